"""What every transport must hold, as checks that run over any of them, with both kinds of caller."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.errors import InvalidRequestError, ModelError, ServerClosedError, ServerOverloadedError
from aioinfer.interaction import InteractionType, calling_in, interaction_type
from aioinfer.testing.callers import (
    HANG,
    AwaitingCallers,
    BlockingCallers,
    GatedModel,
    Ground,
    double,
    eventually,
    request,
)
from aioinfer.transports.base import InferenceTransport

__all__ = ["CHECKS", "check_transport"]

E = TypeVar("E", bound=BaseException)


def check_transport(transport: Callable[[], InferenceTransport], *, drops_cancelled: bool = False) -> None:
    """Run the contract's checks over a transport, with blocking and with awaiting callers.

    Args:
        transport: makes a fresh transport, with room for 16 clients, for each check.
        drops_cancelled: also demand that a request which is cancelled before its batch left is never computed.
            A transport that has only the five verbs can't promise that.

    Raises:
        ExceptionGroup: of the checks that failed, each with a note that names it and its promise.
    """
    failures: list[Exception] = []
    for callers in (BlockingCallers, AwaitingCallers):
        for check in CHECKS:
            try:
                check(Ground(transport, callers, drops_cancelled=drops_cancelled))
            except Exception as failure:
                failure.add_note(f"{check.__name__}, {callers.__name__}: {check.__doc__}")
                failures.append(failure)
    if failures:
        raise ExceptionGroup(f"{len(failures)} checks of the transport contract failed", failures)


# -- replies -----------------------------------------------------------------------------------------------


def every_caller_gets_its_own_reply(ground: Ground) -> None:
    """A reply is the row of the request that it answers, whatever else is under way."""
    with ground.serve(double, max_batch_size=5) as (server, callers):
        for turn in range(20):
            values = [100 * turn + index for index in range(16)]
            replies = [callers.call(index, request(value)) for index, value in enumerate(values)]
            for value, reply in zip(values, replies, strict=True):
                assert _is_double(reply.result(HANG), value)
        assert server.stats().ok == 320


def requests_that_wait_meet_in_one_batch(ground: Ground) -> None:
    """While the model is busy requests gather, and leave together when it is free."""
    model = GatedModel()
    with ground.serve(model) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG)
        replies += [callers.call(index, request(index)) for index in range(1, 9)]
        eventually(lambda: server.stats().pending == 8)
        model.open()
        for value, reply in enumerate(replies):
            assert _is_double(reply.result(HANG), value)
    assert sorted(map(len, model.batches)) == [1, 8]


def a_batch_holds_max_batch_size_at_most(ground: Ground) -> None:
    """Waiting requests beyond ``max_batch_size`` leave in further batches, in order of arrival."""
    model = GatedModel()
    with ground.serve(model, max_batch_size=3) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG)
        for index in range(1, 9):
            replies.append(callers.call(index, request(index)))
            eventually(lambda: server.stats().pending == index)  # noqa: B023
        model.open()
        for reply in replies:
            reply.result(HANG)
    assert model.batches == [[0], [1, 2, 3], [4, 5, 6], [7, 8]]


def requests_made_before_the_start_are_served(ground: Ground) -> None:
    """A request may come before its server runs."""
    with ground.serve(double, start=False) as (server, callers):
        reply = callers.call(0, request(3))
        eventually(lambda: server.stats().pending == 1)
        server.start()
        assert _is_double(reply.result(HANG), 3)


def a_reply_shares_no_memory(ground: Ground) -> None:
    """Writing to a reply shows neither in the request, nor in another reply, nor in the model."""
    bias = torch.ones(3)

    def model(td: TensorDictBase) -> TensorDictBase:
        return TensorDict(
            {"observation": td["observation"], "bias": bias.expand(td.batch_size[0], 3)}, batch_size=td.batch_size
        )

    asked = [request(index) for index in range(4)]
    with ground.serve(model, start=False) as (server, callers):
        pending = [callers.call(index, td) for index, td in enumerate(asked)]
        eventually(lambda: server.stats().pending == 4)
        server.start()
        replies = [reply.result(HANG) for reply in pending]
    for reply in replies:
        assert (reply["bias"] == 1).all()
        reply["bias"].fill_(-1)
        reply["observation"].fill_(-1)
    assert (bias == 1).all()
    for value, td in enumerate(asked):
        assert (td["observation"] == value).all()


# -- unlike requests ---------------------------------------------------------------------------------------


def unlike_requests_are_batched_apart(ground: Ground) -> None:
    """Requests of unlike keys, shapes or dtypes never meet, and each group takes one pass."""
    batches: list[int] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        batches.append(td.batch_size[0])
        return td.clone()

    kinds = (
        request(1),
        request(1, size=5),
        TensorDict({"other": torch.ones(3)}),
        TensorDict({"observation": torch.ones(3).long()}),
    )
    with ground.serve(model, start=False) as (server, callers):
        replies = [callers.call(index, kinds[index % 4]) for index in range(8)]
        eventually(lambda: server.stats().pending == 8)
        server.start()
        for index, reply in enumerate(replies):
            expected = kinds[index % 4]
            found = reply.result(HANG)
            assert set(found.keys()) == set(expected.keys())
            for key, value in expected.items():
                assert found[key].dtype == value.dtype
                assert (found[key] == value).all()
    assert batches == [2, 2, 2, 2]


def exploration_modes_are_batched_apart(ground: Ground) -> None:
    """The exploration mode in force at the caller is in force when its row is computed, and nowhere else."""
    codes = {None: 0, "random": 1, "mean": 2}

    def model(td: TensorDictBase) -> TensorDictBase:
        mode = interaction_type()
        code = torch.full(td.batch_size, codes[None if mode is None else mode.value])
        return TensorDict({"action": code}, batch_size=td.batch_size)

    modes = [None, InteractionType.RANDOM, InteractionType.MEAN]
    with ground.serve(model) as (_, callers):
        for turn in range(12):
            mode = modes[turn % 3]
            reply = callers.call(0, request(1), around=calling_in(mode)).result(HANG)
            assert reply["action"] == codes[None if mode is None else mode.value]
            assert interaction_type() is None


def invalid_requests_are_refused_at_once(ground: Ground) -> None:
    """What is no request, or not of the layout that the server was told, is refused where it is submitted."""
    bad = (
        "observation",
        {"observation": torch.ones(3)},
        TensorDict({"observation": torch.ones(2, 3)}, batch_size=[2]),
        TensorDict({"other": torch.ones(3)}),
        request(1, size=4),
        TensorDict({"observation": torch.ones(3).long()}),
    )
    with ground.serve(double, request_spec=request(0)) as (server, callers):
        for td in bad:
            _expect(InvalidRequestError, callers.call(0, td))
        assert _is_double(callers.call(0, request(2)).result(HANG), 2)
        assert server.stats().rejected == len(bad)


# -- errors of the model -----------------------------------------------------------------------------------


def a_request_that_the_model_cannot_serve_fails_alone(ground: Ground) -> None:
    """Where the model raises on a batch, only those fail that it can't serve alone, each with an error of its own."""

    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            raise ArithmeticError("negative")
        return double(td)

    with ground.serve(model, start=False) as (server, callers):
        replies = [callers.call(index, request(-1 if index in (3, 8) else index)) for index in range(12)]
        eventually(lambda: server.stats().pending == 12)
        server.start()
        errors = [_expect(ArithmeticError, replies.pop(index)) for index in (8, 3)]
        assert errors[0] is not errors[1]
        assert all(str(error) == "negative" and isinstance(error.__cause__, ArithmeticError) for error in errors)
        for index, reply in zip([i for i in range(12) if i not in (3, 8)], replies, strict=True):
            assert _is_double(reply.result(HANG), index)
        assert (server.stats().ok, server.stats().failed) == (10, 2)


