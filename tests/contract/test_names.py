"""Requests by name where a ``request_spec`` says what they are: nested entries, numbers, rows, and odd arrays."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer import (
    InferenceServer,
    InferenceTransport,
    InvalidRequestError,
    MPTransport,
    ProcessSlotTransport,
    SlotTransport,
    ThreadingTransport,
)
from tests.limits import HANG

SPEC = TensorDict(
    {
        "state": {"speed": torch.zeros(2, dtype=torch.float64)},
        "flag": torch.zeros((), dtype=torch.bool),
        "count": torch.zeros((), dtype=torch.int64),
    }
)
ROW: dict[str, Any] = {"state": {"speed": [1, 2]}, "flag": 1, "count": 3.0}


def total(batch: TensorDictBase) -> TensorDict:
    return TensorDict({"total": batch["state"]["speed"].sum(-1) + batch["count"]}, batch.batch_size)


def make(name: str) -> InferenceTransport:
    if name == "process slots":
        return ProcessSlotTransport(
            SPEC, TensorDict({"total": torch.zeros((), dtype=torch.float64)}), num_slots=2, rows=5
        )
    if name == "slots":
        return SlotTransport(2, preallocate=True)
    return MPTransport() if name == "pickled" else ThreadingTransport()


@pytest.mark.parametrize("name", ["threads", "slots", "pickled", "process slots"])
def test_names_are_understood_as_the_spec_says_over_every_transport(name: str) -> None:
    rows = {"state": {"speed": np.ones((5, 2))}, "flag": np.ones(5, np.bool_), "count": np.arange(5)}
    wrong: list[dict[str, Any]] = [{"count": 1.5}, {"flag": True}, {"state": {"speed": np.ones((4, 2))}}]
    with InferenceServer(total, make(name), request_spec=SPEC, max_batch_size=2) as server, server.client() as client:
        assert float(client(ROW, HANG)["total"]) == 6
        assert client(rows, HANG)["total"].tolist() == [2, 3, 4, 5, 6]
        for entries in wrong:
            with pytest.raises(InvalidRequestError, match=r"speed|flag|count"):
                client({**(ROW if "count" in entries else rows), **entries}, HANG)
        assert float(client(ROW, HANG)["total"]) == 6
        assert server.stats().rejected == len(wrong)


def test_rows_are_told_by_nested_entries_and_nested_entries_have_the_batch_size_of_their_request() -> None:
    sizes: list[tuple[int, ...]] = []

    def model(batch: TensorDictBase) -> TensorDict:
        sizes.append(tuple(batch["state", "inner"].batch_size))
        return TensorDict({"action": batch["state", "inner", "x"]}, batch.batch_size)

    spec = TensorDict({"state": {"inner": {"x": torch.zeros(2)}}}, [2])
    with InferenceServer(model, ThreadingTransport(), request_spec=spec) as server:
        client = server.client()
        assert client(state={"inner": {"x": [1.0, 2]}}, timeout=HANG)["action"].tolist() == [1, 2]
        assert client(state={"inner": {"x": np.ones((3, 2), np.float32)}}, timeout=HANG).batch_size == (3, 2)
    assert sizes == [(1, 2), (3, 2)]


def test_arrays_whose_strides_tensors_lack_meet_tensors_and_what_can_be_an_array_is_taken() -> None:
    class Frames:
        def __array__(self, *_: Any, **__: Any) -> Any:
            return np.full(4, 2, np.float32)

    packed = np.zeros(4, dtype=[("tag", "i1"), ("x", "f4")])["x"]
    with InferenceServer(lambda td: td, ThreadingTransport(), min_batch_size=3, batch_timeout=HANG) as server:
        replies = [server.client().submit(x=value) for value in (packed, torch.ones(4), Frames())]
        assert [float(reply.result(HANG)["x"].sum()) for reply in replies] == [0, 4, 8]
        assert server.stats().failed_passes == 0
