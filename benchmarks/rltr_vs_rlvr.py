"""RLTR against RLVR on the built-in task: many seeds, controls and ablations.

    python benchmarks/rltr_vs_rlvr.py --start shipped --seeds 10-29      # all from tiny/
    python benchmarks/rltr_vs_rlvr.py --seeds 100-139                    # a start for each seed
    python benchmarks/rltr_vs_rlvr.py --seeds 100-111 --task mod7
    python benchmarks/rltr_vs_rlvr.py --seeds 100-107 --only rltr b_2 cuts_4
    python benchmarks/rltr_vs_rlvr.py --tables --csv results.csv --figure curves.svg
    python benchmarks/rltr_vs_rlvr.py --read results.csv        # the same tables, from that file

--start shipped: all seeds train from tiny/. --start own: each seed has models and problems of its
own (tiny/make.py). Both have a *held-out* receiver that training never sees. What is done already
is not repeated, and several processes may share the work. Evaluated on 100 held-out problems, 64
completions each; transfer is measured on 4 of them at tau = 0.1 .. 0.9. Controls: `rlvr_16` has 16
samples a problem instead of 8, about the time of RLTR here; `rlvr_10` has 10, about its time where
completions are long. Intervals are Student's t over seeds, of paired differences."""

import argparse
import contextlib
import csv
import functools
import json
import os
import random
import re
import sys
from pathlib import Path

import filelock
import mpmath
import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tiny"))
import make

import eval as evaluation
import rltr

RLVR = ["--transfer-weight", "0"]
VARIANTS = {  # name -> flags, beside those of the built-in task; {weak} is a receiver
    "rltr": [],
    "rlvr": RLVR,
    "rlvr_10": [*RLVR, "--group", "10"],
    "rlvr_16": [*RLVR, "--group", "16"],
    "b_0.5": ["--transfer-weight", "0.5"],
    "b_2": ["--transfer-weight", "2"],
    "b_4": ["--transfer-weight", "4"],
    "transfer_alone": ["--answer-weight", "0"],
    "cuts_2": ["--cuts", "2"],
    "cuts_4": ["--cuts", "4"],
    "receiver_weak": ["--receiver", "{weak}"],
    "receiver_self": ["--receiver", "self"],
    "receiver_greedy": ["--receiver-temperature", "0"],
    "no_leak": [],  # see cut_before_box
}
MAIN = {  # name -> what it is called in tables; colour of its curve
    "rlvr": ("RLVR", "#d55e00"),
    "rlvr_10": ("RLVR, 10 samples", "#cc79a7"),
    "rlvr_16": ("RLVR, 16 samples", "#009e73"),
    "rltr": ("RLTR", "#0072b2"),
}
# The settings of the built-in task.
TASK = ["--prompt", "{question}", "--max-new-tokens", "32", "--receiver-margin", "4"]
TASK += ["--device", "cpu"]
TRANSFER = [f"transfer@{tau}" for tau in (0.3, 0.5, 0.7)]
FIGURES = ["accuracy", "Maj@64", "Pass@64", *TRANSFER, *(f"held-out {name}" for name in TRANSFER)]
COSTS = ["seconds", "sampled", "continued", "learnt"]  # of a whole run, see `cost`
GOAL = 0.8  # training accuracy, for the survival curve


# ========================================================================= the task, and a control

parity_problem = make.tiny_problem
cut_anywhere = rltr.cut_at


def mod7_problem(source: random.Random, flaws: float = 0.0) -> tuple[str, str, str]:
    """The built-in problem, but the answer is the result itself: guessing pays one time in seven.

    >>> mod7_problem(random.Random(1))
    ('Q1>*6;>+2;>-3;>+0;>-3;?', '*6=6+2=1-3=5+0=5-3=2\\\\boxed{2}', '2')
    """
    question, chain, _ = parity_problem(source, flaws)
    truth = int(question[1])
    for operator, operand in re.findall(r">(.)(\d)", question):
        truth = make.RIGHT[operator](truth, int(operand)) % 7
    steps = chain.partition("\\boxed")[0]
    return question, f"{steps}\\boxed{{{steps[-1]}}}", str(truth)


