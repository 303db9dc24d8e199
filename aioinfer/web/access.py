"""Who may ask: tokens, and the checks that keep a browser from asking in the name of a page elsewhere."""

from __future__ import annotations

import hmac
from collections.abc import Mapping, Sequence
from ipaddress import ip_address
from urllib.parse import urlsplit

__all__ = ["Access", "Refusal"]

_SCHEMES = ("bearer ", "api-key ")


class Refusal(Exception):
    """A request that may not be made.

    Attributes:
        status: of the HTTP reply.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


class Access:
    """Decides by the headers of a request, or of a WebSocket's handshake.

    Args:
        tokens: of which a caller needs one, as ``Authorization: Bearer`` or ``Api-Key``; none are needed if there are
            none.
        hosts: names by which this server may be asked, beside IP addresses and ``localhost``: the ``Host`` header has
            one of them, whatever its port. A page elsewhere whose name leads here by a trick of its DNS has another.
            ``None`` takes any.
        origins: of pages that may ask from a browser, beside those of this server.
    """

    def __init__(
        self, tokens: Sequence[str] = (), hosts: Sequence[str] | None = (), origins: Sequence[str] = ()
    ) -> None:
        self._tokens = [token.encode() for token in tokens]
        self._hosts = None if hosts is None else {"localhost", *[host.lower() for host in hosts]}
        self._allowed_host: bytes | None = None  # the latest: most callers use the same
        self._origins = {origin.lower().rstrip("/") for origin in origins}

    def check_page(self, headers: Mapping[bytes, bytes]) -> None:
        """Check ``Host`` and ``Origin``.

        Raises:
            Refusal: one of them is foreign.
        """
        raw_host = headers.get(b"host", b"")
        origin = headers.get(b"origin")
        if raw_host == self._allowed_host and origin is None:
            return
        host = raw_host.decode("latin-1").lower()
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        if self._hosts is not None and name not in self._hosts and not _is_address(name):
            raise Refusal(421, f"this server is not asked by the name {name[:100]!r}; allow it with --allow-host")
        self._allowed_host = raw_host
        if origin is None:
            return
        text = origin.decode("latin-1").lower()
        if text not in self._origins and (not host or _netloc(text) != host):
            raise Refusal(403, f"pages of {text[:100]!r} may not ask this server; allow them with --allow-origin")

    def check_token(self, headers: Mapping[bytes, bytes]) -> None:
        """Check ``Authorization``.

        Raises:
            Refusal: there is no token, or a wrong one.
        """
        if not self._tokens:
            return
        given = headers.get(b"authorization", b"")
        for scheme in _SCHEMES:
            if given[: len(scheme)].lower() == scheme.encode():
                token = given[len(scheme) :].strip()
                # All of them are compared, so that the time says nothing about which one is near.
                if any([hmac.compare_digest(token, one) for one in self._tokens]):  # noqa: C419
                    return
        raise Refusal(401, "this server needs a token: Authorization: Bearer <token>, or Api-Key <token>")


def _netloc(origin: str) -> str:
    try:
        return urlsplit(origin).netloc
    except ValueError:  # brackets without an address
        return ""


def _is_address(name: str) -> bool:
    """Whether a host is an IP address, which no DNS has led here."""
    try:
        ip_address(name.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True
