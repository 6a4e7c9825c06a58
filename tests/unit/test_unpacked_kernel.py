"""A kernel's ELF image out of its bzImage, where there is one that QEMU can boot."""

from __future__ import annotations

import lzma
import struct
from collections.abc import Callable

import lz4.block
import pytest
import zstandard

from deploy.guest.unpacked import has_pvh_entry, unpacked

SETUP_SECTORS = 3
PAYLOAD_OFFSET = 77


def note(name: bytes, kind: int, value: bytes) -> bytes:
    padded = (part + b"\0" * (-len(part) % 4) for part in (name, value))
    return struct.pack("<III", len(name), len(value), kind) + b"".join(padded)


PVH = note(b"Xen\0", 18, struct.pack("<Q", 0x1000000))
OTHERS = note(b"GNU\0", 3, b"0123456789abcdef123") + note(b"Xen\0", 6, b"linux")


def elf(notes: bytes) -> bytes:
    """An ELF image with a segment of code and one of notes."""
    table, begin = 64, 64 + 2 * 56
    header = b"\x7fELF\x02\x01\x01".ljust(16, b"\0") + struct.pack(
        "<HHIQQQIHHHHHH", 2, 62, 1, 0, table, 0, 0, 64, 56, 2, 0, 0, 0
    )
    code = struct.pack("<IIQQQQQQ", 1, 5, 0, 0, 0, 0, 0, 4096)
    told = struct.pack("<IIQQQQQQ", 4, 4, begin, 0, 0, len(notes), len(notes), 4)
    return header + code + told + notes


def lz4_legacy(data: bytes) -> bytes:
    """As `lz4 -l` packs: blocks of 8 MiB, each behind its length."""
    packed = b"\x02\x21\x4c\x18"
    for at in range(0, len(data), 8 << 20):
        block = lz4.block.compress(data[at : at + (8 << 20)], store_size=False)
        packed += struct.pack("<I", len(block)) + block
    return packed


def bzimage(payload: bytes, *, protocol: int = 0x20F, magic: bytes = b"HdrS") -> bytes:
    """The payload is followed by its unpacked length, which the kernel's build adds."""
    payload += b"\x12\x34\x56\x78"
    image = bytearray((SETUP_SECTORS + 1) * 512)
    image[0x1F1] = SETUP_SECTORS
    image[0x202:0x206] = magic
    struct.pack_into("<H", image, 0x206, protocol)
    struct.pack_into("<II", image, 0x248, PAYLOAD_OFFSET, len(payload))
    return bytes(image) + b"c" * PAYLOAD_OFFSET + payload + b"more code"


@pytest.mark.parametrize(
    "pack",
    [
        lambda kernel: lzma.compress(kernel, check=lzma.CHECK_CRC32),
        zstandard.ZstdCompressor().compress,
        lz4_legacy,
    ],
    ids=["xz", "zstd", "lz4"],
)
def test_what_was_packed_comes_out(pack: Callable[[bytes], bytes]) -> None:
    kernel = elf(OTHERS + PVH) + b"code" * (3 << 20)
    assert unpacked(bzimage(pack(kernel))) == kernel


@pytest.mark.parametrize(
    "image",
    [
        b"",
        b"\x7fELF",
        bzimage(lzma.compress(elf(PVH)), magic=b"NOPE"),
        bzimage(lzma.compress(elf(PVH)), protocol=0x207),
        bzimage(b"\x1f\x8b" + elf(PVH)),
        bzimage(lzma.compress(elf(PVH))[:40] + b"damage" * 10),
        bzimage(lz4_legacy(elf(PVH))[:20] + b"damage" * 10),
        bzimage(lzma.compress(elf(OTHERS))),
        bzimage(lzma.compress(b"a program, not a kernel")),
    ],
    ids=["empty", "ELF", "no-magic", "old", "gzip", "damaged", "damaged-lz4", "no-entry", "no-ELF"],
)
def test_an_image_that_is_otherwise_is_left_as_it_is(image: bytes) -> None:
    assert unpacked(image) is None


def test_an_entry_is_found_behind_other_notes() -> None:
    assert has_pvh_entry(elf(OTHERS + PVH))
    assert not has_pvh_entry(elf(OTHERS))
    assert not has_pvh_entry(elf(note(b"Not\0", 18, b"\0" * 8)))
    assert not has_pvh_entry(elf(PVH)[:100])
    assert not has_pvh_entry(elf(OTHERS + PVH)[:-12])
