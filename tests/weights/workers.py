"""Trainers and workers in one process, for the tests of the schemes."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import pytest
from torch import nn

from aioinfer import WeightSyncError
from aioinfer.weight_sync import (
    MultiProcessWeightSyncScheme,
    SharedMemWeightSyncScheme,
)
from tests.limits import HANG
from tests.weight_models import SCHEMES

Scheme = MultiProcessWeightSyncScheme | SharedMemWeightSyncScheme


def linear(value: float) -> nn.Linear:
    module = nn.Linear(2, 2, bias=False)
    nn.init.constant_(module.weight, value)
    return module


def value_of(module: nn.Module) -> float:
    return float(next(module.parameters()).detach().flatten()[0])


def receiver(scheme: Scheme, module: nn.Module | None) -> Scheme:
    """The first worker, which has connected, and applies what comes when it is told to."""
    own = scheme.for_worker(0)
    own.init_on_receiver(model_id="policy", model=module)
    own.connect()
    return own


@contextmanager
def following(scheme: Scheme, worker: int, module: nn.Module | None) -> Iterator[Scheme]:
    """A worker in a thread that applies what comes."""
    end = threading.Event()
    own = scheme.for_worker(worker)
    own.init_on_receiver(model_id="policy", model=module)

    def follow() -> None:
        step: Callable[[], Any] = own.connect
        while not end.is_set():
            try:
                step()
            except WeightSyncError:
                pass
            step = partial(own.receive, 0.02)

    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(follow)
        try:
            yield own
        finally:
            end.set()
            running.result(HANG)
            own.shutdown()


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Iterator[Scheme]:
    made = request.param(timeout=HANG)
    yield made
    made.shutdown()
