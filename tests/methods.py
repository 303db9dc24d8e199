"""How the tests start processes."""

from __future__ import annotations

import multiprocessing

import pytest

__all__ = ["METHODS", "SPAWN"]

# A process of the fork server has nothing of its parent either, and need not import torch, which takes seconds.
SPAWN = pytest.param("spawn", marks=pytest.mark.stress)
METHODS = ["fork", "forkserver", SPAWN]

multiprocessing.set_forkserver_preload(["torch", "tests.hosted", "tests.process_workers", "tests.transports"])
