"""Reads the state of the server for those who watch it, without ever waiting long for it."""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

from aioinfer.errors import InferenceError
from aioinfer.process_server import ProcessInferenceServer
from aioinfer.server import InferenceServer
from aioinfer.stats import Health, ServerStats
from aioinfer.web.front import Front
from aioinfer.web.loop_lag import LoopLag

__all__ = ["Monitor", "Reading"]

_FRESH = 0.25  # seconds for which a reading serves everyone who asks: one costs milliseconds of the event loop
_PATIENCE = 1.0  # seconds that the server has to answer


class Reading(NamedTuple):
    """The state of the server at one moment.

    Attributes:
        stats: what it did; ``None`` where that can't be known, or it does not answer.
        health: how it is; ``None`` where that can't be known.
        answers: whether it answers; ``None`` where it can't be asked.
    """

    stats: ServerStats | None = None
    health: Health | None = None
    answers: bool | None = None


class Monitor:
    """What those see who watch: the app's own counts, and the latest reading of the server.

    Loop thread only, but for :meth:`latest`.

    Args:
        front: that is watched.

    Attributes:
        started_at: when the app was made, by ``time.time``.
        lag: of the event loop.
    """

    def __init__(self, front: Front) -> None:
        self.front = front
        self.started_at = time.time()
        self.lag = LoopLag()
        self._can_answer = isinstance(front.backend.server, InferenceServer | ProcessInferenceServer)
        self._latest = Reading()
        self._read_at = float("-inf")
        self._reading: asyncio.Task[Reading] | None = None
        self._asked: asyncio.Task[ServerStats | None] | None = None

    def trouble(self, reading: Reading) -> str:
        """Why the app is not ready; empty if it is."""
        if self.front.draining:
            return self.front.draining
        if reading.health is not None and not reading.health.ready:
            return reading.health.reason
        return "the server does not answer" if reading.answers is False else ""

    async def read(self) -> Reading:
        """Ask the server; a reading is shared by all who ask at about the same time."""
        self.lag.watch()
        if not self._is_fresh():
            await asyncio.shield(self._begin())  # others may wait for it
        return self._latest

    def latest(self) -> Reading:
        """The latest reading. Any thread.

        On a thread without an event loop it is a new one, and on one with an event loop too if that takes no waiting.
        """
        server = self.front.backend.server
        if self._is_fresh() or not isinstance(server, InferenceServer | ProcessInferenceServer):
            return self._latest
        if isinstance(server, InferenceServer) or not _has_loop():
            return _ask(server)
        self._begin()
        return self._latest

    def close(self) -> None:
        """Ask no more."""
        self.lag.close()
        for task in (self._reading, self._asked):
            if task is not None:
                task.cancel()

    def _is_fresh(self) -> bool:
        return time.monotonic() - self._read_at < _FRESH

    def _begin(self) -> asyncio.Task[Reading]:
        if self._reading is None or _is_over(self._reading):
            self._reading = asyncio.create_task(self._read())
        return self._reading

    async def _read(self) -> Reading:
        if self._can_answer:
            # A server that has not answered yet is not asked again.
            if self._asked is None or _is_over(self._asked):
                self._asked = asyncio.create_task(self._stats())
            health, _ = await asyncio.gather(self._health(), asyncio.wait([self._asked], timeout=_PATIENCE))
            stats = self._asked.result() if self._asked.done() else None
            self._latest = Reading(stats, health, stats is not None)
        self._read_at = time.monotonic()
        return self._latest

    async def _stats(self) -> ServerStats | None:
        try:
            return await self.front.backend.stats()
        except InferenceError:
            return None

    async def _health(self) -> Health | None:
        try:
            return await self.front.backend.health()
        except InferenceError:
            return None


def _is_over(task: asyncio.Task[Any]) -> bool:
    return task.done() or task.get_loop() is not asyncio.get_running_loop()


def _has_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _ask(server: InferenceServer | ProcessInferenceServer) -> Reading:
    """Ask a server, waiting for it on this thread, as long as it is healthy."""
    try:
        health = server.health()
        stats = server.stats() if health.alive and health.policy_version is not None else None
    except InferenceError:
        return Reading(answers=False)
    return Reading(stats, health, stats is not None)
