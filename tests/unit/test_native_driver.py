"""The native engine's driver, beside a hypervisor that does what a test says."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import cast

import msgspec
import pytest

from migrator import native_driver
from migrator.engine_driver import EngineSettings
from migrator.errors import HypervisorError
from migrator.model import (
    PAGE_SIZE_BYTES,
    DomainName,
    DomainState,
    DomainStatus,
    EngineKind,
    MigrationRequest,
    NodeName,
    PassKind,
)
from migrator.native_driver import NativeDriver
from migrator.native_port import NativeFigures, NativeMigration, NativeSettings
from migrator.ports import DomainEvent, DomainEventKind, HypervisorDriver
from migrator.session import vocabulary as v
from migrator.session.source import SourceSession
from tests.unit.migration_world import NoSpares
from tests.unit.session_pair import SPEC

_K = DomainEventKind
LEFT = 40_000
"""Pages, after each pass."""


class Native(NativeMigration):
    def __init__(self) -> None:
        self.asked: list[str] = []
        self.caps: list[int | None] = []
        self.failing: set[str] = set()
        self.guarded = asyncio.Event()
        """What goes before QEMU's `migrate` is done."""
        self.guarded.set()
        self.error = ""

    def _ask(self, what: str) -> None:
        self.asked.append(what)
        if what in self.failing:
            raise HypervisorError(f"no answer to {what} within 5 s")

    async def receive(self, domain: DomainName, settings: NativeSettings) -> tuple[str, int]:
        raise NotImplementedError

    async def prepare(self, domain: DomainName, settings: NativeSettings) -> None:
        self._ask("prepare")

    async def begin(self, domain: DomainName, host: str, port: int) -> None:
        self._ask("guard")
        await self.guarded.wait()
        self._ask("migrate")

    async def switch_over(self, domain: DomainName) -> None:
        self._ask("switch_over")

    async def limit_bandwidth(self, domain: DomainName, bandwidth_bytes_per_s: int | None) -> None:
        self._ask("limit")
        self.caps.append(bandwidth_bytes_per_s)

    async def figures(self, domain: DomainName) -> NativeFigures:
        self._ask("figures")
        return NativeFigures(remaining_bytes=LEFT * PAGE_SIZE_BYTES, error=self.error)


class Hypervisor:
    name = "made up"

    def __init__(self) -> None:
        self.native = Native()
        self.callbacks: list[Callable[[DomainEvent], None]] = []

    def subscribe(self, callback: Callable[[DomainEvent], None]) -> Callable[[], None]:
        self.callbacks.append(callback)
        return self.callbacks.clear

    async def inspect(self, domain: DomainName) -> DomainStatus:
        return DomainStatus(name=domain, state=DomainState.RUNNING, memory_in_use_bytes=1 << 20)


class Driven:
    """A source's driver; `fed` is what its session was told."""

    def __init__(self, folder: Path) -> None:
        self.hypervisor = Hypervisor()
        self.native = self.hypervisor.native
        self.session = SourceSession(
            migration_id="m1",
            spec=SPEC,
            source=NodeName("n1"),
            destination=NodeName("n2"),
            token=1,
            request=MigrationRequest(destination="n2", engine=EngineKind.NATIVE),
            created_at_s=1000.0,
        )
        self.fed: list[v.Event] = []
        self.driver = NativeDriver(
            self.session,
            settings=EngineSettings(
                run_directory=folder,
                spares=NoSpares(folder / "engines.log"),
                bind_address="127.0.0.1",
            ),
            hypervisor=cast(HypervisorDriver, self.hypervisor),
            feed=self.fed.append,
        )

    def say(self, *kinds: DomainEventKind, detail: str = "", at_s: float = 0.0) -> None:
        for kind in kinds:
            event = DomainEvent(
                domain=DomainName(SPEC.name), kind=kind, at_s=at_s or 1000.0, detail=detail
            )
            for callback in tuple(self.hypervisor.callbacks):
                callback(event)

    async def until(self, holds: Callable[[], bool]) -> None:
        async with asyncio.timeout(20):
            while not holds():  # noqa: ASYNC110
                await asyncio.sleep(0.001)

    async def connected(self) -> None:
        self.driver.perform(v.ConnectEngine(host="h", port=1, secret=b"\1"))
        await self.until(lambda: any(isinstance(each, v.EngineConnected) for each in self.fed))
        self.driver.perform(v.RunPass(number=1, kind=PassKind.FIRST))

    async def begun(self) -> None:
        await self.connected()
        await self.until(lambda: "figures" in self.native.asked)  # Its reporter is at work.

    def limit(self, bytes_per_s: int | None) -> None:
        """As `Runner.limit_bandwidth`."""
        self.session.request = msgspec.structs.replace(
            self.session.request, bandwidth_bytes_per_s=bytes_per_s
        )
        self.driver.limit_bandwidth(bytes_per_s)

    @property
    def lost(self) -> list[str]:
        return [each.reason for each in self.fed if isinstance(each, v.EngineLost)]

    @property
    def guest_reports(self) -> list[tuple[DomainEventKind, float]]:
        return [(each.kind, each.at_s) for each in self.fed if isinstance(each, v.GuestReported)]


@pytest.fixture
async def driven(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Driven]:
    monkeypatch.setattr(native_driver, "REPORT_S", 0.01)
    monkeypatch.setattr(native_driver, "WORD_S", 0.05)
    made = Driven(tmp_path)
    yield made
    await made.driver.close()


