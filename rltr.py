"""RLTR, Reinforcement Learning with Transferable Reward, in one file.

Paper: "Beyond Correctness: Learning Robust Reasoning via Transfer" (Lee, Abbasloo, Tack, Shin;
arXiv 2602.08489). A generator learns to reason so that *another* model can pick its reasoning up
half-way and still reach the right answer: each rollout is cut at a random point, a frozen receiver
continues from there, and the share of right endings is a reward beside the usual one.

Start reading at `train`. Its loop is these eight steps, each in the function named here; they stand
in the first third of the file. What they are made of stands below and may be skipped.

    1  y_1..y_G ~ pi(. | x)                       G rollouts of a problem       sample_rollouts
    2  R_ans = 1[answer(y) = g]                   is the final answer right?    score_answers
    3  tau ~ U(0,1], prefix = y[:floor(tau |y|)]  cut the reasoning, K times    cut_rollouts
    4  z ~ M(. | x, prefix)                       the receiver goes on          continue_cuts
    5  R_trans = mean_K 1[answer(prefix+z) = g]   was it transferable?          score_transfer
    6  R = a R_ans + b R_trans + c R_fmt          b = 0 is RLVR                 combine_rewards
    7  A = (R - mean_group) / (std_group + eps)   against its own group         assign_advantages
    8  ascend 1/T sum min(rho A, clip(rho) A)     policy gradient (GRPO)        update

x is a problem, g its right answer, pi the generator, M the receiver, |y| the number of y's tokens
without its stop token. R_fmt: y stopped by itself and has an answer, in a box. rho = pi /
pi_sampling of a token, T the number of tokens that the sum runs over.

From the paper: steps 1-7 with K = 1, R = a R_ans + b R_trans + R_fmt (format with weight 1), then
GRPO; one frozen receiver, tau uniform with floor, binary rewards. We do not know its a, b, models,
learning rate, group size and receiver decoding. Ours, each of them a flag or one function:
  1. a = b = 1, and c = 0.1 where the paper has 1; models, lr and sizes as in `Config`.
  2. The receiver samples at temperature 1. It may write as many tokens as the generator had left
     of --max-new-tokens, plus a margin of 64; a prefix that is too long for its context scores 0.
  3. The loss is one token mean over the rollouts of an optimizer step, clipped at 0.8 and 1.28,
     with no KL penalty. AdamW has betas (0.9, 0.99) and no weight decay; linear warm-up, then a
     constant lr.
  4. Groups whose rewards are all equal hold no information: they leave the update and T.
  5. `--cuts K` averages K independent cuts and continuations: a denser, dearer R_trans.
  6. The stop token is stripped before the cut: with it the receiver's turn would end at tau = 1.
  7. The answer is looked for in prefix and continuation together, as in a text of one author. So a
     prefix that holds an answer already earns what that answer is worth, unless the receiver gives
     another. Such cuts are counted as `leak`; `transfer_unleaked` is the transfer of the others.

    python rltr.py                                    # built-in tiny models: any laptop, no network
    python rltr.py --transfer-weight 0                # the same task with the answer reward alone
    python rltr.py --model Qwen2.5-1.5B --steps 500   # one GPU: MATH, receiver its -Instruct model
    python rltr.py --resume runs/NAME                 # goes on where that run stopped
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17", "datasets>=3.0", "numpy>=1.26", "tqdm>=4.66"]
# ///

from __future__ import annotations

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib
import json
import math
import os
import random
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
import warnings
from dataclasses import dataclass, field
from operator import add, mul, sub, truediv
from pathlib import Path

import filelock
import huggingface_hub
import mpmath
import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer

# ======================================================================================= settings
# Each field of Config is a setting: its name, default and help text are the command line, too.

PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."


def option(default, help_text: str, low: float | None = None, high: float = 1e9):
    """A field of Config. Numbers must lie in [low, high]."""
    return field(default=default, metadata={"help": help_text, "low": low, "high": high})


@dataclass
class Config:
    """All settings of a run, in one flat record."""

    model: str = option("", "generator: a folder or hub name; empty: the built-in tiny task")
    receiver: str = option("Qwen2.5-1.5B-Instruct", "frozen receiver: folder, hub name, or self")
    data: str = option("math", "gsm8k, math, math500, aime24, amc23, a hub id, or a local file")
    split: str = option("", "split of a hub data set; empty: its training split")
    limit: int = option(0, "use only the first N problems (0: all)", 0)
    prompt: str = option(PROMPT, "what the models are asked, with {question} in it")
    out: str = option("", "run folder; empty: a free name like runs/MODEL-rltr-seed0")
    # -- the algorithm
    steps: int = option(500, "policy-gradient steps", 1)
    prompts: int = option(32, "problems a step", 1, 1e6)
    group: int = option(8, "G: rollouts a problem", 2, 1e6)
    max_new_tokens: int = option(1024, "longest completion in tokens", 1)
    temperature: float = option(1.0, "sampling temperature; the loss uses the same", 0.01, 100)
    answer_weight: float = option(1.0, "a: weight of the right final answer", 0, 1e6)
    transfer_weight: float = option(1.0, "b: weight of the transfer reward; 0 is RLVR", 0, 1e6)
    format_weight: float = option(0.1, "c: weight of stopping by itself with an answer", 0, 1e6)
    cuts: int = option(1, "K: cuts a rollout, each with its own tau and continuation", 1, 1000)
    receiver_temperature: float = option(1.0, "temperature of the receiver (0: greedy)", 0, 100)
    receiver_margin: int = option(64, "receiver tokens beyond what the generator had left", 0)
    normalize_std: bool = option(True, "divide advantages by the group's standard deviation")
    clip_low: float = option(0.2, "the ratio is clipped at 1 - this", 0, 1)
    clip_high: float = option(0.28, "the ratio is clipped at 1 + this", 0)
    # -- the optimizer
    lr: float = option(2e-6, "learning rate of the fp32 master weights", 0, 1)
    warmup: int = option(10, "steps of linear warm-up; constant afterwards", 0)
    weight_decay: float = option(0.0, "AdamW weight decay", 0, 1)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", 1e-6)
    epochs: int = option(1, "passes over a batch; 1 with 1 minibatch is on-policy", 1, 1000)
    minibatches: int = option(1, "optimizer steps a pass", 1, 1000)
    # -- memory: none of these changes what is computed, but for rounding
    token_budget: int = option(0, "padded tokens in a micro-batch (0: at most 32768)", 0)
    max_rows: int = option(0, "rows in the KV cache at once (0: what fits the memory)", 0)
    gradient_checkpointing: bool = option(False, "recompute activations: slower, less memory")
    offload: bool = option(False, "master weights and Adam's moments in host memory")
    # -- the run
    seed: int = option(0, "seed of everything random", 0, 2**62)
    save_every: int = option(50, "steps between checkpoints (0: only at the end)", 0)
    keep: int = option(2, "checkpoints to keep", 1)
    show_every: int = option(25, "steps between groups shown to read (0: never)", 0)
    track: str = option("", "log the metrics with this package, too: wandb or trackio")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps")
    eval_data: str = option("", "problems for a closing before/after table (empty: no table)")
    eval_k: int = option(64, "completions a problem in that table", 1, 1e6)


# The built-in task, which needs no network: with no --model these replace the fields that the user
# did not set. tiny/make.py made its two models and its problems.
TINY_FOLDER = Path(__file__).parent / "tiny"
TINY = {
    "model": str(TINY_FOLDER / "generator"),
    "receiver": str(TINY_FOLDER / "receiver"),
    "data": str(TINY_FOLDER / "train.jsonl"),
    "eval_data": str(TINY_FOLDER / "test.jsonl"),
    "prompt": "{question}",
    "max_new_tokens": 32,
    "receiver_margin": 4,
    "steps": 150,
    "lr": 5e-4,
    "device": "cpu",
}

# What random numbers are drawn for. rng(seed, purpose, step, ...) is a function of its keys alone:
# streams do not disturb each other, and a resumed run has no generator state to restore.
DATA, ROLLOUT, CUT, CONTINUATION, EVALUATION = range(1, 6)


def rng(*keys: int) -> np.random.Generator:
    return np.random.default_rng(keys)


class UserError(Exception):
    """Something the user can put right: main prints it as one line and exits with 2."""


def require(condition, message: str):
    if not condition:
        raise UserError(message)


# ======================================================================================== records
# One Rollout carries everything that is known of a completion, from the prompt to the advantage.
# The steps below fill it in, field by field. A batch is a flat list of rollouts: the G of the first
# problem, the G of the second, ...


@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the bare gold answer: "18", "\\frac{3}{4}"


@dataclass
class LM:
    """A causal language model with what is needed to talk to it (see `load_lm`)."""

    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]  # tokens that end a completion
    vocab_size: int  # rows of the vocabulary that the tokenizer knows
    context: int  # longest sequence in tokens


@dataclass
class Completion:
    """What `generate` returns for a prompt."""

    tokens: list[int]  # with the stop token, if it was sampled
    logprobs: list[float]  # of these tokens, under the distribution they were drawn from
    finished: bool  # ended by a stop token, not by the length limit


@dataclass
class Cut:
    """One cut of a rollout and what the receiver made of it (steps 3-5)."""

    tau: float
    prefix_length: int  # tokens of the generator
    prefix: str
    leaked: bool  # the prefix holds an answer already
    overflow: bool = False  # the prefix did not fit the receiver's context
    continuation: str = ""
    continuation_length: int = 0  # tokens of the receiver
    correct: bool = False


@dataclass
class Rollout:
    """One sampled completion of a problem."""

    problem: Problem
    prompt: list[int]  # token ids
    tokens: list[int]  # completion, with the stop token if sampled
    logprobs: list[float]  # under the policy that sampled them: pi_sampling in step 8
    finished: bool
    text: str
    verdict: str = ""  # on the answer: right, wrong, missing, or unparsed (wrong, too)
    cuts: list[Cut] = field(default_factory=list)
    rewards: dict[str, float] = field(default_factory=dict)  # the raw ones, by name
    reward: float = 0.0  # their weighted sum
    advantage: float = 0.0


def grouped(rollouts: list[Rollout], group: int) -> list[list[Rollout]]:
    """The rollouts of a batch, problem by problem."""
    return [rollouts[i : i + group] for i in range(0, len(rollouts), group)]


# ======================================================================================= training
# The algorithm. `train` is what to read first; the steps follow it in their order.


def train(config: Config, resume: bool = False) -> Path:
    """Run RLTR, or RLVR where transfer_weight is 0; returns the folder of the trained model."""
    config = resolve(config)
    with claimed(Path(config.out)), Run(config, resume) as run:
        generator, receiver, tasks = load_everything(config, run.checkpoint)
        optimizer = MasterAdamW(generator.model, config.lr, config.weight_decay, config.offload)
        run.begin(optimizer)
        if generator.model.device.type == "cuda":
            budget = find_token_budget(generator, optimizer, tasks, config)
            config = dataclasses.replace(config, token_budget=budget)

        steps = range(run.start, config.steps)
        bar = tqdm(steps, initial=run.start, total=config.steps, disable=None)  # None: off in a log
        for step in bar:
            clock = Clock()
            lr = config.lr * min(1.0, (step + 1) / max(1, config.warmup))  # linear warm-up
            optimizer.adam.param_groups[0]["lr"] = lr
            batch = draw_problems(tasks, config.prompts, config.seed, step)

            rollouts = sample_rollouts(generator, batch, config, step)  # 1
            clock.lap("sample")
            score_answers(rollouts, config)  # 2
            if receiver is not None:  # b > 0
                taus = draw_taus(len(rollouts), config, step)
                cut_rollouts(rollouts, generator, taus)  # 3
                continue_cuts(rollouts, generator, receiver, config, (CONTINUATION, step))  # 4
                score_transfer(rollouts)  # 5
                clock.lap("transfer")
            combine_rewards(rollouts, config)  # 6
            assign_advantages(rollouts, config)  # 7
            learned = update(generator, optimizer, rollouts, config)  # 8
            clock.lap("update")

            metrics = {"step": step + 1, "lr": lr, **summarize(rollouts, config), **learned}
            metrics |= clock.metrics(rollouts)
            run.log(metrics, rollouts[: config.group])  # one group, to read
            run.save_if_due(generator, optimizer, step + 1)
            report(bar, metrics, rollouts, config)
        return run.finish(generator)


def sample_rollouts(generator: LM, tasks: list, config: Config, step: int) -> list[Rollout]:
    """Step 1: G completions of each problem, y ~ pi(. | x).

    Tasks are pairs of a problem and its prompt in token ids. Sampling is from the full softmax (no
    top-k, no top-p), for the loss speaks of that distribution."""
    completions = generate(
        generator.model,
        [prompt for _, prompt in tasks],
        samples=config.group,
        max_new_tokens=config.max_new_tokens,
        temperature=config.temperature,
        stop_ids=generator.stop_ids,
        vocab_size=generator.vocab_size,
        max_rows=config.max_rows,
        seed=(config.seed, ROLLOUT, step),
    )
    rollouts = []
    for number, c in enumerate(completions):
        problem, prompt = tasks[number // config.group]
        text = decode(generator.tokenizer, c.tokens)
        rollouts.append(Rollout(problem, prompt, c.tokens, c.logprobs, c.finished, text))
    return rollouts


def score_answers(rollouts: list[Rollout], config: Config):
    """Step 2: R_ans = 1[answer(y) = g]. And R_fmt = 1[y stopped by itself and has an answer].

    A reward of your own: compute rewards["name"] here, and add the field name_weight to Config.
    (`config` is there for settings that it may have.)"""
    for rollout in rollouts:
        rollout.verdict = judge_answer(rollout.text, rollout.problem.answer)
        has_answer = rollout.verdict != "missing"
        rollout.rewards["answer"] = float(rollout.verdict == "right")
        rollout.rewards["format"] = float(rollout.finished and has_answer)


def cut_prefix(tokens: list[int], tau: float, stop_ids=()) -> list[int]:
    """The first floor(tau * |y|) tokens of y, a final stop token not counted.

    >>> cut_prefix([5, 6, 7, 8, 2], 0.5, stop_ids=(2,))
    [5, 6]
    >>> cut_prefix([5, 6, 7, 8, 2], 1.0, stop_ids=(2,)), cut_prefix([5, 6, 7, 8], 1e-9)
    ([5, 6, 7, 8], [])
    """
    if tokens and tokens[-1] in stop_ids:
        tokens = tokens[:-1]
    return tokens[: math.floor(tau * len(tokens))]


def draw_taus(count: int, config: Config, step: int) -> np.ndarray:
    """K places to cut for each of `count` rollouts, [count, K]: tau ~ U(0, 1]."""
    uniform = rng(config.seed, CUT, step).random((count, config.cuts))  # in [0, 1)
    return 1 - uniform


def cut_rollouts(rollouts: list[Rollout], generator: LM, taus):
    """Step 3: cut each rollout at its taus [rollouts, K].

    To cut elsewhere, at the end of a sentence say, drop tokens from `prefix` and decode again."""
    for rollout, its_taus in zip(rollouts, taus, strict=True):
        for tau in its_taus:
            prefix = cut_prefix(rollout.tokens, tau, generator.stop_ids)
            text = decode(generator.tokenizer, prefix)
            leaked = extract_answer(text) is not None
            rollout.cuts.append(Cut(float(tau), len(prefix), text, leaked))


def continue_cuts(rollouts: list, generator: LM, receiver: LM, config: Config, key: tuple):
    """Step 4: the frozen receiver goes on from every cut, z ~ M(. | x, prefix).

    The seed and `key` select its random numbers."""
    waiting, prompts, budgets = [], [], []
    same_tokens = generator.tokenizer.get_vocab() == receiver.tokenizer.get_vocab()
    for rollout in rollouts:
        question = encode_prompt(receiver, rollout.problem.question, config.prompt)
        for cut in rollout.cuts:
            # The receiver reads the question in its own form, then the prefix as if it had written
            # that. In the same vocabulary it gets the very tokens, else the text.
            prefix = rollout.tokens[: cut.prefix_length]
            if not same_tokens:
                prefix = encode_text(receiver.tokenizer, cut.prefix)
            room = receiver.context - len(question) - len(prefix)
            left = config.max_new_tokens - cut.prefix_length + config.receiver_margin
            if room < 1:
                cut.overflow = True
            else:
                waiting.append((cut, prefix))
                prompts.append(question + prefix)
                budgets.append(min(room, max(1, left)))

    completions = generate(
        receiver.model,
        prompts,
        max_new_tokens=budgets,
        temperature=config.receiver_temperature,
        stop_ids=receiver.stop_ids,
        vocab_size=receiver.vocab_size,
        max_rows=config.max_rows,
        seed=(config.seed, *key),
    )
    for (cut, prefix), completion in zip(waiting, completions, strict=True):
        # Decoded together: a token's text depends on what is before it. (SentencePiece drops the
        # space of a first word, and the cut may have split a character.)
        whole = decode(receiver.tokenizer, prefix + completion.tokens)
        cut.continuation = whole.removeprefix(decode(receiver.tokenizer, prefix))
        cut.continuation_length = len(completion.tokens)


def score_transfer(rollouts: list[Rollout]):
    """Step 5: R_trans = the share of the cuts from which the receiver reached the right answer.

    The answer is looked for in prefix and continuation together (see point 7 at the top)."""
    for rollout in rollouts:
        for cut in rollout.cuts:
            whole = cut.prefix + cut.continuation
            cut.correct = not cut.overflow and is_correct(whole, rollout.problem.answer)
        right = sum(cut.correct for cut in rollout.cuts)
        rollout.rewards["transfer"] = right / len(rollout.cuts)


def combine_rewards(rollouts: list[Rollout], config: Config):
    """Step 6: R = a R_ans + b R_trans + c R_fmt; the weight of a reward is its NAME_weight."""
    for rollout in rollouts:
        rollout.reward = 0.0
        for name, value in rollout.rewards.items():
            rollout.reward += getattr(config, f"{name}_weight") * value


def assign_advantages(rollouts: list[Rollout], config: Config):
    """Step 7: how much better a rollout was than the others of its group."""
    rewards = [[rollout.reward for rollout in group] for group in grouped(rollouts, config.group)]
    advantages = group_advantages(rewards, config.normalize_std)  # [P, G]
    for rollout, advantage in zip(rollouts, advantages.flatten().tolist(), strict=True):
        rollout.advantage = advantage


def group_advantages(rewards, normalize_std: bool = True) -> torch.Tensor:
    """A_i = (R_i - mean) / (std + 1e-6) within each group; [P, G] -> [P, G] in float64.

    std is the population's. Where all rewards of a group are equal, A is exactly 0: else the
    rounding error of the mean, divided by a tiny std, would pass for a signal.

    >>> group_advantages([[1.0, 0.0, 0.0, 1.0], [1.1, 1.1, 1.1, 1.1]]).round(decimals=3).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]

    Dividing by std makes all groups count alike, however small their differences. So a reward of
    tiny weight decides alone where the others are equal: it revives groups that were dead.

    >>> group_advantages([[1.0, 1.0, 1.0, 1.01]]).round(decimals=2).tolist()
    [[-0.58, -0.58, -0.58, 1.73]]
    """
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        std = rewards.std(dim=1, correction=0, keepdim=True)
        advantages = advantages / (std + 1e-6)
    dead = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)  # [P, 1]
    return advantages.masked_fill(dead, 0.0)


def live_groups(rollouts: list[Rollout], group: int) -> list[list[Rollout]]:
    """The groups to learn from; in the others, the dead ones, all rewards are equal."""
    return [rows for rows in grouped(rollouts, group) if any(r.advantage != 0 for r in rows)]


def policy_objective(logp, old_logp, advantage, clip_low: float, clip_high: float) -> torch.Tensor:
    """Step 8 for each token: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). All [N].

    rho = pi / pi_sampling, the probability of a sampled token now over what it was when it was
    sampled. With one optimizer step a batch (the default) nothing has changed in between: rho is 1
    up to rounding, its gradient is that of log pi, and the clip does nothing. It acts with --epochs
    or --minibatches, where it takes away the incentive to move far from pi_sampling.

    Watch the rewards, not this: at rho = 1 its mean is that of A, whatever was learnt."""
    rho = torch.exp(logp - old_logp)
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(rho * advantage, clipped * advantage)


def update(generator: LM, optimizer: MasterAdamW, rollouts: list[Rollout], config: Config) -> dict:
    """Step 8: ascend the token mean of the objective over all groups that are not dead.

    One optimizer step, or `epochs` passes of `minibatches` steps, each with a T of its own. Returns
    metrics: None if all groups were dead, or if any step was skipped as its gradient was not
    finite."""
    live = live_groups(rollouts, config.group)
    token_figures = []
    norms = []
    for _ in range(config.epochs):
        for number in range(config.minibatches):
            groups = live[number :: config.minibatches]
            minibatch = [rollout for group in groups for rollout in group]
            if minibatch:
                token_figures += add_gradient(generator, minibatch, config)
                norms.append(optimizer.step(config.max_grad_norm))

    metrics = dict.fromkeys(["objective", "entropy", "clip_share", "approx_kl", "grad_norm"])
    metrics |= {"logprob_gap_mean": None, "logprob_gap_max": None}
    metrics["skipped"] = sum(not math.isfinite(norm) for norm in norms)
    if norms and not metrics["skipped"]:
        objective, entropy, log_rho = torch.cat(token_figures, dim=1).double()  # each [N]
        rho = log_rho.exp()
        clipped = (rho < 1 - config.clip_low) | (rho > 1 + config.clip_high)
        metrics["objective"] = objective.mean().item()
        metrics["entropy"] = entropy.mean().item()
        metrics["clip_share"] = clipped.double().mean().item()  # outside, whatever the sign of A
        metrics["approx_kl"] = (rho - 1 - log_rho).mean().item()  # KL(pi_sampling || pi)
        metrics["logprob_gap_mean"] = log_rho.abs().mean().item()  # of one step: rounding
        metrics["logprob_gap_max"] = log_rho.abs().max().item()
        metrics["grad_norm"] = norms[-1]
    return metrics


def add_gradient(generator: LM, rollouts: list[Rollout], config: Config) -> list[torch.Tensor]:
    """Add the gradient of -1/T sum_tokens min(..) to the model's, micro-batch by micro-batch.

    T counts the completion tokens of all `rollouts`, stop tokens included, so the gradient does not
    depend on the micro-batches. Returns a tensor [3, N] for each of these: objective, entropy and
    log rho of its tokens. The optimizer's step uses the gradient and clears it."""
    for module in generator.model.modules():
        # No dropout, as when sampling; but layers only checkpoint in training mode.
        module.training = getattr(module, "gradient_checkpointing", False)
    total_tokens = sum(len(rollout.tokens) for rollout in rollouts)
    token_figures = []
    for batch in micro_batches(rollouts, config.token_budget or TOKEN_BUDGET):
        logp, entropy = completion_logprobs(generator, batch, config.temperature)  # [N], [N]
        old_logp = logp.new_tensor([x for r in batch for x in r.logprobs])  # [N]
        advantage = logp.new_tensor([r.advantage for r in batch for _ in r.tokens])  # [N]
        objective = policy_objective(logp, old_logp, advantage, config.clip_low, config.clip_high)
        (-objective.sum() / total_tokens).backward()
        token_figures.append(torch.stack([objective, entropy, logp - old_logp]).detach().cpu())
    generator.model.eval()
    return token_figures