def cut_before_box(rollout: rltr.Rollout, generator: rltr.LM, tau: float) -> rltr.Cut:
    """Step 3 without leakage: tau is a share of what stands before the first box."""
    box = generator.tokenizer.convert_tokens_to_ids("\\boxed{")
    length = len(rltr.cut_prefix(rollout.tokens, 1.0, generator.stop_ids))
    before = rollout.tokens.index(box) if box in rollout.tokens else length
    return cut_anywhere(rollout, generator, tau * before / max(1, length))


@contextlib.contextmanager
def cutting(cut):
    """While a variant is trained; not while it is evaluated."""
    rltr.cut_at = cut
    try:
        yield
    finally:
        rltr.cut_at = cut_anywhere


# ============================================================================================ runs


def start_of(seed: int, out: Path, shipped: bool) -> Path:
    """A folder like tiny/, and beside its models heldout/, for scoring only, and weak/, a receiver
    that makes as many mistakes as the generator does. Made at the first call."""
    folder = out / ("start" if shipped else f"start-{seed}")
    start = 119 if shipped else seed  # tiny/ is what make_tiny(119) made
    with filelock.FileLock(f"{folder}.lock"):
        if not folder.exists():
            with rltr.complete_folder(folder) as partial:
                if not shipped:
                    make.make_tiny(partial, seed)
                make.warm_start(partial / "heldout", 72, 600, flaws=0.0, seed=10 * start + 1001)
                make.warm_start(partial / "weak", 80, 600, flaws=0.3, seed=10 * start + 1002)
                for name in ("generator", "receiver", "train.jsonl", "test.jsonl"):
                    if shipped:
                        (partial / name).symlink_to(rltr.TINY_FOLDER / name)
    return folder


def evaluate(model: Path, receiver: Path, data: Path, seed: int, k: int, out: Path) -> dict:
    """The figures of eval.py."""
    flags = [*TASK, "--data", str(data), "--model", str(model), "--receiver", str(receiver)]
    flags += ["--k", str(k), "--seed", str(seed), "--out", str(out)]
    with open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):  # its table
        code = evaluation.main(flags)
    rltr.require(code == 0, f"{out}: eval.py ended with exit code {code}")
    return json.loads((out / "result.json").read_text())["figures"]


def all_figures(model: Path, start: Path, seed: int, out: Path) -> dict:
    """All figures with the training receiver, and transfer with the held-out one."""
    data = start / "test.jsonl"
    figures = evaluate(model, start / "receiver", data, seed, 64, out / "eval")
    heldout = evaluate(model, start / "heldout", data, seed, 4, out / "eval-heldout")
    for name, value in heldout.items():
        if name.startswith("transfer@"):
            figures[f"held-out {name}"] = value
    return figures


def run(variant: str, seed: int, out: Path, steps: int, shipped: bool):
    """Train and evaluate one variant, unless that is done."""
    folder = out / f"{variant}-{seed}"
    result = out / f"{variant}-{seed}.json"
    if result.exists():
        return
    start = start_of(seed, out, shipped)
    if variant == "before":
        report = {"figures": all_figures(start / "generator", start, seed, folder)}
    else:
        flags = [*TASK, "--model", str(start / "generator"), "--data", str(start / "train.jsonl")]
        flags += ["--receiver", str(start / "receiver"), "--lr", "5e-4", "--steps", str(steps)]
        flags += ["--seed", str(seed), "--out", str(folder), "--save-every", "0"]
        flags += ["--show-every", "0"]
        flags += [flag.replace("{weak}", str(start / "weak")) for flag in VARIANTS[variant]]
        if (folder / "config.json").exists():  # begun by an earlier call
            flags = ["--resume", str(folder)]
        if not (folder / "final").exists():
            with cutting(cut_before_box if variant == "no_leak" else cut_anywhere):
                rltr.train(*rltr.parse_arguments(flags))
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        config = json.loads((folder / "config.json").read_text())
        report = {
            **cost(rows, config["prompts"] * config["group"]),
            "training": [row["accuracy"] for row in rows],
            "figures": all_figures(folder / "final", start, seed, folder),
        }
    result.write_text(json.dumps(report))


