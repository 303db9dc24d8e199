"""How often an environment is restarted."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest

from aioinfer.collectors.restarts import RestartBudget, Restarts


def test_each_member_has_as_many_restarts_as_it_may_in_a_minute_and_in_its_life() -> None:
    budget = RestartBudget(Restarts(lifetime=4, per_minute=2))
    times = (0.0, 1.0, 59.9, 60.0, 60.5, 61.0, 500.0)
    assert [budget.spend(3, now) for now in times] == [True, True, False, True, False, True, False]
    assert budget.spend(5, 500.0)
    assert budget.spent == {3: 4, 5: 1}


@pytest.mark.parametrize("restarts", [None, Restarts(lifetime=0)])
def test_a_member_without_restarts_is_never_restarted(restarts: Restarts | None) -> None:
    budget = RestartBudget(restarts)
    assert not budget.spend(0, 0.0)
    assert not budget.spent


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"lifetime": -1}, ValueError, "lifetime must be at least 0, got -1"),
        ({"per_minute": 0}, ValueError, "per_minute must be at least 1, got 0"),
        ({"lifetime": 1.5}, TypeError, "lifetime must be an integer, got 1.5"),
        ({"per_minute": True}, TypeError, "per_minute must be an integer, got True"),
    ],
)
def test_numbers_of_restarts_are_checked(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        Restarts(**arguments)


def test_restarts_are_values() -> None:
    assert Restarts() == Restarts(lifetime=10, per_minute=1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        Restarts().lifetime = 3  # type: ignore[misc]