def completion_logprobs(lm: LM, rollouts: list[Rollout], temperature: float = 1.0, chunk: int = 0):
    """Log-probabilities and entropies of all completion tokens under the current policy.

    A tensor [2, N], the rollouts end to end. What runs out of memory first in training is the
    logits, [rows, time, vocabulary]: a gigabyte for two rows of 1,024 tokens. They never exist
    here: they are made for `chunk` tokens at a time (by default as many as make 2**27 logits),
    reduced to two numbers a token, and made once more in the backward pass (checkpoint)."""
    device = lm.model.device
    rows = [torch.tensor((rollout.prompt + rollout.tokens)[:-1]) for rollout in rollouts]
    # Padding on the right needs no mask, as causality hides it, and lengths say which tokens count,
    # never a comparison with a pad id.
    ids = pad_sequence(rows, batch_first=True).to(device)  # [B, T]
    states = lm.model.base_model(input_ids=ids, use_cache=False).last_hidden_state  # [B, T, E]
    parts = []
    for row, rollout in zip(states, rollouts, strict=True):
        first = len(rollout.prompt) - 1  # the state of the prompt's last token predicts y_1
        parts.append(row[first : first + len(rollout.tokens)])
    states = torch.cat(parts)  # [N, E]
    targets = torch.tensor([token for r in rollouts for token in r.tokens], device=device)  # [N]

    chunk = chunk or max(1, 2**27 // lm.vocab_size)
    figures = []
    for part_states, part_targets in zip(states.split(chunk), targets.split(chunk), strict=True):
        part = (lm, part_states, part_targets, temperature)
        figures.append(checkpoint(token_logprobs, *part, use_reentrant=False))  # [2, chunk]
    return torch.cat(figures, dim=1)


def token_logprobs(lm: LM, states: torch.Tensor, targets: torch.Tensor, temperature: float):
    """Last hidden states [n, E], the tokens that followed [n] -> log-probs and entropies [2, n].

    The same temperature and the same vocabulary as in sampling: rows beyond the tokenizer's
    (Qwen2.5-1.5B has 271 of them) do not count."""
    # [n, V], in one expression: with a name the logits would stay in memory beside it.
    logprobs = (head_logits(lm.model, states)[:, : lm.vocab_size] / temperature).log_softmax(-1)
    entropy = -(logprobs.detach().exp() * logprobs.detach()).sum(-1)
    return torch.stack([logprobs.gather(1, targets[:, None]).squeeze(1), entropy])


def micro_batches(rollouts: list[Rollout], token_budget: int) -> list[list[Rollout]]:
    """Rows of like length, so that little is padding; rows x longest row <= token_budget.

    A longer row is a batch of its own. The longest come first: if memory runs out, it does so at
    once and not after an hour."""
    batches = []
    width = 0
    for rollout in sorted(rollouts, key=lambda r: len(r.prompt + r.tokens), reverse=True):
        if not batches or (len(batches[-1]) + 1) * width > token_budget:
            batches.append([])
            width = len(rollout.prompt + rollout.tokens)
        batches[-1].append(rollout)
    return batches


# ====================================================================================== optimizer
# fp32 master weights for a bf16 model, and the search for the micro-batch that fits the memory. A
# reader may skip this.

TOKEN_BUDGET = 2**15 if torch.cuda.is_available() else 2**14  # padded tokens in a micro-batch


class MasterAdamW:
    """AdamW on fp32 master copies of the weights. (Plain AdamW where the model is fp32 itself.)

    bf16 has 8 bits of precision: a step of 1e-6 on a weight of 1e-2 rounds to nothing. So steps are
    made in fp32 and the model gets the rounded result. The gradients of micro-batches add up in
    fp32, too. With `offload` the masters and Adam's moments live in host memory; the sum of the
    gradients stays beside the model and moves once a step."""

    def __init__(self, model, lr: float, weight_decay: float = 0.0, offload: bool = False):
        self.masters = []
        self.copies = []  # (weight, its master) where these are two
        self.sums = {}  # of such weights: place in copies -> fp32 sum of gradients
        for weight in model.parameters():
            master = weight
            if weight.dtype != torch.float32:
                master = weight.detach().to("cpu" if offload else weight.device, torch.float32)
                hook = functools.partial(self.accumulate, self.sums, len(self.copies))
                weight.register_post_accumulate_grad_hook(hook)
                self.copies.append((weight, master))
            self.masters.append(master)
        how = {"betas": (0.9, 0.99), "fused": self.masters[0].device.type == "cuda"}
        self.adam = torch.optim.AdamW(self.masters, lr, weight_decay=weight_decay, **how)

    @staticmethod  # the hook lives on the weight: it must not keep the optimizer alive
    def accumulate(sums: dict, place: int, weight):
        """Called by autograd when the gradient of a weight is complete."""
        if place not in sums:
            sums[place] = torch.zeros_like(weight, dtype=torch.float32)
        sums[place] += weight.grad
        weight.grad = None

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Clip, step, clear; returns the gradient norm. If that is not finite there is no step."""
        for place, gradient in self.sums.items():
            _, master = self.copies[place]
            master.grad = gradient.to(master.device)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if math.isfinite(norm):
            self.adam.step()
            for weight, master in self.copies:
                weight.copy_(master)
        self.zero_grad()
        return norm

    def zero_grad(self):
        """Release all gradients, also those that a failed backward pass has left half-way."""
        self.sums.clear()
        self.adam.zero_grad()
        for weight, _ in self.copies:
            weight.grad = None

    def state_dict(self) -> dict:
        return {"adam": self.adam.state_dict(), "masters": [master for _, master in self.copies]}

    @torch.no_grad()
    def load_state_dict(self, state: dict):
        self.adam.load_state_dict(state["adam"])
        for master, moments in self.adam.state.items():
            for name in ("exp_avg", "exp_avg_sq"):
                require(moments[name].shape == master.shape, "the shapes differ")
        for (_, master), saved in zip(self.copies, state["masters"], strict=True):
            master.copy_(saved)


def find_token_budget(generator: LM, optimizer: MasterAdamW, tasks: list, config: Config) -> int:
    """The largest micro-batch, in padded tokens, that the GPU's memory holds.
    Before step 1 the longest rows that there can be go through the update, with a budget that is
    halved until they fit. So memory runs out now or never, not at step 120."""
    longest_prompt = max((prompt for _, prompt in tasks), key=len)
    length = config.max_new_tokens
    row = Rollout(None, longest_prompt, [0] * length, [0.0] * length, False, "")
    budget = config.token_budget or TOKEN_BUDGET
    fits = False
    while budget and not fits:
        trial = dataclasses.replace(config, token_budget=budget)
        rows_a_batch = max(1, budget // (len(longest_prompt) + length))
        moments = []
        try:
            for master in optimizer.masters:  # room for what Adam will keep of each weight
                if master not in optimizer.adam.state:  # a resumed run has it
                    moments += [torch.empty_like(master), torch.empty_like(master)]
            # Two micro-batches, for at the second one the gradients of the first are there.
            add_gradient(generator, [row] * rows_a_batch * 2, trial)
            fits = True
        except torch.OutOfMemoryError:
            budget = budget // 2 if rows_a_batch > 1 else 0
        # Only behind the handler is the memory of a failed trial released: until then the exception
        # holds its frames, and these hold the tensors.
        moments.clear()
        optimizer.zero_grad()
        torch.cuda.empty_cache()
    if not fits:
        raise torch.OutOfMemoryError
    with contextlib.suppress(RuntimeError):  # an allocator that does not count
        torch.cuda.reset_peak_memory_stats()
    return budget


# ====================================================================================== generation
# One sampler with a KV cache serves generator, receiver and evaluation, for any decoder-only model
# of transformers with ordinary attention. No work is done for rows that are gone: the active ones
# are always the first of the batch; when one finishes, the last one moves into its place, and a
# waiting one takes the free place at the end. A reader may skip this.

MAX_ROWS = 512  # rows in the cache at once, where memory allows
PREFILL_TOKENS = 8192  # prompt tokens in one forward, about
GRAPH_DEVICES = ("cuda",)


@torch.no_grad()
def generate(
    model,
    prompts: list[list[int]],
    *,
    samples: int = 1,
    max_new_tokens: int | list[int],
    temperature: float = 1.0,
    stop_ids=(),
    max_rows: int | None = None,
    vocab_size: int | None = None,
    seed: int | tuple[int, ...] | None = None,
) -> list[Completion]:
    """`samples` completions of each prompt (non-empty lists of token ids), side by side.

    max_new_tokens may be one number for each prompt. Temperature 0 is greedy. Tokens from
    vocab_size on never come out. max_rows and the free memory bound the rows in the cache at once;
    the others wait. The random numbers of completion i are a function of (seed, i) alone, so its
    text does not depend on max_rows or on the other rows. Raises UserError for an empty prompt, no
    token allowed, outputs that are not finite."""
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    allowed = all(prompts) and all(limit > 0 for limit in limits)
    require(allowed, "generate: a prompt is empty, or no new token is allowed")
    if not prompts:
        return []
    if seed is None:
        seed = int(torch.randint(2**31, ()))
    keys = seed if isinstance(seed, tuple) else (seed,)
    # Everything below is per row: row i is the completion i.
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    limits = [limit for limit in limits for _ in range(samples)]
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    capacity = min(len(prompts), max_rows or MAX_ROWS, affordable_rows(model, longest))
    sampler = Sampler(model, prompts, limits, capacity, longest, temperature, stop_ids, vocab_size)
    uniform = [1 - rng(*keys, row).random(limit) for row, limit in enumerate(limits)]  # (0, 1]
    uniform = pad_sequence([torch.from_numpy(row) for row in uniform], batch_first=True)
    sampler.uniform[:, :-1] = uniform.float()

    # Long prompts first: neighbours in the queue are of like length, so prefills pad little.
    queue = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    attention_before = model.config._attn_implementation
    training_before = model.training
    model.eval().set_attn_implementation("rltr_cached")  # looked up by name: cached_attention
    try:
        while queue or sampler.active:
            free = capacity - sampler.active
            enough = max(1, capacity // 8)  # not a prefill for every single free slot
            if queue and free >= min(len(queue), enough):
                sampler.admit(queue[:free])
                queue = queue[free:]
            sampler.advance()
            sampler.release()
    finally:
        model.train(training_before).set_attn_implementation(attention_before)
    completions = sampler.completions()
    finite = all(math.isfinite(sum(c.logprobs)) for c in completions)
    require(finite, f"model {model.name_or_path}: its outputs are not finite numbers")
    return completions


def affordable_rows(model, length: int) -> int:
    """Rows of `length` tokens whose K and V fit half the free GPU memory, or a quarter of RAM."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * length
    usable = 2**31  # bytes, where we cannot ask (Windows)
    if model.device.type == "cuda":
        held_by_torch = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        usable = (torch.cuda.mem_get_info()[0] + held_by_torch) // 2
    elif hasattr(os, "sysconf"):
        usable = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 4
    return max(1, usable // row_bytes)


class Sampler:
    """A batch of `capacity` slots, in which the rows (completions) are generated one after another.
    Slots 0 .. active - 1 are at work. The KV cache of a layer is K and V, each [capacity + 1,
    kv_heads, length, head_dim]; length is that of the longest row, prompt and completion. Its last
    slot is the *parked prompt*: the newest prompt, for its samples that still wait for a slot."""

    graphs_work = True  # until one fails

    def __init__(self, model, prompts, limits, capacity, length, temperature, stop_ids, vocab_size):
        device = model.device
        self.model = model
        self.prompts = prompts
        self.capacity = capacity
        self.length = length
        self.temperature = temperature
        self.vocab_size = vocab_size or 2**30
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        # What is drawn, for each row; -1: nothing yet. Slots that are done write into the last
        # column, which nobody reads, until they are released.
        columns = max(limits) + 1
        self.limit = torch.tensor(limits, dtype=torch.long, device=device)  # tokens a row may have
        self.uniform = torch.zeros(len(limits), columns, device=device)
        self.logprobs = torch.zeros_like(self.uniform)
        self.tokens = torch.full_like(self.uniform, -1, dtype=torch.long)
        # State, for each slot.
        self.slot = torch.arange(capacity + 1, device=device)
        self.row = torch.zeros_like(self.slot)  # the row that the slot works on
        self.token = torch.zeros_like(self.slot)  # the newest one, not yet in the cache
        self.position = torch.zeros_like(self.slot)  # of that token
        self.count = torch.zeros_like(self.slot)  # tokens drawn
        self.done = torch.ones_like(self.slot, dtype=torch.bool)
        self.active = 0
        self.longest = 0  # tokens in the cache of the longest active row
        self.cache = {}  # layer -> (K, V)
        self.parked = None  # the parked prompt
        self.use_graphs = device.type in GRAPH_DEVICES and Sampler.graphs_work
        self.graphs = {}  # (slots, length) -> CUDA graph
        self.pool = None  # memory that the graphs share, as one runs at a time

    def admit(self, rows: list[int]):
        """Give the next slots to these rows. The samples of a prompt come one after another.
        A prompt is read once (prefilled), and its other samples copy the cache. Its last token is
        not read: it is the input of the first step."""
        first = self.active
        newest = self.parked
        source = self.capacity  # the slot that has the newest prompt's cache
        to_read = []
        to_copy = []
        for slot, row in enumerate(rows, start=first):
            if self.prompts[row] is newest:
                to_copy.append((source, slot))
            else:  # the first sample of its prompt
                newest = self.prompts[row]
                source = slot
                to_read.append((slot, newest[:-1]))
        if newest is not self.parked:
            to_copy.append((source, self.capacity))
            self.parked = newest
        self.prefill(to_read)
        positions = [len(self.prompts[row]) - 1 for row in rows]
        self.longest = max(self.longest, *positions)
        self.copy_slots(to_copy)
        new = slice(first, first + len(rows))
        self.row[new] = torch.tensor(rows)
        self.token[new] = torch.tensor([self.prompts[row][-1] for row in rows])
        self.position[new] = torch.tensor(positions)
        self.count[new] = 0
        self.done[new] = False
        self.active += len(rows)

    def prefill(self, prompts: list[tuple[int, list[int]]]):
        """Read prompts (slot, tokens), the longest first, into the cache, several in a forward."""
        prompts = [(slot, tokens) for slot, tokens in prompts if tokens]
        while prompts:
            count = max(1, PREFILL_TOKENS // len(prompts[0][1]))
            slots = torch.tensor([slot for slot, _ in prompts[:count]], device=self.slot.device)
            ids = [torch.tensor(tokens) for _, tokens in prompts[:count]]
            ids = pad_sequence(ids, batch_first=True).to(slots.device)  # [B, T]
            attend = functools.partial(self.attend_in_prompts, slots)
            self.model.base_model(input_ids=ids, use_cache=False, attend=attend)
            prompts = prompts[count:]

    def advance(self):
        """A step of all active slots. On a GPU eight: to look which are done is to wait for it."""
        for _ in range(8 if self.use_graphs else 1):
            self.longest = min(self.longest + 1, self.length)
            if self.use_graphs:
                self.step_as_graph()
            else:
                self.step(self.active, self.longest)

    def step_as_graph(self):
        """A step as a CUDA graph: recorded once, then launched as one.
        To launch the thousand kernels of a step one by one takes longer than to run them. A graph
        has fixed shapes, so there is one for each bucket of slots (a power of two) and cache length
        (a multiple of 64). Slots beyond the active ones are done: what they write, nobody reads."""
        slots = min(1 << (self.active - 1).bit_length(), self.capacity)  # 5 active: 8 slots
        length = min(math.ceil(self.longest / 64) * 64, self.length)
        if (slots, length) in self.graphs:
            self.graphs[slots, length].replay()
            return
        self.step(slots, length)  # as it is; also the warm-up that a capture needs
        if length - self.longest < 16:  # steps until the next bucket: a capture would not pay
            return
        try:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                self.step(slots, length)  # is recorded, not run
            self.graphs[slots, length] = graph
            self.pool = graph.pool()
        except RuntimeError as error:  # a model that waits for the device, say
            Sampler.graphs_work = self.use_graphs = False
            torch.cuda.set_stream(torch.cuda.default_stream())
            print(f"no CUDA graphs, so sampling is slow: {error}", file=sys.stderr)

    def step(self, slots: int, length: int):
        """One token for each of the first `slots` slots, which have at most `length` in the cache.
        Nothing in here waits for the device or depends on values: it can be a CUDA graph."""
        row = self.row[:slots]
        position = self.position[:slots]
        done = self.done[:slots]
        logits = self.model(
            input_ids=self.token[:slots, None],
            position_ids=position[:, None],
            use_cache=False,
            attend=functools.partial(self.attend_to_cache, length),
        ).logits[:, -1, : self.vocab_size]  # [slots, V]
        column = torch.where(done, self.tokens.shape[1] - 1, self.count[:slots])
        tokens, logprobs = sample_tokens(logits, self.temperature, self.uniform[row, column])
        self.tokens[row, column] = tokens
        self.logprobs[row, column] = logprobs
        self.token[:slots] = tokens
        position += ~done
        self.count[:slots] += ~done
        stopped = (tokens[:, None] == self.stop_ids).any(dim=1)
        done |= stopped | (self.count[:slots] >= self.limit[row])

    def release(self):
        """Take the slots that are done out of the batch, and close the gaps that they leave."""
        done = self.done[: self.active].nonzero().flatten().tolist()  # waits for the device
        # Slots 0..5 are active, 1 and 4 are done. Four stay, so slots 0..3 must be filled: 1 is a
        # hole, 5 is beyond and still running: 5 moves to 1.
        staying = self.active - len(done)
        holes = [slot for slot in done if slot < staying]
        movers = sorted(set(range(staying, self.active)) - set(done))
        self.copy_slots(list(zip(movers, holes, strict=True)))
        self.active = staying
        self.done[staying:] = True
        self.position[staying:] = 0
        if done:
            self.longest = int(self.position.max())

    def completions(self) -> list[Completion]:
        """What was drawn, row by row."""
        counts = (self.tokens[:, :-1] >= 0).sum(dim=1).tolist()
        rows = zip(counts, self.tokens.tolist(), self.logprobs.tolist(), strict=True)
        stops = set(self.stop_ids.tolist())
        return [Completion(t[:n], logprobs[:n], t[n - 1] in stops) for n, t, logprobs in rows]

    def copy_slots(self, pairs: list[tuple[int, int]]):
        """Copy (source, target) slots: their state and the part of the cache that is in use."""
        if pairs:
            sources, targets = torch.tensor(pairs, device=self.slot.device).T
            for state in (self.row, self.token, self.position, self.count, self.done):
                state[targets] = state[sources]
            for layer_cache in self.cache.values():
                for tensor in layer_cache:
                    tensor[targets, :, : self.longest] = tensor[sources, :, : self.longest]

    def write(self, layer, slots, positions, key, value) -> tuple[torch.Tensor, torch.Tensor]:
        """Put [B, kv_heads, T, D] into slots [B] of a layer's cache, at positions [B or 1, T]."""
        if layer not in self.cache:
            shape = (self.capacity + 1, key.shape[1], self.length)
            keys = key.new_zeros(*shape, key.shape[3])
            self.cache[layer] = (keys, value.new_zeros(*shape, value.shape[3]))
        keys, values = self.cache[layer]
        keys[slots[:, None], :, positions] = key.transpose(1, 2)
        values[slots[:, None], :, positions] = value.transpose(1, 2)
        return keys, values

    def attend_in_prompts(self, slots, layer, query, key, value, scaling, window, softcap):
        """Whole prompts [B, heads, T, D], padded on the right, which causality hides."""
        length = key.shape[2]
        positions = torch.arange(length, device=key.device)[None]  # [1, T]
        self.write(layer, slots, positions, key, value)
        if softcap is None and (window is None or window >= length):
            shared = key.shape[1] < query.shape[1]  # several query heads share a K/V head
            return torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=scaling, enable_gqa=shared
            )
        return attention(query, key, value, positions, scaling, window, softcap)

    def attend_to_cache(self, length, layer, query, key, value, scaling, window, softcap):
        """A new token of each of the first B slots, [B, heads, 1, D], attends to its row."""
        slots = self.slot[: query.shape[0]]
        positions = self.position[: len(slots), None]  # [B, 1]
        keys, values = self.write(layer, slots, positions, key, value)
        keys = keys[: len(slots), :, :length]
        values = values[: len(slots), :, :length]
        return attention(query, keys, values, positions, scaling, window, softcap)


def cached_attention(
    module, query, key, value, mask, attend, scaling=None, sliding_window=None, softcap=None, **_
):
    """What every layer calls, in the convention of transformers' AttentionInterface. `attend`,
    which the model's forward was given, is one of the two functions of the Sampler above."""
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = attend(module.layer_idx, query, key, value, scaling, sliding_window, softcap)
    return out.transpose(1, 2), None  # [B, T, heads, D], no weights


transformers.AttentionInterface.register("rltr_cached", cached_attention)


def attention(query, key, value, positions, scaling, window, softcap) -> torch.Tensor:
    """Attention, written out: scores, mask, softmax, product.
    query [B, heads, T, D] at positions [B or 1, T], key and value [B, kv_heads, L, D]; returns
    [B, heads, T, D]. The query heads that share a K/V head stand side by side, as rows of one
    matrix, so K and V are never expanded. Soft-capping (Gemma 2) is one line."""
    B, heads, T, D = query.shape
    kv_heads, L = key.shape[1:3]
    groups = heads // kv_heads
    query = query.reshape(B, kv_heads, groups * T, D)
    scores = query @ key.transpose(2, 3) * scaling  # [B, kv_heads, groups * T, L]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    cached = torch.arange(L, device=key.device)
    hidden = cached > positions[:, :, None]  # [B or 1, T, L]: what comes later
    if window is not None:
        hidden |= cached <= positions[:, :, None] - window  # what has left the sliding window
    hidden = hidden.repeat(1, groups, 1)[:, None]  # [B or 1, 1, groups * T, L]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).view(B, heads, T, -1)


def sample_tokens(logits: torch.Tensor, temperature: float, uniform: torch.Tensor):
    """Inverse-CDF sampling: the first token whose cumulative probability reaches u.
    logits [n, V], uniform [n] in (0, 1] -> tokens [n], log-probs [n]. It needs one random number a
    token, so that each row can have its own (torch.multinomial draws for the whole batch). As u > 0
    a token of probability 0 never comes out. Temperature 0: greedy, log-probs of the softmax."""
    if temperature not in (0, 1):
        logits = logits.float() / temperature
    probs = logits.softmax(-1, dtype=torch.float32)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = probs.cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:]).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # NaN: `generate` complains
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).log()


