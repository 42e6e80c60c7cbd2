"""Tests of report.py: what a page shows, and that model text in it is only text."""

import dataclasses
import doctest
import json
import subprocess
import sys
from html import parser as html_parser
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import report

import rltr

HOSTILE = "</pre><script>alert(1)</script><img src=x onerror=y>\x1b[31m\u202egnihton\x00\ud800"
HOSTILE_NAME = "\"'><script>alert(1)</script><a href=javascript:alert(1) onclick=x>"


def logged_run(steps=3, **settings):
    """What rltr.py logs, by its own records: {file: a value, or a list of one a line}."""
    config = rltr.Config(model="m/gen", receiver="m/rec", data="d.jsonl", group=2, **settings)
    metrics, rollouts = [], []
    for step in range(1, steps + 1):
        row = {"step": step, "entropy": 1.5 / step, "accuracy": 0.5, "grad_norm": None}
        metrics.append(row | {"transfer": 0.5, "reward_format": 1.0})
        for verdict in ("right", "wrong"):
            problem = rltr.Problem("2+2?", "4")
            text = f"2+2=4 so {verdict}"
            rollout = rltr.Rollout(problem, [1], [2, 3], [-1.0, -1.0], True, text, verdict)
            rollout.rewards = {"answer": float(verdict == "right"), "format": 1.0}
            if config.transfer_weight:
                rollout.cuts = [rltr.Cut(0.25, 1, "2+2", False), rltr.Cut(0.5, 1, "2+2=", False)]
            rollouts.append({"step": step, **dataclasses.asdict(rollout), "advantage": 0.707})
    figures = {"accuracy": 0.5, "Maj@1": 0.5, "Maj@2": 0.75, "Pass@2": 1.0, "transfer@0.3": 0.25}
    return {
        "config.json": vars(config),
        "metrics.jsonl": metrics,
        "rollouts.jsonl": rollouts,
        "evaluation.json": {"before": figures, "after": figures | {"accuracy": 0.75}},
    }


def write_run(folder, run):
    folder.mkdir()
    for name, content in run.items():
        lines = content if name.endswith("l") else [content]
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def harmless_tags(html):
    """The page's tags with their attributes, none of which runs or loads anything."""
    tags = []
    parser = html_parser.HTMLParser()
    parser.handle_starttag = lambda tag, given: tags.append((tag, dict(given)))
    parser.feed(html)
    known = "html head meta title style body h1 h2 h3 p b i span div details summary pre "
    known += "figure figcaption svg g line text polygon polyline"
    assert {tag for tag, _ in tags} <= set(known.split())
    for _, given in tags:
        assert not {"src", "href", "xlink:href", "srcdoc", "action"} & given.keys()
        assert not [name for name in given if name.startswith("on")]
        for number in given.get("points", "0").replace(",", " ").split():
            assert abs(float(number)) < float("inf")
    assert "http" not in html
    assert not set("\x1b\u202e\x00\ud800") & set(html)
    return tags


def test_a_page_in_which_model_text_is_only_text(tmp_path, capfd):
    run = logged_run(transfer_weight=0.0, split=HOSTILE_NAME)  # it gets into the label
    folders = [write_run(tmp_path / "rlvr", run)]
    for seed in (0, 1):
        run = logged_run(seed=seed)
        run["evaluation.json"]["after"][f"Maj@{HOSTILE_NAME}"] = 0.5
        for row in run["metrics.jsonl"]:
            row |= {"accuracy": 0.25 + 0.5 * seed, f"reward_{HOSTILE_NAME}": 1.0}
        for row in run["rollouts.jsonl"]:
            row["rewards"][HOSTILE_NAME] = 1.0
            row["text"] = row["cuts"][0]["continuation"] = row["cuts"][1]["prefix"] = HOSTILE
            row["problem"]["question"] = row["problem"]["answer"] = HOSTILE
        folders.append(write_run(tmp_path / f"seed{seed}", run))
    with (folders[1] / "rollouts.jsonl").open("a") as file:
        file.write('{"step": 5, "te')  # still being written
    page, result = tmp_path / "report.html", tmp_path / "result.json"
    result.write_text(json.dumps({"figures": {"accuracy": 0.5, "Maj@1": 0.5, "Maj@2": 0.75}}))
    assert report.main([*map(str, folders), "-o", str(page), "--eval", str(result)]) == 0
    assert capfd.readouterr() == (f"a page to look at: {page}\n", "")
    html = page.read_text(encoding="utf-8")
    tags = harmless_tags(html)
    assert html.count("alert(1)") > 20
    for shown in ("\\x1b[31m", "\\ud800", "RLVR", "Maj@k", f"{tmp_path.name}/result"):
        assert shown in html
    assert "2 seeds, right answers from 50% to 50%, right continuations" in html
    assert "on held-out problems right answers from 50% to 75%." in html
    assert "advantage <b>+0.71</b>" in html
    assert [given.get("class") for _, given in tags].count("dashed") == 2 * 3


