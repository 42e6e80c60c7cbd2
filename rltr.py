"""RLTR, Reinforcement Learning with Transferable Reward, in one file.

Paper: "Beyond Correctness: Learning Robust Reasoning via Transfer" (Lee, Abbasloo, Tack, Shin;
arXiv 2602.08489). A generator learns to reason so that *another* model can pick its reasoning up
half-way and still reach the right answer: every rollout is cut at a random point, a frozen receiver
continues from there, and the share of right endings is a reward beside the usual one.

    1  y_1..y_G ~ pi(. | x)                     G rollouts a problem            sample_rollouts
    2  R_ans   = 1[answer(y) = g]               right final answer              score_answers
    3  tau ~ U(0,1], prefix = y[:floor(tau|y|)] cut the reasoning               cut_prefix
    4  z ~ M(. | x, prefix)                     the receiver goes on            TransferReward
    5  R_trans = mean_K 1[answer(prefix+z) = g] was it transferable?            TransferReward
    6  R = a R_ans + b R_trans + c R_fmt        b = 0 is RLVR                   combine_rewards
    7  A = (R - mean_group) / (std_group + eps) against its own group           group_advantages
    8  ascend 1/T sum min(rho A, clip(rho) A)   policy gradient (GRPO)          update

The paper's: steps 1-7 with K = 1, GRPO, one frozen receiver, tau uniform, a binary reward.
Ours (the paper's text that we know does not fix them; each one is a flag):
  1. a = b = 1, c = 0.1; lr, group size, lengths and models as in `Config`; the receiver samples at 1.
  2. One token mean over the whole batch (T in step 8), not one mean per sequence; clip 0.2 / 0.28.
  3. Groups whose rewards are all equal leave the update and T: they hold no information.
  4. `--cuts K` averages K independent cuts and continuations a rollout: a denser, dearer R_trans.
  5. The stop token is stripped before the cut, so that tau = 1 still leaves the receiver a turn.
  6. Receiver budget: what the generator had left plus `--receiver-margin`; too long a prefix scores 0.

    python rltr.py                                       # built-in tiny models, any laptop, no download
    python rltr.py --transfer-weight 0                   # the same task with the answer reward alone
    python rltr.py --model Qwen2.5-1.5B --steps 500      # one GPU, MATH, receiver Qwen2.5-1.5B-Instruct
    python rltr.py --resume runs/NAME                    # goes on where that run stopped
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import csv
import dataclasses
import json
import math
import os
import random
import re
import shutil
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from transformers.modeling_utils import AttentionInterface

# ======================================================================================= settings

PROMPT = ("{question}\nPlease reason step by step, "
          "and put your final answer within \\boxed{{}}.")


def option(default, text):
    return field(default=default, metadata={"help": text})


@dataclass
class Config:
    """One flat record of settings; field names, defaults and help texts are the command line."""

    model: str = option("", "generator: folder or hub name; empty: the built-in tiny task (TINY)")
    receiver: str = option("Qwen2.5-1.5B-Instruct", "frozen receiver: folder or hub name, or self")
    data: str = option("math", "gsm8k, math, math500, aime24, amc23, a hub id, or a local file")
    split: str = option("", "split of a hub data set; empty: its training split")
    limit: int = option(0, "use only the first N problems (0: all)")
    prompt: str = option(PROMPT, "what the models are asked; {question} is replaced")
    out: str = option("", "run folder; empty: runs/MODEL-rltr-seed0 or a free name like it")
    # -- the algorithm
    steps: int = option(500, "policy-gradient steps")
    prompts: int = option(32, "problems a step")
    group: int = option(8, "rollouts a problem (G)")
    max_new_tokens: int = option(1024, "longest completion in tokens")
    temperature: float = option(1.0, "sampling temperature; the loss uses the same")
    answer_weight: float = option(1.0, "a: weight of the right final answer")
    transfer_weight: float = option(1.0, "b: weight of the transfer reward; 0 is RLVR")
    format_weight: float = option(0.1, "c: weight of stopping by itself with a boxed answer")
    cuts: int = option(1, "K: cuts a rollout, each with its own tau and continuation")
    receiver_temperature: float = option(1.0, "temperature of the receiver (0: greedy)")
    receiver_margin: int = option(64, "tokens the receiver gets beyond what the generator had left")
    normalize_std: bool = option(True, "divide advantages by the group's standard deviation")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - this")
    clip_high: float = option(0.28, "the ratio is clipped at 1 + this")
    # -- the optimizer
    lr: float = option(2e-6, "learning rate (of the fp32 master weights)")
    warmup: int = option(10, "steps of linear warm-up")
    weight_decay: float = option(0.0, "AdamW weight decay")
    max_grad_norm: float = option(1.0, "the gradient is scaled down to this norm")
    token_budget: int = option(16384, "padded tokens a micro-batch of the update may hold")
    gradient_checkpointing: bool = option(False, "recompute activations: slower, less memory")
    max_rows: int = option(0, "rows in the KV cache at once (0: what the free memory allows)")
    # -- the run
    seed: int = option(0, "seed of everything random")
    save_every: int = option(50, "steps between checkpoints (0: only the end)")
    keep: int = option(2, "checkpoints to keep")
    show_every: int = option(25, "steps between groups shown on the terminal (0: never)")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cuda or cpu")
    # -- evaluation before and after
    eval_data: str = option("", "problems for a before/after table (empty: none)")
    eval_k: int = option(64, "completions a problem in that table")


# With no --model, these replace the defaults of the fields that the user did not set.
TINY = dict(model="tiny/generator", receiver="tiny/receiver", data="tiny/train.jsonl",
            eval_data="tiny/test.jsonl", prompt="{question}", max_new_tokens=32, receiver_margin=4,
            steps=150, lr=5e-4, cuts=4, transfer_weight=2.0, device="cpu", save_every=50)

# What may differ when a run is resumed; everything else would make it another run.
HARMLESS = {"steps", "save_every", "keep", "show_every", "eval_data", "eval_k", "out"}


class UserError(Exception):
    """Something the user can put right: main() prints it as one line and exits with 2."""


def require(condition, message):
    if not condition:
        raise UserError(message)


# The purposes that random numbers are drawn for: each has a stream of its own, see rng().
DATA, ROLLOUT, CUT, CONTINUATION, EVALUATION, WARM_START = range(1, 7)


def rng(*keys: int) -> np.random.Generator:
    """A generator that is a function of its keys (seed, purpose, step, ...): nothing to save."""
    return np.random.default_rng(keys)


# ======================================================================================= problems

SOURCES = {"gsm8k": ("openai/gsm8k", "main"), "math": ("nlile/hendrycks-MATH-benchmark", None),
           "math500": ("HuggingFaceH4/MATH-500", None), "aime24": ("math-ai/aime24", None),
           "amc23": ("math-ai/amc23", None)}


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str          # the bare gold answer: "18", "\\frac{3}{4}"


def load_problems(source: str, split: str | None = None, limit: int | None = None) -> list[Problem]:
    """Read problems from a short name (SOURCES), a hub id or a local jsonl, json, csv, parquet file.

    Columns: question | problem | prompt, and answer | solution, of which GSM8K's `#### 18` or the
    last `\\boxed{}` is taken. split None: the training split, or the only one there is.
    Raises UserError where that fails, naming the source.
    """
    rows = _read_rows(source, split)
    require(rows, f"{source}: no rows")
    columns = list(rows[0])
    question = next((c for c in ("question", "problem", "prompt") if c in columns), None)
    answer = next((c for c in ("answer", "solution") if c in columns), None)
    require(question and answer, f"{source}: needs a column question, problem or prompt and a column "
                                 f"answer or solution; it has {', '.join(map(str, columns))}")
    problems = []
    for number, row in enumerate(rows[:limit or None], 1):
        asked, text = (str(row.get(c) if row.get(c) is not None else "").strip()
                       for c in (question, answer))
        gold = extract_answer(text) or ("" if answer == "solution" or "####" in text else text)
        require(asked, f"{source}: row {number} has an empty {question}")
        require(gold, f"{source}: row {number} has no answer in column {answer}")
        problems.append(Problem(asked, gold))
    return problems


def _read_rows(source: str, split: str | None) -> list[dict]:
    path, kind = Path(source), Path(source).suffix
    if kind not in (".jsonl", ".json", ".csv", ".parquet"):
        return _read_hub(source, split)
    require(path.is_file(), f"{source}: no such file")
    try:
        if kind == ".parquet":
            import datasets
            return list(datasets.Dataset.from_parquet(source))
        with path.open(encoding="utf-8", newline="") as file:
            if kind == ".csv":
                return list(csv.DictReader(file))
            rows = json.load(file) if kind == ".json" else [json.loads(s) for s in file if s.strip()]
        require(isinstance(rows, list) and all(isinstance(row, dict) for row in rows),
                f"{source}: not a list of objects")
        return rows
    except ImportError:
        raise UserError(f"{source}: pip install datasets, to read parquet files") from None
    except (ValueError, csv.Error, OSError) as error:      # also broken JSON, bad UTF-8, bad parquet
        raise UserError(f"{source}: cannot be read as {kind[1:]}: {error}") from None


def _read_hub(source: str, split: str | None) -> list[dict]:
    try:
        import datasets
    except ImportError:
        raise UserError(f"{source}: pip install datasets, or give a local .jsonl file") from None
    name, config = SOURCES.get(source, (source, None))
    try:
        splits = datasets.load_dataset(name, config)
    except Exception as error:                             # many kinds: hub, network, cache, format
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f"{source}: no such data set or file, or no network: {reason[0]}") from None
    chosen = split or ("train" if "train" in splits else next(iter(splits)))
    require(chosen in splits, f"{source}: no split {chosen}; it has {', '.join(splits)}")
    return list(splits[chosen])


def draw_problems(problems: list, count: int, seed: int, step: int) -> list:
    """The problems of one step, a function of (seed, step): epochs of permutations, end to end."""
    first, size = step * count, len(problems)
    epochs = {e: rng(seed, DATA, e).permutation(size)
              for e in range(first // size, (first + count - 1) // size + 1)}
    return [problems[epochs[i // size][i % size]] for i in range(first, first + count)]


# ======================================================================================== answers


CHECKS = collections.Counter()


def extract_answer(text):
    i = text.rfind("\\boxed{")
    if i < 0:
        m = re.findall(r"#### *(.+)", text)
        return m[-1].strip() if m else None
    depth, j = 1, i + 7
    while j < len(text) and depth:
        depth += {"{": 1, "}": -1}.get(text[j], 0)
        j += 1
    return None if depth else text[i + 7:j - 1].strip()


def answers_equal(a, b):
    return a.replace(",", "").strip() == b.replace(",", "").strip()


def is_correct(text, gold, fallback=False):
    found = extract_answer(text)
    return found is not None and answers_equal(found, gold)


def majority_vote(answers):
    """The answer most often given, by equivalence (answers_equal), or None.

    No-answers (None) do not vote; of answers with equally many votes the first seen wins.
    """
    counts = []
    for answer in answers:
        if answer is None:
            continue
        for entry in counts:
            if answers_equal(entry[0], answer):
                entry[1] += 1
                break
        else:
            counts.append([answer, 1])
    return max(counts, key=lambda e: e[1])[0] if counts else None


# ==================================================================================== the two models

# Short names: what a model's name begins with -> the organisation that publishes it.
ORGANISATIONS = {"Qwen": "Qwen", "Llama": "meta-llama", "SmolLM": "HuggingFaceTB", "gemma": "google",
                 "OLMo": "allenai", "Phi": "microsoft", "Mistral": "mistralai"}


@dataclass
class LM:
    """A causal language model with what is needed to talk to it."""

    model: torch.nn.Module
    tokenizer: object
    stop_ids: tuple[int, ...]       # tokens that end a completion
    vocab_size: int                 # rows of the vocabulary that the tokenizer knows
    context: int                    # longest sequence in tokens

    def encode_prompt(self, question: str | list[dict], prompt: str = PROMPT) -> list[int]:
        """Token ids of the question in this model's own form, BOS exactly once.

        A list of messages (TRL's form) is rendered as it is. Without a chat template the text is
        "Question: ... Answer:".
        """
        messages = question
        if isinstance(question, str):
            messages = [{"role": "user", "content": prompt.format(question=question)}]
        if self.tokenizer.chat_template:
            text = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False)
        else:
            text = f"Question: {messages[-1]['content']}\nAnswer:"
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        bos = self.tokenizer.bos_token_id
        if bos is not None and ids[:1] != [bos] and bos in self.tokenizer.encode(""):
            ids = [bos] + ids                  # the tokenizer wants one and the template wrote none
        while ids[:2] == [bos, bos]:
            ids = ids[1:]
        return ids

    def encode_text(self, text: str) -> list[int]:
        """Token ids of model-written text. A control token spelled out in it stays plain text."""
        ids = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [i for i in ids if i not in self.tokenizer.all_special_ids]

    def decode(self, ids: list[int]) -> str:
        """Text without control tokens; a character that the cut left incomplete is dropped."""
        text = self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")


def load_lm(name: str, device: str = "cpu") -> LM:
    """Load a folder or hub model: bf16 on CUDA, fp32 on CPU, safetensors, no remote code."""
    path = name
    if not Path(name).is_dir():
        if "/" not in name:
            path = next((f"{org}/{name}" for start, org in ORGANISATIONS.items()
                         if name.startswith(start)), name)
        require(_is_reachable(path), f"model {name}: no such folder, and {path} is neither in the "
                                     "local cache nor reachable on the hub")
    dtype = torch.bfloat16 if device.startswith("cuda") else torch.float32
    try:
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype).to(device)
    except (OSError, ValueError, KeyError, RuntimeError, ImportError) as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UserError(f"model {name}: cannot be loaded: {first}") from None
    lm = LM(model, tokenizer, find_stop_ids(model, tokenizer), len(tokenizer),
            getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2 ** 30)
    require(lm.stop_ids, f"model {name}: no end-of-text token in its tokenizer or config")
    require(lm.vocab_size <= model.get_input_embeddings().num_embeddings,
            f"model {name}: its tokenizer has more tokens ({lm.vocab_size}) than the model has rows")
    check_model(lm)
    return lm


def _is_reachable(name: str) -> bool:
    """Cached, or on the hub: one question with a short patience instead of minutes of retries."""
    import huggingface_hub
    try:
        if huggingface_hub.try_to_load_from_cache(name, "config.json") is not None:
            return True
        return bool(huggingface_hub.HfApi().model_info(name, timeout=5))
    except Exception:                          # offline, unknown, private, or not a possible name
        return False


def find_stop_ids(model, tokenizer) -> tuple[int, ...]:
    """Tokens that end a completion: eos of the tokenizer and of generation_config, and what the chat
    template writes after an assistant's turn (Qwen2.5 base: eos <|endoftext|>, template <|im_end|>).
    """
    config = model.generation_config
    stops = {tokenizer.eos_token_id}
    stops |= set(np.atleast_1d(config.eos_token_id if config and config.eos_token_id is not None else []))
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "sentinel"}]
        tail = tokenizer.apply_chat_template(turn, tokenize=False).rpartition("sentinel")[2]
        added = [i for i in tokenizer.encode(tail, add_special_tokens=False)
                 if i in tokenizer.added_tokens_decoder]
        stops |= set(added[:1])
    return tuple(sorted(int(i) for i in stops if i is not None))


# ====================================================================================== generation
#
# One sampler with a KV cache serves the generator, the receiver and the evaluation. transformers
# models call an attention function by name; ours keeps keys and values in a KVCache that it gets as
# an extra argument of the forward. Active rows are always the first n of the cache: a row that
# finishes is replaced by the last one, so no work is done for rows that are gone.


@dataclass
class Completion:
    tokens: list[int]            # with the stop token, if it was sampled
    logprobs: list[float]        # of these tokens, under the distribution they were drawn from
    finished: bool               # ended by a stop token, not by the length limit


class KVCache:
    """Keys and values of `rows` sequences of up to `length` tokens.

    One array a layer, [rows, kv_heads, length, head_dim], made when the layer first runs.
    """

    def __init__(self, rows: int, length: int):
        self.rows, self.length, self.keys, self.values = rows, length, {}, {}
        self.fill_rows = self.fill_from = self.position = self.valid = None

    def begin_prefill(self, rows: torch.Tensor, source: torch.Tensor):
        """The next forward holds whole prompts; cache row rows[i] gets the one at source[i]."""
        self.fill_rows, self.fill_from, self.position = rows, source, None

    def begin_decode(self, position: torch.Tensor, valid: int):
        """The next forward holds one token of each of the first n rows, at position [n] < valid."""
        self.position, self.valid = position, valid
        self.active = torch.arange(len(position), device=position.device)

    def store(self, layer: int, key: torch.Tensor, value: torch.Tensor):
        """Write what the forward brought; when decoding, give back all that is valid."""
        for cache, new in ((self.keys, key), (self.values, value)):       # new: [B, kv_heads, T, D]
            if layer not in cache:
                cache[layer] = new.new_zeros(self.rows, new.shape[1], self.length, new.shape[3])
            if self.position is None:
                cache[layer][self.fill_rows, :, :new.shape[2]] = new[self.fill_from]
            else:
                cache[layer][self.active, :, self.position] = new[:, :, 0]
        n = key.shape[0]
        return self.keys[layer][:n, :, :self.valid], self.values[layer][:n, :, :self.valid]

    def copy(self, target: list[int], source: list[int], valid: int):
        for cache in (*self.keys.values(), *self.values.values()):
            cache[target, :, :valid] = cache[source, :, :valid]


def cached_attention(module, query, key, value, attention_mask, scaling=None, sliding_window=None,
                     softcap=None, kv_cache=None, **kwargs):
    """Attention over a KVCache, in the calling convention of transformers' AttentionInterface.

    query [B, heads, T, D], key and value [B, kv_heads, T, D] -> [B, T, heads, D]. Either T tokens of
    prompts, padded on the right (causality hides the padding: no mask needed), or one token a row.
    """
    B, heads, T, D = query.shape
    kv_heads = key.shape[1]
    scaling = D ** -0.5 if scaling is None else scaling
    cached_key, cached_value = kv_cache.store(module.layer_idx, key, value)
    if kv_cache.position is not None:
        key, value = cached_key, cached_value                             # [B, kv_heads, valid, D]
        now = kv_cache.position[:, None, None]                            # [B, 1, 1]
    else:
        now = torch.arange(T, device=key.device)[None, :, None]           # [1, T, 1]
    if kv_cache.position is None and softcap is None and (sliding_window or T) >= T:
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling,
                                             enable_gqa=heads != kv_heads)
        return out.transpose(1, 2), None
    then = torch.arange(key.shape[2], device=key.device)                  # positions that are looked at
    hidden = then > now                                                   # [B or 1, T, length]
    if sliding_window:
        hidden |= then <= now - sliding_window
    # The query heads that share a K/V head stand side by side, so K and V are never expanded.
    query = query.reshape(B, kv_heads, heads // kv_heads * T, D)
    scores = query @ key.transpose(2, 3) * scaling                        # [B, kv_heads, groups * T, length]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    hidden = hidden.repeat(1, heads // kv_heads, 1)[:, None]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    out = weights.to(value.dtype) @ value
    return out.reshape(B, heads, T, -1).transpose(1, 2), None


AttentionInterface.register("rltr_cached", cached_attention)


@contextlib.contextmanager
def sampling_mode(model):
    """Inside: our attention, eval mode, no gradients. Afterwards everything is as it was before."""
    attention, training = model.config._attn_implementation, model.training
    model.set_attn_implementation("rltr_cached")
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.set_attn_implementation(attention)
        model.train(training)


def sample_tokens(logits: torch.Tensor, temperature: float, uniform: torch.Tensor):
    """Inverse-CDF sampling: the first token whose cumulative probability reaches u.

    logits [n, V], uniform [n] in (0, 1] -> tokens [n], log-probs [n]. As u > 0, a token of
    probability 0 is never the first to reach it. Temperature 0 is greedy, with the plain softmax.
    """
    logprobs = (logits.float() / (temperature or 1.0)).log_softmax(-1)
    if temperature == 0:
        tokens = logprobs.argmax(-1)
    else:
        cdf = logprobs.exp().cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:]).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)                    # NaN: reported by collect()
    return tokens, logprobs.gather(1, tokens[:, None]).squeeze(1)


class Sampler:
    """The rows that are being generated: a KV cache and, a row, its last token and what came out."""

    def __init__(self, model, rows, length, width, temperature, stop_ids, vocab_size):
        self.model, self.temperature, self.vocab_size = model, temperature, vocab_size
        self.n, self.ids, self.width, device = 0, [], width, model.device
        self.cache = KVCache(rows + 1, length)     # the last row keeps a prompt whose samples wait
        self.spare, self.spare_prompt = rows, None
        self.stops = torch.tensor(stop_ids, dtype=torch.long, device=device)
        integers = dict(dtype=torch.long, device=device)
        self.state = dict(
            token=torch.zeros(rows, **integers),               # the last token, not yet in the cache
            position=torch.zeros(rows, **integers),            # its position
            count=torch.zeros(rows, **integers),               # tokens sampled so far
            limit=torch.zeros(rows, **integers),               # tokens the row may have
            done=torch.zeros(rows, dtype=torch.bool, device=device),
            stopped=torch.zeros(rows, dtype=torch.bool, device=device),
            uniform=torch.zeros(rows, width, device=device),   # one random number a position
            tokens=torch.zeros(rows, width + 1, **integers),   # finished rows write to the last column
            logprobs=torch.zeros(rows, width + 1, device=device))

    def admit(self, rows: list[tuple[int, list[int], int]], uniform: np.ndarray, more: bool):
        """Take in rows (id, prompt, limit), samples of a prompt side by side: each distinct prompt is
        prefilled once, without its last token, which the first decoding step feeds. more: the next
        row in the queue has the last of these prompts too.
        """
        slots = range(self.n, self.n + len(rows))
        distinct, source = [], []                   # prompts to prefill; of each row, its prompt's place
        for (_, prompt, _), slot in zip(rows, slots):
            if prompt is self.spare_prompt:
                self.cache.copy([slot], [self.spare], len(prompt) - 1)
                source.append(None)
                continue
            if not distinct or prompt is not distinct[-1]:
                distinct.append(prompt)
            source.append(len(distinct) - 1)
        for first, prompts in self._prefill_batches(distinct):
            pairs = [(slot, s - first) for slot, s in zip(slots, source)
                     if s is not None and 0 <= s - first < len(prompts)]
            self._prefill(prompts, *zip(*pairs))
        last = rows[-1][1]
        if more and last is not self.spare_prompt:
            self.cache.copy([self.spare], [slots[-1]], len(last) - 1)
        self.spare_prompt = last if more else None
        for key, values in dict(token=[p[-1] for _, p, _ in rows], count=0, done=False, stopped=False,
                                position=[len(p) - 1 for _, p, _ in rows],
                                limit=[limit for *_, limit in rows], uniform=uniform).items():
            self.state[key][slots.start:slots.stop] = torch.as_tensor(values, device=self.model.device)
        self.n += len(rows)
        self.ids += [i for i, *_ in rows]

    @staticmethod
    def _prefill_batches(prompts, budget=8192):
        """Consecutive prompts whose padded size stays below the budget: yields (first, prompts)."""
        first = 0
        while first < len(prompts):
            end, longest = first, 0
            while end < len(prompts):
                longest = max(longest, len(prompts[end]))
                if end > first and longest * (end + 1 - first) > budget:
                    break
                end += 1
            yield first, prompts[first:end]
            first = end

    def _prefill(self, prompts, slots, source):
        device, length = self.model.device, max(map(len, prompts)) - 1
        if length == 0:
            return
        ids = torch.zeros(len(prompts), length, dtype=torch.long)
        for row, prompt in zip(ids, prompts):
            row[:len(prompt) - 1] = torch.tensor(prompt[:-1])
        self.cache.begin_prefill(torch.tensor(slots, device=device), torch.tensor(source, device=device))
        self.model.base_model(input_ids=ids.to(device), use_cache=False, kv_cache=self.cache)

    def step(self, valid: int):
        """One token for each active row; all on the device, so nothing waits for the result."""
        n, state = self.n, {key: value[:self.n] for key, value in self.state.items()}
        self.cache.begin_decode(state["position"], valid)
        logits = self.model(input_ids=state["token"][:, None], position_ids=state["position"][:, None],
                            use_cache=False, kv_cache=self.cache).logits[:, -1]
        logits[:, self.vocab_size:] = -torch.inf
        count, done, rows = state["count"], state["done"], torch.arange(n, device=logits.device)
        u = state["uniform"][rows, count.clamp(max=self.width - 1)]
        tokens, logprobs = sample_tokens(logits, self.temperature, u)
        column = torch.where(done, self.width, count)
        state["tokens"][rows, column], state["logprobs"][rows, column] = tokens, logprobs
        state["token"].copy_(tokens)
        alive = ~done
        state["count"] += alive
        state["position"] += alive                              # a finished row stays where it is
        state["stopped"] |= alive & torch.isin(tokens, self.stops)
        state["done"] |= state["stopped"] | (state["count"] >= state["limit"])

    def collect(self) -> list[tuple[int, Completion]]:
        """Take out the rows that are done; the last rows move into their places."""
        done = self.state["done"][:self.n].nonzero().flatten().tolist()
        if not done:
            return []
        finished = []
        out = [self.state[key][done].tolist() for key in ("count", "tokens", "logprobs", "stopped")]
        for slot, count, tokens, logprobs, stopped in zip(done, *out):
            finished.append((self.ids[slot], Completion(tokens[:count], logprobs[:count], stopped)))
            if not all(map(math.isfinite, logprobs[:count])):
                raise UserError(f"model {self.model.name_or_path}: its logits are not finite numbers")
        left = self.n - len(done)
        holes = [slot for slot in done if slot < left]
        movers = [slot for slot in range(left, self.n) if slot not in set(done)]
        if holes:
            self.cache.copy(holes, movers, self.cache.valid)
            for tensor in self.state.values():
                tensor[holes] = tensor[movers]
            for hole, mover in zip(holes, movers):
                self.ids[hole] = self.ids[mover]
        self.n, self.ids = left, self.ids[:left]
        return finished


def generate(model, prompts: list[list[int]], *, samples: int = 1, max_new_tokens: int | list[int],
             temperature: float = 1.0, stop_ids=(), max_rows: int | None = None,
             vocab_size: int | None = None, seed: int | tuple[int, ...] | None = None,
             first_row: int = 0, progress=None) -> list[Completion]:
    """Sample `samples` completions of each prompt with a KV cache.

    prompts: non-empty lists of token ids. Returns len(prompts) * samples completions, the samples of
    a prompt together. max_new_tokens may be one number a prompt. Temperature 0 is greedy. Tokens
    from vocab_size on are never sampled. max_rows bounds the rows in the cache at once (None: by the
    free memory); memory is max_rows times the longest prompt plus completion. Row i's random
    numbers are a function of (seed, first_row + i) alone: not of max_rows or of the other rows.
    """
    if not prompts:
        return []
    require(all(prompts), "generate: a prompt is empty")
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    require(min(limits) > 0, "generate: max_new_tokens must be at least 1")
    if seed is None:
        seed = int(torch.randint(2 ** 31, ()))
    keys = seed if isinstance(seed, tuple) else (seed,)
    longest, total = max(len(p) + m for p, m in zip(prompts, limits)), len(prompts) * samples
    rows = min(total, max_rows or affordable_rows(model, longest))
    # The longest prompts first: neighbours in the queue are of like length, so prefills pad little.
    order = sorted(range(len(prompts)), key=lambda i: -len(prompts[i]))
    queue = collections.deque((i * samples + s, prompts[i], limits[i]) for i in order
                              for s in range(samples))
    done: list[Completion | None] = [None] * total
    with sampling_mode(model):
        sampler = Sampler(model, rows, longest, max(limits), temperature, stop_ids,
                          vocab_size or model.get_output_embeddings().weight.shape[0])
        every = 8 if model.device.type == "cuda" else 1        # looking costs a synchronisation
        while queue or sampler.n:
            free = rows - sampler.n
            if queue and free >= min(len(queue), max(1, rows // 8)):    # not a prefill for each row
                new = [queue.popleft() for _ in range(min(free, len(queue)))]
                uniform = np.zeros((len(new), max(limits)), dtype=np.float32)
                for table, (row, _, limit) in zip(uniform, new):
                    table[:limit] = 1 - rng(*keys, first_row + row).random(limit)         # in (0, 1]
                sampler.admit(new, uniform, more=bool(queue) and queue[0][1] is new[-1][1])
                valid = int(sampler.state["position"][:sampler.n].max())
            for _ in range(every):
                valid = min(valid + 1, longest)
                sampler.step(valid)
            for row, completion in sampler.collect():
                done[row] = completion
                if progress is not None:
                    progress.update(1)
    return done


def affordable_rows(model, length: int) -> int:
    """Rows of `length` tokens whose keys and values take at most half of the free memory."""
    config, element = model.config.get_text_config(), next(model.parameters()).element_size()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row = 2 * config.num_hidden_layers * heads * size * element * length
    if model.device.type == "cuda":
        free = torch.cuda.mem_get_info(model.device)[0]
        free += torch.cuda.memory_reserved(model.device) - torch.cuda.memory_allocated(model.device)
        return max(1, min(512, free // 2 // row))
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1, min(256, free // 2 // row))


def check_model(lm: LM):
    """Refuse a model that our attention or our head would serve wrongly, rather than learn from it.

    Attention sinks, ALiBi, shared or latent keys, state-space layers and the like all show here: the
    logits of a few tokens, computed by the sampler and by the model itself, would differ.
    """
    model, kind = lm.model, lm.model.config.model_type
    ids = torch.arange(12, device=model.device)[None] % lm.vocab_size
    refuse = UserError(f"model type {kind}: its attention is not of the ordinary kind (or its head), "
                       "and this sampler would generate wrong tokens; choose another model")
    types = set(getattr(model.config.get_text_config(), "layer_types", None) or ["full_attention"])
    if not types <= {"full_attention", "sliding_attention"}:
        raise refuse
    was_training = model.training
    model.eval()
    with torch.no_grad():
        want = model(input_ids=ids, use_cache=False).logits[0].float()                    # [12, V]
        ours = head_logits(model, model.base_model(input_ids=ids, use_cache=False).last_hidden_state)
    model.train(was_training)
    with sampling_mode(model):
        cache, rows = KVCache(1, 12), torch.zeros(1, dtype=torch.long, device=model.device)
        try:
            cache.begin_prefill(rows, rows)
            model.base_model(input_ids=ids[:, :8], use_cache=False, kv_cache=cache)
            steps = []
            for t in range(8, 12):
                cache.begin_decode(rows + t, t + 1)
                steps.append(model(input_ids=ids[:, t:t + 1], position_ids=ids.new_tensor([[t]]),
                                   use_cache=False, kv_cache=cache).logits[0, -1].float())
        except (TypeError, AttributeError, RuntimeError, ValueError):
            raise refuse from None
    require(torch.isfinite(want).all(), f"model {model.name_or_path}: its logits are not finite numbers")
    tolerance = (1e-3 if want.dtype == model.dtype else 0.05) * (1 + want.abs().max())
    if len(cache.keys) != model.config.get_text_config().num_hidden_layers or max(
            (torch.stack(steps) - want[8:]).abs().max(), (ours[0] - want).abs().max()) > tolerance:
        raise refuse


# ======================================================================================== rollouts


@dataclass
class Cut:
    """One cut of a rollout and what the receiver made of it (steps 3-5)."""

    tau: float
    prefix_length: int              # tokens
    prefix: str
    continuation: str = ""
    continuation_length: int = 0    # tokens
    correct: bool = False
    leaked: bool = False            # the prefix holds a boxed answer already
    overflow: bool = False          # the prefix does not fit the receiver's context


@dataclass
class Rollout:
    """All there is to know about one sampled completion, from the prompt to the advantage."""

    problem: Problem
    prompt: list[int]               # token ids
    tokens: list[int]               # completion, with the stop token if sampled
    logprobs: list[float]           # under the policy that sampled it
    finished: bool
    text: str
    cuts: list[Cut] = field(default_factory=list)
    r_answer: float = 0.0
    r_transfer: float = 0.0
    r_format: float = 0.0
    reward: float = 0.0
    advantage: float = 0.0


def sample_rollouts(lm: LM, batch: list[tuple[Problem, list[int]]], config: Config,
                    step: int) -> list[Rollout]:
    """Step 1: G completions a problem, with the log-probabilities they were drawn with."""
    prompts = [prompt for _, prompt in batch]
    done = generate(lm.model, prompts, samples=config.group, max_new_tokens=config.max_new_tokens,
                    temperature=config.temperature, stop_ids=lm.stop_ids, vocab_size=lm.vocab_size,
                    max_rows=config.max_rows, seed=(config.seed, ROLLOUT, step))
    owners = [pair for pair in batch for _ in range(config.group)]
    return [Rollout(problem, prompt, c.tokens, c.logprobs, c.finished, lm.decode(c.tokens))
            for (problem, prompt), c in zip(owners, done)]


def score_answers(rollouts: list[Rollout]):
    """Step 2, and R_fmt: 1 for a rollout that stopped by itself and has a boxed answer."""
    for r in rollouts:
        r.r_answer = float(is_correct(r.text, r.problem.answer))
        r.r_format = float(r.finished and extract_answer(r.text) is not None)


def cut_prefix(tokens: list[int], tau: float, stop_ids=()) -> list[int]:
    """Step 3: the first floor(tau * |y|) tokens of y, a final stop token not counted.

    >>> cut_prefix([5, 6, 7, 8, 2], 0.5, stop_ids=(2,))
    [5, 6]
    >>> cut_prefix([5, 6, 7, 8, 2], 1.0, stop_ids=(2,)), cut_prefix([5, 6, 7, 8], 1e-9)
    ([5, 6, 7, 8], [])
    """
    length = len(tokens) - (len(tokens) > 0 and tokens[-1] in stop_ids)
    return list(tokens[:math.floor(tau * length)])


class TransferReward:
    """Steps 3-5: cut the reasoning, let the frozen receiver go on, look for the right answer.

    As a function it follows the calling convention of TRL's `reward_funcs`:
    reward(prompts, completions, answer, completion_ids=None) -> list of floats in [0, 1], the mean
    over `cuts` cuts. prompts: questions or message lists; completions: texts or message lists.
    With `tokenizer` (the generator's) and completion_ids the cut is made in the generator's tokens,
    otherwise in the receiver's. tau is drawn from (seed, number of the call).
    """

    __name__ = "transfer_reward"               # TRL names its log columns after this

    def __init__(self, receiver: LM | str, tokenizer=None, *, cuts: int = 1, temperature: float = 1.0,
                 max_new_tokens: int = 1024, margin: int = 64, prompt: str = PROMPT, seed: int = 0,
                 stop_ids=(), max_rows: int = 0, device: str | None = None):
        if isinstance(receiver, str):
            receiver = load_lm(receiver, device or Config.device)
        self.receiver, self.generator_tokenizer = receiver, tokenizer or receiver.tokenizer
        # With equal vocabularies the prefix is handed over as token ids, otherwise as text.
        self.same_tokens = (self.generator_tokenizer is receiver.tokenizer
                            or self.generator_tokenizer.get_vocab() == receiver.tokenizer.get_vocab())
        self.stop_ids = tuple(stop_ids) or (self.generator_tokenizer.eos_token_id,)
        self.n_cuts, self.temperature, self.max_rows = cuts, temperature, max_rows
        self.max_new_tokens, self.margin, self.prompt, self.seed = max_new_tokens, margin, prompt, seed
        self.calls = 0

    def __call__(self, prompts, completions, answer, completion_ids=None, **kwargs) -> list[float]:
        texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
        if completion_ids is None or self.generator_tokenizer is self.receiver.tokenizer:
            completion_ids = [self.receiver.encode_text(text) for text in texts]
        cuts = self.continue_from_cuts(prompts, completion_ids, answer, step=self.calls)
        self.calls += 1
        return [float(np.mean([cut.correct for cut in row])) for row in cuts]

    def score(self, rollouts: list[Rollout], step: int):
        """Give each rollout its cuts and R_trans."""
        cuts = self.continue_from_cuts([r.problem.question for r in rollouts],
                                       [r.tokens for r in rollouts],
                                       [r.problem.answer for r in rollouts], step=step)
        for r, r.cuts in zip(rollouts, cuts):
            r.r_transfer = float(np.mean([cut.correct for cut in r.cuts]))

    def continue_from_cuts(self, questions, completions: list[list[int]], golds: list[str], *,
                           step: int, taus=None) -> list[list[Cut]]:
        """K cuts of every completion, continued by the receiver and judged. taus [rows, K] overrides
        the random ones."""
        if taus is None:
            taus = 1 - rng(self.seed, CUT, step).random((len(completions), self.n_cuts))   # (0, 1]
        cuts, prompts, prefixes, budgets, waiting = [], [], [], [], []
        heads = {}                                        # a question is rendered once for its group
        for question, tokens, row in zip(questions, completions, taus):
            key = question if isinstance(question, str) else json.dumps(question)
            if key not in heads:
                heads[key] = self.receiver.encode_prompt(question, self.prompt)
            cuts.append([])
            for tau in row:
                ids = cut_prefix(tokens, tau, self.stop_ids)
                cut = Cut(float(tau), len(ids), self._text(ids))
                cut.leaked = extract_answer(cut.prefix) is not None
                cuts[-1].append(cut)
                prefix = ids if self.same_tokens else self.receiver.encode_text(cut.prefix)
                room = self.receiver.context - len(heads[key]) - len(prefix)
                cut.overflow = room < 1
                if not cut.overflow:
                    waiting.append((cut, len(cuts) - 1))
                    prompts.append(heads[key] + prefix)
                    prefixes.append(prefix)
                    budgets.append(max(1, min(self.max_new_tokens - len(ids) + self.margin, room)))
        done = generate(self.receiver.model, prompts, max_new_tokens=budgets, stop_ids=self.receiver.stop_ids,
                        temperature=self.temperature, vocab_size=self.receiver.vocab_size,
                        max_rows=self.max_rows, seed=(self.seed, CONTINUATION, step))
        for (cut, row), prefix, completion in zip(waiting, prefixes, done):
            # Same tokens: decode both together, as the cut may have split a character.
            whole = (self.receiver.decode(prefix + completion.tokens) if self.same_tokens
                     else cut.prefix + self.receiver.decode(completion.tokens))
            cut.continuation = whole[len(cut.prefix):]
            cut.continuation_length = len(completion.tokens)
            cut.correct = is_correct(whole, golds[row])
        return cuts

    def _text(self, ids):
        text = self.generator_tokenizer.decode(ids, skip_special_tokens=True,
                                               clean_up_tokenization_spaces=False)
        return text.rstrip("\ufffd")           # the cut may have split a character


def combine_rewards(rollouts: list[Rollout], config: Config):
    """Step 6: R = a R_ans + b R_trans + c R_fmt. To change the reward, change this line."""
    for r in rollouts:
        r.reward = (config.answer_weight * r.r_answer + config.transfer_weight * r.r_transfer
                    + config.format_weight * r.r_format)


def group_advantages(rewards, normalize_std: bool = True) -> torch.Tensor:
    """Step 7: A_i = (R_i - mean) / (std + 1e-6) within each group; rewards [P, G] -> [P, G], float64.

    std is the population's. A group whose rewards are all equal has exactly 0: rounding in the mean
    would otherwise be blown up by the tiny std.

    >>> group_advantages([[1.0, 0.0, 0.0, 1.0], [1.1, 1.1, 1.1, 1.1]]).round(decimals=3).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    centred = rewards - rewards.mean(1, keepdim=True)
    if normalize_std:
        centred = centred / (rewards.std(1, correction=0, keepdim=True) + 1e-6)
    return torch.where(is_dead(rewards)[:, None], 0.0, centred)


def assign_advantages(rollouts: list[Rollout], config: Config):
    """Step 7 on the records: the G rollouts of a problem, side by side, are a group."""
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64).view(-1, config.group)
    advantages = group_advantages(rewards, config.normalize_std).flatten().tolist()
    for r, advantage in zip(rollouts, advantages):
        r.advantage = advantage


def is_dead(rewards: torch.Tensor) -> torch.Tensor:
    """Groups [P, G] whose rewards are all equal hold no information: [P]."""
    return rewards.max(1).values == rewards.min(1).values


# ========================================================================================== update


def head_logits(model, hidden: torch.Tensor) -> torch.Tensor:
    """Logits [N, V] in fp32 from the last hidden states [N, E], as the model's own forward makes them
    (soft-capped in Gemma, scaled in Cohere and Granite; check_model compares with the model)."""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(hidden).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


def completion_logprobs(lm: LM, rollouts: list[Rollout], temperature: float = 1.0,
                        chunk: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probabilities and entropies of the completion tokens under the current policy.

    Returns two [N] tensors, the completions end to end. Rows are padded on the right, where causality
    makes a mask needless. The vocabulary logits are made for `chunk` tokens at a time and again in
    the backward pass, so [rows, time, vocabulary] never exists (2**27 numbers a chunk by default).
    """
    device = lm.model.device
    ids = torch.zeros(len(rollouts), max(len(r.prompt) + len(r.tokens) for r in rollouts) - 1,
                      dtype=torch.long)
    row, column, targets = [], [], []
    for i, r in enumerate(rollouts):
        ids[i, :len(r.prompt) + len(r.tokens) - 1] = torch.tensor((r.prompt + r.tokens)[:-1])
        row += [i] * len(r.tokens)                          # the token before y_t predicts y_t
        column += range(len(r.prompt) - 1, len(r.prompt) + len(r.tokens) - 1)
        targets += r.tokens
    hidden = lm.model.base_model(input_ids=ids.to(device), use_cache=False).last_hidden_state
    hidden = hidden[torch.tensor(row, device=device), torch.tensor(column, device=device)]      # [N, E]
    targets = torch.tensor(targets, device=device)

    def logprob(hidden, targets):
        logits = head_logits(lm.model, hidden)[:, :lm.vocab_size] / (temperature or 1.0)
        logp = logits.log_softmax(-1)
        entropy = -(logp.detach().exp() * logp.detach()).sum(-1)
        return logp.gather(1, targets[:, None]).squeeze(1), entropy

    chunk = chunk or max(1, 2 ** 27 // lm.vocab_size)
    parts = [checkpoint(logprob, hidden[i:i + chunk], targets[i:i + chunk], use_reentrant=False)
             for i in range(0, len(targets), chunk)]
    logp, entropy = (torch.cat(column) for column in zip(*parts))
    return logp, entropy


def policy_objective(logp, old_logp, advantage, clip_low, clip_high) -> torch.Tensor:
    """Step 8, a token: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A), rho = pi / pi_sampling.

    All of shape [N]. The value is ~0 over a batch at the start, as advantages have mean 0: watch the
    rewards, not the loss.
    """
    rho = torch.exp(logp - old_logp)
    return torch.minimum(rho * advantage, rho.clamp(1 - clip_low, 1 + clip_high) * advantage)


def micro_batches(rollouts: list[Rollout], budget: int) -> list[list[Rollout]]:
    """Rows of like length together, rows x longest <= budget; the longest first, so that memory runs
    out at once or never."""
    batches, width = [], 0
    for r in sorted(rollouts, key=lambda r: -len(r.prompt) - len(r.tokens)):
        if not batches or (len(batches[-1]) + 1) * width > budget:
            batches.append([])
            width = len(r.prompt) + len(r.tokens)
        batches[-1].append(r)
    return batches


def update(lm: LM, optimizer: MasterAdamW, rollouts: list[Rollout], config: Config) -> dict:
    """Step 8: one ascent step on the token mean over all groups that are not dead; returns metrics."""
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64).view(-1, config.group)
    dead = is_dead(rewards).repeat_interleave(config.group).tolist()
    live = [r for r, d in zip(rollouts, dead) if not d]
    if not live:                                            # nothing to learn from this batch
        return {"updated": 0}
    total = sum(len(r.tokens) for r in live)                # T: one divisor whatever the micro-batches
    lm.model.train()
    objective, entropy, gaps = 0.0, 0.0, []
    for batch in micro_batches(live, config.token_budget):
        logp, token_entropy = completion_logprobs(lm, batch, config.temperature)
        old = torch.tensor([x for r in batch for x in r.logprobs], device=logp.device)
        advantage = torch.tensor([r.advantage for r in batch for _ in r.tokens],
                                 dtype=logp.dtype, device=logp.device)
        gain = policy_objective(logp, old, advantage, config.clip_low, config.clip_high).sum() / total
        (-gain).backward()
        objective += gain.item()
        entropy += token_entropy.sum().item() / total
        gaps.append((logp.detach() - old).abs())
    lm.model.eval()
    norm = optimizer.step(config.max_grad_norm)
    gaps = torch.cat(gaps)
    return {"updated": 1, "objective": objective, "entropy": entropy, "grad_norm": norm,
            "logprob_gap_mean": gaps.mean().item(), "logprob_gap_max": gaps.max().item()}


class MasterAdamW:
    """AdamW on fp32 master copies of the weights. (With fp32 models: plain AdamW; deletable.)

    A bf16 number has 8 bits: a step of 1e-6 on a weight of 1e-2 rounds to nothing. So the steps are
    made in fp32 and the model gets the rounded result; gradients of micro-batches add up in fp32.
    """

    def __init__(self, model, lr: float, weight_decay: float = 0.0):
        self.weights = [p for p in model.parameters() if p.requires_grad]
        self.masters = [p if p.dtype == torch.float32 else p.detach().float() for p in self.weights]
        self.adam = torch.optim.AdamW(self.masters, lr=lr, betas=(0.9, 0.99), weight_decay=weight_decay)
        for p, master in zip(self.weights, self.masters):
            if p is not master:
                p.register_post_accumulate_grad_hook(lambda p, m=master: self._add_gradient(p, m))

    @staticmethod
    def _add_gradient(p, master):
        master.grad = p.grad.float() if master.grad is None else master.grad.add_(p.grad)
        p.grad = None

    def step(self, max_norm: float) -> float:
        """Clip, step, clear; returns the gradient norm. A gradient that is not finite is dropped."""
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if math.isfinite(norm):
            self.adam.step()
            with torch.no_grad():
                for p, master in zip(self.weights, self.masters):
                    if p is not master:
                        p.copy_(master)
        self.adam.zero_grad(set_to_none=True)
        return norm

    def set_lr(self, lr: float):
        for group in self.adam.param_groups:
            group["lr"] = lr

    def state_dict(self) -> dict:
        copies = [m for p, m in zip(self.weights, self.masters) if p is not m]
        return {"adam": self.adam.state_dict(), "masters": copies}

    def load_state_dict(self, state: dict):
        self.adam.load_state_dict(state["adam"])
        copies = iter(state["masters"])
        with torch.no_grad():
            for p, master in zip(self.weights, self.masters):
                if p is not master:
                    master.copy_(next(copies))


# =================================================================================== a run on disk


def write_folder(folder: Path, write):
    """Make a folder complete or not at all: write(temporary folder), then rename."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    write(partial)
    shutil.rmtree(folder, ignore_errors=True)
    partial.rename(folder)


class Run:
    """runs/NAME: config.json, metrics.jsonl, rollouts.jsonl, checkpoints/step-000100/, final/."""

    def __init__(self, config: Config, resume: bool):
        self.folder, self.keep = Path(config.out), config.keep
        self.metrics, self.rollouts = self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"
        self.checkpoint, self.start = None, 0
        if resume:
            saved = sorted((self.folder / "checkpoints").glob("step-" + "[0-9]" * 6))
            if saved:
                self.checkpoint, self.start = saved[-1], int(saved[-1].name[5:])
            for log in (self.metrics, self.rollouts):      # forget what came after the checkpoint
                lines = log.read_text(encoding="utf-8").splitlines(True) if log.exists() else []
                lines = [s for s in lines if s.endswith("\n") and json.loads(s)["step"] <= self.start]
                log.write_text("".join(lines), encoding="utf-8")
        else:
            require(not self.folder.exists() or not any(self.folder.iterdir()),
                    f"{self.folder}: exists already; choose another --out, or --resume {self.folder}")
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / "config.json").write_text(json.dumps(dataclasses.asdict(config), indent=1))

    def log(self, metrics: dict, rollouts: list[Rollout], group: int):
        """One line a step, and the step's first group to read."""
        with self.metrics.open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        with self.rollouts.open("a", encoding="utf-8") as file:
            for r in rollouts[:group]:
                file.write(json.dumps({"step": metrics["step"], **dataclasses.asdict(r)}) + "\n")

    def save(self, lm: LM, optimizer: MasterAdamW, step: int):
        def write(folder):
            save_lm(lm, folder)
            torch.save(optimizer.state_dict(), folder / "optimizer.pt")
        write_folder(self.folder / "checkpoints" / f"step-{step:06d}", write)
        for old in sorted((self.folder / "checkpoints").glob("step-" + "[0-9]" * 6))[:-self.keep]:
            shutil.rmtree(old)


