"""The server behind the app: one way to ask, whatever kind of server or client it is."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, TypeAlias

import torch
from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, ClientMaker
from aioinfer.entries import check_entries, make_td
from aioinfer.errors import (
    ClientClosedError,
    DeadlineExceededError,
    InvalidRequestError,
    NoFreeSlotError,
    ServerNotRunningError,
)
from aioinfer.process_server import ProcessInferenceServer
from aioinfer.server import InferenceServer
from aioinfer.stats import Health, ServerStats

__all__ = ["Backend", "Deadline", "PendingReply"]

_KeyTree: TypeAlias = "dict[str, _KeyTree | None]"
"""Names of entries, and of those in them; ``None`` is all that there is."""


class PendingReply:
    """A request that is under way: the future of its reply, and why it was withdrawn, if it was.

    Loop thread only.

    Args:
        future: of the client.
        received_at: when the request had arrived, on the clock of the backend.
        client: that was asked.

    Attributes:
        deadline: if there is one.
    """

    __slots__ = ("client", "deadline", "error", "future", "received_at")

    def __init__(
        self, future: asyncio.Future[TensorDictBase], received_at: float, client: AsyncInferenceClient
    ) -> None:
        self.future = future
        self.received_at = received_at
        self.client = client
        self.error: Exception | None = None
        self.deadline: Deadline | None = None

    def withdraw(self, error: Exception) -> None:
        """End the request with an error, unless its reply is there; it is not computed if no batch has taken it."""
        if not self.future.done():
            self.error = error
            self.future.cancel()

    def withdraw_waiting(self, error: Exception) -> bool:
        """End the request with an error if it is certain that no batch has taken it; return whether it did."""
        try:
            withdrawn = self.client.withdraw(self.future)
        except ClientClosedError:
            return False
        if withdrawn:
            self.error = error
        return withdrawn

    def cancel(self) -> None:
        """Its caller is gone."""
        self.future.cancel()

    def waits(self) -> bool | None:
        """Whether no batch has taken the request yet; ``None`` if that is not known."""
        return False if self.future.done() else self.client.is_pending(self.future)

    def result(self) -> TensorDictBase:
        """The reply to a request that has ended, or raise the error."""
        if self.future.cancelled():
            raise self.error or ClientClosedError("the request was withdrawn")
        return self.future.result()

    def outcome(self) -> TensorDictBase | Exception:
        """The reply to a request that has ended, or its error."""
        try:
            return self.result()
        except Exception as error:
            return error

    async def reply(self) -> TensorDictBase:
        """Wait for the reply, or raise the error."""
        try:
            return await self.future
        except asyncio.CancelledError:
            if self.error is None:
                raise
            raise self.error from None


class Deadline:
    """Ends a request where no reply comes in time, or can come.

    A request that waits is given up where less time is left than the fastest of the latest forward passes took. It has
    waited for half of its time then, in which a server with nothing else to do has taken it: so a deadline that the
    latest passes did not meet is tried again.

    Args:
        pending: the request.
        seconds: from the arrival of the request.
        clock: of the time of arrival.
    """

    __slots__ = ("_clock", "_due", "_most_spared", "_pending", "_seconds", "_timer")

    def __init__(self, pending: PendingReply, seconds: float, clock: Callable[[], float]) -> None:
        self._pending = pending
        self._seconds = seconds
        self._clock = clock
        self._due = pending.received_at + seconds
        self._most_spared = (self._due - clock()) / 2
        self._timer: asyncio.TimerHandle | None = None
        self.look()

    def look(self) -> None:
        """End the request if it is time, or set the timer that calls this again."""
        pending = self._pending
        if pending.future.done():
            return
        left = self._due - self._clock()
        needed = min(self._least_seconds(), self._most_spared)
        if left <= 0:
            pending.withdraw(self._error())
        elif left > needed:
            self._wait(left - needed)
        elif not pending.withdraw_waiting(self._error()):
            self._wait(left)

    def _least_seconds(self) -> float:
        try:
            return self._pending.client.least_seconds
        except ClientClosedError:
            return 0.0

    def stop(self) -> None:
        """Look no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _wait(self, seconds: float) -> None:
        self.stop()
        self._timer = self._pending.future.get_loop().call_later(seconds, self.look)

    def _error(self) -> DeadlineExceededError:
        return DeadlineExceededError(f"no reply within {self._seconds:g} seconds of the request's arrival")


