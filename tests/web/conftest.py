"""Fixtures of the tests of the network front."""

from __future__ import annotations

from collections.abc import Iterator

import pytest


@pytest.fixture
def port() -> Iterator[int]:
    """A port of 127.0.0.1, for one server after the other."""
    from tests.web.hosting import reserved_port  # needs uvicorn, which may not be there

    with reserved_port() as reserved:
        yield reserved
