"""One self-contained HTML page about one or several runs: curves, evaluations, rollouts to read.

    python benchmarks/report.py runs/A [runs/B ...] -o report.html
    python benchmarks/report.py runs/A --eval evals/A/result.json      # and what eval.py has written

Runs that differ only in their seed share a curve (their mean) with a band (lowest to highest). No
network, no scripts; the theme follows the reader's. A run that is still going can be looked at."""

import argparse
import html
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import rltr
from rltr import UserError, printable, require

WIDTH, HEIGHT, LEFT, BOTTOM = 360, 220, 44, 34  # of a chart; room for its labels
CURVES = {
    "accuracy": "right answers",
    "transfer": "right continuations by the receiver",
    "reward": "reward",
    "entropy": "entropy of the next token (nats)",
    "length": "length (tokens)",
    "dead_groups": "groups without a signal",
}
IGNORED = {
    "seed",
    "out",
    "save_every",
    "keep",
    "show_every",
    "eval_data",
    "eval_k",
    "max_rows",
    "token_budget",
    "device",
}

CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #5c5c5c; --line: #d8d8d8;
  --box: #f5f5f2; --c0: #0072b2; --c1: #c04f00; --c2: #00805d; --c3: #a3498a; --c4: #7a6a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161618; --soft: #a8a8a8;
  --line: #3b3b3f; --box: #222226; --c0: #56b4e9; --c1: #ff9d5c; --c2: #3fc99b; --c3: #e59ccf;
  --c4: #e6d34a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1180px; margin: 0 auto; padding: 16px; }
h1 { font-size: 1.5em; margin: .2em 0; } h2 { font-size: 1.2em; margin: 1.6em 0 .4em; }
p { max-width: 46em; } .soft { color: var(--soft); font-size: .9em; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr));
  gap: 12px 24px; }
figure { margin: 0; } figcaption { font-weight: 600; font-size: .95em; } svg { width: 100%; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; }
.legend span { display: inline-block; margin-right: 1.4em; } .legend i { display: inline-block;
  width: 1.6em; border-top: 3px solid; margin-right: .5em; vertical-align: middle; }
details { border-top: 1px solid var(--line); padding: .5em 0; } summary { cursor: pointer; }
.try { background: var(--box); border-radius: 6px; padding: .6em .8em; margin: .8em 0; }
pre { white-space: pre-wrap; overflow-wrap: anywhere; margin: .3em 0; font: 14px/1.5 ui-monospace,
  monospace; } .prefix { color: var(--c0); font-weight: 600; } .own { color: var(--soft); }
.receiver { color: var(--c1); font-weight: 600; } .cut { border-left: 3px solid var(--c1);
  padding: 0 .35em; margin-left: .2em; font-size: .85em; white-space: nowrap; color: var(--soft); }
"""


def read_lines(path: Path) -> list[dict]:
    """The rows of a .jsonl; a last line that is still being written does not count."""
    require(path.is_file(), f"{path}: no such file; is this the folder of a run?")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        try:
            rows.append(json.loads(line))
        except ValueError:
            require(not line.endswith(b"\n"), f"{path}: line {number} is broken")
    return rows


def read_run(folder: Path) -> dict:
    rows = read_lines(folder / "metrics.jsonl")
    require(rows, f"{folder}: no step is finished yet")
    try:
        config = json.loads((folder / "config.json").read_text())
        closing = folder / "evaluation.json"
        evaluation = json.loads(closing.read_text()) if closing.is_file() else {}
    except (OSError, ValueError) as error:
        raise UserError(f"{folder}: {error}") from None
    return {
        "folder": folder,
        "config": config,
        "metrics": rows,
        "evaluation": evaluation,
        "rollouts": read_lines(folder / "rollouts.jsonl"),
    }


def group_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Label -> the runs that differ in nothing but their seed."""

    def shown(value):  # the folders of the built-in task carry the seed, too
        return Path(value).name if isinstance(value, str) and "/" in value else value

    settings = [{k: shown(v) for k, v in run["config"].items() if k not in IGNORED} for run in runs]
    differ = sorted(k for k in settings[0] if len({str(s.get(k)) for s in settings}) > 1)
    groups = {}
    for run, setting in zip(runs, settings):
        weight = setting.get("transfer_weight")
        cuts = setting.get("cuts")
        name = f"RLTR, {cuts} cut{'s'[: cuts > 1]}, b = {weight:g}" if weight else "RLVR"
        extra = [f"{k} = {setting.get(k)}" for k in differ if k not in ("transfer_weight", "cuts")]
        groups.setdefault(", ".join([name, *extra]), []).append(run)
    return groups


