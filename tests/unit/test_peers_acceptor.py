"""The listening side's handshakes: whenever it is closed, every connection ends."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl

from node_agent.peers.acceptor import Acceptor, stop_listening

STEPS = 12
"""Of the event loop: before, in and after the handshake's begin."""


async def test_closing_ends_a_connection_whose_handshake_has_not_begun() -> None:
    for steps in range(STEPS):
        acceptor = Acceptor(
            lambda: ssl.create_default_context(ssl.Purpose.CLIENT_AUTH),
            asyncio.Protocol,
            lambda who, why: None,
        )
        loop = asyncio.get_running_loop()
        server = await loop.create_server(acceptor, "127.0.0.1", 0)
        with socket.socket() as client:
            client.setblocking(False)
            with contextlib.suppress(BlockingIOError):  # The kernel goes on alone.
                client.connect(server.sockets[0].getsockname()[:2])
            for _ in range(steps):
                await asyncio.sleep(0)
            await stop_listening(server)
            await acceptor.close()
            async with asyncio.timeout(30):
                with contextlib.suppress(ConnectionResetError):
                    assert await loop.sock_recv(client, 100) == b""
