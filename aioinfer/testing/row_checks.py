"""Checks of the transport contract: requests of several rows."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.errors import InvalidRequestError, ServerClosedError, ServerOverloadedError
from aioinfer.testing.callers import (
    HANG_TIMEOUT,
    GatedModel,
    TransportHarness,
    are_doubles,
    double,
    eventually,
    expect_doubles,
    expect_error,
    is_double,
    request,
    request_of,
)


def a_request_of_several_rows_gets_as_many(harness: TransportHarness) -> None:
    """Row by row and in order, whatever else is under way; the version of the weights comes with each row."""
    with harness.serve(double, max_batch_size=5) as (server, callers):
        for turn in range(10):
            asked = [range(100 * turn + 10 * index, 100 * turn + 10 * index + index) for index in range(8)]
            replies = [callers.call(index, request_of(*values)) for index, values in enumerate(asked)]
            single = [callers.call(index, request(index)) for index in range(8, 12)]
            for values, future in zip(asked, replies, strict=True):
                reply = future.result(HANG_TIMEOUT)
                assert are_doubles(reply, *values) if values else reply.batch_size == (0,)
                assert torch.equal(reply["policy_version"], torch.zeros(len(values), dtype=torch.int64))
            expect_doubles(single, range(8, 12))
        assert server.stats().ok == 120


def requests_of_one_row_and_of_many_share_a_pass(harness: TransportHarness) -> None:
    """The policy sees one batch dimension; what is pending counts rows."""
    model = GatedModel()
    with harness.serve(model) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG_TIMEOUT)
        single = [callers.call(index, request(index)) for index in (1, 2)]
        many = [callers.call(3, request_of(3, 4, 5)), callers.call(4, request_of(6))]
        eventually(lambda: server.stats().pending == 6)
        model.open()
        expect_doubles([*replies, *single], range(3))
        assert are_doubles(many[0].result(HANG_TIMEOUT), 3, 4, 5)
        assert are_doubles(many[1].result(HANG_TIMEOUT), 6)
        assert server.stats().mean_batch_size == 3.5
    assert sorted(map(len, model.batches)) == [1, 6]


def a_request_is_split_only_if_no_pass_takes_its_rows(harness: TransportHarness) -> None:
    """A request that does not fit beside others waits for the next pass; one that fits none is split, in order."""
    model = GatedModel()
    asked = [request_of(1, 2, 3), request_of(4, 5), request_of(*range(6, 16)), request(16), request_of(17, 18)]
    with harness.serve(model, max_batch_size=4) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG_TIMEOUT)
        pending = 0
        for index, td in enumerate(asked, 1):
            replies.append(callers.call(index, td))
            pending += td.batch_size[0] if td.batch_dims else 1
            eventually(lambda: server.stats().pending == pending)  # noqa: B023
        model.open()
        for reply, td in zip(replies[1:], asked, strict=True):
            assert torch.equal(reply.result(HANG_TIMEOUT)["action"], double(td)["action"])
        assert server.stats().ok == 6
    assert model.batches == [[0], [1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11, 12, 13], [14, 15, 16], [17, 18]]


def a_request_without_rows_is_answered_at_once(harness: TransportHarness) -> None:
    """Without a forward pass, and with the entries that replies are known to have."""
    model = GatedModel()
    with harness.serve(model) as (server, callers):
        first = callers.call(0, request(0))
        assert model.entered.wait(HANG_TIMEOUT)
        without = callers.call(1, request_of())
        if harness.remote:  # the server may read what other processes send when the pass is over
            model.open()
        reply = without.result(HANG_TIMEOUT)
        assert reply.batch_size == reply["policy_version"].shape == (0,)
        model.open()
        assert is_double(first.result(HANG_TIMEOUT), 0)
        assert callers.call(1, request_of()).result(HANG_TIMEOUT)["action"].shape == (0, 3)
        assert server.stats().ok == 3
    assert model.batches == [[0]]


def rows_share_no_memory_with_anybody(harness: TransportHarness) -> None:
    """What the model or a caller writes in place shows in no request, no other reply and no other row."""

    def model(td: TensorDictBase) -> TensorDictBase:
        td["observation"].add_(1)
        return TensorDict({"observation": td["observation"]}, batch_size=td.batch_size)

    asked = [request_of(1, 2), request_of(*range(300)) if not harness.fixed_layout else request_of(3), request(4)]
    for some in (asked[:1], asked):  # alone in its batch, and with others
        with harness.serve(model, start=False, reply=request(0)) as (server, callers):
            pending = [callers.call(index, td) for index, td in enumerate(some)]
            eventually(lambda: server.stats().pending == sum(max(1, td.numel()) for td in some))  # noqa: B023
            server.start()
            replies = [future.result(HANG_TIMEOUT) for future in pending]
        for reply, td in zip(replies, some, strict=True):
            assert torch.equal(reply["observation"], td["observation"] + 1)
            assert reply["observation"].untyped_storage().nbytes() <= max(12 * td.numel(), 1024)
            reply["observation"][..., 0] = -1
            assert torch.equal(reply["observation"][..., 1], td["observation"][..., 1] + 1)


def rows_of_unlike_layout_meet_in_no_batch(harness: TransportHarness) -> None:
    """The number of rows is no part of the layout; more than one dimension of rows is refused."""
    model = GatedModel()
    with harness.serve(model) as (server, callers):
        expect_error(InvalidRequestError, callers.call(0, request_of(1, 2).reshape(2, 1)))
        if harness.fixed_layout:
            expect_error(InvalidRequestError, callers.call(0, request_of(1, size=4)))
            return
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG_TIMEOUT)
        replies += [callers.call(1, request(1)), callers.call(2, request_of(2, 3)), callers.call(3, request(4, size=4))]
        replies += [callers.call(4, request_of(5, 6, 7, size=4))]
        eventually(lambda: server.stats().pending == 7)
        model.open()
        for reply in replies:
            reply.result(HANG_TIMEOUT)
    assert sorted(map(sorted, model.batches)) == [[0], [1, 2, 3], [4, 5, 6, 7]]


def min_batch_size_counts_rows(harness: TransportHarness) -> None:
    """A batch that has as many leaves at once."""
    with harness.serve(double, min_batch_size=8, timeout=10 * HANG_TIMEOUT) as (_, callers):
        assert are_doubles(callers.call(0, request_of(*range(8))).result(HANG_TIMEOUT), *range(8))


def a_request_of_several_rows_fails_alone_and_as_a_whole(harness: TransportHarness) -> None:
    """Where the model raises on a batch, requests are told apart, and not the rows of one."""
    passes: list[int] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        passes.append(td.batch_size[0])
        if (td["observation"] < 0).any():
            raise ArithmeticError("negative")
        return double(td)

    with harness.serve(model, start=False) as (server, callers):
        bad = callers.call(0, request_of(1, -1, 2, 3))
        good = callers.call(1, request_of(4, 5))
        single = callers.call(2, request(6))
        eventually(lambda: server.stats().pending == 7)
        server.start()
        expect_error(ArithmeticError, bad)
        assert are_doubles(good.result(HANG_TIMEOUT), 4, 5)
        assert is_double(single.result(HANG_TIMEOUT), 6)
        assert (server.stats().ok, server.stats().failed) == (2, 1)
    assert passes.count(4) <= 1
    assert not {1, 2} & set(passes[:1])


def a_split_request_fails_with_its_first_part(harness: TransportHarness) -> None:
    """Once, and the parts after it are not computed; its client is usable again."""
    seen: list[float] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        seen.extend(td["observation"][:, 0].tolist())
        if (td["observation"] < 0).any():
            raise ArithmeticError("negative")
        return double(td)

    with harness.serve(model, max_batch_size=2) as (server, callers):
        expect_error(ArithmeticError, callers.call(0, request_of(1, 2, -3, 4, 5, 6, 7)))
        assert are_doubles(callers.call(0, request_of(8, 9, 10)).result(HANG_TIMEOUT), 8, 9, 10)
        assert (server.stats().ok, server.stats().failed, server.stats().pending) == (1, 1, 0)
    assert seen == [1, 2, -3, 4, 8, 9, 10]


def a_cancelled_request_leaves_with_all_its_rows(harness: TransportHarness) -> None:
    """Those that no pass has taken yet are never computed, where the transport can; its client is usable at once."""
    model = GatedModel()
    with harness.serve(model, max_batch_size=2) as (server, callers):
        cancel = callers.submit(0, request_of(0, 1, 2, 3, 4))  # its first part is at the gate
        assert model.entered.wait(HANG_TIMEOUT)
        cancel_other = callers.submit(1, request_of(5, 6))
        other = callers.call(2, request_of(7, 8))
        eventually(lambda: server.stats().pending == 7)
        cancel()
        cancel_other()
        model.open()
        assert are_doubles(other.result(HANG_TIMEOUT), 7, 8)
        assert are_doubles(callers.call(0, request_of(9, 10, 11)).result(HANG_TIMEOUT), 9, 10, 11)
        if harness.drops_cancelled:
            assert not model.seen & {2, 3, 4, 5, 6}
            assert (server.stats().ok, server.stats().cancelled) == (2, 2)


def a_full_queue_counts_rows(harness: TransportHarness) -> None:
    """Past ``max_pending`` rows a caller is refused, or waits for space; more rows than that need an empty queue."""
    model = GatedModel()
    with harness.serve(model, max_pending=4) as (server, callers):
        first = callers.call(0, request(0))
        assert model.entered.wait(HANG_TIMEOUT)
        eventually(lambda: server.stats().pending == 0)
        pending = callers.call(1, request_of(1, 2, 3))
        eventually(lambda: server.stats().pending == 3)
        expect_error(ServerOverloadedError, callers.call(2, request_of(4, 5)))
        assert callers.call(2, request_of()).result(HANG_TIMEOUT).batch_size == (0,)
        last = callers.call(3, request(6))
        eventually(lambda: server.stats().pending == 4)
        expect_error(ServerOverloadedError, callers.call(4, request(7)))
        assert server.stats().rejected == 2
        waiting = [callers.call(4, request_of(7, 8), wait=True), callers.call(5, request_of(*range(9, 15)), wait=True)]
        model.open()
        assert is_double(first.result(HANG_TIMEOUT), 0)
        assert is_double(last.result(HANG_TIMEOUT), 6)
        assert are_doubles(pending.result(HANG_TIMEOUT), 1, 2, 3)
        assert are_doubles(waiting[0].result(HANG_TIMEOUT), 7, 8)
        assert are_doubles(waiting[1].result(HANG_TIMEOUT), *range(9, 15))


def shutdown_ends_requests_of_several_rows(harness: TransportHarness) -> None:
    """Also one of which a part is being computed, and others wait."""
    model = GatedModel()
    with harness.serve(model, max_batch_size=2) as (server, callers):
        split = callers.call(0, request_of(0, 1, 2, 3, 4))
        assert model.entered.wait(HANG_TIMEOUT)
        pending = callers.call(1, request_of(5, 6))
        eventually(lambda: server.stats().pending == 5)
        ending = callers.in_background(lambda: server.shutdown(HANG_TIMEOUT))
        expect_error(ServerClosedError, pending)
        expect_error(ServerClosedError, split)
        model.open()
        ending.result(HANG_TIMEOUT)
        assert server.stats().failed == 2
    assert not model.seen & {2, 3, 4, 5, 6}