def smooth(values: list, width: int = 10) -> np.ndarray:
    """Mean of the last `width` steps; steps without the figure are left out."""
    values = np.array([math.nan if v is None else v for v in values], float)
    parts = (values[max(0, i + 1 - width) : i + 1] for i in range(len(values)))
    return np.array([np.nan if np.isnan(p).all() else np.nanmean(p) for p in parts])


def ticks(low: float, high: float) -> list[float]:
    step = 10 ** math.floor(math.log10((high - low) / 2))
    step = next(s for s in (step, 2 * step, 5 * step, 10 * step) if (high - low) / s <= 5)
    return [
        i * step for i in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)
    ]


def chart(title: str, series: list, x_label: str, log: bool = False, unit: bool = False) -> str:
    """A line chart. series: (number of the colour, xs, means, lowest, highest, dashed)."""
    series = [s for s in series if np.isfinite(s[2]).any()]
    if not series:
        return ""
    place = np.log2 if log else np.asarray
    values = np.concatenate([np.concatenate(s[2:5]) for s in series])
    low, high = (0.0, 1.0) if unit else (float(np.nanmin(values)), float(np.nanmax(values)))
    low, high = (low - 0.5, high + 0.5) if high - low < 1e-9 else (low, high)
    xs = np.concatenate([place(s[1]) for s in series])
    left, right = float(xs.min()), max(float(xs.max()), float(xs.min()) + 1e-9)

    def at(x, y):
        across = (WIDTH - LEFT - 10) * (place(x) - left) / (right - left) + LEFT
        up = (HEIGHT - BOTTOM - 8) * (high - np.asarray(y)) / (high - low) + 8
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in zip(across, up) if np.isfinite(b))

    parts = []
    for y in ticks(low, high):
        y_at = (HEIGHT - BOTTOM - 8) * (high - y) / (high - low) + 8
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{y_at:.1f}" y2="{y_at:.1f}" '
            f'stroke="var(--line)"/><text x="{LEFT - 6}" y="{y_at + 4:.1f}" '
            f'text-anchor="end">{y:.4g}</text>'
        )
    marks = sorted({float(x) for s in series for x in s[1]}) if log else ticks(left, right)
    for x in marks:
        x_at = (WIDTH - LEFT - 10) * (float(place(x)) - left) / (right - left) + LEFT
        parts.append(
            f'<text x="{x_at:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{x:.4g}</text>'
        )
    for colour, x, mean, lowest, highest, dashed in series:
        band = at(np.concatenate([x, x[::-1]]), np.concatenate([highest, lowest[::-1]]))
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(
            f'<polygon points="{band}" fill="var(--c{colour})" opacity=".18"/>'
            f'<polyline points="{at(x, mean)}" fill="none" stroke="var(--c{colour})" '
            f'stroke-width="2"{dash}/>'
        )
    parts.append(
        f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 2}" text-anchor="middle">{x_label}</text>'
    )
    return (
        f"<figure><figcaption>{title}</figcaption><svg viewBox='0 0 {WIDTH} {HEIGHT}' role='img' "
        f"aria-label='{title}'>{''.join(parts)}</svg></figure>"
    )


def band(rows: list) -> tuple:
    """Mean, lowest and highest of curves, as far as all of them go."""
    rows = np.array([row[: min(map(len, rows))] for row in rows])
    return rows.mean(0), rows.min(0), rows.max(0)


