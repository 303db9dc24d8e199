"""A trainer overwrites its parameters whenever it has published them, and no reply ever shows it."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn

from aioinfer import InferenceClient, InferenceServer, ThreadingTransport
from aioinfer.weight_sync import SharedMemWeightSyncScheme

CALLERS, REQUESTS = 8, 250
UNPUBLISHED = -1.0


class Policy(nn.Module):
    """Reads its weights twice in a forward pass, with a pause in between."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1000))

    def forward(self, td: TensorDictBase) -> TensorDict:
        before = self._first_and_last()
        time.sleep(0.001)
        weights = torch.cat([before, self._first_and_last()])
        return TensorDict({"weights": weights.expand(*td.batch_size, 4)}, batch_size=td.batch_size)

    def _first_and_last(self) -> Tensor:
        return self.weight[[0, -1]]


@torch.no_grad()
def train(scheme: SharedMemWeightSyncScheme, end: threading.Event) -> None:
    policy, version = Policy(), 1
    scheme.init_on_sender(model=policy)
    policy.weight.fill_(version)
    scheme.connect(version=version)
    while not end.is_set():
        version += 1
        policy.weight.fill_(version)
        scheme.send(version=version)
        policy.weight.fill_(UNPUBLISHED)
        time.sleep(0.002)


def ask(client: InferenceClient) -> list[TensorDictBase]:
    return [client(TensorDict({"observation": torch.zeros(1)})) for _ in range(REQUESTS)]


def main() -> None:
    scheme, end = SharedMemWeightSyncScheme(num_workers=1), threading.Event()
    with (
        InferenceServer(Policy(), ThreadingTransport(), weight_sync=scheme, swap_weights=True) as server,
        ThreadPoolExecutor(CALLERS + 1) as threads,
    ):
        training = threads.submit(train, scheme, end)
        asked = [threads.submit(ask, server.client()) for _ in range(CALLERS)]
        try:
            replies = [reply for one in asked for reply in one.result()]
        finally:
            end.set()
        training.result()
    scheme.shutdown()

    mixed = sum(len(set(reply["weights"].tolist())) > 1 for reply in replies)
    unpublished = sum(UNPUBLISHED in reply["weights"].tolist() for reply in replies)
    mislabelled = sum(float(reply["policy_version"]) not in reply["weights"].tolist() for reply in replies)
    versions = {int(reply["policy_version"]) for reply in replies}
    print(f"{len(replies)} replies by {len(versions)} sets of weights")
    print(f"{mixed} mixed, {unpublished} from unpublished weights, {mislabelled} with a wrong version")


if __name__ == "__main__":
    main()
