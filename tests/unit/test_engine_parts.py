"""The engine's pure parts: stream frames, the token bucket, zero pages, the order of a delivery."""

from __future__ import annotations

import os
import struct

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrator import ranges
from migrator.engine import frames
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.control import HelperWaiter, Signal, Waiter
from migrator.engine.frames import FrameKind, RegionShape, StreamHello, StreamKind
from migrator.engine.memory import MappedRegion
from migrator.engine.relay import DisksGap
from migrator.engine.stream import Endpoint, PageStream
from migrator.engine.zeroes import ZeroFilter, split_zeroes
from migrator.engine_messages import RegionLayout
from migrator.errors import LocalProtocolError, RemoteProtocolError

PAGE = 4096
SHAPES = (RegionShape(64 * PAGE, PAGE), RegionShape(8 * 2**21, 2**21))
SECRET = bytes(range(32))
ENDING = b"\x7e\x00\x00\x00\x2a\x00"


@given(st.integers(0, len(ENDING) - 1))
def test_the_gap_in_which_disks_are_let_go_is_the_one_before_the_last_piece(cut: int) -> None:
    """Wherever the pieces part; the footers of other devices end nothing."""
    gap = DisksGap(1.0)
    pieces = [ENDING[:-1], b"\x08 and more devices" + ENDING[:cut], ENDING[cut:]]
    told = [gap.saw(piece, at_s) for piece, at_s in zip(pieces, (2.0, 2.5, 2.6), strict=True)]
    assert told == [None, None, pytest.approx(0.1)]


def _pages(numbers: set[int]) -> ranges.Ranges:
    return ranges.from_page_starts(np.array(sorted(numbers), dtype=np.int64) * PAGE, PAGE)


@given(
    st.sets(st.integers(0, 63), min_size=1),
    st.sampled_from([FrameKind.PAGES, FrameKind.ZERO, FrameKind.EXPECT]),
    st.integers(0, 2**63),
)
def test_frames_come_back(numbers: set[int], kind: FrameKind, sequence: int) -> None:
    content = _pages(numbers)
    data = frames.encode(kind, sequence=sequence, region=0, content=content)
    header = frames.parse_header(data[: frames.HEADER_BYTES])
    assert (header.kind, header.sequence, header.count) == (kind, sequence, len(content))
    found = frames.parse_ranges(header, data[frames.HEADER_BYTES :], SHAPES)
    assert found.tolist() == content.tolist()


@given(st.binary(min_size=frames.HEADER_BYTES, max_size=frames.HEADER_BYTES))
def test_noise_is_no_header(data: bytes) -> None:
    with pytest.raises(RemoteProtocolError):
        frames.parse_header(b"\0\0" + data[2:])


def _header(**changes: int) -> bytes:
    fields = {"version": 1, "kind": 2, "region": 0, "count": 1, "zeros": 0, "payload": PAGE}
    fields.update(changes)
    return struct.pack(
        "<2sBBHHIIQQ",
        b"FP",
        fields["version"],
        fields["kind"],
        fields["region"],
        0,
        fields["count"],
        fields["zeros"],
        1,
        fields["payload"],
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"version": 2},
        {"kind": 0},
        {"kind": 7},
        {"count": 0},
        {"count": frames.FRAME_RANGES_MAX + 1},
        {"zeros": 1},
        {"payload": 0},
        {"payload": frames.PAYLOAD_BYTES_CAP + 1},
        {"kind": 3},  # ZERO with a payload
        {"kind": 4, "payload": 0},  # BARRIER with ranges
        {"kind": 6, "count": 0},  # BYE with a payload
    ],
)
def test_bad_headers_are_refused(changes: dict[str, int]) -> None:
    frames.parse_header(_header())
    with pytest.raises(RemoteProtocolError):
        frames.parse_header(_header(**changes))


@pytest.mark.parametrize(
    ("region", "pairs"),
    [
        (2, [(0, PAGE)]),  # no such region
        (0, [(64 * PAGE, 65 * PAGE)]),  # outside
        (0, [(-PAGE, 0)]),
        (0, [(PAGE, PAGE)]),  # empty
        (0, [(2 * PAGE, PAGE)]),
        (0, [(1, PAGE + 1)]),  # not a page
        (1, [(0, PAGE)]),  # not a huge page
        (0, [(0, 2 * PAGE), (PAGE, 3 * PAGE)]),  # overlap
        (0, [(2 * PAGE, 3 * PAGE), (0, PAGE)]),  # out of order
    ],
)
def test_bad_ranges_are_refused(region: int, pairs: list[tuple[int, int]]) -> None:
    data = struct.pack(f"<{2 * len(pairs)}q", *(value for pair in pairs for value in pair))
    header = frames.Header(FrameKind.ZERO, region, len(pairs), 1, 0)
    with pytest.raises(RemoteProtocolError):
        frames.parse_ranges(header, data, SHAPES)


def test_a_payload_that_doesnt_add_up_is_refused() -> None:
    header = frames.Header(FrameKind.PAGES, 0, 1, 1, 2 * PAGE)
    with pytest.raises(RemoteProtocolError, match="add up"):
        frames.parse_ranges(header, struct.pack("<qq", 0, PAGE), SHAPES)


def test_too_many_ranges_are_our_own_fault() -> None:
    content = _pages({2 * number for number in range(frames.FRAME_RANGES_MAX + 1)})
    with pytest.raises(LocalProtocolError):
        frames.encode(FrameKind.ZERO, content=content)


