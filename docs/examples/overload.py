"""A bounded queue, callers that wait for space in it, and deadlines that cover the time in the queue."""

import asyncio
import time

import torch
from tensordict import TensorDict, TensorDictBase

from aioinfer import InferenceClient, InferenceServer, ServerOverloadedError, ThreadingTransport


def slow_policy(batch: TensorDictBase) -> TensorDictBase:
    time.sleep(0.1)
    return TensorDict({"action": -batch["observation"]}, batch_size=batch.batch_size)


def observe() -> TensorDict:
    return TensorDict({"observation": torch.randn(4)})


def ask_with_deadline(client: InferenceClient) -> None:
    """A thread's deadline is ``timeout``. The request is withdrawn, and the client usable at once."""
    try:
        client(observe(), timeout=0.01)
    except TimeoutError as error:
        print("a thread:", error)


async def serve() -> None:
    async with InferenceServer(slow_policy, ThreadingTransport(), max_batch_size=2, max_pending=4) as server:
        client = server.async_client()

        # Refused at once: the first four fill the queue.
        outcomes = await asyncio.gather(*(client(observe()) for _ in range(10)), return_exceptions=True)
        refused = [outcome for outcome in outcomes if isinstance(outcome, ServerOverloadedError)]
        print(f"{len(outcomes) - len(refused)} served, {len(refused)} refused: {refused[0]}")

        # Wait for space in the queue instead: backpressure.
        outcomes = await asyncio.gather(*(client(observe(), wait=True) for _ in range(10)))
        print(f"{len(outcomes)} served with wait=True")

        # A deadline for a task; it covers the wait for space, the queue, and the forward pass.
        try:
            async with asyncio.timeout(0.01):
                await client(observe(), wait=True)
        except TimeoutError:
            print("a task: no reply within 0.01 seconds")

        await asyncio.to_thread(ask_with_deadline, server.client())


def main() -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main()
