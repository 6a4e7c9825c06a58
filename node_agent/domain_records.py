"""The cluster's domain definitions: `domains/NAME` in the store, and what makes one valid.

A name, a MAC, an address and a writable volume each belong to one domain in the cluster. Two
agents may define at the same time, so a definition is written first and checked against all others
again afterwards: of two that clash, the one with the later revision takes itself back.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Final

import msgspec

from migrator.errors import ConflictError, InvalidRequest, NotFoundError, PeerError, WrongStateError
from migrator.model import (
    DomainDefinition,
    DomainName,
    DomainSpec,
    KernelBoot,
    NodeName,
    OwnershipRecord,
    OwnershipState,
    PoolName,
)
from node_agent.mac_addresses import Roll, made, with_macs
from node_agent.resources import DOMAINS, DomainNote, DomainRecord
from node_agent.state.known import KnownPrefix
from node_agent.state.ownership import PREFIX as OWNERSHIP
from node_agent.state.typed import TypedStore, Versioned

HISTORY_MAX: Final = 50
"""Of a domain's notes; older ones go."""
ATTEMPTS: Final = 5


def not_running(domain: DomainName) -> WrongStateError:
    """A call that needs a guest, of a domain that has none."""
    sentence = f"domain {domain} is stopped (`ferry domain start {domain}` starts it)"
    return WrongStateError(f"domain {domain}", "stopped", "running or paused", sentence)


def running(domain: DomainName, node: str) -> WrongStateError:
    """A call for a domain without a guest, and this one runs there by its record."""
    sentence = f"domain {domain} runs on {node}; stop it first (`ferry domain stop {domain}`)"
    return WrongStateError(f"domain {domain}", "running", "stopped", sentence)


@contextlib.contextmanager
def asking(owner: NodeName, domain: DomainName) -> Iterator[None]:
    """For a call to the node that runs it: the PeerError says so, and what helps."""
    try:
        yield
    except PeerError as error:
        raise PeerError(
            f"domain {domain} runs on {owner}: {error}. If {owner} stays away: "
            f"`ferry domain takeover {domain} --to NODE`"
        ) from error


@contextlib.contextmanager
def asking_for_console(owned: OwnershipRecord) -> Iterator[None]:
    """As `asking`, also of the node that it ran on last: its console is there."""
    domain, owner = DomainName(owned.domain), NodeName(owned.owner)
    if owned.state is OwnershipState.RUNNING:
        with asking(owner, domain):
            yield
        return
    try:
        yield
    except PeerError as error:
        raise PeerError(
            f"the console of domain {domain} is on {owner}, where it ran last: {error}"
        ) from error


