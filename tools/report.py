"""One self-contained HTML page about one or several runs: curves, evaluations, attempts to read.

    python tools/report.py runs/A                                # writes runs/A/report.html
    python tools/report.py runs/A runs/B -o report.html
    python tools/report.py runs/A --eval evals/A/result.json     # and what eval.py has written

Runs that differ only in their seed share a curve (their mean) with a band (lowest to highest). No
network, no scripts; the theme follows the reader's. A run that is still going can be looked at."""

import argparse
import html
import json
import math
import re
import sys
from pathlib import Path

WIDTH, HEIGHT, LEFT, BOTTOM = 360, 220, 44, 34  # of a chart; room for its labels
CURVES = {
    "accuracy": "right answers",
    "transfer": "right continuations by the receiver",
    "reward": "reward",
    "entropy": "entropy of the next token (nats)",
    "length": "length (tokens)",
    "dead_groups": "groups without a signal",
}
SHOWN_ALREADY = ("reward_answer", "reward_transfer")  # as accuracy and transfer
EVALUATIONS = {
    "Maj@": "Maj@k: the majority of k answers is right",
    "Pass@": "Pass@k: one of k answers is right",
    "transfer@": "the receiver's right continuations",
}
# Settings by which no runs are told apart: seed, out, and rltr.HARMLESS without the steps.
ALIKE = "seed save_every show_every eval_data eval_k out track "
ALIKE += "token_budget max_rows gradient_checkpointing offload"

CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #5c5c5c; --line: #d8d8d8;
  --box: #f5f5f2; --c0: #0072b2; --c1: #c04f00; --c2: #00805d; --c3: #a3498a; --c4: #7a6a00; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8e8; --paper: #161618; --soft: #a8a8a8;
  --line: #3b3b3f; --box: #222226; --c0: #56b4e9; --c1: #ff9d5c; --c2: #3fc99b; --c3: #e59ccf;
  --c4: #e6d34a; } }
body { font: 16px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 1180px; margin: 0 auto; padding: 16px; overflow-wrap: anywhere; }
h1 { font-size: 1.5em; margin: .2em 0; } h2 { font-size: 1.2em; margin: 1.6em 0 .4em; }
p { max-width: 46em; } .soft { color: var(--soft); font-size: .9em; }
.legend span { display: inline-block; margin-right: 1.4em; } .legend i { display: inline-block;
  width: 1.6em; border-top: 3px solid; margin-right: .5em; vertical-align: middle; }
.grid { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(320px, 100%), 1fr));
  gap: 12px 24px; } figure { margin: 0; } figcaption { font-weight: 600; font-size: .95em; }
svg { width: 100%; } svg line { stroke: var(--line); } svg .y { text-anchor: end; }
svg text { fill: var(--soft); font: 11px system-ui, sans-serif; text-anchor: middle; }
polygon { fill: currentColor; opacity: .18; } .dashed polyline { stroke-dasharray: 5 4; }
polyline { fill: none; stroke: currentColor; stroke-width: 2; stroke-linecap: round; }
details { border-top: 1px solid var(--line); padding: .5em 0; } summary { cursor: pointer; }
.try { background: var(--box); border-radius: 6px; padding: .6em .8em; margin: .8em 0; }
pre { white-space: pre-wrap; margin: .6em 0; font: 14px/1.5 ui-monospace, monospace; }
.prefix { color: var(--c0); font-weight: 600; } .receiver { color: var(--c1); font-weight: 600; }
.own, .cut { color: var(--soft); } .cut { border-left: 3px solid var(--c1); padding: 0 .35em;
  margin-left: .2em; font-size: .85em; white-space: nowrap; }
