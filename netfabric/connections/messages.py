"""Connection tracking's netlink messages (ctnetlink), read and written. Pure.

    entry    nfgenmsg, and attributes: the tuples of both directions, status, timeout, mark, zone,
             what TCP knows (linux/netfilter/nfnetlink_conntrack.h)

An entry is told to another kernel nearly as the first one told it. What changes:

    status   only whether it was answered and is assured: the rest belongs to the first kernel
    TCP      sequence numbers aren't checked (liberal): the other kernel hasn't seen the window. A
             handshake that is under way counts as done, for its end may pass before anybody looks
             again; who let its first packet pass has decided already
    left     counters, ids, helpers, the connection that it belongs to
"""

from __future__ import annotations

import ipaddress
import struct
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Final

from migrator.ports import Connection
from netfabric.netlink_format import NLA_F_NESTED, NLA_TYPE_MASK, attribute, attributes_in

ORIGINAL, REPLY, STATUS, PROTOINFO, TIMEOUT, MARK, ZONE, LABELS = 1, 2, 3, 4, 7, 8, 18, 22
_TUPLE_IP, _TUPLE_PROTO = 1, 2
_IP_SOURCE: Final = {4: 1, 6: 3}
_IP_DESTINATION: Final = {4: 2, 6: 4}
_PROTO_SOURCE_PORT, _PROTO_DESTINATION_PORT = 2, 3
_PROTOINFO_TCP: Final = 1
_TCP_STATE, _TCP_SCALE_ORIGINAL, _TCP_SCALE_REPLY = 1, 2, 3
_TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY = 4, 5
_ESTABLISHED: Final = 3
_HANDSHAKE: Final = frozenset({1, 2, 9})
"""SYN_SENT, SYN_RECV, SYN_SENT2."""
_FLAG_SCALE, _FLAG_SACK, _FLAG_LIBERAL = 0x01, 0x02, 0x08
_FILTER: Final = 25
_FILTER_SOURCE: Final = 1
"""CTA_FILTER_F_CTA_IP_SRC (net/netfilter/nf_internals.h)."""
_SEEN_REPLY, _ASSURED, _CONFIRMED = 0x2, 0x4, 0x8
_COPIED: Final = (TIMEOUT, MARK, ZONE, LABELS)
_FAMILY: Final = {4: 2, 6: 10}
"""AF_INET, AF_INET6."""
_VERSION: Final = {2: 4, 10: 6}
_GENERIC: Final = struct.Struct("=BBH")

Attributes = Mapping[int, bytes]


@dataclass(frozen=True, slots=True)
class Entry:
    """One connection as the kernel tells it."""

    version: int
    attributes: Attributes

    @property
    def key(self) -> tuple[int, bytes, bytes]:
        """What tells it from every other one of the node."""
        return self.version, self.attributes[ORIGINAL], self.attributes.get(ZONE, b"")

    @property
    def sources(self) -> tuple[bytes, bytes]:
        """The source address of each direction: who began it, and who answers."""
        return self._way(ORIGINAL)[0], self._way(REPLY)[0]

    @property
    def translated(self) -> bool:
        """An address or a port is another one on the way back."""
        there, back = self._way(ORIGINAL), self._way(REPLY)
        return (back[1], back[0], back[3], back[2]) != there

    def _way(self, direction: int) -> tuple[bytes, bytes, bytes, bytes]:
        whole = attributes_in(self.attributes[direction])
        ip, proto = attributes_in(whole[_TUPLE_IP]), attributes_in(whole[_TUPLE_PROTO])
        return (
            ip[_IP_SOURCE[self.version]],
            ip[_IP_DESTINATION[self.version]],
            proto.get(_PROTO_SOURCE_PORT, b""),
            proto.get(_PROTO_DESTINATION_PORT, b""),
        )


def parse(payload: bytes) -> Entry | None:
    """The connection that a message is about; None where it lacks what makes one."""
    if len(payload) < _GENERIC.size:
        return None
    version = _VERSION.get(payload[0])
    if version is None:
        return None
    entry = Entry(version, attributes_in(payload[_GENERIC.size :]))
    return entry if _is_whole(entry) else None


def received(connection: Connection) -> Entry | None:
    """The connection that another node told of."""
    if connection.version not in _FAMILY:
        return None
    entry = Entry(connection.version, attributes_in(connection.entry))
    return entry if _is_whole(entry) and TIMEOUT in entry.attributes else None


