"""Clients that robots run, unchanged, and what openpi's examples and other clients do with theirs."""

from __future__ import annotations

import asyncio
import collections
import concurrent.futures
import logging
import uuid
from collections.abc import Callable
from typing import Any, TypeVar

import numpy as np
import pytest
import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer.testing import GatedModel
from tests.limits import HANG
from tests.web.robots import act, observation, pack, served, until

pytest.importorskip("openpi_client")

from openpi_client import action_chunk_broker, image_tools, msgpack_numpy, websocket_client_policy
from openpi_client.runtime import environment, runtime, subscriber
from openpi_client.runtime.agents import policy_agent
from websockets.exceptions import InvalidStatus
from websockets.sync.client import ClientConnection, connect

# The clients are closed by the server.
pytestmark = pytest.mark.filterwarnings("ignore:connect.. must be used as a context manager:DeprecationWarning")

T = TypeVar("T")
VLLM_OMNI = "/v1/realtime/robot/openpi"
LOGGER = "aioinfer.web"


async def in_thread(action: Callable[[], T]) -> T:
    """Run what blocks beside the server."""
    async with asyncio.timeout(HANG):
        return await asyncio.to_thread(action)


def client_of(url: str, **options: Any) -> Any:
    """A client, made as the examples make it: of a host and a port."""
    host, port = url.removeprefix("http://").split(":")
    return websocket_client_policy.WebsocketClientPolicy(host, int(port), **options)


class Policy:
    """A policy of one robot: action ``h`` of its horizon is ``h`` plus the sum of the state, in all dimensions.

    Args:
        state: the entry with the state.
        images: the entries with its cameras; it looks at them, and they change nothing.
        horizon: how many actions.
        action_dim: of each.
    """

    def __init__(self, state: str, images: tuple[Any, ...], horizon: int, action_dim: int) -> None:
        self.in_keys = [state, *images]
        self._state = state
        self._images = images
        self._shape = horizon, action_dim

    def __call__(self, td: TensorDictBase) -> TensorDictBase:
        for key in self._images:
            image = td[key]
            assert image.dtype is torch.uint8
            assert 224 in image.shape
        start = td[self._state].double().sum(-1)[:, None, None]
        actions = (start + torch.arange(self._shape[0])[:, None]).expand(-1, *self._shape)
        outputs = {"actions": actions.float().contiguous(), "value": start[:, 0, 0]}
        return TensorDict(outputs, td.batch_size)


def image(shape: tuple[int, ...] = (224, 224, 3)) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(256, size=shape, dtype=np.uint8)


# -- openpi's client -----------------------------------------------------------------------------------------


async def test_the_client_gets_metadata_and_actions() -> None:
    async with served(metadata={"reset_pose": [0.5, 1.5]}) as (_, url):

        def run() -> None:
            for where in ({}, {"host": url.replace("http", "ws")}):
                client = websocket_client_policy.WebsocketClientPolicy(**where) if where else client_of(url)
                assert client.get_server_metadata() == {"reset_pose": [0.5, 1.5]}
                for value in range(3):
                    reply = client.infer(observation(value, prompt="pick up the cube"))
                    assert (reply["actions"] == np.full((10, 7), 2 * value, np.float32)).all()
                    assert type(reply["policy_version"]) is int
                client.reset()

        await in_thread(run)


async def test_the_client_with_a_key_is_let_in_and_others_are_not() -> None:
    async with served(tokens=["secret"]) as (_, url):

        def run() -> None:
            assert client_of(url, api_key="secret").infer(observation(1))["actions"].shape == (10, 7)
            for key in ("wrong", None):
                with pytest.raises(InvalidStatus) as refused:
                    client_of(url, api_key=key)
                assert refused.value.response.status_code == 401

        await in_thread(run)


