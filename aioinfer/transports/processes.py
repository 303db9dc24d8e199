"""The server's half of the transports whose callers live in other processes."""

from __future__ import annotations

import os
from abc import abstractmethod
from concurrent.futures import Future
from multiprocessing.reduction import DupFd
from typing import Any, NoReturn, Self

import anyio
from tensordict import TensorDictBase

from aioinfer.client import AsyncInferenceClient, InferenceClient
from aioinfer.errors import ServerClosedError
from aioinfer.ipc.selector import Selector
from aioinfer.ipc.sockets import FramedSocket, Listener
from aioinfer.transports.base import Transport
from aioinfer.transports.control import Control, State
from aioinfer.transports.line import Board, Line
from aioinfer.transports.polling import InferenceTransport
from aioinfer.transports.queue import Admission, RequestQueue
from aioinfer.transports.switchboard import Switchboard
from aioinfer.transports.tickets import Ticket

__all__ = ["GivenTransport", "ProcessTransport"]


class ProcessTransport(Transport, InferenceTransport):
    """Base of such transports: a queue that the wires fill, whoever reads them.

    The model thread waits for the wires itself, beside its bell: if the event loop read them and woke it, four
    processes would get 12 000 replies/s instead of 17 000, and 2 x 16 tasks 60 000 instead of 100 000. The event
    loop reads them too where requests must be refused while the model is busy.

    Args:
        address: a path to listen at; ``None`` makes an address up.
    """

    def __init__(self, address: str | None) -> None:
        super().__init__()
        self._given_away = False
        self._listen(Listener(address))

    def _listen(self, listener: Listener) -> None:
        self._ended = False
        self._process = os.getpid()
        self._control = Control()
        self._board = Switchboard(self._make_line, listener, lambda: self.queue.admission.stats.reject())
        self._selector = self._board.poller
        self.queue.selector(self._selector)

    @property
    def is_served(self) -> bool:
        """Whether a server runs on it, or it was given to one in another process."""
        return self._given_away or self.queue.serving

    def check_unused(self) -> None:
        """Raise :class:`RuntimeError` if it can't be given away, since it is served, or has connections already."""
        if self.is_served or self._board.lines:
            raise RuntimeError("the transport is in use already, or was given away")

    def give_away(self) -> GivenTransport:
        """Let another process serve: it listens at the same address, for the clients that were made here too.

        Raises:
            RuntimeError: a server has been made for the transport, or it was given away before.
            OSError: no descriptor is left; the transport was not given away.
        """
        self.check_unused()
        self._board.listener.open()  # it is closed if a server was shut down meanwhile
        given = GivenTransport(type(self), self._estate(), self.address, self._board.give_away())
        self._given_away = True
        return given

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"a {type(self).__qualname__} does not travel: hand its clients to other processes, "
            "or have it served in one by a ProcessInferenceServer"
        )

    def _estate(self) -> dict[str, Any]:
        """The attributes that another process needs, beside those that this class makes."""
        return {}

    @classmethod
    def _inherit(cls, estate: dict[str, Any], listener: Listener) -> Self:
        transport = cls.__new__(cls)
        Transport.__init__(transport)
        transport.__dict__.update(estate)
        transport._given_away = False
        transport._listen(listener)
        return transport

    @abstractmethod
    def _make_line(self, wire: FramedSocket, board: Board) -> Line: ...

    @abstractmethod
    def _lease(self, count: int, copy: bool = True) -> Ticket:
        """What a process needs to make ``count`` clients."""

    @property
    def _serves_elsewhere(self) -> bool:
        """Whether this process only knows the server's address: it gave the transport away, or is a forked child."""
        return self._given_away or self._process != os.getpid()

    @property
    def address(self) -> str:
        """Where processes that nobody has given a client can get one: :func:`aioinfer.connect`."""
        return self._board.listener.address

    # -- clients ---------------------------------------------------------------------------------------

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        """Not supported: a request needs a client.

        Raises:
            NotImplementedError: always.
        """
        raise NotImplementedError(
            f"a {type(self).__qualname__} takes requests through its clients only; make one with client()"
        )

    def client(self, *, copy: bool = True) -> InferenceClient:
        """Make a blocking client. Hand it to a process, or use it in this one; the first to use it has its slot.

        Args:
            copy: where replies lie in shared memory, ``False`` lends the caller a view of each, valid until this
                client's next request. Others are the caller's own in any case.

        Raises:
            NoFreeSlotError: the transport has slots, and all are taken.
        """
        return self.clients(1, copy=copy)[0]

    def async_client(self, *, copy: bool = True) -> AsyncInferenceClient:
        """Make an awaitable client; see :meth:`client`."""
        return self.async_clients(1, copy=copy)[0]

    def clients(self, count: int, *, copy: bool = True) -> list[InferenceClient]:
        """Make blocking clients for the threads of one process, which has one connection for all of them.

        Hand them over together, as one object.

        Args:
            count: how many.
            copy: see :meth:`client`.

        Raises:
            NoFreeSlotError: fewer slots are free.
        """
        return self._lease(count, copy).clients()

    def async_clients(self, count: int, *, copy: bool = True) -> list[AsyncInferenceClient]:
        """Make awaitable clients for the tasks of one process, which has one connection for all of them.

        Hand them over together, as one object. Requests that are made in one tick of an event loop leave
        together. See :meth:`clients`.
        """
        return self._lease(count, copy).async_clients()

    # -- the server's side -----------------------------------------------------------------------------

    def attach(self, queue: RequestQueue) -> None:
        if self._given_away:
            raise RuntimeError("the transport was given to a server in another process")
        self.check_attach(queue)
        self._board.open()
        self._board.move_to(queue.selector(self._selector))
        self._control.set_version_key(queue.admission.version_key)
        self._ended = False
        super().attach(queue)
        self.on_admission()

    def on_admission(self) -> None:
        while self._process == os.getpid():
            admission = self.queue.admission
            state = self._state(admission)
            self._control.set_state(state, admission.closed)
            if self._state(self.queue.admission) is state:  # else another thread has changed it while it was written
                return

    def _state(self, admission: Admission) -> State:
        if admission.closed is not None:
            return State.ENDED if self._ended else State.CLOSED
        return State.REFUSING if admission.pauses else State.OPEN

    async def serve(self) -> None:
        selectors = [self._board.door]
        if self.queue.admission.max_pending is not None:  # requests must be refused while the model is busy
            selectors.append(self._board.poller)
        async with anyio.create_task_group() as tasks:
            for selector in selectors:
                tasks.start_soon(self._poll_when_readable, selector)

    async def _poll_when_readable(self, selector: Selector) -> None:
        while True:
            await anyio.wait_readable(selector.fileno())
            self._poll()

    def _poll(self) -> None:
        """Take in who dials and some of what has been sent, whatever the model thread does."""
        self._board.door.poll()
        self._board.poller.poll()
        self.queue.notify()  # the model thread does not hear of what another thread has read

    def read(self, *, wait: bool = False) -> None:
        self._board.door.poll()
        self._board.poller.poll()
        self._board.read_all()
        self.queue.notify()  # as in _poll

    def close(self, error: ServerClosedError) -> None:
        self._board.close()

    def detach(self, error: ServerClosedError) -> None:
        self._board.finish()
        self._ended = True
        self.on_admission()
        self._board.read_all()  # what was sent before that could be seen
        self._board.finish()

    def close_unserved(self, error: ServerClosedError) -> None:
        """Fail the requests that wait, and all that come: no server will serve this transport."""
        queue = RequestQueue()
        queue.attach([self])
        queue.detach(error)


class GivenTransport:
    """A transport on its way to another process. It is inherited by fork, or pickles as that process is spawned."""

    def __init__(self, kind: type[ProcessTransport], estate: dict[str, Any], address: str, descriptor: int) -> None:
        self._kind = kind
        self._estate = estate
        self._address = address
        self._descriptor: Any = descriptor

    def take(self) -> ProcessTransport:
        """Listen from now on (the other process)."""
        descriptor = self._descriptor if isinstance(self._descriptor, int) else self._descriptor.detach()
        return self._kind._inherit(self._estate, Listener(self._address, descriptor))

    def close(self) -> None:
        """Let go of it, once the other process has started, or can't be (this process). Idempotent.

        If nobody has taken it, nobody listens from then on: clients fail with :class:`ServerClosedError`.
        """
        if isinstance(self._descriptor, int) and self._descriptor >= 0:
            os.close(self._descriptor)
            self._descriptor = -1

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_descriptor": DupFd(self._descriptor)}
