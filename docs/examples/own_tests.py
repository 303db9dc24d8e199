"""Tests of code that uses a server: a function in place of the policy, and a gate in place of any sleep."""

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceClient, InferenceServer, ServerOverloadedError, ThreadingTransport
from aioinfer.testing import GatedModel, eventually


class Pilot:
    """The code under test: it steers, and flies straight on where no reply comes in time."""

    def __init__(self, client: InferenceClient, patience: float = 0.05) -> None:
        self.client, self.patience = client, patience

    def steer(self, height: float) -> float:
        try:
            reply = self.client(TensorDict({"height": torch.tensor([height])}), timeout=self.patience)
        except (TimeoutError, ServerOverloadedError):
            return 0.0
        return float(reply["rudder"])


def down(batch: TensorDictBase) -> TensorDictBase:
    """Stands for the policy: its answers are known."""
    return TensorDict({"rudder": -batch["height"]}, batch_size=batch.batch_size)


def test_the_pilot_does_what_the_policy_says() -> None:
    with InferenceServer(down, ThreadingTransport()) as server:
        assert Pilot(server.client(), patience=20.0).steer(3.0) == -3.0


def test_the_pilot_flies_straight_on_while_the_policy_is_slow() -> None:
    model = GatedModel(down)
    with InferenceServer(model, ThreadingTransport()) as server:
        assert Pilot(server.client()).steer(3.0) == 0.0
        model.open()
        assert Pilot(server.client(), patience=20.0).steer(4.0) == -4.0


def test_the_pilot_flies_straight_on_while_the_server_is_full() -> None:
    model = GatedModel(down)
    with InferenceServer(model, ThreadingTransport(), max_batch_size=1, max_pending=1) as server:
        client = server.client()
        under_way = client.submit(TensorDict({"height": torch.tensor([1.0])}))
        assert model.entered.wait(20.0)  # the model has the first request; the second fills the queue
        waiting = client.submit(TensorDict({"height": torch.tensor([2.0])}))
        eventually(lambda: server.stats().pending == 1)
        assert Pilot(client, patience=20.0).steer(3.0) == 0.0
        model.open()
        assert (float(under_way.result(20.0)["rudder"]), float(waiting.result(20.0)["rudder"])) == (-1.0, -2.0)
        assert model.batches == [[1.0], [2.0]]  # the third was never computed


if __name__ == "__main__":  # or: pytest own_tests.py
    for name, test in list(globals().items()):
        if name.startswith("test_"):
            test()
            print("passed:", name)
