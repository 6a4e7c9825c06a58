"""Nodes that can be asked to join, found by zeroconf (`_ferry._tcp`, mDNS). It gives no right.

A member announces where its HTTPS API is. Whoever joins believes none of it: it checks the
authority's fingerprint, which its token carries, before it says anything. Interfaces are named by
their addresses: without a default route there is no default interface.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Sequence
from typing import Final

import ifaddr
from zeroconf import IPVersion, ServiceStateChange, Zeroconf
from zeroconf.asyncio import AsyncServiceBrowser, AsyncServiceInfo, AsyncZeroconf

from migrator.errors import PeerError, words
from migrator.ports import Struct

SERVICE: Final = "_ferry._tcp.local."
_CLUSTER: Final = "cluster"
_NODE: Final = "node"
_ASK_MS: Final = 3000
_SHOWN: Final = 8
"""So much of the fingerprint is in a node's announced name."""
OTHERS_MAX: Final = 64


class Found(Struct, frozen=True, kw_only=True):
    """What somebody announced. Unchecked."""

    node: str
    fingerprint: str
    """Of the cluster's authority, in hexadecimal."""
    host: str
    port: int


def local_addresses() -> list[str]:
    """The IPv4 addresses of this host's interfaces, loopback left out."""
    found = [
        str(address.ip)
        for adapter in ifaddr.get_adapters()
        for address in adapter.ips
        if isinstance(address.ip, str)
    ]
    return [text for text in found if not ipaddress.ip_address(text).is_loopback]


def announcing_addresses(host: str) -> list[str]:
    """Where a node that listens on `host` announces itself."""
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return local_addresses()
    if address.is_unspecified:
        return local_addresses()
    return [host] if address.version == 4 and not address.is_loopback else []


class Announcer:
    """Announces this node until it is closed."""

    def __init__(self, node: str, fingerprint: str, host: str, port: int) -> None:
        self._addresses = announcing_addresses(host)
        self._info = AsyncServiceInfo(
            SERVICE,
            f"{node}-{fingerprint[:_SHOWN]}.{SERVICE}",
            port=port,
            addresses=[ipaddress.ip_address(each).packed for each in self._addresses],
            properties={_NODE: node, _CLUSTER: fingerprint},
            server=f"{node}-{fingerprint[:_SHOWN]}.local.",
        )
        self._zeroconf: AsyncZeroconf | None = None

    async def open(self) -> None:
        """Begin. PeerError if multicast doesn't work here: others then need `--address`."""
        if not self._addresses:
            raise PeerError("this node listens on no IPv4 address that could be announced")
        try:
            self._zeroconf = AsyncZeroconf(interfaces=self._addresses, ip_version=IPVersion.V4Only)
            await self._zeroconf.async_register_service(self._info, allow_name_change=True)
        except (OSError, RuntimeError) as error:
            await self.close()
            raise PeerError(
                f"multicast doesn't work on {self._addresses}: {words(error)}"
            ) from error

    async def close(self) -> None:
        """Say good-bye. Idempotent."""
        if self._zeroconf is not None:
            zeroconf, self._zeroconf = self._zeroconf, None
            await zeroconf.async_close()


async def find(
    fingerprint: str,
    *,
    timeout_s: float,
    interfaces: Sequence[str] = (),
    others: set[str] | None = None,
) -> list[Found]:
    """Members of the cluster with this fingerprint, as soon as there is one; empty if none in time.

    Of other clusters' nodes nothing is asked, so that they cost no time; `others` gets their names,
    NODE-FINGERPRINT as far as they tell it. PeerError if multicast doesn't work here.
    """
    addresses = list(interfaces) or await asyncio.to_thread(local_addresses)
    if not addresses:
        raise PeerError("this host has no IPv4 address to look for other nodes on")
    arrived: asyncio.Queue[str] = asyncio.Queue(maxsize=64)
    seen = others if others is not None else set[str]()

    def changed(
        zeroconf: Zeroconf, service_type: str, name: str, state_change: ServiceStateChange
    ) -> None:
        if state_change is not ServiceStateChange.Added:
            return
        if not is_of(name, fingerprint):
            if len(seen) < OTHERS_MAX:
                seen.add(name.removesuffix(f".{SERVICE}"))
        elif not arrived.full():
            arrived.put_nowait(name)

    try:
        zeroconf = AsyncZeroconf(interfaces=addresses, ip_version=IPVersion.V4Only)
    except (OSError, RuntimeError) as error:
        raise PeerError(
            f"multicast doesn't work on {', '.join(addresses)}: {words(error)}"
        ) from error
    browser = AsyncServiceBrowser(zeroconf.zeroconf, SERVICE, handlers=[changed])
    try:
        async with asyncio.timeout(timeout_s):
            while True:
                found = await _ask(zeroconf, await arrived.get())
                matching = [each for each in found if each.fingerprint == fingerprint]
                if matching:
                    return matching
    except TimeoutError:
        return []
    finally:
        await browser.async_cancel()
        await zeroconf.async_close()


def is_of(name: str, fingerprint: str) -> bool:
    """Whether an announced name may be of that cluster. A second one of a name has a number."""
    return f"-{fingerprint[:_SHOWN]}" in name


async def _ask(zeroconf: AsyncZeroconf, name: str) -> list[Found]:
    info = AsyncServiceInfo(SERVICE, name)
    if not await info.async_request(zeroconf.zeroconf, _ASK_MS):
        return []
    properties = info.decoded_properties
    return [
        Found(
            node=properties.get(_NODE) or "",
            fingerprint=properties.get(_CLUSTER) or "",
            host=host,
            port=info.port or 0,
        )
        for host in info.parsed_addresses(IPVersion.V4Only)
    ]
