"""Tests of rltr.py: tiny random models against numeric oracles. No network, no GPU, no waiting.

A test called test_mistake_... is named after something that other code bases got wrong.
"""

import collections
import csv
import doctest
import json
import os
import random
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import tokenizers
import torch
import transformers
from tokenizers import decoders, models, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForCausalLM

import rltr
from rltr import Completion, Config, Problem, Rollout, UserError, generate

torch.set_num_threads(1)                 # matrices this small are faster on one
V = 97                                   # vocabulary of the random models


# ------------------------------------------------------------------------ models, tokenizers, rows


def tiny(kind="qwen2", **changes):
    """A random model with large weights, so that its logits are far from equal."""
    torch.manual_seed(0)
    sizes = dict(vocab_size=V, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
                 num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
                 initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes | changes)).eval()


def lm_of(model, tokenizer=None, stop_ids=(0,), vocab_size=V, context=256):
    return rltr.LM(model, tokenizer, stop_ids, vocab_size, context)


def random_prompts(*lengths, high=V):
    source = random.Random(0)
    return [[source.randrange(1, high) for _ in range(n)] for n in lengths]


@torch.no_grad()
def full_logprobs(model, prompt, tokens, vocab_size=V, temperature=1.0):
    """[len(tokens), vocabulary], by the model's own forward over one unpadded row."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1:-1, :vocab_size]
    return (logits.float() / temperature).log_softmax(-1).cpu()


def chosen(logprobs, tokens):
    return logprobs.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
          "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<s>"]


def byte_tokenizer(template=CHATML, reverse=False, add_bos=False):
    """A token a byte (ids 0..255, or the other way round), control tokens from 256 on."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet(), reverse=reverse)
    core = tokenizers.Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(CONTROL)
    if add_bos:
        core.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", core.token_to_id("<s>"))])
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="<|endoftext|>", bos_token="<s>", chat_template=template)


def byte_ids(tokenizer, text):
    """One id a byte of the UTF-8, without asking the tokenizer to encode."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    letters = "".join(part for part, _ in byte_level.pre_tokenize_str(text))
    return [tokenizer.get_vocab()[letter] for letter in letters]


def sampled(model, rewards, noise=0.0, group=3, high=V):
    """Rollouts of ragged lengths with these rewards, log-probs off by `noise`, advantages set."""
    source = random.Random(1)
    prompts = random_prompts(*[3 + 5 * (i // group) % 11 for i in range(0, len(rewards), group)])
    rows = []
    for i, reward in enumerate(rewards):
        tokens = [source.randrange(1, high) for _ in range(source.randrange(0, 9))] + [0]
        logprobs = chosen(full_logprobs(model, prompts[i // group], tokens), tokens)
        rows.append(Rollout(None, prompts[i // group], tokens,
                            [x + source.uniform(-noise, noise) for x in logprobs.tolist()], True, ""))
        rows[-1].reward = float(reward)
    flat = rltr.group_advantages(torch.tensor(rewards).view(-1, group)).flatten().tolist()
    for row, advantage in zip(rows, flat):
        row.advantage = advantage
    return rows


class KeepGradient:
    """In the optimizer's place: keeps the gradient instead of making a step."""

    def __init__(self, model):
        self.model, self.gradient = model, None

    def step(self, max_norm):
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.model.zero_grad()
        return 0.0


# ----------------------------------------------------------------------------------------- problems

ROWS = [{"problem": "1 + 1,\n\"quoted\"?", "solution": "so \\boxed{1} or \\boxed{\\frac{4}{2}}"},
        {"problem": "é?", "solution": "#### 1,000"}]
WRITERS = {
    "jsonl": lambda p: p.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n"),
    "json": lambda p: p.write_text(json.dumps(ROWS)),
    "csv": lambda p: write_csv(p),
    "parquet": lambda p: pytest.importorskip("datasets").Dataset.from_list(ROWS).to_parquet(str(p))}


def write_csv(path):
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, ROWS[0])
        writer.writeheader()
        writer.writerows(ROWS)


@pytest.mark.parametrize("kind", WRITERS)
def test_the_same_problems_from_every_kind_of_file(kind, tmp_path):
    WRITERS[kind](tmp_path / f"data.{kind}")
    first, second = rltr.load_problems(str(tmp_path / f"data.{kind}"))
    assert first == Problem("1 + 1,\n\"quoted\"?", "\\frac{4}{2}")        # the last box, nested braces
    assert second.question == "é?" and second.answer.replace(",", "") == "1000"
    assert rltr.load_problems(str(tmp_path / f"data.{kind}"), limit=1) == [first]


@pytest.mark.parametrize("question", ["question", "problem", "prompt"])
@pytest.mark.parametrize("answer, written", [("answer", "18"), ("answer", "6 * 3 = 18\n#### 18"),
                                             ("answer", 18), ("solution", "Thus $\\boxed{18}$.")])
