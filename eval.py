"""Evaluation: accuracy, Maj@k, Pass@k and transfer accuracy, each with an interval over problems.

    python eval.py --model runs/NAME/final --data math500 --k 64 --out evals/NAME
    python eval.py --model ... --receiver Qwen2.5-1.5B-Instruct     # also cut at tau = 0.1 .. 0.9
    python eval.py --samples FILE                # score completions that exist already, no model
    python eval.py --compare evals/A/result.json evals/B/result.json

n completions y_1..y_n of each problem x with gold answer g, a_i = answer(y_i):

    accuracy    mean_i 1[a_i = g]                      equality is answers_equal, never that of strings
    Maj@k       E_S 1[majority_vote(a_S) = g]          S: k of the n completions
    Pass@k      1 - C(n - c, k) / C(n, k)              c of the n are right
    transfer    1[answer(y[:tau |y|] + z) = g]         z: what another model makes of the beginning

--samples reads lines {"problem": ..., "answer": ..., "completions": [...]}. With --out DIR there are
result.json (every figure, and those of each problem), completions.jsonl (all texts, in the form
that --samples reads) and settings.json; the same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import os
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from rltr import (EVALUATION, LM, PROMPT, Config, Problem, TransferReward, UserError, answers_equal,
                  extract_answer, generate, is_correct, load_lm, load_problems,
                  majority_vote, printable, require)       # majority_vote: for who imports it here

TAUS = tuple(i / 10 for i in range(1, 10))
SUBSETS, RESAMPLES = 1000, 10_000
CONVENTIONS = f"""\
Votes are cast by equivalence; completions without an answer do not vote; ties go to the first seen.
Maj@k, k < n: mean over {SUBSETS:,} subsets without replacement, default_rng(0); k = 1 and n exact.
Pass@k: unbiased. Intervals: 95 %, bootstrap over problems ({RESAMPLES:,} resamples)."""

# ===================================================================================== the figures


def classify(answers: list, gold: str) -> tuple[np.ndarray, np.ndarray]:
    """Answers as integers [n], the same for equivalent ones and 0 for None; and which are right [n].

    >>> classify(["7", "1,000", None, "7", "1000"], "1000")
    (array([1, 2, 0, 1, 2]), array([False,  True, False, False,  True]))
    """
    number, firsts = {None: 0}, []               # firsts[j]: the first answer of class j + 1
    for answer in answers:
        if answer not in number:
            number[answer] = next((number[f] for f in firsts if answers_equal(f, answer)), 0)
            if not number[answer]:
                firsts.append(answer)
                number[answer] = len(firsts)
    right = {a: a is not None and answers_equal(a, gold) for a in number}
    return np.array([number[a] for a in answers]), np.array([right[a] for a in answers])


@functools.lru_cache(maxsize=64)
def subsets(n: int, k: int) -> np.ndarray:
    """The subsets of k of n completions to average over [S, k], each in the order of sampling."""
    if k in (1, n):                              # few enough to take all of them
        return np.arange(n).reshape(-1, k)
    source = np.random.default_rng(0)
    return np.sort([source.choice(n, k, replace=False) for _ in range(SUBSETS)], axis=1)


def vote_winners(classes: np.ndarray, k: int) -> np.ndarray:
    """For each subset of k: the first completion that gave the answer with the most votes [S].

    >>> vote_winners(np.array([2, 0, 1, 1, 2]), 5).tolist()       # a tie: 2 was seen first
    [0]
    """
    chosen = subsets(len(classes), k)                                          # [S, k]
    ballots = classes[chosen]
    boxes = ballots + np.arange(len(chosen))[:, None] * (classes.max() + 1)    # one a subset and class
    votes = np.bincount(boxes.ravel())[boxes] * (ballots > 0)                  # None does not vote
    return chosen[np.arange(len(chosen)), votes.argmax(1)]                     # argmax: first of equals


def maj_at_k(answers: list, gold: str, k: int) -> float:
    """Maj@k = E_S 1[majority_vote(a_S) = g] over subsets S of k answers (None: no answer).

    >>> maj_at_k(["3", "4", None, "3"], "3", 4), maj_at_k(["3", "4", None, "3"], "3", 1)
    (1.0, 0.5)
    """
    require(1 <= k <= len(answers), f"Maj@{k} of {len(answers)} answers")
    classes, right = classify(answers, gold)
    return float(right[vote_winners(classes, k)].mean())


def pass_at_k(n: int, c: int, k: int) -> float:
    """Pass@k = 1 - C(n - c, k) / C(n, k): the chance that k of n completions, c of them right, hold
    a right one. The difference is taken in whole numbers: nothing cancels, nothing overflows.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(10_000, 1, 1)
    (0.25, 0.5, 0.0001)
    """
    require(1 <= k <= n and 0 <= c <= n, f"Pass@{k} of {n} completions, {c} of them right")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def bootstrap(values: np.ndarray) -> np.ndarray:
    """values [P, M], M figures of P problems -> their means over resamples of P problems [R, M]."""
    count, source = len(values), np.random.default_rng(0)
    draws = (source.multinomial(count, np.full(count, 1 / count), size=100)    # [100, P]
             for _ in range(RESAMPLES // 100))
    return np.concatenate([draw @ values / count for draw in draws])


def compare(a: dict, b: dict) -> str:
    """Every figure that two results share: b - a, its interval and p, paired by problem.

    p = 2 min(P[mean* <= 0], P[mean* >= 0]) over bootstrap resamples of the differences.
    """
    rows_a, rows_b = a["per_problem"], b["per_problem"]
    require([r["problem"] for r in rows_a] == [r["problem"] for r in rows_b],
            "--compare: these are results on different problems")
    names = [name for name in rows_a[0]["figures"] if name in rows_b[0]["figures"]]
    difference = np.array([[y["figures"][name] - x["figures"][name] for name in names]
                           for x, y in zip(rows_a, rows_b)])                   # [P, M]
    means = bootstrap(difference)
    low, high = np.percentile(means, [2.5, 97.5], axis=0)
    lines = [f"second - first, {len(rows_a)} problems, paired bootstrap over problems",
             f"{'':14}{'first':>8}{'second':>8}{'difference':>12}{'95 %':>18}{'p':>9}"]
    for j, name in enumerate(names):
        tail = min((means[:, j] <= 0).sum(), (means[:, j] >= 0).sum())
        p = min(1.0, 2 * (tail + 1) / (RESAMPLES + 1))
        first, second = (np.mean([r["figures"][name] for r in rows]) for rows in (rows_a, rows_b))
        lines.append(f"{name:14}{first:8.3f}{second:8.3f}{difference[:, j].mean():+12.3f}"
                     f"{f'[{low[j]:+.3f}, {high[j]:+.3f}]':>18}{p:9.4f}")
    return "\n".join(lines)


# ================================================================================= the completions
#
# A record is a line of completions.jsonl: {"problem", "answer", "completions"}, and of our own
# samples also "finished" and "tokens" (one number a completion) and "cuts".


def evaluate(lm: LM, problems: list[Problem], *, k: int, prompt: str = PROMPT,
             max_new_tokens: int = Config.max_new_tokens, temperature: float = 1.0,
             receiver: LM | None = None, taus=TAUS, margin: int = Config.receiver_margin,
             receiver_temperature: float = 1.0, transfer_samples: int = 4, seed: int = 0,
             max_rows: int = 0, fallback: bool = False, label: str = "evaluation",
             store: Store | None = None) -> dict:
    """Sample k completions a problem, have the receiver continue some of them, and score it all.

    Row i's randomness is a function of (seed, i), and the receiver's of (seed, chunk): with a store
    an evaluation that was interrupted ends like one that was not.
    """
    prompts = [lm.encode_prompt(p.question, prompt) for p in problems]
    limits = [min(max_new_tokens, lm.context - len(ids)) for ids in prompts]
    require(min(limits) > 0, f"problem {np.argmin(limits) + 1} fills the model's context of "
                             f"{lm.context} tokens")
    transfer = receiver and TransferReward(
        receiver, lm.tokenizer, temperature=receiver_temperature, max_new_tokens=max_new_tokens,
        margin=margin, prompt=prompt, seed=seed, stop_ids=lm.stop_ids, max_rows=max_rows)
    size = max(1, (2048 if lm.model.device.type == "cuda" else 512) // k)      # problems a chunk
    records = store.load(problems, size) if store else []
    work = k + (min(transfer_samples, k) * len(taus) if transfer else 0)       # rows a problem
    with tqdm(desc=label, total=work * len(problems), initial=work * len(records), unit="row",
              smoothing=0) as bar:
        for first in range(len(records), len(problems), size):
            chunk = slice(first, first + size)
            done = generate(lm.model, prompts[chunk], samples=k, max_new_tokens=limits[chunk],
                            temperature=temperature, stop_ids=lm.stop_ids, max_rows=max_rows,
                            vocab_size=lm.vocab_size, seed=(seed, EVALUATION), first_row=first * k,
                            progress=bar)
            groups = [done[i:i + k] for i in range(0, len(done), k)]
            new = [{"problem": p.question, "answer": p.answer,
                    "completions": [lm.decode(c.tokens) for c in group],
                    "finished": [c.finished for c in group],
                    "tokens": [len(c.tokens) for c in group]}
                   for p, group in zip(problems[chunk], groups)]
            if transfer:
                tokens = [[c.tokens for c in group[:transfer_samples]] for group in groups]
                bar.update(add_cuts(new, tokens, transfer, taus, first, fallback))
            records += new
            if store:
                store.append(new)
    return score(records, fallback, k)


def add_cuts(records: list[dict], tokens: list[list[list[int]]], transfer: TransferReward, taus,
             step: int, fallback: bool) -> int:
    """Cut the completions given as tokens [problem][completion] at every tau; returns their number."""
    owners = [(record, i) for record, group in zip(records, tokens) for i in range(len(group))]
    rows = transfer.continue_from_cuts(
        [record["problem"] for record, _ in owners], [ids for group in tokens for ids in group],
        [record["answer"] for record, _ in owners], step=step, taus=[taus] * len(owners))
    for (record, i), cuts in zip(owners, rows):
        for cut in cuts:
            if fallback:                               # the reward reads boxes only
                cut.correct = is_correct(cut.prefix + cut.continuation, record["answer"], True)
            fields = {key: value for key, value in vars(cut).items() if key != "prefix"}
            record.setdefault("cuts", []).append({"completion": i, **fields})
    return sum(map(len, rows))


class Store:
    """settings.json and completions.jsonl in a folder: what an evaluation needs to go on."""

    def __init__(self, folder: str, settings: dict):
        self.file, beside = Path(folder) / "completions.jsonl", Path(folder) / "settings.json"
        self.file.parent.mkdir(parents=True, exist_ok=True)
        settings = json.loads(json.dumps(settings))                            # tuples become lists
        if beside.exists():
            saved = read_json(beside)
            changed = [key for key in settings if saved.get(key) != settings[key]]
            require(not changed, f"--out {folder}: holds an evaluation with other values of "
                                 f"{', '.join(changed)}; choose another folder, or delete it")
        else:
            require(not self.file.exists(), f"--out {folder}: completions.jsonl without settings.json")
            write_json(beside, settings)

    def load(self, problems: list[Problem], size: int) -> list[dict]:
        """The records of complete chunks; anything behind them, a torn line too, is cut off."""
        lines = self.file.read_text("utf-8").splitlines(True) if self.file.exists() else []
        lines = [line for line in lines if line.endswith("\n")]
        if len(lines) < len(problems):
            lines = lines[:len(lines) // size * size]
        try:
            records = [json.loads(line) for line in lines]
            same = [r["problem"] for r in records] == [p.question for p in problems[:len(records)]]
        except (ValueError, KeyError, TypeError):
            same = False
        require(same, f"{self.file}: broken, or of other problems; delete it to start afresh")
        if self.file.exists():
            os.truncate(self.file, sum(map(len, lines)))                       # json wrote ASCII
        return records

    def append(self, records: list[dict]):
        with self.file.open("a", encoding="utf-8") as file:
            file.write("".join(json.dumps(record) + "\n" for record in records))


def read_json(path: Path) -> dict:
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except (ValueError, RecursionError):
        data = None
    require(isinstance(data, dict), f"{path}: not a JSON object")
    return data


def write_json(path: Path, data: dict):
    partial = path.with_name(path.name + ".partial")       # a full disk must not cost the old one
    partial.write_text(json.dumps(data, indent=1), "utf-8")
    partial.replace(path)


def read_samples(path: str) -> list[dict]:
    """Completions from elsewhere as records; the first line that is not one is named."""
    records = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            question, answer = row.get("problem", row.get("question")), row.get("answer")
            texts = row.get("completions")
            good = (isinstance(question, str) and type(answer) in (str, int, float) and texts
                    and isinstance(texts, list) and all(isinstance(text, str) for text in texts))
        except (ValueError, RecursionError, AttributeError):
            good = False
        require(good, f"{path}: line {number} is not "
                      '{"problem": text, "answer": text, "completions": [text, ...]}')
        gold = extract_answer(str(answer)) or str(answer)
        records.append({"problem": question, "answer": gold, "completions": texts})
    require(records, f"{path}: no completions in it")
    return records


# ===================================================================================== the result


def score(records: list[dict], fallback: bool = False, k: int = 1) -> dict:
    """All figures of the records, for k = 1, 2, 4 .. n and the given k; n is the smallest group."""
    n = min(len(record["completions"]) for record in records)
    require(k <= n, f"--k {k}: there are only {n} completions of some problem")
    ks = sorted({2 ** i for i in range(n.bit_length())} | {n, k})
    rows = [score_problem(record, ks, fallback) for record in records]
    names = list(rows[0]["figures"])
    values = np.array([list(row["figures"].values()) for row in rows])         # [P, M]
    means = dict(zip(names, values.mean(0).tolist()))
    intervals = np.percentile(bootstrap(values), [2.5, 97.5], axis=0).T.tolist()
    join = lambda key: [x for r in records for x in r.get(key, [])]            # noqa: E731
    lengths = join("tokens") or [len(text) for text in join("completions")]
    result = {
        "accuracy": means["accuracy"], "problems": len(records), "n": n,
        "maj": {str(k): means[f"maj@{k}"] for k in ks},
        "pass": {str(k): means[f"pass@{k}"] for k in ks},
        "intervals": dict(zip(names, intervals)),
        "answered": float(np.mean([row["answered"] for row in rows])),
        "finished": float(np.mean(join("finished"))) if join("finished") else None,
        "length": {"unit": "tokens" if join("tokens") else "characters",
                   "mean": float(np.mean(lengths)), "median": float(np.median(lengths)),
                   "max": max(lengths)}}
    cuts = join("cuts")
    for tau in dict.fromkeys(cut["tau"] for cut in cuts):
        here = [cut for cut in cuts if cut["tau"] == tau]
        result.setdefault("transfer", {})[str(tau)] = {
            "accuracy": means[f"transfer@{tau}"], "cuts": len(here),
            **{name: float(np.mean([cut[key] for cut in here]))
               for name, key in (("leak", "leaked"), ("overflow", "overflow"))}}
    return {**result, "conventions": CONVENTIONS, "per_problem": rows}


def score_problem(record: dict, ks: list[int], fallback: bool) -> dict:
    extra = {"fallback": True} if fallback else {}
    answers = [extract_answer(text, **extra) for text in record["completions"]]
    classes, right = classify(answers, record["answer"])
    n, c = len(answers), int(right.sum())
    figures = {"accuracy": c / n}
    figures |= {f"maj@{k}": float(right[vote_winners(classes, k)].mean()) for k in ks}
    figures |= {f"pass@{k}": pass_at_k(n, c, k) for k in ks}
    outcomes: dict[float, list[bool]] = {}
    for cut in record.get("cuts", []):
        outcomes.setdefault(cut["tau"], []).append(cut["correct"])
    figures |= {f"transfer@{tau}": float(np.mean(right)) for tau, right in outcomes.items()}
    return {"problem": record["problem"], "answer": record["answer"],
            "vote": answers[vote_winners(classes, n)[0]], "answered": float((classes > 0).mean()),
            "figures": figures}


def report(result: dict) -> str:
    show = lambda value, name: "{:.3f} [{:.3f}, {:.3f}]".format(               # noqa: E731
        value, *result["intervals"][name])
    length, finished = result["length"], result["finished"]
    lines = [f"{result['problems']} problems, {result['n']} completions each",
             f"accuracy   {show(result['accuracy'], 'accuracy')}",
             f"answered   {result['answered']:.3f}    finished   "
             + ("unknown" if finished is None else f"{finished:.3f}"),
             "{unit}     mean {mean:.1f}, median {median:.1f}, longest {max}".format(**length),
             "", f"{'k':>6}   {'Maj@k':<24}{'Pass@k':<24}"]
    lines += [f"{k:>6}   {show(result['maj'][k], f'maj@{k}'):<24}"
              f"{show(result['pass'][k], f'pass@{k}'):<24}" for k in result["maj"]]
    if "transfer" in result:
        lines += ["", f"{'tau':>6}   {'transfer accuracy':<24}{'leak':<9}{'overflow':<11}cuts"]
    for tau, cell in result.get("transfer", {}).items():
        lines += [f"{tau:>6}   {show(cell['accuracy'], f'transfer@{tau}'):<24}{cell['leak']:<9.3f}"
                  f"{cell['overflow']:<11.3f}{cell['cuts']}"]
    if "transfer" in result:
        lines += ["leak: prefixes that hold a boxed answer already; "
                  "overflow: too long for the receiver, scored 0"]
    return "\n".join([*lines, "", result["conventions"]])


# ==================================================================================== command line


class Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)
