"""The agent's side of an engine process: asyncio, never blocking.

    process = await EngineProcess.spawn(log_path=..., on_message=..., on_exit=...)
    process.send(Configure(...), fds=memory.fds)
    ...
    await process.stop(timeout_s=1.0)

The engine is in a session of its own, so that a terminal's signals miss it, and dies with its end
of the socketpair: an agent that is killed leaves no engine behind.
"""

from __future__ import annotations

import array
import asyncio
import collections
import contextlib
import errno
import logging
import os
import select
import socket
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from migrator import wire
from migrator.engine.control import PASSING, PASSING_S, SEND_TIMEOUT_S
from migrator.engine_messages import FromEngine, Stop, ToEngine
from migrator.errors import EngineError, RemoteProtocolError, words
from migrator.own_threads import STATE_DIRECTORY, in_own_thread
from migrator.shortage import unstarted

log = logging.getLogger(__name__)
KILLED_S: Final = 10.0
"""A disk that hangs can keep a process, whatever it is told."""
_decoder: Final = msgspec.msgpack.Decoder(FromEngine)
_OUTGOING_MAX: Final = 64
"""Messages waiting for the engine. It reads at every frame: more means that it hangs."""
_RECEIVE_BYTES: Final = 65536
_ROOT: Final = str(Path(__file__).resolve().parents[2])


