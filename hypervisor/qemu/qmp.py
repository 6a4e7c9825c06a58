"""One connection to a QEMU monitor: bounded commands, events as they come, loss noticed.

A thin layer over the library `qemu.qmp`, which matches replies by id. What this adds:

- each command has a timeout, and every failure is a HypervisorError that says whether QEMU
  refused (QmpCommandError), was silent (QmpTimeout), or is not connected (QmpDisconnected);
- events go straight to a callback, in order, with QEMU's own time stamp: the library's listeners
  keep every event for ever, and cost a task switch in the blackout;
- `execute_out_of_band`: QEMU runs it in the monitor's own thread, also while its main loop hangs.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import msgspec
from qemu.qmp import ExecuteError, QMPClient, QMPError, Runstate
from qemu.qmp.events import EventListener
from qemu.qmp.message import Message

from migrator.errors import HypervisorError

logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)
"""The library logs each failure that it also raises, at level ERROR. We report them ourselves."""

SOCKET_PATH_BYTES_MAX = 107
"""sun_path in unix(7), less the final NUL."""

DISCONNECT_TIMEOUT_S = 2.0
"""The library flushes what it has to send first, which a stopped QEMU never reads."""


class _Client(QMPClient):
    """Writes no message down as text for a debug log: that took 5 ms of each migration's CPU."""

    def _cb_outbound(self, msg: Message) -> Message:
        return msg

    def _cb_inbound(self, msg: Message) -> Message:
        return msg


class QmpCommandError(HypervisorError):
    """QEMU answered with an error. `error_class` is QEMU's name for it."""

    def __init__(self, message: str, error_class: str) -> None:
        super().__init__(message)
        self.error_class = error_class


class QmpTimeout(HypervisorError):
    """QEMU didn't answer in time. Whether it will still carry the command out is unknown."""


class QmpDisconnected(HypervisorError):
    """There is no connection. If it broke with a command under way, its outcome is unknown."""


class QmpNotSent(QmpDisconnected):
    """There was no connection to begin with: QEMU never got the command."""


class QmpEvent(msgspec.Struct, frozen=True, kw_only=True):
    """An asynchronous message from QEMU. `at_s`: QEMU's wall clock, microseconds precise."""

    name: str
    at_s: float
    data: Mapping[str, object]


def parse_event(message: Mapping[str, object]) -> QmpEvent:
    """A QMP event as a value. Unknown shapes become empty fields rather than failures."""
    stamp, data = message.get("timestamp"), message.get("data")
    seconds = 0.0
    if isinstance(stamp, Mapping):
        whole, micro = stamp.get("seconds", 0), stamp.get("microseconds", 0)
        if isinstance(whole, int) and isinstance(micro, int):
            seconds = whole + micro / 1e6
    return QmpEvent(
        name=str(message.get("event", "")),
        at_s=seconds,
        data=data if isinstance(data, Mapping) else {},
    )


class _Tap(EventListener):
    """Hands each event to a callback and keeps none."""

    def __init__(self, callback: Callable[[QmpEvent], None]) -> None:
        super().__init__()
        self._callback = callback

    def accept(self, event: Message) -> bool:
        self._callback(parse_event(event))
        return False


@contextlib.contextmanager
def short_path(path: Path) -> Iterator[str]:
    """`path`, or an equal one that fits a socket address: through the folder's descriptor."""
    if len(os.fsencode(path)) <= SOCKET_PATH_BYTES_MAX:
        yield str(path)
        return
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{folder}/{path.name}"
    finally:
        os.close(folder)