def save_lm(lm: LM, folder: Path):
    """An ordinary transformers folder, weights as safetensors."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


# ======================================================================================== training


def train(config: Config, resume: bool = False) -> Path:
    """Run RLTR (or RLVR: transfer_weight 0) and return the folder of the trained model."""
    check_config(config)
    problems = load_problems(config.data, config.split or None, config.limit)
    lm, transfer = load_models(config)
    tasks = encode_problems(lm, problems, config)
    run = Run(config, resume)
    if run.checkpoint:
        lm.model = load_lm(str(run.checkpoint), config.device).model
    if config.gradient_checkpointing:
        lm.model.gradient_checkpointing_enable()
    optimizer = MasterAdamW(lm.model, config.lr, config.weight_decay)
    if run.checkpoint:
        optimizer.load_state_dict(torch.load(run.checkpoint / "optimizer.pt", weights_only=True))

    bar = tqdm(range(run.start, config.steps), initial=run.start, total=config.steps, unit="step")
    for step in bar:
        clock = Clock()
        batch = draw_problems(tasks, config.prompts, config.seed, step)
        rollouts = sample_rollouts(lm, batch, config, step)                               # 1
        clock.lap("sample")
        score_answers(rollouts)                                                           # 2
        if transfer:
            transfer.score(rollouts, step)                                                # 3, 4, 5
        clock.lap("transfer")
        combine_rewards(rollouts, config)                                                 # 6
        assign_advantages(rollouts, config)                                               # 7
        optimizer.set_lr(config.lr * min(1.0, (step + 1) / max(1, config.warmup)))
        learned = update(lm, optimizer, rollouts, config)                                 # 8
        clock.lap("update")

        metrics = {"step": step + 1, **summarize(rollouts, config.group), **learned,
                   **clock.metrics(rollouts)}
        run.log(metrics, rollouts, config.group)
        report(bar, metrics, rollouts, config)
        if step + 1 == config.steps or (config.save_every and (step + 1) % config.save_every == 0):
            run.save(lm, optimizer, step + 1)
    write_folder(run.folder / "final", lambda folder: save_lm(lm, folder))
    return run.folder / "final"


def check_config(c: Config):
    """Everything about the numbers that can be known before anything is loaded."""
    require(c.group >= 2, f"--group {c.group}: a group needs at least 2 rollouts to compare")
    for name in ("steps", "prompts", "max_new_tokens", "cuts", "token_budget", "keep", "eval_k"):
        require(getattr(c, name) >= 1, f"--{name.replace('_', '-')} {getattr(c, name)}: must be at least 1")
    for name in ("answer_weight", "transfer_weight", "format_weight", "receiver_temperature", "lr",
                 "receiver_margin", "weight_decay", "warmup", "seed", "limit", "max_rows", "clip_low",
                 "clip_high", "save_every", "show_every"):
        require(0 <= getattr(c, name) < math.inf,
                f"--{name.replace('_', '-')} {getattr(c, name)}: must be a number of at least 0")
    require(0 < c.temperature < math.inf, f"--temperature {c.temperature}: training needs one above 0")
    require(c.max_grad_norm > 0, f"--max-grad-norm {c.max_grad_norm}: must be above 0")
    require(c.answer_weight + c.transfer_weight + c.format_weight > 0, "all reward weights are 0")
    require("{question}" in c.prompt, "--prompt: must contain {question}")
    require(c.device == "cpu" or torch.cuda.is_available(), f"--device {c.device}: no such device here")


def load_models(config: Config) -> tuple[LM, TransferReward | None]:
    """The generator and, unless transfer_weight is 0, the transfer reward with its frozen receiver."""
    lm = load_lm(config.model, config.device)
    if config.transfer_weight == 0:
        return lm, None
    receiver = load_lm(config.model if config.receiver == "self" else config.receiver, config.device)
    receiver.model.requires_grad_(False)
    return lm, TransferReward(
        receiver, lm.tokenizer, cuts=config.cuts, temperature=config.receiver_temperature,
        max_new_tokens=config.max_new_tokens, margin=config.receiver_margin, prompt=config.prompt,
        seed=config.seed, stop_ids=lm.stop_ids, max_rows=config.max_rows)


def encode_problems(lm: LM, problems: list[Problem], config: Config) -> list[tuple[Problem, list[int]]]:
    """Problems with their prompts; those that do not fit the context are left out, and counted."""
    tasks = [(p, lm.encode_prompt(p.question, config.prompt)) for p in problems]
    fitting = [(p, ids) for p, ids in tasks if len(ids) + config.max_new_tokens <= lm.context]
    require(fitting, f"--max-new-tokens {config.max_new_tokens}: with the prompt this is more than the "
                     f"{lm.context} tokens that {config.model} can read")
    if len(fitting) < len(tasks):
        print(f"{len(tasks) - len(fitting)} of {len(tasks)} problems left out: too long for the model")
    return fitting


# ======================================================================================= reporting


class Clock:
    """Seconds of the phases of a step."""

    def __init__(self):
        self.laps, self.last = {}, time.perf_counter()

    def lap(self, name: str):
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.laps[name], self.last = now - self.last, now

    def metrics(self, rollouts: list[Rollout]) -> dict:
        """Seconds and tokens/s of each phase, and peak memory in GiB."""
        sampled = sum(len(r.tokens) for r in rollouts)
        continued = sum(cut.continuation_length for r in rollouts for cut in r.cuts)
        tokens = {"sample": sampled, "transfer": continued, "update": sampled}
        out = {f"seconds_{name}": round(s, 3) for name, s in self.laps.items()}
        out |= {f"tokens_per_s_{name}": round(tokens[name] / s, 1) for name, s in self.laps.items()}
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        else:
            import resource
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        return out | {"peak_memory_gib": round(peak / 2 ** 30, 3)}


def summarize(rollouts: list[Rollout], group: int) -> dict:
    """The metrics of a batch; the README explains each."""
    cuts = [cut for r in rollouts for cut in r.cuts]
    groups = [rollouts[i:i + group] for i in range(0, len(rollouts), group)]
    votes = [majority_vote([extract_answer(r.text) for r in g]) for g in groups]
    rewards = torch.tensor([r.reward for r in rollouts], dtype=torch.float64).view(-1, group)
    mean = lambda values: float(np.mean(values)) if len(values) else None       # noqa: E731
    out = {"reward": mean([r.reward for r in rollouts]),
           "accuracy": mean([r.r_answer for r in rollouts]),
           "majority": mean([vote is not None and answers_equal(vote, g[0].problem.answer)
                             for vote, g in zip(votes, groups)]),
           "format": mean([r.r_format for r in rollouts]),
           "finished": mean([r.finished for r in rollouts]),
           "length": mean([len(r.tokens) for r in rollouts]),
           "dead_groups": mean(is_dead(rewards).tolist())}
    if cuts:
        out |= {"transfer": mean([r.r_transfer for r in rollouts]),
                "leak": mean([c.leaked for c in cuts]), "overflow": mean([c.overflow for c in cuts])}
        for low in (0.0, 0.25, 0.5, 0.75):
            inside = [c.correct for c in cuts if low < c.tau <= low + 0.25]
            out[f"transfer_tau_{low:.2f}_{low + 0.25:.2f}"] = mean(inside)
    return out


def report(bar, metrics: dict, rollouts: list[Rollout], config: Config):
    """The numbers that matter on the progress bar; now and then a group to read."""
    step, seconds = metrics["step"], sum(v for k, v in metrics.items() if k.startswith("seconds_"))
    show = {"reward": metrics["reward"], "acc": metrics["accuracy"], "transfer": metrics.get("transfer"),
            "len": metrics["length"], "tok/s": metrics["tokens_per_s_sample"]}
    bar.set_postfix({k: f"{v:.3g}" for k, v in show.items() if v is not None})
    if step == bar.initial + 1:
        left = seconds * (config.steps - step) / 60
        bar.write(f"{config.out}: a step takes {seconds:.1f} s, {config.steps - step} more about {left:.1f} min")
    if config.show_every and step % config.show_every == 0:
        bar.write(show_group(rollouts, config))


def printable(text: str) -> str:
    """Model text for a terminal: control characters spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def show_group(rollouts: list[Rollout], config: Config) -> str:
    """One group as text: the problem, a rollout with its cut, the continuation, all the rewards."""
    groups = [rollouts[i:i + config.group] for i in range(0, len(rollouts), config.group)]
    group = next((g for g in groups if any(r.advantage for r in g)), groups[0])
    r = group[0]
    lines = [f"--- problem (answer {r.problem.answer}): {r.problem.question}"]
    if r.cuts:
        cut = r.cuts[0]
        lines += [f"--- rollout, cut at tau = {cut.tau:.2f}: {cut.prefix} >>|<< {r.text[len(cut.prefix):]}",
                  f"--- receiver goes on ({'right' if cut.correct else 'wrong'}): {cut.continuation}"]
    else:
        lines += [f"--- rollout: {r.text}"]
    lines += [f"    answer {x.r_answer:.0f}  transfer {x.r_transfer:.2f}  format {x.r_format:.0f}"
              f"  reward {x.reward:.2f}  advantage {x.advantage:+.2f}" for x in group]
    return printable("\n".join(lines))


