"""The doctor's judgement; what it looks at itself is real and tested in a lab."""

from __future__ import annotations

import pytest

from node_agent.doctor.examination import version_of
from node_agent.doctor.findings import Diagnosis, failure, fine, warning


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