def any_exception_out_of_the_model_ends_its_requests(ground: Ground) -> None:
    """Also one that is meant to end a thread or a task: the caller gets an error, and the server lives on."""
    raised = [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration(), GeneratorExit()]

    def model(td: TensorDictBase) -> TensorDictBase:
        value = int(td["observation"].flatten()[0])
        if value < 0:
            raise raised[-value - 1]
        return double(td)

    with ground.serve(model) as (server, callers):
        for index, original in enumerate(raised):
            error = _expect(ModelError, callers.call(0, request(-1 - index)))
            assert error.__cause__ is original
        assert _is_double(callers.call(0, request(2)).result(HANG), 2)
        assert server.is_alive


def wrong_output_fails_its_batch_and_says_what_it_was(ground: Ground) -> None:
    """A model that returns no TensorDict, or the wrong number of rows, fails that batch only."""
    outputs: list[Any] = [None, torch.ones(1, 3), TensorDict({"action": torch.ones(7, 3)}, batch_size=[7]), None]

    def model(td: TensorDictBase) -> Any:
        return outputs.pop(0) if len(outputs) > 1 else double(td)

    with ground.serve(model) as (_, callers):
        for word in ("NoneType", "Tensor", "[7]"):
            assert word in str(_expect(ModelError, callers.call(0, request(1))))
        assert _is_double(callers.call(0, request(2)).result(HANG), 2)


