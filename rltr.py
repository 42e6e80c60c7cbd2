"""RLTR, Reinforcement Learning with Transferable Reward, in one file.

Paper: "Beyond Correctness: Learning Robust Reasoning via Transfer" (Lee, Abbasloo, Tack, Shin;
arXiv 2602.08489). A generator learns to reason so that *another* model can pick its reasoning up
half-way and still reach the right answer: each rollout is cut at a random point, a frozen receiver
continues from there, and the share of right endings is a reward beside the usual one.

Problem x has the right answer g, the generator pi writes rollouts y for it, of |y| tokens without
the stop token, M is the receiver. Start at `train`: its loop is these eight steps, each in the
function named here. They end before line 500; what stands below them may be skipped.

    1  y_1..y_G ~ pi(. | x)                       G rollouts of a problem       sample_rollouts
    2  R_ans = 1[answer(y) = g]                   is the final answer right?    score_answers
    3  tau ~ U(0,1], prefix = y[:floor(tau |y|)]  cut the reasoning, K times    cut_rollouts
    4  z ~ M(. | x, prefix)                       the receiver goes on          continue_cuts
    5  R_trans = mean_K 1[answer(prefix+z) = g]   was it transferable?          score_transfer
    6  R = a R_ans + b R_trans + c R_fmt          b = 0 is RLVR                 combine_rewards
    7  A = (R - mean_group) / (std_group + eps)   against its own group         assign_advantages
    8  ascend 1/N sum min(rho A, clip(rho) A)     policy gradient (GRPO)        update

R_fmt: y stopped by itself and has an answer (\\boxed{} or #### 5). rho = pi / pi_sampling of a
token, N tokens. GRPO: group-relative policy optimization; RLVR: RL with verifiable rewards (R_ans).

From the paper: steps 1-7 with K = 1, format with weight 1, then GRPO; one frozen receiver, tau
uniform with floor, binary rewards. We do not know its a, b, models, learning rate, group size and
receiver decoding. Ours, each of them a flag or one function:
  1. a = b = 1, and c = 0.1 where the paper has 1; models, lr and sizes as in `Config`.
  2. The receiver samples at temperature 1. It may write as many tokens as the generator had left
     of --max-new-tokens, plus a margin of 64; a prefix too long for its context scores 0.
  3. The loss is one token mean over the rollouts of an optimizer step, clipped at 0.8 and 1.28.
  4. Groups whose rewards are all equal hold no information: they leave the update and N.
  5. The stop token is stripped before the cut: with it the receiver's turn would end at tau = 1.
  6. The answer is looked for in prefix and continuation together, as in a text of one author. So a
     prefix that holds an answer already earns what that answer is worth, unless the receiver gives
     another. Such cuts are counted as `leak`; `transfer_unleaked` is the transfer of the others.
Left out on purpose: several GPUs (tools/with_trl.py), a KL penalty, LoRA, models with unusual
attention (they are refused), answers of kinds that few data sets have (they count as wrong).

    python rltr.py                                    # built-in tiny models: any laptop, no network
    python rltr.py --transfer-weight 0                # the same task with the answer reward alone
    python rltr.py --model Qwen2.5-1.5B --steps 500   # one GPU: MATH, receiver its -Instruct model
    python rltr.py --resume runs/NAME                 # goes on where that run stopped
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.24", "datasets>=3.0", "numpy>=1.26", "tqdm>=4.66"]
# ///

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import itertools
import json
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from operator import add, mul, sub, truediv
from pathlib import Path

import filelock
import mpmath
import numpy as np
import torch
import transformers
from torch.nn.utils.rnn import pad_sequence
from torch.utils.checkpoint import checkpoint as recompute
from tqdm import tqdm

# ======================================================================================= settings
PROMPT = "{question}\nPlease reason step by step, and put your final answer within \\boxed{}."
# Short names of data sets: hub id, and configuration where there are several.
SOURCES = {"gsm8k": "openai/gsm8k:main", "math": "nlile/hendrycks-MATH-benchmark"}
SOURCES |= {"math500": "HuggingFaceH4/MATH-500", "aime24": "math-ai/aime24"}
SOURCES |= {"amc23": "math-ai/amc23"}


def option(default, help_text: str, low: float | None = None, high: float = 1e9):
    return field(default=default, metadata={"help": help_text, "low": low, "high": high})


@dataclass
class Config:  # every field is a flag of the command line, with its help text
    model: str = option("", "generator: a folder or hub name; empty: the built-in tiny task")
    receiver: str = option("Qwen2.5-1.5B-Instruct", "frozen receiver: folder, hub name, or self")
    data: str = option("math", "gsm8k, math, math500, aime24, amc23, a hub id, or a local file")
    split: str = option("", "split of a hub data set; empty: its training split")
    limit: int = option(0, "use only the first N problems (0: all)", 0)
    prompt: str = option(PROMPT, "what the models are asked, with {question} in it")
    out: str = option("", "run folder; empty: runs/MODEL-b1-seed0-TIME")
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
    lr: float = option(2e-6, "learning rate of the fp32 master weights", 0, 1)
    warmup: int = option(10, "steps of linear warm-up; constant afterwards", 0)
    max_grad_norm: float = option(1.0, "gradients are scaled down to this norm", 1e-6)
    epochs: int = option(1, "passes over a batch; 1 with 1 minibatch is on-policy", 1, 1000)
    minibatches: int = option(1, "optimizer steps a pass", 1, 1000)
    token_budget: int = option(
        2**14, "padded tokens in a micro-batch; halved where a GPU lacks memory", 1
    )
    max_rows: int = option(0, "rows in the KV cache at once (0: what fits the memory)", 0)
    gradient_checkpointing: bool = option(False, "recompute activations: slower, less memory")
    offload: bool = option(False, "master weights and Adam's moments in host memory")
    seed: int = option(0, "seed of everything random", 0, 2**62)
    save_every: int = option(50, "steps between checkpoints, two are kept (0: at the end)", 0)
    show_every: int = option(25, "steps between groups shown to read (0: never)", 0)
    track: str = option("", "log the metrics with this package, too: wandb or trackio")
    device: str = option("cuda" if torch.cuda.is_available() else "cpu", "cpu, cuda, cuda:1, mps")
    eval_data: str = option("", "problems for a closing before/after table (empty: no table)")
    eval_k: int = option(64, "completions a problem in that table", 1, 1e6)


# With no --model these replace the defaults: the built-in task (tiny/README.md).
TINY_FOLDER = Path(__file__).parent / "tiny"
TINY = {"model": f"{TINY_FOLDER}/generator", "receiver": f"{TINY_FOLDER}/receiver"}
TINY |= {"data": f"{TINY_FOLDER}/train.jsonl", "eval_data": f"{TINY_FOLDER}/test.jsonl"}
TINY |= {"prompt": "{question}", "max_new_tokens": 32, "receiver_margin": 4, "device": "cpu"}
TINY |= {"steps": 150, "lr": 5e-4}

DATA, ROLLOUT, CUT, CONTINUATION, EVALUATION = range(1, 6)  # what random numbers are drawn for


def rng(*keys: int) -> np.random.Generator:
    """A function of its keys (seed, purpose, step, ..) alone: nothing to restore on resuming."""
    return np.random.default_rng(keys)


class UserError(Exception):
    """Something the user can put right: it is shown as one line."""


def require(condition, message: str):
    if not condition:
        raise UserError(message)


# ======================================================================================== records
# A Rollout is filled in step by step. A batch is a flat list: G of a problem, G of the next, ..
@dataclass(frozen=True)
class Problem:
    question: str
    answer: str  # the bare gold answer: "18", "\\frac{3}{4}"


@dataclass
class LM:  # a causal language model, with what is needed to talk to it
    model: torch.nn.Module
    tokenizer: transformers.PreTrainedTokenizerBase
    stop_ids: tuple[int, ...]  # tokens that end a completion
    vocab_size: int  # tokens that may be sampled: the model's vocabulary can have more rows
    context: int  # longest sequence in tokens

    def sample(self, prompts, limits, temperature, config, key, samples=1) -> list[Completion]:
        """`generate`, prompt by prompt, with this model's stop tokens and vocabulary."""
        how = {"stop_ids": self.stop_ids, "vocab_size": self.vocab_size, "samples": samples}
        how |= {"max_new_tokens": limits, "temperature": temperature, "max_rows": config.max_rows}
        return generate(self.model, prompts, seed=(config.seed, *key), **how)


@dataclass
class Completion:  # what `generate` returns
    tokens: list[int]  # with the stop token, if it was sampled
    logprobs: list[float]  # of these tokens, under the distribution they were drawn from
    finished: bool  # ended by a stop token, not by the length limit


@dataclass
class Cut:  # a cut of a rollout, and what the receiver made of it (steps 3-5)
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
    return [rollouts[i : i + group] for i in range(0, len(rollouts), group)]


