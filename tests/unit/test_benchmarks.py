"""The benchmark's arithmetic: medians, silences, bars."""

from __future__ import annotations

import pytest

from tests.benchmarks import bars, cases
from tests.benchmarks.bars import HELD, NOT_HELD, NOT_MEASURED, Bar
from tests.benchmarks.results import Run, longest_gap_s, summarise, with_client


def done(blackout_ms: float, total_s: float = 1.0) -> Run:
    return Run(completed=True, blackout_ms=blackout_ms, total_s=total_s, bytes_sent=10)


def test_a_row_is_of_the_runs_that_completed() -> None:
    row = summarise("1", "ferry", [done(5.0), done(9.0), Run(completed=False, error="no")])
    assert (row.repeats, row.completed) == (3, 2)
    assert (row.blackout_ms_median, row.blackout_ms_worst) == (7.0, 9.0)


def test_a_row_of_failures_has_no_figures() -> None:
    row = summarise("1", "ferry", [Run(completed=False)])
    assert row.completed == 0
    assert row.blackout_ms_median is None
    assert row.bytes_sent is None


def test_the_longest_silence_is_looked_for_around_the_blackout_only() -> None:
    arrivals_ns = [0, 10**9, 4 * 10**9, 4 * 10**9 + 10**6, 4 * 10**9 + 21 * 10**6]
    assert longest_gap_s(arrivals_ns, 4.001, 4.5) == (4.001, 4.021)
    assert longest_gap_s(arrivals_ns, 3.5, 4.5) == (1.0, 4.0)
    assert longest_gap_s([], 0.0, 1.0) is None


def test_a_guest_that_stays_silent_has_a_gap_up_to_the_end() -> None:
    run = Run(completed=True, blackout_ms=5.0, stopped_at_s=100.0)
    seen = with_client(run, [99_999_000_000], 102.0, None)
    assert seen.client_gap_ms == pytest.approx(2001.0)


@pytest.mark.parametrize(
    ("value", "at_least", "outcome"),
    [(0.5, False, HELD), (1.5, False, NOT_HELD), (1.5, True, HELD), (None, True, NOT_MEASURED)],
)
def test_a_bar_is_held_not_held_or_not_measured(
    value: float | None, at_least: bool, outcome: str
) -> None:
    assert Bar(name="x", value=value, limit=1.0, at_least=at_least).outcome == outcome


def test_bars_compare_medians_of_one_run() -> None:
    found = {
        bar.name: bar.outcome
        for bar in bars.judge(
            {
                ("1", "ferry"): [done(4.0, 0.5), done(6.0, 0.7), done(5.0, 0.6)],
                ("1", "qemu-10ms"): [done(5.0, 2.0)],
                ("1", "qemu-multifd"): [done(50.0, 0.5)],
            }
        )
    }
    assert found["case 1: blackout / QEMU's tuned to 10 ms"] == HELD
    assert found["case 1: total / QEMU's tuned to 10 ms"] == HELD
    assert found["case 1: total / multifd's"] == NOT_HELD
    assert found["case 1: total of `ferry migrate` / of `virsh migrate`"] == NOT_MEASURED
    assert found["case 4: hybrid ends"] == NOT_MEASURED


def test_cases_are_chosen_by_name_or_number() -> None:
    dirty = ["5-50", "5-100", "5-200", "5-200-packed"]
    assert [case.name for case in cases.select("2,5")] == ["2", *dirty]
    with pytest.raises(ValueError, match="no case 9"):
        cases.select("9")


def test_every_case_has_a_guest_that_can_boot() -> None:
    for case in cases.CASES:
        words = case.command_line(address="10.78.0.10/24", udp_target="10.78.0.250:9999")
        assert f"ferry.mem_mib={case.kept_mib}" in words
        assert case.kept_mib < case.memory_mib
