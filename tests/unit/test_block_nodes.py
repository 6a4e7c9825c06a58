"""How each kind of disk is opened: QEMU's arguments, and that no secret stands in them."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from hypervisor.qemu.block_nodes import block_nodes
from migrator.model import (
    BlockDeviceSource,
    BlockSource,
    DiskFormat,
    FileSource,
    IscsiSource,
    NbdSource,
    NfsSource,
    TlsPsk,
)

RAW, QCOW2 = DiskFormat.RAW, DiskFormat.QCOW2
SOURCES: list[tuple[BlockSource, dict[str, Any]]] = [
    (FileSource(path="/p/a.raw", format=RAW), {"driver": "file", "filename": "/p/a.raw"}),
    (
        BlockDeviceSource(path="/dev/vg/a", format=RAW),
        {"driver": "host_device", "filename": "/dev/vg/a"},
    ),
    (
        NfsSource(server="10.0.0.5", path="/x/a/disk.raw", user=7, group=8, format=RAW),
        {
            "driver": "nfs",
            "server": {"type": "inet", "host": "10.0.0.5"},
            "path": "/x/a/disk.raw",
            "user": 7,
            "group": 8,
        },
    ),
    (
        NbdSource(
            host="::1",
            port=10809,
            export="a.1",
            format=QCOW2,
            tls=TlsPsk(directory="/etc/keys", username="ferry"),
            reconnect_delay_s=9,
        ),
        {
            "driver": "nbd",
            "server": {"type": "inet", "host": "::1", "port": "10809"},
            "export": "a.1",
            "reconnect-delay": 9,
            "tls-creds": "d-tls",
        },
    ),
    (
        IscsiSource(
            portal="10.0.0.5:3260",
            target="iqn.2026-11.example:a",
            lun=1,
            initiator_name="iqn.2026-11.example:n1",
            chap_user="u",
            chap_secret_file="/etc/chap",
            format=RAW,
        ),
        {
            "driver": "iscsi",
            "transport": "tcp",
            "portal": "10.0.0.5:3260",
            "target": "iqn.2026-11.example:a",
            "lun": 1,
            "initiator-name": "iqn.2026-11.example:n1",
            "user": "u",
            "password-secret": "d-secret",
        },
    ),
]


def nodes(source: BlockSource) -> dict[str, dict[str, Any]]:
    """Every object and node, by its name."""
    found: dict[str, dict[str, Any]] = {}
    for option, text in zip(*[iter(block_nodes("d", source, frozenset()))] * 2, strict=True):
        value = json.loads(text)
        assert option == ("-object" if "qom-type" in value else "-blockdev")
        found[value.get("node-name", value.get("id"))] = value
    return found


@pytest.mark.parametrize(("source", "expected"), SOURCES)
@pytest.mark.parametrize("read_only", [False, True])
def test_each_kind(source: BlockSource, expected: dict[str, Any], read_only: bool) -> None:
    source = msgspec.structs.replace(source, read_only=read_only)
    made = nodes(source)
    common = {
        "read-only": read_only,
        "auto-read-only": False,
        "cache": {"direct": True, "no-flush": False},
        "discard": "unmap",
    }
    assert made["d-file"] == {"node-name": "d-file", **expected, **common}
    layout = {"node-name": "d", "driver": source.format.value, "file": "d-file", **common}
    if source.format is QCOW2:
        layout["backing"] = None
    assert made["d"] == layout


def test_credentials_are_files() -> None:
    assert nodes(SOURCES[3][0])["d-tls"] == {
        "qom-type": "tls-creds-psk",
        "id": "d-tls",
        "endpoint": "client",
        "dir": "/etc/keys",
        "username": "ferry",
    }
    assert nodes(SOURCES[4][0])["d-secret"] == {
        "qom-type": "secret",
        "id": "d-secret",
        "file": "/etc/chap",
    }


def test_a_backing_chain_is_explicit_and_only_read() -> None:
    base = FileSource(path="/p/base.raw", format=RAW, read_only=True)
    middle = FileSource(path="/p/middle.qcow2", format=QCOW2, read_only=True, backing=base)
    made = nodes(FileSource(path="/p/top.qcow2", format=QCOW2, backing=middle))
    assert made["d"]["backing"] == "d-base"
    assert made["d-base"]["backing"] == "d-base-base"
    assert [made[name]["read-only"] for name in ("d", "d-base", "d-base-base-file")] == [
        False,
        True,
        True,
    ]


@pytest.mark.parametrize("source", [source for source, _ in SOURCES])
def test_sources_travel(source: BlockSource) -> None:
    kind: Any = BlockSource
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(source), type=kind) == source
