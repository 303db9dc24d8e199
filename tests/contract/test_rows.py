"""Requests of several rows, beyond what each transport must hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tensordict import TensorDict, TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import (
    InferenceServer,
    InvalidRequestError,
    ModelError,
    MPTransport,
    PolicyClientModule,
    ServerPausedError,
    SlotTransport,
    ThreadingTransport,
)
from aioinfer.batching import LeaveWhenFree
from aioinfer.futures import run_in_thread
from aioinfer.testing import GatedModel, double, eventually, request, request_of
from aioinfer.testing.callers import are_doubles, is_double
from aioinfer.testing.inspection import has_pending_job
from tests.limits import HANG


class Scale(nn.Module):
    """Multiplies by its weight, behind a gate."""

    def __init__(self, weight: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(weight))
        self.gate = GatedModel(lambda td: TensorDict({"action": td["observation"] * self.weight}, td.batch_size))

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        return self.gate(td)


def test_rows_that_one_pass_could_not_take_carry_the_version_that_computed_each() -> None:
    model = Scale(1.0)
    with InferenceServer(model, ThreadingTransport(), max_batch_size=2) as server:
        future = server.client().submit(request_of(1, 2, 3, 4, 5))
        assert model.gate.entered.wait(HANG)
        update = run_in_thread(lambda: server.update_weights({"weight": torch.tensor(10.0)}, version=7), "update")
        eventually(lambda: has_pending_job(server))
        model.gate.open()
        update.result(HANG)
        reply = future.result(HANG)
    assert reply["policy_version"].tolist() == [0, 0, 7, 7, 7]
    assert reply["action"][:, 0].tolist() == [1, 2, 30, 40, 50]


def test_a_request_made_before_its_server_is_split_by_the_bound_of_that() -> None:
    transport, model = ThreadingTransport(), GatedModel()
    model.open()
    early = transport.client().submit(request_of(*range(100)))
    with InferenceServer(model, transport, max_batch_size=80):
        assert are_doubles(early.result(HANG), *range(100))
    assert list(map(len, model.batches)) == [80, 20]


def test_the_verbs_hand_out_no_more_rows_than_they_are_asked_for() -> None:
    transport = ThreadingTransport()
    future = transport.submit(request_of(*range(5)))
    other = transport.submit(request(5))
    sizes: list[torch.Size] = []
    while not other.done():
        transport.wait_for_work(HANG)
        for td, callback in zip(*transport.drain(2), strict=True):
            sizes.append(td.batch_size)
            transport.resolve(callback, double(td))
    assert sizes == [(2,), (2,), (1,), ()]
    assert are_doubles(future.result(0), *range(5))


def observation() -> Any:
    """A row with an image, a nested entry, a mask of its own and an entry that is no tensor."""
    return TensorDict(
        {
            "pixels": torch.randint(256, (3, 84, 84), dtype=torch.uint8),
            "agent": TensorDict({"position": torch.randn(2), "mask": torch.rand(4) > 0.5}),
        }
    ).set_non_tensor("task", f"task {torch.randint(9, ()).item()}")


@pytest.mark.parametrize("transport", [ThreadingTransport, lambda: SlotTransport(3, preallocate=True), MPTransport])
def test_what_travels_in_one_row_travels_in_several(transport: Any) -> None:
    stacked: Any = torch.stack([observation() for _ in range(5)])
    asked: list[TensorDictBase] = [stacked, observation(), stacked[:1]]
    with InferenceServer(lambda td: td.clone(), transport(), max_batch_size=4, max_pending=64) as server:
        with server.paused():
            pending = [server.client().submit(td) for td in asked]
            eventually(lambda: server.stats().pending == 7)
        for td, future in zip(asked, pending, strict=True):
            reply = future.result(HANG)
            assert reply.batch_size == td.batch_size
            assert reply["agent"].batch_size == td.batch_size
            for key in ("pixels", ("agent", "position"), ("agent", "mask")):
                assert torch.equal(reply[key], td[key])
            rows = [both.unbind(0) if td.batch_dims else [both] for both in (reply, td)]
            assert [row["task"] for row in rows[0]] == [row["task"] for row in rows[1]]


def test_a_collate_function_gets_rows_and_not_requests() -> None:
    seen: list[list[torch.Size]] = []

    def collate(rows: list[TensorDictBase]) -> TensorDictBase:
        seen.append([row.batch_size for row in rows])
        batch: Any = torch.stack([row.exclude("extra") for row in rows])
        return batch  # type: ignore[no-any-return]

    with InferenceServer(double, ThreadingTransport(), collate_fn=collate) as server:
        with server.paused():
            many = server.client().submit(request_of(1, 2).set("extra", torch.ones(2)))
            one = server.client().submit(request(3))
        assert are_doubles(many.result(HANG), 1, 2)
        assert is_double(one.result(HANG), 3)
    assert seen == [[torch.Size([])] * 3]


def test_where_a_row_has_a_batch_size_of_its_own_rows_come_before_it() -> None:
    spec = TensorDict({"observation": torch.zeros(8, 3)}, batch_size=[8])
    with InferenceServer(double, ThreadingTransport(), request_spec=spec) as server:
        client = server.client()
        for size in ([8], [2, 8], [0, 8]):
            reply = client(TensorDict({"observation": torch.ones(*size, 3)}, batch_size=size), HANG)
            assert reply["policy_version"].shape == torch.Size(size)
            assert (reply["action"] == 2).all()
        for size in ([], [7], [8, 2], [2, 2, 8]):
            with pytest.raises(
                InvalidRequestError, match=r"requests to this server have \[8\], or \[n, 8\] for n rows"
            ):
                client(TensorDict({"observation": torch.ones(*size, 3)}, batch_size=size), HANG)
        with pytest.raises(InvalidRequestError, match=r'"observation" has shape \[8, 4\].*have \[8, 3\]'):
            client(TensorDict({"observation": torch.ones(2, 8, 4)}, batch_size=[2, 8]), HANG)


def test_unlike_replies_to_the_parts_of_a_request_are_the_models_error() -> None:
    passes: list[TensorDictBase] = []

    def model(td: TensorDictBase) -> TensorDictBase:
        passes.append(td)
        return TensorDict({f"action {len(passes)}": td["observation"]}, batch_size=td.batch_size)

    with InferenceServer(model, ThreadingTransport(), max_batch_size=2) as server:
        with pytest.raises(ModelError, match="unlike entries"):
            server.client()(request_of(1, 2, 3), HANG)
        assert server.stats().failed == 1


def test_a_pause_serves_or_rejects_all_rows_that_were_pending() -> None:
    model = GatedModel()
    with InferenceServer(model, ThreadingTransport(), max_batch_size=2) as server:
        first = server.client().submit(request(0))
        assert model.entered.wait(HANG)
        pending = [server.client().submit(request_of(1, 2, 3)), server.client().submit(request_of(4, 5))]
        model.open()
        with server.paused("wait"):
            assert [future.done() for future in (first, *pending)] == [True] * 3
            late = server.client().submit(request_of(6, 7, 8))
        assert are_doubles(late.result(HANG), 6, 7, 8)
        with server.paused():
            pending = [server.client().submit(request_of(1, 2, 3)), server.client().submit(request_of(4, 5))]
            with server.paused("reject"):
                for future in pending:
                    with pytest.raises(ServerPausedError):
                        future.result(HANG)
        stats = server.stats()
        assert (stats.ok, stats.failed, stats.rejected, stats.pending) == (4, 0, 2, 0)


class Few(LeaveWhenFree):
    """Chooses small batches."""

    batch_size = 2


def test_a_request_of_more_rows_than_the_rule_chooses_is_served_all_the_same() -> None:
    with InferenceServer(double, ThreadingTransport(), max_batch_size=8, batching=Few()) as server:
        assert are_doubles(server.client()(request_of(1, 2, 3, 4, 5), HANG), 1, 2, 3, 4, 5)
        assert is_double(server.client()(request(6), HANG), 6)


def test_a_request_whose_parts_are_split_again_counts_once() -> None:
    transport = ThreadingTransport()
    early = transport.submit(request_of(*range(9)))
    for td, callback in zip(*transport.drain(4), strict=True):
        transport.resolve(callback, double(td))
    with InferenceServer(double, transport, max_batch_size=2, policy_version_key=None) as server:
        assert are_doubles(early.result(HANG), *range(9))
        assert server.stats().ok == 1


def test_a_reply_whose_entries_have_no_slices_is_a_reply() -> None:
    def model(td: TensorDictBase) -> TensorDictBase:
        lengths = range(1, len(td) + 1)
        ragged = torch.nested.nested_tensor([torch.ones(length) for length in lengths], layout=torch.jagged)
        unlike = lazy_stack([TensorDict({"length": torch.ones(length)}) for length in lengths])
        return TensorDict({"action": td["observation"], "ragged": ragged, "unlike": unlike}, td.batch_size)

    with InferenceServer(model, ThreadingTransport()) as server:
        with server.paused():
            pending = [server.client().submit(request(value)) for value in (1, 2)]
        lengths = [
            reply["ragged"].shape + reply["unlike", "length"].shape for reply in [f.result(HANG) for f in pending]
        ]
        assert lengths == [(1, 1), (2, 2)]
        empty = server.client()(request_of(), HANG)
    assert empty["action"].shape == (0, 3)


@pytest.mark.parametrize("size", [[], [5], [2, 3], [0], [2, 0, 3]])
def test_a_policy_client_returns_what_the_policy_itself_would(size: list[int]) -> None:
    policy = TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])
    with InferenceServer(policy, ThreadingTransport(), max_batch_size=4) as server:
        server.client()(request(0), HANG)
        remote = PolicyClientModule(server, in_keys=["observation"], out_keys=["action"])
        td = TensorDict({"observation": torch.randn(*size, 3), "other": torch.ones(*size, 1)}, batch_size=size)
        with torch.no_grad():
            expected = policy(td.clone())["action"]
        assert remote(td) is td
        torch.testing.assert_close(td["action"], expected)
        assert td["policy_version"].shape == torch.Size(size)
        assert (server.stats().ok, server.stats().rejected) == (2, 0)