# --- its beginning ---------------------------------------------------------------------------


async def test_what_is_stopped_while_its_guard_starts_never_begins(driven: Driven) -> None:
    """QEMU's migration went on without a session, and would have stopped the guest in the end."""
    driven.native.guarded.clear()
    await driven.connected()
    await driven.until(lambda: "guard" in driven.native.asked)
    driven.driver.perform(v.StopEngine())
    driven.native.guarded.set()
    await driven.driver.drained()
    assert "migrate" not in driven.native.asked
    assert not driven.lost


# --- its end ---------------------------------------------------------------------------------


async def test_a_pre_copy_that_has_failed_is_an_engine_lost_with_the_hypervisors_words(
    driven: Driven,
) -> None:
    """Nobody heard of it: the session stayed in pre-copy until its time was over."""
    await driven.begun()
    driven.native.error = "Unable to write to socket: Broken pipe"
    driven.say(_K.MIGRATION_FAILED, detail="failed")
    await driven.until(lambda: bool(driven.lost))
    assert driven.lost == [
        "the hypervisor gave its migration up: Unable to write to socket: Broken pipe"
    ]


async def test_without_words_its_event_tells(driven: Driven) -> None:
    await driven.begun()
    driven.native.failing.add("figures")
    driven.say(_K.MIGRATION_FAILED, detail="cancelled")
    await driven.until(lambda: bool(driven.lost))
    assert driven.lost == ["the hypervisor gave its migration up: cancelled"]


async def test_who_has_stopped_it_is_told_nothing_of_that(driven: Driven) -> None:
    """The session's own abort, or the destination's word, which came first."""
    await driven.begun()
    driven.say(_K.MIGRATION_FAILED, detail="failed")
    driven.driver.perform(v.StopEngine())
    await driven.driver.drained()
    assert not driven.lost


# --- its cap ---------------------------------------------------------------------------------


async def test_a_cap_that_isnt_taken_is_tried_again_and_costs_no_migration(
    driven: Driven, caplog: pytest.LogCaptureFixture
) -> None:
    await driven.begun()
    driven.native.failing.add("limit")
    with caplog.at_level(logging.WARNING):
        driven.limit(1_000_000)
        await driven.until(lambda: driven.native.asked.count("limit") >= 3)
    assert [record.message for record in caplog.records] == [
        "migration m1: its cap isn't changed yet, and is tried again: no answer to limit within 5 s"
    ]
    assert not driven.native.caps
    driven.native.failing.clear()
    await driven.until(lambda: bool(driven.native.caps))
    reports = driven.native.asked.count("figures")
    await driven.until(lambda: driven.native.asked.count("figures") >= reports + 2)
    assert driven.native.caps == [1_000_000]
    assert not driven.lost


async def test_of_two_caps_the_newest_is_tried(driven: Driven) -> None:
    await driven.begun()
    driven.native.failing.add("limit")
    driven.limit(1_000_000)
    await driven.until(lambda: "limit" in driven.native.asked)
    driven.limit(None)
    driven.native.failing.clear()
    await driven.until(lambda: bool(driven.native.caps))
    assert set(driven.native.caps) == {None}


# --- its switchover --------------------------------------------------------------------------


def finished(driven: Driven) -> list[tuple[PassKind, int]]:
    reports = [each.report for each in driven.fed if isinstance(each, v.PassFinished)]
    return [(report.kind, report.pending_pages) for report in reports]


async def test_a_disks_error_ends_no_pass_and_is_no_switchover(driven: Driven) -> None:
    """The hypervisor wasn't told to switch over, and the switchover stalled."""
    await driven.begun()
    driven.say(_K.IO_ERROR, _K.PAUSED, at_s=1001.0)
    driven.say(_K.PASS_BEGAN, detail="2")
    await driven.until(lambda: bool(finished(driven)))
    assert finished(driven) == [(PassKind.FIRST, LEFT)]
    driven.driver.perform(v.RunPass(number=2, kind=PassKind.DIRTY))
    await driven.driver.begin_switchover(DomainName(SPEC.name), Path("unused"))
    assert "switch_over" in driven.native.asked
    assert driven.guest_reports == [(_K.PAUSED, 1001.0)], "it does stand still since then"


async def test_a_guest_that_was_resumed_since_was_not_stopped_for_it(driven: Driven) -> None:
    await driven.begun()
    driven.say(_K.PAUSED, at_s=1001.0)
    driven.say(_K.RESUMED, at_s=1002.0)
    driven.say(_K.PAUSED, at_s=1003.0)
    driven.say(_K.PRE_SWITCHOVER, at_s=1003.001)
    await driven.until(lambda: bool(finished(driven)))
    assert finished(driven) == [(PassKind.FIRST, 0)]
    await driven.driver.begin_switchover(DomainName(SPEC.name), Path("unused"))
    assert "switch_over" not in driven.native.asked
    assert driven.guest_reports == [(_K.PAUSED, 1003.0), (_K.PRE_SWITCHOVER, 1003.001)]


async def test_one_that_was_begun_and_given_up_is_begun_anew(driven: Driven) -> None:
    await driven.begun()
    driven.say(_K.PAUSED, _K.PRE_SWITCHOVER, _K.RESUMED)
    await driven.driver.begin_switchover(DomainName(SPEC.name), Path("unused"))
    assert "switch_over" in driven.native.asked
    assert not driven.guest_reports