def closing_table(config: Config, final: Path):
    """Accuracy, Maj@k and transfer accuracy of the generator before and after, on eval_data."""
    from eval import evaluate
    taus = (0.3, 0.5, 0.7)
    problems, rows = load_problems(config.eval_data), {}
    receiver = load_lm(config.model if config.receiver == "self" else config.receiver, config.device)
    for name, model in (("before", config.model), ("after", str(final))):
        result = evaluate(load_lm(model, config.device), problems, k=config.eval_k, prompt=config.prompt,
                          max_new_tokens=config.max_new_tokens, temperature=config.temperature,
                          receiver=receiver, taus=taus, margin=config.receiver_margin,
                          receiver_temperature=config.receiver_temperature,
                          seed=config.seed, max_rows=config.max_rows, label=name)
        rows[name] = [result["accuracy"], result["maj"][str(config.eval_k)],
                      *(result["transfer"][str(tau)]["accuracy"] for tau in taus)]
    heads = ["accuracy", f"Maj@{config.eval_k}", *(f"transfer {tau}" for tau in taus)]
    print(f"\n{len(problems)} held-out problems, {config.eval_k} completions each")
    print(" " * 8 + "".join(f"{head:>14}" for head in heads))
    for name, values in rows.items():
        print(f"{name:<8}" + "".join(f"{value:>14.3f}" for value in values))
    table = {name: dict(zip(heads, values)) for name, values in rows.items()}
    (Path(config.out) / "evaluation.json").write_text(json.dumps(table, indent=1))