# ======================================================================================= answers
# Is a model's final answer equal to the gold answer? In doubt it is not: reinforcement learning
# finds every wrong answer that passes for right. No text is executed, and all work is bounded.
MAX_CHARS = 100  # of an answer
MAX_ITEMS = 30  # of a list
# At 120 digits rounding hides no difference between answers: not that of √(10^14+1) and 10^7, of
# 1-e^{-30} and 1, or of 10^50+1 and 10^50. The last 20 digits may get lost on the way.
MP = mpmath.mp.clone()
MP.dps = 120
MAX_BITS = 332  # before or behind the point: numbers lie between 10^-100 and 10^100
# Where there is no \boxed{}: MATH's rare \boxed 2$, and the last line of GSM8K.
OTHER_ENDS = (r"\\boxed +([^\s{}$][^{}$]*)\$", r"^####[ \t]*([-+$]*[\d.,]*\d)[.%]?[ \t]*$")
FALLBACKS = (
    r"(?:[Aa]nswer(?: is|:)+|^A:) *(\$[^$\n]+\$|\\\(.+?\\\)|-?\$?\d[\d,]*(?:\.\d+)?|\w+(?=\.?$))",
    r"\$[^$\n]+\$|(?<![\w).])-?\d[\d,]*(?:\.\d+)?",
)


