"""Collect experience: many environments, each at its own pace, ask one policy, and become batches of fragments.

From an environment to a batch, file by file::

    environments/          group.py, tasks.py        writer.py               scheduler.py       collector.py
    a stepper: rows    --> a thread, or a task: ask  --> into rows of    --> which rows are --> a TensorDict [B, T],
    that step as one       the policy, step, again       fragments.py's      the next batch     a view of the ring
                           policy_caller.py              ring
                           local_policy.py

    host.py            all groups of one process: this one, or a worker's (worker.py)
    coordinator.py     hands out rows, has what fails made again, notices what hangs (watch.py, restarts.py)
    worker_pool.py     starts and ends the processes of workers
    messages.py        what the coordinator and the hosts say to each other

A group asks a server, or it runs a copy of the policy itself, with weights that are published through shared memory:
``policy_caller.py`` has the requests, ``local_policy.py`` the copies, ``task_policy.py`` what does so for tasks.
``row_writer.py`` writes what a task collects.

``spaces.py`` says how observations and actions become arrays, ``policy_layout.py`` what is asked and what is kept of
the replies, ``episodes.py`` joins fragments to whole episodes, ``stats.py`` has the figures.
"""

from __future__ import annotations

from aioinfer.collectors.collector import AsyncBatchedCollector
from aioinfer.collectors.fragments import with_next_observation
from aioinfer.collectors.restarts import Restarts
from aioinfer.collectors.stats import CollectorStats

__all__ = ["AsyncBatchedCollector", "CollectorStats", "Restarts", "with_next_observation"]
