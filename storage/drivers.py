"""Every storage driver by the name that a pool's settings give it, and how a pool gets one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from migrator.errors import InvalidRequest
from migrator.model import NodeName, PoolName
from migrator.ports import VolumeDriver
from storage.block import BlockPool, make_block_pool
from storage.directory import DirectoryPool
from storage.iscsi import IscsiPool, make_iscsi_pool
from storage.nbd import NbdPool
from storage.nfs import NfsPool
from storage.settings import (
    BlockSettings,
    DirectorySettings,
    IscsiSettings,
    NbdSettings,
    NfsSettings,
    PoolSettings,
    SimulatedSettings,
)
from storage.simulated import SimulatedPool

DRIVERS: Final[Mapping[str, type[VolumeDriver]]] = {
    "directory": DirectoryPool,
    "nbd": NbdPool,
    "nfs": NfsPool,
    "iscsi": IscsiPool,
    "block": BlockPool,
    "simulated": SimulatedPool,
}

_MAKERS: Final[Mapping[type[Any], Callable[[Any, NodeName, Path], VolumeDriver]]] = {
    DirectorySettings: lambda it, node, _: DirectoryPool(PoolName(it.name), Path(it.path)),
    NbdSettings: lambda it, node, _: NbdPool(it, node),
    NfsSettings: lambda it, node, _: NfsPool(it, node),
    IscsiSettings: lambda it, node, _: make_iscsi_pool(it, node),
    BlockSettings: make_block_pool,
}


def make_pool(settings: PoolSettings, node: NodeName, state_directory: Path) -> VolumeDriver:
    """The driver of one pool on `node`. It may keep files below `state_directory`. No I/O.

    InvalidRequest: the settings contradict each other, or are of a pool that only tests have.
    """
    if isinstance(settings, SimulatedSettings):
        right = "a driver that keeps what it is given: simulated is for tests"
        raise InvalidRequest(f"pool {settings.name}: driver must be {right}", {"driver": right})
    return _MAKERS[type(settings)](settings, node, state_directory)
