"""Errors of the model on their way to another process."""

from __future__ import annotations

import sys
import threading
import types
from collections.abc import Iterator
from typing import Any

import pytest
from tensordict import TensorDictBase

from aioinfer import InferenceServer, ModelError, MPTransport
from aioinfer.testing import GatedModel, double, eventually, request
from tests.ipc.callers import Worker
from tests.limits import HANG
from tests.process_workers import KINDS, clients_of
from tests.transports import process_slots

MAKES: list[Any] = [process_slots, MPTransport]


class Custom(ValueError):
    """It pickles."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message, code)
        self.code = code


class Odd(Exception):
    """Its ``args`` are not what its ``__init__`` takes."""

    def __init__(self, *, where: str, what: str) -> None:
        super().__init__(f"{what} in {where}")
        self.where = where


class Holding(Exception):
    """It holds what does not pickle."""

    def __init__(self, message: str) -> None:
        super().__init__(message)
        self.lock = threading.Lock()


class Mute(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no words")


def local_error() -> Exception:
    class Local(Exception):
        pass

    return Local("only here")


def raising(make: Any) -> Any:
    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            raise make()
        return double(td)

    return model


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker("fork") as worker:
        yield worker


def error_of(worker: Worker, transport: Any, kind: str, model: Any) -> BaseException:
    """The error that a client of another process gets; it must be usable afterwards."""
    with InferenceServer(model, transport):
        (made,) = clients_of(transport, 1, blocking=kind == "blocking")
        client = worker.adopt(made)
        error = worker.call(client, request(-1), HANG / 4).exception(HANG)
        assert worker.call(client, request(1), HANG / 4).result(HANG)["action"][0] == 2
        worker.ask("forget").result(HANG)
    assert error is not None
    return error


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_an_error_that_pickles_keeps_its_type_and_content_and_brings_the_servers_traceback(
    make: Any, kind: str, worker: Worker
) -> None:
    error = error_of(worker, make(), kind, raising(lambda: Custom("too far", code=7)))
    assert type(error) is Custom
    assert (error.args, error.code) == (("too far", 7), 7)
    assert type(error.__cause__) is Custom
    notes = "".join(error.__notes__)
    assert "in the server:" in notes
    assert "Traceback (most recent call last)" in notes
    assert "raise make()" in notes
    assert notes.rstrip().endswith("Custom: ('too far', 7)")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
@pytest.mark.parametrize(
    ("made", "name", "message"),
    [
        (local_error, "Local", "only here"),
        (lambda: Holding("with a lock"), "Holding", "with a lock"),
        (lambda: Odd(where="the model", what="a fault"), "Odd", "a fault in the model"),
        (Mute, "Mute", ""),
    ],
    ids=["of a local class", "with content that does not", "of odd arguments", "without words"],
)
def test_an_error_that_does_not_pickle_comes_as_a_model_error_that_names_it(
    made: Any, name: str, message: str, make: Any, kind: str, worker: Worker
) -> None:
    error = error_of(worker, make(), kind, raising(made))
    assert type(error) is ModelError
    assert name in str(error)
    assert message in str(error)
    notes = "".join(error.__notes__)
    assert "raise make()" in notes
    assert name in notes


@pytest.mark.parametrize("make", MAKES)
def test_every_caller_of_a_batch_that_fails_gets_an_error_of_its_own(make: Any) -> None:
    transport = make()
    server = InferenceServer(raising(lambda: Custom("all of them")), transport)
    replies = [transport.client().submit(request(-1)) for _ in range(6)]
    eventually(lambda: server.stats().pending == 6)
    with server:
        errors = [reply.exception(HANG) for reply in replies]
    assert {type(error) for error in errors} == {Custom}
    assert len(set(map(id, errors))) == 6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make", MAKES)
def test_an_error_of_a_class_that_only_the_server_has_ends_its_own_call_only(
    make: Any, kind: str, worker: Worker
) -> None:
    """The worker was forked before the module was there, as a program would be that finds the server by its address."""
    module = types.ModuleType("only_in_the_server")
    exec("class Foreign(Exception): pass", module.__dict__)
    gate = GatedModel()

    def model(td: TensorDictBase) -> TensorDictBase:
        gate(td)
        return raising(lambda: module.Foreign("from far away"))(td)  # type: ignore[no-any-return]

    transport = make()
    sys.modules[module.__name__] = module
    try:
        with InferenceServer(model, transport) as server:
            clients = [worker.adopt(client) for client in clients_of(transport, 3, blocking=kind == "blocking")]
            first = [worker.call(clients[0], request(0), HANG / 4)]
            assert gate.entered.wait(HANG)
            rest = [worker.call(clients[index], request(value), HANG / 4) for index, value in ((1, -1), (2, 2))]
            eventually(lambda: server.stats().pending == 2)
            gate.open()
            good, bad, other = (call.exception(HANG) for call in (*first, *rest))
            assert (good, other) == (None, None)
            assert type(bad) is ModelError
            assert "Foreign: from far away" in str(bad)
    finally:
        del sys.modules[module.__name__]
        worker.ask("forget").result(HANG)
