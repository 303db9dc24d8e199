"""The one thread that owns the model."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future

import torch

__all__ = ["ModelThread"]


class ModelThread:
    """Prepares the model, then serves one batch after the other.

    Whatever touches the model runs here. So the model needs no lock, and nothing changes it during a
    forward pass.

    The thread waits for requests itself instead of being handed each batch by the event loop: a lone
    caller saves a wake-up of the loop, and under load the loop is woken for replies only.

    Any thread: the public methods. Model thread only: ``_run``, and the callables.

    Args:
        prepare: called first.
        serve: waits for requests and answers a batch of them; returns early when ``wake`` was called.
        wake: makes a running ``serve``, or else the next one, return early.
        ended: called last, with the error that ended the thread, if one did.
        name: the thread's name.
    """

    def __init__(
        self,
        *,
        prepare: Callable[[], None],
        serve: Callable[[], None],
        wake: Callable[[], None],
        ended: Callable[[BaseException | None], None],
        name: str,
    ) -> None:
        self._prepare = prepare
        self._serve = serve
        self._wake = wake
        self._ended = ended
        self._stopping = False
        self._prepared: Future[None] = Future()
        # A daemon: a program that ends without shutting its server down must not hang.
        self._thread = threading.Thread(target=self._run, name=name, daemon=True)

    def start(self) -> Future[None]:
        """Start the thread, once; the future resolves when the model is prepared, or fails if it can't be."""
        self._thread.start()
        return self._prepared

    def stop(self) -> None:
        """End the thread after the batch that runs now."""
        self._stopping = True
        self._wake()

    def join(self, timeout: float | None) -> None:
        """Wait for the end of the thread; returns at once on the thread itself."""
        if threading.current_thread() is not self._thread:
            self._thread.join(timeout)

    @torch.no_grad()
    def _run(self) -> None:
        error: BaseException | None = None
        try:
            self._prepare()
            self._prepared.set_result(None)
            while not self._stopping:
                self._serve()
        except BaseException as caught:
            error = caught
        finally:
            self._ended(error)
            if error is not None and not self._prepared.done():
                self._prepared.set_exception(error)
