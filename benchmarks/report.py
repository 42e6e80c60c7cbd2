"""One self-contained HTML page about one or several runs: curves, evaluations, rollouts to read.

    python benchmarks/report.py runs/A [runs/B ...] -o report.html
    python benchmarks/report.py runs/A --eval evals/A/result.json     # and what eval.py has written

Runs that differ only in their seed share a curve (their mean) with a band (lowest to highest). No
network, no scripts; the theme follows the reader's. A run that is still going can be looked at."""

import html
import json
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
import common

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
SHOWN_ALREADY = {"reward_answer", "reward_transfer"}  # as accuracy and transfer
IGNORED = set(rltr.HARMLESS.split()) - {"steps"} | {"seed"}  # settings that make no other run

# What a run folder must hold, for it may come from elsewhere: see `fits`.
CONFIG = {"model": str, "data": str, "receiver": str, "seed": float, "cuts": float}
CONFIG |= {"answer_weight": float, "transfer_weight": float}
CUT = {"tau": float, "prefix": str, "continuation": str, "correct": bool, "overflow": bool}
ROLLOUT = {"step": float, "problem": {"question": str, "answer": str}, "text": str}
ROLLOUT |= {"reward": float, "advantage": float, "rewards": {str: float}, "cuts": [CUT]}

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


# ================================================================================== reading a run


def fits(value, shape) -> bool:
    """Whether a value from a file has this shape: a type, [shape of every item], {name: shape} of
    names that must be there, {str: shape} of every name. float: a number of a reasonable size.

    >>> fits({"x": [1, 2.5]}, {"x": [float]}), fits({"x": "1"}, {"x": float}), fits({}, {"x": str})
    (True, False, False)
    """
    if shape is float:
        return isinstance(value, (int, float)) and abs(value) < 1e12  # false of NaN
    if isinstance(shape, list):
        return isinstance(value, list) and all(fits(item, shape[0]) for item in value)
    if not isinstance(shape, dict):
        return isinstance(value, shape)
    if not isinstance(value, dict):
        return False
    if str in shape:
        return all(fits(item, shape[str]) for item in value.values())
    return all(name in value and fits(value[name], inner) for name, inner in shape.items())


def parse(content: bytes, shape, where: str):
    """JSON of this shape."""
    try:
        value = json.loads(content)
    except (ValueError, RecursionError):
        raise UserError(f"{where}: is not JSON") from None
    require(fits(value, shape), f"{where}: is not what rltr.py or eval.py writes there")
    return value


def read_lines(path: Path, shape) -> list[dict]:
    """The rows of a .jsonl; a last line that is still being written does not count."""
    require(path.is_file(), f"{path}: no such file; is this the folder of a run?")
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(keepends=True), 1):
        if line.endswith(b"\n"):
            rows.append(parse(line, shape, f"{path}: line {number}"))
    return rows


def read_run(folder: Path) -> dict:
    metrics = read_lines(folder / "metrics.jsonl", {"step": float})
    require(metrics, f"{folder}: no step is finished yet")
    for number, row in enumerate(metrics, 1):
        for name in shown_metrics(row):
            good = row[name] is None or fits(row[name], float)
            require(good, f"{folder}/metrics.jsonl: line {number}: {name} is not a number")
    config = parse((folder / "config.json").read_bytes(), CONFIG, f"{folder}/config.json")
    closing = folder / "evaluation.json"
    evaluation = {}
    if closing.is_file():
        evaluation = parse(closing.read_bytes(), {str: {str: float}}, str(closing))
    return {
        "folder": folder,
        "config": config,
        "metrics": metrics,
        "evaluation": evaluation,
        "rollouts": read_lines(folder / "rollouts.jsonl", ROLLOUT),
    }


def shown_metrics(row: dict) -> list[str]:
    """The metrics that have a chart: those of CURVES, and all rewards by their names."""
    rewards = [name for name in row if name.startswith("reward_") and name not in SHOWN_ALREADY]
    return [name for name in CURVES if name in row] + rewards


