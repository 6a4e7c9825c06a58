"""QEMU's own migration: pre-copy from QEMU to QEMU, stopped short of the handoff.

The destination is started and stays as with the page engine: `-S`, late-block-activate; the source
stops at pre-switchover, and goes on by `migrate-continue` alone. What differs: the memory goes
through QEMU, by TCP, in one stream or several (multifd), in the clear or by TLS.

QEMU's downtime limit is set to the least until `switch_over`: the session decides when, by its
own policy, from the figures that QEMU reports after each pass.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Final

from hypervisor.qemu import switchover
from hypervisor.qemu.config import MONITORS, monitor_path
from hypervisor.qemu.guest import Guest
from hypervisor.qemu.offload import offload_to_disk
from hypervisor.qemu.qmp import QmpCommandError, QmpNotSent
from hypervisor.qemu.status import IDLE
from migrator.errors import HypervisorError
from migrator.model import DomainName
from migrator.native_port import NativeFigures, NativeMigration, NativeSettings

GUARD: Final = Path(__file__).with_name("guard.py")
DOWNTIME_MS_MIN: Final = 1
"""Not 0: QEMU looks for dirtied pages only when less than its limit is left."""
_TLS_ID: Final = "ferry-tls"
_DH_PARAMETERS: Final = """\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""The group ffdhe2048 of RFC 7919. QEMU makes parameters of its own where it finds none, and
answers nothing for seconds; TLS 1.3 uses neither."""
_WATCH_S: Final = 3600.0
_GUARD_START_S: Final = 5.0


class QemuNative(NativeMigration):
    """See the module. `find` raises NotFoundError for a domain without a process here."""

    def __init__(self, find: Callable[[DomainName], Guest]) -> None:
        self._find = find

    async def receive(self, domain: DomainName, settings: NativeSettings) -> tuple[str, int]:
        guest = self._find(domain)
        await switchover.set_capabilities(guest, _capabilities(settings))
        await _set_tls(guest, settings, endpoint="server")
        await guest.execute("migrate-set-parameters", _channel_parameters(settings))
        address = _address(settings.bind_address)
        await guest.execute("migrate-incoming", {"uri": f"tcp:{address}:0"})
        answer = await guest.execute("query-migrate")
        return settings.bind_address, _port(answer)

    async def prepare(self, domain: DomainName, settings: NativeSettings) -> None:
        guest = self._find(domain)
        guest.prepared = False  # For the page engine.
        await switchover.set_capabilities(guest, _capabilities(settings))
        await _set_tls(guest, settings, endpoint="client")
        parameters = {
            **_channel_parameters(settings),
            "tls-hostname": settings.destination if settings.tls is not None else "",
            "max-bandwidth": settings.bandwidth_bytes_per_s or switchover.UNLIMITED_BYTES_PER_S,
            "downtime-limit": DOWNTIME_MS_MIN,
        }
        await guest.execute("migrate-set-parameters", parameters)

    async def begin(self, domain: DomainName, host: str, port: int) -> None:
        guest = self._find(domain)
        guard = await _Guard.start(guest.directory)
        taken = True
        try:
            await switchover.start(guest, f"tcp:{_address(host)}:{port}")
        except (QmpCommandError, QmpNotSent):
            taken = False
            raise
        finally:  # Cancelled, or without an answer, it may be under way.
            if taken:
                guest.spawn_task(_keep(guest, guard), "guard")
            else:
                guard.release()

    async def switch_over(self, domain: DomainName) -> None:
        limit = {"downtime-limit": switchover.DOWNTIME_MS_MAX}
        await self._find(domain).execute("migrate-set-parameters", limit)

    async def limit_bandwidth(self, domain: DomainName, bandwidth_bytes_per_s: int | None) -> None:
        limit = bandwidth_bytes_per_s or switchover.UNLIMITED_BYTES_PER_S
        await self._find(domain).execute("migrate-set-parameters", {"max-bandwidth": limit})

    async def figures(self, domain: DomainName) -> NativeFigures:
        return parse_figures(await self._find(domain).execute("query-migrate"))


def parse_figures(answer: object) -> NativeFigures:
    """Of a `query-migrate` answer; zeros for what it doesn't say (yet)."""
    if not isinstance(answer, Mapping):
        return NativeFigures()
    ram = answer.get("ram")
    error = str(answer.get("error-desc", ""))
    if not isinstance(ram, Mapping):
        return NativeFigures(error=error)
    return NativeFigures(
        bytes_sent=int(ram.get("transferred", 0)),
        remaining_bytes=int(ram.get("remaining", 0)),
        pages=int(ram.get("normal", 0)),
        zero_pages=int(ram.get("duplicate", 0)),
        error=error,
    )