def test_hellos() -> None:
    hello = StreamHello(version=1, migration_id="m", secret=SECRET, kind=StreamKind.PAGES)
    assert frames.refusal_of(hello, "m", SECRET) == ""
    for changes, secret, word in (
        ({"secret": SECRET[:-1]}, SECRET, "secret"),
        ({"secret": b""}, b"", "secret"),  # An engine without a secret lets nobody in.
        ({"version": 2}, SECRET, "version"),
        ({"migration_id": "other"}, SECRET, "migration"),
        ({"kind": StreamKind.INVALID}, SECRET, "kind"),
        ({"index": 1}, SECRET, "range"),
        ({"streams": 1000}, SECRET, "range"),
    ):
        changed = msgspec.structs.replace(hello, **changes)
        assert word in frames.refusal_of(changed, "m", secret)


def _flow(bucket: TokenBucket, seconds: float, now: float) -> int:
    """What a greedy sender gets through in `seconds` of simulated time."""
    sent, end = 0, now + seconds
    while now < end:
        wait_s = bucket.wait_s(now)
        if wait_s:
            now += wait_s
            continue
        count = bucket.piece_bytes(4 << 20)
        bucket.spend(count, now)
        sent += count
        now += count / 4e9  # The network is faster than the cap.
    return sent


@given(st.integers(65_536, 10**9), st.floats(0.5, 5))
def test_the_bucket_keeps_its_rate(rate: int, seconds: float) -> None:
    sent = _flow(TokenBucket(rate, 0.0), seconds, 0.0)
    assert sent == pytest.approx(rate * seconds, rel=0.05)


def test_the_bucket_changes_its_rate_and_can_be_lifted() -> None:
    bucket = TokenBucket(1_000_000, 0.0)
    bucket.spend(1_000_000, 0.0)
    assert bucket.wait_s(0.0) == pytest.approx(1.0)
    bucket.set_rate(2_000_000, 0.5)
    assert bucket.wait_s(0.5) == pytest.approx(0.25)
    bucket.set_rate(None, 0.5)
    assert bucket.wait_s(0.5) == 0.0
    assert bucket.piece_bytes(4 << 20) == 4 << 20


@given(st.sets(st.integers(0, 63)), st.sets(st.integers(0, 63)), st.integers(0, 511))
def test_zero_pages_are_told_apart(asked: set[int], filled: set[int], word: int) -> None:
    words = np.zeros(64 * 512, dtype=np.uint64)
    for page in filled:
        words[page * 512 + word] = 1
    content, zeroes = split_zeroes(words, _pages(asked))
    assert content.tolist() == _pages(asked & filled).tolist()
    assert zeroes.tolist() == _pages(asked - filled).tolist()


def test_the_zero_filter_stops_looking_where_nothing_is_zero() -> None:
    words = np.ones(64 * 512, dtype=np.uint64)
    zero_filter = ZeroFilter()
    zero_filter.split(words, _pages({1}))
    words[:] = 0
    looked = [len(zero_filter.split(words, _pages({1}))[1]) for _ in range(20)]
    assert looked[0] == 0
    assert looked[-5:] == [1] * 5


class _Told(PageStream):
    """Notes its frames, and sends none."""

    def __init__(self) -> None:
        hello = StreamHello(version=1, migration_id="m", secret=SECRET, kind=StreamKind.PAGES)
        super().__init__(Endpoint(host="", port=0), hello, TokenBucket(None, 0.0))
        self.frames: list[bytes] = []
        self.heard_after: list[int] = []

    def _send_vector(
        self, vector: list[bytes | memoryview], waiter: Waiter, *, more: bool = False
    ) -> None:
        self.frames.append(b"".join(vector))

    def collect_acks(self) -> bool:
        self.heard_after.append(len(self.frames))
        return True


def test_missing_pages_are_told_in_frames_that_are_punched_out_in_no_time() -> None:
    """Each is acknowledged: a destination that takes seconds for one counts as silent."""
    gib = 1024**3
    fd = os.memfd_create("guest")
    os.ftruncate(fd, 8 * gib)
    layout = RegionLayout(name="ram", size_bytes=8 * gib, page_size_bytes=PAGE)
    region = MappedRegion(0, fd, layout)
    os.close(fd)
    scattered = [(6 * gib + 2 * at * PAGE, 6 * gib + (2 * at + 1) * PAGE) for at in range(2500)]
    content = ranges.from_pairs([(PAGE, 4 * gib + PAGE), (5 * gib, 6 * gib), *scattered])
    stream, stop = _Told(), Signal()
    stream.tell(FrameKind.MISSING, region, content, HelperWaiter(stop))
    stop.close()
    shapes = [RegionShape(8 * gib, PAGE)]
    told = ranges.empty()
    for number, frame in enumerate(stream.frames, 1):
        header = frames.parse_header(frame[: frames.HEADER_BYTES])
        assert (header.kind, header.sequence) == (FrameKind.MISSING, number)
        part = frames.parse_ranges(header, frame[frames.HEADER_BYTES :], shapes)
        assert 0 < ranges.byte_count(part) <= gib
        assert not len(ranges.intersect(told, part))
        told = ranges.union(told, part)
    assert told.tolist() == content.tolist()
    assert len(stream.frames) == 5 + 3
    # Else both ends wait for each other, once some thousand are on their way.
    assert stream.heard_after == list(range(1, 5 + 3 + 1))