class EngineProcess:
    """One engine. Callbacks run in the event loop; after `on_exit` nothing more comes."""

    def __init__(
        self,
        process: asyncio.subprocess.Process,
        sock: socket.socket,
        on_message: Callable[[FromEngine], None],
        on_exit: Callable[[int], None],
    ) -> None:
        """Use `spawn`."""
        self._process = process
        self._sock = sock
        self._on_message = on_message
        self._on_exit = on_exit
        self._loop = asyncio.get_running_loop()
        self._frames = wire.FrameDecoder()
        self._outgoing: collections.deque[tuple[memoryview, tuple[int, ...]]] = collections.deque()
        self._writing = False
        self._short_since: float | None = None
        """Since when the kernel has no memory for what is to be sent."""
        self._retry: asyncio.TimerHandle | None = None
        """Of the next try then."""
        self._watch = self._loop.create_task(self._watch_exit(), name="engine-exit")
        self._loop.add_reader(sock, self._readable)

    @classmethod
    async def spawn(
        cls,
        *,
        log_path: Path,
        on_message: Callable[[FromEngine], None],
        on_exit: Callable[[int], None],
        python: str = sys.executable,
    ) -> EngineProcess:
        """Start an engine whose output is appended to `log_path`. EngineError if it can't be.

        Its first message must be `Configure`, with the memory's descriptors.
        """
        ours, theirs = socket.socketpair()
        log_fd = -1
        try:
            ours.setblocking(False)
            log_fd = await _open_log(log_path)
            process = await asyncio.create_subprocess_exec(
                python,
                *("-m", "migrator.engine", "--fd", str(theirs.fileno())),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log_fd,
                stderr=log_fd,
                pass_fds=(theirs.fileno(),),
                start_new_session=True,
                env=_environment(),
            )
        except OSError as error:
            ours.close()
            raise EngineError(f"the engine can't be started: {unstarted(error)}") from error
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
            if log_fd >= 0:
                os.close(log_fd)
        return cls(process, ours, on_message, on_exit)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.returncode is None

    @property
    def hung_up(self) -> bool:
        """It has ended, or is about to, and `on_exit` hasn't told so yet."""
        if self._sock.fileno() < 0:
            return False
        poll = select.poll()
        poll.register(self._sock, 0)
        return any(events & select.POLLHUP for _, events in poll.poll(0))

    async def end_told(self) -> None:
        """Return when `on_exit` has told, or after KILLED_S: see `stop`."""
        await asyncio.wait([self._watch], timeout=KILLED_S)

    def attach(
        self, on_message: Callable[[FromEngine], None], on_exit: Callable[[int], None]
    ) -> None:
        """Take over an engine that was started ahead; nothing was said by it yet.

        One that has ended meanwhile tells so all the same.
        """
        self._on_message = on_message
        self._on_exit = on_exit
        status = self._process.returncode
        if self._watch.done() and status is not None:
            self._loop.call_soon(on_exit, status)

    def send(self, message: ToEngine, fds: Sequence[int] = ()) -> None:
        """Queue a message. `fds` travel with its first byte and are duplicated here: the caller
        may close them at once. A message to an engine that has ended is dropped: `on_exit` tells.

        EngineError if the engine has stopped reading. OSError: no descriptors are left.
        """
        if self._sock.fileno() < 0:
            return
        if len(self._outgoing) >= _OUTGOING_MAX:
            raise EngineError("the engine doesn't read its messages")
        data = memoryview(wire.encode_frame(wire.FrameKind.ENGINE, message))
        self._outgoing.append((data, _duplicates(fds)))
        if self._retry is None:
            self._flush()

    async def stop(self, timeout_s: float) -> bool:
        """Ask it to stop, and kill it after `timeout_s`. Returns when it is gone; True: by itself.

        One that the kernel doesn't let go is given up after KILLED_S: it does no more when it comes
        to, and has its guest's dirty log until then (`engine.dirty_log`).

        A killed source engine leaves the guest's tracking registered: see `left_tracking`.
        """
        with contextlib.suppress(EngineError):
            self.send(Stop())
        try:
            async with asyncio.timeout(timeout_s):
                await asyncio.shield(self._watch)
        except TimeoutError:
            self.kill()
            _, late = await asyncio.wait([self._watch], timeout=KILLED_S)
            if late:
                log.error("engine %d was killed and doesn't end", self.pid)
            return False
        return True

    def kill(self) -> None:
        """SIGKILL. Idempotent. `on_exit` follows."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def _flush(self) -> None:
        self._retry = None
        if self._sock.fileno() < 0:
            return  # It has ended meanwhile.
        try:
            while self._outgoing:
                data, fds = self._outgoing[0]
                ancillary = (
                    [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
                )
                count = self._sock.sendmsg([data], ancillary)
                self._short_since = None
                _close_all(fds)
                if count < len(data):
                    self._outgoing[0] = (data[count:], ())
                else:
                    self._outgoing.popleft()
        except BlockingIOError:
            self._short_since = None
            if not self._writing:
                self._writing = True
                self._loop.add_writer(self._sock, self._flush)
            return
        except OSError as error:
            if error.errno in PASSING and self._may_pass():
                self._retry = self._loop.call_later(PASSING_S, self._flush)
            else:
                self._drop_outgoing()  # It has ended; `_watch_exit` tells.
                if error.errno not in (errno.EPIPE, errno.ECONNRESET):
                    log.error("engine %d can't be told anything: %s", self.pid, words(error))
                    self.kill()
        if self._writing:
            self._writing = False
            self._loop.remove_writer(self._sock)

    def _may_pass(self) -> bool:
        """Whether a shortage is young enough to be waited for."""
        now = self._loop.time()
        self._short_since = now if self._short_since is None else self._short_since
        return now - self._short_since < SEND_TIMEOUT_S

    def _readable(self) -> None:
        try:
            data = self._sock.recv(_RECEIVE_BYTES)
        except BlockingIOError:
            return
        except OSError:
            data = b""
        if not data:
            self._loop.remove_reader(self._sock)
            return
        try:
            for frame in self._frames.feed(data):
                self._on_message(frame.decode(_decoder))
        except RemoteProtocolError:
            self._loop.remove_reader(self._sock)
            self.kill()

    async def _watch_exit(self) -> None:
        status = await self._process.wait()
        self._read_rest()
        self._drop_outgoing()
        self._loop.remove_reader(self._sock)
        self._loop.remove_writer(self._sock)
        self._sock.close()
        self._on_exit(status)

    def _read_rest(self) -> None:
        """Its last words may still be in the socket when its exit is seen."""
        with contextlib.suppress(OSError, RemoteProtocolError):
            while data := self._sock.recv(_RECEIVE_BYTES):
                for frame in self._frames.feed(data):
                    self._on_message(frame.decode(_decoder))

    def _drop_outgoing(self) -> None:
        for _, fds in self._outgoing:
            _close_all(fds)
        self._outgoing.clear()


async def _open_log(path: Path) -> int:
    """To append to. OSError. Of one that takes too long to be waited for nothing stays open."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC
    opening = in_own_thread(STATE_DIRECTORY, lambda: os.open(path, flags, 0o600))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close_opened)
        raise


def _close_opened(opening: asyncio.Future[int]) -> None:
    if not opening.cancelled() and opening.exception() is None:
        os.close(opening.result())


def _duplicates(fds: Sequence[int]) -> tuple[int, ...]:
    """All of them, or none. OSError."""
    made: list[int] = []
    try:
        while len(made) < len(fds):
            made.append(os.dup(fds[len(made)]))
    except OSError:
        _close_all(made)
        raise
    return tuple(made)


def _close_all(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)


def _environment() -> dict[str, str]:
    """Ours, with this package importable from wherever the agent's code is.

    numpy's linear algebra, which no engine needs, would start a spinning thread for each core.
    """
    paths = [_ROOT, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OPENBLAS_NUM_THREADS": "1"}
