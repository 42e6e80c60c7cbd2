"""RLTR against RLVR on the built-in task: the same starts, several seeds, controls and ablations.

    python benchmarks/rltr_vs_rlvr.py --seeds 20 21 22 23 24             # hours on one core
    python benchmarks/rltr_vs_rlvr.py --only rltr rlvr                   # a part; may run beside others
    python benchmarks/rltr_vs_rlvr.py --tables --csv benchmarks/rltr_vs_rlvr.csv --figure curves.svg

Each seed has a warm start, problems, a receiver and a *held-out* receiver of its own; training never
sees the latter. What is done already is not repeated. Evaluated on 100 held-out problems, 64
completions each; transfer is measured on 4 of them at tau = 0.1 .. 0.9. The control of
equal compute, `rlvr_28`, has 28 samples a problem instead of 8: about the time of RLTR with four cuts.
Intervals are Student's t over seeds, of paired differences: each seed is one observation."""

import argparse
import contextlib
import csv
import json
import os
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import eval as evaluation
import rltr

RLVR = ["--transfer-weight", "0"]
VARIANTS = {  # name -> flags, beside those of the built-in task
    "rltr": [],
    "rlvr": RLVR,
    "rlvr_28": [*RLVR, "--group", "28"],
    "cuts_1": ["--cuts", "1"],
    "cuts_2": ["--cuts", "2"],
    "cuts_8": ["--cuts", "8"],
    "b_0.5": ["--transfer-weight", "0.5"],
    "b_1": ["--transfer-weight", "1"],
    "receiver_weak": ["--receiver", "{weak}"],
    "receiver_self": ["--receiver", "self"],
}
MAIN = ("rltr", "rlvr", "rlvr_28")
FIGURES = (
    "accuracy",
    "Maj@64",
    "Pass@64",
    "transfer@0.3",
    "transfer@0.5",
    "transfer@0.7",
    "held-out transfer@0.3",
    "held-out transfer@0.5",
    "held-out transfer@0.7",
)
T95 = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def receivers(seed: int) -> dict[str, Path]:
    """The training receiver; one more like it, for scoring only; one that makes as many mistakes as
    the generator does."""
    tiny = rltr.make_tiny(seed)
    made = {"receiver": tiny / "receiver"}
    for name, width, flawed, offset in (
        ("heldout", 72, 0.0, 1001),
        ("weak", 80, rltr.FLAWED, 1002),
    ):
        made[name] = tiny.with_name(f"{tiny.name}-{name}")
        if not made[name].exists():
            rltr.write_folder(
                made[name],
                lambda partial: rltr.warm_start(
                    partial / name, width, 600, flawed, 10 * seed + offset
                ),
            )
        made[name] = made[name] / name
    return made


def evaluated(model: str, seed: int) -> dict:
    """All figures of a model: with the training receiver, and transfer with the held-out one."""
    lm, known = rltr.load_lm(str(model)), receivers(seed)
    problems = rltr.load_problems(str(rltr.make_tiny(seed) / "test.jsonl"))
    settings = dict(prompt="{question}", max_new_tokens=32, margin=4, seed=seed)
    figures = evaluation.evaluate(
        lm, problems, k=64, receiver=rltr.load_lm(str(known["receiver"])), **settings
    )["figures"]
    other = evaluation.evaluate(
        lm, problems, k=4, receiver=rltr.load_lm(str(known["heldout"])), **settings
    )["figures"]
    return figures | {f"held-out {k}": v for k, v in other.items() if k.startswith("transfer@")}


def run(variant: str, seed: int, out: Path):
    """Train and evaluate one variant, unless that is done."""
    folder, result = out / f"{variant}-{seed}", out / f"{variant}-{seed}.json"
    if result.exists():
        return
    if variant == "before":
        figures = {"figures": evaluated(rltr.make_tiny(seed) / "generator", seed)}
    else:
        weak = str(receivers(seed)["weak"])
        flags = [flag.format(weak=weak) for flag in VARIANTS[variant]]
        code = rltr.main(
            [
                "--seed",
                str(seed),
                "--out",
                str(folder),
                "--show-every",
                "0",
                "--save-every",
                "0",
                "--eval-data",
                "",
                *flags,
            ]
        )
        assert code == 0, f"{folder}: exit code {code}"
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        seconds = sum(v for m in rows for k, v in m.items() if k.startswith("seconds_"))
        figures = {
            "seconds": seconds,
            "training": [m["accuracy"] for m in rows],
            "figures": evaluated(folder / "final", seed),
        }
    rltr.write_file(result, json.dumps(figures))


def smooth(values, width=10):
    """Mean of the last `width` steps, of as many as there are at the start."""
    return np.array([np.mean(values[max(0, i + 1 - width) : i + 1]) for i in range(len(values))])


def difference(a: np.ndarray, b: np.ndarray) -> str:
    """Mean of a - b over seeds with its 95 % interval."""
    gain, n = a - b, len(a)
    half = T95[n] * gain.std(ddof=1) / n**0.5 if n > 1 else float("nan")
    return f"{gain.mean():+.3f} [{gain.mean() - half:+.3f}, {gain.mean() + half:+.3f}]"


