"""Copies of volumes that are under way. Whoever is to write to a volume ends its copies.

A copy takes as long as there are bytes, so it holds no lock: nobody waits for it who opens the
volume, or only looks. It is one of a single moment because it is thrown away if anybody could have
written meanwhile. On the event loop, but for `Copy.given_up`.
"""

from __future__ import annotations

import threading
from collections import defaultdict


class Copy:
    """One, of `volume`."""

    def __init__(self, volume: str) -> None:
        self.volume = volume
        self.given_up = threading.Event()
        """Set: the thread that copies should stop."""
        self.why = ""
        """Why it is worth nothing; "": it is whole once it is done."""

    def end(self, why: str) -> None:
        """Idempotent; the first reason stays."""
        self.why = self.why or why
        self.given_up.set()


class Copies:
    """Those of all volumes."""

    def __init__(self) -> None:
        self._of: defaultdict[str, set[Copy]] = defaultdict(set)

    def begin(self, volume: str) -> Copy:
        """`done` is for when nothing can spoil it any more."""
        copy = Copy(volume)
        self._of[volume].add(copy)
        return copy

    def done(self, copy: Copy) -> None:
        """Idempotent."""
        self._of[copy.volume].discard(copy)
        if not self._of[copy.volume]:
            del self._of[copy.volume]

    def end(self, volume: str, why: str) -> None:
        """All of that volume."""
        for copy in self._of.get(volume, ()):
            copy.end(why)
