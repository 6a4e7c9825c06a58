"""The node's FRR announces its guests' addresses by BGP, and the newest announcement wins.

    prepare        network 10.0.0.5/32 route-map ferry-1008      (not announced: no such route here)
    open_arrival   the kernel's route to the tap   ──► zebra ──► bgpd announces it
    leads_away     the best path is another node's
    withdraw       no network 10.0.0.5/32                        at the old node

For a moment two nodes announce one address. The route map gives each announcement a local
preference of one more than the highest that was known of the address, as EVPN's MAC mobility does
(RFC 7432, section 15), and a metric (MED) of one less for peers of another AS; so whoever hears
both takes the new one, in whatever order they come. What bgpd announces itself has a weight that
no preference outweighs; it is taken from it. So bgpd at the old node prefers the new one, too, and
announces its own no more, as soon as it hears of it; the driver withdraws it when that is seen.

By EVPN it is all the same: with `advertise ipv4 unicast` bgpd makes a type-5 route (RFC 9136) of
each best path that is its own, with its preference, and enters those of others beside them.

`bgp network import-check`, which the driver switches on, makes bgpd announce exactly what the
kernel routes to a tap (or, at the old node, into the tunnel): no shell needs to run in the moments
in which a guest stands still, and a guest that dies is withdrawn with its tap.

A bgpd that is restarted has forgotten it all: the driver holds a connection to its shell's socket,
hears of its end, and tells the next one.

The daemons, their neighbours and filters are the operator's. Belongs to one event loop.
"""

from __future__ import annotations

import asyncio
import ipaddress
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar, Final

from migrator.errors import FabricError
from migrator.ports import RouteDriver
from netfabric.routes.frr import reach
from netfabric.routes.frr.vtysh import BgpPrefix, Vtysh

BASE: Final = 1000
"""Local preferences up to here are other people's."""
METRIC_TOP: Final = 1 << 31
AGAIN_S: Final = 1.0
"""A bgpd that is away is looked for so often."""

log = logging.getLogger(__name__)