"""

INTRODUCTION = """\
<p>A model, the <b>generator</b>, learns by trial and error to solve problems. An attempt earns a
reward for a right answer. With RLTR it also earns a <b>transfer reward</b>: it is cut at a random
place (tau, from 0 the start to 1 the end), and another model, the <b>receiver</b>, which does not
learn, goes on from there. If that gets to the right answer, the reasoning was good enough for
somebody else to build on. RLVR is the same training without the transfer reward.</p>"""

HOW_TO_READ = """\
<h2>Attempts to read</h2><p class="soft"><span class="prefix">Up to the cut</span>, <span
class="own">what the generator itself wrote after it</span>, <span class="receiver">what the
receiver wrote instead</span>. A positive advantage makes an attempt more likely. One group a step
is in the log.</p>"""


class PageError(Exception):
    """Something the user can put right."""


# ================================================================================== reading a run
# Model text is untrusted, and so is whatever else a file says: it gets to the page by way of `text`
# or as a formatted number.


def read_lines(path: Path) -> list[dict]:
    """A record a line; damaged lines do not count, and the last one may still be written."""
    records = []
    for line in path.read_text(encoding="utf-8", errors="replace").split("\n"):
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and "step" in record:
            records.append(record)
    return records


def read_run(folder: Path) -> dict:
    metrics = read_lines(folder / "metrics.jsonl")
    if not metrics:
        raise PageError(f"{folder}: no step is finished yet")
    evaluation = {}
    closing = folder / "evaluation.json"
    if closing.exists():
        for when, result in json.loads(closing.read_text()).items():
            evaluation[when] = result.get("figures", result)
    return {
        "config": json.loads((folder / "config.json").read_text()),
        "metrics": metrics,
        "rollouts": read_lines(folder / "rollouts.jsonl"),
        "evaluation": evaluation,
    }


def group_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Label -> the runs that differ in nothing but their seed (and what is in ALIKE)."""
    names = set().union(*(run["config"] for run in runs)) - set(ALIKE.split())
    different = []
    for name in sorted(names - {"cuts", "transfer_weight"}):
        if len({str(run["config"].get(name)) for run in runs}) > 1:
            different.append(name)
    groups = {}
    for run in runs:
        config = run["config"]
        label = "RLVR"
        if config["transfer_weight"]:
            label = f"RLTR, cuts = {config['cuts']}, b = {config['transfer_weight']:g}"
        for name in different:
            label += f", {name} = {config.get(name)}"
        groups.setdefault(label, []).append(run)
    return groups


def is_number(value) -> bool:
    """A metric may also be null, and what is not finite cannot be drawn."""
    return isinstance(value, (int, float)) and math.isfinite(value)


# ========================================================================================= charts


def smooth(rows: list[dict], name: str, width: int = 10) -> dict[float, float]:
    """Step -> mean of a metric over the last `width` steps, where any of them has it."""
    means = {}
    for end in range(1, len(rows) + 1):
        window = rows[max(0, end - width) : end]
        known = [row[name] for row in window if is_number(row.get(name))]
        if known:
            means[rows[end - 1]["step"]] = sum(known) / len(known)
    return means


def curve(tables: list[dict]) -> list[tuple]:
    """(x, mean, lowest, highest) of tables {x: y}, at each x that all of them have.

    >>> curve([{1.0: 2.0, 2.0: 5.0}, {1.0: 4.0}])
    [(1.0, 3.0, 2.0, 4.0)]
    """
    points = []
    for x in sorted(set().union(*tables)):
        ys = [table[x] for table in tables if x in table]
        if len(ys) == len(tables):
            points.append((x, sum(ys) / len(ys), min(ys), max(ys)))
    return points


def ticks(low: float, high: float) -> list[float]:
    """Up to six round numbers from low to high: multiples of 1, 2 or 5 times a power of ten.

    >>> ticks(0, 1), ticks(3, 31)
    ([0.0, 0.2, 0.4, 0.6000000000000001, 0.8, 1.0], [10, 20, 30])
    """
    power = 10 ** math.floor(math.log10((high - low) / 2))
    steps = [factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 5]
    first = math.ceil(low / steps[0] - 1e-9)
    last = math.floor(high / steps[0] + 1e-9)
    return [number * steps[0] for number in range(first, last + 1)]


def limits(values: list[float]) -> tuple[float, float]:
    """Lowest and highest; a level line gets some room."""
    low, high = min(values), max(values)
    room = 0.5 * max(1.0, abs(high)) if high - low < 1e-9 * max(1.0, abs(high)) else 0.0
    return low - room, high + room