# ======================================================================================= training
def train(config: Config, resume: bool = False) -> Path:
    """Run RLTR, or RLVR where transfer_weight is 0; returns the folder of the trained model."""
    check_settings(config)
    with contextlib.closing(Run(config, resume)) as run:
        generator, receiver, tasks = load_everything(config, run.checkpoint)
        optimizer = MasterAdamW(generator.model, config.lr, offload=config.offload)
        run.begin(optimizer)

        bar = tqdm(range(run.start, config.steps))
        for step in bar:
            now = time.perf_counter()
            lr = config.lr * min(1.0, (step + 1) / max(1, config.warmup))  # linear warm-up
            optimizer.adam.param_groups[0]["lr"] = lr
            metrics = {"step": step + 1, "lr": lr}
            batch = draw_problems(tasks, config.prompts, config.seed, step)

            rollouts = sample_rollouts(generator, batch, config, (ROLLOUT, step))  # 1
            now = lap(metrics, "sample", rollouts, now)
            score_answers(rollouts)  # 2
            if receiver is not None:  # b > 0
                cut_rollouts(rollouts, generator, config, (CUT, step))  # 3
                continue_cuts(rollouts, generator, receiver, config, (CONTINUATION, step))  # 4
                score_transfer(rollouts)  # 5
                now = lap(metrics, "transfer", rollouts, now)
            combine_rewards(rollouts, config)  # 6
            assign_advantages(rollouts, config)  # 7
            metrics |= update(generator, optimizer, rollouts, config)  # 8
            lap(metrics, "update", rollouts, now)
            metrics |= summarize(rollouts, config)
            bar.set_postfix(reward=metrics["reward"], accuracy=metrics["accuracy"])
            if config.show_every and (step + 1) % config.show_every == 0:
                bar.write(show_group(rollouts[: config.group]))
            run.log(metrics, rollouts[: config.group])  # one group, to read
            run.save_if_due(generator, optimizer, step + 1)
        return run.finish(generator)