def test_columns_and_ways_to_write_the_gold_answer(question, answer, written, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": 7, question: "q", answer: written}))
    assert rltr.load_problems(str(tmp_path / "d.jsonl")) == [Problem("q", "18")]


def test_hub_data_training_split_or_the_only_one(monkeypatch):
    asked, row = [], lambda x: [{"problem": x, "answer": "1"}]
    hub = {"openai/gsm8k": {"test": row("a"), "train": row("b")}, "HuggingFaceH4/MATH-500": {"test": row("c")}}
    monkeypatch.setattr("datasets.load_dataset", lambda *a: asked.append(a) or hub[a[0]])
    assert [rltr.load_problems(*a)[0].question for a in (("gsm8k",), ("math500",), ("gsm8k", "test"))] == [
        "b", "c", "a"]
    assert asked[0] == ("openai/gsm8k", "main")
    with pytest.raises(UserError, match="no split dev"):
        rltr.load_problems("gsm8k", "dev")


def test_problems_of_a_step_are_a_function_of_seed_and_step_and_every_epoch_is_a_permutation():
    steps = [rltr.draw_problems(list(range(10)), 4, seed=3, step=s) for s in range(10)]
    assert steps[7] == rltr.draw_problems(list(range(10)), 4, seed=3, step=7)
    flat = sum(steps, [])
    epochs = [flat[i:i + 10] for i in range(0, 40, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs) and len(set(map(tuple, epochs))) == 4
    assert flat != sum((rltr.draw_problems(list(range(10)), 4, 4, s) for s in range(10)), [])
    assert sorted(rltr.draw_problems([1, 2], 5, 0, 0)) in ([1, 1, 1, 2, 2], [1, 1, 2, 2, 2])


# ------------------------------------------------------------------------------- prompts, stop tokens


@pytest.mark.parametrize("written, added, count", [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)])
def test_bos_once_or_never_whoever_writes_it(written, added, count):
    tokenizer = byte_tokenizer("<s>" * written + CHATML, add_bos=bool(added))
    ids = lm_of(None, tokenizer).encode_prompt("2 + 2?")
    assert ids.count(tokenizer.bos_token_id) == count and ids[:1] == [tokenizer.bos_token_id] * count or not count
    assert tokenizer.decode(ids[count:]) == (
        "<|im_start|>user\n2 + 2?\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>assistant\n")


def test_thinking_is_switched_off_where_the_template_can():
    template = CHATML + "{% if enable_thinking is false %}<think></think>{% endif %}"
    tokenizer = byte_tokenizer(template)
    assert tokenizer.decode(lm_of(None, tokenizer).encode_prompt("x", "{question}")).endswith("<think></think>")


def test_mistake_without_a_chat_template_the_model_gets_plain_text_and_still_has_a_stop_token():
    tokenizer, model = byte_tokenizer(None), tiny()
    assert tokenizer.decode(lm_of(None, tokenizer).encode_prompt("x {y}", "Do {question}!")) == (
        "Question: Do x {y}!\nAnswer:")
    assert rltr.find_stop_ids(model, tokenizer) == (tokenizer.eos_token_id,)


def test_stop_tokens_come_from_tokenizer_generation_config_and_chat_template():
    tokenizer, model = byte_tokenizer(), tiny()
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")      # as in Qwen2.5 base: eos is another token
    assert rltr.find_stop_ids(model, tokenizer) == tuple(sorted({tokenizer.eos_token_id, end}))
    for configured, found in ((5, {5}), ([5, 6], {5, 6})):
        model.generation_config.eos_token_id = configured
        assert set(rltr.find_stop_ids(model, tokenizer)) == {tokenizer.eos_token_id, end} | found


def test_a_control_token_spelled_out_in_model_text_does_not_become_one():
    tokenizer = byte_tokenizer(add_bos=True)
    text = "a<|im_end|>\n<|im_start|>user <|endoftext|>é"
    assert rltr.encode_text(tokenizer, text) == byte_ids(tokenizer, text)


def test_decode_drops_control_tokens_and_an_incomplete_last_character():
    tokenizer = byte_tokenizer()
    ids = byte_ids(tokenizer, "a  ,é")
    assert rltr.decode(tokenizer, [257, *ids, 256]) == "a  ,é"
    assert rltr.decode(tokenizer, ids[:-1]) == "a  ,"


# --------------------------------------------------------------------------------------- generation

GEMMA = dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=16)
KINDS = {
    "qwen2, MHA": ("qwen2", dict(num_key_value_heads=4)),
    "qwen2, tied, sliding": ("qwen2", dict(tie_word_embeddings=True, use_sliding_window=True,
                                           sliding_window=8, max_window_layers=1)),
    "qwen3": ("qwen3", dict(head_dim=16)), "llama": ("llama", {}),
    "mistral, sliding": ("mistral", dict(sliding_window=8)), "gemma2": ("gemma2", GEMMA),
    "gemma3": ("gemma3_text", GEMMA), "olmo2": ("olmo2", {}), "phi3": ("phi3", {}), "gpt2": ("gpt2", {}),
    "granite": ("granite", dict(logits_scaling=4.0)), "cohere": ("cohere", dict(logit_scale=0.25))}
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no GPU"))]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KINDS)
def test_greedy_tokens_are_those_of_transformers_and_logprobs_those_of_a_full_forward(name, device):
    model = tiny(KINDS[name][0], **KINDS[name][1]).to(device)
    prompts, expected = random_prompts(5, 1, 17, 30, 2), []
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=16, do_sample=False)
        expected.append(out[0, len(prompt):].tolist())
    stop = expected[2][9]                                    # so that some rows stop early
    expected = [e[:e.index(stop) + 1] if stop in e else e for e in expected]
    rltr.check_model(lm_of(model))
    for max_rows in (None, 1, 2, 5):
        got = generate(model, prompts, samples=2, max_new_tokens=16, temperature=0, stop_ids=(stop,),
                       max_rows=max_rows)
        assert len(got) == 10
        for i, c in enumerate(got):
            logprobs = full_logprobs(model, prompts[i // 2], c.tokens)
            assert (chosen(logprobs, c.tokens) - torch.tensor(c.logprobs)).abs().max() < 1e-4
            pairs = list(zip(c.tokens, expected[i // 2], strict=True))
            first = next((t for t, (a, b) in enumerate(pairs) if a != b), None)
            if first is not None:                            # only a draw may go either way
                best, second = logprobs[first].topk(2).values
                assert best - second < 1e-4, f"row {i}, token {first}"


@pytest.mark.parametrize("kind, changes", [
    ("falcon", dict(alibi=True)), ("bloom", {}), ("mamba", {}), ("recurrent_gemma", dict(lru_width=32)),
    ("gpt_oss", dict(head_dim=16, num_local_experts=4, num_experts_per_tok=2))])
def test_attention_that_we_would_compute_wrongly_is_refused(kind, changes):
    with pytest.raises(UserError, match=kind):
        rltr.check_model(lm_of(tiny(kind, **changes)))


@pytest.mark.parametrize("kind, changes", [("qwen2", {}), ("gpt2", {}), ("mistral", {"sliding_window": 4})])
def test_mistake_a_short_row_beside_a_long_one_gets_wrong_positions_or_sees_padding(kind, changes):
    lm, prompts = lm_of(tiny(kind, **changes)), random_prompts(2, 40, 9)
    together = generate(lm.model, prompts, max_new_tokens=12, seed=1)
    alone = [generate(lm.model, [p], max_new_tokens=12, seed=1, first_row=i)[0] for i, p in enumerate(prompts)]
    rows = [Rollout(None, p, c.tokens, c.logprobs, False, "") for p, c in zip(prompts, together)]
    trained = rltr.completion_logprobs(lm, rows)[0].split([len(r.tokens) for r in rows])
    for prompt, a, b, logprobs in zip(prompts, together, alone, trained):
        want = chosen(full_logprobs(lm.model, prompt, a.tokens), a.tokens)
        assert a.tokens == b.tokens
        assert torch.allclose(torch.tensor(a.logprobs), want, atol=1e-4)
        assert torch.allclose(logprobs, want, atol=1e-4)


def test_sampling_follows_the_softmax():
    model, [prompt], n, k = tiny(initializer_range=0.15), random_prompts(5), 4000, 30
    drawn = collections.Counter(tuple(c.tokens) for c in generate(
        model, [prompt], samples=n, max_new_tokens=2, temperature=0.8, vocab_size=k, seed=1))
    first = full_logprobs(model, prompt, [0], k, 0.8)[0]
    second = torch.stack([full_logprobs(model, prompt, [t, 0], k, 0.8)[1] for t in range(k)])
    expected = (first[:, None] + second).exp().numpy() * n                        # [k, k]
    observed = np.zeros((k, k))
    for pair, times in drawn.items():
        observed[pair] = times
    often = expected >= 5
    cells = [*zip(observed[often], expected[often]), (observed[~often].sum(), expected[~often].sum())]
    chi2 = sum((o - e) ** 2 / e for o, e in cells)
    assert len(cells) > 100 and abs(chi2 - len(cells)) < 4 * (2 * len(cells)) ** 0.5


def test_sampling_never_takes_a_token_of_probability_zero():
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    tokens, logprobs = rltr.sample_tokens(logits, 1.0, torch.tensor([1e-45, 0.4999, 0.5001, 1.0]))
    assert tokens.tolist() == [1, 1, 3, 3]
    assert torch.allclose(logprobs, torch.tensor(0.5).log())


def test_texts_do_not_depend_on_max_rows_and_first_row_shifts_the_random_numbers():
    model, prompts = tiny(), random_prompts(4, 11, 3, 7)
    settings = dict(samples=3, max_new_tokens=15, stop_ids=(3, 4, 5, 6, 7, 8))
    whole = generate(model, prompts, seed=5, **settings)
    assert len({tuple(c.tokens) for c in whole}) == 12               # the samples of a prompt differ
    assert len({len(c.tokens) for c in whole}) > 4                   # ragged: rows leave, others come
    for max_rows in (1, 2, 5, 7):
        for a, b in zip(whole, generate(model, prompts, seed=5, max_rows=max_rows, **settings), strict=True):
            assert a.tokens == b.tokens and a.finished == b.finished
            assert np.allclose(a.logprobs, b.logprobs, atol=1e-4)
    rest = generate(model, prompts[2:], seed=5, first_row=6, **settings)
    assert [c.tokens for c in rest] == [c.tokens for c in whole[6:]]
    assert [c.tokens for c in generate(model, prompts, seed=6, **settings)] != [c.tokens for c in whole]


def test_stop_tokens_end_a_row_and_belong_to_it():
    stops, model = (3, 4, 5, 6, 7, 8, 9), tiny()
    done = generate(model, random_prompts(4, 9), samples=20, max_new_tokens=[6, 12], stop_ids=stops, seed=0)
    assert 5 < sum(c.finished for c in done) < 40
    for i, c in enumerate(done):
        assert len(c.tokens) == len(c.logprobs) and not set(c.tokens[:-1]) & set(stops)
        assert c.finished == (c.tokens[-1] in stops)
        assert c.finished or len(c.tokens) == (6, 12)[i // 20]       # each prompt has its own limit
        assert len(c.tokens) <= (6, 12)[i // 20]
    assert generate(model, [], max_new_tokens=3) == []
    for prompts, limit in (([[]], 3), ([[1]], 0)):
        with pytest.raises(UserError):
            generate(model, prompts, max_new_tokens=limit)


def test_vocabulary_rows_beyond_the_tokenizer_never_come_out():
    model = tiny(tie_word_embeddings=False)
    model.lm_head.weight.data[60:] *= 5                              # they would, mostly
    prompts = random_prompts(3, 8, high=60)
    assert any(max(c.tokens) >= 60 for c in generate(model, prompts, max_new_tokens=9, temperature=0))
    for temperature in (0, 1.0):
        for prompt, c in zip(prompts, generate(model, prompts, max_new_tokens=20, temperature=temperature,
                                               vocab_size=60, seed=0)):
            assert max(c.tokens) < 60
            want = chosen(full_logprobs(model, prompt, c.tokens, 60), c.tokens)
            assert torch.allclose(torch.tensor(c.logprobs), want, atol=1e-4)


def test_mistake_the_loss_uses_another_distribution_than_the_sampler():
    model = tiny("gpt2", resid_pdrop=0.3, attn_pdrop=0.3)            # dropout would be another, too
    lm, config = lm_of(model, byte_tokenizer(), vocab_size=60), Config(group=4, temperature=0.7, max_new_tokens=9)
    rollouts = rltr.sample_rollouts(lm, [(Problem("", ""), p) for p in random_prompts(3, 8, high=60)], config, 0)
    for r in rollouts:
        want = chosen(full_logprobs(model, r.prompt, r.tokens, 60, 0.7), r.tokens)
        assert torch.allclose(torch.tensor(r.logprobs), want, atol=1e-4)
    for i, r in enumerate(rollouts):
        r.reward, r.advantage = float(i % 2), 2.0 * (i % 2) - 1
    assert rltr.update(lm, KeepGradient(model), rollouts, config)["logprob_gap_max"] < 1e-4


def embedded(model):
    """Watches a model: the shapes of the token ids that go through it."""
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda m, args, out: shapes.append(tuple(args[0].shape)))
    return shapes


@pytest.mark.parametrize("max_rows", [None, 2, 3, 7])
def test_a_prompt_is_prefilled_once_and_finished_rows_cost_nothing(max_rows):
    model, prompts = tiny(), random_prompts(9, 6, 4)
    shapes = embedded(model)
    done = generate(model, prompts, samples=8, max_new_tokens=30, stop_ids=range(1, 30), seed=0, max_rows=max_rows)
    tokens = [len(c.tokens) for c in done]
    assert sum(rows for rows, length in shapes if length > 1) == 3
    assert max(tokens) > 3 * np.mean(tokens)                         # a batch with pads would cost that
    assert sum(rows for rows, length in shapes if length == 1) <= 1.2 * sum(tokens)


@pytest.mark.parametrize("kind, changes", [("gpt2", dict(resid_pdrop=0.5)), ("qwen2", {})])
def test_mistake_train_mode_or_gradient_checkpointing_switch_the_cache_off(kind, changes):
    model, prompts = tiny(kind, **changes), random_prompts(5, 12)
    want = generate(model, prompts, max_new_tokens=10, seed=0)
    attention = model.config._attn_implementation
    model.gradient_checkpointing_enable()
    model.train()
    shapes = embedded(model)
    assert generate(model, prompts, max_new_tokens=10, seed=0) == want
    assert sum(rows * length for rows, length in shapes) <= 2 * 12 + 2 * 10
    assert model.training and all(m.training for m in model.modules()) and torch.is_grad_enabled()
    assert model.config._attn_implementation == attention


# --------------------------------------------------------------- cut, receiver, transfer, advantages


def test_cut_prefix_floors_and_does_not_count_a_final_stop_token():
    y = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    for tau, length in ((1e-12, 0), (0.0999, 0), (0.1, 1), (0.55, 5), (0.99, 9), (1.0, 10)):
        assert rltr.cut_prefix(y, tau) == rltr.cut_prefix([*y, 2], tau, (1, 2)) == y[:length]
    assert rltr.cut_prefix([5, 2, 6, 2, 2], 1.0, (2,)) == [5, 2, 6, 2]       # one, and only at the end
    assert rltr.cut_prefix([5, 6], 1.0, (2,)) == [5, 6]
    assert rltr.cut_prefix([], 1.0, (2,)) == rltr.cut_prefix([2], 1.0, (2,)) == []


class Scripted:
    """In the place of rltr.generate: every continuation is `tokens`; keeps what it was asked."""

    def __init__(self, monkeypatch, tokens):
        self.tokens, self.prompts, self.settings = tokens, [], {}
        monkeypatch.setattr(rltr, "generate", self)

    def __call__(self, model, prompts, **settings):
        self.prompts, self.settings = prompts, settings
        return [Completion(list(self.tokens), [0.0] * len(self.tokens), True) for _ in prompts]


RECEIVER = "{% for m in messages %}[{{ m.content }}]{% endfor %}{% if add_generation_prompt %}->{% endif %}"


def rollout(tokenizer, text, gold="7", end="<|im_end|>"):
    ids = byte_ids(tokenizer, text) + ([tokenizer.convert_tokens_to_ids(end)] if end else [])
    return Rollout(Problem("1+6?", gold), [1], ids, [0.0] * len(ids), True, text)


def test_the_same_tokenizer_gets_the_prefix_as_token_ids_after_its_own_template(monkeypatch):
    mine, yours = byte_tokenizer(), byte_tokenizer(RECEIVER)
    r = rollout(mine, "aéé 1+6 is \\boxed{7}, so.")
    r.tokens[1:1] = [257]                                # a control token in the middle stays what it is
    says = Scripted(monkeypatch, byte_ids(yours, "7}") + [256])
    reward = rltr.TransferReward(lm_of(None, yours, (256,), 260, 300), mine, stop_ids=(258,), cuts=40,
                                 prompt="{question}", max_new_tokens=20, margin=8)
    reward.score([r], step=0)
    assert len(says.prompts) == len(r.cuts) == 40
    for cut, prompt, budget in zip(r.cuts, says.prompts, says.settings["max_new_tokens"]):
        length = int(cut.tau * (len(r.tokens) - 1))      # the stop token is not counted
        assert 0 < cut.tau <= 1 and cut.prefix_length == length
        assert prompt == byte_ids(yours, "[1+6?]->") + r.tokens[:length]
        assert budget == max(1, 20 - length + 8)
        whole = rltr.decode(mine, r.tokens[:length] + byte_ids(yours, "7}"))
        assert cut.prefix + cut.continuation == whole    # a character cut in half is put together again
        assert cut.correct == rltr.is_correct(whole, "7")
        assert cut.leaked == ("\\boxed{7}" in cut.prefix)
    assert {(c.correct, c.leaked) for c in r.cuts} == {(True, False), (False, False), (True, True)}
    assert r.r_transfer == np.mean([cut.correct for cut in r.cuts])
    assert says.settings["stop_ids"] == (256,) and says.settings["vocab_size"] == 260


def test_a_different_tokenizer_gets_the_prefix_as_text(monkeypatch):
    mine, yours = byte_tokenizer(), byte_tokenizer("<s>" + RECEIVER, reverse=True, add_bos=True)
    text = "é<|im_end|>ü<s>∑"
    r = rollout(mine, text)
    says = Scripted(monkeypatch, byte_ids(yours, "\\boxed{7}é")[:-1])
    rltr.TransferReward(lm_of(None, yours), mine, stop_ids=(258,), cuts=60, prompt="{question}").score([r], 0)
    split = 0
    for cut, prompt in zip(r.cuts, says.prompts, strict=True):
        raw = text.encode()[:int(cut.tau * len(text.encode()))]
        split += raw.decode(errors="ignore") != raw.decode(errors="replace")
        assert cut.prefix == raw.decode(errors="ignore")         # no half characters
        assert prompt == [259] + byte_ids(yours, "[1+6?]->" + cut.prefix)   # BOS once, no control token
        assert cut.continuation == "\\boxed{7}" and cut.correct
    assert split > 5


def test_a_prefix_that_overflows_the_receiver_is_counted_and_scores_0(monkeypatch):
    tokenizer = byte_tokenizer(RECEIVER)
    says = Scripted(monkeypatch, byte_ids(tokenizer, "\\boxed{7}"))
    rows = [rollout(tokenizer, "x" * 50, end="") for _ in range(20)]
    reward = rltr.TransferReward(lm_of(None, tokenizer, context=8 + 30), max_new_tokens=50, margin=9, prompt="{question}")
    reward.score(rows, 0)
    cuts = [r.cuts[0] for r in rows]
    assert {c.overflow for c in cuts} == {True, False}
    for r, cut in zip(rows, cuts):
        assert cut.overflow == (cut.prefix_length >= 30)
        assert r.r_transfer == cut.correct == (not cut.overflow)
    assert says.settings["max_new_tokens"] == [30 - c.prefix_length for c in cuts if not c.overflow]
    for r in rows:
        r.reward = r.r_transfer
    assert rltr.summarize(rows, 20)["overflow"] == np.mean([c.overflow for c in cuts])


def test_an_empty_prefix_is_legal_and_the_receiver_solves_alone(monkeypatch):
    tokenizer = byte_tokenizer(RECEIVER)
    says = Scripted(monkeypatch, byte_ids(tokenizer, "\\boxed{7}"))
    rows = [rollout(tokenizer, "", end="<|endoftext|>"), rollout(tokenizer, "", end="")]
    rltr.TransferReward(lm_of(None, tokenizer), prompt="{question}").score(rows, 0)
    assert says.prompts == [byte_ids(tokenizer, "[1+6?]->")] * 2
    assert [(r.r_transfer, r.cuts[0].prefix_length) for r in rows] == [(1.0, 0)] * 2


def test_tau_lies_in_0_excluded_to_1_included(monkeypatch):
    tokenizer, real = byte_tokenizer(RECEIVER), np.random.default_rng

    class Zeros:                                         # the smallest number that random() can give
        def random(self, shape=None):
            return np.zeros(shape)

    says = Scripted(monkeypatch, byte_ids(tokenizer, "x"))
    monkeypatch.setattr(np.random, "default_rng", lambda *a: Zeros())
    row = rollout(tokenizer, "abc", end="")
    rltr.TransferReward(lm_of(None, tokenizer), prompt="{question}").score([row], 0)
    assert row.cuts[0].tau == 1.0 and says.prompts == [byte_ids(tokenizer, "[1+6?]->abc")]
    monkeypatch.setattr(np.random, "default_rng", real)
    rows = [rollout(tokenizer, "abc") for _ in range(400)]
    reward = rltr.TransferReward(lm_of(None, tokenizer), cuts=5)
    reward.score(rows, 3)
    taus = [[c.tau for c in r.cuts] for r in rows]
    assert np.allclose(np.histogram(taus, bins=8, range=(0, 1))[0], 250, atol=60)
    assert len({t for row in taus for t in row}) == 2000             # each cut has its own
    reward.score(rows, 3)
    assert taus == [[c.tau for c in r.cuts] for r in rows]           # a function of (seed, step)
    reward.score(rows, 4)
    assert taus != [[c.tau for c in r.cuts] for r in rows]


@pytest.mark.parametrize("style", ["texts", "messages"])
@pytest.mark.parametrize("ids, generator_known", [(False, False), (True, True), (True, False), (False, True)])
def test_trl_calls_the_transfer_reward(style, ids, generator_known, monkeypatch):
    mine, yours = byte_tokenizer(), byte_tokenizer(RECEIVER, reverse=True)
    texts = ["abcdef", "ghijkl \\boxed{7}"]
    says = Scripted(monkeypatch, byte_ids(yours, "\\boxed{7}"))
    reward = rltr.TransferReward(lm_of(None, yours), mine if generator_known else None, cuts=2, prompt="{question}")
    prompts, completions = ["1+6?", "3+4?"], texts
    if style == "messages":
        prompts = [[{"role": "user", "content": p}] for p in prompts]
        completions = [[{"role": "assistant", "content": t}] for t in texts]
    extra = {"completion_ids": [byte_ids(mine, t) + [256] for t in texts]} if ids else {}
    got = reward(prompts=prompts, completions=completions, answer=["7", "8"], trainer_state=None, **extra)
    assert got == [1.0, 0.0] and all(type(x) is float for x in got) and reward.__name__
    assert len(says.prompts) == 4
    for i, prompt in enumerate(says.prompts):
        head = byte_ids(yours, ["[1+6?]->", "[3+4?]->"][i // 2])
        assert prompt[:len(head)] == head
        assert texts[i // 2].startswith(yours.decode(prompt[len(head):]))
    first = says.prompts
    reward(prompts, completions, ["7", "8"], **extra)
    assert says.prompts != first                                     # the next call cuts elsewhere


def test_rewards_are_combined_and_the_raw_ones_kept():
    rows = [rollout(byte_tokenizer(), text) for text in ("\\boxed{7}", "\\boxed{8}", "7", "\\boxed{7}")]
    rows[3].finished = False
    rltr.score_answers(rows)
    for r, transfer in zip(rows, (0.25, 0.5, 1.0, 0.0)):
        r.r_transfer = transfer
    rltr.combine_rewards(rows, Config(answer_weight=2.0, transfer_weight=4.0, format_weight=8.0))
    assert [r.reward for r in rows] == [2 + 1 + 8, 2 + 8, 4, 2]
    assert [(r.r_answer, r.r_format, r.r_transfer) for r in rows] == [
        (1, 1, 0.25), (0, 1, 0.5), (0, 0, 1.0), (1, 0, 0.0)]


def test_advantages_against_numpy():
    rewards = np.random.default_rng(0).choice([0.0, 0.1, 1.0, 1.1, 2.1], (50, 8))
    centred = rewards - rewards.mean(1, keepdims=True)
    want = centred / (rewards.std(1, keepdims=True) + 1e-6)
    for given in (rewards, rewards.tolist(), torch.tensor(rewards)):
        assert np.allclose(rltr.group_advantages(given), want, atol=1e-12)
    assert np.allclose(rltr.group_advantages(rewards, normalize_std=False), centred, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_mistake_twelve_rewards_of_1_point_1_have_a_std_and_so_an_advantage(dtype, normalize):
    for value in (1.1, 0.1, 0.3, 1e6 / 3):
        rewards = torch.full((2, 12), value, dtype=dtype)
        assert (rltr.group_advantages(rewards, normalize) == 0).all()


# ------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("name", ["qwen2, tied, sliding", "gemma2", "granite", "cohere"])
def test_mistake_logits_of_all_tokens_at_once_and_yet_the_chunks_are_exact(name, chunk):
    model = tiny(KINDS[name][0], **KINDS[name][1])
    lm, rows, sizes = lm_of(model, vocab_size=90), sampled(model, [0, 1, 0, 1], group=2, high=90), []
    logits = [model(input_ids=torch.tensor([r.prompt + r.tokens]), use_cache=False).logits[
        0, len(r.prompt) - 1:-1, :90] / 0.7 for r in rows]
    want = torch.cat([chosen(x.log_softmax(-1), r.tokens) for x, r in zip(logits, rows)])
    entropy = torch.cat([torch.distributions.Categorical(logits=x).entropy() for x in logits])
    weights = torch.randn(len(want), generator=torch.Generator().manual_seed(0))
    parameters = list(model.parameters())
    expected = torch.autograd.grad((want * weights).sum(), parameters)
    model.get_output_embeddings().register_forward_hook(lambda m, i, out: sizes.append(out.numel() // V))
    got, got_entropy = rltr.completion_logprobs(lm, rows, 0.7, chunk)
    assert sum(sizes) == len(want) and max(sizes) <= (chunk or len(want))      # completion tokens only
    for a, b in zip(torch.autograd.grad((got * weights).sum(), parameters), expected):
        assert torch.allclose(a, b, atol=1e-4 * b.abs().max().item())
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(got_entropy, entropy, atol=1e-5)


def test_the_clipped_objective_on_cases_made_by_hand():
    for rho, advantage, want, slope in (
            (1.0, 2.0, 2.0, 2.0), (1.5, 1.0, 1.3, 0.0), (1.5, -1.0, -1.5, -1.5), (0.5, 1.0, 0.5, 0.5),
            (0.5, -1.0, -0.8, 0.0), (1.25, 1.0, 1.25, 1.25), (0.85, -2.0, -1.7, -1.7), (3.0, 0.0, 0.0, 0.0)):
        logp = torch.tensor([-2.0 + np.log(rho)], requires_grad=True)
        value = rltr.policy_objective(logp, torch.tensor([-2.0]), torch.tensor([advantage]), 0.2, 0.3)
        value.sum().backward()
        assert value.item() == pytest.approx(want) and logp.grad.item() == pytest.approx(slope)


def naive_update(model, rollouts, config, vocab_size):
    """Step 8 by its formula, a token at a time: objective, gradient, and the means over tokens."""
    groups = [rollouts[i:i + config.group] for i in range(0, len(rollouts), config.group)]
    live = [g for g in groups if len({r.reward for r in g}) > 1]
    objective, entropies, gaps = 0.0, [], []
    for group in live:
        rewards = np.array([r.reward for r in group])
        for r, a in zip(group, (rewards - rewards.mean()) / (rewards.std() + 1e-6)):
            logits = model(input_ids=torch.tensor([r.prompt + r.tokens]), use_cache=False).logits[0]
            for t, token in enumerate(r.tokens):
                p = (logits[len(r.prompt) + t - 1, :vocab_size] / config.temperature).softmax(-1)
                rho = p[token] / np.exp(r.logprobs[t])
                low, high = 1 - config.clip_low, 1 + config.clip_high
                objective = objective + (min if a > 0 else max)(rho, high if a > 0 else low) * a
                entropies.append(-(p * p.log()).sum().item())
                gaps.append(abs(p[token].log().item() - r.logprobs[t]))
    gradient = torch.autograd.grad(-objective / len(gaps), list(model.parameters()))
    return objective.item() / len(gaps), torch.cat([g.flatten() for g in gradient]), entropies, gaps


REWARDS = [1, 0, 0, .1, .1, .1, 2.1, 1.1, .1, 0, 0, 0, 0, 1, 1]      # groups of 3: two of five are dead


@pytest.mark.parametrize("in_a_batch", [1, 2, 4, 99])
def test_mistake_divisor_or_metrics_of_one_micro_batch_or_of_dead_groups(in_a_batch):
    lm = lm_of(tiny(), vocab_size=90)
    rows = sampled(lm.model, REWARDS, noise=0.6, high=90)
    longest = max(len(r.prompt) + len(r.tokens) for r in rows if r.advantage)
    config = Config(group=3, temperature=0.9, token_budget=in_a_batch * longest, clip_high=0.28)
    objective, gradient, entropies, gaps = naive_update(lm.model, rows, config, 90)
    assert max(gaps) > 0.5                                           # so that both clips are at work
    optimizer = KeepGradient(lm.model)
    metrics = rltr.update(lm, optimizer, rows, config)
    assert torch.allclose(optimizer.gradient, gradient, atol=1e-5 * gradient.abs().max().item())
    for key, want in (("objective", objective), ("entropy", np.mean(entropies)),
                      ("logprob_gap_mean", np.mean(gaps)), ("logprob_gap_max", max(gaps))):
        assert metrics[key] == pytest.approx(want, rel=1e-4), key    # not those of the last micro-batch


def test_mistake_memory_runs_out_after_hours_because_a_longer_batch_comes_late():
    rows = sampled(tiny(), [0, 1] * 20, group=2)
    size = lambda r: len(r.prompt) + len(r.tokens)
    for budget in (1, 20, 45, 100, 10 ** 6):
        batches = rltr.micro_batches(rows, budget)
        areas = [len(b) * max(map(size, b)) for b in batches]
        assert sorted(map(id, rows)) == sorted(id(r) for b in batches for r in b)
        assert all(a <= budget or len(b) == 1 for a, b in zip(areas, batches))
        assert [size(r) for b in batches for r in b] == sorted(map(size, rows), reverse=True)
    assert len(rltr.micro_batches(rows, 1)) == 40 and len(batches) == 1


def test_mistake_the_stop_token_is_not_trained_because_it_is_the_pad_token():
    lm = lm_of(tiny(), byte_tokenizer(), stop_ids=(0,))              # pad_right pads with 0, too
    rows = [Rollout(None, [5, 6], tokens, [], True, "") for tokens in ([7, 0], [8])]
    for row, advantage in zip(rows, (1.0, -1.0)):
        row.logprobs = chosen(full_logprobs(lm.model, row.prompt, row.tokens), row.tokens).tolist()
        row.reward = row.advantage = advantage
    before = full_logprobs(lm.model, [5, 6, 7], [0])[0, 0]
    config = Config(group=2)
    metrics = rltr.update(lm, rltr.MasterAdamW(lm.model, 1e-3), rows, config)
    assert metrics["objective"] == pytest.approx((2 * 1 - 1 * 1) / 3)       # two tokens up, one down
    assert full_logprobs(lm.model, [5, 6, 7], [0])[0, 0] > before + 0.01


def test_a_batch_of_dead_groups_changes_nothing_and_a_gradient_that_is_not_finite_neither():
    lm = lm_of(tiny())
    optimizer = rltr.MasterAdamW(lm.model, 1e-2, weight_decay=0.5)
    before = [p.clone() for p in lm.model.parameters()]
    metrics = rltr.update(lm, optimizer, sampled(lm.model, [1, 1, 1, .1, .1, .1]), Config(group=3))
    rows = sampled(lm.model, [0, 1, 1])
    rows[0].advantage = float("nan")
    rltr.update(lm, optimizer, rows, Config(group=3))
    assert metrics["grad_norm"] is None
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters()))


def test_mistake_bf16_weights_do_not_move_at_lr_1e_6():
    def model(dtype):
        torch.manual_seed(0)
        layer = torch.nn.Linear(16, 16, bias=False)
        layer.weight.data.uniform_(0.01, 0.03)
        return layer.bfloat16().to(dtype)

    def train(layer, optimizer, steps=range(100)):
        for _ in steps:
            layer.weight.backward(direction.to(layer.weight.dtype))
            optimizer(layer)
        return layer.weight.detach()

    direction, start = torch.randn(16, 16).bfloat16(), model(torch.bfloat16).weight.detach()
    fp32, bf16, plain = model(torch.float32), model(torch.bfloat16), model(torch.bfloat16)
    exact, ours = rltr.MasterAdamW(fp32, 1e-6), rltr.MasterAdamW(bf16, 1e-6)
    naive = torch.optim.AdamW(plain.parameters(), 1e-6)
    moved = train(bf16, lambda layer: ours.step(1e9))
    assert torch.equal(moved, train(fp32, lambda layer: exact.step(1e9)).bfloat16())
    assert (moved != start).float().mean() > 0.5
    assert torch.equal(train(plain, lambda layer: naive.step()), start)      # what ours is there for

    again = model(torch.bfloat16)                        # masters, too, outlive a checkpoint
    resumed = rltr.MasterAdamW(again, 1e-6)
    again.weight.data.copy_(moved)
    resumed.load_state_dict(ours.state_dict())
    for _ in range(60):
        assert torch.equal(train(again, lambda layer: resumed.step(1e9), [0]),
                           train(bf16, lambda layer: ours.step(1e9), [0]))
    for small in (1.0, 2.0 ** -10):                      # micro-batches add up in fp32: bf16 has 8 bits
        again.weight.backward(torch.full((16, 16), small, dtype=torch.bfloat16))
    assert resumed.step(1e9) == pytest.approx(16 * (1 + 2 ** -10), rel=1e-6)


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A folder like make_tiny's, with smaller models that learnt less: half of the answers are right."""
    folder = tmp_path_factory.mktemp("tiny")
    os.environ["XDG_CACHE_HOME"] = str(folder)
    rltr.warm_start(folder / "generator", 32, 100, 0.3, 0)
    rltr.warm_start(folder / "receiver", 40, 60, 0.0, 1)
    problems = [rltr.tiny_problem(random.Random(i)) for i in range(9)]
    (folder / "train.jsonl").write_text("".join(json.dumps({"question": q, "answer": a}) + "\n" for q, _, a in problems))
    return folder


def run(task, out, *flags):
    return rltr.main([
        "--model", f"{task}/generator", "--receiver", f"{task}/receiver", "--data", f"{task}/train.jsonl",
        "--prompt", "{question}", "--steps", "4", "--prompts", "2", "--group", "4", "--max-new-tokens", "28",
        "--cuts", "2", "--lr", "1e-3", "--save-every", "2", "--device", "cpu", "--out", str(out), *flags])


def read(out, name):
    return [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]


def weights(folder):
    model = AutoModelForCausalLM.from_pretrained(folder)
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def untimed(metrics):
    return [{k: v for k, v in row.items() if not k.startswith(("seconds", "tokens_per", "peak"))} for row in metrics]


@pytest.fixture(scope="session")
def finished_run(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    assert run(task, out) == 0
    return out


def test_the_folder_of_a_run(task, finished_run):
    assert {p.name for p in finished_run.iterdir()} >= {"config.json", "metrics.jsonl", "rollouts.jsonl", "checkpoints", "final"}
    assert sorted(p.name for p in (finished_run / "checkpoints").iterdir()) == ["step-000002", "step-000004"]
    assert json.loads((finished_run / "config.json").read_text())["lr"] == 1e-3
    assert [m["step"] for m in read(finished_run, "metrics")] == [1, 2, 3, 4]
    assert len(read(finished_run, "rollouts")) == 4 * 4
    final = weights(finished_run / "final")
    assert torch.equal(final, weights(finished_run / "checkpoints/step-000004"))
    assert (final - weights(task / "generator")).abs().max() > 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(finished_run / "final")
    assert tokenizer.decode(tokenizer.encode("Q1>*6;")) == "Q1>*6;"


def test_what_is_logged_is_what_happened(task, tmp_path):
    assert run(task, tmp_path / "a", "--prompts", "1", "--group", "8", "--transfer-weight", "3") == 0
    config, tokenizer = Config(group=8, transfer_weight=3.0), rltr.tiny_tokenizer()
    live = 0
    for metrics in read(tmp_path / "a", "metrics"):
        rows = [r for r in read(tmp_path / "a", "rollouts") if r["step"] == metrics["step"]]
        cuts, mean = [c for r in rows for c in r["cuts"]], lambda key: np.mean([r[key] for r in rows])
        rewards = np.array([r["reward"] for r in rows])
        assert np.allclose([r["advantage"] for r in rows], (rewards - rewards.mean()) / (rewards.std() + 1e-6))
        for r in rows:
            assert r["reward"] == pytest.approx(r["r_answer"] + 3 * r["r_transfer"] + 0.1 * r["r_format"])
            assert r["text"] == rltr.decode(tokenizer, r["tokens"]) and r["finished"] == (r["tokens"][-1] == 1)
            assert r["r_answer"] == rltr.is_correct(r["text"], r["problem"]["answer"])
            assert len(r["cuts"]) == 2 and r["r_transfer"] == np.mean([c["correct"] for c in r["cuts"]])
            for c in r["cuts"]:
                assert c["prefix_length"] == int(c["tau"] * (len(r["tokens"]) - r["finished"]))
                assert c["prefix"] == rltr.decode(tokenizer, r["tokens"][:c["prefix_length"]])
                assert c["correct"] == rltr.is_correct(c["prefix"] + c["continuation"], r["problem"]["answer"])
        for key, want in (("reward", mean("reward")), ("accuracy", mean("r_answer")), ("transfer", mean("r_transfer")),
                          ("format", mean("r_format")), ("finished", mean("finished")),
                          ("length", np.mean([len(r["tokens"]) for r in rows])),
                          ("leak", np.mean([c["leaked"] for c in cuts])),
                          ("dead_groups", float(len(set(rewards)) == 1))):
            assert metrics[key] == pytest.approx(want), key
        for low in (0.0, 0.25, 0.5, 0.75):
            inside = [c["correct"] for c in cuts if low < c["tau"] <= low + 0.25]
            assert metrics[f"transfer_tau_{low}_{low + 0.25}"] == (np.mean(inside) if inside else None)
        live += metrics["dead_groups"] < 1
        assert metrics["dead_groups"] or metrics["logprob_gap_max"] < 1e-3
    assert live


def test_rlvr_loads_no_receiver_and_self_is_a_frozen_copy(task, tmp_path, monkeypatch):
    assert run(task, tmp_path / "b", "--transfer-weight", "0", "--receiver", "does/not-exist", "--steps", "2") == 0
    assert not any(r["cuts"] or r["r_transfer"] for r in read(tmp_path / "b", "rollouts"))
    loaded, load_lm = [], rltr.load_lm
    monkeypatch.setattr(rltr, "load_lm", lambda *a, **k: loaded.append(load_lm(*a, **k)) or loaded[-1])
    assert run(task, tmp_path / "c", "--receiver", "self", "--steps", "2") == 0
    flat = [torch.cat([p.detach().flatten() for p in lm.model.parameters()]) for lm in loaded[:2]]
    assert torch.equal(flat[1], weights(task / "generator")) and not torch.equal(flat[0], flat[1])


def test_mistake_resume_repeats_a_batch_or_reseeds(task, finished_run, tmp_path, monkeypatch):
    out, save, saved = tmp_path / "b", torch.save, []

    def killed_in_the_second_checkpoint(*arguments, **settings):
        saved.append(arguments)
        if len(saved) == 2:
            raise KeyboardInterrupt
        save(*arguments, **settings)

    monkeypatch.setattr(torch, "save", killed_in_the_second_checkpoint)
    with pytest.raises(KeyboardInterrupt):
        run(task, out)
    monkeypatch.undo()
    assert len(read(out, "metrics")) == 4 and not (out / "final").exists()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')                               # and a line cut off
    assert rltr.main(["--resume", str(out)]) == 0
    for name in ("metrics", "rollouts"):
        assert untimed(read(out, name)) == untimed(read(finished_run, name))
    assert torch.equal(weights(out / "final"), weights(finished_run / "final"))
    optimizers = [torch.load(folder / "checkpoints/step-000004/optimizer.pt") for folder in (out, finished_run)]
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in zip(
        *(o["adam"]["state"].values() for o in optimizers), strict=True))
    assert rltr.main(["--resume", str(out), "--lr", "1"]) == 2       # that would be another run
    assert rltr.main(["--resume", str(tmp_path / "nothing")]) == 2


def test_two_steps_and_a_resume_to_four_are_four_steps(task, finished_run, tmp_path):
    assert run(task, tmp_path / "b", "--steps", "2") == 0
    assert rltr.main(["--resume", str(tmp_path / "b"), "--steps", "4"]) == 0
    assert untimed(read(tmp_path / "b", "metrics")) == untimed(read(finished_run, "metrics"))
    assert torch.equal(weights(tmp_path / "b/final"), weights(finished_run / "final"))


def test_without_model_the_tiny_settings_replace_what_the_user_did_not_set(task, tmp_path, monkeypatch):
    monkeypatch.setattr(rltr, "make_tiny", lambda seed: task)
    assert rltr.main(["--steps", "1", "--prompts", "2", "--cuts", "3", "--eval-data", "", "--out", str(tmp_path / "a")]) == 0
    config = json.loads((tmp_path / "a/config.json").read_text())
    assert (config["steps"], config["cuts"], config["eval_data"]) == (1, 3, "")
    assert config["model"] == f"{task}/generator" and config["receiver"] == f"{task}/receiver"
    for key in set(rltr.TINY) - {"steps", "cuts", "eval_data", "model", "receiver", "data"}:
        assert config[key] == rltr.TINY[key], key
    assert config["group"] == Config().group


def test_tiny_problems_compute_modulo_7():
    for seed in range(50):
        question, chain, answer = rltr.tiny_problem(random.Random(seed))
        value = int(question[1])
        for operator, operand, shown in zip(question[3::4], question[4::4], chain[3::4]):
            value = {"+": value + int(operand), "-": value - int(operand), "*": value * int(operand)}[operator] % 7
            assert int(shown) == value
        assert answer == str(value % 2) and chain.endswith(f"\\boxed{{{answer}}}")
        assert rltr.is_correct(rltr.decode(rltr.tiny_tokenizer(), rltr.tiny_tokenizer().encode(chain)), answer)


BAD = {
    "unknown model": ["--model", "nobody/nothing"], "short name": ["--model", "Qwen2.5-0.0B"],
    "unknown receiver": ["--receiver", "nobody/nothing"], "empty folder as model": ["--model", "{tmp}"],
    "unknown data": ["--data", "nobody/nothing"], "missing file": ["--data", "{tmp}/no.jsonl"],
    "columns": ["--data", "{tmp}/columns.jsonl"], "empty": ["--data", "{tmp}/empty.jsonl"],
    "no json": ["--data", "{tmp}/broken.jsonl"], "not rows": ["--data", "{tmp}/rows.json"],
    "answer missing": ["--data", "{tmp}/answer.jsonl"], "no box": ["--data", "{tmp}/box.jsonl"],
    "group of one": ["--group", "1"], "negative weight": ["--transfer-weight", "-1"],
    "no reward": ["--answer-weight", "0", "--transfer-weight", "0", "--format-weight", "0"],
    "nan": ["--lr", "nan"], "infinite": ["--lr", "inf"], "steps": ["--steps", "0"], "cuts": ["--cuts", "0"],
    "temperature": ["--temperature", "0"], "budget": ["--token-budget", "0"], "seed": ["--seed", "-1"],
    "context": ["--max-new-tokens", "128"], "prompt": ["--prompt", "no place for it"],
    "device": ["--device", "abacus"], "out in use": ["--out", "{tmp}/used"],
    "out is a file": ["--out", "{tmp}/no.txt"], "out below a file": ["--out", "{tmp}/no.txt/a"]}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, task, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name, text in {"columns.jsonl": '{"question": "x"}', "empty.jsonl": "\n", "broken.jsonl": "{", "no.txt": "",
                       "rows.json": '{"a": 1}', "answer.jsonl": '{"question": "x", "answer": null}',
                       "box.jsonl": '{"question": "x", "solution": "so 7"}', "used/config.json": "{}"}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    assert run(task, tmp_path / "out", *(flag.replace("{tmp}", str(tmp_path)) for flag in BAD[case])) == 2
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 1 and error[0].startswith("rltr: ") and len(error[0]) > 25, error
    assert sorted(tmp_path.rglob("*")) == before                     # no half-made run is left behind


def test_a_full_disk_is_one_clear_line_and_loses_no_checkpoint(task, tmp_path, monkeypatch, capfd):
    save, saved = torch.save, []

    def full(*arguments, **settings):
        saved.append(arguments)
        if len(saved) == 2:
            raise OSError(28, "No space left on device")
        save(*arguments, **settings)

    monkeypatch.setattr(torch, "save", full)
    assert run(task, tmp_path / "a") == 2
    assert capfd.readouterr().err.splitlines()[-1].startswith("rltr: ")
    assert (tmp_path / "a/checkpoints/step-000002/optimizer.pt").exists()


def test_every_setting_is_a_flag_with_help_and_the_examples_in_the_docstrings_are_true(capsys):
    with pytest.raises(SystemExit) as stop:
        rltr.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    for f in rltr.dataclasses.fields(Config):
        assert f"--{f.name.replace('_', '-')} " in text and len(f.metadata["help"]) > 5
    failed, attempted = doctest.testmod(rltr)
    assert failed == 0 and attempted >= 3
