"""What a domain's start needs to find on its node: boot files, volumes, bridges, its CPU model.

A hypervisor would say it in words of its own, and only once it was started. So it is asked before:
by a start, a takeover and a migration's destination, which are refused, and by whoever defines the
domain, who is told and no more: it may be meant for another node, or its volumes made later.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Final

from migrator.errors import FerryError, words
from migrator.model import DomainSpec, KernelBoot, PoolName, VolumeName
from migrator.own_threads import in_own_thread
from migrator.ports import FabricDriver, HypervisorDriver, VolumeDriver

FILES_S: Final = 3.0
"""For a look at files, which may be a file server's: less than `manager.INSPECT_S`."""


async def boot_troubles(spec: DomainSpec) -> dict[str, str]:
    """By field of the spec, why it can't be booted here; {}: it can. Changes nothing."""
    if not isinstance(spec.boot, KernelBoot):
        return {}
    files = {"boot.kernel": spec.boot.kernel}
    if spec.boot.initrd is not None:
        files["boot.initrd"] = spec.boot.initrd
    try:
        async with asyncio.timeout(FILES_S):
            found = await in_own_thread(
                "boot files", lambda: {field: _trouble_of(path) for field, path in files.items()}
            )
    except TimeoutError:
        return {
            field: f"{path} gives no answer within {FILES_S:g} s (its storage hangs?)"
            for field, path in files.items()
        }
    except OSError as error:
        return {"boot.kernel": f"{spec.boot.kernel} can't be looked at: {words(error)}"}
    return {field: trouble for field, trouble in found.items() if trouble}


def _trouble_of(path: str) -> str:
    try:
        if Path(path).is_file():
            return ""
        return f"{path} is no file" if Path(path).exists() else f"{path} is not there"
    except OSError as error:
        return f"{path} can't be looked at: {words(error)}"


async def volume_troubles(
    spec: DomainSpec, pools: Mapping[PoolName, VolumeDriver]
) -> dict[str, str]:
    """By field, why this node can't use its volumes now; {}: it can. Pools that are unknown here
    aren't looked at: a definition is refused for them.
    """
    known = [
        (f"disks[{index}].volume", pools[PoolName(disk.pool)], disk)
        for index, disk in enumerate(spec.disks)
        if PoolName(disk.pool) in pools
    ]
    looks = (_volume_trouble(pool, VolumeName(disk.volume)) for _, pool, disk in known)
    found = await asyncio.gather(*looks)
    return {field: trouble for (field, _, _), trouble in zip(known, found, strict=True) if trouble}


async def _volume_trouble(pool: VolumeDriver, volume: VolumeName) -> str:
    try:
        async with asyncio.timeout(FILES_S):
            await pool.inspect(volume)
    except TimeoutError:
        return f"volume {volume}: its storage gives no answer within {FILES_S:g} s"
    except FerryError as error:
        return str(error)
    return ""


async def host_troubles(
    spec: DomainSpec, hypervisor: HypervisorDriver, fabric: FabricDriver
) -> dict[str, str]:
    """By field, what this node's hypervisor and network lack for it; {}: nothing, or who knows."""
    found: dict[str, str] = {}
    with contextlib.suppress(FerryError):
        own = await hypervisor.capabilities()
        model = spec.cpu_model.partition(",")[0]
        if model not in own.cpu_models:
            found["cpu_model"] = f"its hypervisor ({own.version}) has no CPU model {model}"
    for index, nic in enumerate(spec.nics):
        with contextlib.suppress(FerryError):
            if reasons := await fabric.check(nic):
                found[f"nics[{index}]"] = "; ".join(reasons)
    return found
