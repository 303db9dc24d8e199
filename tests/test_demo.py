from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from typing import Any, Self

import gymnasium
import pytest
import torch
from tensordict import TensorDictBase

from aioinfer import InferenceServer, demo

# What is started, then interrupted: the demo, and after it a line that tells what it left behind.
_PROGRAM = """
import argparse, os, sys, threading
if os.isatty(0):  # the terminal's Ctrl-C reaches its own session only
    import fcntl, termios
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from aioinfer import demo
early = sorted({"gymnasium", "rich"} & set(sys.modules))
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
threads = [t.name for t in threading.enumerate() if t is not threading.main_thread()]
print(f"left behind: {early} {threads} {open_envs}", flush=True)
sys.exit(status)
"""


def _run(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    demo.add_arguments(parser)
    return demo.run(parser.parse_args([*arguments]))


class _Env:
    """Stands in for CartPole: the episode never ends, and ``at_step`` is called before each step."""

    def __init__(self, at_step: Any) -> None:
        self._at_step = at_step

    def reset(self, *, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        return torch.zeros(4).numpy(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self._at_step()
        return torch.zeros(4).numpy(), 1.0, False, False, {}

    def close(self) -> None:
        pass


class _RecordedServer(InferenceServer):
    made: list[InferenceServer]

    async def __aenter__(self) -> Self:
        self.made.append(self)
        return await super().__aenter__()


@pytest.fixture(autouse=True)
def _no_thread_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    for thread in set(threading.enumerate()) - before:
        thread.join(5)  # the server's thread may have its last few instructions before it
        assert not thread.is_alive()


@pytest.mark.parametrize(("envs", "threads"), [(4, 2), (3, 0), (0, 3)])
def test_a_short_run_ends_with_a_summary_and_status_0(
    capsys: pytest.CaptureFixture[str], envs: int, threads: int
) -> None:
    torch_threads = torch.get_num_threads()

    assert _run("--seconds", "0.3", "--envs", str(envs), "--threads", str(threads), "--plain") == 0

    output = capsys.readouterr().out
    assert f"{envs} tasks and {threads} threads" in output
    summary = dict(line.strip().split("  ", 1) for line in output.partition("summary of")[2].splitlines()[1:])
    assert list(summary) == [
        "frames/s",
        "tasks",
        "threads",
        "batch size",
        "queue wait",
        "forward",
        "episodes",
        "requests",
    ]
    assert (summary["tasks"].strip() != "0") == (envs > 0)
    assert (summary["threads"].strip() != "0") == (threads > 0)
    assert "0 failed, 0 cancelled, 0 rejected" in summary["requests"]
    assert torch.get_num_threads() == torch_threads


@pytest.mark.parametrize("model", ["tiny", "big"])
def test_each_model_plays(capsys: pytest.CaptureFixture[str], model: str) -> None:
    assert _run("--seconds", "0.1", "--envs", "2", "--threads", "1", "--model", model) == 0

    assert f"model {model}" in capsys.readouterr().out


def test_environments_are_closed_at_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    made, closed, make = [], [], gymnasium.make

    def counted(name: str) -> Any:
        env = make(name)
        made.append(env)
        env.close = lambda: closed.append(env)  # type: ignore[method-assign]
        return env

    monkeypatch.setattr(gymnasium, "make", counted)

    assert _run("--seconds", "0.1", "--envs", "2", "--threads", "2") == 0
    assert len(made) == 4
    assert set(map(id, made)) == set(map(id, closed))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--seconds", "-1"], "above 0, got '-1'"),
        (["--seconds", "0"], "above 0, got '0'"),
        (["--seconds", "soon"], "above 0, got 'soon'"),
        (["--seconds", "inf"], "above 0, got 'inf'"),
        (["--envs", "-3"], "at least 0, got '-3'"),
        (["--threads", "2.5"], "at least 0, got '2.5'"),
        (["--envs", "0", "--threads", "0"], "must be at least 1"),
        (["--model", "huge"], "invalid choice: 'huge'"),
    ],
)
def test_bad_values_are_refused_with_a_message(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        _run(*arguments)

    assert message in capsys.readouterr().err


@pytest.mark.parametrize("module", ["gymnasium", "rich"])
def test_without_the_extra_one_line_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], module: str
) -> None:
    monkeypatch.setitem(sys.modules, module, None)

    assert _run() == 1

    assert capsys.readouterr() == ("", f'the demo needs {module}: pip install "aioinfer[demo]"\n')


@pytest.mark.parametrize(("envs", "threads"), [("2", "0"), ("0", "2")])
def test_a_worker_that_raises_ends_the_demo_with_its_error(
    monkeypatch: pytest.MonkeyPatch, envs: str, threads: str
) -> None:
    def fall() -> None:
        raise ArithmeticError("the pole broke")

    monkeypatch.setattr(gymnasium, "make", lambda name: _Env(fall))

    with pytest.raises(ArithmeticError, match="the pole broke"):
        _run("--envs", envs, "--threads", threads)


def test_a_model_that_raises_ends_the_demo_with_its_error(monkeypatch: pytest.MonkeyPatch) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        raise ArithmeticError("no policy")

    monkeypatch.setattr(demo, "make_policy", lambda name: model)

    with pytest.raises(ArithmeticError, match="no policy"):
        _run("--envs", "2", "--threads", "2")


def test_a_server_that_closes_ends_the_workers_quietly_and_the_demo_with_status_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _RecordedServer.made = []
    monkeypatch.setattr(demo, "InferenceServer", _RecordedServer)
    monkeypatch.setattr(gymnasium, "make", lambda name: _Env(lambda: _RecordedServer.made[0].shutdown(0)))

    assert _run("--envs", "2", "--threads", "2") == 1

    output, errors = capsys.readouterr()
    assert "summary of" in output
    assert errors.startswith("the server closed early: ")
    assert errors.count("\n") == 1


def test_ctrl_c_ends_it_cleanly_on_a_pipe() -> None:
    with _start("--plain", stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout is not None
        while b"frames/s" not in process.stdout.readline():
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read().decode()

    assert process.returncode == 130
    assert "summary of" in rest
    assert "0 failed, 0 cancelled, 0 rejected\nleft behind: [] [] []" in rest
    assert "Traceback" not in rest


def test_ctrl_c_ends_the_live_view_cleanly_on_a_terminal() -> None:
    keyboard, terminal = os.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    with _start(stdin=terminal, stdout=terminal, stderr=terminal, start_new_session=True) as process:
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
    assert "0 failed, 0 cancelled, 0 rejected\r\nleft behind: [] [] []" in after
    assert "Traceback" not in screen


def _start(*arguments: str, **streams: Any) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", _PROGRAM, "--envs", "4", "--threads", "2", "--seconds", "30", *arguments]
    return subprocess.Popen(
        command, env={**os.environ, "TERM": "xterm-256color", "PYTHONIOENCODING": "utf-8"}, **streams
    )


def _until_hang_up(keyboard: int) -> Iterator[str]:
    while True:
        try:
            chunk = os.read(keyboard, 4096)
        except OSError:  # how Linux says that nobody has the terminal open any more
            return
        if not chunk:
            return
        yield chunk.decode(errors="replace")