def chart(title: str, lines: list[tuple], x_label: str, shares: bool = False) -> str:
    """A chart of lines (colour, class, points of `curve`). shares: the y axis goes from 0 to 1, and
    each x has a mark. The axis of k is logarithmic."""
    lines = [line for line in lines if line[2]]
    if not lines:
        return ""
    points = [point for _, _, its_points in lines for point in its_points]
    scale = math.log2 if x_label == "k" else float
    left, right = limits([scale(point[0]) for point in points])
    low, high = (0.0, 1.0) if shares else limits([y for point in points for y in point[1:]])

    def across(x: float) -> float:
        return LEFT + (WIDTH - LEFT - 10) * (scale(x) - left) / (right - left)

    def down(y: float) -> float:
        return 8 + (HEIGHT - BOTTOM - 8) * (high - y) / (high - low)

    def path(column: int, some: list) -> str:
        return " ".join(f"{across(point[0]):.1f},{down(point[column]):.1f}" for point in some)

    parts = []
    for y in ticks(low, high):
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{down(y):.1f}" y2="{down(y):.1f}"/>')
        parts.append(f'<text class="y" x="{LEFT - 6}" y="{down(y) + 4:.1f}">{y:.4g}</text>')
    for x in sorted({point[0] for point in points}) if shares else ticks(left, right):
        parts.append(f'<text x="{across(x):.1f}" y="{HEIGHT - BOTTOM + 16}">{x:.4g}</text>')
    parts.append(f'<text x="{(WIDTH + LEFT) / 2}" y="{HEIGHT - 2}">{x_label}</text>')
    for colour, kind, its in lines:
        band = f"{path(2, its)} {path(3, its[::-1])}"
        mean = path(1, its[:1] + its)  # the first one twice: a single point is a dot
        parts.append(
            f'<g class="{kind}" style="color: var(--c{colour})">'
            f'<polygon points="{band}"/><polyline points="{mean}"/></g>'
        )
    return (
        f'<figure><figcaption>{text(title)}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{text(title)}">{"".join(parts)}</svg></figure>'
    )


def training_charts(groups: dict) -> str:
    titles = dict(CURVES)
    for runs in groups.values():
        for name in runs[0]["metrics"][-1]:
            if name.startswith("reward_") and name not in SHOWN_ALREADY:
                titles.setdefault(name, name.replace("_", ": ", 1))
    charts = []
    for name, title in titles.items():
        lines = []
        for number, runs in enumerate(groups.values()):
            points = curve([smooth(run["metrics"], name) for run in runs])
            lines.append((number % 5, "solid", points))
        charts.append(chart(title, lines, "step"))
    return "".join(charts)


def evaluation_charts(groups: dict) -> str:
    """Maj@k and Pass@k over k, transfer over tau: before (dashed) and after training (solid)."""
    charts = []
    for prefix, title in EVALUATIONS.items():
        lines = []
        for number, runs in enumerate(groups.values()):
            for when, kind in (("before", "dashed"), ("after", "solid")):
                tables = [run["evaluation"].get(when, {}) for run in runs]
                found = [table for table in tables if table]
                lines.append((number % 5, kind, curve([places(table, prefix) for table in found])))
        x_label = "tau" if prefix == "transfer@" else "k"
        charts.append(chart(title, lines, x_label, shares=True))
    return "".join(charts)


def places(figures: dict[str, float], prefix: str) -> dict[float, float]:
    """Of the figures with this prefix, by the number behind it.

    >>> places({"Maj@1": 0.5, "Maj@16": 0.7, "Pass@1": 0.5}, "Maj@")
    {1.0: 0.5, 16.0: 0.7}
    """
    found = {}
    for name, value in figures.items():
        match = re.fullmatch(prefix + r"([1-9]\d*|0\.\d+)", name)
        if match and is_number(value):
            found[float(match[1])] = value
    return found


# ======================================================================================= the page


