"""Serve a policy on a port: to robots, over HTTP, and to clients on other machines."""

from __future__ import annotations

import argparse
import math
import sys
from importlib.util import find_spec
from pathlib import Path

from aioinfer.interrupts import INTERRUPTED, ending_at_interrupt

__all__ = ["add_arguments", "run"]

_EXTRA = {
    "starlette": "starlette",
    "uvicorn": "uvicorn",
    "websockets": "websockets",
    "httptools": "httptools",
    "msgpack": "msgpack",
    "orjson": "orjson",
    "prometheus_client": "prometheus-client",
}
_UNITS = {"": 1, "b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}
_LOG_LEVELS = ("debug", "info", "warning", "error")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of ``aioinfer serve``."""
    parser.add_argument(
        "policy",
        type=_reference,
        metavar="module:name",
        help="a policy, or a function without arguments that makes one; modules of the current folder are found",
    )
    add = parser.add_argument_group("the policy").add_argument
    add("--checkpoint", type=Path, metavar="FILE", help="weights: torch.save(policy.state_dict(), FILE)")
    add("--device", help="where the policy runs, such as cuda:0")
    add("--in-keys", type=_keys, metavar="A,B", help="of a plain module: the entries that are its arguments")
    add("--out-keys", type=_keys, metavar="A,B", help="of a plain module: the entries that its results become")
    add("--max-batch-size", type=_count, default=64, metavar="N", help="most rows in one pass (%(default)s)")
    add("--max-pending", type=_count, default=4096, metavar="N", help="most rows that wait; 429 beyond (%(default)s)")
    add("--deadline", type=_seconds, metavar="SECONDS", help="for a reply; 504 beyond (requests may name their own)")
    add("--newest-wins", action="store_true", help="a newer request of a connection ends the one that waits")
    add("--process", action="store_true", help="run the policy in a process of its own")
    add = parser.add_argument_group("the address").add_argument
    add("--host", default="127.0.0.1", help="what to listen on (%(default)s: this machine alone)")
    add("--port", type=_port, default=8000, help="0 takes a free one (%(default)s)")
    add("--uds", type=Path, metavar="PATH", help="listen on a Unix socket instead")
    add("--ssl-certfile", type=Path, metavar="FILE", help="serve https and wss")
    add("--ssl-keyfile", type=Path, metavar="FILE", help="the key, if it is not in the same file")
    add = parser.add_argument_group("who may ask").add_argument
    add("--api-key-file", type=Path, metavar="FILE", help="tokens, one a line; AIOINFER_API_KEY may have one, too")
    add("--insecure", action="store_true", help="let anybody ask who reaches the address")
    add("--allow-host", action="append", default=[], metavar="NAME", help="this server may be asked by this name")
    add("--allow-origin", action="append", default=[], metavar="URL", help="pages of this site may ask")
    add = parser.add_argument_group("more").add_argument
    add("--name", type=_name, default="policy", help="of the policy, in /v2/models/NAME and in metrics (%(default)s)")
    add("--metadata", type=Path, metavar="FILE", help="what robots are told first: a map, in YAML or JSON")
    add("--max-message-size", type=_size, default=64 * 2**20, metavar="SIZE", help="such as 64MiB, the default")
    add("--drain", type=_wait, default=20.0, metavar="SECONDS", help="for replies, as it ends (%(default)g)")
    add("--log-level", choices=_LOG_LEVELS, default="info", help="debug logs each request, too (%(default)s)")
    add("--debug", action="store_true", help="tell callers tracebacks")


def run(options: argparse.Namespace) -> int:
    """Run ``aioinfer serve``.

    Returns:
        The exit status: 0 after SIGTERM or Ctrl-C, 130 after a second Ctrl-C; 2 where options are wrong, and 1 where
        the policy can't be loaded, its process has died, or the extra ``serve`` is missing.
    """
    missing = next((package for module, package in _EXTRA.items() if find_spec(module) is None), None)
    if missing is not None:
        print(f'the server needs {missing}: pip install "aioinfer[serve]"', file=sys.stderr)
        return 1
    try:
        with ending_at_interrupt():
            from aioinfer.serve.command import serve  # imports torch
        return serve(options)
    except KeyboardInterrupt:
        return INTERRUPTED


def _reference(text: str) -> str:
    module, _, name = text.partition(":")
    if not module or not all(part.isidentifier() for part in name.split(".")):
        raise argparse.ArgumentTypeError(f"expected module:name, such as my_robot:make_policy, got {text!r}")
    return text


def _keys(text: str) -> list[str]:
    keys = [key.strip() for key in text.split(",")]
    if not all(keys):
        raise argparse.ArgumentTypeError(f"expected names with commas between them, got {text!r}")
    return keys


def _name(text: str) -> str:
    if not text or not all(letter.isalnum() or letter in "-_." for letter in text):
        raise argparse.ArgumentTypeError(f"a name has letters, digits, and any of -_. only, got {text!r}")
    return text


def _count(text: str) -> int:
    count = int(text) if text.isdecimal() else 0
    if count < 1:
        raise argparse.ArgumentTypeError(f"must be a whole number above 0, got {text!r}")
    return count


def _port(text: str) -> int:
    port = int(text) if text.isdecimal() else -1
    if not 0 <= port < 2**16:
        raise argparse.ArgumentTypeError(f"must be a whole number from 0 to {2**16 - 1}, got {text!r}")
    return port


def _seconds(text: str) -> float:
    seconds = _wait(text)
    if not seconds:
        raise argparse.ArgumentTypeError("must be above 0 seconds")
    return seconds


def _wait(text: str) -> float:
    try:
        seconds = float(text)
    except ValueError:
        seconds = math.nan
    if not 0 <= seconds < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number of seconds, got {text!r}")
    return seconds


def _size(text: str) -> int:
    number = text.rstrip("KMGiBkmgb")
    factor = _UNITS.get(text[len(number) :].lower())
    try:
        size = 0 if factor is None else int(float(number) * factor)
    except (ValueError, OverflowError):
        size = 0
    if size < 1:
        raise argparse.ArgumentTypeError(f"expected a size such as 64MiB, 500kB or 1000, got {text!r}")
    return size