class Monitor:
    """A connected monitor. `on_event` and `on_lost` are called from the event loop.

    `on_lost` is called once, when QEMU's end goes away; not after `close`.
    """

    def __init__(
        self, name: str, on_event: Callable[[QmpEvent], None], on_lost: Callable[[], None]
    ) -> None:
        self._name = name
        self._on_lost = on_lost
        self._client = _Client(name)
        self._client.events.event_filter = lambda _event: False
        self._client.register_listener(_Tap(on_event))
        self._watcher: asyncio.Task[None] | None = None
        self._ending: asyncio.Task[None] | None = None
        self._closed = False

    @property
    def connected(self) -> bool:
        return self._client.runstate is Runstate.RUNNING

    @property
    def version(self) -> str:
        """QEMU's version from its greeting, e.g. `7.2.22`. Empty before `connect`."""
        greeting = self._client.greeting
        if greeting is None:
            return ""
        numbers = greeting.QMP.version["qemu"]
        assert isinstance(numbers, Mapping)
        return ".".join(str(numbers[part]) for part in ("major", "minor", "micro"))

    async def connect(self, address: Path | socket.socket, *, timeout_s: float) -> None:
        """Connect and negotiate. QmpTimeout if another client holds the monitor.

        On failure nothing stays open; a socket that was passed in is closed.
        """
        try:
            async with asyncio.timeout(timeout_s):
                if isinstance(address, Path):
                    address = await _connect(address)
                await self._client.connect(address)
        except TimeoutError as error:
            raise QmpTimeout(f"{self._name}: no greeting within {timeout_s:g} s") from error
        except (OSError, QMPError, EOFError) as error:
            raise QmpDisconnected(f"{self._name}: can't connect to the monitor: {error}") from error
        finally:
            if isinstance(address, socket.socket) and not self.connected:
                address.close()
        self._watcher = asyncio.create_task(self._watch(), name=f"{self._name}-watch")

    async def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> object:
        """Run a command and return QEMU's answer. Raises one of this module's errors."""
        return await self._run(command, arguments, timeout_s, out_of_band=False)

    async def execute_out_of_band(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float
    ) -> object:
        """As `execute`, for the few commands that QEMU runs beside its main loop (`yank`)."""
        return await self._run(command, arguments, timeout_s, out_of_band=True)

    async def _run(
        self,
        command: str,
        arguments: Mapping[str, object] | None,
        timeout_s: float,
        *,
        out_of_band: bool,
    ) -> object:
        if not self.connected:
            raise QmpNotSent(f"{self._name}: {command}: not connected")
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, arguments, oob=out_of_band)
        except TimeoutError as error:
            raise QmpTimeout(
                f"{self._name}: no answer to {command} within {timeout_s:g} s"
            ) from error
        except ExecuteError as error:
            raise QmpCommandError(
                f"{self._name}: QEMU refused {command}: {error}", error.error_class
            ) from error
        except (QMPError, OSError, EOFError) as error:
            raise QmpDisconnected(f"{self._name}: {command}: not connected: {error}") from error

    async def hear_out(self) -> None:
        """When QEMU has ended: its last events, up to the end of the connection. Bounded."""
        if self._watcher is not None:
            await asyncio.wait([self._watcher], timeout=DISCONNECT_TIMEOUT_S)

    async def close(self) -> None:
        """Disconnect. Idempotent; never raises for a connection that is already broken."""
        self._closed = True
        await self._disconnect()
        if self._watcher is not None:
            await asyncio.wait([self._watcher])

    async def _watch(self) -> None:
        while self._client.runstate is Runstate.RUNNING:
            await self._client.runstate_changed()
        await self._disconnect()
        if not self._closed:
            self._on_lost()

    async def _disconnect(self) -> None:
        """One disconnect for all callers: the library allows no second one, and no cancelling."""
        if self._ending is None and self._client.runstate is not Runstate.IDLE:
            self._ending = asyncio.create_task(self._end(), name=f"{self._name}-disconnect")
        if self._ending is not None:
            await asyncio.shield(self._ending)

    async def _end(self) -> None:
        with contextlib.suppress(OSError, EOFError, QMPError, TimeoutError):
            async with asyncio.timeout(DISCONNECT_TIMEOUT_S):
                await self._client.disconnect()


async def _connect(path: Path) -> socket.socket:
    """A connected, non-blocking unix socket. The connect itself is immediate or fails."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        connection.setblocking(False)
        with short_path(path) as address:
            await asyncio.get_running_loop().sock_connect(connection, address)
    except BaseException:
        connection.close()
        raise
    return connection
