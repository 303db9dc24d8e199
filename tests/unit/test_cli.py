"""The command ``aioinfer``: what it loads, and how it ends."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from aioinfer.interrupts import ending_at_interrupt
from tests.limits import HANG

# Stands in for torch: it is there as soon as it is being imported, and takes no notice of a KeyboardInterrupt.
_SLOW_TORCH = """
import time
print("importing", flush=True)
try:
    time.sleep(50)
except BaseException as error:
    raise ImportError("half of it is there") from error
"""


@contextmanager
def _aioinfer(*arguments: str, stdout: int = subprocess.PIPE, path: str = "") -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-m", "aioinfer", *arguments],
        env={**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": ""},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.mark.parametrize(
    "arguments", [["--help"], ["serve", "--help"], ["demo", "--help"], ["bench", "--help"]], ids=" ".join
)
def test_help_is_shown_without_importing_torch(arguments: list[str]) -> None:
    program = (
        "import sys; from aioinfer.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit as end: print(end.code, {'torch', 'tensordict', 'numpy', 'uvicorn'} & sys.modules.keys())"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments], capture_output=True, text=True, timeout=HANG, check=True
    )
    assert done.stdout.startswith("usage: aioinfer")
    assert done.stdout.endswith("\n0 set()\n")


def test_help_for_nobody_ends_quietly() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    with _aioinfer("--help", stdout=writer) as process:
        os.close(writer)
        assert process.communicate(timeout=HANG)[1] == ""
    assert process.returncode == 141


@pytest.mark.stress
def test_a_demo_whose_output_nobody_reads_any_more_ends_quietly(tmp_path: Path) -> None:
    with _aioinfer("demo", "--plain", "--seconds", "40", "--out", str(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline().startswith("CartPole")
        process.stdout.close()
        assert process.stderr.read() == ""
        assert process.wait(HANG) == 141


def test_ctrl_c_while_torch_is_imported_ends_the_command_with_status_130(tmp_path: Path) -> None:
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(_SLOW_TORCH)
    with _aioinfer("demo", "--out", str(tmp_path), path=str(tmp_path)) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "importing\n"
        process.send_signal(signal.SIGINT)
        assert process.communicate(timeout=HANG) == ("", "")
    assert process.returncode == 130


def test_a_program_that_ignores_ctrl_c_goes_on_ignoring_it() -> None:
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with ending_at_interrupt():
            os.kill(os.getpid(), signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, before)
