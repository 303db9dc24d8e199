"""What a server tells about itself: counts, reasons, batch sizes, percentiles."""

import asyncio

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, Percentiles, ServerStats, ThreadingTransport


def in_ms(times: Percentiles) -> str:
    return f"p50 {times.p50 * 1e3:.2f} ms, p95 {times.p95 * 1e3:.2f} ms, p99 {times.p99 * 1e3:.2f} ms"


def show(stats: ServerStats) -> None:
    print(f"requests    {stats.ok} ok, {stats.failed} failed, {stats.cancelled} cancelled, {stats.rejected} rejected")
    print(f"pending     {stats.pending}")
    print(f"batches     {', '.join(f'{count} {reason}' for reason, count in stats.batches.items())}")
    print(f"batch size  {stats.mean_batch_size:.1f} on average")
    print(f"queue wait  {in_ms(stats.queue_wait)}")
    print(f"held back   {in_ms(stats.held)}")
    print(f"forward     {in_ms(stats.forward)}")
    print(f"request     {in_ms(stats.request)}")
    print(f"callers     {stats.callers} that come back, think {in_ms(stats.think_time)}")


async def serve() -> None:
    policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
    async with InferenceServer(policy, ThreadingTransport(), max_batch_size=32) as server:
        client = server.async_client()

        async def ask() -> None:
            for _ in range(100):
                await client(TensorDict({"observation": torch.randn(4)}))

        await asyncio.gather(*(ask() for _ in range(8)))  # these also pay for the first forward pass
        server.stats(reset=True)
        await asyncio.gather(*(ask() for _ in range(64)))
        show(server.stats())


def main() -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main()
