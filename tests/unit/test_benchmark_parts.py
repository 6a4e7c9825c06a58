"""The benchmark's parts that need no guest: its budget, the guest's work, a newer QEMU."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from scapy.layers.inet import IP, TCP, UDP
from scapy.packet import Raw

from deploy.guest.build import GuestImage
from tests.benchmarks import bars, engines, newer_qemu
from tests.benchmarks.bars import HELD, NOT_HELD
from tests.benchmarks.results import Run, with_work, work_rate
from tests.benchmarks.run import Bench
from tests.benchmarks.schedule import Budget, turns
from tests.benchmarks.site import Sites
from tests.benchmarks.tcp import Segment, recovery, segment_in

SECOND_NS = 10**9
IMAGE = GuestImage(Path("kernel"), Path("initrd"))


def test_engines_alternate_and_turn_round() -> None:
    assert [turn.engine for turn in turns("1", ["a", "b"], 3)] == ["a", "b", "b", "a", "a", "b"]
    assert [turn.engine for turn in turns("4", ["a", "b"], 3, "b")] == ["a", "b", "b", "b"]


def test_a_budget_ends_the_beginnings() -> None:
    budget = Budget(10.0, 3, 100.0)
    assert budget.begin(100.0)
    assert budget.begin(109.9)
    assert not budget.begin(110.0)
    assert budget.where(111.0) == "[2/3, 0:11 of at most 0:10]"


def test_work_is_the_median_between_two_looks() -> None:
    at_ns = [second * SECOND_NS for second in range(6)]
    work = [0, 100, 200, 210, 300, 400]
    assert work_rate(at_ns, work, 0.0, 5.0) == 100
    assert work_rate(at_ns, work, 2.2, 2.8) == 10
    assert work_rate(at_ns, work, 7.0, 8.0) is None
    assert work_rate([], [], 0.0, 1.0) is None


def test_the_work_of_a_post_copy_is_held_against_that_before() -> None:
    at_ns = [second * SECOND_NS for second in range(6)]
    run = Run(completed=True, post_copy_at_s=(3.1, 4.9))
    seen = with_work(run, at_ns, [0, 100, 200, 300, 360, 420], 3.0, 4.0)
    assert (seen.work_before, seen.work_during) == (100, 60)


@pytest.mark.parametrize(("during", "outcome"), [(90.0, HELD), (80.0, NOT_HELD)])
def test_the_slowdown_has_a_bar(during: float, outcome: str) -> None:
    run = Run(completed=True, work_before=100.0, work_during=during, work_after=100.0)
    found = {bar.name: bar.outcome for bar in bars.judge({("slow", "ferry"): [run]})}
    assert found["the guest's work in pre-copy / before"] == outcome
    assert found["the guest's work after a cancelled pre-copy / before"] == HELD


def test_hybrid_is_held_against_the_memory_over_the_link() -> None:
    run = Run(completed=True, total_s=2.0, blackout_ms=9.0, in_use_bytes=250_000_000)
    found = {bar.name: bar for bar in bars.judge({("4", "ferry-hybrid"): [run]})}
    assert found["case 4: hybrid's total / (memory in use / link)"].value == pytest.approx(1.0)


@pytest.mark.parametrize("suite", ["", "../etc", "Trixie", "trixie;reboot"])
def test_a_suite_is_a_word(suite: str, tmp_path: Path) -> None:
    with pytest.raises(newer_qemu.NewerQemuError, match="a Debian suite"):
        newer_qemu.install(suite, tmp_path)
    assert not list(tmp_path.iterdir())


def test_without_debootstrap_the_cache_stays_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(newer_qemu.NewerQemuError, match="apt-get install debootstrap"):
        newer_qemu.install("trixie", tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_bootstrap_that_fails_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bin_folder, cache = tmp_path / "bin", tmp_path / "cache"
    bin_folder.mkdir()
    for name, text in {"unshare": 'shift; exec "$@"', "debootstrap": "echo E: no; exit 3"}.items():
        (bin_folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (bin_folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_folder}:/bin:/usr/bin")
    with pytest.raises(newer_qemu.NewerQemuError, match="E: no"):
        newer_qemu.install("trixie", cache)
    assert not list(cache.iterdir())


def test_modules_are_the_newer_qemus_own_where_the_host_has_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usual, root = tmp_path / "modules", tmp_path / "cache" / "qemu-trixie"
    monkeypatch.setattr(newer_qemu, "_MODULES", str(usual).lstrip("/"))
    binary, link = root / "usr" / "bin" / newer_qemu.BINARY, root / "bin" / newer_qemu.BINARY
    for path in (binary, link):
        path.parent.mkdir(parents=True)
    binary.touch()
    link.symlink_to(binary)
    (root / ".ready").touch()
    assert newer_qemu.modules_to_bind(link) is None, "the host has none"
    usual.mkdir()
    assert newer_qemu.modules_to_bind(link) == (root / str(usual).lstrip("/"), usual)
    (root / ".ready").unlink()
    assert newer_qemu.modules_to_bind(link) is None, "it is the host's"


def test_what_was_measured_stays_until_its_case_is_measured_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = engines.select("ferry,qemu-10ms")
    kept = {("1", "ferry"): [Run(completed=False)], ("2", "ferry"): [Run(completed=False)]}
    bench = Bench(Sites(IMAGE, tmp_path, node_memory_bytes=0), tmp_path, chosen, kept)
    monkeypatch.setattr(bench, "run", lambda turn: Run(completed=True, total_s=1.0))
    plan = bench.plan(["1", "slow"], 3)
    assert [len(each) for each in plan] == [6, 3]
    written: list[int] = []
    budget = Budget(100.0, 9, time.monotonic())
    assert bench.work(plan, budget, lambda: written.append(len(bench.runs)))
    assert [len(bench.runs[key]) for key in (("1", "ferry"), ("1", "qemu-10ms"))] == [3, 3]
    assert len(bench.runs["2", "ferry"]) == 1
    assert len(written) == 2


def _stream(from_s: float, until_s: float, bytes_per_s: float) -> list[Segment]:
    """A segment a millisecond; sequence numbers begin just below their end."""
    count = int((until_s - from_s) * 1e3)
    length = int(bytes_per_s / 1e3)
    return [
        Segment(from_s + n / 1e3, ((1 << 32) - 5000 + n * length) % (1 << 32), length)
        for n in range(count)
    ]


def test_a_streams_recovery_is_read_from_its_segments() -> None:
    before = _stream(100.0, 103.0, 50e6)
    slow = _stream(103.2, 103.4, 20e6)
    full = _stream(103.4, 106.3, 48e6)
    found = recovery([*before, *slow, *full], 100.0, 103.0, 103.15, 3.0)
    assert found.before_bytes_per_s == pytest.approx(50e6, rel=0.05)
    assert found.back_ms == pytest.approx(294.6, abs=3.0)
    assert found.silence_ms == pytest.approx(50.0, abs=2.0)


def test_a_segment_that_comes_again_is_counted_and_one_past_the_numbers_end_is_not() -> None:
    stream = _stream(100.0, 103.0, 50e6)
    again = [*stream[:500], *stream[490:500], *stream[500:]]
    assert recovery(stream, 100.0, 100.1, 100.2, 2.0).repeated == 0
    assert recovery(again, 100.0, 100.1, 100.2, 2.0).repeated == 10


def test_a_segments_numbers_are_read_from_its_packet() -> None:
    packet = IP(src="10.0.0.5") / TCP(seq=77, options=[("NOP", None)] * 4) / Raw(b"x" * 30)
    assert segment_in(bytes(packet)) == (77, 30)
    assert segment_in(bytes(IP() / UDP() / Raw(b"x" * 30))) is None
    assert segment_in(b"") is None
