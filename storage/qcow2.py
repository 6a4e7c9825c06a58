"""The head of a qcow2 image, read without asking anybody what format it is. Pure.

Layout: QEMU's docs/interop/qcow2.txt, "Header"; every number is big-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import BinaryIO, Final

from migrator.errors import StorageError

HEADER_BYTES: Final = 104
"""Version 3's header without its extensions; version 2 uses the first 72."""
MAGIC: Final = b"QFI\xfb"

_HEADER: Final = struct.Struct(">4sIQIIQ")
_INCOMPATIBLE_OFFSET: Final = 72
_EXTERNAL_DATA_FILE: Final = 1 << 2
_BACKING_BYTES_MAX: Final = 1023
_CLUSTER_BITS: Final = range(9, 22)


@dataclass(frozen=True, slots=True)
class Qcow2Header:
    """What Ferry needs of it."""

    version: int
    capacity_bytes: int
    cluster_bytes: int
    backing_offset: int
    backing_bytes: int
    """Where the name of the file that it leans on stands, and its length; 0: there is none."""
    external_data: bool
    """Its data lies in another file."""

    @property
    def backing_file(self) -> bool:
        """It refers to another file, which a copy of this one would need too."""
        return self.backing_offset != 0


def is_qcow2(head: bytes) -> bool:
    """Whether the bytes begin as a qcow2 image does."""
    return head.startswith(MAGIC)


def parse_header(head: bytes) -> Qcow2Header:
    """Read the first HEADER_BYTES of an image. StorageError: not one, or of an unknown version."""
    if not is_qcow2(head):
        raise StorageError("not a qcow2 image: the magic number is missing")
    if len(head) < _INCOMPATIBLE_OFFSET:
        raise StorageError("not a qcow2 image: the header is cut short")
    _, version, backing_offset, backing_bytes, cluster_bits, capacity_bytes = _HEADER.unpack_from(
        head
    )
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
        backing_offset=backing_offset,
        backing_bytes=backing_bytes,
        external_data=bool(incompatible & _EXTERNAL_DATA_FILE),
    )


def read_backing_name(file: BinaryIO, header: Qcow2Header) -> str | None:
    """The name as it stands in the header, untrusted; None: it leans on nothing.

    StorageError for a name that can't be one.
    """
    if not header.backing_file:
        return None
    if not 0 < header.backing_bytes <= _BACKING_BYTES_MAX:
        raise StorageError(f"not a qcow2 image: a backing file of {header.backing_bytes} bytes")
    file.seek(header.backing_offset)
    try:
        return file.read(header.backing_bytes).decode()
    except UnicodeDecodeError as error:
        raise StorageError("the name of the qcow2 image's backing file is no text") from error
