"""The words for a migration's iterations, the page engine's passes (a part of `model`)."""

from __future__ import annotations

import enum

from migrator.names import Value


class PassKind(enum.StrEnum):
    """Which pages an iteration sends."""

    FIRST = "first"
    """Every populated extent."""
    DIRTY = "dirty"
    """What is pending: dirtied since it was last sent."""
    FINAL = "final"
    """The guest is paused: pending plus a last scan. Done only when the destination holds all."""
    STALE = "stale"
    """Before post-copy, the guest still runs: what is pending is dropped at the destination."""
    MISSING = "missing"
    """Post-copy, the guest is paused: what is pending after a last scan is told, not sent."""


class PassReport(Value, frozen=True, kw_only=True):
    """What one iteration did, in pages of 4 KiB.

    `pending_pages` were dirtied meanwhile, and not told as missing.
    """

    number: int
    kind: PassKind
    seconds: float
    pages: int
    bytes_sent: int
    """On the wire, headers included."""
    zero_pages: int = 0
    pending_pages: int = 0
    scan_seconds: float = 0.0
    payload_bytes: int = 0
    """Of guest memory in `pages`: more than `bytes_sent` where pages were compressed."""
    compressors: tuple[str, ...] = ()
    """What compressed them, like zstd-1: that of the most pages first."""
    same_pages: int = 0
    """Dirtied and not sent: by a hash they are as they were sent before."""
    deferred_pages: int = 0
    """Not sent, because the guest had dirtied them by then: they are among `pending_pages`."""
    cut_pages: int = 0
    """Not sent, because the iteration was ended early: they are among `pending_pages`, too."""
    dirtied_s: float = 0.0
    """In which `pending_pages` were dirtied: since the scan before, which is longer than `seconds`
    where the iteration had to wait for something. 0.0: not known, by an older engine."""
    pending_packed_share: float | None = None
    """What packing would leave of a byte of `pending_pages`, by a sample of them; None: the
    iteration packed nothing, or nothing is pending."""
