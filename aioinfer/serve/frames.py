"""Frames of WebSockets, as far as messages of arrays need them: a whole message in one frame, without extensions."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from websockets.frames import Opcode, apply_mask  # type: ignore[attr-defined]  # of C, where it could be compiled

__all__ = ["FrameSplitter", "Piece", "frame"]

# Of the first byte of a frame, and of the second.
_FIN, _OPCODE = 0x80, 0x0F
_MASKED, _SIZE = 0x80, 0x7F
_SIZE_OF_2_BYTES, _SIZE_OF_8_BYTES = 126, 127
_MASK_BYTES = 4
_WHOLE_BINARY = _FIN | Opcode.BINARY
_WHOLE_TEXT = _FIN | Opcode.TEXT


def frame(message: bytes | str) -> bytes:
    """Make the frame of a message that a server sends."""
    if isinstance(message, str):
        opcode, data = _WHOLE_TEXT, message.encode()
    else:
        opcode, data = _WHOLE_BINARY, message
    size = len(data)
    if size < _SIZE_OF_2_BYTES:
        return bytes((opcode, size)) + data
    if size < 2**16:
        return bytes((opcode, _SIZE_OF_2_BYTES)) + size.to_bytes(2, "big") + data
    return bytes((opcode, _SIZE_OF_8_BYTES)) + size.to_bytes(8, "big") + data


class Piece(NamedTuple):
    """What has arrived.

    Attributes:
        data: a message; or a part of a frame, as it came.
        is_message: whether it is a message.
    """

    data: bytes
    is_message: bool


class FrameSplitter:
    """Takes messages of one binary frame out of what a client sends, and leaves the rest to a parser of all frames.

    The parser is between two frames whenever there is a message.

    Args:
        max_size: bytes of a message at most; frames with more are left to the parser.
    """

    def __init__(self, max_size: int) -> None:
        self._max_size = max_size
        self._held = bytearray()  # the beginning of a message, or of the head of a frame
        self._awaited = 0  # bytes of the message that has begun, with its head
        self._passing = 0  # bytes of a frame that the parser still gets
        self._in_parts = False  # whether a message of several frames has begun
        self._passes_all = False  # from now on: there will be no more messages, or the parser will refuse them

    @property
    def held(self) -> int:
        """Bytes that are kept until what they belong to has come."""
        return len(self._held)

    def feed(self, data: bytes) -> Iterator[Piece]:
        """Take what has arrived, and say what it has."""
        received: bytes | bytearray = data
        if self._held:
            self._held += data
            if len(self._held) < self._awaited:
                return
            received, self._held, self._awaited = self._held, bytearray(), 0
        start, end = 0, len(received)
        while start < end:
            if not self._passing and not self._passes_all:
                head = _read_head(received, start)
                if head is None:
                    self._held += received[start:]
                    return
                if self._is_message(head):
                    if end < head.end:
                        self._held += received[start:]
                        self._awaited = head.end - start
                        return
                    yield Piece(_unmask(received, head), is_message=True)
                    start = head.end
                    continue
                self._pass(head, start)
            stop = end if self._passes_all else min(end, start + self._passing)
            self._passing = max(0, self._passing - (stop - start))
            yield Piece(bytes(received[start:stop]), is_message=False)
            start = stop

    def _is_message(self, head: _Head) -> bool:
        size = head.end - head.body
        return head.first == _WHOLE_BINARY and head.is_masked and size <= self._max_size and not self._in_parts

    def _pass(self, head: _Head, start: int) -> None:
        self._passing = head.end - start
        opcode = head.first & _OPCODE
        if opcode == Opcode.CLOSE or not head.is_masked or head.end - head.body > self._max_size:
            self._passes_all = True
        elif opcode < Opcode.CLOSE:  # no control frame, which may come between two parts
            self._in_parts = not head.first & _FIN


class _Head(NamedTuple):
    first: int
    is_masked: bool
    body: int  # where it begins
    end: int  # where the frame ends


def _read_head(data: bytes | bytearray, start: int) -> _Head | None:
    """Read the head of the frame that begins there; ``None``: it is not whole."""
    left = len(data) - start
    if left < 2:
        return None
    second = data[start + 1]
    size = second & _SIZE
    body = start + 2
    if size >= _SIZE_OF_2_BYTES:
        long = body + (2 if size == _SIZE_OF_2_BYTES else 8)
        size, body = int.from_bytes(data[body:long], "big"), long
    is_masked = second & _MASKED != 0
    if is_masked:
        body += _MASK_BYTES
    return None if len(data) < body else _Head(data[start], is_masked, body, body + size)


def _unmask(data: bytes | bytearray, head: _Head) -> bytes:
    with memoryview(data) as view:
        message: bytes = apply_mask(view[head.body : head.end], data[head.body - _MASK_BYTES : head.body])
    return message
