"""The process that starts the programs of the tests, see ``programs.py``. It has imported already what takes long.

A program is a fork of it, so what the interpreter does at its end is all there.
"""

from __future__ import annotations

import gc
import os
import signal
import socket
import sys
import types
import warnings

import torch

from tests.programs import NUMBER

__all__: list[str] = []


def next_program(orders: socket.socket) -> list[str]:
    """Wait for the order to run a program; return its arguments, in the process that is to become it."""
    watchers: list[int] = []
    while True:
        words, descriptors, _, _ = socket.recv_fds(orders, 1 << 16, 4)
        if not words:
            os._exit(0)
        while watchers and os.waitpid(watchers[0], os.WNOHANG)[0]:
            del watchers[0]
        if (child := os.fork()) == 0:
            orders.close()
            *streams, watcher = descriptors
            if (program := os.fork()) == 0:
                os.close(watcher)
                become(streams)
                return words.decode().split("\0")
            for stream in streams:
                os.close(stream)
            os.write(watcher, NUMBER.pack(program))
            _, status = os.waitpid(program, 0)
            os.write(watcher, NUMBER.pack(os.waitstatus_to_exitcode(status)))
            os._exit(0)
        watchers.append(child)
        for descriptor in descriptors:
            os.close(descriptor)


def become(streams: list[int]) -> None:
    """Be a process of a session of its own, with these streams."""
    os.setsid()
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)


if __name__ == "__main__":
    torch.set_num_threads(1)
    gc.freeze()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with socket.socket(fileno=int(sys.argv[1])) as line:
        action, *sys.argv = next_program(line)
    if action:
        sys.warnoptions.append(action)  # of processes that it spawns
        warnings.simplefilter(action)  # type: ignore[arg-type]
    # As Python itself begins a program.
    main = types.ModuleType("__main__")
    main.__file__ = sys.argv[0]
    sys.modules["__main__"] = main
    sys.path[0] = os.path.dirname(sys.argv[0])
    with open(sys.argv[0], encoding="utf-8") as source:
        code = compile(source.read(), sys.argv[0], "exec")
    exec(code, main.__dict__)