def spread(values) -> str:
    return f"{np.mean(values):.3f} ({min(values):.3f} .. {max(values):.3f})"


def tables(results: dict) -> str:
    def column(variant, figure, seeds=None):
        return np.array([results[variant][s]["figures"][figure] for s in seeds or results[variant]])

    seeds = sorted(set.intersection(*(set(results[v]) for v in ("before", *MAIN))))
    lines = [
        f"Seeds {', '.join(map(str, seeds))}: mean (lowest .. highest); differences with a 95 % "
        "interval",
        "",
        "| | before | RLVR | RLVR, 28 samples | RLTR | RLTR - RLVR | RLTR - RLVR 28 |",
        "|---" * 7 + "|",
    ]
    for figure in FIGURES:
        x = {v: column(v, figure, seeds) for v in ("before", *MAIN)}
        cells = [spread(x[v]) for v in ("before", "rlvr", "rlvr_28", "rltr")]
        cells += [difference(x["rltr"], x["rlvr"]), difference(x["rltr"], x["rlvr_28"])]
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    seconds = {v: np.mean([results[v][s]["seconds"] for s in seeds]) for v in MAIN}
    reached = []
    for s in seeds:
        goal = smooth(results["rlvr"][s]["training"])[-1]
        hits = np.flatnonzero(smooth(results["rltr"][s]["training"])[9:] >= goal) + 10
        reached.append(str(hits[0]) if len(hits) else "never")
    total = len(results["rlvr"][seeds[0]]["training"])
    lines += [
        "",
        "Training seconds, mean: " + ", ".join(f"{v} {t:.0f}" for v, t in seconds.items()),
        "",
        f"Steps until RLTR's training accuracy (mean of ten steps) is what RLVR has after "
        f"{total}: {', '.join(reached)} (seeds in order)",
        "",
        "| ablation | seeds | accuracy | Maj@64 | held-out transfer@0.5 | accuracy - RLTR | "
        "seconds |",
        "|---" * 7 + "|",
    ]
    for variant in ("rltr", *(v for v in results if v not in ("before", *MAIN)), "rlvr"):
        mine = [s for s in results[variant] if s in results["rltr"]]
        cells = [
            spread(column(variant, f, mine))
            for f in ("accuracy", "Maj@64", "held-out transfer@0.5")
        ]
        gain = (
            ""
            if variant == "rltr"
            else difference(*(column(v, "accuracy", mine) for v in (variant, "rltr")))
        )
        time = np.mean([results[variant][s]["seconds"] for s in mine])
        lines.append(f"| {variant} | {len(mine)} | {' | '.join(cells)} | {gain} | {time:.0f} |")
    return "\n".join(lines)


def figure(results: dict, path: str):
    """Training accuracy over steps: each seed a thin line, their mean a thick one."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panel, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    for variant, label, colour in (
        ("rltr", "RLTR (4 cuts, b = 2)", "#0072b2"),
        ("rlvr", "RLVR", "#d55e00"),
        ("rlvr_28", "RLVR, 28 samples", "#009e73"),
    ):
        curves = np.array([smooth(r["training"]) for r in results[variant].values()])
        steps = np.arange(1, curves.shape[1] + 1)
        axes.plot(steps, curves.T, color=colour, alpha=0.3, linewidth=0.8)
        axes.plot(steps, curves.mean(0), color=colour, linewidth=2.5, label=label)
    axes.set(xlabel="step", ylabel="training accuracy (mean of ten steps)", ylim=(0.4, 1.0))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right", frameon=False)
    panel.savefig(path)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[20, 21, 22, 23, 24])
    parser.add_argument(
        "--only", nargs="+", choices=["before", *VARIANTS], default=["before", *VARIANTS]
    )
    parser.add_argument("--out", type=Path, default=Path("runs/rltr-vs-rlvr"))
    parser.add_argument("--tables", action="store_true", help="of what is there; run nothing")
    parser.add_argument("--csv", help="write all results here")
    parser.add_argument("--figure", help="draw the curves here (needs matplotlib)")
    given = parser.parse_args()
    given.out.mkdir(parents=True, exist_ok=True)
    for seed in given.seeds if not given.tables else ():
        for variant in given.only:
            with contextlib.redirect_stderr(open(os.devnull, "w")):  # progress bars
                run(variant, seed, given.out)
    results = {}
    for variant in ("before", *VARIANTS):
        files = {s: given.out / f"{variant}-{s}.json" for s in given.seeds}
        found = {s: json.loads(f.read_text()) for s, f in files.items() if f.exists()}
        results |= {variant: found} if found else {}
    if given.csv:
        with open(given.csv, "w", newline="") as file:
            rows = [
                {
                    "variant": v,
                    "seed": s,
                    "seconds": round(r.get("seconds", 0)),
                    **{f: round(r["figures"][f], 4) for f in FIGURES},
                }
                for v, found in results.items()
                for s, r in found.items()
            ]
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    if given.figure:
        figure(results, given.figure)
    if all(v in results for v in ("before", *MAIN)):
        print(tables(results))


if __name__ == "__main__":
    main()
