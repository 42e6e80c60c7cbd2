"""What the scripts of this folder share: a mistake on the command line is one line, exit code 2."""

import argparse
import math
import re
import sys
import warnings
from pathlib import Path

import torch
import transformers

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tiny")]  # for all of them: rltr.py, eval.py, make.py
import rltr  # noqa: E402


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose description is the first line of a script's docstring."""
    return argparse.ArgumentParser(description=doc.split("\n")[0], allow_abbrev=False)


def whole(low: int, high: int = 10**6):
    """For argparse: a whole number from `low` to `high`."""

    def read(text: str) -> int:
        if not (text.isascii() and text.isdecimal()) or not low <= int(text[:10]) <= high:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number from {low} to {high}")
        return int(text)

    return read


def number(low: float, high: float):
    """For argparse: a number from `low` to `high`."""

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:  # also true of NaN
            raise argparse.ArgumentTypeError(f"{text!r} is not a number from {low:g} to {high:g}")
        return value

    return read


def output(text: str) -> Path:
    """For argparse: a file that may be written. What else is there (a folder, a device) stays."""
    path = Path(text)
    if path.exists() and not path.is_file():
        raise argparse.ArgumentTypeError(f"{text!r} is there, and not a file")
    return path


def device(text: str) -> str:
    """For argparse: a device that this machine has."""
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise argparse.ArgumentTypeError(f"{text!r} is not like cpu, cuda or cuda:1")
    try:
        torch.zeros(1, device=text)
    except (RuntimeError, AssertionError) as error:
        raise argparse.ArgumentTypeError(f"{text!r}: there is none ({error})") from None
    return text


def command_line(name: str, main, argv: list[str] | None = None) -> int:
    """main(argv), and what the user can put right as one line on stderr."""
    warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    try:
        main(argv)
        return 0
    except ModuleNotFoundError as error:
        message = f"{error}; pip install {error.name}"
    except torch.OutOfMemoryError as error:
        message = f"out of memory: {error}"
    except (rltr.UserError, OSError) as error:
        message = str(error)
    print(f"{name}: " + rltr.one_line(message), file=sys.stderr)
    return 2
