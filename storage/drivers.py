"""Every storage driver by the name that the configuration gives it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from migrator.ports import VolumeDriver
from storage.directory import DirectoryPool
from storage.simulated import SimulatedPool

DRIVERS: Final[Mapping[str, type[VolumeDriver]]] = {
    "directory": DirectoryPool,
    "simulated": SimulatedPool,
}
