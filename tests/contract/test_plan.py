"""A server runs the functions that its policy is made of, and what callers see is the same."""

from __future__ import annotations

import logging
import traceback
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, TensorDictModule, TensorDictSequential
from tensordict.nn import ProbabilisticTensorDictModule as Sampler
from tensordict.nn import ProbabilisticTensorDictSequential as SamplerSequential
from torch import Tensor, distributions, nn

from aioinfer import InferenceServer, PolicyClientModule, ThreadingTransport
from aioinfer.testing import request
from tests.limits import HANG
from tests.transports import TRANSPORTS


class Witness(nn.Module):
    """Doubles, and notes for each call whether tensordict has called it, outside of what a plan looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.notes = SimpleNamespace(by_tensordict=[])

    @property
    def by_tensordict(self) -> list[bool]:
        return list(self.notes.by_tensordict)

    def forward(self, observation: Tensor) -> Tensor:
        files = [frame.filename for frame in traceback.extract_stack()]
        self.notes.by_tensordict.append(any("tensordict" in file.split("/") for file in files))
        return observation * 2


def witness(**options: Any) -> tuple[Witness, InferenceServer]:
    seen = Witness()
    model = TensorDictSequential(TensorDictModule(seen, ["observation"], ["action"]))
    return seen, InferenceServer(model, ThreadingTransport(), **options)


@pytest.mark.parametrize("transport", TRANSPORTS)
def test_replies_are_those_of_the_policy(transport: str, caplog: pytest.LogCaptureFixture) -> None:
    model = TensorDictModule(Witness(), ["observation"], ["action"])
    with InferenceServer(model, TRANSPORTS[transport]()) as server, server.client() as client:
        for value in range(3):
            reply = client(request(value), HANG)
            assert set(reply.keys()) == {"action", "policy_version"}
            assert torch.equal(reply["action"], request(value)["observation"] * 2)
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_after_the_first_batch_only_the_functions_of_a_policy_run() -> None:
    seen, server = witness()
    with server:
        for value in range(3):
            server.client()(request(value), HANG)
    assert seen.by_tensordict == [True, False, False, False]


def test_a_policy_is_called_as_it_is_where_that_is_asked_for() -> None:
    seen, server = witness(plan=False)
    with server:
        for value in range(3):
            server.client()(request(value), HANG)
    assert seen.by_tensordict == [True, True, True]
    with pytest.raises(TypeError, match="plan must be True or False, got 1"):
        witness(plan=1)


def test_a_hook_that_is_registered_while_the_server_runs_sees_each_pass() -> None:
    seen, server = witness()
    hooked: list[object] = []
    with server:
        client = server.client()
        client(request(1), HANG)
        with server.paused():
            handle = server.model.register_forward_hook(lambda *_: hooked.append(None))  # type: ignore[attr-defined]
        client(request(2), HANG)
        with server.paused():
            handle.remove()
        client(request(3), HANG)
    assert len(hooked) == 1
    assert seen.by_tensordict == [True, False, True, False]


def test_a_request_that_the_policy_refuses_gets_the_policys_error(caplog: pytest.LogCaptureFixture) -> None:
    _, server = witness()
    with server:
        client = server.client()
        for _ in range(2):
            with pytest.raises((KeyError, TypeError, RuntimeError)):
                client(TensorDict({"other": torch.ones(1)}), HANG)
            client(request(1), HANG)
    assert not caplog.records


def test_each_request_is_computed_in_its_own_mode() -> None:
    logits = TensorDictModule(lambda observation: observation.expand(-1, 1000), ["observation"], ["logits"])
    sampler = Sampler(["logits"], ["action"], distribution_class=distributions.Categorical)
    model = SamplerSequential(logits, sampler)
    given = TensorDict({"observation": torch.zeros(1, 1)}, batch_size=[1])
    with InferenceServer(model, ThreadingTransport()) as server:
        drawn: dict[InteractionType, set[int]] = {InteractionType.MODE: set(), InteractionType.RANDOM: set()}
        policies = {
            mode: PolicyClientModule(
                server.client(), in_keys=["observation"], out_keys=["action"], interaction_type=mode
            )
            for mode in drawn
        }
        for _ in range(4):
            for mode, policy in policies.items():
                drawn[mode].add(int(policy(given.clone())["action"]))
    assert drawn[InteractionType.MODE] == {0}
    assert len(drawn[InteractionType.RANDOM]) > 1