def group_runs(runs: list[dict]) -> dict[str, list[dict]]:
    """Label -> the runs that differ in nothing but their seed."""
    settings = []
    for run in runs:
        setting = {}
        for name, value in run["config"].items():
            if isinstance(value, str) and "/" in value:
                value = Path(value).name  # the folders of the built-in task carry the seed, too
            if name not in IGNORED:
                setting[name] = str(value)
        settings.append(setting)
    named = ("transfer_weight", "cuts")  # they are in the label anyway
    differ = [name for name in settings[0] if name not in named]
    differ = [name for name in differ if len({s.get(name) for s in settings}) > 1]
    groups = {}
    for run, setting in zip(runs, settings, strict=True):
        weight, cuts = run["config"]["transfer_weight"], run["config"]["cuts"]
        label = "RLVR"
        if weight:
            label = f"RLTR, {cuts:g} cut{'s' if cuts > 1 else ''}, b = {weight:g}"
        for name in sorted(differ):
            label += f", {name} = {setting.get(name)}"
        groups.setdefault(label, []).append(run)
    return groups


# ========================================================================================= charts


def smooth(values: list, width: int = 10) -> np.ndarray:
    """Mean of the last `width` steps; steps without the figure are left out."""
    values = np.array([math.nan if value is None else value for value in values], float)
    means = []
    for end in range(1, len(values) + 1):
        known = values[max(0, end - width) : end]
        known = known[~np.isnan(known)]
        means.append(known.mean() if len(known) else math.nan)
    return np.array(means)


def ticks(low: float, high: float) -> list[float]:
    """Up to six round numbers from low to high: multiples of 1, 2 or 5 times a power of ten."""
    power = 10 ** math.floor(math.log10((high - low) / 2))
    steps = [factor * power for factor in (1, 2, 5, 10) if (high - low) / (factor * power) <= 5]
    first = math.ceil(low / steps[0] - 1e-9)
    last = math.floor(high / steps[0] + 1e-9)
    return [number * steps[0] for number in range(first, last + 1)]


def chart(title: str, series: list, x_label: str, log: bool = False, unit: bool = False) -> str:
    """A line chart. series: (number of the colour, xs, means, lowest, highest, dashed)."""
    series = [s for s in series if np.isfinite(s[2]).any()]
    if not series:
        return ""
    place = np.log2 if log else np.asarray
    low, high = 0.0, 1.0
    if not unit:
        values = np.concatenate([np.concatenate(s[2:5]) for s in series])
        low, high = float(np.nanmin(values)), float(np.nanmax(values))
    if high - low < 1e-9 * max(1.0, abs(high)):  # a level line
        low -= 0.5 * max(1.0, abs(high))
        high += 0.5 * max(1.0, abs(high))
    xs = np.concatenate([place(s[1]) for s in series])
    left, right = float(xs.min()), max(float(xs.max()), float(xs.min()) + 1e-9)

    def across(x):
        return (WIDTH - LEFT - 10) * (place(x) - left) / (right - left) + LEFT

    def up(y):
        return (HEIGHT - BOTTOM - 8) * (high - np.asarray(y)) / (high - low) + 8

    def points(x, y):
        pairs = zip(across(x), up(y), strict=True)
        return " ".join(f"{a:.1f},{b:.1f}" for a, b in pairs if np.isfinite(b))

    parts = []
    for y in ticks(low, high):
        parts.append(
            f'<line x1="{LEFT}" x2="{WIDTH - 10}" y1="{up(y):.1f}" y2="{up(y):.1f}" '
            f'stroke="var(--line)"/><text x="{LEFT - 6}" y="{up(y) + 4:.1f}" '
            f'text-anchor="end">{y:.4g}</text>'
        )
    marks = sorted({float(x) for s in series for x in s[1]}) if log else ticks(left, right)
    for x in marks:
        parts.append(
            f'<text x="{float(across(x)):.1f}" y="{HEIGHT - BOTTOM + 16}" '
            f'text-anchor="middle">{x:.4g}</text>'
        )
    for colour, x, mean, lowest, highest, dashed in series:
        outline = points(np.concatenate([x, x[::-1]]), np.concatenate([highest, lowest[::-1]]))
        dash = ' stroke-dasharray="5 4"' if dashed else ""
        parts.append(
            f'<polygon points="{outline}" fill="var(--c{colour})" opacity=".18"/>'
            f'<polyline points="{points(x, mean)}" fill="none" stroke="var(--c{colour})" '
            f'stroke-width="2"{dash}/>'
        )
    middle = (WIDTH + LEFT) / 2
    parts.append(f'<text x="{middle}" y="{HEIGHT - 2}" text-anchor="middle">{x_label}</text>')
    return (
        f"<figure><figcaption>{text(title)}</figcaption><svg viewBox='0 0 {WIDTH} {HEIGHT}' "
        f"role='img' aria-label='{text(title)}'>{''.join(parts)}</svg></figure>"
    )


