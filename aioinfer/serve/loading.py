"""The policy of a command line: ``module:name``, and the checkpoint that is loaded into it."""

from __future__ import annotations

import importlib
import inspect
import os
import pickle
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from multiprocessing.connection import Connection
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import nn

from aioinfer.devices import Model
from aioinfer.errors import describe
from aioinfer.ipc.pickling import dumps

__all__ = ["LoadError", "PolicyFactory", "PolicyInfo", "PolicySource", "one_line"]

_INSIDE = ("state_dict", "model")
"""Under which of its entries a checkpoint may have the weights."""
_LONGEST = 600  # characters of a message


class LoadError(Exception):
    """There is no policy, or its checkpoint does not fit; the message has one line."""


def one_line(text: str) -> str:
    """A message without line breaks, and not too long."""
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST else f"{line[:_LONGEST]}..."


@dataclass(frozen=True)
class PolicyInfo:
    """What is known of a policy before it is asked.

    Attributes:
        kind: the name of its class.
        parameters: how many numbers its weights have.
        in_keys: the entries that it reads; ``None``: unknown.
        metadata: what robots are told first: its attribute ``metadata``.
        request_spec: an example of one row: its attribute ``request_spec``.
    """

    kind: str
    parameters: int
    in_keys: list[Any] | None
    metadata: Mapping[str, Any] | None
    request_spec: TensorDictBase | None

    @classmethod
    def of(cls, model: Model, in_keys: Sequence[str] | None = None) -> PolicyInfo:
        """Look at a policy.

        Args:
            model: the policy.
            in_keys: the entries that it reads, if it can't say so itself.
        """
        keys = in_keys or getattr(model, "in_keys", None)
        metadata, spec = getattr(model, "metadata", None), getattr(model, "request_spec", None)
        return cls(
            kind=getattr(model, "__name__", None) or type(model).__qualname__,
            parameters=sum(one.numel() for one in model.parameters()) if isinstance(model, nn.Module) else 0,
            in_keys=None if keys is None else list(keys),
            metadata=metadata if isinstance(metadata, Mapping) else None,
            request_spec=spec if isinstance(spec, TensorDictBase) else None,
        )


@dataclass(frozen=True)
class PolicySource:
    """Where a policy comes from. It can be pickled, and then makes the policy in another process.

    Attributes:
        reference: ``module:name``. What it names is the policy where it is an ``nn.Module``, or can't be called without
            arguments; otherwise it is called to make it.
        checkpoint: a file that ``torch.save`` has written, of a state dict; or of a mapping that has one as its entry
            ``state_dict`` or ``model``. ``None``: the policy has its weights.
    """

    reference: str
    checkpoint: Path | None = None

    def load(self) -> Model:
        """Import the module, make the policy, and load the checkpoint.

        Raises:
            LoadError: one of them failed.
        """
        model = self._make(self._find())
        if self.checkpoint is not None:
            _load_checkpoint(model, self.checkpoint)
        return model

    def _find(self) -> Any:
        module_name, _, path = self.reference.partition(":")
        if "" not in sys.path and os.getcwd() not in sys.path:
            sys.path.insert(0, os.getcwd())
        found: Any = _import(module_name)
        for name in path.split("."):
            try:
                found = getattr(found, name)
            except AttributeError:
                raise LoadError(f"{self.reference}: there is no {name!r}; {_offer(found, name)}") from None
        return found

    def _make(self, found: Any) -> Model:
        if not callable(found):
            raise LoadError(f"{self.reference} is no policy, and makes none: it is a {type(found).__qualname__}")
        if not _is_factory(found):
            return found  # type: ignore[no-any-return]
        if inspect.iscoroutinefunction(found):
            raise LoadError(f"{self.reference} is an async function; the one that makes the policy must be a plain one")
        try:
            model = found()
        except (Exception, SystemExit) as error:
            raise LoadError(one_line(f"{self.reference}() raised {describe(error)}")) from error
        if not callable(model):
            raise LoadError(f"{self.reference}() must return a policy, and returned a {type(model).__qualname__}")
        return model  # type: ignore[no-any-return]


@dataclass
class PolicyFactory:
    """Makes the policy in the process of a server, and tells the process that started it what it has made.

    Attributes:
        source: of the policy.
        in_keys: the entries that it reads, if it can't say so itself.
        info: where the :class:`PolicyInfo` goes.
    """

    source: PolicySource
    in_keys: Sequence[str] | None
    info: Connection

    def __call__(self) -> Model:
        """Make the policy. Main thread only."""
        # An init system sends it to all processes of a service at once; the one that started this one decides.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        model = self.source.load()
        with self.info:
            self.info.send_bytes(dumps(PolicyInfo.of(model, self.in_keys)))
        return model


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise LoadError(one_line(f"{name} can't be imported: {error}")) from error
        hint = f"; for the file {name}, write {name.removesuffix('.py')}:..." if name.endswith(".py") else ""
        raise LoadError(f"there is no module {name!r}, neither in {os.getcwd()} nor installed{hint}") from None
    except (Exception, SystemExit) as error:
        raise LoadError(one_line(f"{name} can't be imported: {describe(error)}")) from error


def _offer(holder: Any, name: str) -> str:
    if not isinstance(holder, ModuleType | type):
        return f"it is a {type(holder).__qualname__}"
    there = {each: value for each, value in vars(holder).items() if not each.startswith("_")}
    names = [each for each, value in there.items() if callable(value)]
    own = [each for each in names if getattr(there[each], "__module__", None) == holder.__name__]
    choice = get_close_matches(name, names, 3) or own or names
    return f"there is {', '.join(choice[:10])}" if choice else "there is nothing that can be called"


def _is_factory(found: Callable[..., Any]) -> bool:
    if isinstance(found, nn.Module):
        return False
    try:
        inspect.signature(found).bind()
    except TypeError:
        return isinstance(found, type)  # which is not called with a batch; what it lacks, it says itself
    except ValueError:  # of a builtin, whose signature is unknown
        pass
    return True


def _load_checkpoint(model: Model, path: Path) -> None:
    if not isinstance(model, nn.Module):
        raise LoadError(f"{path}: the policy is no nn.Module, which a checkpoint could be loaded into")
    try:
        # On the CPU: the weights are copied to wherever the policy has its own.
        found = torch.load(path, weights_only=True, map_location="cpu")
    except pickle.UnpicklingError as error:
        raise LoadError(
            f"{path} is no checkpoint, or has more in it than tensors, numbers and texts, which could run code as "
            "it is loaded; write it with torch.save(policy.state_dict(), path)"
        ) from error
    except Exception as error:
        raise LoadError(one_line(f"{path} can't be read: {describe(error)}")) from error
    for name in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(name), Mapping):
            found = found[name]
            break
    if not isinstance(found, Mapping):
        raise LoadError(f"{path} has no state dict, but a {type(found).__qualname__}")
    try:
        model.load_state_dict(found)
    except Exception as error:
        raise LoadError(one_line(f"{path} does not fit the policy: {error}")) from error
