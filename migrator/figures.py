"""Figures that are measured before a migration, and what is predicted from them. Values only.

dirty rate   how fast a guest writes, and on how many different pages (`DirtyPoint`s)
link speed   what the way to the destination carries, and how that is known
prediction   what `migrator.prediction` makes of the two
"""

from __future__ import annotations

import enum
from typing import Annotated

import msgspec

SAMPLE_S_MIN = 0.1
SAMPLE_S_MAX = 60.0
SampleSeconds = Annotated[float, msgspec.Meta(ge=SAMPLE_S_MIN, le=SAMPLE_S_MAX)]


class Figure(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of the values of this module."""


class DirtyPoint(Figure, frozen=True, kw_only=True):
    """Within `seconds` a guest wrote to so many different bytes of memory, in whole pages.

    Points of growing `seconds` make the curve of a working set: it flattens where the guest
    writes to the same pages again.
    """

    seconds: float
    bytes: int


class DirtyRate(Figure, frozen=True, kw_only=True):
    """How a running guest dirties its memory, sampled from its dirty log."""

    domain: str
    node: str
    sampled_at_s: float
    seconds: float
    """How long it was sampled."""
    pages_per_s: float
    """Pages dirtied a second; one that is written again after a tenth of a second counts again."""
    bytes_per_s: float
    working_set_bytes: int
    """What was dirtied at least once within `seconds`."""
    memory_in_use_bytes: int
    """Populated guest memory."""
    zero_share: float
    """The share of it that is pages of zeros, which aren't sent; from a sample of pages."""
    packed_share: float = 1.0
    """What LZ4 leaves of a byte of the others; from the same sample."""
    dirtied_packed_share: float | None = None
    """What it leaves of a byte of the pages that were dirtied; None: none was."""
    curve: tuple[DirtyPoint, ...]


class LinkOrigin(enum.StrEnum):
    """How the speed of a link is known."""

    MIGRATIONS = "migrations"
    """Measured by the last finished migrations between the two nodes."""
    INTERFACE = "interface"
    """What the network interface of the migration address says of itself."""
    PROBE = "probe"
    """A few megabytes sent for the purpose."""
    FIRST_PASS = "first-pass"
    """Measured by this migration's own first iteration."""


class LinkSpeed(Figure, frozen=True, kw_only=True):
    """What the way from a source to a destination carries."""

    bytes_per_s: float
    origin: LinkOrigin
    detail: str = ""
    overhead_s: float | None = None
    """Of a migration, beside its iterations and its blackout; None: not known."""
    fixed_blackout_ms: float | None = None
    """Of a blackout, beside the last pages; None: not known."""

    @property
    def uncapped_bytes_per_s(self) -> float | None:
        """What was measured with no cap in force; None: it wasn't (an interface only claims)."""
        measured = (LinkOrigin.MIGRATIONS, LinkOrigin.PROBE)
        return self.bytes_per_s if self.origin in measured else None


class Prediction(Figure, frozen=True, kw_only=True):
    """How a migration is expected to go, and the figures that it was made from."""

    converges: bool
    """Whether pre-copy gets within the downtime limit, in the time that the request allows."""
    reason: str
    iterations: int
    """Up to the switchover, the last pages of the paused guest included."""
    bytes_sent: int
    """Where it doesn't converge: up to giving up, or with what post-copy sends."""
    total_s: float
    blackout_ms: float
    """Where it neither converges nor ends in post-copy: what a switchover would cost."""
    memory_in_use_bytes: int
    zero_share: float
    dirty_rate_bytes_per_s: float
    """As the first iteration meets it."""
    dirty_rate_origin: str
    link: LinkSpeed
    packed_share: float = 1.0
    """What is left on the wire of a byte that isn't of a page of zeros."""
    dirtied_packed_share: float | None = None
    """The same, of the pages that the guest dirties meanwhile. None: as that, by an older agent."""
    post_copy: bool = False
    """What pre-copy leaves follows after the switchover."""
