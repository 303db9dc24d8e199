"""A recurrent policy: 16 environments share one LSTM, and each keeps a state of its own."""

import asyncio

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from aioinfer import AsyncInferenceClient, InferenceServer, ThreadingTransport

LAYERS, HIDDEN, STEPS = 2, 32, 50


class Policy(nn.Module):
    """One step of an LSTM, whose state travels batch-first: ``[layers, hidden]`` in a request."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(4, HIDDEN, LAYERS, batch_first=True)
        self.head = nn.Linear(HIDDEN, 2)

    def forward(self, observation: Tensor, hidden: Tensor, cell: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        # A batch is [B, layers, hidden]. nn.LSTM wants [layers, B, hidden], also with batch_first=True.
        state = hidden.transpose(0, 1).contiguous(), cell.transpose(0, 1).contiguous()
        output, (hidden, cell) = self.lstm(observation.unsqueeze(1), state)  # a sequence of one step
        return self.head(output.squeeze(1)), hidden.transpose(0, 1), cell.transpose(0, 1)


async def play(client: AsyncInferenceClient, observations: Tensor) -> Tensor:
    """Play one episode, and return its actions."""
    hidden, cell = torch.zeros(LAYERS, HIDDEN), torch.zeros(LAYERS, HIDDEN)  # an episode starts with zeros
    actions = []
    for observation in observations:
        reply = await client(TensorDict({"observation": observation, "hidden": hidden, "cell": cell}))
        actions.append(reply["action"])
        hidden, cell = reply["hidden"], reply["cell"]
    return torch.stack(actions)


async def serve() -> None:
    network = Policy()
    policy = TensorDictModule(network, in_keys=["observation", "hidden", "cell"], out_keys=["action", "hidden", "cell"])
    episodes = torch.randn(16, STEPS, 4)
    async with InferenceServer(policy, ThreadingTransport()) as server:
        client = server.async_client()
        actions = torch.stack(await asyncio.gather(*(play(client, episode) for episode in episodes)))
        print(f"{server.stats().ok} requests, {server.stats().mean_batch_size:.1f} in a forward pass")
    with torch.no_grad():
        alone = network.head(network.lstm(episodes)[0])  # whole episodes at once, without any server
    print("the same actions as without a server:", torch.allclose(actions, alone, atol=1e-5))


if __name__ == "__main__":
    asyncio.run(serve())
