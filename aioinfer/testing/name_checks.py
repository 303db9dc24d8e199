"""Checks of the transport contract: requests by name."""

from __future__ import annotations

from typing import Any

import numpy as np

from aioinfer.errors import InvalidRequestError
from aioinfer.testing.callers import (
    HANG_TIMEOUT,
    GatedModel,
    TransportHarness,
    are_doubles,
    double,
    eventually,
    expect_doubles,
    expect_error,
    named_requests,
    request,
)


def requests_by_name_are_like_any_other(harness: TransportHarness) -> None:
    """Tensors, arrays and numbers make the request that a TensorDict of them would be; nobody's array is changed."""
    with harness.serve(double) as (server, callers):
        for turn in range(3):
            asked = named_requests(turn)
            expect_doubles([callers.call(index, named) for index, named in enumerate(asked)], [turn] * len(asked))
            assert all(named["observation"][0] == turn for named in asked)
        assert server.stats().ok == 3 * len(named_requests(0))


def requests_by_name_share_a_pass_with_others(harness: TransportHarness) -> None:
    """They are batched with each other, and with TensorDicts of their layout."""
    model = GatedModel()
    with harness.serve(model) as (server, callers):
        replies = [callers.call(0, request(0))]
        assert model.entered.wait(HANG_TIMEOUT)
        named = [form for form in named_requests(1) if isinstance(form["observation"], np.ndarray)]
        replies += [callers.call(index, form) for index, form in enumerate(named, 1)]
        replies.append(callers.call(9, request(1)))
        eventually(lambda: server.stats().pending == len(replies) - 1)
        model.open()
        expect_doubles(replies, [0] + [1] * (len(replies) - 1))
    assert sorted(map(len, model.batches)) == [1, len(replies) - 1]


def what_cannot_be_a_tensor_is_refused_by_name(harness: TransportHarness) -> None:
    """The error names the entry; the others get their replies."""
    masked = np.ma.masked_equal(np.arange(3, dtype=np.float32), 1)
    bad: tuple[Any, ...] = ("up", None, object(), np.array(["up"]), [[1.0], [1.0, 2.0]], masked)
    with harness.serve(double) as (server, callers):
        good = callers.call(0, request(2))
        for index, value in enumerate(bad, 1):
            error = expect_error(InvalidRequestError, callers.call(index, {"observation": value}))
            assert '"observation" can\'t be a tensor' in str(error)
        expect_doubles([good], [2])
        eventually(lambda: server.stats().rejected == len(bad))


def rows_by_name_get_as_many(harness: TransportHarness) -> None:
    """Where a ``request_spec`` tells what a row is, an array of rows is a request of several."""
    with harness.serve(double, request_spec=request(0)) as (server, callers):
        rows = np.repeat(np.arange(5, dtype=np.float32)[:, None], 3, axis=1)
        assert are_doubles(callers.call(0, {"observation": rows}).result(HANG_TIMEOUT), *range(5))
        expect_doubles([callers.call(1, {"observation": rows[3]})], [3])
        expect_error(InvalidRequestError, callers.call(2, {"observation": rows[:, :2]}))
        expect_error(InvalidRequestError, callers.call(3, {"observation": rows.astype(np.float64)}))
        eventually(lambda: server.stats().rejected == 2)
        assert server.stats().ok == 2
