"""A client that stands where a policy stands."""

from __future__ import annotations

import math
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey

from aioinfer.client import InferenceClient
from aioinfer.errors import InvalidRequestError
from aioinfer.interaction_type import InteractionType, interaction_type, requests_carry

__all__ = ["PolicyClientModule"]


class PolicyClientModule(TensorDictModuleBase):
    """A TensorDict module whose forward pass is computed by a server.

    It stands where a policy stands, in a torchrl ``Collector`` or a ``TensorDictSequential``: it reads
    ``in_keys``, writes ``out_keys``, and returns the TensorDict that it was given. The exploration
    mode in force where it is called (``tensordict.nn.interaction_type()``) goes along, and is in force
    when the row is computed.

    Args:
        client: a blocking client, or what makes one: a transport, a server, or what ``connect`` returned.
        in_keys: entries that are sent; ``None`` sends all of them.
        out_keys: entries of the reply that are written; ``None`` writes all of them.
        interaction_type: a mode to use instead of the caller's. Before tensordict 0.15 modes are
            process-wide: name one here where several threads use unlike modes.
        policy_version_key: the entry of the reply that says which weights computed it; it is written too, if the reply
            has it. ``None`` writes it only if ``out_keys`` names it.

    Raises:
        TypeError: ``client`` is none of these.
    """

    def __init__(
        self,
        client: InferenceClient | Any,
        *,
        in_keys: Sequence[NestedKey] | None = None,
        out_keys: Sequence[NestedKey] | None = None,
        interaction_type: InteractionType | str | None = None,
        policy_version_key: str | None = "policy_version",
    ) -> None:
        super().__init__()
        made = client.client() if hasattr(client, "client") else client
        if not isinstance(made, InferenceClient):
            raise TypeError(
                f"client must be a blocking InferenceClient, a transport or a server, got {type(client).__qualname__}"
            )
        self.client = made
        self.in_keys = list(in_keys or [])  # type: ignore[arg-type]
        self.out_keys = list(out_keys or [])  # type: ignore[arg-type]
        self.interaction_type = None if interaction_type is None else InteractionType(interaction_type)
        self.policy_version_key = policy_version_key
        self._row_dims = 0  # of a row's batch size, as far as known from replies

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        """Send one request; the future resolves to the server's reply, and ``td`` is left alone.

        Args:
            td: one request, with the ``in_keys``: a row, or ``[n, ...]`` rows; see :meth:`InferenceClient.submit`.
        """
        with self._calling():
            return self.client.submit(self._request(td))

    def _request(self, td: TensorDictBase) -> TensorDictBase:
        return td.select(*self.in_keys) if self.in_keys else td.copy()

    def _calling(self) -> AbstractContextManager[None]:
        mode = self.interaction_type
        return requests_carry(interaction_type() if mode is None else mode)

    def forward(self, td: TensorDictBase) -> TensorDictBase:
        """Compute ``out_keys``.

        Args:
            td: ``[*batch]``, with the ``in_keys``, or ``[*batch, *size]`` where the server's ``request_spec`` is of
                batch size ``[*size]``. All elements of ``batch`` are the rows of one request, or of as few as the
                client can send (:attr:`InferenceClient.max_rows`), one after the other.

        Returns:
            ``td`` with the ``out_keys`` written to it, and the policy version of each row.
        """
        reply = self._reply(self._request(td))
        if self.out_keys:
            version = self.policy_version_key
            written = [*self.out_keys, *([version] if version is not None and version in reply else [])]
            reply = reply.select(*written, strict=bool(reply.numel()))  # without rows, its entries may be unknown
        return td.update(reply)

    def _reply(self, td: TensorDictBase) -> TensorDictBase:
        """The server's reply to all elements of a batch, which has the entries to be sent."""
        if td.batch_dims == 0:
            return self._call(td)
        refusal: InvalidRequestError | None = None
        # One row and rows that are sent as they are look the same.
        most = td.batch_dims if self._exceeds_client(td) else td.batch_dims - 1
        expected = min(self._row_dims, most)
        for dims in (expected, *[dims for dims in range(most + 1) if dims != expected]):
            try:
                reply = self._reply_to_rows(td, dims)
            except InvalidRequestError as error:
                refusal = refusal or error
            else:
                if dims != expected:
                    self._row_dims = dims
                return reply
        assert refusal is not None
        try:
            raise refusal
        finally:
            del refusal  # its traceback leads here: it must not lead back

    def _exceeds_client(self, rows: TensorDictBase) -> bool:
        return self.client.max_rows is not None and rows.batch_size[0] > self.client.max_rows

    def _reply_to_rows(self, td: TensorDictBase, dims: int) -> TensorDictBase:
        """The reply to rows of so many batch dimensions each."""
        if dims == td.batch_dims:
            return self._call(td)
        split = td.batch_dims - dims
        rows = td if split == 1 else td.reshape(math.prod(td.batch_size[:split]), *td.batch_size[split:])
        if self._exceeds_client(rows):
            # Each reply may lie in memory that the client's next request overwrites.
            parts: list[Any] = [self._call(some).clone() for some in rows.split(self.client.max_rows or 1)]
            reply: Any = torch.cat(parts)
        else:
            reply = self._call(rows)
        shaped: TensorDictBase = reply if split == 1 else reply.reshape(td.batch_size)
        return shaped

    def _call(self, td: TensorDictBase) -> TensorDictBase:
        with self._calling():
            return self.client(td, wait=True)
