"""A NIC's tap on a bridge of this node: in its VLAN, behind its filters, at its rates.

All of it is made before the hypervisor has the tap, so that no frame passes unfiltered.
Synchronous; belongs into a thread.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Collection
from dataclasses import dataclass

from migrator.errors import FabricError
from migrator.model import NicSpec
from netfabric import filters
from netfabric.bridge.links import Exits, find_exits, netlink
from netfabric.checks import mtu_reason, nic_reasons
from netfabric.frames import parse_mac
from netfabric.link_table import Link
from netfabric.taps import TAP_NAME, host_side_mac, open_tap

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Tap:
    """A tap of ours that exists now, and the bridge that it is a port of, if any."""

    name: str
    bridge: str | None


def reasons(nic: NicSpec) -> list[str]:
    """Why the NIC can't be plugged here; empty if it can. Changes nothing."""
    found = nic_reasons(nic) + filters.filter_reasons(nic)
    with netlink(f"can't look at bridge {nic.bridge}") as kernel:
        bridge = kernel.find(nic.bridge)
    return found + bridge_reasons(nic, bridge)


def bridge_reasons(nic: NicSpec, bridge: Link | None) -> list[str]:
    """What is against this bridge. Pure."""
    if bridge is None:
        return [f"there is no bridge {nic.bridge} here"]
    if bridge.kind != "bridge":
        return [f"{nic.bridge} is not a bridge, it is {bridge.kind or 'a physical interface'}"]
    found = [] if bridge.up else [f"bridge {nic.bridge} is down"]
    if nic.vlan is not None and not bridge.vlan_filtering:
        found.append(
            f"NIC {nic.mac} is to be in VLAN {nic.vlan}, but bridge {nic.bridge} isn't VLAN-aware"
            f" (ip link set {nic.bridge} type bridge vlan_filtering 1)"
        )
    narrow = mtu_reason(nic, bridge.mtu_bytes)
    return [*found, narrow] if narrow else found


def plug(tap: str, nic: NicSpec) -> tuple[int, Exits]:
    """The tap's descriptor, and where its announcements leave. FabricError: nothing is left."""
    with netlink(f"can't plug tap {tap} into bridge {nic.bridge}") as kernel:
        bridge = kernel.find(nic.bridge)
        found = nic_reasons(nic) + filters.filter_reasons(nic) + bridge_reasons(nic, bridge)
        if found or bridge is None:
            raise FabricError("; ".join(found))
        fd = open_tap(tap)
        try:
            link = kernel.find(tap)
            if link is None:
                raise FabricError(f"tap {tap} was removed by somebody else")
            filters.apply(tap, nic)
            mac = host_side_mac(parse_mac(nic.mac))
            kernel.attach(link, bridge, mac, open_now=False)
            if nic.vlan is not None:
                kernel.put_into_vlan(link.index, nic.vlan)
            if nic.receive_limit_bytes_per_s is not None:
                kernel.limit(
                    link.index,
                    nic.receive_limit_bytes_per_s,
                    burst_bytes=filters.burst_bytes(nic.receive_limit_bytes_per_s),
                    queue_bytes=filters.queue_bytes(nic.receive_limit_bytes_per_s),
                )
            kernel.raise_up(link)
            exits = find_exits(kernel, tap)
            if exits is None:
                raise FabricError(f"tap {tap} was taken off bridge {nic.bridge} by somebody else")
        except BaseException:
            os.close(fd)
            _remove_rules(tap, nic)
            raise
    return fd, exits


def close_plugged(plugged: tuple[int, Exits]) -> None:
    """For whoever doesn't want it any more. Its rules go with the next sweep."""
    os.close(plugged[0])


def unplug(tap: str) -> None:
    """Remove the tap and its rules. Idempotent."""
    with netlink(f"can't remove tap {tap}") as kernel:
        link = kernel.find(tap)
        if link is not None:
            kernel.delete(link)
    filters.remove(tap)


def sweep() -> None:
    """Remove the rules of taps that exist no more: their hypervisors died."""
    sweep_rules({tap.name for tap in list_taps()})


def sweep_rules(taps: Collection[str]) -> None:
    """Remove the rules of all taps but these."""
    try:
        tables = filters.tables()
    except FabricError as error:
        _log.info("rules aren't looked after: %s", error)
        return
    names = {filters.table_of(tap) for tap in taps}
    for table in tables - names:
        filters.remove(table.removeprefix(filters.table_of("")))


def list_taps() -> list[Tap]:
    """Every tap of this network namespace that is named as ours are."""
    with netlink("can't list the taps") as kernel:
        links = kernel.links()
    names = {link.index: link.name for link in links}
    return [
        Tap(link.name, names.get(link.master) if link.master is not None else None)
        for link in links
        if link.kind == "tun" and TAP_NAME.fullmatch(link.name)
    ]


def _remove_rules(tap: str, nic: NicSpec) -> None:
    if filters.wanted(nic):
        try:
            filters.remove(tap)
        except FabricError as error:
            _log.warning("%s", error)
