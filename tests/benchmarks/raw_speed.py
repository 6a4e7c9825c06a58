"""Case 7: how fast the page engine itself is, beside a plain copy, in the same run.

Incompressible pages go from one engine process to another over loopback, unshaped, into memory
that nobody touched. The plain copy is the least that any engine has to do, made easy: `sendfile`
from a memory file into a TCP stream, received into memory that was prefaulted beforehand.
`ferry-prefaulted` has that made as easy: what is left between the two is the engine, without what
this machine, and the one that it runs on if it is virtual, take to find 4 GiB. `plain-copy-cold` is
the other way to compare like with like: the plain copy, with the time to find its memory.
"""

from __future__ import annotations

import asyncio
import contextlib
import mmap
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

import numpy as np
import trustme

from migrator.errors import FerryError
from migrator.model import PassKind
from tests.benchmarks.cases import MIB
from tests.benchmarks.results import Run
from tests.integration.engine_lab.lab import Guest, Pair, compile_guest, pair_of, tls_files

SIZE_BYTES: Final = 4096 * MIB
QUICK_BYTES: Final = 1024 * MIB
CASE: Final = "7"
ENGINE: Final = "ferry"
TLS: Final = "ferry-tls"
STREAMS: Final = "ferry-streams"
PREFAULTED: Final = "ferry-prefaulted"
PLAIN: Final = "plain-copy"
PLAIN_COLD: Final = "plain-copy-cold"
REPEATS: Final = 5

_BLOCK_BYTES: Final = 64 * MIB
_MADV_POPULATE_WRITE: Final = 23
_TIMEOUT_S: Final = 120.0


def fill(descriptor: int, size_bytes: int) -> None:
    """Random bytes, so that nothing can be saved: no page is zero, none is like its neighbours."""
    block = np.random.default_rng(1).bytes(_BLOCK_BYTES)
    for offset in range(0, size_bytes, _BLOCK_BYTES):
        os.pwrite(descriptor, block, offset)


def measure_engine(
    folder: Path,
    size_bytes: int,
    *,
    streams: int = 1,
    tls: bool = False,
    prefaulted: bool = False,
) -> Run:
    """One pass over all pages. Raises FerryError or TimeoutError."""
    binary = folder / "guest"
    if not binary.exists():
        compile_guest(folder)

    async def work() -> Run:
        async with asyncio.timeout(_TIMEOUT_S), pair_of(binary, folder, size_bytes) as pair:
            if tls:
                authority = trustme.CA()
                for role, name in pair.names.items():
                    pair.tls[role] = tls_files(folder, authority, name)
            if prefaulted:
                await asyncio.to_thread(fill, pair.destination_guest.fd, size_bytes)
            return await _pass(pair, streams)

    return asyncio.run(work())


async def _pass(pair: Pair, streams: int) -> Run:
    guest: Guest = pair.source_guest
    await asyncio.to_thread(fill, guest.fd, guest.size)
    began = time.monotonic()
    await pair.start(streams=streams)
    report = await pair.run_pass(PassKind.FIRST)
    return Run(
        completed=True,
        total_s=time.monotonic() - began,
        transfer_s=report.seconds,
        bytes_sent=report.bytes_sent,
        in_use_bytes=guest.size,
    )


def measure_plain(size_bytes: int, *, cold: bool = False) -> Run:
    """The same bytes by sendfile. `cold`: making the memory present counts, too. Raises OSError."""
    with contextlib.ExitStack() as stack:
        source = os.memfd_create("plain-source", os.MFD_CLOEXEC)
        stack.callback(os.close, source)
        fill(source, size_bytes)
        destination = os.memfd_create("plain-destination", os.MFD_CLOEXEC)
        stack.callback(os.close, destination)
        os.ftruncate(destination, size_bytes)
        memory = mmap.mmap(destination, size_bytes)
        stack.callback(memory.close)
        if not cold:
            memory.madvise(_MADV_POPULATE_WRITE)
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        sender = stack.enter_context(socket.create_connection(listener.getsockname()))
        receiver, _ = listener.accept()
        stack.enter_context(receiver)
        for end in (sender, receiver):
            end.settimeout(_TIMEOUT_S)
        thread = threading.Thread(target=_send, args=(sender, source, size_bytes), daemon=True)
        began = time.monotonic()
        if cold:
            memory.madvise(_MADV_POPULATE_WRITE)
        thread.start()
        _receive(receiver, memory, size_bytes)
        seconds = time.monotonic() - began
        thread.join(_TIMEOUT_S)
    return Run(completed=True, total_s=seconds, transfer_s=seconds, bytes_sent=size_bytes)


def _send(sender: socket.socket, source: int, size_bytes: int) -> None:
    offset = 0
    sender.setblocking(True)
    while offset < size_bytes:
        offset += os.sendfile(sender.fileno(), source, offset, size_bytes - offset)


def _receive(receiver: socket.socket, memory: mmap.mmap, size_bytes: int) -> None:
    with memoryview(memory) as view:
        offset = 0
        while offset < size_bytes:
            with view[offset : offset + 4 * MIB] as part:
                count = receiver.recv_into(part)
            if count == 0:
                raise FerryError("the plain copy's sender ended early")
            offset += count


ENGINES: Final[Mapping[str, Callable[[Path, int], Run]]] = {
    ENGINE: measure_engine,
    TLS: lambda folder, size: measure_engine(folder, size, tls=True),
    STREAMS: lambda folder, size: measure_engine(folder, size, streams=2),
    PREFAULTED: lambda folder, size: measure_engine(folder, size, prefaulted=True),
    PLAIN: lambda _, size: measure_plain(size),
    PLAIN_COLD: lambda _, size: measure_plain(size, cold=True),
}


def measure(folder: Path, engine: str, size_bytes: int) -> Run:
    """One run of an engine's; what goes wrong is in it."""
    try:
        return ENGINES[engine](folder, size_bytes)
    except (FerryError, OSError) as error:
        return Run(completed=False, error=f"{type(error).__name__}: {error}")
