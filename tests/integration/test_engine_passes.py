"""Passes of real engines that are ended before they have sent all."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator.engine_messages import ChannelBroken, EndPass, PassDone, Report, RunPass, SetBandwidth
from migrator.model import PassKind, PassReport
from tests.integration.engine_lab.lab import MIB, PAGE, Pair, Proxy, pair_of

SIZE = 128 * MIB
USED = 96 * MIB

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd needs root")


@pytest.fixture
async def pair(binary: Path, tmp_path: Path) -> AsyncIterator[Pair]:
    """The source's memory is noise, which can't be packed; the destination's isn't all holes."""
    async with pair_of(binary, tmp_path, SIZE) as made:
        made.source_guest.fill_with_noise(USED)
        made.destination_guest.tell(f"fill {100 * MIB} {101 * MIB}")
        yield made


async def done(pair: Pair) -> PassReport:
    return (await pair.source.expect(PassDone)).report


@pytest.mark.parametrize("streams", [1, 3])
async def test_what_a_pass_that_was_ended_has_not_sent_is_pending(pair: Pair, streams: int) -> None:
    guest, say = pair.source_guest, pair.source_says
    await pair.start(streams=streams, bandwidth_bytes_per_s=4 * MIB)
    guest.tell(f"run 1000 0 {USED}")
    say(RunPass(number=1, kind=PassKind.FIRST))
    await pair.source.expect(Report)
    say(EndPass(number=1))
    first = await done(pair)
    assert first.seconds < 12.0, "all of it would take 24 s"
    assert USED // PAGE // 3 < first.cut_pages <= first.pending_pages
    assert first.pages + first.cut_pages + first.deferred_pages == USED // PAGE

    say(SetBandwidth(bandwidth_bytes_per_s=None))
    say(EndPass(number=1))  # Late: it isn't the one that runs.
    say(RunPass(number=2, kind=PassKind.DIRTY))
    second = await done(pair)
    assert second.cut_pages == 0
    assert second.pages + second.zero_pages + second.same_pages == first.pending_pages

    guest.tell(f"touch 500 0 {USED}")
    say(EndPass(number=3))  # Overtakes its pass, which waits for the one before.
    say(RunPass(number=3, kind=PassKind.DIRTY))
    third = await done(pair)
    assert (third.pages, third.cut_pages > 0) == (0, True)

    assert guest.tell("pause") > 0
    say(EndPass(number=4))
    say(RunPass(number=4, kind=PassKind.FINAL))
    final = await done(pair)
    assert (final.cut_pages, final.pending_pages) == (0, 0), "that has to send all"
    assert pair.same_memory(), "and what is a hole at the source was told"


async def test_a_pass_can_be_ended_while_its_stream_is_broken(pair: Pair) -> None:
    listening = await pair.configure(reconnect_s=20.0)
    proxy = Proxy(listening.port)
    await proxy.start()
    try:
        await pair.connect(proxy.port)
        proxy.cut_after_bytes, proxy.refuse = proxy.carried_bytes + 8 * MIB, True
        pair.source_says(RunPass(number=1, kind=PassKind.FIRST))
        await pair.source.expect(ChannelBroken)
        pair.source_says(EndPass(number=1))
        proxy.refuse = False
        first = await done(pair)
        assert first.cut_pages > USED // PAGE // 2, "and what had no acknowledgement"
        pair.source_says(RunPass(number=2, kind=PassKind.FINAL))
        assert (await done(pair)).pages == first.pending_pages
        assert pair.same_memory()
    finally:
        await proxy.close()


@pytest.mark.parametrize(("touched", "least", "most"), [("noise", 0.9, 1.0), ("text", 0.0, 0.3)])
async def test_what_is_pending_is_sampled_for_whether_it_can_be_packed(
    pair: Pair, touched: str, least: float, most: float
) -> None:
    guest, half = pair.source_guest, USED // 2
    os.pwrite(guest.fd, b"an even text. \n\n" * (half // 16), half)
    await pair.start(bandwidth_bytes_per_s=32 * MIB)
    pair.source_says(RunPass(number=1, kind=PassKind.FIRST))
    await pair.source.expect(Report)
    guest.tell("touch 4000 " + {"noise": f"0 {half}", "text": f"{half} {USED}"}[touched])
    first = await done(pair)
    assert first.compressors
    assert first.pending_packed_share is not None
    assert least <= first.pending_packed_share <= most

    guest.tell("pause")
    final = await pair.run_pass(PassKind.FINAL)
    assert final.pending_packed_share is None
