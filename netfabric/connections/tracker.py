"""The kernel's connection tracking, by ctnetlink.

    take       subscribe to connections that begin; then ask for those that there are, by address
    take_new   read what the subscription has
    loosen     change entries that there are, a hundred a conversation
    install    new entries, a hundred a conversation

Messages by hand (see `messages`): a busy guest has thousands of entries, and a library that decodes
each of them into objects takes longer than the kernel takes for all. A node that keeps no state
(nothing in its rules says `ct`) isn't asked anything.
"""

from __future__ import annotations

import errno
import ipaddress
import logging
import os
import socket
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import ClassVar, Final

from pyroute2 import IPRoute

from migrator.errors import FabricError
from migrator.model import DomainName
from migrator.ports import Connection, ConnectionTracker, TakenConnections
from netfabric.connections.messages import (
    ORIGINAL,
    REPLY,
    Entry,
    generic,
    loosened,
    of_addresses,
    parse,
    question,
    received,
    removal,
    told,
)
from netfabric.netlink_format import (
    NLM_F_ACK,
    NLM_F_CREATE,
    NLM_F_DUMP,
    NLMSG_DONE,
    NLMSG_ERROR,
    error_in,
    message,
    messages_in,
)
from netfabric.threads import in_thread

COUNT: Final = Path("/proc/sys/net/netfilter/nf_conntrack_count")
"""Of the calling thread's network namespace; missing where the kernel tracks no connections."""
_NETLINK_NETFILTER: Final = 12
_TABLE: Final = 1 << 8
_NEW, _GET, _DELETE = _TABLE, _TABLE | 1, _TABLE | 2
_GROUP_NEW: Final = 1
_AT_ONCE: Final = 100
"""Their acknowledgements fit into a socket's usual buffer."""
_FEW: Final = 1_000
"""Connections of a node that are read all at once: the kernel takes 10 ms for each question,
however few there are (262,144 empty buckets)."""
_READ_BYTES: Final = 1 << 16
_NOTES_BYTES: Final = 1 << 20
_TIMEOUT_S: Final = 5.0

log = logging.getLogger(__name__)


class KernelConnections(ConnectionTracker):
    """See the module. Of this process's network namespace; belongs to one event loop."""

    name: ClassVar[str] = "conntrack"

    def __init__(self) -> None:
        self._notes: dict[DomainName, tuple[socket.socket, frozenset[bytes]]] = {}

    async def take(self, domain: DomainName, addresses: Collection[str]) -> TakenConnections:
        self._end_notes(domain)
        packed = frozenset(ipaddress.ip_address(each).packed for each in addresses)
        found = await in_thread(lambda: _take(addresses), _discard)
        if found is None:
            return TakenConnections()
        notes, entries = found
        self._end_notes(domain)
        self._notes[domain] = notes, packed
        return _sorted(entries)

    def take_new(self, domain: DomainName) -> TakenConnections:
        notes, packed = self._notes.get(domain, (None, frozenset[bytes]()))
        entries: list[Entry] = []
        try:
            while notes is not None:
                entries += _entries(notes.recv(_READ_BYTES), packed)
        except BlockingIOError:
            pass
        except OSError as error:  # ENOBUFS: more began than could be noted.
            log.warning("not every new connection of %s is known: %s", domain, error.strerror)
        self._end_notes(domain)
        return _sorted(entries)

    async def loosen(self, connections: Sequence[Connection]) -> None:
        entries = [entry for each in connections if (entry := received(each)) is not None]
        payloads = [each for each in map(loosened, entries) if each is not None]
        if payloads:
            await in_thread(lambda: _loosen(payloads))

    async def install(self, connections: Sequence[Connection], addresses: Collection[str]) -> int:
        packed = frozenset(ipaddress.ip_address(each).packed for each in addresses)
        payloads = [
            generic(each.version) + each.entry
            for each in connections
            if (entry := received(each)) is not None and of_addresses(entry, packed)
        ]
        return await in_thread(lambda: _install(payloads))

    async def forget(self, addresses: Collection[str], here: Collection[str]) -> int:
        return await in_thread(lambda: _forget(addresses, here))

    async def close(self) -> None:
        for domain in list(self._notes):
            self._end_notes(domain)

    def _end_notes(self, domain: DomainName) -> None:
        notes = self._notes.pop(domain, None)
        if notes is not None:
            notes[0].close()


def is_tracking() -> bool:
    """Whether the kernel tracks connections at all."""
    return COUNT.exists()


def count() -> int:
    """How many connections the node knows."""
    try:
        return int(COUNT.read_text())
    except (OSError, ValueError):
        return 0


def _open() -> socket.socket:
    try:
        opened = socket.socket(
            socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_NETFILTER
        )
    except OSError as error:
        raise FabricError(f"connection tracking can't be asked: {error.strerror}") from error
    opened.settimeout(_TIMEOUT_S)
    return opened


