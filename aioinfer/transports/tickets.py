"""What a process is handed to be a client: it pickles, and connects when it is first used."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import weakref
from abc import ABC, abstractmethod
from copy import copy as copy_of
from functools import partial
from typing import Any, Self

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.errors import InvalidRequestError, PeerDiedError, ServerClosedError, own_error
from aioinfer.transports.futures import Future
from aioinfer.transports.outlets import FUTURES
from aioinfer.transports.receivers import WAITERS, LoopDesk, Waiter
from aioinfer.transports.station import Station

__all__ = ["Ticket"]


class Ticket(ABC):
    """Stands for a number of clients of one process.

    Args:
        address: where the server listens.
        count: how many clients.
        one_at_a_time: whether each of them has one request under way at most.
    """

    def __init__(self, address: str, count: int, *, one_at_a_time: bool) -> None:
        if not isinstance(count, int) or isinstance(count, bool) or count < 1:
            raise ValueError(f"the number of clients must be an integer of at least 1, got {count!r}")
        self.address = address
        self.count = count
        self.one_at_a_time = one_at_a_time
        self.copies = True
        """Whether replies are copied out of the memory in which they came."""
        self.id = secrets.token_bytes(8)
        self._reset()

    def renewed(self, count: int, *, copy: bool = True) -> Self:
        """Another ticket, for the same server.

        Args:
            count: for how many clients.
            copy: ``False`` lends replies, valid until the client's next request, where the transport can.
        """
        ticket = copy_of(self)
        Ticket.__init__(ticket, self.address, count, one_at_a_time=self.one_at_a_time)
        ticket.copies = copy
        return ticket

    def _reset(self) -> None:
        self._lock = threading.Lock()
        self.connection: Station | None = None
        """That of this process, which may be dead by now."""
        _tickets.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "connection")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @abstractmethod
    def _connect(self) -> Station: ...

    @abstractmethod
    def cargo(self, td: TensorDictBase) -> Any:
        """What the station makes of a request.

        Raises:
            InvalidRequestError: it can't be served.
        """

    def station(self) -> Station:
        """Connect this process, unless it has a connection that works.

        Raises:
            ServerClosedError: the server is shut down.
            PeerDiedError: its process is gone.
        """
        with self._lock:
            dead = None if self.connection is None else self.connection.dead
            if self.connection is None or dead is not None:
                try:
                    self.connection = self._connect()
                except ServerClosedError as error:
                    if isinstance(dead, PeerDiedError):
                        raise PeerDiedError("the server's process is gone") from error
                    raise
            return self.connection

    def clients(self) -> list[InferenceClient]:
        """The clients, for threads that block."""
        return [_Client(self, place) for place in range(self.count)]

    def async_clients(self) -> list[AsyncInferenceClient]:
        """The clients, for tasks."""
        return [_AsyncClient(self, place) for place in range(self.count)]


# The connections of a process are not those of its forked children, who connect anew.
_tickets: weakref.WeakSet[Ticket] = weakref.WeakSet()


def _start_anew() -> None:
    for ticket in list(_tickets):
        ticket._reset()


os.register_at_fork(after_in_child=_start_anew)


class _Place:
    """What both kinds of client share. It pickles."""

    def __init__(self, ticket: Ticket, place: int) -> None:
        self._ticket = ticket
        self._place = place
        self._number = -1

    def __getstate__(self) -> tuple[Ticket, int]:
        return self._ticket, self._place

    def __setstate__(self, state: tuple[Ticket, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def _checked(self, td: TensorDictBase) -> tuple[Station, Any]:
        """The connection, and the cargo of a request; the server counts one that is refused."""
        ticket = self._ticket
        station = ticket.connection
        if station is None or station.dead is not None:
            station = ticket.station()
        try:
            cargo = ticket.cargo(td)
        except InvalidRequestError:
            station.count_refusal()
            raise
        if self._number in station.calls and ticket.one_at_a_time:
            raise RuntimeError(
                "the client has a request under way; wait for its reply, cancel it, or make a client for each caller"
            )
        return station, cargo


class _Client(_Place, InferenceClient):
    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        station, cargo = self._checked(td)
        future: Future[TensorDictBase] = Future()
        asked = station.ask(self._place, cargo, future, FUTURES)
        self._number = asked[0]
        future.add_done_callback(partial(_withdraw, station, asked[0]))
        station.post([asked])
        station.attend_futures()
        return future

    def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:
        station, cargo = self._checked(td)
        waiter = Waiter()
        asked = station.ask(self._place, cargo, waiter, WAITERS, patient=wait)
        self._number = asked[0]
        try:
            station.post([asked])
            station.wait(asked[0], waiter, timeout)
        finally:
            unanswered = not waiter.done and station.withdraw(asked[0])
        if unanswered:
            raise (
                TimeoutError(f"no reply within {timeout} seconds") if station.dead is None else own_error(station.dead)
            )
        return waiter.outcome()


class _AsyncClient(_Place, AsyncInferenceClient):
    def __init__(self, ticket: Ticket, place: int) -> None:
        super().__init__(ticket, place)
        self._at: tuple[Station, LoopDesk] | None = None

    def _ask(self, td: TensorDictBase, *, patient: bool) -> tuple[Station, int, asyncio.Future[TensorDictBase]]:
        station, cargo = self._checked(td)
        if self._at is None or self._at[0] is not station or not self._at[1].runs_here():
            self._at = station, station.desk()
        desk = self._at[1]
        future: asyncio.Future[TensorDictBase] = desk.loop.create_future()
        asked = station.ask(self._place, cargo, future, desk, patient=patient)
        desk.post_at_end_of_tick(station, asked)
        self._number = asked[0]
        return station, asked[0], future

    def submit(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        station, number, future = self._ask(td, patient=False)
        future.add_done_callback(partial(_withdraw, station, number))
        return future

    async def __call__(self, td: TensorDictBase, *, wait: bool = False) -> TensorDictBase:
        station, number, future = self._ask(td, patient=wait)
        try:
            return await future
        except asyncio.CancelledError:
            station.withdraw(number)
            raise
        finally:
            del future  # the traceback of its error will lead here: it must not lead back


def _withdraw(station: Station, number: int, future: Future[TensorDictBase] | asyncio.Future[TensorDictBase]) -> None:
    if future.cancelled():
        station.withdraw(number)
