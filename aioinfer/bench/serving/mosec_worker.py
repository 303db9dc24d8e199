"""The worker of Mosec, which its processes import."""

from __future__ import annotations

import os
from typing import Any

import torch
from mosec import Server, Worker

from aioinfer.bench.models import Policy
from aioinfer.bench.workloads import MAX_BATCH_SIZE

__all__ = ["ActWorker", "run"]

_MODEL = "AIOINFER_BENCH_MODEL"


class ActWorker(Worker):  # type: ignore[misc]
    """Computes a batch of JSON requests."""

    def __init__(self) -> None:
        super().__init__()
        torch.set_num_threads(1)
        self.network = Policy(os.environ[_MODEL]).module.module

    def forward(self, data: Any) -> Any:
        """Answer a batch of requests."""
        with torch.no_grad():
            actions = self.network(torch.tensor([one["observation"] for one in data]))
        return [{"action": action} for action in actions.tolist()]


def run(model: str) -> None:
    """Serve until a signal ends the process."""
    server = Server()
    server.append_worker(ActWorker, num=1, max_batch_size=MAX_BATCH_SIZE, max_wait_time=1, env=[{_MODEL: model}])
    server.run()
