"""Servers of modules and functions of tensors, without TensorDicts."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer import InferenceServer, InvalidRequestError, ModelError, ThreadingTransport
from aioinfer.testing import request

OBSERVATION = np.arange(3, dtype=np.float32)
KEYS: dict[str, Any] = {"in_keys": ["observation"], "out_keys": ["action"]}


def test_a_plain_module_is_served_by_name() -> None:
    module = nn.Linear(3, 2)
    with InferenceServer(module, ThreadingTransport(), **KEYS) as server:
        reply = server.client()(observation=OBSERVATION)
        server.update_weights({"weight": torch.zeros(2, 3), "bias": torch.ones(2)})
        later = server.client()({"observation": OBSERVATION, "unread": 1})
    assert type(reply) is TensorDict
    assert set(reply.keys()) == {"action", "policy_version"}
    assert torch.allclose(later["action"], torch.ones(2))
    assert int(later["policy_version"]) == 1


def test_a_function_has_an_argument_for_each_key_and_returns_in_order() -> None:
    def steer(image: Tensor, speed: Tensor) -> tuple[Tensor, Tensor]:
        return image.flatten(1).sum(1), -speed

    keys = {"in_keys": ["image", ("state", "speed")], "out_keys": ["angle", ("control", "brake")]}
    with InferenceServer(steer, ThreadingTransport(), **keys) as server:  # type: ignore[arg-type]
        reply = server.client()(image=np.ones((2, 2)), state={"speed": 3.0})
    assert float(reply["angle"]) == 4
    assert float(reply["control", "brake"]) == -3


async def test_a_module_is_served_to_tasks_rows_at_a_time() -> None:
    async with InferenceServer(nn.ReLU(), ThreadingTransport(), **KEYS, request_spec=request(0)) as server:
        client = server.async_client()
        reply = await client(observation=np.stack([OBSERVATION, -OBSERVATION]))
    assert torch.equal(reply["action"], torch.tensor([[0.0, 1, 2], [0, 0, 0]]))


def test_what_such_a_model_does_wrong_is_said_by_name() -> None:
    wrong: Any = {"two": lambda x: (x, x), "none": lambda x: None, "scalar": lambda x: x.sum()}
    for function in wrong.values():
        with (
            InferenceServer(function, ThreadingTransport(), **KEYS) as server,
            pytest.raises(ModelError, match=r"lambda> returned"),
        ):
            server.client()(observation=OBSERVATION)


def test_a_request_that_lacks_an_argument_is_refused_by_name() -> None:
    with InferenceServer(nn.ReLU(), ThreadingTransport(), **KEYS) as server:
        client = server.client()
        with pytest.raises(InvalidRequestError, match='has no tensor "observation"'):
            client(image=OBSERVATION)
        assert float(client(observation=OBSERVATION)["action"].sum()) == 3


def test_hooks_of_all_modules_run_for_a_plain_module_too() -> None:
    called: list[object] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, *_: called.append(type(module)))
    try:
        with InferenceServer(nn.ReLU(), ThreadingTransport(), **KEYS) as server:
            server.client()(observation=OBSERVATION)
    finally:
        handle.remove()
    assert called == [nn.ReLU]


@pytest.mark.parametrize(
    ("model", "keys", "error", "message"),
    [
        (nn.ReLU(), {"in_keys": ["x"]}, ValueError, "in_keys and out_keys"),
        (nn.ReLU(), {"in_keys": [], "out_keys": ["y"]}, ValueError, "in_keys and out_keys"),
        (nn.ReLU(), {"in_keys": "x", "out_keys": ["y"]}, TypeError, "in_keys must be a sequence"),
        (TensorDictModule(nn.ReLU(), ["x"], ["y"]), {"in_keys": ["x"], "out_keys": ["y"]}, TypeError, "its own"),
    ],
)
def test_keys_that_make_no_sense_are_refused(
    model: Any, keys: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        InferenceServer(model, ThreadingTransport(), **keys)


def test_a_compiled_function_of_tensors_runs_once_for_each_bucket() -> None:
    seen: list[int] = []

    def double(observation: Tensor) -> Tensor:
        return observation * 2

    def backend(graph: Any, examples: list[Tensor]) -> Any:
        seen.append(examples[0].shape[0])
        return graph.forward

    with InferenceServer(
        double,
        ThreadingTransport(),
        **KEYS,
        request_spec=request(0),
        max_batch_size=4,
        compile={"backend": backend},
    ) as server:
        replies = [server.client().submit(observation=OBSERVATION) for _ in range(3)]
        assert all(torch.equal(reply.result(60)["action"], torch.tensor([0.0, 2, 4])) for reply in replies)
    assert sorted(set(seen)) == [1, 2, 4]


def test_an_output_without_a_name_is_not_kept() -> None:
    keys: dict[str, Any] = {"in_keys": ["observation"], "out_keys": ["_", "action"]}
    with InferenceServer(lambda x: (x, -x), ThreadingTransport(), **keys) as server:
        reply = server.client()(observation=OBSERVATION)
    assert set(reply.keys()) == {"action", "policy_version"}
    with pytest.raises(ValueError, match="in_keys and out_keys"):
        InferenceServer(nn.ReLU(), ThreadingTransport(), in_keys=["x"], out_keys=["_"])


def test_a_function_may_take_and_return_subclasses_of_tensors() -> None:
    bias = nn.Parameter(torch.ones(1, 3))

    class Image(Tensor):
        pass

    with InferenceServer(lambda x: bias if x.sum() else x, ThreadingTransport(), **KEYS) as server:
        client = server.client()
        assert client(observation=torch.zeros(3).as_subclass(Image))["action"].sum() == 0
        assert client(observation=OBSERVATION)["action"].sum() == 3