# ================================================================================== the tiny default
#
# `python rltr.py` makes two tiny models and a task in the cache folder, once a seed; from there on
# they are models and data like any other. A problem is a chain of five operations modulo 7, and the
# answer only whether the result is odd: guessing pays half the time, so a right answer says little
# about the reasoning. The generator learnt from flawed demonstrations, the receiver from clean ones.

OPERATIONS = {"+": lambda a, b: a + b, "-": lambda a, b: a - b, "*": lambda a, b: a * b}
MISCONCEPTIONS = {"+": lambda a, b: a + b + 1, "-": lambda a, b: b - a, "*": lambda a, b: a + b}
FLAWED = 0.30                      # share of flawed steps in the generator's demonstrations


def tiny_problem(random: random.Random, flawed: float = 0.0) -> tuple[str, str, str]:
    """question, demonstration (each step wrong with probability `flawed`), right answer.

    >>> tiny_problem(random.Random(1))
    """
    start = value = truth = random.randrange(7)
    question, chain = f"Q{start}", ""
    for _ in range(5):
        operator, operand = random.choice("+-*"), random.randrange(7)
        question += f">{operator}{operand};"
        rules = MISCONCEPTIONS if random.random() < flawed else OPERATIONS
        value = rules[operator](value, operand) % 7
        truth = OPERATIONS[operator](truth, operand) % 7
        chain += f"{operator}{operand}={value}"
    return question + "?", f"{chain}\\boxed{{{value % 2}}}", str(truth % 2)