# -- callers that go away ----------------------------------------------------------------------------------


def a_cancelled_request_changes_nobody_elses(ground: Ground) -> None:
    """Cancelled while it waits it is not computed, where the transport can; its neighbours get their replies."""
    model = GatedModel()
    with ground.serve(model) as (server, callers):
        first = callers.call(0, request(0))
        assert model.entered.wait(HANG)
        cancels = [callers.submit(index, request(index)) for index in range(1, 5)]
        others = [callers.call(index, request(index)) for index in range(5, 9)]
        eventually(lambda: server.stats().pending == 8)
        for cancel in cancels:
            cancel()
        model.open()
        assert _is_double(first.result(HANG), 0)
        for index, reply in enumerate(others, 5):
            assert _is_double(reply.result(HANG), index)
        for index in range(1, 5):  # their clients are usable again
            assert _is_double(callers.call(index, request(10 + index)).result(HANG), 10 + index)
        if ground.drops_cancelled:
            assert not model.seen & {1, 2, 3, 4}
            assert server.stats().cancelled == 4


def a_request_cancelled_in_its_forward_pass_changes_nobody_elses(ground: Ground) -> None:
    """Its reply is thrown away, and its client is usable at once."""
    model = GatedModel()
    with ground.serve(model) as (_, callers):
        cancel = callers.submit(0, request(0))
        assert model.entered.wait(HANG)
        cancel()
        replies = [callers.call(index, request(10 + index)) for index in range(3)]
        model.open()
        for index, reply in enumerate(replies):
            assert _is_double(reply.result(HANG), 10 + index)


def a_call_that_times_out_leaves_its_client_usable(ground: Ground) -> None:
    """``TimeoutError`` comes on time, and the stale reply is never taken for a fresh one."""
    model = GatedModel()
    with ground.serve(model) as (_, callers):
        for turn in range(3):
            _expect(TimeoutError, callers.call(0, request(turn), timeout=0.01))
        reply = callers.call(0, request(7))
        model.open()
        assert _is_double(reply.result(HANG), 7)
        for turn in range(20):
            assert _is_double(callers.call(0, request(turn)).result(HANG), turn)


# -- a bounded queue ---------------------------------------------------------------------------------------


def a_full_queue_refuses_at_once(ground: Ground) -> None:
    """Past ``max_pending`` a caller is refused, or waits for room if it asked to."""
    model = GatedModel()
    with ground.serve(model, max_pending=2) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG)
        eventually(lambda: server.stats().pending == 0)
        replies += [callers.call(index, request(index)) for index in (1, 2)]
        eventually(lambda: server.stats().pending == 2)
        _expect(ServerOverloadedError, callers.call(3, request(3)))
        assert server.stats().rejected == 1
        waiting = [callers.call(index, request(index), wait=True) for index in range(4, 9)]
        model.open()
        for index, reply in zip((0, 1, 2, 4, 5, 6, 7, 8), (*replies, *waiting), strict=True):
            assert _is_double(reply.result(HANG), index)


def waiting_for_room_ends_with_its_deadline(ground: Ground) -> None:
    """Who waits for room with a timeout gets ``TimeoutError``, and takes nobody's place."""
    model = GatedModel()
    with ground.serve(model, max_pending=1) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG)
        replies.append(callers.call(1, request(1)))
        eventually(lambda: server.stats().pending == 1)
        _expect(TimeoutError, callers.call(2, request(2), timeout=0.01, wait=True))
        replies.append(callers.call(3, request(3), wait=True))
        model.open()
        for index, reply in zip((0, 1, 3), replies, strict=True):
            assert _is_double(reply.result(HANG), index)
    assert 2 not in model.seen


