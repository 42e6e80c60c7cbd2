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
    assert lm_of(None, tokenizer).encode_text(text) == byte_ids(tokenizer, text)


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
