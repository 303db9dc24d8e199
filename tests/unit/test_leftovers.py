"""What the tests look for when a program has ended."""

from __future__ import annotations

import secrets
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.leftovers import assert_no_memory_stays, go_on
from tests.programs import running

_MEMORY = Path("/dev/shm")
pytestmark = pytest.mark.skipif(not (sys.platform == "linux" and _MEMORY.is_dir()), reason=f"needs {_MEMORY}")

PROGRAM = """
import mmap, multiprocessing, sys

def hold(path, line):
    with open(path, "xb+") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)  # outlives the descriptor
    line.send("mapped")
    line.recv()

if __name__ == "__main__":
    opened = open(sys.argv[1], "xb")
    line, other = multiprocessing.Pipe()
    child = multiprocessing.get_context("fork").Process(target=hold, args=(sys.argv[2], other))
    child.start()
    line.recv()
    print("ready", flush=True)
    sys.stdin.readline()
    line.send("end")
    child.join()
"""


@pytest.fixture
def names() -> Iterator[list[Path]]:
    made = [_MEMORY / f"aioinfer-test-{secrets.token_hex(8)}" for _ in range(3)]
    yield made
    for path in made:
        path.unlink(missing_ok=True)


def test_memory_that_a_program_or_its_child_leaves_is_found_and_no_one_elses(names: list[Path], tmp_path: Path) -> None:
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    names[2].touch()
    with running(program, *map(str, names[:2])) as process:
        assert process.stdout.readline() == "ready\n"
        found = go_on(process)
        assert process.wait() == 0
    assert found == set(names[:2])
    assert all(path.exists() for path in found)
    for path in found:
        path.unlink()
    assert_no_memory_stays(found)
