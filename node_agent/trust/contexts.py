"""The TLS contexts of this node, made when they are needed first and again after a renewal.

A connection keeps the certificate that it was made with: a renewal drops none. Only what is dialed
or accepted afterwards uses the new one.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable

from migrator.tls import TlsFiles, client_context, server_context
from node_agent.peers.messages import Side


class TlsContexts:
    """`load` and `reload` block for a millisecond: call them in a thread."""

    def __init__(self, files: TlsFiles) -> None:
        self.files = files
        self.api = self._api()
        self._peers: dict[Side, ssl.SSLContext] = {}
        self._load()

    def peers(self, side: Side) -> ssl.SSLContext:
        """For the next connection of the agents' protocol."""
        return self._peers[side]

    def reload(self) -> None:
        """Read the files again. ConfigError: the contexts stay as they were."""
        self._load()
        self.api.load_cert_chain(self.files.certificate_path, self.files.key_path)

    def _load(self) -> None:
        self._peers = {
            Side.DIALING: client_context(self.files),
            Side.LISTENING: server_context(self.files),
        }

    def _api(self) -> ssl.SSLContext:
        """HTTPS: the server shows its certificate, the client its bearer token."""
        context = server_context(self.files)
        context.verify_mode = ssl.CERT_NONE
        return context


SslContexts = Callable[[Side], ssl.SSLContext]
