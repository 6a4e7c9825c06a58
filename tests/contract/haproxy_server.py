"""A real HAProxy on loopback with a runtime API, in front of servers that need not be there."""

from __future__ import annotations

import asyncio
import contextlib
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from node_agent.hooks.haproxy import _command
from node_agent.hooks.model import HaproxyHook

READY_S: Final = 30.0

_CONFIG: Final = """
global
    stats socket {socket} level admin
    stats timeout 60s
defaults
    mode tcp
    timeout connect 2s
    timeout client 60s
    timeout server 60s
frontend web
    bind 127.0.0.1:{port}
    default_backend web
backend web
    balance roundrobin
{servers}
"""


@dataclass(frozen=True)
class Haproxy:
    """`address` is the runtime API's, `port` the frontend's on 127.0.0.1."""

    address: str
    port: int

    def server(self, name: str) -> dict[str, str]:
        """A row of `show servers state`, and `scur` and `weight` of `show stat`."""
        return asyncio.run(self.server_now(name))

    async def server_now(self, name: str) -> dict[str, str]:
        hook = HaproxyHook(address=self.address, backend="web")
        lines = (await _command(hook, "show servers state web")).splitlines()
        keys = lines[1].removeprefix("# ").split()
        rows = [dict(zip(keys, line.split(), strict=False)) for line in lines[2:]]
        row = next(row for row in rows if row["srv_name"] == name)
        stat = (await _command(hook, "show stat")).removeprefix("# ").splitlines()
        names = stat[0].split(",")
        for line in stat[1:]:
            cells = dict(zip(names, line.split(","), strict=False))
            if (cells["pxname"], cells["svname"]) == ("web", name):
                row |= {"scur": cells["scur"], "weight": cells["weight"], "status": cells["status"]}
        return row


@contextlib.contextmanager
def running_haproxy(servers: dict[str, tuple[str, int]]) -> Iterator[Haproxy]:
    """Ready to serve; gone afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="fy-haproxy-"))
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    path = folder / "api.sock"
    lines = [f"    server {name} {host}:{each}" for name, (host, each) in servers.items()]
    config = folder / "haproxy.cfg"
    config.write_text(_CONFIG.format(socket=path, port=port, servers="\n".join(lines)))
    process = subprocess.Popen(["haproxy", "-db", "-f", str(config)], stdin=subprocess.DEVNULL)
    try:
        deadline_s = time.monotonic() + READY_S
        while not path.is_socket():
            assert process.poll() is None and time.monotonic() < deadline_s, "haproxy doesn't start"
            time.sleep(0.01)
        yield Haproxy(f"unix:{path}", port)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)
