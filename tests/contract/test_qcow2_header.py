"""The header of qcow2 files, against what QEMU writes."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrator.errors import StorageError
from storage.qcow2 import HEADER_BYTES, parse_header
from tests.contract.volume_contract import MIB, needs_qemu_img, qemu_img


@needs_qemu_img
@pytest.mark.parametrize("options", ["compat=0.10", "compat=1.1", "cluster_size=2M"])
def test_the_header_of_what_qemu_makes(tmp_path: Path, options: str) -> None:
    path = tmp_path / "x.qcow2"
    qemu_img("create", "-q", "-f", "qcow2", "-o", options, path, "123M")
    header = parse_header(path.read_bytes()[:HEADER_BYTES])
    assert header.capacity_bytes == 123 * MIB
    assert header.version == (2 if "0.10" in options else 3)
    assert header.cluster_bytes == (2 * MIB if "2M" in options else 65536)
    assert not header.backing_file
    assert not header.external_data


@pytest.mark.parametrize(
    "head",
    [
        b"",
        b"QFI\xfb",
        b"\x00" * HEADER_BYTES,
        b"QFI\xfb" + (9).to_bytes(4, "big") + bytes(96),
        b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(96),
        b"QFI\xfb" + (3).to_bytes(4, "big") + bytes(12) + (16).to_bytes(4, "big") + bytes(50),
    ],
)
def test_what_is_no_qcow2_header_is_refused(head: bytes) -> None:
    with pytest.raises(StorageError):
        parse_header(head)
