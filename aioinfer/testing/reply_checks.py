"""Checks of the transport contract: replies, batching and errors."""

from __future__ import annotations

import asyncio
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.errors import InvalidRequestError, ModelError
from aioinfer.interaction_type import InteractionType, interaction_type, requests_carry
from aioinfer.testing.callers import (
    HANG_TIMEOUT,
    GatedModel,
    TransportHarness,
    double,
    eventually,
    expect_doubles,
    expect_error,
    is_double,
    request,
)

# -- replies -----------------------------------------------------------------------------------------------


def every_caller_gets_its_own_reply(harness: TransportHarness) -> None:
    """A reply is the row of the request that it answers, whatever else is under way."""
    with harness.serve(double, max_batch_size=5) as (server, callers):
        for turn in range(20):
            values = [100 * turn + index for index in range(16)]
            replies = [callers.call(index, request(value)) for index, value in enumerate(values)]
            expect_doubles(replies, values)
        assert server.stats().ok == 320


def requests_that_wait_meet_in_one_batch(harness: TransportHarness) -> None:
    """While the model is busy requests gather, and leave together when it is free."""
    model = GatedModel()
    with harness.serve(model) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG_TIMEOUT)
        replies += [callers.call(index, request(index)) for index in range(1, 9)]
        eventually(lambda: server.stats().pending == 8)
        model.open()
        expect_doubles(replies, range(9))
    assert sorted(map(len, model.batches)) == [1, 8]


def a_batch_holds_max_batch_size_at_most(harness: TransportHarness) -> None:
    """Waiting requests beyond ``max_batch_size`` leave in further batches, in order of arrival."""
    model = GatedModel()
    with harness.serve(model, max_batch_size=3) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG_TIMEOUT)
        for index in range(1, 9):
            replies.append(callers.call(index, request(index)))
            eventually(lambda: server.stats().pending == index)  # noqa: B023
        model.open()
        for reply in replies:
            reply.result(HANG_TIMEOUT)
    assert model.batches == [[0], [1, 2, 3], [4, 5, 6], [7, 8]]


def requests_made_before_the_start_are_served(harness: TransportHarness) -> None:
    """A request may come before its server runs."""
    with harness.serve(double, start=False) as (server, callers):
        reply = callers.call(0, request(3))
        eventually(lambda: server.stats().pending == 1)
        server.start()
        assert is_double(reply.result(HANG_TIMEOUT), 3)


def a_reply_shares_no_memory(harness: TransportHarness) -> None:
    """Writing to a reply shows neither in the request, nor in another reply, nor in the model."""
    bias = torch.ones(3)

    def model(td: TensorDictBase) -> TensorDictBase:
        return TensorDict(
            {"observation": td["observation"], "bias": bias.expand(td.batch_size[0], 3)}, batch_size=td.batch_size
        )

    asked = [request(index) for index in range(4)]
    layout = TensorDict({"observation": torch.zeros(3), "bias": torch.zeros(3)})
    with harness.serve(model, start=False, reply=layout) as (server, callers):
        pending = [callers.call(index, td) for index, td in enumerate(asked)]
        eventually(lambda: server.stats().pending == 4)
        server.start()
        replies = [reply.result(HANG_TIMEOUT) for reply in pending]
    for reply in replies:
        assert (reply["bias"] == 1).all()
        reply["bias"].fill_(-1)
        reply["observation"].fill_(-1)
    assert (bias == 1).all()
    for value, td in enumerate(asked):
        assert (td["observation"] == value).all()


def a_reply_keeps_little_more_than_itself_alive(harness: TransportHarness) -> None:
    """A row of 1 KiB or more has memory of its own; smaller rows may lie in one piece with their batch."""

    def model(td: TensorDictBase) -> TensorDictBase:
        count = td.batch_size[0]
        return TensorDict({"large": torch.zeros(count, 256), "small": torch.zeros(count, 255)}, batch_size=[count])

    layout = TensorDict({"large": torch.zeros(256), "small": torch.zeros(255)})
    with harness.serve(model, start=False, reply=layout) as (server, callers):
        pending = [callers.call(index, request(index)) for index in range(8)]
        eventually(lambda: server.stats().pending == 8)
        server.start()
        for reply in [future.result(HANG_TIMEOUT) for future in pending]:
            assert reply["large"].untyped_storage().nbytes() == 1024
            assert reply["small"].untyped_storage().nbytes() <= 8 * 1020


def a_lone_caller_waits_for_nobody(harness: TransportHarness) -> None:
    """With ``min_batch_size=1`` it never pays the batching wait, else never more than ``timeout``."""
    choices: list[dict[str, Any]] = [{"timeout": 10 * HANG_TIMEOUT}, {"min_batch_size": 8, "timeout": 0.01}]
    for options in choices:
        with harness.serve(double, **options) as (_, callers):
            for value in range(3):
                assert is_double(callers.call(0, request(value)).result(HANG_TIMEOUT), value)


