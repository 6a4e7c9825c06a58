"""The native engine: when it is chosen, and whole migrations by it through two managers."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Callable
from functools import partial
from pathlib import Path

import msgspec
import pytest

from hypervisor.qemu.host import native_hazard
from hypervisor.qemu.native import parse_figures
from hypervisor.simulated.driver import SimulatedHypervisor
from hypervisor.simulated.native import BROKEN
from migrator import native_driver, runner
from migrator.errors import RefusedError
from migrator.journal import MigrationJournal
from migrator.journal_entry import JournalEntry
from migrator.model import (
    PAGE_SIZE_BYTES,
    DomainState,
    EngineKind,
    HypervisorCapabilities,
    Migration,
    MigrationMode,
    MigrationRequest,
    MigrationState,
    PassKind,
)
from migrator.ports import DomainEvent, DomainEventKind
from migrator.session import source_leave, source_view
from migrator.session.base import Timing
from migrator.session.source import SourceSession
from migrator.session.vocabulary import LeavePart
from node_agent.hooks.model import HookReport
from node_agent.migrations.engine_choice import EngineChoice, choose
from tests.unit.migration_world import WEB, MigrationWorld, eventually, migration_world

OLD = "the kernel is old"


def chosen(
    engine: EngineKind,
    mode: MigrationMode = MigrationMode.PRECOPY,
    *,
    not_paged: tuple[str, ...] = (),
    not_native: tuple[str, ...] = (),
) -> EngineChoice:
    request = MigrationRequest(destination="b", engine=engine, mode=mode)
    return choose(request, not_paged=not_paged, not_native=not_native)


@pytest.mark.parametrize("mode", MigrationMode)
def test_auto_is_paged_where_nothing_speaks_against_it(mode: MigrationMode) -> None:
    found = chosen(EngineKind.AUTO, mode, not_native=("no",))
    assert found == EngineChoice(engine=EngineKind.PAGED, mode=mode)


def test_auto_is_native_otherwise_and_says_why() -> None:
    found = chosen(EngineKind.AUTO, not_paged=(OLD, "no memfd"))
    assert found.engine is EngineKind.NATIVE
    assert not found.refused
    assert OLD in found.reason and "no memfd" in found.reason


def test_paged_is_never_replaced() -> None:
    found = chosen(EngineKind.PAGED, not_paged=(OLD,))
    assert (found.engine, found.refused) == (EngineKind.PAGED, (OLD,))


def test_native_has_no_post_copy() -> None:
    for engine, not_paged in ((EngineKind.NATIVE, ()), (EngineKind.AUTO, (OLD,))):
        refused = chosen(engine, MigrationMode.POSTCOPY, not_paged=not_paged)
        assert any("post-copy" in reason for reason in refused.refused)
        hybrid = chosen(engine, MigrationMode.HYBRID, not_paged=not_paged)
        assert not hybrid.refused
        assert hybrid.mode is MigrationMode.PRECOPY
        assert "instead of hybrid" in hybrid.reason


def test_a_known_harm_refuses_auto_and_is_told_to_who_asks_for_native() -> None:
    request = MigrationRequest(destination="b", mode=MigrationMode.PRECOPY)
    harm = native_hazard("7.2.22", "tcg")
    assert "the guest may crash" in harm
    found = choose(request, not_paged=(OLD,), not_native=(), hazard=harm)
    assert harm in found.refused
    assert choose(request, not_paged=(), not_native=(), hazard=harm).engine is EngineKind.PAGED
    asked = msgspec.structs.replace(request, engine=EngineKind.NATIVE)
    found = choose(asked, not_paged=(), not_native=(), hazard=harm)
    assert not found.refused
    assert found.reason == f"asked for, but {harm}"


@pytest.mark.parametrize("known", [("10.0.8", "tcg"), ("7.2.22", "kvm"), ("11.0.0", "tcg")])
def test_no_harm_is_known_under_kvm_or_of_newer_releases(known: tuple[str, str]) -> None:
    assert native_hazard(*known) == ""


def test_where_neither_can_be_used_both_reasons_are_given() -> None:
    found = chosen(EngineKind.AUTO, not_paged=(OLD,), not_native=("no driver",))
    assert any(OLD in reason for reason in found.refused)
    assert "no driver" in found.refused


def test_figures_of_a_query() -> None:
    ram = {"transferred": 9, "remaining": 8, "normal": 7, "duplicate": 6}
    figures = parse_figures({"status": "active", "ram": ram})
    assert (figures.bytes_sent, figures.remaining_bytes) == (9, 8)
    assert (figures.pages, figures.zero_pages) == (7, 6)
    assert parse_figures({"status": "failed", "error-desc": "broke"}).error == "broke"
    assert parse_figures({}).bytes_sent == 0


# --- whole migrations ------------------------------------------------------------------------


@pytest.fixture
async def world(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[MigrationWorld]:
    async with migration_world(tmp_path, monkeypatch) as made:
        yield made


def write(world: MigrationWorld, *pages: int) -> None:
    guest = world.a.node.host.guests[WEB]
    for number in pages:
        guest.write_memory(number * PAGE_SIZE_BYTES, b"%d" % number)


async def never_converging(world: MigrationWorld) -> Migration:
    """Each pass leaves as much as it sent: what no pass can get below the downtime limit."""
    world.a.node.host.native_pending.extend([40_000] * 10_000)
    return await world.migrate(engine=EngineKind.NATIVE, downtime_limit_ms=1)


async def test_it_moves_the_guest_and_tells_its_passes(world: MigrationWorld) -> None:
    write(world, 1, 5, 7)
    world.a.node.host.native_pending.extend((40_000, 20_000, 9_000))
    begun = await world.migrate(engine=EngineKind.NATIVE)
    ended = await world.ended(begun)
    assert ended.state is MigrationState.COMPLETED, ended.error
    assert ended.token == 1
    assert world.running() == ["b"]
    assert world.b.node.host.guests[WEB].read_memory(5 * PAGE_SIZE_BYTES, 1) == b"5"
    assert ended.request.engine is EngineKind.NATIVE
    assert ended.timeline[0].name == "engine"
    kinds = [each.kind for each in ended.iterations]
    assert kinds[0] is PassKind.FIRST and kinds[-1] is PassKind.FINAL
    assert PassKind.DIRTY in kinds
    assert ended.iterations[0].pending_pages == 40_000
    assert ended.blackout_ms is not None
    assert not world.script.running  # No page engine was made.


async def test_a_guest_that_is_idle_is_stopped_by_the_hypervisor_itself(
    world: MigrationWorld,
) -> None:
    ended = await world.ended(await world.migrate(engine=EngineKind.NATIVE))
    assert ended.state is MigrationState.COMPLETED, ended.error
    assert [phase.name for phase in ended.timeline].count("stop") == 1


async def test_one_that_was_stopped_doesnt_wait_for_another_pass_when_leave_comes_late(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still until the migration's time was over: no pass of a paused guest ends."""
    monkeypatch.setattr(source_leave, "_FRESH_S", 0.0)  # Whatever it takes, it is late.
    ended = await world.ended(await world.migrate(engine=EngineKind.NATIVE))
    assert ended.state is MigrationState.COMPLETED, ended.error
    assert world.running() == ["b"]


