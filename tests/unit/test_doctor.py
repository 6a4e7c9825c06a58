"""The doctor's judgement; what it looks at itself is real and tested in a lab."""

from __future__ import annotations

from pathlib import Path

import pytest

from node_agent.doctor import examination
from node_agent.doctor.examination import version_of
from node_agent.doctor.findings import Diagnosis, Level, failure, fine, warning


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("6.18.44-fc-v595", (6, 18, 44)),
        ("6.7.0-rc1+", (6, 7, 0)),
        ("7.2.22 (Debian)", (7, 2, 22)),
        ("unknown", ()),
    ],
)
def test_versions(text: str, expected: tuple[int, ...]) -> None:
    assert version_of(text) == expected


def test_only_a_failure_makes_a_node_unhealthy() -> None:
    good = fine("kernel", "6.18")
    assert Diagnosis(node="n1", findings=(good, warning("KVM", "none", "buy one"))).healthy
    assert not Diagnosis(node="n1", findings=(good, failure("QEMU", "none", "install it"))).healthy


@pytest.mark.parametrize(
    ("free", "level"),
    [(2**30, Level.OK), (2**24, Level.WARNING), (2**10, Level.FAILURE), (0, Level.FAILURE)],
)
def test_a_full_state_directory_is_found(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, level: Level
) -> None:
    monkeypatch.setattr(examination, "free_bytes", lambda folder: free)
    found = examination.state_directory(tmp_path)
    assert found.level is level
    assert str(tmp_path) in found.detail
    assert bool(found.mend) is (level is not Level.OK)


def test_a_state_directory_that_isnt_there_is_named(tmp_path: Path) -> None:
    found = examination.state_directory(tmp_path / "nowhere")
    assert found.level is Level.FAILURE
    assert "nowhere: No such file" in found.detail
