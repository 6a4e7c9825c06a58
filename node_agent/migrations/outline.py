"""What is asked of all migrations at once: which are under way, and how the others ended.

The store keeps a thousand that have ended, 2 to 6 KB each with their timelines. Decoding all of
that takes an agent's event loop longer than a blackout, and each step of a drain asks.
"""

from __future__ import annotations

import msgspec

from migrator.model import ENDED, Migration, MigrationState


class MigrationOutline(msgspec.Struct, frozen=True, kw_only=True):
    """The fields of the same names of a `Migration`, decoded from its record."""

    id: str
    domain: str
    source: str
    destination: str
    state: MigrationState
    created_at_s: float
    ended_at_s: float | None = None
    blackout_ms: float | None = None
    total_s: float | None = None

    @property
    def ended(self) -> bool:
        return self.state in ENDED


def outline_of(migration: Migration) -> MigrationOutline:
    """Of one that is there whole."""
    fields = MigrationOutline.__struct_fields__
    return MigrationOutline(**{name: getattr(migration, name) for name in fields})
