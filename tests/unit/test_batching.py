from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from aioinfer.batching import BatchLimits, DispatchReason


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_batch_size": 0},
        {"min_batch_size": 0},
        {"max_batch_size": 4, "min_batch_size": 5},
        {"timeout": -0.001},
        {"timeout": float("nan")},
    ],
)
def test_values_out_of_range_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="must"):
        BatchLimits(**arguments)


@pytest.mark.parametrize("arguments", [{"max_batch_size": 2.0}, {"min_batch_size": True}, {"timeout": "1"}])
def test_values_of_the_wrong_type_are_refused(arguments: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match="must"):
        BatchLimits(**arguments)


@pytest.mark.parametrize(
    ("pending", "waited", "callers", "draining", "reason"),
    [
        (8, 0.0, None, False, DispatchReason.FULL),
        (4, 0.0, None, False, DispatchReason.IDLE),
        (3, 0.0, None, False, None),
        (3, 0.1, None, False, DispatchReason.TIMEOUT),
        (3, 0.0, 3, False, DispatchReason.ALL_WAITING),
        (3, 0.0, 4, False, None),
        (3, 0.0, None, True, DispatchReason.DRAIN),
    ],
)
def test_a_batch_leaves_for_the_first_reason_that_holds(
    pending: int, waited: float, callers: int | None, draining: bool, reason: DispatchReason | None
) -> None:
    rule = BatchLimits(max_batch_size=8, min_batch_size=4, timeout=0.1)
    assert rule.decide(pending=pending, waited=waited, callers=callers, draining=draining) is reason


rules = st.integers(1, 100).flatmap(
    lambda most: st.builds(
        BatchLimits, st.just(most), st.integers(1, most), st.floats(0, 10, allow_nan=False, allow_infinity=False)
    )
)


@given(rule=rules, pending=st.integers(1, 200), callers=st.none() | st.integers(1, 200))
def test_no_request_waits_longer_than_the_timeout(rule: BatchLimits, pending: int, callers: int | None) -> None:
    assert rule.decide(pending=pending, waited=rule.timeout, callers=callers) is not None


@given(most=st.integers(1, 100), waited=st.floats(0, 10), pending=st.integers(1, 200))
def test_nobody_pays_the_batching_wait_where_batches_of_one_are_allowed(most: int, waited: float, pending: int) -> None:
    assert BatchLimits(max_batch_size=most, min_batch_size=1, timeout=10).decide(pending=pending, waited=waited)


@given(rule=rules, pending=st.integers(1, 200), waited=st.floats(0, 20), callers=st.none() | st.integers(1, 200))
def test_a_held_batch_is_one_that_the_wait_for_more_can_end(
    rule: BatchLimits, pending: int, waited: float, callers: int | None
) -> None:
    if rule.decide(pending=pending, waited=waited, callers=callers) is None:
        assert pending < rule.wanted(callers) <= rule.min_batch_size
        assert waited < rule.timeout
