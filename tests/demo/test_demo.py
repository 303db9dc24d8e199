"""The command `aioinfer demo`: how it ends, and what it leaves behind."""

from __future__ import annotations

import argparse
import asyncio
import multiprocessing
import os
import signal
import subprocess
import sys
import termios
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import gymnasium
import pytest
import torch

from aioinfer import InferenceServer, demo
from aioinfer.demo import learning_curve, session
from aioinfer.demo.metrics import Metrics
from aioinfer.demo.policy import Actor, make_policy
from aioinfer.demo.views import View
from aioinfer.errors import CollectorError
from tests.demo.cartpole import ScriptedEnv
from tests.limits import IMPORTS

# What is started, then interrupted: the demo, and after it a line that tells what it left behind.
_PROGRAM = """
import argparse, multiprocessing, os, sys, threading, time
if os.isatty(0):  # the terminal's Ctrl-C reaches its own session only
    import fcntl, termios
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from aioinfer import demo
early = sorted({"gymnasium", "matplotlib", "rich"} & set(sys.modules))
import gymnasium
open_envs, make = [], gymnasium.make
def counted(name):
    env = make(name)
    open_envs.append(env)
    env.close = lambda: open_envs.remove(env)
    return env
gymnasium.make = counted
parser = argparse.ArgumentParser()
demo.add_arguments(parser)
status = demo.run(parser.parse_args())
deadline = time.monotonic() + 60
while (threads := [t.name for t in threading.enumerate() if t is not threading.main_thread()]) and (
    time.monotonic() < deadline
):
    time.sleep(0.01)  # one that has done its work takes a moment to be gone
print(f"left behind: {early} {threads} {multiprocessing.active_children()} {open_envs}", flush=True)
sys.exit(status)
"""


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([*arguments]))


class _IdleTrainer:
    """Stands in for a trainer that never asks for a batch."""

    def __init__(self, scheme: Any, seed: int) -> None:
        pass

    def offer(self, batch: Any) -> None:
        pass

    async def feed(self, published: Any) -> None:
        await asyncio.Event().wait()

    def close(self) -> None:
        pass


class _RecordedServer(InferenceServer):
    made: list[InferenceServer]

    async def __aenter__(self) -> Self:
        self.made.append(self)
        return await super().__aenter__()


# -- the command ---------------------------------------------------------------------------------------


@pytest.mark.usefixtures("spawned_in_a_moment")
def test_a_run_that_reaches_the_goal_leaves_trained_weights_and_a_picture_and_ends_with_status_0(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(learning_curve, "GOAL", 40.0)  # twice what an untrained policy gets
    torch_threads = torch.get_num_threads()

    assert _run("--plain", "--seed", "3", "--out", str(tmp_path / "new" / "results")) == 0

    output = capsys.readouterr().out
    summary = dict(line.strip().split("  ", 1) for line in output.partition("summary of")[2].splitlines()[1:6])
    assert list(summary) == ["episode return", "frames/s", "policy version", "weights' age", "batch size"]
    assert int(summary["policy version"]) > 0
    picture, weights = tmp_path / "new" / "results" / "learning_curve.png", tmp_path / "new" / "results" / "policy.pt"
    assert f"learning curve: {picture}\nweights: {weights}\nlearned in " in output
    assert picture.read_bytes().startswith(b"\x89PNG")
    torch.manual_seed(3)
    untrained = make_policy(Actor())
    trained = torch.load(weights)
    assert all(not torch.equal(trained[name], tensor) for name, tensor in untrained.state_dict().items())
    untrained.load_state_dict(trained)
    assert multiprocessing.active_children() == []
    assert torch.get_num_threads() == torch_threads


@pytest.mark.usefixtures("spawned_in_a_moment")
def test_a_run_that_does_not_learn_says_so_and_ends_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    made, closed, make = [], [], gymnasium.make

    def counted(name: str) -> Any:
        env = make(name)
        made.append(env)
        env.close = lambda: closed.append(env)  # type: ignore[method-assign]
        return env

    monkeypatch.setattr(gymnasium, "make", counted)

    assert _run("--seconds", "0.3", "--out", str(tmp_path)) == 1

    assert capsys.readouterr().err.startswith("not learned in 0.")
    assert {path.name for path in tmp_path.iterdir()} == {"learning_curve.png", "policy.pt"}
    assert len(made) == 32
    assert set(map(id, made)) == set(map(id, closed))
    assert multiprocessing.active_children() == []


@pytest.mark.usefixtures("spawned_in_a_moment")
def test_a_trainer_that_dies_ends_the_demo_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    class KillingView:
        interval = 0.01
        killed = False

        def show(self, metrics: Metrics) -> None:
            if not self.killed:  # once: to look for children takes the exit status from another thread that waits
                for child in multiprocessing.active_children():
                    child.kill()
                    self.killed = True

    @contextmanager
    def killing_view(title: str) -> Iterator[View]:
        yield KillingView()

    monkeypatch.setattr(session, "plain_view", killing_view)

    assert _run("--plain", "--out", str(tmp_path)) == 1

    errors = capsys.readouterr().err.splitlines()
    assert errors[0] == "the trainer died with exit code -9"
    assert errors[1].startswith("not learned in ")
    assert len(errors) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "-1"], "above 0, got '-1'"),
        (["--seconds", "0"], "above 0, got '0'"),
        (["--seconds", "soon"], "above 0, got 'soon'"),
        (["--seconds", "inf"], "above 0, got 'inf'"),
        (["--seed", "-3"], "from 0 to 4294967295, got '-3'"),
        (["--seed", "2.5"], "from 0 to 4294967295, got '2.5'"),
        (["--seed", "4294967296"], "from 0 to 4294967295, got '4294967296'"),
    ],
)
def test_bad_values_are_refused_with_a_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _run(*arguments)

    assert message in capsys.readouterr().err


