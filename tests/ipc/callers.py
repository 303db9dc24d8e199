"""Callers that live in another process, for the checks of the contract: what they do is said over a pipe."""

from __future__ import annotations

import asyncio
import gc
import os
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from itertools import count
from multiprocessing.connection import Connection
from typing import Any

from anyio.from_thread import start_blocking_portal
from tensordict import TensorDictBase

from aioinfer import InferenceClient, InferenceServer
from aioinfer.interaction_type import INHERIT, Mode, caller_mode, requests_carry
from aioinfer.testing import Callers
from tests.limits import HANG
from tests.process_workers import Child


class Worker(Child):
    """A process that holds clients and calls them as it is told, many at a time.

    Args:
        method: how it is started.
    """

    def __init__(self, method: str) -> None:
        self.opened = 0
        """How many descriptors the process had when it was started."""
        self._numbers = count()
        self._replies: dict[int, Future[Any]] = {}
        self._lock = threading.Lock()  # guards the line
        super().__init__(method, drive)
        self._reader = threading.Thread(target=self._read, name="replies-of-worker")
        self._reader.start()

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self._reader.join()
        super().__exit__()

    def ask(self, order: str, *arguments: Any) -> Future[Any]:
        """Say what to do; the future tells what comes of it."""
        number = next(self._numbers)
        future = self._replies[number] = Future()
        data = pickle.dumps((number, order, *arguments))
        with self._lock:
            self.line.send_bytes(data)
        return future

    def adopt(self, client: Any) -> int:
        """Hand a client over, and return the number by which it is known there."""
        return int(self.ask("adopt", client).result(HANG))

    def call(
        self, client: int, td: Any, timeout: float | None = None, *, wait: bool = False, mode: Mode = INHERIT
    ) -> Future[TensorDictBase]:
        """Let a client call."""
        return self.ask("call", client, td, timeout, wait, mode)

    def _read(self) -> None:
        while True:
            try:
                number, outcome, error, cause = pickle.loads(self.line.recv_bytes())
            except (EOFError, OSError):  # it ended
                break
            future = self._replies.pop(number)
            if error is None:
                future.set_result(outcome)
            else:
                error.__cause__ = cause
                future.set_exception(error)
        for future in self._replies.values():
            future.set_exception(AssertionError("the worker is gone"))


class _CallersElsewhere(Callers):
    def __init__(self, worker: Worker, server: InferenceServer) -> None:
        super().__init__(server)
        self._worker = worker

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self._worker.ask("forget").result(HANG)

    def _start(
        self, client: Any, td: Any, timeout: float | None, wait: bool, around: AbstractContextManager[Any]
    ) -> Future[TensorDictBase]:
        mode: Mode = INHERIT
        if not isinstance(around, nullcontext):
            with around:
                mode = caller_mode()
        return self._worker.call(client, td, timeout, wait=wait, mode=mode)

    def submit(self, index: int, td: Any) -> Callable[[], None]:
        submitted = self._worker.ask("submit", self.client(index), td).result(HANG)
        return lambda: self._worker.ask("cancel", submitted).result(HANG)


class BlockingElsewhere(_CallersElsewhere):
    """Threads of another process."""

    def _make_client(self) -> int:
        return self._worker.adopt(self._server.client())


class AwaitingElsewhere(_CallersElsewhere):
    """Tasks of another process."""

    def _make_client(self) -> int:
        return self._worker.adopt(self._server.async_client())


# -- a worker that makes the calls of tests ----------------------------------------------------------------


def drive(line: Connection[Any, Any]) -> None:
    """Do what a :class:`Worker` of another process says, until it hangs up."""
    with ThreadPoolExecutor(64) as threads, start_blocking_portal() as portal:
        threads.submit(int).result()
        driver = _Driver(line, threads, portal)
        while (message := pickle.loads(line.recv_bytes())) is not None:
            driver.obey(*message)


class _Driver:
    def __init__(self, line: Connection[Any, Any], threads: ThreadPoolExecutor, portal: Any) -> None:
        self._line = line
        self._threads = threads
        self._portal = portal
        self._lock = threading.Lock()  # guards the line
        self._clients: dict[int, Any] = {}
        self._submitted: dict[int, Any] = {}

    def obey(self, number: int, order: str, *arguments: Any) -> None:
        """Do as told; what comes of it is reported under ``number``."""
        if order == "call":
            self._call(*arguments).add_done_callback(lambda future: self._report_future(number, future))
            return
        try:
            self._report(number, getattr(self, f"_{order}")(number, *arguments), None)
        except Exception as error:
            self._report(number, None, error)

    def _report_future(self, number: int, future: Future[Any]) -> None:
        error = future.exception()
        self._report(number, None if error else future.result(), error)

    def _report(self, number: int, outcome: Any, error: BaseException | None) -> None:
        cause = None if error is None else error.__cause__  # which pickling an error leaves out
        data = pickle.dumps((number, outcome, error, cause))
        with self._lock:
            self._line.send_bytes(data)

    def _adopt(self, number: int, client: Any) -> int:
        self._clients[number] = client
        return number

    def _call(self, client: int, td: Any, timeout: float | None, wait: bool, mode: Mode) -> Future[Any]:
        target = self._clients[client]

        def call() -> Any:
            with nullcontext() if mode is INHERIT else requests_carry(mode):
                return target(td, timeout, wait=wait)

        async def call_and_await() -> Any:
            async with asyncio.timeout(timeout):
                with nullcontext() if mode is INHERIT else requests_carry(mode):
                    return await target(td, wait=wait)

        if isinstance(target, InferenceClient):
            return self._threads.submit(call)
        future: Future[Any] = self._portal.start_task_soon(call_and_await)
        return future

    def _submit(self, number: int, client: int, td: Any) -> int:
        target = self._clients[client]

        async def submit() -> Any:
            return target.submit(td)

        self._submitted[number] = (
            target.submit(td) if isinstance(target, InferenceClient) else self._portal.call(submit)
        )
        return number

    def _cancel(self, _: int, submitted: int) -> None:
        future = self._submitted.pop(submitted)

        async def cancel() -> None:
            future.cancel()
            await asyncio.sleep(0)  # callbacks run in the next tick

        if isinstance(future, Future):
            future.cancel()
        else:
            self._portal.call(cancel)

    def _forget(self, _: int, client: int | None = None) -> None:
        if client is not None:
            del self._clients[client]
            return
        self._clients.clear()
        self._submitted.clear()

    def _descriptors(self, _: int) -> int:
        gc.collect()
        return len(os.listdir("/proc/self/fd"))

    def _seconds(self, _: int) -> float:
        return time.process_time()
