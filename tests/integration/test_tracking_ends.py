"""However a source's engine ends, its guest is rid of the write tracking when a migration is over.

The engines are real processes, and so is what stands in for the guest.
"""

from __future__ import annotations

import os
import signal
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator import engine_driver
from migrator.engine import kernel
from migrator.engine_messages import Configured
from migrator.journal_entry import entry_of, restore
from migrator.left_tracking import clear_tracking
from migrator.model import DomainName, Role
from migrator.ports import GuestMemory
from migrator.session import vocabulary as v
from migrator.session.source import SourceSession
from tests.integration.engine_lab.lab import Engine, Guest, configuration, engines_of
from tests.integration.engine_lab.source_driver import OneGuest, SourceDriver, signalled, until
from tests.integration.test_dirty_sampling import wait_tracked
from tests.unit.session_pair import SessionPair

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd needs root")


@pytest.fixture
async def source(guest: Guest, tmp_path: Path) -> AsyncIterator[SourceDriver]:
    """Its engine tracks."""
    made = SourceDriver(guest, tmp_path, SessionPair().source)
    made.perform(v.StartEngine())
    await made.driver.drained()
    await wait_tracked(guest)
    yield made
    await made.close()


async def test_an_engine_that_was_killed_leaves_no_tracking(
    source: SourceDriver, guest: Guest
) -> None:
    """It stayed until the next migration, and each first write to a page was slower."""
    signalled(guest, signal.SIGKILL)
    await until(lambda: source.heard != [])
    killed = "it was killed by signal 9 (if for want of memory, `journalctl -k` says so)"
    assert source.heard == [v.EngineLost(reason=killed)]
    assert guest.tracked()
    await source.end()
    assert not guest.tracked()
    assert not engines_of(guest)


async def test_nor_does_one_that_hangs(
    source: SourceDriver, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is killed by its agent, after a while."""
    monkeypatch.setattr(engine_driver, "STOP_S", 0.1)
    signalled(guest, signal.SIGSTOP)
    await source.end()
    assert not guest.tracked()
    assert not engines_of(guest)


async def test_nor_one_that_was_killed_with_its_agent(guest: Guest, tmp_path: Path) -> None:
    """The next agent ends the migration, and knows nothing of that engine."""
    pair = SessionPair()
    pair.source.handle(v.Begin(), 1.0)
    killed = await Engine.spawn(tmp_path / "log")
    killed.process.send(configuration(Role.SOURCE, guest), guest.fds)
    await killed.expect(Configured)
    killed.process.kill()
    await killed.exited()
    assert guest.tracked()
    session = restore(entry_of(pair.source, boot_id="boot"), boot_id="boot")
    assert isinstance(session, SourceSession)
    source = SourceDriver(guest, tmp_path, session)
    await source.end()
    assert not guest.tracked()
    assert not engines_of(guest)


async def test_one_that_ends_by_itself_needs_no_other(source: SourceDriver, guest: Guest) -> None:
    source.hypervisor.gone = True  # Nobody would get the memory.
    await source.end()
    assert not guest.tracked()
    assert source.heard == [v.EngineStopped(bytes_sent=0)]


async def test_of_a_guest_that_is_gone_nothing_is_said(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    hypervisor = OneGuest(guest)
    hypervisor.gone = True
    await clear_tracking(hypervisor.memory, DomainName("web"))
    memory = guest.memory()

    async def opened_before(domain: DomainName) -> GuestMemory:
        guest.kill()
        return memory

    await clear_tracking(opened_before, DomainName("web"))
    assert not caplog.records


async def test_missing_pages_are_still_waited_for(
    guest: Guest, caplog: pytest.LogCaptureFixture
) -> None:
    """They would read as zeros."""
    kernel.uffd_initialise(guest.uffd)
    kernel.uffd_register_missing(guest.uffd, guest.address, guest.size)
    await clear_tracking(OneGuest(guest).memory, DomainName("web"))
    assert guest.waits_for_missing()
    assert not caplog.records
