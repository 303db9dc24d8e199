"""Where a signal has interrupted a thread."""

from __future__ import annotations

from types import CodeType, FrameType

__all__ = ["is_within"]


def is_within(frame: FrameType | None, code: CodeType) -> bool:
    """Whether a signal has interrupted the function of this code, or what it has called."""
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame is not None
