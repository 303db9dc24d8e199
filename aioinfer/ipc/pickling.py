"""TensorDicts and errors as bytes, for other processes."""

from __future__ import annotations

import io
import pickle
import traceback
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from tensordict import TensorDict
from torch import Tensor

from aioinfer.errors import ModelError
from aioinfer.tensors import build

__all__ = ["dump_exception", "dumps", "load_exception", "loads", "loads_or", "pickler"]


class _Pickler(pickle.Pickler):
    """Plain CPU tensors travel as their bytes: torch's own way writes each as a file, which takes 100 us."""

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and obj.device.type == "cpu" and obj.layout is torch.strided and not obj.is_quantized:
            if obj.is_conj() or obj.is_neg() or obj.dtype.is_complex:
                return NotImplemented
            return _tensor, (obj.dtype, tuple(obj.shape), _bytes(obj))
        if type(obj) is TensorDict and not obj.is_locked and obj.names == [None] * obj.ndim:
            return _tensordict, (dict(obj.items()), tuple(obj.batch_size), obj.device)
        return NotImplemented


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().contiguous().view(-1)
    return flat.view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def _tensor(dtype: torch.dtype, shape: tuple[int, ...], data: bytes) -> Tensor:
    if not data:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(data), dtype=dtype).view(shape)


def _tensordict(source: dict[str, Any], batch_size: tuple[int, ...], device: torch.device | None) -> TensorDict:
    return build(source, torch.Size(batch_size), device)


def dumps(message: Any) -> bytes:
    """Pickle anything; tensors inside share no memory with what arrives."""
    body = io.BytesIO()
    _Pickler(body, pickle.HIGHEST_PROTOCOL).dump(message)
    return body.getvalue()


loads: Callable[[bytes], Any] = pickle.loads


def pickler() -> tuple[Callable[[Any], bytes], bool]:
    """What pickles code of the user's: ``cloudpickle`` where that is installed.

    Returns:
        The function, and whether it takes functions and classes that have no name of their own in a module.
    """
    with suppress(ImportError):
        import cloudpickle

        return partial(cloudpickle.dumps, protocol=pickle.HIGHEST_PROTOCOL), True
    return partial(pickle.dumps, protocol=pickle.HIGHEST_PROTOCOL), False


def loads_or(data: bytes, instead: Callable[[BaseException], Any]) -> Any:
    """Unpickle what another process sent, whose classes may raise anything.

    Args:
        data: the pickle.
        instead: makes what is returned where that raises. An exception that does not come again is none of the
            pickle's but a signal handler's, and raised.
    """
    try:
        return loads(data)
    except BaseException:
        try:
            loads(data)
        except BaseException as error:
            return instead(error)
        raise


def dump_exception(error: Exception) -> bytes:
    """Pickle an error with its cause; one that does not survive that becomes a :class:`ModelError` that names it.

    The text of the cause's traceback travels as a note.
    """
    cause = error.__cause__
    pickled = b""
    for candidate in ((error, cause), (error, _stand_in(cause))):
        try:
            pickled = dumps(candidate)
            arrived, _ = loads(pickled)
            if type(arrived) is type(error) and str(arrived) == str(error):
                break
        except BaseException:  # a class of the user's may do anything here
            pass
        pickled = b""
    return pickle.dumps((pickled, str(_stand_in(error)), _traceback_of(cause)))


def load_exception(data: bytes) -> Exception:
    """Make the error that :func:`dump_exception` has pickled; a :class:`ModelError` where its class is not known."""
    pickled, name, traceback_text = pickle.loads(data)
    # The server's program may have classes that this one does not.
    arrived, cause = loads_or(pickled, lambda _: (None, None)) if pickled else (None, None)
    error: Exception = ModelError(name)
    if isinstance(arrived, Exception):
        error = arrived
        error.__cause__ = cause
    if traceback_text:
        error.add_note(traceback_text)
    return error


def _stand_in(error: BaseException | None) -> ModelError | None:
    return None if error is None else ModelError(f"{type(error).__qualname__}: {_text_of(error)}")


def _text_of(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return "(its message can't be shown)"


def _traceback_of(error: BaseException | None) -> str:
    if error is None or error.__traceback__ is None:
        return ""
    try:
        return "in the server:\n" + "".join(traceback.format_exception(error))
    except BaseException:
        return ""
