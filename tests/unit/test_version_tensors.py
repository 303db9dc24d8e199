"""Stamps are used again only if nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aioinfer.tensors import VersionTensorCache

SIZE = torch.Size([3])


def addresses(tensors: VersionTensorCache, version: int = 1) -> list[int]:
    return [tensor.data_ptr() for tensor in tensors.make(version, SIZE, None)]


def test_stamps_that_nobody_has_are_used_again() -> None:
    tensors = VersionTensorCache()
    assert addresses(tensors) == addresses(tensors)


@pytest.mark.parametrize(
    "keep",
    [
        lambda tensor: tensor,
        lambda tensor: tensor.unsqueeze(0),
        lambda tensor: tensor.detach(),
        lambda tensor: tensor.numpy(),
        lambda tensor: tensor.untyped_storage(),
        lambda tensor: {"reply": [tensor]},
    ],
)
def test_stamps_that_somebody_has_are_left_alone(keep: Callable[[Tensor], Any]) -> None:
    tensors = VersionTensorCache()
    first = tensors.make(1, SIZE, None)
    address, kept = first[0].data_ptr(), keep(first[1])
    del first
    assert addresses(tensors)[0] != address
    del kept
    assert address in {addresses(tensors)[0] for _ in range(2)}


def test_stamps_that_somebody_has_written_to_are_thrown_away() -> None:
    tensors = VersionTensorCache()
    first = tensors.make(1, SIZE, None)
    first[1].add_(5)
    del first
    assert [int(tensor) for tensor in tensors.make(1, SIZE, None)] == [1, 1, 1]


def test_stamps_say_the_version_in_the_shape_that_is_asked_for() -> None:
    tensors = VersionTensorCache()
    for version in (1, 2, 1):
        for size in ([2], [200], [2, 5], [2, 5, 0]):
            made = tensors.make(version, torch.Size(size), None)
            assert [tensor.shape for tensor in made] == [torch.Size(size[1:])] * size[0]
            assert all(tensor.dtype == torch.int64 and bool((tensor == version).all()) for tensor in made)
    assert tensors.make(1, SIZE, torch.device("meta"))[0].device.type == "meta"
