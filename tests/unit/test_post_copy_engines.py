"""Engines of a post-copy that end again and again: as soon as they work, or after a while."""

from __future__ import annotations

import pytest

from migrator.model import MigrationMode, MigrationRequest, MigrationState, Role
from migrator.session import vocabulary as v
from tests.unit.session_pair import COMPLETED, SessionPair

_ENGINE = v.TimerName.ENGINE


def running_there() -> SessionPair:
    """The guest runs at the destination, and lacks pages."""
    request = MigrationRequest(destination="n2", mode=MigrationMode.POSTCOPY)
    pair = SessionPair(request, pending=lambda number: 900_000)
    assert pair.run() == (MigrationState.POSTCOPY, MigrationState.POSTCOPY)
    return pair


def lose(pair: SessionPair, role: Role, reason: str) -> float:
    """An engine: after how many seconds it has a successor, which is there then."""
    lost_at_s = pair.now_s
    pair.push(pair.of(role), v.EngineLost(reason=reason))
    pair.run()
    at_s = pair.timers.pop((role, _ENGINE))
    pair.now_s = max(pair.now_s, at_s)
    pair.push(pair.of(role), v.TimerFired(name=_ENGINE))
    pair.run()
    return at_s - lost_at_s


@pytest.mark.parametrize("role", Role)
def test_what_ends_as_soon_as_it_works_has_ever_later_successors(role: Role) -> None:
    """A destination without memory had ten engines a second, as each was connected."""
    pair = running_there()
    gaps_s = [lose(pair, role, "no memory") for _ in range(8)]
    assert gaps_s == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0], abs=0.02)
    pair.now_s += 1.5
    assert lose(pair, role, "killed") == pytest.approx(0.1, abs=0.02), "that one had worked"


def test_the_source_tells_why_the_destination_s_engines_end() -> None:
    """Users see its side alone, which knew of streams that break."""
    pair = running_there()
    lose(pair, Role.DESTINATION, "killed")
    pair.run(timers=8)
    assert pair.source.view().error is None, "one is no news"
    for _ in range(2):
        lose(pair, Role.DESTINATION, "no memory is left")
    pair.push(pair.source, v.ChannelNoted(broken=True, detail="reset"))
    pair.silence(v.StartEngine)
    lose(pair, Role.DESTINATION, "no memory is left")
    pair.run(timers=8)
    assert pair.source.view().error == (
        "the guest waits for pages that don't come: "
        "the engine of n2 ends again and again: no memory is left"
    )
    pair.push(pair.source, v.ChannelNoted(broken=True, detail="connection refused"))
    pair.run(timers=8)
    assert "no memory is left" in (pair.source.view().error or ""), "the rest follows from it"
    pair.push(pair.source, v.EngineConnected(pages_in_use=1, round_trip_ms=0.0))
    pair.run()
    assert pair.source.view().error is None


def test_a_full_disk_at_the_destination_is_not_told_as_pages_that_dont_come() -> None:
    """It stood at its last page for as long as the disk was full, without a reason."""
    pair = running_there()
    pair.failing[v.Journal] = v.CommandFailed(command="Journal", error="the disk is full")
    pair.push(pair.destination, v.PagesComplete())
    pair.run()
    del pair.timers[Role.DESTINATION, v.TimerName.FILLED]  # The runner drops what stands behind it.
    assert pair.run() == (MigrationState.POSTCOPY, MigrationState.POSTCOPY)
    told = "the guest has all its pages; n2 can't end the migration: the disk is full"
    assert pair.source.view().error == told
    pair.failing.clear()
    pair.run(timers=8)
    assert (pair.source.state, pair.destination.state) == COMPLETED
    assert pair.source.view().error is None


def test_what_a_lost_engine_had_sent_stays_sent() -> None:
    pair = running_there()
    for sent in (50_000_000, 1_000):
        lose(pair, Role.SOURCE, "killed")
        told = v.EngineReported(bytes_sent=sent, remaining_bytes=9, throughput_bytes_per_s=None)
        pair.push(pair.source, told)
        pair.run()
    began = sum(each.bytes_sent for each in pair.source.passes)
    assert pair.source.view().progress.bytes_sent == began + 50_001_000


def test_the_last_engine_s_last_words_count() -> None:
    """Its last report is some moments older. They come when the migration has ended, mostly."""
    pair = running_there()
    told = v.EngineReported(bytes_sent=60_000_000, remaining_bytes=9, throughput_bytes_per_s=None)
    pair.push(pair.source, told)
    pair.push(pair.destination, v.PagesComplete())
    assert pair.run(timers=2) == COMPLETED
    assert pair.source.view().progress.bytes_sent == 60_000_000
    pair.push(pair.source, v.EngineStopped(bytes_sent=60_000_500))
    assert pair.run() == COMPLETED
    progress = pair.source.view().progress
    assert (progress.bytes_sent, progress.remaining_bytes) == (60_000_500, 0)


def test_what_is_shown_as_completed_stays_as_it_is_shown() -> None:
    """A pre-copy's iterations add up to all that was sent, as they do in its table."""
    pair = SessionPair()
    assert pair.run() == COMPLETED
    shown = pair.source.view().progress.bytes_sent
    assert shown == sum(each.bytes_sent for each in pair.source.passes)
    pair.push(pair.source, v.EngineStopped(bytes_sent=shown + 500))
    pair.run()
    assert pair.source.view().progress.bytes_sent == shown


def test_those_of_a_successor_count_beside_what_was_sent_before() -> None:
    pair = running_there()
    began = pair.source.view().progress.bytes_sent
    lose(pair, Role.SOURCE, "killed")
    pair.run()
    pair.push(pair.source, v.EngineStopped(bytes_sent=700))
    pair.run()
    assert pair.source.view().progress.bytes_sent == began + 700


def test_so_do_those_of_a_migration_that_is_cancelled_in_a_pass() -> None:
    pair = SessionPair()
    pair.silence(v.RunPass)
    pair.run()
    pair.push(pair.source, v.CancelRequested(reason="cancelled"))
    pair.push(pair.source, v.EngineStopped(bytes_sent=700))
    pair.run()
    assert pair.source.state is MigrationState.CANCELLED
    assert pair.source.view().progress.bytes_sent == 700


def test_a_destination_whose_engine_asks_for_nothing_is_told_of() -> None:
    """Stopped, it has lost no connection, and for fifteen seconds nothing was told."""
    pair = running_there()
    source = pair.source
    assert source.standing_s(pair.now_s) is None
    pair.push(
        source, v.EngineReported(bytes_sent=50, remaining_bytes=900, throughput_bytes_per_s=5.0)
    )
    assert source.standing_s(pair.now_s + 1.0) is None
    assert source.standing_s(pair.now_s + 3.0) == pytest.approx(3.0, abs=0.1)
    progress = source.view(source.standing_s(pair.now_s + 3.0)).progress
    assert progress.unheard_s is not None and progress.throughput_bytes_per_s == 0.0
    pair.push(
        source, v.EngineReported(bytes_sent=60, remaining_bytes=890, throughput_bytes_per_s=5.0)
    )
    assert source.standing_s(pair.now_s) is None, "it goes on"
    pair.push(pair.destination, v.PagesComplete(seconds=1.0, pages=10))
    assert pair.run(timers=1) == COMPLETED
    assert source.standing_s(pair.now_s + 9.0) is None
