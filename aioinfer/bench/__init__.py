"""Measure aioinfer against torchrl's inference server, side by side."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

from aioinfer.bench.workloads import COLLATES, WORKLOADS

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmark's options to the parser of its command."""
    names = [workload.name for workload in WORKLOADS]
    parser.add_argument(
        "--only",
        action="append",
        choices=names,
        metavar="NAME",
        help=f"measure this workload alone; may be given several times. One of {', '.join(names)}",
    )
    parser.add_argument(
        "--repeats", type=_positive(int), default=5, help="measurements per system and workload (%(default)s)"
    )
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        default=1.5,
        help="length of one measurement, warm-up not counted (%(default)s)",
    )
    parser.add_argument(
        "--torchrl-collate",
        choices=COLLATES,
        default="default",
        help="how torchrl's server stacks requests: as it comes, with collate_fn=torch.stack, or both, each in "
        "turn (%(default)s)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="keep the raw figures of every repeat")
    parser.add_argument("--markdown", type=Path, metavar="FILE", help="write the table for the documentation")


def run(options: argparse.Namespace) -> int:
    """Measure, print the table, and write the files that were asked for.

    Returns:
        0, or 1 if a measurement crashed or hung. Times never decide.
    """
    from aioinfer.bench import report
    from aioinfer.bench.runner import Runner

    chosen = [workload for workload in WORKLOADS if not options.only or workload.name in options.only]
    about = report.describe_machine()
    results = report.Results(
        machine=about,
        seconds=options.seconds,
        repeats=options.repeats,
        torchrl_collate=options.torchrl_collate if about["torchrl"] else None,
    )
    runner = Runner(results)
    for number, workload in enumerate(chosen, 1):
        runner.measure(workload, f"[{number}/{len(chosen)}] {workload.name}")
    print(report.text(results))
    if options.json is not None:
        options.json.write_text(report.to_json(results))
    if options.markdown is not None:
        options.markdown.write_text(report.markdown(results))
    return 1 if results.crashes else 0


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if not 0 < value < math.inf:
            raise argparse.ArgumentTypeError(f"{text} is no number above 0")
        return value

    return parse
