"""The command ``aioinfer``: a server of a policy, a demo, the benchmark, and a simulation of rules for batches."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from aioinfer.interrupts import INTERRUPTED, end_at_interrupt, ending_at_interrupt

if TYPE_CHECKING:
    import argparse

__all__ = ["main"]

_OUTPUT_CLOSED = 128 + 13  # the exit status that a shell reports after SIGPIPE


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit status, which is 130 after Ctrl-C, and 141 where the output is closed.

    Meant to be a program's last call: Ctrl-C ends the process at once from then on.
    """
    try:
        with ending_at_interrupt():
            options = _parse(arguments)
        try:
            status: int = options.run(options)
        finally:
            end_at_interrupt()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        if not _output_is_closed():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes it once more
        return _OUTPUT_CLOSED
    return status


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    import argparse

    from aioinfer import bench, demo, serve
    from aioinfer.bench import simulation

    parser = argparse.ArgumentParser(prog="aioinfer", description="One PyTorch policy, served to many callers at once.")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, module in (("serve", serve), ("demo", demo), ("bench", bench), ("simulate", simulation)):
        summary = (module.__doc__ or "").splitlines()[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    try:
        return parser.parse_args(arguments)
    finally:
        sys.stdout.flush()  # the help; a closed output is noticed here


def _output_is_closed() -> bool:
    import select

    poll = select.poll()
    poll.register(sys.stdout, 0)  # errors are reported in any case
    return bool(poll.poll(0))