def is_correct(text: str, gold: str, fallback: bool = False) -> bool:
    r"""Whether the final answer in a model's completion equals the gold answer.
    >>> is_correct(r"The area is \boxed{14\pi \text{ cm}^2}.", r"14 \pi"), is_correct("5", "5")
    (True, False)
    """
    return judge_answer(text, gold, fallback) == "right"


def judge_answer(text: str, gold: str, fallback: bool = False) -> str:
    """One of "right", "wrong", "missing" (no answer) and "unparsed" (not understood: wrong too)."""
    answer = extract_answer(text, fallback)
    return "missing" if answer is None else compare(answer, gold)


def extract_answer(text: str, fallback: bool = False) -> str | None:
    r"""The content of the last \boxed{}, else of \boxed 2$ or a line '#### number', else None.
    With `fallback`, not for training, also what follows 'answer is', the last formula or number.
    >>> extract_answer(r"\boxed{1}? No: \boxed{\frac{3}{7}}.")
    '\\frac{3}{7}'
    """
    _, _, rest = text.replace(r"\fbox", r"\boxed").rpartition(r"\boxed")
    rest = rest[:10_000].lstrip()  # to bound the work
    if not rest.startswith("{"):
        rest = ""
    depth = 0
    for brace in re.finditer(r"\\.|[{}]", rest):
        if brace[0] == "{":
            depth += 1
        elif brace[0] == "}":
            depth -= 1
        if depth == 0:
            return rest[1 : brace.start()].strip() or None
    patterns = OTHER_ENDS + FALLBACKS if fallback else OTHER_ENDS
    for pattern in patterns:
        found = re.findall(pattern, text[-3 * MAX_CHARS :], re.M)
        if found:
            return found[-1]
    return None


def majority_vote(answers: list[str | None]) -> str | None:
    """The answer with most votes, of several the first. Equal answers vote together, None never."""
    voters = [answer for answer in answers if answer is not None]
    votes = [sum(answers_equal(answer, other) for other in voters) for answer in voters]
    return voters[votes.index(max(votes))] if votes else None


def answers_equal(a: str, b: str) -> bool:
    r"""Whether two bare answers are equal. Symmetric, reflexive, never raises.
    >>> answers_equal(r"\frac{6}{\sqrt{12}}", "sqrt(3)"), answers_equal("[1,2)", "(1,2)")
    (True, False)
    """
    return compare(a, b) == "right"


def compare(a: str, b: str) -> str:
    """Two bare answers: "right", "wrong", or "unparsed" where one of them is not understood."""
    a, b = sorted((a.strip(), b.strip()))  # so that their order cannot matter
    if a == b:
        return "right"
    if max(len(a), len(b)) > MAX_CHARS:
        return "unparsed"
    try:
        return "right" if same(normalise(a), normalise(b)) else "wrong"
    except (ValueError, ArithmeticError, RecursionError):
        return "unparsed"


def same(a: str, b: str) -> bool:
    """Whether two normalised answers are equal: as relations, as lists or as quantities."""
    if a == b:
        return a != ""
    if NAMED.match(a) or NAMED.match(b):
        return same_relations(a, b)
    if read_list(a) != ("", [a]) or read_list(b) != ("", [b]):
        return same_lists(a, b)
    return same_quantities(a, b)


def same_relations(a: str, b: str) -> bool:
    """x=5 is 5, and x∈(3,∞), which was x>3, is (3,∞). But names may not differ, nor is |x|=5 5."""
    name, value = split_name(a)
    other_name, other_value = split_name(b)
    names = {name, other_name} - {""}
    return len(names) < 2 and same(value, other_value)


