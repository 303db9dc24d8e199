"""How fast frames come."""

from __future__ import annotations

import time
from collections.abc import Iterator


def frame_rate(frames: Iterator[int], warm_up: float, seconds: float) -> float:
    """Frames per second after a warm-up that begins with the first batch; each item is the frames of one batch."""
    clock = time.perf_counter
    next(frames)
    begin = clock() + warm_up
    while clock() < begin:
        next(frames)
    begun, count = clock(), 0
    while (now := clock()) < begun + seconds:
        count += next(frames)
    return count / (now - begun)