def training_charts(groups: dict) -> str:
    charts = []
    for key, title in CURVES.items():
        series = []
        for colour, runs in enumerate(groups.values()):
            curves = [smooth([m.get(key) for m in run["metrics"]]) for run in runs]
            mean, lowest, highest = band(curves)
            steps = np.array([m["step"] for m in runs[0]["metrics"]][: len(mean)])
            series.append((colour % 5, steps, mean, lowest, highest, False))
        charts.append(chart(title, series, "step"))
    return "".join(charts)


def evaluation_charts(groups: dict, results: dict) -> str:
    """Maj@k and Pass@k over k, transfer over tau: before (dashed) and after training (solid) from the
    closing tables of runs, and the results of eval.py."""
    charts = []
    for prefix, title, label in (
        ("Maj@", "Maj@k: the majority of k answers is right", "k"),
        ("Pass@", "Pass@k: one of k answers is right", "k"),
        ("transfer@", "the receiver's right continuations", "tau"),
    ):
        series = []
        found = [*groups.values(), *([{"evaluation": {"after": r}}] for r in results.values())]
        for colour, runs in enumerate(found):
            for when in ("before", "after"):
                tables = [run["evaluation"][when] for run in runs if run["evaluation"].get(when)]
                keys = [k for k in tables[0] if k.startswith(prefix)] if tables else []
                if keys:
                    x = np.array([float(k.split("@")[1]) for k in keys])
                    curves = band([np.array([t[k] for k in keys]) for t in tables])
                    series.append((colour % 5, x, *curves, when == "before"))
        charts.append(chart(title, series, label, log=label == "k", unit=True))
    return "".join(charts)


def text(value) -> str:
    """Model text for a page: markup and control characters are shown, not obeyed."""
    return html.escape(printable(str(value)))


def show_cut(rollout: dict, cut: dict) -> str:
    verdict = "right" if cut["correct"] else "does not fit" if cut["overflow"] else "wrong"
    prefix, whole = cut["prefix"], rollout["text"]
    return (
        f'<pre><span class="prefix">{text(prefix)}</span><span class="cut">cut at tau = '
        f'{cut["tau"]:.2f}</span><span class="own">{text(whole[len(prefix) :])}</span></pre>'
        f'<pre>receiver: <span class="receiver">{text(cut["continuation"])}</span> '
        f"({verdict})</pre>"
    )


