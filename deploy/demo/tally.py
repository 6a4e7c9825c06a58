"""Turns arrivals into observations: samples of equal width, gaps, losses. Pure: no clock, no I/O.

A sample is closed by `take(until_s)`. What arrives for a sample that was closed already, because
this process was starved, counts in the oldest one that is still open: no byte is ever lost.
"""

from __future__ import annotations

import dataclasses
from typing import Final

from deploy.demo.observations import (
    SAMPLE_S,
    Duplicate,
    Late,
    Loss,
    Observation,
    Reboot,
    Sample,
)
from deploy.guest.protocol import UdpPacket

LOSSES_KEPT_MAX: Final = 1_000_000
"""Missing numbers that are remembered, to tell a late packet from a duplicate; ten minutes' worth
of silence and more."""
_IDLE_SAMPLES_MAX: Final = 72_000
"""An hour. Bounds what one `take` makes after a jump of the clock."""


@dataclasses.dataclass(slots=True)
class _Open:
    stream_bytes: int = 0
    packets: int = 0
    longest_gap_ms: float = 0.0
    gap_ended_at_s: float = 0.0


class Tally:
    """The samples from `started_at_s` on. Not for several threads at once."""

    def __init__(self, started_at_s: float) -> None:
        self._started_at_s = started_at_s
        self._closed = 0
        self._open: dict[int, _Open] = {}
        self._events: list[Observation] = []
        self._boot_id: int | None = None
        self._highest = 0
        self._missing: set[int] = set()
        self._packet_at_s: float | None = None

    def note(self, observation: Observation) -> None:
        """Something that isn't counted here, to be taken with the rest."""
        self._events.append(observation)

    def stream(self, at_s: float, count_bytes: int) -> None:
        """Bytes of the download arrived."""
        self._sample(at_s).stream_bytes += count_bytes

    def packet(self, at_s: float, packet: UdpPacket) -> None:
        """A numbered packet arrived."""
        if self._boot_id is not None and packet.boot_id != self._boot_id:
            self._events.append(Reboot(at_s=at_s))
        if packet.boot_id != self._boot_id:
            self._boot_id, self._highest = packet.boot_id, packet.sequence - 1
            self._missing.clear()
        sample = self._sample(at_s)
        sample.packets += 1
        self._end_gap(sample, at_s)
        self._packet_at_s = max(at_s, self._packet_at_s or at_s)
        self._number(at_s, packet.sequence)

    def take(self, until_s: float, *, last: bool = False) -> list[Observation]:
        """Close and return every sample that ended before `until_s`, and what else was noted.

        `last`: the sample in which `until_s` lies, too, and a gap that is still open.
        """
        if last and self._packet_at_s is not None and until_s > self._packet_at_s:
            self._end_gap(self._sample(until_s), until_s)
        end = self._index(until_s) + (1 if last else 0)
        end = min(end, self._closed + _IDLE_SAMPLES_MAX)
        taken: list[Observation] = []
        for index in range(self._closed, end):
            counts = self._open.pop(index, None) or _Open()
            taken.append(
                Sample(
                    at_s=self._started_at_s + index * SAMPLE_S,
                    stream_bytes=counts.stream_bytes,
                    packets=counts.packets,
                    longest_gap_ms=counts.longest_gap_ms,
                    gap_ended_at_s=counts.gap_ended_at_s,
                )
            )
        self._closed = max(self._closed, end)
        taken += self._events
        self._events = []
        return taken

    def _index(self, at_s: float) -> int:
        return int((at_s - self._started_at_s) / SAMPLE_S)

    def _sample(self, at_s: float) -> _Open:
        return self._open.setdefault(max(self._index(at_s), self._closed), _Open())

    def _end_gap(self, sample: _Open, at_s: float) -> None:
        if self._packet_at_s is None:
            return
        gap_ms = (at_s - self._packet_at_s) * 1e3
        if gap_ms > sample.longest_gap_ms:
            sample.longest_gap_ms, sample.gap_ended_at_s = gap_ms, at_s

    def _number(self, at_s: float, sequence: int) -> None:
        if sequence > self._highest:
            skipped = sequence - self._highest - 1
            if skipped:
                first = self._highest + 1
                self._events.append(Loss(at_s=at_s, first_sequence=first, count=skipped))
                room = max(LOSSES_KEPT_MAX - len(self._missing), 0)
                self._missing.update(range(first, first + min(skipped, room)))
            self._highest = sequence
        elif sequence in self._missing:
            self._missing.remove(sequence)
            self._events.append(Late(at_s=at_s, sequence=sequence))
        else:
            self._events.append(Duplicate(at_s=at_s, sequence=sequence))