def split_name(text: str) -> tuple[str, str]:
    """("x=", "5") for x=5, and ("", "5") for 5."""
    value = NAMED.sub("", text)
    return text.removesuffix(value), value


def same_lists(a: str, b: str) -> bool:
    """Lists, sets and unions in any order; tuples, intervals and matrices in theirs."""
    brackets, items = read_list(a)
    other_brackets, others = read_list(b)
    if brackets != other_brackets or len(items) != len(others) or len(items) > MAX_ITEMS:
        return False
    names = {split_name(item)[0] for item in items + others}
    if brackets not in ("", "∪") or ("" in names and len(names) > 2):  # x=1,y=2 is 1,2, not 2,1
        return all(map(same, items, others))
    for item in items:
        matches = [other for other in others if same(item, other)]
        if not matches:
            return False
        others.remove(matches[0])
    return True


def read_list(text: str) -> tuple[str, list[str]]:
    """("(]", ["0", "1"]) for (0,1]; the brackets of a set are "", of a union of intervals "∪"."""
    brackets = ""
    items = split_outside(text, ",;∪")
    if len(items) > 1 and "∪" in text and re.search(r"[(\[]", text):
        brackets = "∪"
    elif len(items) == 1 and re.fullmatch(r"⦃.*⦄|⟦.*⟧|[(\[].*[,;].*[)\]]", text):
        brackets = (text[0] + text[-1]).replace("⦃⦄", "")
        items = split_outside(text[1:-1], ",;∪")
    return brackets, items


def split_outside(text: str, separators: str) -> list[str]:
    """The pieces of a text between the separators that are outside of all brackets."""
    pieces = [""]
    depth = 0
    for character in text:
        if character in "([{⦃⟦":
            depth += 1
        elif character in ")]}⦄⟧":
            depth -= 1
        if depth == 0 and character in separators:
            pieces.append("")
        else:
            pieces[-1] += character
    return pieces


def same_quantities(a: str, b: str) -> bool:
    """5@cm, a number with a known unit, is 5 or 5@cms, but not 5@km."""
    value, _, unit = a.partition("@")
    other, _, other_unit = b.partition("@")
    units = {PLURAL.sub("", unit), PLURAL.sub("", other_unit)} - {""}
    return len(units) < 2 and same_values(value, other)


def same_values(a: str, b: str) -> bool:
    """The polynomial identity test: two expressions in x are equal if they agree at random points,
    as different ones do so only by a rare accident. Points where one is undefined do not count,
    and one or two would not do: x+1 and |x|+1 agree at half of them."""
    points = range(16) if NAME.search(a + b) else range(1)
    agreed = 0
    for point in points:
        try:
            u = value_at(point, a)
            v = value_at(point, b)
        except ArithmeticError:
            continue
        if abs(u - v) > abs(u) / 10**100:
            return False
        agreed += 1
    return agreed >= min(3, len(points))


@functools.lru_cache(10_000)
def value_at(point: int, text: str) -> MP.mpf | MP.mpc:
    tokens = ["", *reversed(TOKEN.findall(text))]  # to be taken from the end
    value = parse(tokens, point, 0)
    if tokens != [""]:
        raise ValueError("the rest is not understood")
    return value


def value_of_name(name: str, point: int) -> MP.mpf:
    """As good as random, but the same in both answers. Small and large values of both signs occur:
    |x-100| differs from 100-x at large values only, |x+y| from x+y at negative ones, √(x²y²) from
    xy where the signs are mixed."""
    size = 3 * 10 ** (point % 4)
    return MP.mpf(random.Random(f"{name} {point}").uniform(-size, size))


def parse(tokens: list[str], point: int, level: int) -> MP.mpf | MP.mpc:
    """A Pratt parser that computes as it reads. It stops at an operator that binds no more than
    level: a sum binds 1, a product 2, one without a sign 3 (in sin 2x cos x), a power 5."""
    value = parse_atom(tokens, point)
    limit = 14 if level == RIGHT_LEVELS["^"] else MAX_BITS  # an exponent is below 2^14
    while True:
        sign = tokens[-1]
        if value != 0 and not abs(MP.mag(value)) < limit:
            raise OverflowError("too large, too small or undefined")
        if sign == "!" and level < 4:  # 2^{3}! is (2^3)!
            tokens.pop()
            value = MP.factorial(value)
        elif level < LEVELS.get(sign, 0):
            tokens.pop()
            value = OPERATIONS[sign](value, parse(tokens, point, RIGHT_LEVELS[sign]))
        elif level < 3 and FACTOR.match(sign) and not (level == 2 and ENDS_ARGUMENT.match(sign)):
            value *= parse(tokens, point, 3)
        else:
            return value


def parse_atom(tokens: list[str], point: int) -> MP.mpf | MP.mpc:
    token = tokens.pop()
    if token in ("+", "-"):
        return OPERATIONS[token](0, parse(tokens, point, 3))
    if token in CLOSING:
        value = parse(tokens, point, 0)
        if tokens.pop() != CLOSING[token]:
            raise ValueError("a bracket is not closed")
        return abs(value) if token == "|" else value
    if token == r"\frac":
        return parse_atom(tokens, point) / parse_atom(tokens, point)
    if token.startswith("√"):
        radicand = parse_atom(tokens, point)
        return MP.sqrt(radicand) if token == "√" else MP.root(radicand, int(token[2:-1]))
    function, _, exponent = token.partition("^")
    if function in FUNCTIONS:
        argument = parse_atom(tokens, point) if tokens[-1] in CLOSING else parse(tokens, point, 2)
        return FUNCTIONS[function](argument) ** int(exponent or 1)
    if token in CONSTANTS:
        return CONSTANTS[token]
    return value_of_name(token, point) if NAME.fullmatch(token) else MP.mpf(token)


PLURAL = re.compile(r"(?<=\w\w)s\b")  # of a unit; alone s is a second, and ms are thousandths
OPERATIONS = {"+": add, "-": sub, "*": mul, "/": truediv, "^": pow}
LEVELS = {"+": 1, "-": 1, "*": 2, "/": 2, "^": 5}
RIGHT_LEVELS = {"+": 1, "-": 1, "*": 3, "/": 3, "^": 4}  # 1/2x is (1/2)x, 2^3^2 is 2^(3^2)
FUNCTIONS = {r"\sin": MP.sin, r"\cos": MP.cos, r"\tan": MP.tan, r"\cot": MP.cot, r"\sec": MP.sec}
FUNCTIONS |= {r"\csc": MP.csc, r"\ln": MP.ln, r"\log": MP.log10, r"\arctan": MP.atan}
FUNCTIONS |= {r"\arcsin": MP.asin, r"\arccos": MP.acos, r"\exp": MP.exp}
CONSTANTS = {"π": +MP.pi, "e": MP.exp(1), "i": MP.mpc(0, 1), "°": MP.pi / 180}
CLOSING = {"(": ")", "{": "}", "[": "]", "|": "|"}
ENDS_ARGUMENT = re.compile(r"\\(sin|cos|tan|cot|sec|csc|ln|log|exp|arc(?:sin|cos|tan))|[({\[|]")
# A name is a letter, a word, capitals (AB is a segment) or a number in another base, with an index.
GREEK = "alpha|beta|gamma|delta|epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|Delta|Omega"
LETTER = rf"(?<![\d)}}])[A-Za-z]{{3,}}|[A-Z]{{2,}}|[A-Za-z∞]|\\(?:{GREEK})(?![a-z])|\d+(?=_)"
NAME = re.compile(rf"(?:{LETTER})'*(?:_(?:\{{[^{{}}]*\}}|\w))?", re.A)
TOKEN = re.compile(rf"\s*({NAME.pattern}|\d+\.?\d*|\.\d+|√\[\d\]|\\[a-z]+(?:\^\d)?|!+|\S)", re.A)
# What may follow a factor without a sign: the x of 2x, but no number and no word.
FACTOR = re.compile(r"(?![A-Za-z]{3})[A-Za-z∞({√π°\\]")
# What stands before a value: x=5 is the answer 5, but x=y is not y.
NAMED = re.compile(
    rf"^(?:{NAME.pattern}"  # x=5, AB=5
    r"|[A-Zf-hpq]'*(?:\^\{-1\})?\([-\w.,]*\)"  # f(2)=5, f^{-1}(2)=5
    r"|\([a-z](?:,[a-z])+\)"  # (x,y)=(1,2)
    r"|[A-Z]+:[A-Z]+"  # A:B=5
    r"|\\frac\{(?:d[a-z]|[A-Z]+)\}\{(?:d[a-z]|[A-Z]+)\}"  # \frac{dy}{dx}=5, \frac{AB}{CD}=5
    r")[=≈∈](?![A-Za-z]$)(?=[^=≈∈]+$)"  # the only such sign
)


def normalise(text: str) -> str:
    """One way to write what has several: symbols, the rewrites in their order, words in small."""
    text = COMMAND.sub(lambda command: SYMBOL.get(command[0], command[0]), text)
    for pattern, replacement, _ in REWRITES:
        text = pattern.sub(replacement, text)
    return re.sub(r"\b[A-Z](?=[a-z]{3}|es\b|o\b)", lambda letter: letter[0].lower(), text)


