"""Stamps are used again only if nobody can tell."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from aioinfer.stamps import VersionStamps

SIZE = torch.Size([3])


def addresses(stamps: VersionStamps, version: int = 1) -> list[int]:
    return [stamp.data_ptr() for stamp in stamps.make(version, SIZE, None)]


def test_stamps_that_nobody_has_are_used_again() -> None:
    stamps = VersionStamps()
    assert addresses(stamps) == addresses(stamps)


@pytest.mark.parametrize(
    "keep",
    [
        lambda stamp: stamp,
        lambda stamp: stamp.unsqueeze(0),
        lambda stamp: stamp.detach(),
        lambda stamp: stamp.numpy(),
        lambda stamp: stamp.untyped_storage(),
        lambda stamp: {"reply": [stamp]},
    ],
)
def test_stamps_that_somebody_has_are_left_alone(keep: Callable[[Tensor], Any]) -> None:
    stamps = VersionStamps()
    first = stamps.make(1, SIZE, None)
    address, kept = first[0].data_ptr(), keep(first[1])
    del first
    assert addresses(stamps)[0] != address
    del kept
    assert address in {addresses(stamps)[0] for _ in range(2)}


def test_stamps_that_somebody_has_written_to_are_thrown_away() -> None:
    stamps = VersionStamps()
    first = stamps.make(1, SIZE, None)
    first[1].add_(5)
    del first
    assert [int(stamp) for stamp in stamps.make(1, SIZE, None)] == [1, 1, 1]


def test_stamps_say_the_version_in_the_shape_that_is_asked_for() -> None:
    stamps = VersionStamps()
    for version in (1, 2, 1):
        for size in ([2], [200], [2, 5], [2, 5, 0]):
            made = stamps.make(version, torch.Size(size), None)
            assert [stamp.shape for stamp in made] == [torch.Size(size[1:])] * size[0]
            assert all(stamp.dtype == torch.int64 and bool((stamp == version).all()) for stamp in made)
    assert stamps.make(1, SIZE, torch.device("meta"))[0].device.type == "meta"