class DomainRecords:
    """Reads and writes definitions. StoreError: the outcome of a write is unknown."""

    def __init__(
        self, store: TypedStore, first_name: Callable[[PoolName], PoolName] = lambda pool: pool
    ) -> None:
        """`first_name`: of the names of a pool that has several (`PoolSet`)."""
        self._store = store
        self._first_name = first_name
        self._ownership = KnownPrefix(store, OWNERSHIP, OwnershipRecord)

    async def get(self, domain: DomainName) -> DomainRecord:
        """NotFoundError if it isn't defined."""
        record = await self.find(domain)
        if record is None:
            raise NotFoundError(f"there is no domain {domain}")
        return record

    async def find(self, domain: DomainName) -> DomainRecord | None:
        """None if it isn't defined."""
        entry = await self._store.get(f"{DOMAINS}{domain}", DomainRecord)
        return None if entry is None else entry.value

    async def list_records(self) -> Mapping[DomainName, DomainRecord]:
        entries = await self._list()
        return {DomainName(entry.value.spec.name): entry.value for entry in entries}

    async def list_ownership(self) -> Mapping[DomainName, OwnershipRecord]:
        """Every ownership record; those of deleted domains are not among them."""
        found = await self._ownership.read()
        return {DomainName(owned.domain): owned for owned in found.values()}

    async def running_on(self, node: NodeName) -> Mapping[DomainName, DomainRecord]:
        """By their ownership records; without those that aren't defined any more.

        Reads the definitions of these alone: of all domains they are many times as much.
        """
        ours = [
            name
            for name, owned in (await self.list_ownership()).items()
            if owned.owner == node and owned.state is OwnershipState.RUNNING
        ]
        found = await asyncio.gather(*map(self.find, ours))
        return {
            name: record for name, record in zip(ours, found, strict=True) if record is not None
        }

    async def add(self, record: DomainRecord) -> None:
        """Define. ConflictError names everything that another domain already has."""
        key = f"{DOMAINS}{record.spec.name}"
        self._refuse_clashes(record.spec, await self._list(), None)
        revision = await self._store.put_if(key, record, None)
        if revision is None:
            raise ConflictError(f"domain {record.spec.name} is defined already")
        try:
            self._refuse_clashes(record.spec, await self._list(), revision)
        except ConflictError:
            await self._store.delete_if(key, revision)
            raise

    async def define(
        self, definition: DomainDefinition, roll: Roll, *, at_s: float
    ) -> DomainRecord:
        """`add`, with a MAC for each NIC that has none. The same errors."""
        for attempt in range(1, ATTEMPTS + 1):
            spec = with_macs(definition, roll)
            record = DomainRecord(spec=spec, defined_at_s=at_s)
            try:
                await self.add(record)
            except ConflictError:
                # Chance has found one that is taken, maybe in this moment by another node.
                taken = await self._macs_of_others(spec.name)
                if attempt == ATTEMPTS or not made(definition, spec) & taken:
                    raise
            else:
                return record
        raise AssertionError("unreachable")

    async def _macs_of_others(self, name: str) -> set[str]:
        specs = [entry.value.spec for entry in await self._list()]
        return {mac for spec in specs if spec.name != name for mac in _macs(spec)}

    async def note(self, domain: DomainName, text: str, *, user: str, at_s: float) -> None:
        """Add to the domain's history; durable when it returns. NotFoundError, ConflictError."""
        key, entry = f"{DOMAINS}{domain}", DomainNote(at_s=at_s, text=text, user=user)
        for _ in range(ATTEMPTS):
            found = await self._store.get(key, DomainRecord)
            if found is None:
                raise NotFoundError(f"there is no domain {domain}")
            history = (*found.value.history, entry)[-HISTORY_MAX:]
            record = msgspec.structs.replace(found.value, history=history)
            if await self._store.put_if(key, record, found.revision) is not None:
                return
        raise ConflictError(f"the record of domain {domain} keeps changing; nothing was noted")

    async def remove(self, domain: DomainName) -> None:
        """NotFoundError if it isn't defined."""
        key = f"{DOMAINS}{domain}"
        entry = await self._store.get(key, DomainRecord)
        if entry is None or not await self._store.delete_if(key, entry.revision):
            raise NotFoundError(f"there is no domain {domain}")

    async def put_back(self, record: DomainRecord) -> None:
        """What was just removed, unless it was defined anew meanwhile."""
        await self._store.put_if(f"{DOMAINS}{record.spec.name}", record, None)

    async def _list(self) -> Sequence[Versioned[DomainRecord]]:
        return await self._store.list_prefix(DOMAINS, DomainRecord)

    def _refuse_clashes(
        self, spec: DomainSpec, entries: Sequence[Versioned[DomainRecord]], own_revision: int | None
    ) -> None:
        """Against all others; once written, only against those written before."""
        places = {(self._first_name(PoolName(d.pool)), d.volume) for d in spec.disks}
        reasons = ["two of its disks are one volume"] if len(places) < len(spec.disks) else []
        for entry in entries:
            if own_revision is not None and entry.revision >= own_revision:
                continue
            other = entry.value.spec
            if other.name == spec.name:
                raise ConflictError(f"domain {spec.name} is defined already")
            shared = _shared(spec, other, self._first_name)
            reasons += [f"{what} belongs to domain {other.name}" for what in shared]
        if reasons:
            raise ConflictError(f"domain {spec.name} can't be defined: {'; '.join(reasons)}")