def _port(answer: object) -> int:
    """Where a destination listens, of its `query-migrate` answer."""
    addresses = answer.get("socket-address") if isinstance(answer, Mapping) else None
    if isinstance(addresses, list):
        for each in addresses:
            if isinstance(each, Mapping) and str(each.get("port", "")).isdecimal():
                return int(each["port"])
    raise HypervisorError("QEMU doesn't say at which port it waits for the migration")


def _address(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _capabilities(settings: NativeSettings) -> dict[str, bool]:
    return {
        **switchover.HANDOFF_CAPABILITIES,
        "x-ignore-shared": False,
        "multifd": settings.channels > 1,
    }


def _channel_parameters(settings: NativeSettings) -> dict[str, object]:
    return {
        "multifd-channels": max(settings.channels, 2),
        "tls-creds": _TLS_ID if settings.tls is not None else "",
    }


# --- TLS -------------------------------------------------------------------------------------


async def _set_tls(guest: Guest, settings: NativeSettings, *, endpoint: str) -> None:
    """Make QEMU's credentials anew from the node's files: they may have been renewed."""
    with contextlib.suppress(HypervisorError):  # There are none yet.
        await guest.execute("object-del", {"id": _TLS_ID})
    files = settings.tls
    if files is None:
        return
    folder = guest.directory / "tls"
    names = {
        "ca-cert.pem": files.authority_path,
        "server-cert.pem": files.certificate_path,
        "server-key.pem": files.key_path,
        "client-cert.pem": files.certificate_path,
        "client-key.pem": files.key_path,
    }
    await offload_to_disk(lambda: _link(folder, names))
    await guest.execute(
        "object-add",
        {
            "qom-type": "tls-creds-x509",
            "id": _TLS_ID,
            "dir": str(folder),
            "endpoint": endpoint,
            "verify-peer": True,
            # QEMU's own look at the files wants RSA's key usages of a certificate; the handshake
            # checks all that matters.
            "sanity-check": False,
            # As the page streams have it.
            "priority": "SECURE128:-VERS-ALL:+VERS-TLS1.3",
        },
    )


def _link(folder: Path, names: Mapping[str, str]) -> None:
    """The names that QEMU wants, as links. HypervisorError if they can't be made."""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(mode=0o700)
        for name, target in names.items():
            (folder / name).symlink_to(target)
        (folder / "dh-params.pem").write_text(_DH_PARAMETERS)
    except OSError as error:
        raise HypervisorError(f"can't make {folder}: {error}") from error


# --- the guard -------------------------------------------------------------------------------


class _Guard:
    """The process of `guard.py`, which watches whether we live: by a pipe whose end we hold.

    It is nobody's child, so nobody has to wait for it.
    """

    def __init__(self, pipe: int) -> None:
        self._pipe = pipe

    @classmethod
    async def start(cls, directory: Path) -> _Guard:
        """HypervisorError if it can't be."""
        # The spare monitor first: the other one was ours.
        monitors = [str(monitor_path(directory, index)) for index in reversed(range(MONITORS))]
        theirs, ours = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ours, False)
        try:
            async with asyncio.timeout(_GUARD_START_S):
                process = await asyncio.create_subprocess_exec(
                    *(sys.executable, "-I", "-S", str(GUARD), *monitors),
                    stdin=theirs,
                    stdout=asyncio.subprocess.DEVNULL,
                    stderr=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
                status = await process.wait()
            if status:
                raise HypervisorError(f"the migration's guard ended with status {status}")
        except BaseException as error:
            os.close(ours)
            if isinstance(error, OSError):
                raise HypervisorError(f"can't start the migration's guard: {error}") from error
            raise
        finally:
            os.close(theirs)
        return cls(ours)

    def release(self) -> None:
        """It is needed no more, and ends."""
        with contextlib.suppress(OSError):
            os.write(self._pipe, b".")
        os.close(self._pipe)

    def alarm(self) -> None:
        """As our death would."""
        os.close(self._pipe)


async def _keep(guest: Guest, guard: _Guard) -> None:
    """Until QEMU's migration is over. Cancelled, we let the guest go: then nobody watches it."""
    try:
        while not guest.process.exited:
            if await guest.wait_until(lambda: guest.migration in IDLE, timeout_s=_WATCH_S):
                break
    except asyncio.CancelledError:
        guard.alarm()
        raise
    guard.release()
