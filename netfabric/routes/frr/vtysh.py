"""FRR's shell: commands in, JSON or nothing out. Bounded; one at a time."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Final

import msgspec

from migrator.errors import FabricError
from migrator.ports import Struct

TIMEOUT_S: Final = 10.0
_REFUSALS: Final = ("% ", "vtysh: ", "Exiting: ")
_OUTPUT_BYTES_MAX: Final = 16 * 1024**2


class BgpPath(Struct, frozen=True):
    """One path to a prefix, as `show bgp ... json` has it."""

    sourced: bool = False
    """This node's own."""
    locPrf: int = 0  # noqa: N815 - FRR's name
    bestpath: _Best | None = None
    nexthops: tuple[_NextHop, ...] = ()


class _NextHop(Struct, frozen=True):
    ip: str = ""


class _Best(Struct, frozen=True):
    overall: bool = False


class BgpPrefix(Struct, frozen=True):
    paths: tuple[BgpPath, ...] = ()

    @property
    def best(self) -> BgpPath | None:
        for path in self.paths:
            if path.bestpath is not None and path.bestpath.overall:
                return path
        return None


class _Peer(Struct, frozen=True):
    state: str = ""


class BgpFamily(Struct, frozen=True):
    """One address family in `show bgp summary json`."""

    as_: int = msgspec.field(name="as", default=0)
    peers: dict[str, _Peer] = msgspec.field(default_factory=dict)

    @property
    def established(self) -> list[str]:
        """The neighbours that are up."""
        return [name for name, peer in self.peers.items() if peer.state == "Established"]


class EvpnNetwork(Struct, frozen=True):
    """What zebra says of a VXLAN network identifier; nothing of one that it doesn't know."""

    type: str = ""
    state: str = ""
    vrf: str = ""


class Vtysh:
    """The daemons whose sockets are in `directory`. Errors: FabricError."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._turn = asyncio.Lock()

    async def run(self, commands: Sequence[str]) -> str:
        """What they print. FabricError: FRR doesn't run here, or refuses one of them."""
        program = shutil.which("vtysh")
        if program is None:
            raise FabricError("frr: vtysh isn't installed (Debian: frr)")
        arguments = [part for command in commands for part in ("-c", command)]
        async with self._turn:
            process = await asyncio.create_subprocess_exec(
                *(program, "--vty_socket", str(self._directory), *arguments),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=asyncio.subprocess.STDOUT,
            )
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    raw, _ = await process.communicate()
            except TimeoutError as error:
                raise FabricError(f"frr: no answer within {TIMEOUT_S:g} s") from error
            finally:
                if process.returncode is None:
                    with contextlib.suppress(ProcessLookupError):
                        process.kill()
                    await process.wait()
        text = raw[:_OUTPUT_BYTES_MAX].decode(errors="replace")
        refused = [line for line in text.splitlines() if line.startswith(_REFUSALS)]
        if process.returncode or refused:
            reason = refused[0] if refused else text.strip() or f"status {process.returncode}"
            raise FabricError(f"frr: {reason}")
        return text

    async def system_number(self) -> int:
        """The AS of this node's BGP. FabricError: it has none."""
        families = await self.families()
        number = next((family.as_ for family in families.values() if family.as_), 0)
        if not number:
            raise FabricError("frr: bgpd has no `router bgp` with a neighbour")
        return number

    async def families(self) -> dict[str, BgpFamily]:
        """By name (ipv4Unicast, ipv6Unicast, l2VpnEvpn), those that have a neighbour."""
        text = await self.run(["show bgp summary json"])
        try:
            return msgspec.json.decode(text or "{}", type=dict[str, BgpFamily])
        except msgspec.MsgspecError as error:
            raise FabricError(f"frr: bgpd says {text.strip()[:80]!r}") from error

    async def evpn_network(self, identifier: int) -> EvpnNetwork:
        text = await self.run([f"show evpn vni {identifier} json"])
        try:
            return msgspec.json.decode(text or "{}", type=EvpnNetwork)
        except msgspec.MsgspecError as error:
            raise FabricError(f"frr: zebra says {text.strip()[:80]!r}") from error

    async def bgp_configuration(self) -> list[str]:
        """The lines of bgpd's running configuration."""
        return (await self.run(["show running-config bgpd"])).splitlines()

    async def prefix(self, version: int, prefix: str) -> BgpPrefix:
        """The paths that bgpd knows to a prefix."""
        family = "ipv4" if version == 4 else "ipv6"
        text = await self.run([f"show bgp {family} unicast {prefix} json"])
        try:
            return msgspec.json.decode(text or "{}", type=BgpPrefix)
        except msgspec.MsgspecError as error:
            raise FabricError(f"frr: bgpd says {text.strip()[:80]!r}") from error
