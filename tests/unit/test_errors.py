from __future__ import annotations

import pickle

import pytest

from aioinfer import (
    ClientBusyError,
    ClientClosedError,
    InferenceError,
    NoFreeSlotError,
    PeerDiedError,
    ServerClosedError,
    ServerNotRunningError,
    ServerStartError,
    errors,
)
from aioinfer.errors import ModelError, clone_exception


class Odd(Exception):
    def __init__(self, code: int, *, reason: str) -> None:
        super().__init__(f"{code}: {reason}")
        self.code = code


class Hopeless(Exception):
    def __reduce__(self) -> str:
        raise RuntimeError

    def __new__(cls, *args: object) -> Hopeless:
        if args == ("copy",):
            raise RuntimeError
        return super().__new__(cls)

    def __init__(self, *args: object) -> None:
        self.args = ("copy",)


@pytest.mark.parametrize(
    "original",
    [ValueError("a", 1), KeyError("k"), OSError(2, "no"), Odd(3, reason="odd"), ExceptionGroup("g", [ValueError("b")])],
)
def test_each_caller_gets_an_own_instance_of_the_same_kind(original: Exception) -> None:
    first, second = clone_exception(original), clone_exception(original)
    assert first is not second
    assert type(first) is type(original)
    assert str(first) == str(original)
    assert first.args == original.args
    assert first.__cause__ is original


def test_attributes_come_along() -> None:
    copy = clone_exception(Odd(3, reason="odd"))
    assert isinstance(copy, Odd)
    assert copy.code == 3


@pytest.mark.parametrize("original", [SystemExit(1), KeyboardInterrupt(), StopIteration(2), Hopeless("x")])
def test_what_no_caller_can_be_given_becomes_a_model_error(original: BaseException) -> None:
    error = clone_exception(original)
    assert type(error) is ModelError
    assert type(original).__name__ in str(error)
    assert error.__cause__ is original


@pytest.mark.parametrize("name", [name for name in errors.__all__ if name[0].isupper()])
def test_every_error_pickles_and_is_an_inference_error(name: str) -> None:
    kind = getattr(errors, name)
    assert issubclass(kind, InferenceError)
    copy = pickle.loads(pickle.dumps(kind("a message")))
    assert type(copy) is kind
    assert str(copy) == "a message"


@pytest.mark.parametrize(
    "kind",
    [
        ServerClosedError,
        PeerDiedError,
        ServerStartError,
        ServerNotRunningError,
        NoFreeSlotError,
        ClientBusyError,
        ClientClosedError,
    ],
)
def test_what_ends_a_call_for_good_is_a_runtime_error_too(kind: type[Exception]) -> None:
    """As users of other inference servers catch it."""
    assert issubclass(kind, InferenceError)
    assert issubclass(kind, RuntimeError)