async def test_one_that_was_stopped_runs_on_when_leave_doesnt_come(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still for as long as the store or storage took."""

    async def never(session: SourceSession, part: LeavePart) -> str:
        if part is LeavePart.HOOKS:
            return ""
        await asyncio.Event().wait()
        raise AssertionError

    monkeypatch.setattr(source_view, "Timing", partial(Timing, switchover_s=0.3))
    monkeypatch.setattr(world.a.manager._site, "leave", never)
    ended = await world.ended(await world.migrate(engine=EngineKind.NATIVE))
    assert ended.state is MigrationState.FAILED
    assert "stopped the guest by itself" in (ended.error or "")
    assert ended.blackout_ms is not None and ended.blackout_ms >= 250.0
    assert world.running() == ["a"]


@pytest.mark.parametrize("engine", [EngineKind.NATIVE, EngineKind.PAGED])
async def test_hooks_may_take_their_time_and_are_asked_once(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch, engine: EngineKind
) -> None:
    """They held a guest that QEMU had stopped, or, once that was bounded, kept it from moving."""
    asked: list[int] = []

    async def slow(session: SourceSession) -> HookReport:
        asked.append(len(session.passes))
        await asyncio.sleep(0.5)
        return HookReport()

    monkeypatch.setattr(source_view, "Timing", partial(Timing, switchover_s=0.3))
    monkeypatch.setattr(world.a.manager._site._moments, "before_switchover", slow)
    ended = await world.ended(await world.migrate(engine=engine))
    assert ended.state is MigrationState.COMPLETED, ended.error
    assert asked == [0 if engine is EngineKind.NATIVE else asked[0]]
    assert asked[0] > 0 or engine is EngineKind.NATIVE
    assert ended.blackout_ms is not None and ended.blackout_ms < 300.0


async def test_one_that_was_stopped_doesnt_wait_for_a_disk(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It stood still while its journal hung, for half a minute."""
    back = threading.Event()
    write = MigrationJournal._write

    def hang(journal: MigrationJournal, entry: JournalEntry, packed: bytes, durable: bool) -> None:
        if entry.state is MigrationState.SWITCHOVER:
            back.wait(60.0)
        write(journal, entry, packed, durable)

    monkeypatch.setattr(MigrationJournal, "_write", hang)
    monkeypatch.setattr(runner, "NOTE_S", 0.2)
    begun = await world.migrate(engine=EngineKind.NATIVE)
    try:
        session = world.a.manager._runners[begun.id].session
        assert isinstance(session, SourceSession)
        await world.until(lambda: session.blackout_ms is not None)
        assert world.running() == ["a"]
        assert not back.is_set()
    finally:
        back.set()
    ended = await world.ended(begun)
    assert ended.state is MigrationState.FAILED
    assert "hangs" in (ended.error or "")


def at_first_pass(world: MigrationWorld, do: Callable[[], None]) -> list[str]:
    """Call `do` when the source's hypervisor begins it. Its passes, as they begin."""
    passes: list[str] = []

    def hear(event: DomainEvent) -> None:
        if event.kind is DomainEventKind.PASS_BEGAN:
            passes.append(event.detail)
            if event.detail == "1":
                do()

    world.a.node.hypervisor.subscribe(hear)
    return passes


async def test_a_disks_error_isnt_the_hypervisors_switchover(world: MigrationWorld) -> None:
    """It was taken for it, and the switchover stalled."""
    host = world.a.node.host
    host.native_pending.extend([500] * 1000)
    at_first_pass(world, lambda: host.fail_disk(WEB))
    ended = await world.ended(
        await world.migrate(engine=EngineKind.NATIVE, downtime_limit_ms=10_000)
    )
    assert ended.state is MigrationState.COMPLETED, ended.error
    assert ended.iterations[0].pending_pages == 500
    assert world.running() == ["b"]


async def test_what_the_hypervisor_gives_up_in_pre_copy_fails_with_its_words(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the destination said nothing it stayed in pre-copy until its time was over."""
    monkeypatch.setattr(native_driver, "WORD_S", 0.05)
    host = world.a.node.host

    def lose() -> None:
        channel = host.guests[WEB].device_channel
        assert channel is not None
        world.world.channels.unlisten(channel)

    passes = at_first_pass(world, lose)
    ended = await world.ended(await never_converging(world))
    assert ended.state is MigrationState.FAILED
    assert ended.error == f"the source's engine: the hypervisor gave its migration up: {BROKEN}"
    assert passes == ["1"]
    assert world.running() == ["a"]


async def test_a_guest_that_never_converges_stays_where_it_is(world: MigrationWorld) -> None:
    ended = await world.ended(await never_converging(world))
    assert ended.state is MigrationState.FAILED
    assert "doesn't converge" in (ended.error or "")
    assert world.running() == ["a"]
    assert (await world.a.node.ownership.read(WEB)) is not None


async def test_a_cancelled_one_leaves_the_guest_running(world: MigrationWorld) -> None:
    begun = await never_converging(world)

    async def iterates() -> bool:
        return bool((await world.a.manager.get(begun.id)).iterations)

    await eventually(iterates)
    await world.a.manager.cancel(begun.id)
    ended = await world.ended(begun)
    assert ended.state is MigrationState.CANCELLED
    assert world.running() == ["a"]
    await world.until(lambda: world.state(world.b) is None)


async def test_one_that_is_cancelled_as_it_begins_never_begins(world: MigrationWorld) -> None:
    """The hypervisor's migration ran on, without a session."""
    faults = world.a.node.host.faults
    faults.hanging.add("native_begin")
    begun = await never_converging(world)
    session = world.a.manager._runners[begun.id].session
    await world.until(lambda: session.state is MigrationState.PRECOPY)
    await world.a.manager.cancel(begun.id)
    faults.hanging.clear()
    faults.release()
    ended = await world.ended(begun)
    assert ended.state is MigrationState.CANCELLED
    assert not world.a.node.hypervisor.native._runs
    assert world.running() == ["a"]


@pytest.mark.parametrize(
    "operation", ["native_prepare", "native_begin", "native_switch_over", "continue_switchover"]
)
async def test_what_fails_at_the_source_leaves_the_guest_there(
    world: MigrationWorld, operation: str
) -> None:
    world.a.node.host.native_pending.extend([500] * 1000)
    world.a.node.host.faults.failing[operation] = 1
    request = {"engine": EngineKind.NATIVE, "downtime_limit_ms": 10_000}  # However slow its passes.
    ended = await world.ended(await world.migrate(**request))
    assert ended.state is MigrationState.FAILED
    assert world.running() == ["a"]
    again = await world.ended(await world.migrate(**request))
    assert again.state is MigrationState.COMPLETED, again.error
    assert world.running() == ["b"]


async def test_what_fails_at_the_destination_leaves_the_guest_there(
    world: MigrationWorld,
) -> None:
    world.b.node.host.faults.failing["native_receive"] = 1
    ended = await world.ended(await world.migrate(engine=EngineKind.NATIVE))
    assert ended.state is MigrationState.FAILED
    assert world.running() == ["a"]


async def test_the_destination_dies_between_two_passes(world: MigrationWorld) -> None:
    begun = await never_converging(world)
    await world.until(lambda: world.state(world.b) is DomainState.INCOMING)
    world.b.node.host.kill(WEB)
    ended = await world.ended(begun)
    assert ended.state is MigrationState.FAILED
    assert world.running() == ["a"]


async def test_auto_says_in_the_record_why_it_is_native(
    world: MigrationWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = SimulatedHypervisor.capabilities

    async def old(driver: SimulatedHypervisor) -> HypervisorCapabilities:
        found = await known(driver)
        return msgspec.structs.replace(found, paged_engine=False, paged_engine_reason=OLD)

    monkeypatch.setattr(SimulatedHypervisor, "capabilities", old)
    asked = MigrationRequest(destination="b", engine=EngineKind.PAGED)
    assert any(OLD in reason for reason in await world.a.manager.check(WEB, asked))
    with pytest.raises(RefusedError):
        await world.a.manager.create(WEB, asked)
    choice = await world.a.manager.choose_engine(WEB, MigrationRequest(destination="b"))
    assert choice.engine is EngineKind.NATIVE
    ended = await world.ended(await world.migrate())
    assert ended.state is MigrationState.COMPLETED, ended.error
    assert ended.request.engine is EngineKind.NATIVE
    assert OLD in ended.timeline[0].detail


async def test_the_agent_dies_between_two_passes(world: MigrationWorld) -> None:
    begun = await never_converging(world)

    async def iterates() -> bool:
        return bool((await world.a.manager.get(begun.id)).iterations)

    await eventually(iterates)
    await world.a.crash()
    await world.a.restart(world.b)
    ended = await world.ended(begun)
    assert ended.state is MigrationState.FAILED
    assert world.running() == ["a"]
