"""A model whose passes end when a test says so, one by one."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tensordict import TensorDictBase

from aioinfer.testing import double
from tests.limits import HANG


class Steps:
    """A model that stands still in every pass, until it is told to make one more."""

    def __init__(self) -> None:
        self.entered = threading.Semaphore(0)
        self.go = threading.Semaphore(0)

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        self.entered.release()
        assert self.go.acquire(timeout=HANG)
        return double(td)

    @contextmanager
    def closed(self) -> Iterator[None]:
        try:
            yield
        finally:
            self.go.release(100)
