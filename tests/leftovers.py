"""What programs and servers leave behind."""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aioinfer.testing import eventually

_ROOT = Path(__file__).parent.parent
_DESCRIPTORS = "/proc/self/fd"

needs_descriptors = pytest.mark.skipif(not os.path.isdir(_DESCRIPTORS), reason=f"needs {_DESCRIPTORS}")


@contextmanager
def running(program: Path, *arguments: str, stderr: int = subprocess.DEVNULL) -> Iterator[subprocess.Popen[str]]:
    """A program in a session of its own, that may import the tests; it is gone afterwards, but not what it started."""
    with subprocess.Popen(
        [sys.executable, str(program), *arguments],
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        stdout=subprocess.PIPE,
        stderr=stderr,
        start_new_session=True,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def is_there(pid: int) -> bool:
    """Whether a process, or with a negative number one of a group, is there."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def shared_memory() -> set[str]:
    """The names in shared memory; other programs of the machine may come and go."""
    return set(os.listdir("/dev/shm")) if Path("/dev/shm").is_dir() else set()


def assert_no_descriptor_stays(cycle: Callable[[], None], times: int) -> None:
    """Run ``cycle`` so many times, after a first one which may leave what later ones use."""
    cycle()
    gc.collect()
    before = len(os.listdir(_DESCRIPTORS))
    for _ in range(times):
        cycle()
    gc.collect()
    eventually(lambda: len(os.listdir(_DESCRIPTORS)) <= before)
