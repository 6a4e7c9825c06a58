"""The head of a qcow2 image, read without asking anybody what format it is. Pure.

Layout: QEMU's docs/interop/qcow2.txt, "Header"; every number is big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Final

from migrator.errors import StorageError

HEADER_BYTES: Final = 104
"""Version 3's header without its extensions; version 2 uses the first 72."""
MAGIC: Final = b"QFI\xfb"

_HEADER: Final = struct.Struct(">4sIQIIQ")
_INCOMPATIBLE_OFFSET: Final = 72
_EXTERNAL_DATA_FILE: Final = 1 << 2
_CLUSTER_BITS: Final = range(9, 22)


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """What Ferry needs of it."""

    version: int
    capacity_bytes: int
    cluster_bytes: int
    backing_file: bool
    """It refers to another file, which a copy of this one would need too."""
    external_data: bool
    """Its data lies in another file."""


def is_qcow2(head: bytes) -> bool:
    """Whether the bytes begin as a qcow2 image does."""
    return head.startswith(MAGIC)


def parse_header(head: bytes) -> Qcow2Header:
    """Read the first HEADER_BYTES of an image. StorageError: not one, or of an unknown version."""
    if not is_qcow2(head):
        raise StorageError("not a qcow2 image: the magic number is missing")
    if len(head) < _INCOMPATIBLE_OFFSET:
        raise StorageError("not a qcow2 image: the header is cut short")
    _, version, backing_offset, _, cluster_bits, capacity_bytes = _HEADER.unpack_from(head)
    if version not in (2, 3):
        raise StorageError(f"qcow2 version {version} is not supported: 2 and 3 are")
    if cluster_bits not in _CLUSTER_BITS:
        raise StorageError(f"not a qcow2 image: clusters of 2^{cluster_bits} bytes")
    incompatible = 0
    if version == 3:
        if len(head) < _INCOMPATIBLE_OFFSET + 8:
            raise StorageError("not a qcow2 image: the header is cut short")
        (incompatible,) = struct.unpack_from(">Q", head, _INCOMPATIBLE_OFFSET)
    return Qcow2Header(
        version=version,
        capacity_bytes=capacity_bytes,
        cluster_bytes=1 << cluster_bits,
        backing_file=backing_offset != 0,
        external_data=bool(incompatible & _EXTERNAL_DATA_FILE),
    )
