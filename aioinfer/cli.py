"""The command ``aioinfer``: a demo on real environments, and the benchmark."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from aioinfer import bench, demo

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="aioinfer", description="One PyTorch policy, served to many callers at once.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (("demo", demo), ("bench", bench)):
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    status: int = options.run(options)
    return status