def cost(rows: list[dict], rollouts: int) -> dict:
    """Of all steps, from the lines of metrics.jsonl: seconds, tokens sampled and learnt from."""
    seconds = sampled = continued = learnt = 0.0
    for row in rows:
        seconds += sum(value for name, value in row.items() if name.startswith("seconds_"))
        tokens = row["length"] * rollouts
        sampled += tokens
        continued += row.get("tokens_per_s_transfer", 0) * row.get("seconds_transfer", 0)
        learnt += tokens * (1 - row["dead_groups"])  # all completions are about as long
    return {"seconds": seconds, "sampled": sampled, "continued": continued, "learnt": learnt}


def seed_range(text: str) -> range:
    """For argparse: 100-139."""
    found = re.fullmatch(r"(\d{1,9})-(\d{1,9})", text)
    if not found or int(found[1]) > int(found[2]):
        raise argparse.ArgumentTypeError(f"{text!r} is not like 100-139")
    return range(int(found[1]), min(int(found[2]), int(found[1]) + 10_000) + 1)


# ========================================================================================= tables


def read_results(out: Path, seeds: range) -> dict:
    """variant -> seed -> what `run` has written."""
    results = {}
    for variant in ("before", *VARIANTS):
        for seed in seeds:
            file = out / f"{variant}-{seed}.json"
            if file.exists():
                try:
                    report = json.loads(file.read_text())
                    numbers = [float(report["figures"][name]) for name in FIGURES]
                    whole = np.isfinite(numbers + report.get("training", [])).all()
                except (ValueError, KeyError, TypeError):
                    whole = False
                rltr.require(whole, f"{file}: damaged; delete it")
                if "training" in report:
                    report["steps_until_goal"] = steps_until_goal(report["training"])
                results.setdefault(variant, {})[seed] = report
    rltr.require(results, f"{out}: no results there")
    return results


def write_csv(results: dict, path: Path):
    """A run a line. `training` is the accuracy of each step, for the figure."""
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["variant", "seed", *COSTS, "steps_until_goal", *FIGURES, "training"])
        for variant, runs in results.items():
            for seed, report in runs.items():
                row = [round(report[name]) if name in report else "" for name in COSTS]
                row.append(report.get("steps_until_goal", ""))
                row += [round(report["figures"][name], 4) for name in FIGURES]
                row.append(" ".join(f"{value:.3f}" for value in report.get("training", [])))
                writer.writerow([variant, seed, *row])


def read_csv(path: Path) -> dict:
    """What `write_csv` has written, as `read_results` gives it."""
    results = {}
    try:
        with open(path, newline="") as file:
            for row in csv.DictReader(file):
                report = {"figures": {name: float(row[name]) for name in FIGURES}}
                if row["seconds"]:  # of a run, and not of the start
                    for name in (*COSTS, "steps_until_goal"):
                        report[name] = float(row[name])
                if row.get("training"):
                    report["training"] = [float(value) for value in row["training"].split()]
                results.setdefault(row["variant"], {})[int(row["seed"])] = report
    except (KeyError, TypeError, ValueError) as error:
        raise rltr.UserError(f"{path}: not what --csv has written ({error!r})") from None
    rltr.require(results, f"{path}: holds no results")
    return results


def smooth(values: list[float], width: int = 10) -> np.ndarray:
    """Mean of the last `width` steps, of as many as there are at the start."""
    ends = range(1, len(values) + 1)
    return np.array([np.mean(values[max(0, end - width) : end]) for end in ends])


def steps_until_goal(training: list[float]) -> float:
    """Until the training accuracy, as a mean of ten steps, is GOAL; infinity: never."""
    hits = np.flatnonzero(smooth(training)[9:] >= GOAL)
    return hits[0] + 10 if len(hits) else np.inf