async def test_the_client_raises_errors_and_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.CRITICAL, LOGGER)
    async with served() as (_, url):

        def run() -> None:
            client = client_of(url)
            for malformed in ({}, {"state": None}, {"state": np.array(["text"])}, {"image": image()}):
                with pytest.raises(RuntimeError, match="Error in inference server"):
                    client.infer(malformed)
                assert (client.infer(observation(1))["actions"] == 2).all()

        await in_thread(run)


async def test_a_broker_hands_out_one_action_after_the_other() -> None:
    async with served(Policy("state", (), horizon=10, action_dim=7)) as (app, url):

        def run() -> None:
            broker = action_chunk_broker.ActionChunkBroker(client_of(url), action_horizon=4)
            for step in range(9):
                reply = broker.infer({"state": np.full(2, step, np.float32)})
                start = 2 * (step - step % 4)
                assert reply["actions"].tolist() == [start + step % 4] * 7
                assert reply["value"] == start
            broker.reset()
            assert broker.infer({"state": np.full(2, 50.0)})["actions"].tolist() == [100] * 7

        await in_thread(run)
        assert app.front.stats.requests["openpi", "ok"] == 4


async def test_clients_share_a_batch() -> None:
    gate = GatedModel(act)
    async with served(gate) as (app, url):

        def run(value: int) -> None:
            client = client_of(url)
            for step in range(3):
                assert (client.infer(observation(value + step))["actions"] == 2 * (value + step)).all()

        loop = asyncio.get_running_loop()
        with concurrent.futures.ThreadPoolExecutor(8) as threads:
            robots = [loop.run_in_executor(threads, run, 10 * index) for index in range(8)]
            size = len(pack(observation(0)))
            await until(lambda: app.front.bytes_in_flight.bytes == 8 * size)
            gate.open()
            async with asyncio.timeout(HANG):
                await asyncio.gather(*robots)
    assert len(gate.batches[0]) + len(gate.batches[1]) >= 8


# -- openpi's examples ---------------------------------------------------------------------------------------

OBSERVATIONS: dict[str, tuple[Policy, Callable[[], dict[str, Any]]]] = {
    "droid": (
        Policy(
            "observation/joint_position",
            ("observation/exterior_image_1_left", "observation/wrist_image_left"),
            horizon=10,
            action_dim=8,
        ),
        lambda: {
            "observation/exterior_image_1_left": image(),
            "observation/wrist_image_left": image(),
            "observation/joint_position": np.random.default_rng(0).random(7),
            "observation/gripper_position": np.random.default_rng(0).random(1),
            "prompt": "do something",
        },
    ),
    "aloha": (
        Policy("state", tuple(("images", f"cam_{name}") for name in ("high", "low")), horizon=50, action_dim=14),
        lambda: {
            "state": np.ones(14),
            "images": {f"cam_{name}": image((3, 224, 224)) for name in ("high", "low", "left_wrist", "right_wrist")},
            "prompt": "do something",
        },
    ),
    "libero": (
        Policy("observation/state", ("observation/image", "observation/wrist_image"), horizon=10, action_dim=7),
        lambda: {
            "observation/state": np.random.default_rng(0).random(8),
            "observation/image": image(),
            "observation/wrist_image": image(),
            "prompt": "do something",
        },
    ),
}


@pytest.mark.parametrize("kind", OBSERVATIONS)
async def test_the_simple_client_times_what_it_asks(kind: str) -> None:
    policy, observe = OBSERVATIONS[kind]
    async with served(policy) as (_, url):

        def run() -> dict[str, list[float]]:
            client = client_of(url)
            timings = collections.defaultdict(list)
            for _ in range(4):
                reply = client.infer(observe())
                for key, value in [*reply["server_timing"].items(), *reply.get("policy_timing", {}).items()]:
                    timings[key].append(value)
            return timings

        timings = await in_thread(run)
    assert {key: len(values) for key, values in timings.items()} == {"infer_ms": 4, "prev_total_ms": 3}
    assert all(np.mean(values) > 0 for values in timings.values())


