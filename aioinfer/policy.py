"""A client that stands where a policy stands."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

from tensordict import TensorDictBase, lazy_stack
from tensordict.nn import TensorDictModuleBase
from tensordict.utils import NestedKey

from aioinfer.client import InferenceClient
from aioinfer.errors import ClientBusyError, InvalidRequestError, ServerOverloadedError
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
        self._request_dims: int | None = None  # of a request's batch size; None: not known yet

    def submit(self, td: TensorDictBase) -> Future[TensorDictBase]:
        """Send one request; the future resolves to the server's reply, and ``td`` is left alone.

        Args:
            td: one request, with the ``in_keys``: ``[]``, or of the batch size of the server's ``request_spec``.
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
                batch size ``[*size]``. Each element of ``batch`` is a request of its own, and may meet those of other
                callers in one forward pass. A client with a slot sends one after the other; others send as many at a
                time as the server has room for.

        Returns:
            ``td`` with the ``out_keys`` written to it, and the policy version.
        """
        if 0 in td.batch_size:
            raise ValueError(f"an empty batch can't be sent to a server, got batch size {list(td.batch_size)}")
        reply = self._reply(td)
        if self.out_keys:
            version = self.policy_version_key
            reply = reply.select(*self.out_keys, *([version] if version is not None and version in reply else []))
        return td.update(reply)

    def _reply(self, td: TensorDictBase) -> TensorDictBase:
        """The server's reply to all elements of a batch."""
        if self._request_dims is None and td.batch_dims:  # ask once with each number of dimensions, the largest first
            for dims in range(td.batch_dims, 0, -1):
                try:
                    reply = self._reply_in_parts(td, dims)
                except InvalidRequestError:
                    continue
                self._request_dims = dims
                return reply
            reply = self._reply_in_parts(td, 0)
            self._request_dims = 0
            return reply
        return self._reply_in_parts(td, min(self._request_dims or 0, td.batch_dims))

    def _reply_in_parts(self, td: TensorDictBase, dims: int) -> TensorDictBase:
        """The reply to requests of so many batch dimensions each."""
        if dims == td.batch_dims:
            with self._calling():
                return self.client(self._request(td), wait=True)
        size = td.batch_size[td.batch_dims - dims :]
        replies = self._replies(list(td.reshape(-1, *size).unbind(0)))
        return lazy_stack(replies).contiguous().reshape(td.batch_size)

    def _replies(self, requests: list[TensorDictBase]) -> list[TensorDictBase]:
        """Send requests, as many at a time as the client and the server take."""
        replies: dict[int, TensorDictBase] = {}
        while left := [index for index in range(len(requests)) if index not in replies]:
            pending: list[tuple[int, Future[TensorDictBase]]] = []
            before = len(replies)
            try:
                for index in left:
                    try:
                        pending.append((index, self.submit(requests[index])))
                    except ClientBusyError:  # it has one request under way at a time
                        break
                    if _is_overloaded(pending[-1][1]):
                        break
                for index, future in pending:
                    try:
                        replies[index] = future.result()
                    except ServerOverloadedError:  # again, when some of the others are answered
                        continue
            except BaseException:
                for _, future in pending:
                    future.cancel()
                raise
            if len(replies) == before:  # other callers have all the room
                with self._calling():
                    replies[left[0]] = self.client(self._request(requests[left[0]]), wait=True)
        return [replies[index] for index in range(len(requests))]


def _is_overloaded(future: Future[TensorDictBase]) -> bool:
    """Whether the server has refused a request already, since it has no room."""
    return future.done() and not future.cancelled() and isinstance(future.exception(), ServerOverloadedError)
