"""What an engine is told by its agent, and when; the engine is made up."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import cast

import msgspec
import pytest

from migrator import engine_messages as m
from migrator import engine_watch
from migrator.engine.spares import EngineSpares
from migrator.engine_driver import EngineDriver, EngineSettings
from migrator.engine_watch import FIRST_WORD_S, PING_S, UNANSWERED_MAX, UNHEARD_S, excused_s
from migrator.errors import EngineError
from migrator.link_rates import BYTES_MIN, LinkRates
from migrator.model import DomainName, PassKind, PassReport, Role
from migrator.policy import TOLD
from migrator.ports import GuestMemory, HypervisorDriver, MemoryRegion
from migrator.session import vocabulary as v
from tests.unit.session_pair import SessionPair

MIB = 1024 * 1024
GIB = 1024 * MIB
CONNECT = v.ConnectEngine(host="10.0.0.2", port=7000, secret=b"s" * 32, post_copy=True)


class _Engine:
    """In the place of a process that waits."""

    running = True

    def __init__(self) -> None:
        self.told: list[m.ToEngine] = []

    def attach(
        self, on_message: Callable[[m.FromEngine], None], on_exit: Callable[[int], None]
    ) -> None:
        return

    def send(self, message: m.ToEngine, fds: Sequence[int] = ()) -> None:
        self.told.append(message)

    def kill(self) -> None:
        self.running = False

    async def stop(self, timeout_s: float) -> bool:
        self.running = False
        return True


class _Spares:
    def __init__(self) -> None:
        self.taken: list[_Engine] = []

    async def take(self) -> _Engine:
        self.taken.append(_Engine())
        return self.taken[-1]


class _Hypervisor:
    """Its guest has no memory. `meanwhile` happens while that is opened."""

    size_bytes = MIB

    def __init__(self) -> None:
        self.meanwhile: Callable[[], None] = lambda: None
        self.files: list[Path] = []
        """The first is the guest's memory; none: it has none."""

    async def memory(self, domain: DomainName) -> GuestMemory:
        self.meanwhile()
        regions = tuple(await self.arriving_memory(domain))
        return GuestMemory(pid=1, regions=regions, uffd=os.eventfd(0), pagemap_fd=os.eventfd(0))

    async def arriving_memory(self, domain: DomainName) -> Sequence[MemoryRegion]:
        return [
            MemoryRegion(
                name="ram0",
                fd=os.open(each, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600),
                size_bytes=self.size_bytes,
                page_size_bytes=4096,
                mappings=(),
            )
            for each in self.files[:1]
        ]


class _World:
    def __init__(self, folder: Path, role: Role = Role.SOURCE) -> None:
        self.folder = folder
        self.heard: list[v.Event] = []
        pair = SessionPair()
        self.session = pair.source if role is Role.SOURCE else pair.destination
        self.spares = _Spares()
        self.hypervisor = _Hypervisor()
        self.driver = EngineDriver(
            self.session,
            settings=EngineSettings(
                run_directory=folder, spares=cast(EngineSpares, self.spares), bind_address=""
            ),
            hypervisor=cast(HypervisorDriver, self.hypervisor),
            device_channel=folder / "device",
            feed=self.heard.append,
        )

    async def hears_something(self) -> None:
        """Not bounded by time, which may stand still."""
        for _ in range(100 * UNANSWERED_MAX):
            if self.heard:
                return
            await asyncio.sleep(0)
        raise AssertionError("nothing was heard")

    async def perform(self, command: v.EngineCommand) -> None:
        self.driver.perform(command)
        await self.driver.drained()

    def limit(self, bytes_per_s: int) -> None:
        """As `Runner.limit_bandwidth`."""
        self.session.request = msgspec.structs.replace(
            self.session.request, bandwidth_bytes_per_s=bytes_per_s
        )
        self.driver.limit_bandwidth(bytes_per_s)


@pytest.fixture
def world(tmp_path: Path) -> _World:
    return _World(tmp_path)


async def test_a_successor_is_told_nothing_before_its_configuration(world: _World) -> None:
    """It would end at once: that has to be the first message."""
    await world.perform(v.StartEngine())
    await world.perform(v.StartEngine(post_copy=True))
    first, successor = world.spares.taken
    assert [type(each) for each in first.told] == [m.Configure]
    world.limit(5 * MIB)
    await world.perform(v.PullPages())
    assert successor.told == []
    await world.perform(CONNECT)
    configure, connect = successor.told
    assert isinstance(configure, m.Configure)
    assert configure.bandwidth_bytes_per_s == 5 * MIB
    assert isinstance(connect, m.Connect)
    world.limit(6 * MIB)
    assert successor.told[2:] == [m.SetBandwidth(bandwidth_bytes_per_s=6 * MIB)]
    await world.driver.close()