async def test_droid_executes_8_of_10_actions() -> None:
    policy, observe = OBSERVATIONS["droid"]
    async with served(policy) as (app, url):

        def run() -> int:
            client = client_of(url)
            executed, chunk = 8, None
            for _ in range(20):
                if executed >= 8:
                    executed = 0
                    seen = observe()
                    for name in ("observation/exterior_image_1_left", "observation/wrist_image_left"):
                        seen[name] = image_tools.resize_with_pad(image((180, 320, 3)), 224, 224)
                    chunk = client.infer(seen)["actions"]
                    assert chunk.shape == (10, 8)
                assert chunk is not None
                action = chunk[executed]
                executed += 1
                gripper = np.ones(1) if action[-1].item() > 0.5 else np.zeros(1)
                action = np.clip(np.concatenate([action[:-1], gripper]), -1, 1)
                assert action.shape == (8,)
            return executed

        assert await in_thread(run) == 4
        assert app.front.stats.requests["openpi", "ok"] == 3


async def test_libero_plans_anew_after_5_actions() -> None:
    policy, observe = OBSERVATIONS["libero"]
    async with served(policy) as (app, url):

        def run() -> None:
            client = client_of(url)
            plan: collections.deque[Any] = collections.deque()
            for step in range(13):
                if not plan:
                    chunk = client.infer(observe())["actions"]
                    assert len(chunk) >= 5
                    plan.extend(chunk[:5])
                action = plan.popleft().tolist()
                first = float(observe()["observation/state"].sum())
                assert action == pytest.approx([first + step % 5] * 7)

        await in_thread(run)
        assert app.front.stats.requests["openpi", "ok"] == 3


class Arms(environment.Environment):  # type: ignore[misc]
    """What stands for a robot of two arms: remembers where it was reset to, and its actions."""

    def __init__(self, reset_pose: Any, observe: Callable[[], dict[str, Any]]) -> None:
        self.reset_pose = reset_pose
        self.actions: list[Any] = []
        self.resets = 0
        self._observe = observe

    def reset(self) -> None:
        self.resets += 1

    def is_episode_complete(self) -> bool:
        return False

    def get_observation(self) -> dict[str, Any]:
        return self._observe()

    def apply_action(self, action: dict[str, Any]) -> None:
        self.actions.append(action["actions"])


class Watcher(subscriber.Subscriber):  # type: ignore[misc]
    def __init__(self) -> None:
        self.steps = 0

    def on_episode_start(self) -> None: ...

    def on_step(self, observation: dict[str, Any], action: dict[str, Any]) -> None:
        self.steps += 1

    def on_episode_end(self) -> None: ...