def tiny_tokenizer():
    """One token a character, and \\boxed{ as one."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    words = ["<pad>", "<eos>", "<unk>", "\\boxed{", *"}Q?>;=+-*0123456"]
    core = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"\\boxed\{|."), "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>",
        chat_template="{% for m in messages %}{{ m['content'] }}{% endfor %}")


def warm_start(name: str, width: int, steps: int, flawed: float, seed: int, folder: Path):
    """A small Qwen2, trained on demonstrations by next-token prediction, as a model folder."""
    from transformers import Qwen2Config, Qwen2ForCausalLM
    torch.manual_seed(seed)
    tokenizer, source = tiny_tokenizer(), random.Random(seed)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=len(tokenizer), hidden_size=width, intermediate_size=4 * width, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=4, max_position_embeddings=128, rope_theta=100.0,
        initializer_range=0.08, eos_token_id=1, pad_token_id=0, bos_token_id=None))
    adam = torch.optim.AdamW(model.parameters(), lr=4e-3)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(adam, steps)
    for _ in tqdm(range(steps), desc=f"warm start of the {name}"):
        texts = [q + demo for q, demo, _ in (tiny_problem(source, flawed) for _ in range(32))]
        ids = torch.tensor(tokenizer(texts)["input_ids"])
        ids = F.pad(ids, (0, 1), value=tokenizer.eos_token_id)                    # all of one length
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        adam.step()
        schedule.step()
        adam.zero_grad()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def make_tiny(seed: int) -> Path:
    """The folder with generator/, receiver/, train.jsonl and test.jsonl; made when first asked for."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    folder = cache / "rltr" / f"tiny-1-seed{seed}"

    def write(partial):
        source, seen = random.Random(f"problems {seed}"), set()
        for file, count in (("test.jsonl", 100), ("train.jsonl", 4096)):
            with (partial / file).open("w") as out:
                while count:
                    question, _, answer = tiny_problem(source)
                    if question not in seen:
                        seen.add(question)
                        count -= 1
                        out.write(json.dumps({"question": question, "answer": answer}) + "\n")
        warm_start("generator", 64, 400, FLAWED, 2 * seed, partial / "generator")
        warm_start("receiver", 80, 600, 0.0, 2 * seed + 1, partial / "receiver")

    if not folder.exists():
        write_folder(folder, write)
    return folder


