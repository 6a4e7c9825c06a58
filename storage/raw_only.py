"""What the drivers whose volumes are raw, and nothing but raw, check before they make one."""

from __future__ import annotations

from pathlib import Path

from migrator.errors import InvalidRequest
from migrator.model import DiskFormat, VolumeName
from storage.bounded import bounded
from storage.images import image_capacity
from storage.names import (
    capacity_below_image,
    check_capacity,
    check_volume_name,
    linked_unsupported,
)


async def check_new(
    where: str,
    volume: VolumeName,
    *,
    capacity_bytes: int,
    format: DiskFormat,
    image: Path | None,
    why_raw: str,
) -> None:
    """InvalidRequest names the field and what is right; StorageError: the image can't be read.

    `where` ("pool web") begins the messages.
    """
    check_volume_name(volume)
    check_capacity(volume, capacity_bytes)
    if format is not DiskFormat.RAW:
        right = f"raw, not {format}: {why_raw}"
        raise InvalidRequest(
            f"{where}: format must be {right}; nothing was made", {"format": "raw"}
        )
    if image is not None:
        image_bytes = await bounded(lambda: image_capacity(image, format), where)
        if capacity_bytes < image_bytes:
            raise capacity_below_image(volume, capacity_bytes, image_bytes)


def check_clone(driver: str, volume: VolumeName, new: VolumeName, *, linked: bool) -> None:
    """InvalidRequest: a bad name, or an overlay, which a raw volume can't be."""
    check_volume_name(volume)
    check_volume_name(new)
    if linked:
        raise linked_unsupported(driver)