# -- the end -----------------------------------------------------------------------------------------------


def shutdown_fails_what_is_pending_and_refuses_what_comes(ground: Ground) -> None:
    """The batch under way is answered; nothing hangs, neither pending nor submitted later."""
    model = GatedModel()
    with ground.serve(model, max_pending=4) as (server, callers):
        first = callers.call(0, request(0))
        assert model.entered.wait(HANG)
        pending = [callers.call(index, request(index)) for index in range(1, 5)]
        eventually(lambda: server.stats().pending == 4)
        waiting = callers.call(5, request(5), wait=True)
        callers.in_background(lambda: server.shutdown(HANG))
        _expect(ServerClosedError, waiting)
        model.open()
        for reply in pending:
            _expect(ServerClosedError, reply)
        assert _is_double(first.result(HANG), 0)
        eventually(lambda: not server.is_alive)
        _expect(ServerClosedError, callers.call(6, request(6)))
        assert not model.seen & {1, 2, 3, 4, 5}


def shutdown_can_serve_what_is_pending_first(ground: Ground) -> None:
    """``drain=True`` answers what is pending, and refuses only what comes."""
    model = GatedModel()
    with ground.serve(model) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG)
        replies += [callers.call(index, request(index)) for index in range(1, 5)]
        eventually(lambda: server.stats().pending == 4)
        closing = callers.in_background(lambda: server.shutdown(HANG, drain=True))
        eventually(lambda: callers.refused(5, request(5)))
        model.open()
        for index, reply in enumerate(replies):
            assert _is_double(reply.result(HANG), index)
        closing.result(HANG)
        assert not server.is_alive


def shutdown_does_not_wait_for_a_model_that_hangs(ground: Ground) -> None:
    """It returns after its timeout, and the requests under way fail; no second worker starts beside the first."""
    model = GatedModel()
    with ground.serve(model) as (server, callers):
        reply = callers.call(0, request(0))
        assert model.entered.wait(HANG)
        server.shutdown(timeout=0.01)
        _expect(ServerClosedError, reply)
        assert server.is_alive
        _raises(RuntimeError, server.start)
        model.open()
        eventually(lambda: not server.is_alive)
        server.start()
        assert _is_double(callers.call(0, request(1)).result(HANG), 1)


def a_server_serves_again_after_a_restart(ground: Ground) -> None:
    """``start`` after ``shutdown`` takes requests from the same clients."""
    with ground.serve(double) as (server, callers):
        for value in range(3):
            assert _is_double(callers.call(0, request(value)).result(HANG), value)
            server.shutdown()
            _expect(ServerClosedError, callers.call(0, request(value)))
            server.start()


CHECKS: tuple[Callable[[Ground], None], ...] = (
    every_caller_gets_its_own_reply,
    requests_that_wait_meet_in_one_batch,
    a_batch_holds_max_batch_size_at_most,
    requests_made_before_the_start_are_served,
    a_reply_shares_no_memory,
    unlike_requests_are_batched_apart,
    exploration_modes_are_batched_apart,
    invalid_requests_are_refused_at_once,
    a_request_that_the_model_cannot_serve_fails_alone,
    any_exception_out_of_the_model_ends_its_requests,
    wrong_output_fails_its_batch_and_says_what_it_was,
    a_cancelled_request_changes_nobody_elses,
    a_request_cancelled_in_its_forward_pass_changes_nobody_elses,
    a_call_that_times_out_leaves_its_client_usable,
    a_full_queue_refuses_at_once,
    waiting_for_room_ends_with_its_deadline,
    shutdown_fails_what_is_pending_and_refuses_what_comes,
    shutdown_can_serve_what_is_pending_first,
    shutdown_does_not_wait_for_a_model_that_hangs,
    a_server_serves_again_after_a_restart,
)


def _is_double(reply: TensorDictBase, value: float) -> bool:
    return bool((reply["action"] == 2 * value).all())


def _expect(kind: type[E], reply: Future[TensorDictBase]) -> E:
    return _raises(kind, lambda: reply.result(HANG))


def _raises(kind: type[E], action: Callable[[], Any]) -> E:
    try:
        outcome = action()
    except kind as error:
        return error
    raise AssertionError(f"expected {kind.__name__}, got {outcome!r}")
