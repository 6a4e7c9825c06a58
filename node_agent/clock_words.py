"""How far two clocks are apart, in words. Pure."""

from __future__ import annotations

from typing import Final

DIFFERS_S: Final = 10.0
"""Heartbeats tell it to about a second, where the store answers; what is less does no harm."""


def span_text(seconds: float) -> str:
    """A length of time, for an operator: "7 s", "5.0 min", "3.2 h", "365.0 days"."""
    if seconds < 120.0:
        return f"{seconds:.0f} s"
    if seconds < 7200.0:
        return f"{seconds / 60.0:.1f} min"
    if seconds < 172_800.0:
        return f"{seconds / 3600.0:.1f} h"
    return f"{seconds / 86_400.0:.1f} days"


def offset_text(offset_s: float, than: str) -> str:
    """ "5.0 min ahead of n1's"."""
    return f"{span_text(abs(offset_s))} {'ahead of' if offset_s > 0 else 'behind'} {than}"