# ==================================================================================== command line


def parse_arguments(argv: list[str] | None) -> tuple[Config, bool]:
    """The Config and whether to resume. Order: defaults < TINY (no --model) < config.json < flags."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    for f in dataclasses.fields(Config):
        flag = "--" + f.name.replace("_", "-")
        kind = dict(action=argparse.BooleanOptionalAction) if isinstance(f.default, bool) else dict(
            type=type(f.default), metavar=type(f.default).__name__)
        parser.add_argument(flag, default=argparse.SUPPRESS,
                            help=f"{f.metadata['help']} (default: {f.default})".replace("%", "%%"), **kind)
    parser.add_argument("--resume", nargs="?", const="", metavar="FOLDER", default=argparse.SUPPRESS,
                        help="go on with the run in FOLDER (or in --out)")
    given = vars(parser.parse_args(argv))
    if "resume" in given:
        return resumed_config(given), True
    config = Config(**({} if given.get("model") else TINY) | given)
    if not config.out:
        kind = "rltr" if config.transfer_weight else "rlvr"
        name = Path("runs") / f"{Path(config.model).name}-{kind}-seed{config.seed}"
        names = [name, *(Path(f"{name}-{i}") for i in range(2, 10000))]
        config.out = str(next(path for path in names if not path.exists()))
    return config, False


def resumed_config(given: dict) -> Config:
    """The configuration of an earlier run; only what cannot change its course may differ."""
    folder = Path(given.pop("resume") or given.get("out", ""))
    try:
        saved = json.loads((folder / "config.json").read_text())
        config = Config(**saved)
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--resume {folder}: no run to resume there ({error})") from None
    changed = [k for k, v in given.items() if saved[k] != v and k not in HARMLESS]
    require(not changed, f"--resume {folder}: it ran with other values of {', '.join(changed)}; "
                         "leave these away, or start a new run")
    return dataclasses.replace(config, **given, out=str(folder))


def main(argv: list[str] | None = None) -> int:
    try:
        config, resume = parse_arguments(argv)
        check_config(config)
        folder = str(make_tiny(config.seed)) if any(
            v.startswith("tiny/") for v in vars(config).values() if isinstance(v, str)) else ""
        for name in ("model", "receiver", "data", "eval_data"):
            value = getattr(config, name)
            if value.startswith("tiny/"):
                setattr(config, name, folder + value[4:])
        final = train(config, resume)
        print(f"trained model: {final}")
        if config.eval_data:
            closing_table(config, final)
        return 0
    except UserError as error:
        print(f"rltr: {printable(str(error))}".replace("\n", " "), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.modules["rltr"] = sys.modules["__main__"]      # eval.py imports rltr: let it get this one
    sys.exit(main())
