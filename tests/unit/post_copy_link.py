"""Connections of a post-copy that break at any byte, in the place of sockets."""

from __future__ import annotations

import itertools
import os
import socket
from collections.abc import Iterable
from typing import Final

from tests.unit.lockstep import Lockstep

_BUFFER_BYTES: Final = 6000
"""A source that sends more waits until the destination takes it."""
_NEVER: Final = float("inf")
_numbers = itertools.count(10_000)
"""In the place of descriptors."""


class End:
    """One end of a connection, with the methods of `socket.socket` that streams use."""

    def __init__(self, lockstep: Lockstep, buffer_bytes: int | None) -> None:
        """`buffer_bytes`: what may be on its way to this end; None: any."""
        self._lockstep = lockstep
        self._number = next(_numbers)
        self.peer: End
        self.buffer_bytes = buffer_bytes
        self.come = bytearray()
        """Sent to us, and not yet read."""
        self.ends_at_s = _NEVER
        """From when on we know that nothing follows what has come."""
        self.loses = False
        """What is sent arrives nowhere."""
        self.held_until_s = 0.0
        """What has come is still on its way."""
        self._silence_s: float | None = None
        self._shut = self._closed = False

    def fileno(self) -> int:
        return self._number

    def setblocking(self, blocking: bool) -> None:
        assert blocking

    def setsockopt(self, level: int, name: int, value: object) -> None:
        if isinstance(value, bytes) and name == socket.SO_RCVTIMEO:
            self._silence_s = int.from_bytes(value[:8], "little") or None

    def readable(self) -> bool:
        return (bool(self.come) and self._lockstep.now_s >= self.held_until_s) or self._ended()

    def _ended(self) -> bool:
        return self._shut or self._lockstep.now_s >= self.ends_at_s

    def recv_into(self, view: memoryview, count: int, flags: int) -> int:
        assert flags == socket.MSG_WAITALL
        assert view
        self._refuse_closed()
        got = 0
        while got < len(view) and self._lockstep.wait(self.readable, self._silence_s):
            self._refuse_closed()
            count = min(len(self.come), len(view) - got)
            if not count:  # It ends.
                return got
            view[got : got + count] = self.come[:count]
            del self.come[:count]
            got += count
        if not got:
            raise BlockingIOError
        return got

    def sendmsg(self, buffers: Iterable[bytes | memoryview]) -> int:
        data = b"".join(buffers)
        self._lockstep.pause()
        self._refuse_closed()
        if not self._lockstep.wait(lambda: self._ended() or self._room() > 0, self._silence_s):
            raise BlockingIOError
        if self._ended():
            raise BrokenPipeError
        data = data[: self._lockstep.chance.randint(1, self._room())]
        if not self.loses:
            self.peer.come += data
        return len(data)

    def _room(self) -> int:
        most = self.peer.buffer_bytes
        return 1 << 30 if most is None or self.loses else most - len(self.peer.come)

    def shutdown(self, how: int) -> None:
        self._lockstep.pause()
        if self._closed:
            raise OSError("closed")
        self._leave()

    def close(self) -> None:
        self._lockstep.pause()
        self._leave()
        self._closed = True

    def _leave(self) -> None:
        """The other end reads what was sent, and mostly all of it."""
        if self._shut:
            return
        self._shut = True
        self.peer.loses = True
        if self._lockstep.chance.random() < 0.3:
            self.peer.cut()
        self.peer.ends_at_s = min(self.peer.ends_at_s, self._lockstep.now_s)

    def cut(self) -> None:
        """Some of what is on its way is lost."""
        del self.come[self._lockstep.chance.randint(0, len(self.come)) :]

    def _refuse_closed(self) -> None:
        if self._closed:
            raise OSError(os.EX_IOERR, "used after its close")


def connect(lockstep: Lockstep) -> tuple[End, End]:
    """(the source's, the destination's)."""
    source, destination = End(lockstep, None), End(lockstep, _BUFFER_BYTES)
    source.peer, destination.peer = destination, source
    return source, destination


def break_connection(lockstep: Lockstep, end: End) -> None:
    """At any byte; each end sees it sooner or later."""
    for each in (end, end.peer):
        each.loses = True
        each.cut()
        seen_s = lockstep.now_s + lockstep.chance.choice((0.0, 0.0, 0.01, 3.0))
        each.ends_at_s = min(each.ends_at_s, seen_s)
        lockstep.alarm(seen_s)


def hold_connection(lockstep: Lockstep, end: End) -> None:
    """Nothing arrives for a while, which may be longer than anybody is patient."""
    until_s = lockstep.now_s + lockstep.chance.choice((0.3, 3.0, 8.0))
    end.held_until_s = end.peer.held_until_s = until_s
    lockstep.alarm(until_s)