def unlike_requests_are_batched_apart(harness: TransportHarness) -> None:
    """Requests of unlike keys, shapes or dtypes never meet, and each group takes one pass; or they are refused."""
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
    if harness.fixed_layout:
        with harness.serve(double) as (_, callers):
            for kind in kinds[1:]:
                expect_error(InvalidRequestError, callers.call(0, kind))
        return
    with harness.serve(model, start=False) as (server, callers):
        replies = [callers.call(index, kinds[index % 4]) for index in range(8)]
        eventually(lambda: server.stats().pending == 8)
        server.start()
        for index, reply in enumerate(replies):
            expected = kinds[index % 4]
            found = reply.result(HANG_TIMEOUT)
            assert set(found.keys()) == {*expected.keys(), "policy_version"}
            for key, value in expected.items():
                assert found[key].dtype == value.dtype
                assert (found[key] == value).all()
    assert batches == [2, 2, 2, 2]


def exploration_modes_are_batched_apart(harness: TransportHarness) -> None:
    """The exploration mode in force at the caller is in force when its row is computed, and nowhere else."""
    codes = {None: 0, "random": 1, "mean": 2}

    def model(td: TensorDictBase) -> TensorDictBase:
        mode = interaction_type()
        code = torch.full(td.batch_size, codes[None if mode is None else mode.value])
        return TensorDict({"action": code}, batch_size=td.batch_size)

    modes = [None, InteractionType.RANDOM, InteractionType.MEAN]
    with harness.serve(model, reply=TensorDict({"action": torch.tensor(0)})) as (_, callers):
        for turn in range(12):
            mode = modes[turn % 3]
            reply = callers.call(0, request(1), around=requests_carry(mode)).result(HANG_TIMEOUT)
            assert reply["action"] == codes[None if mode is None else mode.value]
            assert interaction_type() is None


def invalid_requests_are_refused_at_once(harness: TransportHarness) -> None:
    """A value that is no request, or not of the layout of ``request_spec``, is refused at ``submit``."""
    bad = (
        "observation",
        [torch.ones(3)],
        TensorDict({"observation": torch.ones(2, 1, 3)}, batch_size=[2, 1]),
        TensorDict({"other": torch.ones(3)}),
        request(1, size=4),
        TensorDict({"observation": torch.ones(3).long()}),
    )
    with harness.serve(double, request_spec=request(0)) as (server, callers):
        for td in bad:
            expect_error(InvalidRequestError, callers.call(0, td))
        assert is_double(callers.call(0, request(2)).result(HANG_TIMEOUT), 2)
        assert server.stats().rejected == len(bad)


def a_request_that_the_model_cannot_serve_fails_alone(harness: TransportHarness) -> None:
    """Where the model raises on a batch, only those fail that it can't serve alone, each with an error of its own."""

    def model(td: TensorDictBase) -> TensorDictBase:
        if (td["observation"] < 0).any():
            raise ArithmeticError("negative")
        return double(td)

    with harness.serve(model, start=False) as (server, callers):
        replies = [callers.call(index, request(-1 if index in (3, 8) else index)) for index in range(12)]
        eventually(lambda: server.stats().pending == 12)
        server.start()
        errors = [expect_error(ArithmeticError, replies.pop(index)) for index in (8, 3)]
        assert errors[0] is not errors[1]
        assert all(str(error) == "negative" and isinstance(error.__cause__, ArithmeticError) for error in errors)
        expect_doubles(replies, (0, 1, 2, 4, 5, 6, 7, 9, 10, 11))
        assert (server.stats().ok, server.stats().failed) == (10, 2)


def any_exception_out_of_the_model_ends_its_requests(harness: TransportHarness) -> None:
    """Also one that is meant to end a thread or a task: the caller gets an error, and the server lives on."""
    raised = [SystemExit(3), KeyboardInterrupt(), asyncio.CancelledError(), StopIteration(), GeneratorExit()]

    def model(td: TensorDictBase) -> TensorDictBase:
        value = int(td["observation"].flatten()[0])
        if value < 0:
            raise raised[-value - 1]
        return double(td)

    with harness.serve(model) as (server, callers):
        for index, original in enumerate(raised):
            error = expect_error(ModelError, callers.call(0, request(-1 - index)))
            assert error.__cause__ is original or (harness.remote and type(original).__name__ in str(error))
        assert is_double(callers.call(0, request(2)).result(HANG_TIMEOUT), 2)
        assert server.is_alive


def wrong_output_fails_its_batch_and_says_what_it_was(harness: TransportHarness) -> None:
    """A model that returns no TensorDict, or the wrong number of rows, fails that batch only."""
    outputs: list[Any] = [None, torch.ones(1, 3), TensorDict({"action": torch.ones(7, 3)}, batch_size=[7]), None]

    def model(td: TensorDictBase) -> Any:
        return outputs.pop(0) if len(outputs) > 1 else double(td)

    with harness.serve(model) as (_, callers):
        for word in ("NoneType", "Tensor", "[7]"):
            assert word in str(expect_error(ModelError, callers.call(0, request(1))))
        assert is_double(callers.call(0, request(2)).result(HANG_TIMEOUT), 2)