COMMAND = re.compile(r"\\\\|\\[A-Za-z]+|\\[{}%]|[<>!]=|[×·÷−²&]|(?<![A-Za-z])[a-z]+(?![A-Za-z])")
SYMBOLS = r"""
\times *  \cdot *  × *  · *  \div /  ÷ /  − -  \pm ±  \le ≤  \leq ≤  <= ≤  \ge ≥  \geq ≥  >= ≥
\lt <  \gt >  \ne ≠  \neq ≠  != ≠  \approx ≈  \in ∈  \cup ∪  \infty ∞  \pi π  pi π  \sqrt √  sqrt √
\{ ⦃  \} ⦄  \% %  pct %  percent %  degrees °  ² ^2  \dfrac \frac  \tfrac \frac  \cfrac \frac
and ,  or ∪  per /  \emptyset ∅  \varnothing ∅  & ,  \\ ),(  \setminus ∖  sin \sin  cos \cos
tan \tan  ln \ln  log \log  \leqslant ≤  \geqslant ≥  \degree °  \vert |  \lvert |  \rvert |
"""
SYMBOL = dict(pair.split() for pair in re.split("  |\n", SYMBOLS.strip()))
# One rewrite a line: what is found, what it becomes, an example. Words in capitals are in PARTS.
TABLE = r"""
(?<![\d.,}])([1-9]\d{0,2})GROUPGROUP?GROUP?(?![\d,]|[^(\[⦃]*[)\]⦄])  \1\2\3\4  1,234,567 -> 1234567
\\(?:left|right|[bB]igg?[lrm]?)(?![a-z])(?:\.(?!\d))?|\\!  ""  \left(5 -> (5
\\(?:(?:display|text)style|limits|angle|math(?:bf|it)|boldsymbol|vec)(?![a-z])  ""  \mathbf{x} -> x
\\mathbb ?(?:\{R\}|R)|^[Aa]ll real numbers$  (-∞,∞)  x \in \mathbb{R} -> x∈(-∞,∞)
(?<!\\)\$((?:[^$]|(?<=\\)\$)*)(?<!\\)\$|(?<!\\)\\[()\[\]]  " \1 "  $5$ -> 5
[\[(]?\\begin ?\{(?:[pb]?matrix|array)\}(?:\{[lcr|]*\})?  ⟦(  \begin{bmatrix}5\end{bmatrix} -> ⟦(5)⟧
(?:\),\( ?)?\\end ?\{(?:[pb]?matrix|array)\} ?[\])]?  )⟧  \begin{pmatrix}1&2\end{pmatrix} -> ⟦(1,2)⟧
(?:\\[,;:> ]|\\q?quad(?![a-z])|[~\s])+  " "  5 \, x -> 5 x
\^ ?\{? ?(?:\\circ(?![a-z])|°) ?\}?  °  45^\circ -> 45@°
(?<![\w.)}])\\?\$ ?(\d(?:[\d,.]*\d)?|\.\d+)  "\1 dollars"  \$18 -> 18@dollars
(?<=\d) ?\^?\{? ?(?:\\(?:text|mathrm)\{)?(?:st|nd|rd|th)\b[ }]*  " "  12^{th} grade -> 12@grade
START(NUMBER) ?\\(?:text|mathrm|mbox) ?\{ ?(UNIT)[. ]*\}(POWER) ?STOP  \1@\2\3  5\text{ m} -> 5@m
\\(?:text[a-z]*|mathrm|[mh]box|operatorname)\*? ?\{([^{}]*)\}  " \1 "  \text{east} -> east
[ ]{2,}  " "  \text{May } 20 -> May 20
START(NUMBER)(?: |(?=cm|[°%]|[a-z]{3}))(?![A-Za-z]\b)(UNIT) ?STOP  \1@\2  15 hours -> 15@hours
^ *\(?([A-J])[.)] +(?![-+*/=<>^_!,|(])(?!.*\b[A-J]\b).*  \1  (C) 18 -> C
(?<=\d) *([ap])\.?m\b\.?  \1m  3:15 p.m. -> 3:15pm
(?<=\d) ?x ?(?=10 ?\^)  *  3 x 10^4 -> 3*10^4
\\frac ?(\d) ?(\d)  \\frac{\1}{\2}  \frac12 -> \frac{1}{2}
(?<![\w.])(\d+\.?\d*|\.\d+)[eE]([+-]?\d{1,3})(?![\w.])  (\1*10^{\2})  2.5e-3 -> (2.5*10^{-3})
(?<![\w.^}/])(\d+) (\d+) ?/ ?(\d+)(?![\w.])  (\1+\\frac{\2}{\3})  2 1/4 -> (2+\frac{1}{4})
(?<![\d.^_])(\d+) ?(\\frac ?\{ ?\d+ ?\} ?\{ ?\d+ ?\})  (\1+\2)  2\frac14 -> (2+\frac{1}{4})
(?<=,)[ ,]+|(?<=\W) | (?=\W)|^ |(?<![.,])[.,;:]? ?$  ""  1, 2, and 3. -> 1,2,3
^\{([^{}]*)\}$  \1  {5} -> 5
([_^])\{(\w)\}(?!\w)  \1\2  x_{1} -> x_1
START(NUMBER)≈[\d.]+STOP  \1  \frac{1}{7} \approx 0.143 -> \frac{1}{7}
(?<![^,;∪=])FIGURE+=(?=FIGURE+(?:@.*)?STOP)  ""  9-4=5 -> 5
START(VAR)([<≤]VALUE)STOP  -∞<\1\2  x≤3 -> x∈(-∞,3]
START(VAR)>(VALUE)STOP  \2<\1<∞  x>3 -> x∈(3,∞)
START(VAR)≥(VALUE)STOP  \2≤\1<∞  x≥3 -> x∈[3,∞)
START(VALUE)<(VAR)(?=[<≤]VALUE)  \2∈(\1,  1<x<5 -> x∈(1,5)
START(VALUE)≤(VAR)(?=[<≤]VALUE)  \2∈[\1,  1≤x<5 -> x∈[1,5)
(?<=,)<(VALUE)STOP  \1)  1<x<5 -> x∈(1,5)
(?<=,)≤(VALUE)STOP  \1]  1<x≤5 -> x∈(1,5]
([(\[])([^(),]*),([^(),]*)([)\]])∖⦃([^,⦄]*)⦄  \1\2,\5)∪(\5,\3\4  (0,9)\setminus\{2\} -> (0,2)∪(2,9)
(?<![^,;∪⦃])([^,;∪⦃±]*)±([^,;∪⦄±]*)  \1+\2,\1-\2  1±√2 -> 1+√2,1-√2
"""
PARTS = {
    "GROUP": r"(?:(?:,|\{,\}|\\,|,\\! ?)(\d{3}))",
    "START": r"(?<![^,;∪])",  # of an item of a list
    "STOP": r"(?=\.? *(?:[,;∪]|$))",
    # A number, perhaps named, as in x = 5; \frac, brackets, signs and exponents belong to it.
    "NUMBER": r"(?:[^=≈,;∪@]*[=≈] ?)?(?:\\frac|[^A-Za-z\\,;∪@])*[\d)}π]",
    "VAR": r"[A-Za-z](?:_\w|\([a-z]\))?",
    # A character of a value without names: 9-4 is three of them.
    "FIGURE": r"(?:\\frac|[^A-Za-z\\=≈≠<≤>≥,;∪@±])",
    "VALUE": "[^<≤>≥=,;∪]+",
    "UNIT": "ONE(?:(?: ?/ ?| )ONE)*",
    "ONE": r"(?<![A-Za-z])(?:cm|m|km|mm|in|inch|inches|ft|feet|foot|yd|yard|mile|mph|g|kg|lb|pound|"
    r"oz|ounce|(?:centi|milli|kilo)?(?:meter|gram|liter)|L|mL|gallon|s|sec|second|min|minute|h|hr|"
    r"hour|day|week|month|year|dollar|cent|%|°|rad|radian|unit|J|N|W|V|A|K|eV|meV|MeV|erg|Hz|"
    r"people|student|children|book|page|coin|apple|egg|cup|card|box|boxe|cookie|marble|ticket|tree|"
    r"game|team|point|piece|slice|digit|side|integer|solution|triangle|way|time|grade|square|sq|"
    r"cubic)s?(?![A-Za-z])POWER",
    "POWER": r"(?: ?\^\{?-?[1-9]\}?)?",
}
REWRITES = []
for row in TABLE.strip("\n").splitlines():
    pattern, replacement, example = row.split("  ")
    for word, part in PARTS.items():
        pattern = pattern.replace(word, part)
    REWRITES.append((re.compile(pattern, re.A), replacement.strip('"'), example))


# ================================================================================ models, problems
# Loading language models and data sets, and talking to a model in its own form: chat template, stop
# tokens, token ids and text. What would go wrong later is refused here. A reader may skip this.


def load_everything(config: Config, checkpoint: Path | None):
    """The generator, the receiver (None where b = 0), and the tasks: problem and prompt ids."""
    problems = load_problems(config.data, config.split, config.limit)
    generator = load_lm(str(checkpoint or config.model), config.device)
    if config.gradient_checkpointing:
        can = generator.model.supports_gradient_checkpointing
        require(can, f"model {config.model}: has no --gradient-checkpointing")
        generator.model.gradient_checkpointing_enable()
    receiver = None
    if config.transfer_weight > 0:
        name = config.model if config.receiver == "self" else config.receiver
        receiver = load_lm(name, config.device)
        encode_problems(receiver, problems, config.prompt, 1)  # has it room for any of them?
    tasks = encode_problems(generator, problems, config.prompt, config.max_new_tokens)
    if len(tasks) < len(problems):
        print(f"{len(problems) - len(tasks)} of {len(problems)} problems left out: too long")
    if config.eval_data:  # what is wrong with it is found now rather than after training
        closing = load_problems(config.eval_data, prefer="test")
        fitting = encode_problems(generator, closing, config.prompt, 1)
        require(len(fitting) == len(closing), f"{config.eval_data}: some problems are too long")
    return generator, receiver, tasks


def encode_problems(lm: LM, problems: list[Problem], prompt: str, new_tokens: int) -> list[tuple]:
    """(problem, prompt's token ids), without those that leave no room for so many new tokens."""
    tasks = [(problem, encode_prompt(lm, problem.question, prompt)) for problem in problems]
    fitting = [task for task in tasks if len(task[1]) + new_tokens <= lm.context]
    room = f"context of {lm.context} tokens, no prompt with {new_tokens} new ones fits"
    require(fitting, f"model {lm.model.name_or_path}: {room} (--max-new-tokens)")
    return fitting


