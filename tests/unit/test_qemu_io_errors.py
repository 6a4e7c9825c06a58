"""A failed disk's name and cause, from the event and from QEMU's memory of it."""

from __future__ import annotations

from hypervisor.qemu.io_errors import describe_event, describe_status
from migrator.model import DiskSpec, DomainSpec

SPEC = DomainSpec(
    name="web",
    memory_bytes=64 * 1024**2,
    disks=(DiskSpec(volume="a"), DiskSpec(volume="b", pool="p")),
)


def test_the_event_names_device_operation_and_reason() -> None:
    data = {"node-name": "disk1", "operation": "write", "reason": "Bad address", "nospace": False}
    assert describe_event(data, SPEC) == "write of disk 1 (p/b) failed: Bad address"
    full = {**data, "reason": "No space left on device", "nospace": True}
    told = "write of disk 1 (p/b) failed: its pool has no space left; the guest goes on by itself"
    assert describe_event(full, SPEC).startswith(told)
    assert describe_event({"node-name": "disk7"}, SPEC) == "access of disk7 failed: unknown"
    assert describe_event({}, SPEC) == "access of a disk failed: unknown"


def test_query_block_still_knows_which() -> None:
    well = {
        "device": "",
        "qdev": "/machine/peripheral/virtio-disk0/virtio-backend",
        "io-status": "ok",
    }
    failed = {"device": "", "qdev": "/machine/peripheral/virtio-disk1/virtio-backend"}
    assert describe_status([well], SPEC) is None
    assert describe_status([well, {**failed, "io-status": "failed"}], SPEC) == "disk 1 (p/b) failed"
    full = describe_status([{**failed, "io-status": "nospace"}], SPEC)
    assert full is not None and full.startswith("disk 1 (p/b) failed: its pool has no space left")
    assert describe_status(None, SPEC) is None
