"""What the command says as it begins to serve: what, where, and lines to try it with."""

from __future__ import annotations

import json
import shlex
import socket
from typing import Any

from tensordict import TensorDictBase

from aioinfer.serve.loading import PolicyInfo
from aioinfer.serve.settings import KEY_VARIABLE, Settings

__all__ = ["announce", "url_of"]

_LONGEST_EXAMPLE = 400  # characters of JSON that are still pasted
_ANYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}


def url_of(settings: Settings, listening: socket.socket) -> str:
    """Where the service is asked over HTTP; on a Unix socket, the address that goes with its path."""
    scheme = "http" if settings.tls is None else "https"
    if settings.uds is not None:
        return f"{scheme}://localhost"
    host, port = settings.host, listening.getsockname()[1]
    host = _ANYWHERE.get(host, host)
    return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"


def announce(settings: Settings, info: PolicyInfo, url: str) -> str:
    """The lines.

    Args:
        settings: of the service.
        info: about the policy.
        url: where it is asked.
    """
    robots = f"ws{_from_elsewhere(settings, url).removeprefix('http')}"
    if settings.uds is not None:
        robots = f"{settings.uds}, a WebSocket"
    lines = {
        "robots": f"{robots}   (openpi; any path)",
        "clients": f'aioinfer.connect("{robots}")' if settings.uds is None else "",
        "page": f"{url}/" if settings.uds is None else "",
        "try it": " ".join([*_curl(settings), *_request(info, url)]),
    }
    if info.request_spec is None and info.in_keys:
        entries = ", ".join(f'"{_text(key)}": [...]' for key in info.in_keys)
        lines["request"] = " ".join([*_curl(settings), f"{url}/act -d '{{{entries}}}'"])
    return "\n".join([_headline(settings, info, url), *(f"  {name:8} {line}" for name, line in lines.items() if line)])


def _from_elsewhere(settings: Settings, url: str) -> str:
    """The URL for other machines, where they reach it."""
    here = _ANYWHERE.get(settings.host)
    return url if here is None else url.replace(f"[{here}]" if ":" in here else here, socket.gethostname())


def _headline(settings: Settings, info: PolicyInfo, url: str) -> str:
    where = url if settings.uds is None else str(settings.uds)
    about = [info.kind]
    if info.parameters:
        about.append(f"{info.parameters} parameters")
    about.append(f"on {settings.server_options['device'] or 'the CPU' if info.parameters else 'the CPU'}")
    if settings.process:
        about.append("in a process of its own")
    return f"serving {settings.source.reference} ({', '.join(about)}) at {where}; Ctrl-C ends it"


def _curl(settings: Settings) -> list[str]:
    words = ["curl", "-s"]
    if settings.uds is not None:
        words += ["--unix-socket", shlex.quote(str(settings.uds))]
    if settings.certificate is not None:
        words += ["--cacert", shlex.quote(str(settings.certificate))]
    if settings.key_file is not None:  # the token itself is not shown
        token = f"tr -d ' \\t\\r' < {shlex.quote(str(settings.key_file))} | grep -m1 '^[^#]'"
        words += ["-H", f'"Authorization: Bearer $({token})"']
    elif settings.tokens:
        words += ["-H", f'"Authorization: Bearer ${KEY_VARIABLE}"']
    return words


def _request(info: PolicyInfo, url: str) -> list[str]:
    if info.request_spec is not None:
        try:
            example = json.dumps(_lists(info.request_spec))
        except (AttributeError, TypeError, ValueError):  # an entry that is no tensor
            example = ""
        if example and len(example) <= _LONGEST_EXAMPLE:
            return [f"{url}/act", "-d", shlex.quote(example)]
    return [f"{url}/readyz"]


def _lists(td: TensorDictBase) -> dict[str, Any]:
    return {
        str(name): _lists(value) if isinstance(value, TensorDictBase) else value.tolist() for name, value in td.items()
    }


def _text(key: Any) -> str:
    return key if isinstance(key, str) else ".".join(key)
