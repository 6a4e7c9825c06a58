"""Which Ferry this is."""

from __future__ import annotations

import functools
from importlib import metadata


@functools.cache
def version() -> str:
    """The installed version, "0" where it isn't installed."""
    try:
        return metadata.version("ferry")
    except metadata.PackageNotFoundError:
        return "0"
