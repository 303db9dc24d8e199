from __future__ import annotations

import copy
import threading

import pytest
import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, TensorDictModule, TensorDictSequential
from tensordict.nn.probabilistic import interaction_type, set_interaction_type
from torch import distributions, nn

from aioinfer import InferenceServer, PolicyClientModule, ThreadingTransport
from aioinfer.interaction_type import attach_mode, detach_mode, requests_carry
from aioinfer.testing import GatedModel, double, eventually, request
from tests.limits import HANG


def policy() -> TensorDictModule:
    torch.manual_seed(0)
    return TensorDictModule(nn.Linear(3, 2), in_keys=["observation"], out_keys=["action"])


def test_it_writes_what_the_policy_itself_would_write() -> None:
    local = policy()
    with InferenceServer(local, ThreadingTransport()) as server:
        remote = PolicyClientModule(server.client(), in_keys=["observation"], out_keys=["action"])
        td = request(1).set("other", torch.ones(1))
        result = remote(td)
    assert result is td
    assert set(td.keys()) == {"observation", "action", "other", "policy_version"}
    torch.testing.assert_close(td["action"], local(request(1))["action"])


def test_it_takes_a_transport_in_place_of_a_client() -> None:
    with InferenceServer(policy(), ThreadingTransport()) as server:
        remote = PolicyClientModule(server.transport)
        assert set(remote(request(1)).keys()) == {"observation", "action", "policy_version"}


def test_it_refuses_what_does_not_block() -> None:
    with pytest.raises(TypeError, match="blocking"):
        PolicyClientModule(ThreadingTransport().async_client())


def test_a_batch_of_any_shape_is_one_request() -> None:
    local = policy()
    td = TensorDict({"observation": torch.randn(2, 5, 3)}, batch_size=[2, 5])
    expected = local(td.clone())["action"]
    with InferenceServer(local, ThreadingTransport()) as server:
        remote = PolicyClientModule(server.client(), in_keys=["observation"], out_keys=["action"])
        torch.testing.assert_close(remote(td)["action"], expected)
        assert td["policy_version"].shape == (2, 5)
        assert remote(td[:, :0])["action"].shape == (2, 0, 2)
        stats = server.stats()
        assert (stats.ok, stats.rejected, stats.mean_batch_size) == (2, 0, 10)


def test_it_stands_in_a_sequence_and_may_be_copied() -> None:
    with InferenceServer(policy(), ThreadingTransport()) as server:
        remote = PolicyClientModule(server.client(), in_keys=["observation"], out_keys=["action"])
        scale = TensorDictModule(lambda action: action * 10, in_keys=["action"], out_keys=["scaled"])
        sequence = copy.deepcopy(TensorDictSequential(remote, scale))
        td = sequence(request(1))
        torch.testing.assert_close(td["scaled"], 10 * td["action"])
        assert sequence.in_keys == ["observation"]


def spread() -> TensorDictSequential:
    """A policy whose action tells the mode: 0 for the mean, another number for a sample."""
    normal = TensorDictModule(lambda o: (o * 0, o * 0 + 1), in_keys=["observation"], out_keys=["loc", "scale"])
    head = ProbabilisticTensorDictModule(
        in_keys=["loc", "scale"],
        out_keys=["action"],
        distribution_class=distributions.Normal,
        default_interaction_type=InteractionType.MEAN,
    )
    return TensorDictSequential(normal, head)


def test_the_mode_in_force_at_the_caller_is_in_force_where_its_row_is_computed() -> None:
    with InferenceServer(spread(), ThreadingTransport()) as server:
        remote = PolicyClientModule(server.client(), in_keys=["observation"], out_keys=["action"])
        for _ in range(3):
            assert (remote(request(1))["action"] == 0).all()
            with set_interaction_type("random"):
                assert (remote(request(1))["action"] != 0).all()
                with set_interaction_type("mean"):
                    assert (remote(request(1))["action"] == 0).all()
        sampling = PolicyClientModule(server.client(), out_keys=["action"], interaction_type="random")
        assert (sampling(request(1))["action"] != 0).all()


def test_callers_of_unlike_modes_share_a_server_but_no_batch() -> None:
    model = GatedModel(spread())
    with InferenceServer(model, ThreadingTransport(), out_keys=["action"]) as server:
        remote = PolicyClientModule(server.client(), in_keys=["observation"])
        first = remote.submit(request(9))
        assert model.entered.wait(HANG)
        futures = []
        for value in range(8):
            with requests_carry(InteractionType.RANDOM if value % 2 else None):
                futures.append(server.client().submit(request(value)))
        eventually(lambda: server.stats().pending == 8)
        model.open()
        first.result(HANG)
        for value, future in enumerate(futures):
            assert bool((future.result(HANG)["action"] != 0).all()) is bool(value % 2)
    assert sorted(map(len, model.batches)) == [1, 4, 4]


def test_a_mode_of_a_forward_pass_is_not_seen_by_other_threads() -> None:
    if "thread_local" not in set_interaction_type.__init__.__code__.co_varnames:
        pytest.skip("this tensordict knows process-wide modes only")
    model = GatedModel(spread())
    with InferenceServer(model, ThreadingTransport()) as server:
        remote = PolicyClientModule(server.client(), in_keys=["observation"], interaction_type="random")
        future = remote.submit(request(1))
        assert model.entered.wait(HANG)
        seen: list[InteractionType | None] = []
        thread = threading.Thread(target=lambda: seen.append(interaction_type()))
        thread.start()
        thread.join()
        assert [*seen, interaction_type()] == [None, None]
        model.open()
        future.result(HANG)


@pytest.mark.parametrize("mode", [None, *InteractionType])
def test_a_stamped_request_gives_its_mode_back(mode: InteractionType | None) -> None:
    td = request(1)
    tagged = attach_mode(td, mode)
    assert set(td.keys()) == {"observation"}
    plain, found = detach_mode(tagged)
    assert found is mode
    assert set(plain.keys()) == {"observation"}


def test_a_reply_of_a_submitted_request_leaves_the_request_alone() -> None:
    with InferenceServer(double, ThreadingTransport()) as server:
        td: TensorDictBase = request(1)
        reply = PolicyClientModule(server.client()).submit(td).result(HANG)
        assert set(td.keys()) == {"observation"}
        assert (reply["action"] == 2).all()


def test_a_torchrl_collector_collects_through_it() -> None:
    torchrl_collectors = pytest.importorskip("torchrl.collectors")
    from torchrl.envs import GymEnv

    module = TensorDictModule(
        nn.Sequential(nn.Linear(4, 2), nn.Softmax(-1)), in_keys=["observation"], out_keys=["action"]
    )
    with InferenceServer(module, ThreadingTransport()) as server:
        remote = PolicyClientModule(server.client(), in_keys=["observation"], out_keys=["action"])
        collector = torchrl_collectors.Collector(
            lambda: GymEnv("CartPole-v1", categorical_action_encoding=False),
            remote,
            frames_per_batch=20,
            total_frames=40,
            auto_register_policy_transforms=False,
        )
        frames = sum(batch.numel() for batch in collector)
        collector.shutdown()
        assert frames == 40
        assert server.stats().ok >= 40