@functools.cache
def t_quantile(freedom: int) -> float:
    """The t beyond which (on both sides) lie 5 % of Student's distribution."""

    def excess(t):
        x = freedom / (freedom + t**2)
        return mpmath.betainc(freedom / 2, 0.5, 0, x, regularized=True) - 0.05

    return float(mpmath.findroot(excess, 2.0))


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Mean of a - b over seeds with its 95 % interval."""
    gain, count = a - b, len(a)
    if count == 1:
        return f"{gain[0]:+.3f}"
    half = t_quantile(count - 1) * gain.std(ddof=1) / count**0.5
    return f"{gain.mean():+.3f} [{gain.mean() - half:+.3f}, {gain.mean() + half:+.3f}]"


def spread(values: np.ndarray) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def column(results: dict, variant: str, figure: str, seeds: list[int]) -> np.ndarray:
    return np.array([results[variant][seed]["figures"][figure] for seed in seeds])


def main_table(results: dict, seeds: list[int], variants: list[str]) -> list[str]:
    names = [MAIN[variant][0] for variant in variants]
    controls = [variant for variant in variants if variant != "rltr"]
    gains = ["RLTR - " + MAIN[control][0].replace(", ", " ") for control in controls]
    gains = [gain.replace(" samples", "") for gain in gains]
    lines = [
        f"{len(seeds)} seeds, {seeds[0]} to {seeds[-1]}: mean (lowest .. highest); paired "
        "differences with a 95 % interval",
        "",
        f"| | before | {' | '.join(names + gains)} |",
        "|---" * (2 + len(names + gains)) + "|",
    ]
    for figure in FIGURES:
        x = {variant: column(results, variant, figure, seeds) for variant in ("before", *variants)}
        cells = [spread(x[variant]) for variant in ("before", *variants)]
        cells += [difference(x["rltr"], x[control]) for control in controls]
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    return lines


def cost_table(results: dict, seeds: list[int], variants: list[str]) -> list[str]:
    lines = [
        "| mean of a run | seconds | sampled tokens, thousands | of the receiver | learnt from "
        f"| seeds that reach {GOAL} in training | steps until then: median of these (range) |",
        "|---" * 7 + "|",
    ]
    for variant in ("rltr", *(variant for variant in variants if variant != "rltr")):
        reports = [results[variant][seed] for seed in seeds]
        cells = [f"{np.mean([report['seconds'] for report in reports]):.0f}"]
        for name in ("sampled", "continued", "learnt"):
            cells.append(f"{np.mean([report[name] for report in reports]) / 1000:.0f}")
        steps = np.array([report["steps_until_goal"] for report in reports])
        reached = steps[np.isfinite(steps)]
        cells.append(f"{len(reached)} of {len(steps)}")
        if len(reached):
            low, middle, high = np.percentile(reached, [0, 50, 100])
            cells.append(f"{middle:.0f} ({low:.0f} .. {high:.0f})")
        else:
            cells.append("-")
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return lines


def catching_up(results: dict, seeds: list[int], variants: list[str]) -> list[str]:
    """How soon the mean curve of RLTR is where that of a control ends."""
    if not all("training" in results[variant][seed] for variant in variants for seed in seeds):
        return []
    curves = {}
    for variant in variants:
        runs = [smooth(results[variant][seed]["training"]) for seed in seeds]
        curves[variant] = np.mean(runs, axis=0)
    lines = []
    for variant in variants:
        end = curves[variant][-1]
        if variant != "rltr" and curves["rltr"].max() >= end:
            steps = 1 + np.argmax(curves["rltr"] >= end)
            share = f"{len(curves[variant]) / steps:.1f} times fewer"
            lines.append(
                f"- mean curve: {MAIN[variant][0]} ends at {end:.3f} after {len(curves[variant])} "
                f"steps, where RLTR is after {steps} ({share})"
            )
    return ["", *lines]


def ablation_table(results: dict) -> list[str]:
    shown = ("accuracy", "Maj@64", "held-out transfer@0.5")
    lines = [f"| variant | seeds | {' | '.join(shown)} | accuracy - RLTR | seconds |"]
    lines.append("|---" * 7 + "|")
    for variant, runs in results.items():
        seeds = [seed for seed in runs if seed in results.get("rltr", {})]
        if variant == "before" or not seeds:
            continue
        cells = [spread(column(results, variant, figure, seeds)) for figure in shown]
        theirs = column(results, variant, "accuracy", seeds)
        gain = difference(theirs, column(results, "rltr", "accuracy", seeds))
        seconds = np.mean([runs[seed]["seconds"] for seed in seeds])
        cells += ["" if variant == "rltr" else gain, f"{seconds:.0f}"]
        lines.append(f"| {variant} | {len(seeds)} | {' | '.join(cells)} |")
    return lines


def figure(results: dict, seeds: list[int], variants: list[str], path: Path):
    """Left: training accuracy, mean and the middle 80 % of the seeds. Right: the share of seeds
    that have reached GOAL, which also tells of those that never do."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    bottom = 0.4
    panel, (left, right) = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for variant in reversed(variants):
        label, colour = MAIN[variant]
        curves = np.array([smooth(results[variant][seed]["training"]) for seed in seeds])
        steps = np.arange(1, curves.shape[1] + 1)
        bottom = min(bottom, np.floor(10 * curves.mean(axis=0).min()) / 10)
        low, high = np.percentile(curves, [10, 90], axis=0)
        left.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        left.plot(steps, curves.mean(axis=0), color=colour, linewidth=2, label=label)
        reached = np.array([results[variant][seed]["steps_until_goal"] for seed in seeds])
        share = [(reached <= step).mean() for step in steps]
        right.step(steps, share, color=colour, linewidth=2, where="post")
    left.set(xlabel="step", ylabel="training accuracy (mean of ten steps)", ylim=(bottom, 1.0))
    right.set(xlabel="step", ylabel=f"share of seeds that have reached {GOAL}", ylim=(0, 1))
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    left.legend(loc="lower right", frameon=False)
    try:
        panel.savefig(path)
    except ValueError as error:  # a format that it does not know
        raise rltr.UserError(f"--figure {path}: {error}") from None


