"""The doctor's judgement; what it looks at itself is real and tested in a lab."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from migrator.model import Fencing, PoolHealth
from node_agent.cli.client import ApiClient
from node_agent.doctor import examination, paths
from node_agent.doctor.certificates import check_certificates
from node_agent.doctor.examination import version_of
from node_agent.doctor.findings import Diagnosis, Level, failure, fine, warning
from node_agent.doctor.units import check_units
from node_agent.resources import Pool, PoolList, PoolOrigin
from node_agent.trust.founding import found_cluster
from storage.settings import NfsSettings
from tests.unit.trust_world import node_config


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


@pytest.mark.parametrize(
    ("free", "level"),
    [(2**35, Level.OK), (2**30, Level.WARNING), (0, Level.FAILURE)],
)
def test_a_full_pool_is_found(monkeypatch: pytest.MonkeyPatch, free: int, level: Level) -> None:
    health = PoolHealth(reachable=True, capacity_bytes=2**40, free_bytes=free)
    pool = Pool(
        name="fast",
        driver="nfs",
        origin=PoolOrigin.CLUSTER,
        settings=NfsSettings(name="fast", server="192.0.2.5", export="/srv"),
        fencing=Fencing(remote_writers=True, method=""),
        health=health,
        room=health.room,
    )
    client = ApiClient("unix:/nowhere")
    monkeypatch.setattr(client, "get", lambda path, kind: PoolList(pools=(pool,)))
    (found,) = examination._pools(client, True)
    assert (found.level, found.check) == (level, "pool fast")
    assert ("MiB free" in found.detail) is (level is not Level.OK)


def test_a_state_directory_that_isnt_there_is_named(tmp_path: Path) -> None:
    found = examination.state_directory(tmp_path / "nowhere")
    assert found.level is Level.FAILURE
    assert "nowhere: No such file" in found.detail


DAY_S = 86_400.0


@pytest.mark.parametrize(
    ("heartbeats_s", "icmp_ms", "level", "detail"),
    [
        (0.3, 12.0, Level.OK, "+12 ms"),
        (-1.2, -400.0, Level.WARNING, "-400 ms"),
        (None, 12.0, Level.OK, "+12 ms"),
        (-0.8, None, Level.OK, "within 10 s, by its heartbeats"),
        (None, None, Level.WARNING, "unknown: no answer to ICMP timestamps"),
        (300.0, 0.0, Level.WARNING, "5.0 min ahead of this node's"),
        # ICMP tells the time of day alone: a day or a year off looks like nothing.
        (-DAY_S + 60, 0.0, Level.WARNING, "24.0 h behind this node's"),
        (365 * DAY_S, 0.0, Level.FAILURE, "365.0 days ahead of this node's: certificates may"),
    ],
)
def test_a_clock_that_is_whole_days_off_is_found(
    monkeypatch: pytest.MonkeyPatch,
    heartbeats_s: float | None,
    icmp_ms: float | None,
    level: Level,
    detail: str,
) -> None:
    monkeypatch.setattr(paths, "clock_offset_ms", lambda address: icmp_ms)
    found = paths.check_clock("n2", "192.0.2.2", heartbeats_s)
    assert (found.level, found.check) == (level, "clock of n2")
    assert found.detail.startswith(detail)


def test_who_waits_for_a_core_while_it_asks_for_the_time_asks_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A clock is 30 ms ahead. Its answer is looked at 600 ms late, and then at once."""
    now_ms = [1_000.0, 1_601.0, 2_000.0, 2_002.0]
    theirs_ms = [1_031, 2_031]
    monkeypatch.setattr(paths, "_since_midnight_ms", lambda: now_ms.pop(0))

    def answer(address: str, kinds: tuple[int, int], body: bytes) -> bytes:
        at_ms = theirs_ms.pop(0)
        return struct.pack("!III", 0, at_ms, at_ms)

    monkeypatch.setattr(paths, "_ask", answer)
    assert paths.clock_offset_ms("192.0.2.2") == pytest.approx(30.0, abs=1.0)
    assert not now_ms


@pytest.mark.allow_blocking("the command line is synchronous")
def test_what_is_wrong_with_certificates_is_told_with_its_mend(tmp_path: Path) -> None:
    config = node_config(tmp_path, 1, 'mode = "required"')
    (alone,) = check_certificates(config, 0.0)
    assert (alone.level, alone.detail) == (Level.FAILURE, "this node belongs to no cluster")
    assert not list(check_certificates(node_config(tmp_path, 1, 'mode = "plain"'), 0.0))
    identity = found_cluster(config, "c1")
    now_s = identity.certificate.not_after_s - 30 * DAY_S

    def levels(days: float) -> list[Level]:
        return [each.level for each in check_certificates(config, now_s + days * DAY_S)]

    assert levels(0) == levels(20.5) == [Level.OK, Level.OK]
    assert levels(-10) == [Level.FAILURE, Level.FAILURE]  # A clock that is behind.
    assert levels(22) == [Level.WARNING, Level.OK]
    assert levels(31) == [Level.FAILURE, Level.OK]
    assert levels(3500) == [Level.FAILURE, Level.WARNING]
    assert levels(3651) == [Level.FAILURE, Level.FAILURE]
    own, _ = check_certificates(config, now_s + 31 * DAY_S)
    assert "it held until" in own.detail and "this node signs" in own.mend
    (tmp_path / "n1" / "tls" / "authority-key.pem").unlink()
    own, _ = check_certificates(config, now_s + 31 * DAY_S)
    assert "ferry cluster join TOKEN --again" in own.mend
    (tmp_path / "n1" / "tls" / "key.pem").write_text("nonsense")
    (broken,) = check_certificates(config, now_s)
    assert broken.level is Level.FAILURE


@pytest.mark.parametrize(
    ("active", "limit_s", "levels"),
    [
        ({"ferry-agent.service", "ferry-guests.service"}, 120.0, [Level.OK]),
        ({"ferry-agent.service"}, 120.0, [Level.WARNING]),
        ({"ferry-agent.service"}, 0.0, []),
        (set(), 120.0, []),
    ],
    ids=["both", "an older installation's", "switched off", "a lab, or no systemd"],
)
def test_a_host_whose_shutdown_would_cut_guests_off_is_told_of(
    active: set[str], limit_s: float, levels: list[Level]
) -> None:
    found = list(check_units(limit_s, active.__contains__))
    assert [each.level for each in found] == levels
    assert all("ferry-guests.service" in each.mend for each in found if each.mend)
