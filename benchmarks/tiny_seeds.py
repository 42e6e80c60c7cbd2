"""RLTR and RLVR on the built-in tiny task, several seeds each; every seed has its own warm start.

    python benchmarks/tiny_seeds.py --seeds 10 11 12 13 14 --out runs/tiny-seeds

A step of RLTR costs more (four continuations a rollout), so RLVR also runs for 430 instead of 150
steps: nearly three times the rollouts. Writes OUT/tiny_seeds.csv (a line a run) and
prints means, spread and paired differences. Runs that are complete already are not repeated.
About seven minutes a seed on one CPU core.
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import rltr  # noqa: E402

METHODS = {"rltr": [], "rlvr": ["--transfer-weight", "0"],
           "rlvr430": ["--transfer-weight", "0", "--steps", "430"]}
FIGURES = ("accuracy", "Maj@64", "transfer@0.3", "transfer@0.5", "transfer@0.7")


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[10, 11, 12, 13, 14])
    parser.add_argument("--out", type=Path, default=Path("runs/tiny-seeds"))
    args = parser.parse_args()
    rows = []
    for seed in args.seeds:
        for method, flags in METHODS.items():
            folder = args.out / f"{method}-{seed}"
            if not (folder / "evaluation.json").exists():
                code = rltr.main(["--seed", str(seed), "--out", str(folder), "--show-every", "0", *flags])
                assert code == 0, f"{folder}: exit code {code}"
            table = json.loads((folder / "evaluation.json").read_text())
            metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
            seconds = sum(v for m in metrics for k, v in m.items() if k.startswith("seconds_"))
            rows.append({"seed": seed, "method": method, "seconds": round(seconds),
                         **{f"{figure} {when}": round(table[when][figure], 4)
                            for figure in FIGURES for when in ("before", "after")}})
    with (args.out / "tiny_seeds.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)

    def column(method, name):
        return np.array([row[name] for row in rows if row["method"] == method])

    print(f"{len(args.seeds)} seeds: mean (lowest .. highest); differences: mean +- sd over seeds\n")
    print("| | before | RLVR | RLVR, 430 steps | RLTR | RLTR - RLVR | RLTR - RLVR 430 |\n" + "|---" * 7 + "|")
    for figure in FIGURES:
        after = {method: column(method, f"{figure} after") for method in METHODS}
        cells = [f"{x.mean():.3f} ({x.min():.3f} .. {x.max():.3f})" for x in (
            column("rltr", f"{figure} before"), after["rlvr"], after["rlvr430"], after["rltr"])]
        gains = [after["rltr"] - after[method] for method in ("rlvr", "rlvr430")]
        cells += [f"{g.mean():+.3f} +- {g.std(ddof=min(1, len(g) - 1)):.3f}" for g in gains]
        print(f"| {figure} | {' | '.join(cells)} |")
    for method in METHODS:
        better = column(method, "accuracy after") > column(method, "accuracy before") + 0.05
        print(f"\n{method}: accuracy up by more than 0.05 in {better.sum()} of {len(better)} seeds; "
              f"mean training time {column(method, 'seconds').mean():.0f} s")


if __name__ == "__main__":
    main()
