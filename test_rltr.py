"""Tests of rltr.py and eval.py: tiny random models against numeric oracles. No network, no GPU.

A test called test_mistake_... is named after something that other code bases got wrong."""

import ast
import contextlib
import copy
import dataclasses
import doctest
import functools
import gc
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import runpy
import shlex
import signal
import subprocess
import sys
import threading
import types
import warnings
import weakref
from html import parser as html_parser

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import pytest
import tokenizers
import torch
import transformers
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
    judge_answer,
    majority_vote,
)

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


def lm_of(model, tokenizer=None, stop_ids=(0,), vocab_size=V, context=256):
    return rltr.LM(model, tokenizer, stop_ids, vocab_size, context)


def random_prompts(*lengths, high=V):
    source = random.Random(0)
    return [[source.randrange(1, high) for _ in range(n)] for n in lengths]


@torch.no_grad()
def full_logprobs(model, prompt, tokens, vocab_size=V, temperature=1.0):
    """[len(tokens), vocabulary], by the model's own forward over one unpadded row."""
    ids = torch.tensor([prompt + tokens], device=model.device)
    logits = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1, :vocab_size]
    return (logits.float() / temperature).log_softmax(-1).cpu()


def chosen(logprobs, tokens):
    return logprobs.gather(1, torch.tensor(tokens)[:, None]).squeeze(1)


def logprobs_are_right(model, prompt, c, vocab_size=V, temperature=1.0):
    want = chosen(full_logprobs(model, prompt, c.tokens, vocab_size, temperature), c.tokens)
    return torch.allclose(torch.tensor(c.logprobs), want, rtol=0, atol=1e-4)


