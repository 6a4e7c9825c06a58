"""The demo's own arithmetic: what arrived, which migration answers for it, and what is a fault."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from deploy.demo import cli, client, figure, report
from deploy.demo.observations import (
    SAMPLE_S,
    Duplicate,
    Farewell,
    Late,
    Loss,
    Observation,
    Reboot,
    Request,
    Sample,
    Stream,
    StreamState,
    decode_line,
    encode_line,
)
from deploy.demo.report import ClientSide, Window
from deploy.demo.tally import Tally
from deploy.guest.protocol import GuestStatus, UdpPacket
from deploy.guest.records import DiskReport
from migrator.errors import FerryError
from migrator.model import (
    Migration,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    Phase,
)
from node_agent.cli.errors import CliError, ExitCode

BEGIN_S = 1000.0
STATUS = GuestStatus(
    name="web1",
    boot_id="0000000000000007",
    uptime_ms=9000,
    ready=True,
    corruptions=0,
    memory_pages=16384,
    memory_writes=1000,
    memory_checks=2000,
    memory_sweeps=1,
    memory_corruptions=0,
    disk_slots=256,
    disk_records_written=40,
    disk_last_sequence=40,
    disk_checks=40,
    disk_corruptions=0,
    disk_errors=0,
    udp_sent=9000,
    udp_errors=0,
    http_requests=20,
    http_bytes_sent=100_000,
)


def packet(sequence: int, boot_id: int = 7) -> UdpPacket:
    return UdpPacket(boot_id=boot_id, sequence=sequence, guest_monotonic_ns=0)


def migration(
    created_at_s: float,
    total_s: float = 1.0,
    state: MigrationState = MigrationState.COMPLETED,
    blackout_ms: float | None = 10.0,
) -> Migration:
    stop = Phase(name="stop", started_at_s=created_at_s + 0.5, seconds=0.25)
    final = Phase(name="final pass", started_at_s=created_at_s + 0.75, seconds=0.002)
    return Migration(
        id="m1",
        domain="web1",
        source="n1",
        destination="n2",
        request=MigrationRequest(destination="n2"),
        state=state,
        progress=MigrationProgress(state=state, bytes_sent=5000),
        created_at_s=created_at_s,
        ended_at_s=created_at_s + total_s,
        blackout_ms=blackout_ms,
        total_s=total_s,
        timeline=(stop, final),
        error=None if state is MigrationState.COMPLETED else "the wire was cut",
    )


def gap(ended_at_s: float, longest_gap_ms: float) -> Sample:
    return Sample(
        at_s=ended_at_s - 0.01,
        packets=1,
        stream_bytes=100,
        longest_gap_ms=longest_gap_ms,
        gap_ended_at_s=ended_at_s,
    )


# --- the tally -------------------------------------------------------------------------------


def test_samples_have_equal_widths_and_hold_what_arrived_in_them() -> None:
    tally = Tally(BEGIN_S)
    tally.stream(BEGIN_S + 0.01, 100)
    tally.stream(BEGIN_S + 0.04, 11)
    tally.packet(BEGIN_S + 0.01, packet(1))
    tally.packet(BEGIN_S + 0.12, packet(2))
    samples = [each for each in tally.take(BEGIN_S + 0.17) if isinstance(each, Sample)]
    assert [each.stream_bytes for each in samples] == [111, 0, 0]
    assert [each.packets for each in samples] == [1, 0, 1]
    assert [each.at_s for each in samples] == pytest.approx(
        [BEGIN_S, BEGIN_S + SAMPLE_S, BEGIN_S + 2 * SAMPLE_S]
    )
    assert samples[2].longest_gap_ms == pytest.approx(110)
    assert samples[2].gap_ended_at_s == pytest.approx(BEGIN_S + 0.12)
    assert tally.take(BEGIN_S + 0.17) == []


def test_what_comes_for_a_closed_sample_counts_in_the_oldest_open_one() -> None:
    tally = Tally(BEGIN_S)
    tally.take(BEGIN_S + 0.11)
    tally.stream(BEGIN_S + 0.01, 5)
    late = [each for each in tally.take(BEGIN_S + 0.16) if isinstance(each, Sample)]
    assert [(each.at_s, each.stream_bytes) for each in late] == [(BEGIN_S + 0.1, 5)]


def test_an_open_gap_ends_with_the_last_sample() -> None:
    tally = Tally(BEGIN_S)
    tally.packet(BEGIN_S + 0.01, packet(1))
    samples = [each for each in tally.take(BEGIN_S + 5, last=True) if isinstance(each, Sample)]
    assert samples[-1].longest_gap_ms == pytest.approx(4990)


def test_lost_late_and_doubled_packets_are_told_apart() -> None:
    tally = Tally(BEGIN_S)
    for offset, sequence in enumerate((10, 11, 15, 13, 13, 11, 16)):
        tally.packet(BEGIN_S + offset / 1e3, packet(sequence))
    events = [each for each in tally.take(BEGIN_S + 1) if not isinstance(each, Sample)]
    assert events == [
        Loss(at_s=BEGIN_S + 0.002, first_sequence=12, count=3),
        Late(at_s=BEGIN_S + 0.003, sequence=13),
        Duplicate(at_s=BEGIN_S + 0.004, sequence=13),
        Duplicate(at_s=BEGIN_S + 0.005, sequence=11),
    ]


def test_a_new_boot_id_is_a_reboot_and_no_loss() -> None:
    tally = Tally(BEGIN_S)
    tally.packet(BEGIN_S, packet(900))
    tally.packet(BEGIN_S + 0.001, packet(1, boot_id=8))
    events = [each for each in tally.take(BEGIN_S + 1) if not isinstance(each, Sample)]
    assert events == [Reboot(at_s=BEGIN_S + 0.001)]


@given(st.sets(st.integers(1, 300), min_size=1), st.randoms(use_true_random=False))
def test_losses_less_late_ones_are_what_never_came(arrived: set[int], random: object) -> None:
    order = sorted(arrived)
    first = order.pop(0)
    random.shuffle(order)  # type: ignore[attr-defined]
    tally = Tally(BEGIN_S)
    for offset, sequence in enumerate([first, *order]):
        tally.packet(BEGIN_S + offset / 1e3, packet(sequence))
    side = report.sort_observations(tally.take(BEGIN_S + 60, last=True))
    lost = report.packets_lost(side, Window(from_s=BEGIN_S, to_s=BEGIN_S + 60))
    assert lost == max(arrived) - first + 1 - len(arrived)
    assert sum(each.packets for each in side.samples) == len(arrived)
    assert not side.duplicates


# --- the report ------------------------------------------------------------------------------


def test_a_window_reaches_past_the_end_but_not_into_the_next_migration() -> None:
    first, second = migration(BEGIN_S), migration(BEGIN_S + 1.5)
    assert report.windows([first, second]) == [
        Window(from_s=BEGIN_S, to_s=BEGIN_S + 1.5),
        Window(from_s=BEGIN_S + 1.5, to_s=BEGIN_S + 2.5 + report.SETTLE_S),
    ]


def test_gaps_and_losses_go_to_the_migration_in_whose_window_they_lie() -> None:
    side = ClientSide(
        samples=(
            gap(BEGIN_S - 1.0, 50),
            gap(BEGIN_S + 0.005, 9),  # began before the migration, ended in it
            gap(BEGIN_S + 0.8, 31.234),
            gap(BEGIN_S + 10.8, 17),
        ),
        losses=(
            Loss(at_s=BEGIN_S - 1, first_sequence=1, count=100),
            Loss(at_s=BEGIN_S + 0.8, first_sequence=200, count=10),
            Loss(at_s=BEGIN_S + 2.9, first_sequence=300, count=1),
        ),
        late=(Late(at_s=BEGIN_S + 0.9, sequence=205),),
    )
    migrations = [migration(BEGIN_S), migration(BEGIN_S + 10)]
    first, second = report.results(migrations, side)
    assert (first.client_longest_gap_ms, first.packets_lost) == (31.23, 10)
    assert (second.client_longest_gap_ms, second.packets_lost) == (17, 0)
    assert (first.source, first.destination, first.bytes_sent) == ("n1", "n2", 5000)
    assert report.longest_quiet_gap_ms(side.samples, report.windows(migrations)) == 50


def test_a_failed_migration_has_no_row_and_is_a_fault() -> None:
    failed = migration(BEGIN_S, state=MigrationState.FAILED, blackout_ms=None)
    side = healthy()
    assert report.results([failed], side) == []
    assert report.faults([failed], side, None) == [
        "the migration n1 -> n2 failed: the wire was cut"
    ]
    assert report.blackout_window(failed) is None


def test_the_blackout_begins_where_the_stop_ends() -> None:
    window = report.blackout_window(migration(BEGIN_S))
    assert window is not None
    assert [window.from_s, window.to_s] == pytest.approx([BEGIN_S + 0.75, BEGIN_S + 0.76])
    assert report.slowest_blackout([migration(BEGIN_S)]) == "final pass 2.0 ms"


def healthy(*more: Observation) -> ClientSide:
    return report.sort_observations(
        [
            Stream(at_s=BEGIN_S - 3, state=StreamState.STARTED),
            gap(BEGIN_S + 0.8, 12),
            gap(BEGIN_S + 3.0, 1),
            Request(at_s=BEGIN_S, seconds=0.01),
            *more,
            Farewell(at_s=BEGIN_S + 9, status=STATUS),
        ]
    )


def disk(last_sequence: int) -> DiskReport:
    return DiskReport(
        slots=256,
        first_sequence=1,
        last_sequence=last_sequence,
        records=last_sequence,
        boot_ids=(7,),
        torn_slot=None,
        problems=(),
    )


def test_a_healthy_course_has_no_faults() -> None:
    migrations = [migration(BEGIN_S)]
    assert report.faults(migrations, healthy(), disk(STATUS.disk_last_sequence)) == []
    assert report.tcp_survived(healthy(), migrations)


@pytest.mark.parametrize(
    ("more", "word"),
    [
        (Stream(at_s=BEGIN_S, state=StreamState.BROKEN, error="reset"), "TCP connection broke: r"),
        (Request(at_s=BEGIN_S, seconds=5.0, error="timed out"), "1 HTTP requests failed"),
        (Duplicate(at_s=BEGIN_S, sequence=4), "1 packets arrived twice"),
        (Reboot(at_s=BEGIN_S), "booted anew"),
    ],
)
def test_what_users_would_notice_is_a_fault(more: Observation, word: str) -> None:
    found = report.faults([migration(BEGIN_S)], healthy(more), None)
    assert len(found) == 1
    assert word in found[0]


def test_a_download_that_brings_nothing_after_the_last_migration_did_not_survive() -> None:
    assert not report.tcp_survived(healthy(), [migration(BEGIN_S + 30)])
    assert not report.tcp_survived(ClientSide(), [])


def test_an_acknowledged_record_that_the_disk_lacks_is_a_fault() -> None:
    found = report.faults([migration(BEGIN_S)], healthy(), disk(STATUS.disk_last_sequence - 1))
    assert len(found) == 1
    assert "had been acknowledged" in found[0]


def test_a_client_without_a_farewell_is_a_fault() -> None:
    side = report.sort_observations(
        [Stream(at_s=BEGIN_S, state=StreamState.STARTED), gap(BEGIN_S + 3, 1)]
    )
    assert "no farewell" in report.faults([migration(BEGIN_S)], side, None)[0]


# --- lines, the client's reading, the picture ---------------------------------------------------


def test_every_observation_survives_its_line() -> None:
    for each in (
        gap(BEGIN_S, 3),
        Loss(at_s=1, first_sequence=2, count=3),
        Request(at_s=1, seconds=2, error="no"),
        Stream(at_s=1, state=StreamState.BROKEN, error="no"),
        Farewell(at_s=1, status=STATUS),
    ):
        assert decode_line(encode_line(each)) == each


def test_the_body_begins_after_the_head() -> None:
    assert client._body_after(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n") is None
    assert client._body_after(b"HTTP/1.1 200 OK\r\nA: b\r\n\r\nxyz") == b"xyz"
    with pytest.raises(ValueError, match="404"):
        client._body_after(b"HTTP/1.1 404 Not Found\r\n\r\n")


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    plot = tmp_path / "demo.png"
    figure.draw(plot, "a title", [migration(BEGIN_S), migration(BEGIN_S + 2)], healthy())
    assert plot.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(FerryError, match="nothing to draw"):
        figure.draw(plot, "a title", [], ClientSide())


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (KeyboardInterrupt(), ExitCode.INTERRUPTED),
        (CliError("interrupted before it answered", ExitCode.INTERRUPTED), ExitCode.INTERRUPTED),
        (CliError("no agent answers", ExitCode.UNREACHABLE), ExitCode.FAILED),
        (FerryError("the lab can't be made"), ExitCode.FAILED),
    ],
)
def test_an_interrupt_is_one_in_a_request_too(error: BaseException, code: ExitCode) -> None:
    with pytest.raises(typer.Exit) as ended, cli._errors_as_sentences():
        raise error
    assert ended.value.exit_code == code
