"""Volume names as every storage driver takes them."""

from __future__ import annotations

import msgspec

from migrator.errors import InvalidRequest
from migrator.model import FileName, VolumeName

SECTOR_BYTES = 512


def check_volume_name(volume: VolumeName) -> None:
    """InvalidRequest unless the name is one that can't leave its pool (`model.FileName`)."""
    try:
        msgspec.convert(volume, FileName)
    except msgspec.ValidationError as error:
        raise InvalidRequest(f"volume name {volume!r}: {error}", {"volume": str(error)}) from error


def check_capacity(volume: VolumeName, capacity_bytes: int) -> None:
    """InvalidRequest unless the capacity is a positive number of whole sectors."""
    if capacity_bytes > 0 and capacity_bytes % SECTOR_BYTES == 0:
        return
    reason = f"a positive multiple of {SECTOR_BYTES}"
    raise InvalidRequest(
        f"volume {volume}: capacity_bytes is {capacity_bytes}, it must be {reason}",
        {"capacity_bytes": reason},
    )


def capacity_below_image(
    volume: VolumeName, capacity_bytes: int, image_bytes: int
) -> InvalidRequest:
    """The error for a capacity that would cut the image short."""
    return InvalidRequest(
        f"volume {volume}: capacity_bytes is {capacity_bytes}, the image holds {image_bytes}",
        {"capacity_bytes": f"at least {image_bytes}"},
    )


def check_growth(volume: VolumeName, present_bytes: int, capacity_bytes: int) -> None:
    """InvalidRequest unless the capacity is right and not less than what the volume has."""
    check_capacity(volume, capacity_bytes)
    if capacity_bytes >= present_bytes:
        return
    raise InvalidRequest(
        f"volume {volume} holds {present_bytes} bytes; it was not cut to {capacity_bytes}",
        {"capacity_bytes": f"at least {present_bytes}: a volume only grows"},
    )


def linked_unsupported(driver: str) -> InvalidRequest:
    """The error for a linked clone where a pool has none."""
    return InvalidRequest(
        f"a pool of driver {driver} has no linked clones; nothing was made",
        {"linked": "false: a full copy"},
    )
