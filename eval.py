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

Start reading at `evaluate`: it makes a record of each problem, and `score` makes figures of them.
"""

# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.11", "transformers>=5.17", "datasets>=3.0", "numpy>=1.26", "tqdm>=4.66"]
# ///
import argparse
import contextlib
import dataclasses
import functools
import json
import math
import sys
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

import rltr
from rltr import Config, UserError, answers_equal, extract_answer, majority_vote, option, require  # noqa: F401

TAUS = [tenth / 10 for tenth in range(1, 10)]
SUBSETS = 1000
RESAMPLES = 10_000
CHUNK_ROWS = 2048  # completions that are made, and then stored, at once: about so many
CONVENTIONS = f"""\
Votes are cast by equivalence, completions without an answer do not vote, ties go to the first seen.
Maj@k: 1 < k < n is a mean over {SUBSETS:,} subsets without replacement. Pass@k: unbiased estimator.
[..]: 95 % intervals, bootstrap over problems, {RESAMPLES:,} resamples."""


@dataclasses.dataclass
class Settings(Config):
    """Evaluation uses a few settings of training, some with another default, and has its own."""

    model: str = option("", "folder or hub name of the model to evaluate")
    run: str = option("", "folder of a run of rltr.py: its model before and after training")
    samples: str = option("", "file of completions to score instead of a model's")
    data: str = option("math500", "short name, hub id or local file, as in rltr.py")
    split: str = option("", "of a hub data set; empty: test, or the only one there is")
    k: int = option(64, "completions a problem; of --samples all, if not given", 1)
    out: str = option("", "folder for the results; goes on with what is there")
    temperature: float = option(1.0, "sampling temperature (0: greedy)", 0)
    receiver: str = option("", "model that goes on from cut completions; self: the same one")
    transfer_samples: int = option(4, "completions a problem that are cut", 1)
    fallback: bool = option(False, "also read answers without a box")


FLAGS = "model run samples data split limit k out prompt max_new_tokens temperature receiver "
FLAGS += "transfer_samples receiver_temperature receiver_margin fallback seed max_rows device"


# ===================================================================================== evaluating


def evaluate(settings: Settings) -> dict:
    """Sample k completions of each problem; let the receiver, if there is one, go on from cuts.

    Completion i of a chunk is a function of (seed, the chunk's first problem, i), and chunks that
    an interrupted evaluation with the same settings has left in the folder `out` serve again."""
    problems = rltr.load_problems(settings.data, settings.split, settings.limit, prefer="test")
    lm = rltr.load_lm(settings.model, settings.device)
    receiver = lm if settings.receiver == "self" else None
    if settings.receiver and receiver is None:
        receiver = rltr.load_lm(settings.receiver, settings.device)
    tasks = [(p, rltr.encode_prompt(lm, p.question, settings.prompt)) for p in problems]
    for number, (_, prompt) in enumerate(tasks, 1):
        require(len(prompt) < lm.context, f"problem {number} is longer than the model's context")

    # The chunks are the same on every machine, and with or without a receiver.
    cuts = min(settings.k, settings.transfer_samples) * len(TAUS)
    size = max(1, CHUNK_ROWS // max(settings.k, cuts))  # in problems
    records = stored_records(settings, problems, size) if settings.out else []
    with tqdm(total=len(tasks), initial=len(records), desc=Path(settings.model).name) as bar:
        for first in range(len(records), len(tasks), size):
            chunk = sample_chunk(lm, receiver, tasks[first : first + size], first, settings)
            if settings.out:
                with Path(settings.out, "completions.jsonl").open("a") as file:
                    file.writelines(json.dumps(record) + "\n" for record in chunk)
            records += chunk
            bar.update(len(chunk))
    return score(records, settings.k, settings.fallback)


def sample_chunk(lm: rltr.LM, receiver, tasks: list, first: int, settings: Settings) -> list[dict]:
    """The records of some problems. Tasks are pairs of a problem and its prompt in token ids."""
    completions = rltr.generate(
        lm.model,
        [prompt for _, prompt in tasks],
        samples=settings.k,
        max_new_tokens=[min(settings.max_new_tokens, lm.context - len(p)) for _, p in tasks],
        temperature=settings.temperature,
        stop_ids=lm.stop_ids,
        vocab_size=lm.vocab_size,
        max_rows=settings.max_rows,
        seed=(settings.seed, rltr.EVALUATION, first),
    )
    rollouts = []
    for number, c in enumerate(completions):
        problem, prompt = tasks[number // settings.k]
        text = rltr.decode(lm.tokenizer, c.tokens)
        rollouts.append(rltr.Rollout(problem, prompt, c.tokens, c.logprobs, c.finished, text))
    groups = rltr.grouped(rollouts, settings.k)
    if receiver is not None:  # steps 3 to 5 of training, with fixed taus
        to_cut = [rollout for group in groups for rollout in group[: settings.transfer_samples]]
        rltr.cut_rollouts(to_cut, lm, taus=[TAUS] * len(to_cut))
        stream = (rltr.EVALUATION, rltr.CONTINUATION, first)
        rltr.continue_cuts(to_cut, lm, receiver, settings, stream)
        rltr.score_transfer(to_cut)

    records = []
    for (problem, _), group in zip(tasks, groups, strict=True):
        record = {"problem": problem.question, "answer": problem.answer}
        record["completions"] = [rollout.text for rollout in group]
        record["drawn"] = {
            "finished": [rollout.finished for rollout in group],
            "tokens": [len(rollout.tokens) for rollout in group],
            "cuts": [dataclasses.asdict(cut) for rollout in group for cut in rollout.cuts],
        }
        records.append(record)
    return records


# ======================================================================================== figures


@functools.lru_cache(maxsize=1)  # of one problem, for all k
def classify(answers: tuple, gold: str) -> tuple[list[int], list[bool]]:
    """Answers as integers, the same for equivalent ones, 0 for None; and which are right.

    >>> classify(("7", "1,000", None, "7", "1000"), "1000")
    ([1, 2, 0, 1, 2], [False, True, False, False, True])
    """
    first_seen = []  # of class 1, 2, ...
    class_of = {None: 0}
    is_right = {None: False}
    for answer in dict.fromkeys(a for a in answers if a is not None):  # each once
        is_right[answer] = answers_equal(answer, gold)
        known = [first for first in first_seen if answers_equal(first, answer)]
        if not known:
            first_seen.append(answer)
        class_of[answer] = class_of[known[0]] if known else len(first_seen)
    return [class_of[answer] for answer in answers], [is_right[answer] for answer in answers]


@functools.lru_cache(maxsize=64)
def subsets(n: int, k: int) -> list[list[int]]:
    """Subsets of k of n completions, each in the order of sampling: for "first seen"."""
    if k in (1, n):  # all there are
        return np.arange(n).reshape(-1, k).tolist()
    source = np.random.default_rng(0)
    return [sorted(source.choice(n, k, replace=False).tolist()) for _ in range(SUBSETS)]


def maj_at_k(answers: list[str | None], gold: str, k: int) -> float:
    """Maj@k = mean over subsets S of k answers (None: no answer) of 1[majority_vote(a_S) = gold].

    The same vote as `majority_vote`, but answers are compared once, not anew in each subset.

    >>> maj_at_k(["3", "4", None, "3"], "3", 4), maj_at_k(["3", "4", None, "3"], "3", 1)
    (1.0, 0.5)
    """
    require(1 <= k <= len(answers), f"Maj@{k} of {len(answers)} answers")
    classes, right = classify(tuple(answers), gold)
    hits = 0
    for subset in subsets(len(answers), k):
        voters = {}  # class -> those who gave an answer of this class
        for i in subset:
            if classes[i] != 0:
                voters.setdefault(classes[i], []).append(i)
        if voters:
            winners = max(voters.values(), key=len)  # of equals the first: a dict keeps its order
            hits += right[winners[0]]
    return hits / len(subsets(len(answers), k))


def pass_at_k(n: int, c: int, k: int) -> float:
    """Pass@k = 1 - C(n - c, k) / C(n, k): some of k completions is right, if c of n are.

    The difference is taken in whole numbers, so nothing cancels and nothing overflows.

    >>> pass_at_k(4, 1, 1), pass_at_k(4, 1, 2), pass_at_k(10_000, 1, 1)
    (0.25, 0.5, 0.0001)
    """
    require(1 <= k <= n and 0 <= c <= n, f"Pass@{k} of {n} completions, {c} of them right")
    return (math.comb(n, k) - math.comb(n - c, k)) / math.comb(n, k)


def bootstrap(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How sure are the means of M figures over P problems? values: [P, M].

    Draws P problems with replacement, again and again. Returns the 95 % intervals of the means
    [M, 2] and, for values that are differences, p = 2 min(P[mean <= 0], P[mean >= 0]) [M]."""
    count = len(values)
    equally_likely = np.full(count, 1 / count)
    times_drawn = np.random.default_rng(0).multinomial(count, equally_likely, RESAMPLES)  # [R, P]
    means = times_drawn @ values / count  # [R, M]
    tail = np.minimum((means <= 0).sum(axis=0), (means >= 0).sum(axis=0)) + 1
    intervals = np.percentile(means, [2.5, 97.5], axis=0).T
    return intervals, np.minimum(1, 2 * tail / (RESAMPLES + 1))


def score_problem(record: dict, ks: list[int], fallback: bool) -> dict:
    """All figures of one problem, under the names that the report uses."""
    gold = record["answer"]
    drawn = record.get("drawn", {})
    answers = [extract_answer(text, fallback) for text in record["completions"]]
    _, right = classify(tuple(answers), gold)
    figures = {"accuracy": rltr.mean(right)}
    figures["answered"] = rltr.mean(answer is not None for answer in answers)
    for name in ("finished", "tokens"):
        if name in drawn:
            figures[name] = rltr.mean(drawn[name])
    for k in ks:
        figures[f"Maj@{k}"] = maj_at_k(answers, gold, k)
        figures[f"Pass@{k}"] = pass_at_k(len(answers), sum(right), k)
    cuts_at = {}  # tau -> cuts
    for cut in drawn.get("cuts", []):
        cuts_at.setdefault(cut["tau"], []).append(cut)
        if fallback and not cut["overflow"]:  # the transfer reward reads boxes only
            cut["correct"] = rltr.is_correct(cut["prefix"] + cut["continuation"], gold, True)
    if cuts_at:
        figures["overflow"] = rltr.mean(cut["overflow"] for cut in drawn["cuts"])
    for tau, cuts in cuts_at.items():
        figures[f"transfer@{tau}"] = rltr.mean(cut["correct"] for cut in cuts)
        figures[f"leak@{tau}"] = rltr.mean(cut["leaked"] for cut in cuts)
    figures = {name: float(value) for name, value in figures.items()}
    require(all(map(math.isfinite, figures.values())), f"problem {record['problem']!r}: damaged")
    return {"problem": record["problem"], "answer": gold, "figures": figures}


def score(records: list[dict], k: int | None = None, fallback: bool = False) -> dict:
    """All figures, for k = 1, 2, 4 .. n and the given k; each problem has n or more completions."""
    n = min(len(record["completions"]) for record in records)
    k = k or n
    require(k <= n, f"--k {k}: some problem has only {n} completions")
    ks = sorted({2**exponent for exponent in range(n.bit_length())} | {k, n})
    rows = []
    for number, record in enumerate(records, 1):
        with expecting(f"completions of problem {number}: damaged"):
            rows.append(score_problem(record, ks, fallback))
    names = [name for name in rows[0]["figures"] if all(name in row["figures"] for row in rows)]
    values = figure_table(rows, names)
    intervals, _ = bootstrap(values)
    mean = dict(zip(names, values.mean(axis=0).tolist(), strict=True))
    transfer = {}
    for tau in [name.removeprefix("transfer@") for name in names if name.startswith("transfer@")]:
        transfer[tau] = {"accuracy": mean[f"transfer@{tau}"], "leak": mean[f"leak@{tau}"]}
    return {
        "problems": len(rows),
        "n": n,
        "accuracy": mean["accuracy"],
        "maj": {str(k): mean[f"Maj@{k}"] for k in ks},
        "pass": {str(k): mean[f"Pass@{k}"] for k in ks},
        "transfer": transfer,
        "cut": len(records[0]["drawn"]["cuts"]) // len(transfer) if transfer else 0,
        "figures": mean,
        "intervals": dict(zip(names, intervals.tolist(), strict=True)),
        "conventions": CONVENTIONS,
        "per_problem": rows,
    }


def figure_table(rows: list[dict], names: list[str]) -> np.ndarray:
    table = np.array([[row["figures"][name] for name in names] for row in rows], float)  # [P, M]
    require(np.isfinite(table).all(), "result.json: figures that are no finite numbers")
    return table


# ========================================================================================= tables


def report(result: dict) -> str:
    lines = {}  # what has the same k or tau shares a line
    for name, mean in result["figures"].items():
        low, high = result["intervals"][name]
        cell = f"{name:<13}{mean:8.3f} [{low:.3f}, {high:.3f}]"
        key = name.partition("@")[2] or name
        lines[key] = lines.get(key, "") + f"{cell:<42}"
    title = f"{result['problems']} problems, {result['n']} completions each"
    if result["cut"]:
        title += f", {result['cut']} of them cut and continued"
    return "\n".join([title, *lines.values(), result["conventions"]])


def compare(before: dict, after: dict, only: list[str] | None = None) -> str:
    """The differences of the figures that two results share, paired by problem."""
    shared = before["figures"].keys() & after["figures"].keys()
    names = [name for name in only or before["figures"] if name in shared]
    tables = [figure_table(result["per_problem"], names) for result in (before, after)]
    asked = [[row["problem"] for row in result["per_problem"]] for result in (before, after)]
    require(asked[0] and asked[0] == asked[1], "--compare: results on different problems")
    intervals, p_values = bootstrap(tables[1] - tables[0])
    lines = [f"{len(asked[0])} problems, difference, 95 % interval: paired bootstrap over problems"]
    for column, name in enumerate(names):
        first, second = (table[:, column].mean() for table in tables)
        low, high = intervals[column]
        means = f"{first:9.3f} ->{second:9.3f}   {second - first:+.3f}"
        lines.append(f"{name:<14}{means} [{low:+.3f}, {high:+.3f}]   p = {p_values[column]:.4f}")
    return "\n".join(lines)


def before_and_after(given: dict):
    """The closing table of a run. Everything is as in the run, but for the flags that are given."""
    run = Path(given["run"])
    require((run / "final").is_dir(), f"{run}: no run of rltr.py, or not at its end: no final/")
    with expecting(f"{run}/config.json: not the settings of a run"):
        config = Config(**json.loads((run / "config.json").read_bytes()))
    ours = {"data": config.eval_data, "k": config.eval_k, "split": "", "limit": 0, "out": ""}
    settings = Settings(**(vars(config) | ours | given))
    rltr.resolve(settings)  # refuses wrong ones
    require(settings.data, f"{run}: a run without --eval-data; give --data")
    if settings.receiver == "self":
        settings.receiver = config.model
    if config.transfer_weight == 0 and "receiver" not in given:
        try:  # RLVR needs no receiver, but where one is at hand its transfer is shown
            rltr.load_lm(settings.receiver, settings.device)
        except UserError as error:
            tell(f"a table without transfer: {error}")
            settings.receiver = ""

    results = {}
    for when, model in (("before", config.model), ("after", f"{run}/final")):
        out = f"{settings.out}/{when}" if settings.out else ""
        results[when] = evaluate(dataclasses.replace(settings, model=model, out=out))
    figures = {when: result["figures"] for when, result in results.items()}
    rltr.write_file(run / "evaluation.json", json.dumps(figures, indent=1))
    names = ["accuracy", f"Maj@{settings.k}", *(f"transfer@{tau}" for tau in TAUS[::2])]
    print("before -> after,", compare(results["before"], results["after"], names))


# ========================================================================================== files


@contextlib.contextmanager
def expecting(message: str):
    """Damaged files, or files of another kind, are refused in one line, whatever they hold."""
    try:
        yield
    except (AttributeError, KeyError, TypeError, ValueError, OverflowError, RecursionError) as e:
        raise UserError(f"{message} ({e!r})") from None


def read_file(path: str | Path) -> bytes:
    require(Path(path).is_file(), f"{path}: no such file")  # nor a device, which has no end
    return Path(path).read_bytes()


def read_records(path: str | Path) -> list[dict]:
    """One record a line: problem, answer, completions; `sample_chunk` adds what was drawn."""
    records = []
    for number, line in enumerate(read_file(path).splitlines(), 1):
        if line.strip():
            message = f"{path}: line {number} lacks problem, answer or completions, a list of texts"
            with expecting(message):
                record = json.loads(line)
                problem = record.get("problem", record.get("question"))
                gold = rltr.read_cell(record, "answer", f"{path}: line {number}")
                texts = record["completions"]
            good = isinstance(texts, list) and texts
            require(good and all(isinstance(text, str) for text in [problem, *texts]), message)
            records.append(record | {"problem": problem, "answer": extract_answer(gold) or gold})
    require(records, f"{path}: holds no completions")
    return records


def stored_records(settings: Settings, problems: list, size: int) -> list[dict]:
    """The whole chunks that an interrupted evaluation has left in the folder `out`."""
    folder = Path(settings.out)
    folder.mkdir(parents=True, exist_ok=True)
    harmless = ("out", "max_rows", "fallback")  # do not change what is drawn
    identity = {name: getattr(settings, name) for name in FLAGS.split() if name not in harmless}
    weights = sorted(Path(settings.model).glob("*.safetensors"))
    identity["weights"] = [file.stat().st_mtime_ns for file in weights]  # was it trained anew?
    log = folder / "completions.jsonl"
    if not log.exists() or log.stat().st_size == 0:
        rltr.write_file(folder / "settings.json", json.dumps(identity, indent=1))
        return []
    with expecting(f"{folder}/settings.json: damaged"):
        saved = json.loads((folder / "settings.json").read_bytes())
        changed = [name for name in identity if saved.get(name) != identity[name]]
    require(not changed, f"{folder}: holds an evaluation with another {', '.join(changed)}")

    # What is behind the last whole chunk goes: a few lines, a torn one.
    lines = [line for line in log.read_bytes().splitlines(True) if line.endswith(b"\n")]
    if len(lines) < len(problems):
        lines = lines[: len(lines) // size * size]
    rltr.write_file(log, b"".join(lines).decode(errors="replace"))
    records = read_records(log) if lines else []
    stored = [rltr.Problem(record["problem"], record["answer"]) for record in records]
    require(stored == problems[: len(stored)], f"{folder}: holds completions of other problems")
    return records


# =================================================================================== command line


def parse_arguments(argv: list[str] | None) -> dict:
    """The flags that were given, and the prompt of the run that the model comes from."""
    parser = rltr.Parser(allow_abbrev=False, argument_default=argparse.SUPPRESS)
    for f in dataclasses.fields(Settings):
        how = {"action": "store_true"} if f.default is False else {"type": type(f.default)}
        text = f"{f.metadata['help']} (default: {f.default!r})".replace("%", "%%")
        if f.name in FLAGS.split():
            parser.add_argument("--" + f.name.replace("_", "-"), help=text, **how)
    parser.add_argument("--compare", nargs=2, metavar="RESULT", help="two result.json, paired")
    given = vars(parser.parse_args(argv))
    tasks = [name for name in ("model", "run", "samples", "compare") if given.get(name)]
    require(len(tasks) == 1, "give one of --model, --run, --samples and --compare")
    has_model = tasks[0] in ("model", "run")
    require(has_model or "receiver" not in given, "--receiver: there is no model to go on from")
    for folder in list(Path(given.get("model", "")).parents)[:2]:  # NAME/final, NAME/checkpoints/9
        path = folder / "config.json"
        if path.is_file() and "prompt" not in given:
            with expecting(f"{path}: not the settings of a run"):
                given["prompt"] = json.loads(path.read_bytes()).get("prompt", rltr.PROMPT)
    return given


def tell(message: str):
    print("eval: " + rltr.one_line(message), file=sys.stderr)


@rltr.safe_output()
def main(argv: list[str] | None = None) -> int:
    try:
        given = parse_arguments(argv)
        with rltr.claimed(Path(given["out"])) if given.get("out") else contextlib.nullcontext():
            if "compare" in given:
                with expecting("--compare: these are not two result.json of eval.py"):
                    print(compare(*[json.loads(read_file(p)) for p in given["compare"]]))
            elif given.get("run"):
                before_and_after(given)
            else:
                settings = Settings(**given)
                rltr.resolve(settings)  # refuses wrong ones
                if settings.samples:
                    records = read_records(settings.samples)
                    result = score(records, given.get("k"), settings.fallback)
                else:
                    result = evaluate(settings)
                print(report(result))
                if settings.out:
                    chosen = {name: getattr(settings, name) for name in FLAGS.split()}
                    text = json.dumps({"settings": chosen, **result}, indent=1)
                    rltr.write_file(Path(settings.out, "result.json"), text)
        kept = given.get("out") or not sys.stdout.failed
        require(kept, "stdout cannot be written; --out FOLDER keeps the results")
        return 0
    except KeyboardInterrupt:
        tell("interrupted; with --out, the same command goes on")
        return 130
    except torch.OutOfMemoryError:
        tell("out of memory: a smaller --max-rows helps")
    except (UserError, OSError, torch.AcceleratorError) as error:
        tell(str(error))
    return 2


if __name__ == "__main__":
    sys.exit(main())
