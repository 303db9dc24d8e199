"""Hosts that stand in for those of environments. Workers import them from here."""

from __future__ import annotations

import ctypes
import mmap
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Stop(NamedTuple):
    """Ends a host."""


@dataclass(frozen=True)
class Config:
    """What the host of a worker gets: it calls the factories, and reports what these return."""

    factories: dict[int, Callable[[], Any]] = field(default_factory=dict)


class Host:
    """Does what messages say, which are a word and an argument."""

    def __init__(self, config: Config, report: Callable[[Any], None]) -> None:
        self.config = config
        self.report = report
        self.note = ""  # where it notes that it was told to end

    def make(self) -> None:
        assert threading.current_thread() is threading.main_thread()
        self.report(("made", {number: factory() for number, factory in self.config.factories.items()}))

    def handle(self, message: Any, descriptors: Sequence[int] = ()) -> None:
        if not isinstance(message, Stop):
            word, argument = message
            getattr(self, word)(argument, *descriptors)
        elif self.note:
            Path(self.note).write_text("told to end")

    def join(self, timeout: float | None) -> bool:
        return True

    def note_the_end(self, path: str) -> None:
        self.note = path
        self.report(("will note", path))

    def echo(self, argument: Any) -> None:
        self.report(("echo", argument))

    def send_what_does_not_arrive(self, _: Any) -> None:
        self.report(Homesick())

    def read(self, size: int, *descriptors: int) -> None:
        """Report what is in shared memory."""
        found = []
        for descriptor in descriptors:
            with mmap.mmap(descriptor, size) as memory:
                found.append(bytes(memory[:]))
            os.close(descriptor)
        self.report(("read", found))

    def say_how_it_is(self, _: Any) -> None:
        handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
        self.report(("is", (os.getpid(), *handlers, torch.get_num_threads())))

    def say_what_is_imported(self, names: Sequence[str]) -> None:
        self.report(("is imported", [name for name in names if name in sys.modules]))

    def have_a_child(self, _: Any) -> None:
        """Start a process, as an environment may."""
        child = multiprocessing.get_context("spawn").Process(target=os.getpid)
        child.start()
        child.join()
        self.report(("had a child", child.exitcode))

    def count_and(self, end: tuple[int, str, int]) -> None:
        """Report the numbers up to one, and then end in one way."""
        count, how, code = end
        for number in range(count):
            self.report(("number", number))
        if how == "exit":
            os._exit(code)
        elif how == "signal":
            os.kill(os.getpid(), code)
        elif how == "segfault":
            ctypes.string_at(0)
        elif how == "raise":
            raise ValueError("the host gives up")

    def hang(self, how: str) -> None:
        """Hold on, with or without the GIL."""
        self.report(("hanging", os.getpid()))
        if how == "with the GIL":
            ctypes.PyDLL(None).sleep(1000)
        else:
            time.sleep(1000)


class Raising(Host):
    """One that can't make its environments."""

    def make(self) -> None:
        raise LookupError("no environment of this name")


class Slow(Host):
    """One whose environments take for ever to be made, and that does not mind being told to end."""

    def make(self) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        self.report(("making", os.getpid()))
        time.sleep(1000)


class Homesick:
    """Unpickles only in the process that has pickled it."""

    def __reduce__(self) -> Any:
        return _come_home, (os.getpid(),)

    def __call__(self) -> None: ...


def _come_home(pid: int) -> Homesick:
    if pid != os.getpid():
        raise ImportError("this is not home")
    return Homesick()
