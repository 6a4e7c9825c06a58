"""How fast the way to another node is, and how that is known, best first:

1. the last finished migrations between the two nodes: their iterations, as the store keeps them
2. what the interface of this node's migration address says, where it is a real one: a veth or a
   tap calls itself 10 Gbit/s, whatever it carries
3. a probe (`link_probe`), which takes up to half a second of the link
"""

from __future__ import annotations

import asyncio
import fcntl
import ipaddress
import socket
import statistics
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from migrator.figures import LinkOrigin, LinkSpeed
from migrator.model import Migration, MigrationState, PassKind
from migrator.policy import throughput

_MIGRATIONS_MAX: Final = 5
_BYTES_MIN: Final = 4 * 1024 * 1024
"""A smaller migration measures latency, not throughput."""
_LINE_SHARE: Final = 0.94
"""What Ethernet, IP and TCP leave of the line rate: 1448 of 1538 bytes a frame."""
_ENGINE_BYTES_PER_S: Final = 2.1e9
"""No faster than memory can be received (ARCHITECTURE: "The page engine")."""
_NET: Final = Path("/sys/class/net")
_SIOCGIFADDR: Final = 0x8915
"""linux/sockios.h"""
_found_at: Final[dict[bytes, str]] = {}
"""Where an address was found last; of those asked for, so of one or two."""


def of_migrations(
    migrations: Sequence[Migration], source: str, destination: str
) -> LinkSpeed | None:
    """By migrations that were not capped; those the other way round count where no others are.

    `migrations` newest first. None if there are none between the two nodes.
    """
    for way in ((source, destination), (destination, source)):
        found = [
            each
            for each in migrations
            if (each.source, each.destination) == way
            and each.state is MigrationState.COMPLETED
            and each.request.bandwidth_bytes_per_s is None
            and sum(one.bytes_sent for one in each.iterations) >= _BYTES_MIN
        ][:_MIGRATIONS_MAX]
        if found:
            # Of two, the better one: what a busy host adds once is no property of the link.
            return LinkSpeed(
                bytes_per_s=statistics.median(
                    throughput([one for one in each.iterations if one.kind is not PassKind.FINAL])
                    for each in found
                ),
                origin=LinkOrigin.MIGRATIONS,
                detail=f"the last {len(found)} from {way[0]} to {way[1]}",
                overhead_s=_overhead_s(found),
                fixed_blackout_ms=statistics.median_low(_fixed_blackout_ms(each) for each in found),
            )
    return None


def _overhead_s(migrations: Sequence[Migration]) -> float | None:
    """Beside iterations and blackouts. A post-copy takes time of its own: only others tell."""
    found = []
    for each in migrations:
        if any(one.kind is PassKind.MISSING for one in each.iterations):
            continue
        passes_s = sum(
            one.seconds + one.scan_seconds
            for one in each.iterations
            if one.kind is not PassKind.FINAL
        )
        blackout_s = (each.blackout_ms or 0.0) / 1e3
        found.append(max(0.0, (each.total_s or 0.0) - passes_s - blackout_s))
    return statistics.median_low(found) if found else None


def _fixed_blackout_ms(migration: Migration) -> float:
    pages_ms = sum(
        each.seconds * 1e3 for each in migration.iterations if each.kind is PassKind.FINAL
    )
    return max(0.0, (migration.blackout_ms or 0.0) - pages_ms)


async def of_interface(address: str) -> LinkSpeed | None:
    """By the interface that has `address` here. None if it doesn't say, or is a virtual one."""
    return await asyncio.to_thread(interface_speed, address)


def interface_speed(address: str, net: Path = _NET) -> LinkSpeed | None:
    """As `of_interface`; blocks for some microseconds. IPv4 only: others aren't found."""
    try:
        wanted = ipaddress.IPv4Address(address).packed
    except ValueError:
        return None
    name = _interface_with(wanted)
    mbit_per_s = None if name is None else real_speed_mbit_per_s(net, name)
    if mbit_per_s is None:
        return None
    return LinkSpeed(
        bytes_per_s=min(mbit_per_s * 1e6 / 8 * _LINE_SHARE, _ENGINE_BYTES_PER_S),
        origin=LinkOrigin.INTERFACE,
        detail=f"{name}: {mbit_per_s} Mbit/s",
    )


def interface_bytes_per_s(address: str) -> float | None:
    """The speed alone; see `interface_speed`."""
    found = interface_speed(address)
    return None if found is None else found.bytes_per_s


def _interface_with(address: bytes) -> str | None:
    """Its name. Listing all waits for the kernel's lock of links, and holds Python's meanwhile."""
    known = _found_at.get(address)
    if known is None or _address_of(known) != address:
        every = (name for _, name in socket.if_nameindex())
        known = next((name for name in every if _address_of(name) == address), None)
    if known is not None:
        _found_at[address] = known
    return known


def _address_of(interface: str) -> bytes | None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            answer = fcntl.ioctl(sock, _SIOCGIFADDR, struct.pack("=16s24x", interface.encode()))
        except OSError:
            return None
    return bytes(answer[20:24])


def real_speed_mbit_per_s(net: Path, name: str, depth: int = 4) -> int | None:
    """Of a network card or a bond; of what lies on one of them alone (VLAN, bridge): its speed."""
    folder = net / name
    if (folder / "device").exists() or (folder / "bonding").exists():
        try:
            speed = int((folder / "speed").read_text())
        except (OSError, ValueError):  # EINVAL while the link is down.
            return None
        return speed if 0 < speed < 10_000_000 else None
    lower = [path.name.removeprefix("lower_") for path in folder.glob("lower_*")]
    speeds = [real_speed_mbit_per_s(net, each, depth - 1) for each in lower] if depth else []
    real = [speed for speed in speeds if speed is not None]
    return real[0] if len(real) == 1 else None
