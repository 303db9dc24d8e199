"""A client that stands where a policy stands."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager

from tensordict import TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey

from aioinfer.client import InferenceClient
from aioinfer.interaction import InteractionType, calling_in, interaction_type
from aioinfer.transports.base import InferenceTransport

__all__ = ["PolicyClientModule"]


class PolicyClientModule(TensorDictModuleBase):
    """A TensorDict module whose forward pass is computed by a server.

    It stands where a policy stands, in a torchrl ``Collector`` or a ``TensorDictSequential``: it reads
    ``in_keys``, writes ``out_keys``, and returns the TensorDict that it was given. The exploration
    mode in force where it is called (``tensordict.nn.interaction_type()``) goes along, and is in force
    when the row is computed.

    Args:
        client: a blocking client, or a transport to make one from.
        in_keys: entries that are sent; ``None`` sends all of them.
        out_keys: entries of the reply that are written; ``None`` writes all of them.
        interaction_type: a mode to use instead of the caller's. Before tensordict 0.15 modes are
            process-wide: name one here where several threads use unlike modes.

    Raises:
        TypeError: ``client`` is neither.
    """

    def __init__(
        self,
        client: InferenceClient | InferenceTransport,
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        interaction_type: InteractionType | str | None = None,
    ) -> None:
        super().__init__()
        if isinstance(client, InferenceTransport):
            client = client.client()
        if not isinstance(client, InferenceClient):
            raise TypeError(
                f"client must be a blocking InferenceClient or a transport, got {type(client).__qualname__}"
            )
        self.client = client
        self.in_keys = list(in_keys or [])  # type: ignore[arg-type]
        self.out_keys = list(out_keys or [])  # type: ignore[arg-type]
        self.interaction_type = None if interaction_type is None else InteractionType(interaction_type)

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        """Send one request; the future resolves to the server's reply, and ``td`` is left alone.

        Args:
            td: ``[]``, with the ``in_keys``.
        """
        with self._calling():
            return self.client.submit(self._request(td))

    def _request(self, td: TensorDictBase) -> TensorDictBase:
        return td.select(*self.in_keys) if self.in_keys else td.copy()

    def _calling(self) -> AbstractContextManager[None]:
        mode = self.interaction_type
        return calling_in(interaction_type() if mode is None else mode)

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Compute ``out_keys``.

        Args:
            td: ``[*batch]``, with the ``in_keys``. Each element of the batch is a request of its own, and
                may meet those of other callers in one forward pass.

        Returns:
            ``td`` with the ``out_keys`` written to it.
        """
        if not td.batch_size:
            with self._calling():
                reply: TensorDictBase = self.client(self._request(td))
        elif 0 in td.batch_size:
            raise ValueError(f"an empty batch can't be sent to a server, got batch size {list(td.batch_size)}")
        else:
            pending = [self.submit(row) for row in td.reshape(-1).unbind(0)]
            reply = lazy_stack([future.result() for future in pending]).contiguous().reshape(td.batch_size)
        return td.update(reply.select(*self.out_keys) if self.out_keys else reply)