@pytest.mark.parametrize("same", [True, False])
async def test_a_guest_whose_memory_isnt_what_its_pages_went_to_is_never_attached(
    tmp_path: Path, same: bool
) -> None:
    """It would run with zeros."""
    world = _World(tmp_path, Role.DESTINATION)
    world.hypervisor.files = [tmp_path / "made ahead"]
    world.driver.begin_early()
    await world.perform(v.StartEngine())
    if not same:
        world.hypervisor.files = [tmp_path / "another"]
    await world.driver.arrived()
    (engine,) = world.spares.taken
    kinds = [type(each) for each in engine.told]
    attached = [m.Attach, m.OpenDeviceChannel]
    assert kinds == [m.Configure, *(attached if same else [])]
    lost = [each.reason for each in world.heard if isinstance(each, v.EngineLost)]
    assert lost == ([] if same else ["start: vm has other memory than its pages went to"])
    await world.driver.close()


async def test_an_engine_has_to_be_heard_in_a_pass(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    await world.perform(v.StartEngine())
    driver, now = world.driver, time.monotonic()
    report = PassReport(number=1, kind=PassKind.FIRST, seconds=1.0, pages=1, bytes_sent=1)
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        assert driver.unheard_s is None
        driver.perform(v.RunPass(number=1, kind=PassKind.FIRST))
        now += 9.0
        assert driver.unheard_s == pytest.approx(9.0)
        driver._on_message(m.PassDone(report=report), 0)
        now += 9.0
        assert driver.unheard_s is None
    await driver.close()


@pytest.mark.parametrize("kind", sorted(TOLD))
async def test_an_engine_that_tells_what_is_missing_reports_nothing_and_is_asked(
    world: _World, monkeypatch: pytest.MonkeyPatch, kind: PassKind
) -> None:
    """A GiB of small ranges takes seconds, and a link that breaks meanwhile more of them."""
    await world.perform(v.StartEngine())
    driver, now = world.driver, time.monotonic()
    driver._note_life()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        driver.perform(v.RunPass(number=2, kind=kind))
        now += PING_S
        assert driver.unheard_s is None
        now += UNHEARD_S + 1.0
        assert driver.unheard_s == pytest.approx(PING_S + UNHEARD_S + 1.0)
    await asyncio.sleep(0)
    assert m.Ping() in world.spares.taken[0].told
    await driver.close()


@pytest.mark.parametrize("spoke", [True, False])
async def test_one_that_never_spoke_is_replaced_too_if_it_has_had_time_to(
    world: _World, monkeypatch: pytest.MonkeyPatch, spoke: bool
) -> None:
    """A successor that hangs in its imports: the guest waits for its pages."""
    monkeypatch.setattr(engine_watch, "PING_S", 0.0)
    world.hypervisor.files = [world.folder / "memory"]
    driver, now = world.driver, time.monotonic()
    await world.perform(v.StartEngine(post_copy=True))
    await world.perform(CONNECT)
    if spoke:
        driver._note_life()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        now += FIRST_WORD_S - 1.0
        for _ in range(10 * UNANSWERED_MAX):
            await asyncio.sleep(0)
        lost = [each.reason for each in world.heard if isinstance(each, v.EngineLost)]
        assert bool(lost) is spoke
        now += 2.0
        await world.hears_something()
    (lost_event,) = (each for each in world.heard if isinstance(each, v.EngineLost))
    assert "it has said nothing for" in lost_event.reason
    await driver.close()


async def test_an_engine_hangs_no_sooner_than_it_is_configured(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it is configured with may hang with a disk, and where pages go to isn't known at once:
    whoever took its place then would wait, too, and its guest be told of the wrong cause.
    """
    monkeypatch.setattr(engine_watch, "PING_S", 0.0)
    driver, now = world.driver, time.monotonic()
    await world.perform(v.StartEngine(post_copy=True))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        now += 10 * FIRST_WORD_S
        for _ in range(10 * UNANSWERED_MAX):
            await asyncio.sleep(0)
        assert world.heard == []
        await world.perform(CONNECT)
        now += FIRST_WORD_S - 1.0
        for _ in range(10 * UNANSWERED_MAX):
            await asyncio.sleep(0)
        assert world.heard == []
        now += 2.0
        await world.hears_something()
    assert isinstance(world.heard[0], v.EngineLost)
    await driver.close()


@pytest.mark.parametrize("what", ["first word", "pass", "rest of a pass", "post-copy"])
async def test_a_large_guest_is_looked_through_for_as_long_as_that_takes(
    world: _World, monkeypatch: pytest.MonkeyPatch, what: str
) -> None:
    """Each GiB of it costs up to 0.05 s in which a source's engine says nothing: it was taken for
    hung. While the guest waits for its pages it isn't looked through.
    """
    monkeypatch.setattr(engine_watch, "PING_S", 0.0)
    monkeypatch.setattr(_Hypervisor, "size_bytes", 1024 * GIB)
    world.hypervisor.files = [world.folder / "memory"]
    driver, now = world.driver, time.monotonic()
    await world.perform(v.StartEngine(post_copy=True))
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: now)
        await world.perform(CONNECT)
        if what != "first word":
            driver._note_life()
            driver.perform(v.RunPass(number=2, kind=PassKind.STALE))
        if what == "rest of a pass":
            now += 99.0
            driver._note_life()
        elif what == "post-copy":
            report = PassReport(number=2, kind=PassKind.STALE, seconds=1.0, pages=1, bytes_sent=1)
            driver._on_message(m.PassDone(report=report), driver._generation)
            world.heard.clear()
        excused = {"first word": FIRST_WORD_S + 512.0, "post-copy": 0.0}.get(what, 102.4)
        now += max(excused - 1.0, 0.0)
        for _ in range(10 * UNANSWERED_MAX):
            await asyncio.sleep(0)
        assert bool(world.heard) is (what == "post-copy")
        now += 2.0
        await world.hears_something()
    assert isinstance(world.heard[0], v.EngineLost)
    asked = world.spares.taken[0].told.count(m.Ping())
    assert asked <= 12 * UNANSWERED_MAX, "no more than its socket holds"
    await driver.close()


def test_of_a_guest_of_usual_size_nobody_waits_longer() -> None:
    for in_pass in (False, True):
        assert excused_s(16 * GIB, spoke=True, in_pass=in_pass) < 2.0
    assert excused_s(16 * GIB, spoke=False, in_pass=False) < FIRST_WORD_S + 10.0


async def test_what_hangs_with_the_only_pages_is_asked_no_more_than_it_can_be(
    world: _World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its socket has an end: the agent took a full one for the engine's, and gave the guest up."""

    async def gone(domain: DomainName) -> GuestMemory:
        raise EngineError("no such process")

    monkeypatch.setattr(engine_watch, "PING_S", 0.0)
    await world.perform(v.StartEngine(post_copy=True))
    await world.perform(CONNECT)
    monkeypatch.setattr(world.hypervisor, "memory", gone)
    world.driver._note_life()
    await world.hears_something()
    (engine,) = world.spares.taken
    asked = len(engine.told)
    for _ in range(10 * UNANSWERED_MAX):
        await asyncio.sleep(0)
    assert len(engine.told) == asked
    assert not [each for each in world.heard if isinstance(each, v.EngineLost)]
    world.driver._note_life()
    for _ in range(10):
        await asyncio.sleep(0)
    assert len(engine.told) > asked
    await world.driver.close()


async def test_after_an_agent_stood_still_its_engine_is_asked_before_it_is_judged(
    world: _World,
) -> None:
    """Nothing was asked for over a minute, so nothing was answered."""
    await world.perform(v.StartEngine(post_copy=True))
    await world.perform(CONNECT)
    world.driver._note_life()
    world.driver._quiet_since_s -= 300.0
    told = world.spares.taken[0].told
    before = len(told)
    world.driver._ask()
    assert told[before:] == [m.Ping()]
    await world.driver.close()


@pytest.mark.parametrize("alone", [True, False])
async def test_one_that_answers_while_it_is_judged_doesnt_hang(
    world: _World, monkeypatch: pytest.MonkeyPatch, alone: bool
) -> None:
    """It was noted as hanging then, asked no more, and replaced once QEMU went on, too."""
    await world.perform(v.StartEngine(post_copy=True))
    await world.perform(CONNECT)
    world.driver._note_life()

    async def answers() -> bool:
        world.driver._note_life()
        return not alone

    monkeypatch.setattr(world.driver, "_memory_is_there", answers)
    await world.driver._hangs(15.0)
    assert world.heard == []
    assert world.driver._ask()
    assert world.spares.taken[0].told[-1] == m.Ping()
    await world.driver.close()


async def test_a_cap_that_is_set_while_the_engine_is_configured_holds(world: _World) -> None:
    world.hypervisor.meanwhile = lambda: world.limit(7 * MIB)
    await world.perform(v.StartEngine())
    (configure,) = world.spares.taken[0].told
    assert isinstance(configure, m.Configure)
    assert configure.bandwidth_bytes_per_s == 7 * MIB
    await world.driver.close()


async def test_what_the_link_carried_is_told_to_the_next_engine(tmp_path: Path) -> None:
    first, second = _World(tmp_path), _World(tmp_path)
    second.driver._settings = first.driver._settings
    carried = PassReport(
        number=1, kind=PassKind.FIRST, seconds=2.0, pages=1, bytes_sent=2 * BYTES_MIN
    )
    rates = []
    for world in (first, second):
        await world.perform(v.StartEngine())
        (configure,) = first.spares.taken[-1].told
        assert isinstance(configure, m.Configure)
        rates.append(configure.expected_bytes_per_s)
        world.driver._on_message(m.PassDone(report=carried, link_bytes_per_s=117e6), 0)
        await world.driver.close()
    assert rates == [None, 117e6]


def test_a_link_is_forgotten_once_it_holds_nothing_up() -> None:
    rates = LinkRates()
    rates.note("n2", None, BYTES_MIN)
    assert rates.to("n2") is None
    rates.note("n2", 117e6, 1)
    rates.note("n3", 25e6, BYTES_MIN)
    rates.note("n2", None, BYTES_MIN - 1)  # Too short to tell.
    assert (rates.to("n2"), rates.to("n3")) == (117e6, 25e6)
    rates.note("n2", None, BYTES_MIN)
    assert (rates.to("n2"), rates.to("n3")) == (None, 25e6)
