"""The server behind the app: one way to ask, whatever kind of server or client it is."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, ClientMaker
from aioinfer.entries import check_entries, make_td
from aioinfer.errors import DeadlineExceededError, InvalidRequestError
from aioinfer.server import BaseServer
from aioinfer.stats import Health, ServerStats

__all__ = ["Backend", "PendingReply"]

_FASTEST_OF = 64  # replies, of which the fastest says how long one takes at least


class PendingReply:
    """A request that is under way: the future of its reply, and why it was withdrawn, if it was.

    Loop thread only.

    Args:
        future: of the client.
        received_at: when the request had arrived, by ``time.perf_counter``.
        client: that was asked.
    """

    __slots__ = ("client", "error", "future", "received_at", "timer")

    def __init__(
        self, future: asyncio.Future[TensorDictBase], received_at: float, client: AsyncInferenceClient
    ) -> None:
        self.future = future
        self.received_at = received_at
        self.client = client
        self.error: Exception | None = None
        self.timer: asyncio.TimerHandle | None = None

    def withdraw(self, error: Exception) -> None:
        """End the request with an error, unless its reply is there; it is not computed if no batch has taken it."""
        if not self.future.done():
            self.error = error
            self.future.cancel()

    def cancel(self) -> None:
        """Its caller is gone."""
        self.future.cancel()

    def waits(self) -> bool | None:
        """Whether no batch has taken the request yet; ``None`` if that is not known."""
        return False if self.future.done() else self.client.is_pending(self.future)

    async def reply(self) -> TensorDictBase:
        """Wait for the reply, or raise the error."""
        try:
            return await self.future
        except asyncio.CancelledError:
            if self.error is None:
                raise
            raise self.error from None


class Backend:
    """Asks a server, and knows what can be known of it.

    Loop thread only.

    Args:
        server: a server of this package, what :func:`aioinfer.connect` returns, or a client of one of them.
        in_keys: the entries of a message that make a request; others are left out. By default those that the model
            reads, where the server has the model; else all of them.
        deadline: seconds from the arrival of a request to its reply, if it names none; ``None`` is without end.
    """

    def __init__(
        self,
        server: ClientMaker | AsyncInferenceClient,
        *,
        in_keys: Sequence[str] | None = None,
        deadline: float | None = None,
    ) -> None:
        if not isinstance(server, ClientMaker | AsyncInferenceClient):
            raise TypeError(f"expected a server, or an AsyncInferenceClient, got {type(server).__qualname__}")
        self.server = server
        self.deadline = deadline
        model_keys = getattr(getattr(server, "model", None), "in_keys", None)
        keys = in_keys or model_keys
        self.in_keys = {_root(key) for key in keys} if keys else None
        self._clients: list[AsyncInferenceClient] = []
        self._fastest: deque[float] = deque(maxlen=_FASTEST_OF)

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
            received_at: when the message with them had arrived, by ``time.perf_counter``.
            deadline: seconds from then on; ``None`` takes that of the app.
            defaults: entries that the model gets where it reads them and ``entries`` lack them.

        Raises:
            InvalidRequestError: they make no request. What else the server refuses, the reply fails with.
        """
        request = self._request(entries, defaults)
        client = self._take_client()
        try:
            future = client.submit(request)
        except BaseException:
            self._give_back(client)
            raise
        pending = PendingReply(future, received_at, client)
        seconds = self.deadline if deadline is None else deadline
        if seconds is not None:
            left = received_at + seconds - time.perf_counter()
            pending.timer = future.get_loop().call_later(max(0.0, left), self._expire, pending, seconds)
        return pending

    def finish(self, pending: PendingReply) -> None:
        """Free what a request had, which has ended."""
        if pending.timer is not None:
            pending.timer.cancel()
        self._give_back(pending.client)

    @staticmethod
    def _expire(pending: PendingReply, seconds: float) -> None:
        pending.withdraw(DeadlineExceededError(f"no reply within {seconds:g} seconds of the request's arrival"))

    def _request(
        self, entries: Mapping[str, Any], defaults: Mapping[str, Any] | None
    ) -> TensorDictBase | dict[str, Any]:
        if isinstance(entries, TensorDictBase):
            return entries
        if not isinstance(entries, Mapping):
            raise InvalidRequestError(f"a request is a map of entries, got {type(entries).__name__}")
        keys = self.in_keys
        chosen = dict(entries) if keys is None else {name: entries[name] for name in keys if name in entries}
        if defaults and keys is not None:
            chosen |= {name: value for name, value in defaults.items() if name in keys and name not in chosen}
        texts = {name: value for name, value in chosen.items() if isinstance(value, str)}
        if not texts:
            return chosen
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
        """A client that has no request under way: one of a slot may have one only."""
        if isinstance(self.server, AsyncInferenceClient):
            return self.server
        return self._clients.pop() if self._clients else self.server.async_client()

    def _give_back(self, client: AsyncInferenceClient) -> None:
        if client is not self.server:
            self._clients.append(client)

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
        if not isinstance(self.server, BaseServer) or self.server.is_alive:
            return False
        await self.server.__aenter__()
        return True

    async def stop(self) -> None:
        """Shut the server down, after its last reply."""
        if isinstance(self.server, BaseServer):
            await self.server.aclose(timeout=None, drain=True)

    def close(self) -> None:
        """Close the clients that were made here."""
        while self._clients:
            self._clients.pop().close()


def _root(key: Any) -> str:
    name: str = key if isinstance(key, str) else key[0]
    return name
