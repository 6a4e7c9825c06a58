"""The blackout that a migration's progress tells while it goes on: one that may come, or none."""

from __future__ import annotations

import pytest

from migrator.model import (
    PAGE_SIZE_BYTES,
    MigrationMode,
    MigrationProgress,
    MigrationRequest,
    PassKind,
    PassReport,
)
from migrator.policy import FIXED_BLACKOUT_MS
from migrator.session import vocabulary as v
from tests.unit.session_pair import SessionPair

_SENT_PAGES = 1000
_LIMIT_MS = 50


def after_a_pass(mode: MigrationMode, pending_pages: int) -> MigrationProgress:
    """Of a migration whose link carries a page in a millisecond. It waits for its next pass."""
    request = MigrationRequest(destination="n2", mode=mode, downtime_limit_ms=_LIMIT_MS)
    pair = SessionPair(request)
    pair.silence(v.RunPass)
    pair.run()
    all_follows = mode is MigrationMode.POSTCOPY
    report = PassReport(
        number=1,
        kind=PassKind.STALE if all_follows else PassKind.FIRST,
        seconds=_SENT_PAGES / 1000,
        pages=_SENT_PAGES,
        bytes_sent=0 if all_follows else _SENT_PAGES * PAGE_SIZE_BYTES,
        pending_pages=pending_pages,
    )
    pair.push(pair.source, v.PassFinished(report=report))
    pair.run()
    return pair.source.view().progress


@pytest.mark.parametrize("mode", [MigrationMode.PRECOPY, MigrationMode.HYBRID])
@pytest.mark.parametrize("pending_pages", [10, 40])
def test_one_that_fits_into_the_limit_may_come_in_either_mode(
    mode: MigrationMode, pending_pages: int
) -> None:
    expected = pytest.approx(FIXED_BLACKOUT_MS + pending_pages)
    assert after_a_pass(mode, pending_pages).predicted_blackout_ms == expected


@pytest.mark.parametrize("pending_pages", [400, 900])
def test_hybrid_has_no_blackout_beyond_the_limit_and_tells_none(pending_pages: int) -> None:
    """Whether another iteration makes it less, or all that is left follows the guest."""
    assert after_a_pass(MigrationMode.HYBRID, pending_pages).predicted_blackout_ms is None
    expected = pytest.approx(FIXED_BLACKOUT_MS + pending_pages)
    assert after_a_pass(MigrationMode.PRECOPY, pending_pages).predicted_blackout_ms == expected


def test_where_all_memory_follows_the_guest_none_is_told() -> None:
    assert after_a_pass(MigrationMode.POSTCOPY, 10).predicted_blackout_ms is None
