"""Tests of with_trl.py, without TRL: its transfer reward is called as TRL does it."""

import numpy as np
import pytest
import tokenizers
import transformers
from tokenizers import decoders, models, pre_tokenizers
from with_trl import TransferReward, parse_arguments

import rltr

QUESTIONS = ["Q1>+6;?", "Q3>+4;?"]
TEXTS = ["+6=0+1", "+4=0-3=4*2"]  # without an answer: what the receiver writes decides
OTHERS = ["2=2=2=2=2=2=", "3=3=3=3=3=3="]
RECEIVER = rltr.load_lm(str(rltr.TINY_FOLDER / "receiver"))


@pytest.fixture
def asked(monkeypatch):
    """The texts that the receiver is asked to continue; it goes on with a boxed 0."""
    texts = []
    answer = RECEIVER.tokenizer.convert_tokens_to_ids(["\\boxed{", "0", "}"])

    def generate(model, prompts, **settings):
        texts.extend(RECEIVER.tokenizer.decode(prompt) for prompt in prompts)
        return [rltr.Completion(answer, [0.0] * len(answer), True) for _ in prompts]

    monkeypatch.setattr(rltr, "generate", generate)
    return texts


def other_tokenizer():
    """The receiver's characters by other numbers."""
    words = ["<eos>", "<unk>", *"6543210*-+=;>?Q}"]
    core = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>")


@pytest.mark.parametrize("as_messages", [False, True])
@pytest.mark.parametrize("with_ids", [False, True])
@pytest.mark.parametrize("with_tokenizer", [False, True])
def test_trl_calls_the_transfer_reward(as_messages, with_ids, with_tokenizer, asked):
    tokenizer = other_tokenizer() if with_tokenizer else None
    reward = TransferReward(RECEIVER, tokenizer, cuts=2, prompt="{question}")
    prompts, completions = QUESTIONS, TEXTS
    if as_messages:
        prompts = [[{"role": "user", "content": question}] for question in QUESTIONS]
        completions = [[{"role": "assistant", "content": text}] for text in TEXTS]
    columns = {"answer": ["0", "1"], "trainer_state": None}
    if with_ids:  # those of other texts, to see what was cut
        columns["completion_ids"] = [other_tokenizer().encode(text) for text in OTHERS]
    cut = OTHERS if with_ids and with_tokenizer else TEXTS  # without it ids mean nothing
    rewards = reward(prompts=prompts, completions=completions, **columns)
    assert (rewards, reward.__name__, len(asked)) == ([1.0, 0.0], "transfer_reward", 4)
    for number, text in enumerate(asked):  # two cuts of the first, two of the second
        assert cut[number // 2].startswith(text.removeprefix(QUESTIONS[number // 2]))
    reward(prompts=prompts, completions=completions, **columns)
    assert asked[4:] != asked[:4]  # the next call cuts elsewhere


def test_messages_are_asked_as_they_stand_and_texts_within_the_prompt(asked):
    reward = TransferReward(RECEIVER, prompt="Q{question}?")
    turns = zip(["system", "user", "assistant", "user"], "+123", strict=True)
    messages = [{"role": role, "content": content} for role, content in turns]
    reward([messages], [""], ["0"])
    reward(["3"], [""], ["0"])
    assert asked == ["3", "Q3?"]
    with pytest.raises(rltr.UserError, match="user"):
        reward([messages[:1]], [""], ["0"])
    with pytest.raises(rltr.UserError, match="cuts"):
        TransferReward(RECEIVER, cuts=0)


def taus_of_calls(reward, calls, rollouts=1):
    taus = []
    for _ in range(calls):
        reward(QUESTIONS[:1] * rollouts, TEXTS[:1] * rollouts, ["0"] * rollouts)
        taus += [cut.tau for rollout in reward.rollouts for cut in rollout.cuts]
    return taus


def test_tau_is_uniform_and_each_cut_has_its_own(asked):
    taus = taus_of_calls(TransferReward(RECEIVER, cuts=5), 2, rollouts=400)
    assert len(set(taus)) == 4000
    assert np.allclose(np.histogram(taus, bins=8, range=(0, 1))[0], 500, atol=90)
    assert taus[:2000] == taus_of_calls(TransferReward(RECEIVER, cuts=5), 1, rollouts=400)


def test_every_call_in_every_process_has_random_numbers_of_its_own(asked, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    taus = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        taus += taus_of_calls(TransferReward(RECEIVER, cuts=2), calls=4)
    assert len(set(taus)) == 3 * 4 * 2


def test_the_real_receiver_solves_the_built_in_problems_alone():
    problems = rltr.load_problems(rltr.TINY["data"], limit=64)
    reward = TransferReward(RECEIVER, prompt="{question}", max_new_tokens=32)
    rewards = reward([p.question for p in problems], [""] * 64, [p.answer for p in problems])
    assert sum(rewards) > 48  # luck would be 32


def test_without_a_model_the_script_trains_the_built_in_one():
    assert parse_arguments([]).receiver == rltr.TINY["receiver"]
    given = parse_arguments(["--model", "x", "--steps", "500"])
    assert (given.receiver, given.lr, given.prompt) == ("Qwen2.5-1.5B-Instruct", 2e-6, rltr.PROMPT)