def sample_rollouts(generator: LM, tasks: list, config: Config, key: tuple) -> list[Rollout]:
    """Step 1: G completions of each problem, y ~ pi(. | x).
    Tasks are pairs of a problem and its prompt in token ids. Sampling is from the full softmax (no
    top-k, no top-p), for the loss speaks of that. `key` selects a stream of random numbers."""
    prompts = [prompt for _, prompt in tasks]
    limits = [min(config.max_new_tokens, generator.context - len(prompt)) for prompt in prompts]
    completions = generator.sample(prompts, limits, config.temperature, config, key, config.group)
    rollouts = []
    for number, c in enumerate(completions):
        problem, prompt = tasks[number // config.group]
        text = decode(generator.tokenizer, c.tokens)
        rollouts.append(Rollout(problem, prompt, c.tokens, c.logprobs, c.finished, text))
    return rollouts


def score_answers(rollouts: list[Rollout]):
    """Step 2: R_ans = 1[answer(y) = g]. And R_fmt = 1[y stopped by itself and has an answer].
    A reward of your own: compute rewards["name"] here, and add the field name_weight to Config."""
    for rollout in rollouts:
        rollout.verdict = judge_answer(rollout.text, rollout.problem.answer)
        has_answer = rollout.verdict != "missing"
        rollout.rewards["answer"] = float(rollout.verdict == "right")
        rollout.rewards["format"] = float(rollout.finished and has_answer)


def cut_rollouts(rollouts: list[Rollout], generator: LM, config: Config, key: tuple):
    """Step 3: cut each rollout at K places, tau ~ U(0, 1]."""
    uniform = rng(config.seed, *key).random((len(rollouts), config.cuts))  # in [0, 1)
    for rollout, taus in zip(rollouts, 1 - uniform, strict=True):
        for tau in taus:
            rollout.cuts.append(cut_at(rollout, generator, float(tau)))


def cut_at(rollout: Rollout, generator: LM, tau: float) -> Cut:
    """A cut at tau. (Training draws it, evaluation does not.) To cut elsewhere, drop tokens."""
    prefix = cut_prefix(rollout.tokens, tau, generator.stop_ids)
    text = decode(generator.tokenizer, prefix)
    return Cut(tau, len(prefix), text, leaked=extract_answer(text) is not None)


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


def continue_cuts(rollouts: list, generator: LM, receiver: LM, config: Config, key: tuple):
    """Step 4: the frozen receiver goes on from every cut, z ~ M(. | x, prefix).
    It reads the question in its own form, and then the prefix as if it had written that: in the
    same vocabulary the generator's very tokens, else the same text in tokens of its own."""
    same_tokens = generator.tokenizer.get_vocab() == receiver.tokenizer.get_vocab()
    questions = {rollout.problem.question for rollout in rollouts}
    encoded = {question: encode_prompt(receiver, question, config.prompt) for question in questions}
    waiting = []  # cuts, each with its prefix in the receiver's tokens
    prompts = []
    limits = []
    for rollout in rollouts:
        for cut in rollout.cuts:
            prefix = rollout.tokens[: cut.prefix_length]
            if not same_tokens:
                prefix = encode_text(receiver.tokenizer, cut.prefix)
            prompt = encoded[rollout.problem.question] + prefix
            room = receiver.context - len(prompt)
            cut.overflow = room < 1  # not a token fits: no continuation, and no reward
            if not cut.overflow:
                # What the generator could still write and a margin, but a stop token at least.
                limit = config.max_new_tokens - cut.prefix_length + config.receiver_margin
                waiting.append((cut, prefix))
                prompts.append(prompt)
                limits.append(min(room, max(1, limit)))
    completions = receiver.sample(prompts, limits, config.receiver_temperature, config, key)
    for (cut, prefix), completion in zip(waiting, completions, strict=True):
        # A token's text depends on what is before it: after "The" a token may read " cat", and
        # alone "cat"; the cut may have split a character. So both are decoded together.
        before = decode(receiver.tokenizer, prefix)
        both = decode(receiver.tokenizer, prefix + completion.tokens)
        cut.continuation = both.removeprefix(before)
        cut.continuation_length = len(completion.tokens)


def score_transfer(rollouts: list[Rollout]):
    """Step 5: R_trans = the share of the cuts from which the receiver reached the right answer.
    The answer is looked for in prefix and continuation together (see point 6 at the top)."""
    for rollout in rollouts:
        for cut in rollout.cuts:
            whole = cut.prefix + cut.continuation
            cut.correct = not cut.overflow and is_correct(whole, rollout.problem.answer)
        rollout.rewards["transfer"] = mean(cut.correct for cut in rollout.cuts)


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
    std is the population's. Where all rewards of a group are equal the group is *dead*, and A is
    exactly 0: else the rounding error of the mean, divided by a tiny std, would pass for a signal.

    >>> group_advantages([[1.0, 0.0, 0.0, 1.0], [1.1, 1.1, 1.1, 1.1]]).round(decimals=3).tolist()
    [[1.0, -1.0, -1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]

    Dividing by std makes all groups count alike, however small their differences: a reward of tiny
    weight decides alone where the others are equal, and revives groups that were dead."""
    rewards = torch.as_tensor(rewards, dtype=torch.float64)
    advantages = rewards - rewards.mean(dim=1, keepdim=True)
    if normalize_std:
        advantages = advantages / (rewards.std(dim=1, correction=0, keepdim=True) + 1e-6)
    dead = rewards.amax(dim=1, keepdim=True) == rewards.amin(dim=1, keepdim=True)  # [P, 1]
    return advantages.masked_fill(dead, 0.0)


def live_groups(rollouts: list[Rollout], group: int) -> list[list[Rollout]]:
    """The groups to learn from. In the others, the dead ones, every advantage is exactly 0."""
    return [rows for rows in grouped(rollouts, group) if any(r.advantage != 0 for r in rows)]


def policy_objective(logp, old_logp, advantage, clip_low: float, clip_high: float) -> torch.Tensor:
    """Step 8 for each token: min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A). All [N].
    rho = pi / pi_sampling, the probability of a sampled token now over that when it was sampled.
    With one optimizer step a batch (the default) rho is 1 up to rounding, and its gradient is that
    of log pi. The objective itself is then just the mean of A and shows no progress: watch the
    rewards. With --epochs or --minibatches the clip stops moves far away from pi_sampling."""
    rho = torch.exp(logp - old_logp)
    clipped = rho.clamp(1 - clip_low, 1 + clip_high)
    return torch.minimum(rho * advantage, clipped * advantage)


def update(generator: LM, optimizer: MasterAdamW, rollouts: list[Rollout], config: Config) -> dict:
    """Step 8: ascend the token mean of the objective over all groups that are not dead.
    One optimizer step, or `epochs` passes of `minibatches` steps, each with an N of its own."""
    live = live_groups(rollouts, config.group)
    figures = []  # of tokens
    norms = []
    for _ in range(config.epochs):
        for number in range(config.minibatches):
            minibatch = [rollout for rows in live[number :: config.minibatches] for rollout in rows]
            if minibatch:
                figures += fitting_gradient(generator, optimizer, minibatch, config)  # add_gradient
                norms.append(optimizer.step(config.max_grad_norm))
    return update_metrics(figures, norms, config)


def add_gradient(generator: LM, rollouts: list[Rollout], config: Config) -> list[torch.Tensor]:
    """Add the gradient of -1/N sum_tokens min(..) to the model's, micro-batch by micro-batch.
    N counts the completion tokens of all `rollouts`, stop tokens included, so the gradient does not
    depend on the micro-batches. Returns for each: objective, entropy, log rho [3, its tokens]."""
    for module in generator.model.modules():
        # No dropout, as in sampling; but layers recompute activations in training mode only.
        module.training = getattr(module, "gradient_checkpointing", False)
    total_tokens = sum(len(rollout.tokens) for rollout in rollouts)  # N
    token_figures = []
    for batch in micro_batches(rollouts, config.token_budget):
        logp, entropy = completion_logprobs(generator, batch, config.temperature)  # [n], [n]
        old_logp = logp.new_tensor([x for r in batch for x in r.logprobs])  # [n]
        advantage = logp.new_tensor([r.advantage for r in batch for _ in r.tokens])  # [n]
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
    reduced to two numbers a token, and made once more in the backward pass (`recompute`)."""
    device = lm.model.device
    rows = [torch.tensor((rollout.prompt + rollout.tokens)[:-1]) for rollout in rollouts]
    # Padded on the right: causality hides that, and lengths (no pad id) say which tokens count.
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
    for part in zip(states.split(chunk), targets.split(chunk), strict=True):
        part_figures = recompute(token_logprobs, lm, *part, temperature, use_reentrant=False)
        figures.append(part_figures)  # [2, chunk]
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
    A longer row is a batch of its own. The longest come first: if memory runs out, then at once."""
    batches = []
    width = 0
    for rollout in sorted(rollouts, key=lambda r: len(r.prompt + r.tokens), reverse=True):
        if not batches or (len(batches[-1]) + 1) * width > token_budget:
            batches.append([])
            width = len(rollout.prompt + rollout.tokens)
        batches[-1].append(rollout)
    return batches


# ====================================================================================== optimizer
class MasterAdamW:
    """AdamW on fp32 master copies of the weights: in bf16, with 8 bits of precision, a step of 1e-6
    on a weight of 1e-2 rounds to nothing. Gradients of micro-batches add up in fp32, too. With
    `offload` masters and Adam's moments live in host memory; gradients move there once a step."""

    def __init__(self, model, lr: float, weight_decay: float = 0.0, offload: bool = False):
        self.weights = list(model.parameters())
        self.masters = []
        self.sums = {}  # master -> sum of gradients, beside the weight
        for weight in self.weights:
            device = "cpu" if offload else weight.device
            master = weight.detach().to(device, torch.float32, copy=True)
            weight.register_post_accumulate_grad_hook(functools.partial(add_up, self.sums, master))
            self.masters.append(master)
        how = {"betas": (0.9, 0.99), "fused": self.masters[0].device.type == "cuda"}
        self.adam = torch.optim.AdamW(self.masters, lr, weight_decay=weight_decay, **how)

    @torch.no_grad()
    def step(self, max_norm: float) -> float:
        """Clip, step, clear; returns the gradient norm. If that is not finite there is no step."""
        for master, gradient in self.sums.items():
            master.grad = gradient.to(master.device)
        norm = torch.nn.utils.clip_grad_norm_(self.masters, max_norm).item()
        if math.isfinite(norm):
            self.adam.step()
            for weight, master in zip(self.weights, self.masters, strict=True):
                weight.copy_(master)
        self.zero_grad()
        return norm

    def zero_grad(self):
        """Release all gradients, also those of a backward pass that has failed half-way."""
        self.sums.clear()
        for tensor in self.weights + self.masters:
            tensor.grad = None


def add_up(sums: dict, master: torch.Tensor, weight: torch.Tensor):
    """Autograd calls this when the gradient of a weight is complete."""
    if master not in sums:
        sums[master] = torch.zeros_like(weight, dtype=torch.float32)
    sums[master] += weight.grad
    weight.grad = None


def fitting_gradient(generator: LM, optimizer: MasterAdamW, rollouts: list, config: Config) -> list:
    """`add_gradient`, with a token budget that is halved, for good, until the GPU's memory holds a
    micro-batch. Raises torch.OutOfMemoryError where not even one row fits."""
    longest = max(len(rollout.prompt + rollout.tokens) for rollout in rollouts)
    while True:
        try:
            return add_gradient(generator, rollouts, config)
        except torch.OutOfMemoryError:
            if config.token_budget < 2 * longest:  # a row a micro-batch
                raise
        # After the handler: inside it the exception still holds the tensors of the failed trial.
        optimizer.zero_grad()
        torch.cuda.empty_cache()
        config.token_budget //= 2


# ====================================================================================== generation
# Rows that are done leave the batch: the last one moves into their place, a waiting one to the end.
MAX_ROWS = 512  # rows in the cache at once, where memory allows
PREFILL_TOKENS = 8192  # prompt tokens in one forward, about
GRAPH_DEVICES = {"cuda"}  # none, once a graph has failed


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
    seed: int | tuple[int, ...] = 0,
) -> list[Completion]:
    """`samples` completions of each prompt (a list of token ids), side by side, for decoder-only
    models with ordinary attention. max_new_tokens may be one number for each prompt. Temperature 0
    is greedy. Tokens from vocab_size on never come out. max_rows and the free memory bound the rows
    in the cache at once; the others wait. The random numbers of completion i depend on (seed, i)
    alone, so (but for rounding) its text does not depend on other rows. UserError: not finite."""
    if not prompts:
        return []
    limits = max_new_tokens if isinstance(max_new_tokens, list) else [max_new_tokens] * len(prompts)
    require(all(prompts) and min(limits) > 0, "generate: an empty prompt, or no token allowed")
    # Everything below is per row: row i is the completion i.
    prompts = [prompt for prompt in prompts for _ in range(samples)]
    limits = [limit for limit in limits for _ in range(samples)]
    longest = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
    capacity = min(len(prompts), max_rows or MAX_ROWS, affordable_rows(model, longest))
    sampler = Sampler(model, prompts, limits, capacity, longest, temperature, stop_ids, vocab_size)
    keys = seed if isinstance(seed, tuple) else (seed,)
    for row, limit in enumerate(limits):  # in (0, 1]
        sampler.uniform[row, :limit] = torch.from_numpy(1 - rng(*keys, row).random(limit))
    # Long prompts first: neighbours in the queue are of like length, so prefills pad little.
    queue = sorted(range(len(prompts)), key=lambda row: len(prompts[row]), reverse=True)
    attention_before = model.config._attn_implementation
    transformers.AttentionInterface.register("rltr_cached", cached_attention)
    model.eval().set_attn_implementation("rltr_cached")
    try:
        while queue or sampler.active:
            free = capacity - sampler.active
            if queue and free >= min(len(queue), max(1, capacity // 8)):  # not for every free slot
                sampler.admit(queue[:free])
                queue = queue[free:]
            # On a GPU eight steps between two looks, as looking makes the CPU wait.
            for _ in range(8 if model.device.type in GRAPH_DEVICES else 1):
                sampler.advance()
            sampler.release()
    finally:
        model.set_attn_implementation(attention_before)
    return sampler.completions()


def affordable_rows(model, length: int) -> int:
    """Rows of `length` tokens whose K and V fit half the free GPU memory, or 2 GiB on a CPU."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes = 2 * config.num_hidden_layers * heads * size * model.dtype.itemsize * length
    usable = 2**31
    if model.device.type == "cuda":
        held_by_torch = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        usable = (torch.cuda.mem_get_info()[0] + held_by_torch) // 2
    return max(1, usable // row_bytes)


class Sampler:
    """A batch of `capacity` slots, in which the rows (completions) are generated one after another.
    Slots 0 .. active - 1 are at work. The cache of a layer is K and V, [2, capacity, kv_heads,
    length, head_dim]; length is that of the longest row, prompt and completion."""

    def __init__(self, model, prompts, limits, capacity, length, temperature, stop_ids, vocab_size):
        device = model.device
        self.model = model
        self.prompts = prompts
        self.capacity = capacity
        self.length = length
        self.temperature = temperature
        self.vocab_size = vocab_size or 2**30
        self.stop_ids = torch.tensor(list(stop_ids), dtype=torch.long, device=device)
        # For each row: its prompt's last position, the tokens it may have, and what is drawn (-1:
        # nothing yet) with which numbers. Slots that are done write into the last column.
        self.start = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
        self.limit = torch.tensor(limits, device=device)
        self.uniform = torch.zeros(len(limits), max(limits) + 1, device=device)
        self.logprobs = torch.zeros_like(self.uniform)
        self.tokens = torch.full_like(self.uniform, -1, dtype=torch.long)
        # For each slot: its row, its newest token, which is not yet in the cache, and its position.
        self.row = torch.zeros(capacity, dtype=torch.long, device=device)
        self.token = torch.zeros_like(self.row)
        self.position = torch.zeros_like(self.row)
        self.done = torch.ones_like(self.row, dtype=torch.bool)
        self.active = 0
        self.longest = 0  # tokens in the cache of the longest active row
        self.cache = {}  # layer -> K and V
        self.graphs = {}  # (slots, length) -> CUDA graph

    def admit(self, rows: list[int]):
        """Give the next slots to these rows. The samples of a prompt come one after another: it is
        read (prefilled) once, and its K and V are written to all their slots. Its last token is
        not read: it is the input of the first step."""
        new = slice(self.active, self.active + len(rows))
        self.row[new] = torch.tensor(rows)
        self.token[new] = torch.tensor([self.prompts[row][-1] for row in rows])
        self.position[new] = self.start[self.row[new]]
        self.done[new] = False
        self.longest = max(self.longest, len(self.prompts[rows[0]]) - 1)
        slot = self.active
        self.active += len(rows)
        # [[0, 1], [2, 3]]: rows 0 and 1 have the same prompt
        groups = [list(g) for _, g in itertools.groupby(rows, lambda row: id(self.prompts[row]))]
        while groups and len(self.prompts[groups[0][0]]) > 1:
            count = max(1, PREFILL_TOKENS // (len(self.prompts[groups[0][0]]) - 1))
            ids = [torch.tensor(self.prompts[group[0]][:-1]).long() for group in groups[:count]]
            ids = pad_sequence(ids, batch_first=True).to(self.row.device)  # [B, T]
            copies = [place for place, group in enumerate(groups[:count]) for _ in group]
            copies = torch.tensor(copies, device=ids.device)  # the place in ids, for each slot
            attend = functools.partial(self.attend_in_prompts, slot, copies)
            self.model.base_model(input_ids=ids, use_cache=False, attend=attend)
            slot += len(copies)
            groups = groups[count:]

    def advance(self):
        """A step of all active slots. On a GPU it is a recorded CUDA graph, as to launch a thousand
        kernels takes longer than to run them. A graph has fixed shapes: there is one for each
        number of slots (rounded up to a power of two) and cache length (64, 128, ...)."""
        self.longest = min(self.longest + 1, self.length)
        if self.row.device.type not in GRAPH_DEVICES:
            self.step(self.active, self.longest)
            return
        slots = min(1 << (self.active - 1).bit_length(), self.capacity)  # 5 active: 8, 3 are done
        length = min(math.ceil(self.longest / 64) * 64, self.length)
        if (slots, length) in self.graphs:
            self.graphs[slots, length].replay()
            return
        self.step(slots, length)  # as it is; also the warm-up that a capture needs
        try:
            graph = torch.cuda.CUDAGraph()
            pools = [other.pool() for other in self.graphs.values()]  # one for all: they take turns
            with torch.cuda.graph(graph, pool=pools[0] if pools else None):
                self.step(slots, length)  # is recorded, not run
            self.graphs[slots, length] = graph
        except RuntimeError as error:  # its forward waits for the device, say
            GRAPH_DEVICES.clear()
            torch.cuda.set_stream(torch.cuda.default_stream())  # the failed capture left its own
            print(f"no CUDA graphs, so sampling is slow: {error}", file=sys.stderr)

    def step(self, slots: int, length: int):
        """One token for each of the first slots, which have at most `length` in the cache. Nothing
        in here waits for the device or depends on values, so that it can be a CUDA graph."""
        row = self.row[:slots]
        position = self.position[:slots]
        done = self.done[:slots]
        logits = self.model(
            input_ids=self.token[:slots, None],
            position_ids=position[:, None],
            use_cache=False,
            attend=functools.partial(self.attend_to_cache, length),
        ).logits[:, -1, : self.vocab_size]  # [slots, V]
        drawn = position - self.start[row]  # tokens before this one
        column = torch.where(done, self.tokens.shape[1] - 1, drawn)
        tokens, logprobs = sample_tokens(logits, self.temperature, self.uniform[row, column])
        self.tokens[row, column] = tokens
        self.logprobs[row, column] = logprobs
        self.token[:slots] = tokens
        stopped = (tokens[:, None] == self.stop_ids).any(dim=1)
        position += ~done
        done |= stopped | (drawn + 1 >= self.limit[row])

    def release(self):
        """Close the gaps that slots leave that are done. Slots 0..5 are active, 1 and 4 are done:
        four stay, so 0..3 must be filled. 1 is a hole, 5 is beyond and running: 5 moves to 1."""
        done = self.done[: self.active].nonzero().flatten().tolist()  # waits for the device
        if done:
            self.active -= len(done)
            holes = [slot for slot in done if slot < self.active]
            movers = sorted(set(range(self.active, self.active + len(done))) - set(done))
            moves = torch.tensor([movers, holes], dtype=torch.long, device=self.row.device)
            for state in (self.row, self.token, self.position, self.done):
                state[moves[1]] = state[moves[0]]
            for cache in self.cache.values():
                cache[:, moves[1], :, : self.longest] = cache[:, moves[0], :, : self.longest]
            self.done[self.active :] = True
            self.position[self.active :] = 0
            self.longest = int(self.position.max())

    def completions(self) -> list[Completion]:
        finite = self.logprobs[:, :-1].isfinite().all()
        require(finite, f"model {self.model.name_or_path}: its outputs are not finite numbers")
        counts = (self.tokens[:, :-1] >= 0).sum(dim=1).tolist()
        rows = zip(counts, self.tokens.tolist(), self.logprobs.tolist(), strict=True)
        stops = set(self.stop_ids.tolist())
        return [Completion(t[:n], logprobs[:n], t[n - 1] in stops) for n, t, logprobs in rows]

    def write(self, layer, slots, positions, key, value) -> torch.Tensor:
        """Put [B, kv_heads, T, D] into slots [B] of a layer's cache, at positions [B or 1, T]."""
        if layer not in self.cache:
            shape = (2, self.capacity, key.shape[1], self.length, key.shape[3])
            self.cache[layer] = key.new_zeros(shape)
        for cache, new in zip(self.cache[layer], (key, value), strict=True):
            cache[slots[:, None], :, positions] = new.transpose(1, 2)
        return self.cache[layer]

    def attend_in_prompts(self, slot, copies, layer, query, key, value, scaling, window, softcap):
        """Whole prompts [B, heads, T, D], padded on the right, which causality hides."""
        length = key.shape[2]
        positions = torch.arange(length, device=key.device)[None]  # [1, T]
        slots = torch.arange(slot, slot + len(copies), device=key.device)
        self.write(layer, slots, positions, key[copies], value[copies])
        if softcap is None and (window is None or window >= length):
            # torch's own, for it never holds the scores of a long prompt, [B, heads, T, T].
            how = {"is_causal": True, "scale": scaling, "enable_gqa": key.shape[1] < query.shape[1]}
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, **how)
        return attention(query, key, value, positions, scaling, window, softcap)

    def attend_to_cache(self, length, layer, query, key, value, scaling, window, softcap):
        """A new token of each of the first B slots, [B, heads, 1, D], attends to its row."""
        slots = torch.arange(len(query), device=query.device)
        positions = self.position[: len(slots), None]  # [B, 1]
        keys, values = self.write(layer, slots, positions, key, value)[:, : len(slots), :, :length]
        return attention(query, keys, values, positions, scaling, window, softcap)


def cached_attention(
    module, query, key, value, mask, attend, scaling=None, sliding_window=None, softcap=None, **_
):
    """What every layer calls, in the convention of transformers' AttentionInterface. `attend`,
    which the model's forward was given, is one of the two functions of the Sampler above."""
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    out = attend(module.layer_idx, query, key, value, scaling, sliding_window, softcap)
    return out.transpose(1, 2), None  # [B, T, heads, D], no weights


def attention(query, key, value, positions, scaling, window, softcap) -> torch.Tensor:
    """Attention, written out: scores, mask, softmax, product. Returns [B, heads, T, D].
    query [B, heads, T, D] at positions [B or 1, T], key and value [B, kv_heads, L, D]. The query
    heads that share a K/V head are rows of one matrix, so K and V are never expanded."""
    B, heads, T, D = query.shape
    kv_heads, L = key.shape[1:3]
    groups = heads // kv_heads
    query = query.reshape(B, kv_heads, groups * T, D)
    scores = query @ key.transpose(2, 3) * scaling  # [B, kv_heads, groups * T, L]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)  # Gemma 2
    cached = torch.arange(L, device=key.device)
    hidden = cached > positions[:, :, None]  # [B or 1, T, L]: what comes later
    if window is not None:
        hidden |= cached <= positions[:, :, None] - window  # what has left the sliding window
    hidden = hidden.repeat(1, groups, 1)[:, None]  # [B or 1, 1, groups * T, L]
    weights = scores.masked_fill(hidden, -torch.inf).softmax(-1, dtype=torch.float32)
    return (weights.to(value.dtype) @ value).view(B, heads, T, -1)


def sample_tokens(logits: torch.Tensor, temperature: float, uniform: torch.Tensor):
    """Inverse-CDF sampling: the first token whose cumulative probability reaches u.
    logits [n, V], uniform [n] in (0, 1] -> tokens [n], log-probs [n]. It needs one number a token,
    a row's own. As u > 0 no token of probability 0 comes out (rounding aside: hence the clamp)."""
    if temperature not in (0, 1):
        logits = logits.float() / temperature
    probs = logits.softmax(-1, dtype=torch.float32)
    if temperature == 0:
        tokens = logits.argmax(-1)
    else:
        cdf = probs.cumsum(-1)
        tokens = torch.searchsorted(cdf, uniform[:, None] * cdf[:, -1:]).squeeze(1)
        tokens = tokens.clamp(max=logits.shape[1] - 1)  # NaN: `completions` complains
    return tokens, probs.gather(1, tokens[:, None]).squeeze(1).clamp(min=1e-37).log()


# ======================================================================================= answers
# Is a model's answer equal to the gold answer? In doubt it is not, for reinforcement learning finds
# what passes for right. No text is executed, and all work is bounded. An answer becomes tokens, and
# these a value: a kind and its parts, as ("number", 5), ("unit", "cm", ..), ("named", "x", ..).
MAX_CHARS = 100  # of an answer
# At 120 digits rounding hides no difference, as of √(10^14+1) and 10^7. The last 20 may get lost.
MP = mpmath.mp.clone()
MP.dps = 120
MAX_BITS = 332  # before or behind the point: numbers lie between 10^-100 and 10^100


def is_correct(text: str, gold: str) -> bool:
    r"""Whether the final answer in a model's completion equals the gold answer.
    >>> is_correct(r"The area is \boxed{14\pi \text{ cm}^2}.", r"14 \pi"), is_correct("5", "5")
    (True, False)
    """
    return judge_answer(text, gold) == "right"


def judge_answer(text: str, gold: str) -> str:
    """One of "right", "wrong", "missing" (no answer) and "unparsed" (not understood: wrong too)."""
    answer = extract_answer(text)
    return "missing" if answer is None else compare(answer, gold)


def extract_answer(text: str) -> str | None:
    r"""The content of the last \boxed{} that holds something, else of a line '#### 5', else None.
    >>> extract_answer(r"\boxed{1}? No: \boxed{\frac{3}{7}}. So it is in the \boxed{}.")
    '\\frac{3}{7}'
    """
    boxes = text.replace(r"\fbox", r"\boxed").split(r"\boxed")[1:]
    for box in reversed(boxes):
        if re.match(r" [^\s{}$]+\$", box):  # MATH has \boxed 2$
            return box[1 : box.index("$")]
        if re.match(r"\s*\{\s*[^\s}]", box):  # not the word alone, nor an empty box
            depth = 0
            for brace in re.finditer(r"\\.|[{}]", box):
                depth += {"{": 1, "}": -1}.get(brace[0], 0)
                if depth == 0:
                    return box[: brace.start()].strip()[1:].strip()
            return None  # it is not closed
    lines = re.findall(r"^\**####[ \t]*([-+$]*\.?\d[^\r\n]*)", text[-3 * MAX_CHARS :], re.M)
    return lines[-1].rstrip("* ") if lines else None


def answers_equal(a: str, b: str) -> bool:
    """Whether two bare answers are equal. Symmetric, reflexive, never raises."""
    return compare(a, b) == "right"


def compare(a: str, b: str) -> str:
    """Two bare answers: "right", "wrong", or "unparsed" where one of them is not understood.
    The polynomial identity test: two expressions in x are equal if they agree at random points, as
    different ones hardly ever do. Two points are too few, though: at half of them x+1 is |x|+1."""
    a, b = sorted((a.strip(), b.strip()))  # so that their order cannot matter
    if a == b:
        return "right"
    if max(len(a), len(b)) > MAX_CHARS:
        return "unparsed"
    if tokenize(a) == tokenize(b):
        return "right" if tokenize(a) else "wrong"
    points = 16 if "name:" in " ".join(tokenize(a) + tokenize(b)) else 1
    agreed = 0
    try:
        for point in range(points):
            with contextlib.suppress(ArithmeticError):  # undefined, or too large to compute
                if not equal(value_at(point, a), value_at(point, b)):
                    return "wrong"
                agreed += 1
    except (ValueError, TypeError, LookupError, RecursionError):
        return "unparsed"
    return "right" if agreed >= min(3, points) else "unparsed"


@functools.lru_cache(10_000)
def equal(u: tuple, v: tuple) -> bool:
    """Of two values. x=5 is 5, 5 cm is 5, and 1,2 is 2,1; but x=5 is not y=5, nor 5 cm 5 km."""
    for kind in ("named", "set", "unit"):
        if u[0] == v[0] == kind and u[1] != v[1]:
            return False
        u = u[2] if u[0] == kind else u
        v = v[2] if v[0] == kind else v
    if u[0] in NUMERIC and v[0] in NUMERIC:
        return abs(u[-1] - v[-1]) <= abs(u[-1]) / 10**100
    if u[0] != v[0] or len(u) != len(v) or u[0] == "word":
        return u == v
    names = {part[1] for part in u[1:] + v[1:] if part[0] == "named"}
    if u[0] not in (",", "∪") or len(names) > 1 or len(u) > 10:  # x=1,y=2 is 1,2, but not 2,1
        return all(map(equal, u[1:], v[1:]))
    return all(sum(equal(p, q) for q in u[1:]) == sum(equal(p, q) for q in v[1:]) for p in u[1:])


# What has several spellings, in pairs.
SPELLINGS = r"""\times *  \cdot *  × *  · *  \div /  ÷ /  per /  − -  \pm ±  \le ≤  \leq ≤  <= ≤
\leqslant ≤  \ge ≥  \geq ≥  >= ≥  \geqslant ≥  \lt <  \gt >  \ne ≠  \neq ≠  != ≠  \approx =  \in ∈
\cup ∪  and ,  or ∪  & ,  ; ,  \infty ∞  \pi π  pi π  e e  i i  \sqrt √  sqrt √  \{ ⦃  \} ⦄  \$ $
\% unit:%  % unit:%  percent unit:%  ° unit:°  degrees unit:°  \emptyset word:∅
\varnothing word:∅  \dfrac \frac  \tfrac \frac  \cfrac \frac  \vert |  \lvert |  \rvert |
YES word:yes  NO word:no  sin \sin  cos \cos  tan \tan  ln \ln  log \log10  \log \log10
\arcsin \asin  \arccos \acos  \arctan \atan"""
SPELLING = dict(zip(SPELLINGS.split()[::2], SPELLINGS.split()[1::2], strict=True))
UNITS = """cm m km mm in inche inch ft feet foot yd yard mile mph g kg lb pound oz ounce gram L
liter s sec second min minute h hr hour day week month year dollar cent rad radian unit square sq
cubic people student book page apple egg cup card box boxe game grade point piece am pm old"""
TOKENS = {  # kind of token: what it looks like
    "text": r"\\(?:text[a-z]*|mathrm|mbox)\s*\{[^{}]*\}",
    "nothing": r"[\s~\u00a0\u2009\u202f]|\\[,;:!> ()\[\]]|\\q?quad(?![a-z])|(?<!\\)\$"
    r"|\\(?:left|right|[bB]igg?[lrm]?|displaystyle|limits|angle|mathbf|boldsymbol|vec)(?![a-z])"
    r"|(?<=\d)\s*\^?\{?\s*(?:\\(?:text|mathrm)\s*\{)?(?:st|nd|rd|th)\b[\s}]*",  # 12^{th}
    "degree": r"\^\s*\{?\s*(?:\\circ(?![a-z])|°)\s*\}?|\\degree",
    "begin": r"\\begin\s*\{(?:[pb]?matrix|array)\}(?:\{[lcr|]*\})?",
    "end": r"(?:\\\\\s*)?\\end\s*\{(?:[pb]?matrix|array)\}",
    "row": r"\\\\",
    "number_in_groups": r"(?<![\d.,}])[1-9]\d{0,2}(?:(?:,|\{,\}|\\,|,\\!\s?|[\u2009\u202f])\d{3})+"
    r"(?![\d,]|[^(\[{]*[)\]}])(?:\.\d+)?",  # 12,500 outside of brackets
    "number_after_frac": r"(?<=frac)\d|(?<=frac )\d|(?<=frac\d)\d|(?<=frac \d)\d|(?<=\d\})\d",
    "mixed": r"(?<![\w.^}/])\d+(?=\s*\\[dt]?frac(?:\d\d|\{\d+\}\{\d+\})|\s+\d+/\d+(?![\w.^]))",
    "word": r'"[A-Za-z.]+|(?<![\d)}A-Za-z])[A-Za-z]{3,}|(?<=\d)[a-z]{4,}|(?<=[\d\s])cm\b|^(?i:no)$'
    r"|(?<=\s)(?:km|mm|ft|in|kg|am|pm)\b|(?<![A-Za-z])(?:pi|or|ln|sin|cos|tan|log)(?![a-z])",
    "name": r"(?:[fghPQ](?:\^\{-1\})?\([\w.-]*\)|[A-Z]+|[a-z]|\d+(?=_)|\\(?:alpha|beta|gamma|delta|"
    r"epsilon|theta|lambda|mu|rho|sigma|tau|phi|omega|Delta|Omega)(?![a-z]))'*(?:_\{[^{}]*\}|_\w)?",
    "number": r"(?<=\d\s)\d+/\d+(?![\w.^])|\d+\.?\d*(?:[eE][+-]?\d{1,3}(?![\w.]))?|\.\d+",
    "sign": r"\\[A-Za-z]+|\\.|[<>!]=|!+|.",
}
TOKEN = re.compile("|".join(f"(?P<{kind}>{row})" for kind, row in TOKENS.items()), re.A | re.S)
SIGNS = {"nothing": "", "begin": "⟦ (", "row": ") , (", "end": ") ⟧", "degree": "unit:°"}


@functools.lru_cache(10_000)
def tokenize(text: str) -> list[str]:
    """Tokens of one spelling each: signs, numbers, names, units and other words."""
    text = re.sub(r"(?<![.,])\\?[.,;:]?[\s*\\]*$", "", text).lstrip("* ")
    tokens = []
    for match in TOKEN.finditer(text):
        kind = match.lastgroup.partition("_")[0]
        token = match[0].strip('" ')
        unit = re.sub(r"(?<=\w\w)s$", "", token)
        if token in SPELLING:
            tokens.append(SPELLING[token])
        elif kind in SIGNS:
            tokens += SIGNS[kind].split()
        elif kind == "text":  # its words are words, however short
            for part in re.findall(r"[A-Za-z.]+|[^A-Za-z.~{}\s]+", token.partition("{")[2]):
                tokens += tokenize('"' + part.replace(".", "") if part[0].isalpha() else part)
        elif kind == "mixed":  # 2\frac{1}{4}
            tokens += [token, "⊕"]
        elif kind == "word" and unit in UNITS.split():
            tokens.append("unit:" + unit)
        elif kind == "word" and len(token) > 1:  # North is north, but DNA is not Dna
            tokens.append("word:" + (token.lower() if token.istitle() else token))
        else:
            mark = "name:" if kind in ("name", "word") else ""
            tokens.append(token if kind == "sign" else mark + re.sub(r"[{}\\,!\s]", "", token))
    return tokens


@functools.lru_cache(10_000)
def value_at(point: int, text: str) -> tuple:
    r"""The value of an answer at a point, that is for certain values of its letters.
    >>> tokenize(r"\left(\frac12, 5\text{ cm}\right]")
    ['(', '\\frac', '1', '2', ',', '5', 'unit:cm', ']']
    >>> value_at(0, r"\left(\frac12, 5\text{ cm}\right]")
    ('(]', ('number', mpf('0.5')), ('unit', 'cm', ('number', mpf('5.0'))))
    """
    tokens = ["", *reversed(tokenize(text))]  # taken from the end of the list
    value = parse(tokens, point, 0)
    if tokens != [""]:
        raise ValueError("the rest is not understood")
    return value


def value_of_name(name: str, point: int) -> MP.mpf:
    """A random number for both answers. It is small or large, as |x-100| is 100-x at small x."""
    return MP.mpf(random.Random(f"{name} {point}").uniform(-3, 3)) * 10 ** (point % 4)


def parse(tokens: list[str], point: int, level: int) -> tuple:
    """A Pratt parser that computes as it reads, to an operator that binds no more than level."""
    value = parse_atom(tokens, point)
    while True:
        sign = tokens[-1]
        if level < UNIT and sign.startswith("unit:"):
            unit = ""  # m/s, cm^2, square miles
            while tokens[-1] in ("/", "^") or tokens[-1].startswith("unit:"):
                sign = tokens.pop().removeprefix("unit:")
                unit += f"^{parse(tokens, point, POSTFIX)}" if sign == "^" else sign
            value = ("unit", unit, value)
        elif level < LEVELS.get(sign, 0):
            tokens.pop()
            if sign in ("!", "unit:°"):
                value = apply(sign, value)
            elif sign != "," or tokens[-1] not in (",", "∪"):  # but 1, 2, and 3
                value = apply(sign, value, parse(tokens, point, RIGHT_LEVELS[sign]))
        elif level < FACTOR and (sign.startswith("name:") or level < FACTOR_LEVELS.get(sign, 0)):
            value = apply("*", value, parse(tokens, point, FACTOR))
        else:
            return value


def parse_atom(tokens: list[str], point: int) -> tuple:
    token = tokens.pop()
    if token.startswith("name:"):
        return ("name", token[5:], value_of_name(token[5:], point))
    if token.startswith("word:"):
        return ("word", token)
    if token in ("+", "-", "±"):
        return apply(token, ("number", 0), parse(tokens, point, FACTOR))
    if token in (r"\frac", r"\binom"):
        return apply(token, parse_atom(tokens, point), parse_atom(tokens, point))
    if token == "√":
        index = parse_atom(tokens, point) if tokens[-1] == "[" else ("number", 2)
        return apply("^", parse_atom(tokens, point), apply("/", ("number", 1), index))
    if token == "$":
        return ("unit", "dollar", parse_atom(tokens, point))
    if token in FUNCTIONS:
        in_brackets = tokens[-1] in OPENING
        argument = parse_atom(tokens, point) if in_brackets else parse(tokens, point, ARGUMENT)
        return apply(token, argument)
    if token not in OPENING:
        return ("number", CONSTANTS.get(token) or MP.mpf(token))
    value = parse(tokens, point, 0)
    brackets = token + tokens.pop()
    if brackets not in BRACKETS or (token == "⦃" and value[0] == "word"):
        raise ValueError("a bracket is not closed")
    if token == "|":
        return apply("|", value)
    if token == "⦃":
        return ("set", "", value)
    if value[0] == "," and token != "{":
        return (brackets, *value[1:])
    return (brackets, value) if token == "⟦" else value


@functools.lru_cache(10_000)
def apply(sign: str, *values: tuple) -> tuple:
    """A number, list, union or relation. OverflowError: it is too large to compute."""
    if sign in OPERATIONS:
        numbers = [value[-1] for value in values]
        if sign in ("^", "!") and numbers[-1] != 0 and not MP.mag(numbers[-1]) < 14:
            raise OverflowError("too large")
        number = OPERATIONS[sign](*numbers)
        if number != 0 and not abs(MP.mag(number)) < MAX_BITS:
            raise OverflowError("too large, too small or undefined")
        return ("number", number)
    u, v = values
    if sign == "±":
        return (",", apply("+", u, v), apply("-", u, v))
    if sign == "∪" and (v[0] in NUMERIC or v[0] == "named" and v[2][0] in NUMERIC):  # 5 or 6
        sign = ","
    if sign in (",", "∪"):
        return (*u, v) if u[0] == sign else (sign, u, v)
    if sign in MIRRORED and u[0] == "number" and v[0] == "name":  # 5>x is x<5
        return apply(MIRRORED[sign], v, u)
    if sign in ("<", "≤") and v[0] == "named" and v[2][1] == LOW:  # 1<x≤5
        return ("named", v[1], (("(" if sign == "<" else "[") + v[2][0][1], u, v[2][2]))
    if sign != "≠" and u[0] in ("name", "word") and v[0] != "name":  # x=5, x<5
        half_lines = {"<": ("()", LOW, v), "≤": ("(]", LOW, v)}
        half_lines |= {">": ("()", v, TOP), "≥": ("[)", v, TOP)}
        return ("named", u[1], half_lines.get(sign, v))
    return v if sign == "=" and equal(u, v) else (sign, u, v)  # 2+3=5 is 5


ROWS = [", ∪", "= ∈ ≠ < ≤ > ≥", "", "± + -", "* /", "", "! unit:°", "^", "⊕"]  # from loose to tight
LEVELS = {sign: level for level, row in enumerate(ROWS, 1) for sign in row.split()}
UNIT, ARGUMENT, FACTOR, POSTFIX = 3, 5, 6, 7
# Of the right operand: 1/2x is (1/2)x, and 2^3^2 is 2^(3^2).
RIGHT_LEVELS = LEVELS | dict.fromkeys("=∈≠<≤>≥", 1) | {"*": FACTOR, "/": FACTOR, "^": POSTFIX}
NUMERIC = ("number", "name")
MIRRORED = {"<": ">", "≤": "≥", ">": "<", "≥": "≤", "=": "="}
FUNCTION_NAMES = "sin cos tan cot sec csc asin acos atan ln log10 exp"
FUNCTIONS = {"\\" + name: getattr(MP, name) for name in FUNCTION_NAMES.split()}
FACTOR_LEVELS = dict.fromkeys(["√", r"\frac", r"\binom", *"πei"], FACTOR)
FACTOR_LEVELS |= dict.fromkeys([*FUNCTIONS, "(", "{"], ARGUMENT)  # they end the 2x of sin 2x cos x
OPERATIONS = {"+": add, "⊕": add, "-": sub, "*": mul, "/": truediv, r"\frac": truediv, "^": pow}
OPERATIONS |= {"|": abs, "!": MP.factorial, r"\binom": MP.binomial, "unit:°": MP.radians}
OPERATIONS |= FUNCTIONS
CONSTANTS = {"π": MP.pi * 1, "e": MP.exp(1), "i": MP.mpc(0, 1), "∞": value_of_name("∞", 3)}
LOW, TOP = ("number", -CONSTANTS["∞"]), ("number", CONSTANTS["∞"])
BRACKETS = ("()", "(]", "[)", "[]", "{}", "||", "⦃⦄", "⟦⟧")
OPENING = tuple(brackets[0] for brackets in BRACKETS)


# ================================================================================ models, problems
def load_everything(config: Config, checkpoint: Path | None):
    """The generator, the receiver (None where b = 0), and the tasks: problem and prompt ids."""
    problems = load_problems(config.data, config.split, config.limit)
    generator = load_lm(str(checkpoint or config.model), config.device)
    tasks = encode_problems(generator, problems, config.prompt, config.max_new_tokens)
    if config.gradient_checkpointing:
        generator.model.gradient_checkpointing_enable()
    receiver = None
    if config.transfer_weight > 0:
        name = config.model if config.receiver == "self" else config.receiver
        receiver = load_lm(name, config.device)
        encode_problems(receiver, problems, config.prompt, 1)  # has it room for any of them?
    return generator, receiver, tasks


def encode_problems(lm: LM, problems: list[Problem], prompt: str, new_tokens: int) -> list[tuple]:
    """(problem, prompt's token ids), without those that leave no room for so many new tokens."""
    tasks = [(problem, encode_prompt(lm, problem.question, prompt)) for problem in problems]
    kept = problems[0].question in decode(lm.tokenizer, tasks[0][1])
    require(kept, f"model {lm.model.name_or_path}: tokenizer or chat template change the question")
    fitting = [task for task in tasks if len(task[1]) + new_tokens <= lm.context]
    report = f"{len(fitting)} of {len(tasks)} prompts leave room for {new_tokens} new tokens"
    require(fitting, f"{report} (--max-new-tokens) in a context of {lm.context}")
    if len(fitting) < len(tasks):
        print(report, file=sys.stderr)
    return fitting


def draw_problems(tasks: list, count: int, seed: int, step: int) -> list:
    """The problems of a step, a function of (seed, step): permutations of the data, end to end."""
    places = range(step * count, (step + 1) * count)
    epochs = {place // len(tasks) for place in places}
    orders = {epoch: rng(seed, DATA, epoch).permutation(len(tasks)) for epoch in epochs}
    return [tasks[orders[place // len(tasks)][place % len(tasks)]] for place in places]


def write_chat(tokenizer, messages: list[dict], **how) -> str:
    """Messages in the chat template: no thinking, and always the same date (else no --resume)."""
    template = (
        "{% macro strftime_now(form) %}1 January 2026{% endmacro %}" + tokenizer.chat_template
    )
    how |= {"chat_template": template, "tokenize": False, "enable_thinking": False}
    return tokenizer.apply_chat_template(messages, **how)


def encode_prompt(lm: LM, question: str, prompt: str = PROMPT) -> list[int]:
    """The question in the model's own form, as token ids: its chat template, or "Question: ...
    Answer:" where it has none. BOS exactly once, or never, as the tokenizer wants."""
    content = prompt.replace("{question}", question)
    text = f"Question: {content}\nAnswer:"
    if lm.tokenizer.chat_template:
        messages = [{"role": "user", "content": content}]
        text = write_chat(lm.tokenizer, messages, add_generation_prompt=True)
    ids = lm.tokenizer.encode(text, add_special_tokens=False)
    bos = lm.tokenizer.bos_token_id
    wants_bos = bos in lm.tokenizer.encode("") and ids[:1] != [bos]  # and the template has none
    return [bos, *ids] if wants_bos else ids


def encode_text(tokenizer, text: str) -> list[int]:
    """Model-written text: a control token that is spelled out in it stays plain text."""
    return tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)


def decode(tokenizer, ids: list[int]) -> str:
    """Text without control tokens and without a last character that a cut left incomplete."""
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return text.rstrip("\ufffd")


def load_lm(name: str, device: str = "cpu") -> LM:
    """A folder or hub model: bf16 on CUDA, else fp32; no remote code. UserError if unservable."""
    is_short = re.match("Qwen[^/]*$", name) and not os.path.isdir(name)
    path = f"Qwen/{name}" if is_short else name
    how = {"dtype": torch.float32, "output_loading_info": True, "trust_remote_code": False}
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        model, report = transformers.AutoModelForCausalLM.from_pretrained(path, **how)
        tokens = 1 + max(tokenizer.get_vocab().values())
    except Exception as error:  # unknown, unreachable, damaged, not a language model, ...
        raise UserError(f"model {name}: no such folder or hub model, or damaged: {error}") from None
    report["frozen"] = [weight for weight in model.parameters() if not weight.requires_grad]
    for what, weights in report.items():  # missing, unexpected, of another shape; an adapter's base
        require(not weights, f"model {name}: its weights are not those of its config ({what})")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or 2**30
    vocab_size = min(tokens, model.get_input_embeddings().num_embeddings)  # most have more rows
    lm = LM(model.eval(), tokenizer, find_stop_ids(model, tokenizer), vocab_size, context)
    require(lm.stop_ids, f"model {name}: no end-of-text token in its tokenizer or config")
    check_model(lm)  # while it is on the CPU and in fp32
    if device.startswith("cuda"):
        torch.cuda.set_device(torch.device(device).index or 0)  # for graphs and memory figures
        for weight in model.parameters():  # not the buffers: rotary frequencies need fp32
            weight.data = weight.data.bfloat16()
    model.to(device)
    return lm


def find_stop_ids(model, tokenizer) -> tuple[int, ...]:
    """eos of tokenizer and generation_config, and what the chat template writes after a turn.
    Qwen2.5 *base* has eos <|endoftext|>, but its template ends turns with <|im_end|>."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    stops = {tokenizer.eos_token_id, *np.ravel(configured).tolist()}  # there may be several
    if tokenizer.chat_template:
        turn = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "sentinel"}]
        after_turn = write_chat(tokenizer, turn).rpartition("sentinel")[2]
        ids = tokenizer.encode(after_turn, add_special_tokens=False)
        stops.update([token for token in ids if token in tokenizer.added_tokens_decoder][:1])
    return tuple(sorted(stops - {None}))


def save_lm(lm: LM, folder: Path):
    lm.model.save_pretrained(folder)
    lm.tokenizer.save_pretrained(folder)


def head_logits(model, states: torch.Tensor) -> torch.Tensor:
    """Logits [N, V], fp32, of last hidden states [N, E], as the model's own forward makes them."""
    logits = model.get_output_embeddings()(states).float()
    cap = getattr(model.config.get_text_config(), "final_logit_softcapping", None)  # Gemma
    return cap * torch.tanh(logits / cap) if cap else logits


@torch.no_grad()
def check_model(lm: LM):
    """Refuse a model that we would serve wrongly: attention sinks, ALiBi, latent or shared keys,
    state spaces, unknown heads. They show in a number computed in three ways: the log-probabilities
    of a few tokens by the sampler, by the trainer, and by the model's own plain forward."""
    config = lm.model.config.get_text_config()
    # With these, all positions change beyond some length. (As text, for it can be nested.)
    rope = str(getattr(config, "rope_parameters", None))
    served = "'longrope'" not in rope and "'dynamic'" not in rope
    prompt = [i % lm.vocab_size for i in range(8)]
    try:
        [c] = generate(lm.model, [prompt], max_new_tokens=4, vocab_size=lm.vocab_size)
        trained = completion_logprobs(lm, [Rollout(None, prompt, c.tokens, [], True, "")])[0]
        ids = torch.tensor([prompt + c.tokens])
        logits = lm.model(input_ids=ids, use_cache=False).logits[0, 7:-1, : lm.vocab_size]
        plain = logits.float().log_softmax(-1).gather(1, ids[0, 8:, None]).squeeze(1)
        ours = torch.stack([plain.new_tensor(c.logprobs), trained])
        served = served and ((ours - plain).abs() < 1e-3).all()  # in fp32: rounding only
    except (UserError, torch.OutOfMemoryError, torch.AcceleratorError):
        raise  # they say what they are
    except Exception:  # of the model's code, which does not know our attention
        served = False
    require(served, f"model type {config.model_type} is not served: unusual attention or head")


def load_problems(source: str, split=None, limit=None, prefer: str = "train") -> list[Problem]:
    """Problems of a short name (SOURCES), a hub id, or a local .jsonl, .json, .csv, .parquet file.
    Columns: question | problem | prompt, and answer | solution, of which GSM8K's `#### 18` or the
    last `\\boxed{}` is taken. No split: the one called `prefer`, or the only one there is."""
    try:
        rows = read_rows(source, split, prefer)[: limit or None]
    except Exception as error:  # each reader has failures of its own
        raise UserError(f"{source}: cannot be read: {error!r}") from None
    columns = rows[0].keys() if rows else ()
    questions = [name for name in ("question", "problem", "prompt") if name in columns]
    answers = [name for name in ("answer", "solution") if name in columns]
    require(questions and answers, f"{source}: no question or no answer in {', '.join(columns)}")
    problems = []
    for number, row in enumerate(rows, 1):
        cells = [row.get(column) for column in (questions[0], answers[0])]
        question, text = ["" if cell is None else str(cell).strip() for cell in cells]
        answer = extract_answer(text) or (text if answers[0] == "answer" else "")
        require(question and answer, f"{source}: row {number} has no question or no answer")
        problems.append(Problem(question, answer))
    return problems


def read_rows(source: str, split: str | None, prefer: str) -> list[dict]:
    kind = Path(source).suffix[1:]
    if kind == "jsonl":  # needs no package
        text = Path(source).read_text(encoding="utf-8-sig").strip()
        return json.loads("[" + text.replace("\n", ",\n") + "]")  # its errors name the line
    import datasets  # slow to import

    if kind in ("json", "csv", "parquet"):
        return list(datasets.load_dataset(kind, data_files=source, split="train"))
    name, _, configuration = SOURCES.get(source, source).partition(":")
    splits = datasets.load_dataset(name, configuration or None)
    return list(splits[split or (next(iter(splits)) if len(splits) == 1 else prefer)])


# =================================================================================== a run on disk
class Run:
    """The folder of a run: config.json, metrics.jsonl (a line a step), rollouts.jsonl (a group a
    step), checkpoints/, final/. Killed at any moment, a run goes on from its last checkpoint as if
    nothing had happened. It has one writer, who holds its lock; a new run makes the folder."""

    def __init__(self, config: Config, resume: bool):
        name = f"{Path(config.model).name}-b{config.transfer_weight:g}-seed{config.seed}"
        self.folder = Path(config.out or f"runs/{name}-{time.strftime('%Y%m%d-%H%M%S')}")
        self.config = dataclasses.replace(config, out=str(self.folder))
        self.signal = 0  # that asks us to stop
        self.tracker = __import__(config.track) if config.track else None
        self.lock = filelock.FileLock(self.folder / ".lock", timeout=0)
        if resume:
            self.lock.acquire()  # or an error that names it
        require(resume or not self.folder.exists(), f"{self.folder}: exists; --resume, or --out")
        self.checkpoint = max(self.checkpoints(), default=None)
        self.start = int(self.checkpoint.name[5:]) if self.checkpoint else 0

    def checkpoints(self) -> list[Path]:
        return sorted(self.folder.glob("checkpoints/step-" + 6 * "[0-9]"))

    def begin(self, optimizer: MasterAdamW):
        """When resuming, read the optimizer's state and forget what was logged later. Else make the
        folder: only now that all is loaded, so that a start that fails leaves nothing."""
        if self.checkpoint:
            try:
                state = torch.load(self.checkpoint / "optimizer.pt", "cpu", weights_only=True)
                optimizer.adam.load_state_dict(state["adam"])
                for master, saved in zip(optimizer.masters, state["masters"], strict=True):
                    master.copy_(saved)
            except Exception as error:  # of many kinds, by how it is damaged
                raise UserError(f"{self.checkpoint}: damaged; delete it ({error})") from None
        if not self.lock.is_locked:
            self.folder.mkdir(parents=True)
            self.lock.acquire()
        for log in [*self.folder.glob("metrics.jsonl"), *self.folder.glob("rollouts.jsonl")]:
            lines = log.read_bytes().splitlines(keepends=True)
            steps = [re.match(rb'\{"step": (\d+),.*\n', line) for line in lines]  # None: torn
            kept = [step[0] for step in steps if step and int(step[1]) <= self.start]
            os.truncate(log, len(b"".join(kept)))
        partial = self.folder / "config.json.partial"
        partial.write_text(json.dumps(vars(self.config), indent=1))
        partial.replace(self.folder / "config.json")
        if self.tracker:  # by name (trackio) or id (wandb) a resumed run goes on
            os.environ["WANDB_RUN_ID"] = self.folder.name
            self.tracker.init(project="rltr", name=self.folder.name, resume="allow")
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.note_signal)

    def note_signal(self, number, frame):
        """Ctrl-C or SIGTERM: the step ends and is saved first. A second one stops at once."""
        self.signal = number
        signal.signal(number, signal.SIG_DFL)

    def log(self, metrics: dict, rollouts: list[Rollout]):
        rows = [{"step": metrics["step"], **dataclasses.asdict(rollout)} for rollout in rollouts]
        for name, lines in (("metrics.jsonl", [metrics]), ("rollouts.jsonl", rows)):
            with open(self.folder / name, "a") as file:
                file.writelines(json.dumps(line) + "\n" for line in lines)
        if self.tracker:
            self.tracker.log(metrics, step=metrics["step"])

    def save_if_due(self, generator: LM, optimizer: MasterAdamW, step: int):
        """A checkpoint every `save_every` steps, after the last one, and when asked to stop."""
        due = self.config.save_every and step % self.config.save_every == 0
        if due or self.signal or step == self.config.steps:
            with complete_folder(self.folder / f"checkpoints/step-{step:06d}") as folder:
                save_lm(generator, folder)
                state = {"adam": optimizer.adam.state_dict(), "masters": optimizer.masters}
                torch.save(state, folder / "optimizer.pt")
            for old in self.checkpoints()[:-2]:
                shutil.rmtree(old, ignore_errors=True)  # Windows keeps files that are in use
        if self.signal:
            print(f"\nstopped; go on with: python rltr.py --resume {self.folder}")
            sys.exit(128 + self.signal)

    def finish(self, generator: LM) -> Path:
        with complete_folder(self.folder / "final") as folder:
            save_lm(generator, folder)
        if self.tracker:
            self.tracker.finish()
        return self.folder / "final"

    def close(self):
        """However the run ended: the folder is free, and Ctrl-C is Python's again."""
        self.lock.release()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


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
        raise UserError(f"{folder}: cannot be written: {error}") from error


# ======================================================================================= reporting
def lap(metrics: dict, phase: str, rollouts: list[Rollout], start: float) -> float:
    """Note seconds and tokens/s of a phase that began at `start` and ends now; returns now."""
    sampled = sum(len(r.tokens) for r in rollouts)
    continued = sum(cut.continuation_length for r in rollouts for cut in r.cuts)
    tokens = continued if phase == "transfer" else sampled
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
        metrics["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
    now = time.perf_counter()
    metrics[f"seconds_{phase}"] = round(now - start, 3)
    metrics[f"tokens_per_s_{phase}"] = round(tokens / (now - start))
    return now


def mean(values) -> float | None:
    values = list(values)
    return sum(values) / len(values) if values else None


def summarize(rollouts: list[Rollout], config: Config) -> dict:
    """The metrics of steps 1 to 7. (docs/reference.md has a line on each.)"""
    live = live_groups(rollouts, config.group)
    metrics = {"reward": mean(r.reward for r in rollouts)}
    metrics["accuracy"] = mean(r.verdict == "right" for r in rollouts)
    metrics["finished"] = mean(r.finished for r in rollouts)
    metrics["length"] = mean(len(r.tokens) for r in rollouts)
    metrics["dead_groups"] = 1 - len(live) * config.group / len(rollouts)
    metrics["answers_missing"] = mean(r.verdict == "missing" for r in rollouts)
    metrics["answers_unparsed"] = mean(r.verdict == "unparsed" for r in rollouts)
    for name in rollouts[0].rewards:
        metrics[f"reward_{name}"] = mean(r.rewards[name] for r in rollouts)
    cuts = [cut for rollout in rollouts for cut in rollout.cuts]
    if cuts:
        metrics["transfer"] = mean(cut.correct for cut in cuts)
        metrics["transfer_unleaked"] = mean(cut.correct for cut in cuts if not cut.leaked)
        metrics["leak"] = mean(cut.leaked for cut in cuts)
        metrics["overflow"] = mean(cut.overflow for cut in cuts)
        for low in (0.0, 0.25, 0.5, 0.75):
            within = [cut.correct for cut in cuts if low < cut.tau <= low + 0.25]
            metrics[f"transfer_tau_{low}_{low + 0.25}"] = mean(within)
    return metrics


def update_metrics(token_figures: list[torch.Tensor], norms: list[float], config: Config) -> dict:
    """The metrics of step 8: few where all groups were dead, or a gradient was not finite."""
    metrics = {"skipped": sum(not math.isfinite(norm) for norm in norms)}
    if norms and not metrics["skipped"]:
        objective, entropy, log_rho = torch.cat(token_figures, dim=1).double()  # each [N]
        rho = log_rho.exp()
        clipped = (rho < 1 - config.clip_low) | (rho > 1 + config.clip_high)  # whatever A's sign
        means = {"objective": objective, "entropy": entropy, "clip_share": clipped.double()}
        means |= {"approx_kl": rho - 1 - log_rho, "logprob_gap_mean": log_rho.abs()}
        metrics |= {name: values.mean().item() for name, values in means.items()}
        metrics |= {"logprob_gap_max": log_rho.abs().max().item(), "grad_norm": norms[-1]}
    return metrics


def show_group(group: list[Rollout]) -> str:
    """A group to read: the problem, a rollout with its cuts and continuations, all the rewards."""
    first = group[0]
    lines = [f"--- {first.problem.question} (answer {first.problem.answer})", first.text]
    for cut in first.cuts:
        lines.append(f"--- cut at tau = {cut.tau:.2f}: {cut.prefix} >>|<< {cut.continuation}")
    for r in group:
        rewards = "  ".join(f"{name} {value:.2f}" for name, value in r.rewards.items())
        lines.append(f"    {rewards}  reward {r.reward:.2f}  advantage {r.advantage:+.2f}")
    return printable("\n".join(lines))


def printable(text: str) -> str:
    """Model text for a terminal: control characters, and what it has no code for, spelled out."""
    text = "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


# ==================================================================================== command line
# May differ when a run is resumed, because they do not change its course.
HARMLESS = {"resume", "steps", "save_every", "show_every", "eval_data", "eval_k"}
HARMLESS |= {"track", "token_budget", "max_rows", "gradient_checkpointing", "offload"}


def add_flags(parser: argparse.ArgumentParser, fields):
    for f in fields:
        how = {"type": type(f.default), "metavar": type(f.default).__name__.upper()}
        if isinstance(f.default, bool):
            how = {"action": argparse.BooleanOptionalAction}
        flag = "--" + f.name.replace("_", "-")
        parser.add_argument(flag, default=f.default, help=f.metadata["help"], **how)


def parse_arguments(argv: list[str] | None) -> tuple[Config, bool]:
    """The settings, and whether to resume. Flags override those of the run to resume, or TINY."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add_flags(parser, dataclasses.fields(Config))
    parser.add_argument("--resume", metavar="FOLDER", help="go on with the run in FOLDER")
    given = parser.parse_args(argv)
    saved = {}
    if given.resume:
        saved = json.loads(Path(given.resume, "config.json").read_text()) | {"out": given.resume}
    elif not given.model:
        require(TINY_FOLDER.is_dir(), "no tiny/ beside this file: give --model, --receiver, --data")
        parser.set_defaults(**TINY)
    parser.set_defaults(**saved)
    settings = vars(parser.parse_args(argv))
    differ = [name for name in saved if settings[name] != saved[name] and name not in HARMLESS]
    require(not differ, f"--resume {given.resume}: that run has another {', '.join(differ)}")
    del settings["resume"]
    return Config(**settings), given.resume is not None


def check_settings(config: Config):
    for f in dataclasses.fields(config):
        value = getattr(config, f.name)
        low, high = f.metadata["low"], f.metadata["high"]
        if low is not None:
            require(low <= value <= high, f"{f.name} {value}: must be from {low} to {high:g}")
    require("{question}" in config.prompt, "--prompt: {question} is missing in it")


def run_command(name: str, function, argv: list[str] | None) -> int:
    """function(argv) as a command: what the user can put right is one line, and exit code 2."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity(transformers.utils.logging.CRITICAL)
    try:
        function(argv)
        return 0
    except torch.OutOfMemoryError:
        flags = "--gradient-checkpointing, --offload, a smaller --token-budget or --max-rows"
        message = f"out of memory; try {flags}; a run that has begun goes on with --resume"
    except (UserError, OSError, ImportError, torch.AcceleratorError) as error:
        message = str(error)
    print(printable(f"{name}: {' '.join(message.split())}")[:2000], file=sys.stderr)
    return 2


def train_and_show(argv: list[str] | None):
    config, resume = parse_arguments(argv)
    run = train(config, resume).parent
    print(f"the trained model: {run}/final", flush=True)
    torch.cuda.empty_cache()  # for the processes that make a table, before and after, and a page
    page = ["tools/report.py", run, "-o", run / "report.html"]
    for script, *flags in (["eval.py", "--run", run], page):
        path = Path(__file__).parent / script
        if path.exists() and (config.eval_data or script != "eval.py"):
            subprocess.run([sys.executable, path, *flags])


def main(argv: list[str] | None = None) -> int:
    return run_command("rltr", train_and_show, argv)


if __name__ == "__main__":
    sys.exit(main())