class FrrRoutes(RouteDriver):
    """See the module. Errors: FabricError."""

    name: ClassVar[str] = "frr"

    def __init__(self, vty_directory: Path, identifier: int | None = None) -> None:
        """`identifier`: of EVPN's VXLAN, where that carries the guests' packets."""
        self._vtysh = Vtysh(vty_directory)
        self._socket = vty_directory / "bgpd.vty"
        self._keeping: asyncio.Task[None] | None = None
        self._doubtful = asyncio.Event()
        self._identifier = identifier
        self._system = 0
        self._announced: dict[str, int] = {}
        """Prefix: the preference that this node announces it with; 0 if an earlier agent knew."""

    async def open(self) -> None:
        self._system = await self._vtysh.system_number()
        await self._configure(["bgp network import-check"])
        if self._keeping is None:
            self._keeping = asyncio.create_task(self._keep(), name="bgpd is told again")

    def hold(self, addresses: Sequence[str]) -> None:
        """bgpd has gone on announcing them."""
        for prefix, _ in map(prefix_of, addresses):
            self._announced.setdefault(prefix, 0)
        self._doubtful.set()

    async def cut_off(self, addresses: Sequence[str]) -> str:
        try:
            versions = {prefix_of(text)[1] for text in addresses}
            return await reach.cut_off(self._vtysh, versions, self._identifier)
        except FabricError as error:
            return str(error)

    async def prepare(self, addresses: Sequence[str]) -> None:
        for text in addresses:
            prefix, version = prefix_of(text)
            preference = next_preference(await self._vtysh.prefix(version, prefix))
            await self._say(prefix, version, preference)
            self._announced[prefix] = preference

    def lead_here_now(self, addresses: Sequence[str]) -> float | None:
        """bgpd has said so since the port was opened: nothing is left to do."""
        known = all(prefix_of(text)[0] in self._announced for text in addresses)
        return time.time() if known and addresses else None

    async def lead_here(self, addresses: Sequence[str]) -> None:
        new = [text for text in addresses if prefix_of(text)[0] not in self._announced]
        if new:
            await self.prepare(new)
        for text in addresses:
            prefix, version = prefix_of(text)
            best = (await self._vtysh.prefix(version, prefix)).best
            if best is None:
                raise FabricError(f"frr: bgpd doesn't announce {prefix} yet")
            if not best.sourced:
                raise FabricError(f"frr: another node's announcement of {prefix} is preferred")

    async def leads_away(self, addresses: Sequence[str]) -> bool:
        for text in addresses:
            prefix, version = prefix_of(text)
            best = (await self._vtysh.prefix(version, prefix)).best
            if best is not None and best.sourced:
                return False
        return True

    async def hop_of(self, address: str) -> str | None:
        prefix, version = prefix_of(address)
        best = (await self._vtysh.prefix(version, prefix)).best
        if best is None or best.sourced or not best.nexthops:
            return None
        return best.nexthops[0].ip or None

    async def withdraw(self, addresses: Sequence[str]) -> None:
        for text in addresses:
            prefix, version = prefix_of(text)
            preference = self._announced.pop(prefix, None)
            if preference is None:
                continue
            try:
                await self._configure(
                    [f"address-family {_family(version)} unicast", f"no network {prefix}"]
                )
                if preference and preference not in self._announced.values():
                    await self._vtysh.run(
                        ["configure terminal", f"no route-map ferry-{preference}"]
                    )
            except FabricError as error:
                log.warning("%s is announced on: %s", prefix, error)
            except asyncio.CancelledError:
                self._announced.setdefault(prefix, preference)  # To be withdrawn yet.
                raise

    async def close(self) -> None:
        """bgpd announces on: the guests go on."""
        if self._keeping is not None:
            self._keeping.cancel()
            await asyncio.wait({self._keeping})
            self._keeping = None

    async def _say(self, prefix: str, version: int, preference: int) -> None:
        name = f"ferry-{preference}"
        await self._vtysh.run(
            [
                "configure terminal",
                f"route-map {name} permit 10",
                f"set local-preference {preference}",
                f"set metric {METRIC_TOP - preference}",
                "set weight 0",
                "exit",
                f"router bgp {self._system}",
                f"address-family {_family(version)} unicast",
                f"network {prefix} route-map {name}",
            ]
        )

    async def _keep(self) -> None:
        """bgpd forgets what it was told when it is restarted: it is told again. Until `close`."""
        while True:
            try:
                reader, writer = await asyncio.open_unix_connection(self._socket)
            except OSError:
                await asyncio.sleep(AGAIN_S)
                continue
            try:
                await self._tell_again(reader)
            except (FabricError, OSError) as error:
                log.warning("what bgpd announces isn't known: %s", error)
            finally:
                writer.close()
            await asyncio.sleep(AGAIN_S)

    async def _tell_again(self, reader: asyncio.StreamReader) -> None:
        """Whenever there is a doubt, until bgpd ends the connection."""
        gone = asyncio.create_task(reader.read())
        try:
            while not gone.done():
                self._doubtful.clear()
                await self._say_missing()
                doubt = asyncio.create_task(self._doubtful.wait())
                await asyncio.wait({gone, doubt}, return_when=asyncio.FIRST_COMPLETED)
                doubt.cancel()
        finally:
            gone.cancel()

    async def _say_missing(self) -> None:
        said = [line.strip() for line in await self._vtysh.bgp_configuration()]
        if "router bgp" not in " ".join(said):
            raise FabricError("frr: bgpd isn't configured yet")
        await self._configure(["bgp network import-check"])
        for prefix, known in list(self._announced.items()):
            here = f"network {prefix} "
            if any(f"{line} ".startswith(here) for line in said) or prefix not in self._announced:
                continue
            version = 6 if ":" in prefix else 4
            found = known or next_preference(await self._vtysh.prefix(version, prefix))
            await self._say(prefix, version, found)
            log.warning("bgpd didn't announce %s any more: it was told again", prefix)

    async def _configure(self, commands: Sequence[str]) -> None:
        await self._vtysh.run(["configure terminal", f"router bgp {self._system}", *commands])


def prefix_of(text: str) -> tuple[str, int]:
    """The host route's prefix, as bgpd writes it, and its IP version. FabricError."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError as error:
        raise FabricError(f"{text!r} is not an IPv4 or IPv6 address") from error
    return f"{address}/{address.max_prefixlen}", address.version


def next_preference(known: BgpPrefix) -> int:
    """One more than the highest that anybody announces it with. Pure."""
    return max([BASE, *(path.locPrf for path in known.paths if path.locPrf < METRIC_TOP)]) + 1


def _family(version: int) -> str:
    return "ipv4" if version == 4 else "ipv6"
