"""What the options of the command mean: checked before anything is loaded, and read from the files that they name."""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
import ssl
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from aioinfer.serve.listener import AddressError, bind, bind_unix, is_local
from aioinfer.serve.loading import PolicySource, one_line
from aioinfer.web.arrays import packb
from aioinfer.web.limits import Limits

__all__ = ["Settings", "UsageError", "read_settings", "read_tokens"]

KEY_VARIABLE = "AIOINFER_API_KEY"
"""The environment variable that may have a token."""

_log = logging.getLogger("aioinfer.serve")


class UsageError(Exception):
    """The options can't be used; the message has one line."""


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A service, as it was asked for.

    Attributes:
        source: of the policy.
        process: whether it runs in a process of its own.
        server_options: keyword arguments of the server.
        in_keys: the entries that a plain module reads.
        name: of the policy.
        metadata: what robots are told first; ``None``: what the policy says.
        deadline: seconds for a reply.
        newest_wins: whether a newer request of a session ends the one that waits.
        tokens: of which callers need one.
        hosts: names by which the server may be asked.
        origins: of pages that may ask.
        limits: of messages.
        tls: certificate and key.
        drain: seconds for replies at the end.
        debug: whether callers get tracebacks.
        log_level: of the loggers.
        host: where it listens.
        port: where it listens; 0 takes a free one.
        uds: where it listens instead.
        certificate: the file of ``tls``.
        key_file: the file with tokens.
    """

    source: PolicySource
    process: bool
    server_options: Mapping[str, Any]
    in_keys: Sequence[str] | None
    name: str
    metadata: Mapping[str, Any] | None
    deadline: float | None
    newest_wins: bool
    tokens: Sequence[str]
    hosts: Sequence[str] | None
    origins: Sequence[str]
    limits: Limits
    tls: ssl.SSLContext | None
    drain: float
    debug: bool
    log_level: str
    host: str
    port: int
    uds: Path | None
    certificate: Path | None
    key_file: Path | None

    def bind(self) -> list[socket.socket]:
        """Make the sockets to listen on.

        Raises:
            AddressError: they can't be made.
        """
        return bind(self.host, self.port) if self.uds is None else [bind_unix(self.uds)]


def read_settings(options: argparse.Namespace, environment: Mapping[str, str] = os.environ) -> Settings:
    """Check the options, and read the files that they name.

    Args:
        options: of the command line.
        environment: variables.

    Raises:
        UsageError: they can't be used.
    """
    if bool(options.in_keys) != bool(options.out_keys):
        raise UsageError("a plain module needs both --in-keys and --out-keys")
    if options.checkpoint is not None and not options.checkpoint.is_file():
        raise UsageError(f"--checkpoint {options.checkpoint}: there is no such file")
    tokens = [] if options.api_key_file is None else read_tokens(options.api_key_file)
    if key := environment.get(KEY_VARIABLE, "").strip():
        tokens.append(_checked_token(key, KEY_VARIABLE))
    _check_exposure(options, tokens)
    return Settings(
        source=PolicySource(options.policy, options.checkpoint),
        process=options.process,
        server_options={
            "max_batch_size": options.max_batch_size,
            "max_pending": options.max_pending,
            "device": options.device,
            "in_keys": options.in_keys,
            "out_keys": options.out_keys,
        },
        in_keys=options.in_keys,
        name=options.name,
        metadata=None if options.metadata is None else _read_metadata(options.metadata),
        deadline=options.deadline,
        newest_wins=options.newest_wins,
        tokens=tokens,
        hosts=[*options.allow_host, options.host, socket.gethostname()] if options.allow_host or not tokens else None,
        origins=options.allow_origin,
        limits=Limits(max_message_size=options.max_message_size),
        tls=_make_tls(options.ssl_certfile, options.ssl_keyfile),
        drain=options.drain,
        debug=options.debug,
        log_level=options.log_level,
        host=options.host,
        port=options.port,
        uds=options.uds,
        certificate=options.ssl_certfile,
        key_file=options.api_key_file,
    )


def _check_exposure(options: argparse.Namespace, tokens: Sequence[str]) -> None:
    if tokens or options.insecure or options.uds is not None:
        return
    try:
        if is_local(options.host):
            return
    except AddressError as error:
        raise UsageError(f"--host: {error}") from None
    raise UsageError(
        f"--host {options.host} lets other machines ask; give --api-key-file FILE (or {KEY_VARIABLE}), so that callers "
        "need a token, or --insecure, to let anybody ask who reaches this address"
    )


def read_tokens(path: Path) -> list[str]:
    """Read tokens, one a line; empty lines and those that begin with ``#`` have none.

    Raises:
        UsageError: the file can't be read, has no token, or has one that no header can carry.
    """
    try:
        lines = [line.strip() for line in path.read_text().splitlines()]
        mode = path.stat().st_mode
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--api-key-file {path}: {getattr(error, 'strerror', None) or error}") from None
    tokens = [_checked_token(line, f"--api-key-file {path}") for line in lines if line and not line.startswith("#")]
    if not tokens:
        raise UsageError(f"--api-key-file {path}: there is no token in it")
    if mode & 0o004:
        _log.warning("every user of this machine can read the tokens: chmod o-r %s", path)
    return tokens


def _checked_token(token: str, where: str) -> str:
    if not token.isascii() or not token.isprintable() or " " in token:
        raise UsageError(f"{where}: a token has visible ASCII characters only, and no blank")
    return token


def _read_metadata(path: Path) -> dict[str, Any]:
    try:
        text = path.read_text()
        found = json.loads(text) if path.suffix == ".json" else _parse_yaml(text, path)
        if not isinstance(found, dict):
            raise UsageError(f"--metadata {path}: expected a map, got a {type(found).__name__}")
        packb(found)
    except OSError as error:
        raise UsageError(f"--metadata {path}: {error.strerror}") from None
    except (TypeError, ValueError, OverflowError, RecursionError) as error:
        raise UsageError(one_line(f"--metadata {path}: {error}")) from None
    return found


def _parse_yaml(text: str, path: Path) -> Any:
    try:
        import yaml
    except ImportError:
        raise UsageError(f"--metadata {path} needs pyyaml, unless it is JSON and its name ends with .json") from None
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None


def _make_tls(certificate: Path | None, key: Path | None) -> ssl.SSLContext | None:
    if certificate is None:
        if key is not None:
            raise UsageError("--ssl-keyfile needs --ssl-certfile")
        return None
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    try:
        context.load_cert_chain(certificate, key, password="")  # an encrypted key is refused, instead of asked for
    except (OSError, ValueError) as error:
        hint = "; expected a certificate and its key, both in PEM, and the key without a password"
        files = f"--ssl-certfile {certificate}" + ("" if key is None else f" --ssl-keyfile {key}")
        raise UsageError(one_line(f"{files}: {error}{hint if isinstance(error, ssl.SSLError) else ''}")) from None
    return context
