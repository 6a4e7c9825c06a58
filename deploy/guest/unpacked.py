"""A kernel's ELF image, taken out of its bzImage: what boots from it has nothing to unpack.

    vmlinuz:  boot sector | setup code | protected-mode code ( ... | payload | ... )
                                                                  └─ compressed vmlinux

Emulated (TCG), a guest spends most of its boot on its kernel's decompressor. QEMU starts an ELF
image through its PVH entry (`-kernel`, machines since 4.0), which an ELF note gives. Formats:
Documentation/arch/x86/boot.rst ("payload_offset"), include/xen/interface/elfnote.h.
"""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable, Mapping
from typing import Final

import lz4.block
import zstandard

_MAGIC_AT: Final = 0x202
_MAGIC: Final = b"HdrS"
_PROTOCOL_AT: Final = 0x206
_PROTOCOL_WITH_PAYLOAD: Final = 0x208
_SETUP_SECTORS_AT: Final = 0x1F1
_PAYLOAD_AT: Final = 0x248
_HEADER_BYTES: Final = 0x250
_SECTOR_BYTES: Final = 512

_ELF64: Final = b"\x7fELF\x02\x01"
_PROGRAM_HEADERS_AT: Final = 0x20
_PROGRAM_HEADER_COUNT_AT: Final = 0x36
_PROGRAM_HEADER_BYTES: Final = 56
_NOTES: Final = 4
"""PT_NOTE."""
_PVH_ENTRY: Final = 18
"""XEN_ELFNOTE_PHYS32_ENTRY."""

_LZ4_BLOCK_BYTES: Final = 8 * 1024**2
"""What a block holds at most, in LZ4's legacy frames, which the kernel's build makes."""


def _unpack_lz4(data: bytes) -> bytes:
    blocks = []
    at = len(_LZ4)
    while at + 8 <= len(data):  # Less is the length alone.
        (length,) = struct.unpack_from("<I", data, at)
        block = data[at + 4 : at + 4 + length]
        blocks.append(lz4.block.decompress(block, uncompressed_size=_LZ4_BLOCK_BYTES))
        at += 4 + length
    return b"".join(blocks)


_LZ4: Final = b"\x02\x21\x4c\x18"
_UNPACKERS: Final[Mapping[bytes, Callable[[bytes], bytes]]] = {
    _LZ4: _unpack_lz4,
    b"\xfd7zXZ\x00": lambda data: lzma.LZMADecompressor(lzma.FORMAT_XZ).decompress(data),
    b"\x28\xb5\x2f\xfd": lambda data: zstandard.ZstdDecompressor().decompressobj().decompress(data),
}
"""By how the payload begins. Behind it are four bytes, which all leave alone: its length."""


def unpacked(image: bytes) -> bytes | None:
    """The ELF image in a bzImage. None: there is none that could be booted."""
    if len(image) < _HEADER_BYTES or image[_MAGIC_AT : _MAGIC_AT + 4] != _MAGIC:
        return None
    (protocol,) = struct.unpack_from("<H", image, _PROTOCOL_AT)
    if protocol < _PROTOCOL_WITH_PAYLOAD:
        return None
    offset, length = struct.unpack_from("<II", image, _PAYLOAD_AT)
    begin = (image[_SETUP_SECTORS_AT] + 1) * _SECTOR_BYTES + offset
    payload = image[begin : begin + length]
    for magic, unpack in _UNPACKERS.items():
        if payload.startswith(magic):
            try:
                kernel = unpack(payload)
            except (lzma.LZMAError, zstandard.ZstdError, lz4.block.LZ4BlockError):
                return None
            return kernel if has_pvh_entry(kernel) else None
    return None


def has_pvh_entry(kernel: bytes) -> bool:
    """Whether it is an ELF image that says where a hypervisor enters it."""
    if not kernel.startswith(_ELF64):
        return False
    try:
        (table,) = struct.unpack_from("<Q", kernel, _PROGRAM_HEADERS_AT)
        (count,) = struct.unpack_from("<H", kernel, _PROGRAM_HEADER_COUNT_AT)
        for index in range(count):
            at = table + index * _PROGRAM_HEADER_BYTES
            (kind,) = struct.unpack_from("<I", kernel, at)
            (begin,) = struct.unpack_from("<Q", kernel, at + 8)
            (length,) = struct.unpack_from("<Q", kernel, at + 32)
            if kind == _NOTES and _holds_entry(kernel[begin : begin + length]):
                return True
    except struct.error:
        return False
    return False


def _holds_entry(notes: bytes) -> bool:
    at = 0
    while at + 12 <= len(notes):
        name_bytes, value_bytes, kind = struct.unpack_from("<III", notes, at)
        name = notes[at + 12 : at + 12 + name_bytes]
        if kind == _PVH_ENTRY and name == b"Xen\0":
            return True
        at += 12 + (name_bytes + 3) // 4 * 4 + (value_bytes + 3) // 4 * 4
    return False
