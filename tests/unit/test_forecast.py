"""What a node predicts from, and who may sample a dirty log; simulated guests, a made-up engine."""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import AsyncIterator, Sequence
from pathlib import Path

import msgspec
import pytest

from migrator.engine_messages import DirtySampled
from migrator.errors import ConflictError, EngineError, PeerError, WrongStateError
from migrator.figures import DirtyPoint, LinkOrigin, LinkSpeed
from migrator.model import (
    DomainName,
    EngineKind,
    FencingToken,
    Migration,
    MigrationId,
    MigrationProgress,
    MigrationRequest,
    MigrationState,
    NodeName,
    PassKind,
    PassReport,
)
from migrator.ports import Launch
from node_agent.migrations import forecast
from node_agent.migrations.forecast import KNOWN_FOR_S, Forecaster
from node_agent.migrations.link_probe import LinkProbe, ProbeParams
from node_agent.migrations.link_speed import (
    interface_speed,
    of_migrations,
    real_speed_mbit_per_s,
)
from tests.unit.agent_world import World, open_world, spec_of
from tests.unit.migration_world import migration_world

MIB = 1024**2
WEB = DomainName("web")
REQUEST = MigrationRequest(destination="b")
PROBED = LinkSpeed(bytes_per_s=1e8, origin=LinkOrigin.PROBE)


def migration_of(number: int = 1, **changes: object) -> Migration:
    """One that moved 100 MiB in a second, with 20 ms of blackout, and 0.3 s beside it all."""
    passes = (
        PassReport(
            number=1,
            kind=PassKind.FIRST,
            seconds=1.0,
            pages=25_600,
            bytes_sent=100 * MIB,
            zero_pages=25_600,
            pending_pages=1_000,
        ),
        PassReport(number=2, kind=PassKind.FINAL, seconds=0.005, pages=1_000, bytes_sent=4 * MIB),
    )
    values: dict[str, object] = {
        "id": f"m-{number}",
        "domain": "web",
        "source": "a",
        "destination": "b",
        "request": REQUEST,
        "state": MigrationState.COMPLETED,
        "progress": MigrationProgress(state=MigrationState.COMPLETED),
        "created_at_s": time.time() - number,
        "blackout_ms": 20.0,
        "total_s": 1.32,
        "iterations": passes,
    }
    return Migration(**(values | changes))  # type: ignore[arg-type]


class Bench:
    """A forecaster on node a, and what it is told."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.history: list[Migration] = []
        self.interface: LinkSpeed | None = None
        self.begun = asyncio.Event()
        self.release = asyncio.Event()
        self.release.set()
        self.ending = asyncio.Event()
        """Not set: what was sampled doesn't end."""
        self.ending.set()
        self.error: Exception | None = None
        self.samples = 0
        self.dirtied_packed_share: float | None = None
        self.now_s = time.time()
        self.locks = world.a.domains.locks
        self.forecaster = Forecaster(
            NodeName("a"),
            hypervisor=world.a.hypervisor,
            locks=self.locks,
            sample=self._sample,
            history=self._history,
            interface=self._interface,
            probe=self._probe,
            clock=lambda: self.now_s,
        )

    async def _sample(self, domain: DomainName, seconds: float) -> DirtySampled:
        self.samples += 1
        self.begun.set()
        try:
            await self.release.wait()
        finally:
            await self.ending.wait()
        if self.error is not None:
            raise self.error
        return DirtySampled(
            seconds=seconds,
            fresh_bytes=int(seconds * 2000) * 4096,
            curve=(DirtyPoint(seconds=seconds, bytes=6 * MIB),),
            zero_share=0.5,
            packed_share=0.4,
            dirtied_packed_share=self.dirtied_packed_share,
            memory_in_use_bytes=80 * MIB,
        )

    async def _history(self) -> Sequence[Migration]:
        return self.history

    async def _interface(self) -> LinkSpeed | None:
        return self.interface

    async def _probe(self, node: NodeName) -> LinkSpeed:
        return PROBED


@pytest.fixture
async def bench(tmp_path: Path) -> AsyncIterator[Bench]:
    async with open_world(tmp_path) as world:
        spec = spec_of(disks=[], nics=[])
        launch = Launch(spec=spec, disks=(), tap_fds=(), token=FencingToken(1))
        await world.a.hypervisor.start(launch)
        made = Bench(world)
        yield made
        await made.forecaster.close()


async def test_a_dirty_rate_has_its_figures(bench: Bench) -> None:
    rate = await bench.forecaster.dirty_rate(WEB, 2.0)
    assert (rate.pages_per_s, rate.bytes_per_s) == (2000.0, 2000.0 * 4096)
    assert (rate.working_set_bytes, rate.memory_in_use_bytes) == (6 * MIB, 80 * MIB)
    assert (rate.domain, rate.node, rate.seconds) == ("web", "a", 2.0)


