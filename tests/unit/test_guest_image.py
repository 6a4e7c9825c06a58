"""The pure parts of the guest image: archive, command line, kernel package, formats."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.guest.build import initrd_entries
from deploy.guest.cmdline import BOOT_OPTIONS, guest_cmdline
from deploy.guest.cpio import character_device, directory, file, symlink, write_newc
from deploy.guest.disk_check import check_disk, describe
from deploy.guest.kernel import (
    GuestBuildError,
    KernelPackage,
    load_order,
    module_name,
    parse_depends,
    parse_policy,
    run_tool,
)
from deploy.guest.protocol import UdpPacket, read_console, stream_bytes
from deploy.guest.records import (
    RECORD_BYTES,
    Record,
    SlotState,
    encode_record,
    expected_sequence,
    parse_slot,
)

# --- cpio -------------------------------------------------------------------------------------


def read_newc(archive: bytes) -> list[tuple[str, list[int], bytes]]:
    """A second implementation of the format, to check the first: name, header fields, data."""
    entries: list[tuple[str, list[int], bytes]] = []
    at = 0
    while True:
        assert archive[at : at + 6] == b"070701"
        fields = [int(archive[at + 6 + 8 * i : at + 14 + 8 * i], 16) for i in range(13)]
        size_bytes, name_bytes = fields[6], fields[11]
        name_at = at + 110
        data_at = (name_at + name_bytes + 3) // 4 * 4
        name = archive[name_at : name_at + name_bytes - 1].decode()
        if name == "TRAILER!!!":
            return entries
        entries.append((name, fields, archive[data_at : data_at + size_bytes]))
        at = (data_at + size_bytes + 3) // 4 * 4


def test_cpio_holds_what_was_put_in() -> None:
    archive = write_newc(
        [
            directory("dev"),
            character_device("dev/console", 5, 1),
            file("init", b"#!/bin/sh\n", executable=True),
            file("data", b"12345"),
            symlink("sh", "init"),
        ]
    )
    entries = {name: (fields, data) for name, fields, data in read_newc(archive)}
    assert list(entries) == ["dev", "dev/console", "init", "data", "sh"]
    assert stat.S_ISDIR(entries["dev"][0][1])
    assert entries["dev/console"][0][9:11] == [5, 1]
    assert entries["init"] == (entries["init"][0], b"#!/bin/sh\n")
    assert stat.S_IMODE(entries["init"][0][1]) == 0o755
    assert stat.S_IMODE(entries["data"][0][1]) == 0o644
    assert entries["sh"][1] == b"init"
    assert len({fields[0] for fields, _ in entries.values()}) == len(entries)


@given(st.binary(max_size=40), st.text("abc", min_size=1, max_size=9))
def test_cpio_pads_any_length(data: bytes, name: str) -> None:
    archive = write_newc([file(name, data), file(name + "2", b"end")])
    assert [(n, d) for n, _, d in read_newc(archive)] == [(name, data), (name + "2", b"end")]


@pytest.mark.parametrize("path", ["", "/init"])
def test_cpio_refuses_paths_that_are_not_relative(path: str) -> None:
    with pytest.raises(ValueError, match="cpio path"):
        write_newc([file(path, b"")])


def test_cpio_refuses_a_path_given_twice() -> None:
    with pytest.raises(ValueError, match="duplicate"):
        write_newc([file("a", b""), file("a", b"")])


def test_initrd_loads_modules_in_order() -> None:
    entries = initrd_entries(
        init=b"i", workload=b"w", busybox=b"b", modules=[("virtio.ko", b"1"), ("net.ko", b"2")]
    )
    contents = {name: data for name, _, data in read_newc(write_newc(entries))}
    assert contents["lib/modules/order"] == b"virtio.ko\nnet.ko\n"
    assert contents["lib/modules/net.ko"] == b"2"
    assert contents["init"] == b"i"
    assert contents["bin/sh"] == b"busybox"


# --- command line -----------------------------------------------------------------------------


def test_cmdline_says_all_that_was_asked_for() -> None:
    words = guest_cmdline(
        name="web1",
        address="10.77.1.10/24",
        gateway="10.77.1.1",
        udp="10.77.1.250:9999",
        memory_mib=32,
        dirty_pages_per_s=2000,
        disk=True,
    ).split()
    assert set(BOOT_OPTIONS) <= set(words)
    for word in (
        "panic=-1",
        "ferry.name=web1",
        "ferry.ip=10.77.1.10/24",
        "ferry.gw=10.77.1.1",
        "ferry.udp=10.77.1.250:9999",
        "ferry.udp_per_s=1000",
        "ferry.mem_mib=32",
        "ferry.dirty_pages_per_s=2000",
        "ferry.disk=1",
        "ferry.http=1",
        "ipv6.disable=1",
    ):
        assert word in words


def test_cmdline_leaves_ipv6_on_for_an_ipv6_address() -> None:
    words = guest_cmdline(address6="fd77::10/64").split()
    assert "ferry.ip6=fd77::10/64" in words
    assert "ipv6.disable=1" not in words
    assert not any(word.startswith("ferry.ip=") for word in words)


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"address": "10.77.1.10"}, "prefix"),
        ({"address": "10.77.1.300/24"}, "10.77.1.300"),
        ({"udp": "10.77.1.1"}, "address:port"),
        ({"udp": "10.77.1.1:70000"}, "address:port"),
        ({"name": "a b"}, "host name"),
        ({"name": 'x"y'}, "host name"),
    ],
)
def test_cmdline_refuses_what_the_guest_would_refuse(wrong: dict[str, str], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        guest_cmdline(**wrong)  # type: ignore[arg-type]


def test_cmdline_refuses_numbers_that_mean_nothing() -> None:
    with pytest.raises(ValueError, match="negative"):
        guest_cmdline(memory_mib=-1)
    with pytest.raises(ValueError, match="100 percent"):
        guest_cmdline(memory_noise_percent=101)


# --- kernel package ---------------------------------------------------------------------------


def test_kernel_package_is_read_from_apt() -> None:
    depends = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-9-cloud-amd64\n  Suggests: x\n"
    policy = "linux-image:\n  Installed: (none)\n  Candidate: 6.1.27-1\n  Version table:\n"
    assert parse_depends(depends, "linux-image-cloud-amd64") == "linux-image-6.1.0-9-cloud-amd64"
    assert parse_policy(policy) == "6.1.27-1"


def test_each_flavour_and_each_choice_of_modules_has_its_own_folder() -> None:
    depends = "linux-image-amd64\n  Depends: linux-image-6.1.0-9-amd64\n"
    assert parse_depends(depends, "linux-image-amd64") == "linux-image-6.1.0-9-amd64"
    with pytest.raises(GuestBuildError, match="linux-image-cloud-amd64"):
        parse_depends(depends, "linux-image-cloud-amd64")
    packages = [
        KernelPackage(name, "6.1.27-1", modules)
        for name in ("linux-image-6.1.0-9-amd64", "linux-image-6.1.0-9-cloud-amd64")
        for modules in (("virtio_pci",), ("virtio_pci", "bridge"))
    ]
    assert len({package.cache_name for package in packages}) == 4


def test_missing_package_lists_are_named() -> None:
    with pytest.raises(GuestBuildError, match="apt-get update"):
        parse_depends("", "linux-image-amd64")
    with pytest.raises(GuestBuildError, match="apt-get update"):
        parse_policy("  Candidate: (none)\n")


def test_a_missing_tool_is_named_with_its_package() -> None:
    with pytest.raises(GuestBuildError, match="install the package gcc"):
        run_tool(["no-such-compiler"], package="gcc", timeout_s=1.0)


def test_a_failing_tool_says_why() -> None:
    with pytest.raises(GuestBuildError, match="status 2"):
        run_tool(["ls", "/no/such/folder"], package="coreutils", timeout_s=10.0)


def make_module(folder: Path, name: str, depends: str) -> tuple[str, Path]:
    path = folder / f"{name}.ko"
    path.write_bytes(b"\x7fELF\0license=GPL\0depends=" + depends.encode() + b"\0intree=Y\0")
    return module_name(path), path


def test_modules_are_loaded_after_what_they_need(tmp_path: Path) -> None:
    files = dict(
        [
            make_module(tmp_path, "net", "core-ring,failover"),
            make_module(tmp_path, "core-ring", "core"),
            make_module(tmp_path, "core", ""),
            make_module(tmp_path, "failover", ""),
            make_module(tmp_path, "unused", ""),
        ]
    )
    assert load_order(["net", "builtin"], files) == ("core", "core_ring", "failover", "net")


def test_a_module_that_misses_its_need_is_an_error(tmp_path: Path) -> None:
    files = dict([make_module(tmp_path, "net", "gone")])
    with pytest.raises(GuestBuildError, match="net needs gone"):
        load_order(["net"], files)


# --- packets, streams, console ----------------------------------------------------------------


def test_packet_round_trip() -> None:
    packet = UdpPacket(boot_id=2**63, sequence=7, guest_monotonic_ns=123)
    assert UdpPacket.parse(packet.encode()) == packet


@pytest.mark.parametrize("data", [b"", b"x" * 31, b"x" * 32])
def test_what_is_not_a_packet_is_refused(data: bytes) -> None:
    with pytest.raises(ValueError, match="packet"):
        UdpPacket.parse(data)


@given(st.integers(0, 3000), st.integers(0, 100))
def test_a_stream_is_the_same_in_pieces(offset_bytes: int, length_bytes: int) -> None:
    whole = stream_bytes(0, 4096)
    piece = stream_bytes(offset_bytes, length_bytes)
    assert piece == whole[offset_bytes : offset_bytes + length_bytes]


def test_stream_words() -> None:
    assert stream_bytes(8, 8) == (0x9E3779B97F4A7C15).to_bytes(8, "little")


def test_console_is_sorted() -> None:
    report = read_console(
        "noise\r\nFERRY-READY name=a\r\nFERRY-STATUS {broken\r\n"
        "[ 1.0] xFERRY-CORRUPTION memory page=1\r\nFERRY-ERROR no disk\r\n"
        "[ 2.0] Kernel panic - not syncing\r\nFERRY-READY cut off"
    )
    assert report.boots == 1
    assert report.last_status is None
    assert len(report.corruptions) == 1
    assert report.errors == ("FERRY-ERROR no disk", "[ 2.0] Kernel panic - not syncing")
    assert not report.healthy


# --- disk records -----------------------------------------------------------------------------


def write_disk(path: Path, count: int, *, slots: int = 8, capacity: int = 16) -> list[Record]:
    """A disk on which a guest has written `count` records."""
    image = bytearray(capacity * RECORD_BYTES)
    records: list[Record] = []
    for sequence in range(1, count + 1):
        previous = records[-1].crc32 if records else 0
        data = encode_record(sequence=sequence, slots=slots, boot_id=1, previous_crc32=previous)
        record = parse_slot(data)
        assert isinstance(record, Record)
        records.append(record)
        at = (sequence - 1) % slots * RECORD_BYTES
        image[at : at + RECORD_BYTES] = data
    path.write_bytes(image)
    return records


def overwrite(path: Path, slot: int, data: bytes) -> None:
    with path.open("r+b") as image:
        image.seek(slot * RECORD_BYTES)
        image.write(data)


@given(st.integers(1, 30), st.integers(2, 9))
def test_each_slot_expects_the_newest_record_that_belongs_there(last: int, slots: int) -> None:
    held = {}
    for sequence in range(1, last + 1):
        held[(sequence - 1) % slots] = sequence
    assert [expected_sequence(slot, last, slots) for slot in range(slots)] == [
        held.get(slot, 0) for slot in range(slots)
    ]


@pytest.mark.parametrize(("count", "first"), [(1, 1), (5, 1), (8, 1), (9, 2), (27, 20)])
def test_a_healthy_disk_is_intact(tmp_path: Path, count: int, first: int) -> None:
    disk = tmp_path / "disk.raw"
    write_disk(disk, count)
    report = check_disk(disk)
    assert report.intact, report.problems
    assert (report.first_sequence, report.last_sequence) == (first, count)
    assert (report.slots, report.records, report.boot_ids) == (8, count - first + 1, (1,))
    assert report.torn_slot is None
    assert describe(report).startswith("intact")


def test_a_blank_disk_has_no_records(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(bytes(8 * RECORD_BYTES))
    report = check_disk(disk)
    assert (report.slots, report.records, report.intact) == (0, 0, True)
    assert describe(report).startswith("blank")


@pytest.mark.parametrize("slot", [0, 2, 7])
def test_a_changed_byte_is_found(tmp_path: Path, slot: int) -> None:
    disk = tmp_path / "disk.raw"
    write_disk(disk, 20)  # in slot 3; the next record's slot is 4
    with disk.open("r+b") as image:
        image.seek(slot * RECORD_BYTES + 1000)
        image.write(b"\1")
    report = check_disk(disk)
    assert [problem.slot for problem in report.problems] == [slot]
    assert "broken" in describe(report)


def test_a_write_broken_off_is_no_problem(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    write_disk(disk, 20)
    overwrite(disk, 4, b"torn")
    report = check_disk(disk)
    assert report.intact
    assert report.torn_slot == 4


def test_a_lost_write_is_found(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    write_disk(disk, 20)
    # Record 18 never arrived: its slot still holds record 10.
    overwrite(disk, 1, encode_record(sequence=10, slots=8, boot_id=1))
    report = check_disk(disk)
    assert [problem.expected_sequence for problem in report.problems] == [18]
    assert "record 10" in report.problems[0].detail


def test_a_second_writer_is_found(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    records = write_disk(disk, 20)
    # Whole, in its place, chained to its predecessor; but record 20 was chained to another 19.
    second = encode_record(
        sequence=19, slots=8, boot_id=2, guest_monotonic_ns=5, previous_crc32=records[17].crc32
    )
    overwrite(disk, 2, second)
    report = check_disk(disk)
    assert [problem.expected_sequence for problem in report.problems] == [20]
    assert report.boot_ids == (1, 2)


def test_a_disk_of_something_else_is_damaged(tmp_path: Path) -> None:
    disk = tmp_path / "disk.raw"
    disk.write_bytes(b"\xff" * 4 * RECORD_BYTES)
    report = check_disk(disk)
    assert not report.intact
    assert report.records == 0


def test_a_record_with_an_absurd_circle_is_broken() -> None:
    assert parse_slot(encode_record(sequence=1, slots=2**40)) is SlotState.BROKEN
    with pytest.raises(ValueError, match="4096"):
        parse_slot(b"")