def test_damaged_lines_and_numbers_do_not_count(tmp_path):
    folder = write_run(tmp_path / "run", logged_run())
    report.write_page([folder], tmp_path / "whole.html")
    junk = [b"", b"[]", b"7", b'{"step": 9', b"\xff\xfe", b"null", b"\x00", b'"step"']
    for name in ("metrics.jsonl", "rollouts.jsonl"):
        lines = (folder / name).read_bytes().splitlines()
        (folder / name).write_bytes(b"\n".join([*junk, *lines, *junk]))
    log = (folder / "metrics.jsonl").read_text(errors="replace")
    (folder / "metrics.jsonl").write_text(log.replace('"grad_norm": null', '"reward": NaN'))
    report.write_page([folder], tmp_path / "damaged.html")
    assert (tmp_path / "whole.html").read_text() == (tmp_path / "damaged.html").read_text()


def test_a_run_that_has_just_begun(tmp_path):
    run = logged_run(steps=1, transfer_weight=0.0)
    run["rollouts.jsonl"] = []
    del run["evaluation.json"]
    folder = write_run(tmp_path / "run", run)
    report.write_page([folder], folder / "report.html")
    html = (folder / "report.html").read_text(encoding="utf-8")
    points = [given["points"] for tag, given in harmless_tags(html) if tag == "polyline"]
    assert {len(set(line.split())) for line in points} == {1}  # dots
    assert "held-out" not in html


def test_runs_that_differ_only_in_seed_share_a_curve():
    runs = []
    for seed, extra in ((0, {}), (1, {}), (2, {}), (0, {"lr": 1e-3}), (0, {"cuts": 4})):
        config = vars(rltr.Config(model="tiny/generator", seed=seed, **extra))
        others = {name: str(len(runs)) for name in report.ALIKE.split() if name != "seed"}
        runs.append({"config": config | others})
    groups = {label: len(group) for label, group in report.group_runs(runs).items()}
    assert groups == {
        "RLTR, cuts = 1, b = 1, lr = 2e-06": 3,
        "RLTR, cuts = 1, b = 1, lr = 0.001": 1,
        "RLTR, cuts = 4, b = 1, lr = 2e-06": 1,
    }
    assert set(report.ALIKE.split()) == rltr.HARMLESS - {"resume", "steps"} | {"seed", "out"}


def test_common_mistakes_are_one_line(tmp_path, capfd):
    run = write_run(tmp_path / "run", logged_run())
    begun = write_run(tmp_path / "begun", logged_run(steps=0))
    (tmp_path / "list.json").write_text("[]")
    wrong = [[tmp_path / "nowhere"], [tmp_path], [begun], [run, "-o", tmp_path]]
    wrong += [[run, "--eval", path] for path in (tmp_path / "list.json", tmp_path)]
    for argv in wrong:
        assert report.main([str(word) for word in ["-o", tmp_path / "page.html", *argv]]) == 2
        out, err = capfd.readouterr()
        assert (out, err[:8], err.count("\n")) == ("", "report: ", 1)
    assert not (tmp_path / "page.html").exists()


def test_the_module_has_no_side_effects_and_its_examples_hold():
    code = "import sys; path = list(sys.path); import report; assert sys.path == path; "
    code += "assert not {'rltr', 'torch', 'numpy'} & set(sys.modules); assert report.write_page"
    folder = Path(report.__file__).parent
    subprocess.run([sys.executable, "-c", code], cwd=folder, check=True)
    failed, attempted = doctest.testmod(report)
    assert (failed, attempted) == (0, 3)
