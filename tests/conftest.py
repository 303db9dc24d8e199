from __future__ import annotations

import gc
import multiprocessing
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import torch

from tests.effort import efforts
from tests.limits import HANG

torch.set_num_threads(1)
# A loaded machine takes its time.
hypothesis.settings.register_profile(
    "any machine", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("any machine")
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # in the background of a shell, as would be what we start
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--stress-count", type=int, default=1, help="how often each test marked stress is run, each time anew at random"
    )
    parser.addoption("--screenshots", help="folder that tests marked browser write pictures of the documentation to")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "effort" in metafunc.fixturenames:
        metafunc.parametrize("effort", efforts(metafunc.config.getoption("--stress-count")))


@pytest.fixture(autouse=True)
def _no_thread_is_left() -> Iterator[None]:
    before = set(threading.enumerate())
    yield
    deadline = time.monotonic() + HANG
    while left := [thread for thread in threading.enumerate() if thread not in before]:
        assert time.monotonic() < deadline, f"the test left threads behind: {left}"
        time.sleep(0.001)


@pytest.fixture(autouse=True)
def _gradients_are_enabled() -> Iterator[None]:
    """What a signal handler raises as ``torch.no_grad`` is left keeps it from enabling them again."""
    yield
    torch.set_grad_enabled(True)


@pytest.fixture
def only_new_garbage() -> Iterator[None]:
    """A garbage collection looks at what the test has made, not at all of torch, which takes a sixth of a second."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def spawned_in_a_moment(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the package spawns comes from a fork server, for tests that do not look at how it is started."""
    get_context: Callable[[str | None], Any] = multiprocessing.get_context
    methods: dict[str | None, str] = {"spawn": "forkserver"}
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: get_context(methods.get(method, method)))


@pytest.fixture
def finalizers_may_be_interrupted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a signal handler raises inside a finalizer goes nowhere, and nobody is told who could be interrupted."""
    monkeypatch.setattr(sys, "unraisablehook", bool)