def band(curves: list) -> tuple:
    """Mean, lowest and highest of curves, as far as all of them go."""
    shortest = min(len(curve) for curve in curves)
    rows = np.array([curve[:shortest] for curve in curves])
    return rows.mean(0), rows.min(0), rows.max(0)


def training_charts(groups: dict) -> str:
    titles = dict(CURVES)
    for runs in groups.values():
        for name in shown_metrics(runs[0]["metrics"][0]):
            titles.setdefault(name, name.replace("_", ": ", 1))
    charts = []
    for name, title in titles.items():
        series = []
        for colour, runs in enumerate(groups.values()):
            curves = [smooth([row.get(name) for row in run["metrics"]]) for run in runs]
            mean, lowest, highest = band(curves)
            steps = np.array([row["step"] for row in runs[0]["metrics"]][: len(mean)])
            series.append((colour % 5, steps, mean, lowest, highest, False))
        charts.append(chart(title, series, "step"))
    return "".join(charts)


def evaluation_charts(groups: dict, results: dict) -> str:
    """Maj@k and Pass@k over k, transfer over tau: before (dashed) and after training (solid) from
    the closing tables of runs, and the results of eval.py."""
    found = list(groups.values())
    for result in results.values():
        found.append([{"evaluation": {"after": result}}])
    charts = []
    for prefix, title, label in (
        ("Maj@", "Maj@k: the majority of k answers is right", "k"),
        ("Pass@", "Pass@k: one of k answers is right", "k"),
        ("transfer@", "the receiver's right continuations", "tau"),
    ):
        series = []
        for colour, runs in enumerate(found):
            for when in ("before", "after"):
                tables = [run["evaluation"][when] for run in runs if run["evaluation"].get(when)]
                keys = set.intersection(*(set(table) for table in tables)) if tables else set()
                places = {place_of(key): key for key in keys if key.startswith(prefix)}
                if places:
                    x = np.array(sorted(places))
                    curves = [np.array([table[places[at]] for at in x]) for table in tables]
                    series.append((colour % 5, x, *band(curves), when == "before"))
        charts.append(chart(title, series, label, log=label == "k", unit=True))
    return "".join(charts)


def place_of(name: str) -> float:
    """16 of Maj@16, 0.3 of transfer@0.3."""
    try:
        place = float(name.partition("@")[2])
    except ValueError:
        place = math.nan
    require(0 < place < 1e9, f"evaluation: {name!r} is no figure of eval.py")
    return place


# ======================================================================================= the page


def text(value) -> str:
    """Model text for a page: markup and control characters are shown, not obeyed."""
    return html.escape(printable(str(value)))


