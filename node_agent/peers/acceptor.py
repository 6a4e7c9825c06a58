"""The listening side's TLS handshake, and why one failed.

asyncio's own TLS servers drop a failed handshake in silence, and keep one context for good. Here
each connection takes the context of its moment (so that a renewed certificate needs no restart),
and whoever fails is told to the caller: a stranger at the door belongs in the log. Who closes the
connection by itself was refused nothing, and isn't told.
"""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Callable
from typing import Final

from migrator.tls import verification_words

HANDSHAKE_S: Final = 5.0
HANDSHAKES_LIMIT: Final = 64
"""Unfinished ones at once: a stranger costs us no more than that."""
_REASON_CHARACTERS: Final = 200


async def stop_listening(server: asyncio.Server) -> None:
    """Close it, and forget no connection that it has just accepted.

    asyncio accepts a connection in one turn of its loop and makes its transport in the next: a
    server closed in between leaves a socket that nobody owns (3.11: `Server._attach` fails).
    """
    for listener in server.sockets:
        asyncio.get_running_loop().remove_reader(listener.fileno())
    await asyncio.sleep(0)  # The transports are made,
    await asyncio.sleep(0)  # and their protocols told.
    server.close()


class Acceptor:
    """Makes the protocols of new TCP connections; `close` when the server is closed."""

    def __init__(
        self,
        context: Callable[[], ssl.SSLContext],
        make: Callable[[], asyncio.Protocol],
        failed: Callable[[str, str], None],
    ) -> None:
        self._context = context
        self._make = make
        self._failed = failed
        self._tasks: dict[asyncio.Task[None], asyncio.Transport] = {}
        self._closed = False

    def __call__(self) -> asyncio.Protocol:
        return _Plain(self)

    async def close(self) -> None:
        """Give the handshakes under way up, and those of connections that were just accepted."""
        self._closed = True
        tasks = dict(self._tasks)
        for task, transport in tasks.items():
            task.cancel()
            transport.abort()  # A task that hasn't begun never runs, and so closes nothing.
        await asyncio.gather(*tasks, return_exceptions=True)

    def connected(self, transport: asyncio.Transport, plain: _Plain) -> None:
        """A TCP connection is there."""
        if self._closed or len(self._tasks) >= HANDSHAKES_LIMIT:
            transport.abort()
            return
        task = asyncio.get_running_loop().create_task(
            self._shake_hands(transport, plain), name="TLS handshake"
        )
        self._tasks[task] = transport
        task.add_done_callback(self._tasks.pop)

    async def _shake_hands(self, transport: asyncio.Transport, plain: _Plain) -> None:
        address = transport.get_extra_info("peername")
        gate = _Gate()
        try:
            async with asyncio.timeout(HANDSHAKE_S):
                secured = await asyncio.get_running_loop().start_tls(
                    transport, gate, self._context(), server_side=True
                )
        except ConnectionError:  # It only knocked (`ferry doctor`, a health check): not refused.
            transport.abort()
        except OSError as error:  # ssl.SSLError and TimeoutError are among them.
            transport.abort()
            self._failed(str(address[0]) if address else "somebody", explain(error))
        except BaseException:
            transport.abort()
            raise
        else:
            if secured is not None:
                gate.open(secured, self._make())


class _Plain(asyncio.Protocol):
    """Hands the transport on before a byte is read."""

    def __init__(self, acceptor: Acceptor) -> None:
        self._acceptor = acceptor

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        transport.pause_reading()
        self._acceptor.connected(transport, self)


class _Gate(asyncio.Protocol):
    """Keeps what comes between the handshake's end and `open`, which runs a moment later."""

    def __init__(self) -> None:
        self._data: list[bytes] = []
        self._lost: tuple[Exception | None] | None = None

    def data_received(self, data: bytes) -> None:
        self._data.append(data)

    def connection_lost(self, error: Exception | None) -> None:
        self._lost = (error,)

    def open(self, transport: asyncio.Transport, protocol: asyncio.Protocol) -> None:
        """Let the real protocol take over. It never learns of a connection that is gone."""
        if self._lost is not None:
            return
        transport.set_protocol(protocol)
        protocol.connection_made(transport)
        for data in self._data:
            protocol.data_received(data)
        self._data.clear()


def explain(error: OSError) -> str:
    """Why a handshake failed, for an operator."""
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its certificate was not accepted: {verification_words(error)}"
    if isinstance(error, ssl.SSLError):
        reason = (error.reason or str(error)).replace("_", " ").lower()
        return f"the TLS handshake failed: {reason[:_REASON_CHARACTERS]}"
    if isinstance(error, TimeoutError):
        return f"no TLS handshake within {HANDSHAKE_S:g} s"
    return f"the TLS handshake failed: {error}"
