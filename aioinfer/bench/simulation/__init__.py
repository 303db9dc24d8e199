"""Simulate rules for batches in virtual time: latency and throughput on many traces and costs."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

__all__ = ["add_arguments", "run"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the simulation's options to the parser of its command."""
    parser.add_argument(
        "--only", type=re.compile, default=re.compile(""), metavar="PATTERN", help="the cases whose names match alone"
    )
    parser.add_argument("--processes", type=int, help="how many at once (one per core)")
    parser.add_argument("--markdown", type=Path, metavar="PAGE", help="write the table into this page")
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw some of the cases, as SVG")


def run(options: argparse.Namespace) -> int:
    """Simulate, print the table; return 1 if a bar is missed."""
    from aioinfer.bench.simulation import report
    from aioinfer.bench.simulation.cases import CASES, DRAWN
    from aioinfer.bench.simulation.comparison import compare_all, ours
    from aioinfer.bench.simulation.plot import draw

    names = [case.name for case in CASES if options.only.search(case.name)]
    print(report.HEADER)
    comparisons = []
    for comparison in compare_all(names, {"ours": ours}, processes=options.processes):
        comparisons.append(comparison)
        print(report.line(comparison), flush=True)
    print(report.summary(comparisons))
    if options.markdown is not None:
        page = options.markdown.read_text(encoding="utf-8")
        options.markdown.write_text(report.update_page(page, comparisons), encoding="utf-8")
    if options.plot is not None:
        drawn = [comparison for comparison in comparisons if comparison.case in DRAWN]
        options.plot.write_text(draw(drawn), encoding="utf-8")
    return 0 if all(comparison.as_good_as_simple("ours") for comparison in comparisons) else 1
