"""Three ways to pause a server, by what becomes of the requests that are pending."""

import asyncio

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ServerPausedError, ThreadingTransport


def make_policy() -> TensorDictModule:
    return TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])


def observe() -> TensorDict:
    return TensorDict({"observation": torch.randn(4)})


async def serve() -> None:
    async with InferenceServer(make_policy(), ThreadingTransport()) as server:
        client = server.async_client()

        # Pending requests wait, and so does what is submitted inside.
        async with server.paused():
            asked = [client.submit(observe()) for _ in range(3)]
            await server.aupdate_weights(make_policy())
        replies = await asyncio.gather(*asked)
        print("keep:   computed by version", [int(reply["policy_version"]) for reply in replies])

        # Pending requests are served first; what is submitted inside waits.
        before = [client.submit(observe()) for _ in range(3)]
        async with server.paused(pending="wait"):
            inside = [client.submit(observe()) for _ in range(3)]
            await server.aupdate_weights(make_policy())
        replies = await asyncio.gather(*before, *inside)
        print("wait:   computed by version", [int(reply["policy_version"]) for reply in replies])

        # Pending requests are refused, and so is what is submitted inside.
        async with server.paused(pending="reject"):
            try:
                await client(observe())
            except ServerPausedError as error:
                print("reject:", error)


def main() -> None:
    asyncio.run(serve())


if __name__ == "__main__":
    main()
