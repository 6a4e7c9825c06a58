"""The contract of NativeMigration: hypervisors' own migrations, on the simulated one and QEMU's.

What the guest itself holds is not compared: QEMU 7.2 loses dirtied pages where it emulates. The
pages that are compared are written from outside before the migration, and nobody writes there.
"""

from __future__ import annotations

import asyncio
import os
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
import trustme

from migrator.errors import HypervisorError, NotFoundError
from migrator.model import DomainState, NodeName
from migrator.native_port import NativeMigration, NativeSettings
from migrator.ports import AbortOutcome, DomainEventKind
from migrator.tls import TlsFiles
from tests.contract.hypervisor_worlds import (
    VM,
    Node,
    QemuWorld,
    SimulatedWorld,
    World,
    eventually,
    open_qemus,
)

PATTERN_OFFSET = 16 * 1024**2
PATTERN = random.Random(1).randbytes(24 * 1024**2)
SLOW_BYTES_PER_S = 2_000_000
"""Of which the pattern takes longer than any test."""


@pytest.fixture(params=["simulated", pytest.param("qemu", marks=pytest.mark.lab)])
async def world(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[World]:
    made = {"simulated": SimulatedWorld, "qemu": QemuWorld}[request.param](tmp_path)
    await made.open()
    try:
        yield made
    finally:
        await made.close()


def settings(
    *, bandwidth: int | None = None, channels: int = 1, tls: TlsFiles | None = None
) -> NativeSettings:
    return NativeSettings(
        bind_address="127.0.0.1",
        destination=NodeName("n2"),
        channels=channels,
        bandwidth_bytes_per_s=bandwidth,
        tls=tls,
    )


def native(node: Node) -> NativeMigration:
    found = node.driver.native
    assert found is not None
    return found


async def write_pattern(node: Node) -> None:
    memory = await node.driver.memory(VM)
    try:
        os.pwrite(memory.regions[0].fd, PATTERN, PATTERN_OFFSET)
    finally:
        memory.close()


async def has_pattern(node: Node) -> bool:
    memory = await node.driver.memory(VM)
    try:
        return os.pread(memory.regions[0].fd, len(PATTERN), PATTERN_OFFSET) == PATTERN
    finally:
        memory.close()


def never_end(world: World) -> None:
    if isinstance(world, SimulatedWorld):
        world.hosts["a"].native_pending.extend([1000] * 100_000)


async def begin(
    world: World, source: NativeSettings | None = None, destination: NativeSettings | None = None
) -> None:
    """A guest with the pattern runs on `a`; its migration to `b` has begun."""
    await native(world.a).begin(VM, *await prepare(world, source, destination))


async def prepare(
    world: World, source: NativeSettings | None = None, destination: NativeSettings | None = None
) -> tuple[str, int]:
    """A guest with the pattern runs on `a`; `b` listens there for it."""
    await world.a.driver.start(world.launch())
    await write_pattern(world.a)
    await world.b.driver.start_incoming(world.launch(2))
    host, port = await native(world.b).receive(VM, destination or source or settings())
    await native(world.a).prepare(VM, source or settings())
    for node in (world.a, world.b):
        node.forget()
    return host, port


async def begin_slowly(world: World) -> None:
    never_end(world)
    await begin(world, settings(bandwidth=SLOW_BYTES_PER_S))
    await world.a.wait(DomainEventKind.PASS_BEGAN)


async def end(world: World) -> None:
    """Up to the handoff."""
    await native(world.a).switch_over(VM)
    await world.a.wait(DomainEventKind.PRE_SWITCHOVER)
    assert await world.a.state() is DomainState.PRE_SWITCHOVER
    assert await world.b.state() is DomainState.INCOMING
    await world.a.driver.continue_switchover(VM)
    await world.a.wait(DomainEventKind.DEVICE_STATE_SENT)
    await world.b.wait(DomainEventKind.DEVICE_STATE_LOADED)


async def test_up_to_the_handoff_and_on(world: World) -> None:
    await begin(world)
    await end(world)
    kinds = world.a.kinds()
    assert kinds.index(DomainEventKind.PAUSED) < kinds.index(DomainEventKind.PRE_SWITCHOVER)
    assert await world.a.state() is DomainState.POSTMIGRATE
    assert await world.b.state() is DomainState.LOADED
    assert (await native(world.a).figures(VM)).bytes_sent >= len(PATTERN)
    await world.b.driver.resume(VM)
    assert await world.b.state() is DomainState.RUNNING
    assert await world.a.state() is DomainState.POSTMIGRATE
    assert await has_pattern(world.b)


async def test_back_after_all_was_sent(world: World) -> None:
    await begin(world)
    await end(world)
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.SENT
    await world.b.driver.destroy(VM)
    await world.a.driver.resume(VM)
    assert await world.a.state() is DomainState.RUNNING


async def test_a_cancelled_pre_copy_leaves_the_guest_running(world: World) -> None:
    await begin_slowly(world)
    assert await world.a.state() is DomainState.RUNNING
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    assert await world.a.state() is DomainState.RUNNING
    assert DomainEventKind.PAUSED not in world.a.kinds()
    await eventually(lambda: DomainEventKind.EXITED in world.b.kinds())


@pytest.mark.parametrize("after_s", [0.0, 0.03, 0.1])
async def test_one_whose_beginning_is_cancelled_is_over_after_an_abort(
    world: World, after_s: float
) -> None:
    """However far it had come: QEMU's guard starts first."""
    never_end(world)
    host, port = await prepare(world, settings(bandwidth=SLOW_BYTES_PER_S))
    beginning = asyncio.create_task(native(world.a).begin(VM, host, port))
    await asyncio.sleep(after_s)
    beginning.cancel()
    await asyncio.wait([beginning])
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    world.a.forget()
    await asyncio.sleep(0.1)
    assert await world.a.state() is DomainState.RUNNING
    assert not {DomainEventKind.PASS_BEGAN, DomainEventKind.PAUSED} & set(world.a.kinds())


async def test_after_a_cancelled_one_the_page_engine_can_have_it(world: World) -> None:
    await begin_slowly(world)
    await world.a.driver.abort_switchover(VM)
    await eventually(lambda: DomainEventKind.EXITED in world.b.kinds())
    await world.switch_over(world.a, world.b)
    await world.b.driver.resume(VM)
    assert await world.b.state() is DomainState.RUNNING


async def test_cancelled_in_pre_switchover(world: World) -> None:
    await begin(world)
    await native(world.a).switch_over(VM)
    await world.a.wait(DomainEventKind.PRE_SWITCHOVER)
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED
    assert await world.a.state() is DomainState.RUNNING


async def test_the_destination_dies(world: World) -> None:
    await begin_slowly(world)
    await world.kill(world.b)
    await world.a.wait(DomainEventKind.MIGRATION_FAILED)
    assert await world.a.state() is DomainState.RUNNING
    assert await world.a.driver.abort_switchover(VM) is AbortOutcome.RESUMED


@pytest.mark.parametrize("stopped", [False, True], ids=["pre-copy", "pre-switchover"])
async def test_without_its_agent_the_guest_runs_on(world: World, stopped: bool) -> None:
    if stopped:
        await begin(world)
        await native(world.a).switch_over(VM)
        await world.a.wait(DomainEventKind.PRE_SWITCHOVER)
    else:
        await begin_slowly(world)
    await world.a.driver.close()
    await eventually(lambda: DomainEventKind.EXITED in world.b.kinds())
    assert await world.reopen("a") == [VM]
    assert await world.a.state() is DomainState.RUNNING


async def test_a_cap_is_lifted_while_it_runs(world: World) -> None:
    await begin_slowly(world)
    await native(world.a).limit_bandwidth(VM, None)
    await end(world)
    assert await has_pattern(world.b)


async def test_nobody_listens(world: World) -> None:
    await world.a.driver.start(world.launch())
    await native(world.a).prepare(VM, settings())
    world.a.forget()
    try:
        await native(world.a).begin(VM, "127.0.0.1", 1)
    except HypervisorError:
        pass
    else:
        await world.a.wait(DomainEventKind.MIGRATION_FAILED)
    assert await world.a.state() is DomainState.RUNNING


async def test_a_domain_that_is_not_here(world: World) -> None:
    for node in (world.a, world.b):
        with pytest.raises(NotFoundError):
            await native(node).receive(VM, settings())
        with pytest.raises(NotFoundError):
            await native(node).prepare(VM, settings())
        with pytest.raises(NotFoundError):
            await native(node).figures(VM)


# --- what only a real one can show -----------------------------------------------------------


@pytest.fixture
async def qemu(tmp_path: Path) -> AsyncIterator[QemuWorld]:
    async with open_qemus(tmp_path) as made:
        yield made


@pytest.mark.lab
async def test_several_connections(qemu: QemuWorld) -> None:
    await begin(qemu, settings(channels=3))
    await end(qemu)
    assert await has_pattern(qemu.b)


def files_of(folder: Path, authority: trustme.CA, name: str) -> TlsFiles:
    folder = folder / name
    folder.mkdir()
    certificate = authority.issue_cert(name)
    authority.cert_pem.write_to_path(str(folder / "authority.pem"))
    certificate.cert_chain_pems[0].write_to_path(str(folder / "certificate.pem"))
    certificate.private_key_pem.write_to_path(str(folder / "key.pem"))
    return TlsFiles(
        authority_path=str(folder / "authority.pem"),
        certificate_path=str(folder / "certificate.pem"),
        key_path=str(folder / "key.pem"),
    )


@pytest.mark.lab
@pytest.mark.parametrize("channels", [1, 2])
async def test_tls(qemu: QemuWorld, tmp_path: Path, channels: int) -> None:
    authority = trustme.CA()
    await begin(
        qemu,
        settings(tls=files_of(tmp_path, authority, "n1"), channels=channels),
        settings(tls=files_of(tmp_path, authority, "n2"), channels=channels),
    )
    await end(qemu)
    assert await has_pattern(qemu.b)
    # Else QEMU would compute some, for seconds, and answer nothing meanwhile.
    assert list((tmp_path / "b" / "run").glob("*/tls/dh-params.pem"))


@pytest.mark.lab
@pytest.mark.parametrize("wrong", ["authority", "name", "plain"])
async def test_tls_admits_nobody_else(qemu: QemuWorld, tmp_path: Path, wrong: str) -> None:
    authority = trustme.CA()
    other = trustme.CA() if wrong == "authority" else authority
    source = None if wrong == "plain" else files_of(tmp_path, other, "n1")
    destination = files_of(tmp_path, authority, "n3" if wrong == "name" else "n2")
    await begin(qemu, settings(tls=source), settings(tls=destination))
    await qemu.a.wait(DomainEventKind.MIGRATION_FAILED)
    assert await qemu.a.state() is DomainState.RUNNING
    assert DomainEventKind.DEVICE_STATE_LOADED not in qemu.b.kinds()