def sampled(model, rewards, noise=0.0, group=3, high=V):
    """Rollouts of ragged lengths with these rewards, log-probs off by `noise`, advantages set."""
    source = random.Random(1)
    rows = []
    prompts = random_prompts(*[3 + 5 * (i // group) % 11 for i in range(0, len(rewards), group)])
    advantages = rltr.group_advantages(torch.tensor(rewards).view(-1, group)).flatten().tolist()
    for i, (reward, advantage) in enumerate(zip(rewards, advantages, strict=True)):
        prompt = prompts[i // group]
        tokens = [source.randrange(1, high) for _ in range(source.randrange(0, 9))] + [0]
        logprobs = [
            x + source.uniform(-noise, noise)
            for x in chosen(full_logprobs(model, prompt, tokens), tokens).tolist()
        ]
        rows.append(
            Rollout(
                None, prompt, tokens, logprobs, True, "", reward=float(reward), advantage=advantage
            )
        )
    return rows


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BRACKETS = (
    "{% for m in messages %}[{{ m.content }}]{% endfor %}"
    "{% if add_generation_prompt %}->{% endif %}"
)


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


# ----------------------------------------------------------------------------------------- problems

ROWS = [
    {"problem": '1 + 1,\n"quoted"?', "solution": "so \\boxed{1} or \\boxed{\\frac{4}{2}}"},
    {"problem": "é?", "solution": "#### 1,000"},
]


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_the_same_problems_from_every_kind_of_file(kind, tmp_path):
    datasets = pytest.importorskip("datasets")
    path = tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        table = datasets.Dataset.from_list(ROWS)
        {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](str(path))
    first, second = rltr.load_problems(str(path))
    assert first == Problem('1 + 1,\n"quoted"?', "\\frac{4}{2}")  # the last box, whole
    assert second.question == "é?"
    assert second.answer.replace(",", "") == "1000"
    assert rltr.load_problems(str(path), limit=1) == [first]


@pytest.mark.parametrize("question", ["question", "problem", "prompt"])
@pytest.mark.parametrize(
    "answer, written",
    [
        ("answer", "18"),
        ("answer", "6 * 3 = 18\n#### 18"),
        ("answer", 18),
        ("solution", "Thus $\\boxed{18}$."),
    ],
)
def test_columns_and_ways_to_write_the_gold_answer(question, answer, written, tmp_path):
    (tmp_path / "d.jsonl").write_text(json.dumps({"id": 7, question: "q", answer: written}))
    assert rltr.load_problems(str(tmp_path / "d.jsonl")) == [Problem("q", "18")]


def test_hub_data_training_split_or_the_only_one(monkeypatch):
    hub = {"openai/gsm8k": {"test": "a", "train": "b"}, "HuggingFaceH4/MATH-500": {"test": "c"}}
    monkeypatch.setattr(
        "datasets.load_dataset",
        lambda name, part: {
            split: [{"problem": f"{part} {x}", "answer": "1"}] for split, x in hub[name].items()
        },
    )
    asked = [("gsm8k",), ("math500",), ("gsm8k", "test"), ("openai/gsm8k", "train")]
    found = [rltr.load_problems(*source)[0].question for source in asked]
    assert found == ["main b", "None c", "main a", "None b"]
    with pytest.raises(UserError, match="no split dev"):
        rltr.load_problems("gsm8k", "dev")


def test_problems_of_a_step_are_a_function_of_seed_and_step_and_every_epoch_is_a_permutation():
    steps = [rltr.draw_problems(list(range(10)), 4, seed=3, step=s) for s in range(10)]
    assert steps[7] == rltr.draw_problems(list(range(10)), 4, seed=3, step=7)
    flat = sum(steps, [])
    epochs = [flat[i : i + 10] for i in range(0, 40, 10)]
    assert all(sorted(e) == list(range(10)) for e in epochs)
    assert len(set(map(tuple, epochs))) == 4
    assert flat != sum((rltr.draw_problems(list(range(10)), 4, 4, s) for s in range(10)), [])
    assert sorted(rltr.draw_problems([1, 2], 5, 0, 0)) in ([1, 1, 1, 2, 2], [1, 1, 2, 2, 2])


# ----------------------------------------------------------------------------- prompts, stop tokens


@pytest.mark.parametrize("written, added, count", [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)])
def test_bos_once_or_never_whoever_writes_it_and_no_thinking(written, added, count):
    template = "<s>" * written + CHATML + "{% if enable_thinking is false %}<no think>{% endif %}"
    tokenizer = byte_tokenizer(template, add_bos=bool(added))
    assert tokenizer.decode(
        rltr.encode_prompt(lm_of(None, tokenizer), "2 + 2?")
    ) == "<s>" * count + (
        "<|im_start|>user\n2 + 2?\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>assistant\n<no think>"
    )


def test_stop_tokens_come_from_tokenizer_generation_config_and_chat_template():
    tokenizer = byte_tokenizer()
    model = tiny()  # as in Qwen2.5 base: <|im_end|> is not eos
    for configured, more in ((None, ()), (5, (5,)), ([5, 6], (5, 6))):
        model.generation_config.eos_token_id = configured
        assert rltr.find_stop_ids(model, tokenizer) == (*more, 256, 258)


def test_mistake_without_a_chat_template_the_model_never_stops():
    tokenizer = byte_tokenizer(None)  # a plain prompt, and still a stop token
    prompt = rltr.encode_prompt(lm_of(None, tokenizer), "x {y}", "Do {question}!")
    assert tokenizer.decode(prompt) == "Question: Do x {y}!\nAnswer:"
    assert rltr.find_stop_ids(tiny(), tokenizer) == (256,)


def test_decode_drops_control_tokens_and_an_incomplete_last_character():
    tokenizer = byte_tokenizer()
    ids = byte_ids(tokenizer, "a  ,é")
    assert rltr.decode(tokenizer, [257, *ids, 256]) == "a  ,é"
    assert rltr.decode(tokenizer, ids[:-1]) == "a  ,"


# --------------------------------------------------------------------------------------- generation

GEMMA = {"head_dim": 16, "sliding_window": 8, "query_pre_attn_scalar": 16}
KINDS = {
    "qwen2, MHA": ("qwen2", {"num_key_value_heads": 4}),
    "qwen2, tied, sliding": (
        "qwen2",
        {
            "tie_word_embeddings": True,
            "use_sliding_window": True,
            "sliding_window": 8,
            "max_window_layers": 1,
        },
    ),
    "qwen3": ("qwen3", {"head_dim": 16}),
    "llama": ("llama", {}),
    "olmo2": ("olmo2", {}),
    "mistral, sliding": ("mistral", {"sliding_window": 8}),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma2": ("gemma2", dict(GEMMA, attn_implementation="eager")),  # others may drop soft caps
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "granite": ("granite", {"logits_scaling": 4.0}),
    "cohere": ("cohere", {"logit_scale": 0.25}),
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KINDS)
def test_greedy_is_that_of_transformers_and_logprobs_are_those_of_a_full_forward(name, device):
    model = tiny(KINDS[name][0], **KINDS[name][1]).to(device)
    expected = []
    prompts = random_prompts(5, 1, 17, 30, 2)
    for prompt in prompts:
        ids = torch.tensor([prompt], device=device)
        out = model.generate(ids, attention_mask=ids**0, max_new_tokens=16, do_sample=False)
        expected.append(out[0, len(prompt) :].tolist())
    stop = expected[2][9]  # so that some rows stop early
    expected = [e[: e.index(stop) + 1] if stop in e else e for e in expected]
    rltr.check_model(lm_of(model))
    for max_rows in (None, 1, 2, 5):
        got = generate(
            model,
            prompts,
            samples=2,
            max_new_tokens=16,
            temperature=0,
            stop_ids=(stop,),
            max_rows=max_rows,
        )
        for i, c in enumerate(got):
            assert logprobs_are_right(model, prompts[i // 2], c)
            pairs = list(zip(c.tokens, expected[i // 2], strict=True))
            first = next((t for t, (a, b) in enumerate(pairs) if a != b), None)
            if first is not None:  # only a draw may go either way
                best = full_logprobs(model, prompts[i // 2], c.tokens)[first].topk(2).values
                assert best[0] - best[1] < 1e-4, f"row {i}, token {first}"
        assert len(got) == 10


# What the sampler does on CUDA, on the CPU: the kernel in Triton's interpreter; a graph that cannot
# be captured (there is none here), then one whose replay is the step itself.


@pytest.mark.parametrize(
    "kind, changes",
    [
        ("falcon", {"alibi": True}),
        ("bloom", {}),
        ("mamba", {}),
        ("recurrent_gemma", {"lru_width": 32}),
        ("gpt_oss", {"head_dim": 16, "num_local_experts": 4, "num_experts_per_tok": 2}),
    ],
)
def test_attention_that_we_would_compute_wrongly_is_refused(kind, changes):
    with pytest.raises(UserError, match=kind):
        rltr.check_model(lm_of(tiny(kind, **changes)))


LONGROPE = {  # as in Phi-3 128k
    "rope_type": "longrope",
    "original_max_position_embeddings": 32,
    "short_factor": [1.0] * 4,
    "long_factor": [2.0, 3.0, 4.0, 5.0],
}


DYNAMIC = {"rope_type": "dynamic", "factor": 2.0}


@pytest.mark.parametrize("error", [torch.OutOfMemoryError, torch.AcceleratorError])
def test_a_failing_device_is_not_taken_for_a_model_that_is_not_served(error, monkeypatch):
    def fail(*_, **__):
        raise error("the device")

    monkeypatch.setattr(rltr, "completion_logprobs", fail)
    with pytest.raises(error, match="the device"):
        rltr.check_model(lm_of(tiny()))
    monkeypatch.setattr(rltr, "generate", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match="not served"):
        rltr.check_model(lm_of(tiny()))


@pytest.mark.parametrize("kind, rope", [("phi3", LONGROPE), ("llama", DYNAMIC)])
def test_positions_that_all_change_beyond_some_length_are_refused(kind, rope, tmp_path):
    changes = {"rope_parameters": rope | {"rope_theta": 1e4}}
    changes |= {"original_max_position_embeddings": 32} if kind == "phi3" else {}
    rltr.save_lm(lm_of(tiny(kind, vocab_size=260, **changes), byte_tokenizer()), tmp_path)
    with pytest.raises(UserError, match=f"{kind} is not served"):
        rltr.load_lm(str(tmp_path))


def test_a_loaded_model_keeps_its_soft_capped_attention_where_transformers_would_drop_it(tmp_path):
    exact = tiny("gemma2", vocab_size=260, **KINDS["gemma2"][1])
    tokenizer = byte_tokenizer()
    rltr.save_lm(lm_of(exact, tokenizer), tmp_path)
    lm = rltr.load_lm(str(tmp_path))
    [prompt] = random_prompts(30)
    [c] = generate(lm.model, [prompt], max_new_tokens=9, seed=0)
    row = Rollout(None, prompt, c.tokens, c.logprobs, False, "")
    trained = Completion(c.tokens, rltr.completion_logprobs(lm, [row])[0].tolist(), False)
    assert all(logprobs_are_right(exact, prompt, x, 260) for x in (c, trained))


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral, sliding"])
def test_mistake_a_short_row_beside_a_long_one_gets_wrong_positions_or_sees_padding(name):
    lm = lm_of(tiny(KINDS[name][0], **KINDS[name][1]))
    prompts = random_prompts(2, 40, 9)
    together = generate(lm.model, prompts, max_new_tokens=12, seed=1)
    rows = [
        Rollout(None, prompt, c.tokens, c.logprobs, False, "")
        for prompt, c in zip(prompts, together, strict=True)
    ]
    trained = rltr.completion_logprobs(lm, rows)[0].view(3, 12).tolist()
    for i, (prompt, c) in enumerate(zip(prompts, together, strict=True)):
        # Row i has the same random numbers in both; here all rows are of one length.
        alone = generate(lm.model, [prompt] * (i + 1), max_new_tokens=12, seed=1)[i]
        assert c.tokens == alone.tokens
        assert logprobs_are_right(lm.model, prompt, c)
        assert logprobs_are_right(lm.model, prompt, Completion(c.tokens, trained[i], False))


def test_sampling_follows_the_softmax():
    model = tiny(initializer_range=0.15)
    [prompt] = random_prompts(5)
    n = 4000
    k = 30
    seen = np.zeros((k, k))
    expected = np.zeros((k, k))
    for c in generate(
        model, [prompt], samples=n, max_new_tokens=2, temperature=0.8, vocab_size=k, seed=1
    ):
        seen[tuple(c.tokens)] += 1
    for t in range(k):
        first, second = full_logprobs(model, prompt, [t, 0], k, 0.8)
        expected[t] = n * (first[t] + second).exp().numpy()
    often = expected >= 5  # the other pairs make one cell
    cells = [
        *zip(seen[often], expected[often], strict=True),
        (seen[~often].sum(), expected[~often].sum()),
    ]
    chi2 = sum((o - e) ** 2 / e for o, e in cells)
    assert len(cells) > 100
    assert abs(chi2 - len(cells)) < 4 * (2 * len(cells)) ** 0.5


class Lowest:
    """A generator of random numbers that always gives the lowest number of [0, 1)."""

    def random(self, shape=()):
        return np.zeros(shape)


def test_sampling_never_takes_a_token_of_probability_zero(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    tokens, logprobs = rltr.sample_tokens(logits, 1.0, torch.tensor([1e-45, 0.4999, 0.5001, 1.0]))
    assert tokens.tolist() == [1, 1, 3, 3]
    assert torch.allclose(logprobs, torch.tensor(0.5).log())
    # The lowest random number is 0, so u, which is never 0, is 1.
    monkeypatch.setattr(rltr, "rng", lambda *keys: Lowest())
    assert min(generate(tiny(), [[5]], max_new_tokens=9)[0].tokens) > 0


def test_texts_depend_neither_on_max_rows_nor_on_how_the_samples_of_a_prompt_are_given():
    model = tiny()
    prompts = random_prompts(4, 11, 4, 7)

    def texts(prompts, samples, **settings):
        limits = {"max_new_tokens": 15, "stop_ids": range(3, 9)}
        done = generate(model, prompts, samples=samples, **limits, **settings)
        for i, c in enumerate(done):
            assert logprobs_are_right(model, prompts[i // samples], c)
        return [c.tokens for c in done]

    whole = texts(prompts, 3, seed=5)
    assert len(set(map(tuple, whole))) == 12  # the samples of a prompt differ
    assert len(set(map(len, whole))) > 4  # ragged: rows leave, others take their place
    assert texts(prompts, 3, seed=6) != whole
    assert texts(prompts, 3, seed=(5, 1)) != whole
    repeated = [prompt for prompt in prompts for _ in range(3)]  # one list, three times
    equal = [list(prompt) for prompt in repeated]  # three lists
    for max_rows in (None, 1, 2, 5, 7):
        assert texts(prompts, 3, seed=5, max_rows=max_rows) == whole
        assert texts(repeated, 1, seed=5, max_rows=max_rows) == whole
        assert texts(equal, 1, seed=5, max_rows=max_rows) == whole


def test_stop_tokens_end_a_row_and_belong_to_it():
    stops = (3, 4, 5, 6, 7, 8, 9)
    model = tiny()
    limits = [6, 12]  # each prompt has its own limit
    done = generate(
        model, random_prompts(4, 9), samples=20, max_new_tokens=limits, stop_ids=stops, seed=0
    )
    assert 5 < sum(c.finished for c in done) < 40
    for i, c in enumerate(done):
        assert len(c.tokens) == len(c.logprobs) <= limits[i // 20]
        assert not set(c.tokens[:-1]) & set(stops)
        assert c.finished == (c.tokens[-1] in stops)
        assert c.finished or len(c.tokens) == limits[i // 20]
    assert generate(model, [], max_new_tokens=3) == []
    for prompts, limit in (([[]], 3), ([[1]], 0)):
        with pytest.raises(UserError):
            generate(model, prompts, max_new_tokens=limit)


class FakeGraphs:
    def __init__(self, monkeypatch, error=None):
        self.error = error
        self.recording = None
        self.captured = []  # (slots, length, steps left in the bucket)
        self.pooled = False  # there is a graph, whose memory the others are to share
        self.plain = 0
        self.replays = 0
        self.real_step = rltr.Sampler.step
        self.stream = "the usual stream"
        monkeypatch.setattr(rltr, "GRAPH_DEVICES", ("cpu",))
        monkeypatch.setattr(rltr.Sampler, "graphs_work", True)  # put back afterwards
        monkeypatch.setattr(rltr.Sampler, "step", self.step())
        monkeypatch.setattr(FakeGraph, "graphs", self)
        monkeypatch.setattr(torch.cuda, "CUDAGraph", FakeGraph)
        monkeypatch.setattr(torch.cuda, "graph", self.capture)
        monkeypatch.setattr(torch.cuda, "current_stream", lambda *device: self.stream)
        monkeypatch.setattr(torch.cuda, "default_stream", lambda *device: "the usual stream")
        monkeypatch.setattr(torch.cuda, "set_stream", self.set_stream)

    def set_stream(self, stream):
        self.stream = stream

    @contextlib.contextmanager
    def capture(self, graph, pool=None):
        assert pool == ("the pool" if self.pooled else None)
        before = self.stream
        self.stream = "a stream to record on"
        self.recording = graph
        yield
        self.recording = None
        if self.error:
            raise self.error  # and the stream stays the wrong one
        self.stream = before

    def step(self):
        def step(sampler, slots, length):
            assert sampler.active <= slots <= sampler.capacity
            assert sampler.longest <= length <= sampler.length
            if self.recording is None:
                self.plain += 1
                self.real_step(sampler, slots, length)
            else:
                self.captured.append((slots, length, length - sampler.longest))
                self.recording.arguments = (sampler, slots, length)
                self.recording.addresses = addresses(sampler)

        return step


class FakeGraph:
    graphs = None

    def pool(self):
        self.graphs.pooled = True
        return "the pool"

    def replay(self):
        sampler, slots, length = self.arguments
        assert addresses(sampler) == self.addresses  # nothing was put in a tensor's place
        assert sampler.active <= slots
        assert sampler.longest <= length
        self.graphs.replays += 1
        self.graphs.real_step(sampler, slots, length)


def addresses(sampler):
    state = [x for x in vars(sampler).values() if isinstance(x, torch.Tensor)]
    cache = [x for layer in sampler.cache.values() for x in layer]
    return [tensor.data_ptr() for tensor in state + cache]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", ["qwen2, tied, sliding", "gemma2"])
def test_the_steps_of_cuda_graphs_give_the_same_tokens_as_plain_ones(
    name, temperature, monkeypatch
):
    model = tiny(KINDS[name][0], **KINDS[name][1])
    prompts = random_prompts(37, 3, 60)

    def drawn(max_rows):
        graphs.pooled = False
        limits = {"max_new_tokens": 70, "stop_ids": range(1, 12), "max_rows": max_rows}
        return generate(model, prompts, samples=4, temperature=temperature, seed=0, **limits)

    with monkeypatch.context() as patch:
        graphs = FakeGraphs(patch)
        patch.setattr(rltr, "GRAPH_DEVICES", ())
        plain = drawn(None)
    assert not graphs.captured
    assert temperature == 0 or len({len(c.tokens) for c in plain}) > 4  # ragged
    graphs = FakeGraphs(monkeypatch)
    for max_rows in (None, 5):
        got = drawn(max_rows)
        assert [c.tokens for c in got] == [c.tokens for c in plain]
        assert [c.finished for c in got] == [c.finished for c in plain]
        for ours, theirs in zip(got, plain, strict=True):
            assert ours.logprobs == pytest.approx(theirs.logprobs, abs=1e-4)
    assert graphs.replays > graphs.plain / 2


def test_a_graph_is_captured_once_a_bucket_and_only_where_16_steps_are_left(monkeypatch):
    model = tiny()
    prompts = random_prompts(50, 50)
    graphs = FakeGraphs(monkeypatch)

    def captured(new_tokens, samples, prompts=prompts[:1]):
        graphs.captured.clear()
        graphs.pooled = False
        generate(model, prompts, samples=samples, max_new_tokens=new_tokens, seed=0)
        return graphs.captured

    # After the first step 50 tokens are in the cache: 14 steps are left in the bucket of 64. The
    # last bucket ends where the longest row does.
    assert captured(14, 3) == []
    assert captured(30, 3) == []
    assert captured(31, 3) == [(3, 81, 16)]
    assert captured(78, 5) == [(5, 128, 63)]
    assert captured(95, 1) == [(1, 128, 63), (1, 145, 16)]
    graphs.replays = 0
    assert captured(94, 3) == [(3, 128, 63)]
    assert graphs.replays == 63
    # Six rows begin; three of them end in the step that brings the cache to 70 tokens, and at the
    # next look, at 74, the step is one of four slots.
    assert captured([21, 78], 3, prompts) == [(6, 128, 63), (4, 128, 54)]


def test_a_capture_that_fails_is_said_and_sampling_goes_on_without_graphs(monkeypatch, capsys):
    model = tiny()
    settings = {"samples": 3, "max_new_tokens": 90, "stop_ids": range(1, 4), "seed": 0}
    plain = generate(model, random_prompts(50, 9), **settings)
    graphs = FakeGraphs(monkeypatch, RuntimeError("operation not permitted when capturing"))
    for got, want in zip(generate(model, random_prompts(50, 9), **settings), plain, strict=True):
        assert (got.tokens, got.finished) == (want.tokens, want.finished)
        assert got.logprobs == pytest.approx(want.logprobs, abs=1e-4)
    assert capsys.readouterr().err.count("not permitted") == 1
    assert (len(graphs.captured), graphs.replays) == (1, 0)
    assert graphs.stream == "the usual stream"


def test_a_capture_that_fails_is_said_once_and_not_in_every_step_of_a_run(monkeypatch, capsys):
    model = tiny()
    FakeGraphs(monkeypatch, RuntimeError("operation not permitted when capturing"))
    for seed in range(3):
        generate(model, [[5, 6]], max_new_tokens=20, seed=seed)
    assert capsys.readouterr().err.count("not permitted") == 1


class KeepGradient:
    """In the optimizer's place: keeps the gradients instead of making steps."""

    def __init__(self, model):
        self.model = model
        self.gradients = []

    def step(self, max_norm):
        self.gradients.append(torch.cat([p.grad.flatten() for p in self.model.parameters()]))
        self.model.zero_grad()
        return 0.0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mistake_the_loss_uses_another_distribution_than_the_sampler(checkpointing):
    model = tiny("gpt2", resid_pdrop=0.3, attn_pdrop=0.3)
    prompts = random_prompts(3, 8, high=60)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.lm_head.weight.data[60:] *= 5  # rows that the tokenizer does not know
    assert max(generate(model, prompts, max_new_tokens=9, temperature=0)[0].tokens) >= 60
    lm = lm_of(model, byte_tokenizer(), (0,), 60)
    tasks = [(Problem("", ""), prompt) for prompt in prompts]
    config = Config(group=4, temperature=0.7, max_new_tokens=9)
    config.gradient_checkpointing = checkpointing
    rollouts = rltr.sample_rollouts(lm, tasks, config, step=0)
    for i, r in enumerate(rollouts):
        assert max(r.tokens) < 60
        assert logprobs_are_right(model, r.prompt, r, 60, 0.7)
        r.reward = float(i % 2)
        r.advantage = 2.0 * (i % 2) - 1
    greedy = generate(model, prompts, max_new_tokens=9, temperature=0, vocab_size=60)
    for prompt, c in zip(prompts, greedy, strict=True):
        assert logprobs_are_right(model, prompt, c, 60)
    assert rltr.update(lm, KeepGradient(model), rollouts, config)["logprob_gap_max"] < 1e-4
    for step in (0, 1):  # a function of the step
        again = rltr.sample_rollouts(lm, tasks, config, step)
        assert ([r.tokens for r in again] == [r.tokens for r in rollouts]) == (step == 0)


def embedded(model):
    """Watches a model: (rows, tokens) of whatever goes through it."""
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: shapes.append(i[0].shape))
    return shapes


@pytest.mark.parametrize("max_rows", [None, 2, 3, 7])
def test_a_prompt_is_prefilled_once_and_finished_rows_cost_nothing(max_rows):
    model = tiny()
    prompts = random_prompts(9, 6, 4)
    shapes = embedded(model)
    done = generate(
        model,
        prompts,
        samples=8,
        max_new_tokens=30,
        stop_ids=range(1, 30),
        seed=0,
        max_rows=max_rows,
    )
    tokens = [len(c.tokens) for c in done]
    assert sum(rows for rows, length in shapes if length > 1) == 3
    assert max(tokens) > 3 * np.mean(tokens)  # what a batch with pads would cost
    assert sum(rows for rows, length in shapes if length == 1) <= 1.2 * sum(tokens)


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("kind, changes", [("gpt2", {"resid_pdrop": 0.5}), ("qwen2", {})])
def test_mistake_train_mode_or_gradient_checkpointing_switch_the_cache_off(kind, changes):
    model = tiny(kind, **changes)
    prompts = random_prompts(5, 12)
    want = generate(model, prompts, max_new_tokens=10, seed=0)
    attention = model.config._attn_implementation
    model.gradient_checkpointing_enable()
    model.train()
    shapes = embedded(model)
    assert generate(model, prompts, max_new_tokens=10, seed=0) == want
    assert sum(rows * length for rows, length in shapes) <= 2 * 12 + 2 * 10
    assert all(m.training for m in model.modules())
    assert torch.is_grad_enabled()
    assert model.config._attn_implementation == attention


# -------------------------------------------------------------- cut, receiver, transfer, advantages


def test_cut_prefix_floors_and_does_not_count_a_final_stop_token():
    y = [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]
    for tau, length in ((1e-12, 0), (0.0999, 0), (0.1, 1), (0.55, 5), (0.99, 9), (1.0, 10)):
        assert rltr.cut_prefix(y, tau) == rltr.cut_prefix([*y, 2], tau, (1, 2)) == y[:length]
    assert rltr.cut_prefix([5, 2, 6, 2, 2], 1.0, (2,)) == [5, 2, 6, 2]  # one, at the end only
    assert rltr.cut_prefix([], 1.0, (2,)) == rltr.cut_prefix([2], 1.0, (2,)) == []


@pytest.fixture
def receiver_says(monkeypatch):
    """Puts a script in the place of rltr.generate; the script keeps what it was asked."""

    class Script:
        def __call__(self, model, prompts, **settings):
            self.prompts = prompts
            self.settings = settings
            return [Completion(list(self.tokens), [0.0] * len(self.tokens), True) for _ in prompts]

    def say(tokens):
        Script.tokens = tokens
        monkeypatch.setattr(rltr, "generate", Script())
        return rltr.generate

    return say


def rollout(tokenizer, text, end=()):
    return Rollout(Problem("1+6?", "7"), [1], [*byte_ids(tokenizer, text), *end], [], True, text)


def transfer(rollouts, generator, receiver, number=0, **settings):
    """Steps 3 to 5, cut anew for each number."""
    config = Config(prompt="{question}", **settings)
    taus = 1 - rltr.rng(number).random((len(rollouts), config.cuts))
    rltr.cut_rollouts(rollouts, generator, taus)
    rltr.continue_cuts(rollouts, generator, receiver, config, (rltr.CONTINUATION, number))
    rltr.score_transfer(rollouts)


def test_the_same_tokenizer_gets_the_prefix_as_token_ids_after_its_own_template(receiver_says):
    mine = byte_tokenizer()
    yours = byte_tokenizer(BRACKETS)
    asked = receiver_says(byte_ids(yours, "7}"))
    r = rollout(mine, "aéé 1: \\boxed{7}, or.", [258])
    r.tokens[1:1] = [257]  # a control token in the middle: stays one
    generator = lm_of(None, mine, (258,))
    receiver = lm_of(None, yours, (256,), 260)
    transfer([r], generator, receiver, cuts=40, receiver_margin=8, max_new_tokens=20)
    budgets = asked.settings["max_new_tokens"]
    for cut, prompt, budget in zip(r.cuts, asked.prompts, budgets, strict=True):
        length = int(cut.tau * (len(r.tokens) - 1))  # the stop token is not counted
        assert prompt == byte_ids(yours, "[1+6?]->") + r.tokens[:length]
        assert cut.prefix_length == length
        assert budget == max(1, 20 - length + 8)
        whole = rltr.decode(mine, r.tokens[:length] + byte_ids(yours, "7}"))
        assert cut.prefix + cut.continuation == whole  # with the character that the cut had split
        assert cut.correct == rltr.is_correct(whole, "7")
        assert cut.leaked == ("\\boxed{7}" in cut.prefix)
    assert {(c.correct, c.leaked) for c in r.cuts} == {(True, False), (False, False), (True, True)}
    assert len(r.cuts) == 40
    assert r.rewards["transfer"] == np.mean([cut.correct for cut in r.cuts])
    assert asked.settings["stop_ids"] == (256,)
    assert asked.settings["vocab_size"] == 260


def test_a_different_tokenizer_gets_the_prefix_as_text(receiver_says):
    mine = byte_tokenizer()
    yours = byte_tokenizer("<s>" + BRACKETS, reverse=True, add_bos=True)
    text = "é<|im_end|>ü<s>∑"  # spelled out: not control tokens
    r = rollout(mine, text, [258])
    asked = receiver_says(byte_ids(yours, "\\boxed{7}é")[:-1])
    transfer([r], lm_of(None, mine, (258,)), lm_of(None, yours), cuts=60)
    split = 0
    for cut, prompt in zip(r.cuts, asked.prompts, strict=True):
        raw = text.encode()[: int(cut.tau * len(text.encode()))]
        split += raw.decode(errors="ignore") != raw.decode(errors="replace")
        assert cut.prefix == raw.decode(errors="ignore")  # no half characters
        assert prompt == [259] + byte_ids(yours, "[1+6?]->" + cut.prefix)  # and BOS once
        assert cut.continuation == "\\boxed{7}"
        assert cut.correct
    assert split > 5


def word_tokenizer():
    """Whole words, the space before a word a part of it, as SentencePiece makes them."""
    words = ["<unk>", "</s>", "▁a", "▁green", "een", "▁gr", "▁", "a", *"▁1+6?"]
    vocabulary = {word: i for i, word in enumerate(dict.fromkeys(words))}
    core = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Metaspace()
    core.decoder = decoders.Metaspace()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token="</s>", unk_token="<unk>"
    )


@pytest.mark.parametrize("same_tokenizer", [True, False])
@pytest.mark.parametrize("words, text", [(["▁green"], " green"), (["▁gr", "een"], " green")])
def test_mistake_the_space_at_the_seam_is_lost(words, text, same_tokenizer, receiver_says):
    yours = word_tokenizer()
    ids = yours.get_vocab()
    assert yours.decode([ids["▁green"]]) == "green"  # the first space of a text is nobody's
    mine = byte_tokenizer()
    tokens = byte_ids(byte_tokenizer(), "a")
    if same_tokenizer:
        mine = word_tokenizer()
        tokens = [ids["▁a"]]
    asked = receiver_says([ids[word] for word in words])
    r = Rollout(Problem("1+6?", "7"), [1], tokens, [], True, "a")
    rltr.cut_rollouts([r], lm_of(None, mine), [[1.0, 0.5]])  # after "a", and before it
    config = Config(prompt="{question}", cuts=2)
    rltr.continue_cuts([r], lm_of(None, mine), lm_of(None, yours), config, (1,))
    whole, alone = r.cuts
    assert asked.prompts[0][-1] == ids["▁a"]
    assert (whole.prefix, whole.continuation) == ("a", text)
    assert (alone.prefix, alone.continuation) == ("", text.strip())


def test_a_prefix_that_overflows_the_receiver_is_counted_and_scores_0(receiver_says):
    tokenizer = byte_tokenizer(BRACKETS)
    r = rollout(tokenizer, "x" * 50)
    asked = receiver_says(byte_ids(tokenizer, "\\boxed{7}"))
    receiver = lm_of(None, tokenizer, context=8 + 30)  # the question takes 8
    settings = {"cuts": 300, "max_new_tokens": 50, "receiver_margin": 9}
    transfer([r], lm_of(None, tokenizer), receiver, **settings)
    for cut in r.cuts:
        assert cut.overflow == (cut.prefix_length >= 30)
        assert cut.correct == (not cut.overflow)
    assert {c.prefix_length for c in r.cuts} >= {29, 30}
    assert 0.5 < r.rewards["transfer"] < 0.7
    budgets = [min(59, 30) - c.prefix_length for c in r.cuts if not c.overflow]
    assert asked.settings["max_new_tokens"] == budgets
    metrics = rltr.summarize([r], Config(group=1))
    assert metrics["overflow"] == pytest.approx(1 - r.rewards["transfer"])


def test_an_empty_prefix_is_legal_and_the_receiver_solves_alone(receiver_says):
    tokenizer = byte_tokenizer(BRACKETS)
    asked = receiver_says(byte_ids(tokenizer, "\\boxed{7}"))
    rows = [rollout(tokenizer, "", end=[256]), rollout(tokenizer, "")]
    transfer(rows, lm_of(None, tokenizer, (256,)), lm_of(None, tokenizer))
    assert asked.prompts == [byte_ids(tokenizer, "[1+6?]->")] * 2
    assert [(r.rewards["transfer"], r.cuts[0].prefix_length) for r in rows] == [(1.0, 0)] * 2


def taus_of_calls(reward, monkeypatch, calls, rollouts=1):
    """What the transfer reward of TRL cuts at: an array [rollouts, cuts] a call."""
    drawn = []
    cut = rltr.cut_rollouts

    def spy(rollouts, generator, taus):
        drawn.append(np.array(taus))
        cut(rollouts, generator, taus)

    with monkeypatch.context() as patch:
        patch.setattr(rltr, "cut_rollouts", spy)
        for _ in range(calls):
            reward(["1+6?"] * rollouts, ["abc"] * rollouts, ["7"] * rollouts)
    return drawn


def test_tau_is_uniform_and_each_cut_has_its_own(receiver_says, monkeypatch):
    receiver_says([])

    def reward(**settings):
        return rltr.TransferReward(lm_of(None, byte_tokenizer(BRACKETS)), cuts=5, **settings)

    first, second = taus_of_calls(reward(), monkeypatch, 2, rollouts=400)
    assert first.shape == (400, 5)
    assert len({*first.flatten(), *second.flatten()}) == 4000
    assert np.allclose(np.histogram(first, bins=8, range=(0, 1))[0], 250, atol=60)
    [again] = taus_of_calls(reward(), monkeypatch, 1, rollouts=400)
    [other] = taus_of_calls(reward(seed=1), monkeypatch, 1, rollouts=400)
    assert np.array_equal(first, again)  # a function of the seed
    assert not np.array_equal(first, other)


def test_every_process_of_trl_draws_other_taus_in_every_call(receiver_says, monkeypatch):
    receiver_says([])
    monkeypatch.setenv("WORLD_SIZE", "3")
    drawn = []
    for rank in range(3):
        monkeypatch.setenv("RANK", str(rank))
        reward = rltr.TransferReward(lm_of(None, byte_tokenizer(BRACKETS)), cuts=2)
        drawn += taus_of_calls(reward, monkeypatch, calls=4)
    assert len({tau for taus in drawn for tau in taus.flatten()}) == 3 * 4 * 2


def test_mistake_the_receiver_shares_the_random_numbers_of_the_rollouts(monkeypatch):
    """It then writes the same text as the generator, where it is the same model."""
    tokenizer = byte_tokenizer(BRACKETS)
    lm = lm_of(tiny(vocab_size=256), tokenizer, (0,), 256)
    tasks = [(Problem("1+6?", "7"), rltr.encode_prompt(lm, "1+6?", "{question}"))]
    config = Config(group=8, prompt="{question}", max_new_tokens=8, receiver_margin=0)
    rollouts = rltr.sample_rollouts(lm, tasks, config, step=0)

    def continuations(*stream):
        for rollout in rollouts:
            rollout.cuts = []
        rltr.cut_rollouts(rollouts, lm, taus=[[1e-9]] * 8)  # it begins where they began
        rltr.continue_cuts(rollouts, lm, lm, config, stream)
        return [r.cuts[0].continuation for r in rollouts]

    assert continuations(rltr.ROLLOUT, 0) == [r.text for r in rollouts]  # so that would be seen
    ours = continuations(rltr.CONTINUATION, 0)
    assert ours == continuations(rltr.CONTINUATION, 0)  # a function of the stream
    streams = [ours, [r.text for r in rollouts]]
    streams += [continuations(rltr.CONTINUATION, 1), continuations(rltr.CONTINUATION, 0, 1)]
    for texts in zip(*streams, strict=True):  # of one rollout
        assert len(set(texts)) == 4


@pytest.mark.parametrize("as_messages", [False, True])
@pytest.mark.parametrize("ids, tokenizer_given", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_trl_calls_the_transfer_reward(as_messages, ids, tokenizer_given, receiver_says):
    mine = byte_tokenizer()
    yours = byte_tokenizer(BRACKETS, reverse=True)
    texts = ["abcdef", "ghijkl \\boxed{7}"]
    asked = receiver_says(byte_ids(yours, "\\boxed{7}"))
    reward = rltr.TransferReward(
        lm_of(None, yours), mine if tokenizer_given else None, cuts=2, prompt="{question}"
    )
    prompts = ["1+6?", "3+4?"]
    completions = texts
    if as_messages:
        prompts = [[{"role": "user", "content": p}] for p in prompts]
        completions = [[{"role": "assistant", "content": t}] for t in texts]
    more = {"completion_ids": [byte_ids(mine, t) + [256] for t in texts]} if ids else {}
    got = reward(prompts=prompts, completions=completions, answer=["7", "8"], state=None, **more)
    assert got == [1.0, 0.0]
    assert all(type(x) is float for x in got)
    assert reward.__name__
    for i, prompt in enumerate(map(yours.decode, asked.prompts)):
        assert prompt.startswith(["[1+6?]->", "[3+4?]->"][i // 2])
        assert texts[i // 2].startswith(prompt[8:])
    assert i == 3
    first = asked.prompts
    reward(prompts, completions, ["7", "8"], **more)
    assert asked.prompts != first  # the next call cuts elsewhere


def test_rewards_are_combined_and_the_raw_ones_kept():
    texts = ["\\boxed{7}", "\\boxed{8}", "7", "\\boxed{7}"]
    rows = [rollout(byte_tokenizer(), text) for text in texts]
    rows[3].finished = False
    rltr.score_answers(rows, Config())
    assert [r.verdict for r in rows] == ["right", "wrong", "missing", "right"]
    for r, share in zip(rows, (0.25, 0.5, 1.0, 0.0), strict=True):
        r.rewards["transfer"] = share
    rltr.combine_rewards(rows, Config(answer_weight=2.0, transfer_weight=4.0, format_weight=8.0))
    assert [r.reward for r in rows] == [2 + 1 + 8, 2 + 8, 4, 2]
    assert [r.rewards for r in rows] == [
        {"answer": 1, "format": 1, "transfer": 0.25},
        {"answer": 0, "format": 1, "transfer": 0.5},
        {"answer": 0, "format": 0, "transfer": 1.0},
        {"answer": 1, "format": 0, "transfer": 0.0},
    ]


def test_a_reward_of_a_fork_has_its_weight_by_name_and_is_logged_by_name():
    @dataclasses.dataclass
    class Fork(Config):
        length_weight: float = 0.5

    rows = [rollout(byte_tokenizer(), text) for text in ("\\boxed{7}", "7")]
    config = Fork(group=2, answer_weight=1.0, format_weight=0.25)
    rltr.score_answers(rows, config)
    for r, length in zip(rows, (4.0, 1.0), strict=True):
        r.rewards["length"] = length
    rltr.combine_rewards(rows, config)
    assert [r.reward for r in rows] == [1 + 0.25 + 2, 0.5]
    assert rltr.summarize(rows, config)["reward_length"] == 2.5


def test_mistake_the_votes_of_the_metrics_count_as_answers_that_cannot_be_read():
    """Shares are of the rollouts: each is judged once, though summarize compares answers, too."""
    texts = ["\\boxed{7}", "\\boxed{??}", "no answer", "\\boxed{8}"] * 2
    rows = [rollout(byte_tokenizer(), text) for text in texts]
    rltr.score_answers(rows, Config())
    rltr.combine_rewards(rows, Config())
    for _ in range(2):
        metrics = rltr.summarize(rows, Config(group=8))
        assert metrics["answers_missing"] == 0.25
        assert metrics["answers_unparsed"] == np.mean([r.verdict == "unparsed" for r in rows])
        assert metrics["answers_unparsed"] in (0, 0.25)
        assert metrics["accuracy"] == metrics["reward_answer"] == 0.25


def test_advantages_against_numpy():
    rewards = np.random.default_rng(0).choice([0.0, 0.1, 1.0, 1.1, 2.1], (50, 8))
    centred = rewards - rewards.mean(1, keepdims=True)
    want = centred / (rewards.std(1, keepdims=True) + 1e-6)
    for given in (rewards, rewards.tolist(), torch.tensor(rewards)):
        assert np.allclose(rltr.group_advantages(given), want, rtol=0, atol=1e-12)
    assert np.allclose(rltr.group_advantages(rewards, normalize_std=False), centred, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("normalize", [True, False])
def test_mistake_twelve_rewards_of_1_point_1_have_a_std_and_so_an_advantage(dtype, normalize):
    for value in (1.1, 0.1, 0.3, 1e6 / 3):
        rewards = torch.full((2, 12), value, dtype=dtype)
        assert (rltr.group_advantages(rewards, normalize) == 0).all()


# ------------------------------------------------------------------------------------------- update


@pytest.mark.parametrize("chunk", [1, 7, 0])
@pytest.mark.parametrize("name", ["qwen2, tied, sliding", "gemma2", "granite", "cohere"])
def test_mistake_logits_of_all_tokens_at_once_and_yet_the_chunks_are_exact(name, chunk):
    model = tiny(KINDS[name][0], **KINDS[name][1])
    rows = sampled(model, [0, 1, 0, 1], group=2, high=90)
    sizes = []
    logits = [
        model(input_ids=torch.tensor([r.prompt + r.tokens]), use_cache=False).logits[
            0, len(r.prompt) - 1 : -1, :90
        ]
        / 0.7
        for r in rows
    ]
    want = torch.cat(
        [chosen(x.log_softmax(-1), r.tokens) for x, r in zip(logits, rows, strict=True)]
    )
    entropy = torch.cat([torch.distributions.Categorical(logits=x).entropy() for x in logits])
    weights = torch.arange(len(want)) % 5 - 2.0
    parameters = list(model.parameters())
    expected = torch.autograd.grad((want * weights).sum(), parameters)
    model.get_output_embeddings().register_forward_hook(
        lambda m, inputs, out: sizes.append(out.numel() // V)
    )
    got, got_entropy = rltr.completion_logprobs(lm_of(model, vocab_size=90), rows, 0.7, chunk)
    assert sum(sizes) == len(want)
    assert max(sizes) <= (chunk or len(want))
    for a, b in zip(torch.autograd.grad((got * weights).sum(), parameters), expected, strict=True):
        assert torch.allclose(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
    assert torch.allclose(got, want, atol=1e-5)
    assert torch.allclose(got_entropy, entropy, atol=1e-5)


def test_the_clipped_objective_on_cases_made_by_hand():
    for rho, advantage, want, slope in (
        (1, 2.0, 2, 2),
        (1.5, 1.0, 1.3, 0.0),
        (1.5, -1.0, -1.5, -1.5),
        (0.5, 1.0, 0.5, 0.5),
        (0.5, -1.0, -0.8, 0.0),
        (1.25, 1.0, 1.25, 1.25),
        (0.85, -2.0, -1.7, -1.7),
    ):
        logp = torch.tensor([-2.0 + np.log(rho)], requires_grad=True)
        old = torch.tensor([-2.0])
        value = rltr.policy_objective(logp, old, torch.tensor([advantage]), 0.2, 0.3)
        value.sum().backward()
        assert value.item() == pytest.approx(want)
        assert logp.grad.item() == pytest.approx(slope)


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
        logits = model(input_ids=torch.tensor([r.prompt + r.tokens]), use_cache=False).logits[0]
        for t, token in enumerate(r.tokens):
            p = (logits[len(r.prompt) + t - 1, :vocab_size] / config.temperature).softmax(-1)
            rho = p[token] / np.exp(r.logprobs[t])
            log_rhos.append(rho.log().item())
            rho = min(rho, 1 + config.clip_high) if a > 0 else max(rho, 1 - config.clip_low)
            objective = objective + rho * a
            entropies.append(-(p * p.log()).sum().item())
    gradient = torch.autograd.grad(-objective / len(log_rhos), list(model.parameters()))
    rhos = np.exp(log_rhos)
    metrics = {
        "objective": objective.item() / len(rhos),
        "entropy": np.mean(entropies),
        "logprob_gap_mean": np.mean(np.abs(log_rhos)),
        "logprob_gap_max": np.max(np.abs(log_rhos)),
        "clip_share": sum(not 1 - config.clip_low <= rho <= 1 + config.clip_high for rho in rhos)
        / len(rhos),
        "approx_kl": sum(rho - 1 - np.log(rho) for rho in rhos) / len(rhos),
    }
    return metrics, torch.cat([g.flatten() for g in gradient])


def same_gradient(got, want, tolerance=1e-5):
    return (got - want).abs().max() < tolerance * want.abs().max()


@pytest.mark.parametrize("in_a_batch", [1, 2, 4, 99])
def test_mistake_divisor_or_metrics_are_those_of_one_micro_batch_or_of_dead_groups(in_a_batch):
    lm = lm_of(tiny(), vocab_size=90)
    # Groups of three: the second and the fourth are dead.
    rewards = [1, 0, 0] + [0.1, 0.1, 0.1] + [2.1, 1.1, 0.1] + [0, 0, 0] + [0, 1, 1]
    rows = sampled(lm.model, rewards, noise=0.6, high=90)
    optimizer = KeepGradient(lm.model)
    longest = max(len(r.prompt) + len(r.tokens) for r in rows if r.advantage)
    config = Config(group=3, temperature=0.9, token_budget=in_a_batch * longest)
    want, gradient = naive_update(lm.model, rows, config, 90)
    assert want["logprob_gap_max"] > 0.5  # so that both clips are at work
    assert 0.1 < want["clip_share"] < 0.9
    metrics = rltr.update(lm, optimizer, rows, config)
    assert same_gradient(optimizer.gradients[0], gradient)
    for key, value in want.items():
        assert metrics[key] == pytest.approx(value, rel=1e-4), key


def test_minibatches_split_the_live_groups_and_epochs_repeat_them():
    lm = lm_of(tiny(), vocab_size=90)
    config = Config(group=3, epochs=2, minibatches=2)
    rewards = [1, 0, 0, 2, 2, 2, 2.1, 1.1, 0.1, 0, 1, 1]  # the second group is dead
    rows = sampled(lm.model, rewards, noise=0.6, high=90)
    optimizer = KeepGradient(lm.model)  # it makes no step: the policy stays the same
    metrics = rltr.update(lm, optimizer, rows, config)
    first = naive_update(lm.model, rows[:3] + rows[9:], config, 90)[1]
    second = naive_update(lm.model, rows[6:9], config, 90)[1]
    for got, want in zip(optimizer.gradients, [first, second, first, second], strict=True):
        assert same_gradient(got, want)
    for key, value in naive_update(lm.model, rows, config, 90)[0].items():
        assert metrics[key] == pytest.approx(value, rel=1e-4), key


def test_on_policy_the_ratio_is_1_and_with_minibatches_the_policy_moves_away():
    lm = lm_of(tiny())
    rows = sampled(lm.model, [1, 0, 0, 1, 0, 1])
    first = rltr.update(lm, rltr.MasterAdamW(lm.model, 0.01), rows, Config(group=3))
    assert first["clip_share"] == 0
    assert abs(first["approx_kl"]) < 1e-6
    rows = sampled(lm.model, [1, 0, 0, 1, 0, 1])
    config = Config(group=3, minibatches=2, epochs=2)
    later = rltr.update(lm, rltr.MasterAdamW(lm.model, 0.01), rows, config)
    assert later["clip_share"] > 0.1
    assert later["approx_kl"] > 0.01


class OutOfMemory:
    """A machine whose memory holds `most` padded tokens in a micro-batch, and that runs out of it
    in the forward pass, the backward pass or half-way through the gradients of the weights. It does
    so in every second micro-batch only: the first leaves its gradients."""

    def __init__(self, model, where):
        self.where = where
        self.most = 10**9
        self.shapes = []
        self.too_large = 0
        self.gradients = 0
        model.get_input_embeddings().register_forward_hook(self.forward)
        for weight in model.parameters():
            weight.register_post_accumulate_grad_hook(self.gradient)

    def run_out(self, where):
        rows, length = self.shapes[-1]
        if where == self.where and rows * length > self.most and self.too_large % 2 == 0:
            raise torch.OutOfMemoryError

    def forward(self, module, inputs, states):
        self.shapes.append(tuple(inputs[0].shape))
        self.too_large += inputs[0].numel() > self.most
        self.gradients = 0
        self.run_out("forward")
        if states.requires_grad:
            states.register_hook(self.backward)

    def backward(self, gradient):
        self.run_out("backward")

    def gradient(self, weight):
        self.gradients += 1
        if self.gradients > 5:
            self.run_out("gradients")


def gradient_of(lm, optimizer, rows, config):
    """What the optimizer would make a step with."""
    kept = []
    step = optimizer.adam.step
    optimizer.adam.step = lambda: kept.extend(master.grad.flatten() for master in optimizer.masters)
    rltr.add_gradient(lm, rows, config)
    optimizer.step(1e9)
    optimizer.adam.step = step
    return torch.cat(kept)


@pytest.fixture
def without_cuda(monkeypatch):
    """What find_token_budget asks of the GPU."""
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda *device: None)


@pytest.mark.parametrize(
    "where, dtype, given",
    [
        ("forward", torch.float32, 400),
        ("forward", torch.bfloat16, 400),
        ("backward", torch.float32, 400),
        ("backward", torch.bfloat16, 1600),
        ("gradients", torch.float32, 400),
        ("gradients", torch.bfloat16, 400),
        ("forward", torch.float32, 100),
    ],
)
def test_the_token_budget_is_halved_until_two_full_micro_batches_fit(
    where, dtype, given, without_cuda
):
    lm = lm_of(tiny().to(dtype))
    memory = OutOfMemory(lm.model, where)
    optimizer = rltr.MasterAdamW(lm.model, 1e-3)
    rows = sampled(lm.model, [1, 0, 0, 0, 1, 1] * 3)
    unlimited = gradient_of(lm, optimizer, rows, Config(token_budget=10**6))

    memory.most = 100
    tasks = [(None, prompt) for prompt in random_prompts(9, 30, 4)]
    config = Config(token_budget=given, max_new_tokens=20)  # so the longest row has 50 tokens
    budget = rltr.find_token_budget(lm, optimizer, tasks, config)
    assert budget == 100
    assert config.token_budget == given
    assert memory.shapes[-2:] == [(2, 49)] * 2  # two, for the second one meets the gradients
    assert (given > 100) == (memory.too_large > 0)
    weights = [*lm.model.parameters(), *optimizer.masters]
    assert not optimizer.sums
    assert all(weight.grad is None for weight in weights)

    limited = gradient_of(lm, optimizer, rows, Config(token_budget=budget))
    assert same_gradient(limited, unlimited, 1e-5 if dtype == torch.float32 else 0.03)


@pytest.mark.parametrize("where", ["forward", "backward"])
def test_memory_that_holds_no_row_is_said_at_once(where, without_cuda):
    lm = lm_of(tiny())
    optimizer = rltr.MasterAdamW(lm.model, 1e-3)
    OutOfMemory(lm.model, where).most = 0
    with pytest.raises(torch.OutOfMemoryError):
        rltr.find_token_budget(lm, optimizer, [(None, [1, 2])], Config(max_new_tokens=20))
    assert all(p.grad is None for p in lm.model.parameters())


def test_mistake_memory_runs_out_after_hours_because_a_longer_batch_comes_late():
    rows = sampled(tiny(), [0, 1] * 20, group=2)
    sizes = {id(r): len(r.prompt) + len(r.tokens) for r in rows}
    for budget in (1, 20, 45, 100, 10**6):
        batches = [[id(r) for r in batch] for batch in rltr.micro_batches(rows, budget)]
        assert sorted(sum(batches, [])) == sorted(sizes)
        assert all(len(b) * max(sizes[i] for i in b) <= budget or len(b) == 1 for b in batches)
        assert [sizes[i] for b in batches for i in b] == sorted(sizes.values(), reverse=True)
    assert len(rltr.micro_batches(rows, 1)) == 40
    assert len(batches) == 1


def test_mistake_the_stop_token_is_not_trained_because_it_is_the_pad_token():
    lm = lm_of(tiny())  # 0 stops, and pads
    rows = [
        Rollout(None, [5, 6], tokens, [], True, "", reward=a, advantage=a)
        for tokens, a in (([7, 0], 1.0), ([8], -1.0))
    ]
    for row in rows:
        row.logprobs = chosen(full_logprobs(lm.model, row.prompt, row.tokens), row.tokens).tolist()
    before = full_logprobs(lm.model, [5, 6, 7], [0])[0, 0]
    metrics = rltr.update(lm, rltr.MasterAdamW(lm.model, 1e-3), rows, Config(group=2))
    assert metrics["objective"] == pytest.approx((2 - 1) / 3)  # two tokens up, one down
    assert full_logprobs(lm.model, [5, 6, 7], [0])[0, 0] > before + 0.01


def test_neither_dead_groups_nor_a_gradient_that_is_not_finite_change_anything():
    lm = lm_of(tiny())
    optimizer = rltr.MasterAdamW(lm.model, 1e-2, weight_decay=0.5)
    before = [p.clone() for p in lm.model.parameters()]
    dead = sampled(lm.model, [1, 1, 1, 0.1, 0.1, 0.1])
    broken = sampled(lm.model, [0, 1, 1])
    broken[0].advantage = float("nan")
    metrics = rltr.update(lm, optimizer, dead, Config(group=3))
    assert (metrics["grad_norm"], metrics["skipped"]) == (None, 0)
    metrics = rltr.update(lm, optimizer, broken, Config(group=3))
    assert (metrics["grad_norm"], metrics["skipped"]) == (None, 1)
    after = list(lm.model.parameters())
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert not optimizer.adam.state
    rltr.update(lm, optimizer, sampled(lm.model, [0, 1, 1]), Config(group=3))
    assert not any(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_mistake_bf16_weights_do_not_move_at_lr_1e_6():
    def layer(dtype):
        made = torch.nn.Linear(16, 16, bias=False, dtype=dtype)
        made.weight.data.copy_(start)
        return made

    def train(layer, step, times=100):
        for _ in range(times):
            layer.weight.backward(direction.to(layer.weight.dtype))
            step(1e9)
        return layer.weight.detach().clone()

    torch.manual_seed(0)
    direction = torch.randn(16, 16).bfloat16()
    start = torch.rand(16, 16).bfloat16() / 64 + 1 / 64
    fp32, bf16, plain, again = map(layer, (torch.float32, *[torch.bfloat16] * 3))
    naive = torch.optim.AdamW(plain.parameters(), 1e-6)
    assert torch.equal(train(plain, lambda norm: naive.step()), start)
    ours = rltr.MasterAdamW(bf16, 1e-6, offload=True)
    exact = rltr.MasterAdamW(fp32, 1e-6)
    moved = train(bf16, ours.step)
    assert torch.equal(moved, train(fp32, exact.step).bfloat16())
    assert (moved != start).float().mean() > 0.5

    resumed = rltr.MasterAdamW(again, 1e-6)  # the masters outlive a checkpoint
    again.weight.data.copy_(moved)
    resumed.load_state_dict(ours.state_dict())
    for _ in range(60):
        assert torch.equal(train(again, resumed.step, 1), train(bf16, ours.step, 1))
    for small in (1.0, 2.0**-10):  # micro-batches add up in fp32: bf16 has 8 bits
        again.weight.backward(torch.full((16, 16), small, dtype=torch.bfloat16))
    assert resumed.step(1e9) == pytest.approx(16 * (1 + 2**-10), rel=1e-6)


def test_the_gradient_is_clipped_to_the_norm_and_cleared():
    layer = torch.nn.Linear(2, 1, bias=False)
    optimizer = rltr.MasterAdamW(layer, 1e-3)
    for scale in (1.0, 100.0):
        layer.weight.backward(torch.tensor([[3.0, 4.0]]) * scale)
        assert optimizer.step(1.0) == pytest.approx(5 * scale)
    mean = optimizer.adam.state[layer.weight]["exp_avg"] / (1 - 0.9**2)  # of both gradients
    assert torch.allclose(mean, torch.tensor([[0.6, 0.8]]), atol=1e-5)


def test_the_model_does_not_keep_the_optimizer_in_memory():
    layer = torch.nn.Linear(2, 2, dtype=torch.bfloat16)
    optimizer = rltr.MasterAdamW(layer, 1e-3)
    master = weakref.ref(optimizer.masters[0])
    del optimizer
    gc.collect()
    assert master() is None


# --------------------------------------------------------------------------------------------- runs


@pytest.fixture(scope="session")
def task(tmp_path_factory):
    """A folder like make_tiny's, with smaller models that learnt less."""
    folder = tmp_path_factory.mktemp("tiny")
    rltr.warm_start(folder / "generator", 32, 100, 0.3, 0)
    rltr.warm_start(folder / "receiver", 40, 60, 0.0, 1)
    problems = [rltr.tiny_problem(random.Random(i)) for i in range(9)]
    (folder / "train.jsonl").write_text(
        "\n".join(
            json.dumps({"question": question, "answer": answer}) for question, _, answer in problems
        )
    )
    return folder


def arguments(task, out, flags=""):
    given = f"""--model {task}/generator --receiver {task}/receiver --data {task}/train.jsonl
        --out {out} --prompt {{question}} --steps 4 --prompts 2 --group 4 --max-new-tokens 28
        --cuts 2 --lr 1e-3 --save-every 2 --device cpu {flags}"""
    return given.split()


def run(task, out, flags=""):
    return rltr.main(arguments(task, out, flags))


def read(out, name):
    """Lines of metrics.jsonl or rollouts.jsonl, without what differs from run to run."""
    rows = [json.loads(line, parse_constant=no_number) for line in (out / f"{name}.jsonl").open()]
    differs = ("seconds", "tokens_per", "peak")
    return [{k: v for k, v in row.items() if not k.startswith(differs)} for row in rows]


def no_number(word):
    raise AssertionError(f"{word} is not JSON")


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def weights(folder):
    return flat(AutoModelForCausalLM.from_pretrained(folder))


@pytest.fixture(scope="session")
def whole(task, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "a"
    assert run(task, out) == 0
    return out


def test_the_folder_of_a_run(task, whole):
    assert {str(file.relative_to(whole)) for file in (*whole.glob("*"), *whole.glob("c*/*"))} == {
        "config.json",
        "metrics.jsonl",
        "rollouts.jsonl",
        "checkpoints",
        "final",
        "report.html",
        "checkpoints/step-000002",
        "checkpoints/step-000004",
    }
    assert [m["step"] for m in read(whole, "metrics")] == [1, 2, 3, 4]
    final = weights(whole / "final")
    assert torch.equal(final, weights(whole / "checkpoints/step-000004"))
    assert (final - weights(task / "generator")).abs().max() > 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "final")
    assert tokenizer.decode(tokenizer.encode("Q1>*6;")) == "Q1>*6;"


def test_config_json_is_what_the_user_set_and_the_defaults(task, whole):
    """Not what this machine made of it: rows and token budget that fit the memory."""
    config = json.loads((whole / "config.json").read_text())
    assert config == {
        **vars(Config()),
        "model": f"{task}/generator",
        "receiver": f"{task}/receiver",
        "data": f"{task}/train.jsonl",
        "out": str(whole),
        "prompt": "{question}",
        "steps": 4,
        "prompts": 2,
        "group": 4,
        "max_new_tokens": 28,
        "cuts": 2,
        "lr": 1e-3,
        "save_every": 2,
        "device": "cpu",
    }
    assert (config["token_budget"], config["max_rows"]) == (0, 0)


def test_mistake_the_warm_up_starts_at_0(task, whole, tmp_path):
    assert [m["lr"] for m in read(whole, "metrics")] == pytest.approx([1e-4, 2e-4, 3e-4, 4e-4])
    assert run(task, tmp_path / "b", "--steps 2 --warmup 1") == 0
    assert [m["lr"] for m in read(tmp_path / "b", "metrics")] == [1e-3, 1e-3]
    # Adam's first step is the learning rate, wherever the gradient is not tiny.
    assert run(task, tmp_path / "c", "--steps 1 --warmup 4") == 0
    moved = weights(tmp_path / "c/final") - weights(task / "generator")
    assert moved.abs().max().item() == pytest.approx(1e-3 / 4, rel=0.01)


def test_rollouts_and_continuations_of_a_run_have_random_numbers_of_their_own(
    task, tmp_path, monkeypatch
):
    seeds = []

    def spy(*given, seed, **settings):
        seeds.append(seed)
        return generate(*given, seed=seed, **settings)

    def lowest_tau(*keys):
        return Lowest() if keys[1] == rltr.CUT else rng(*keys)

    rng = rltr.rng
    monkeypatch.setattr(rltr, "check_model", lambda lm: None)  # generates, too
    monkeypatch.setattr(rltr, "generate", spy)
    monkeypatch.setattr(rltr, "rng", lowest_tau)
    assert run(task, tmp_path / "b", "--steps 2") == 0
    assert len(seeds) == len(set(seeds)) == 4  # generator and receiver, two steps
    cuts = [cut for r in read(tmp_path / "b", "rollouts") for cut in r["cuts"]]
    assert {cut["tau"] for cut in cuts} == {1.0}  # the lowest random number, 0, gives tau = 1


def test_what_is_logged_is_what_happened(task, tmp_path):
    assert run(task, tmp_path / "a", "--prompts 1 --group 8 --transfer-weight 3") == 0
    tokenizer = rltr.tiny_tokenizer()
    right = rltr.is_correct
    rewards_by_name = {"answer": 1, "transfer": 3, "format": 0.1}  # and their weights
    alive = 0
    for metrics in read(tmp_path / "a", "metrics"):
        rows = [r for r in read(tmp_path / "a", "rollouts") if r["step"] == metrics["step"]]
        cuts = [c for r in rows for c in r["cuts"]]
        column = {name: np.array([r["rewards"][name] for r in rows]) for name in rewards_by_name}
        rewards = np.array([r["reward"] for r in rows])
        advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-6)
        assert np.allclose(rewards, sum(w * column[name] for name, w in rewards_by_name.items()))
        assert np.allclose([r["advantage"] for r in rows], advantages)
        assert len(rows) == 8
        for r in rows:
            gold = r["problem"]["answer"]
            tokens = r["tokens"]
            text = r["text"]
            assert text == rltr.decode(tokenizer, tokens)
            assert r["finished"] == (tokens[-1] == 1)
            assert r["rewards"]["answer"] == right(text, gold) == (r["verdict"] == "right")
            assert (r["verdict"] == "missing") == (rltr.extract_answer(text) is None)
            assert r["rewards"]["format"] == (r["finished"] and r["verdict"] != "missing")
            assert len(r["cuts"]) == 2
            assert r["rewards"]["transfer"] == np.mean([c["correct"] for c in r["cuts"]])
            for c in r["cuts"]:
                assert c["prefix_length"] == int(c["tau"] * (len(tokens) - r["finished"]))
                assert c["prefix"] == rltr.decode(tokenizer, tokens[: c["prefix_length"]])
                assert c["correct"] == right(c["prefix"] + c["continuation"], gold)
        for name, values in {
            "reward": rewards,
            "accuracy": column["answer"],
            "transfer": column["transfer"],
            "reward_answer": column["answer"],
            "reward_transfer": column["transfer"],
            "reward_format": column["format"],
            "answers_missing": [r["verdict"] == "missing" for r in rows],
            "answers_unparsed": [r["verdict"] == "unparsed" for r in rows],
            "finished": [r["finished"] for r in rows],
            "leak": [c["leaked"] for c in cuts],
            "transfer_unleaked": [c["correct"] for c in cuts if not c["leaked"]],
            "length": [len(r["tokens"]) for r in rows],
            "dead_groups": np.ptp(rewards) == 0,
            "transfer_tau_0.25_0.5": [c["correct"] for c in cuts if 0.25 < c["tau"] <= 0.5],
        }.items():
            want = pytest.approx(np.mean(values)) if np.size(values) else None
            assert metrics[name] == want, name
        alive += not metrics["dead_groups"]
        if not metrics["dead_groups"]:  # on-policy
            assert metrics["logprob_gap_max"] < 1e-3
            assert metrics["clip_share"] == 0
    assert alive


def test_rlvr_loads_no_receiver_and_self_is_a_frozen_copy(task, tmp_path, monkeypatch):
    assert run(task, tmp_path / "b", "--transfer-weight 0 --receiver does/not-exist --steps 2") == 0
    for r in read(tmp_path / "b", "rollouts"):
        assert not r["cuts"]
        assert set(r["rewards"]) == {"answer", "format"}
    assert not any("transfer" in name for m in read(tmp_path / "b", "metrics") for name in m)
    loaded = []
    load = rltr.load_lm

    def spy(*given):
        loaded.append(load(*given))
        return loaded[-1]

    monkeypatch.setattr(rltr, "load_lm", spy)
    assert run(task, tmp_path / "c", "--receiver self --steps 2") == 0
    trained, frozen = (flat(lm.model) for lm in loaded)
    assert torch.equal(frozen, weights(task / "generator"))
    assert not torch.equal(trained, frozen)


@pytest.fixture
def closing_tables(monkeypatch):
    """Commands that would have made the table at the end of a run; they exit with `.code`, or
    cannot be started."""

    class Commands(list):
        code = 0

        def run(self, command, **settings):
            self.append(command)
            if self.code is None:
                raise OSError(12, "Cannot allocate memory")
            if settings.get("check") and self.code:
                raise subprocess.CalledProcessError(self.code, command)
            return subprocess.CompletedProcess(command, self.code)

    commands = Commands()
    monkeypatch.setattr(rltr.subprocess, "run", commands.run)
    return commands


def test_table_and_page_are_processes_and_their_failure_does_not_hide_the_success(
    task, tmp_path, closing_tables, capfd
):
    here = rltr.Path(rltr.__file__).parent
    for code in (0, 1, None):
        closing_tables.code = code
        out = tmp_path / str(code)
        assert run(task, out, f"--steps 1 --eval-data {task}/train.jsonl") == 0
        page = [sys.executable, here / "benchmarks/report.py", out, "-o", out / "report.html"]
        assert closing_tables.pop() == page
        assert closing_tables.pop() == [sys.executable, here / "eval.py", "--run", out]
        assert (out / "final/model.safetensors").exists()
        said = capfd.readouterr().out
        assert f"{out}/final" in said
        assert "--transfer-weight 0" in said
        for command in (f"eval.py --run {out}", f"report.py {out} -o {out}/report.html"):
            assert (command in said) == (code != 0)
    assert run(task, tmp_path / "no-table", "--steps 1") == 0
    assert closing_tables.pop()[1] == here / "benchmarks/report.py"
    assert not closing_tables
    assert "to evaluate it" in capfd.readouterr().out


def test_without_a_transfer_reward_a_missing_receiver_does_not_fail_the_closing_table_or_the_run(
    task, tmp_path, capfd
):
    flags = "--transfer-weight 0 --receiver does/not-exist --steps 1 --eval-k 2"
    assert run(task, tmp_path / "b", f"{flags} --eval-data {task}/train.jsonl") == 0
    assert "not done" not in capfd.readouterr().out


def fail_in_the_second_checkpoint(monkeypatch, error):
    save = torch.save
    calls = []

    def failing(*arguments, **settings):
        calls.append(1)
        if len(calls) == 2:
            raise error
        save(*arguments, **settings)

    monkeypatch.setattr(torch, "save", failing)


def test_mistake_resume_repeats_a_batch_or_reseeds(task, whole, tmp_path, monkeypatch):
    fail_in_the_second_checkpoint(monkeypatch, KeyboardInterrupt())
    assert forked(lambda: run(task, tmp_path / "b")) != 0
    monkeypatch.undo()
    out = tmp_path / "b"
    assert len(read(out, "metrics")) == 4
    assert not (out / "final").exists()
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "rew')  # and a line cut off
    assert rltr.main(["--resume", str(out)]) == 0
    for name in ("metrics", "rollouts"):
        assert read(out, name) == read(whole, name)
    assert torch.equal(weights(out / "final"), weights(whole / "final"))
    ours, theirs = (
        torch.load(folder / "checkpoints/step-000004/optimizer.pt")["adam"]["state"]
        for folder in (out, whole)
    )
    assert all(torch.equal(ours[i]["exp_avg_sq"], theirs[i]["exp_avg_sq"]) for i in theirs)
    assert sorted(p.name for p in out.rglob("*")) == sorted(p.name for p in whole.rglob("*"))
    assert rltr.main(["--resume", str(out), "--lr", "1"]) == 2  # that would be another run
    assert rltr.main(["--resume", str(tmp_path / "nothing")]) == 2


def test_two_steps_and_a_resume_to_four_are_four_steps(task, whole, tmp_path):
    assert run(task, tmp_path / "b", "--steps 2") == 0
    assert rltr.main(["--resume", str(tmp_path / "b"), "--steps", "4"]) == 0
    assert read(tmp_path / "b", "metrics") == read(whole, "metrics")
    assert torch.equal(weights(tmp_path / "b/final"), weights(whole / "final"))


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
def test_resume_accepts_the_memory_knobs_which_change_nothing(task, whole, tmp_path):
    assert forked(lambda: run(task, tmp_path / "b", "--steps 2")) == 0
    knobs = "--token-budget 60 --max-rows 3 --gradient-checkpointing --offload --device cpu"
    given = f"--resume {tmp_path / 'b'} --steps 4 --keep 5 --save-every 1 {knobs}"
    assert rltr.main(given.split()) == 0
    config = json.loads((tmp_path / "b/config.json").read_text())
    assert (config["token_budget"], config["max_rows"], config["offload"]) == (60, 3, True)
    for name in ("step", "tau", "text", "continuation", "rewards", "tokens"):
        ours = [r.get(name) for r in read(tmp_path / "b", "rollouts")]
        assert ours == [r.get(name) for r in read(whole, "rollouts")], name
    final = weights(tmp_path / "b/final")
    assert torch.allclose(final, weights(whole / "final"), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "change",
    ["--lr 0.1", "--seed 1", "--cuts 1", "--prompts 3", "--no-normalize-std", "--model x"],
)
def test_resume_refuses_what_would_be_another_run(change, whole, capfd):
    assert rltr.main(["--resume", str(whole), "--steps", "5", *change.split()]) == 2
    [error] = capfd.readouterr().err.splitlines()
    assert change.split()[0].strip("-").removeprefix("no-").replace("-", "_") in error
    assert len(read(whole, "metrics")) == 4


def test_resume_refuses_settings_that_are_missing_unknown_or_of_the_wrong_kind(
    whole, tmp_path, capfd
):
    saved = json.loads((whole / "config.json").read_text())
    without = {name: value for name, value in saved.items() if name != "clip_low"}
    for config, word in (
        (without, "clip_low"),  # a fork's new field: not its default in silence
        (saved | {"length_weight": 1.0}, "length_weight"),
        (saved | {"lr": "1e-3"}, "lr"),
        (saved | {"steps": True}, "steps"),
        (saved | {"cuts": 0}, "cuts"),
        ([], "resume"),
    ):
        (tmp_path / "config.json").write_text(json.dumps(config))
        assert rltr.main(["--resume", str(tmp_path)]) == 2
        [error] = capfd.readouterr().err.splitlines()
        assert word in error


def test_settings_from_a_program_are_checked_like_those_of_the_command_line(task, tmp_path):
    good = {"model": f"{task}/generator", "out": str(tmp_path / "b"), "device": "cpu"}
    for name, value in {"steps": "3", "lr": None, "group": 1, "offload": 1, "clip_low": 2}.items():
        with pytest.raises(UserError, match=name.replace("_", "-")):
            rltr.train(Config(**good | {name: value}))
    assert not list(tmp_path.iterdir())


def test_without_model_tiny_settings_replace_what_the_user_did_not_set(task, tmp_path, monkeypatch):
    monkeypatch.setattr(rltr, "make_tiny", lambda seed: task)
    monkeypatch.chdir(tmp_path)
    flags = ["--steps", "1", "--prompts", "2", "--cuts", "3", "--out", "tiny/x", "--eval-data", ""]
    assert rltr.main(flags) == 0
    assert (tmp_path / "tiny/x/final").is_dir()
    config = json.loads((tmp_path / "tiny/x/config.json").read_text())
    given = {"steps": 1, "prompts": 2, "cuts": 3, "eval_data": "", "out": "tiny/x"}
    for key, want in {**vars(Config()), **rltr.TINY, **given}.items():
        if isinstance(want, str):
            want = want.replace("{tiny}", str(task))
        assert config[key] == want


def test_mistake_settings_that_begin_with_tiny_are_taken_for_the_tiny_task(
    task, tmp_path, monkeypatch
):
    def never(seed):
        raise AssertionError("not asked for")

    monkeypatch.setattr(rltr, "make_tiny", never)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").symlink_to(task)
    (tmp_path / "runs").mkdir()
    assert run("tiny", "runs/../tiny/x", "--steps 1") == 0  # a model, a receiver, data, a folder
    assert (task / "x/final").is_dir()
    rltr.shutil.rmtree(task / "x")


BAD = {
    "unknown model": "--model nobody/nothing",
    "short name": "--model Qwen2.5-0.0B",
    "unknown receiver": "--receiver nobody/nothing",
    "folder without a model": "--model {tmp}",
    "unknown data": "--data nobody/nothing",
    "missing file": "--data {tmp}/no.jsonl",
    "columns": "--data {tmp}/columns.jsonl",
    "empty": "--data {tmp}/empty.jsonl",
    "no json": "--data {tmp}/broken.jsonl",
    "not rows": "--data {tmp}/rows.json",
    "answer missing": "--data {tmp}/answer.jsonl",
    "no box": "--data {tmp}/box.jsonl",
    "group of one": "--group 1",
    "negative weight": "--transfer-weight -1",
    "no reward": "--answer-weight 0 --transfer-weight 0 --format-weight 0",
    "nan": "--lr nan",
    "infinite": "--lr inf",
    "steps": "--steps 0",
    "cuts": "--cuts 0",
    "temperature": "--temperature 0",
    "budget": "--token-budget -1",
    "seed": "--seed -1",
    "context": "--max-new-tokens 128",
    "prompt": "--prompt no_place",
    "device": "--device abacus",
    "receiver with a tiny context": "--receiver {odd}/short",
    "NaN weights": "--model {odd}/nan",
    "no end of text": "--model {odd}/endless",
    "more tokens than rows": "--model {odd}/narrow",
    "no tokenizer": "--model {odd}/mute",
    "unsupported": "--model {odd}/bloom",
    "remote code": "--model {odd}/remote",
    "half a file of weights": "--model {odd}/half",
    "broken config": "--receiver {odd}/config",
    "template without the question": "--model {odd}/drops",
    "template in small letters": "--receiver {odd}/lowers",
    "template with half the question": "--model {odd}/cuts",
    "template that raises": "--receiver {odd}/raises",
    "template that does not parse": "--model {odd}/syntax",
    "template without end": "--model {odd}/loops",
    "end of text a word": "--model {odd}/word",
    "no context": "--model {odd}/nothing",
    "not text": "--data {tmp}/binary.jsonl",
    "not a number": "--data {tmp}/nan.jsonl",
    "an empty box": "--data {tmp}/empty-box.jsonl",
    "infinite answer": "--data {tmp}/infinite.jsonl",
    "true answer": "--data {tmp}/true.jsonl",
    "half a character": "--data {tmp}/half.jsonl",
    "a book": "--data {tmp}/book.jsonl",
    "a pipe": "--data {tmp}/pipe.jsonl",
    "a device": "--data {tmp}/device.jsonl",
    "long problems to evaluate": "--eval-data {tmp}/long.jsonl",
    "out of new folders": "--out {tmp}/a/b/c --data {tmp}/no.jsonl",
    "out an empty folder": "--out {tmp}/mine --data {tmp}/no.jsonl",
    "a device without rows": "--device meta",
    "a device of another machine": "--device cuda:99",
    "nearly greedy": "--receiver-temperature 1e-40",
    "a comma too many": "--data {tmp}/comma.csv",
    "a quote too many": "--data {tmp}/quote.csv",
    "a token beyond the embeddings": "--receiver {odd}/gap",
    "a huge end of text": "--model {odd}/huge",
    "a long name": "--model " + 300 * "x",
    "tracker": "--track abacus",
    "tracker that is not there": "--track trackio",
    "broken csv": "--data {tmp}/broken.csv",
    "broken parquet": "--data {tmp}/broken.parquet",
    "broken json": "--data {tmp}/broken.json",
    "empty answer": "--data {tmp}/blank.jsonl",
    "answer a list": "--data {tmp}/list.jsonl",
    "empty question": "--data {tmp}/question.jsonl",
    "eval data": "--eval-data {tmp}/no.jsonl",
    "k": "--eval-k 0",
    "word": "--steps many",
    "unknown flag": "--abacus 3",
    "no value": "--lr",
    "epochs": "--epochs 0",
    "resume nothing": "--resume {tmp}/no.txt",
    "out in use": "--out {tmp}/used",
    "out is a file": "--out {tmp}/no.txt",
    "out below a file": "--out {tmp}/no.txt/a",
}


@pytest.fixture(scope="session")
def odd(task, tmp_path_factory):
    """Model folders that cannot be used, each in another way."""
    folder = tmp_path_factory.mktemp("odd")
    tokenizer = rltr.tiny_tokenizer()

    def save(name, model, tokenizer=tokenizer):
        rltr.save_lm(lm_of(model, tokenizer), folder / name)

    small = {"vocab_size": len(tokenizer), "eos_token_id": 1}
    save("short", tiny(max_position_embeddings=9, **small))
    model = tiny(**small)
    model.lm_head.weight.data[3] = torch.nan
    save("nan", model)
    silent = rltr.tiny_tokenizer()
    silent.eos_token = None
    save("endless", tiny(vocab_size=len(tokenizer)), silent)
    save("narrow", tiny(vocab_size=5, eos_token_id=1))
    gap = json.loads(tokenizer.backend_tokenizer.to_str())
    gap["model"]["vocab"]["+"] = 70
    gap = tokenizers.Tokenizer.from_str(json.dumps(gap))
    control = {"eos_token": "<eos>", "unk_token": "<unk>"}
    save(
        "gap", tiny(**small), transformers.PreTrainedTokenizerFast(tokenizer_object=gap, **control)
    )
    tiny(**small).save_pretrained(folder / "mute")
    save("bloom", tiny("bloom", **small))
    for name in ("remote", "half", "config"):
        save(name, tiny(**small))
    config = json.loads((folder / "remote/config.json").read_text())
    config |= {
        "model_type": "mine",
        "auto_map": {name: f"code.{name}" for name in ("AutoConfig", "AutoModelForCausalLM")},
    }
    (folder / "remote/config.json").write_text(json.dumps(config))
    (folder / "remote/code.py").write_text(f"open({str(folder / 'executed')!r}, 'w')")
    weights = folder / "half/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    (folder / "config/config.json").write_text("{")
    content = "message['content']"
    for name, said in {
        "drops": "{{ 'Q1' }}",
        "lowers": f"{{{{ {content}.lower() }}}}",
        "cuts": f"{{{{ {content}[:9] }}}}",
        "raises": "{{ raise_exception('roles must alternate') }}",
        "syntax": "{{ for }",
        "loops": "{% for i in range(10 ** 9) %}{{ i }}{% endfor %}",
    }.items():
        spoilt = rltr.tiny_tokenizer()
        spoilt.chat_template = f"{{% for message in messages %}}{said}{{% endfor %}}"
        save(name, tiny(**small), spoilt)
    for name, change in {
        "word": {"eos_token_id": ["<eos>"]},
        "nothing": {"max_position_embeddings": 0},
        "huge": {"eos_token_id": 2**70},
    }.items():
        save(name, tiny(**small))
        for file in ("config.json", "generation_config.json"):
            path = folder / name / file
            path.write_text(json.dumps(json.loads(path.read_text()) | change))
    return folder


@pytest.mark.parametrize("change", ["missing", "unexpected", "another shape"])
def test_mistake_weights_that_are_not_those_of_the_config_are_loaded_or_made_up(change, tmp_path):
    from safetensors.torch import load_file, save_file

    tokenizer = rltr.tiny_tokenizer()
    model = tiny(vocab_size=len(tokenizer), eos_token_id=1)
    rltr.save_lm(lm_of(model, tokenizer), tmp_path)
    assert rltr.load_lm(str(tmp_path)).stop_ids == (1,)
    tensors = load_file(tmp_path / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    if change == "missing":
        del tensors[name]
    elif change == "unexpected":
        tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(2)
    else:
        tensors[name] = tensors[name][:5].clone()
    save_file(tensors, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=re.escape(str(tmp_path))):
        rltr.load_lm(str(tmp_path))


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, task, odd, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("builtins.input", lambda *question: "y")  # "may I run its code?"
    (tmp_path / "used").mkdir()
    (tmp_path / "mine").mkdir()
    for name, text in {
        "columns.jsonl": '{"question": "x"}',
        "empty.jsonl": "\n",
        "broken.jsonl": "{",
        "rows.json": '{"a": 1}',
        "answer.jsonl": '{"question": "x", "answer": null}',
        "box.jsonl": '{"question": "x", "solution": "7"}',
        "no.txt": "",
        "used/a": "",
        "broken.csv": "a",
        "broken.json": "[",
        "broken.parquet": "PAR1",
        "blank.jsonl": '{"question": "x", "answer": " "}',
        "list.jsonl": '{"question": "x", "answer": [1]}',
        "question.jsonl": '{"question": "", "answer": "1"}',
        "comma.csv": "question,answer\n1 + 1?,2\nWhat is 1,000 + 1?,1001\n",
        "quote.csv": 'question,answer\n1 + 1?,"2\n1 + 2?,3\n',
        "empty-box.jsonl": '{"question": "x", "answer": "$\\\\boxed{}$"}',
        "nan.jsonl": '{"question": "x", "answer": NaN}',
        "infinite.jsonl": '{"question": "x", "answer": -Infinity}',
        "true.jsonl": '{"question": "x", "answer": true}',
        "half.jsonl": '{"question": "x \\ud800", "answer": "1"}',
        "book.jsonl": '{"question": "' + 10**6 * "x" + '", "answer": "1"}',
        "long.jsonl": '{"question": "' + 200 * "1+" + '1?", "answer": "201"}',
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    os.mkfifo(tmp_path / "pipe.jsonl")
    (tmp_path / "device.jsonl").symlink_to("/dev/zero")
    monkeypatch.setitem(sys.modules, "trackio", None)
    before = sorted(tmp_path.rglob("*"))
    assert run(task, tmp_path / "out", BAD[case].format(tmp=tmp_path, odd=odd)) == 2
    [error] = capfd.readouterr().err.splitlines()
    assert error.startswith("rltr: ")
    assert len(error) > 25
    assert sorted(tmp_path.rglob("*")) == before  # no half-made run is left behind
    assert not (odd / "executed").exists()


def test_the_cuda_device_in_use_is_set_with_its_number(monkeypatch):
    """torch.cuda.set_device("cuda") raises ValueError; the default of --device is "cuda"."""
    chosen = []
    on_gpu = types.SimpleNamespace(device=torch.device("cuda", 0))
    monkeypatch.setattr(rltr.torch, "zeros", lambda *size, device: on_gpu)
    monkeypatch.setattr(rltr.torch.cuda, "set_device", chosen.append)
    rltr.resolve(Config(model="x", device="cuda", out="y"))
    assert chosen == [torch.device("cuda", 0)]


# ------------------------------------------------------------------------------------------- faults


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def forked(function, limit=None, timer=None):
    """The exit code of the function in a process of its own, -9 if that was killed."""

    def child():
        rltr.tqdm.set_lock(threading.RLock())  # not the parent's: the dead never release it
        if limit:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        if timer:
            signal.setitimer(signal.ITIMER_REAL, timer)  # SIGALRM: death, like kill -9
        sys.exit(function())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    process.join()
    return process.exitcode


def resumes_to(whole, out):
    """Resume; is it then as if nothing had happened?"""
    assert forked(lambda: rltr.main(["--resume", str(out)])) == 0
    for name in ("metrics", "rollouts"):
        assert read(out, name) == read(whole, name)
    assert torch.equal(weights(out / "final"), weights(whole / "final"))
    ours, theirs = (
        torch.load(folder / "checkpoints/step-000004/optimizer.pt")["adam"]["state"]
        for folder in (out, whole)
    )
    assert all(torch.equal(ours[i]["exp_avg_sq"], theirs[i]["exp_avg_sq"]) for i in theirs)
    assert sorted(p.name for p in out.rglob("*")) == sorted(p.name for p in whole.rglob("*"))


@pytest.mark.parametrize(
    "where, name, call",
    [
        (rltr, "sample_rollouts", 4),
        (rltr, "save_lm", 1),
        (torch, "save", 2),
        (rltr, "write_file", 3),
        (rltr.Path, "replace", 1),
        (rltr.Path, "rename", 1),
        (rltr.Path, "rename", 2),
        (rltr.Path, "rename", 3),
        (rltr.shutil, "rmtree", 3),
        (rltr.Run, "log", 4),
        (rltr.subprocess, "run", 1),
    ],
)
def test_kill_at_a_chosen_moment(where, name, call, task, whole, tmp_path):
    out = tmp_path / "b"
    at_the_table = where is rltr.subprocess  # the training is over

    def die_at_call():
        calls = itertools.count(1)
        real = getattr(where, name)

        def function(*given, **settings):
            if next(calls) == call:
                die()
            return real(*given, **settings)

        setattr(where, name, function)
        return run(task, out, f"--eval-data {task}/train.jsonl" if at_the_table else "")

    assert forked(die_at_call) == -9
    if at_the_table:
        assert forked(lambda: rltr.main(["--resume", str(out), "--eval-data", ""])) == 0
    if not (out / "config.json").exists():  # the very first file was being written
        assert run(task, out) == 0  # so the folder is free
    resumes_to(whole, out)


def kill_at_random(task, whole, out, kills, seed):
    """So many deaths in one run, at moments of a steady kind of randomness; then it is finished."""
    source = random.Random(seed)
    died = 0
    while died < kills:
        if (out / "config.json").exists():
            start = ["--resume", str(out)]
        else:
            start = arguments(task, out)
            rltr.shutil.rmtree(out, ignore_errors=True)
        code = forked(functools.partial(rltr.main, start), timer=source.uniform(0.02, 1.0))
        assert code in (0, -signal.SIGALRM)
        if code == 0:  # survived: begin once more
            assert [m["step"] for m in read(out, "metrics")] == [1, 2, 3, 4]
            rltr.shutil.rmtree(out)
        else:
            died += 1
    if (out / "config.json").exists():
        resumes_to(whole, out)


def test_kills_at_random_moments(task, whole, tmp_path):
    kill_at_random(task, whole, tmp_path / "b", 3, seed=0)


with warnings.catch_warnings():  # there is no pytest.ini to register it in
    warnings.simplefilter("ignore")
    soak = pytest.mark.soak


@soak
def test_soak_twenty_kills_at_random_moments(task, whole, tmp_path, request):
    if "soak" not in request.config.getoption("-m"):
        pytest.skip("python -m pytest -m soak")
    kill_at_random(task, whole, tmp_path / "b", 20, seed=1)


@pytest.mark.parametrize("size", [500, 9_000, 60_000])  # no settings, no logs, no weights
def test_a_full_disk_ends_the_run_with_one_clear_line(size, task, whole, tmp_path, capfd):
    out = tmp_path / "b"
    assert forked(lambda: run(task, out), limit=size) == 2  # the limit is that of any file
    errors = [line for line in capfd.readouterr().err.splitlines() if "rltr: " in line]
    assert len(errors) == 1
    assert errors[0].startswith("rltr: ")
    assert str(out) in errors[0]
    assert not (out / "final").exists()
    assert not list(out.glob("checkpoints/*"))
    if (out / "config.json").exists():
        resumes_to(whole, out)


@pytest.mark.parametrize(
    "where, call",
    [
        ("metrics.jsonl", 1),
        ("metrics.jsonl", 2),
        ("metrics.jsonl", 4),
        ("rollouts.jsonl", 2),
        ("rollouts.jsonl", 3),
        ("save_lm", 1),
        ("save_lm", 2),
        ("save_lm", 3),
    ],
)
def test_a_disk_that_is_full_for_a_while_loses_nothing(
    where, call, task, whole, tmp_path, monkeypatch, capfd
):
    calls = itertools.count(1)
    opened = rltr.Path.open
    saved = rltr.save_lm

    def full_for_a_while(path, mode="r", *given, **settings):
        if path.name == where and mode == "a" and next(calls) == call:
            with opened(path, "ab") as file:
                file.write(b'{"step": 2, "torn')
            raise OSError(28, "No space left on device", str(path))
        return opened(path, mode, *given, **settings)

    def save_lm(lm, folder):
        if where == "save_lm" and next(calls) == call:
            with opened(folder / "config.json", "w") as file:
                file.write("{")
            raise OSError(28, "No space left on device", str(folder))
        saved(lm, folder)

    with monkeypatch.context() as patch:
        patch.setattr(rltr, "save_lm", save_lm)
        patch.setattr(rltr.Path, "open", full_for_a_while)
        assert forked(lambda: run(task, tmp_path / "b")) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("rltr: ")
    assert "No space left" in error
    assert not list((tmp_path / "b").rglob("*.partial"))
    resumes_to(whole, tmp_path / "b")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_finishes_the_step_and_saves_and_a_second_one_stops_at_once(
    number, times, task, whole, tmp_path, capfd
):
    out = tmp_path / "b"

    def signalled():
        calls = itertools.count(1)
        real = rltr.sample_rollouts

        def sample(*given):
            if next(calls) == 3:
                for _ in range(times):
                    os.kill(os.getpid(), number)
            return real(*given)

        rltr.sample_rollouts = sample
        return run(task, out)

    code = forked(signalled)
    steps = sorted(p.name for p in out.glob("checkpoints/step-*"))
    if times == 2:
        assert code == -number
        assert steps == ["step-000002"]
    else:
        assert code == 128 + number
        assert steps == ["step-000002", "step-000003"]
        assert f"--resume {out}" in capfd.readouterr().out
        assert forked(lambda: rltr.main(["--resume", str(out)])) == 0
        assert read(out, "rollouts") == read(whole, "rollouts")
        assert torch.equal(weights(out / "final"), weights(whole / "final"))


def test_a_program_gets_its_signal_handlers_back(task, tmp_path):
    def mine(number, frame):
        pass

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert run(task, tmp_path / "b", "--steps 1") == 0
        assert signal.getsignal(signal.SIGTERM) is mine
        assert run(task, tmp_path / "b") == 2  # exists: ends before any handler was set
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_signal_while_the_final_model_is_written_stops_before_the_table(
    task, tmp_path, monkeypatch
):
    save = rltr.save_lm

    def save_and_signal(lm, folder):
        if folder.name.startswith("final"):
            os.kill(os.getpid(), signal.SIGTERM)
        save(lm, folder)

    monkeypatch.setattr(rltr, "save_lm", save_and_signal)
    flags = f"--steps 1 --eval-data {task}/train.jsonl"
    assert forked(lambda: run(task, tmp_path / "b", flags)) == 128 + signal.SIGTERM
    assert (tmp_path / "b/final").exists()
    assert not (tmp_path / "b/evaluation.json").exists()


def test_text_that_the_terminal_has_no_code_for_does_not_end_a_run(task, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"question": "Q1>*6;\u2192?", "answer": "0"}) + "\n")
    flags = "--steps 1 --prompts 1 --group 2 --max-new-tokens 8 --show-every 1 --transfer-weight 0"
    command = [sys.executable, rltr.__file__, "--model", str(task / "generator"), *flags.split()]
    command += ["--data", str(data), "--prompt", "{question}", "--out", str(tmp_path / "b")]
    done = subprocess.run(
        [*command, "--device", "cpu"],
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "\\u2192" in done.stdout


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_byte_order_mark_is_no_part_of_the_first_column(kind, tmp_path):
    rows = {"csv": "question,answer\n1+1?,2\n", "jsonl": '{"question": "1+1?", "answer": "2"}\n'}
    path = tmp_path / f"data.{kind}"
    path.write_text(rows[kind], encoding="utf-8-sig")
    assert rltr.load_problems(str(path)) == [Problem("1+1?", "2")]


def test_a_resumed_run_does_not_reserve_room_for_adam_twice(monkeypatch):
    lm = lm_of(tiny())
    optimizer = rltr.MasterAdamW(lm.model, 1e-3)
    made = []
    empty_like = torch.empty_like
    monkeypatch.setattr(rltr.torch, "empty_like", lambda x: made.append(x) or empty_like(x))
    monkeypatch.setattr(rltr.torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(rltr.torch.cuda, "reset_peak_memory_stats", lambda: None)
    tasks = [(None, [5, 6, 7])]
    config = Config(max_new_tokens=4, token_budget=16)
    for weights_without_state in (len(optimizer.masters), 0):
        made.clear()
        rltr.find_token_budget(lm, optimizer, tasks, config)
        assert len(made) == 2 * weights_without_state
        for master in optimizer.masters:
            master.grad = torch.zeros_like(master)
        optimizer.step(1.0)


def test_folders_that_only_look_like_checkpoints_do_not_count(task, whole, tmp_path):
    rltr.shutil.copytree(whole, tmp_path / "b")
    checkpoints = tmp_path / "b/checkpoints"
    rltr.shutil.copytree(checkpoints / "step-000004", checkpoints / "step-000004-copy2")
    assert rltr.main(["--resume", str(tmp_path / "b"), "--steps", "5"]) == 0
    assert (checkpoints / "step-000005").exists()


def test_two_runs_cannot_write_one_folder(task, tmp_path, capfd):
    assert run(task, tmp_path / "b", "--steps 1") == 0
    with rltr.claimed(tmp_path / "b"):
        assert forked(lambda: rltr.main(["--resume", str(tmp_path / "b"), "--steps", "2"])) == 2
        assert "another process" in capfd.readouterr().err
    assert forked(lambda: rltr.main(["--resume", str(tmp_path / "b"), "--steps", "2"])) == 0


@pytest.mark.parametrize("out", ["--out runs/a", ""])
def test_two_runs_that_start_together_do_not_mix(out, task, tmp_path, capfd, monkeypatch):
    """With the same --out one of them is refused; with none, each may find a name of its own."""
    monkeypatch.chdir(tmp_path)
    flags = arguments(task, "x", "--steps 2 --transfer-weight 0")
    flags = [word for word in flags if word not in ("--out", "x")] + out.split()
    fork = multiprocessing.get_context("fork")
    at_the_gate = fork.Barrier(2)

    def start():
        rltr.tqdm.set_lock(threading.RLock())
        at_the_gate.wait()
        sys.exit(rltr.main(flags))

    processes = [fork.Process(target=start) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    codes = sorted(process.exitcode for process in processes)
    assert codes == [0, 2] or (not out and codes == [0, 0])
    errors = [x for x in capfd.readouterr().err.splitlines() if x.startswith("rltr: ")]
    assert len(errors) == codes.count(2)
    folders = list((tmp_path / "runs").iterdir())
    assert len(folders) == codes.count(0)
    for folder in folders:
        assert [row["step"] for row in read(folder, "metrics")] == [1, 2]


def test_sigterm_while_a_model_is_loaded_leaves_nothing_behind(task, tmp_path, monkeypatch):
    def stop(*_, **__):
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", stop)
    monkeypatch.setattr(sys, "argv", ["rltr.py", *arguments(task, tmp_path / "a/b")])
    code = forked(lambda: runpy.run_path(rltr.__file__, run_name="__main__"))
    assert code == 128 + signal.SIGTERM
    assert not list(tmp_path.iterdir())


def test_settings_that_are_empty_or_no_text_are_named(task, tmp_path, capfd):
    for flag, bad in (("data", ""), ("receiver", ""), ("prompt", "\udcff{question}")):
        assert rltr.main([*arguments(task, tmp_path / "b"), f"--{flag}", bad]) == 2
        assert f"--{flag}" in capfd.readouterr().err
    with pytest.raises(UserError, match="--out"):
        rltr.train(Config(model="x", out="a\0b"))
    assert not list(tmp_path.iterdir())


def test_a_row_is_numbered_as_in_its_file(tmp_path):
    path = tmp_path / "data.jsonl"
    good = '{"question": "1 + 1?", "answer": "2"}'
    for bad in ("7", "null", '{"question": "", "answer": "2"}', '{"question": "x"}', 9999 * "["):
        path.write_text(f"{good}\n\n{good}\n{bad}\n")
        with pytest.raises(UserError, match="row 4"):
            rltr.load_problems(str(path))
    path.write_text(f"\n{good}\n")
    assert rltr.load_problems(str(path)) == [Problem("1 + 1?", "2")]


def test_a_cache_that_is_read_only_serves(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "rltr/tiny-v3-seed5").mkdir(parents=True)
    monkeypatch.setattr(rltr.filelock, "FileLock", None)  # would be a file
    assert rltr.make_tiny(5) == tmp_path / "rltr/tiny-v3-seed5"


def test_a_run_that_died_at_once_leaves_a_folder_to_start_in(task, tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / "b/.lock").touch()
    (tmp_path / "b/config.json.partial").write_text("{")
    assert run(task, tmp_path / "b", "--steps 1 --transfer-weight 0") == 0


@pytest.mark.parametrize("name", ["stdout", "stderr"])
@pytest.mark.parametrize("fault", ["full", "closed", "no reader", "ascii"])
def test_output_that_cannot_be_written_loses_words_but_not_the_run(fault, name, task, tmp_path):
    def child():
        if fault == "full":
            stream = open("/dev/full", "w")  # noqa: SIM115
        elif fault == "closed":
            stream = None  # what Python makes of >&-
        elif fault == "no reader":
            reading, writing = os.pipe()
            os.close(reading)
            stream = os.fdopen(writing, "w")
        else:
            stream = open(tmp_path / "ascii", "w", encoding="ascii")  # noqa: SIM115
        setattr(sys, name, stream)
        return rltr.main(arguments(task, tmp_path / "b", "--steps 2 --show-every 1"))

    assert forked(child) == 0
    assert (tmp_path / "b/final/model.safetensors").exists()
    assert len(read(tmp_path / "b", "metrics")) == 2


def test_the_broken_row_of_a_file_has_its_number(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('{"question": "x", "answer": "1"}\n\n{"question": "x", "answer": 1,}\n')
    with pytest.raises(UserError, match="row 3"):
        rltr.load_problems(str(path))


def test_an_empty_model_is_the_tiny_task():
    config, _ = rltr.parse_arguments(["--model", "", "--steps", "7"])
    assert config.model == "{tiny}/generator"
    assert config.steps == 7


def test_metrics_go_to_a_tracker_too(task, tmp_path, monkeypatch):
    calls = []
    tracker = types.ModuleType("wandb")
    tracker.init = lambda **settings: calls.append(settings)
    tracker.log = lambda metrics, step: calls.append((step, metrics["reward"]))
    tracker.finish = lambda: calls.append("finished")
    monkeypatch.setitem(sys.modules, "wandb", tracker)
    assert run(task, tmp_path / "b", "--steps 2 --track wandb") == 0
    start, *logged, end = calls
    assert start["name"] == "b"
    assert start["config"]["group"] == 4
    assert logged == [(row["step"], row["reward"]) for row in read(tmp_path / "b", "metrics")]
    assert end == "finished"


def test_progress_in_a_file_is_a_plain_line_now_and_then(task, tmp_path, capfd):
    flags = "--steps 12 --prompts 1 --group 2 --transfer-weight 0 --save-every 0"
    assert run(task, tmp_path / "b", flags) == 0
    error = capfd.readouterr().err
    assert "\r" not in error
    lines = [line.split(":")[0] for line in error.splitlines() if line.startswith("step ")]
    assert lines == ["step 1 of 12", "step 10 of 12"]


def test_a_step_without_a_finite_gradient_is_skipped_and_said(task, tmp_path, monkeypatch):
    objective = rltr.policy_objective
    steps = itertools.count(1)
    bad = {2}

    def sometimes_nan(*given):
        return objective(*given) * (torch.nan if next(steps) in bad else 1.0)

    monkeypatch.setattr(rltr, "policy_objective", sometimes_nan)
    flags = "--prompts 4 --seed 2 --token-budget 99999"  # one micro-batch, and no step is dead
    assert run(task, tmp_path / "b", flags) == 0
    metrics = read(tmp_path / "b", "metrics")
    assert [m["skipped"] for m in metrics] == [0, 1, 0, 0]
    assert [m["grad_norm"] is None for m in metrics] == [False, True, False, False]
    bad.update(range(999))
    assert run(task, tmp_path / "c", flags) == 0
    assert [m["skipped"] for m in read(tmp_path / "c", "metrics")] == [1] * 4
    assert torch.equal(weights(tmp_path / "c/final"), weights(task / "generator"))


@pytest.mark.parametrize("step", [1, 4])
def test_out_of_memory_is_one_line_that_names_what_helps(
    step, task, whole, tmp_path, monkeypatch, capfd
):
    objective = rltr.policy_objective
    steps = itertools.count(1)

    def out_of_memory(*given):
        if next(steps) == step:
            raise torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2 GiB")
        return objective(*given)

    monkeypatch.setattr(rltr, "policy_objective", out_of_memory)
    assert forked(lambda: run(task, tmp_path / "b")) == 2
    error = capfd.readouterr().err.splitlines()[-1]
    assert error.startswith("rltr: out of memory")
    for word in ("token-budget", "max-rows", "gradient-checkpointing", "offload", "resume"):
        assert f"--{word}" in error
    monkeypatch.undo()
    resumes_to(whole, tmp_path / "b")


def test_a_run_that_fails_in_a_program_gives_back_the_signals_and_the_folder(
    task, whole, tmp_path, monkeypatch
):
    """Else Ctrl-C does nothing from then on, and the run cannot be resumed without a restart."""

    def out_of_memory(*given):
        raise torch.OutOfMemoryError

    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with monkeypatch.context() as patch:
        patch.setattr(rltr, "policy_objective", out_of_memory)
        assert run(task, tmp_path / "b") == 2
    after = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    for number, handler in zip((signal.SIGINT, signal.SIGTERM), before, strict=True):
        signal.signal(number, handler)
    assert after == before
    assert rltr.main(["--resume", str(tmp_path / "b")]) == 0
    assert read(tmp_path / "b", "metrics") == read(whole, "metrics")


class Bomb:
    def __reduce__(self):
        return open, (os.environ["RLTR_BOMB"], "w")


def test_a_damaged_or_foreign_checkpoint_is_refused_and_an_earlier_one_is_used(
    task, whole, tmp_path, capfd, monkeypatch
):
    out = tmp_path / "b"
    bomb = tmp_path / "executed"
    monkeypatch.setenv("RLTR_BOMB", str(bomb))
    rltr.shutil.copytree(whole, out)
    checkpoint = out / "checkpoints/step-000004"
    good = {
        name: (checkpoint / name).read_bytes() for name in ("optimizer.pt", "model.safetensors")
    }
    foreign = torch.load(checkpoint / "optimizer.pt")
    for moments in foreign["adam"]["state"].values():
        moments["exp_avg"] = moments["exp_avg"].flatten()[:3].clone()
    for name, data in (
        ("optimizer.pt", good["optimizer.pt"][:-500]),
        ("optimizer.pt", b""),
        ("optimizer.pt", Bomb()),
        ("optimizer.pt", foreign),
        ("model.safetensors", good["model.safetensors"][:-500]),
    ):
        if isinstance(data, bytes):
            (checkpoint / name).write_bytes(data)
        else:
            torch.save(data, checkpoint / name)
        assert rltr.main(["--resume", str(out), "--steps", "5"]) == 2
        [error] = capfd.readouterr().err.splitlines()
        assert "step-000004" in error
        assert not bomb.exists()
        (checkpoint / name).write_bytes(good[name])
    rltr.shutil.rmtree(checkpoint)  # the advice it gave
    resumes_to(whole, out)


def test_devices_may_have_a_number(tmp_path):
    for device in ("cpu", "cpu:0"):
        config = Config(model="x", out=str(tmp_path / "b"), device=device)
        assert rltr.resolve(config).device == device


def test_every_setting_is_a_flag_with_help_and_the_examples_in_the_docstrings_are_true(capsys):
    with pytest.raises(SystemExit) as stop:
        rltr.main(["--help"])
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at will
    for name, f in Config.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in text
        assert "".join(f.metadata["help"].split()) in text
    failed, attempted = doctest.testmod(rltr)
    assert stop.value.code == 0
    assert failed == 0
    assert attempted >= 3


# ----------------------------------------------------------------------------- the file as a text


WITHOUT_UNIX = """
import sys
import filelock, huggingface_hub, torch, tqdm, transformers
sys.modules["fcntl"] = sys.modules["resource"] = None
import rltr
assert "eval" not in sys.modules
"""


def test_the_file_imports_where_there_is_no_unix_and_without_eval():
    folder = rltr.Path(rltr.__file__).parent
    subprocess.run([sys.executable, "-c", WITHOUT_UNIX], cwd=folder, check=True)
    imported = set()
    for node in ast.walk(SOURCE):
        if isinstance(node, ast.Import):
            imported.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert {"torch", "transformers"} <= imported
    assert not imported & {"eval", "fcntl", "resource"}


SOURCE = ast.parse(rltr.Path(rltr.__file__).read_text())


FUNCTIONS = {node.name: node for node in ast.walk(SOURCE) if isinstance(node, ast.FunctionDef)}


def test_the_algorithm_stands_at_the_beginning_and_can_be_read_calmly():
    assert FUNCTIONS["train"].lineno < 300
    assert FUNCTIONS["completion_logprobs"].end_lineno < 620
    for name, node in FUNCTIONS.items():
        assert node.end_lineno - node.lineno < 60, name
    parallel = []  # a, b = x, y
    for node in ast.walk(SOURCE):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Tuple):
            parallel += [node.lineno for target in node.targets if isinstance(target, ast.Tuple)]
    assert len(parallel) < 12, parallel


# ---------------------------------------------------------------------------------- report, README


def benchmark(name):
    """benchmarks/NAME.py as a module."""
    path = rltr.Path(rltr.__file__).parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


report = benchmark("report")

HOSTILE_TEXT = "</pre><script>alert(1)</script><img src=x onerror=y>\x1b[31m\u202egnihton\x00"
BREAKING_OUT = "\"'><script>alert(1)</script><a href=javascript:alert(1) onclick=x>"


def logged_run(steps=3, **settings):
    """What rltr.py logs, by its own records: {file: a value, or a list of one a line}."""
    config = Config(model="m/generator", receiver="m/receiver", data="d.jsonl", group=2, **settings)
    metrics, rollouts = [], []
    for step in range(1, steps + 1):
        group = []
        for verdict in ("right", "wrong"):
            text = f"2+2=4 so {verdict}"
            rollout = Rollout(Problem("2+2?", "4"), [1], [2, 3], [-1.0, -1.0], True, text, verdict)
            rollout.rewards = {"answer": float(verdict == "right"), "format": 1.0}
            if config.transfer_weight:
                rollout.cuts = [
                    rltr.Cut(0.25, 1, "2+2", False, continuation="=5", correct=False),
                    rltr.Cut(0.5, 1, "2+2=", False, continuation="4", correct=True),
                ]
                rltr.score_transfer([rollout])
            group.append(rollout)
        rltr.combine_rewards(group, config)
        rltr.assign_advantages(group, config)
        metrics.append({"step": step, **rltr.summarize(group, config), "entropy": 1.5 / step})
        rollouts += [{"step": step, **dataclasses.asdict(rollout)} for rollout in group]
    figures = {"accuracy": 0.5, "Maj@1": 0.5, "Maj@2": 0.75, "Pass@2": 1.0, "transfer@0.3": 0.25}
    return {
        "config.json": vars(config),
        "metrics.jsonl": metrics,
        "rollouts.jsonl": rollouts,
        "evaluation.json": {"before": figures, "after": figures},
    }


def write_run(folder, run):
    folder.mkdir(exist_ok=True)
    for name, content in run.items():
        lines = content if name.endswith("l") else [content]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def harmless_tags(html):
    """The page's tags with their attributes, none of which runs or loads anything."""
    tags = []
    parser = html_parser.HTMLParser()
    parser.handle_starttag = lambda tag, given: tags.append((tag, dict(given)))
    parser.feed(html)
    known = "html head meta title style body h1 h2 h3 p b i span div details summary pre "
    known += "figure figcaption svg g line text polygon polyline"
    assert {tag for tag, _ in tags} <= set(known.split())
    for tag, given in tags:
        assert not {"src", "href", "xlink:href", "srcdoc", "action"} & given.keys()
        assert not [name for name in given if name.startswith("on")]
        for name in ("x", "y", "x1", "x2", "y1", "y2", "points"):  # finite numbers
            for number in given.get(name, "0").replace(",", " ").split():
                assert abs(float(number)) < float("inf"), (tag, given)
    assert "http" not in html
    assert html.isascii()
    return tags


def test_the_report_is_one_page_in_which_model_text_is_only_text(tmp_path, capfd):
    run = logged_run(transfer_weight=0.0)
    for row in run["rollouts.jsonl"]:
        row["text"] = HOSTILE_TEXT
    folders = [write_run(tmp_path / "rlvr", run)]
    for seed in (0, 1):
        run = logged_run(seed=seed)
        for row in run["metrics.jsonl"]:
            row["accuracy"] = 0.25 + 0.5 * seed
        for row in run["rollouts.jsonl"]:
            row["text"] = row["cuts"][0]["continuation"] = HOSTILE_TEXT
            row["problem"]["question"] = HOSTILE_TEXT
        folders.append(write_run(tmp_path / f"seed{seed}", run))
    with (folders[1] / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 5, "te')  # still being written
    page = tmp_path / "report.html"
    scored = tmp_path / "result.json"
    scored.write_text(json.dumps({"figures": {"Maj@1": 0.5, "Maj@2": 0.75}}))
    assert report.main([*map(str, folders), "-o", str(page), "--eval", str(scored)]) == 0
    assert capfd.readouterr() == ("", "")
    html = page.read_text()
    tags = harmless_tags(html)
    assert "alert(1)" in html
    assert "\\x1b[31m" in html
    assert not set("\x1b\u202e\x00") & set(html)
    assert "2 seeds, right answers from 50% to 50%" in html
    assert f"{tmp_path.name}/result.json" in html
    assert "RLVR" in html
    assert "Maj@k" in html
    assert f"{run['rollouts.jsonl'][-1]['advantage']:+.2f}" in html
    lines = [given["points"] for tag, given in tags if tag == "polyline"]
    assert len(lines) >= 2 * 5
    assert len([given for tag, given in tags if given.get("class") == "dashed"]) == 2 * 3
    assert [path.name for path in tmp_path.glob("*.partial")] == []


def places_in(value, path=()):
    """The path of each value within a value of JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else []
    items = enumerate(value) if isinstance(value, list) else items
    for key, inner in items:
        yield from places_in(inner, (*path, key))


def replaced(value, path, new):
    """A copy with another value at this path."""
    if not path:
        return new
    value = copy.copy(value)
    value[path[0]] = replaced(value[path[0]], path[1:], new)
    return value


def everywhere(value, new):
    """A copy with another value in all places that hold no others."""
    if isinstance(value, dict):
        return {key: everywhere(inner, new) for key, inner in value.items()}
    return [everywhere(inner, new) for inner in value] if isinstance(value, list) else new


HOSTILE_VALUES = [
    BREAKING_OUT,
    [BREAKING_OUT],
    {BREAKING_OUT: BREAKING_OUT},
    {"step": [[{}]], "reward_" + BREAKING_OUT: 1, "Maj@" + BREAKING_OUT: 1, "Maj@1": BREAKING_OUT},
    None,
    True,
    float("nan"),
    -float("inf"),
    1e300,
    -(10**400),
    "\ud800",
]


@pytest.mark.parametrize("value", HOSTILE_VALUES, ids=lambda value: repr(value)[:20])
def test_no_value_of_a_run_folder_breaks_out_of_the_report(value, tmp_path):
    run = logged_run(steps=1)
    # A value in each place of what the page reads, and of something that it does not.
    run["config.json"] = report.take(run["config.json"], report.CONFIG) | {"lr": 1e-3}
    run["rollouts.jsonl"] = report.take(run["rollouts.jsonl"], [report.ROLLOUT])[:1]
    for name in set(run["metrics.jsonl"][0]) - {"step", "accuracy", "reward_format", "finished"}:
        del run["metrics.jsonl"][0][name]
    page = tmp_path / "report.html"
    folder = write_run(tmp_path / "run", run)
    written = 0
    for name, content in run.items():
        damaged = [replaced(content, path, value) for path in places_in(content)]
        for damage in [*damaged, everywhere(content, value)]:
            if name.endswith("l") and not isinstance(damage, list):
                damage = [damage]
            write_run(folder, {name: damage})
            page.unlink(missing_ok=True)
            try:
                report.write_page([folder, folder], page)
            except report.PageError as error:
                assert str(folder) in str(error)
                assert not page.exists()
            else:
                harmless_tags(page.read_text())
                written += 1
        write_run(folder, {name: content})
    assert written > 30
    write_run(folder, everywhere(run, value))
    with pytest.raises(report.PageError):
        report.write_page([folder], page)


def test_names_in_a_run_folder_are_only_text(tmp_path):
    run = logged_run()
    for row in run["metrics.jsonl"]:
        row[f"reward_{BREAKING_OUT}"] = 1.0
    for row in run["rollouts.jsonl"]:
        row["rewards"][BREAKING_OUT] = 1.0
    run["evaluation.json"]["after"] |= {f"Maj@{BREAKING_OUT}": 0.5, "Maj@0": 0.5, "Maj@1e9": 0.5}
    run["evaluation.json"]["after"] |= {"Maj@" + "9" * 5000: 0.5, "Maj@1.2.3": 0.5, "Maj@": 0.5}
    first = write_run(tmp_path / "first", run)
    run["config.json"] |= {BREAKING_OUT: BREAKING_OUT, "data": BREAKING_OUT}  # it is in the label
    second = write_run(tmp_path / BREAKING_OUT.replace("/", ""), run)
    result = second / "result.json"
    result.write_text(json.dumps({"figures": {"Pass@1": 0.5}}))
    report.write_page([first, second], tmp_path / "page.html", [result])
    html = (tmp_path / "page.html").read_text()
    harmless_tags(html)
    assert html.count("alert(1)") > 10


def test_damaged_lines_of_a_run_do_not_count(tmp_path):
    run = logged_run(steps=3)
    folder = write_run(tmp_path / "run", run)
    report.write_page([folder], tmp_path / "whole.html")
    junk = [b"", b"[]", b"7", b'{"step": 9', b"\xff\xfe", b'{"step": "9"}', b"[" * 100_000]
    junk += [b"9" * 5000, b'{"step": 1e400}', b"null", b'{"step": NaN, "accuracy": 1}', b"\x00"]
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        lines = (folder / name).read_bytes().splitlines()
        (folder / name).write_bytes(b"\n".join([*junk, *lines, *junk]))
    report.write_page([folder], tmp_path / "damaged.html")
    pages = [(tmp_path / name).read_text() for name in ("whole.html", "damaged.html")]
    assert pages[0] == pages[1]


def test_a_report_of_a_run_that_has_just_begun(tmp_path):
    run = logged_run(steps=1, transfer_weight=0.0)
    run["rollouts.jsonl"] = []
    del run["evaluation.json"]
    folder = write_run(tmp_path / "run", run)
    report.write_page([folder], folder / "report.html")
    html = (folder / "report.html").read_text()
    points = [given["points"] for tag, given in harmless_tags(html) if tag == "polyline"]
    assert points
    for line in points:  # a dot
        first, second = line.split()
        assert first == second
    assert "Evaluation" not in html


def test_runs_that_differ_only_in_seed_and_folders_share_a_curve():
    runs = []
    for seed, extra in ((0, {}), (1, {}), (2, {}), (0, {"lr": 1e-3}), (0, {"cuts": 4})):
        config = vars(Config(model=f"cache/tiny-seed{seed}/generator", seed=seed, **extra))
        changed = {name: str(len(runs)) for name in report.ALIKE.split() if name != "seed"}
        texts = {name: str(value) for name, value in (config | changed).items()}
        settings = {name: text.replace(f"seed{seed}", "seed") for name, text in texts.items()}
        runs.append({"config": config, "settings": settings})
    groups = {label: len(group) for label, group in report.group_runs(runs).items()}
    assert groups == {
        "RLTR, cuts = 1, b = 1, lr = 2e-06": 3,
        "RLTR, cuts = 1, b = 1, lr = 0.001": 1,
        "RLTR, cuts = 4, b = 1, lr = 2e-06": 1,
    }
    assert set(report.ALIKE.split()) == set(rltr.HARMLESS.split()) - {"steps"} | {"seed", "out"}


def test_what_the_report_cannot_do_is_one_line(tmp_path, capfd):
    run = write_run(tmp_path / "run", logged_run())
    page = tmp_path / "report.html"
    page.write_text("the last one")
    os.mkfifo(tmp_path / "fifo")
    (tmp_path / "full").symlink_to("/dev/full")  # the device itself would not survive a mistake
    (tmp_path / "taken.html.partial").mkdir()
    (tmp_path / "list.json").write_text("[]")
    for name in ("config.json", "metrics.jsonl", "rollouts.jsonl"):
        lacking = write_run(tmp_path / f"no {name}", logged_run())
        (lacking / name).unlink()
    for name in ("config.json", "metrics.jsonl", "evaluation.json"):
        empty = write_run(tmp_path / f"empty {name}", logged_run())
        (empty / name).write_text("")
    wrong = [
        [],
        ["--what"],
        [run, "-o"],
        [tmp_path / "nowhere"],
        [tmp_path],
        [page],
        ["a\nb\udcff"],
    ]
    wrong += [[path] for path in sorted(tmp_path.glob("no *"))]
    wrong += [[path] for path in sorted(tmp_path.glob("empty *"))]
    wrong += [[run, "--eval", path] for path in (tmp_path / "list.json", tmp_path, "nowhere.json")]
    wrong = [[*argv, "-o", page] for argv in wrong if "-o" not in argv] + [[run, "-o"]]
    for output in ("", "full", "fifo", "no/page", "taken.html", "x" * 300):
        wrong.append([run, "-o", tmp_path / output])
    for argv in wrong:
        assert report.main([str(word) for word in argv]) == 2, argv
        out, err = capfd.readouterr()
        assert out == ""
        assert len(err.splitlines()) == 1, argv
        assert err.startswith("report: ")
        assert page.read_text() == "the last one"
    assert (tmp_path / "fifo").is_fifo()
    assert (tmp_path / "full").is_symlink()
    assert not (tmp_path / "no").exists()


def test_the_report_is_a_module_without_side_effects():
    here = rltr.Path(rltr.__file__).parent
    code = "import sys; path = list(sys.path); from benchmarks import report; "
    code += "assert sys.path == path; assert not {'rltr', 'torch', 'numpy'} & set(sys.modules); "
    code += "assert report.write_page"
    subprocess.run([sys.executable, "-c", code], cwd=here, check=True)
    failed, attempted = doctest.testmod(report)
    assert (failed, attempted) == (0, 5)
    for node in ast.walk(ast.parse((here / "benchmarks/report.py").read_text())):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 60, node.name


def test_the_forks_of_the_readme_fit_the_file():
    here = rltr.Path(rltr.__file__).parent
    forks = (
        (here / "README.md").read_text().split("## Fork it")[1].split("**More than one GPU**")[0]
    )
    source = (here / "rltr.py").read_text().splitlines()
    diff = [line[4:] for line in forks.splitlines() if line.startswith("    ")]
    assert sum(line.startswith("+") for line in diff) > 5
    for line in diff:
        if line.startswith(("-", " ")):  # is there now
            assert line[1:] in source, line


HERE = rltr.Path(rltr.__file__).parent
PAGES = ("README.md", "docs/reference.md", "benchmarks/RESULTS.md")


def test_the_map_of_the_readme_has_the_right_lines():
    lines = (HERE / "rltr.py").read_text().splitlines()
    parts = [(1, "head")]
    for number, line in enumerate(lines, 1):
        if line.startswith("# ===="):
            parts.append((number, line.split("= ")[1]))
    ends = [start - 1 for start, _ in parts[1:]] + [len(lines)]
    true = [(start, end, name) for (start, name), end in zip(parts, ends, strict=True)]
    rows = re.findall(r"^\| (\d+)-(\d+) \| ([^|]+) \|", (HERE / "README.md").read_text(), re.M)
    assert [(int(start), int(end), name) for start, end, name in rows] == true


def test_the_readme_can_be_read_in_a_few_minutes():
    text = (HERE / "README.md").read_text()
    assert len(text.split()) <= 1300
    assert "pip install -r requirements.txt && .venv/bin/python rltr.py" in text[:3000]
    first = [number for number, line in enumerate(text.splitlines(), 1) if "venv" in line]
    assert first[1] <= 40
    for line in text.splitlines():
        code_or_table = line.startswith(("    ", "|", "!["))
        assert code_or_table or len(line) <= 100, line


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page):
    text = (HERE / page).read_text()
    for target in re.findall(r"\]\(([^)]+)\)", text):
        if not target.startswith("https://"):
            file, _, anchor = target.partition("#")
            where = (HERE / page).parent / file if file else HERE / page
            assert where.exists(), target
            titles = re.findall(r"^#+ (.+)$", where.read_text(), re.M) if anchor else []
            anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
            assert not anchor or anchor in anchors, target


def test_a_single_file_names_the_packages_it_needs():
    """PEP 723, for `uv run rltr.py`: what requirements.txt has, but for pytest."""
    wanted = [
        line for line in (HERE / "requirements.txt").read_text().split("\n") if line[:1] != "#"
    ]
    wanted = [line for line in wanted if line and not line.startswith("pytest")]
    for name in ("rltr.py", "eval.py"):
        block = re.search(r"^# /// script\n(.*?)^# ///$", (HERE / name).read_text(), re.M | re.S)[1]
        assert json.loads(re.search(r"dependencies = (\[.*?\])", block, re.S)[1]) == wanted


def test_the_examples_of_the_reference_end_as_it_says(task, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(rltr, "make_tiny", lambda seed: task)
    (task / "test.jsonl").write_text((task / "train.jsonl").read_text())
    (tmp_path / "problems.jsonl").write_text((task / "train.jsonl").read_text())
    page = (HERE / "docs/reference.md").read_text()
    examples = re.findall(r"^    \$ python (\S+) (.*)\n    (.*)$", page, re.M)
    assert len(examples) >= 6
    scripts = {"rltr.py": rltr.main, "eval.py": evaluation.main, "report.py": report.main}

    def process(command, **_):  # without the seconds that it takes to import torch
        code = scripts[command[1].name](list(map(str, command[2:])))
        return subprocess.CompletedProcess(command, code)

    monkeypatch.setattr(rltr.subprocess, "run", process)
    for script, flags, last in examples:
        assert scripts[script](shlex.split(flags)) == 0
        assert capfd.readouterr().out.splitlines()[-1] == last, (script, flags)


def test_the_commands_of_the_readme_parse():
    here = rltr.Path(rltr.__file__).parent
    text = "\n".join((here / page).read_text() for page in PAGES)
    commands = re.findall(
        r"(?:python|accelerate launch[^`\n]*?) ((?:benchmarks/)?\w+\.py)([^`\n#&|]*)", text
    )
    assert not re.findall(r"torchrun .*rltr\.py", text)  # one process, one GPU
    settings = ["--" + name.replace("_", "-") for name in Config.__dataclass_fields__]
    settings += ["--resume", "--help", "--samples", "--compare", "--fallback"]
    settings += ["--" + name.replace("_", "-") for name in evaluation.FLAGS.split()]
    seen = set()
    for script, rest in commands:
        given = [word.strip('"') for word in shlex.split(rest) if word not in ("...", ")")]
        seen.add(script)
        if script == "rltr.py" and "--help" not in given and "--resume" not in given:
            rltr.parse_arguments(given)
        elif script == "eval.py" and given:
            evaluation.parse_arguments(given)
        flags = [word for word in given if word.startswith("--")]
        known = settings
        if script.startswith("bench"):
            known = (here / script).read_text()
        assert not [flag for flag in flags if flag not in known], (script, flags)
    assert {"rltr.py", "eval.py", "benchmarks/report.py", "benchmarks/gpu_check.py"} <= seen


def test_the_tables_of_the_results_are_those_of_the_recorded_runs(tmp_path, capsys):
    driver = benchmark("rltr_vs_rlvr")
    page = (HERE / "benchmarks/RESULTS.md").read_text()
    files = set(re.findall(r"rltr_vs_rlvr.py --read (\S+)", page))
    recorded = ("one_cut", "mod7", "ablations")
    assert files == {f"benchmarks/rltr_vs_rlvr_{name}.csv" for name in recorded}
    for file in files:
        driver.main(["--read", str(HERE / file), "--csv", str(tmp_path / "again.csv")])
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.startswith("|") for line in lines) > 5
        for line in lines:
            assert line in page, (file, line)
        assert driver.read_csv(tmp_path / "again.csv") == driver.read_csv(HERE / file)

    runs = driver.read_csv(HERE / "benchmarks/rltr_vs_rlvr_one_cut.csv")
    shown = {"accuracy": "accuracy", "Maj@64": "Maj@64", "Pass@64": "Pass@64"}
    shown["transfer to a new receiver"] = "held-out transfer@0.5"
    for title, figure in shown.items():
        row = f"| {title} |"
        for variant in ("rlvr", "rlvr_16", "rltr"):
            values = driver.column(runs, variant, figure, range(100, 140))
            row += f" {values.mean():.2f} ±{values.std(ddof=1):.2f} |"
        assert row in (HERE / "README.md").read_text()


def test_results_that_are_none_are_refused(tmp_path):
    driver = benchmark("rltr_vs_rlvr")
    recorded = (HERE / "benchmarks/rltr_vs_rlvr_one_cut.csv").read_text()
    for text in ("", "a,b\n1,2\n", recorded.splitlines()[0], recorded.replace("0.67", "x", 1)):
        (tmp_path / "some.csv").write_text(text)
        with pytest.raises(UserError):
            driver.main(["--read", str(tmp_path / "some.csv")])
    without_curves = str(HERE / "benchmarks/rltr_vs_rlvr_one_cut.csv")
    with pytest.raises(UserError, match="no curves"):
        driver.main(["--read", without_curves, "--figure", str(tmp_path / "a.svg")])


# ------------------------------------------------------------------------------------------ answers

EQUAL = r"""
x = 5 \text{ cm} == 5 | \text{Area} = 24 \text{ cm}^2 == 24 | 4 + 9 = 13 == 13 |
\frac{17}{50} = 0.34 == 0.34 | \angle ABC = 60^\circ == 60 | f^{-1}(x) = x-1 == x-1 |
18 \text{ eggs} == 18 | \arcsin 1 == \frac{\pi}{2} | x \leqslant 3 == (-\infty,3] |
5 \text{ miles per hour} == 5 \text{ mile/hour} | 3 \text{ s} == 3 |
18 \, \text{cm}^2 == 18 | 90^\circ. == 90^\circ | \$18.90. == 18.9 | $\$36$ == 36 |
\$18 \text{ per day} == 18 | 3 \, \text{m}, 4 \, \text{m} == 4,3 | 15\text{ inches} . == 15 |
\lvert x-3 \rvert == |3-x| | 5 \text{ centimeters} == 5 |
\left[\begin{matrix}1&2\end{matrix}\right] == \begin{pmatrix}1&2\end{pmatrix} |
\mathbb{R} \setminus \{4\} == (-\infty,4)\cup(4,\infty) | 3 x 10^4 == 30000 |
\frac17 \approx 0.143 == 1/7 |
{5} == 5 | {\{4,5\}} == \{4,5\} | 5! == 120 | \frac{10!}{2} == 1814400 |
sin 2x == 2 sin x cos x | all real numbers == (-\infty,\infty) |
1,234,567 == 1234567 | 12{,}500 == 12500 | ７ == 7 | 12\,500 == 12500 | 12,\!500 == 12500 |
−8 == -8 |
\frac{3}{16} == .1875 | \tfrac79 == 7/9 | \cfrac{7}{9} == 7/9 | -\frac{7}{9} == \frac{-7}{9} |
2\frac{7}{8} == 23/8 | 2 7/8 == 2.875 | \frac{\frac{1}{2}}{3} == 1/6 | 6. == 6 | -0 == 0 |
35\% == 35 | 35 percent == 35\% | 35\text{ pct} == 35 | \$7.50 == 7.5 | \$7.50 == 7.50 dollars |
14\text{ km} == 14 | 14 \mathrm{~m/s} == 14 | 14 km == 14\text{ km} | 8 books == 8 |
5.4cents == 5.4 |
3\text{ m}^2 == 3 | 6 miles per hour == 6 miles/hour |
12^{\text{th}} grade == 12 | 72^\circ == 72 | 72 degrees == 72° |
\sqrt{27} == 3\sqrt3 | \frac{1}{\sqrt{7}} == \frac{\sqrt{7}}{7} | \sqrt{0} == 0 | √5 == \sqrt 5 |
\sqrt[3]{24} == 2\sqrt[3]{3} | \sqrt{11} == 11^{1/2} | 5π/6 == \frac{5\pi}{6} | 7pi == 7\pi |
3\times10^{4} == 3e4 | 2.5e-3 == 0.0025 | 2^{-3} == 1/8 |
(x-3)^2 == x^2-6x+9 | \frac{ab}{3} == ba/3 | \frac{1}{2}abc == \frac{1}{2}cba | 2x+3y == 3y+2x |
\frac{x^2-4}{x-2} == x+2 | |x-3| == |3-x| | \sqrt{x^2} == |x| | x_{1}+x_2 == x_2+x_1 |
\sin 2x == 2 \sin x \cos x | \sin^2 x == 1-\cos^2 x | \tan t == \frac{\sin t}{\cos t} |
\ln 9 == 2\ln 3 | \ln 1 == 0 | 3^{n+1} == 3\cdot3^n | e^{2t} == (e^t)^2 | (2+i)^2 == 3+4i |
\sqrt{-9} == 3i | \frac{1}{1+i} == \frac{1-i}{2} |
\left(\frac12, 3\right) == (0.5,3) | \{4,5\} == \{5,4\} | \{4,5\} == 5, 4 |
\emptyset == \varnothing |
7, 8 \text{ and } 9 == 9,8,7 | 7 \text{ or } 8 == 8,7 | \pm 6 == 6,-6 |
1\pm\sqrt2 == 1-\sqrt2,1+\sqrt2 |
[1,4)\cup(7,\infty) == (7,\infty)\cup[1,4) | 101_2 == 101_{2} |
\begin{pmatrix} 1/2 \\ 3 \end{pmatrix} == \begin{bmatrix} 0.5 \\ 3 \end{bmatrix} |
\left[\begin{array}{cc}1&2\\3&4\end{array}\right] == \begin{pmatrix}1&2\\3&4\end{pmatrix} |
\text{(D)} == D | (D) == D | \textbf{(D)}\ 14 == D | \text{No} == no | \text{north} == North |
\text{3:15 p.m.} == 3:15 pm | 3:15 \text{ p.m.} == 3:15 pm | 5:7 == 5 : 7 | \boldsymbol{9} == 9 |
x = 9 == 9 | f(3)=9 == 9 | AB = 2\sqrt{3} == \sqrt{12} | A:B=3 == 3 | \frac{dy}{dx}=2x == 2x |
x \approx 5 == 5 | S = \{1,2\} == \{2,1\} |
x=2,y=7 == y=7,x=2 | x=2,y=7 == 2,7 | x=2 \text{ or } x=7 == 7, 2 | x=\pm 2 == \{-2,2\} |
x \ge 4 == [4,\infty) | x<4 == (-\infty,4) | 1 < t \le 6 == (1,6] | x \in (1,6] == (1,6] |
x<1 \text{ or } x>4 == (-\infty,1)\cup(4,\infty) | 0 < f(x) < 1 == (0,1)
"""
UNEQUAL = r"""
5\text{ s} != 5\text{ cm} | 5\text{ m} != 5\text{ ms} | \text{5} \text{6} != 56 |
4+9=14 != 13 | 13=9 != 13 | 4+x=13 != 13 | f^{-1}(x)=5 != f(x)=5 |
\text{Area} = 5 \text{ m} != 5 \text{ cm} |
\frac17 \approx 0.143 != 0.143 | (0,9)\setminus\{2\} != (0,9) | sin x != \cos x | 3x10^4 != 3 |
3!! != 720 | 5! != 5 | (x!)! != x! | 2^3! != 720 |
6 != 6\sqrt2 | 1.0000000000000000000000000000000000000000000000000000000000001 != 1 |
1/100! != 1/101! | (3,4) != (4,3) | [3,4] != (3,4) | [3,4) != (3,4] | \pm 6 != 6 |
10:30 != 11:30 | 3:15 am != 3:15 pm | \frac{1}{6} != 16 | 7 != 7! | \frac16 != 0.1667 |
\sqrt3 != 1.7320508075 | \pi != 3.14159 | 10^{30} != 10^{30}+1 | 45 != 4.5 | 1,234 != 1 |
6, 700 != 6700 | 9 km != 9 hours | 9\% != 0.09 | 3 million != 3 | 3\frac12 != \frac{31}{2} |
3 1/2 != 31/2 | 101_2 != 101 | 101_2 != 101_3 | 101_2 != 5 | x != |x| | x != y |
x^{ab} != x^a b |
2x != x^2 | 3-2i != 3+2i | 4:5 != 5:4 | \log x != \ln x | \binom{7}{2} != \frac{7}{2} |
arm != ram |
(A) != (B) | yes != no | x=3 != y=3 | x=3 != x=4 | x=2,y=7 != x=7,y=2 | x=2,y=7 != 7,2 |
x^2+y^2=9 != 9 | x^2+3y^2=9 != x^2+4y^2=9 | 4^{2}! != 16 | x > 4 != x \ge 4 | x > 4 != x < 4 |
x > 4 != -x > -4 | 2x=10 != 10 | x \ne 4 != 4 | \{1,2\} != (1,2) | \{1,2\} != \{1,2,7\} |
1,1,2 != 1,2,2 | (1,2),(3,4) != (1,2,3,4) | (0,1)\cup(2,3) != (0,1)\cup[2,3) |
\sum_{n=1}^{4} n != 10 | e^{-900} != 0 |
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&3\\2&4\end{pmatrix} | 5 or 6 != 5
"""
# Different answers that a careless checker takes for equal, by what it would have to overlook.
NEAR_MISSES = {
    "a unit": r"""
        7 m != 7 km | 7\text{ m} != 7\text{ km} | 7 cm^2 != 7 cm^{-2} | 7 cm^2 != 7 cm^3 |
        7 s != 7 h |
        7\text{ minutes} != 7\text{ hours} | 7\text{ dollars} != 7\text{ cents} |
        \$7 != 7\text{ cents} |
        2 meV != 2 MeV | 2 mL != 2 ML | 7 km != 7 km/h | 7 kg^2 != 7 kg | 7^\circ != 7\% |
        7\text{ m}+3 != 7 | 3\text{ m} x != 3 | \sin 30^\circ != \sin 30""",
    "a word that is no unit": r"""
        2 billion != 2 | 3 dozen != 3 | 2 fifths != 2 | 6 squared != 6 | 4 factorial != 4 |
        8 mod y != 8 |
        7 minus two != 7 | 5 hours ten minutes != 5 | 4 out of nine != 4 | 9 remainder != 9 |
        3 percentx != 3""",
    "a product of letters": r"""
        \frac{3}{2}mg != \frac{3}{2} | \frac{1}{2}mv^2 != \frac{1}{2} | 2\pi rh != 2\pi |
        3 sec x != 3 |
        (x+y)ab != x+y | 5 in x != 5 | 2nm != 2 | 3km != 3 | \frac{k}{2}h != \frac{k}{2}""",
    "percent": r"30\% != 0.3 | 30\% != \frac{3}{10} | 30\% != 3\% | 0.5\% != 0.5\text{ m}",
    "the ends of an interval": r"""
        (2,5) != [2,5] | [2,5) != (2,5] | (2,\infty) != [2,\infty) | 2<x<5 != 2\le x<5 |
        x>2 != [2,\infty) |
        (2,5)\cup(6,7) != (2,5),(6,7) | x<2 \text{ or } x>5 != x<2 \text{ and } x>5""",
    "order": r"""
        (2,5) != (5,2) | TF != FT | HHT != THH | XI != IX | <2,5> != <5,2> | mga != agm |
        5:2 != 2:5 |
        \begin{pmatrix}2\\5\end{pmatrix} != \begin{pmatrix}5\\2\end{pmatrix} |
        dog bites man != man bites dog""",
    "the case of a symbol": r"""
        mgr != mgR | x+y != X+y | Ab != ab | 2RT != 2rT | F_n != f_n | DNA != Dna""",
    "all but special points": r"""
        |x-7| != x-7 | |x-7| != 7-x | |x-250| != 250-x | |x+y| != x+y | |x-y| != x-y |
        \sqrt{y^2} != y |
        \sqrt{x^2y^2} != xy | |xy| != xy | \sqrt{(t-9)^2} != t-9 | |n^2-7| != n^2-7 |
        |x|+|y| != |x+y| |
        x(x-1)(x-2) != 0 | x+10^{-12} != x | n^2-n+41 != n^2-n+43 | \sqrt[3]{x^6} != |x^3| |
        \sqrt{x^2}-x != 0 |
        \sqrt{x^2}+x != 0 | \frac{\sqrt{x^2}}{x} != 1""",
    "a small difference": r"""
        0.333 != 1/3 | 0.33333333333333333333 != 1/3 | 1-e^{-40} != 1 |
        \sqrt{10^{16}+1} != 10^8 |
        \sqrt{10^{16}+1} != \sqrt{10^{16}+2} | \pi != \frac{245850922}{78256779} |
        e^{e^{-40}} != 1 |
        \sqrt{3} != \frac{5042}{2911} | \cos(10^{-9}) != 1 | 1.414213562373095 != \sqrt2 |
        2^{10^{-20}} != 1 |
        3+10^{-20}\pi != 3 | \frac{10^{20}+1}{10^{20}} != 1 | \ln(1+10^{-17}) != 0""",
    "typography": r"""
        7ⁿ != 7n | 11₂ != 112 | √⅓ != \frac{1}{3} | x^⅓ != \frac{x}{3} | 8÷½ != 4 | aᵇ != ab |
        xᵀ != xT |
        7$8 != 78 | 7\$80 != 780 | 10 000/4 != 2500 | 0,250 != 250 | 1,2,3,... != 1,2,3 |
        7 8 != 78 |
        \displaystyle.7 != 7 | 3e - 2 != 0.03 | 2e-3 != 2e^{-3} | 1.250 != 1250 |
        12:00 != 1:00 | 3:1.5 != 3:15 |
        x2 != 2x | 12,34 != 1234 | 3!! != 720 | 2^3^2 != 64""",
    "a relation": r"""
        |x|=7 != 7 | |x|<7 != (-\infty,7) | \ln x < 7 != (-\infty,7) | ab=7 != 7 |
        \sin x=1 != 1 | 7=8 != 7 |
        a|b = 7 != 7 | x^2=7 != 7 | x\ne7 != x=7 | \{x : x > 2.5\} != \{x : x > 25\} |
        x>y != y>x |
        x-7=0 != 7 | 3x=21 != x=7 | B=C != C | x=y != y""",
    "a choice": r"""
        (A) or (B) != A | (A)(B) != A | A+5 != A | A(x+1) != A |
        (A)\ 5 \text{ or } (B)\ 6 != A | (A) (x+1) != A | (A)+5 != A | (A) - 5 != A""",
}
DIFFERENT = r"""
5 -5 5! 5^2 5i 5\pi 5x 5y 5x^2 5/2 0.5 \sqrt5 \sqrt[3]{5} (5,5) \{5,6\} [5,6] (5,6) (6,5)
(5,6] 5_6 5:6 x>5 x<5 x\ge5 x\ne5 |x| x x^{-1} \frac{x}{5} x+y=5 x^2+y^2=5 x^2+y^2=25 e^x
y=5x+1 \sin5 \sin{x} \cos{x} \ln5 \log5 e^5 e^{-x} x_1 x_2 \pm5 5\pm\sqrt2 5\text{million}
(-\infty,5] (-\infty,5)\cup(6,\infty) \binom{7}{4} 0.\overline{5} A \text{(Q)} even odd
5:06\text{am} 5:06\text{pm} \begin{pmatrix}5\\7\end{pmatrix} \int_0^5x \sum_{n=1}^5n
"""
HOSTILE = [
    "{" * 10**6,
    "(" * 10**6 + ")" * 10**6,
    r"\frac{" * 10**6,
    "9" * 10**5,
    "9^" * 190 + "9",
    "][",
    "9^{9^{9^{9^9}}}",
    "99!!!!!!",
    "400!," * 70,
    "+".join(f"1/{n}!" for n in range(400, 460)),
    "-" * 399,
    "1e999999999",
    "1/" * 190 + "3",
    r"\sqrt{" * 60 + "2" + "}" * 60,
    "x_" * 190,
    "\x00",
    "(1," * 100 + "2" + ")" * 100,
    "\x005\x00",
    "\ud800",
    "٣٤",
    "\u202e12\u202c",
    "½" * 390,
    "\\",
    "ﷺ" * 390,
    "}{",
    "\\\\",
    "$" * 390,
    "|" * 390,
    "(" * 199 + "5" + ")" * 199,
    "__import__('os').system('true')",
    "%s%n{0}",
    r"\begin{pmatrix}" * 26,
    ",".join(f"({n},{n + 1})" for n in range(50)),
    "±1" * 150,
    "f(a)" * 90 + "+=5",
    "5" + "m" * 390,
    "5" + " cm" * 120 + "!",
    "1,000" * 79,
    "a" * 399,
    "<" * 399,
    "x<" * 190,
    "e^x+" * 99 + "1/0",
    "x^99+" * 79 + "1",
    "⦃" * 190 + "⦄" * 190,
]


SLOW = [  # of about MAX_CHARS characters
    "i^x+" * 28 + "1",
    "x^x+" * 28 + "1",
    "\\sqrt[3]{ix}+" * 8 + "1",
    "\\arctan i^x+" * 9 + "1",
    "√" * 115 + "x",
    "\\tan" * 27 + "(i+x)",
    "\\sec^9x" * 16 + "y",
    "i^{9999}x+" * 11 + "1",
    "(-7.1)^{16000}+" * 7 + "x",
    "x+" * 57 + "y",
    "(i^x+" * 18 + "1" + ")" * 18,
]


def pairs(table, sign):
    return [pair.strip().split(sign) for pair in " ".join(table.split()).split(" | ")]


@pytest.mark.parametrize("a, b", pairs(EQUAL, " == "))
def test_equal(a, b):
    assert answers_equal(a, b)
    assert answers_equal(b, a)
    assert judge_answer(f"So it is $\\boxed{{{a}}}$.", b) == "right"


@pytest.mark.parametrize("a, b", pairs(UNEQUAL, " != "))
def test_unequal(a, b):
    assert not answers_equal(a, b)
    assert not answers_equal(b, a)


@pytest.mark.parametrize("kind", NEAR_MISSES)
def test_near_misses(kind):
    table = pairs(NEAR_MISSES[kind], " != ")
    assert all(len(pair) == 2 for pair in table)
    assert [pair for pair in table if answers_equal(*pair) or answers_equal(*pair[::-1])] == []


def test_different_answers_differ():
    different = DIFFERENT.split()
    assert not [pair for pair in itertools.permutations(different, 2) if answers_equal(*pair)]


@pytest.mark.parametrize("pattern, replacement, example", rltr.REWRITES)
def test_every_rewrite_has_an_example_that_runs(pattern, replacement, example):
    before, after = example.split(" -> ")
    assert rltr.normalise(before) == after


@pytest.mark.parametrize("form, symbol", rltr.SYMBOL.items())
def test_every_symbol(form, symbol):
    assert rltr.normalise(f"x {form} y") == rltr.normalise(f"x {symbol} y")


@pytest.mark.parametrize(
    "text, gold, verdict",
    [
        (r"\boxed{2.5}", r"\frac52", "right"),
        (r"\boxed{2.4}", r"\frac52", "wrong"),
        ("I do not know.", "5", "missing"),
        (r"\boxed{5", "5", "missing"),
        (r"\boxed{\int x}", "5", "unparsed"),
        (r"\boxed{" + "1+" * 300 + "1}", "5", "unparsed"),
        (r"\boxed{}", "5", "missing"),
        (r"\boxed{west}", "east", "wrong"),
    ],
)
def test_judge_answer(text, gold, verdict):
    assert judge_answer(text, gold) == verdict
    assert is_correct(text, gold) is (verdict == "right")


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{7}}}", r"\frac{1}{\sqrt{7}}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox{4}", "4"),
        ("\\boxed\n {5}", "5"),
        (r"so $x = \boxed 25$.", "25"),
        ("#### -3", "-3"),
        (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        ("a\n#### 1,250\n", "1,250"),
        ("8", None),
        (r"\boxed{6", None),
        (r"\boxed{7} \boxed{", None),
        ("#### Step 2: add", None),
        ("", None),
        ("The answer is 8.", None),
        (r"\boxed}8{", None),
        (r"$\boxed 8", None),
        (r"\boxed $8$", None),
        ("\\boxed" + "{" * 10**6, None),
    ],
)
def test_extract(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    "text",
    [
        "The answer is 12.",
        "The answer is $12$. I see.",
        "The answer is: 12",
        "Final Answer: The final answer is $12$. I hope it is correct.",
        r"Final Answer: The final answer is \(12\).",
        "5 + 7 = 12 apples",
        "5+7=<<5+7=12>>12\nA: 12",
        "She pays $5 and $7, so $12 in all.",
        "That makes 12 m².",
        r"\boxed{12}, I think; the answer is 13",
        "#### 12",
    ],
)
def test_fallback(text):
    assert is_correct(text, "12", fallback=True)
    if "12}" not in text and "####" not in text:
        assert judge_answer(text, "12") == "missing"


def test_hostile_and_random_strings_are_equal_to_themselves_only_and_symmetric():
    rng = random.Random(0)
    alphabet = [
        *"0123456789.,;:+-*/^_!|()[]{}<>=$% ~\\'\"&abxei\n\x00½π√±∪@∈⦃⟧°",
        *[r"\frac", r"\sqrt", r"\text{", r"\pm", r"\{", r"\}", r"\sin", r"\le", r"\left("],
        " and ",
    ]
    noise = ["".join(rng.choices(alphabet, k=rng.randrange(1, 30))) for _ in range(2000)]
    golds = ["7", r"\frac{3}{8}", "(3,8)", "x+8", "3,8", r"\text{Q}", "x>8", "100!"]
    for text in HOSTILE + noise[:300]:
        assert answers_equal(text, text)
        assert not is_correct(f"\\boxed{{{text}}}", "31337.5")
        for gold in golds:
            assert answers_equal(text, gold) is answers_equal(gold, text)
    for a, b in zip(HOSTILE + noise, noise[::-1], strict=False):
        assert answers_equal(a, b) is answers_equal(b, a)


@pytest.mark.parametrize("gold", ["7", "x+8", "(3,8)", "1,2,3", r"\{1,2\}"])
def test_the_work_on_hostile_answers_is_bounded(gold, monkeypatch):
    """Also where an answer has to be computed at all points, as it is undefined at each."""
    parse = rltr.parse
    calls = []

    def counting(tokens, point, level):
        calls.append(level)
        return parse(tokens, point, level)

    monkeypatch.setattr(rltr, "parse", counting)
    for text in HOSTILE + SLOW:
        for answer in (text, text + "/0"):
            calls.clear()
            rltr.value_at.cache_clear()
            answers_equal(answer, gold)
            assert len(calls) < 10_000, answer[:50]


def test_letters_have_values_of_mixed_sign_and_size():
    """Every pair of letters has different signs, the same signs and either order at some points."""
    letters = "abcdfghjklmnopqrstuvwxyzABCKLMNPQRSTVWXYZ"
    values = {name: [rltr.value_of_name(name, point) for point in range(16)] for name in letters}
    assert all(max(row) > 100 and min(row) < -100 for row in values.values())
    for a, b in itertools.combinations(letters, 2):
        pairs = list(zip(values[a], values[b], strict=True))
        assert {x * y > 0 for x, y in pairs} == {True, False}
        assert {x > y for x, y in pairs} == {True, False}
        assert {x + y > 0 for x, y in pairs} == {True, False}
        assert not answers_equal(f"|{a}-100|", f"100-{a}")


def test_majority_vote():
    assert majority_vote(["1/2", "3", "0.5", None, None, None]) == "1/2"
    assert majority_vote(["3", "1/2", "0.5", "3.0"]) == "3"
    assert majority_vote([None, None]) is None
    assert majority_vote([]) is None


# --------------------------------------------------------------------------------------- evaluation


POOL = ["1,000", "1000", "7", "8", None]  # the first two are the same answer


def draws(n, seed):
    return random.Random(seed).choices(POOL, [2, 2, 3, 1, 2], k=n)


def vote_is_right(answers):
    return majority_vote(answers) in ("1,000", "1000")


@pytest.mark.parametrize(
    "answers, vote",
    [
        ([], None),
        ([None, None], None),
        ([None, "3", None], "3"),
        (["4", "3", "3"], "3"),
        (["4", "3", "3", "4"], "4"),
        (["1,000", "2", "1000", "2", "1000"], "1,000"),
    ],
)
def test_votes_of_equivalents_count_together_and_the_first_wins_ties(answers, vote):
    assert majority_vote(answers) == vote
    if answers:
        assert maj_at_k(answers, vote or "3", len(answers)) == (vote is not None)


@pytest.mark.parametrize("seed", range(6))
def test_maj_at_k_is_the_mean_over_subsets(seed):
    answers = draws(9, seed)
    for k in range(1, 10):
        exact = np.mean([vote_is_right(s) for s in itertools.combinations(answers, k)])
        tolerance = 1e-12 if k in (1, 9) else 4 * np.sqrt(exact * (1 - exact) / 1000) + 1e-12
        assert abs(maj_at_k(answers, "1000", k) - exact) <= tolerance
    assert maj_at_k(["7"] * 8 + ["8"] * 8, "7", 2) > 0.7  # of a pair 7, 8 the 7 was first


@pytest.mark.parametrize("n, c", [(1, 0), (1, 1), (6, 0), (6, 2), (6, 6)])
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n, c):
    for k in range(1, n + 1):
        exact = np.mean([min(s) < c for s in itertools.combinations(range(n), k)])
        assert pass_at_k(n, c, k) == pytest.approx(exact, abs=1e-15)
    assert pass_at_k(n, c, 1) == c / n and 0 < pass_at_k(100_000, 1, 3) < 3.1e-5


@pytest.mark.parametrize("seed", range(3))
def test_maj_at_k_votes_like_majority_vote_in_every_subset(seed):
    answers = draws(9, seed)
    for k in range(1, 10):
        subsets = evaluation.subsets(9, k)
        assert all(subset == sorted(set(subset)) and len(subset) == k for subset in subsets)
        hits = [vote_is_right([answers[i] for i in subset]) for subset in subsets]
        assert maj_at_k(answers, "1000", k) == np.mean(hits)


def test_the_examples_of_eval_run():
    failed, attempted = doctest.testmod(evaluation)
    assert failed == 0 and attempted >= 3


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def sample_rows(last=None):
    say = {None: "no idea", **{a: f"so \\boxed{{{a}}}" for a in POOL if a}}
    return [
        {
            "question" if i % 2 else "problem": f"q{i}",
            "answer": "1000" if i % 3 else 1000,
            "completions": [say[a] for a in [*draws(8, i)[:-1], last or draws(8, i)[-1]]],
        }
        for i in range(12)
    ]


def result_of(*argv, out):
    assert evaluation.main([*argv, "--out", str(out)]) == 0
    return json.loads((out / "result.json").read_text())


def test_samples_are_scored_as_by_brute_force(tmp_path, capsys):
    path = write_lines(tmp_path / "s.jsonl", sample_rows())
    result = result_of("--samples", path, "--k", "3", out=tmp_path / "o")
    out, answers = capsys.readouterr().out, [draws(8, i) for i in range(12)]
    right = [[a in ("1000", "1,000") for a in group] for group in answers]
    assert result["accuracy"] == result["maj"]["1"] == pytest.approx(np.mean(right))
    half = 1.96 * np.std(np.mean(right, axis=1)) / 12**0.5
    interval = [np.mean(right) - half, np.mean(right) + half]
    assert result["intervals"]["accuracy"] == pytest.approx(interval, abs=0.02)
    assert result["figures"]["answered"] == np.mean([a is not None for g in answers for a in g])
    assert list(result["maj"]) == list(result["pass"]) == ["1", "2", "3", "4", "8"]
    assert result["maj"]["8"] == np.mean([vote_is_right(group) for group in answers])
    for k in (2, 3, 4):
        maj = np.mean([[vote_is_right(s) for s in itertools.combinations(g, k)] for g in answers])
        passed = np.mean([[any(s) for s in itertools.combinations(g, k)] for g in right])
        assert result["maj"][str(k)] == pytest.approx(maj, abs=0.02)
        assert result["pass"][str(k)] == pytest.approx(passed)
    assert f"{result['accuracy']:.3f} [" in out and "first seen" in out
    loose = result_of("--samples", path, "--fallback", "--k", "3", out=tmp_path / "f")
    assert loose["figures"] == result["figures"]  # "no idea" holds no number either
    path = write_lines(tmp_path / "s.jsonl", sample_rows("1000"))
    result_of("--samples", path, out=tmp_path / "b")
    a, b = (str(tmp_path / name / "result.json") for name in "ob")  # b is nowhere worse than a
    assert evaluation.main(["--compare", a, a]) == evaluation.main(["--compare", a, b]) == 0
    lines = [s for s in capsys.readouterr().out.splitlines() if s.startswith("accuracy   ")]
    assert "+0.000 [+0.000, +0.000]   p = 1.0000" in lines[-2] and "[+0.0" in lines[-1]


@pytest.mark.parametrize(
    "splits, split, want",
    [
        ("train test", "", "test"),
        ("train", "", "train"),
        ("train test", "train", "train"),
        ("train dev", "", None),
        ("test", "dev", None),
    ],
)
def test_the_test_split_or_the_only_one_is_taken(splits, split, want, monkeypatch, tmp_path):
    sets = {name: [{"question": name, "answer": "1"}] for name in splits.split()}
    monkeypatch.setattr("datasets.load_dataset", lambda *_: sets)
    monkeypatch.setattr(rltr, "use_cache_if_offline", lambda: None)
    monkeypatch.setattr(rltr, "load_lm", lambda *_: rltr.LM(None, None, (), 9, context=9))
    monkeypatch.setattr(rltr, "encode_prompt", lambda *_: [1])

    def no_answers(lm, receiver, tasks, first, settings):
        return [{"problem": p.question, "answer": p.answer, "completions": [""]} for p, _ in tasks]

    monkeypatch.setattr(evaluation, "sample_chunk", no_answers)
    argv = ["--model", "m", "--data", "some/set", "--split", split, "--k", "1"]
    if want:
        assert result_of(*argv, out=tmp_path)["per_problem"][0]["problem"] == want
    else:
        assert evaluation.main(argv) == 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, tokenizer = tmp_path_factory.mktemp("model"), rltr.tiny_tokenizer()
    torch.manual_seed(0)
    transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=len(tokenizer),
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=64,
            eos_token_id=1,
            pad_token_id=0,
            bos_token_id=None,
        )
    ).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def command(model, tmp_path):
    """An evaluation of five problems, two at a time, with transfer."""
    data = [{"question": f"Q{i}?", "answer": "1"} for i in range(5)]
    path = write_lines(tmp_path / "d.jsonl", data)
    flags = "--k 256 --prompt {question} --max-new-tokens 6 --receiver self --transfer-samples 2"
    return ["--model", model, "--data", path, *flags.split(), "--device", "cpu"]


def stop_at(call, error, monkeypatch):
    """The evaluation fails in this call of sample_chunk. Returns the list of the chunks so far."""
    calls, sample_chunk = [], evaluation.sample_chunk

    def failing(lm, receiver, tasks, first, settings):
        calls.append(first)
        if len(calls) == call:
            raise error
        return sample_chunk(lm, receiver, tasks, first, settings)

    monkeypatch.setattr(evaluation, "CHUNK_ROWS", 512)
    monkeypatch.setattr(evaluation, "sample_chunk", failing)
    return calls


def test_interrupted_evaluation_goes_on(command, tmp_path, monkeypatch, capsys):
    whole, halves = tmp_path / "w", tmp_path / "h"
    calls = stop_at(6, UserError("power cut"), monkeypatch)
    want = result_of(*command, out=whole)
    assert evaluation.main([*command, "--out", str(halves)]) == 2  # 2 chunks of 3 are done
    log = halves / "completions.jsonl"
    log.write_bytes(log.read_bytes()[:-100])  # a torn last line
    got = result_of(*command, "--max-rows", "50", out=halves)
    assert calls == [0, 2, 4] + [0, 2, 4] + [2, 4]  # the first was reused
    assert log.read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert {**got, "settings": 0} == {**want, "settings": 0}
    assert list(got["transfer"]) == [f"0.{i}" for i in range(1, 10)] and got["cut"] == 2
    assert result_of("--samples", str(log), out=tmp_path / "again")["figures"] == got["figures"]
    assert result_of(*command, out=halves)["figures"] == got["figures"] and len(calls) == 8
    capsys.readouterr()
    assert evaluation.main([*command, "--seed", "1", "--out", str(halves)]) == 2
    assert "another seed" in capsys.readouterr().err


def test_ctrl_c_is_one_line_and_the_evaluation_goes_on(command, tmp_path, monkeypatch, capsys):
    calls = stop_at(2, KeyboardInterrupt(), monkeypatch)
    assert evaluation.main([*command, "--out", str(tmp_path / "o")]) == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("eval: interrupted")
    result_of(*command, out=tmp_path / "o")
    assert calls == [0, 2, 2, 4]


def test_completions_of_other_problems_and_a_folder_in_use_are_refused(command, tmp_path, capsys):
    out = tmp_path / "o"
    result_of(*command, out=out)
    before = (out / "completions.jsonl").read_bytes()

    def refused():
        capsys.readouterr()
        assert evaluation.main([*command, "--out", str(out)]) == 2
        assert (out / "completions.jsonl").read_bytes() == before
        return capsys.readouterr().err.splitlines()[-1]

    lock = rltr.filelock.FileLock(out / ".lock")
    with lock:
        assert "another process is writing there" in refused()
    data = rltr.Path(command[command.index("--data") + 1])
    rows = data.read_text()
    for changed in (rows.replace("Q3", "Q9"), rows.replace('"1"', '"2"'), rows[: rows.index("\n")]):
        data.write_text(changed)
        assert "other problems" in refused()
    data.write_text(rows)
    result_of(*command, out=out)


def test_random_numbers_are_new_in_every_chunk_and_do_not_depend_on_the_receiver(
    command, tmp_path, monkeypatch
):
    same = [{"question": "Q1?", "answer": "1"}] * 3
    command[command.index("--data") + 1] = write_lines(tmp_path / "same.jsonl", same)
    seeds = []

    def noting(model, prompts, **settings):
        if isinstance(settings["seed"], tuple):  # not that of check_model
            seeds.append(settings["seed"])
        return generate(model, prompts, **settings)

    def texts(name, *flags):
        result_of(*command, *flags, out=tmp_path / name)
        lines = (tmp_path / name / "completions.jsonl").read_text().splitlines()
        return [json.loads(line)["completions"] for line in lines]

    monkeypatch.setattr(rltr, "generate", noting)
    monkeypatch.setattr(evaluation, "CHUNK_ROWS", 512)
    first, second, third = texts("a")
    assert first != second and second != third and first != third
    assert len(seeds) == len(set(seeds)) == 4  # two chunks, each the generator's and the receiver's
    assert texts("b", "--receiver", "") == [first, second, third]
    assert texts("c", "--seed", "1")[0] != first


# -- the closing table of a run


@pytest.fixture
def finished_run(task, tmp_path):
    """Makes a run by hand: the generator has become as good as the receiver."""

    def make(name="run", **settings):
        folder = tmp_path / name
        rltr.shutil.copytree(task / "receiver", folder / "final")
        names = {"model": str(task / "generator"), "receiver": str(task / "receiver")}
        data = {"eval_data": str(task / "train.jsonl"), "eval_k": 8, "prompt": "{question}"}
        lengths = {"max_new_tokens": 28, "receiver_margin": 3, "seed": 4, "device": "cpu"}
        config = Config(**(names | data | lengths | settings), out=str(folder))
        (folder / "config.json").write_text(json.dumps(vars(config)))
        return folder

    return make


def table_of(folder, *flags):
    assert evaluation.main(["--run", str(folder), *flags]) == 0
    return json.loads((folder / "evaluation.json").read_text())


def names_in(printed):
    return [line.split()[0] for line in printed.splitlines()[1:]]


SHOWN = ["accuracy", "Maj@8", *(f"transfer@0.{i}" for i in (1, 3, 5, 7, 9))]


@pytest.mark.parametrize("transfer_weight", [1.0, 0.0])
def test_the_table_of_a_run_compares_its_model_before_and_after(
    finished_run, task, tmp_path, capsys, transfer_weight
):
    folder = finished_run(transfer_weight=transfer_weight, limit=3, split="train")
    table = table_of(folder)
    printed = capsys.readouterr().out
    assert printed.startswith("before -> after, 9 problems") and names_in(printed) == SHOWN
    # The same numbers as by hand. The prompt is that of the run, without a flag for final/.
    flags = f"--data {task}/train.jsonl --k 8 --max-new-tokens 28 --seed 4 --device cpu"
    flags += f" --receiver {task}/receiver --receiver-margin 3"
    after = result_of("--model", str(folder / "final"), *flags.split(), out=tmp_path / "after")
    flags += " --prompt {question}"
    before = result_of("--model", f"{task}/generator", *flags.split(), out=tmp_path / "before")
    assert table == {"before": before["figures"], "after": after["figures"]}
    assert table["before"]["tokens"] != table["after"]["tokens"]


def test_a_run_without_transfer_needs_no_receiver_for_its_table(finished_run, capsys):
    nobody = {"receiver": "nobody/nothing"}
    table = table_of(finished_run(transfer_weight=0.0, **nobody))
    shown = capsys.readouterr()
    assert names_in(shown.out) == ["accuracy", "Maj@8"] and "transfer@0.5" not in table["after"]
    [line] = [line for line in shown.err.splitlines() if line.startswith("eval: ")]
    assert "without transfer" in line and "nobody/nothing" in line
    # Where it was trained with, or where it was asked for, it must be there.
    for number, (weight, flags) in enumerate([(1.0, []), (0.0, ["--receiver", "no/body"])]):
        folder = finished_run(str(number), transfer_weight=weight, **nobody)
        assert evaluation.main(["--run", str(folder), *flags]) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("eval: model no")


def test_the_receiver_self_of_a_run_is_its_generator_at_the_start(finished_run, task):
    by_name = table_of(finished_run("a", receiver=str(task / "generator")))
    assert table_of(finished_run("b", receiver="self")) == by_name
    assert table_of(finished_run("c"), "--receiver", "self") == by_name


def test_flags_replace_settings_of_the_run_and_its_table_goes_on(
    finished_run, task, tmp_path, monkeypatch, capsys
):
    folder = finished_run(eval_data="")
    flags = ["--data", f"{task}/train.jsonl", "--limit", "5", "--k", "4"]
    flags += ["--receiver", "", "--out", str(tmp_path / "o")]
    calls = stop_at(2, UserError("power cut"), monkeypatch)
    assert evaluation.main(["--run", str(folder), *flags]) == 2
    table = table_of(folder, *flags)
    assert calls == [0, 0, 0]  # before, after: stopped, after
    assert "5 problems" in capsys.readouterr().out and "transfer@0.5" not in table["before"]
    assert "Maj@4" in table["before"] and "Maj@8" not in table["before"]


def test_what_is_no_finished_run_is_refused_in_one_line(finished_run, tmp_path, capsys):
    good = finished_run("good")
    unfinished = finished_run("unfinished")
    rltr.shutil.rmtree(unfinished / "final")
    damaged = {"torn": '{"model": "a', "list": "[]", "other": '{"vocab_size": 9}'}
    damaged |= {"kinds": '{"prompt": 5}', "deep": "[" * 9999, "seed": '{"seed": -1}'}
    for name, text in damaged.items():
        (finished_run(name) / "config.json").write_text(text)
    cases = {
        str(tmp_path / "nowhere"): "no run",
        str(unfinished): "no final/",
        str(finished_run("without", eval_data="")): "--eval-data",
        str(finished_run("data", eval_data="gone.jsonl")): "gone.jsonl",
        str(finished_run("start", model="no/model")): "no/model",
        **{str(tmp_path / name): "" for name in damaged},
    }
    for folder, message in cases.items():
        assert evaluation.main(["--run", folder]) == 2, folder
        err = capsys.readouterr().err
        assert err.startswith("eval: ") and err.count("\n") == 1 and message in err, err
    for flags in (["--model", "m"], ["--k", "0"], ["--device", "abacus"], ["--lr", "1"]):
        assert evaluation.main(["--run", str(good), *flags]) == 2


def test_bad_input_is_one_line(model, tmp_path, capsys):
    good, run = write_lines(tmp_path / "good.jsonl", sample_rows()), ["--model", model]
    line, bad = '{"problem": "q", "answer": "1", "completions": %s}\n', []
    drawn = '{"problem": "q", "answer": "1", "completions": ["a"], "drawn": %s}\n'
    for i, text in enumerate(
        [
            "",
            line % '["a"]' + '{"prob',
            line % '"abc"',
            line % "[]",
            "[1]",
            line % "[1]",
            "[" * 9999,
            "\0\x1b[31m\n",
            '{"answer": "1"}',
            '{"problem": "q", "answer": NaN, "completions": ["a"]}',
            '{"problem": "q", "answer": " ", "completions": ["a"]}',
            '{"problem": "q", "answer": true, "completions": ["a"]}',
            drawn % '{"tokens": [NaN]}',
            *(drawn % text for text in ("[]", "5", '{"tokens": []}', '{"finished": ["x"]}')),
            *(drawn % f'{{"cuts": {cuts}}}' for cuts in ("5", "[5]", '[{"tau": []}]', '{"a": 1}')),
        ]
    ):
        bad.append(str(tmp_path / f"{i}.jsonl"))
        (tmp_path / f"{i}.jsonl").write_text(text)
    pipe = str(tmp_path / "pipe")
    os.mkfifo(pipe)
    results = []
    for i, text in enumerate(
        [
            "{",
            "[]",
            '{"figures": {"a": 1}}',
            '{"per_problem": [{"problem": "q", "figures": {"a": 1}}]}',
            '{"figures": {"a": 1}, "per_problem": 5}',
            '{"figures": {"a": 1}, "per_problem": [5]}',
            '{"figures": {"a": 1}, "per_problem": [{"problem": "q", "figures": {"a": "x"}}]}',
            '{"figures": {"a": 1}, "per_problem": [{"problem": "q", "figures": {}}]}',
            '{"figures": {}, "per_problem": []}',
            '{"figures": ["a"], "per_problem": [{"problem": "q", "figures": {"a": 1}}]}',
            '{"figures": {"a": 1}, "per_problem": [{"problem": "q", "figures": {"a": NaN}}]}',
            '{"figures": {"a": 1}, "per_problem": [{"problem": "q", "figures": {"a": null}}]}',
        ]
    ):
        results.append(str(tmp_path / f"result{i}.json"))
        (tmp_path / f"result{i}.json").write_text(text)
    beside = []  # models with a config.json beside them that is not a run's
    for i, text in enumerate(['{"prompt": "', "[]", '{"prompt": 5}', '{"prompt": "none"}']):
        beside.append(str(tmp_path / f"run{i}" / "final"))
        (tmp_path / f"run{i}").mkdir()
        (tmp_path / f"run{i}" / "config.json").write_text(text)
    for argv in (
        [],
        ["--nonsense"],
        [*run, "--samples", good],
        ["--samples", "missing"],
        *(["--samples", good, "--k", k] for k in "90x"),
        *(["--samples", b] for b in bad),
        ["--samples", good, "--receiver", "self"],
        ["--samples", good, "--out", good],
        ["--samples", str(tmp_path)],
        ["--samples", pipe],
        ["--compare", pipe, pipe],
        ["--samples", "missing", "--out", str(tmp_path / "new/folder")],
        [*run, "--data", good, "--k", "0", "--out", str(tmp_path / "new/folder")],
        ["--compare", good, good],
        ["--compare", "no", good],
        *(["--compare", path, path] for path in results),
        *(["--model", path, "--data", good] for path in beside),
        [*run, "--data", good, "--device", "abacus"],
        *([*run, "--temperature", t] for t in ("-1", "nan", "hot")),
        [*run, "--k", "-1"],
        [*run, "--prompt", "none"],
        ["--model", "no/such\x1b[31mmodel", "--data", good],
        [*run, "--data", "missing.jsonl"],
        [*run, "--data", bad[0]],
    ):
        assert evaluation.main(argv) == 2, argv
        err = capsys.readouterr().err
        assert err.startswith("eval: ") and err.count("\n") == 1 and "\x1b" not in err, argv
        assert not (tmp_path / "new").exists()
