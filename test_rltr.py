"""Tests of rltr.py and eval.py: tiny random models against numeric oracles. No network, no GPU.

A test called test_mistake_... is named after something that other code bases got wrong."""

import contextlib
import doctest
import importlib.util
import itertools
import json
import multiprocessing
import os
import random
import re
import resource
import shlex
import signal
import subprocess
import sys
import warnings
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
from eval import maj_at_k, majority_vote, pass_at_k
from rltr import (
    CHECKS,
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

torch.set_num_threads(1)  # matrices this small are faster on one
V = 97  # vocabulary of the random models

# ------------------------------------------------------------------------ models, tokenizers, rows


def tiny(kind="qwen2", **changes):
    """A random model with large weights, so that its logits are far from equal."""
    torch.manual_seed(0)
    sizes = dict(
        vocab_size=V,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
        initializer_range=0.3,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
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
    source, rows = random.Random(1), []
    prompts = random_prompts(*[3 + 5 * (i // group) % 11 for i in range(0, len(rewards), group)])
    advantages = rltr.group_advantages(torch.tensor(rewards).view(-1, group)).flatten().tolist()
    for i, (reward, advantage) in enumerate(zip(rewards, advantages)):
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
    datasets, path = pytest.importorskip("datasets"), tmp_path / f"data.{kind}"
    if kind == "json":
        path.write_text(json.dumps(ROWS, indent=1))
    else:
        table = datasets.Dataset.from_list(ROWS)
        {"jsonl": table.to_json, "csv": table.to_csv, "parquet": table.to_parquet}[kind](str(path))
    first, second = rltr.load_problems(str(path))
    assert first == Problem('1 + 1,\n"quoted"?', "\\frac{4}{2}")  # the last box, whole
    assert second.question == "é?" and second.answer.replace(",", "") == "1000"
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
    assert all(sorted(e) == list(range(10)) for e in epochs) and len(set(map(tuple, epochs))) == 4
    assert flat != sum((rltr.draw_problems(list(range(10)), 4, 4, s) for s in range(10)), [])
    assert sorted(rltr.draw_problems([1, 2], 5, 0, 0)) in ([1, 1, 1, 2, 2], [1, 1, 2, 2, 2])


# ----------------------------------------------------------------------------- prompts, stop tokens


@pytest.mark.parametrize("written, added, count", [(0, 0, 0), (0, 1, 1), (1, 0, 1), (1, 1, 1)])
def test_bos_once_or_never_whoever_writes_it_and_no_thinking(written, added, count):
    template = "<s>" * written + CHATML + "{% if enable_thinking is false %}<no think>{% endif %}"
    tokenizer = byte_tokenizer(template, add_bos=bool(added))
    assert tokenizer.decode(lm_of(None, tokenizer).encode_prompt("2 + 2?")) == "<s>" * count + (
        "<|im_start|>user\n2 + 2?\nPlease reason step by step, and put your final answer within "
        "\\boxed{}.<|im_end|>\n<|im_start|>assistant\n<no think>"
    )


def test_stop_tokens_come_from_tokenizer_generation_config_and_chat_template():
    tokenizer, model = byte_tokenizer(), tiny()  # as in Qwen2.5 base: <|im_end|> is not eos
    for configured, more in ((None, ()), (5, (5,)), ([5, 6], (5, 6))):
        model.generation_config.eos_token_id = configured
        assert rltr.find_stop_ids(model, tokenizer) == (*more, 256, 258)


def test_mistake_without_a_chat_template_the_model_never_stops():
    tokenizer = byte_tokenizer(None)  # a plain prompt, and still a stop token
    prompt = lm_of(None, tokenizer).encode_prompt("x {y}", "Do {question}!")
    assert tokenizer.decode(prompt) == "Question: Do x {y}!\nAnswer:"
    assert rltr.find_stop_ids(tiny(), tokenizer) == (256,)


def test_decode_drops_control_tokens_and_an_incomplete_last_character():
    tokenizer = byte_tokenizer()
    ids = byte_ids(tokenizer, "a  ,é")
    assert rltr.decode(tokenizer, [257, *ids, 256]) == "a  ,é"
    assert rltr.decode(tokenizer, ids[:-1]) == "a  ,"


# --------------------------------------------------------------------------------------- generation

GEMMA = dict(head_dim=16, sliding_window=8, query_pre_attn_scalar=16)
KINDS = {
    "qwen2, MHA": ("qwen2", dict(num_key_value_heads=4)),
    "qwen2, tied, sliding": (
        "qwen2",
        dict(
            tie_word_embeddings=True, use_sliding_window=True, sliding_window=8, max_window_layers=1
        ),
    ),
    "qwen3": ("qwen3", dict(head_dim=16)),
    "llama": ("llama", {}),
    "olmo2": ("olmo2", {}),
    "mistral, sliding": ("mistral", dict(sliding_window=8)),
    "gemma3": ("gemma3_text", GEMMA),
    "gemma2": ("gemma2", dict(GEMMA, attn_implementation="eager")),  # others may drop soft caps
    "phi3": ("phi3", {}),
    "gpt2": ("gpt2", {}),
    "granite": ("granite", dict(logits_scaling=4.0)),
    "cohere": ("cohere", dict(logit_scale=0.25)),
}
DEVICES = [
    "cpu",
    pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")),
]


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", KINDS)
def test_greedy_is_that_of_transformers_and_logprobs_are_those_of_a_full_forward(name, device):
    model, expected = tiny(KINDS[name][0], **KINDS[name][1]).to(device), []
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
ON_CUDA = """
import types
import rltr, test_rltr
model = test_rltr.tiny("gemma2", hidden_size=36, num_attention_heads=6, head_dim=20,
                       sliding_window=7, attn_logit_softcapping=2.0)
def texts(temperature):
    return rltr.generate(model, test_rltr.random_prompts(37, 3), samples=4, max_new_tokens=5,
                         seed=0, max_rows=5, stop_ids=range(1, 20), temperature=temperature)
drawn = texts(1.0)
rltr.capture = lambda step, pool: types.SimpleNamespace(replay=step, pool=object)
greedy, rltr.triton = texts(0), None
for fused, plain in ((drawn, texts(1.0)), (greedy, texts(0))):
    assert [c.tokens for c in fused] == [c.tokens for c in plain]
    assert all(abs(a - b) < 1e-4 for c, d in zip(fused, plain)
               for a, b in zip(c.logprobs, d.logprobs))
"""


def test_the_sampler_of_cuda_gives_the_same_with_its_kernel_and_its_graphs():
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-c", ON_CUDA],
        cwd=os.path.dirname(__file__) or ".",
        env=os.environ | {"TRITON_INTERPRET": "1"},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0 and "no CUDA graph" in done.stderr, done.stderr


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


def test_a_loaded_model_keeps_its_soft_capped_attention_where_transformers_would_drop_it(tmp_path):
    exact, tokenizer = tiny("gemma2", vocab_size=260, **KINDS["gemma2"][1]), byte_tokenizer()
    rltr.save_lm(lm_of(exact, tokenizer), tmp_path)
    lm, [prompt] = rltr.load_lm(str(tmp_path)), random_prompts(30)
    [c] = generate(lm.model, [prompt], max_new_tokens=9, seed=0)
    row = Rollout(None, prompt, c.tokens, c.logprobs, False, "")
    trained = Completion(c.tokens, rltr.completion_logprobs(lm, [row])[0].tolist(), False)
    assert all(logprobs_are_right(exact, prompt, x, 260) for x in (c, trained))


def test_longrope_is_refused_or_served_up_to_the_length_where_all_positions_would_change(tmp_path):
    rope = dict(
        rope_type="longrope",
        rope_theta=1e4,
        original_max_position_embeddings=32,
        short_factor=[1.0] * 4,
        long_factor=[2.0, 3.0, 4.0, 5.0],
    )  # as in Phi-3 128k
    model = tiny("phi3", vocab_size=260, rope_parameters=rope, original_max_position_embeddings=32)
    rltr.save_lm(lm_of(model, byte_tokenizer()), tmp_path)
    with contextlib.suppress(UserError):
        assert rltr.load_lm(str(tmp_path)).context == 32


@pytest.mark.parametrize("name", ["llama", "gpt2", "mistral, sliding"])
def test_mistake_a_short_row_beside_a_long_one_gets_wrong_positions_or_sees_padding(name):
    lm, prompts = lm_of(tiny(KINDS[name][0], **KINDS[name][1])), random_prompts(2, 40, 9)
    together = generate(lm.model, prompts, max_new_tokens=12, seed=1)
    rows = [Rollout(None, p, c.tokens, c.logprobs, False, "") for p, c in zip(prompts, together)]
    trained = rltr.completion_logprobs(lm, rows)[0].view(3, 12).tolist()
    for i, (prompt, c) in enumerate(zip(prompts, together)):
        alone = generate(lm.model, [prompt], max_new_tokens=12, seed=1, first_row=i)[0]
        assert c.tokens == alone.tokens and logprobs_are_right(lm.model, prompt, c)
        assert logprobs_are_right(lm.model, prompt, Completion(c.tokens, trained[i], False))


def test_sampling_follows_the_softmax():
    model, [prompt], n, k = tiny(initializer_range=0.15), random_prompts(5), 4000, 30
    seen, expected = np.zeros((k, k)), np.zeros((k, k))
    for c in generate(
        model, [prompt], samples=n, max_new_tokens=2, temperature=0.8, vocab_size=k, seed=1
    ):
        seen[tuple(c.tokens)] += 1
    for t in range(k):
        first, second = full_logprobs(model, prompt, [t, 0], k, 0.8)
        expected[t] = n * (first[t] + second).exp().numpy()
    often = expected >= 5  # the other pairs make one cell
    cells = [*zip(seen[often], expected[often]), (seen[~often].sum(), expected[~often].sum())]
    chi2 = sum((o - e) ** 2 / e for o, e in cells)
    assert len(cells) > 100 and abs(chi2 - len(cells)) < 4 * (2 * len(cells)) ** 0.5


def lowest_random_numbers(monkeypatch):
    """From now on the generators' random() gives the lowest number of [0, 1)."""
    lowest = type("Lowest", (), {"random": lambda self, shape=(): np.zeros(shape)})
    monkeypatch.setattr(np.random, "default_rng", lambda *a: lowest())


def test_sampling_never_takes_a_token_of_probability_zero(monkeypatch):
    logits = torch.tensor([[-torch.inf, 0.0, -torch.inf, 0.0, -torch.inf]]).repeat(4, 1)
    tokens, logprobs = rltr.sample_tokens(logits, 1.0, torch.tensor([1e-45, 0.4999, 0.5001, 1.0]))
    assert tokens.tolist() == [1, 1, 3, 3] and torch.allclose(logprobs, torch.tensor(0.5).log())
    lowest_random_numbers(monkeypatch)  # so u, which is never 0, is 1
    assert min(generate(tiny(), [[5]], max_new_tokens=9)[0].tokens) > 0


def test_texts_do_not_depend_on_max_rows_and_first_row_shifts_the_random_numbers():
    model, prompts = tiny(), random_prompts(4, 11, 3, 7)

    def texts(prompts, **settings):
        done = generate(
            model, prompts, samples=3, max_new_tokens=15, stop_ids=range(3, 9), **settings
        )
        assert all(logprobs_are_right(model, prompts[i // 3], c) for i, c in enumerate(done))
        return [c.tokens for c in done]

    whole = texts(prompts, seed=5)
    assert len(set(map(tuple, whole))) == 12  # the samples of a prompt differ
    assert len(set(map(len, whole))) > 4  # ragged: rows leave, others take their place
    assert all(texts(prompts, seed=5, max_rows=rows) == whole for rows in (1, 2, 5, 7))
    assert texts(prompts[2:], seed=5, first_row=6) == whole[6:] and texts(prompts, seed=6) != whole


def test_stop_tokens_end_a_row_and_belong_to_it():
    stops, model, limits = (3, 4, 5, 6, 7, 8, 9), tiny(), [6, 12]  # each prompt has its own limit
    done = generate(
        model, random_prompts(4, 9), samples=20, max_new_tokens=limits, stop_ids=stops, seed=0
    )
    assert 5 < sum(c.finished for c in done) < 40
    for i, c in enumerate(done):
        assert len(c.tokens) == len(c.logprobs) <= limits[i // 20]
        assert not set(c.tokens[:-1]) & set(stops) and c.finished == (c.tokens[-1] in stops)
        assert c.finished or len(c.tokens) == limits[i // 20]
    assert generate(model, [], max_new_tokens=3) == []
    for prompts, limit in (([[]], 3), ([[1]], 0)):
        with pytest.raises(UserError):
            generate(model, prompts, max_new_tokens=limit)


class KeepGradient:
    """In the optimizer's place: keeps the gradient instead of making a step."""

    def __init__(self, model):
        self.model = model

    def step(self, max_norm):
        self.gradient = torch.cat([p.grad.flatten() for p in self.model.parameters()])
        self.model.zero_grad()
        return 0.0


@pytest.mark.filterwarnings("ignore:.*gradient_checkpointing_enable")
@pytest.mark.parametrize("checkpointing", [False, True])
def test_mistake_the_loss_uses_another_distribution_than_the_sampler(checkpointing):
    model, prompts = tiny("gpt2", resid_pdrop=0.3, attn_pdrop=0.3), random_prompts(3, 8, high=60)
    if checkpointing:
        model.gradient_checkpointing_enable()
    model.lm_head.weight.data[60:] *= 5  # rows that the tokenizer does not know
    assert max(generate(model, prompts, max_new_tokens=9, temperature=0)[0].tokens) >= 60
    lm, tasks = lm_of(model, byte_tokenizer(), (0,), 60), [(Problem("", ""), p) for p in prompts]
    config = Config(
        group=4, temperature=0.7, max_new_tokens=9, gradient_checkpointing=checkpointing
    )
    rollouts = rltr.sample_rollouts(lm, tasks, config, step=0)
    for i, r in enumerate(rollouts):
        assert max(r.tokens) < 60 and logprobs_are_right(model, r.prompt, r, 60, 0.7)
        r.reward, r.advantage = float(i % 2), 2.0 * (i % 2) - 1
    greedy = generate(model, prompts, max_new_tokens=9, temperature=0, vocab_size=60)
    assert all(logprobs_are_right(model, p, c, 60) for p, c in zip(prompts, greedy))
    assert rltr.update(lm, KeepGradient(model), rollouts, config)["logprob_gap_max"] < 1e-4
    same = [
        [r.tokens for r in rollouts]
        == [r.tokens for r in rltr.sample_rollouts(lm, tasks, config, step)]
        for step in (0, 1)
    ]
    assert same == [True, False]  # a function of the step


def embedded(model):
    """Watches a model: (rows, tokens) of whatever goes through it."""
    shapes = []
    model.get_input_embeddings().register_forward_hook(lambda m, i, o: shapes.append(i[0].shape))
    return shapes


@pytest.mark.parametrize("max_rows", [None, 2, 3, 7])
def test_a_prompt_is_prefilled_once_and_finished_rows_cost_nothing(max_rows):
    model, prompts = tiny(), random_prompts(9, 6, 4)
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
    assert all(m.training for m in model.modules()) and torch.is_grad_enabled()
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
            self.prompts, self.settings = prompts, settings
            return [Completion(list(self.tokens), [0.0] * len(self.tokens), True) for _ in prompts]

    def say(tokens):
        Script.tokens = tokens
        monkeypatch.setattr(rltr, "generate", Script())
        return rltr.generate

    return say


def rollout(tokenizer, text, end=()):
    return Rollout(Problem("1+6?", "7"), [1], [*byte_ids(tokenizer, text), *end], [], True, text)


def test_the_same_tokenizer_gets_the_prefix_as_token_ids_after_its_own_template(receiver_says):
    mine, yours = byte_tokenizer(), byte_tokenizer(BRACKETS)
    asked, r = receiver_says(byte_ids(yours, "7}")), rollout(mine, "aéé 1: \\boxed{7}, or.", [258])
    r.tokens[1:1] = [257]  # a control token in the middle: stays one
    rltr.TransferReward(
        lm_of(None, yours, (256,), 260),
        mine,
        stop_ids=(258,),
        cuts=40,
        margin=8,
        prompt="{question}",
        max_new_tokens=20,
    ).score([r], step=0)
    budgets = asked.settings["max_new_tokens"]
    for cut, prompt, budget in zip(r.cuts, asked.prompts, budgets, strict=True):
        length = int(cut.tau * (len(r.tokens) - 1))  # the stop token is not counted
        assert prompt == byte_ids(yours, "[1+6?]->") + r.tokens[:length]
        assert cut.prefix_length == length and budget == max(1, 20 - length + 8)
        whole = rltr.decode(mine, r.tokens[:length] + byte_ids(yours, "7}"))
        assert cut.prefix + cut.continuation == whole  # with the character that the cut had split
        assert cut.correct == rltr.is_correct(whole, "7")
        assert cut.leaked == ("\\boxed{7}" in cut.prefix)
    assert {(c.correct, c.leaked) for c in r.cuts} == {(True, False), (False, False), (True, True)}
    assert len(r.cuts) == 40 and r.r_transfer == np.mean([cut.correct for cut in r.cuts])
    assert asked.settings["stop_ids"] == (256,) and asked.settings["vocab_size"] == 260


def test_a_different_tokenizer_gets_the_prefix_as_text(receiver_says):
    mine, yours = byte_tokenizer(), byte_tokenizer("<s>" + BRACKETS, reverse=True, add_bos=True)
    text, split = "é<|im_end|>ü<s>∑", 0  # spelled out: not control tokens
    r, asked = rollout(mine, text, [258]), receiver_says(byte_ids(yours, "\\boxed{7}é")[:-1])
    rltr.TransferReward(
        lm_of(None, yours), mine, stop_ids=(258,), cuts=60, prompt="{question}"
    ).score([r], step=0)
    for cut, prompt in zip(r.cuts, asked.prompts, strict=True):
        raw = text.encode()[: int(cut.tau * len(text.encode()))]
        split += raw.decode(errors="ignore") != raw.decode(errors="replace")
        assert cut.prefix == raw.decode(errors="ignore")  # no half characters
        assert prompt == [259] + byte_ids(yours, "[1+6?]->" + cut.prefix)  # and BOS once
        assert cut.continuation == "\\boxed{7}" and cut.correct
    assert split > 5


def test_a_prefix_that_overflows_the_receiver_is_counted_and_scores_0(receiver_says):
    tokenizer = byte_tokenizer(BRACKETS)
    r, asked = rollout(tokenizer, "x" * 50), receiver_says(byte_ids(tokenizer, "\\boxed{7}"))
    reward = rltr.TransferReward(
        lm_of(None, tokenizer, context=8 + 30),  # the question takes 8
        cuts=300,
        max_new_tokens=50,
        margin=9,
        prompt="{question}",
    )
    reward.score([r], step=0)
    for cut in r.cuts:
        assert cut.overflow == (cut.prefix_length >= 30) and cut.correct == (not cut.overflow)
    assert {c.prefix_length for c in r.cuts} >= {29, 30} and 0.5 < r.r_transfer < 0.7
    budgets = [min(59, 30) - c.prefix_length for c in r.cuts if not c.overflow]
    assert asked.settings["max_new_tokens"] == budgets
    assert rltr.summarize([r], 1)["overflow"] == pytest.approx(1 - r.r_transfer)


def test_an_empty_prefix_is_legal_and_the_receiver_solves_alone(receiver_says):
    tokenizer = byte_tokenizer(BRACKETS)
    asked = receiver_says(byte_ids(tokenizer, "\\boxed{7}"))
    rows = [rollout(tokenizer, "", end=[256]), rollout(tokenizer, "")]
    rltr.TransferReward(lm_of(None, tokenizer), prompt="{question}").score(rows, 0)
    assert asked.prompts == [byte_ids(tokenizer, "[1+6?]->")] * 2
    assert [(r.r_transfer, r.cuts[0].prefix_length) for r in rows] == [(1.0, 0)] * 2


def test_tau_is_uniform_from_0_excluded_to_1_included(receiver_says, monkeypatch):
    tokenizer = byte_tokenizer(BRACKETS)
    receiver_says([])
    rows = [rollout(tokenizer, "abc") for _ in range(400)]

    def taus(step):
        rltr.TransferReward(lm_of(None, tokenizer), cuts=5).score(rows, step)
        return [[cut.tau for cut in r.cuts] for r in rows]

    assert taus(3) == taus(3) != taus(4)  # a function of (seed, step)
    assert len({t for row in taus(3) for t in row}) == 2000  # each cut has its own
    assert np.allclose(np.histogram(taus(3), bins=8, range=(0, 1))[0], 250, atol=60)
    lowest_random_numbers(monkeypatch)
    assert {t for row in taus(3) for t in row} == {1.0} and rows[0].cuts[0].prefix == "abc"


@pytest.mark.parametrize("as_messages", [False, True])
@pytest.mark.parametrize("ids, tokenizer_given", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_trl_calls_the_transfer_reward(as_messages, ids, tokenizer_given, receiver_says):
    mine, yours = byte_tokenizer(), byte_tokenizer(BRACKETS, reverse=True)
    texts, asked = ["abcdef", "ghijkl \\boxed{7}"], receiver_says(byte_ids(yours, "\\boxed{7}"))
    reward = rltr.TransferReward(
        lm_of(None, yours), mine if tokenizer_given else None, cuts=2, prompt="{question}"
    )
    prompts, completions = ["1+6?", "3+4?"], texts
    if as_messages:
        prompts = [[{"role": "user", "content": p}] for p in prompts]
        completions = [[{"role": "assistant", "content": t}] for t in texts]
    more = {"completion_ids": [byte_ids(mine, t) + [256] for t in texts]} if ids else {}
    got = reward(prompts=prompts, completions=completions, answer=["7", "8"], state=None, **more)
    assert got == [1.0, 0.0] and all(type(x) is float for x in got) and reward.__name__
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
    rltr.score_answers(rows)
    for r, transfer in zip(rows, (0.25, 0.5, 1.0, 0.0)):
        r.r_transfer = transfer
    rltr.combine_rewards(rows, Config(answer_weight=2.0, transfer_weight=4.0, format_weight=8.0))
    assert [(r.reward, r.r_answer, r.r_format, r.r_transfer) for r in rows] == [
        (2 + 1 + 8, 1, 1, 0.25),
        (2 + 8, 0, 1, 0.5),
        (4, 0, 0, 1.0),
        (2, 1, 0, 0.0),
    ]


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


@pytest.mark.parametrize("chunk", [1, 7, None])
@pytest.mark.parametrize("name", ["qwen2, tied, sliding", "gemma2", "granite", "cohere"])
def test_mistake_logits_of_all_tokens_at_once_and_yet_the_chunks_are_exact(name, chunk):
    model = tiny(KINDS[name][0], **KINDS[name][1])
    rows, sizes = sampled(model, [0, 1, 0, 1], group=2, high=90), []
    logits = [
        model(input_ids=torch.tensor([r.prompt + r.tokens]), use_cache=False).logits[
            0, len(r.prompt) - 1 : -1, :90
        ]
        / 0.7
        for r in rows
    ]
    want = torch.cat([chosen(x.log_softmax(-1), r.tokens) for x, r in zip(logits, rows)])
    entropy = torch.cat([torch.distributions.Categorical(logits=x).entropy() for x in logits])
    weights, parameters = torch.arange(len(want)) % 5 - 2.0, list(model.parameters())
    expected = torch.autograd.grad((want * weights).sum(), parameters)
    model.get_output_embeddings().register_forward_hook(
        lambda m, inputs, out: sizes.append(out.numel() // V)
    )
    got, got_entropy = rltr.completion_logprobs(lm_of(model, vocab_size=90), rows, 0.7, chunk)
    assert sum(sizes) == len(want) and max(sizes) <= (chunk or len(want))  # no prompt
    for a, b in zip(torch.autograd.grad((got * weights).sum(), parameters), expected):
        assert torch.allclose(a, b, rtol=0, atol=1e-4 * b.abs().max().item())
    assert torch.allclose(got, want, atol=1e-5) and torch.allclose(got_entropy, entropy, atol=1e-5)


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
        logp, old = torch.tensor([-2.0 + np.log(rho)], requires_grad=True), torch.tensor([-2.0])
        value = rltr.policy_objective(logp, old, torch.tensor([advantage]), 0.2, 0.3)
        value.sum().backward()
        assert value.item() == pytest.approx(want) and logp.grad.item() == pytest.approx(slope)


def naive_update(model, rollouts, config, vocab_size):
    """Step 8 by its formula, a token at a time: objective, its gradient, entropies, gaps."""
    objective, entropies, gaps = 0.0, [], []
    for r in rollouts:
        i = rollouts.index(r) // config.group * config.group
        rewards = np.array([other.reward for other in rollouts[i : i + config.group]])
        if rewards.min() == rewards.max():
            continue  # a dead group
        a = (r.reward - rewards.mean()) / (rewards.std() + 1e-6)
        logits = model(input_ids=torch.tensor([r.prompt + r.tokens]), use_cache=False).logits[0]
        for t, token in enumerate(r.tokens):
            p = (logits[len(r.prompt) + t - 1, :vocab_size] / config.temperature).softmax(-1)
            rho = p[token] / np.exp(r.logprobs[t])
            rho = min(rho, 1 + config.clip_high) if a > 0 else max(rho, 1 - config.clip_low)
            objective = objective + rho * a
            entropies.append(-(p * p.log()).sum().item())
            gaps.append(abs(p[token].log().item() - r.logprobs[t]))
    gradient = torch.autograd.grad(-objective / len(gaps), list(model.parameters()))
    return objective.item() / len(gaps), torch.cat([g.flatten() for g in gradient]), entropies, gaps


@pytest.mark.parametrize("in_a_batch", [1, 2, 4, 99])
def test_mistake_divisor_or_metrics_are_those_of_one_micro_batch_or_of_dead_groups(in_a_batch):
    lm = lm_of(tiny(), vocab_size=90)
    rewards = [
        1,
        0,
        0,
        0.1,
        0.1,
        0.1,
        2.1,
        1.1,
        0.1,
        0,
        0,
        0,
        0,
        1,
        1,
    ]  # threes: two of five are dead
    rows, optimizer = sampled(lm.model, rewards, noise=0.6, high=90), KeepGradient(lm.model)
    longest = max(len(r.prompt) + len(r.tokens) for r in rows if r.advantage)
    config = Config(group=3, temperature=0.9, token_budget=in_a_batch * longest)
    objective, gradient, entropies, gaps = naive_update(lm.model, rows, config, 90)
    assert max(gaps) > 0.5  # so that both clips are at work
    metrics = rltr.update(lm, optimizer, rows, config)
    assert (optimizer.gradient - gradient).abs().max() < 1e-5 * gradient.abs().max()
    for key, want in (
        ("objective", objective),
        ("entropy", np.mean(entropies)),
        ("logprob_gap_mean", np.mean(gaps)),
        ("logprob_gap_max", max(gaps)),
    ):
        assert metrics[key] == pytest.approx(want, rel=1e-4), key


class KeepGradients(KeepGradient):
    def __init__(self, model):
        super().__init__(model)
        self.gradients, self.masters = [], list(model.parameters())
        self.adam = torch.optim.AdamW(self.masters)

    def step(self, max_norm):
        self.gradients.append(super().step(max_norm) or self.gradient)
        return 0.0


def test_minibatches_split_the_live_groups_and_epochs_repeat_them():
    lm, config = lm_of(tiny(), vocab_size=90), Config(group=3, epochs=2, minibatches=2)
    rows = sampled(lm.model, [1, 0, 0, 2, 2, 2, 2.1, 1.1, 0.1, 0, 1, 1], noise=0.6, high=90)
    optimizer = KeepGradients(lm.model)  # it makes no step: the policy stays the same
    metrics = rltr.update(lm, optimizer, rows, config)
    halves = [
        naive_update(lm.model, part, config, 90)[1] for part in (rows[:3] + rows[9:], rows[6:9])
    ]
    for got, want in zip(optimizer.gradients, halves + halves, strict=True):
        assert (got - want).abs().max() < 1e-5 * want.abs().max()
    assert metrics["entropy"] == pytest.approx(np.mean(naive_update(lm.model, rows, config, 90)[2]))


def test_out_of_memory_halves_the_token_budget_and_repeats_the_step(monkeypatch, capsys):
    lm, config = lm_of(tiny(), vocab_size=90), Config(group=3, token_budget=400)
    rows, seen = sampled(lm.model, [1, 0, 0, 0, 1, 1] * 5, high=90), []
    logprobs = rltr.completion_logprobs
    most, optimizer = 70, KeepGradients(lm.model)

    def limited(lm, batch, *a):
        seen.append(len(batch) * max(len(r.prompt) + len(r.tokens) for r in batch))
        if len(seen) % 2 == 0 and seen[-1] > most:  # the first one fits
            raise torch.OutOfMemoryError
        return logprobs(lm, batch, *a)

    monkeypatch.setattr(rltr, "completion_logprobs", limited)
    rltr.update(lm, optimizer, rows, config)
    want = naive_update(lm.model, rows, config, 90)[1]
    assert (optimizer.gradient - want).abs().max() < 1e-5 * want.abs().max()
    assert config.token_budget in (50, 100, 200) and "--token-budget 200" in capsys.readouterr().out

    monkeypatch.setattr(rltr, "completion_logprobs", logprobs)  # what a run on CUDA starts with
    shapes, longest = embedded(lm.model), random_prompts(9, 30, 4)
    rltr.rehearse(
        lm, optimizer, [(None, p) for p in longest], Config(token_budget=200, max_new_tokens=20)
    )
    assert [(b, t) for b, t in shapes] == [(4, 49), (1, 49)]
    assert not any(p.grad is not None and p.grad.any() for p in lm.model.parameters())

    def never(*a):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(rltr, "completion_logprobs", never)
    with pytest.raises(UserError, match="gradient-checkpointing"):
        rltr.update(lm, optimizer, rows, config)


def test_mistake_memory_runs_out_after_hours_because_a_longer_batch_comes_late():
    rows = sampled(tiny(), [0, 1] * 20, group=2)
    sizes = {id(r): len(r.prompt) + len(r.tokens) for r in rows}
    for budget in (1, 20, 45, 100, 10**6):
        batches = [[id(r) for r in batch] for batch in rltr.micro_batches(rows, budget)]
        assert sorted(sum(batches, [])) == sorted(sizes)
        assert all(len(b) * max(sizes[i] for i in b) <= budget or len(b) == 1 for b in batches)
        assert [sizes[i] for b in batches for i in b] == sorted(sizes.values(), reverse=True)
    assert len(rltr.micro_batches(rows, 1)) == 40 and len(batches) == 1


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
    dead, broken = sampled(lm.model, [1, 1, 1, 0.1, 0.1, 0.1]), sampled(lm.model, [0, 1, 1])
    broken[0].advantage = float("nan")
    assert rltr.update(lm, optimizer, dead, Config(group=3))["grad_norm"] is None
    rltr.update(lm, optimizer, broken, Config(group=3))
    assert all(torch.equal(a, b) for a, b in zip(before, lm.model.parameters()))
    rltr.update(lm, optimizer, sampled(lm.model, [0, 1, 1]), Config(group=3))
    assert not any(torch.equal(a, b) for a, b in zip(before, lm.model.parameters()))


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
    direction, start = torch.randn(16, 16).bfloat16(), torch.rand(16, 16).bfloat16() / 64 + 1 / 64
    fp32, bf16, plain, again = map(layer, (torch.float32, *[torch.bfloat16] * 3))
    naive = torch.optim.AdamW(plain.parameters(), 1e-6)
    assert torch.equal(train(plain, lambda norm: naive.step()), start)
    ours, exact = rltr.MasterAdamW(bf16, 1e-6, device="cpu"), rltr.MasterAdamW(fp32, 1e-6)
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


def run(task, out, flags=""):
    given = f"""--model {task}/generator --receiver {task}/receiver --data {task}/train.jsonl
        --out {out} --prompt {{question}} --steps 4 --prompts 2 --group 4 --max-new-tokens 28
        --cuts 2 --lr 1e-3 --save-every 2 --device cpu {flags}"""
    return rltr.main(given.split())


def read(out, name):
    """Lines of metrics.jsonl or rollouts.jsonl, without what differs from run to run."""
    rows = [json.loads(line) for line in (out / f"{name}.jsonl").read_text().splitlines()]
    differs = ("seconds", "tokens_per", "peak")
    return [{k: v for k, v in row.items() if not k.startswith(differs)} for row in rows]


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
        "checkpoints/step-000002",
        "checkpoints/step-000004",
    }
    assert json.loads((whole / "config.json").read_text())["lr"] == 1e-3
    assert [m["step"] for m in read(whole, "metrics")] == [1, 2, 3, 4]
    final = weights(whole / "final")
    assert torch.equal(final, weights(whole / "checkpoints/step-000004"))
    assert (final - weights(task / "generator")).abs().max() > 1e-5
    tokenizer = transformers.AutoTokenizer.from_pretrained(whole / "final")
    assert tokenizer.decode(tokenizer.encode("Q1>*6;")) == "Q1>*6;"


def test_what_is_logged_is_what_happened(task, tmp_path):
    assert run(task, tmp_path / "a", "--prompts 1 --group 8 --transfer-weight 3") == 0
    tokenizer, right, alive = rltr.tiny_tokenizer(), rltr.is_correct, 0
    for metrics in read(tmp_path / "a", "metrics"):
        rows = [r for r in read(tmp_path / "a", "rollouts") if r["step"] == metrics["step"]]
        column = {
            name: np.array([r[name] for r in rows], float)
            for name in ("reward", "advantage", "r_answer", "r_transfer", "r_format", "finished")
        }
        cuts, rewards = [c for r in rows for c in r["cuts"]], column["reward"]
        assert np.allclose(
            rewards,
            sum(
                w * column[name]
                for w, name in ((1, "r_answer"), (3, "r_transfer"), (0.1, "r_format"))
            ),
        )
        assert np.allclose(column["advantage"], (rewards - rewards.mean()) / (rewards.std() + 1e-6))
        for r in rows:
            gold, tokens, text = r["problem"]["answer"], r["tokens"], r["text"]
            assert text == rltr.decode(tokenizer, tokens) and r["finished"] == (tokens[-1] == 1)
            assert r["r_answer"] == right(text, gold) and len(r["cuts"]) == 2 and len(rows) == 8
            assert r["r_transfer"] == np.mean([c["correct"] for c in r["cuts"]])
            for c in r["cuts"]:
                assert c["prefix_length"] == int(c["tau"] * (len(tokens) - r["finished"]))
                assert c["prefix"] == rltr.decode(tokenizer, tokens[: c["prefix_length"]])
                assert c["correct"] == right(c["prefix"] + c["continuation"], gold)
        low = [c["correct"] for c in cuts if 0.25 < c["tau"] <= 0.5]
        for name, values in {
            "reward": rewards,
            "accuracy": column["r_answer"],
            "transfer": column["r_transfer"],
            "format": column["r_format"],
            "finished": column["finished"],
            "leak": [c["leaked"] for c in cuts],
            "length": [len(r["tokens"]) for r in rows],
            "dead_groups": np.ptp(rewards) == 0,
            "transfer_tau_0.25_0.5": low,
        }.items():
            want = pytest.approx(np.mean(values)) if np.size(values) else None
            assert metrics[name] == want, name
        alive += not metrics["dead_groups"]
        assert metrics["dead_groups"] or metrics["logprob_gap_max"] < 1e-3
    assert alive


def test_rlvr_loads_no_receiver_and_self_is_a_frozen_copy(task, tmp_path, monkeypatch):
    assert run(task, tmp_path / "b", "--transfer-weight 0 --receiver does/not-exist --steps 2") == 0
    assert not any(r["cuts"] or r["r_transfer"] for r in read(tmp_path / "b", "rollouts"))
    loaded, load = [], rltr.load_lm
    monkeypatch.setattr(rltr, "load_lm", lambda *a, **k: loaded.append(load(*a, **k)) or loaded[-1])
    assert run(task, tmp_path / "c", "--receiver self --steps 2") == 0
    trained, frozen = (flat(lm.model) for lm in loaded)
    assert torch.equal(frozen, weights(task / "generator")) and not torch.equal(trained, frozen)


def fail_in_the_second_checkpoint(monkeypatch, error):
    save, calls = torch.save, []

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
    assert len(read(out, "metrics")) == 4 and not (out / "final").exists()
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


def test_two_processes_make_the_rollouts_and_gradient_of_one(task, tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "argv", ["pytest"])
    flags = f"--steps 1 --prompts 3 --eval-data {task}/train.jsonl --eval-k 2 --seed 1"
    assert run(task, tmp_path / "one", flags) == 0
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", "29517"]
    capfd.readouterr()
    monkeypatch.setattr(
        rltr,
        "main",
        lambda argv: (
            subprocess.run(
                [sys.executable, *command, rltr.__file__, *argv],
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            ).returncode
        ),
    )
    assert run(task, tmp_path / "two", flags) == 0
    assert capfd.readouterr().out.count("trained model") == 1  # one of them speaks
    one, two = tmp_path / "one", tmp_path / "two"
    for a, b in zip(read(one, "rollouts"), read(two, "rollouts"), strict=True):
        assert a.pop("logprobs") == pytest.approx(b.pop("logprobs"), abs=1e-5) and a == b
    for a, b in zip(read(one, "metrics"), read(two, "metrics"), strict=True):
        assert a == pytest.approx(b, rel=1e-5, abs=1e-6)
    first, second = (
        torch.load(folder / "checkpoints/step-000001/optimizer.pt")["adam"]["state"]
        for folder in (one, two)
    )
    for i in first:
        assert torch.allclose(first[i]["exp_avg"], second[i]["exp_avg"], rtol=0, atol=1e-6)
    before, after = (
        json.loads((out / "evaluation.json").read_text())["before"] for out in (one, two)
    )
    assert before == after  # the same texts


def test_two_steps_and_a_resume_to_four_are_four_steps(task, whole, tmp_path):
    assert run(task, tmp_path / "b", "--steps 2") == 0
    assert rltr.main(["--resume", str(tmp_path / "b"), "--steps", "4"]) == 0
    assert read(tmp_path / "b", "metrics") == read(whole, "metrics")
    assert torch.equal(weights(tmp_path / "b/final"), weights(whole / "final"))


def test_without_model_tiny_settings_replace_what_the_user_did_not_set(task, tmp_path, monkeypatch):
    monkeypatch.setattr(rltr, "make_tiny", lambda seed: task)
    monkeypatch.chdir(tmp_path)
    assert rltr.main([*"--steps 1 --prompts 2 --cuts 3 --out a --eval-data".split(), ""]) == 0
    config = json.loads((tmp_path / "a/config.json").read_text())
    given = {"steps": 1, "prompts": 2, "cuts": 3, "eval_data": "", "max_rows": 512}  # resolved
    for key, want in {**vars(Config()), **rltr.TINY, **given, "out": "a"}.items():
        assert config[key] == (want.replace("tiny/", f"{task}/") if isinstance(want, str) else want)


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
    "not text": "--data {tmp}/binary.jsonl",
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
    folder, tokenizer = tmp_path_factory.mktemp("odd"), rltr.tiny_tokenizer()

    def save(name, model, tokenizer=tokenizer):
        rltr.save_lm(lm_of(model, tokenizer), folder / name)

    small = dict(vocab_size=len(tokenizer), eos_token_id=1)
    save("short", tiny(max_position_embeddings=9, **small))
    model = tiny(**small)
    model.lm_head.weight.data[3] = torch.nan
    save("nan", model)
    silent = rltr.tiny_tokenizer()
    silent.eos_token = None
    save("endless", tiny(vocab_size=len(tokenizer)), silent)
    save("narrow", tiny(vocab_size=5, eos_token_id=1))
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
    return folder


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_line_and_exit_code_2(case, task, odd, tmp_path, capfd, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
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
    }.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "binary.jsonl").write_bytes(bytes(range(256)))
    before = sorted(tmp_path.rglob("*"))
    assert run(task, tmp_path / "out", BAD[case].format(tmp=tmp_path, odd=odd)) == 2
    [error] = capfd.readouterr().err.splitlines()
    assert error.startswith("rltr: ") and len(error) > 25
    assert sorted(tmp_path.rglob("*")) == before  # no half-made run is left behind
    assert not (odd / "executed").exists()


def test_debug_shows_the_traceback(tmp_path):
    with pytest.raises(UserError):
        rltr.main(["--model", str(tmp_path), "--debug"])


# ------------------------------------------------------------------------------------------- faults


def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)


def forked(function, limit=None, timer=None):
    """The exit code of the function in a process of its own, -9 if that was killed."""

    def child():
        rltr.tqdm.set_lock(rltr.threading.RLock())  # not the parent's: the dead never release it
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
        (rltr, "flush", 12),
        (rltr.Path, "rename", 1),
        (rltr.Path, "rename", 2),
        (rltr.shutil, "rmtree", 3),
        (rltr.Run, "log", 4),
        (rltr.Path, "replace", 1),
        (evaluation, "before_and_after", 1),
    ],
)
def test_kill_at_a_chosen_moment(where, name, call, task, whole, tmp_path):
    def die_at_call():
        calls, real = itertools.count(1), getattr(where, name)
        setattr(where, name, lambda *a, **k: die() if next(calls) == call else real(*a, **k))
        return run(task, tmp_path / "b", "--eval-data x" if where is evaluation else "")

    if where is evaluation:  # the training is over
        data = f"--eval-data {task}/train.jsonl"

        def die_at_call():
            evaluation.before_and_after = die
            return run(task, tmp_path / "b", data)

    assert forked(die_at_call) == -9
    if name == "replace":  # the very first files of the run
        assert run(task, tmp_path / "b") == 2
    if where is evaluation:
        assert forked(lambda: rltr.main(["--resume", str(tmp_path / "b"), "--eval-data", ""])) == 0
    if (tmp_path / "b/config.json").exists():
        resumes_to(whole, tmp_path / "b")


def kill_at_random(task, whole, out, kills, seed):
    """So many deaths in one run, at moments of a steady kind of randomness; then it is finished."""
    source, died = random.Random(seed), 0
    while died < kills:
        resume = (out / "config.json").exists()
        if not resume:
            rltr.shutil.rmtree(out, ignore_errors=True)
        code = forked(
            lambda: rltr.main(["--resume", str(out)]) if resume else run(task, out),
            timer=source.uniform(0.02, 1.0),
        )
        died += code != 0
        assert code in (0, -signal.SIGALRM)
        steps = [m["step"] for m in read(out, "metrics")] if code == 0 else []
        assert code != 0 or steps == [1, 2, 3, 4]
        if code == 0:  # survived: begin once more
            rltr.shutil.rmtree(out)
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


def test_a_full_disk_is_said_and_training_goes_on(task, whole, tmp_path, capfd, monkeypatch):
    for size in (9_000, 60_000):  # of any file: even logs break off; weights do not fit
        out = tmp_path / str(size)
        assert forked(lambda: run(task, out), limit=size) == 2
        err = capfd.readouterr().err
        assert "training goes on" in err and f"--resume {out}" in err.splitlines()[-1]
        assert not (out / "final").exists() and not list(out.glob("checkpoints/step-0*"))
        resumes_to(whole, out)


def test_a_disk_that_is_full_for_a_while_loses_nothing(task, whole, tmp_path, monkeypatch, capfd):
    opened, real, saved = itertools.count(1), rltr.Path.open, []

    def full_for_a_while(path, mode="r", *a, **k):
        if mode == "r+b" and next(opened) in (2, 3):
            with real(path, "ab") as file:
                file.write(b'{"step": 2, "torn')
            raise OSError(28, "No space left on device")
        return real(path, mode, *a, **k)

    save = rltr.save_lm
    monkeypatch.setattr(
        rltr,
        "save_lm",
        lambda *a: (
            saved.append(1)
            or (
                die()
                if len(saved) > 3
                else save(*a)
                if len(saved) != 1
                else open("/dev/full", "w").write("x" * 9999)
            )
        ),
    )
    monkeypatch.setattr(rltr.Path, "open", full_for_a_while)
    assert run(task, tmp_path / "b") == 0
    assert "No space left" in capfd.readouterr().err
    for name in ("metrics", "rollouts"):
        assert read(tmp_path / "b", name) == read(whole, name)
    assert [p.name for p in (tmp_path / "b/checkpoints").iterdir()] == ["step-000004"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("times", [1, 2])
def test_a_signal_finishes_the_step_and_saves_and_a_second_one_stops_at_once(
    number, times, task, whole, tmp_path, capfd
):
    def signalled():
        calls, real = itertools.count(1), rltr.sample_rollouts

        def sample(*a):
            for _ in range(times if next(calls) == 3 else 0):
                os.kill(os.getpid(), number)
            return real(*a)

        rltr.sample_rollouts = sample
        return run(task, tmp_path / "b")

    code, steps = forked(signalled), sorted(p.name for p in tmp_path.glob("b/checkpoints/step-*"))
    if times == 2:
        assert code == -number and steps == ["step-000002"]
    else:
        assert code == 128 + number and steps == ["step-000002", "step-000003"]
        assert f"--resume {tmp_path / 'b'}" in capfd.readouterr().out
        assert forked(lambda: rltr.main(["--resume", str(tmp_path / "b")])) == 0
        assert read(tmp_path / "b", "rollouts") == read(whole, "rollouts")
        assert torch.equal(weights(tmp_path / "b/final"), weights(whole / "final"))


def test_two_runs_cannot_write_one_folder(task, tmp_path, capfd):
    assert run(task, tmp_path / "b", "--steps 1") == 0
    config = Config(**json.loads((tmp_path / "b/config.json").read_text()))
    holder = rltr.Run(config, resume=True)
    assert forked(lambda: rltr.main(["--resume", str(tmp_path / "b"), "--steps", "2"])) == 2
    assert "another run" in capfd.readouterr().err
    del holder
    assert forked(lambda: rltr.main(["--resume", str(tmp_path / "b"), "--steps", "2"])) == 0


def test_a_step_without_a_finite_gradient_is_skipped_and_shown_and_six_end_the_run(
    task, tmp_path, monkeypatch, capfd
):
    objective, bad = rltr.policy_objective, [2]
    steps = itertools.count(1)
    monkeypatch.setattr(
        rltr,
        "policy_objective",
        lambda *a: objective(*a) * (torch.nan if next(steps) in bad else 1.0),
    )
    flags = "--prompts 4 --answer-weight 1 --lr 1e-3 --seed 2 --token-budget 99999"
    assert run(task, tmp_path / "b", flags) == 0
    metrics, rows = read(tmp_path / "b", "metrics"), read(tmp_path / "b", "rollouts")
    assert [m["skipped"] for m in metrics] == [0, 1, 0, 0] and metrics[1]["grad_norm"] is None
    assert [sum(r["step"] == step for r in rows) for step in (1, 2, 3, 4)] == [4, 16, 4, 4]
    bad[:] = range(999)
    assert run(task, tmp_path / "c", flags + " --steps 20") == 2
    assert "six steps in a row" in capfd.readouterr().err
    assert len(read(tmp_path / "c", "metrics")) == 6
    assert torch.equal(weights(tmp_path / "c/checkpoints/step-000004"), weights(task / "generator"))


class Bomb:
    def __reduce__(self):
        return open, (os.environ["RLTR_BOMB"], "w")


def test_a_damaged_or_foreign_checkpoint_is_refused_and_an_earlier_one_is_used(
    task, whole, tmp_path, capfd, monkeypatch
):
    out, bomb = tmp_path / "b", tmp_path / "executed"
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
        assert "step-000004" in error and not bomb.exists()
        (checkpoint / name).write_bytes(good[name])
    (checkpoint / "optimizer.pt").unlink()
    rltr.shutil.rmtree(checkpoint)  # the advice it gave
    resumes_to(whole, out)
    assert rltr.main(["--resume", str(out), "--steps", "5", "--lr", "1"]) == 2
    assert "lr" in capfd.readouterr().err
    assert rltr.main(["--resume", str(out), "--steps", "5", "--lr", "1", "--force"]) == 0
    assert json.loads((out / "config.json").read_text())["lr"] == 1


def test_every_setting_is_a_flag_with_help_and_the_examples_in_the_docstrings_are_true(capsys):
    with pytest.raises(SystemExit) as stop:
        rltr.main(["--help"])
    text = "".join(capsys.readouterr().out.split())  # argparse breaks lines at will
    for name, f in Config.__dataclass_fields__.items():
        assert f"--{name.replace('_', '-')}" in text and "".join(f.metadata["help"].split()) in text
    failed, attempted = doctest.testmod(rltr)
    assert stop.value.code == 0 and failed == 0 and attempted >= 3


# ---------------------------------------------------------------------------------- report, README


def benchmark(name):
    """benchmarks/NAME.py as a module."""
    path = rltr.Path(rltr.__file__).parent / "benchmarks" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"benchmarks_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


HOSTILE_TEXT = "</pre><script>alert(1)</script><img src=x onerror=y>\x1b[31m\u202egnihton\x00"


def test_the_report_is_one_page_in_which_model_text_is_only_text(task, whole, tmp_path, capfd):
    report, folders = benchmark("report"), []
    assert (
        run(
            task,
            tmp_path / "rlvr",
            f"--transfer-weight 0 --steps 2 --eval-k 2 --eval-data {task}/train.jsonl",
        )
        == 0
    )
    for seed in (0, 1):  # two runs that differ in the seed
        folders.append(tmp_path / f"seed{seed}")
        rltr.shutil.copytree(whole, folders[-1])
        config = json.loads((whole / "config.json").read_text()) | {"seed": seed}
        (folders[-1] / "config.json").write_text(json.dumps(config))
        rows = [json.loads(line) for line in (whole / "metrics.jsonl").open()]
        for row in rows:
            row["accuracy"] = 0.25 + 0.5 * seed
        (folders[-1] / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    rows = [json.loads(line) for line in (whole / "rollouts.jsonl").open()]
    for row in rows:
        row["text"] = row["cuts"][0]["continuation"] = row["problem"]["question"] = HOSTILE_TEXT
    (folders[0] / "rollouts.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows) + '{"step": 5, "te'
    )  # still being written
    page = tmp_path / "report.html"
    scored = tmp_path / "result.json"
    scored.write_text(json.dumps({"figures": {"Maj@1": 0.5, "Maj@2": 0.75}}))
    assert (
        report.main(
            [*map(str, folders), str(tmp_path / "rlvr"), "-o", str(page), "--eval", str(scored)]
        )
        == 0
    )
    html = page.read_text()
    parser = html_parser.HTMLParser()
    tags = []
    parser.handle_starttag = lambda tag, given: tags.append((tag, dict(given)))
    parser.feed(html)
    assert not {"script", "img", "link", "iframe"} & {tag for tag, _ in tags} and "http" not in html
    assert not any(
        key in ("src", "href") or key.startswith("on") for _, given in tags for key in given
    )
    assert "alert(1)" in html and "\\x1b[31m" in html and not set("\x1b\u202e\x00") & set(html)
    assert "2 seeds" in html and "right answers went from 50% to 50%" in html  # both seeds' mean
    assert f"{tmp_path.name}/result.json" in html
    assert "RLVR" in html and "Maj@k" in html and f"{rows[-1]['advantage']:+.2f}" in html
    lines = [given["points"] for tag, given in tags if tag == "polyline"]
    assert len(lines) >= 2 * 5 and all(lines)
    capfd.readouterr()
    for argv in ([tmp_path / "nowhere"], [task]):
        assert report.main([*map(str, argv), "-o", str(page)]) == 2
        assert len(capfd.readouterr().err.splitlines()) == 1
    (folders[1] / "metrics.jsonl").write_text('{"step": 1\n{"step": 2}\n')
    assert report.main([str(folders[1])]) == 2 and "line 1" in capfd.readouterr().err


def test_the_commands_of_the_readme_parse(tmp_path, monkeypatch):
    here = rltr.Path(rltr.__file__).parent
    text = (here / "README.md").read_text() + (here / "benchmarks/RESULTS.md").read_text()
    commands = re.findall(
        r"(?:python|torchrun[^`\n]*?) ((?:benchmarks/)?\w+\.py)([^`\n#&|]*)", text
    )
    seen = set()
    for script, rest in commands:
        given = [word.strip('"') for word in shlex.split(rest) if word not in ("...", ")")]
        seen.add(script)
        if script == "rltr.py" and "--help" not in given and "--resume" not in given:
            rltr.parse_arguments(given)
        elif script == "eval.py" and given:
            evaluation.parse_arguments(given)
        source = (here / script).read_text()
        flags = [word for word in given if word.startswith("--")]
        known = (
            source
            if script.startswith("bench")
            else [
                *("--" + name.replace("_", "-") for name in Config.__dataclass_fields__),
                "--resume",
                "--help",
                "--force",
                "--debug",
                "--k",
                "--samples",
                "--compare",
            ]
        )
        assert not [flag for flag in flags if flag not in known], (script, flags)
    assert {"rltr.py", "eval.py", "benchmarks/report.py", "benchmarks/gpu_check.py"} <= seen


# ------------------------------------------------------------------------------------------ answers


EQUAL = r"""
1,234,567 == 1234567 | 12{,}500 == 12500 | 12\,500 == 12500 | −8 == -8 | ７ == 7 |
\frac{3}{16} == .1875 | \tfrac79 == 7/9 | -\frac{7}{9} == \frac{-7}{9} | 2\frac{7}{8} == 23/8 |
35\% == 35 | \$7.50 == 7.5 | 14\text{ km} == 14 | 14 \mathrm{~m/s} == 14 | 8 books == 8 |
72^\circ == 72 | \sqrt{27} == 3\sqrt3 | \frac{1}{\sqrt{7}} == \frac{\sqrt{7}}{7} |
\sqrt[3]{24} == 2\sqrt[3]{3} | 5π/6 == \frac{5\pi}{6} | 3\times10^{4} == 3e4 | 2^{-3} == 1/8 |
(x-3)^2 == x^2-6x+9 | \frac{ab}{3} == ba/3 | \sin 2x == 2 \sin x \cos x | \ln 9 == 2\ln 3 |
3^{n+1} == 3\cdot3^n | (2+i)^2 == 3+4i | \sqrt{-9} == 3i | \left(\frac12, 3\right) == (0.5,3) |
\{4,5\} == \{5,4\} | 7, 8 \text{ and } 9 == 9,8,7 | \pm 6 == 6,-6 |
[1,4)\cup(7,\infty) == (7,\infty)\cup[1,4) | 101_2 == 101_{2} |
\begin{pmatrix} 1/2 \\ 3 \end{pmatrix} == \begin{bmatrix} 0.5 \\ 3 \end{bmatrix} | \text{(D)} == D |
\text{No} == no | \text{3:15 p.m.} == 3:15 pm | 5:7 == 5 : 7 | \text{north} == North |
\boldsymbol{9} == 9 | \frac{x^2-4}{x-2} == x+2 | x = 9 == 9 | f(3)=9 == 9 |
AB = 2\sqrt{3} == \sqrt{12} | x=2,y=7 == y=7,x=2 | x=2,y=7 == 2,7 | x \ge 4 == [4,\infty) |
1 < t \le 6 == (1,6] | x \in (1,6] == (1,6] |
\mathbb{R} \setminus \{4\} == (-\infty,4)\cup(4,\infty) | S = \{1,2\} == \{2,1\}
"""
UNEQUAL = r"""
6 != 6\sqrt2 | 1/100! != 1/101! | (3,4) != (4,3) | [3,4] != (3,4) | [3,4) != (3,4] | \pm 6 != 6 |
10:30 != 11:30 | 3:15 am != 3:15 pm | \frac{1}{6} != 16 | 7 != 7! | \frac16 != 0.1667 |
\sqrt3 != 1.7320508075 | \pi != 3.14159 | 10^{30} != 10^{30}+1 | 45 != 4.5 | 1,234 != 1 |
6, 700 != 6700 | 9 km != 9 hours | 9\% != 0.09 | 3 million != 3 | 3\frac12 != \frac{31}{2} |
3 1/2 != 31/2 | 101_2 != 101 | 101_2 != 101_3 | 101_2 != 5 | x != |x| | x != y | x^{ab} != x^a b |
2x != x^2 | 3-2i != 3+2i | 4:5 != 5:4 | \log x != \ln x | \binom{7}{2} != \frac{7}{2} | arm != ram |
(A) != (B) | yes != no | x=3 != y=3 | x=3 != x=4 | x=2,y=7 != x=7,y=2 | x=2,y=7 != 7,2 |
x^2+y^2=9 != 9 | x^2+3y^2=9 != x^2+4y^2=9 | 4^{2}! != 16 | x > 4 != x \ge 4 | x > 4 != x < 4 |
x > 4 != -x > -4 | 2x=10 != 10 | x \ne 4 != 4 | \{1,2\} != (1,2) | \{1,2\} != \{1,2,7\} |
1,1,2 != 1,2,2 | (1,2),(3,4) != (1,2,3,4) | (0,1)\cup(2,3) != (0,1)\cup[2,3) |
\sum_{n=1}^{4} n != 10 | e^{-900} != 0 |
\begin{pmatrix}1&2\\3&4\end{pmatrix} != \begin{pmatrix}1&3\\2&4\end{pmatrix} | 5 or 6 != 5
"""
HOSTILE = [
    "{" * 10**6,
    "(" * 10**6 + ")" * 10**6,
    r"\frac{" * 10**6,
    "9" * 10**5,
    "9^" * 250 + "9",
    "][",
    "9^{9^{9^{9^9}}}",
    "99!!!!!!",
    "2000!," * 90,
    "+".join(f"1/{n}!" for n in range(2000, 2060)),
    "-" * 500,
    "1e999999999",
    "1/" * 250 + "3",
    r"\sqrt{" * 90 + "2" + "}" * 90,
    "x_" * 250,
    "\x00",
    "(1," * 150 + "2" + ")" * 150,
    "\x005\x00",
    "\ud800",
    "٣٤",
    "\u202e12\u202c",
    "½" * 500,
    "\\",
    "ﷺ" * 500,
    "}{",
    "\\\\",
    "$" * 500,
    "|" * 500,
    "__import__('os').system('true')",
    "%s%n{0}",
    r"\begin{pmatrix}" * 30,
    ",".join(f"({n},{n + 1})" for n in range(80)),
    "±1" * 99,
    "f(a)" * 120 + "+=5",
]


def pairs(table, sign):
    return [pair.split(sign) for pair in " ".join(table.split("\n")).strip().split(" | ")]


@pytest.mark.parametrize("a, b", pairs(EQUAL, " == "))
def test_equal(a, b):
    assert answers_equal(a, b) and answers_equal(b, a)
    assert is_correct(f"So it is $\\boxed{{{a}}}$.", b)


@pytest.mark.parametrize("a, b", pairs(UNEQUAL, " != "))
def test_unequal(a, b):
    assert not answers_equal(a, b) and not answers_equal(b, a)


def test_different_answers_differ():
    different = r"""
        5 -5 5! 5^2 5i 5\pi 5x 5y 5x^2 5/2 0.5 \sqrt5 \sqrt[3]{5} (5,5) \{5,6\} [5,6] (5,6) (6,5)
        (5,6] 5_6 5:6 x>5 x<5 x\ge5 x\ne5 |x| x x^{-1} \frac{x}{5} x+y=5 x^2+y^2=5 x^2+y^2=25 e^x
        y=5x+1 \sin5 \sin{x} \cos{x} \ln5 \log5 e^5 e^{-x} x_1 x_2 \pm5 5\pm\sqrt2 5\text{million}
        (-\infty,5] (-\infty,5)\cup(6,\infty) \binom{7}{4} 0.\overline{5} A \text{(Q)} even odd
        5:06\text{am} 5:06\text{pm} \begin{pmatrix}5\\7\end{pmatrix} \int_0^5x \sum_{n=1}^5n
        """.split()
    assert not [(a, b) for a in different for b in different if a != b and answers_equal(a, b)]


@pytest.mark.parametrize(
    "text, answer",
    [
        (r"\boxed{1} then \boxed{2}", "2"),
        (r"\boxed{\frac{1}{\sqrt{7}}}", r"\frac{1}{\sqrt{7}}"),
        (r"\boxed{\boxed{3}}", "3"),
        (r"\fbox{4}", "4"),
        ("\\boxed\n {5}", "5"),
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
        ("\\boxed" + "{" * 10**6, None),
    ],
)
def test_extract(text, answer):
    assert extract_answer(text) == answer


def test_fallback():
    for text in ("The answer is 12.", "The answer is $12$. I see.", "5 + 7 = 12 apples", "A: 12"):
        assert is_correct(text, "12", fallback=True) and not is_correct(text, "12")


def test_hostile_and_random_strings_are_equal_to_themselves_only_and_symmetric():
    rng = random.Random(0)
    alphabet = [
        *"0123456789.,;:+-*/^_!|()[]{}<>=$% ~\\'\"&abxei\n\x00½π√±∪",
        r"\frac",
        r"\sqrt",
        r"\text{",
        r"\pm",
        r"\{",
        r"\}",
        r"\sin",
        r"\le",
        r"\left(",
        " and ",
        r"\overline{",
    ]
    noise = ["".join(rng.choices(alphabet, k=rng.randrange(1, 30))) for _ in range(2000)]
    golds = ["7", r"\frac{3}{8}", "(3,8)", "x+8", "3,8", r"\text{Q}", "x>8", "100!"]
    for s in HOSTILE + noise[:300]:
        assert answers_equal(s, s)
        assert is_correct(f"\\boxed{{{s}}}", "31337.5") is False
        for gold in golds:
            assert answers_equal(s, gold) is answers_equal(gold, s)
    for a, b in zip(HOSTILE + noise, noise[::-1]):
        assert answers_equal(a, b) is answers_equal(b, a)


def test_checks_count():
    CHECKS.clear()
    for text in ("nothing", r"\boxed{\int x}", r"\boxed{east}"):
        is_correct(text, "west" if "east" in text else "5")
    assert CHECKS == {"missing": 1, "unparsed": 1, "compared_as_text": 2}


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
    monkeypatch.setattr(evaluation, "load_lm", lambda *_: None)
    monkeypatch.setattr(
        evaluation,
        "evaluate",
        lambda _, problems, **__: evaluation.score(
            [{"problem": p.question, "answer": p.answer, "completions": [""]} for p in problems]
        ),
    )
    argv = ["--model", "m", "--data", "some/set", "--split", split]
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


def test_interrupted_evaluation_goes_on(model, tmp_path, monkeypatch, capsys):
    data = [{"question": f"Q{i}?", "answer": "1"} for i in range(5)]
    command = [
        "--model",
        model,
        "--data",
        write_lines(tmp_path / "d.jsonl", data),
        "--k",
        "256",
        "--prompt",
        "{question}",
        "--max-new-tokens",
        "6",
        "--receiver",
        "self",
        "--transfer-samples",
        "2",
        "--device",
        "cpu",
    ]
    whole, halves, calls, generate = tmp_path / "w", tmp_path / "h", [], evaluation.generate
    want = result_of(*command, out=whole)

    def failing(*args, **kwargs):
        calls.append(kwargs["first_row"])
        rltr.require(len(calls) != 3, "power cut")
        return generate(*args, **kwargs)

    monkeypatch.setattr(evaluation, "generate", failing)
    assert evaluation.main([*command, "--out", str(halves)]) == 2  # 2 chunks of 3 are done
    log = halves / "completions.jsonl"
    log.write_bytes(log.read_bytes()[:-100])  # a torn last line
    got = result_of(*command, "--max-rows", "50", out=halves)
    assert calls == [0, 512, 1024, 512, 1024]  # the first was reused
    assert log.read_bytes() == (whole / "completions.jsonl").read_bytes()
    assert {**got, "settings": 0} == {**want, "settings": 0}
    assert list(got["transfer"]) == [f"0.{i}" for i in range(1, 10)] and got["cut"] == 2
    assert result_of("--samples", str(log), out=tmp_path / "again")["figures"] == got["figures"]
    capsys.readouterr()
    assert evaluation.main([*command, "--seed", "1", "--out", str(halves)]) == 2
    assert "another seed" in capsys.readouterr().err


def test_bad_input_is_one_line(model, tmp_path, capsys):
    good, run = write_lines(tmp_path / "good.jsonl", sample_rows()), ["--model", model]
    line, bad = '{"problem": "q", "answer": "1", "completions": %s}\n', []
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
        ]
    ):
        bad.append(str(tmp_path / f"{i}.jsonl"))
        (tmp_path / f"{i}.jsonl").write_text(text)
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
        ["--compare", good, good],
        ["--compare", "no", good],
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
