"""Messages come out of frames whole, however they arrive, and a parser of frames gets the rest as it came."""

from __future__ import annotations

from itertools import pairwise

import pytest

pytest.importorskip("uvicorn")

from hypothesis import given, settings
from hypothesis import strategies as st
from websockets.frames import Frame, Opcode
from websockets.streams import StreamReader

from aioinfer.serve.frames import FrameSplitter, frame

SIZES = [0, 1, 125, 126, 2**16 - 1, 2**16]


def sent(opcode: Opcode, data: bytes, *, fin: bool = True) -> bytes:
    """What a client sends."""
    return Frame(opcode, data, fin).serialize(mask=True)


def split(data: bytes, cuts: list[int], max_size: int = 2**20) -> tuple[list[bytes], bytes]:
    """The messages in what arrives in parts, and all that the parser gets."""
    splitter = FrameSplitter(max_size)
    messages, rest = [], b""
    places = [0, *sorted(cut % (len(data) + 1) for cut in cuts), len(data)]
    for start, stop in pairwise(places):
        for piece, is_message in splitter.feed(data[start:stop]):
            if is_message:
                messages.append(piece)
            else:
                rest += piece
    assert splitter.held == 0
    return messages, rest


@pytest.mark.parametrize("size", SIZES)
def test_a_message_of_any_size_is_read(size: int) -> None:
    assert split(sent(Opcode.BINARY, b"m" * size), []) == ([b"m" * size], b"")


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("letter", ["a", b"a"])
def test_a_client_understands_what_is_sent(size: int, letter: str | bytes) -> None:
    reader = StreamReader()
    reader.feed_data(frame(letter * size))
    parsed = Frame.parse(reader.read_exact, mask=False)
    with pytest.raises(StopIteration) as ended:
        next(parsed)
    got = ended.value.value
    assert got.fin
    assert got.opcode is (Opcode.TEXT if isinstance(letter, str) else Opcode.BINARY)
    assert bytes(got.data) == (letter * size if isinstance(letter, bytes) else letter.encode() * size)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(["message", "text", "ping", "parts"]), st.integers(0, 300)), min_size=1, max_size=6
    ),
    st.lists(st.integers(0, 2000), max_size=8),
)
def test_however_frames_are_cut_each_goes_where_it_belongs(sends: list[tuple[str, int]], cuts: list[int]) -> None:
    data, messages, rest = b"", [], b""
    for kind, size in sends:
        body = bytes(range(256)) * 2
        match kind:
            case "message":
                data += sent(Opcode.BINARY, body[:size])
                messages.append(body[:size])
                continue
            case "text":
                others = sent(Opcode.TEXT, b"t" * size)
            case "ping":
                others = sent(Opcode.PING, body[: size % 126])
            case _:
                others = (
                    sent(Opcode.BINARY, body[:size], fin=False)
                    + sent(Opcode.PING, b"")
                    + sent(Opcode.CONT, b"more", fin=True)
                )
        data += others
        rest += others
    assert split(data, cuts) == (messages, rest)


@pytest.mark.parametrize(
    "first",
    [
        sent(Opcode.CLOSE, b""),
        sent(Opcode.BINARY, bytes(101)),
        Frame(Opcode.BINARY, b"no mask").serialize(mask=False),
    ],
    ids=["close", "too large", "no mask"],
)
def test_there_are_no_messages_after_a_frame_that_ends_the_connection(first: bytes) -> None:
    data = first + sent(Opcode.BINARY, b"late")
    assert split(data, [], max_size=100) == ([], data)


def test_a_message_within_another_one_of_several_frames_is_left_to_the_parser() -> None:
    data = sent(Opcode.BINARY, b"begun", fin=False) + sent(Opcode.BINARY, b"within")
    assert split(data, []) == ([], data)


def test_frames_with_reserved_bits_are_left_to_the_parser() -> None:
    data = bytearray(sent(Opcode.BINARY, b"odd"))
    data[0] |= 0x40
    assert split(bytes(data), []) == ([], bytes(data))
