from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import LazyStackedTensorDict, NonTensorData, TensorDict, TensorDictBase, lazy_stack
from torch import nn

from aioinfer import InvalidRequestError, ModelError, tensors
from aioinfer.tensors import (
    RequestSpec,
    UnlikeRequestsError,
    check_output,
    concatenate,
    group_by_layout,
    layout,
    rows,
    split,
    stack,
)


def nested(value: float) -> TensorDict:
    return TensorDict(
        {
            "observation": torch.full((3,), value),
            "inner": TensorDict({"pixels": torch.full((2, 2), int(value)), "done": torch.tensor(value > 1)}),
            "empty": torch.zeros(0),
        }
    )


@pytest.fixture(params=["unchecked", "checked"])
def _constructor(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "checked":
        monkeypatch.setattr(tensors, "build", tensors.build_checked)
    else:
        assert tensors.build is not tensors.build_checked


@pytest.mark.usefixtures("_constructor")
def test_stacked_requests_come_back_as_they_were() -> None:
    requests = [nested(value) for value in range(4)]
    batch = stack(requests)
    assert batch.batch_size == (4,)
    assert batch["inner"].batch_size == (4,)
    for request, reply in zip(requests, rows(batch), strict=True):
        assert reply.batch_size == ()
        assert layout(reply) == layout(request)
        assert (reply == request).all()


def test_where_tensordicts_have_other_attributes_the_public_constructor_is_used(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    construct = TensorDict.__init__

    def add_attribute(self: Any, *args: Any, **options: Any) -> None:
        construct(self, *args, **options)
        self.more = True

    monkeypatch.setattr(TensorDict, "__init__", add_attribute)
    assert tensors.fastest_constructor() is tensors.build_checked


def test_the_order_of_entries_does_not_matter() -> None:
    one, other = (
        TensorDict({"a": torch.ones(2), "b": torch.zeros(2)}),
        TensorDict({"b": torch.zeros(2), "a": torch.ones(2)}),
    )
    assert layout(one) == layout(other)
    batch = stack([one, other])
    assert torch.equal(batch["a"], torch.ones(2, 2))
    assert torch.equal(batch["b"], torch.zeros(2, 2))


@pytest.mark.usefixtures("_constructor")
def test_rows_of_requests_come_back_as_they_were_whatever_each_request_brought() -> None:
    def with_task(value: float) -> Any:
        return nested(value).set_non_tensor("task", f"task {value}")

    requests: list[Any] = [
        torch.stack([with_task(0), with_task(1), with_task(2)]),
        with_task(3),
        torch.stack([with_task(4)]),
        lazy_stack([with_task(5), with_task(6)]),
        with_task(7),
    ]
    sizes = [3, None, 1, 2, None]
    batch = concatenate(requests, [size is not None for size in sizes])
    assert batch.batch_size == batch["inner"].batch_size == (8,)
    assert [row["task"] for row in batch.unbind(0)] == [f"task {value}" for value in range(8)]
    for request, reply in zip(requests, split(batch, sizes), strict=True):
        assert reply.batch_size == request.batch_size
        assert reply["inner"].batch_size == request.batch_size
        for key in ("observation", ("inner", "pixels"), ("inner", "done"), "empty"):
            assert torch.equal(reply[key], request[key])
            reply[key].fill_(1)
        for found, asked in zip(*[td.unbind(0) if td.batch_dims else [td] for td in (reply, request)], strict=True):
            assert found["task"] == asked["task"]
    assert batch["observation"][0].sum() == 0


def test_rows_that_are_unlike_each_other_meet_nobody_but_may_share_a_request() -> None:
    unlike = lazy_stack([TensorDict({"a": torch.ones(2)}), TensorDict({"a": torch.ones(3)})])
    assert concatenate([unlike], [True])[1]["a"].shape == (3,)
    with pytest.raises(UnlikeRequestsError):
        concatenate([unlike, TensorDict({"a": torch.ones(2)})], [True, False])


@pytest.mark.parametrize(
    "other",
    [
        TensorDict({"a": torch.ones(2, dtype=torch.float64)}),
        TensorDict({"b": torch.ones(2)}),
        TensorDict({"a": torch.ones(2), "b": torch.ones(2)}),
        TensorDict({}),
        TensorDict({"a": TensorDict({"c": torch.ones(2)})}),
        TensorDict({"a": torch.ones(3)}),
    ],
)
def test_requests_of_unlike_layout_are_not_stacked(other: TensorDictBase) -> None:
    like = TensorDict({"a": torch.ones(2)})
    for pair in ([like, other], [other, like]):
        with pytest.raises((UnlikeRequestsError, RuntimeError)):
            stack(pair)
        with pytest.raises((UnlikeRequestsError, RuntimeError)):
            concatenate([pair[0].unsqueeze(0), pair[1]], [True, False])
        assert group_by_layout([*pair, like], [False] * 3) in ([[0, 2], [1]], [[0], [1, 2]])


def test_a_parameter_and_a_tensor_may_meet() -> None:
    batch = stack([TensorDict({"a": torch.ones(2)}), TensorDict({"a": nn.Parameter(torch.ones(2)).data})])
    assert batch["a"].shape == (2, 2)


def test_non_tensor_entries_travel() -> None:
    requests = [TensorDict({"a": torch.ones(1), "task": NonTensorData(name)}) for name in ("walk", "run")]
    assert [reply["task"] for reply in rows(stack(requests))] == ["walk", "run"]


def test_the_device_of_the_requests_is_that_of_their_batch() -> None:
    assert stack([TensorDict({"a": torch.ones(1)}, device="cpu")] * 2).device == torch.device("cpu")
    assert stack([TensorDict({"a": torch.ones(1)})] * 2).device is None


def test_small_rows_share_their_batch_and_large_ones_have_memory_of_their_own() -> None:
    small, large = torch.zeros(64, 8), torch.zeros(64, 1024)
    reply = rows(TensorDict({"small": small, "large": large}, batch_size=[64]))[0]
    assert reply["small"].untyped_storage().nbytes() == small.untyped_storage().nbytes()
    assert reply["large"].untyped_storage().nbytes() == 4096


@pytest.mark.parametrize("width", [1, 1024])
def test_rows_of_an_expanded_or_transposed_leaf_are_apart(width: int) -> None:
    expanded = torch.zeros(1, width).expand(3, width)
    transposed = torch.arange(3.0 * width).reshape(width, 3).T
    first, second, _ = rows(TensorDict({"e": expanded, "t": transposed}, batch_size=[3]))
    first["e"].fill_(1)
    assert (second["e"] == 0).all()
    assert first["t"].is_contiguous()
    assert torch.equal(second["t"], transposed[1])


def test_replies_carry_no_graph() -> None:
    weight = nn.Parameter(torch.ones(2, 3))
    with torch.no_grad():
        reply = rows(TensorDict({"a": weight, "b": weight * 2}, batch_size=[2]))[0]
    assert not reply["a"].requires_grad
    assert reply["b"].grad_fn is None


def test_a_lazy_stack_is_a_proper_output() -> None:
    output = LazyStackedTensorDict(*[TensorDict({"a": torch.full((2,), float(i))}) for i in range(3)], stack_dim=0)
    assert [reply["a"][0].item() for reply in rows(check_output(output, 3))] == [0, 1, 2]


def test_chosen_entries_only() -> None:
    batch = TensorDict({"a": torch.ones(2), "b": torch.ones(2)}, batch_size=[2])
    assert [set(reply.keys()) for reply in rows(batch, {"a"})] == [{"a"}, {"a"}]
    assert [set(reply.keys()) for reply in rows(batch, {"c"})] == [set(), set()]


@pytest.mark.parametrize(
    ("output", "words"),
    [
        (torch.ones(3), "Tensor"),
        (TensorDict({}), r"\[\]"),
        (TensorDict({}, batch_size=[4]), r"\[4\] for a batch of 3"),
    ],
)
def test_an_improper_output_is_named(output: object, words: str) -> None:
    with pytest.raises(ModelError, match=words):
        check_output(output, 3)


@pytest.mark.parametrize(
    ("request_td", "words"),
    [
        (TensorDict({"b": torch.ones(4)}), 'lacks "a", .* and has unknown "b"'),
        (TensorDict({"a": torch.ones(3), "in": {"c": torch.ones(1)}}), r'"a" has shape \[3\], requests .* have \[4\]'),
        (TensorDict({"a": torch.ones(4), "in": {"c": torch.ones(1).long()}}), "torch.int64, requests .* torch.float32"),
    ],
)
def test_a_request_that_breaks_the_spec_is_told_found_and_expected(request_td: TensorDictBase, words: str) -> None:
    spec = RequestSpec(TensorDict({"a": torch.ones(4), "in": {"c": torch.ones(1)}}))
    with pytest.raises(InvalidRequestError, match=words):
        spec.check(request_td)


def test_a_request_of_the_spec_passes() -> None:
    RequestSpec(nested(1)).check(nested(2))