def printable(words: str) -> str:
    """Control characters spelled out."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in words)


def text(words) -> str:
    """Words for a page: markup and control characters are shown, not obeyed."""
    return html.escape(printable(str(words)))


def show_cut(rollout: dict, cut: dict) -> str:
    verdict = "right" if cut["correct"] else "wrong"
    if cut["overflow"]:
        verdict = "does not fit"
    own = rollout["text"][len(cut["prefix"]) :]
    return (
        f'<pre><span class="prefix">{text(cut["prefix"])}</span><span class="cut">cut at tau = '
        f'{cut["tau"]:.2f}</span><span class="own">{text(own)}</span>\nreceiver: '
        f'<span class="receiver">{text(cut["continuation"])}</span> ({verdict})</pre>'
    )


def show_rollout(rollout: dict) -> str:
    cuts = [show_cut(rollout, cut) for cut in rollout["cuts"]]
    shown = cuts[0] if cuts else f"<pre>{text(rollout['text'])}</pre>"
    if cuts[1:]:
        shown += f"<details><summary>More cuts</summary>{''.join(cuts[1:])}</details>"
    rewards = [f"{text(name)} {value:.2f}" for name, value in rollout["rewards"].items()]
    return (
        f'<div class="try">{shown}<div class="soft">{" &middot; ".join(rewards)} &rarr; reward '
        f"<b>{rollout['reward']:.2f}</b>, advantage <b>{rollout['advantage']:+.2f}</b></div></div>"
    )


def show_rollouts(run: dict) -> str:
    """The group of the first, a middle and the last step, the best attempt first."""
    steps = {}
    for rollout in run["rollouts"]:
        steps.setdefault(rollout["step"], []).append(rollout)
    numbers = sorted(steps)
    shown = set()
    if numbers:
        shown = {numbers[0], numbers[len(numbers) // 2], numbers[-1]}
    parts = []
    for step in sorted(shown):
        problem = steps[step][0]["problem"]
        parts.append(
            f"<details{' open' if step == numbers[-1] else ''}><summary>Step {step:.0f}: "
            f"{text(problem['question'])} <b>(right answer {text(problem['answer'])})</b>"
            "</summary>"
        )
        best_first = sorted(steps[step], key=lambda rollout: -rollout["reward"])
        parts += [show_rollout(rollout) for rollout in best_first[:16]]
        parts.append("</details>")
    return "".join(parts)


def what_happened(label: str, runs: list[dict]) -> str:
    """The figures of a curve in a sentence."""
    seeds = f"{len(runs)} seed{'s' if len(runs) > 1 else ''}"
    words = f"<b>{text(label)}</b>: {len(runs[0]['metrics'])} steps, {seeds}"
    for name, subject in (("accuracy", "right answers"), ("transfer", "right continuations")):
        points = curve([smooth(run["metrics"], name) for run in runs])
        if points:
            first = points[min(9, len(points) - 1)]  # the first mean of ten steps
            words += f", {subject} from {first[1]:.0%} to {points[-1][1]:.0%}"
    evaluations = [run["evaluation"] for run in runs if run["evaluation"]]
    if evaluations:
        before = sum(figures["before"]["accuracy"] for figures in evaluations) / len(evaluations)
        after = sum(figures["after"]["accuracy"] for figures in evaluations) / len(evaluations)
        words += f"; on held-out problems right answers from {before:.0%} to {after:.0%}"
    return f"<p>{words}.</p>"


def title(runs: list[dict]) -> str:
    config = runs[0]["config"]
    words = f"{short(config['model'])} on {short(config['data'])}"
    if any(run["config"]["transfer_weight"] for run in runs):
        words += f", receiver {short(config['receiver'])}"
    return f"<h1>RLTR: {text(words)}</h1>"


def short(path: str) -> str:
    """tiny/generator of /home/me/tiny/generator."""
    return "/".join(Path(path).parts[-2:])


def page(runs: list[dict], results: dict[str, dict]) -> str:
    """The page of runs and of results of eval.py, label -> figures."""
    groups = group_runs(runs)
    evaluated = dict(groups)
    for label, figures in results.items():
        evaluated[label] = [{"evaluation": {"after": figures}}]
    keys = []
    for number, label in enumerate(evaluated):
        line = f'<i style="color: var(--c{number % 5})"></i>'
        keys.append(f"<span>{line}{text(label)}</span>")
    parts = [
        title(runs),
        INTRODUCTION,
        *(what_happened(label, group) for label, group in groups.items()),
        f'<h2>Training</h2><p class="legend">{"".join(keys[: len(groups)])}</p>',
        '<p class="soft">Mean of the last ten steps; a band goes from the lowest to the highest '
        f'seed.</p><div class="grid">{training_charts(groups)}</div>',
    ]
    evaluations = evaluation_charts(evaluated)
    if evaluations:
        parts.append(
            "<h2>Evaluation on held-out problems</h2>"
            f'<p class="legend">{"".join(keys)}</p><p class="soft">Dashed before, solid after '
            f'training.</p><div class="grid">{evaluations}</div>'
        )
    parts.append(HOW_TO_READ)
    for label, group in groups.items():
        parts.append(f"<h3>{text(label)}</h3>{show_rollouts(group[0])}")
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        "content='width=device-width, initial-scale=1'><title>RLTR report</title><style>"
        f"{CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write_page(runs: list[Path], output: Path, evaluations: list[Path] = ()):
    """The page of these run folders and of these result.json of eval.py."""
    results = {str(path): json.loads(path.read_text())["figures"] for path in evaluations}
    content = page([read_run(folder) for folder in runs], results)
    output.write_text(content, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--eval", nargs="+", type=Path, default=[], help="result.json of eval.py")
    parser.add_argument("-o", "--output", type=Path, help="default: report.html in the first run")
    given = parser.parse_args(argv)
    output = given.output or given.runs[0] / "report.html"
    try:
        write_page(given.runs, output, given.eval)
        print(f"a page to look at: {output}")
        return 0
    except (PageError, OSError) as error:
        message = str(error)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        message = f"not what rltr.py and eval.py write: {error!r}"
    print("report: " + printable(message), file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
