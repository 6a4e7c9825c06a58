"""Real etcd servers on loopback, each of which a test may kill, stop and bring back."""

from __future__ import annotations

import contextlib
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from migrator.tls import TlsFiles

READY_S: Final = 60.0


@dataclass
class EtcdMember:
    """One server. `endpoint` is (host, port) of its clients' side."""

    name: str
    endpoint: tuple[str, int]
    command: Sequence[str]
    log_path: Path
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    def start(self) -> None:
        """Start it, or start it again with what it has on its disk."""
        assert self.process is None
        with self.log_path.open("wb") as log:
            self.process = subprocess.Popen(
                self.command, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )

    def kill(self) -> None:
        """SIGKILL; returns when it is gone. Idempotent."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
            self.process = None

    def freeze(self) -> None:
        """SIGSTOP: it holds its connections and says nothing."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def wait_ready(self) -> None:
        """Until it says that it serves clients, in its log."""
        deadline_s = time.monotonic() + READY_S
        while b"serving client traffic" not in self.log_path.read_bytes():
            assert self.process is not None
            if self.process.poll() is not None or time.monotonic() > deadline_s:
                raise AssertionError(f"etcd doesn't start: {self.log_path.read_text()[-2000:]}")
            time.sleep(0.02)


@contextlib.contextmanager
def running_members(count: int, tls: TlsFiles | None = None) -> Iterator[list[EtcdMember]]:
    """A cluster of `count` servers, ready. Its data is in memory; nothing is left afterwards.

    With `tls` clients come by mutual TLS, or not at all.
    """
    root = Path("/dev/shm") if Path("/dev/shm").is_dir() else None
    folder = Path(tempfile.mkdtemp(prefix="fy-etcd-", dir=root))
    ports = _free_ports(2 * count)
    names = [f"m{number}" for number in range(1, count + 1)]
    peers = dict(zip(names, ports[count:], strict=True))
    cluster = ",".join(f"{name}=http://127.0.0.1:{port}" for name, port in peers.items())
    members = []
    for name, port in zip(names, ports, strict=False):
        scheme = "http" if tls is None else "https"
        client, peer = f"{scheme}://127.0.0.1:{port}", f"http://127.0.0.1:{peers[name]}"
        command = [
            *("etcd", "--name", name, "--data-dir", str(folder / name)),
            *("--listen-client-urls", client, "--advertise-client-urls", client),
            *("--listen-peer-urls", peer, "--initial-advertise-peer-urls", peer),
            *("--initial-cluster", cluster, "--logger", "zap"),
        ]
        if tls is not None:
            command += [
                *("--cert-file", tls.certificate_path, "--key-file", tls.key_path),
                *("--client-cert-auth", "--trusted-ca-file", tls.authority_path),
            ]
        members.append(EtcdMember(name, ("127.0.0.1", port), command, folder / f"{name}.log"))
    try:
        for member in members:
            member.start()
        for member in members:
            member.wait_ready()
        yield members
    finally:
        for member in members:
            member.kill()
        shutil.rmtree(folder, ignore_errors=True)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    try:
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
