"""The torch modes under which the library makes what it keeps."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["long_lived"]


@contextmanager
def long_lived() -> Iterator[None]:
    """Make tensors that outlive the call in which they are made.

    A call may come under ``torch.inference_mode()``, a default device or with gradients enabled. Tensors that are made
    inside this block, and views of them, are plain CPU tensors all the same: they can be written to under any
    mode, and need no gradient. Name the ``dtype`` of each, since the default dtype is the caller's too.

    Use it as a ``with`` block or as a decorator. It costs 5 us, so not on the way of a request.
    """
    with torch.inference_mode(False), torch.no_grad(), torch.device("cpu"):
        yield
