"""Greets an agent's port with a node's certificate and prints why it is refused.

`python greet_peer.py TLS_FOLDER NODE PEER ADDRESS`
"""

from __future__ import annotations

import socket
import ssl
import sys

from deploy.lab.config import PEER_PORT
from migrator.tls import TlsFiles, client_context
from migrator.wire import FrameDecoder, FrameKind, encode_frame
from node_agent.peers import messages


def main(folder: str, node: str, peer: str, address: str) -> str:
    context = client_context(
        TlsFiles(
            authority_path=f"{folder}/authority.pem",
            certificate_path=f"{folder}/certificate.pem",
            key_path=f"{folder}/key.pem",
        )
    )
    hello = messages.Hello(version=messages.PROTOCOL_VERSION, node=node, agent_version="1")
    with (
        socket.create_connection((address, PEER_PORT), timeout=20) as raw,
        context.wrap_socket(raw, server_hostname=peer) as connection,
    ):
        connection.sendall(encode_frame(FrameKind.HELLO, hello))
        decoder = FrameDecoder()
        while data := connection.recv(65_536):
            for frame in decoder.feed(data):
                if frame.kind is not FrameKind.NOTICE:
                    return f"it answered with a {frame.kind.name.lower()}"
                notice = frame.decode(messages.notice_decoder)
                return messages.unpack(notice.params, messages.RefusedParams, "").reason
    return "closed"


if __name__ == "__main__":
    try:
        print(main(*sys.argv[1:]))
    except ssl.SSLError as error:
        print(error)
