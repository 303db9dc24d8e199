"""What a process is handed to be a client: it pickles, and connects when it is first used."""

from __future__ import annotations

import asyncio
import os
import secrets
import threading
import weakref
from abc import ABC, abstractmethod
from contextlib import AbstractContextManager
from copy import copy as copy_of
from functools import partial
from typing import Any, NoReturn, Self

from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient, check_count
from aioinfer.errors import (
    ClientBusyError,
    ClientClosedError,
    InferenceError,
    InvalidRequestError,
    PeerDiedError,
    ServerClosedError,
    clone_exception,
)
from aioinfer.futures import Future
from aioinfer.transports.receivers import WAITERS, LoopDesk, Waiter
from aioinfer.transports.station import Station, client_closed

__all__ = ["Ticket"]


class Ticket(ABC):
    """Stands for a number of clients of one process.

    Args:
        address: where the server listens.
        count: how many clients.
        one_at_a_time: whether each of them has one request under way at most.
    """

    def __init__(self, address: str, count: int, *, one_at_a_time: bool) -> None:
        check_count(count)
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
        self._members: weakref.WeakSet[_Place] = weakref.WeakSet()  # the clients of this process that are not closed
        self._disconnect()

    def start_anew(self) -> None:
        """Forget the connection of the process that has forked this one."""
        self._disconnect()
        for client in list(self._members):
            client.start_anew(self)

    def _disconnect(self) -> None:
        self._lock = threading.RLock()  # guards the connection and the members; never held while anything blocks
        self.connection: Station | None = None
        """That of this process, which may be dead by now."""
        _tickets.add(self)

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_lock", "_members", "connection")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._reset()

    @abstractmethod
    def _connect(self) -> Station: ...

    def _give_back(self) -> None:  # noqa: B027 - to have nothing is right for some
        """Tell the server that nobody will join for clients that were never used."""

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
            ClientClosedError: all of the clients were closed.
            OSError: no descriptor is left.
        """
        with self._lock:
            if not self._members:
                raise client_closed()
            dead = None if self.connection is None else self.connection.dead
            if self.connection is None or dead is not None:
                try:
                    self.connection = self._connect()
                except ServerClosedError as error:
                    if isinstance(dead, PeerDiedError):
                        raise PeerDiedError("the server's process is gone") from error
                    raise
            return self.connection

    def admit(self, client: _Place) -> None:
        """A client of this process has the ticket."""
        with self._lock:
            self._members.add(client)

    def dismiss(self, client: _Place) -> None:
        """A client was closed; the last one hangs up."""
        with self._lock:
            self._members.discard(client)
            connection, last = self.connection, not self._members
        if last and (connection is None or connection.control is None):  # it may never be taken in
            self._give_back()
        if connection is None:
            return
        if last:
            connection.close()
        else:
            connection.close_client(client.place)

    def close(self) -> None:
        """Close all the clients of this process."""
        for client in list(self._members):
            client.close()

    def count_refusal(self) -> None:
        """Tell the server that a request was refused here, if it is there to be told."""
        try:
            self.station().count_refusal()
        except _REFUSALS:
            pass

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
        ticket.start_anew()


os.register_at_fork(after_in_child=_start_anew)


class _ClosedTicket:
    """What a client has that was closed."""

    one_at_a_time = False
    connection = None

    def cargo(self, _: object) -> NoReturn:
        raise client_closed()

    def admit(self, _: object) -> None:
        pass

    dismiss = admit

    def __reduce__(self) -> str:
        return "_CLOSED"


_CLOSED: Any = _ClosedTicket()

# What `submit` does not raise, but lets the future fail with.
_REFUSALS = (InferenceError, OSError)


class _Place:
    """What both kinds of client share. It pickles."""

    def __init__(self, ticket: Ticket, place: int) -> None:
        self._ticket = ticket
        self.place = place
        self.number = -1
        self.start_anew(ticket)
        ticket.admit(self)

    def start_anew(self, ticket: Ticket) -> None:
        """Forget what other threads of a process do that has forked."""
        self.claim: AbstractContextManager[object] | None = threading.RLock() if ticket.one_at_a_time else None

    def __getstate__(self) -> tuple[Ticket, int]:
        return self._ticket, self.place

    def __setstate__(self, state: tuple[Ticket, int]) -> None:
        self.__init__(*state)  # type: ignore[misc]

    def close(self) -> None:
        ticket, self._ticket = self._ticket, _CLOSED
        ticket.dismiss(self)


class _Client(_Place, InferenceClient):
    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        ticket = self._ticket
        try:
            cargo = ticket.cargo(td)
        except InvalidRequestError:
            ticket.count_refusal()
            raise
        future: Future[TensorDictBase] = Future()
        try:
            station = ticket.connection
            if station is None or station.dead is not None:
                station = ticket.station()
            number = (next(station.numbers) & 0xFFFFFF) << 32 | self.place
            try:
                asked = station.ask(self, number, cargo, future, station.futures, False)
                future.add_done_callback(partial(_withdraw, station, number))
                station.post([asked])
                station.futures.attend()
            except BaseException:
                station.withdraw(number)
                raise
        except (ClientBusyError, ClientClosedError, InvalidRequestError):
            raise
        except _REFUSALS as error:
            future.set_exception(error)
        return future

    def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:
        ticket = self._ticket
        try:
            cargo = ticket.cargo(td)
        except InvalidRequestError:
            ticket.count_refusal()
            raise
        station = ticket.connection
        if station is None or station.dead is not None:
            station = ticket.station()
        number = (next(station.numbers) & 0xFFFFFF) << 32 | self.place
        waiter = Waiter()
        try:
            try:
                asked = station.ask(self, number, cargo, waiter, WAITERS, wait)
                station.post([asked])
                station.wait(number, waiter, timeout)
            finally:
                station.leave(number, waiter)
        finally:
            if not waiter.left:  # an exception of a signal's handler kept it from its work
                station.leave(number, waiter)
        if not waiter.done:
            raise (
                TimeoutError(f"no reply within {timeout} seconds")
                if station.dead is None
                else clone_exception(station.dead)
            )
        return waiter.outcome()


class _AsyncClient(_Place, AsyncInferenceClient):
    def __init__(self, ticket: Ticket, place: int) -> None:
        super().__init__(ticket, place)
        self._at: tuple[Station, LoopDesk] | None = None

    def close(self) -> None:
        super().close()
        self._at = None

    def _submit(
        self, td: TensorDictBase, *, patient: bool
    ) -> tuple[asyncio.Future[TensorDictBase], Station | None, int]:
        ticket = self._ticket
        try:
            cargo = ticket.cargo(td)
        except InvalidRequestError:
            ticket.count_refusal()
            raise
        try:
            station = ticket.connection
            if station is None or station.dead is not None:
                station = ticket.station()
            at = self._at
            if at is None or at[0] is not station or not at[1].runs_here():
                at = self._at = station, station.desk()
            desk = at[1]
            future: asyncio.Future[TensorDictBase] = desk.loop.create_future()
            number = (next(station.numbers) & 0xFFFFFF) << 32 | self.place
            try:
                asked = station.ask(self, number, cargo, future, desk, patient)
                desk.post_at_end_of_tick(station, asked)
            except BaseException:
                station.withdraw(number)
                raise
        except (ClientBusyError, ClientClosedError):
            raise
        except _REFUSALS as error:
            future = asyncio.get_running_loop().create_future()
            future.set_exception(error)
            return future, None, -1
        return future, station, number

    def submit(self, td: TensorDictBase) -> asyncio.Future[TensorDictBase]:
        future, station, number = self._submit(td, patient=False)
        if station is not None:
            future.add_done_callback(partial(_withdraw, station, number))
        return future

    async def __call__(self, td: TensorDictBase, timeout: float | None = None, *, wait: bool = False) -> TensorDictBase:  # noqa: ASYNC109
        if timeout is not None:
            async with asyncio.timeout(timeout):
                return await self(td, wait=wait)
        future, station, number = self._submit(td, patient=wait)
        try:
            return await future
        except BaseException:
            if station is not None and (future.cancelled() or not future.done()):
                station.withdraw(number)
            raise
        finally:
            del future  # the traceback of its error will lead here: it must not lead back


def _withdraw(station: Station, number: int, future: Any) -> None:
    if future.cancelled():
        station.withdraw(number)
