"""The network's rows: what is held, and what is written."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.benchmarks.network_rows import Judged, Row, Rows


@pytest.mark.parametrize(
    ("values", "judged", "expected", "outcome"),
    [
        ((1.0, 2.0, 9.0), Judged.MEDIAN, 3, "held"),
        ((1.0, 2.0, 9.0), Judged.WORST, 3, "not held"),
        ((1.0, 2.0, 2.0), Judged.WORST, 0, "held"),
        ((1.0, 2.0), Judged.MEDIAN, 3, "not held"),  # One move never got there.
        ((), Judged.MEDIAN, 3, "not held"),
        ((), Judged.MEDIAN, 0, "not measured"),
    ],
)
def test_a_bar_is_held_by_every_move_that_there_was(
    values: tuple[float, ...], judged: Judged, expected: int, outcome: str
) -> None:
    row = Row(fabric="bridge", name="x", values=values, expected=expected, limit=2, judged=judged)
    assert row.outcome == outcome
    assert outcome in row.text


def test_a_figure_without_a_bar_has_no_outcome() -> None:
    assert Row(fabric="bridge", name="blackout, ms", values=(5.0,)).outcome == ""


def test_rows_are_printed_and_written_as_they_are_found(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = Rows(tmp_path / "build")
    rows.begin("bridge")
    rows.add("first packet, ms", [1.0, None, 3.0], 5, expected=3)
    rows.begin("routed")
    rows.add("blackout, ms", [7.0], note="one")
    first, second = json.loads(rows.path.read_text())
    assert (first["fabric"], first["moves"], first["median"]) == ("bridge", 2, 2.0)
    assert (first["worst"], first["limit"], first["outcome"]) == (3.0, 5, "not held")
    assert (second["fabric"], second["outcome"], second["note"]) == ("routed", None, "one")
    printed = capsys.readouterr().out
    assert "--- bridge" in printed
    assert "2 of 3" in printed
