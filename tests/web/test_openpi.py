from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Callable
from contextlib import AsyncExitStack
from typing import Any, ClassVar

import hypothesis
import msgpack
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from tensordict import NonTensorData, NonTensorStack, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn
from websockets.exceptions import ConnectionClosed

from aioinfer import InferenceServer, ThreadingTransport
from aioinfer.batching import BatchScheduler
from aioinfer.testing import GatedModel
from aioinfer.web.app import create_app
from aioinfer.web.limits import Limits
from tests.limits import HANG
from tests.web import robots
from tests.web.hosting import hosted
from tests.web.listening import listened, listening
from tests.web.robots import ACTION_DIM, HORIZON, Robot, act, observation, pack, robot, served, unpack, until

VLLM_OMNI, SGLANG = "/v1/realtime/robot/openpi", "/openpi/policy"

# Python objects, as openpi's own decoder takes it: that server dies of this message.
OBJECTS = msgpack.packb({b"__ndarray__": True, b"data": b"\x41" * 8, b"dtype": "|O", b"shape": [1]})


@pytest.fixture(autouse=True, params=[hosted, listened])
def host(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Serves apps: uvicorn, or our own listener, which hands messages over without a task."""
    monkeypatch.setattr(robots, "hosted", request.param)
    chosen: Callable[..., Any] = request.param
    return chosen


@pytest.fixture
def no_log(caplog: pytest.LogCaptureFixture) -> None:
    """The model fails on purpose, which is logged with tracebacks."""
    caplog.set_level(logging.CRITICAL, "aioinfer.web")


# -- what is asked, and what is answered ---------------------------------------------------------------------


async def test_the_first_message_is_the_metadata() -> None:
    metadata = {"reset_pose": [0.0, -1.5], "image_resolution": (224, 224), "nested": {"needs_session_id": True}}
    async with served(metadata=metadata) as (_, url):
        for path in ("/", "/any/other", VLLM_OMNI, SGLANG):
            async with robot(url, path) as one:
                assert one.metadata == {**metadata, "image_resolution": [224, 224]}


def test_metadata_that_no_message_can_carry_is_refused_where_the_app_is_made() -> None:
    with pytest.raises(TypeError, match="object"):
        create_app(InferenceServer(act, ThreadingTransport()), metadata={"what": object()})


async def test_a_policy_may_bring_its_metadata() -> None:
    class Policy:
        metadata: ClassVar[Any] = {"action_space": "joint_position"}

        def __call__(self, td: TensorDictBase) -> TensorDictBase:
            return act(td)

    async with served(Policy()) as (_, url), robot(url) as one:
        assert one.metadata == Policy.metadata


async def test_observations_get_the_outputs_of_the_policy_and_figures() -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        count = td.batch_size[0]
        outputs = {
            "actions": torch.arange(count * 70.0).reshape(count, 10, 7),
            "half": torch.ones(count, 2, dtype=torch.bfloat16),
            "value": torch.full((count,), 0.5),
            "done": torch.ones(count, dtype=torch.bool),
            "policy_timing": TensorDict({"infer_ms": torch.full((count,), 3.0)}, [count]),
            "subtask": NonTensorStack(*[NonTensorData("grasp")] * count),
        }
        return TensorDict(outputs, [count])

    async with served(policy) as (_, url), robot(url) as one:
        first, second = [await one.ask(observation(1)) for _ in range(2)]
    timing = first.pop("server_timing")
    np.testing.assert_array_equal(first.pop("actions"), np.arange(70.0).reshape(10, 7))
    np.testing.assert_array_equal(first.pop("half"), np.ones(2, np.float32))
    assert first == {
        "value": 0.5,
        "done": True,
        "policy_timing": {"infer_ms": 3.0},
        "subtask": "grasp",
        "policy_version": 0,
    }
    assert type(first["policy_version"]) is int
    assert set(timing) == {"infer_ms"}
    assert set(second["server_timing"]) == {"infer_ms", "prev_total_ms"}
    assert all(type(value) is float and value > 0 for value in second["server_timing"].values())


async def test_errors_are_texts_and_the_connection_goes_on(no_log: None) -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        if (td["state"] < 0).any():
            raise ValueError("the arm is broken")
        return act(td)

    async with served(policy) as (_, url):
        for path in ("/", SGLANG):
            async with robot(url, path) as one:
                assert "the arm is broken (error id" in await one.ask(observation(-1))
                await one.act(1)
                assert "map" in await one.ask([1, 2])
                await one.socket.send("state")
                assert "msgpack" in await one.receive()
                await one.socket.send(b"\xc1")
                assert "msgpack" in await one.receive()
                await one.socket.send(b"")
                assert "msgpack" in await one.receive()
                assert "bool, integers or floating point" in await one.ask({"state": np.array(["a"])})
                assert "can't be a tensor" in await one.ask({"state": None})
                assert "expected a request" in await one.ask({})
                await one.act(2)


async def test_an_error_of_the_model_that_no_text_can_carry_is_told_all_the_same(no_log: None) -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        raise ValueError("\udcff is no character")

    async with served(policy) as (_, url), robot(url) as one:
        assert "is no character" in await one.ask(observation(1))


async def test_the_message_that_ends_other_servers_gets_an_error_and_everybody_goes_on() -> None:
    assert len(OBJECTS) <= 50
    async with served() as (_, url), robot(url) as good, robot(url) as bad:
        await good.act(1)
        await bad.socket.send(OBJECTS)
        assert "bool, integers or floating point" in await bad.receive()
        await bad.send({"state": {b"x": msgpack.unpackb(OBJECTS)}})
        assert "bool, integers or floating point" in await bad.receive()
        await bad.act(2)
        await good.act(3)


async def test_outputs_that_no_message_can_carry_are_an_error(no_log: None) -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"actions": torch.zeros(td.batch_size[0], 2, dtype=torch.complex64)}, td.batch_size)

    async with served(policy) as (_, url), robot(url) as one:
        for _ in range(2):
            assert "messages carry no" in await one.ask(observation(1))


# -- dialects ------------------------------------------------------------------------------------------------


async def test_messages_with_an_endpoint_get_bare_actions_and_a_text() -> None:
    async with served() as (_, url), robot(url) as one:
        actions = await one.ask(observation(3, endpoint="infer", session_id="a"))
        np.testing.assert_array_equal(actions, np.full((HORIZON, ACTION_DIM), 6, np.float32))
        assert await one.ask({"endpoint": "reset"}) == "reset successful"
        assert '"infer" or "reset"' in await one.ask(observation(3, endpoint="plan"))
        assert '"infer" or "reset"' in await one.ask(observation(3, endpoint=np.zeros(3)))
        await one.act(4)


async def test_a_policy_without_actions_is_told_to_clients_of_roboarena(no_log: None) -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        return TensorDict({"torques": td["state"]}, td.batch_size)

    async with served(policy) as (_, url), robot(url) as one:
        reply = await one.ask(observation(3, endpoint="infer"))
        assert '"actions"' in reply
        assert "torques" in reply


async def test_clients_of_vllm_omni_get_an_array_and_maps() -> None:
    async with served() as (_, url), robot(url, VLLM_OMNI) as one:
        for more in ({}, {"endpoint": "infer"}, {"session_id": "a"}):
            actions = await one.ask(observation(3, **more))
            np.testing.assert_array_equal(actions, np.full((HORIZON, ACTION_DIM), 6, np.float32))
        assert await one.ask({"endpoint": "reset", "session_id": "a"}) == {"status": "reset successful"}
        await one.socket.send(OBJECTS)
        error = await one.receive()
        assert set(error) == {"type", "message"}
        assert error["type"] == "error"
        assert "bool, integers or floating point" in error["message"]


async def test_clients_of_vllm_omni_get_a_map_where_the_policy_writes_several_arrays() -> None:
    def policy(td: TensorDictBase) -> TensorDictBase:
        count = td.batch_size[0]
        outputs = {"eef_9d": torch.zeros(count, 40, 9), "gripper": torch.ones(count, 40, 1), "value": td["state"][:, 0]}
        return TensorDict(outputs, [count])

    async with served(policy) as (_, url), robot(url, VLLM_OMNI) as one:
        reply = await one.ask(observation(3))
    assert {name: array.shape for name, array in reply.items()} == {"eef_9d": (40, 9), "gripper": (40, 1)}


# -- entries -------------------------------------------------------------------------------------------------


class Reads(nn.Module):
    """A policy that reads some entries, and remembers what it got."""

    def __init__(self, *in_keys: str) -> None:
        super().__init__()
        self.in_keys = list(in_keys)
        self.out_keys = ["actions"]
        self.seen: list[dict[str, Any]] = []

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        for row in td.unbind(0):
            self.seen.append(dict(row.items()))
        return TensorDict({"actions": torch.zeros(td.batch_size[0], 1, 1)}, td.batch_size)


async def test_entries_that_the_policy_does_not_read_are_left_out() -> None:
    policy = Reads("observation/state", "observation.image")
    async with served(policy) as (_, url), robot(url) as one:
        image = np.arange(27, dtype=np.uint8).reshape(3, 3, 3)
        message = {
            "observation/state": np.array([1, 2], np.float32),
            "observation.image": image,
            "observation/unread": np.zeros(5),
            "prompt": "pick up the cube",
            "names": [["deep"], None, b"bytes"],
            "session_id": 7,
            b"raw": 1,
        }
        assert isinstance(await one.ask(message), dict)
    (seen,) = policy.seen
    assert set(seen) == {"observation/state", "observation.image"}
    assert seen["observation/state"].tolist() == [1, 2]
    assert torch.equal(seen["observation.image"], torch.from_numpy(image))


async def test_a_policy_that_reads_text_gets_it() -> None:
    policy = Reads("state", "prompt")
    prompts = ["pick up the cube", "pick up the cube", "öffne die Tür"]
    gate = GatedModel(policy, key="state")
    gate.in_keys = policy.in_keys  # type: ignore[attr-defined]
    async with served(gate) as (_, url), AsyncExitStack() as stack:
        robots = [await stack.enter_async_context(robot(url)) for _ in prompts]
        asking = [one.ask(observation(1, prompt=prompt)) for one, prompt in zip(robots, prompts, strict=True)]
        replies = asyncio.gather(*asking)
        await until(gate.entered.is_set)
        gate.open()
        assert {type(reply) for reply in await replies} == {dict}
    seen = [getattr(row["prompt"], "data", row["prompt"]) for row in policy.seen]
    assert sorted(seen) == sorted(prompts)


async def test_nested_entries_reach_a_policy_that_reads_them() -> None:
    module = nn.Linear(2, 1, bias=False)
    nn.init.ones_(module.weight)
    policy = TensorDictModule(module, in_keys=[("observation", "state")], out_keys=["actions"])
    async with served(policy) as (_, url), robot(url) as one:
        reply = await one.ask({"observation": {"state": np.array([1, 2], np.float32)}, "prompt": "pick"})
        assert reply["actions"] == [3.0]


# -- batches -------------------------------------------------------------------------------------------------

MALFORMED: dict[str, dict[str, Any]] = {
    "another shape": {"state": np.zeros((2, 8), np.float32)},
    "no dimension": {"state": np.float32(1)},
    "another dtype": {"state": np.zeros(8, np.bool_)},
    "a key is missing": {"stat": np.zeros(8, np.float32)},
    "a text": {"state": "a"},
    "a list": {"state": [[1.0], [1.0, 2.0]]},
    "a map": {"state": {"x": np.zeros(8, np.float32)}},
}


def strict(td: TensorDictBase) -> TensorDictBase:
    state = td["state"]
    if state.dtype != torch.float32 or state.shape[1:] != (8,):
        raise TypeError(f"the state is {state.dtype} {list(state.shape)}")
    return act(td)


@pytest.mark.parametrize("malformed", MALFORMED.values(), ids=MALFORMED)
async def test_a_malformed_observation_fails_alone(malformed: dict[str, Any], no_log: None) -> None:
    gate = GatedModel(strict)
    async with served(gate) as (app, url), AsyncExitStack() as stack:
        first, bad, *good = [await stack.enter_async_context(robot(url)) for _ in range(9)]
        occupied = asyncio.create_task(first.act(0))
        await until(gate.entered.is_set)
        await bad.send(malformed)
        size, bad_size = len(pack(observation(0))), len(pack(malformed))
        # Some are refused at once, others are pending with the good ones.
        refused = app.front.stats.requests
        await until(lambda: bool(refused["openpi", "invalid"]) or app.front.bytes_in_flight.bytes == size + bad_size)
        await asyncio.gather(*[one.send(observation(index)) for index, one in enumerate(good)])
        await until(lambda: app.front.bytes_in_flight.bytes in (8 * size, 8 * size + bad_size))
        gate.open()
        await occupied
        for index, one in enumerate(good):
            one.check(await one.receive(), index)
        assert isinstance(await bad.receive(), str)
        await bad.act(3)
    assert [float(index) for index in range(7)] in map(sorted, gate.batches)


async def test_every_reply_is_that_of_its_own_observation() -> None:
    await _ask_all(connections=16, requests=8)


@pytest.mark.stress
async def test_every_reply_of_ten_thousand_is_that_of_its_own_observation() -> None:
    await _ask_all(connections=64, requests=160)


async def _ask_all(connections: int, requests: int) -> None:
    async with served() as (app, url), AsyncExitStack() as stack:
        robots = [await stack.enter_async_context(robot(url)) for _ in range(connections)]

        async def talk(index: int, one: Robot) -> None:
            for first in range(index * requests, (index + 1) * requests, 4):  # one by one, and three at once
                await one.act(first)
                for value in range(first + 1, first + 4):
                    await one.send(observation(value))
                for value in range(first + 1, first + 4):
                    one.check(await one.receive(), value)

        await asyncio.gather(*[talk(index, one) for index, one in enumerate(robots)])
        assert app.front.stats.requests["openpi", "ok"] == connections * requests
        assert app.front.bytes_in_flight.bytes == 0


# -- order, limits, and the end ------------------------------------------------------------------------------


async def test_replies_come_in_the_order_of_what_was_asked() -> None:
    async with served() as (_, url), robot(url) as one:
        expected: list[Any] = []
        for value in range(50):
            if value % 5 == 3:
                await one.socket.send("no observation")
                expected.append(str)
            elif value % 5 == 4:
                await one.send({"endpoint": "reset"})
                expected.append("reset successful")
            else:
                await one.send(observation(value))
                expected.append(value)
        for what in expected:
            reply = await one.receive()
            if what is str:
                assert "binary" in reply
            elif isinstance(what, str):
                assert reply == what
            else:
                one.check(reply, what)


async def test_pings_are_answered_while_the_model_computes() -> None:
    gate = GatedModel(act)
    async with served(gate) as (_, url), robot(url) as one, robot(url) as other:
        reply = asyncio.create_task(one.ask(observation(1)))
        await until(gate.entered.is_set)
        for _ in range(3):
            async with asyncio.timeout(HANG):
                for socket in (one.socket, other.socket):
                    await (await socket.ping())
        assert not reply.done()
        gate.open()
        one.check(await reply, 1)


@pytest.mark.parametrize("abort", [False, True])
async def test_what_a_robot_that_has_gone_asked_is_not_computed(abort: bool) -> None:
    gate = GatedModel(act)
    async with served(gate) as (app, url), robot(url) as other:
        occupied = asyncio.create_task(other.act(1))
        await until(gate.entered.is_set)
        async with robot(url) as one:
            for value in (2, 3):
                await one.send(observation(value))
            message = len(pack(observation(0)))
            await until(lambda: app.front.bytes_in_flight.bytes == 3 * message)
            if abort:
                one.socket.transport.abort()
        await until(lambda: app.front.stats.requests["openpi", "cancelled"] == 2)
        await until(lambda: app.front.bytes_in_flight.bytes == message)
        gate.open()
        await occupied
        await other.act(4)
        assert gate.seen == {1, 4}


async def test_a_robot_is_not_read_while_it_has_asked_as_much_as_it_may() -> None:
    gate = GatedModel(act)
    async with served(gate, limits=Limits(max_pending_per_connection=4)) as (app, url), robot(url) as one:
        for value in range(12):
            await one.send(observation(value))
        async with robot(url) as other:  # is served after all that can be read of the first one
            reply = asyncio.create_task(other.ask(observation(50)))
            message = len(pack(observation(0)))
            await until(lambda: app.front.bytes_in_flight.bytes == 5 * message)
            gate.open()
            for value in range(12):
                one.check(await one.receive(), value)
            other.check(await reply, 50)
        assert app.front.bytes_in_flight.bytes == 0


async def test_a_robot_may_have_as_many_bytes_pending_as_one_message_may_have() -> None:
    gate = GatedModel(act)
    size = len(pack(observation(0)))
    async with served(gate, limits=Limits(max_message_size=2 * size)) as (app, url), robot(url) as one:
        for value in range(6):
            await one.send(observation(value))
        await until(lambda: app.front.bytes_in_flight.bytes == 2 * size)
        gate.open()
        for value in range(6):
            one.check(await one.receive(), value)


async def test_a_message_that_waits_for_room_is_counted_meanwhile() -> None:
    gate = GatedModel(act)
    async with InferenceServer(gate, ThreadingTransport()) as server:
        app = create_app(server, limits=Limits(max_pending_per_connection=2))
        async with listening(app, limits=app.front.limits, whole=lambda: app) as at:
            url = f"http://127.0.0.1:{at.port}"
            async with robot(url) as one, robot(url) as other:
                arrived, taken = at.guard.bytes_in_flight, app.front.bytes_in_flight
                await one.send(observation(1))
                await one.send(observation(2))
                await one.send(observation(3, image=np.zeros(2**20, np.uint8)))
                await until(lambda: arrived.bytes > 2**20)
                for _ in range(3):
                    assert "map" in await other.ask([])
                assert arrived.bytes > 2**20
                assert taken.bytes == 2 * len(pack(observation(0)))
                gate.open()
                for value in (1, 2, 3):
                    one.check(await one.receive(), value)
                assert arrived.bytes == taken.bytes == 0
        app.close()


async def test_messages_that_come_directly_and_those_that_wait_are_answered_in_order() -> None:
    async with InferenceServer(act, ThreadingTransport()) as server:
        for limit in (1, 2, 7, 1024):
            app = create_app(server, limits=Limits(max_pending_per_connection=limit))
            async with listening(app, limits=app.front.limits, whole=lambda app=app: app) as at:  # type: ignore[misc]
                async with robot(f"http://127.0.0.1:{at.port}") as one:
                    reading = asyncio.create_task(_read_in_order(one, 200))
                    for value in range(200):
                        message = pack(observation(value))
                        kind = value % 7
                        if kind == 2:
                            await one.socket.send("no observation")
                        elif kind == 4:
                            await one.socket.send([message[:9], message[9:]])
                        elif kind == 5:
                            await one.send({"endpoint": "reset"})
                        else:
                            await one.socket.send(message)
                    await reading
                assert app.front.bytes_in_flight.bytes == app.front.stats.inflight == 0
            app.close()


async def _read_in_order(one: Robot, count: int) -> None:
    for value in range(count):
        reply = await one.receive()
        if value % 7 == 2:
            assert "binary" in reply
        elif value % 7 == 5:
            assert reply == "reset successful"
        else:
            one.check(reply, value)


@pytest.mark.parametrize("options", [{}, {"newest_wins": True}, {"deadline": HANG}], ids=str)
@pytest.mark.parametrize("by_client", [False, True])
async def test_the_server_learns_which_robot_asks(
    options: dict[str, Any], by_client: bool, host: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_batch(self: BatchScheduler, requests: Any) -> None:
        callers.extend([request.caller for request in requests])

    callers: list[Any] = []
    monkeypatch.setattr(BatchScheduler, "on_batch", on_batch)
    async with InferenceServer(act, ThreadingTransport()) as server:
        app = create_app(server.async_client() if by_client else server, **options)
        async with host(app, lifespan="off") as url, robot(url) as one, robot(url) as other:
            for value in range(3):
                await one.act(value)
                await other.act(value)
        app.close()
    assert len(callers) >= 2
    assert None not in callers
    assert len(set(callers)) == 2


async def test_a_message_that_is_too_large_ends_its_connection_only() -> None:
    async with served(limits=Limits(max_message_size=1000)) as (app, url), robot(url) as other:
        async with robot(url) as one:
            await one.send(observation(1, image=np.zeros(2000, np.uint8)))
            with pytest.raises(ConnectionClosed) as closed:
                await one.receive()
            assert closed.value.rcvd is not None
            assert closed.value.rcvd.code == 1009
        await other.act(1)
        assert app.front.bytes_in_flight.bytes == 0


async def test_robots_are_refused_while_too_many_bytes_are_in_flight() -> None:
    gate = GatedModel(act)
    size = len(pack(observation(0)))
    async with served(gate, limits=Limits(max_bytes_in_flight=2 * size)) as (app, url), AsyncExitStack() as stack:
        robots = [await stack.enter_async_context(robot(url)) for _ in range(3)]
        for value, one in enumerate(robots[:2]):
            await one.send(observation(value))
        await until(lambda: app.front.bytes_in_flight.bytes == 2 * size)
        assert "try again later" in await robots[2].ask(observation(2))
        gate.open()
        for value, one in enumerate(robots[:2]):
            one.check(await one.receive(), value)
        await robots[2].act(2)
        assert app.front.stats.requests["openpi", "rejected"] == 1
        assert app.front.bytes_in_flight.bytes == 0


async def test_a_drained_app_closes_connections_after_their_last_reply() -> None:
    gate = GatedModel(act)
    async with served(gate) as (app, url), robot(url) as busy, robot(url) as idle:
        for value in range(3):
            await busy.send(observation(value))
        await until(gate.entered.is_set)
        await until(lambda: app.front.bytes_in_flight.bytes == 3 * len(pack(observation(0))))
        draining = asyncio.create_task(app.drain())
        with pytest.raises(ConnectionClosed) as closed:
            await idle.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        assert not draining.done()
        await busy.send(observation(9))  # too late
        gate.open()
        for value in range(3):
            busy.check(await busy.receive(), value)
        with pytest.raises(ConnectionClosed) as closed:
            await busy.receive()
        assert closed.value.rcvd is not None
        assert closed.value.rcvd.code == 1001
        assert await draining


# -- rubbish -------------------------------------------------------------------------------------------------

NAMES = st.sampled_from(["state", "endpoint", "session_id", "seed", "prompt", "__ndarray__", "__npgeneric__", "data"])
KEYS = NAMES | NAMES.map(str.encode) | st.text(max_size=3) | st.binary(max_size=3)
DTYPES = st.sampled_from(["<f4", ">f8", "|u1", "|b1", "<i8", "|O", "<U4", "<c8", "<M8[s]", "V8", "f", "", "<f99"])
SIZES = st.integers(-2, 9) | st.sampled_from([2**31, 2**62, 2**64 - 1]) | st.floats()
LEAVES = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats()
    | st.text(max_size=5)
    | st.binary(max_size=9)
)


def markers(as_key: Callable[[str], Any]) -> st.SearchStrategy[Any]:
    """Maps that look like arrays and scalars, and a few that are some."""
    array = st.fixed_dictionaries(
        {
            as_key("__ndarray__"): st.just(True) | LEAVES,
            as_key("data"): st.binary(max_size=64) | LEAVES,
            as_key("dtype"): DTYPES | LEAVES,
            as_key("shape"): st.lists(SIZES, max_size=10) | LEAVES,
        }
    )
    scalar = st.fixed_dictionaries(
        {as_key("__npgeneric__"): LEAVES, as_key("data"): LEAVES, as_key("dtype"): DTYPES | LEAVES}
    )
    return array | scalar


VALUES = st.recursive(
    LEAVES | markers(str) | markers(str.encode),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=4,
)
MESSAGES = VALUES | st.fixed_dictionaries({"state": VALUES}) | st.dictionaries(NAMES, VALUES, max_size=4)
GOOD = pack(observation(1, image=np.zeros((2, 2, 3), np.uint8), endpoint="infer", session_id="a", prompt="pick"))


@st.composite
def mutations(draw: st.DrawFn) -> bytes:
    """A good message of which a few bytes are others, gone, or there twice."""
    message = bytearray(GOOD)
    for _ in range(draw(st.integers(1, 4))):
        start = draw(st.integers(0, len(message)))
        stop = min(len(message), start + draw(st.integers(0, 4)))
        message[start:stop] = draw(st.binary(max_size=4) | st.just(bytes(message[start:stop]) * 2))
    return bytes(message)


RUBBISH = st.binary(max_size=60) | mutations() | MESSAGES.map(msgpack.packb)


class Line:
    """A connection to an app without a socket."""

    def __init__(self, app: Any, path: str) -> None:
        self._inbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        self._outbox: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
        scope = {"type": "websocket", "path": path, "root_path": "", "headers": [(b"host", b"localhost")]}
        self._serving = asyncio.create_task(app(scope, self._inbox.get, self._outbox.put))

    async def open(self) -> None:
        await self._inbox.put({"type": "websocket.connect"})
        assert (await self._next())["type"] == "websocket.accept"
        assert (await self._next())["type"] == "websocket.send"

    async def ask(self, message: bytes) -> bytes | str:
        await self._inbox.put({"type": "websocket.receive", "bytes": message})
        reply = await self._next()
        assert reply["type"] == "websocket.send", reply
        answer: bytes | str = reply.get("bytes") or reply["text"]
        return answer

    async def _next(self) -> dict[str, Any]:
        async with asyncio.timeout(HANG):
            return await self._outbox.get()

    async def close(self) -> None:
        await self._inbox.put({"type": "websocket.disconnect"})
        await self._serving


@pytest.mark.parametrize("host", [hosted], indirect=True, ids=[""])  # there is none: it would do all of it twice
@pytest.mark.parametrize(("path", "count"), [("/", 1000), (VLLM_OMNI, 100)])
def test_rubbish_gets_an_answer_and_harms_nobody(path: str, count: int, no_log: None) -> None:
    server = InferenceServer(strict, ThreadingTransport())
    app = create_app(server, in_keys=["state"])
    numbers = iter(range(1, 1_000_000))

    async def begin() -> tuple[Line, Line]:
        await server.__aenter__()
        lines = Line(app, path), Line(app, "/")
        for line in lines:
            await line.open()
        return lines

    async def exchange(bad: Line, good: Line, message: bytes) -> None:
        assert await bad.ask(message)
        number = next(numbers)
        reply = await good.ask(pack(observation(number)))
        assert isinstance(reply, bytes)
        Robot.check(unpack(reply), number)
        assert app.front.bytes_in_flight.bytes == 0

    async def end(*lines: Line) -> None:
        for line in lines:
            await line.close()
        await server.aclose()

    with asyncio.Runner() as runner:
        bad, good = runner.run(begin())

        @hypothesis.settings(max_examples=count, database=None)
        @hypothesis.given(RUBBISH)
        def try_all(message: bytes) -> None:
            runner.run(exchange(bad, good, message))

        try:
            try_all()
        finally:
            runner.run(end(bad, good))
    assert next(numbers) >= count


async def test_random_bytes_in_a_good_message_harm_nobody(no_log: None) -> None:
    chance = random.Random(0)
    async with served(strict, in_keys=["state"]) as (_, url), robot(url) as bad, robot(url) as good:
        for number in range(500):
            message = bytearray(GOOD)
            for _ in range(3):
                message[chance.randrange(len(message))] = chance.randrange(256)
            await bad.socket.send(bytes(message))
            assert await bad.socket.recv()
            await good.act(number)