def _shared(
    spec: DomainSpec, other: DomainSpec, first_name: Callable[[PoolName], PoolName]
) -> Iterator[str]:
    """What both would have, though only one may."""
    for mac in _macs(spec) & _macs(other):
        yield f"MAC {mac}"
    for address in _addresses(spec) & _addresses(other):
        yield f"address {address}"
    others = {(first_name(PoolName(disk.pool)), disk.volume): disk for disk in other.disks}
    for disk in spec.disks:
        theirs = others.get((first_name(PoolName(disk.pool)), disk.volume))
        if theirs is not None and not (theirs.read_only and disk.read_only):
            by = "" if theirs.pool == disk.pool else f" (pool {theirs.pool} is the same place)"
            yield f"volume {disk.pool}/{disk.volume}{by}"


def _macs(spec: DomainSpec) -> set[str]:
    return {nic.mac for nic in spec.nics}


def _addresses(spec: DomainSpec) -> set[str]:
    return {str(ipaddress.ip_address(text)) for nic in spec.nics for text in nic.addresses}


def check_spec(spec: DomainSpec, pools: Collection[PoolName]) -> None:
    """What the types alone can't say. InvalidRequest names every wrong field."""
    fields = dict(_nic_problems(spec))
    volumes: set[tuple[str, str]] = set()
    for index, disk in enumerate(spec.disks):
        if PoolName(disk.pool) not in pools:
            known = ", ".join(sorted(pools)) or "none"
            fields[f"disks[{index}].pool"] = f"a pool of this cluster ({known})"
        if (disk.pool, disk.volume) in volumes:
            fields[f"disks[{index}].volume"] = "a volume that isn't a disk of this domain already"
        volumes.add((disk.pool, disk.volume))
    if isinstance(spec.boot, KernelBoot):
        for name, path in (("kernel", spec.boot.kernel), ("initrd", spec.boot.initrd)):
            if path is not None and not path.startswith("/"):
                fields[f"boot.{name}"] = "an absolute path, the same on every node"
    if fields:
        wrong = "; ".join(f"{name} must be {right}" for name, right in fields.items())
        raise InvalidRequest(f"domain {spec.name} can't be defined: {wrong}", fields)


def _nic_problems(spec: DomainSpec) -> Iterator[tuple[str, str]]:
    macs: set[str] = set()
    addresses: set[str] = set()
    for index, nic in enumerate(spec.nics):
        where = f"nics[{index}].mac"
        if int(nic.mac[:2], 16) & 1:
            yield where, "a unicast address: the second digit must be even"
        elif nic.mac == "00:00:00:00:00:00":
            yield where, "a real address, not all zeroes"
        elif nic.mac in macs:
            yield where, "different from the domain's other NICs"
        macs.add(nic.mac)
        for position, text in enumerate(nic.networks):
            if _network(text) is None:
                yield f"nics[{index}].networks[{position}]", "a network, like 10.0.0.0/24"
        for position, text in enumerate(nic.addresses):
            where = f"nics[{index}].addresses[{position}]"
            try:
                address = ipaddress.ip_address(text)
            except ValueError:
                yield where, "an IPv4 or IPv6 address without a prefix, like 10.0.0.7"
                continue
            if address.is_multicast or address.is_unspecified or address.is_loopback:
                yield where, "an address that one host on a network can have"
            elif str(address) in addresses:
                yield where, "listed once"
            elif nic.networks and not _in_one(address, nic.networks):
                yield where, f"in {' or '.join(nic.networks)}, the NIC's networks"
            addresses.add(str(address))


def _network(text: str) -> ipaddress.IPv4Network | ipaddress.IPv6Network | None:
    try:
        return ipaddress.ip_network(text)
    except ValueError:
        return None


def _in_one(address: ipaddress.IPv4Address | ipaddress.IPv6Address, texts: Sequence[str]) -> bool:
    networks = [network for text in texts if (network := _network(text)) is not None]
    return any(address in network for network in networks) or not networks
