"""What nodes and routers say to each other about host routes: signed datagrams. Pure.

    node ── Claims: "10.0.0.5 is by 192.0.2.1, for the 7th time" ──► every other node, every router
         ◄── Known: what the receiver leads to, after it has set its routes ────────────────────────

    datagram    HMAC-SHA256 of the rest (32 bytes), then a Claims or Known as MessagePack

Each claim has a sequence, as EVPN's MAC mobility does (RFC 7432, section 15): a node that a guest
comes to claims one more than what it knows, and the highest is right, in whatever order they
arrive. A claim without a hop withdraws the address. What was recorded and is sent again is refused
after SKEW_S; before, it is no newer than what the receiver has.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
from typing import Final

import msgspec

from migrator.errors import FabricError
from migrator.ports import Struct

SKEW_S: Final = 30.0
"""By which the clocks of two nodes may differ."""
KEY_BYTES_MIN: Final = 16
_SIGNATURE_BYTES: Final = 32
_CLAIMS_MAX: Final = 64
_ADDRESSES_MAX: Final = 1 << 17
ASKING: Final = -1
"""The sequence of what is no claim, only a question for what is known."""


class Claim(Struct, frozen=True, kw_only=True):
    """`hop` "": the address is nowhere."""

    address: str
    sequence: int
    hop: str


class Claims(Struct, frozen=True, kw_only=True, tag="claims"):
    id: int
    at_s: float
    """The sender's wall clock."""
    claims: tuple[Claim, ...]


class Known(Struct, frozen=True, kw_only=True, tag="known"):
    """The answer: what the receiver leads to now, of what it was told of."""

    id: int
    at_s: float
    claims: tuple[Claim, ...]
    failures: tuple[str, ...] = ()


_DECODER: Final = msgspec.msgpack.Decoder(Claims | Known)


def sign(message: Claims | Known, key: bytes) -> bytes:
    """The datagram."""
    body = msgspec.msgpack.encode(message)
    return hmac.digest(key, body, hashlib.sha256) + body


def verify(datagram: bytes, key: bytes, now_s: float) -> Claims | Known:
    """FabricError: not signed with the key, too old, or no message."""
    signature, body = datagram[:_SIGNATURE_BYTES], datagram[_SIGNATURE_BYTES:]
    if not hmac.compare_digest(signature, hmac.digest(key, body, hashlib.sha256)):
        raise FabricError("it is signed with another key")
    try:
        message: Claims | Known = _DECODER.decode(body)
    except msgspec.MsgspecError as error:
        raise FabricError(f"it is no message: {error}") from error
    if abs(now_s - message.at_s) > SKEW_S:
        raise FabricError(f"it is {now_s - message.at_s:.0f} s old: do the clocks differ?")
    if len(message.claims) > _CLAIMS_MAX:
        raise FabricError(f"it has more than {_CLAIMS_MAX} claims")
    return message


class Ledger:
    """The newest claim of each address that this node or router has heard. Pure."""

    def __init__(self) -> None:
        self._newest: dict[str, Claim] = {}

    def newest(self, address: str) -> Claim | None:
        return self._newest.get(address)

    def take(self, claim: Claim) -> bool:
        """Whether it is newer than what was known, and so counts from now on.

        Of two with one sequence, which two nodes make that don't know of each other, the higher
        hop counts, everywhere alike.
        """
        known = self._newest.get(claim.address)
        if claim.sequence == ASKING:
            return False
        if known is None and len(self._newest) >= _ADDRESSES_MAX:
            del self._newest[next(iter(self._newest))]
        if known is not None and (known.sequence, known.hop) >= (claim.sequence, claim.hop):
            return False
        self._newest[claim.address] = claim
        return True

    def next_sequence(self, address: str, hop: str) -> int:
        """For a claim that `address` is by `hop` now: that of the same claim, or one more."""
        known = self._newest.get(address)
        if known is None:
            return 1
        return known.sequence if known.hop == hop else known.sequence + 1


def canonical(text: str) -> str:
    """An address as everybody writes it. FabricError: it is none."""
    try:
        return str(ipaddress.ip_address(text))
    except ValueError as error:
        raise FabricError(f"{text!r} is not an IPv4 or IPv6 address") from error