def _take(addresses: Collection[str]) -> tuple[socket.socket, list[Entry]] | None:
    if not is_tracking():
        return None
    notes = _open()
    try:
        notes.setblocking(False)
        notes.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _NOTES_BYTES)
        notes.bind((0, _GROUP_NEW))
        return notes, _find(addresses)
    except OSError as error:
        notes.close()
        raise FabricError(f"new connections can't be heard of: {error.strerror}") from error
    except BaseException:
        notes.close()
        raise


def _discard(found: tuple[socket.socket, list[Entry]] | None) -> None:
    if found is not None:
        found[0].close()


def _find(addresses: Collection[str]) -> list[Entry]:
    """Every connection of the addresses."""
    known, parsed = count(), [ipaddress.ip_address(each) for each in addresses]
    if not known:
        return []
    questions = [question(each, way) for each in parsed for way in (ORIGINAL, REPLY)]
    if known <= _FEW:
        questions = [generic()]
    found: dict[tuple[int, bytes, bytes], Entry] = {}
    packed = frozenset(each.packed for each in parsed)
    with _open() as kernel:
        for payload in (each for one in questions for each in _dump(kernel, one)):
            entry = parse(payload)
            # A kernel before 5.8 knows no such questions, and tells all.
            if entry is not None and of_addresses(entry, packed):
                found[entry.key] = entry
    return list(found.values())


def _dump(kernel: socket.socket, payload: bytes) -> list[bytes]:
    """The payloads of all that the kernel answers. FabricError: it refuses."""
    found: list[bytes] = []
    try:
        kernel.send(message(_GET, NLM_F_DUMP, payload))
        while True:
            for kind, _, content in messages_in(kernel.recv(_READ_BYTES)):
                if kind == NLMSG_DONE:
                    return found
                if kind == NLMSG_ERROR:
                    code = error_in(content)
                    raise FabricError(f"connection tracking can't be read: {os.strerror(code)}")
                found.append(content)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FabricError(f"connection tracking can't be read: {reason}") from error


def _install(payloads: Sequence[bytes]) -> int:
    if not payloads or not is_tracking():
        return 0
    refused = _tell(_NEW, NLM_F_CREATE, payloads)
    if len(refused) == len(payloads):
        raise FabricError(f"no connection could be told: {os.strerror(refused[0])}")
    for code in sorted(set(refused)):
        log.warning("%d connections weren't taken: %s", refused.count(code), os.strerror(code))
    return len(payloads) - len(refused)


def _loosen(payloads: Sequence[bytes]) -> None:
    if not is_tracking():
        return
    for code in set(_tell(_NEW, 0, payloads)):
        log.warning("connections aren't known loosely here: %s", os.strerror(code))


def _forget(addresses: Collection[str], here: Collection[str]) -> int:
    if not is_tracking():
        return 0
    staying = {ipaddress.ip_address(each).packed for each in here} | _own_addresses()
    staying -= {ipaddress.ip_address(each).packed for each in addresses}
    gone = [entry for entry in _find(addresses) if not of_addresses(entry, staying)]
    refused = _tell(_DELETE, 0, [removal(entry) for entry in gone])
    return len(gone) - len(refused)


def _own_addresses() -> set[bytes]:
    with IPRoute() as route:
        texts = {entry.get_attr("IFA_ADDRESS") for entry in route.get_addr()}
    return {ipaddress.ip_address(text).packed for text in texts if text}


def _tell(kind: int, flags: int, payloads: Sequence[bytes]) -> list[int]:
    """Each payload, acknowledged; the error numbers of those that were refused."""
    refused: list[int] = []
    try:
        with _open() as kernel:
            for at in range(0, len(payloads), _AT_ONCE):
                part = payloads[at : at + _AT_ONCE]
                kernel.send(b"".join(message(kind, NLM_F_ACK | flags, one) for one in part))
                answered = 0
                while answered < len(part):
                    for answer, _, content in messages_in(kernel.recv(_READ_BYTES)):
                        if answer == NLMSG_ERROR:
                            answered += 1
                            code = error_in(content)
                            refused += [code] if code and code != errno.ENOENT else []
    except OSError as error:
        reason = error.strerror or str(error)
        raise FabricError(f"connection tracking can't be told anything: {reason}") from error
    return refused


def _entries(data: bytes, packed: Collection[bytes]) -> Iterable[Entry]:
    for kind, _, payload in messages_in(data):
        entry = parse(payload) if kind == _NEW else None
        if entry is not None and of_addresses(entry, packed):
            yield entry


def _sorted(entries: Sequence[Entry]) -> TakenConnections:
    moving = tuple(told(entry) for entry in entries if not entry.translated)
    return TakenConnections(connections=moving, translated=len(entries) - len(moving))