# =================================================================================== command line


def main(argv: list[str] | None = None):
    main_ones = ["before", "rltr", "rlvr", "rlvr_10", "rlvr_16"]
    everything = ["before", *VARIANTS]
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=seed_range, default=seed_range("100-139"), help="FROM-TO")
    parser.add_argument("--only", nargs="+", choices=everything, default=main_ones)
    parser.add_argument("--start", choices=("shipped", "own"), default="own")
    parser.add_argument("--task", choices=("parity", "mod7"), default="parity")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--out", type=Path, help="default: runs/rltr-vs-rlvr-TASK")
    parser.add_argument("--tables", action="store_true", help="of what is there; run nothing")
    parser.add_argument("--read", type=Path, help="tables of what --csv wrote; run nothing")
    parser.add_argument("--csv", type=Path, help="write all results here")
    parser.add_argument("--figure", type=Path, help="draw curves here (with matplotlib)")
    given = parser.parse_args(argv)
    shipped = given.start == "shipped"
    out = given.out or Path(f"runs/rltr-vs-rlvr-{given.start}-{given.task}")
    if not (given.tables or given.read):
        out.mkdir(parents=True, exist_ok=True)
        if given.task == "mod7":
            rltr.require(not shipped, "--task mod7: needs --start own")
            make.tiny_problem = mod7_problem
        for seed in given.seeds:
            # Another process that works on this seed goes on with it.
            lock = filelock.FileLock(out / f"{seed}.lock", timeout=0)
            with contextlib.suppress(filelock.Timeout), lock:
                for variant in given.only:
                    print(f"{variant}, seed {seed}", flush=True)
                    with open(os.devnull, "w") as nowhere, contextlib.redirect_stderr(nowhere):
                        run(variant, seed, out, given.steps, shipped)  # its bars go nowhere

    results = read_csv(given.read) if given.read else read_results(out, given.seeds)
    if given.csv:
        write_csv(results, given.csv)
    variants = [variant for variant in MAIN if variant in results]
    seeds = set()
    if {"before", "rltr", "rlvr"} <= set(results):
        complete = [set(results[variant]) for variant in ("before", *variants)]
        seeds = sorted(set.intersection(*complete))
    if not seeds or set(results) - {"before", *MAIN}:
        print("\n".join(["", *ablation_table(results)]))
    else:
        print("\n".join(["", *main_table(results, seeds, variants)]))
        print("\n".join(["", *cost_table(results, seeds, variants)]))
        print("\n".join(catching_up(results, seeds, variants)))
    if given.figure:
        rltr.require(seeds, "no seed has all variants")
        drawable = all(
            "training" in results[variant][seed] for variant in variants for seed in seeds
        )
        rltr.require(drawable, f"{given.read}: has no curves")
        figure(results, seeds, variants, given.figure)


if __name__ == "__main__":
    sys.exit(rltr.run_command("rltr_vs_rlvr", main, sys.argv[1:]))
