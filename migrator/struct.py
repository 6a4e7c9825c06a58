"""The base of values that stay inside the program."""

from __future__ import annotations

import msgspec


class Struct(msgspec.Struct, frozen=True, kw_only=True):
    """Base of immutable values inside the program."""