@pytest.mark.parametrize("horizon", [25, 10], ids=["real", "sim"])
async def test_aloha_runs_episodes(horizon: int) -> None:
    policy, observe = OBSERVATIONS["aloha"]
    async with served(policy, metadata={"reset_pose": [0, -1.5, 1.5]}) as (app, url):

        def run() -> tuple[Arms, Watcher]:
            client = client_of(url)
            arms, watcher = Arms(client.get_server_metadata().get("reset_pose"), observe), Watcher()
            broker = action_chunk_broker.ActionChunkBroker(policy=client, action_horizon=horizon)
            runtime.Runtime(
                environment=arms,
                agent=policy_agent.PolicyAgent(policy=broker),
                subscribers=[watcher],
                max_hz=0,  # as fast as it can
                num_episodes=2,
                max_episode_steps=2 * horizon,
            ).run()
            return arms, watcher

        arms, watcher = await in_thread(run)
        # An episode ends one step later than it says, and the next one throws the rest of its chunk away.
        steps = watcher.steps // 2
        assert app.front.stats.requests["openpi", "ok"] == 2 * -(-steps // horizon)
    assert arms.reset_pose == [0, -1.5, 1.5]
    assert arms.resets == 3
    expected = [14 + step % horizon for step in range(steps)] * 2
    assert [action.tolist() for action in arms.actions] == [[value] * 14 for value in expected]


# -- other clients of the protocol ---------------------------------------------------------------------------


class RoboArenaClient:
    """Says in each message what it wants, and gets bare actions."""

    def __init__(self, url: str) -> None:
        self._packer = msgpack_numpy.Packer()
        self._socket: ClientConnection = connect(url, compression=None, max_size=None)
        self.metadata = msgpack_numpy.unpackb(self._socket.recv())

    def infer(self, seen: dict[str, Any]) -> Any:
        seen["endpoint"] = "infer"
        self._socket.send(self._packer.pack(seen))
        reply = self._socket.recv()
        if isinstance(reply, str):
            raise RuntimeError(f"Error in inference server:\n{reply}")
        return msgpack_numpy.unpackb(reply)

    def reset(self, about: dict[str, Any]) -> Any:
        about["endpoint"] = "reset"
        self._socket.send(self._packer.pack(about))
        return self._socket.recv()


async def test_roboarena_runs_episodes() -> None:
    metadata = {
        "image_resolution": (224, 224),
        "needs_wrist_camera": True,
        "n_external_cameras": 1,
        "needs_stereo_camera": False,
        "needs_session_id": True,
        "action_space": "joint_position",
    }
    policy = Policy("observation/joint_position", ("observation/wrist_image_left",), horizon=10, action_dim=8)
    async with served(policy, metadata=metadata) as (app, url):

        def run() -> None:
            client = RoboArenaClient(url.replace("http", "ws"))
            assert client.metadata == {**metadata, "image_resolution": [224, 224]}
            for _ in range(3):
                session = str(uuid.uuid4())
                for step in range(3):
                    seen = {
                        "observation/wrist_image_left": image(),
                        "observation/joint_position": np.full(7, step, np.float64),
                        "observation/cartesian_position": np.zeros(6),
                        "observation/gripper_position": np.zeros(1),
                        "prompt": "put the cube in the bowl",
                        "session_id": session,
                    }
                    actions = client.infer(seen)
                    assert actions.shape == (10, 8)
                    assert actions[:, 0].tolist() == [7 * step + number for number in range(10)]
                assert client.reset({}) == "reset successful"
            with pytest.raises(RuntimeError, match="tensor"):
                client.infer({"observation/joint_position": [[1.0], [1.0, 2.0]]})
            assert client.reset({"session_id": "a"}) == "reset successful"

        await in_thread(run)
        assert len(app.front.sessions) == 4


async def test_a_client_of_vllm_omni_runs_episodes() -> None:
    policy = Policy("state", (("images", "cam_high"),), horizon=50, action_dim=14)
    async with served(policy) as (_, url):

        def run() -> None:
            socket = connect(url.replace("http", "ws") + VLLM_OMNI, max_size=64 * 2**20)

            def ask(message: dict[str, Any]) -> Any:
                socket.send(msgpack_numpy.packb(message))
                reply = msgpack_numpy.unpackb(socket.recv())
                if isinstance(reply, dict) and (reply.get("type") == "error" or "error" in reply):
                    raise RuntimeError(reply["message"])
                return reply

            assert msgpack_numpy.unpackb(socket.recv()) == {}
            for _ in range(2):
                session = uuid.uuid4().hex
                for _ in range(2):
                    seen = {"images": {"cam_high": image()}, "state": np.ones(14, np.float32), "prompt": "pick"}
                    actions = ask({**seen, "endpoint": "infer", "session_id": session})
                    assert actions.shape == (50, 14)
                    assert actions[:, 0].tolist() == [14 + number for number in range(50)]
                assert ask({"endpoint": "reset", "session_id": session}) == {"status": "reset successful"}
            with pytest.raises(RuntimeError, match="tensor"):
                ask({"state": [[1.0], [1.0, 2.0]]})

        await in_thread(run)
