"""Stands in for the agent where a test is about the lab: answers GET /healthz, nothing else.

`python stub_agent.py --config PATH`, the same contract as `python -m node_agent`.
"""

from __future__ import annotations

import http.server
import os
import signal
import socketserver
import sys
import tomllib
from pathlib import Path


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        body = b'{"status": "ok"}'
        self.send_response(200 if self.path == "/healthz" else 404)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self) -> str:
        return "unix"


class _Server(socketserver.UnixStreamServer):
    def get_request(self) -> tuple[object, object]:  # type: ignore[override]
        connection, _ = self.socket.accept()
        return connection, ("unix", 0)


def main() -> None:
    config_path = Path(sys.argv[sys.argv.index("--config") + 1])
    config = tomllib.loads(config_path.read_text())
    socket_path = config["api"]["socket"]
    Path(socket_path).unlink(missing_ok=True)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    with _Server(socket_path, _Handler) as server:
        print("stub agent of", config["node"]["name"], flush=True)
        server.serve_forever()


if __name__ == "__main__":
    main()
