"""The clock of one migration, while the host's is set."""

from __future__ import annotations

import pytest

from migrator.session.messages import Running
from migrator.steady_clock import SteadyClock


@pytest.mark.parametrize("step_s", [0.0, 300.0, -300.0, 86_400.0, -365 * 86_400.0])
def test_a_clock_that_is_set_changes_nothing(step_s: float) -> None:
    wall, monotonic = [1_000_000.0], [50.0]
    clock = SteadyClock(lambda: wall[0], lambda: monotonic[0])
    assert clock.now_s == 1_000_000.0
    wall[0] += 10.0 + step_s
    monotonic[0] += 10.0
    assert clock.now_s == pytest.approx(1_000_010.0)
    stamped_s = wall[0]
    wall[0] += 0.25
    monotonic[0] += 0.25
    assert clock.of(stamped_s) == pytest.approx(1_000_010.0), "as it was heard, a quarter late"


def test_what_is_heard_now_is_no_day_old() -> None:
    """Stamped before the clock was set by a day, and heard after it."""
    wall = [1000.0]
    clock = SteadyClock(lambda: wall[0], lambda: 50.0)
    wall[0] += 86_400.0
    assert clock.heard(1000.0) == 1000.0
    assert clock.heard(86_400.0 + 995.0) == 995.0
    assert clock.of(1000.0) == 1000.0 - 86_400.0, "of what may have been long ago"


def test_what_was_stamped_in_the_future_is_now() -> None:
    """By a clock that is set back between the stamp and the hearing."""
    clock = SteadyClock(lambda: 1000.0, lambda: 50.0)
    assert clock.of(2000.0) == 1000.0


@pytest.mark.parametrize("ahead_s", [0.02, 300.0, -0.02, -300.0, 86_400.0])
def test_a_destinations_times_are_told_by_the_sources_clock(ahead_s: float) -> None:
    """Sent at 1000.000, won at .003, resumed at .008, heard at .010."""
    said = Running(
        token=2,
        won_at_s=1000.003 + ahead_s,
        fenced_at_s=1000.005 + ahead_s,
        resumed_at_s=1000.008 + ahead_s,
    )
    by_ours = said.by_clock_of(1000.0, 1000.010)
    assert by_ours.resumed_at_s == pytest.approx(1000.010)
    assert by_ours.won_at_s == pytest.approx(1000.005)
    assert by_ours.fenced_at_s == pytest.approx(1000.007)
    assert by_ours.loaded_at_s == 0.0


def test_times_that_can_be_true_are_left_as_they_are() -> None:
    said = Running(token=2, won_at_s=1000.003, resumed_at_s=1000.008)
    assert said.by_clock_of(1000.0, 1000.010) is said
    died = Running(token=2, won_at_s=2000.0, resumed_at_s=0.0)
    assert died.by_clock_of(1000.0, 1000.010) is died
