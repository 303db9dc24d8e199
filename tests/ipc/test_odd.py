"""Requests and replies that can't be copied, pickled or unpickled: each fails alone."""

from __future__ import annotations

import asyncio
import sys
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pytest
import torch
from tensordict import NonTensorData, TensorDict, TensorDictBase
from torch import Tensor

from aioinfer import InferenceServer, InvalidRequestError, ModelError, MPTransport, ProcessSlotTransport, connect
from aioinfer.ipc.sockets import connect_unix, frame, header
from aioinfer.testing import double, eventually, request
from aioinfer.testing.callers import is_double
from aioinfer.transports.ipc.protocol import FromClient
from tests.ipc.test_rubbish import is_hung_up
from tests.limits import HANG
from tests.process_workers import KINDS, Child, call, client_of, outcome
from tests.transports import process_slots


class Angry(Tensor):
    """Does not want to be copied."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("copy_", "stack", "detach"):
            raise KeyboardInterrupt("angry")
        return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]


def fake() -> Tensor:
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.zeros(3)


def nested() -> Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it is a prototype
        return torch.nested.nested_tensor([torch.zeros(1), torch.zeros(2)])


ODD: dict[str, tuple[Callable[[], Tensor], str]] = {
    "sparse": (lambda: torch.ones(3).to_sparse(), "is torch.sparse_coo, expected a plain tensor"),
    "mkldnn": (lambda: torch.ones(3).to_mkldnn(), "is torch._mkldnn, expected a plain tensor"),
    "nested": (nested, "is nested, expected a plain tensor"),
    "quantised": (lambda: torch.quantize_per_tensor(torch.zeros(3), 0.1, 1, torch.quint8), "is quantised"),
    "meta": (lambda: torch.zeros(3, device="meta"), "is on device meta, expected cpu"),
    "fake": (fake, "can't be copied: AssertionError"),
    "angry": (lambda: torch.zeros(3).as_subclass(Angry), "can't be copied: KeyboardInterrupt: angry"),
}
FINE: dict[str, Callable[[], Tensor]] = {
    "conjugate": lambda: torch.tensor([1 + 2j, 3j, 0]).conj().imag,
    "of a graph": lambda: torch.ones(3, requires_grad=True) * 2,
    "a parameter": lambda: torch.nn.Parameter(torch.ones(3)),
    "a view": lambda: torch.arange(12.0).view(3, 4)[:, 1],
    "expanded": lambda: torch.ones(1).expand(3),
}


def odd(kind: str) -> TensorDict:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return TensorDict({"observation": ODD[kind][0]()})


@pytest.mark.parametrize("kind", ODD)
async def test_an_odd_tensor_fails_its_own_request_and_none_that_leaves_in_the_same_tick(kind: str) -> None:
    transport = process_slots()
    async with InferenceServer(double, transport) as server:
        clients = transport.async_clients(12)  # so many are copied together
        for turn in range(3):
            asked = [client(odd(kind) if place == turn else request(place)) for place, client in enumerate(clients)]
            async with asyncio.timeout(HANG):
                replies = await asyncio.gather(*asked, return_exceptions=True)
            for place, reply in enumerate(replies):
                if place == turn:
                    assert isinstance(reply, InvalidRequestError)
                    assert ODD[kind][1] in str(reply)
                else:
                    assert not isinstance(reply, BaseException)
                    assert is_double(reply, place)
        assert server.stats().rejected == 3


@pytest.mark.parametrize("kind", ODD)
def test_an_odd_tensor_from_before_the_server_fails_its_own_request_and_no_later_one(kind: str) -> None:
    transport = process_slots()
    clients = transport.clients(3)
    failed = False
    try:
        bad: Future[Any] = clients[0].submit(odd(kind))
    except InvalidRequestError:
        failed = True
    good = clients[1].submit(request(1))
    with InferenceServer(double, transport):
        assert is_double(good.result(HANG), 1)
        assert failed or isinstance(bad.exception(HANG), InvalidRequestError)
        for client in clients:  # also the one that asked for it, and the thread that reads for futures
            assert is_double(client.submit(request(2)).result(HANG), 2)
            assert is_double(client(request(3), HANG), 3)
            with pytest.raises(InvalidRequestError):
                client(odd(kind), HANG)


@pytest.mark.parametrize("kind", FINE)
@pytest.mark.parametrize("count", [1, 12])
async def test_an_unusual_tensor_is_copied_as_it_looks(kind: str, count: int) -> None:
    transport = process_slots()
    tensor = FINE[kind]()
    async with InferenceServer(double, transport):
        clients = transport.async_clients(count)
        replies = await asyncio.gather(*[client(TensorDict({"observation": tensor})) for client in clients])
        for reply in replies:
            assert torch.equal(reply["action"], 2 * tensor.detach())


@pytest.mark.parametrize("kind", ["sparse", "mkldnn", "nested", "quantised"])
def test_a_spec_of_an_odd_tensor_is_refused_by_name(kind: str) -> None:
    with pytest.raises(TypeError, match=r"request_spec has 'observation', which is .*; expected a plain tensor"):
        ProcessSlotTransport(odd(kind), double(request(0)), num_slots=1)


def test_an_odd_reply_fails_its_batch_and_the_server_goes_on() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            return TensorDict({"action": torch.zeros(td.batch_size[0], 3).to_sparse()}, td.batch_size)
        return double(td)

    transport = process_slots()
    with InferenceServer(model, transport) as server:
        client = transport.client()
        with pytest.raises(ModelError):
            client(request(-1), HANG)
        assert is_double(client(request(1), HANG), 1)
        assert server.is_alive


# -- what runs where something is pickled ------------------------------------------------------------------


class Exits:
    """Ends the program where it is unpickled, as a script that parses arguments when it is imported."""

    def __reduce__(self) -> Any:
        return sys.exit, (2,)


class Interrupts:
    def __reduce__(self) -> Any:
        return _interrupt, ()


def _interrupt() -> None:
    raise KeyboardInterrupt("here")


class Stubborn:
    """Ends the program where it is pickled."""

    def __reduce__(self) -> Any:
        raise SystemExit(3)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("content", "name"), [(Exits(), "SystemExit: 2"), (Interrupts(), "KeyboardInterrupt: here")])
@pytest.mark.parametrize("bounded", [False, True], ids=["read by the model thread", "read by the event loop"])
def test_what_unpickling_a_request_raises_fails_that_request_and_no_other(
    content: Any, name: str, bounded: bool, kind: str
) -> None:
    transport = MPTransport()
    with InferenceServer(double, transport, max_pending=8 if bounded else None) as server:
        guilty, neighbour = client_of(transport, kind), transport.client()
        td = TensorDict({"observation": torch.ones(3), "odd": NonTensorData(content)})
        for value in range(3):
            with pytest.raises(InvalidRequestError, match=f"can't be unpickled in the server's process: {name}"):
                call(guilty, td)
            assert is_double(neighbour(request(value), HANG), value)
            assert outcome(guilty, value) == 2 * value
        assert server.is_alive


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", [Exits(), Interrupts(), Stubborn()])
def test_what_pickling_and_unpickling_a_reply_raises_fails_that_reply_and_no_other(content: Any, kind: str) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            return TensorDict({"action": NonTensorData(content, batch_size=td.batch_size)}, td.batch_size)
        return double(td)

    transport = MPTransport()
    with InferenceServer(model, transport) as server:
        guilty, neighbour = client_of(transport, kind), transport.client()
        for value in range(3):
            with pytest.raises(ModelError):
                call(guilty, request(-1))
            assert is_double(neighbour(request(value), HANG), value)
            assert outcome(guilty, value) == 2 * value
        assert server.is_alive


class Hidden(Exception):
    """Ends the program that reads it."""

    def __reduce__(self) -> Any:
        return sys.exit, (4,)


@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_an_error_that_ends_programs_where_it_is_unpickled_comes_as_a_model_error(make: Any) -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        raise Hidden("the reason")

    transport = make()
    with InferenceServer(model, transport) as server:
        client = transport.client()
        for _ in range(2):
            with pytest.raises(ModelError, match="Hidden: the reason"):
                client(request(1), HANG)
        assert server.is_alive


@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_who_says_hello_with_a_pickle_that_exits_costs_nobody_anything(make: Any) -> None:
    from aioinfer.ipc.pickling import dumps

    transport = make()
    with InferenceServer(double, transport) as server:
        client = transport.client()
        assert is_double(client(request(1), HANG), 1)
        with connect_unix(transport.address) as sock:
            sock.sendall(frame(header(FromClient.HELLO), dumps((Exits(), 1, ""))))
            sock.settimeout(HANG)
            assert sock.recv(1 << 16)
        with connect_unix(transport.address) as sock:
            sock.sendall(frame(header(FromClient.RELEASE), b"nobody's") + frame(header(7), b""))
            assert is_hung_up(sock)
        assert is_double(client(request(2), HANG), 2)
        assert server.is_alive


# -- callbacks of futures ----------------------------------------------------------------------------------


@pytest.mark.parametrize("error", [SystemExit(1), KeyboardInterrupt(), ArithmeticError()])
@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_a_callback_that_raises_keeps_no_other_future_from_its_reply(
    make: Any, error: BaseException, caplog: pytest.LogCaptureFixture
) -> None:
    def complain(_: object) -> None:
        raise error

    transport = make()
    clients = transport.clients(4)
    futures = [client.submit(request(value)) for value, client in enumerate(clients)]
    futures[0].add_done_callback(complain)
    futures[1].add_done_callback(complain)
    with InferenceServer(double, transport):
        for value, future in enumerate(futures):
            assert is_double(future.result(HANG), value)
        for value, client in enumerate(clients):
            assert is_double(client.submit(request(value)).result(HANG), value)
    caplog.clear()


@pytest.mark.parametrize("make", [process_slots, MPTransport])
def test_a_callback_that_blocks_keeps_no_thread_or_task_from_its_reply(make: Any) -> None:
    transport = make()
    released = threading.Event()
    with InferenceServer(double, transport) as server:
        first, second = transport.clients(2)
        with server.paused():  # a callback of a future that is done runs at once, here
            future = first.submit(request(1))
            future.add_done_callback(lambda _: released.wait(HANG))
        eventually(lambda: bool(future.done()))
        try:
            for value in range(3):
                assert is_double(second(request(value), HANG / 4), value)
        finally:
            released.set()
        assert is_double(second.submit(request(5)).result(HANG), 5)


# -- both at once, from another process --------------------------------------------------------------------


def ask_odd(line: Any, address: str) -> None:
    """Requests that fail and requests that don't, from one connection, in one tick."""

    async def main() -> None:
        with connect(address, timeout=HANG) as remote:
            clients = remote.async_clients(6)
            asked = [client(odd("fake") if place % 2 else request(place)) for place, client in enumerate(clients)]
            replies = await asyncio.gather(*asked, return_exceptions=True)
            line.send([type(reply).__name__ for reply in replies])

    asyncio.run(main())


def test_odd_requests_of_another_process_fail_alone() -> None:
    transport = process_slots()
    with InferenceServer(double, transport), Child("fork", ask_odd, transport.address) as child:
        assert child.hear() == ["TensorDict", "InvalidRequestError"] * 3
