"""Tests of rltr.py and eval.py: tiny random models against numeric oracles. No network, no GPU.

They stand in the order of rltr.py. A test called test_mistake_... is named after something that
other code bases got wrong."""

import ast
import contextlib
import dataclasses
import doctest
import functools
import io
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
import unittest.mock
from pathlib import Path
from unittest import mock

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

import eval as evaluation
import rltr
from eval import maj_at_k, pass_at_k
from rltr import (
    Completion,
    Config,
    Problem,
    Rollout,
    UserError,
    answers_equal,
    extract_answer,
    generate,
    is_correct,
)

HERE = Path(rltr.__file__).parent
sys.path[:0] = [str(HERE / "benchmarks"), str(HERE / "tiny")]
import make  # noqa: E402
import rltr_vs_rlvr as driver  # noqa: E402

torch.set_num_threads(1)  # matrices this small are faster on one
V = 97  # vocabulary of the random models

# ------------------------------------------------------------------------ models, tokenizers, rows


def tiny(kind="qwen2", **changes):
    """A random model with large weights, so that its logits are far from equal."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.3,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | changes)).eval()


WINDOW = {"sliding_window": 8, "use_sliding_window": True, "max_window_layers": 1}
CAPS = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
KINDS = {  # benchmarks/gpu_check.py has more
    "qwen2, tied, sliding": lambda: tiny("qwen2", tie_word_embeddings=True, **WINDOW),
    "qwen3": lambda: tiny("qwen3", head_dim=16),
    "llama": lambda: tiny("llama", num_key_value_heads=4),
    "gemma2": lambda: tiny("gemma2", attn_implementation="eager", **CAPS),  # others may drop caps
    "gpt2": lambda: tiny("gpt2"),
}


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def lm_of(model, tokenizer=None, stop_ids=(0,), vocab_size=V, context=256):
    return rltr.LM(model, tokenizer, stop_ids, vocab_size, context)


def random_prompts(*lengths, high=V):
    source = random.Random(0)
    return [[source.randrange(1, high) for _ in range(n)] for n in lengths]


def row_logits(model, prompt, tokens):
    """[len(tokens), vocabulary], by the model's own forward over one unpadded row."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    return model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float()


@torch.no_grad()
def full_logprobs(model, prompt, tokens, vocab_size=V, temperature=1.0):
    logits = row_logits(model, prompt, tokens)[:, :vocab_size]
    return (logits / temperature).log_softmax(-1).cpu()


def chosen(logprobs, tokens):
    return logprobs.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


def logprobs_are_right(model, prompt, c, vocab_size=V, temperature=1.0):
    want = chosen(full_logprobs(model, prompt, c.tokens, vocab_size, temperature), c.tokens)
    return torch.allclose(torch.tensor(c.logprobs), want, rtol=0, atol=1e-4)


