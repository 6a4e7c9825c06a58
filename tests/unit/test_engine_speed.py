"""The speed that an engine reports, that of the time in which bytes could leave, and is shown."""

from __future__ import annotations

import pytest

from migrator.engine.speed import WINDOW_S, Speed
from migrator.model import (
    MigrationMode,
    MigrationRequest,
    MigrationState,
    PassKind,
    PassReport,
)
from migrator.session import vocabulary as v
from tests.unit.session_pair import SessionPair
from tests.unit.test_post_copy import running_there


def test_a_pass_has_a_speed_from_its_first_window_on() -> None:
    speed = Speed()
    speed.begin(10.0, 500, flowing=True)
    assert not speed.is_due(10.0 + WINDOW_S / 2) and speed.is_due(10.0 + 2 * WINDOW_S)
    assert speed.measure(10.5, 1_500) == pytest.approx(2_000.0)
    assert speed.measure(11.0, 1_500) == 0.0


def test_the_first_bytes_after_a_standstill_have_no_speed() -> None:
    """Post-copy: since the last pass the guest was handed over, then the first page asked for."""
    speed = Speed()
    speed.begin(10.0, 500, flowing=False)
    assert speed.stands(500)
    assert speed.measure(12.0, 4_500) is None
    assert speed.measure(12.5, 1_004_500) == pytest.approx(2e6)
    speed.begin(20.0, 1_004_500, flowing=False)
    assert speed.measure(20.25, 1_004_501) is None


def test_no_time_left_is_told_in_post_copy_before_pages_have_a_speed() -> None:
    """What told the destination what it lacks was small and quick: no speed of pages. One that was
    measured lasts until another one is.
    """
    pair = running_there()
    before = pair.source.view().progress
    assert before.remaining_bytes > 0
    assert (before.throughput_bytes_per_s, before.eta_s) == (None, None)
    assert before.dirty_rate_bytes_per_s is None
    for speed, eta_s in ((None, None), (8e6, 1.0), (None, 1.0)):
        reported = v.EngineReported(
            bytes_sent=9, remaining_bytes=8_000_000, throughput_bytes_per_s=speed
        )
        pair.push(pair.source, reported)
        pair.run()
        assert pair.source.view().progress.eta_s == eta_s


def test_in_hybrid_the_passes_speed_is_what_the_rest_is_reckoned_with() -> None:
    pair = running_there(MigrationMode.HYBRID)
    progress, passes = pair.source.view().progress, pair.source.passes
    sending = [each for each in passes if each.kind in (PassKind.FIRST, PassKind.DIRTY)]
    assert sending and len(sending) < len(passes)
    expected = sum(each.bytes_sent for each in sending) / sum(each.seconds for each in sending)
    assert progress.throughput_bytes_per_s == pytest.approx(expected)
    assert progress.eta_s == pytest.approx(progress.remaining_bytes / expected)


def test_the_rate_of_a_pass_that_stands_still_is_none() -> None:
    """A stopped engine at the destination: the source's speaks, and sends nothing."""
    pair = SessionPair(MigrationRequest(destination="n2", mode=MigrationMode.PRECOPY))
    pair.run_until_state(MigrationState.PRECOPY)
    pair.source.handle(v.PassFinished(report=pass_report(1)), pair.now_s)
    assert pair.source.view().progress.throughput_bytes_per_s == 4e6
    for number, (sent, rate) in enumerate(((9, 4e6), (9, 4e6), (9, 0.0), (10, 4e6))):
        told = v.EngineReported(bytes_sent=sent, remaining_bytes=8, throughput_bytes_per_s=1.0)
        pair.source.handle(told, pair.now_s + 1.1 * (number + 1))
        assert pair.source.view().progress.throughput_bytes_per_s == rate


def test_an_engine_that_is_not_heard_has_no_rate_while_pages_should_travel() -> None:
    pair = SessionPair(pending=lambda number: 900_000)
    assert pair.source.view(7.0).progress.unheard_s is None
    pair.run_until_state(MigrationState.PRECOPY)
    told = v.EngineReported(bytes_sent=9, remaining_bytes=8, throughput_bytes_per_s=2.0)
    pair.source.handle(told, pair.now_s)
    progress = pair.source.view().progress
    assert (progress.throughput_bytes_per_s, progress.eta_s) == (2.0, 4.0)
    progress = pair.source.view(7.0).progress
    assert (progress.throughput_bytes_per_s, progress.eta_s) == (0.0, None)
    assert progress.unheard_s == 7.0


def pass_report(number: int) -> PassReport:
    return PassReport(
        number=number,
        kind=PassKind.FIRST,
        seconds=1.0,
        pages=1000,
        bytes_sent=4_000_000,
        pending_pages=900_000,
    )
