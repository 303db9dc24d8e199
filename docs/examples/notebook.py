"""A notebook, cell by cell: the server lives in the background from one cell to the next."""

# %% Start a server. A cell that is run again shuts down the server of its last run.
import copy
from concurrent.futures import ThreadPoolExecutor

import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule
from torch import nn

from aioinfer import InferenceServer, ThreadingTransport

if "server" in globals():
    globals()["server"].shutdown()
policy = TensorDictModule(nn.Linear(4, 2), in_keys=["observation"], out_keys=["action"])
server = InferenceServer(policy, ThreadingTransport()).start()

# %% Ask it.
client = server.client()
print(client(TensorDict({"observation": torch.ones(4)})))

# %% Ask it from many threads.
requests = [TensorDict({"observation": torch.randn(4)}) for _ in range(64)]
with ThreadPoolExecutor(8) as threads:
    replies = list(threads.map(client, requests))
print(torch.stack([reply["action"] for reply in replies]).shape)

# %% Change a copy of the policy, and serve that: the model that the server was given is the server's.
changed = copy.deepcopy(policy)
nn.init.zeros_(next(changed.parameters()))
server.update_weights(changed)
reply = client(TensorDict({"observation": torch.ones(4)}))
print(reply["action"], "by version", int(reply["policy_version"]))

# %% Look at what it did.
stats = server.stats()
print(f"{stats.ok} requests, {stats.mean_batch_size:.1f} in a forward pass, p95 {stats.request.p95 * 1e3:.2f} ms")

# %% End it.
server.shutdown()
