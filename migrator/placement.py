"""What a domain's owner allows: what may be done to it, and where it may run beside whom."""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

from migrator.names import END, Name, Value


class MaintenancePolicy(enum.StrEnum):
    """What may be done to a domain so that its node can be emptied."""

    LIVE = "live"
    """It is migrated."""
    STOP = "stop"
    """It is powered off, and started again elsewhere (`maintenance_restart`)."""
    NEVER = "never"
    """Nothing: its node can't be drained while it runs there."""


LabelKey = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[a-z0-9]([a-z0-9./-]{0,61}[a-z0-9])?" + END,
        description="1 to 63 lower-case letters, digits, '.', '/' and '-'",
    ),
]
LabelValue = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[A-Za-z0-9._-]{0,63}" + END,
        description="at most 63 letters, digits, '.', '_' and '-'",
    ),
]
DomainSelector = Annotated[
    str,
    msgspec.Meta(
        pattern=r"^[a-z0-9][a-z0-9./-]{0,62}(=[A-Za-z0-9._-]{0,63})?" + END,
        description="the name of a domain, or a label: KEY=VALUE",
    ),
]


class PlacementRules(Value, frozen=True, kw_only=True):
    """Where a domain may run beside other domains. Hard: no drain or balancing breaks them."""

    affinity: tuple[DomainSelector, ...] = ()
    """On the same node as each of these that runs."""
    anti_affinity: tuple[DomainSelector, ...] = ()
    """Never on the same node as any of these."""
    pinned: tuple[Name, ...] = ()
    """Only on these nodes; empty: on any."""