def draw_problems(tasks: list, count: int, seed: int, step: int) -> list:
    """The problems of a step, a function of (seed, step): permutations of the data, end to end."""
    places = range(step * count, (step + 1) * count)
    epochs = {place // len(tasks) for place in places}
    orders = {epoch: rng(seed, DATA, epoch).permutation(len(tasks)) for epoch in epochs}
    return [tasks[orders[place // len(tasks)][place % len(tasks)]] for place in places]


def encode_prompt(lm: LM, question: str | list[dict], prompt: str = PROMPT) -> list[int]:
    """The question, or a list of messages, in the model's own form, as token ids: its chat
    template, with thinking switched off where it can be, or "Question: ... Answer:" where it has
    none. BOS exactly once, or never, as the tokenizer wants."""
    tokenizer = lm.tokenizer
    messages = question
    if isinstance(question, str):
        messages = [{"role": "user", "content": prompt.replace("{question}", question)}]
    content = messages[-1]["content"]
    text = f"Question: {content}\nAnswer:"
    if tokenizer.chat_template:
        text = apply_template(tokenizer, messages, add_generation_prompt=True)
        kept = content.strip() in text
        require(kept, f"model {tokenizer.name_or_path}: its chat template changes {content!r}")
    ids = tokenizer.encode(text, add_special_tokens=False)
    require(ids, f"model {tokenizer.name_or_path}: has no token for any part of {content!r}")
    bos = tokenizer.bos_token_id
    wants_bos = bos in tokenizer.encode("") and ids[:1] != [bos]  # and the template has none
    return [bos, *ids] if wants_bos else ids


def apply_template(tokenizer, messages: list[dict], **how) -> str:
    how |= {"tokenize": False, "enable_thinking": False}
    try:
        return tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # a template is a program, with errors of its own
        message = f"model {tokenizer.name_or_path}: its chat template fails: {error}"
        raise UserError(message) from None


def encode_text(tokenizer, text: str) -> list[int]:
    """Model-written text: a control token that is spelled out in it stays plain text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def decode(tokenizer, ids: list[int]) -> str:
    """Text without control tokens and without a last character that a cut left incomplete."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")


def load_lm(name: str, device: str = "cpu") -> LM:
    """A folder or hub model: bf16 on CUDA, else fp32; no remote code. UserError if unservable."""
    require(name, "--model or --receiver: no name; Config(**TINY) is the built-in task")
    path = name
    if not os.path.isdir(name):
        use_cache_if_offline()
        path = f"Qwen/{name}" if re.match("Qwen[^/]*$", name) else name
    how = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, report = AutoModelForCausalLM.from_pretrained(path, **how)
    except Exception as error:  # unknown, unreachable, damaged, not a language model, ...
        raise UserError(f"model {name}: no such folder or hub model, or damaged: {error}") from None
    model.eval()
    config = model.config.get_text_config()
    context = getattr(config, "max_position_embeddings", None)
    context = 2**30 if context is None else context
    require(context > 0, f"model {name}: its config allows {context} tokens")
    vocab_size = 1 + max(tokenizer.get_vocab().values(), default=-1)
    lm = LM(model, tokenizer, find_stop_ids(model, tokenizer), vocab_size, context)
    rows = model.get_input_embeddings().num_embeddings
    for what, weights in report.items():  # missing, unexpected, of another shape
        require(not weights, f"model {name}: its weights are not those of its config ({what})")
    require(encode_text(tokenizer, "1"), f"model {name}: it comes without a tokenizer")
    require(lm.stop_ids, f"model {name}: no end-of-text token in its tokenizer or config")
    require(lm.vocab_size <= rows, f"model {name}: more tokens than embeddings")
    if getattr(config, "attn_logit_softcapping", None):
        model.set_attn_implementation("eager")  # sdpa drops it in older transformers
    check_model(lm)  # while it is on the CPU and in fp32
    if device.startswith("cuda"):
        for weight in model.parameters():  # not the buffers: rotary frequencies need fp32
            weight.data = weight.data.bfloat16()
    model.to(device)
    return lm


def use_cache_if_offline():
    """Where no hub answers, look in the local cache only, instead of retrying for a minute."""
    try:
        huggingface_hub.get_session().head(huggingface_hub.constants.ENDPOINT, timeout=5)
    except Exception:  # its HTTP library and so its errors differ by version
        huggingface_hub.constants.HF_HUB_OFFLINE = True
        os.environ["HF_HUB_OFFLINE"] = "1"


def find_stop_ids(model, tokenizer) -> tuple[int, ...]:
    """eos of tokenizer and generation_config, and what the chat template writes after a turn.
    Qwen2.5 *base* has eos <|endoftext|>, but its template ends turns with <|im_end|>."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = configured if isinstance(configured, list) else [configured]
    stops = [stop for stop in [tokenizer.eos_token_id, *stops] if stop is not None]
    known = all(type(stop) is int and 0 <= stop < 2**31 for stop in stops)
    require(known, f"model {tokenizer.name_or_path}: eos_token_id {configured!r} is no token")
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "sentinel"}]
        written = apply_template(tokenizer, turn).rpartition("sentinel")[2]
        after_turn = tokenizer.encode(written, add_special_tokens=False)
        control = [token for token in after_turn if token in tokenizer.added_tokens_decoder]
        stops += control[:1]
    return tuple(sorted(set(stops)))


def save_lm(lm: LM, folder: Path):
    """An ordinary transformers folder, weights as safetensors."""
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def head_logits(model, states: torch.Tensor) -> torch.Tensor:
    """Logits [N, V], fp32, of last hidden states [N, E], as the model's own forward makes them:
    soft-capped in Gemma, scaled in Cohere and Granite. (`check_model` compares.)"""
    config = model.config.get_text_config()
    logits = model.get_output_embeddings()(states).float()
    logits = logits * (getattr(config, "logit_scale", None) or 1.0)
    logits = logits / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def check_model(lm: LM):
    """Refuse a model that we would serve wrongly: attention sinks, ALiBi, latent or shared keys,
    state spaces, unknown heads. They show in a number computed in three ways: the log-probabilities
    of a few tokens by the sampler, by the trainer, and by the model's own plain forward. In fp32
    they agree to rounding."""
    config = lm.model.config.get_text_config()
    message = f"model type {config.model_type} is not served: attention or head of an unusual kind"
    layers = set(getattr(config, "layer_types", None) or [])
    require(layers <= {"full_attention", "sliding_attention"}, message)
    # With these, all positions change beyond some length, and cached keys are outdated.
    rope = getattr(config, "rope_parameters", None) or {}
    require(rope.get("rope_type") not in ("longrope", "dynamic"), message)
    n = 8
    prompt = [i % lm.vocab_size for i in range(n)]
    try:
        [c] = generate(lm.model, [prompt], max_new_tokens=4, vocab_size=lm.vocab_size, seed=0)
        rollout = Rollout(None, prompt, c.tokens, c.logprobs, True, "")
        trained = completion_logprobs(lm, [rollout])[0]
        ids = torch.tensor([prompt + c.tokens], device=lm.model.device)
        logits = lm.model(input_ids=ids, use_cache=False).logits[0, n - 1 : -1, : lm.vocab_size]
        plain = logits.float().log_softmax(-1).gather(1, ids[0, n:, None]).squeeze(1)
        ours = torch.stack([plain.new_tensor(c.logprobs), trained])
        served = ((ours - plain).abs() < 1e-3).all()
    except (UserError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # they say what they are
    except Exception:  # of its code, when it is used in a way that it does not know
        served = False
    require(served, message)


# Short names of data sets: hub id and configuration.
SOURCES = {
    "gsm8k": ("openai/gsm8k", "main"),
    "math": ("nlile/hendrycks-MATH-benchmark", None),
    "math500": ("HuggingFaceH4/MATH-500", None),
    "aime24": ("math-ai/aime24", None),
    "amc23": ("math-ai/amc23", None),
}


def load_problems(source: str, split=None, limit=None, prefer: str = "train") -> list[Problem]:
    """Problems of a short name (SOURCES), a hub id, or a local .jsonl, .json, .csv, .parquet file.

    Columns: question | problem | prompt, and answer | solution, of which GSM8K's `#### 18` or the
    last `\\boxed{}` is taken. split None: the one called `prefer`, or the only one there is; a
    local file is one split. Raises UserError naming the source and the row."""
    require(source, "--data: no name")
    rows = read_rows(source, split, prefer)
    require(isinstance(rows, list), f"{source}: holds no list of objects")
    rows = [(number, row) for number, row in enumerate(rows, 1) if row != {}]  # {}: an empty line
    require(rows, f"{source}: holds no rows")
    for number, row in rows:
        good = isinstance(row, dict) and None not in row  # None: what is too much in a csv row
        require(good, f"{source}: row {number} has not the form of the others")
    columns = rows[0][1].keys()
    questions = [name for name in ("question", "problem", "prompt") if name in columns]
    answers = [name for name in ("answer", "solution") if name in columns]
    needs = f"{source}: needs a column question, problem or prompt, and one answer or solution"
    require(questions and answers, f"{needs}; it has {', '.join(columns)}")
    problems = []
    for number, row in rows[: limit or None]:
        where = f"{source}: row {number}"
        question = read_cell(row, questions[0], where)
        text = read_cell(row, answers[0], where)
        answer = extract_answer(text)
        bare = answers[0] == "answer" and "####" not in text and "\\boxed{}" not in text
        if answer is None and bare:
            answer = text
        require(answer, f"{where} has no answer in its {answers[0]}")
        problems.append(Problem(question, answer))
    return problems


def read_cell(row: dict, column: str, where: str) -> str:
    """The text or number in a column."""
    value = row.get(column)
    text = str(value).strip() if type(value) in (str, int, float) else ""
    require(text not in ("", "nan", "inf", "-inf"), f"{where}: no text or number in its {column}")
    half = re.search("[\ud800-\udfff]", text)  # of a character: no tokenizer takes it
    require(not half and len(text) <= 10**5, f"{where}: its {column} is too long, or damaged")
    return text


def read_rows(source: str, split: str | None, prefer: str) -> list[dict]:
    kind = Path(source).suffix
    local = kind in (".jsonl", ".json", ".csv", ".parquet")
    require(not local or Path(source).is_file(), f"{source}: no such file")
    try:
        if kind in (".jsonl", ".json", ".csv"):
            with open(source, encoding="utf-8-sig", newline="") as file:
                if kind == ".csv":
                    return list(csv.DictReader(file, strict=True))
                if kind == ".json":
                    return json.load(file)
                return read_json_lines(file)
        if not local:
            use_cache_if_offline()  # it asks when it is imported
        import datasets  # slow to import, and not needed for the above

        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # we say it ourselves
        if local:
            return list(datasets.Dataset.from_parquet(source))
        splits = datasets.load_dataset(*SOURCES.get(source, (source, None)))
        if not split:
            split = prefer if prefer in splits or len(splits) > 1 else next(iter(splits))
        require(split in splits, f"no split {split}; it has {', '.join(splits)}")
        return list(splits[split])
    except ImportError:
        raise UserError(f"{source}: pip install datasets, or give a local .jsonl file") from None
    except Exception as error:  # each reader has failures of its own: say which
        raise UserError(f"{source}: cannot be read: {error}") from None


def read_json_lines(file) -> list:
    """A value a line; of an empty line {}, so that rows are numbered as in the file."""
    rows = []
    for number, line in enumerate(file, 1):
        try:
            rows.append(json.loads(line if line.strip() else "{}"))
        except (ValueError, RecursionError) as error:
            reason = getattr(error, "msg", error)  # without the number of its only line
            raise ValueError(f"row {number}: {reason}") from None
    return rows


# =================================================================================== a run on disk
# runs/NAME/: config.json, metrics.jsonl (a line a step), rollouts.jsonl (a group a step),
# checkpoints/step-000100/, final/. Killed at any moment, a run goes on from its last checkpoint as
# if nothing had happened; its logs have no gap and no line twice. A reader may skip this.


class Run:
    """The folder of a run."""

    def __init__(self, config: Config, resume: bool):
        self.config = config
        self.folder = Path(config.out)
        self.checkpoints = self.folder / "checkpoints"
        self.signal = 0  # that asks us to stop
        self.handlers = {}  # of signals, before us
        self.tracker = None
        if config.track:
            try:
                self.tracker = importlib.import_module(config.track)
            except ImportError:
                raise UserError(f"--track: pip install {config.track}") from None
        # A run that was killed before its first file leaves a lock, and perhaps half a file.
        used = [p for p in self.folder.glob("*") if p.name != ".lock" and p.suffix != ".partial"]
        free = resume or not used
        require(free, f"{self.folder}: exists; another --out, or --resume {self.folder}")
        self.checkpoint = self.saved()[-1] if self.saved() else None
        self.start = int(self.checkpoint.name[5:]) if self.checkpoint else 0
        lost = not self.checkpoint and (self.folder / "final").exists()
        require(not lost, f"{self.folder}: is finished, but its checkpoints are gone")

    def saved(self) -> list[Path]:
        """The checkpoints, the newest last."""
        folders = [path for path in self.checkpoints.glob("step-*") if path.name[5:].isdecimal()]
        return sorted(folders, key=lambda path: int(path.name[5:]))

    def __enter__(self):
        return self

    def __exit__(self, kind, error, traceback):
        for number, handler in self.handlers.items():
            signal.signal(number, handler or signal.SIG_DFL)
        if isinstance(error, OSError):
            began = (self.folder / "config.json").exists()
            advice = "; then --resume goes on" if began else ""
            raise UserError(f"{self.folder}: {error}{advice}") from error

    def begin(self, optimizer: MasterAdamW):
        """Write the settings; when resuming, forget all that came after the checkpoint."""
        if self.checkpoint:
            path = self.checkpoint / "optimizer.pt"
            try:
                optimizer.load_state_dict(torch.load(path, "cpu", weights_only=True))
            except Exception as error:  # of many kinds, by how it is damaged
                advice = "damaged, or of another model; delete it to go on from an earlier one"
                raise UserError(f"{self.checkpoint}: {advice} ({error})") from None
        write_file(self.folder / "config.json", json.dumps(vars(self.config), indent=1))
        self.track("init", project="rltr", name=self.folder.name, config=vars(self.config))
        for log in (self.folder / "metrics.jsonl", self.folder / "rollouts.jsonl"):
            text = log.read_text(errors="replace") if log.exists() else ""
            kept = []
            for line in text.splitlines(keepends=True):
                # A line begins with its step; one that a crash has torn does not match.
                step = re.match(r'\{"step": (\d{1,9}),.*\n', line)
                if step and int(step[1]) <= self.start:
                    kept.append(line)
            write_file(log, "".join(kept))
        with contextlib.suppress(ValueError):  # only the main thread has a say
            for number in (signal.SIGINT, signal.SIGTERM):
                self.handlers[number] = signal.signal(number, self.note_signal)

    def note_signal(self, number, frame):
        """Ctrl-C or SIGTERM: the step ends and is saved first. A second one stops at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)
        with contextlib.suppress(OSError):
            os.write(2, b"\nrltr: stops after this step; once more: at once\n")  # print may not

    def log(self, metrics: dict, rollouts: list[Rollout]):
        """A line of metrics, and rollouts to read."""
        rows = [{"step": metrics["step"], **dataclasses.asdict(rollout)} for rollout in rollouts]
        for name, lines in (("metrics.jsonl", [metrics]), ("rollouts.jsonl", rows)):
            with (self.folder / name).open("a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        figures = {name: value for name, value in metrics.items() if name != "step"}
        self.track("log", figures, step=metrics["step"])

    def track(self, function: str, *arguments, **settings):
        """Call a function of the tracker, if there is one. Its failures do not end a run."""
        if self.tracker:
            try:
                getattr(self.tracker, function)(*arguments, **settings)
            except Exception as error:
                print(f"--track {self.config.track}: {error}", file=sys.stderr)
                self.tracker = None

    def save_if_due(self, generator: LM, optimizer: MasterAdamW, step: int):
        """A checkpoint every `save_every` steps, after the last one, and when asked to stop."""
        due = self.config.save_every and step % self.config.save_every == 0
        if due or self.signal or step == self.config.steps:
            with complete_folder(self.checkpoints / f"step-{step:06d}") as folder:
                save_lm(generator, folder)
                torch.save(optimizer.state_dict(), folder / "optimizer.pt")
            for old in self.saved()[: -self.config.keep]:
                shutil.rmtree(old, ignore_errors=True)  # Windows keeps files that are in use
        self.stop_if_asked()

    def stop_if_asked(self):
        if self.signal:
            print(f"\nstopped; go on with: python rltr.py --resume {self.folder}")
            sys.exit(128 + self.signal)

    def finish(self, generator: LM) -> Path:
        """Write the trained model; returns its folder."""
        final = self.folder / "final"
        with complete_folder(final) as folder:
            save_lm(generator, folder)
        self.track("finish")
        self.stop_if_asked()
        return final


@contextlib.contextmanager
def claimed(folder: Path):
    """While one process has a folder, no other can; if it wrote nothing, nothing is left of it."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    lock = filelock.FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()  # until this process ends, however it does
    except filelock.Timeout:
        raise UserError(f"{folder}: another process is writing there") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # what is not empty stays
            (folder / ".lock").unlink()
            for path in made:
                path.rmdir()
        lock.release()


@contextlib.contextmanager
def complete_folder(folder: Path):
    """A folder to write to that appears complete or not at all: written beside, then renamed."""
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        yield partial
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
    except Exception as error:  # torch and safetensors have kinds of their own for a full disk
        shutil.rmtree(partial, ignore_errors=True)
        raise UserError(f"{folder}: cannot be written: {error}") from error


def write_file(path: Path, text: str):
    """A file that is there with all of its text or as it was before."""
    partial = path.with_name(path.name + ".partial")
    try:
        partial.write_bytes(text.encode())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


# ======================================================================================= reporting
# The metrics of a step, and now and then a group of rollouts to read.


class Clock:
    """Seconds and tokens/s of the phases of a step, and the peak memory so far."""

    def __init__(self):
        self.last = time.perf_counter()
        self.seconds = {}

    def lap(self, phase: str):
        """The phase that ends now."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[phase] = now - self.last
        self.last = now

    def metrics(self, rollouts: list[Rollout]) -> dict:
        metrics = {}
        for phase, seconds in self.seconds.items():
            tokens = sum(len(r.tokens) for r in rollouts)
            if phase == "transfer":
                tokens = sum(cut.continuation_length for r in rollouts for cut in r.cuts)
            metrics[f"seconds_{phase}"] = round(seconds, 3)
            metrics[f"tokens_per_s_{phase}"] = round(tokens / seconds)
        if torch.cuda.is_available():
            metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
        return metrics


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def summarize(rollouts: list[Rollout], config: Config) -> dict:
    """The metrics of a batch (docs/reference.md has a line on each)."""
    groups = grouped(rollouts, config.group)
    votes_right = []
    for group in groups:
        vote = majority_vote([extract_answer(rollout.text) for rollout in group])
        votes_right.append(vote is not None and answers_equal(vote, group[0].problem.answer))
    cuts = [cut for rollout in rollouts for cut in rollout.cuts]
    metrics = {
        "reward": mean(r.reward for r in rollouts),
        "accuracy": mean(r.verdict == "right" for r in rollouts),
        "majority": mean(votes_right),
        "finished": mean(r.finished for r in rollouts),
        "length": mean(len(r.tokens) for r in rollouts),
        "dead_groups": 1 - len(live_groups(rollouts, config.group)) / len(groups),
        "answers_missing": mean(r.verdict == "missing" for r in rollouts),
        "answers_unparsed": mean(r.verdict == "unparsed" for r in rollouts),
    }
    for name in rollouts[0].rewards:
        metrics[f"reward_{name}"] = mean(r.rewards[name] for r in rollouts)
    if cuts:
        metrics["transfer"] = mean(cut.correct for cut in cuts)
        metrics["transfer_unleaked"] = mean(cut.correct for cut in cuts if not cut.leaked)
        metrics["leak"] = mean(cut.leaked for cut in cuts)
        metrics["overflow"] = mean(cut.overflow for cut in cuts)
        for low in (0.0, 0.25, 0.5, 0.75):
            within = [cut.correct for cut in cuts if low < cut.tau <= low + 0.25]
            metrics[f"transfer_tau_{low}_{low + 0.25}"] = mean(within)
    return metrics


def report(bar, metrics: dict, rollouts: list[Rollout], config: Config):
    """The numbers that matter on the progress bar; now and then a group to read."""
    shown = ("reward", "accuracy", "transfer", "length", "tokens_per_s_sample")
    figures = {name: f"{metrics[name]:.3g}" for name in shown if name in metrics}
    bar.set_postfix(figures)
    step = metrics["step"]
    if bar.disable and (step == 1 or step % 10 == 0):  # stderr is no terminal: a plain line
        figures = ", ".join(f"{name} {value}" for name, value in figures.items())
        print(f"step {step} of {config.steps}: {figures}", file=sys.stderr)
    if config.show_every and step % config.show_every == 0:
        live = live_groups(rollouts, config.group)
        bar.write(show_group(live[0] if live else rollouts[: config.group]))


def show_group(group: list[Rollout]) -> str:
    """A group to read: the problem, a rollout with its cut, the continuation, all the rewards."""
    text = group[0].text
    problem = group[0].problem
    if group[0].cuts:
        cut = group[0].cuts[0]
        verdict = "right" if cut.correct else "wrong"
        text = f"{cut.prefix} >>|<< {text[len(cut.prefix) :]}\n--- cut at tau = {cut.tau:.2f}, "
        text += f"receiver goes on ({verdict}): {cut.continuation}"
    lines = [f"--- problem (answer {problem.answer}): {problem.question}\n--- rollout: {text}"]
    for r in group:
        rewards = "".join(f"{name} {value:.2f}  " for name, value in r.rewards.items())
        lines.append(f"    {rewards}reward {r.reward:.2f}  advantage {r.advantage:+.2f}")
    return printable("\n".join(lines))


def printable(text: str) -> str:
    """Model text for a terminal: control characters, and what it has no code for, spelled out."""
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    encoding = getattr(sys.stdout, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# ==================================================================================== command line
# Settings come from the command line, from an earlier run's config.json, or from a caller of
# `train`; all pass `resolve` before anything is loaded.

# What may differ when a run is resumed, because it does not change its course.
HARMLESS = "steps save_every keep show_every eval_data eval_k track "
HARMLESS += "token_budget max_rows gradient_checkpointing offload"


def check_settings(config: Config):
    """Types, ranges, and what does not fit together."""
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        low, high = f.metadata["low"], f.metadata["high"]
        flag = f"--{f.name.replace('_', '-')} {value!r}"
        kinds = (int, float) if isinstance(f.default, float) else (type(f.default),)
        require(type(value) in kinds, f"{flag}: must be of type {kinds[-1].__name__}")
        require(low is None or low <= value <= high, f"{flag}: must be from {low} to {high:g}")
        damaged = isinstance(value, str) and re.search("[\0\ud800-\udfff]", value)
        require(not damaged, f"{flag}: holds a character that is none")
        if f.name.endswith("temperature"):
            require(value == 0 or value >= 0.01, f"{flag}: must be 0 or at least 0.01")
    require("{question}" in config.prompt, "--prompt: {question} is missing in it")
    require(config.track in ("", "wandb", "trackio"), "--track: wandb or trackio")
    weights = [value for name, value in vars(config).items() if name.endswith("_weight")]
    require(any(weights), "all reward weights are 0")


def resolve(config: Config) -> Config:
    """Refuse what is wrong before anything is loaded; name the tiny files and the run."""
    check_settings(config)
    known = re.fullmatch(r"cpu(:0)?|mps|cuda(:\d+)?", config.device)
    require(known, f"--device {config.device!r}: must be like cpu, cuda, cuda:1 or mps")
    try:
        device = torch.zeros(1, device=config.device).device  # "cuda" is "cuda:0", say
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {config.device}: there is none ({error})") from None
    if device.type == "cuda":
        torch.cuda.set_device(device)  # kernels, graphs and memory figures are of this one
    kind = "rltr" if config.transfer_weight > 0 else "rlvr"
    out = config.out or f"runs/{Path(config.model).name}-{kind}-seed{config.seed}"
    if not config.out and Path(out).exists():
        out += time.strftime("-%Y%m%d-%H%M%S")
    return dataclasses.replace(config, out=out)


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)  # one line, not a manual


def parse_arguments(argv: list[str] | None) -> tuple[Config, bool]:
    """The settings, and whether to resume. Flags override TINY, TINY overrides defaults."""
    parser = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    for f in dataclasses.fields(Config):
        flag = "--" + f.name.replace("_", "-")
        how = {"type": type(f.default), "metavar": type(f.default).__name__.upper()}
        if isinstance(f.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        parser.add_argument(flag, default=argparse.SUPPRESS, help=text, **how)
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in FOLDER")
    given = vars(parser.parse_args(argv))
    folder = given.pop("resume")
    if folder is not None:
        return resumed_config(Path(folder), given), True
    if not given.get("model"):
        given.pop("model", None)
        given = TINY | given
        alone = "this file is alone, without tiny/: give --model, --receiver and --data"
        require(TINY_FOLDER.is_dir(), alone)
    return Config(**given), False


def resumed_config(folder: Path, given: dict) -> Config:
    """The settings of an earlier run; only what is harmless may differ."""
    try:
        saved = json.loads((folder / "config.json").read_text())
        config = Config(**saved)
    except (OSError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"--resume {folder}: no run to resume there ({error})") from None
    differ = [f.name for f in dataclasses.fields(config) if f.name not in saved]  # a later field
    differ += [name for name in given if given[name] != saved.get(name)]
    differ = set(differ) - set(HARMLESS.split())
    require(not differ, f"--resume {folder}: that run has another {', '.join(sorted(differ))}")
    return dataclasses.replace(config, **{**given, "out": str(folder)})


class Output:
    """stdout or stderr that never ends a run: where it cannot be written (a full disk, a pipe or a
    terminal that was closed), what is said gets lost."""

    def __init__(self, stream):
        self.failed = False
        self.stream = stream or open(os.devnull, "w")  # noqa: SIM115 - None: it was closed
        if hasattr(self.stream, "reconfigure"):
            self.stream.reconfigure(errors="backslashreplace")  # for what it has no code for

    def write(self, text: str):
        try:
            self.stream.write(text)
            self.stream.flush()
        except (OSError, ValueError):
            self.failed = True
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def __getattr__(self, name):  # isatty, encoding, ...
        return getattr(self.stream, name)


@contextlib.contextmanager
def safe_output():
    """For a `main`: stdout and stderr of the kind above, and no chatter of transformers."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    stdout = contextlib.redirect_stdout(Output(sys.stdout))
    stderr = contextlib.redirect_stderr(Output(sys.stderr))
    with stdout, stderr, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@safe_output()
def main(argv: list[str] | None = None) -> int:
    """Train and show a table. What the user can put right is one line, and exit code 2."""
    try:
        config, resume = parse_arguments(argv)
        show_results(train(config, resume).parent, config)
        return 0
    except KeyboardInterrupt:
        print("\nrltr: stopped", file=sys.stderr)
        return 130
    except torch.OutOfMemoryError:
        knobs = "--gradient-checkpointing, --offload, a smaller --token-budget or --max-rows"
        message = f"out of memory; try {knobs}; a run that has begun goes on with --resume"
    except (UserError, OSError, torch.AcceleratorError) as error:
        message = str(error)
    print("rltr: " + one_line(message), file=sys.stderr)
    return 2


def one_line(message: str) -> str:
    return printable(" ".join(message.split()))[:2000]


def show_results(run: Path, config: Config):
    """What stands where, and what to do next. Table and page are made by processes of their own:
    the memory of training is free, and a copied rltr.py does without them."""
    torch.cuda.empty_cache()
    if config.eval_data:  # before and after
        run_script("eval.py", "--run", run)
    page = run / "report.html"
    run_script("benchmarks/report.py", run, "-o", page)
    print(f"the trained model: {run}/final")
    if page.exists():
        print(f"a page about the run: {page}")
    if not config.eval_data:
        print(f"to evaluate it: python eval.py --model {run}/final --data math500 --k 64")
    if config.transfer_weight > 0:
        print("to compare: a run with --transfer-weight 0, which is RLVR")


def run_script(name: str, *arguments):
    """A script that stands beside this file."""
    script = Path(__file__).parent / name
    done = False
    if script.exists():
        with contextlib.suppress(OSError):  # no process could be started
            # Ctrl-C is for us: it ends the script, too.
            command = [sys.executable, script, *arguments]
            done = subprocess.run(command, start_new_session=True).returncode == 0
    if not done:
        command = shlex.join(map(str, ["python", script, *arguments]))
        print(f"{name} is not here, or has failed, so this was not done: {command}")


# ======================================================================================== with TRL


class TransferReward:
    """The transfer reward as a reward function of TRL's trainers, for whoever outgrows one GPU.

    reward_funcs=[.., TransferReward("Qwen2.5-1.5B-Instruct", tokenizer)], and a column `answer` in
    the data. tokenizer: the generator's, whose tokens are cut; without it they are the receiver's.
    settings: fields of Config. Every call in every process has random numbers of its own."""

    __name__ = "transfer_reward"  # TRL names its log columns after this

    def __init__(self, receiver: LM | str, tokenizer=None, *, stop_ids=(), **settings):
        self.config = Config(**settings)
        check_settings(self.config)
        self.receiver = receiver
        if isinstance(receiver, str):
            self.receiver = load_lm(receiver, self.config.device)
        self.knows_ids = tokenizer is not None
        tokenizer = tokenizer or self.receiver.tokenizer
        stop_ids = tuple(stop_ids) or find_stop_ids(None, tokenizer)
        self.generator = LM(None, tokenizer, stop_ids, len(tokenizer), 2**30)  # to read with
        # Calls are numbered through over all processes, so that each has random numbers of its own.
        self.call = int(os.environ.get("RANK", 0))

    def __call__(self, prompts, completions, answer, completion_ids=None, **others) -> list[float]:
        """prompts and completions: texts or lists of messages -> rewards in [0, 1]."""
        rollouts = []
        for i, completion in enumerate(completions):
            text = completion if isinstance(completion, str) else completion[-1]["content"]
            tokens = encode_text(self.generator.tokenizer, text)
            if self.knows_ids and completion_ids is not None:
                tokens = list(completion_ids[i])
            rollouts.append(Rollout(Problem(prompts[i], answer[i]), [], tokens, [], True, text))
        taus = draw_taus(len(rollouts), self.config, self.call)
        cut_rollouts(rollouts, self.generator, taus)
        key = (CONTINUATION, self.call)
        continue_cuts(rollouts, self.generator, self.receiver, self.config, key)
        score_transfer(rollouts)
        self.call += int(os.environ.get("WORLD_SIZE", 1))
        return [rollout.rewards["transfer"] for rollout in rollouts]


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # tidies up first
    sys.exit(main())
