"""The source's page streams between passes: kept up, measured, and told what they won't carry.

Nothing that is said then is different twice. So where a stream breaks it is connected again, and
all of it is said again; a pass has to be more careful (`delivery.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Final

from migrator.engine.channel import ChannelHealth, reconnect
from migrator.engine.control import Waiter
from migrator.engine.frames import FrameKind
from migrator.engine.memory import MappedRegion
from migrator.engine.stream import PageStream, StreamBrokenError
from migrator.ranges import Ranges

_ROUND_TRIPS: Final = 3


class BetweenPasses:
    """See the module. ChannelLostError: a stream can't be connected again in `reconnect_s`."""

    def __init__(self, health: ChannelHealth, reconnect_s: float, waiter: Waiter) -> None:
        self._health = health
        self._reconnect_s = reconnect_s
        self._waiter = waiter

    def look_at(self, stream: PageStream) -> None:
        """Something has come. Nothing should: it is the end of the stream."""
        try:
            stream.collect_acks()
        except StreamBrokenError as error:
            self._restore(stream, error)

    def round_trip_ms(self, stream: PageStream) -> float:
        """The best of a few barriers: what an acknowledgement costs at least."""
        best_s = float("inf")
        for _ in range(_ROUND_TRIPS):
            began = time.monotonic()
            try:
                stream.barrier(self._waiter)
                stream.await_acknowledged(self._waiter)
            except StreamBrokenError as error:
                self._restore(stream, error)
                continue
            best_s = min(best_s, time.monotonic() - began)
        return best_s * 1e3

    def tell_missing(
        self,
        stream: PageStream,
        regions: Sequence[MappedRegion],
        missing: Sequence[Ranges],
        holes: Sequence[Ranges],
        *,
        arms: bool,
    ) -> None:
        """By region, what the destination lacks, and what is a hole there; returns when it is
        acknowledged. `arms`: that was the last of it.
        """
        while True:  # Each connecting again is bounded.
            try:
                for region, content, hole in zip(regions, missing, holes, strict=True):
                    stream.tell(FrameKind.ZERO, region, hole, self._waiter)
                    stream.tell(FrameKind.MISSING, region, content, self._waiter)
                if arms:
                    stream.tell(FrameKind.ARM, None, None, self._waiter)
                stream.await_acknowledged(self._waiter)
                return
            except StreamBrokenError as error:
                self._restore(stream, error)

    def _restore(self, stream: PageStream, error: StreamBrokenError) -> None:
        stream.take_unacknowledged()  # Barriers only: every pass awaits its acknowledgements.
        reconnect(stream, self._health, str(error), self._reconnect_s, self._waiter)