def show_cut(rollout: dict, cut: dict) -> str:
    verdict = "right" if cut["correct"] else "does not fit" if cut["overflow"] else "wrong"
    prefix = cut["prefix"]
    rest = rollout["text"][len(prefix) :]
    return (
        f'<pre><span class="prefix">{text(prefix)}</span><span class="cut">cut at tau = '
        f'{cut["tau"]:.2f}</span><span class="own">{text(rest)}</span></pre>'
        f'<pre>receiver: <span class="receiver">{text(cut["continuation"])}</span> '
        f"({verdict})</pre>"
    )


def show_rollout(rollout: dict) -> str:
    parts = ['<div class="try">']
    if rollout["cuts"]:
        parts.append(show_cut(rollout, rollout["cuts"][0]))
    else:
        parts.append(f"<pre>{text(rollout['text'])}</pre>")
    others = rollout["cuts"][1:]
    if others:
        more = "".join(show_cut(rollout, cut) for cut in others)
        parts.append(f"<details><summary>{len(others)} more cuts</summary>{more}</details>")
    rewards = [f"{text(name)} {value:.2f}" for name, value in rollout["rewards"].items()]
    parts.append(
        f'<div class="soft">{" &middot; ".join(rewards)} &rarr; reward '
        f"<b>{rollout['reward']:.2f}</b>, advantage <b>{rollout['advantage']:+.2f}</b></div></div>"
    )
    return "".join(parts)


