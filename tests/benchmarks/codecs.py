"""What each codec makes of a guest's memory: `python -m tests.benchmarks.codecs MEMORY`.

MEMORY is a file of it: /proc/PID/fd/N of a QEMU that runs, or a copy. It is read once. Prints, for
each of the ladder (`migrator.engine.codecs`): what is left of the frames that can be made smaller
at all, and how fast one core packs these and unpacks what came of them.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import numpy as np

from migrator.engine import codecs
from migrator.engine.kernel import populated_extents
from migrator.engine.packing_policy import PACK_BYTES_MAX, RAW_SHARE
from migrator.model import PAGE_SIZE_BYTES

_SIEVE: Final = codecs.LADDER[-1]


def frames_of(path: Path) -> list[memoryview]:
    """The memory without zero pages, as pieces of a frame's size."""
    kept: list[bytes] = []
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        for start, end in populated_extents(file.fileno(), size).tolist():
            data = os.pread(file.fileno(), end - start, start)
            pages = np.frombuffer(data, dtype=np.uint8).reshape(-1, PAGE_SIZE_BYTES)
            kept.append(pages[pages.any(axis=1)].tobytes())
    whole = memoryview(b"".join(kept))
    return [whole[at : at + PACK_BYTES_MAX] for at in range(0, len(whole), PACK_BYTES_MAX)]


def figures(codec: codecs.Codec, contents: Sequence[memoryview]) -> tuple[float, float, float]:
    """(what is left of a byte, bytes a second packed, bytes a second unpacked)."""
    total = sum(map(len, contents))
    began = time.thread_time()
    packed = [codecs.compress(codec, content) for content in contents]
    packing_s = time.thread_time() - began
    began = time.thread_time()
    for payload, content in zip(packed, contents, strict=True):
        codecs.decompress(codec.kind, memoryview(payload), len(content))
    unpacking_s = time.thread_time() - began
    return sum(map(len, packed)) / total, total / packing_s, total / unpacking_s


def main(arguments: Sequence[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m tests.benchmarks.codecs MEMORY", file=sys.stderr)
        return 2
    contents = frames_of(Path(arguments[0]))
    worth = [
        content
        for content in contents
        if len(codecs.compress(_SIEVE, content)) < RAW_SHARE * len(content)
    ]
    print(f"{len(worth)} of {len(contents)} frames can be made smaller")
    for codec in codecs.usable(codecs.FAMILIES) if worth else ():
        share, packing, unpacking = figures(codec, worth)
        print(
            f"{codec.name:12} {share:5.2f} left, {packing / 1e6:5.0f} MB/s packed,"
            f" {unpacking / 1e6:5.0f} MB/s unpacked"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
