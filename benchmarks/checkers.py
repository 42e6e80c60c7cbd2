"""Agreement and speed of answer checkers on a file of cases, ours against math-verify.

    pip install math-verify
    python benchmarks/checkers.py CASES.jsonl

A case is a line {"gold", "response", "expected": true or false, "kind"}. Cases of kind no_box are
left out (they need guessing where the answer stands); math-verify gets its default settings, both
arguments as its documentation says, and ten seconds a case by its own time-out.
"""

import argparse
import importlib.metadata
import json
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import rltr  # noqa: E402


def math_verify_checker():
    try:
        import math_verify
    except ImportError:
        return None
    import logging

    logging.getLogger("math_verify").setLevel(logging.CRITICAL)

    def is_correct(response, gold):
        parsed = math_verify.parse(f"\\boxed{{{gold}}}", parsing_timeout=10)
        return math_verify.verify(
            parsed, math_verify.parse(response, parsing_timeout=10), timeout_seconds=10
        )

    return is_correct


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("cases", type=Path)
    args = parser.parse_args()
    cases = [json.loads(line) for line in args.cases.read_text(encoding="utf-8").splitlines()]
    cases = [case for case in cases if case["kind"] != "no_box"]
    print(
        f"{len(cases)} cases\n\n| checker | agreement | false + | false - | errors | slowest | cases/s |"
    )
    print("|---|---|---|---|---|---|---|")
    for name, check in (
        ("rltr.is_correct", rltr.is_correct),
        ("math-verify", math_verify_checker()),
    ):
        if check is None:
            print("| math-verify | not installed: pip install math-verify |")
            continue
        wrong, errors, seconds = {True: 0, False: 0}, 0, []
        for case in cases:
            start = time.perf_counter()
            try:
                verdict = bool(check(case["response"], case["gold"]))
            except Exception:  # a peer that raises is counted, not excused
                verdict, errors = None, errors + 1
            seconds.append(time.perf_counter() - start)
            if verdict is not None and verdict != case["expected"]:
                wrong[verdict] += 1
        agreed = len(cases) - sum(wrong.values()) - errors
        version = importlib.metadata.version(name) if name == "math-verify" else ""
        print(
            f"| {name} {version} | {agreed / len(cases):.2%} | {wrong[True]} | {wrong[False]} | {errors} "
            f"| {1e3 * max(seconds):.0f} ms | {len(cases) / sum(seconds):.0f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
