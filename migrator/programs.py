"""Other programs, run to their end and no longer.

    run ──► the program ends ──► how it ended, and what it had printed by then
              └ it is late, or we are cancelled ──► SIGKILL, and END_S for its end

The program's own end counts, and not that of its pipes, for which asyncio's `communicate` (in
Python 3.11 `wait`, too) waits: a daemon that it has started may hold them for ever, as ssh's
connection that persists does.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import logging
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Final, cast

END_S: Final = 5.0
"""From SIGKILL to its end; a program in an uninterruptible I/O may take longer, and is left."""
OUTPUT_BYTES_MAX: Final = 4 * 1024 * 1024
"""Of standard output and of standard error; what is beyond it is dropped."""
_READ_BYTES: Final = 64 * 1024
_PRINTED: Final = (1, 2)

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True, slots=True)
class Ended:
    """How a program ended: its exit status, or the signal that ended it as a negative number."""

    status: int
    out: bytes
    err: bytes


async def run(
    argv: Sequence[str],
    *,
    timeout_s: float,
    stdin: bytes = b"",
    environment: Mapping[str, str] | None = None,
    folder: str | None = None,
    with_group: bool = False,
) -> Ended:
    """Run it without a shell. OSError: it can't be run. TimeoutError: it was late, and killed.

    `with_group`: it gets a session of its own, and what it leaves in its process group is killed
    when it has ended.
    """
    transport, program = await asyncio.get_running_loop().subprocess_exec(
        _Program,
        *argv,
        env=None if environment is None else dict(environment),
        cwd=folder,
        start_new_session=with_group,
    )
    try:
        program.give(stdin)
        async with asyncio.timeout(timeout_s):
            await asyncio.shield(program.ended)
        status = transport.get_returncode()
        assert status is not None
        return Ended(status, *program.printed())
    finally:
        try:
            _kill(transport, with_group=with_group)
            await asyncio.wait({program.ended}, timeout=END_S)
            if not program.ended.done():
                _log.warning("%s was killed, and has not ended in %g s", argv[0], END_S)
        finally:
            transport.close()


def _kill(transport: asyncio.SubprocessTransport, *, with_group: bool) -> None:
    with contextlib.suppress(ProcessLookupError):
        if with_group:
            os.killpg(transport.get_pid(), signal.SIGKILL)
        elif transport.get_returncode() is None:
            transport.kill()


class _Program(asyncio.SubprocessProtocol):
    """What it prints, and when it ends."""

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self.ended: asyncio.Future[None] = self._loop.create_future()
        self._printed = {number: bytearray() for number in _PRINTED}
        self._transport: asyncio.SubprocessTransport | None = None

    def give(self, data: bytes) -> None:
        """All of its standard input."""
        pipe = self._pipe(0)
        if pipe is not None:
            writer = cast("asyncio.WriteTransport", pipe)
            writer.write(data)
            writer.close()

    def printed(self) -> tuple[bytes, bytes]:
        out, err = (bytes(self._printed[number]) for number in _PRINTED)
        return out, err

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.SubprocessTransport", transport)

    def pipe_data_received(self, fd: int, data: bytes) -> None:
        kept = self._printed[fd]
        kept += data[: OUTPUT_BYTES_MAX - len(kept)]

    def process_exited(self) -> None:
        # What the transports have read already comes first; what is still in the pipes is ours.
        for number in _PRINTED:
            if (pipe := self._pipe(number)) is not None:
                cast("asyncio.ReadTransport", pipe).pause_reading()
        self._loop.call_soon(self._read_the_rest)

    def _read_the_rest(self) -> None:
        for number in _PRINTED:
            pipe = self._pipe(number)
            descriptor = None if pipe is None else pipe.get_extra_info("pipe").fileno()
            while descriptor is not None and len(self._printed[number]) < OUTPUT_BYTES_MAX:
                try:
                    data = os.read(descriptor, _READ_BYTES)
                except BlockingIOError:
                    break  # Somebody else holds it, and may print more; it isn't ours.
                if not data:
                    break
                self.pipe_data_received(number, data)
        self.ended.set_result(None)

    def _pipe(self, number: int) -> asyncio.BaseTransport | None:
        """None: it is closed."""
        pipe = None if self._transport is None else self._transport.get_pipe_transport(number)
        return None if pipe is None or pipe.is_closing() else pipe