class Backend:
    """Asks a server, and knows what can be known of it.

    Clients that have a slot are asked by one request at a time; there are as many as there were requests at once.

    Loop thread only.

    Args:
        server: a server of this package, what :func:`aioinfer.connect` returns, or a client of one of them.
        in_keys: the entries of a message that make a request; others are left out. By default those that the model
            reads, where the server has the model; else all of them.
        deadline: seconds from the arrival of a request to its reply, if it names none; ``None`` is without end.
        clock: seconds, of the times at which requests arrive.
    """

    def __init__(
        self,
        server: ClientMaker | AsyncInferenceClient,
        *,
        in_keys: Sequence[str] | None = None,
        deadline: float | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        if not isinstance(server, ClientMaker | AsyncInferenceClient):
            raise TypeError(f"expected a server, or an AsyncInferenceClient, got {type(server).__qualname__}")
        if isinstance(in_keys, str):
            raise TypeError(f"in_keys must be a sequence of keys, got {in_keys!r}")
        if deadline is not None and not deadline > 0:
            raise ValueError(f"the deadline must be above 0 seconds, got {deadline}")
        self.server = server
        self.deadline = deadline
        self._clock = clock
        model_keys = getattr(getattr(server, "model", None), "in_keys", None)
        keys = in_keys or model_keys
        self._keys = _key_tree(keys) if keys else None
        self._local = server if isinstance(server, InferenceServer | ProcessInferenceServer) else None
        self._has_run = False
        self._made: set[AsyncInferenceClient] = set()
        self._free: list[AsyncInferenceClient] = []  # with a slot, and no request under way
        self._shared: AsyncInferenceClient | None = server if isinstance(server, AsyncInferenceClient) else None

    @property
    def in_keys(self) -> Collection[str] | None:
        """The first names of the entries that make a request; ``None`` if all do."""
        return None if self._keys is None else self._keys.keys()

    def submit(
        self,
        entries: Mapping[str, Any],
        received_at: float,
        *,
        deadline: float | None = None,
        defaults: Mapping[str, Any] | None = None,
    ) -> PendingReply:
        """Ask; returns at once. When the future of the request is done, :meth:`finish` is to be called.

        Args:
            entries: of one row, or of ``n`` rows where the server has a ``request_spec``.
            received_at: when the message with them had arrived, on the clock.
            deadline: seconds from then on; ``None`` takes that of the app, ``math.inf`` is without end.
            defaults: entries that the model gets where it reads them and ``entries`` lack them.

        Raises:
            InvalidRequestError: they make no request. What else the server refuses, the reply fails with.
            DeadlineExceededError: the deadline has passed.
            NoFreeSlotError: all slots of the server are taken.
            ServerNotRunningError: the server was not started, or has ended.
        """
        request = self.make_request(entries, defaults)
        seconds = self.deadline if deadline is None else deadline
        if seconds is not None and received_at + seconds <= self._clock():
            raise DeadlineExceededError(f"{seconds:g} seconds had passed before the request could be asked")
        client = self._shared
        if client is None:
            client = self._take_client()
        try:
            future = client.submit(request)
            if future.done() and not future.cancelled() and future.exception() is not None:
                self._check_runs()
        except BaseException:
            self._give_back(client)
            raise
        pending = PendingReply(future, received_at, client)
        if seconds is not None and seconds != math.inf:
            pending.deadline = Deadline(pending, seconds, self._clock)
        return pending

    def _check_runs(self) -> None:
        """Check whether a server of ours runs; one that has been started refuses requests itself when it has ended."""
        if self._local is not None and not self._local.is_alive:
            raise ServerNotRunningError("the server does not run")
        self._has_run = True

    def finish(self, pending: PendingReply) -> None:
        """Free what a request had, which has ended."""
        if pending.deadline is not None:
            pending.deadline.stop()
        client = pending.client
        if client in self._made and _found_no_slot(pending.future):
            self._made.discard(client)
            client.close()
        self._give_back(client)

    def make_request(
        self, entries: Mapping[str, Any], defaults: Mapping[str, Any] | None = None
    ) -> TensorDictBase | dict[str, Any]:
        """Choose what makes a request; see :meth:`submit`.

        Raises:
            InvalidRequestError: the entries make none.
            ServerNotRunningError: the server was not started.
        """
        if not self._has_run:
            self._check_runs()
        if type(entries) is not dict:
            if isinstance(entries, TensorDictBase):
                return entries
            if not isinstance(entries, Mapping):
                raise InvalidRequestError(f"a request is a map of entries, got {type(entries).__name__}")
        keys = self._keys
        chosen = dict(entries) if keys is None else _choose(entries, keys)
        if defaults and keys is not None:
            chosen |= {name: value for name, value in defaults.items() if name in keys and name not in chosen}
        if str not in map(type, chosen.values()):
            return chosen
        texts = {name: value for name, value in chosen.items() if type(value) is str}
        others = {name: value for name, value in chosen.items() if name not in texts}
        if others:
            check_entries(others)
        td = make_td(others, torch.Size([]))
        for name, text in texts.items():
            td.set_non_tensor(name, text)
        return td

    def client(self) -> AsyncInferenceClient:
        """A client of the server, which the caller closes, unless it is the server itself."""
        return self.server if isinstance(self.server, AsyncInferenceClient) else self.server.async_client()

    def _take_client(self) -> AsyncInferenceClient:
        """A client that may be asked now."""
        if self._free:
            return self._free.pop()
        client = self.client()
        self._made.add(client)
        if not client.has_slot:
            self._shared = client
        return client

    def _give_back(self, client: AsyncInferenceClient) -> None:
        if client is not self._shared and client in self._made:
            self._free.append(client)

    async def stats(self) -> ServerStats | None:
        """What the server did; ``None`` where that can't be known."""
        astats = getattr(self.server, "astats", None)
        return None if astats is None else await astats()

    async def health(self) -> Health | None:
        """How the server is; ``None`` where that can't be known."""
        ahealth = getattr(self.server, "ahealth", None)
        return None if ahealth is None else await ahealth()

    async def start(self) -> bool:
        """Start the server, unless it runs, or is not ours to start; whether it was started here."""
        if self._local is None or self._local.is_alive:
            return False
        await self._local.__aenter__()
        return True

    async def stop(self) -> None:
        """Shut the server down, after its last reply."""
        if self._local is not None:
            await self._local.aclose(timeout=None, drain=True)

    def close(self) -> None:
        """Close the clients that were made here; others are made if there are more requests."""
        made, self._made = self._made, set()
        self._free.clear()
        if self._shared is not self.server:
            self._shared = None
        for client in made:
            client.close()


def _found_no_slot(future: asyncio.Future[TensorDictBase]) -> bool:
    return future.done() and not future.cancelled() and isinstance(future.exception(), NoFreeSlotError)


def _key_tree(keys: Sequence[Any]) -> _KeyTree:
    tree: _KeyTree = {}
    for key in keys:
        *above, last = [key] if isinstance(key, str) else key
        branch: _KeyTree | None = tree
        for name in above:
            if branch is not None:
                branch = branch.setdefault(name, {})
        if branch is not None:  # else all that is there is chosen already
            branch[last] = None
    return tree


def _choose(entries: Mapping[str, Any], keys: _KeyTree) -> dict[str, Any]:
    """The entries that make a request."""
    chosen = {}
    for name, inner in keys.items():
        if name in entries:
            value = entries[name]
            chosen[name] = _choose(value, inner) if inner is not None and isinstance(value, dict) else value
    return chosen