async def test_only_a_running_guest_that_does_not_migrate_is_sampled_and_only_once(
    bench: Bench,
) -> None:
    with pytest.raises(WrongStateError):
        await bench.forecaster.dirty_rate(DomainName("nobody"), 1.0)
    await bench.world.a.hypervisor.pause(WEB)
    with pytest.raises(WrongStateError, match="running"):
        await bench.forecaster.dirty_rate(WEB, 1.0)
    await bench.world.a.hypervisor.resume(WEB)
    await bench.locks.claim_for_migration(WEB, MigrationId("m-1"))
    with pytest.raises(ConflictError, match="m-1"):
        await bench.forecaster.dirty_rate(WEB, 1.0)
    bench.locks.release_from_migration(WEB, MigrationId("m-1"))
    bench.release.clear()
    first = asyncio.create_task(bench.forecaster.dirty_rate(WEB, 1.0))
    await bench.begun.wait()
    with pytest.raises(ConflictError, match="sampled already"):
        await bench.forecaster.dirty_rate(WEB, 1.0)
    bench.release.set()
    await first
    assert bench.samples == 1


async def test_a_migration_ends_a_sampling_and_a_caller_that_leaves_too(bench: Bench) -> None:
    bench.release.clear()
    sampling = asyncio.create_task(bench.forecaster.dirty_rate(WEB, 1.0))
    await bench.begun.wait()
    await bench.forecaster.interrupt(WEB)
    with pytest.raises(ConflictError, match="for the sake of a migration"):
        await sampling
    bench.begun.clear()
    sampling = asyncio.create_task(bench.forecaster.dirty_rate(WEB, 1.0))
    await bench.begun.wait()
    sampling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await sampling
    bench.release.set()
    assert (await bench.forecaster.dirty_rate(WEB, 1.0)).domain == "web"


