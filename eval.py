"""Evaluation: accuracy, Maj@k, Pass@k and transfer accuracy, with intervals over problems.

    python eval.py --model runs/NAME/final --data math500 --k 64 --out evals/NAME
    python eval.py ... --receiver Qwen2.5-1.5B-Instruct     # also transfer, at tau = 0.1 .. 0.9
    python eval.py --run runs/NAME                          # its model before and after training
    python eval.py --samples FILE                           # completions that exist already
    python eval.py --compare evals/A/result.json evals/B/result.json

Of a problem with gold answer g there are n completions y_i with answers a_i = answer(y_i):

    accuracy   mean_i 1[a_i = g]                  equality is answers_equal, never that of strings
    Maj@k      mean_S 1[majority_vote(a_S) = g]   S: k of the n completions
    Pass@k     1 - C(n - c, k) / C(n, k)          c of the n are right
    transfer   1[answer(y[:tau |y|] + z) = g]     z: how the receiver goes on from there
    leak       1[y[:tau |y|] has a boxed answer]  overflow: it is too long for the receiver
Start at `evaluate`: it makes a record of each problem, and `score` makes figures of them.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.24", "datasets>=3.0", "numpy>=1.26", "tqdm>=4.66"]
# ///
import argparse
import json
import os
import re
import sys
import zlib
from collections import defaultdict
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from math import comb
from pathlib import Path

import numpy as np
from tqdm import tqdm

import rltr
from rltr import Config, answers_equal, extract_answer, mean, option, require

TAUS = [tenth / 10 for tenth in range(1, 10)]
SUBSETS = 1000
RESAMPLES = 10_000
CHUNK_ROWS = 2048  # completions that are made, and then stored, at once: about so many
CONVENTIONS = """\
Votes are cast by equivalence, completions without an answer do not vote, ties go to the first seen.
Maj@k: 1 < k < n is a mean over 1,000 subsets without replacement. Pass@k: unbiased estimator.
[..]: 95 % intervals, bootstrap over problems, 10,000 resamples."""


@dataclass
class Settings(Config):  # a few settings of training are used, some with another default
    model: str = option("", "folder or hub name of the model to evaluate")
    run: str = option("", "folder of a run of rltr.py: its model before and after training")
    samples: str = option("", "file of completions to score instead of a model's")
    data: str = option("math500", "short name, hub id or local file, as in rltr.py")
    split: str = option("", "of a hub data set; empty: test, or the only one there is")
    k: int = option(64, "completions a problem; of --samples all there are", 1)
    out: str = option("", "folder for the results; goes on with what is there")
    temperature: float = option(1.0, "sampling temperature (0: greedy)", 0)
    receiver: str = option("", "model that goes on from cut completions; self: the same one")
    transfer_samples: int = option(4, "completions a problem that are cut", 1)
    fallback: bool = option(False, "also read answers without a box")
    compare: tuple = option((), "two results")


FLAGS = "model run samples data split limit k out prompt max_new_tokens temperature receiver "
FLAGS += "transfer_samples receiver_temperature receiver_margin fallback seed max_rows device"


# ===================================================================================== evaluating
def evaluate(settings: Settings) -> dict:
    """Sample k completions of each problem; let the receiver, if there is one, go on from cuts.
    Completion i of a chunk is a function of (seed, the chunk's first problem, i). Whole chunks that
    an interrupted evaluation has left in the folder `out` serve again."""
    problems = rltr.load_problems(settings.data, settings.split, settings.limit, prefer="test")
    generator = rltr.load_lm(settings.model, settings.device)
    receiver = rltr.load_lm(settings.receiver, settings.device) if settings.receiver else None
    tasks = rltr.encode_problems(generator, problems, settings.prompt, new_tokens=1)
    # Problems in a chunk: the same number on every machine, and with or without a receiver.
    cuts = min(settings.k, settings.transfer_samples) * len(TAUS)
    size = max(1, CHUNK_ROWS // max(settings.k, cuts))
    records = stored_records(settings, tasks, size) if settings.out else []
    for first in tqdm(range(len(records), len(tasks), size), disable=None):  # None: off in a log
        chunk = sample_chunk(generator, receiver, tasks[first : first + size], first, settings)
        if settings.out:
            with Path(settings.out, "completions.jsonl").open("a") as file:
                file.writelines(json.dumps(record) + "\n" for record in chunk)
        records += chunk
    return score(records, settings)


def sample_chunk(generator, receiver, tasks, first: int, settings: Settings) -> list[dict]:
    """Records of some problems, of which the first has the number `first`: all that figures need.
    Tasks are pairs of a problem and its prompt in token ids."""
    config = replace(settings, group=settings.k)
    rollouts = rltr.sample_rollouts(generator, tasks, config, (rltr.EVALUATION, first))
    groups = rltr.grouped(rollouts, settings.k)
    if receiver is not None:  # steps 3 to 5 of training, with fixed taus
        to_cut = [rollout for group in groups for rollout in group[: settings.transfer_samples]]
        for rollout in to_cut:
            rollout.cuts = [rltr.cut_at(rollout, generator, tau) for tau in TAUS]
        key = (rltr.EVALUATION, rltr.CONTINUATION, first)
        rltr.continue_cuts(to_cut, generator, receiver, settings, key)
        rltr.score_transfer(to_cut)
    records = []
    for group in groups:
        record = {"problem": group[0].problem.question, "answer": group[0].problem.answer}
        record["completions"] = [rollout.text for rollout in group]
        record["finished"] = [rollout.finished for rollout in group]
        record["tokens"] = [len(rollout.tokens) for rollout in group]
        record["cuts"] = [asdict(cut) for rollout in group for cut in rollout.cuts]
        records.append(record)
    return records


def stored_records(settings: Settings, tasks, size: int) -> list[dict]:
    """The whole chunks that an interrupted evaluation has left in the folder `out`."""
    folder = Path(settings.out)
    log = folder / "completions.jsonl"
    # What decides on the completions. The checksum speaks for the data and for the tokenizer.
    checksum = zlib.crc32(repr(tasks).encode())
    identity = json.dumps(dict(vars(settings), out="", max_rows=0, fallback=False, tasks=checksum))
    if not log.exists():
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "settings.json").write_text(identity)
        return []
    same = (folder / "settings.json").read_text() == identity
    require(same, f"{folder}: holds an evaluation of other problems, or with other settings")
    lines = log.read_text().split("\n")[:-1]  # what is behind the last line end is torn
    if len(lines) < len(tasks):
        lines = lines[: len(lines) // size * size]  # a chunk that is not whole is made again
    os.truncate(log, sum(len(line) + 1 for line in lines))
    return [json.loads(line) for line in lines]


def before_and_after(settings: Settings):
    """The closing table of a run: its model at the start against its model at the end."""
    results = {}
    for when, model in (("before", settings.model), ("after", f"{settings.run}/final")):
        out = settings.out and f"{settings.out}/{when}"
        results[when] = evaluate(replace(settings, model=model, out=out))
    names = ["accuracy", f"Maj@{settings.k}", *(f"transfer@{tau}" for tau in TAUS[::2])]
    print("before -> after,", compare_results(results["before"], results["after"], names))
    for result in results.values():
        del result["per_problem"]
    Path(settings.run, "evaluation.json").write_text(json.dumps(results, indent=1))


# ===================================================================================== statistics
# Without a box `fallback` reads what follows "answer is" or "A:", else the last formula or number.
equal = lru_cache(10_000)(answers_equal)
FALLBACKS = (
    r"(?:[Aa]nswer(?: is|:)+|^A:) *(\$[^$\n]+\$|\\\(.+?\\\)|-?\$?\d[\d,]*(?:\.\d+)?|\w+(?=\.?$))",
    r"\$[^$\n]+\$|(?<![\w).])-?\d[\d,]*(?:\.\d+)?",
)


def is_correct(text: str, gold: str, fallback: bool = True) -> bool:
    """Whether the final answer in a completion equals the gold answer.
    >>> is_correct("5 + 7 = 12 apples", "12"), is_correct("12 apples", "12", fallback=False)
    (True, False)
    """
    answer = read_answer(text, fallback)
    return answer is not None and equal(answer, gold)


def read_answer(text: str, fallback: bool) -> str | None:
    answer = extract_answer(text)
    if answer is None and fallback:
        for pattern in FALLBACKS:
            found = re.findall(pattern, text[-300:], re.MULTILINE)
            if found:
                return found[-1]
    return answer


def score(records, settings: Settings) -> dict:
    """All figures, for k = 1, 2, 4 .. n; each problem has n or more completions."""
    n = min(len(record["completions"]) for record in records)
    ks = {2**exponent for exponent in range(n.bit_length())} | {min(settings.k, n), n}
    rows = [score_problem(record, sorted(ks), settings.fallback) for record in records]
    names = list(rows[0]["figures"])
    values = figure_table(rows, names)
    intervals, _ = bootstrap(values)
    return {
        "problems": len(rows),
        "n": n,
        "figures": dict(zip(names, values.mean(axis=0).tolist(), strict=True)),
        "intervals": dict(zip(names, intervals.tolist(), strict=True)),
        "per_problem": rows,
    }


def score_problem(record: dict, ks, fallback: bool) -> dict:
    gold = record["answer"]
    answers = [read_answer(text, fallback) for text in record["completions"]]
    is_right = [answer is not None and equal(answer, gold) for answer in answers]
    figures = {"accuracy": mean(is_right), "answered": mean(a is not None for a in answers)}
    for name in ("finished", "tokens"):
        if name in record:  # completions from elsewhere are texts alone
            figures[name] = mean(record[name])
    for k in ks:
        figures[f"Maj@{k}"] = maj_at_k(answers, gold, k)
        figures[f"Pass@{k}"] = pass_at_k(len(answers), sum(is_right), k)
    shares = defaultdict(list)  # of what the receiver has made of the cuts
    for cut in record.get("cuts", []):
        whole = cut["prefix"] + cut["continuation"]
        right = not cut["overflow"] and is_correct(whole, gold, fallback)
        shares["overflow"].append(cut["overflow"])
        shares[f"transfer@{cut['tau']}"].append(right)
        shares[f"leak@{cut['tau']}"].append(cut["leaked"])
    figures |= {name: mean(values) for name, values in shares.items()}
    return {"problem": record["problem"], "figures": figures}


def classes_of(answers: list) -> np.ndarray:
    """Equal answers get the same number, from 1 on; no answer is 0.
    >>> classes_of(["7", "1,000", None, "7", "1000"]).tolist()
    [1, 2, 0, 1, 2]
    """
    firsts = []  # of each class
    number_of = {None: 0}
    for answer in dict.fromkeys(answers):
        if answer is not None:
            equals = [number for number, first in enumerate(firsts, 1) if equal(first, answer)]
            if not equals:
                firsts.append(answer)
            number_of[answer] = equals[0] if equals else len(firsts)
    return np.array([number_of[answer] for answer in answers])


def majority_vote(answers: list) -> str | None:
    """The answer with most votes, of several the first. Equal answers vote together, None never.
    >>> majority_vote(["7", "1,000", None, None, "1000"])
    '1,000'
    """
    return answers[winners(classes_of(answers)[None])[0]] if answers else None


def winners(classes: np.ndarray) -> np.ndarray:
    """Votes by class, [S, k] -> the place of the winner in each; of equals the first. [S]"""
    votes = (classes[:, :, None] == classes[:, None, :]).sum(axis=2)  # [S, k]: for its own class
    return np.where(classes > 0, votes, 0).argmax(axis=1)


def maj_at_k(answers: list, gold: str, k: int) -> float:
    """Maj@k = mean over subsets S of k answers (None: no answer) of 1[majority_vote(a_S) = gold].
    >>> maj_at_k(["3", "4", None, "3"], "3", 4), maj_at_k(["3", "4", None, "3"], "3", 1)
    (1.0, 0.5)
    """
    right = np.array([answer is not None and equal(answer, gold) for answer in answers])
    chosen = np.array(subsets(len(answers), k))  # [S, k]
    places = winners(classes_of(answers)[chosen])
    return right[chosen[range(len(chosen)), places]].mean().item()


@lru_cache(maxsize=64)
def subsets(n: int, k: int):
    """Subsets of k of n completions, each in the order of sampling: for "first seen"."""
    if k in (1, n):  # all there are
        return np.arange(n).reshape(-1, k).tolist()
    source = np.random.default_rng(0)
    return [sorted(source.choice(n, k, replace=False).tolist()) for _ in range(SUBSETS)]


def pass_at_k(n: int, c: int, k: int) -> float:
    """Pass@k = 1 - C(n - c, k) / C(n, k): some of k completions is right, if c of n are.
    The difference is taken in whole numbers, so nothing cancels and nothing overflows.
    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(10_000, 1, 1)
    (0.25, 0.5, 0.0001)
    """
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def figure_table(rows, names):
    return np.array([[row["figures"][name] for name in names] for row in rows])  # [P, M]


def bootstrap(values):
    """How sure are the means of M figures over P problems? values: [P, M].
    Draws P problems with replacement, again and again. Returns the 95 % intervals of the means
    [M, 2] and, for values that are differences, p = 2 min(P[mean <= 0], P[mean >= 0]) [M]."""
    count = len(values)
    source = np.random.default_rng(0)
    times_drawn = source.multinomial(count, [1 / count] * count, RESAMPLES)  # [R, P]
    means = times_drawn @ values / count  # [R, M]
    tail = np.minimum((means <= 0).sum(axis=0), (means >= 0).sum(axis=0)) + 1
    intervals = np.percentile(means, [2.5, 97.5], axis=0).T
    return intervals, np.minimum(1, 2 * tail / (RESAMPLES + 1))


def compare_results(before: dict, after: dict, names) -> str:
    """The differences of those figures that two results share, paired by problem."""
    asked = [[row["problem"] for row in result["per_problem"]] for result in (before, after)]
    require(asked[0] == asked[1], "--compare: results on different problems")
    names = [name for name in names if name in before["figures"] and name in after["figures"]]
    old = figure_table(before["per_problem"], names)
    new = figure_table(after["per_problem"], names)
    intervals, p_values = bootstrap(new - old)
    columns = zip(names, old.mean(axis=0), new.mean(axis=0), intervals, p_values, strict=True)
    lines = [f"{len(old)} problems, difference, 95 % interval: paired bootstrap over problems"]
    for name, first, second, (low, high), p in columns:
        means = f"{first:9.3f} ->{second:9.3f}   {second - first:+.3f}"
        lines.append(f"{name:<14}{means} [{low:+.3f}, {high:+.3f}]   p = {p:.4f}")
    return "\n".join(lines)


def report(result: dict) -> str:
    lines = {}  # figures of the same k or tau share one
    for name, (low, high) in result["intervals"].items():
        cell = f"{name:<13}{result['figures'][name]:8.3f} [{low:.3f}, {high:.3f}]"
        key = name.partition("@")[2] or name
        lines[key] = lines.get(key, "") + f"{cell:<42}"
    title = f"{result['problems']} problems, {result['n']} completions each"
    return "\n".join([title, *lines.values(), CONVENTIONS])


# =================================================================================== command line
def run(argv):
    settings = parse_arguments(argv)
    if settings.compare:
        before, after = [json.loads(Path(path).read_text()) for path in settings.compare]
        print(compare_results(before, after, before["figures"]))
    elif settings.run:
        before_and_after(settings)
    else:
        result = score_file(settings) if settings.samples else evaluate(settings)
        print(report(result))
        if settings.out:
            Path(settings.out).mkdir(parents=True, exist_ok=True)
            result["settings"] = {name: getattr(settings, name) for name in FLAGS.split()}
            Path(settings.out, "result.json").write_text(json.dumps(result, indent=1))


def parse_arguments(argv) -> Settings:
    """Flags override the settings of a run, these override our defaults."""
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    flags = [Settings.__dataclass_fields__[name] for name in FLAGS.split()]
    tasks = parser.add_mutually_exclusive_group(required=True)
    tasks.add_argument("--compare", nargs=2, help="two result.json, paired by problem")
    rltr.add_flags(tasks, flags[:3])
    rltr.add_flags(parser, flags[3:])
    given = parser.parse_args(argv)
    if given.run:
        require(Path(given.run, "final").is_dir(), f"{given.run}: holds no finished run")
        saved = json.loads(Path(given.run, "config.json").read_text())
        saved |= {"data": saved["eval_data"] or given.data, "k": saved["eval_k"]}
        if saved["transfer_weight"] == 0 and not Path(saved["receiver"]).is_dir():
            saved["receiver"] = ""  # RLVR needs none: it may have to be downloaded
        parser.set_defaults(**saved | {"split": "", "limit": 0, "out": ""})
    for folder in Path(given.model).parents:  # runs/NAME is one of runs/NAME/final
        if (folder / "metrics.jsonl").is_file():
            saved = json.loads((folder / "config.json").read_text())
            parser.set_defaults(prompt=saved["prompt"])
            print(f"eval: the prompt is by default that of {folder}", file=sys.stderr)
    settings = Settings(**vars(parser.parse_args(argv)))
    rltr.check_settings(settings)
    if settings.receiver == "self":
        settings.receiver = settings.model  # of a run, as it was at the start
    return settings


def score_file(settings: Settings) -> dict:
    """Completions from elsewhere: a file of problems with one more column, `completions`."""
    problems = rltr.load_problems(settings.samples)
    records = rltr.read_rows(settings.samples, None, "")
    for problem, record in zip(problems, records, strict=True):
        is_list = isinstance(record.get("completions"), list)
        require(is_list, f"{settings.samples}: a row without a list of completions")
        record |= {"problem": problem.question, "answer": problem.answer}
    return score(records, settings)


def main(argv=None) -> int:
    return rltr.run_command("eval", run, argv)


if __name__ == "__main__":
    sys.exit(main())