def sampled(model, rewards, noise=0.0, group=3, high=V):
    """Rollouts of ragged lengths with these rewards, log-probs off by `noise`, advantages set."""
    source = random.Random(1)
    prompts = random_prompts(*[3 + 5 * (i // group) % 11 for i in range(0, len(rewards), group)])
    rows = []
    for i, reward in enumerate(rewards):
        prompt = prompts[i // group]
        tokens = [source.randrange(1, high) for _ in range(source.randrange(0, 9))] + [0]
        exact = chosen(full_logprobs(model, prompt, tokens), tokens).tolist()
        logprobs = [x + source.uniform(-noise, noise) for x in exact]
        rows.append(Rollout(None, prompt, tokens, logprobs, True, "", reward=float(reward)))
    rltr.assign_advantages(rows, Config(group=group))
    return rows


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = "{% for m in messages %}[{{ m.content }}]{% endfor %}{{ '->' if add_generation_prompt }}"


def byte_tokenizer(template=CHATML, reverse=False, add_bos=False):
    """A token a byte (ids 0..255, or the other way round), control tokens from 256 on."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    core = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"])
    if add_bos:
        core.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 259)])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<s>", chat_template=template
    )


def byte_ids(tokenizer, text):
    """One id a byte of the UTF-8, without asking the tokenizer to encode."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = "".join(part for part, _ in byte_level.pre_tokenize_str(text))
    return [tokenizer.get_vocab()[letter] for letter in letters]


def rollout(tokenizer, text, end=()):
    return Rollout(Problem("1+6?", "7"), [1], [*byte_ids(tokenizer, text), *end], [], True, text)


# ----------------------------------------------------------------------------------------- training
# What is sampled is what the loss speaks of; prefix and continuation read as one text, whatever the
# two tokenizers are; raw rewards are kept; groups of equal rewards say nothing; log-probs, divisor
# and gradient are those of the formulas, a token at a time.


class KeepGradient:
    """In the optimizer's place: keeps the gradients instead of making steps."""

    def __init__(self, model):
        self.model = model
        self.zero_grad = model.zero_grad
        self.gradients = []

    def step(self, max_norm):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        self.zero_grad()
        return 0.0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mistake_the_loss_uses_another_distribution_than_the_sampler(checkpointing):
    model = tiny("gpt2", resid_pdrop=0.3, attn_pdrop=0.3)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.lm_head.weight.data[60:] *= 5  # rows that the tokenizer does not know
    prompts = random_prompts(3, 8, high=60)
    assert max(generate(model, prompts, max_new_tokens=9, temperature=0)[0].tokens) >= 60
    lm = lm_of(model, byte_tokenizer(), stop_ids=(), vocab_size=60, context=12)
    tasks = [(Problem(str(prompt), ""), prompt) for prompt in prompts]
    config = Config(group=4, temperature=0.7, max_new_tokens=9)
    rollouts = rltr.sample_rollouts(lm, tasks, config, (rltr.ROLLOUT, 0))
    for i, r in enumerate(rollouts):
        assert (r.problem, r.prompt) == tasks[i // 4]
        assert len(r.tokens) == [9, 4][i // 4]  # as many as the context has room for
        assert r.text == rltr.decode(lm.tokenizer, r.tokens)
        assert max(r.tokens) < 60
        assert logprobs_are_right(model, r.prompt, r, 60, 0.7)
        r.reward = float(i % 2)
    rltr.assign_advantages(rollouts, config)
    assert rltr.update(lm, KeepGradient(model), rollouts, config)["logprob_gap_max"] < 1e-4


def test_cut_prefix_floors_and_does_not_count_a_final_stop_token():
    y = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    for tau, length in ((1e-12, 0), (0.0999, 0), (0.1, 1), (0.55, 5), (0.99, 9), (1.0, 10)):
        assert rltr.cut_prefix(y, tau) == rltr.cut_prefix([*y, 2], tau, (1, 2)) == y[:length]
    assert rltr.cut_prefix([5, 2, 6, 2, 2], 1.0, (2,)) == [5, 2, 6, 2]  # one, at the end only
    assert rltr.cut_prefix([], 1.0, (2,)) == rltr.cut_prefix([2], 1.0, (2,)) == []


def test_tau_is_uniform_and_each_cut_has_its_own(monkeypatch):
    def taus(seed=0, step=0):
        rollouts = [rollout(lm.tokenizer, "") for _ in range(100)]
        rltr.cut_rollouts(rollouts, lm, Config(cuts=20, seed=seed), (rltr.CUT, step))
        return [cut.tau for r in rollouts for cut in r.cuts]

    lm = lm_of(None, byte_tokenizer())
    assert np.allclose(np.histogram(taus(), bins=8, range=(0, 1))[0], 250, atol=60)
    assert len({*taus(), *taus(), *taus(seed=1), *taus(step=1)}) == 3 * 2000
    monkeypatch.setattr(rltr, "rng", lambda *keys: types.SimpleNamespace(random=np.zeros))
    assert set(taus()) == {1.0}  # the lowest random number is 0: tau lies in (0, 1]


@pytest.fixture
def receiver_says(monkeypatch):
    """Puts in the place of `generate` what gives these tokens to every prompt."""

    def say(tokens):
        def answer(model, prompts, **settings):
            return [Completion(list(tokens), [0.0] * len(tokens), True) for _ in prompts]

        monkeypatch.setattr(rltr, "generate", unittest.mock.Mock(side_effect=answer))
        return rltr.generate

    return say


def transfer(rollouts, generator, receiver, **settings):
    """Steps 3 to 5."""
    config = Config(prompt="{question}", **settings)
    rltr.cut_rollouts(rollouts, generator, config, (rltr.CUT, 0))
    rltr.continue_cuts(rollouts, generator, receiver, config, (rltr.CONTINUATION, 0))
    rltr.score_transfer(rollouts)


def test_the_same_tokenizer_gets_the_prefix_as_token_ids_after_its_own_template(receiver_says):
    mine = byte_tokenizer()
    yours = byte_tokenizer(BRACKETS)
    asked = receiver_says(byte_ids(yours, "7}"))
    r = rollout(mine, "aéé 1: \\boxed{7}, or.", end=[258])
    r.tokens[1:1] = [257]  # a control token in the middle: stays one
    sizes = {"cuts": 40, "receiver_margin": 8, "max_new_tokens": 20}
    transfer([r], lm_of(None, mine, (258,)), lm_of(None, yours, (256,), 260), **sizes)
    (_, prompts), settings = asked.call_args
    for cut, prompt, limit in zip(r.cuts, prompts, settings["max_new_tokens"], strict=True):
        length = int(cut.tau * (len(r.tokens) - 1))  # the stop token is not counted
        assert prompt == byte_ids(yours, "[1+6?]->") + r.tokens[:length]
        assert cut.prefix_length == length
        assert limit == max(1, 20 - length + 8)
        whole = rltr.decode(mine, r.tokens[:length] + byte_ids(yours, "7}"))
        assert cut.prefix + cut.continuation == whole  # with the character that the cut had split
        assert cut.correct == rltr.is_correct(whole, "7")
        assert cut.leaked == ("\\boxed{7}" in cut.prefix)
    assert {(c.correct, c.leaked) for c in r.cuts} == {(True, False), (False, False), (True, True)}
    assert 0 in {c.prefix_length for c in r.cuts}  # legal: the receiver solves alone
    assert r.rewards["transfer"] == np.mean([cut.correct for cut in r.cuts])
    assert (settings["stop_ids"], settings["vocab_size"]) == ((256,), 260)


def test_a_different_tokenizer_gets_the_prefix_as_text(receiver_says):
    mine = byte_tokenizer()
    yours = byte_tokenizer("<s>" + BRACKETS, reverse=True, add_bos=True)
    text = "é<|im_end|>ü<s>∑"  # spelled out: not control tokens
    r = rollout(mine, text, end=[258])
    asked = receiver_says(byte_ids(yours, "\\boxed{7}é")[:-1])
    transfer([r], lm_of(None, mine, (258,)), lm_of(None, yours), cuts=60)
    split = 0
    for cut, prompt in zip(r.cuts, asked.call_args.args[1], strict=True):
        raw = text.encode()[: int(cut.tau * len(text.encode()))]
        split += raw.decode(errors="ignore") != raw.decode(errors="replace")
        assert cut.prefix == raw.decode(errors="ignore")  # no half characters
        assert prompt == [259] + byte_ids(yours, "[1+6?]->" + cut.prefix)  # and BOS once
        assert (cut.continuation, cut.correct) == ("\\boxed{7}", True)
    assert split > 5


def word_tokenizer():
    """Whole words, the space before a word a part of it, as SentencePiece makes them."""
    words = ["<unk>", "</s>", "▁a", "▁green", "▁gr", "een", "▁Question:", "▁1+6?\nAnswer:"]
    vocabulary = {word: i for i, word in enumerate(words)}
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("same_tokenizer", [True, False])
@pytest.mark.parametrize("words", [["▁green"], ["▁gr", "een"]])
def test_mistake_the_space_at_the_seam_is_lost(words, same_tokenizer, receiver_says):
    yours = word_tokenizer()
    ids = yours.get_vocab()
    assert yours.decode([ids["▁green"]]) == "green"  # the first space of a text is nobody's
    mine = yours if same_tokenizer else byte_tokenizer()
    tokens = [ids["▁a"]] if same_tokenizer else byte_ids(mine, "a")
    asked = receiver_says([ids[word] for word in words])
    r = Rollout(Problem("1+6?", "7"), [1], tokens, [], True, "a")
    generator = lm_of(None, mine)
    for tau in (1.0, 0.5):  # after "a", and before it
        r.cuts.append(rltr.cut_at(r, generator, tau))
    config = Config(prompt="{question}", cuts=2)
    rltr.continue_cuts([r], generator, lm_of(None, yours), config, (rltr.CONTINUATION, 0))
    assert asked.call_args.args[1][0][-1] == ids["▁a"]
    assert [(cut.prefix, cut.continuation) for cut in r.cuts] == [("a", " green"), ("", "green")]


def test_a_prefix_that_overflows_the_receiver_is_counted_and_scores_0(receiver_says):
    tokenizer = byte_tokenizer(BRACKETS)
    r = rollout(tokenizer, "\\boxed{7}" + "x" * 41)
    asked = receiver_says(byte_ids(tokenizer, "\\boxed{7}"))
    receiver = lm_of(None, tokenizer, context=8 + 30)  # the question takes 8
    transfer([r], lm_of(None, tokenizer), receiver, cuts=300, max_new_tokens=50)
    for cut in r.cuts:
        assert cut.overflow == (cut.prefix_length >= 30) == (not cut.correct)
    assert {c.prefix_length for c in r.cuts} >= {0, 29, 30, 49}
    room = [30 - cut.prefix_length for cut in r.cuts if not cut.overflow]
    assert asked.call_args.kwargs["max_new_tokens"] == room


def test_mistake_the_receiver_shares_the_random_numbers_of_the_rollouts():
    """It then writes the same text as the generator, where it is the same model."""

    def continuations(*key):
        for r in rollouts:
            r.cuts = [rltr.cut_at(r, lm, 1e-9)]  # it begins where they began
        rltr.continue_cuts(rollouts, lm, lm, config, key)
        return [r.cuts[0].continuation for r in rollouts]

    lm = lm_of(tiny(vocab_size=256), byte_tokenizer(BRACKETS), vocab_size=256)
    config = Config(group=8, prompt="{question}", max_new_tokens=8, receiver_margin=0)
    tasks = rltr.encode_problems(lm, [Problem("1+6?", "7")], config.prompt, 8)
    rollouts = rltr.sample_rollouts(lm, tasks, config, (rltr.ROLLOUT, 0))
    other = rltr.sample_rollouts(lm, tasks, dataclasses.replace(config, seed=1), (rltr.ROLLOUT, 0))
    texts = [r.text for r in rollouts]
    assert continuations(rltr.ROLLOUT, 0) == texts  # so that would be seen
    ours = continuations(rltr.CONTINUATION, 0)
    assert ours == continuations(rltr.CONTINUATION, 0)  # a function of the key
    all_texts = (texts, ours, continuations(rltr.CONTINUATION, 1), [r.text for r in other])
    assert all(len(set(of_one)) == 4 for of_one in zip(*all_texts, strict=True))


def test_rewards_have_their_weights_by_name_also_in_a_fork_and_the_raw_ones_are_kept():
    @dataclasses.dataclass
    class Fork(Config):
        length_weight: float = 0.5

    texts = ["\\boxed{7}", "\\boxed{8}", "7", "\\boxed{7}"]
    rows = [rollout(byte_tokenizer(), text) for text in texts]
    rows[3].finished = False
    rltr.score_answers(rows)
    for r, share in zip(rows, (0.25, 0.5, 1.0, 0.0), strict=True):
        r.rewards |= {"transfer": share, "length": 6.0}
    rltr.combine_rewards(rows, Fork(answer_weight=2.0, transfer_weight=4.0, format_weight=8.0))
    assert [r.reward for r in rows] == [2 + 1 + 8 + 3, 2 + 8 + 3, 4 + 3, 2 + 3]
    raw = [list(r.rewards.values()) for r in rows]  # answer, format, transfer, length
    assert raw == [[1, 1, 0.25, 6], [0, 1, 0.5, 6], [0, 0, 1, 6], [1, 0, 0, 6]]


def test_advantages_against_numpy():
    rewards = np.random.default_rng(0).choice([0.0, 0.1, 1.0, 1.1, 2.1], (50, 8))
    centred = rewards - rewards.mean(1, keepdims=True)
    want = centred / (rewards.std(1, keepdims=True) + 1e-6)
    for given in (rewards, rewards.tolist(), torch.tensor(rewards)):
        assert np.allclose(rltr.group_advantages(given), want, rtol=0, atol=1e-12)
    assert np.allclose(rltr.group_advantages(rewards, normalize_std=False), centred, atol=1e-12)


@pytest.mark.parametrize("normalize", [True, False])
def test_mistake_twelve_rewards_of_1_point_1_have_a_std_and_so_an_advantage(normalize):
    for value in (1.1, 0.1, 0.3, 1e6 / 3):
        for dtype in (torch.float32, torch.float64):
            rewards = torch.full((2, 12), value, dtype=dtype)
            assert (rltr.group_advantages(rewards, normalize) == 0).all()


@pytest.mark.parametrize("name", KINDS)
def test_mistake_logits_of_all_tokens_at_once_and_yet_the_chunks_are_exact(name):
    model = KINDS[name]()
    parameters = list(model.parameters())
    rows = sampled(model, [0, 1, 0, 1], group=2, high=90)
    logits = [row_logits(model, r.prompt, r.tokens)[:, :90] / 0.7 for r in rows]
    targets = [token for r in rows for token in r.tokens]
    want = chosen(torch.cat(logits).log_softmax(-1), targets)
    weights = torch.arange(len(want)) % 5 - 2.0
    gradients = torch.autograd.grad((want * weights).sum(), parameters)
    sizes = []
    head = model.get_output_embeddings()
    head.register_forward_hook(lambda module, inputs, out: sizes.append(out.numel() // V))
    for chunk in (1, 7, 0):
        sizes.clear()
        got, _ = rltr.completion_logprobs(lm_of(model, vocab_size=90), rows, 0.7, chunk)
        assert sum(sizes) == len(want)
        assert max(sizes) <= (chunk or len(want))
        assert torch.allclose(got, want, atol=1e-5)
        ours = torch.autograd.grad((got * weights).sum(), parameters)
        for a, b in zip(ours, gradients, strict=True):
            assert torch.allclose(a, b, rtol=0, atol=1e-4 * b.abs().max().item())


def naive_update(model, rollouts, config, vocab_size):
    """Step 8 by its formulas, a token at a time: the metrics, and the gradient of the loss."""
    objective = 0.0
    entropies = []
    log_rhos = []
    for i, r in enumerate(rollouts):
        group = rollouts[i // config.group * config.group :][: config.group]
        rewards = np.array([other.reward for other in group])
        if rewards.min() == rewards.max():
            continue  # a dead group
        a = (r.reward - rewards.mean()) / (rewards.std() + 1e-6)
        logits = row_logits(model, r.prompt, r.tokens)[:, :vocab_size] / config.temperature
        for t, token in enumerate(r.tokens):
            p = logits[t].softmax(-1)
            rho = p[token] / np.exp(r.logprobs[t])
            log_rhos.append(rho.log().item())
            rho = min(rho, 1 + config.clip_high) if a > 0 else max(rho, 1 - config.clip_low)
            objective = objective + rho * a
            entropies.append(-(p * p.log()).sum().item())
    gradient = torch.autograd.grad(-objective / len(log_rhos), list(model.parameters()))
    rhos = np.exp(log_rhos)
    outside = (rhos < 1 - config.clip_low) | (rhos > 1 + config.clip_high)
    metrics = {
        "objective": objective.item() / len(rhos),
        "entropy": np.mean(entropies),
        "logprob_gap_mean": np.mean(np.abs(log_rhos)),
        "logprob_gap_max": np.max(np.abs(log_rhos)),
        "clip_share": np.mean(outside),
        "approx_kl": np.mean(rhos - 1 - np.log(rhos)),
    }
    return metrics, torch.cat([g.flatten() for g in gradient])


def test_mistake_divisor_or_metrics_are_those_of_one_micro_batch_or_of_dead_groups():
    lm = lm_of(tiny(), vocab_size=90)
    # Groups of three: the second and the fourth are dead.
    rewards = [1, 0, 0] + [0.1, 0.1, 0.1] + [2.1, 1.1, 0.1] + [0, 0, 0] + [0, 1, 1]
    rows = sampled(lm.model, rewards, noise=0.6, high=90)
    longest = max(len(r.prompt) + len(r.tokens) for r in rows if r.advantage)
    config = Config(group=3, temperature=0.9)
    want, whole = naive_update(lm.model, rows, config, 90)
    assert want["logprob_gap_max"] > 0.5  # so that both clips are at work
    assert 0.1 < want["clip_share"] < 0.9
    first = naive_update(lm.model, rows[:3] + rows[12:], config, 90)[1]
    second = naive_update(lm.model, rows[6:9], config, 90)[1]
    for settings, gradients in (
        ({"token_budget": 1}, [whole]),
        ({"token_budget": 2 * longest}, [whole]),
        ({"token_budget": 4 * longest}, [whole]),
        ({}, [whole]),
        ({"epochs": 2, "minibatches": 2}, [first, second, first, second]),  # of the live groups
    ):
        optimizer = KeepGradient(lm.model)  # it makes no step: the policy stays the same
        metrics = rltr.update(lm, optimizer, rows, dataclasses.replace(config, **settings))
        assert {key: metrics[key] for key in want} == pytest.approx(want, rel=1e-4)
        for got, gradient in zip(optimizer.gradients, gradients, strict=True):
            assert (got - gradient).abs().max() < 1e-5 * gradient.abs().max()


def test_mistake_the_stop_token_is_not_trained_because_it_is_the_pad_token():
    lm = lm_of(tiny())  # 0 stops, and pads
    rows = []
    for tokens, advantage in (([7, 0], 1.0), ([8], -1.0)):
        logprobs = chosen(full_logprobs(lm.model, [5, 6], tokens), tokens).tolist()
        rows.append(Rollout(None, [5, 6], tokens, logprobs, True, "", advantage=advantage))
    before = full_logprobs(lm.model, [5, 6, 7], [0])[0, 0]
    metrics = rltr.update(lm, rltr.MasterAdamW(lm.model, 1e-3), rows, Config(group=2))
    assert metrics["objective"] == pytest.approx((2 - 1) / 3)  # two tokens up, one down
    assert full_logprobs(lm.model, [5, 6, 7], [0])[0, 0] > before + 0.01


def test_dead_groups_change_nothing():
    lm = lm_of(tiny())
    optimizer = rltr.MasterAdamW(lm.model, 1e-2, weight_decay=0.5)
    before = flat(lm.model)
    dead = sampled(lm.model, [1, 1, 1, 0.1, 0.1, 0.1])
    assert rltr.update(lm, optimizer, dead, Config(group=3)) == {"skipped": 0}
    assert torch.equal(flat(lm.model), before)
    assert not optimizer.adam.state


def test_mistake_memory_runs_out_after_hours_because_a_longer_batch_comes_late():
    rows = sampled(tiny(), [0, 1] * 20, group=2)
    sizes = {id(r): len(r.prompt) + len(r.tokens) for r in rows}
    for budget in (1, 20, 45, 100, 10**6):
        batches = [[id(r) for r in batch] for batch in rltr.micro_batches(rows, budget)]
        assert sorted(sum(batches, [])) == sorted(sizes)
        assert all(len(b) * max(sizes[i] for i in b) <= budget or len(b) == 1 for b in batches)
        assert [sizes[i] for b in batches for i in b] == sorted(sizes.values(), reverse=True)


# ---------------------------------------------------------------------------------------- optimizer
# fp32 masters of bf16 weights, and the search for what fits the memory.


def test_mistake_bf16_weights_do_not_move_at_lr_1e_6(tmp_path, monkeypatch):
    torch.manual_seed(0)
    direction = torch.randn(16, 16).bfloat16()
    start = torch.rand(16, 16).bfloat16() / 64 + 1 / 64

    def train(layer, optimizer, times=100):
        for _ in range(times):
            layer[0].backward(direction.to(layer[0].dtype))
            optimizer.step(1e9)
        return layer[0].detach().clone()

    bf16 = torch.nn.ParameterList([start.clone()])
    fp32 = torch.nn.ParameterList([start.float()])
    ours = rltr.MasterAdamW(bf16, 1e-6, offload=True)
    moved = train(bf16, ours)
    assert torch.equal(moved, train(fp32, rltr.MasterAdamW(fp32, 1e-6)).bfloat16())
    assert (moved != start).float().mean() > 0.5
    again = torch.nn.ParameterList([moved.clone()])  # the masters outlive a checkpoint
    resumed = rltr.MasterAdamW(again, 1e-6)
    config = Config(model="m", out=str(tmp_path / "run"), steps=1)
    monkeypatch.setattr(rltr, "save_lm", lambda lm, folder: None)
    for resume, optimizer in ((False, ours), (True, resumed)):
        with contextlib.closing(rltr.Run(config, resume)) as run:
            run.begin(optimizer)
            run.save_if_due(None, optimizer, 1)
    for _ in range(60):
        assert torch.equal(train(again, resumed, 1), train(bf16, ours, 1))
    for small in (1.0, 2.0**-10):  # micro-batches add up in fp32: bf16 has 8 bits
        again[0].backward(torch.full((16, 16), small, dtype=torch.bfloat16))
    assert resumed.step(1e9) == pytest.approx(16 * (1 + 2**-10), rel=1e-6)


def test_the_gradient_is_clipped_to_the_norm_and_cleared():
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer = rltr.MasterAdamW(layer, 1e-3)
    for scale in (1.0, 100.0):
        layer.weight.backward(torch.tensor([[3.0, 4.0]]) * scale)
        assert optimizer.step(1.0) == pytest.approx(5 * scale)
    moments = optimizer.adam.state[optimizer.masters[0]]
    mean = moments["exp_avg"] / (1 - 0.9**2)  # of both gradients
    assert torch.allclose(mean, torch.tensor([[0.6, 0.8]]), atol=1e-5)


def test_out_of_memory_halves_the_token_budget_and_leaves_no_gradient_behind(monkeypatch):
    def with_little_memory(lm, rows, config):
        figures = add_gradient(lm, rows, config)
        if config.token_budget > most:
            raise torch.OutOfMemoryError
        return figures

    add_gradient = rltr.add_gradient
    monkeypatch.setattr(rltr, "add_gradient", with_little_memory)
    lm = lm_of(tiny())
    rows = sampled(lm.model, [1, 0, 0, 0, 1, 1])
    optimizer = KeepGradient(lm.model)
    config = Config(group=3, token_budget=120)
    for most in (120, 30):
        rltr.update(lm, optimizer, rows, config)
        assert config.token_budget == most
    unlimited, limited = optimizer.gradients
    assert (limited - unlimited).abs().max() < 1e-5 * unlimited.abs().max()
    most = 0
    with pytest.raises(torch.OutOfMemoryError):
        rltr.update(lm, optimizer, rows, config)


# --------------------------------------------------------------------------------------- generation
# The sampler against transformers' own generate and a full forward: exact, in any company of rows.


@pytest.mark.parametrize("name", KINDS)
def test_greedy_is_that_of_transformers_and_logprobs_are_those_of_a_full_forward(name):
    """Also of a short row beside a long one, which may get wrong positions or see padding."""
    model = KINDS[name]()
    rltr.check_model(lm_of(model))
    prompts = random_prompts(5, 1, 17, 30, 2)
    expected = []
    for prompt in prompts:
        ids = torch.tensor([prompt])
        out = model.generate(ids, attention_mask=ids**0, max_new_tokens=16, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    stop = expected[2][9]  # so that some rows stop early
    expected = [e[: e.index(stop) + 1] if stop in e else e for e in expected]
    limits = {"samples": 2, "max_new_tokens": 16, "stop_ids": (stop,)}
    for max_rows in (None, 2, 5):
        got = generate(model, prompts, temperature=0, max_rows=max_rows, **limits)
        assert [c.tokens for c in got] == [tokens for tokens in expected for _ in range(2)]
        assert all(logprobs_are_right(model, prompts[i // 2], c) for i, c in enumerate(got))


def test_sampling_follows_the_softmax():
    model = tiny(initializer_range=0.15)
    [prompt] = random_prompts(5)
    n = 4000
    k = 30
    settings = {"max_new_tokens": 2, "temperature": 0.8, "vocab_size": k, "seed": 1}
    seen = np.zeros((k, k))
    for c in generate(model, [prompt], samples=n, **settings):
        seen[tuple(c.tokens)] += 1
    expected = np.zeros((k, k))
    for t in range(k):
        first, second = full_logprobs(model, prompt, [t, 0], k, 0.8)
        expected[t] = n * (first[t] + second).exp()
    often = expected >= 5  # the other pairs make one cell
    seen = np.append(seen[often], seen[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    chi2 = ((seen - expected) ** 2 / expected).sum()
    assert len(seen) > 100
    assert abs(chi2 - len(seen)) < 4 * (2 * len(seen)) ** 0.5


def test_sampling_never_takes_a_token_of_probability_zero(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    tokens, logprobs = rltr.sample_tokens(logits, 1.0, torch.tensor([1e-45, 0.4999, 0.5001, 1.0]))
    assert tokens.tolist() == [1, 1, 3, 3]
    assert torch.allclose(logprobs, torch.tensor(0.5).log())
    # The lowest random number is 0, so u, which is never 0, is 1.
    monkeypatch.setattr(rltr, "rng", lambda *keys: types.SimpleNamespace(random=np.zeros))
    assert min(generate(tiny(), [[5]], max_new_tokens=9)[0].tokens) > 0


def test_texts_do_not_depend_on_max_rows_and_stop_tokens_end_them():
    model = tiny()
    prompts = random_prompts(4, 11, 4, 7)
    stops = range(3, 9)
    limits = [15, 15, 6, 12]  # each prompt has its own

    def texts(**settings):
        settings |= {"max_new_tokens": limits, "stop_ids": stops}
        done = generate(model, prompts, samples=3, **settings)
        for i, c in enumerate(done):
            assert logprobs_are_right(model, prompts[i // 3], c)
            assert not set(c.tokens[:-1]) & set(stops)
            assert c.finished == (c.tokens[-1] in stops)  # it belongs to the text
            assert c.finished or len(c.tokens) == limits[i // 3]
        return [c.tokens for c in done]

    whole = texts(seed=5)
    assert len(set(map(tuple, whole))) == 12  # the samples of a prompt differ
    assert len(set(map(len, whole))) > 4  # ragged: rows leave, others take their place
    assert texts(seed=6) != whole
    assert texts(seed=(5, 1)) != whole
    for max_rows in (1, 2, 5, 7):
        assert texts(seed=5, max_rows=max_rows) == whole


def test_what_cannot_be_generated_is_refused():
    assert generate(tiny(), [], max_new_tokens=3) == []
    for prompts, limit in (([[]], 3), ([[1]], 0)):
        with pytest.raises(UserError):
            generate(tiny(), prompts, max_new_tokens=limit)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_mistake_train_mode_or_gradient_checkpointing_switch_the_cache_off():
    model = tiny("gpt2", resid_pdrop=0.5)
    limits = {"samples": 8, "max_new_tokens": 30, "stop_ids": range(1, 30)}
    want = generate(model, random_prompts(9, 6, 4), **limits)
    attention = model.config._attn_implementation
    model.gradient_checkpointing_enable()
    model.train()
    shapes = []  # (rows, tokens) of whatever goes through the model
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: shapes.append(i[0].shape))
    assert generate(model, random_prompts(9, 6, 4), **limits) == want
    assert sum(rows for rows, length in shapes if length > 1) == 3  # each prompt once
    lengths = [len(c.tokens) for c in want]
    assert max(lengths) > 3 * np.mean(lengths)  # what a batch with pads would cost
    assert sum(rows for rows, length in shapes if length == 1) <= 1.2 * sum(lengths)
    assert torch.is_grad_enabled()
    assert model.config._attn_implementation == attention


@pytest.fixture
def graphs(monkeypatch):
    """What the sampler does on CUDA, on the CPU: recording a graph keeps the arguments of a step,
    and the replay of the graph is that step. With `error` recording fails."""
    fake = types.SimpleNamespace(recording=None, captured=[], replays=0, error=None, streams=[])
    real_step = rltr.Sampler.step

    def step(sampler, slots, length):
        assert sampler.active <= slots <= sampler.capacity
        assert sampler.longest <= length <= sampler.length
        if fake.recording is None:
            real_step(sampler, slots, length)
        else:
            fake.recording.step = (sampler, slots, length)
            fake.recording.addresses = addresses(sampler)

    class Graph:
        def pool(self):
            return "the pool"

        def replay(self):
            assert addresses(self.step[0]) == self.addresses  # nothing is in a tensor's place
            fake.replays += 1
            step(*self.step)

    @contextlib.contextmanager
    def capture(graph, pool=None):
        assert pool == ("the pool" if fake.captured else None)
        fake.recording = graph
        yield
        fake.recording = None
        if fake.error:
            raise fake.error  # and the stream stays the wrong one
        fake.captured.append(graph.step[1:])

    monkeypatch.setattr(rltr, "GRAPH_DEVICES", {"cpu"})
    monkeypatch.setattr(rltr.Sampler, "step", step)
    monkeypatch.setattr(torch.cuda, "CUDAGraph", Graph)
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "default_stream", lambda: "the usual stream")
    monkeypatch.setattr(torch.cuda, "set_stream", fake.streams.append)
    return fake


def addresses(sampler):
    state = [x for x in vars(sampler).values() if isinstance(x, torch.Tensor)]
    cache = [x for layer in sampler.cache.values() for x in layer]
    return [tensor.data_ptr() for tensor in state + cache]


@pytest.mark.parametrize("name, temperature", [("qwen2, tied, sliding", 1.0), ("gemma2", 0.0)])
def test_cuda_graphs_give_the_tokens_of_plain_steps(name, temperature, graphs, capsys):
    def drawn(max_rows=None):
        graphs.captured.clear()
        graphs.replays = 0
        settings = {"samples": 4, "max_new_tokens": 70, "stop_ids": range(1, 12)}
        settings |= {"temperature": temperature, "max_rows": max_rows}
        done = generate(model, random_prompts(37, 3, 60), **settings)
        return [c.tokens for c in done], [x for c in done for x in c.logprobs]

    model = KINDS[name]()
    with_graphs = []
    for max_rows in (None, 5):
        with_graphs.append(drawn(max_rows))
        assert len(graphs.captured) == len(set(graphs.captured))  # once a bucket
        assert graphs.replays > 15
    graphs.error = RuntimeError("not permitted")  # then plain steps do, and it is said once
    drawn()
    tokens, logprobs = drawn()
    assert graphs.replays == 0
    assert capsys.readouterr().err.count("not permitted") == 1
    assert graphs.streams == ["the usual stream"]
    for got in with_graphs:
        assert got == (tokens, pytest.approx(logprobs, abs=1e-4))


# --------------------------------------------------------------------------------- models, problems
# What would go wrong later is refused at loading, or put right: attention of another kind, stop
# tokens, BOS, templates, weights, tokens without a row. Problems are the same from every source.


def saved(folder, model, tokenizer=None):
    rltr.save_lm(lm_of(model, tokenizer or byte_tokenizer()), folder)
    return str(folder)


# Positions that all change beyond some length: what is in the cache is wrong from there on.
LOCAL = {"rope_type": "default", "rope_theta": 1e4}
LONG = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 32}
LONG |= {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8}
NOT_SERVED = {
    "falcon": {"alibi": True},
    "mamba": {},
    "gpt_oss": {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "cohere": {"logit_scale": 0.25},
    "llama": {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}},
    "gemma3_text": CAPS | {"rope_parameters": {"sliding_attention": LOCAL, "full_attention": LONG}},
}


@pytest.mark.parametrize("kind", NOT_SERVED)
def test_attention_that_we_would_compute_wrongly_is_refused(kind):
    with pytest.raises(UserError, match=f"{kind} is not served"):
        rltr.check_model(lm_of(tiny(kind, **NOT_SERVED[kind])))


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_failing_device_is_not_taken_for_a_model_that_is_not_served(error, monkeypatch):
    def fail(*_, **__):
        raise error("no memory")

    monkeypatch.setattr(rltr, "generate", fail)
    with pytest.raises(error):
        rltr.check_model(lm_of(tiny()))


def test_frozen_weights_as_under_an_adapter_are_refused(tmp_path, monkeypatch):
    model = tiny(vocab_size=260)
    name = saved(tmp_path, model)
    model.lm_head.weight.requires_grad_(False)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: (model, {}))
    with pytest.raises(UserError, match="adapter|frozen"):
        rltr.load_lm(name)


def test_rows_without_a_token_and_tokens_without_a_row_are_never_sampled(tmp_path):
    for rows, served in ((300, 260), (259, 259)):  # the tokenizer has 260 tokens
        lm = rltr.load_lm(saved(tmp_path / str(rows), tiny(vocab_size=rows)))
        assert (lm.vocab_size, lm.context, lm.stop_ids) == (served, 256, (256, 258))


def test_stop_tokens_come_from_tokenizer_generation_config_and_chat_template():
    model = tiny()  # as in Qwen2.5 base: <|im_end|> is not eos
    for configured, more in ((None, ()), (5, (5,)), ([5, 6], (5, 6))):
        model.generation_config.eos_token_id = configured
        assert rltr.find_stop_ids(model, byte_tokenizer()) == (*more, 256, 258)


def test_mistake_without_a_chat_template_the_model_never_stops():
    tokenizer = byte_tokenizer(None)  # a plain prompt, and still a stop token
    prompt = rltr.encode_prompt(lm_of(None, tokenizer), "x {y}", "Do {question}!")
    assert tokenizer.decode(prompt) == "Question: Do x {y}!\nAnswer:"
    assert rltr.find_stop_ids(tiny(), tokenizer) == (256,)


@pytest.mark.parametrize("written, added, count", [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)])
def test_bos_once_or_never_whoever_writes_it_and_no_thinking(written, added, count):
    template = "<s>" * written + BRACKETS + "{% if enable_thinking is false %}<no think>{% endif %}"
    tokenizer = byte_tokenizer(template, add_bos=bool(added))
    text = tokenizer.decode(rltr.encode_prompt(lm_of(None, tokenizer), "2 + 2?"))
    asked = "2 + 2?\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert text == "<s>" * count + f"[{asked}]-><no think>"


def test_mistake_the_date_in_a_chat_template_makes_a_resumed_run_another_one():
    dated = byte_tokenizer("({{ strftime_now('%d %B %Y') }})" + BRACKETS)
    text = dated.decode(rltr.encode_prompt(lm_of(None, dated), "1 + 1?", "{question}"))
    assert text.endswith(")[1 + 1?]->")
    assert time.strftime("%d %B %Y") not in text


def test_decode_drops_control_tokens_and_an_incomplete_last_character():
    tokenizer = byte_tokenizer()
    ids = byte_ids(tokenizer, "a  ,é")
    assert rltr.decode(tokenizer, [257, *ids, 256]) == "a  ,é"
    assert rltr.decode(tokenizer, ids[:-1]) == "a  ,"


def test_the_same_problems_from_every_kind_of_file(tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    rows = [
        {"problem": '1 + 1,\n"quoted"?', "solution": "so \\boxed{1} or \\boxed{\\frac{4}{2}}"},
        {"problem": "é?", "solution": "#### 1,000"},
    ]
    table = datasets.Dataset.from_list(rows)
    table.to_json(str(tmp_path / "data.jsonl"))
    table.to_csv(str(tmp_path / "data.csv"))
    table.to_parquet(str(tmp_path / "data.parquet"))
    (tmp_path / "data.json").write_text(json.dumps(rows, indent=1))
    for kind in ("jsonl", "json", "csv", "parquet"):
        first, second = rltr.load_problems(str(tmp_path / f"data.{kind}"))
        assert first == Problem('1 + 1,\n"quoted"?', "\\frac{4}{2}"), kind  # the last box, whole
        assert (second.question, second.answer.replace(",", "")) == ("é?", "1000")
    assert rltr.load_problems(str(tmp_path / "data.jsonl"), limit=1) == [first]


def test_columns_and_ways_to_write_the_gold_answer(tmp_path):
    path = tmp_path / "data.jsonl"
    for row in (
        {"question": "q", "answer": "18"},
        {"problem": "q", "answer": "6 * 3 = 18\n#### 18"},
        {"id": 7, "prompt": "q", "answer": 18},
        {"question": "q", "solution": "Thus $\\boxed{18}$."},
    ):
        path.write_text(json.dumps(row))
        assert rltr.load_problems(str(path)) == [Problem("q", "18")]


def test_hub_data_training_split_or_the_only_one(monkeypatch):
    def load_dataset(name, configuration=None):
        splits = ["test"] if name.endswith("500") else ["test", "train"]
        question = f"{name} {configuration}"
        return {split: [{"problem": question, "answer": split}] for split in splits}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    for source, settings, question, answer in (
        ("gsm8k", {}, "openai/gsm8k main", "train"),
        ("gsm8k", {"split": "test"}, "openai/gsm8k main", "test"),
        ("gsm8k", {"prefer": "test"}, "openai/gsm8k main", "test"),
        ("math500", {}, "HuggingFaceH4/MATH-500 None", "test"),
        ("openai/gsm8k:main", {}, "openai/gsm8k main", "train"),
    ):
        assert rltr.load_problems(source, **settings) == [Problem(question, answer)]
    with pytest.raises(UserError, match="dev"):
        rltr.load_problems("gsm8k", "dev")


def test_problems_of_a_step_are_a_function_of_seed_and_step_and_every_epoch_is_a_permutation():
    steps = [rltr.draw_problems(list(range(10)), 4, seed=3, step=s) for s in range(10)]
    assert steps[7] == rltr.draw_problems(list(range(10)), 4, seed=3, step=7)
    drawn = sum(steps, [])
    epochs = [drawn[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert drawn != sum((rltr.draw_problems(list(range(10)), 4, 4, s) for s in range(10)), [])
    assert sorted(rltr.draw_problems([1, 2], 5, 0, 0)) in ([1, 1, 1, 2, 2], [1, 1, 2, 2, 2])


# ------------------------------------------------------------------------------------------ answers

EQUAL = {}
EQUAL["numbers"] = r"""
\arcsin 1 == \frac{\pi}{2} | 5! == 120 | \frac{10!}{2} == 1814400 | ７ == 7 |
-\frac{7}{9} == \frac{-7}{9} | 2\frac{7}{8} == 23/8 | 2 7/8 == 2.875 | \sqrt{27} == 3\sqrt3 |
\sqrt[3]{24} == 2\sqrt[3]{3} | 3\times10^{4} == 3e4 | 2.5e-3 == 0.0025 | (2+i)^2 == 3+4i |
\binom{5}{2} == 10 | \frac 59 == 5/9 | 025 == 25 | 2 \cdot 3! == 12"""
EQUAL["units and words"] = r"""
x = 5 \text{ cm} == 5 | \text{Area} = 24 \text{ cm}^2 == 24 | \angle ABC = 60^\circ == 60 |
5 \text{ miles per hour} == 5 \text{ mile/hour} | 3 \, \text{m}, 4 \, \text{m} == 4,3 |
\lvert x-3 \rvert == |3-x| |
\left[\begin{matrix}1&2\end{matrix}\right] == \begin{pmatrix}1&2\end{pmatrix} | 35\% == 35 |
\$7.50 == 7.50 dollars | \pm 6 == 6,-6 | 1\pm\sqrt2 == 1-\sqrt2,1+\sqrt2 |
\begin{pmatrix} 1/2 \\ 3 \end{pmatrix} == \begin{bmatrix} 0.5 \\ 3 \end{bmatrix} |
\left[\begin{array}{cc}1&2\\3&4\end{array}\right] == \begin{pmatrix}1&2\\3&4\end{pmatrix} |
\text{(D)} == D | \text{3:15 p.m.} == 3:15 pm | 3:15 \text{ p.m.} == 3:15 pm |
x=2 \text{ or } x=7 == 7, 2 | x=\pm 2 == \{-2,2\} |
x<1 \text{ or } x>4 == (-\infty,1)\cup(4,\infty) | yes == Yes | NO == \text{no} |
5\text{ cm}^{2} == 5 cm^2 | \frac{1}{2} \text{ or } 3 == 3, 0.5 | \sin 30^\circ == 0.5"""
EQUAL["expressions"] = r"""
sin 2x == 2 sin x cos x | (x-3)^2 == x^2-6x+9 | |x-3| == |3-x| | \sqrt{x^2} == |x| |
\sin 2x == 2 \sin x \cos x | \tan t == \frac{\sin t}{\cos t} | \mathrm{e}^x == e^x"""
EQUAL["lists, intervals, matrices and relations"] = r"""
4 + 9 = 13 == 13 | f^{-1}(x) = x-1 == x-1 | {\{4,5\}} == \{4,5\} | 12{,}500 == 12500 |
12\,500 == 12500 | \left(\frac12, 3\right) == (0.5,3) | \{4,5\} == \{5,4\} | \{4,5\} == 5, 4 |
\emptyset == \varnothing | [1,4)\cup(7,\infty) == (7,\infty)\cup[1,4) |
AB = 2\sqrt{3} == \sqrt{12} | S = \{1,2\} == \{2,1\} | x=2,y=7 == 2,7 | x \ge 4 == [4,\infty) |
1 < t \le 6 == (1,6] | x \in (1,6] == (1,6] | 0 < f(x) < 1 == (0,1) | 3 < x == x > 3 |
5>x == (-\infty,5) | 2,400.00 == 2400 | -2 \le x < 7 == x \in [-2,7) | \{5\} == 5"""
# Different answers that a careless checker takes for equal, by what it would have to overlook.
UNEQUAL = {}
UNEQUAL["anything"] = r"""
5\text{ s} != 5\text{ cm} | 5\text{ m} != 5\text{ ms} | \text{5} \text{6} != 56 | 4+9=14 != 13 |
13=9 != 13 | 4+x=13 != 13 | f^{-1}(x)=5 != f(x)=5 | \text{Area} = 5 \text{ m} != 5 \text{ cm} |
\frac17 \approx 0.143 != 0.143 | (0,9)\setminus\{2\} != (0,9) | sin x != \cos x | 3x10^4 != 3 |
3!! != 720 | 5! != 5 | (x!)! != x! | 2^3! != 720 | 6 != 6\sqrt2 |
1.0000000000000000000000000000000000000000000000000000000000001 != 1 | 1/100! != 1/101! |
(3,4) != (4,3) | [3,4] != (3,4) | [3,4) != (3,4] | \pm 6 != 6 | 10:30 != 11:30 |
3:15 am != 3:15 pm | \frac{1}{6} != 16 | 7 != 7! | \frac16 != 0.1667 | \sqrt3 != 1.7320508075 |
\pi != 3.14159 | 10^{30} != 10^{30}+1 | 45 != 4.5 | 1,234 != 1 | 6, 700 != 6700 |
9 km != 9 hours | 9\% != 0.09 | 3 million != 3 | 3\frac12 != \frac{31}{2} | 3 1/2 != 31/2 |
101_2 != 101 | 101_2 != 101_3 | 101_2 != 5 | x != |x| | x != y | x^{ab} != x^a b | 2x != x^2 |
3-2i != 3+2i | 4:5 != 5:4 | \log x != \ln x | \binom{7}{2} != \frac{7}{2} | arm != ram |
(A) != (B) | yes != no | x=3 != y=3 | x=3 != x=4 | x=2,y=7 != x=7,y=2 | x=2,y=7 != 7,2 |
x^2+y^2=9 != 9 | x^2+3y^2=9 != x^2+4y^2=9 | 4^{2}! != 16 | x > 4 != x \ge 4 | x > 4 != x < 4 |
x > 4 != -x > -4 | 2x=10 != 10 | x \ne 4 != 4 | \{1,2\} != (1,2) | \{1,2\} != \{1,2,7\} |
1,1,2 != 1,2,2 | (1,2),(3,4) != (1,2,3,4) | (0,1)\cup(2,3) != (0,1)\cup[2,3) |
\sum_{n=1}^{4} n != 10 | e^{-900} != 0 |
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&3\\2&4\end{pmatrix} | 5 or 6 != 5"""
UNEQUAL["a unit or a word that is none"] = r"""
7 m != 7 km | 7\text{ m} != 7\text{ km} | 7 cm^2 != 7 cm^{-2} | 7 cm^2 != 7 cm^3 | 7 s != 7 h |
7\text{ minutes} != 7\text{ hours} | 7\text{ dollars} != 7\text{ cents} | \$7 != 7\text{ cents} |
2 meV != 2 MeV | 2 mL != 2 ML | 7 km != 7 km/h | 7 kg^2 != 7 kg | 7^\circ != 7\% |
7\text{ m}+3 != 7 | 3\text{ m} x != 3 | \sin 30^\circ != \sin 30 | 2 billion != 2 |
3 dozen != 3 | 2 fifths != 2 | 6 squared != 6 | 4 factorial != 4 | 8 mod y != 8 |
7 minus two != 7 | 5 hours ten minutes != 5 | 4 out of nine != 4 | 9 remainder != 9 |
3 percentx != 3 | \frac{3}{2}mg != \frac{3}{2} | \frac{1}{2}mv^2 != \frac{1}{2} |
2\pi rh != 2\pi | 3 sec x != 3 | (x+y)ab != x+y | 5 in x != 5 | 2nm != 2 | 3km != 3 |
\frac{k}{2}h != \frac{k}{2} | 30\% != 0.3 | 30\% != \frac{3}{10} | 30\% != 3\% |
0.5\% != 0.5\text{ m}"""
UNEQUAL["the ends of an interval, order, case"] = r"""
(2,5) != [2,5] | [2,5) != (2,5] | (2,\infty) != [2,\infty) | 2<x<5 != 2\le x<5 |
x>2 != [2,\infty) | (2,5)\cup(6,7) != (2,5),(6,7) | x<2 \text{ or } x>5 != x<2 \text{ and } x>5 |
(2,5) != (5,2) | TF != FT | HHT != THH | XI != IX | <2,5> != <5,2> | mga != agm | 5:2 != 2:5 |
\begin{pmatrix}2\\5\end{pmatrix} != \begin{pmatrix}5\\2\end{pmatrix} |
dog bites man != man bites dog | mgr != mgR | x+y != X+y | Ab != ab | 2RT != 2rT | F_n != f_n |
DNA != Dna"""
UNEQUAL["all but special points"] = r"""
|x-7| != x-7 | |x-7| != 7-x | |x-250| != 250-x | |x+y| != x+y | |x-y| != x-y | \sqrt{y^2} != y |
\sqrt{x^2y^2} != xy | |xy| != xy | \sqrt{(t-9)^2} != t-9 | |n^2-7| != n^2-7 | |x|+|y| != |x+y| |
x(x-1)(x-2) != 0 | x+10^{-12} != x | n^2-n+41 != n^2-n+43 | \sqrt[3]{x^6} != |x^3| |
\sqrt{x^2}-x != 0 | \sqrt{x^2}+x != 0 | \frac{\sqrt{x^2}}{x} != 1"""
UNEQUAL["a small difference"] = r"""
0.333 != 1/3 | 0.33333333333333333333 != 1/3 | 1-e^{-40} != 1 | \sqrt{10^{16}+1} != 10^8 |
\sqrt{10^{16}+1} != \sqrt{10^{16}+2} | \pi != \frac{245850922}{78256779} | e^{e^{-40}} != 1 |
\sqrt{3} != \frac{5042}{2911} | \cos(10^{-9}) != 1 | 1.414213562373095 != \sqrt2 |
2^{10^{-20}} != 1 | 3+10^{-20}\pi != 3 | \frac{10^{20}+1}{10^{20}} != 1 | \ln(1+10^{-17}) != 0"""
UNEQUAL["typography"] = r"""
7ⁿ != 7n | 11₂ != 112 | √⅓ != \frac{1}{3} | x^⅓ != \frac{x}{3} | 8÷½ != 4 | aᵇ != ab | xᵀ != xT |
7$8 != 78 | 7\$80 != 780 | 10 000/4 != 2500 | 0,250 != 250 | 1,2,3,... != 1,2,3 | 7 8 != 78 |
\displaystyle.7 != 7 | 3e - 2 != 0.03 | 2e-3 != 2e^{-3} | 1.250 != 1250 | 12:00 != 1:00 |
3:1.5 != 3:15 | x2 != 2x | 12,34 != 1234 | 3!! != 720 | 2^3^2 != 64"""
UNEQUAL["a relation or a choice"] = r"""
|x|=7 != 7 | |x|<7 != (-\infty,7) | \ln x < 7 != (-\infty,7) | ab=7 != 7 | \sin x=1 != 1 |
7=8 != 7 | a|b = 7 != 7 | x^2=7 != 7 | x\ne7 != x=7 | \{x : x > 2.5\} != \{x : x > 25\} |
x>y != y>x | x-7=0 != 7 | 3x=21 != x=7 | B=C != C | x=y != y | (A) or (B) != A | (A)(B) != A |
A+5 != A | A(x+1) != A | (A)\ 5 \text{ or } (B)\ 6 != A | (A) (x+1) != A | (A)+5 != A |
(A) - 5 != A"""
UNEQUAL["a token or an operator"] = r"""
1.5 != 15 | 1e3 != 1e-3 | 1,0000 != 10000 | 2 1/3 != 2/3 | 2\frac13 != \frac23 |
\frac123 != \frac{1}{23} | \frac12x != \frac{1}{2x} | \text{5 or 6} != 5 | \text{about } 5 != 5 |
3x10 != 30 | 3x10^2 != 3x | 30^\circ != 30^0 | \cos 60^\circ != \cos 60 | 5th != 4th |
x^{th} != x | \begin{pmatrix}1&2\end{pmatrix} != (1,2) |
\begin{pmatrix}1\\2\end{pmatrix} != 1,2 | left != felt | \text{not east} != east | x' != x |
AB != BA | 1,2 != 12 | \{\{1,2\},3\} != \{1,2,3\} | (1,2)\cup(2,3) != (1,3) | 5<x != x<5 |
1<x<5 != 5<x<1 | x(2)=5 != 5 | f(x)(x+1)=5 != 5 | \pi\approx3.14 != 3.14 |
x\approx3.1 != x=3.14 | \pm2 != 2 | 3\pm2 != 5 | 1/2x != \frac{1}{2x} | -2^2 != 4 |
(2\cdot3)! != 2\cdot3! | 3!! != 6! | |-3|-4 != |-3-4| | |x|5 != 5x | \sqrt2x != \sqrt{2x} |
\sqrt[3]{8} != 3\sqrt8 | \sin^{-1}x != \frac{1}{\sin x} | \sin x^2 != \sin^2x |
\binom{5}{2} != \binom{2}{5} | \binom52 != \frac52 | 0.\overline{3} != 0.3 |
0.1\overline{2} != 0.\overline{12} | 5 cm^2 != 5 cm^3 | \$5 per day != 5 per hour | 3:4 != 4:3 |
1:2:3 != 1:23"""
DIFFERENT = r"""
5 -5 5! 5^2 5i 5\pi 5x 5y 5x^2 5/2 0.5 \sqrt5 \sqrt[3]{5} (5,5) \{5,6\} [5,6] (5,6) (6,5) (5,6]
5_6 5:6 x>5 x<5 x\ge5 x\ne5 |x| x x^{-1} \frac{x}{5} x+y=5 x^2+y^2=5 x^2+y^2=25 e^x y=5x+1 \sin5
\sin{x} \cos{x} \ln5 \log5 e^5 e^{-x} x_1 x_2 \pm5 5\pm\sqrt2 5\text{million} (-\infty,5]
(-\infty,5)\cup(6,\infty) \binom{7}{4} 0.\overline{5} A \text{(Q)} even odd 5:06\text{am}
5:06\text{pm} \begin{pmatrix}5\\7\end{pmatrix} \int_0^5x \sum_{n=1}^5n
"""
HOSTILE = "\\ \x00 \ud800 ½ % $ @ # < ,, name:x 5unit:cm word:x ٣٤ %s%n{0} ][ }{ { } \\\\".split()
HOSTILE += "9^{9^{9^{9^9}}} 99!!!!!! 10^10^10! 1e999999999 x!+y!+z! __import__('os')".split()
HOSTILE += ["{" * 10**6, "(" * 10**6 + ")" * 10**6, "9" * 10**5, "(" * 49 + "5" + ")" * 49]
REPEATED = r"""9^ 400!, - 1/ _ = \frac \sqrt{ (1, ±1 f(a) \begin{pmatrix} 1,000 a x< ⦃ x^99+ i^x+
√ | { \tan x+ (-7.1)^{16000}+ \binom{x}{y} a,b,c,d,e, \text{ 5\text{m} 1+ <x \sin^{ ("""
HOSTILE += [text * (98 // len(text)) + "9" for text in REPEATED.split()]


def pairs(table, sign):
    return [pair.strip().split(sign) for pair in " ".join(table.split()).split(" | ")]


@pytest.mark.parametrize("kind", EQUAL)
def test_equal(kind):
    for a, b in pairs(EQUAL[kind], " == "):
        assert rltr.answers_equal(a, b) and rltr.answers_equal(b, a), a
        assert rltr.judge_answer(f"So it is $\\boxed{{{a}}}$.", b) == "right", a


@pytest.mark.parametrize("kind", UNEQUAL)
def test_near_misses(kind):
    for a, b in pairs(UNEQUAL[kind], " != "):
        assert not rltr.answers_equal(a, b) and not rltr.answers_equal(b, a), a


def test_different_answers_differ():
    different = itertools.permutations(DIFFERENT.split(), 2)
    assert not [pair for pair in different if rltr.answers_equal(*pair)]


def test_spaces_and_stars_around_an_answer_do_not_count():
    for text in "5\u00a0|\u20095|5\u202f\\text{ m}|5\\ |**5**|5**|\\,5\\,|5.".split("|"):
        assert rltr.judge_answer(f"\\boxed{{{text}}}", "5") == "right", text
    assert rltr.answers_equal("12\u202f500", "12500")
    assert not rltr.answers_equal("5**2", "25") and not rltr.answers_equal("5...", "5")


def test_judge_answer():
    verdicts = r"""2.5 \frac52 right | 2.4 \frac52 wrong | \int\!x 5 unparsed | 1/0 0 unparsed |
    2^{2014}+1 1+2^{2014} unparsed | west east wrong | 9^{9^9} 9 unparsed"""
    for answer, gold, verdict in pairs(verdicts, " "):
        assert rltr.judge_answer(f"\\boxed{{{answer}}}", gold) == verdict, answer
        assert rltr.is_correct(f"\\boxed{{{answer}}}", gold) is (verdict == "right")
    assert rltr.judge_answer("5", "5") == rltr.judge_answer(r"\boxed{ }", "5") == "missing"
    assert rltr.judge_answer(r"\boxed{" + "1+" * 300 + "1}", "301") == "unparsed"


def test_the_last_box_that_holds_something_is_the_answer():
    texts = r"\boxed{1} \boxed{5}|\boxed{\boxed{5}}|\fbox{5}|\boxed {5 }|\boxed 5$"
    texts += r"|\boxed{5} (in \boxed{ }, \boxed{})|\boxed{5} in \boxed form|\boxed{5} \boxed{"
    assert {rltr.extract_answer(text) for text in texts.split("|")} == {"5"}
    assert rltr.extract_answer(r"\boxed{\left\{1\right.} it is") == r"\left\{1\right."
    texts = ["8", "", r"\boxed{6", "#### Step 2: a", r"\boxed}8{", r"$\boxed 8", r"\boxed $8$"]
    texts += [text * 10**5 for text in ("\\boxed", "\\boxed{", "\\boxed{}", "\\boxed}")]
    assert {rltr.extract_answer(text) for text in texts} == {None}


def test_without_a_box_the_last_line_of_gsm8k_is_the_answer():
    for text in "#### 18|**#### 18**\r\n|a\n#### 18\r\nb|#### 1\n#### 18\n#### Step".split("|"):
        assert rltr.extract_answer(text) == "18"
    for answer in ["18 dollars", "1/2", "-1,250", "$18.5", ".5"]:
        assert rltr.extract_answer(f"So it is.\n#### {answer}\n") == answer


def test_hostile_and_random_strings_are_equal_to_themselves_only_and_symmetric():
    rng = random.Random(0)
    alphabet = [*"0123456789.,;:+-*/^_!|()[]{}<>=$% ~\\'\"&abxei\n\x00½π√±∪@∈⦃⟧°#", " and "]
    alphabet += r"\frac \sqrt \text{ \pm \{ \sin \le \left( \binom cm".split()
    noise = ["".join(rng.choices(alphabet, k=rng.randrange(1, 30))) for _ in range(2000)]
    for text in HOSTILE + noise[:300]:
        assert rltr.answers_equal(text, text)
        assert not rltr.is_correct(f"\\boxed{{{text}}}", "31337.5")
        for gold in ["7", r"\frac{3}{8}", "(3,8)", "x+8", "3,8", r"\text{Q}", "x>8", "100!"]:
            assert rltr.answers_equal(text, gold) is rltr.answers_equal(gold, text)
    for a, b in zip(HOSTILE + noise, noise[::-1], strict=False):
        assert rltr.answers_equal(a, b) is rltr.answers_equal(b, a)


def test_the_work_on_hostile_answers_is_bounded(monkeypatch):
    """Also where an answer has to be computed at all points, as it is undefined at each."""
    calls = []
    for name in ("parse", "equal"):
        function = getattr(rltr, name)
        monkeypatch.setattr(rltr, name, lambda *args, f=function: calls.append(0) or f(*args))
    for text, gold in itertools.product(HOSTILE, ["7", "x+8", "(3,8)", "1,2,3", r"\{1,2\}"]):
        for answer in (text, text + "/0"):
            calls.clear()
            rltr.answers_equal(answer, gold)
            rltr.answers_equal(answer, answer[::-1])
            assert len(calls) < 10_000, answer[:50]


def test_letters_have_values_of_mixed_sign_and_size():
    letters = "abcdfghjklmnopqrstuvwxyzABCKLMNPQRSTVWXYZ"
    values = {a: [rltr.value_of_name(a, point) for point in range(16)] for a in letters}
    assert all(max(row) > 100 and min(row) < -100 for row in values.values())
    for a, b in itertools.combinations(letters, 2):
        both = list(zip(values[a], values[b], strict=True))
        assert {x * y > 0 for x, y in both} == {x > y for x, y in both} == {True, False}
        assert {x + y > 0 for x, y in both} == {True, False}
        assert not rltr.answers_equal(f"|{a}-100|", f"100-{a}")


# --------------------------------------------------------------------------------------------- runs
# A run makes seven promises; the tests say which of them they are about.


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A folder like tiny/, with the same models and four problems: an epoch is two steps."""
    folder = shutil.copytree(HERE / "tiny", tmp_path_factory.mktemp("task") / "tiny")
    for name in ("train.jsonl", "test.jsonl"):
        lines = (folder / name).read_text().splitlines(keepends=True)
        (folder / name).write_text("".join(lines[:4]))
    return folder


def arguments(task, out, flags=""):
    given = f"""--model {task}/generator --receiver {task}/receiver --data {task}/train.jsonl
        --out {out} --prompt {{question}} --steps 4 --prompts 2 --group 4 --max-new-tokens 28
        --receiver-margin 4 --cuts 2 --lr 1e-3 --save-every 2 --device cpu {flags}"""
    return given.split()


def main(argv):
    """rltr.main; the processes for a table and a page at the end fail, which must not matter."""
    with mock.patch("subprocess.run", return_value=subprocess.CompletedProcess([], 1)):
        return rltr.main(argv)


def run(task, out, flags=""):
    return main(arguments(task, out, flags))


def resume(out, flags=""):
    return main(["--resume", str(out), *flags.split()])


def read(out, name):
    """Lines of metrics.jsonl or rollouts.jsonl, without what differs from run to run."""
    rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    differs = ("seconds", "tokens_per", "peak")
    return [{k: v for k, v in row.items() if not k.startswith(differs)} for row in rows]


def weights(folder):
    return flat(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="session")
def whole(task, tmp_path_factory):
    """A run of four steps."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    assert run(task, out) == 0
    return out


@pytest.fixture(scope="session")
def half_of_it(task, tmp_path_factory):
    """The first two of them."""
    out = tmp_path_factory.mktemp("runs") / "half"
    assert run(task, out, "--steps 2") == 0
    return out


@pytest.fixture
def half(half_of_it, tmp_path):
    """A copy, to go on with."""
    return shutil.copytree(half_of_it, tmp_path / "half")


def is_the_same_run(out, whole):
    for name in ("metrics", "rollouts"):
        assert read(out, name) == read(whole, name)
    assert torch.equal(weights(out / "final"), weights(whole / "final"))


def test_the_folder_of_a_run(task, whole):
    files = [*whole.glob("[!.]*"), *whole.glob("checkpoints/*")]
    expected = "config.json metrics.jsonl rollouts.jsonl final checkpoints "
    expected += "checkpoints/step-000002 checkpoints/step-000004"
    assert {str(file.relative_to(whole)) for file in files} == set(expected.split())
    final = weights(whole / "final")
    assert torch.equal(final, weights(whole / "checkpoints/step-000004"))
    assert (final - weights(task / "generator")).abs().max() > 1e-5
    # What the user set and the defaults, not what this machine made of them.
    config, _ = rltr.parse_arguments(arguments(task, whole))
    assert json.loads((whole / "config.json").read_text()) == vars(config)


def test_mistake_the_warm_up_starts_at_0(task, whole, tmp_path):
    assert [m["lr"] for m in read(whole, "metrics")] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])
    # Adam's first step is the learning rate, wherever the gradient is not tiny.
    assert run(task, tmp_path / "b", "--steps 1 --warmup 4") == 0
    moved = weights(tmp_path / "b/final") - weights(task / "generator")
    assert moved.abs().max().item() == pytest.approx(1e-3 / 4, rel=0.01)


def test_random_numbers_are_functions_of_seed_purpose_and_step(task, whole, tmp_path):
    """So problems, rollouts, cuts and continuations do not disturb each other."""
    with mock.patch.object(rltr, "generate", wraps=generate) as spy:
        assert run(task, tmp_path / "b", "--steps 2 --seed 7") == 0
    seeds = [call.kwargs["seed"] for call in spy.mock_calls if "seed" in call.kwargs]
    purposes = (rltr.ROLLOUT, rltr.CONTINUATION)
    assert seeds == [(7, purpose, step) for step in (0, 1) for purpose in purposes]
    rows = read(whole, "rollouts")
    questions = [json.loads(line)["question"] for line in (task / "train.jsonl").open()]
    order = [i for epoch in (0, 1) for i in rltr.rng(0, rltr.DATA, epoch).permutation(4)]
    drawn = [row["problem"]["question"] for row in rows[::4]]  # the first problem of each step
    assert drawn == [questions[i] for i in order[::2]]
    for step in range(4):
        taus = 1 - rltr.rng(0, rltr.CUT, step).random((8, 2))
        cuts = [cut for row in rows if row["step"] == step + 1 for cut in row["cuts"]]
        assert [cut["tau"] for cut in cuts] == taus[:4].flatten().tolist()


def test_what_is_logged_is_what_happened(task, tmp_path):
    tokenizer = transformers.AutoTokenizer.from_pretrained(task / "generator")
    weight = {"answer": 1, "transfer": 3, "format": 0.1}
    with mock.patch.object(rltr, "update", wraps=rltr.update) as update:
        assert run(task, tmp_path / "a", "--transfer-weight 3") == 0
    for metrics, call in zip(read(tmp_path / "a", "metrics"), update.mock_calls, strict=True):
        rows = [dataclasses.asdict(rollout) for rollout in call.args[2]]
        logged = [r for r in read(tmp_path / "a", "rollouts") if r["step"] == metrics["step"]]
        assert logged == [{"step": metrics["step"], **row} for row in rows[:4]]
        for row in rows:
            gold = row["problem"]["answer"]
            assert row["text"] == rltr.decode(tokenizer, row["tokens"])
            assert row["finished"] == (row["tokens"][-1] == tokenizer.eos_token_id)
            assert row["verdict"] == rltr.judge_answer(row["text"], gold)
            assert row["rewards"]["answer"] == (row["verdict"] == "right")
            assert row["rewards"]["format"] == (row["finished"] and row["verdict"] != "missing")
            assert row["rewards"]["transfer"] == np.mean([cut["correct"] for cut in row["cuts"]])
            for cut in row["cuts"]:
                length = int(cut["tau"] * (len(row["tokens"]) - row["finished"]))
                assert cut["prefix_length"] == length
                assert cut["prefix"] == rltr.decode(tokenizer, row["tokens"][:length])
                assert cut["leaked"] == (rltr.extract_answer(cut["prefix"]) is not None)
                assert cut["correct"] == rltr.is_correct(cut["prefix"] + cut["continuation"], gold)

        raw = {name: np.array([row["rewards"][name] for row in rows]) for name in weight}
        rewards = sum(weight[name] * raw[name] for name in weight).reshape(2, 4)  # two groups
        advantages = rewards - rewards.mean(axis=1, keepdims=True)
        advantages /= rewards.std(axis=1, keepdims=True) + 1e-6
        assert np.allclose([row["reward"] for row in rows], rewards.flatten())
        assert np.allclose([row["advantage"] for row in rows], advantages.flatten())
        lengths = np.array([len(row["tokens"]) for row in rows]).reshape(2, 4)
        live = np.ptp(rewards, axis=1) > 0
        cuts = [cut for row in rows for cut in row["cuts"]]
        figures = {f"reward_{name}": raw[name] for name in weight}
        figures |= {"reward": rewards, "length": lengths, "dead_groups": ~live}
        figures |= {"accuracy": raw["answer"], "transfer": raw["transfer"]}
        figures["finished"] = [row["finished"] for row in rows]
        figures["leak"] = [cut["leaked"] for cut in cuts]
        figures["transfer_unleaked"] = [cut["correct"] for cut in cuts if not cut["leaked"]]
        figures["transfer_tau_0.25_0.5"] = [c["correct"] for c in cuts if 0.25 < c["tau"] <= 0.5]
        for name, values in figures.items():
            want = pytest.approx(np.mean(values)) if np.size(values) else None
            assert metrics[name] == want, name
        assert live.any()
        token_mean = (advantages * lengths)[live].sum() / lengths[live].sum()
        assert metrics["objective"] == pytest.approx(token_mean, abs=1e-5)  # on-policy: rho is 1
        assert metrics["logprob_gap_max"] < 1e-3
        assert metrics["clip_share"] == 0


def test_rlvr_loads_no_receiver_and_self_is_a_frozen_copy(task, tmp_path):
    assert run(task, tmp_path / "b", "--transfer-weight 0 --receiver no/where --steps 1") == 0
    for row in read(tmp_path / "b", "rollouts"):
        assert not row["cuts"]
        assert set(row["rewards"]) == {"answer", "format"}
    assert not any("transfer" in name for m in read(tmp_path / "b", "metrics") for name in m)
    loaded = []
    load = rltr.load_lm

    def spy(*given):
        loaded.append(load(*given))
        return loaded[-1]

    with mock.patch.object(rltr, "load_lm", spy):
        assert run(task, tmp_path / "c", "--receiver self --steps 1") == 0
    trained, frozen = (flat(lm.model) for lm in loaded)
    assert torch.equal(frozen, weights(task / "generator"))
    assert not torch.equal(trained, frozen)


def test_a_step_without_a_finite_gradient_is_skipped_and_said(task, tmp_path):
    objective = rltr.policy_objective
    factors = iter([1.0, 1.0, torch.nan])  # of the three steps, each one micro-batch
    flags = "--steps 3 --prompts 4 --token-budget 99999 --save-every 1"
    with mock.patch.object(rltr, "policy_objective", lambda *x: objective(*x) * next(factors)):
        assert run(task, tmp_path / "b", flags) == 0
    assert [m["skipped"] for m in read(tmp_path / "b", "metrics")] == [0, 0, 1]
    second, third = (weights(tmp_path / f"b/checkpoints/step-00000{step}") for step in (2, 3))
    assert torch.equal(second, third)
    assert not torch.equal(second, weights(task / "generator"))


def test_a_tracker_gets_the_metrics_and_a_resumed_run_goes_on_there(task, tmp_path):
    tracker = mock.MagicMock()
    run_ids = []
    tracker.init.side_effect = lambda **_: run_ids.append(os.environ.get("WANDB_RUN_ID"))
    flags = "--transfer-weight 0 --track wandb --steps 1"
    with mock.patch.dict(sys.modules, wandb=tracker), mock.patch.dict(os.environ):
        assert run(task, tmp_path / "b", flags) == 0
        assert resume(tmp_path / "b", "--steps 2") == 0
        logged = [(call.kwargs["step"], call.args[0]["reward"]) for call in tracker.log.mock_calls]
        assert run(task, tmp_path / "c", flags) == 0
    assert logged == [(m["step"], m["reward"]) for m in read(tmp_path / "b", "metrics")]
    settings = [call.kwargs for call in tracker.init.mock_calls]
    assert [given["name"] for given in settings] == ["b", "b", "c"]
    assert {given["resume"] for given in settings} == {"allow"}
    assert run_ids[0] == run_ids[1] != run_ids[2]


# ------------------------ promises 1 to 4: killed, asked to stop, one writer, the settings it had


def forked(function, *given, file_limit=None, fatal=("", "")):
    """The exit code of a function in a process of its own; -N if it died of signal N.

    file_limit: it dies when a file grows beyond so many bytes, in the middle of writing it.
    fatal: an operation and a part of a path (see sys.addaudithook); it dies just before that."""

    def die_before(operation, details):
        if operation == fatal[0] and fatal[1] in str(details[0]):
            os.kill(os.getpid(), signal.SIGKILL)

    def child():
        rltr.tqdm.set_lock(multiprocessing.RLock())  # not the parent's: the dead never release it
        sys.addaudithook(die_before)
        if file_limit:
            signal.signal(signal.SIGXFSZ, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
        sys.exit(function(*given))

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def test_two_steps_and_a_resume_to_four_are_four_steps(half, whole):  # promise 1
    assert resume(half, "--steps 4") == 0
    is_the_same_run(half, whole)


@pytest.mark.parametrize("moment", ["log", "first checkpoint", "rename", "trimming a log"])
def test_mistake_a_killed_run_repeats_a_batch_or_reseeds(moment, task, half, whole, tmp_path):
    """Promise 1: kill -9 at any moment, then --resume, and it is as if nothing had happened."""
    out = half
    one_group = (half / "rollouts.jsonl").stat().st_size // 2
    if moment == "log":  # it has the metrics of step 3 and half of its rollouts
        code = forked(resume, out, "--steps 4", file_limit=5 * one_group // 2)
    elif moment == "first checkpoint":
        out = tmp_path / "new"
        code = forked(run, task, out, file_limit=100_000)
    elif moment == "rename":
        code = forked(resume, out, "--steps 4", fatal=("os.rename", "step-000004"))
    else:  # where the last of two checkpoints was deleted
        out = shutil.copytree(whole, tmp_path / "trimmed")
        shutil.rmtree(out / "checkpoints/step-000004")
        fatal = ("os.truncate", "rollouts.jsonl")  # or by writing it anew:
        code = forked(resume, out, file_limit=3 * one_group // 2, fatal=fatal)
    assert code in (-signal.SIGKILL, -signal.SIGXFSZ)
    assert resume(out, "--steps 4") == 0
    is_the_same_run(out, whole)
    assert {path.name for path in out.rglob("*")} == {path.name for path in whole.rglob("*")}


@pytest.mark.parametrize("signals", [[signal.SIGINT], [signal.SIGTERM], 2 * [signal.SIGTERM]])
def test_a_signal_saves_the_step_and_a_second_stops_at_once(signals, half, whole, capfd):  # 2
    sample = rltr.sample_rollouts

    def signal_and_sample(*given):
        for number in signals:
            os.kill(os.getpid(), number)
        return sample(*given)

    with mock.patch.object(rltr, "sample_rollouts", signal_and_sample):
        code = forked(resume, half, "--steps 4")
    saved = (half / "checkpoints/step-000003").exists()
    if len(signals) == 2:
        assert (code, saved) == (-signals[1], False)
    else:
        assert (code, saved) == (128 + signals[0], True)
        assert f"--resume {half}" in capfd.readouterr().out
        assert resume(half) == 0
        is_the_same_run(half, whole)


def test_a_folder_has_one_writer(task, half, tmp_path, capfd):  # promise 3
    out = tmp_path / "b"
    sample = rltr.sample_rollouts
    load = rltr.load_lm

    def others_write_there_too(*given):
        assert resume(out) == 2
        assert run(task, out) == 2
        return sample(*given)

    def another_was_faster(*given):
        shutil.copytree(half, tmp_path / "c", dirs_exist_ok=True)
        return load(*given)

    with mock.patch.object(rltr, "sample_rollouts", others_write_there_too):
        assert run(task, out, "--steps 1") == 0
        assert resume(out, "--steps 2") == 0
    reasons = re.findall("rltr: .*?(lock|exists)", capfd.readouterr().err)
    assert reasons == ["lock", "exists", "lock", "exists"]
    with mock.patch.object(rltr, "load_lm", another_was_faster):
        assert run(task, tmp_path / "c") == 2
    assert read(tmp_path / "c", "metrics") == read(half, "metrics")


def test_resume_refuses_what_would_be_another_run(whole, capfd):  # promise 4
    changes = "--lr 0.1, --seed 1, --cuts 1, --prompts 3, --no-normalize-std, --model x, --data x"
    for change in changes.split(", "):
        assert resume(whole, f"--steps 5 {change}") == 2
        [error] = capfd.readouterr().err.splitlines()
        assert change.split()[0].rpartition("-")[2] in error
    assert len(read(whole, "metrics")) == 4


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_resume_accepts_the_memory_knobs_which_change_nothing(half, whole):
    knobs = "--token-budget 60 --max-rows 3 --gradient-checkpointing --offload"
    assert resume(half, f"--steps 4 --save-every 1 {knobs}") == 0
    saved = {path.name for path in half.glob("checkpoints/*")}
    assert saved == {"step-000003", "step-000004"}  # the last two
    config = json.loads((half / "config.json").read_text())
    assert (config["token_budget"], config["max_rows"], config["offload"]) == (60, 3, True)
    for name in ("step", "tokens", "text", "rewards"):
        ours = [row[name] for row in read(half, "rollouts")]
        assert ours == [row[name] for row in read(whole, "rollouts")], name
    assert torch.allclose(weights(half / "final"), weights(whole / "final"), rtol=0, atol=1e-5)


class Bomb:
    def __reduce__(self):
        return print, ("executed",)


def test_a_damaged_checkpoint_is_named_and_never_executed(whole, tmp_path, capfd):  # 4 and 6
    out = shutil.copytree(whole, tmp_path / "b")
    checkpoint = out / "checkpoints/step-000004"
    bomb = io.BytesIO()
    torch.save(Bomb(), bomb)
    for name in ("optimizer.pt", "model.safetensors"):
        good = (checkpoint / name).read_bytes()
        for damaged in (good[:-500], b"", bomb.getvalue()):
            (checkpoint / name).write_bytes(damaged)
            assert resume(out, "--steps 5") == 2
            said, error = capfd.readouterr()
            assert "executed" not in said
            assert "step-000004" in error
            assert error.count("\n") == 1
        (checkpoint / name).write_bytes(good)
    shutil.rmtree(checkpoint)  # so that an earlier one is the last
    assert resume(out) == 0
    is_the_same_run(out, whole)


# -------------------------------------------------- promises 5 and 6: mistakes, what is not trusted

GOOD_ROW = '{"question": "Q1>*6;>+2;>-3;>+0;>-3;?", "answer": "0"}\n'
MISTAKES = {  # flags, or what a file of problems holds; what the line must contain
    "\n": "no question",
    '{"question": "x"}': "answer",
    '{"question": "x", "solution": "7"}': "row 1",
    '{"question": "What is one and one?", "answer": "2"}': "tokenizer",
    GOOD_ROW + '{"question": "x", "answer": null}': "row 2",
    GOOD_ROW + '{"question": " ", "answer": "1"}': "row 2",
    GOOD_ROW + "{": "line 2",
    "--model nobody/nothing": "nobody/nothing",
    "--receiver nobody/no\x1b[2Jthing": "no\\x1b[2Jthing",
    "--model {tmp}": "no such folder or hub model",
    "--model {odd}/half_a_file": "half_a_file",
    "--model {odd}/missing": "its weights are not those of its config",
    "--model {odd}/another_shape": "another_shape",
    "--model {odd}/endless": "end-of-text",
    "--model {odd}/not_a_number": "finite",
    "--model {odd}/bloom": "bloom",
    "--model {odd}/remote_code": "remote_code",
    "--receiver {odd}/short": "context of 9",
    "--max-new-tokens 128": "--max-new-tokens",
    "--data nobody/nothing": "nobody/nothing",
    "--data {tmp}/nowhere.jsonl": "No such file",
    "--group 1": "group",
    "--lr nan": "lr",
    "--prompt no_place": "--prompt",
    "--transfer-weight -1": "transfer",
    "--track abacus": "abacus",
    "--resume {tmp}/nowhere": "nowhere",
    "--out {tmp}": "--resume",
}


@pytest.fixture(scope="session")
def odd(task, tmp_path_factory):
    """Model folders that cannot be used, each in another way."""
    folder = tmp_path_factory.mktemp("odd")
    tokenizer = transformers.AutoTokenizer.from_pretrained(task / "generator")

    def save(name, kind="qwen2", **changes):
        model = tiny(kind, vocab_size=len(tokenizer), **changes)
        rltr.save_lm(lm_of(model, tokenizer), folder / name)
        return folder / name

    one = "model.layers.1.mlp.up_proj.weight"
    for name, change in {
        "missing": lambda tensors: tensors.pop(one),
        "another_shape": lambda tensors: tensors.update({one: tensors[one][:5].clone()}),
        "not_a_number": lambda tensors: tensors[one].fill_(torch.nan),
    }.items():
        path = save(name) / "model.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path, {"format": "pt"})
    path = save("half_a_file") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    classes = {name: f"code.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")}
    config = json.dumps({"model_type": "mine", "auto_map": classes})
    (save("remote_code") / "config.json").write_text(config)
    (folder / "remote_code/code.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")
    save("short", max_position_embeddings=9)
    save("bloom", "bloom")
    tokenizer.eos_token = None
    save("endless")
    return folder


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_common_mistake_is_one_line_and_leaves_nothing(mistake, task, odd, tmp_path, capfd):
    """Promises 5, 3 and 6."""
    data = tmp_path / "data.jsonl"
    data.write_text(GOOD_ROW)
    flags = mistake.format(tmp=tmp_path, odd=odd) if mistake.startswith("--") else f"--data {data}"
    if not mistake.startswith("--"):
        data.write_text(mistake)
    given = [] if mistake.startswith("--resume") else arguments(task, tmp_path / "out")
    with mock.patch("builtins.input", return_value="y"):  # "may I run its code?"
        assert main(given + flags.split(" ")) == 2
    [error] = capfd.readouterr().err.splitlines()
    assert error.startswith("rltr: ")
    assert error.isprintable()
    assert MISTAKES[mistake] in error
    assert list(tmp_path.rglob("*")) == [data]
    assert not (odd / "executed").exists()


def test_what_fails_in_the_middle_is_one_line_too_and_the_run_goes_on_later(half, whole, capfd):
    """Promise 5: out of memory, and a disk that is full for a log or a checkpoint."""
    memory = torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
    knobs = "--gradient-checkpointing --offload --token-budget --max-rows --resume"
    full = OSError(28, "No space left on device")
    for name, error, words in (
        ("rltr.policy_objective", memory, f"out of memory {knobs}"),
        ("rltr.Run.log", full, "space left"),
        ("torch.save", RuntimeError("PytorchStreamWriter failed"), "step-000004 StreamWriter"),
    ):
        with mock.patch(name, side_effect=error):
            assert resume(half, "--steps 4") == 2
        said = capfd.readouterr().err.splitlines()[-1]
        assert said.startswith("rltr: ")
        assert all(word in said for word in words.split()), said
    assert resume(half, "--steps 4") == 0
    is_the_same_run(half, whole)


def test_mistakes_in_flags_in_a_program_and_in_copying_the_file(tmp_path, monkeypatch, capsys):
    with pytest.raises(SystemExit, match="2"):  # argparse explains it
        rltr.main(["--abacus", "3"])
    assert "--abacus" in capsys.readouterr().err
    with pytest.raises(UserError, match="group"):
        rltr.train(Config(model="x", out=str(tmp_path / "b"), group=1))
    monkeypatch.setattr(rltr, "TINY_FOLDER", tmp_path / "tiny")
    assert rltr.main([]) == 2
    assert "--model" in capsys.readouterr().err


def test_model_text_reaches_the_terminal_without_control_characters(monkeypatch):  # promise 6
    problem = Problem("\x1b]0;title\x07?", "\x9b2J")
    rollout = Rollout(problem, [], [], [], True, "a\x1b[31mb\r\u202ec")
    rollout.cuts = [rltr.Cut(0.5, 1, "a", False, continuation="\x00")]
    shown = rltr.show_group([rollout])
    assert all(c.isprintable() or c == "\n" for c in shown)
    assert "\\x1b[31mb\\r\\u202ec" in shown
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert rltr.printable("é\u2192") == "\\xe9\\u2192"  # it has no code for these


# ------------------------------------------------------------------ the files, and the command line


def test_the_file_imports_where_there_is_no_unix_and_without_eval(monkeypatch):  # promise 7
    for name in ("fcntl", "resource", "termios", "pwd", "eval", "make"):
        monkeypatch.setitem(sys.modules, name, None)
    again = runpy.run_path(rltr.__file__, run_name="elsewhere")
    assert vars(again["Config"]()) == vars(Config())


def test_the_files_are_short_and_the_algorithm_stands_first():
    for name, most in (("rltr.py", 1550), ("eval.py", 380)):
        assert len((HERE / name).read_text().splitlines()) <= most, name
    tree = ast.parse(Path(rltr.__file__).read_text())
    functions = {node.name: node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
    steps = re.findall(r"^    [1-8]  .* (\w+)$", rltr.__doc__, re.M)
    assert len(steps) == 8
    for name in ("train", *steps, "completion_logprobs"):
        assert functions[name].end_lineno < 550, name
    for name, node in functions.items():
        assert node.end_lineno - node.lineno < 60, name


def test_every_setting_is_a_flag_with_help_and_the_examples_in_docstrings_are_true(capsys):
    with pytest.raises(SystemExit) as stop:
        rltr.main(["--help"])
    assert stop.value.code == 0
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at will
    for name, setting in Config.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in text
        assert "".join(setting.metadata["help"].split()) in text
    for module in (rltr, evaluation, make):
        failed, attempted = doctest.testmod(module)
        assert failed == 0 < attempted


def test_make_py_makes_the_problems_of_tiny_and_a_model_twice(tmp_path):
    make.write_problems(tmp_path, 119)
    for name in ("train.jsonl", "test.jsonl"):
        assert (tmp_path / name).read_bytes() == (HERE / "tiny" / name).read_bytes()
    for name in ("a", "b"):
        make.warm_start(tmp_path / name, 8, 3, 0.3, seed=1)
    assert torch.equal(weights(tmp_path / "a"), weights(tmp_path / "b"))


# ------------------------------------------------------------------------------------ documentation

PAGES = ("README.md", "docs/reference.md", "benchmarks/RESULTS.md", "tiny/README.md")
TEXT = {page: (HERE / page).read_text() for page in PAGES}


def test_the_readme_is_short_and_the_diffs_of_its_forks_fit_the_file():
    assert len(TEXT["README.md"].split()) <= 1200
    forks = TEXT["README.md"].split("## Fork it")[1].split("\n## ")[0]
    diff = [line[4:] for line in forks.splitlines() if line.startswith(("    +", "    -", "     "))]
    source = (HERE / "rltr.py").read_text().splitlines()
    assert sum(line.startswith("+") for line in diff) > 5
    for line in diff:
        assert line.startswith("+") or line[1:] in source, line


def test_links_lead_somewhere():
    for page, text in TEXT.items():
        for target in re.findall(r"\]\((?!https://)([^)]+)\)", text):
            file, _, anchor = target.partition("#")
            where = (HERE / page).parent / file if file else HERE / page
            assert where.exists(), target
            titles = re.findall(r"^#+ (.+)$", where.read_text(), re.M) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, target


def test_a_single_file_names_the_packages_it_needs():
    """PEP 723, for `uv run rltr.py`: what requirements.txt has, but for pytest."""
    lines = (HERE / "requirements.txt").read_text().splitlines()
    wanted = [line for line in lines if line and not line.startswith(("#", "pytest"))]
    assert {"torch>=2.11", "transformers>=5.24"} <= set(wanted)
    for name in ("rltr.py", "eval.py"):
        block = re.search(r"^# /// script\n(.*?)^# ///$", (HERE / name).read_text(), re.M | re.S)[1]
        assert json.loads(re.search(r"dependencies = (\[.*?\])", block, re.S)[1]) == wanted


def test_the_commands_of_the_pages_parse():
    command = r"(?:python|uv run|accelerate launch[^`\n]*?) ((?:\w+/)?\w+\.py)([^`\n#&|]*)"
    commands = re.findall(command, "\n".join(TEXT.values()))
    parsers = {"rltr.py": rltr.parse_arguments, "eval.py": evaluation.parse_arguments}
    for script, rest in commands:
        given = [word for word in shlex.split(rest) if word not in ("...", ")")]
        flags = {word for word in given if word.startswith("--")}
        if script not in parsers:
            known = re.findall(r"--[a-z-]+", (HERE / script).read_text())
            assert flags <= {"--help", *known}, (script, rest)
        elif flags and not flags & {"--help", "--resume", "--run"}:
            parsers[script](given)
    used = {script for script, _ in commands}
    assert {"rltr.py", "eval.py", "tools/report.py", "tiny/make.py"} <= used


def test_an_example_of_the_reference_runs_and_ends_with_a_table(task, tmp_path):
    """As a process, with the built-in task and less of everything."""
    example = re.search(r"^    \$ python rltr.py (.*)$", TEXT["docs/reference.md"], re.M)[1]
    less = f"--steps 2 --prompts 2 --out a --eval-k 1 --eval-data {task}/test.jsonl"
    command = [sys.executable, HERE / "rltr.py", *shlex.split(example), *less.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Maj@1" in done.stdout
    assert "a/final" in done.stdout
    assert (tmp_path / "a/report.html").exists()
    config = json.loads((tmp_path / "a/config.json").read_text())
    given = {"steps": 2, "prompts": 2, "out": "a", "eval_k": 1, "eval_data": f"{task}/test.jsonl"}
    assert config == {**vars(Config()), **rltr.TINY, **given}


def test_the_tables_of_the_results_are_those_of_the_recorded_runs(tmp_path, capsys):
    page = TEXT["benchmarks/RESULTS.md"]
    files = set(re.findall(r"rltr_vs_rlvr.py --read (\S+)", page))
    assert len(files) >= 3
    for file in files:
        driver.main(["--read", str(HERE / file), "--csv", str(tmp_path / "again.csv")])
        lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
        assert len(lines) > 5
        for line in lines:
            assert line in page, (file, line)
        assert driver.read_csv(tmp_path / "again.csv") == driver.read_csv(HERE / file)


# --------------------------------------------------------------------------------------- evaluation

POOL = ["1,000", "1000", "7", "8", None]  # the first two are the same answer


def draws(n, seed):
    return random.Random(seed).choices(POOL, [2, 2, 3, 1, 2], k=n)


@functools.cache
def vote_is_right(answers):
    voters = [answer for answer in answers if answer is not None]
    votes = [sum(answers_equal(answer, other) for other in voters) for answer in voters]
    return bool(votes) and voters[votes.index(max(votes))] in ("1,000", "1000")


def test_votes_of_equivalents_count_together_and_the_first_wins_ties():
    votes = {"--": None, "-3-": "3", "433": "3", "4334": "4", "": None}
    votes = {tuple(None if a == "-" else a for a in answers): votes[answers] for answers in votes}
    votes |= {("1,000", "2", "1000", "2", "1000"): "1,000", ("1/2", "3", "0.5", None): "1/2"}
    for answers, vote in votes.items():
        assert evaluation.majority_vote(answers) == vote


@pytest.mark.parametrize("seed", range(4))
def test_maj_at_k_is_the_mean_over_subsets_that_vote_like_majority_vote(seed):
    answers = draws(9, seed)
    for k in range(1, 10):
        subsets = evaluation.subsets(9, k)
        assert len(subsets) == {1: 9, 9: 1}.get(k, 1000)
        assert all(subset == sorted(set(subset)) and len(subset) == k for subset in subsets)
        hits = [vote_is_right(tuple(answers[i] for i in subset)) for subset in subsets]
        assert maj_at_k(answers, "1000", k) == np.mean(hits)
        exact = np.mean([vote_is_right(s) for s in itertools.combinations(answers, k)])
        assert abs(np.mean(hits) - exact) <= (1e-12 if k in (1, 9) else 0.06)
    assert maj_at_k(["7"] * 8 + ["8"] * 8, "7", 2) > 0.7  # of a pair 7, 8 the 7 was first


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (6, 0), (6, 2), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c):
    for k in range(1, n + 1):
        exact = np.mean([min(s) < c for s in itertools.combinations(range(n), k)])
        assert pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-15)
    assert pass_at_k(n, c, 1) == c / n and 0 < pass_at_k(100_000, 1, 3) < 3.1e-5
    assert doctest.testmod(evaluation) == (0, 5)  # the examples


WITHOUT_A_BOX = r"""The answer is 12, say 7 of 9.
The answer is: $12$. I see.
Final Answer: The final answer is \(12\).
5+7=<<5+7=12>>12|A: 12
She pays $5 and $7, so $12 in all."""


@pytest.mark.parametrize("text", [*WITHOUT_A_BOX.split("\n"), r"\boxed{12}; A: 13", "#### 12"])
def test_fallback(text):
    text = text.replace("|", "\n")
    assert evaluation.is_correct(text, "12") and not evaluation.is_correct(text, "13")
    assert evaluation.is_correct(text, "12", fallback=False) == is_correct(text, "12")
    assert is_correct(text, "12") == ("12}" in text or "####" in text)


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sample_rows(last=()):
    rows = []
    for i in range(12):
        answers = [*draws(8, i), *last][-8:]
        texts = [f"so \\boxed{{{a}}}" if a else "no idea \x1b[1000m" for a in answers]
        rows.append({"problem": f"q{i}", "answer": ["1000", 1000][i % 2], "completions": texts})
    return rows


def result_of(*argv, out):
    assert evaluation.main([*argv, "--out", str(out)]) == 0
    return json.loads((out / "result.json").read_text())


def test_samples_are_scored_as_by_brute_force(tmp_path, capsys):
    path = write_lines(tmp_path / "s.jsonl", sample_rows())
    result = result_of("--samples", path, "--k", "3", out=tmp_path / "o")
    figures, out = result["figures"], capsys.readouterr().out
    answers = [draws(8, i) for i in range(12)]
    right = [[a in ("1000", "1,000") for a in group] for group in answers]
    assert figures["accuracy"] == figures["Maj@1"] == pytest.approx(np.mean(right))
    half = 1.96 * np.std(np.mean(right, axis=1)) / 12**0.5
    interval = pytest.approx([np.mean(right) - half, np.mean(right) + half], abs=0.02)
    assert result["intervals"]["accuracy"] == interval
    assert figures["answered"] == np.mean([a is not None for g in answers for a in g])
    assert [name for name in figures if "Maj" in name] == [f"Maj@{k}" for k in (1, 2, 3, 4, 8)]
    for k in (2, 3, 4, 8):
        passed = np.mean([[any(s) for s in itertools.combinations(g, k)] for g in right])
        assert figures[f"Maj@{k}"] == np.mean([maj_at_k(group, "1000", k) for group in answers])
        assert figures[f"Pass@{k}"] == pytest.approx(passed)
    assert f"{figures['accuracy']:.3f} [" in out and "first seen" in out and "\x1b" not in out
    loose = result_of("--samples", path, "--fallback", out=tmp_path / "f")["figures"]
    assert loose["accuracy"] == np.mean([a not in ("7", "8") for g in answers for a in g])


def test_results_are_compared_problem_by_problem(tmp_path, capsys):
    results = []
    for i, rows in enumerate([sample_rows(), sample_rows(["1000"]), sample_rows()[1:]]):
        result_of("--samples", write_lines(tmp_path / "s.jsonl", rows), out=tmp_path / str(i))
        results.append(str(tmp_path / str(i) / "result.json"))
    codes = [evaluation.main(["--compare", results[0], other]) for other in results]
    lines = [s for s in capsys.readouterr().out.splitlines() if s.startswith("accuracy   ")]
    assert codes == [0, 0, 2] and "+0.000 [+0.000, +0.000]   p = 1.0000" in lines[-2]
    assert "[+0.0" in lines[-1]  # nowhere worse


@pytest.fixture
def command(tmp_path):
    problems = rltr.load_problems(rltr.TINY["eval_data"])[:5]
    data = write_lines(tmp_path / "d.jsonl", [vars(problem) for problem in problems])
    return f"""--model {rltr.TINY["model"]} --receiver {rltr.TINY["receiver"]} --data {data} --k 4
        --transfer-samples 2 --prompt {{question}} --receiver-margin 4 --device cpu""".split()


def stop_at(call, monkeypatch):
    """Two problems a chunk. Fails in this call of sample_chunk. Returns the chunks so far."""
    calls, sample_chunk = [], evaluation.sample_chunk

    def stopping(generator, receiver, tasks, first, settings):
        calls.append(first)
        if len(calls) == call:
            raise UserError("power cut")
        return sample_chunk(generator, receiver, tasks, first, settings)

    monkeypatch.setattr(evaluation, "CHUNK_ROWS", 36)
    monkeypatch.setattr(evaluation, "sample_chunk", stopping)
    return calls


def test_interrupted_evaluation_goes_on_bit_for_bit(command, tmp_path, monkeypatch, capsys):
    whole, halves, data = tmp_path / "w", tmp_path / "h", tmp_path / "d.jsonl"
    command += ["--max-new-tokens", "5"]
    calls = stop_at(6, monkeypatch)
    want = result_of(*command, out=whole)
    assert evaluation.main([*command, "--out", str(halves)]) == 2  # 2 chunks of 3 are done
    log = halves / "completions.jsonl"
    log.write_bytes(log.read_bytes()[:-100])  # a torn last line
    got = result_of(*command, "--max-rows", "5", out=halves)
    assert calls == [0, 2, 4] + [0, 2, 4] + [2, 4]  # the first was reused
    assert log.read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert {**got, "settings": 0} == {**want, "settings": 0}
    assert result_of("--samples", str(log), out=tmp_path / "s")["figures"] == got["figures"]
    assert result_of(*command, "--fallback", out=halves)["n"] == 4 and len(calls) == 8
    assert "%|" not in capsys.readouterr().err  # no bar where stderr is no terminal
    data.write_text(data.read_text().replace("Q1", "Q2"))
    assert evaluation.main([*command, "--out", str(halves)]) == 2
    assert evaluation.main([*command, "--out", str(whole), "--seed", "1"]) == 2
    assert capsys.readouterr().err.count("other problems, or with other settings") == 2


def test_the_figures_of_transfer_are_those_of_the_stored_cuts(command, tmp_path):
    figures = result_of(*command, "--max-new-tokens", "28", out=tmp_path / "o")["figures"]
    rows = [json.loads(line) for line in (tmp_path / "o/completions.jsonl").open()]
    for name in ("tokens", "finished"):
        assert figures[name] == pytest.approx(np.mean([row[name] for row in rows]))
    for tau in [tenth / 10 for tenth in range(1, 10)]:
        right, leaked = [], []
        for row in rows:
            cuts = [cut for cut in row["cuts"] if cut["tau"] == tau]
            for cut, text, tokens in zip(cuts, row["completions"], row["tokens"], strict=False):
                assert text.startswith(cut["prefix"])
                assert cut["prefix_length"] in (int(tau * tokens), int(tau * (tokens - 1)))
                right.append(is_correct(cut["prefix"] + cut["continuation"], row["answer"]))
                leaked.append(extract_answer(cut["prefix"]) is not None)
        assert len(right) == 10 and figures[f"leak@{tau}"] == pytest.approx(np.mean(leaked))
        assert figures[f"transfer@{tau}"] == pytest.approx(np.mean(right))
    cut |= {"prefix": "\\boxed{1}", "continuation": "", "overflow": False}  # a leak counts as right
    row |= {"answer": "1", "cuts": [cut, cut | {"overflow": True}]}
    assert evaluation.score_problem(row, [1], False)["figures"]["transfer@0.9"] == 0.5


def test_random_numbers_are_new_in_every_chunk_and_independent_of_the_receiver(
    command, tmp_path, monkeypatch
):
    monkeypatch.setattr(evaluation, "CHUNK_ROWS", 18)  # one problem a chunk, thrice the same one
    write_lines(tmp_path / "d.jsonl", [{"question": "Q1>*3;>-6;>+6;>+4;>-5;?", "answer": "0"}] * 3)
    command += ["--max-new-tokens", "20", "--seed", "3"]
    seeds = []
    note = lambda *args, **how: seeds.append(how.get("seed")) or generate(*args, **how)  # noqa: E731
    monkeypatch.setattr(rltr, "generate", note)
    texts = {}
    for receiver in (rltr.TINY["receiver"], ""):
        result_of(*command, "--receiver", receiver, out=tmp_path / f"o{len(texts)}")
        lines = (tmp_path / f"o{len(texts)}/completions.jsonl").open()
        texts[receiver] = [json.loads(line)["completions"] for line in lines]
    first, second, third = texts[""]
    assert texts[rltr.TINY["receiver"]] == texts[""] and first != second != third != first
    ours = [(3, rltr.EVALUATION, i) for i in range(3)]
    theirs = [(3, rltr.EVALUATION, rltr.CONTINUATION, i) for i in range(3)]
    drawn = [seed for seed in seeds if isinstance(seed, tuple)]  # check_model's is a number
    assert sorted(drawn) == sorted(ours + ours + theirs)


@pytest.fixture
def finished_run(command, tmp_path):
    """Makes a run by hand: the generator has become as good as the receiver."""

    def make(name="run", **settings):
        folder = tmp_path / name
        shutil.copytree(rltr.TINY_FOLDER / "receiver", folder / "final")
        closing = {"eval_data": f"{tmp_path}/d.jsonl", "eval_k": 4, "out": str(folder), "seed": 4}
        config = Config(**(rltr.TINY | closing | {"limit": 3, "split": "train"} | settings))
        (folder / "config.json").write_text(json.dumps(vars(config)))
        (folder / "metrics.jsonl").touch()
        return folder

    return make


def table_of(folder, *flags):
    assert evaluation.main(["--run", str(folder), *flags]) == 0
    return json.loads((folder / "evaluation.json").read_text())


def test_the_table_of_a_run_compares_its_model_before_and_after(finished_run, tmp_path, capsys):
    folder = finished_run(transfer_weight=0.0)
    table = table_of(folder, "--out", str(tmp_path / "o"))
    assert (tmp_path / "o/after/completions.jsonl").exists()  # so it can go on
    printed = capsys.readouterr().out.splitlines()
    shown = ["before", "accuracy", "Maj@4", *(f"transfer@0.{i}" for i in (1, 3, 5, 7, 9))]
    assert [line.split()[0] for line in printed] == shown
    # The same numbers as by hand. The prompt is that of the run, without a flag for its model.
    flags = f"--data {tmp_path}/d.jsonl --k 4 --max-new-tokens 32 --receiver-margin 4 --seed 4"
    flags += f" --receiver {rltr.TINY['receiver']} --device cpu"
    after = result_of("--model", str(folder / "final"), *flags.split(), out=tmp_path / "after")
    assert f"the prompt is by default that of {folder}" in capsys.readouterr().err
    flags += f" --model {rltr.TINY['model']} --prompt {{question}}"
    before = result_of(*flags.split(), out=tmp_path / "before")
    for name in ("figures", "intervals", "problems", "n"):
        assert table["before"][name] == before[name] and table["after"][name] == after[name]
    assert f"{before['figures']['accuracy']:.3f} ->" in printed[1]


def test_receivers_of_a_run(finished_run):  # RLVR needs none
    folder = finished_run(receiver="nobody/nothing", transfer_weight=0.0)
    flags = ["--k", "1", "--max-new-tokens", "9", "--transfer-samples", "1"]
    figures = table_of(folder, *flags)["after"]["figures"]
    assert "Maj@1" in figures and "Maj@4" not in figures and "transfer@0.5" not in figures
    assert evaluation.main(["--run", str(folder), "--receiver", "no/body"]) == 2
    by_name = table_of(folder, *flags, "--receiver", rltr.TINY["model"])
    assert table_of(finished_run("self", receiver="self"), *flags) == by_name


def test_ordinary_mistakes_are_one_line(finished_run, command, tmp_path, capsys):
    rows = write_lines(tmp_path / "s.jsonl", [{"problem": "q", "answer": "1"}])
    finished_run("unfinished")
    (tmp_path / "unfinished/final").rename(tmp_path / "moved")
    finished_run("start", model="no/model")
    mistakes = {
        "--samples missing.jsonl": "missing.jsonl",
        f"--samples {rows}": "without a list of completions",
        f"--model no/such\x1b[31mmodel --data {rows}": r"no/such\x1b[31mmodel",
        "--model m --k 0": "k 0",
        f"--run {tmp_path}/unfinished": "no finished run",
        f"--run {tmp_path}/start": "no/model",
        f"--compare {rows} gone.json": "gone.json",
    }
    for argv, message in mistakes.items():
        assert evaluation.main(argv.split()) == 2
        err = capsys.readouterr().err
        assert err.startswith("eval: ") and err.count("\n") == 1 and message in err, err
    with pytest.raises(SystemExit, match="2"):  # one of four things
        evaluation.main(["--model", "m", "--samples", rows])
