"""What a fabric driver keeps of NICs that move, whatever carries them. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

import msgspec

from migrator.model import NicSpec
from netfabric.frames import announcements


@dataclass(frozen=True, slots=True, kw_only=True)
class Departure:
    """One NIC that is to leave, and the name of its tunnel's end."""

    nic: NicSpec
    tap_index: int
    tunnel: str
    forwards: bool = True
    """False: what was tried didn't come out at the other end."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One NIC that is to come, the name of its tunnel's end, and its announcement's frames."""

    nic: NicSpec
    tap: str
    tap_index: int
    tunnel: str
    frames: tuple[bytes, ...] = ()
    learnt: tuple[str, ...] = ()


Leaving = TypeVar("Leaving", bound=Departure)
Coming = TypeVar("Coming", bound=Arrival)


def with_addresses(
    arrivals: Sequence[Coming], learnt: Sequence[Sequence[str]]
) -> tuple[Coming, ...]:
    """The same NICs, announced also under what was learnt of each. Pure."""
    found: list[Coming] = []
    for index, arrival in enumerate(arrivals):
        more = tuple(learnt[index]) if index < len(learnt) else ()
        texts = tuple(dict.fromkeys((*arrival.nic.addresses, *more)))
        nic = msgspec.structs.replace(arrival.nic, addresses=texts)
        found.append(replace(arrival, frames=announcements(nic), learnt=more))
    return tuple(found)
