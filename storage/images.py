"""What an image that a user names really is, before a byte of it is copied. Synchronous.

Nobody is asked to guess a format: the user says it, and the file is held against it. A raw image
that begins as a qcow2 one does is refused too: some tool would take it for one later, and open
whatever file its header names.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from migrator.errors import InvalidRequest, StorageError
from migrator.model import DiskFormat
from storage.qcow2 import HEADER_BYTES, is_qcow2, parse_header


def image_capacity(image: Path, format: DiskFormat) -> int:
    """The image's size as a guest sees it (bytes). InvalidRequest if it isn't what was said.

    OSError where it can't be read.
    """
    try:
        # Not blocking: what is no file, but a pipe, would wait for a writer.
        fd = os.open(image, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise InvalidRequest(f"there is no image {image}", {"image": "an existing file"}) from error
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise InvalidRequest(f"image {image} is no file", {"image": "a regular file"})
        head = os.pread(fd, HEADER_BYTES, 0)
    finally:
        os.close(fd)
    if format is DiskFormat.RAW:
        if is_qcow2(head):
            raise InvalidRequest(f"image {image} is qcow2, not raw", {"format": "qcow2"})
        return status.st_size
    try:
        header = parse_header(head)
    except StorageError as error:
        raise InvalidRequest(f"image {image}: {error}", {"image": "a qcow2 image"}) from error
    if header.backing_file or header.external_data:
        raise InvalidRequest(
            f"image {image} leans on another file: flatten it first (qemu-img convert)",
            {"image": "a qcow2 image without a backing file or external data"},
        )
    return header.capacity_bytes
