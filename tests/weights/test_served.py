"""Weights that arrive while a server serves: never torn, never unpublished, and stamped with their version."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, SlotTransport, ThreadingTransport, WeightSyncError
from aioinfer.testing import GatedModel, double, eventually, request
from aioinfer.testing.inspection import channel_of, put_bytes, sender_of
from aioinfer.weight_sync import MultiProcessWeightSyncScheme, NoWeightSyncScheme, SharedMemWeightSyncScheme
from tests.effort import Effort
from tests.limits import HANG
from tests.transports import FiveVerbs
from tests.weight_models import SCHEMES, Counter, mark, mark_of, policy

Scheme = MultiProcessWeightSyncScheme | SharedMemWeightSyncScheme


@contextmanager
def serving(scheme: Scheme | None, **options: Any) -> Iterator[InferenceServer]:
    with InferenceServer(policy(0.0), ThreadingTransport(), weight_sync=scheme, **options) as server:
        yield server


@pytest.fixture(params=SCHEMES)
def scheme(request: pytest.FixtureRequest) -> Iterator[Scheme]:
    made = request.param(num_workers=1, timeout=HANG)
    yield made
    made.shutdown()


# -- never torn --------------------------------------------------------------------------------------------


def publisher(kind: str, server: InferenceServer, scheme: Scheme | None, module: nn.Module) -> Callable[[int], None]:
    """How a trainer in this process publishes its module."""
    if scheme is None:
        return lambda number: server.update_weights(module, version=number)
    scheme.sync = kind == "sync"
    scheme.init_on_sender(model=module)
    scheme.connect()
    return lambda number: scheme.send(version=number)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    ("kind", "make"),
    [
        ("sync", MultiProcessWeightSyncScheme),
        ("sync", SharedMemWeightSyncScheme),
        ("async", MultiProcessWeightSyncScheme),
        ("async", SharedMemWeightSyncScheme),
        ("update_weights", None),
    ],
)
def test_no_reply_mixes_two_weight_sets_and_each_says_the_right_version(
    kind: str, make: type[Scheme] | None, swap: bool, effort: Effort
) -> None:
    scheme = None if make is None else make(num_workers=1, timeout=HANG)
    source, served, end = policy(0.0), policy(0.0, seconds=0.0005), threading.Event()
    with (
        InferenceServer(served, ThreadingTransport(), weight_sync=scheme, swap_weights=swap) as server,
        ThreadPoolExecutor(16) as pool,
    ):
        publish = publisher(kind, server, scheme, source)

        def train() -> int:
            number = 0
            while not end.is_set():
                number += 1
                mark(source, number)
                publish(number)
                mark(source, -1)  # unpublished
                time.sleep(0.001)
            return number

        def ask(client: Any) -> set[int]:
            seen: set[int] = set()
            for _ in range(effort.times(60, stress=350)):
                reply = client(request(0), HANG)
                version = int(reply["policy_version"])
                assert mark_of(reply) == (version if version else 0)
                seen.add(version)
            return seen

        training = pool.submit(train)
        eventually(lambda: server.policy_version >= 2)
        seen: set[int] = set()
        while len(seen) <= 20:
            asking = [pool.submit(ask, server.client()) for _ in range(15)]
            seen.update(*[asked.result(HANG) for asked in asking])
        end.set()
        published = training.result(HANG)
    assert max(seen) <= published
    if scheme is not None:
        scheme.shutdown()
    assert all(bool((part == part[0]).all()) for part in served.parameters())


# -- versions ----------------------------------------------------------------------------------------------


def test_versions_count_updates_or_are_the_senders_own(scheme: Scheme) -> None:
    with serving(scheme, policy_version=5) as server:
        client = server.client()
        assert int(client(request(0), HANG)["policy_version"]) == server.policy_version == 5
        scheme.init_on_sender(model=policy(1.0))
        scheme.connect()
        assert server.policy_version == 6
        scheme.connect(version=9)
        assert server.policy_version == 9
        scheme.send(policy(2.0), version=70)
        reply = client(request(0), HANG)
        assert (mark_of(reply), int(reply["policy_version"])) == (2, 70)
        scheme.send()
        assert server.stats().policy_version == server.policy_version == 71
        server.update_weights(policy(3.0))
        assert server.policy_version == 72
        for version, error in (("v1", TypeError), (1.5, TypeError), (2**70, ValueError)):
            with pytest.raises(error, match="version must"):
                server.update_weights(policy(4.0), version=version)  # type: ignore[arg-type]
            with pytest.raises(error, match="version must"):
                scheme.send(version=version)  # type: ignore[arg-type]
        assert server.policy_version == 72


@pytest.mark.parametrize("make", [ThreadingTransport, lambda: SlotTransport(4), FiveVerbs])
def test_the_version_is_a_tensor_of_the_replys_own(make: Callable[[], Any]) -> None:
    spec = TensorDict({"observation": torch.zeros(2, 3)}, batch_size=[2])
    model = TensorDictModule(nn.Linear(3, 1), in_keys=["observation"], out_keys=["action"])
    for name in ("policy_version", "behaviour"):
        with InferenceServer(
            model, make(), request_spec=spec, min_batch_size=2, timeout=1.0, policy_version_key=name
        ) as server:
            client, other = server.client(), server.client()
            with ThreadPoolExecutor(2) as pool:
                first, second = [asked.result(HANG) for asked in [pool.submit(c, spec, HANG) for c in (client, other)]]
            assert first[name].shape == (2,)
            assert first[name].dtype == torch.int64
            first[name] += 7
            assert second[name].tolist() == [0, 0]
    with InferenceServer(model, make(), request_spec=spec, policy_version_key=None) as server:
        assert set(server.client()(spec, HANG).keys()) == {"action"}


# -- all or nothing ----------------------------------------------------------------------------------------


def test_an_update_that_does_not_fit_is_refused_to_the_sender_and_the_server_serves_on(scheme: Scheme) -> None:
    with serving(scheme) as server:
        scheme.init_on_sender(model=policy(1.0))
        scheme.connect()
        short = policy(2.0).state_dict()
        del short["module.statistics"]
        with pytest.raises(WeightSyncError, match=r'worker 0 refused.*"module\.statistics" is missing'):
            scheme.send(short)
        with pytest.raises(WeightSyncError, match=r"has shape \[9\], the model has \[500\]"):
            scheme.send(policy(2.0, size=9))
        with pytest.raises(WeightSyncError, match=r'"module\.statistics" is missing'):
            server.update_weights(short)
        reply = server.client()(request(0), HANG)
        assert (mark_of(reply), int(reply["policy_version"])) == (1, 1)
        stats = server.stats()
        assert (stats.weight_updates, stats.refused_updates, stats.trainer_connected) == (1, 3, True)
        doubles = {name: tensor.double() for name, tensor in policy(3.0).state_dict().items()}
        with pytest.raises(WeightSyncError, match="dtype"):
            server.update_weights(doubles)
        server.update_weights(doubles, cast=True)
        assert mark_of(server.client()(request(0), HANG)) == 3
        scheme.send(policy(4.0))
        assert mark_of(server.client()(request(0), HANG)) == 4


def test_rubbish_on_the_weight_queue_is_counted_and_ignored(scheme: Scheme, caplog: pytest.LogCaptureFixture) -> None:
    with serving(scheme) as server:
        channel_of(scheme).updates.put((("policy", {"weight": 1}), "update_weights"))
        eventually(lambda: server.stats().refused_updates == 1)
        put_bytes(channel_of(scheme).updates, b"hello")
        eventually(lambda: server.stats().refused_updates == 2)
        channel_of(scheme).updates.put(b"somebody else's")
        scheme.init_on_sender(model=policy(4.0))
        scheme.connect()
        assert mark_of(server.client()(request(0), HANG)) == 4
    assert "can't be unpickled" in caplog.text


def test_extra_state_travels_to_a_server(scheme: Scheme) -> None:
    served = nn.ModuleDict({"counter": Counter(1)})

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.parts = served

        def forward(self, td: Any) -> Any:
            return double(td)

    with InferenceServer(Model(), ThreadingTransport(), weight_sync=scheme):
        scheme.init_on_sender(
            weights={"parts.counter.weight": torch.ones(2), "parts.counter._extra_state": {"count": 9}}
        )
        scheme.connect()
        assert served["counter"].count == 9


def test_a_server_needs_a_module_and_a_queue() -> None:
    with pytest.raises(TypeError, match=r"nn\.Module"):
        InferenceServer(double, ThreadingTransport(), weight_sync=MultiProcessWeightSyncScheme(num_workers=1))
    server = InferenceServer(policy(), ThreadingTransport(), weight_sync=MultiProcessWeightSyncScheme())
    with pytest.raises(ValueError, match="init_on_sender"):
        server.start()
    with InferenceServer(double, ThreadingTransport()) as plain, pytest.raises(TypeError, match=r"nn\.Module"):
        plain.update_weights(policy())
    with InferenceServer(policy(), ThreadingTransport(), weight_sync=NoWeightSyncScheme()) as served:
        assert served.stats().trainer_connected is None
    several = MultiProcessWeightSyncScheme(num_workers=2)
    with pytest.raises(ValueError, match="name this one"):
        InferenceServer(policy(), ThreadingTransport(), weight_sync=several).start()
    several.for_worker(1).init_on_receiver(model_id="policy")
    with InferenceServer(policy(), ThreadingTransport(), weight_sync=several.for_worker(1)):
        pass


# -- coming and going --------------------------------------------------------------------------------------


def test_a_server_serves_what_it_has_until_the_trainer_comes_and_after_it_has_gone(scheme: Scheme) -> None:
    with serving(scheme) as server:
        client = server.client()
        assert mark_of(client(request(0), HANG)) == 0
        assert server.stats().trainer_connected is False
        scheme.init_on_sender(model=policy(1.0))
        scheme.connect()
        assert mark_of(client(request(0), HANG)) == 1
        assert server.stats().trainer_connected is True
        sender_of(scheme).close()  # as the end of its process does
        eventually(lambda: server.stats().trainer_connected is False)
        assert mark_of(client(request(0), HANG)) == 1
        scheme.init_on_sender(model=policy(2.0))
        scheme.connect()
        scheme.send()
        assert mark_of(client(request(0), HANG)) == 2


@pytest.mark.parametrize("swap", [False, True])
def test_a_server_that_shuts_down_keeps_its_weights_and_starts_again(scheme: Scheme, swap: bool) -> None:
    server = InferenceServer(policy(0.0), ThreadingTransport(), weight_sync=scheme, swap_weights=swap)
    with server:
        scheme.init_on_sender(model=policy(3.0))
        scheme.connect()
    for value in (5.0, 6.0, 7.0):  # to nobody; and into the memory that the server may have lent
        scheme.send(policy(value))
    assert all(bool((part == 3).all()) for part in server.model.parameters())  # type: ignore[attr-defined]
    with server:
        eventually(lambda: mark_of(server.client()(request(0), HANG)) == 7)
        scheme.send(policy(8.0))
        assert mark_of(server.client()(request(0), HANG)) == 8


async def test_a_trainer_on_the_servers_own_event_loop_awaits(scheme: Scheme) -> None:
    async with InferenceServer(policy(0.0), ThreadingTransport(), weight_sync=scheme) as server:
        scheme.init_on_sender(model=policy(1.0))
        scheme.connect()  # does not wait for the loop that it blocks
        await scheme.asend(policy(2.0))
        assert mark_of(await server.async_client()(request(0))) == 2
        with pytest.raises(WeightSyncError, match="await asend"):  # at once, not at the timeout
            scheme.send(policy(3.0))
        await scheme.asend(policy(4.0))
        assert mark_of(await server.async_client()(request(0))) == 4


async def test_weights_wait_for_the_pass_that_runs() -> None:
    gate = GatedModel()

    class Gated(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

        def forward(self, td: Any) -> Any:
            before = self.weight.clone()
            out = gate(td)
            out["weight"] = torch.stack([before, self.weight]).expand(*td.batch_size, 2, 1).clone()
            return out

    async with InferenceServer(Gated(), ThreadingTransport()) as server:
        asked = server.async_client().submit(request(1))
        assert await asyncio.to_thread(gate.entered.wait, HANG)
        updating = asyncio.ensure_future(server.aupdate_weights({"weight": torch.ones(1)}))
        await asyncio.sleep(0.02)
        assert not updating.done()
        gate.open()
        assert (await asked)["weight"].flatten().tolist() == [0, 0]
        await updating
        assert (await server.async_client()(request(1)))["weight"].flatten().tolist() == [1, 1]
    with pytest.raises(RuntimeError, match="does not run"):
        await server.aupdate_weights({"weight": torch.ones(1)})
