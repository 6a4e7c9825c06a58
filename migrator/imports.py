"""Importing much at once, as an agent and an engine do at their start."""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def without_collections() -> Iterator[None]:
    """Around imports: nothing looks for garbage meanwhile, and never among what has come by then.

    There is hardly any, and the looking takes a tenth of a start.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