def show_rollouts(run: dict) -> str:
    """The group of the first, a middle and the last step."""
    steps = {}
    for rollout in run["rollouts"]:
        steps.setdefault(rollout["step"], []).append(rollout)
    numbers = sorted(steps)
    chosen = {numbers[0], numbers[len(numbers) // 2], numbers[-1]} if numbers else set()
    parts = []
    for step in sorted(chosen):
        problem = steps[step][0]["problem"]
        parts.append(
            f"<details{' open' if step == numbers[-1] else ''}><summary>Step {step:g}: "
            f"{text(problem['question'])} <b>(right answer {text(problem['answer'])})</b>"
            "</summary>"
        )
        best_first = sorted(steps[step][:16], key=lambda rollout: -rollout["reward"])
        parts += [show_rollout(rollout) for rollout in best_first]
        parts.append("</details>")
    return "".join(parts)


def what_happened(label: str, runs: list[dict]) -> str:
    """In plain words, from the numbers."""
    steps, seeds = len(runs[0]["metrics"]), len(runs)
    words = (
        f"<b>{text(label)}</b> ({steps} steps, {seeds} seed{'s' if seeds > 1 else ''}): the share "
        f"of right answers went {first_and_last(runs, 'accuracy')}"
    )
    if runs[0]["metrics"][0].get("transfer") is not None:
        words += f", the receiver's right continuations {first_and_last(runs, 'transfer')}"
    solid, lucky = [], []  # advantages of right answers, by whether the receiver could go on
    for run in runs:
        for rollout in run["rollouts"]:
            transfer = rollout["rewards"].get("transfer")
            if transfer is None or not rollout["rewards"].get("answer") or not rollout["advantage"]:
                continue
            if transfer >= 0.75:
                solid.append(rollout["advantage"])
            elif transfer <= 0.25:
                lucky.append(rollout["advantage"])
    if solid and lucky:
        words += (
            ". What the transfer reward did: of the right answers in the log, those whose "
            f"reasoning the receiver could mostly continue ({len(solid)}) got a mean advantage of "
            f"{np.mean(solid):+.2f}, those it could hardly continue, the lucky ones "
            f"({len(lucky)}), {np.mean(lucky):+.2f}. With the answer alone, both would earn the "
            "same"
        )
    return f"<p>{words}.</p>"


def first_and_last(runs: list[dict], name: str) -> str:
    curves = [smooth([row.get(name) for row in run["metrics"]]) for run in runs]
    first = np.mean([curve[min(9, len(curve) - 1)] for curve in curves])
    last = np.mean([curve[-1] for curve in curves])
    return f"from {first:.0%} to {last:.0%}"


INTRODUCTION = """\
<p>A model, the <b>generator</b>, learns by trial and error to solve problems. Each attempt earns
{answer_weight:g} for a right answer. With RLTR it also earns up to {transfer_weight:g} as a
<b>transfer reward</b>: the attempt is cut at a random place (tau, from 0 the start to 1 the end)
and another model, the <b>receiver</b> ({receiver}), which does not learn, goes on from there. If it
gets to the right answer, the reasoning was good enough for somebody else to build on; a right
answer by luck earns less. RLVR is the same training without the transfer reward.</p>"""

HOW_TO_READ = """\
<h2>Attempts to read</h2><p class="soft"><span class="prefix">Up to the cut</span>, <span
class="own">what the generator itself wrote after it</span>, <span class="receiver">what the
receiver wrote instead</span>. A positive advantage makes an attempt more likely. One group a step
is in the log.</p>"""


def page(runs: list[dict], results: dict) -> str:
    groups = group_runs(runs)
    config = runs[0]["config"]
    weights = [run["config"]["transfer_weight"] for run in runs]
    keys = []
    for number, label in enumerate([*groups, *results]):
        line = f'<i style="border-color: var(--c{number % 5})"></i>'
        keys.append(f"<span>{line}{text(label)}</span>")
    parts = [
        f"<h1>RLTR: {text(Path(config['model']).name)} on {text(Path(config['data']).name)}</h1>",
        INTRODUCTION.format(
            answer_weight=config["answer_weight"],
            transfer_weight=max(weights),
            receiver=text(Path(config["receiver"]).name),
        ),
        *(what_happened(label, group) for label, group in groups.items()),
        f'<h2>Training</h2><p class="legend">{"".join(keys[: len(groups)])}</p>',
        '<p class="soft">Mean of the last ten steps; a band goes from the lowest to the highest '
        "seed.</p>",
        f'<div class="grid">{training_charts(groups)}</div>',
    ]
    evaluations = evaluation_charts(groups, results)
    if evaluations:
        parts.append(
            "<h2>Evaluation on held-out problems</h2>"
            f'<p class="legend">{"".join(keys)}</p><p class="soft">Dashed before, solid after '
            f'training.</p><div class="grid">{evaluations}</div>'
        )
    parts.append(HOW_TO_READ)
    for label, group in groups.items():
        if len(groups) > 1:
            parts.append(f"<h3>{text(label)}</h3>")
        parts.append(show_rollouts(group[0]))
    return (
        "<!doctype html><html lang='en'><head><meta charset='utf-8'><meta name='viewport' "
        "content='width=device-width, initial-scale=1'><title>RLTR report</title><style>"
        f"{CSS}</style></head><body>{''.join(parts)}</body></html>\n"
    )


def write_report(argv: list[str] | None):
    parser = common.parser(__doc__)
    parser.add_argument("runs", nargs="+", type=Path, help="folders of runs")
    parser.add_argument("--eval", nargs="+", type=Path, default=[], help="result.json of eval.py")
    parser.add_argument("-o", "--output", type=common.output, default=Path("report.html"))
    given = parser.parse_args(argv)
    results = {}
    for path in given.eval:
        shape = {"figures": {str: float}}
        label = f"{path.parent.name}/{path.name}"
        results[label] = parse(path.read_bytes(), shape, str(path))["figures"]
    content = page([read_run(folder) for folder in given.runs], results)
    # In pure ASCII, whatever the encoding of this machine.
    rltr.write_file(given.output, content.encode("ascii", "xmlcharrefreplace").decode("ascii"))
    print(given.output)


def main(argv: list[str] | None = None) -> int:
    return common.command_line("report", write_report, argv)


if __name__ == "__main__":
    sys.exit(main())
