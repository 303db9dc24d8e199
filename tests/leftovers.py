"""What programs and servers leave behind."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from aioinfer.testing import eventually
from tests.programs import Program

_DESCRIPTORS = "/proc/self/fd"

needs_descriptors = pytest.mark.skipif(not os.path.isdir(_DESCRIPTORS), reason=f"needs {_DESCRIPTORS}")


def is_there(pid: int) -> bool:
    """Whether a process, or with a negative number one of a group, is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def shared_memory_of(pid: int) -> set[Path]:
    """The files of shared memory that a process and its descendants have mapped or open now, and that have a name.

    Nobody else's: other programs of the machine make and remove such files as they like.
    """
    found: set[Path] = set()
    with suppress(OSError):  # it has ended meanwhile; or there is no /proc
        for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
            found.update(_named_memory(line.split(maxsplit=5)[-1]))
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                found.update(_named_memory(os.readlink(descriptor)))
        for task in Path(f"/proc/{pid}/task").iterdir():
            for child in (task / "children").read_text().split():
                found |= shared_memory_of(int(child))
    return found


def _named_memory(path: str) -> Iterator[Path]:
    if path.startswith("/dev/shm/") and not path.endswith(" (deleted)"):
        yield Path(path)


def go_on(process: Program) -> set[Path]:
    """Let a program go on that waits for a line; return the :func:`shared_memory_of` it before that."""
    found = shared_memory_of(process.pid)
    process.stdin.write("go on\n")
    process.stdin.flush()
    return found


def assert_no_memory_stays(found: set[Path]) -> None:
    """Wait until none of these files is there."""
    eventually(lambda: not any(path.exists() for path in found))


def assert_no_descriptor_stays(cycle: Callable[[], None], times: int) -> None:
    """Run ``cycle`` so many times, after a first one which may leave what later ones use."""
    cycle()
    gc.collect()
    before = len(os.listdir(_DESCRIPTORS))
    for _ in range(times):
        cycle()
    gc.collect()
    eventually(lambda: len(os.listdir(_DESCRIPTORS)) <= before)
