"""The engine's end of the socketpair to its agent, and waiting that never forgets the agent.

Everything that may take long in an engine waits through a `Waiter`, so that a dead agent, a
`Stop` or a new bandwidth is noticed within a frame, whatever the engine is doing.
"""

from __future__ import annotations

import collections
import errno
import os
import select
import socket
import threading
import time
from collections.abc import Callable
from typing import Final, Protocol

import msgspec

from migrator import wire
from migrator.engine_messages import Configure, FromEngine, Stop, ToEngine
from migrator.errors import EngineError, LocalProtocolError

POLL_IN: Final = select.POLLIN
POLL_OUT: Final = select.POLLOUT

_DESCRIPTORS_MAX: Final = 253  # linux/socket.h, SCM_MAX_FD
SEND_TIMEOUT_S: Final = 10.0
PASSING: Final = frozenset({errno.ENOBUFS, errno.ENOMEM})
"""The kernel has no memory for a socketpair's message at this moment; nobody is gone."""
PASSING_S: Final = 0.05
_SPARE_WAIT_S: Final = 1.0
"""One wait of an engine that was started ahead; it looks at its host, and waits again."""
_decoder: Final = msgspec.msgpack.Decoder(ToEngine)


class AgentGoneError(Exception):
    """End of file on the socketpair, or the agent stopped reading. The engine must end."""


class StoppedError(Exception):
    """The agent said `Stop`, or SIGTERM came. The engine must end."""


class Control:
    """Messages to and from the agent. `send` from any thread, the rest from the main thread."""

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._frames = wire.FrameDecoder()
        self._lock = threading.Lock()
        self.pipelined: list[ToEngine] = []
        """What came together with `Configure`: to be handled before the next `receive`."""
        self._descriptors: list[int] = []
        self.at_switchover: Callable[[], None] = lambda: None
        """Called from a helper thread when the guest is about to stand still."""

    def fileno(self) -> int:
        return self._sock.fileno()

    def send(self, message: FromEngine) -> None:
        """AgentGoneError if the agent is dead, or hasn't read for 10 s."""
        data = memoryview(wire.encode_frame(wire.FrameKind.ENGINE, message))
        deadline = time.monotonic() + SEND_TIMEOUT_S
        with self._lock:
            while data:
                try:
                    data = data[self._sock.send(data) :]
                except BlockingIOError:
                    left = deadline - time.monotonic()
                    if left <= 0 or not poll({self.fileno(): POLL_OUT}, left):
                        raise AgentGoneError("the agent doesn't read") from None
                except OSError as error:
                    if error.errno not in PASSING or time.monotonic() > deadline:
                        raise AgentGoneError(str(error)) from error
                    time.sleep(PASSING_S)  # Such a socket is writable all the while.

    def receive(self) -> list[ToEngine]:
        """What has arrived, without waiting. AgentGoneError at the end."""
        try:
            data, descriptors, _, _ = socket.recv_fds(self._sock, 65536, _DESCRIPTORS_MAX)
        except BlockingIOError:
            return []
        except OSError as error:
            raise AgentGoneError(str(error)) from error
        if not data:
            raise AgentGoneError("the agent closed the socket")
        for descriptor in descriptors:
            os.set_inheritable(descriptor, False)
        self._descriptors += descriptors
        return [frame.decode(_decoder) for frame in self._frames.feed(data)]

    def receive_configure(self, waiting: Callable[[], None]) -> tuple[Configure, list[int]]:
        """The first message, with its descriptors; what came with it is in `pipelined`.

        An engine that was started ahead waits as long as its agent lives, and calls `waiting` after
        each second of it.
        """
        while True:
            if not poll({self.fileno(): POLL_IN}, _SPARE_WAIT_S):
                waiting()
                continue
            messages = self.receive()
            if not messages:
                continue
            first, *self.pipelined = messages
            if isinstance(first, Stop):
                raise StoppedError("it wasn't needed")
            if not isinstance(first, Configure):
                raise LocalProtocolError(f"{type(first).__name__} came before Configure")
            wanted = len(first.regions) + (2 if first.attached else 0)
            if len(self._descriptors) < wanted:
                raise LocalProtocolError(
                    f"{len(first.regions)} regions came with {len(self._descriptors)} descriptors"
                )
            taken, self._descriptors = self._descriptors[:wanted], self._descriptors[wanted:]
            return first, taken

    def take_descriptor(self) -> int:
        """The next one that came with a message behind `Configure`."""
        if not self._descriptors:
            raise LocalProtocolError("a message came without its descriptor")
        return self._descriptors.pop(0)

    def close(self) -> None:
        self._sock.close()


def poll(watched: dict[int, int], timeout_s: float) -> dict[int, int]:
    """poll(2): descriptor -> wanted events in, descriptor -> what happened out."""
    poller = select.poll()
    for descriptor, events in watched.items():
        poller.register(descriptor, events)
    return dict(poller.poll(max(0, int(timeout_s * 1000 + 0.999))))


class Pollable(Protocol):
    def fileno(self) -> int: ...


class Waiter(Protocol):
    """How a sending thread waits. Raises what ends the engine: AgentGoneError, StoppedError."""

    def wait(self, source: Pollable | None, events: int, timeout_s: float) -> bool:
        """Whether `events` (or an error) came to `source` in time. None: just pass the time."""

    def tick(self) -> None:
        """Called between frames: look at the control socket, report."""


class Signal:
    """A flag that wakes a poll: set in one thread, seen by all others. Stays set until cleared."""

    def __init__(self) -> None:
        self._fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)

    def fileno(self) -> int:
        return self._fd

    def set(self) -> None:
        os.eventfd_write(self._fd, 1)

    def clear(self) -> None:
        try:
            os.eventfd_read(self._fd)
        except BlockingIOError:
            return

    def close(self) -> None:
        os.close(self._fd)


class HelperWaiter:
    """Waits in a helper thread: ended by a signal from the main thread."""

    def __init__(self, stop: Signal) -> None:
        self._stop = stop

    def wait(self, source: Pollable | None, events: int, timeout_s: float) -> bool:
        watched = {self._stop.fileno(): POLL_IN}
        if source is not None:
            watched[source.fileno()] = events
        happened = poll(watched, timeout_s)
        if self._stop.fileno() in happened:
            raise StoppedError("the pass was given up")
        return bool(happened)

    def tick(self) -> None:
        if poll({self._stop.fileno(): POLL_IN}, 0):
            raise StoppedError("the pass was given up")


class ThreadFaults:
    """Exceptions of helper threads, for the main thread to raise."""

    def __init__(self) -> None:
        self.signal = Signal()
        self._faults: collections.deque[BaseException] = collections.deque()

    def report(self, fault: BaseException) -> None:
        self._faults.append(fault)
        self.signal.set()

    def raise_first(self) -> None:
        """Raise the first fault; nothing if there is none."""
        self.signal.clear()
        if self._faults:
            raise self._faults.popleft()


class ChannelLostError(EngineError):
    """The other engine could not be reached again in time."""