def _is_whole(entry: Entry) -> bool:
    try:
        return all(len(each) in (4, 16) for each in entry.sources)
    except KeyError:
        return False


def told(entry: Entry) -> Connection:
    """As another kernel is to know it. See the module."""
    attributes = entry.attributes
    status = int.from_bytes(attributes.get(STATUS, b""), "big")
    info, unanswered = _protocol_info(attributes.get(PROTOINFO, b""))
    seen = _SEEN_REPLY if unanswered else status & _SEEN_REPLY
    parts = [
        attribute(ORIGINAL | NLA_F_NESTED, attributes[ORIGINAL]),
        attribute(REPLY | NLA_F_NESTED, attributes[REPLY]),
        attribute(STATUS, (_CONFIRMED | seen | status & _ASSURED).to_bytes(4, "big")),
        info,
        *(attribute(kind, attributes[kind]) for kind in _COPIED if kind in attributes),
    ]
    return Connection(version=entry.version, entry=b"".join(parts))


def _protocol_info(data: bytes) -> tuple[bytes, bool]:
    """TCP's part, and whether its handshake is under way."""
    tcp = attributes_in(attributes_in(data).get(_PROTOINFO_TCP, b""))
    if _TCP_STATE not in tcp:
        return b"", False
    state = tcp[_TCP_STATE][0]
    handshake = state in _HANDSHAKE
    scales = [kind for kind in (_TCP_SCALE_ORIGINAL, _TCP_SCALE_REPLY) if kind in tcp]
    parts = [
        attribute(_TCP_STATE, bytes([_ESTABLISHED if handshake else state])),
        *(attribute(kind, tcp[kind][:1]) for kind in scales),
    ]
    for kind in (_TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY):
        flags = (tcp.get(kind, b"\0")[0] & (_FLAG_SCALE | _FLAG_SACK)) | _FLAG_LIBERAL
        parts.append(attribute(kind, bytes([flags, _FLAG_SCALE | _FLAG_SACK | _FLAG_LIBERAL])))
    inner = attribute(_PROTOINFO_TCP | NLA_F_NESTED, b"".join(parts))
    return attribute(PROTOINFO | NLA_F_NESTED, inner), handshake


def loosened(entry: Entry) -> bytes | None:
    """The payload after which its sequence numbers aren't checked; None: they never are.

    A node that one direction of a connection doesn't pass any more takes the other's
    acknowledgements for invalid: it hasn't seen what they acknowledge.
    """
    if _PROTOINFO_TCP not in attributes_in(entry.attributes.get(PROTOINFO, b"")):
        return None
    liberal = bytes([_FLAG_LIBERAL, _FLAG_LIBERAL])
    flags = [attribute(kind, liberal) for kind in (_TCP_FLAGS_ORIGINAL, _TCP_FLAGS_REPLY)]
    inner = attribute(_PROTOINFO_TCP | NLA_F_NESTED, b"".join(flags))
    return removal(entry) + attribute(PROTOINFO | NLA_F_NESTED, inner)


def of_addresses(entry: Entry, packed: Collection[bytes]) -> bool:
    """Whether one of its two ends has one of the addresses."""
    return any(each in packed for each in entry.sources)


def question(address: ipaddress.IPv4Address | ipaddress.IPv6Address, direction: int) -> bytes:
    """The payload of a dump of all connections whose source that way is the address."""
    ip = attribute(_IP_SOURCE[address.version], address.packed)
    flags = [_FILTER_SOURCE if each == direction else 0 for each in (ORIGINAL, REPLY)]
    wanted = b"".join(
        attribute(kind, struct.pack("=I", value)) for kind, value in enumerate(flags, 1)
    )
    return (
        generic(address.version)
        + attribute(direction | NLA_F_NESTED, attribute(_TUPLE_IP | NLA_F_NESTED, ip))
        + attribute(_FILTER | NLA_F_NESTED, wanted)
    )


def generic(version: int | None = None) -> bytes:
    """nfgenmsg; None: of every version."""
    return _GENERIC.pack(0 if version is None else _FAMILY[version], 0, 0)


def removal(entry: Entry) -> bytes:
    """The payload that removes it, and begins what changes it: nothing but which one it is."""
    kinds = [ORIGINAL | NLA_F_NESTED, *([ZONE] if ZONE in entry.attributes else [])]
    parts = [attribute(kind, entry.attributes[kind & NLA_TYPE_MASK]) for kind in kinds]
    return generic(entry.version) + b"".join(parts)