def test_without_a_place_for_the_results_the_demo_does_not_begin(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()

    assert _run("--out", str(tmp_path / "file")) == 1

    assert capsys.readouterr() == ("", f"--out {tmp_path / 'file'}: File exists\n")


@pytest.mark.parametrize("module", ["gymnasium", "matplotlib", "rich"])
def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    assert _run() == 1

    assert capsys.readouterr() == ("", f'the demo needs {module}: pip install "aioinfer[demo]"\n')


def test_an_environment_that_raises_ends_the_demo_and_its_error_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fall(step: int) -> tuple[bool, bool]:
        raise ArithmeticError("the pole broke")

    monkeypatch.setattr(session, "TrainerProcess", _IdleTrainer)
    monkeypatch.setattr(gymnasium, "make", lambda name: ScriptedEnv(fall))

    with pytest.raises(CollectorError, match="the pole broke") as raised:
        _run("--out", str(tmp_path))

    assert isinstance(raised.value.__cause__, ArithmeticError)


def test_a_model_that_raises_ends_the_demo_with_its_error(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    class Broken(Actor):
        def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            raise ArithmeticError("no policy")

    monkeypatch.setattr(session, "TrainerProcess", _IdleTrainer)
    monkeypatch.setattr(session, "Actor", Broken)

    with pytest.raises(ArithmeticError, match="no policy"):
        _run("--out", str(tmp_path))


def test_a_server_that_closes_ends_the_demo_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def close(step: int) -> tuple[bool, bool]:
        _RecordedServer.made[0].shutdown(0)
        return False, False

    _RecordedServer.made = []
    monkeypatch.setattr(session, "TrainerProcess", _IdleTrainer)
    monkeypatch.setattr(session, "InferenceServer", _RecordedServer)
    monkeypatch.setattr(gymnasium, "make", lambda name: ScriptedEnv(close))

    assert _run("--out", str(tmp_path)) == 1

    output, errors = capsys.readouterr()
    assert "summary of" in output
    assert errors.startswith("the server closed early: ")
    assert errors.count("\n") == 2


# -- its end, seen from outside ------------------------------------------------------------------------


def test_ctrl_c_ends_it_cleanly_on_a_pipe(tmp_path: Path) -> None:
    with _start("--plain", "--out", str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        _read_until(process, b"frames/s")
        process.send_signal(signal.SIGINT)
        rest = _read_until_all_processes_ended(process)

    assert process.returncode == 130
    assert "summary of" in rest
    assert rest.endswith("left behind: [] [] [] []\n")
    assert "Traceback" not in rest


@pytest.mark.stress
def test_ctrl_c_ends_the_live_view_cleanly_on_a_terminal(tmp_path: Path) -> None:
    keyboard, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with _start(
        "--out", str(tmp_path), stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True
    ) as process:
        os.close(terminal)
        screen = ""
        while "Ctrl-C ends it" not in screen:
            screen += os.read(keyboard, 4096).decode(errors="replace")
        os.write(keyboard, b"\x03")
        screen = "".join(_until_hang_up(keyboard))
    os.close(keyboard)

    assert process.returncode == 130
    _, cursor_is_back, after = screen.rpartition("\x1b[?25h")
    assert cursor_is_back
    assert "summary of" in after
    assert after.endswith("left behind: [] [] [] []\r\n")
    assert "Traceback" not in screen


def test_the_trainer_ends_by_itself_when_the_demo_is_killed(tmp_path: Path) -> None:
    with _start("--plain", "--out", str(tmp_path), stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        _read_until(process, b" ms)")  # weights have come
        process.kill()
        rest = _read_until_all_processes_ended(process)

    assert process.returncode == -9
    assert "Traceback" not in rest


def _start(*arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _PROGRAM, "--seconds", str(IMPORTS), *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}, **streams
    )


def _read_until(process: subprocess.Popen[bytes], part: bytes) -> None:
    assert process.stdout is not None
    while part not in (line := process.stdout.readline()):
        assert line, "it ended early"


def _read_until_all_processes_ended(process: subprocess.Popen[bytes]) -> str:
    # The trainer has inherited the pipe, so it is at its end only when the trainer is.
    assert process.stdout is not None
    return process.stdout.read().decode()


def _until_hang_up(keyboard: int) -> Iterator[str]:
    while True:
        try:
            chunk = os.read(keyboard, 4096)
        except OSError:  # how Linux says that nobody has the terminal open any more
            return
        if not chunk:
            return
        yield chunk.decode(errors="replace")
