"""Engines of a post-copy that end, and what becomes of it."""

from __future__ import annotations

from migrator.model import MigrationMode, MigrationRequest, MigrationState, Role
from migrator.session import vocabulary as v
from tests.unit.session_pair import SessionPair

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


def test_what_a_lost_engine_had_sent_stays_sent() -> None:
    pair = running_there()
    for sent in (50_000_000, 1_000):
        lose(pair, Role.SOURCE, "killed")
        told = v.EngineReported(bytes_sent=sent, remaining_bytes=9, throughput_bytes_per_s=None)
        pair.push(pair.source, told)
        pair.run()
    began = sum(each.bytes_sent for each in pair.source.passes)
    assert pair.source.view().progress.bytes_sent == began + 50_001_000
