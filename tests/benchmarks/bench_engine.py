"""How fast the page engine is: `python -m tests.benchmarks.bench_engine`.

Prints, from one run on this machine over loopback TCP:
- plain: sendfile from a filled memory file to a socket, received into a prefaulted one
- first: the engine's first pass of the same amount, into prefaulted and into cold memory
- final: a final pass of 300 scattered pages, as the engine counts it and as the agent waits for it
- guest: what writing a page costs the guest before, while and after it is tracked
"""

from __future__ import annotations

import asyncio
import mmap
import os
import socket
import statistics
import tempfile
import threading
import time
from pathlib import Path

import trustme

from migrator.model import PassKind
from tests.integration.engine_lab.lab import MIB, PAGE, compile_guest, pair_of, tls_files

SIZE = 1024 * MIB
ROUNDS = 9


def plain_gb_per_s(source_fd: int, size: int) -> float:
    """sendfile to a prefaulted mapping, in one process: what the kernel gives at best."""
    target = os.memfd_create("target")
    os.ftruncate(target, size)
    mapping = mmap.mmap(target, size)
    view = memoryview(mapping)
    for offset in range(0, size, PAGE):
        view[offset] = 1
    listener = socket.create_server(("127.0.0.1", 0))
    sender = socket.create_connection(listener.getsockname())
    receiver, _ = listener.accept()

    def receive() -> None:
        got = 0
        while got < size:
            got += receiver.recv_into(view[got : got + 4 * MIB], 0, socket.MSG_WAITALL)

    thread = threading.Thread(target=receive)
    thread.start()
    began = time.monotonic()
    offset = 0
    while offset < size:
        offset += os.sendfile(sender.fileno(), source_fd, offset, size - offset)
    thread.join()
    seconds = time.monotonic() - began
    for sock in (listener, sender, receiver):
        sock.close()
    view.release()
    mapping.close()
    os.close(target)
    return size / seconds / 1e9


async def engine_runs(
    binary: Path, folder: Path, *, streams: int, warm: bool, tls: bool = False
) -> None:
    async with pair_of(binary, folder, SIZE) as pair:
        if tls:
            authority = trustme.CA()
            for role, name in pair.names.items():
                pair.tls[role] = tls_files(folder, authority, name)
        guest = pair.source_guest
        guest.tell(f"fill 0 {SIZE}")
        if warm:
            pair.destination_guest.tell(f"fill 0 {SIZE}")
        label = f"{'prefaulted' if warm else 'cold'}, {streams} stream(s){', TLS' if tls else ''}"
        if warm:
            print(f"plain sendfile      {plain_gb_per_s(guest.fd, SIZE):5.2f} GB/s")
        await pair.start(streams=streams)
        first = await pair.run_pass(PassKind.FIRST)
        print(f"first pass          {first.bytes_sent / first.seconds / 1e9:5.2f} GB/s  ({label})")
        waits, copies, scans = [], [], []
        for _ in range(ROUNDS):
            guest.tell(f"touch 300 0 {SIZE}")
            began = time.monotonic()
            final = await pair.run_pass(PassKind.FINAL)
            waits.append(1e3 * (time.monotonic() - began))
            copies.append(1e3 * final.seconds)
            scans.append(1e3 * final.scan_seconds)
            assert final.pages == 300
        for name, values in (("wait", waits), ("copy", copies), ("scan", scans)):
            print(
                f"final 300 pages     {statistics.median(values):5.2f} ms {name}"
                f" (best {min(values):.2f}, worst {max(values):.2f})"
            )
        assert pair.same_memory()


async def guest_costs(binary: Path, folder: Path) -> None:
    """One word to each of 25,600 pages, again and again."""
    async with pair_of(binary, folder, 100 * MIB) as pair:
        guest = pair.source_guest
        command = f"time 0 {100 * MIB}"
        pages = 100 * MIB // PAGE
        for _ in range(2):
            guest.tell(command)
        print(f"guest untracked     {guest.tell(command) / pages:5.0f} ns a page")
        await pair.start()
        for name in ("tracked, first write", "tracked, again"):
            print(f"guest {name:22}{guest.tell(command) / pages:5.0f} ns a page")
        await pair.stop_engines()
        for name in ("unregistered, first", "unregistered, again"):
            print(f"guest {name:22}{guest.tell(command) / pages:5.0f} ns a page")


async def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        binary = compile_guest(folder)
        await guest_costs(binary, folder)
        for streams in (1, 2):
            await engine_runs(binary, folder, streams=streams, warm=True)
        for streams in (1, 2, 3):
            for tls in (False, True):
                await engine_runs(binary, folder, streams=streams, warm=False, tls=tls)


if __name__ == "__main__":
    asyncio.run(main())
