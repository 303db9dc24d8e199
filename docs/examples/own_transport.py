"""A minimal custom transport: five methods over a list and a condition."""

import asyncio
import threading
from collections import deque
from concurrent.futures import Future
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, InferenceTransport, ThreadingTransport


class ListTransport(InferenceTransport):
    """Requests wait in a list that a condition guards."""

    def __init__(self) -> None:
        self._pending: deque[tuple[TensorDictBase, Future[TensorDictBase]]] = deque()
        self._arrived = threading.Condition()

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        future: Future[TensorDictBase] = Future()
        with self._arrived:
            self._pending.append((td, future))
            self._arrived.notify()
        return future

    def wait_for_work(self, timeout: float) -> None:
        with self._arrived:
            self._arrived.wait_for(lambda: bool(self._pending), timeout)

    def drain(self, max_items: int) -> tuple[list[TensorDictBase], list[Any]]:
        with self._arrived:
            taken = [self._pending.popleft() for _ in range(min(max_items, len(self._pending)))]
        return [td for td, _ in taken], [future for _, future in taken]

    def resolve(self, callback: Any, result: TensorDictBase) -> None:
        callback.set_result(result)

    def resolve_exception(self, callback: Any, exc: BaseException) -> None:
        callback.set_exception(exc)


def main() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    request = TensorDict({"observation": torch.randn(4)})
    custom, threading_transport = ListTransport(), ThreadingTransport()
    with InferenceServer(policy, [custom, threading_transport]) as server:
        print("from a thread:          ", custom.client()(request)["action"])

        async def ask() -> TensorDictBase:
            return await custom.async_client()(request)

        print("from a task:            ", asyncio.run(ask())["action"])
        print("beside other transports:", threading_transport.client()(request)["action"])
        print("requests:", server.stats().ok)


if __name__ == "__main__":
    main()
