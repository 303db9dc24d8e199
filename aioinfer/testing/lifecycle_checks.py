"""Checks of the transport contract: cancellation, the bounded queue, shutdown and restart."""

from __future__ import annotations

from aioinfer.errors import ServerClosedError, ServerOverloadedError
from aioinfer.testing.callers import (
    HANG_TIMEOUT,
    GatedModel,
    TransportHarness,
    double,
    eventually,
    expect_doubles,
    expect_error,
    is_double,
    raises,
    request,
)

# -- callers that go away ----------------------------------------------------------------------------------


def a_cancelled_request_changes_nobody_elses(harness: TransportHarness) -> None:
    """Cancelled while it waits it is not computed, where the transport can; its neighbours get their replies."""
    model = GatedModel()
    with harness.serve(model) as (server, callers):
        first = callers.call(0, request(0))
        assert model.entered.wait(HANG_TIMEOUT)
        cancels = [callers.submit(index, request(index)) for index in range(1, 5)]
        others = [callers.call(index, request(index)) for index in range(5, 9)]
        eventually(lambda: server.stats().pending == 8)
        for cancel in cancels:
            cancel()
        model.open()
        assert is_double(first.result(HANG_TIMEOUT), 0)
        expect_doubles(others, range(5, 9))
        for index in range(1, 5):  # their clients are usable again
            assert is_double(callers.call(index, request(10 + index)).result(HANG_TIMEOUT), 10 + index)
        if harness.drops_cancelled:
            assert not model.seen & {1, 2, 3, 4}
            assert server.stats().cancelled == 4


def a_request_cancelled_in_its_forward_pass_changes_nobody_elses(harness: TransportHarness) -> None:
    """Its reply is thrown away, and its client is usable at once."""
    model = GatedModel()
    with harness.serve(model) as (_, callers):
        cancel = callers.submit(0, request(0))
        assert model.entered.wait(HANG_TIMEOUT)
        cancel()
        replies = [callers.call(index, request(10 + index)) for index in range(3)]
        model.open()
        expect_doubles(replies, (10, 11, 12))


def a_call_that_times_out_leaves_its_client_usable(harness: TransportHarness) -> None:
    """``TimeoutError`` comes on time, and the stale reply is never taken for a fresh one."""
    model = GatedModel()
    with harness.serve(model) as (_, callers):
        for turn in range(3):
            expect_error(TimeoutError, callers.call(0, request(turn), timeout=0.01))
        reply = callers.call(0, request(7))
        model.open()
        assert is_double(reply.result(HANG_TIMEOUT), 7)
        for turn in range(20):
            assert is_double(callers.call(0, request(turn)).result(HANG_TIMEOUT), turn)


def a_full_queue_refuses_at_once(harness: TransportHarness) -> None:
    """Past ``max_pending`` a caller is refused, or waits for space if it asked to."""
    model = GatedModel()
    with harness.serve(model, max_pending=2) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG_TIMEOUT)
        eventually(lambda: server.stats().pending == 0)
        replies += [callers.call(index, request(index)) for index in (1, 2)]
        eventually(lambda: server.stats().pending == 2)
        expect_error(ServerOverloadedError, callers.call(3, request(3)))
        assert server.stats().rejected == 1
        waiting = [callers.call(index, request(index), wait=True) for index in range(4, 9)]
        model.open()
        expect_doubles([*replies, *waiting], (0, 1, 2, 4, 5, 6, 7, 8))


def waiting_for_room_ends_with_its_deadline(harness: TransportHarness) -> None:
    """A caller that waits for space with a timeout gets ``TimeoutError``, and its request leaves no trace."""
    model = GatedModel()
    with harness.serve(model, max_pending=1) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG_TIMEOUT)
        replies.append(callers.call(1, request(1)))
        eventually(lambda: server.stats().pending == 1)
        expect_error(TimeoutError, callers.call(2, request(2), timeout=0.01, wait=True))
        replies.append(callers.call(3, request(3), wait=True))
        model.open()
        expect_doubles(replies, (0, 1, 3))
    assert 2 not in model.seen


def shutdown_fails_what_is_pending_and_refuses_what_comes(harness: TransportHarness) -> None:
    """The batch under way is answered; nothing hangs, neither pending nor submitted later."""
    model = GatedModel()
    with harness.serve(model, max_pending=4) as (server, callers):
        first = callers.call(0, request(0))
        assert model.entered.wait(HANG_TIMEOUT)
        pending = [callers.call(index, request(index)) for index in range(1, 5)]
        eventually(lambda: server.stats().pending == 4)
        waiting = callers.call(5, request(5), wait=True)
        callers.in_background(lambda: server.shutdown(HANG_TIMEOUT))
        expect_error(ServerClosedError, waiting)
        model.open()
        for reply in pending:
            expect_error(ServerClosedError, reply)
        assert is_double(first.result(HANG_TIMEOUT), 0)
        eventually(lambda: not server.is_alive)
        expect_error(ServerClosedError, callers.call(6, request(6)))
        assert not model.seen & {1, 2, 3, 4, 5}


def shutdown_can_serve_what_is_pending_first(harness: TransportHarness) -> None:
    """``drain=True`` answers pending requests, and refuses only new ones."""
    model = GatedModel()
    with harness.serve(model) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG_TIMEOUT)
        replies += [callers.call(index, request(index)) for index in range(1, 5)]
        eventually(lambda: server.stats().pending == 4)
        closing = callers.in_background(lambda: server.shutdown(HANG_TIMEOUT, drain=True))
        eventually(lambda: callers.refused(5, request(5)))
        model.open()
        expect_doubles(replies, range(5))
        closing.result(HANG_TIMEOUT)
        assert not server.is_alive


def shutdown_does_not_wait_for_a_model_that_hangs(harness: TransportHarness) -> None:
    """It returns after its timeout, and the requests under way fail; no second worker starts beside the first."""
    model = GatedModel()
    with harness.serve(model) as (server, callers):
        reply = callers.call(0, request(0))
        assert model.entered.wait(HANG_TIMEOUT)
        server.shutdown(timeout=0.01)
        expect_error(ServerClosedError, reply)
        assert server.is_alive
        raises(RuntimeError, server.start)
        model.open()
        eventually(lambda: not server.is_alive)
        server.start()
        assert is_double(callers.call(0, request(1)).result(HANG_TIMEOUT), 1)


def a_server_serves_again_after_a_restart(harness: TransportHarness) -> None:
    """``start`` after ``shutdown`` takes requests from the same clients."""
    with harness.serve(double) as (server, callers):
        for value in range(3):
            assert is_double(callers.call(0, request(value)).result(HANG_TIMEOUT), value)
            server.shutdown(HANG_TIMEOUT)
            expect_error(ServerClosedError, callers.call(0, request(value)))
            server.start()
