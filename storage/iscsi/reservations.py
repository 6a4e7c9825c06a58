"""Persistent reservations of one LUN (SPC-4, PERSISTENT RESERVE IN and OUT), and the fence on them.

The reservation's type is "write exclusive, registrants only": whoever has registered may write,
whoever hasn't is refused, and reading is free (a destination reads while the source still runs).

    fence(key):  REGISTER ── who holds it? ── nobody: RESERVE
                                │            └─ an older key: PREEMPT, which takes its place and
                                │                             removes all that registered by it
                                └─ a newer one: unregister, FenceError
                 then PREEMPT every other key that isn't newer

Being the holder comes first, the removing after: see `hypervisor/qemu/iscsi_shim.c` for why.
PREEMPT is the compare-and-set: it names the key that it replaces.
"""

from __future__ import annotations

import asyncio
import enum
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from migrator.errors import ConflictError, FenceError
from storage.holder_keys import HolderKey, parse_key
from storage.iscsi.session import IscsiSession, ReservationConflictError

TYPE: Final = 5
"""Write exclusive, registrants only."""
_IN: Final = 0x5E
_OUT: Final = 0x5F
_READ_KEYS, _READ_RESERVATION, _REPORT_CAPABILITIES = 0, 1, 2
_RESERVE, _CLEAR, _PREEMPT, _REGISTER_AND_IGNORE = 1, 3, 4, 6
_IN_BYTES: Final = 8 * 1024
_PTPL_CAPABLE: Final = 0x01
_TRIES: Final = 8
"""How often a fence looks again when somebody was faster. Each time a newer token wins, it ends."""


class ForeignReservationError(ConflictError):
    """Somebody who isn't Ferry uses the LUN."""


@dataclass(frozen=True, slots=True)
class Reservation:
    """Who holds the LUN."""

    key: int
    type: int


class Reservations:
    """The reservation commands on an open session."""

    def __init__(self, session: IscsiSession) -> None:
        self._session = session

    async def keys(self) -> Sequence[int]:
        """Every registered key, once a registration."""
        data = await self._in(_READ_KEYS)
        length = min(struct.unpack(">I", data[4:8])[0], len(data) - 8) // 8 * 8
        return [value for (value,) in struct.iter_unpack(">Q", data[8 : 8 + length])]

    async def holder(self) -> Reservation | None:
        data = await self._in(_READ_RESERVATION)
        if struct.unpack(">I", data[4:8])[0] < 16:
            return None
        return Reservation(key=struct.unpack(">Q", data[8:16])[0], type=data[21] & 0x0F)

    async def survives_power_loss(self) -> bool:
        """Whether the target can keep registrations over its own restart (PTPL_C)."""
        data = await self._in(_REPORT_CAPABILITIES)
        return bool(data[2] & _PTPL_CAPABLE)

    async def register(self, key: int, *, persist: bool) -> None:
        """Register this session by `key`; 0 unregisters it. `persist`: over a power loss."""
        await self._out(_REGISTER_AND_IGNORE, service_key=key, persist=persist)

    async def reserve(self, key: int) -> None:
        await self._out(_RESERVE, key=key)

    async def preempt(self, key: int, victim: int) -> None:
        """Remove every registration by `victim`; its reservation, if it has it, becomes ours."""
        await self._out(_PREEMPT, key=key, service_key=victim)

    async def clear(self, key: int) -> None:
        """Remove every registration and the reservation."""
        await self._out(_CLEAR, key=key)

    async def _in(self, action: int) -> bytes:
        cdb = struct.pack(">BB5xHB", _IN, action, _IN_BYTES, 0)
        return await self._session.command(cdb, data_in_bytes=_IN_BYTES)

    async def _out(
        self, action: int, *, key: int = 0, service_key: int = 0, persist: bool = False
    ) -> None:
        parameters = struct.pack(">QQ4xB3x", key, service_key, int(persist))
        cdb = struct.pack(">BBBxxIB", _OUT, action, TYPE, len(parameters), 0)
        await self._session.command(cdb, data_out=parameters)


class Unknown(enum.Enum):
    """Stands for a holder that nobody has looked for yet."""

    UNKNOWN = 0


async def look(reservations: Reservations, what: str) -> tuple[HolderKey | None, frozenset[int]]:
    """The LUN's holder and every registered key, in one round trip. Changes nothing.

    ForeignReservationError: one of them isn't Ferry's.
    """
    # The holder is asked for first, and a target works in order: see `fence`.
    holder, registered = await asyncio.gather(reservations.holder(), reservations.keys())
    keys = frozenset(registered)
    if holder is not None and (parse_key(holder.key) is None or holder.type != TYPE):
        raise ForeignReservationError(
            f"{what} is in use by a stranger: key {holder.key:#x} holds a persistent reservation"
            f" of type {holder.type}; nothing was changed"
        )
    stranger = next((key for key in keys if parse_key(key) is None), None)
    if stranger is not None:
        raise ForeignReservationError(
            f"{what} is in use by a stranger: key {stranger:#x} is registered; nothing was changed"
        )
    return parse_key(holder.key) if holder is not None else None, keys


def refuse_outranked(held: HolderKey | None, key: HolderKey, what: str) -> None:
    """FenceError if the LUN's holder has won over `key`."""
    if held is None or not held.outranks(key):
        return
    if held.token == key.token:
        raise FenceError(
            f"{what}: token {key.token} was won by another node, which alone can fence with it"
        )
    whose = "this node" if held.node == key.node else "another node"
    raise FenceError(
        f"{what} is fenced by token {held.token} of {whose}; token {key.token} is too old"
    )


async def fence(
    reservations: Reservations,
    key: HolderKey,
    what: str,
    *,
    persist: bool,
    held: HolderKey | Unknown | None = Unknown.UNKNOWN,
) -> None:
    """Make `key` the holder and shut out every other that isn't newer. Idempotent.

    `held`: who held the LUN when this session was registered by `key`, if it was: that spares two
    of four round trips, and PREEMPT refuses if it isn't so any more. FenceError: a newer token
    was faster, or others kept interfering; ForeignReservationError.
    """
    if isinstance(held, Unknown):
        held, _ = await look(reservations, what)
        refuse_outranked(held, key, what)
        await reservations.register(key.value, persist=persist)
    refuse_outranked(held, key, what)
    held_before = held == key
    for _ in range(_TRIES):
        try:
            if held is None:
                await reservations.reserve(key.value)
            elif held != key:
                await reservations.preempt(key.value, held.value)
        except ReservationConflictError:
            pass  # Somebody was faster. Who?
        held, keys = await look(reservations, what)
        if held == key:
            victims = [other for other in keys if _is_victim(other, key, held_before=held_before)]
            try:
                for victim in victims:
                    await reservations.preempt(key.value, victim)
            except ReservationConflictError:
                continue  # It is gone already; or we are.
            return
        if held is not None and held.outranks(key):
            await reservations.register(0, persist=persist)
            refuse_outranked(held, key, what)
        if key.value not in keys:
            await reservations.register(key.value, persist=persist)
    raise FenceError(f"{what}: token {key.token} could not be confirmed; others kept interfering")


def _is_victim(value: int, key: HolderKey, *, held_before: bool) -> bool:
    """Whether a registration must go. Newer tokens stay: they may be about to win.

    Where `key` was the holder before, this node's older keys stay, too: its hypervisor, started
    before a rollback, has registered itself again under the key that it was started with.
    """
    other = parse_key(value)
    if other is None or other == key or other.token > key.token:
        return False
    return not (held_before and other.node == key.node)
