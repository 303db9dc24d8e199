"""Learn CartPole live: a trainer in another process learns from the batches of a collector of 32 environments."""

from __future__ import annotations

import argparse
import math
import sys
from importlib.util import find_spec
from pathlib import Path

from aioinfer.interrupts import INTERRUPTED, ending_at_interrupt

__all__ = ["add_arguments", "run"]

_EXTRA = ("gymnasium", "matplotlib", "rich")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``aioinfer demo``."""
    parser.add_argument(
        "--seconds", type=_seconds, default=90.0, help="how long it may take to learn (default: %(default)g)"
    )
    parser.add_argument(
        "--seed",
        type=_seed,
        default=0,
        help="of the weights, the actions and the environments (default: %(default)s); two runs with one seed still"
        " differ a little, since their processes don't run in step",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("aioinfer-demo"),
        metavar="DIRECTORY",
        help="where the learning curve and the weights go (default: %(default)s)",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="one line a second, no live view; the default where the output is no terminal",
    )


def _seconds(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 < seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds above 0, got {text!r}")
    return seconds


def _seed(text: str) -> int:
    seed = int(text) if text.isdecimal() else -1
    if not 0 <= seed < 2**32:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**32 - 1}, got {text!r}")
    return seed


def run(options: argparse.Namespace) -> int:
    """Run ``aioinfer demo``.

    Returns:
        The exit status: 0 when the goal is reached, 130 after Ctrl-C, and 1 where it was not reached in time, the
        trainer died, the server closed early, there is no place for the results, or the extra ``demo`` is missing.

    Raises:
        CollectorError: an environment failed; the error is its cause.
        Exception: the error of the model.
    """
    # Looked for, not imported: matplotlib is not needed before the end, and takes a while.
    missing = next((name for name in _EXTRA if find_spec(name) is None), None)
    if missing is not None:
        print(f'the demo needs {missing}: pip install "aioinfer[demo]"', file=sys.stderr)
        return 1
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        print(f"--out {options.out}: {error.strerror}", file=sys.stderr)
        return 1
    try:
        with ending_at_interrupt():
            from aioinfer.demo.session import learn  # imports torch
        return learn(options)
    except KeyboardInterrupt:  # before the first frame, or a second one while the first was obeyed
        return INTERRUPTED
