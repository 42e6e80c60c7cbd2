"""Agreement and speed of answer checkers on a file of cases, ours against math-verify.

    pip install math-verify
    python benchmarks/checkers.py CASES.jsonl

A case is a line {"gold", "response", "expected": true or false, "kind"}. Cases of kind no_box are
left out (they need guessing where the answer stands); math-verify gets its default settings, both
arguments as its documentation says, and ten seconds a case by its own time-out."""

import argparse
import importlib.metadata
import json
import logging
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import rltr


def read_cases(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        cases = [json.loads(line) for line in file]
    cases = [case for case in cases if case["kind"] != "no_box"]
    rltr.require(cases, f"{path}: holds no cases")
    return cases


def load_math_verify():
    """math-verify as a function like rltr.is_correct, or None where it is not installed."""
    try:
        import math_verify
    except ImportError:
        return None
    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def is_correct(response: str, gold: str) -> bool:
        right = math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=10)
        given = math_verify.parse(response, parsing_timeout=10)
        return math_verify.verify(right, given, timeout_seconds=10)

    return is_correct


def judge(name: str, check, cases: list[dict]) -> str:
    """A line of the table."""
    false_positives = false_negatives = errors = 0
    seconds = []
    for case in cases:
        start = time.perf_counter()
        try:
            verdict = bool(check(case["response"], case["gold"]))
            false_positives += verdict and not case["expected"]
            false_negatives += case["expected"] and not verdict
        except Exception:  # a peer that raises is counted, not excused
            errors += 1
        seconds.append(time.perf_counter() - start)
    agreed = len(cases) - false_positives - false_negatives - errors
    return (
        f"| {name} | {agreed / len(cases):.2%} | {false_positives} | {false_negatives} "
        f"| {errors} | {1e3 * max(seconds):.0f} ms | {len(cases) / sum(seconds):.0f} |"
    )


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("cases", type=Path, help="a .jsonl of labelled cases")
    cases = read_cases(parser.parse_args(argv).cases)
    print(f"{len(cases)} cases\n")
    print("| checker | agreement | false + | false - | errors | slowest | cases/s |")
    print("|---|---|---|---|---|---|---|")
    print(judge("rltr.is_correct", rltr.is_correct, cases), flush=True)
    math_verify = load_math_verify()
    if math_verify is None:
        print("| math-verify | not installed: pip install math-verify |")
    else:
        name = f"math-verify {importlib.metadata.version('math-verify')}"
        print(judge(name, math_verify, cases))


if __name__ == "__main__":
    sys.exit(rltr.run_command("checkers", main, sys.argv[1:]))