async def test_a_migration_doesnt_begin_beside_a_sampling_that_doesnt_end(
    bench: Bench, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its engine is being killed, say. Two that read one dirty log lose what the other one read."""
    monkeypatch.setattr(forecast, "INTERRUPT_S", 0.01)
    bench.ending.clear()
    bench.release.clear()
    sampling = asyncio.create_task(bench.forecaster.dirty_rate(WEB, 1.0))
    await bench.begun.wait()
    with pytest.raises(ConflictError, match="doesn't end"):
        await bench.forecaster.interrupt(WEB)
    bench.ending.set()
    with pytest.raises(ConflictError, match="for the sake of a migration"):
        await sampling
    await bench.forecaster.interrupt(WEB)


async def test_a_guest_that_ends_meanwhile_is_the_reason_and_an_engine_is_not(
    bench: Bench,
) -> None:
    bench.error = EngineError("no such process")
    with pytest.raises(EngineError):
        await bench.forecaster.dirty_rate(WEB, 1.0)
    bench.release.clear()
    sampling = asyncio.create_task(bench.forecaster.dirty_rate(WEB, 1.0))
    await bench.begun.wait()
    await asyncio.sleep(0)
    await bench.world.a.hypervisor.destroy(WEB)
    bench.release.set()
    with pytest.raises(WrongStateError, match="running"):
        await sampling


async def test_the_links_speed_comes_from_migrations_then_the_interface_then_a_probe(
    bench: Bench,
) -> None:
    found = await bench.forecaster.predict(WEB, REQUEST, 1.0)
    assert found.link == PROBED
    assert found.zero_share == 0.5
    assert found.dirty_rate_origin == "sampled over 1.0 s"
    bench.interface = LinkSpeed(bytes_per_s=1.2e8, origin=LinkOrigin.INTERFACE)
    assert (await bench.forecaster.predict(WEB, REQUEST, 1.0)).link == bench.interface
    bench.history = [migration_of()]
    link = (await bench.forecaster.predict(WEB, REQUEST, 1.0)).link
    assert link.origin is LinkOrigin.MIGRATIONS
    assert link.bytes_per_s == pytest.approx(100 * MIB)
    assert link.overhead_s == pytest.approx(0.3)
    assert link.fixed_blackout_ms == pytest.approx(15.0)


async def test_how_small_pages_become_is_the_last_migrations_word_then_the_samples(
    bench: Bench,
) -> None:
    found = await bench.forecaster.predict(WEB, REQUEST, 1.0)
    assert (found.packed_share, found.dirtied_packed_share) == (0.4, 0.4)
    bench.dirtied_packed_share = 0.9
    found = await bench.forecaster.predict(WEB, REQUEST, 1.0)
    assert (found.packed_share, found.dirtied_packed_share) == (0.4, 0.9)
    bench.interface = LinkSpeed(bytes_per_s=1.2e9, origin=LinkOrigin.INTERFACE)
    assert (await bench.forecaster.predict(WEB, REQUEST, 1.0)).packed_share == 1.0
    first, last = migration_of().iterations
    packed = msgspec.structs.replace(first, payload_bytes=200 * MIB, compressors=("lz4",))
    bench.history = [migration_of(iterations=(packed, last))]
    assert (await bench.forecaster.predict(WEB, REQUEST, 1.0)).packed_share == 0.5
    native = msgspec.structs.replace(REQUEST, engine=EngineKind.NATIVE)
    bench.history = [migration_of(iterations=(packed, last), request=native)]
    assert (await bench.forecaster.predict(WEB, REQUEST, 1.0)).packed_share == 0.4


async def test_a_prediction_at_the_start_costs_nothing_and_needs_knowledge(bench: Bench) -> None:
    assert await bench.forecaster.at_start(WEB, REQUEST) is None
    bench.forecaster.ended(migration_of())
    os.pwrite(bench.world.a.host.guests[WEB].memory_fd, b"x" * MIB, 0)
    found = await bench.forecaster.at_start(WEB, REQUEST)
    assert found is not None
    assert found.dirty_rate_origin == "the iterations of migration m-1"
    assert found.zero_share == 0.0, "pages of zeros were left out where it arrived"
    bench.now_s += 1.0
    await bench.forecaster.dirty_rate(WEB, 1.0)
    bench.now_s += 9.0
    found = await bench.forecaster.at_start(WEB, REQUEST)
    assert found is not None
    assert found.dirty_rate_origin == "sampled 9 s before"
    assert bench.samples == 1
    bench.now_s += KNOWN_FOR_S
    assert await bench.forecaster.at_start(WEB, REQUEST) is None


async def test_every_migration_has_its_prediction_and_ends_a_sampling(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with migration_world(tmp_path, monkeypatch) as world:
        world.script.dirty.extend([50])
        first = await world.ended(await world.migrate())
        assert first.prediction is not None
        assert first.prediction.link.origin is LinkOrigin.FIRST_PASS
        assert first.prediction.converges
        await world.until(lambda: not world.b.manager._runners)
        os.pwrite(world.world.b.host.guests[WEB].memory_fd, b"x" * MIB, 0)
        sampling = asyncio.create_task(world.b.manager.dirty_rate(WEB, 30.0))
        await world.until(lambda: bool(world.b.manager._forecaster._sampling))
        back = await world.b.manager.create(WEB, MigrationRequest(destination="a"))
        with pytest.raises(ConflictError, match="for the sake of a migration"):
            await sampling
        assert back.prediction is not None
        assert back.prediction.link.origin is LinkOrigin.INTERFACE
        assert back.prediction.dirty_rate_origin == f"the iterations of migration {first.id}"
        assert back.prediction.memory_in_use_bytes >= MIB
        await world.until(lambda: world.running() == ["a"])
        await world.until(lambda: not world.b.manager._runners)
        assert (await world.b.manager.get(back.id)).prediction == back.prediction
        dry = await world.a.manager.predict(WEB, REQUEST, 0.1)
        assert dry.converges


def test_which_migrations_tell_a_links_speed() -> None:
    capped = msgspec.structs.replace(REQUEST, bandwidth_bytes_per_s=10**6)
    useless = [
        migration_of(1, request=capped),
        migration_of(2, state=MigrationState.CANCELLED),
        migration_of(3, destination="c"),
        migration_of(4, iterations=()),
    ]
    assert of_migrations(useless, "a", "b") is None
    back = migration_of(5, source="b", destination="a")
    found = of_migrations([*useless, back], "a", "b")
    assert found is not None
    assert found.detail == "the last 1 from b to a"
    found = of_migrations([*useless, back, migration_of(6), migration_of(7)], "a", "b")
    assert found is not None
    assert found.detail == "the last 2 from a to b"


def _interface(net: Path, name: str, speed: str, *, real: bool = False, on: str = "") -> None:
    folder = net / name
    folder.mkdir()
    (folder / "speed").write_text(speed)
    if real:
        (folder / "device").mkdir()
    if on:
        (folder / f"lower_{on}").mkdir()


def test_only_real_interfaces_are_believed(tmp_path: Path) -> None:
    _interface(tmp_path, "eth0", "1000\n", real=True)
    _interface(tmp_path, "eth1", "-1\n", real=True)
    _interface(tmp_path, "veth0", "10000\n")
    _interface(tmp_path, "vlan5", "10000\n", on="eth0")
    _interface(tmp_path, "br0", "10000\n", on="vlan5")
    _interface(tmp_path, "loop0", "10000\n", on="loop0")
    (tmp_path / "bond0").mkdir()
    (tmp_path / "bond0" / "bonding").mkdir()
    (tmp_path / "bond0" / "speed").write_text("20000\n")
    names = ("eth0", "eth1", "veth0", "vlan5", "br0", "loop0", "bond0", "none")
    found = [real_speed_mbit_per_s(tmp_path, name) for name in names]
    assert found == [1000, None, None, 1000, 1000, None, 20000, None]
    assert interface_speed("not an address") is None
    assert interface_speed("192.0.2.77") is None


async def test_a_link_is_probed_between_two_agents(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        probes = [LinkProbe(node.hub, "127.0.0.1") for node in (world.a, world.b)]
        for probe in probes:
            probe.register()
        speed = await probes[0].measure(NodeName("b"))
        assert speed.origin is LinkOrigin.PROBE
        assert 1e6 < speed.bytes_per_s < 1e11
        with pytest.raises(PeerError):
            await probes[0].measure(NodeName("c"))
        elsewhere = LinkProbe(world.b.hub, "192.0.2.77")
        with pytest.raises(PeerError, match="can't listen"):
            await elsewhere.serve(NodeName("a"), ProbeParams())
        for probe in probes:
            await probe.close()