def show_rollouts(run: dict) -> str:
    """The group of the first, a middle and the last step."""
    steps = {}
    for row in run["rollouts"]:
        steps.setdefault(row["step"], []).append(row)
    numbers, parts = sorted(steps), []
    for step in sorted({numbers[0], numbers[len(numbers) // 2], numbers[-1]}) if numbers else ():
        problem = steps[step][0]["problem"]
        parts.append(
            f"<details{' open' if step == numbers[-1] else ''}><summary>Step {step}: "
            f"{text(problem['question'])} <b>(right answer {text(problem['answer'])})</b>"
            "</summary>"
        )
        for r in sorted(steps[step][:16], key=lambda r: -r["reward"]):
            parts.append(
                '<div class="try">'
                + (show_cut(r, r["cuts"][0]) if r["cuts"] else f"<pre>{text(r['text'])}</pre>")
            )
            if r["cuts"][1:]:
                more = "".join(show_cut(r, cut) for cut in r["cuts"][1:])
                parts.append(
                    f"<details><summary>{len(r['cuts']) - 1} more cuts</summary>{more}</details>"
                )
            parts.append(
                f'<div class="soft">answer {r["r_answer"]:.0f} &middot; transfer '
                f"{r['r_transfer']:.2f} &middot; format {r['r_format']:.0f} &rarr; reward "
                f"<b>{r['reward']:.2f}</b>, advantage <b>{r['advantage']:+.2f}</b></div></div>"
            )
        parts.append("</details>")
    return "".join(parts)


def what_happened(label: str, runs: list[dict]) -> str:
    """In plain words, from the numbers."""

    def first_last(key):
        curves = [smooth([m.get(key) for m in run["metrics"]]) for run in runs]
        starts, ends = ([c[min(9, len(c) - 1)] for c in curves], [c[-1] for c in curves])
        return f"from {np.mean(starts):.0%} to {np.mean(ends):.0%}"

    steps, seeds = len(runs[0]["metrics"]), len(runs)
    lines = [
        f"<b>{text(label)}</b> ({steps} steps, {seeds} seed{'s' if seeds > 1 else ''}): the share of "
        f"right answers went {first_last('accuracy')}"
    ]
    if runs[0]["metrics"][0].get("transfer") is not None:
        lines[0] += f", the receiver's right continuations {first_last('transfer')}"
        right = [r for run in runs for r in run["rollouts"] if r["r_answer"] and r["advantage"]]
        solid = [r["advantage"] for r in right if r["r_transfer"] >= 0.75]
        lucky = [r["advantage"] for r in right if r["r_transfer"] <= 0.25]
        if solid and lucky:
            lines.append(
                f"What the transfer reward did: of the right answers in the log, those whose reasoning the "
                f"receiver could mostly continue ({len(solid)}) got a mean advantage of "
                f"{np.mean(solid):+.2f}, those it could hardly continue, the lucky ones ({len(lucky)}), "
                f"{np.mean(lucky):+.2f}. With the answer alone, both would earn the same"
            )
    return "<p>" + ". ".join(lines) + ".</p>"


def page(runs: list[dict], results: dict) -> str:
    groups, config = group_runs(runs), runs[0]["config"]
    keys = [
        f'<span><i style="border-color: var(--c{i % 5})"></i>{text(label)}</span>'
        for i, label in enumerate([*groups, *results])
    ]
    legend, evaluations = "".join(keys[: len(groups)]), evaluation_charts(groups, results)
    parts = [
        f"<h1>RLTR: {text(Path(config['model']).name)} on {text(Path(config['data']).name)}</h1>",
        f"<p>A model, the <b>generator</b>, learns by trial and error to solve problems. Each attempt "
        f"earns {config['answer_weight']:g} for a right answer. With RLTR it also earns up to "
        f"{max(r['config']['transfer_weight'] for r in runs):g} as a <b>transfer reward</b>: the attempt is "
        f"cut at a random place (tau, from 0 the start to 1 the end) and another model, the <b>receiver</b> "
        f"({text(Path(config['receiver']).name)}), which does not learn, goes on from there. If it gets to "
        "the right answer, the reasoning was good enough for somebody else to build on; a right answer by "
        "luck earns less. RLVR is the same training without the transfer reward.</p>",
        *(what_happened(label, group) for label, group in groups.items()),
        f'<h2>Training</h2><p class="legend">{legend}</p><p class="soft">Mean of the last ten steps; a '
        "band goes from the lowest to the highest seed.</p>",
        f'<div class="grid">{training_charts(groups)}</div>',
    ]
    if evaluations:
        parts.append(
            "<h2>Evaluation on held-out problems</h2>"
            f'<p class="legend">{"".join(keys)}</p><p class="soft">Dashed before, solid after '
            f'training.</p><div class="grid">{evaluations}</div>'
        )
    parts.append(
        '<h2>Attempts to read</h2><p class="soft"><span class="prefix">Up to the cut</span>, '
        '<span class="own">what the generator itself wrote after it</span>, <span '
        'class="receiver">what the receiver wrote instead</span>. A positive advantage makes an '
        "attempt more likely. One group a step is in the log.</p>"
    )
    for label, group in groups.items():
        parts.append(
            (f"<h3>{text(label)}</h3>" if len(groups) > 1 else "") + show_rollouts(group[0])
        )
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        "content='width=device-width, initial-scale=1'><title>RLTR report</title><style>"
        f"{CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def main(argv=None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--eval", nargs="+", type=Path, default=[], help="result.json of eval.py")
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"))
    given = parser.parse_args(argv)
    try:
        results = {
            f"{p.parent.name}/{p.name}": json.loads(p.read_text())["figures"] for p in given.eval
        }
        rltr.write_file(given.output, page([read_run(folder) for folder in given.runs], results))
        print(given.output)
        return 0
    except (UserError, OSError, KeyError, ValueError) as error:
        print(f"report: {printable(str(error))}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
