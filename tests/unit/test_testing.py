"""What ``aioinfer.testing`` gives to those who test a transport of their own, or code around a server."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.testing import BlockingCallers, GatedModel, TransportHarness
from aioinfer.testing.callers import raises
from aioinfer.testing.reply_checks import a_request_that_the_model_cannot_serve_fails_alone
from tests.transports import FiveVerbs


def _same(td: TensorDictBase) -> TensorDictBase:
    return td


def _opened(model: GatedModel) -> GatedModel:
    model.open()
    return model


@pytest.mark.parametrize(
    ("batch", "key", "remembered"),
    [
        ({"pixels": torch.tensor([[[1], [9]], [[2], [9]]])}, None, [1, 2]),
        ({"agents": {"left": {"position": torch.tensor([[3.0, 9.0], [4.0, 9.0]])}}}, None, [3, 4]),
        ({"task": torch.tensor([5, 6])}, None, [5, 6]),
        ({"first": torch.zeros(2), "agents": {"position": torch.tensor([7, 8])}}, ("agents", "position"), [7, 8]),
    ],
    ids=["another entry", "a nested entry", "an entry without dimensions", "a named entry"],
)
def test_a_gated_model_remembers_the_first_element_of_each_row(
    batch: dict[str, Any], key: tuple[str, ...] | None, remembered: list[float]
) -> None:
    model = _opened(GatedModel(_same, key=key))
    td = TensorDict(batch, batch_size=[2])
    assert model(td) is td
    assert model.batches == [remembered]
    assert model.seen == set(remembered)


def test_a_gated_model_says_that_a_batch_has_no_tensor() -> None:
    with pytest.raises(ValueError, match=r"no tensor to remember, only the entries \['nothing'\]"):
        _opened(GatedModel(_same))(TensorDict({"nothing": {}}, batch_size=[2]))


class ReturnsErrors(FiveVerbs):
    """A mistake that is easily made: an error is handed over as if it were a reply."""

    def resolve_exception(self, callback: Any, exc: BaseException) -> None:
        callback.set_result(exc)


def test_the_contract_says_that_an_error_was_returned_and_not_raised() -> None:
    with pytest.raises(AssertionError) as failed:
        a_request_that_the_model_cannot_serve_fails_alone(TransportHarness(ReturnsErrors, BlockingCallers))
    said = str(failed.value)
    assert said.startswith("expected the call to raise ArithmeticError, but it returned the error as its reply: ")
    assert said.endswith("ArithmeticError('negative')")


def test_what_happened_instead_of_an_expected_error_is_said() -> None:
    def wrong() -> None:
        raise KeyError("other")

    with pytest.raises(AssertionError, match=r"raise TimeoutError, but it raised KeyError\('other'\)"):
        raises(TimeoutError, wrong)
    with pytest.raises(AssertionError, match="raise TimeoutError, but it returned: 3"):
        raises(TimeoutError, lambda: 3)
