"""Evaluation: accuracy, Maj@k, Pass@k and transfer accuracy, with intervals over problems.

    python eval.py --model runs/NAME/final --data math500 --k 64 --out evals/NAME
    python eval.py ... --receiver Qwen2.5-1.5B-Instruct     # also transfer, at tau = 0.1 .. 0.9
    python eval.py --samples FILE                           # completions that exist already
    python eval.py --compare evals/A/result.json evals/B/result.json

Of a problem with gold answer g there are n completions y_i with answers a_i = answer(y_i):

    accuracy   mean_i 1[a_i = g]                  equality is answers_equal, never that of strings
    Maj@k      mean_S 1[majority_vote(a_S) = g]   S: k of the n completions
    Pass@k     1 - C(n - c, k) / C(n, k)          c of the n are right
    transfer   1[answer(y[:tau |y|] + z) = g]     z: how the receiver goes on from there
    leak       1[y[:tau |y|] has a boxed answer]  overflow: it is too long for the receiver
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import os
import sys
import zlib
from pathlib import Path

import numpy as np
import transformers
from tqdm import tqdm

import rltr
from rltr import (
    EVALUATION,
    LM,
    PROMPT,
    Config,
    Problem,
    TransferReward,
    UserError,
    answers_equal,
    decode,
    extract_answer,
    gather,
    generate,
    is_correct,
    load_lm,
    load_problems,
    majority_vote,
    printable,
    require,
    share,
)  # noqa: F401 (majority_vote: re-exported)

TAUS = tuple(i / 10 for i in range(1, 10))
SUBSETS, RESAMPLES = 1000, 10_000
CONVENTIONS = f"""\
Votes are cast by equivalence, completions without an answer do not vote, ties go to the first seen.
Maj@k: 1 < k < n is a mean over {SUBSETS:,} subsets without replacement. Pass@k: unbiased estimator.
[..]: 95 % intervals, bootstrap over problems, {RESAMPLES:,} resamples."""


# ==================================================================================== mathematics
@functools.lru_cache(maxsize=1)  # of one problem, for all k
def classify(answers: tuple, gold: str) -> tuple[np.ndarray, np.ndarray]:
    """Answers as integers [n], the same for equivalent ones, 0 for None; and which are right [n].

    >>> classify(("7", "1,000", None, "7", "1000"), "1000")
    (array([1, 2, 0, 1, 2]), array([False,  True, False, False,  True]))
    """
    number, firsts = {None: 0}, []  # firsts[j] is the first answer of class j + 1
    for answer in dict.fromkeys(a for a in answers if a is not None):
        j = next((j for j, f in enumerate(firsts) if answers_equal(f, answer)), len(firsts))
        firsts += [answer] * (j == len(firsts))
        number[answer] = j + 1
    right = {a: a is not None and answers_equal(a, gold) for a in number}
    return np.array([number[a] for a in answers]), np.array([right[a] for a in answers])


@functools.lru_cache(maxsize=64)
def subsets(n: int, k: int) -> np.ndarray:
    """Subsets of k of n completions [S, k], each in the order of sampling: for "first seen"."""
    if k in (1, n):  # all there are
        return np.arange(n).reshape(-1, k)
    source = np.random.default_rng(0)
    return np.sort([source.choice(n, k, replace=False) for _ in range(SUBSETS)], axis=1)


def maj_at_k(answers: list, gold: str, k: int) -> float:
    """Maj@k = mean over subsets S of k answers (None: no answer) of 1[majority_vote(a_S) = gold].

    >>> maj_at_k(["3", "4", None, "3"], "3", 4), maj_at_k(["3", "4", None, "3"], "3", 1)
    (1.0, 0.5)
    """
    require(1 <= k <= len(answers), f"Maj@{k} of {len(answers)} answers")
    classes, right = classify(tuple(answers), gold)
    chosen = subsets(len(answers), k)  # [S, k]
    rows = np.arange(len(chosen))
    boxes = classes[chosen] + rows[:, None] * (classes.max() + 1)  # one a subset and class
    votes = np.bincount(boxes.ravel())[boxes] * (classes[chosen] > 0)
    winners = chosen[rows, votes.argmax(1)]  # argmax: the first of equals
    return float(right[winners].mean())


def pass_at_k(n: int, c: int, k: int) -> float:
    """Pass@k = 1 - C(n - c, k) / C(n, k): some of k completions is right, if c of n are. The
    difference is taken in whole numbers, so nothing cancels and nothing overflows.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(10_000, 1, 1)
    (0.25, 0.5, 0.0001)
    """
    require(1 <= k <= n and 0 <= c <= n, f"Pass@{k} of {n} completions, {c} of them right")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """values [P, M], M figures of P problems. Draws P problems with replacement, again and again:
    the 95 % intervals of the means [M, 2] and p = 2 min(P[mean <= 0], P[mean >= 0]) [M]."""
    count, source = len(values), np.random.default_rng(0)
    means = (
        np.concatenate(
            [
                source.multinomial(count, np.full(count, 1 / count), 100) @ values
                for _ in range(RESAMPLES // 100)
            ]
        )
        / count
    )  # [R, M]
    tail = np.minimum((means <= 0).sum(0), (means >= 0).sum(0)) + 1
    return np.percentile(means, [2.5, 97.5], axis=0).T, np.minimum(1, 2 * tail / (RESAMPLES + 1))


# ==================================================================================== completions
def evaluate(
    lm: LM,
    problems: list[Problem],
    *,
    k,
    prompt=PROMPT,
    max_new_tokens=1024,
    temperature=1.0,
    receiver: LM | None = None,
    taus=TAUS,
    margin=64,
    receiver_temperature=1.0,
    transfer_samples=4,
    seed=0,
    max_rows=0,
    fallback=False,
    label="",
    out="",
    settings=None,
) -> dict:
    """Sample k completions a problem, let the receiver go on from the first `transfer_samples` of
    them, and score it all. Row i is a function of (seed, i), the receiver's of (seed, chunk, i):
    chunks that an earlier call with the same settings has left in the folder `out` are reused.
    """
    prompts = [lm.encode_prompt(p.question, prompt) for p in problems]
    limits = [min(max_new_tokens, lm.context - len(ids)) for ids in prompts]
    require(min(limits) > 0, f"problem {np.argmin(limits) + 1}: longer than the model's context")
    transfer = receiver and TransferReward(
        receiver,
        lm.tokenizer,
        temperature=receiver_temperature,
        max_new_tokens=max_new_tokens,
        margin=margin,
        prompt=prompt,
        seed=seed,
        stop_ids=lm.stop_ids,
        max_rows=max_rows,
    )
    size = max(1, (2048 if lm.model.device.type == "cuda" else 512) // k)  # problems a chunk
    records = gather(
        stored_records(out, settings or {}, problems, size) if out and rltr.RANK == 0 else []
    )
    work = k + (min(k, transfer_samples) * len(taus) if transfer else 0)  # rows a problem
    with tqdm(
        desc=label,
        unit="row",
        smoothing=0,
        total=work * len(problems),
        initial=work * len(records),
        disable=rltr.RANK > 0,
    ) as bar:
        for first in range(len(records), len(problems), size):
            here = slice(first, min(first + size, len(problems)))
            mine = share(here.stop - first)  # of several GPUs, under torchrun
            done = gather(
                generate(
                    lm.model,
                    prompts[here][mine],
                    samples=k,
                    max_new_tokens=limits[here][mine],
                    temperature=temperature,
                    stop_ids=lm.stop_ids,
                    vocab_size=lm.vocab_size,
                    max_rows=max_rows,
                    seed=(seed, EVALUATION),
                    first_row=(first + mine.start) * k,
                    progress=bar,
                )
            )
            groups = [done[i : i + k] for i in range(0, len(done), k)]
            new = [
                {
                    "problem": p.question,
                    "answer": p.answer,
                    "completions": [decode(lm.tokenizer, c.tokens) for c in group],
                    "drawn": {
                        "finished": [c.finished for c in group],
                        "tokens": [len(c.tokens) for c in group],
                        "cuts": [],
                    },
                }
                for p, group in zip(problems[here], groups)
            ]
            if transfer:
                owners = [(r, c) for r, g in zip(new, groups) for c in g[:transfer_samples]]
                rows = transfer.continue_from_cuts(
                    [r["problem"] for r, _ in owners],
                    [c.tokens for _, c in owners],
                    [r["answer"] for r, _ in owners],
                    step=first,
                    taus=[taus] * len(owners),
                )
                for (r, _), cuts in zip(owners, rows):
                    r["drawn"]["cuts"] += map(dataclasses.asdict, cuts)
                bar.update((work - k) * len(new))
            records += new
            if out and rltr.RANK == 0:
                with Path(out, "completions.jsonl").open("a") as file:
                    file.write("".join(json.dumps(record) + "\n" for record in new))
    return score(records, k, fallback)


def stored_records(out: str, settings: dict, problems: list[Problem], size: int) -> list[dict]:
    """The complete chunks of an interrupted evaluation; what is behind, a torn line too, is cut."""
    file, beside = Path(out, "completions.jsonl"), Path(out, "settings.json")
    settings = {**settings, "problems": zlib.crc32(repr(problems).encode(errors="replace"))}
    if not file.exists() or not file.stat().st_size:
        file.parent.mkdir(parents=True, exist_ok=True)
        beside.write_text(json.dumps(settings, indent=1))
        file.touch()
    saved = parse(beside.read_bytes(), beside)
    changed = ", ".join(key for key in settings if saved.get(key) != settings[key])
    require(not changed, f"--out {out}: there is an evaluation with another {changed} in it")
    lines = [line for line in file.read_bytes().splitlines(True) if line.endswith(b"\n")]
    if len(lines) < len(problems):
        lines = lines[: len(lines) // size * size]
    os.truncate(file, sum(map(len, lines)))
    return read_records(file) if lines else []


def read_records(path: str | Path) -> list[dict]:
    """One record a line: "problem", "answer", "completions"; evaluate adds what is "drawn"."""
    records = []
    lines = enumerate(Path(path).read_bytes().splitlines(), 1)
    for number, row in ((i, parse(line, f"{path}: line {i}")) for i, line in lines if line.strip()):
        asked, gold = row.get("problem", row.get("question")), row.get("answer")
        texts = row.get("completions")
        good = isinstance(gold, (str, int, float)) and isinstance(texts, list) and len(texts) > 0
        require(
            good and all(isinstance(text, str) for text in [asked, *texts]),
            f"{path}: line "
            f'{number} is not {{"problem": text, "answer": text, "completions": [text, ..]}}',
        )
        gold = extract_answer(str(gold)) or str(gold)
        records.append({**row, "problem": asked, "answer": gold})
    require(records, f"{path}: holds no completions")
    return records


def parse(text: bytes, where) -> dict:
    try:
        data = json.loads(text)
    except (ValueError, RecursionError):
        data = None
    require(isinstance(data, dict), f"{where}: not a JSON object")
    return data


# ========================================================================================= result
def score_problem(record: dict, ks: list[int], fallback: bool) -> dict:
    """All figures of one problem, under the names that the report uses."""
    texts, gold, drawn = record["completions"], record["answer"], record.get("drawn", {})
    answers = [extract_answer(text, fallback) for text in texts]
    right = classify(tuple(answers), gold)[1]
    figures = {"accuracy": right.mean(), "answered": np.mean([a is not None for a in answers])}
    figures |= {name: np.mean(drawn[name]) for name in ("finished", "tokens") if name in drawn}
    for k in ks:
        figures[f"Maj@{k}"] = maj_at_k(answers, gold, k)
        figures[f"Pass@{k}"] = pass_at_k(len(texts), int(right.sum()), k)
    cuts = drawn.get("cuts", [])
    if cuts:
        figures["overflow"] = np.mean([cut["overflow"] for cut in cuts])
    if fallback:  # the reward reads boxes only
        cuts = [
            {**cut, "correct": is_correct(cut["prefix"] + cut["continuation"], gold, True)}
            for cut in cuts
        ]
    for tau in dict.fromkeys(cut["tau"] for cut in cuts):
        for name, key in ("transfer", "correct"), ("leak", "leaked"):
            figures[f"{name}@{tau}"] = np.mean([cut[key] for cut in cuts if cut["tau"] == tau])
    return {
        "problem": record["problem"],
        "answer": gold,
        "figures": {name: float(value) for name, value in figures.items()},
    }


def score(records: list[dict], k: int | None = None, fallback: bool = False) -> dict:
    """All figures, for k = 1, 2, 4 .. n and the given k; each problem has n or more completions."""
    n = min(len(record["completions"]) for record in records)
    require((k or n) <= n, f"--k {k}: some problem has only {n} completions")
    ks = sorted({2**i for i in range(n.bit_length())} | {n, k or n})
    rows = [score_problem(record, ks, fallback) for record in records]
    names = [name for name in rows[0]["figures"] if all(name in row["figures"] for row in rows)]
    values = np.array([[row["figures"][name] for name in names] for row in rows])  # [P, M]
    mean = dict(zip(names, values.mean(0).tolist()))
    taus = [name.split("@")[1] for name in names if name.startswith("transfer")]
    return {
        "problems": len(rows),
        "n": n,
        "accuracy": mean["accuracy"],
        "maj": {str(k): mean[f"Maj@{k}"] for k in ks},
        "pass": {str(k): mean[f"Pass@{k}"] for k in ks},
        "transfer": {
            tau: {"accuracy": mean[f"transfer@{tau}"], "leak": mean[f"leak@{tau}"]} for tau in taus
        },
        "cut": len(records[0]["drawn"]["cuts"]) // len(taus) if taus else 0,
        "figures": mean,
        "intervals": dict(zip(names, bootstrap(values)[0].tolist())),
        "conventions": CONVENTIONS,
        "per_problem": rows,
    }


def report(result: dict) -> str:
    rows = {}  # what has the same k or tau shares a row
    for (name, mean), (low, high) in zip(result["figures"].items(), result["intervals"].values()):
        cell = f"{name:<13}{mean:8.3f} [{low:.3f}, {high:.3f}]"
        rows.setdefault(name.partition("@")[2] or name, []).append(f"{cell:<42}")
    cut = f", {result['cut']} of them cut and continued" if result["cut"] else ""
    return "\n".join(
        [
            f"{result['problems']} problems, {result['n']} completions each{cut}",
            *map("".join, rows.values()),
            result["conventions"],
        ]
    )


def compare(a: dict, b: dict, only=()) -> str:
    """The differences of the figures that two results share, paired by problem."""
    require("per_problem" in a and "per_problem" in b, "--compare: these are not two result.json")
    asked, other = ([row["problem"] for row in x["per_problem"]] for x in (a, b))
    require(asked == other, "--compare: these are results on different problems")
    names = [name for name in a["figures"] if name in b["figures"] and (not only or name in only)]
    first, second = (
        np.array([[row["figures"][name] for name in names] for row in x["per_problem"]])
        for x in (a, b)
    )  # [P, M]
    lines = [f"{len(first)} problems, difference and 95 % interval: paired bootstrap over problems"]
    for name, x, y, (low, high), p in zip(
        names, first.mean(0), second.mean(0), *bootstrap(second - first)
    ):
        lines.append(
            f"{name:<14}{x:9.3f} ->{y:9.3f}   {y - x:+.3f} [{low:+.3f}, {high:+.3f}]   p = {p:.4f}"
        )
    return "\n".join(lines)


def before_and_after(config: Config, final: Path):
    """The closing table of rltr.py: the generator and what became of it, on config.eval_data."""
    settings = {
        **vars(config),
        "data": config.eval_data,
        "k": config.eval_k,
        "out": "",
        "receiver": config.model if config.receiver == "self" else config.receiver,
        "split": "",
        "limit": 0,
        "transfer_samples": 4,
        "fallback": False,
    }
    before, after = (
        evaluate_model(argparse.Namespace(**{**settings, "model": model}))
        for model in (config.model, str(final))
    )
    if rltr.RANK > 0:
        return
    table = {"before": before["figures"], "after": after["figures"]}
    Path(config.out, "evaluation.json").write_text(json.dumps(table, indent=1))
    print(
        "before -> after,",
        compare(
            before,
            after,
            ["accuracy", f"Maj@{config.eval_k}", *(f"transfer@{tau}" for tau in TAUS[::2])],
        ),
    )


# =================================================================================== command line
FLAGS = [  # name, default, least value (None: text), help
    ("model", "", None, "folder or hub name of the model to evaluate"),
    ("samples", "", None, "file of completions to score instead of a model's"),
    ("data", "math500", None, "short name, hub id or local file, as in rltr.py"),
    ("split", "", None, "of a hub data set; empty: test, or the only one there is"),
    ("k", None, 1, "completions a problem (default: 64; of --samples: all there are)"),
    ("out", "", None, "folder of result.json and completions.jsonl; goes on with what is there"),
    ("prompt", "", None, "with {question}; empty: that of the run the model comes from"),
    ("temperature", 1.0, 0, "sampling temperature (0: greedy)"),
    ("receiver", "", None, "model that goes on from cut completions; self: the same one"),
    ("transfer_samples", 4, 1, "completions a problem that are cut"),
    *(
        (f.name, f.default, f.metadata["minimum"], f.metadata["help"])
        for f in dataclasses.fields(Config)
        if f.name
        in (
            "max_new_tokens",
            "receiver_temperature",
            "receiver_margin",
            "limit",
            "seed",
            "max_rows",
            "device",
        )
    ),
]


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    parser.error = functools.partial(require, False)  # one line, not a manual
    for name, default, least, text in FLAGS:
        kind = str if least is None else type(default or least)
        parser.add_argument("--" + name.replace("_", "-"), type=kind, default=default, help=text)
    parser.add_argument("--fallback", action="store_true", help="also read answers without a box")
    parser.add_argument("--compare", nargs=2, metavar="RESULT", help="two result.json, paired")
    args = parser.parse_args(argv)
    require(
        bool(args.model) + bool(args.samples) + bool(args.compare) == 1,
        "give one of --model, --samples and --compare",
    )
    require(args.model or not args.receiver, "--receiver needs --model: it continues its tokens")
    for name, _, least, _ in FLAGS:
        value = getattr(args, name)
        require(
            least is None or value is None or least <= value < math.inf,
            f"--{name.replace('_', '-')} {value}: must be a number of at least {least}",
        )
    for config in (folder / "config.json" for folder in [*Path(args.model).parents][:2]):
        if not args.prompt and config.is_file():  # of a run of rltr.py
            args.prompt = parse(config.read_bytes(), config).get("prompt", "")
    args.prompt, args.k = args.prompt or PROMPT, args.k or (Config.eval_k if args.model else None)
    require("{question}" in args.prompt, "--prompt: {question} is missing in it")
    return args


def evaluate_model(args: argparse.Namespace) -> dict:
    problems = load_problems(args.data, args.split, args.limit, prefer="test")
    files = [f for m in (args.model, args.receiver) if m for f in Path(m).glob("*.safetensors")]
    settings = {
        key: value
        for key, value in vars(args).items()
        if key not in ("out", "max_rows", "fallback")
    }
    settings["weights"] = sorted(f.stat().st_mtime_ns for f in files)  # to notice a new training
    lm = load_lm(args.model, args.device)
    receiver = (
        lm
        if args.receiver == "self"
        else (load_lm(args.receiver, args.device) if args.receiver else None)
    )
    return evaluate(
        lm,
        problems,
        receiver=receiver,
        margin=args.receiver_margin,
        settings=settings,
        label=Path(args.model).name,
        **{
            name: getattr(args, name)
            for name in (
                "k",
                "prompt",
                "max_new_tokens",
                "temperature",
                "receiver_temperature",
                "transfer_samples",
                "fallback",
                "out",
                "seed",
                "max_rows",
            )
        },
    )


def main(argv: list[str] | None = None) -> int:
    transformers.utils.logging.disable_progress_bar()
    try:
        args = parse_arguments(argv)
        rltr.join_ranks()
        if args.compare:
            print(compare(*(parse(Path(path).read_bytes(), path) for path in args.compare)))
            return 0
        result = (
            score(read_records(args.samples), args.k, args.fallback)
            if args.samples
            else evaluate_model(args)
        )
        if rltr.RANK == 0:
            print(report(result))
        if args.out and rltr.RANK == 0:
            Path(args.out).mkdir(parents=True, exist_ok=True)
            result = json.dumps({"settings": vars(args), **result}, indent=1)
            Path(args.out, "result.json").write_text(result)
        return 0
    except (UserError, OSError) as error:
        print("eval: " + printable(" ".join(str(error).split())), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
