"""What comes in by one connection: bytes into memory, or into a pipe, each wait bounded.

One thread reads. Another may `revoke` it, and close it to whoever writes.

Whatever the kernel says of a connection (ENOBUFS and ENOMEM, too: it has no memory for a socket at
that moment) ends that connection, which can be made anew. EFAULT alone is said of the memory that
is read into, and is passed on as it is: OSError.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import time
from typing import Final

from migrator.engine.transport import SecureSocket, StreamSocket
from migrator.errors import words

_FLAGS: Final = socket.MSG_WAITALL


class ConnectionEndedError(Exception):
    """End of file, a reset or another error of the socket, a silence within a frame, `revoke`."""


class Intake:
    """Reads from `sock`, which blocks, with its waits limited to `silence_s`. Doesn't own it."""

    def __init__(self, sock: StreamSocket, silence_s: float) -> None:
        self._sock = sock
        self._silence_s = silence_s
        self._revoked = False

    @property
    def can_splice(self) -> bool:
        """What comes is content as it is, and the kernel's."""
        return not isinstance(self._sock, SecureSocket)

    def revoke(self) -> None:
        """Whoever reads, or will, gets ConnectionEndedError. From any thread."""
        self._revoked = True
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def fill(self, view: memoryview, *, idle: bool = False, deadline: float | None = None) -> None:
        """All of `view`. `idle`: any time may pass before the first byte."""
        got = 0
        while got < len(view):
            self._check(deadline)
            try:
                count = self._sock.recv_into(view[got:], 0, _FLAGS)
            except BlockingIOError:
                if idle and not got:
                    continue
                raise self._silent() from None
            except OSError as error:
                raise _ended(error) from error
            got += self._some(count)

    def fill_scattered(self, views: list[memoryview]) -> None:
        """All of each, at most IOV_MAX (1024) of them. Of mapped memory EFAULT may be told."""
        done = 0
        while done < len(views):
            self._check(None)
            try:
                count = self._sock.recvmsg_into(views[done:], 0, _FLAGS)[0]
            except BlockingIOError:
                raise self._silent() from None
            except OSError as error:
                raise _ended(error) from error
            self._some(count)
            while done < len(views) and count >= len(views[done]):
                count -= len(views[done])
                done += 1
            if count:
                views[done] = views[done][count:]

    def splice(self, pipe: int, bytes_max: int) -> int:
        """Move some of what has come into an empty pipe, without a copy; how much, at least 1."""
        self._check(None)
        try:
            count = os.splice(self._sock.fileno(), pipe, bytes_max)
        except BlockingIOError:
            raise self._silent() from None
        except OSError as error:
            raise _ended(error) from error
        return self._some(count)

    def _some(self, count: int) -> int:
        if count == 0:
            raise ConnectionEndedError("the source's engine closed the stream")
        return count

    def _check(self, deadline: float | None) -> None:
        if self._revoked:
            raise ConnectionEndedError("the stream was replaced")
        if deadline is not None and time.monotonic() > deadline:
            raise ConnectionEndedError("the hello took too long")

    def _silent(self) -> ConnectionEndedError:
        return ConnectionEndedError(
            f"the source's engine was silent for {self._silence_s:g} s within a frame"
        )


def _ended(error: OSError) -> Exception:
    """Of a socket's error. EFAULT is raised as it is."""
    if error.errno == errno.EFAULT:
        raise error
    return ConnectionEndedError(words(error))
