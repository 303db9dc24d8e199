"""The API of LitServe, which its worker process imports."""

from __future__ import annotations

from typing import Any

import litserve
import torch

from aioinfer.bench.models import Policy

__all__ = ["ActAPI"]


class ActAPI(litserve.LitAPI):  # type: ignore[misc]
    """Computes batches of JSON requests.

    Args:
        model: its name.
        options: of the base class.
    """

    def __init__(self, model: str, **options: Any) -> None:
        super().__init__(**options)
        self._model = model

    def setup(self, device: str) -> None:
        """Make the policy, in the worker process."""
        torch.set_num_threads(1)
        self._network = Policy(self._model).module.module

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # it looks at annotations
        """The observation of a request."""
        return request["observation"]

    def batch(self, inputs: Any) -> Any:
        """Stack observations."""
        return torch.tensor(inputs)

    def predict(self, batch: Any) -> Any:
        """Compute actions."""
        with torch.no_grad():
            return self._network(batch)

    def unbatch(self, output: Any) -> Any:
        """The actions of each request."""
        return output.tolist()

    def encode_response(self, output: Any) -> Any:
        """The reply."""
        return {"action": output}
