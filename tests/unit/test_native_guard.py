"""The guard of QEMU's own migration: it stays for as long as that may be under way."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Mapping
from pathlib import Path
from typing import cast

import pytest

from hypervisor.qemu import native
from hypervisor.qemu.guest import Guest
from hypervisor.qemu.native import QemuNative
from hypervisor.qemu.process import QemuProcess
from hypervisor.qemu.qmp import QmpCommandError, QmpDisconnected, QmpNotSent, QmpTimeout
from hypervisor.qemu.records import ProcessRecord
from hypervisor.qemu.status import MigrationStatus
from migrator.model import DomainName
from tests.unit.session_pair import SPEC
from tests.unit.test_qemu_guest import Record, Running

VM = DomainName(SPEC.name)


class Guarded:
    """A guest whose QEMU answers as a test says, and the guard's end of its pipe."""

    def __init__(self, folder: Path) -> None:
        self.guest = Guest(
            folder,
            cast(ProcessRecord, Record()),
            cast(QemuProcess, Running()),
            emit=lambda _: None,
            on_gone=lambda _: None,
        )
        self.native = QemuNative(lambda _: self.guest)
        self.answer: Exception | None = None
        self.silent = False
        self.asked = asyncio.Event()
        self.theirs, self._ours = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.guest.execute = self._execute  # type: ignore[method-assign]

    async def start(self, _: Path) -> native._Guard:
        return native._Guard(self._ours)

    async def _execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, timeout_s: float = 1.0
    ) -> object:
        self.asked.set()
        if command.startswith("query"):
            return {"status": "paused" if command == "query-status" else "none"}
        if self.silent:
            await asyncio.Event().wait()
        if self.answer is not None:
            raise self.answer
        return {}

    async def begin(self) -> None:
        await self.native.begin(VM, "127.0.0.1", 1)

    @property
    def watches(self) -> bool:
        """False: it was told that all is over. Once that is told it can't be asked again."""
        try:
            word = os.read(self.theirs, 1)
        except BlockingIOError:
            return True
        assert word == b".", "it is alarmed"
        return False

    async def until_released(self) -> None:
        async with asyncio.timeout(10):
            while self.watches:  # noqa: ASYNC110
                await asyncio.sleep(0.001)


@pytest.fixture
async def guarded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Guarded]:
    made = Guarded(tmp_path)
    monkeypatch.setattr(native._Guard, "start", made.start)
    yield made
    await made.guest.let_go()
    os.close(made.theirs)


@pytest.mark.parametrize(
    "answer", [QmpCommandError("busy", "GenericError"), QmpNotSent("not connected")]
)
async def test_it_goes_where_qemu_certainly_doesnt_migrate(
    guarded: Guarded, answer: Exception
) -> None:
    guarded.answer = answer
    with pytest.raises(type(answer)):
        await guarded.begin()
    assert not guarded.watches
    assert guarded.guest.migration is MigrationStatus.NONE


@pytest.mark.parametrize("answer", [QmpTimeout("no answer"), QmpDisconnected("it broke")])
async def test_it_stays_where_qemu_hasnt_answered(guarded: Guarded, answer: Exception) -> None:
    """It was sent away. QEMU might have migrated on though the agent had died by then."""
    guarded.answer = answer
    with pytest.raises(type(answer)):
        await guarded.begin()
    await asyncio.sleep(0.01)
    assert guarded.watches
    await guarded.guest.refresh()  # As an abort does: nothing is under way.
    await guarded.until_released()


async def test_it_stays_where_the_beginning_was_cancelled(guarded: Guarded) -> None:
    guarded.silent = True
    beginning = asyncio.create_task(guarded.begin())
    await guarded.asked.wait()
    beginning.cancel()
    await asyncio.wait([beginning])
    assert beginning.cancelled()
    await asyncio.sleep(0.01)
    assert guarded.watches
    await guarded.guest.let_go()  # The agent ends.
    with pytest.raises(AssertionError, match="alarmed"):
        _ = guarded.watches


async def test_it_goes_when_qemus_migration_is_over(guarded: Guarded) -> None:
    await guarded.begin()
    await asyncio.sleep(0.01)
    assert guarded.watches
    guarded.guest.migration = MigrationStatus.CANCELLED
    guarded.guest._wake()
    await guarded.until_released()
