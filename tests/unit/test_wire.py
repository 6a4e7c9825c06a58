"""The wire codec: any split of any frames decodes; any garbage is refused and never buffered."""

from __future__ import annotations

import itertools

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator.errors import LocalProtocolError, RemoteProtocolError
from migrator.wire import (
    BODY_CAP_BYTES,
    HEADER_BYTES,
    MAGIC,
    VERSION,
    Frame,
    FrameDecoder,
    FrameKind,
    encode_frame,
    parse_header,
)

KINDS = sorted(BODY_CAP_BYTES)
messages = st.lists(
    st.tuples(st.sampled_from(KINDS), st.binary(max_size=300)), min_size=1, max_size=8
)


def header(kind: int, length: int, *, magic: bytes = MAGIC, version: int = VERSION) -> bytes:
    return magic + bytes([version, kind]) + length.to_bytes(4, "big")


@given(messages, st.lists(st.integers(0, 3000), max_size=20))
def test_any_split_decodes(sent: list[tuple[FrameKind, bytes]], cuts: list[int]) -> None:
    stream = b"".join(encode_frame(kind, body) for kind, body in sent)
    edges = [0, *sorted(min(cut, len(stream)) for cut in cuts), len(stream)]
    decoder = FrameDecoder()
    received: list[Frame] = []
    for start, end in itertools.pairwise(edges):
        received += decoder.feed(stream[start:end])
    decode = msgspec.msgpack.Decoder(bytes)
    assert [(frame.kind, frame.decode(decode)) for frame in received] == sent
    assert decoder.buffered_bytes == 0


@given(st.binary(max_size=200), st.lists(st.integers(0, 200), max_size=5))
def test_garbage_is_refused_or_waited_for_but_never_crashes(data: bytes, cuts: list[int]) -> None:
    decoder = FrameDecoder()
    edges = [0, *sorted(min(cut, len(data)) for cut in cuts), len(data)]
    try:
        for start, end in itertools.pairwise(edges):
            decoder.feed(data[start:end])
    except RemoteProtocolError:
        assert decoder.buffered_bytes == 0
        with pytest.raises(RemoteProtocolError):
            decoder.feed(encode_frame(FrameKind.HELLO, b""))


@given(messages, st.integers(0, 7), st.integers(1, 255))
def test_a_flipped_header_byte_never_passes_as_another_frame(
    sent: list[tuple[FrameKind, bytes]], position: int, flip: int
) -> None:
    kind, body = sent[0]
    stream = bytearray(encode_frame(kind, body))
    stream[position] ^= flip
    decoder = FrameDecoder()
    try:
        frames = decoder.feed(bytes(stream))
    except RemoteProtocolError:
        return
    # Only the kind and the length may change unnoticed here: what they name is checked further up.
    assert position >= 3
    assert all(frame.kind in BODY_CAP_BYTES for frame in frames)


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (bytes(HEADER_BYTES), "not a Ferry frame"),
        (b"GET / HTTP/1.1\r\n", "not a Ferry frame"),
        (header(1, 0, version=0), "version 0 is unknown"),
        (header(1, 0, version=VERSION + 1), f"version {VERSION + 1} is unknown"),
        (header(0, 0), "kind 0 is unknown"),
        (header(99, 0), "kind 99 is unknown"),
        (header(FrameKind.HELLO, BODY_CAP_BYTES[FrameKind.HELLO] + 1), "above the cap"),
        (header(FrameKind.RESPONSE, 2**32 - 1), "above the cap"),
    ],
)
def test_a_bad_header_is_refused_before_its_body_comes(data: bytes, expected: str) -> None:
    with pytest.raises(RemoteProtocolError, match=expected):
        parse_header(data[:HEADER_BYTES])
    with pytest.raises(RemoteProtocolError, match=expected):
        FrameDecoder().feed(data)


def test_what_was_complete_before_a_bad_frame_is_handed_over() -> None:
    decoder = FrameDecoder()
    assert len(decoder.feed(encode_frame(FrameKind.HELLO, 1) + bytes(HEADER_BYTES))) == 1
    with pytest.raises(RemoteProtocolError):
        decoder.feed(b"")


@given(st.binary(max_size=100))
def test_a_body_that_does_not_fit_names_its_frame(body: bytes) -> None:
    decode = msgspec.msgpack.Decoder(dict[str, dict[str, int]])
    try:
        Frame(FrameKind.REQUEST, body).decode(decode)
    except RemoteProtocolError as error:
        assert "malformed request frame" in str(error)


@pytest.mark.parametrize("body", [b"\x81\xa1\x80", b"\x81\xa1x" + b"\x91" * 30_000])
def test_bad_utf8_and_deep_nesting_are_malformed_too(body: bytes) -> None:
    class Message(msgspec.Struct):
        known: int = 0

    with pytest.raises(RemoteProtocolError, match="malformed request frame"):
        Frame(FrameKind.REQUEST, body).decode(msgspec.msgpack.Decoder(Message))


@pytest.mark.parametrize("kind", KINDS)
def test_above_the_cap_is_not_sent(kind: FrameKind) -> None:
    with pytest.raises(LocalProtocolError, match="above the cap"):
        encode_frame(kind, bytes(BODY_CAP_BYTES[kind]))
    with pytest.raises(LocalProtocolError, match="can't be sent"):
        encode_frame(FrameKind.INVALID, b"")
