"""What only a real QEMU can show: crashed agents, broken disks, panics, stuck peers."""

from __future__ import annotations

import asyncio
import fcntl
import os
import shutil
import signal
import socket
import struct
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import msgspec
import pytest

from hypervisor.qemu.driver import QemuDriver
from migrator.errors import HypervisorError
from migrator.model import (
    DiskFormat,
    DiskSpec,
    DomainName,
    DomainSpec,
    DomainState,
    FencingToken,
    FileSource,
    NicSpec,
)
from migrator.ports import AbortOutcome, DomainEventKind, Launch
from tests.contract.hypervisor_worlds import (
    VM,
    Node,
    QemuWorld,
    copy_memory,
    eventually,
    open_qemus,
)
from tests.integration.agent_process import Orders
from tests.integration.bare_metal import (
    COUNT,
    COUNTER_OFFSET,
    HEED_BUTTON,
    PANIC,
    POWER_OFF,
    is_beyond,
    write_disk,
)

pytestmark = pytest.mark.lab
ROOT = Path(__file__).parents[2]


@pytest.fixture
async def world(tmp_path: Path) -> AsyncIterator[QemuWorld]:
    async with open_qemus(tmp_path) as made:
        yield made


def boot(world: QemuWorld, program: bytes, *, machine: str = "pc-q35-7.2") -> Launch:
    write_disk(world.folder / "vm-1.raw", program)
    return world.launch(machine=machine)


def named(world: QemuWorld, name: str) -> Launch:
    spec = DomainSpec(name=name, memory_bytes=32 * 1024**2, machine="pc-q35-7.2")
    return Launch(spec=spec, disks=(), tap_fds=(), token=FencingToken(5))


async def counter(node: Node) -> int:
    memory = await node.driver.memory(VM)
    try:
        return int.from_bytes(os.pread(memory.regions[0].fd, 4, COUNTER_OFFSET), "little")
    finally:
        memory.close()


async def counts(node: Node, beyond: int) -> int:
    """Wait until the guest has counted further than `beyond`."""

    async def further() -> bool:
        return is_beyond(await counter(node), beyond)

    await eventually(further)
    return await counter(node)


def open_descriptors() -> set[str]:
    return {entry.name for entry in Path("/proc/self/fd").iterdir()}


async def spawn_agent(orders: Orders) -> asyncio.subprocess.Process:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "tests.integration.agent_process"),
        msgspec.json.encode(orders).decode(),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdout is not None
    async with asyncio.timeout(30):
        assert await process.stdout.readline() == b"ready\n"
    return process


async def test_guests_outlive_an_agent_that_is_killed_and_are_adopted(world: QemuWorld) -> None:
    await world.a.driver.close()
    running, waiting = boot(world, COUNT), named(world, "vm-2")
    agent = await spawn_agent(Orders(str(world.folder / "a"), [running], [waiting]))
    agent.kill()
    await agent.wait()
    assert await world.reopen("a") == [VM, "vm-2"]
    first = await world.a.driver.inspect(VM)
    assert first.state is DomainState.RUNNING
    assert first.pid is not None
    assert os.getsid(first.pid) == first.pid, "a session of its own"
    before = await counter(world.a)
    assert await counts(world.a, before) != before
    other = await world.a.driver.inspect(DomainName("vm-2"))
    assert other.state is DomainState.INCOMING
    assert isinstance(world.a.driver, QemuDriver)
    assert await world.a.driver.launched_token(DomainName("vm-2")) == 5
    await world.switch_over(world.a, world.b)
    await world.b.driver.resume(VM)
    assert await world.b.state() is DomainState.RUNNING


async def test_memory_and_execution_move(world: QemuWorld) -> None:
    await world.a.driver.start(boot(world, COUNT))
    await counts(world.a, 1000)
    await world.switch_over(world.a, world.b)
    at_pause = await counter(world.a)
    assert await counter(world.b) == at_pause
    await world.b.driver.resume(VM)
    await counts(world.b, at_pause)
    assert await counter(world.a) == at_pause, "the source stands still"


async def test_the_pc_machine_moves_too(world: QemuWorld) -> None:
    launch = boot(world, COUNT, machine="pc-i440fx-7.2")
    await world.a.driver.start(launch)
    await counts(world.a, 1000)
    world.fixed_launch = launch
    await world.switch_over(world.a, world.b)
    await world.b.driver.resume(VM)
    await counts(world.b, await counter(world.a))


async def test_a_guest_that_powers_itself_off_is_noticed(world: QemuWorld) -> None:
    await world.a.driver.start(boot(world, POWER_OFF))
    event = await world.a.wait(DomainEventKind.EXITED)
    assert event.detail == "powered off by the guest"
    assert await world.a.state() is DomainState.STOPPED
    assert list((world.folder / "a" / "run").iterdir()) == []


async def test_a_guest_heeds_the_power_button(world: QemuWorld) -> None:
    await world.a.driver.start(boot(world, HEED_BUTTON))
    assert await world.a.driver.stop(VM, timeout_s=20)
    assert (await world.a.wait(DomainEventKind.EXITED)).detail == "powered off by the guest"


async def test_a_panic_is_reported_and_kept_until_the_reset(world: QemuWorld) -> None:
    await world.a.driver.start(boot(world, PANIC))
    await world.a.wait(DomainEventKind.PANICKED)
    await world.a.wait(DomainEventKind.PAUSED)
    status = await world.a.driver.inspect(VM)
    assert (status.state, status.reason) == (DomainState.CRASHED, "the guest panicked")
    write_disk(world.folder / "vm-1.raw", COUNT)
    await world.a.driver.reset(VM)
    await counts(world.a, 1000)
    assert await world.a.state() is DomainState.RUNNING


async def test_the_console_goes_to_a_file(world: QemuWorld) -> None:
    path = world.a.driver.console_log(VM)
    for boots in (1, 2):
        await world.a.driver.start(world.launch())
        await eventually(lambda: path.read_bytes().count(b"No bootable") == boots)  # noqa: B023
        await world.a.driver.destroy(VM)


async def test_a_start_that_fails_says_why_and_leaves_nothing(world: QemuWorld) -> None:
    launch = msgspec.structs.replace(
        world.launch(), disks=(FileSource(path="/nonexistent.raw", format=DiskFormat.RAW),)
    )
    with pytest.raises(HypervisorError, match=r"nonexistent\.raw"):
        await world.a.driver.start(launch)
    assert await world.a.state() is DomainState.STOPPED
    assert list((world.folder / "a" / "run").iterdir()) == []
    await world.a.driver.start(world.launch())


@pytest.mark.parametrize("after_s", [0.0, 0.005, 0.02, 0.05])
async def test_a_start_that_is_cancelled_leaves_nothing(world: QemuWorld, after_s: float) -> None:
    await world.a.driver.capabilities()
    before = open_descriptors()
    run_directory = world.folder / "a" / "run"
    for _ in range(3):
        task = asyncio.create_task(world.a.driver.start(world.launch()))
        await asyncio.sleep(after_s)
        task.cancel()
        await asyncio.wait([task])
        await world.a.driver.destroy(VM)
        await eventually(lambda: not list(run_directory.iterdir()))
    await eventually(lambda: open_descriptors() <= before)
    await world.a.driver.start(world.launch())


async def test_a_hung_client_on_the_first_monitor_leaves_the_second(world: QemuWorld) -> None:
    await world.a.driver.start(world.launch())
    await world.a.driver.close()
    with socket.socket(socket.AF_UNIX) as hung:
        hung.connect(str(world.folder / "a" / "run" / VM / "m0"))
        assert await world.reopen("a") == [VM]
        assert await world.a.state() is DomainState.RUNNING
        await world.a.driver.pause(VM)
        await world.a.wait(DomainEventKind.PAUSED)


async def test_only_one_agent_uses_a_state_directory(world: QemuWorld) -> None:
    with pytest.raises(HypervisorError, match="another agent"):
        await QemuDriver(world.folder / "a").open()


async def test_a_launch_without_a_record_is_ended_by_the_next_agent(world: QemuWorld) -> None:
    await world.a.driver.start_incoming(world.launch())
    pid = (await world.a.driver.inspect(VM)).pid
    await world.a.driver.close()
    (world.folder / "a" / "run" / VM / "state.json").unlink()
    assert await world.reopen("a") == []
    assert list((world.folder / "a" / "run").iterdir()) == []
    await eventually(lambda: not Path(f"/proc/{pid}/exe").exists())


async def test_a_running_guest_whose_record_is_unreadable_is_left_alone(world: QemuWorld) -> None:
    await world.a.driver.start(world.launch())
    await world.a.driver.close()
    state = world.folder / "a" / "run" / VM / "state.json"
    kept = state.read_bytes()
    state.write_text("{}")
    assert await world.reopen("a") == []
    state.write_bytes(kept)
    assert await world.reopen("a") == [VM]
    assert await world.a.state() is DomainState.RUNNING


async def test_the_remains_of_a_dead_process_are_cleared(world: QemuWorld) -> None:
    await world.a.driver.start(world.launch())
    directory = world.folder / "a" / "run" / VM
    await asyncio.to_thread(
        shutil.copytree,
        directory,
        world.folder / "kept",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("m*", "end"),
    )
    await world.a.driver.destroy(VM)
    await world.a.driver.close()
    await asyncio.to_thread(shutil.copytree, world.folder / "kept", directory)
    assert await world.reopen("a") == []
    assert not directory.exists()


async def test_a_domain_with_many_disks_moves(world: QemuWorld) -> None:
    disks = []
    for index, layout in enumerate((DiskFormat.RAW, DiskFormat.RAW, DiskFormat.QCOW2)):
        path = world.folder / f"many-{index}"
        if layout is DiskFormat.RAW:
            write_disk(path, COUNT)
        else:
            command = ("qemu-img", "create", "-q", "-f", "qcow2", str(path), "16M")
            assert await (await asyncio.create_subprocess_exec(*command)).wait() == 0
        disks.append(FileSource(path=str(path), format=layout, read_only=index == 1))
    spec = DomainSpec(
        name=VM,
        memory_bytes=64 * 1024**2,
        vcpus=2,
        machine="pc-q35-7.2",
        disks=tuple(DiskSpec(volume=f"d{index}") for index in range(3)),
    )
    launch = Launch(spec=spec, disks=tuple(disks), tap_fds=(), token=FencingToken(1))
    await world.a.driver.start(launch)
    world.fixed_launch = launch
    await counts(world.a, 1000)
    await world.switch_over(world.a, world.b)
    await world.b.driver.resume(VM)
    await counts(world.b, await counter(world.a))


class Stuck:
    """A peer that takes some bytes of the device state, and then neither reads nor closes."""

    def __init__(self, path: Path, limit_bytes: int) -> None:
        self.path = path
        self.limit_bytes = limit_bytes
        self.connection: socket.socket | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        self._listener.bind(str(path))
        self._listener.listen(1)
        self._listener.setblocking(False)

    async def serve(self) -> None:
        loop = asyncio.get_running_loop()
        self.connection, _ = await loop.sock_accept(self._listener)
        left = self.limit_bytes
        while left and (data := await loop.sock_recv(self.connection, left)):
            left -= len(data)

    def close(self) -> None:
        self._listener.close()
        if self.connection is not None:
            self.connection.close()


@pytest.mark.parametrize("limit_bytes", [0, 100_000])
async def test_a_stuck_peer_does_not_keep_the_source(world: QemuWorld, limit_bytes: int) -> None:
    await world.a.driver.start(boot(world, COUNT))
    await counts(world.a, 1000)
    stuck = Stuck(world.folder / "stuck", limit_bytes)
    serving = asyncio.create_task(stuck.serve())
    try:
        await world.a.driver.begin_switchover(VM, stuck.path)
        await world.a.wait(DomainEventKind.PRE_SWITCHOVER)
        await world.a.driver.continue_switchover(VM)
        await asyncio.sleep(0.1)
        async with asyncio.timeout(15):
            outcome = await world.a.driver.abort_switchover(VM)
        state = await world.a.state()
        assert (outcome, state) == (AbortOutcome.RESUMED, DomainState.RUNNING)
    finally:
        serving.cancel()
        stuck.close()
    await world.switch_over(world.a, world.b)


async def test_a_stopped_destination_does_not_keep_the_source(world: QemuWorld) -> None:
    await world.a.driver.start(boot(world, COUNT))
    await world.begin(world.a, world.b)
    pid = (await world.b.driver.inspect(VM)).pid
    assert pid is not None
    os.kill(pid, signal.SIGSTOP)
    try:
        await world.a.driver.continue_switchover(VM)
        async with asyncio.timeout(15):
            outcome = await world.a.driver.abort_switchover(VM)
        assert outcome in (AbortOutcome.RESUMED, AbortOutcome.SENT)
        assert await world.b.state() is DomainState.UNKNOWN
    finally:
        os.kill(pid, signal.SIGCONT)


async def test_abort_races_with_the_device_state(world: QemuWorld) -> None:
    """Whatever the moment: the source runs and nothing was lost, or it is sent and can go on."""
    await world.a.driver.start(boot(world, COUNT))
    outcomes = []
    for attempt in range(10):
        await counts(world.a, await counter(world.a))
        await world.begin(world.a, world.b)
        await world.a.driver.continue_switchover(VM)
        await asyncio.sleep(attempt * 0.001)
        outcomes.append(await world.a.driver.abort_switchover(VM))
        await world.b.driver.destroy(VM)
        await world.a.driver.resume(VM)
        assert await world.a.state() is DomainState.RUNNING
    assert set(outcomes) <= {AbortOutcome.RESUMED, AbortOutcome.SENT}
    await counts(world.a, await counter(world.a))


async def test_the_memory_can_be_copied_while_the_agent_knows_nothing(world: QemuWorld) -> None:
    await world.a.driver.start(boot(world, COUNT))
    await counts(world.a, 1000)
    await world.b.driver.start_incoming(world.launch(2))
    await copy_memory(world.a, world.b)
    status = await world.b.driver.inspect(VM)
    assert status.memory_in_use_bytes
    assert await counter(world.b) >= 1000


def open_tap() -> int:
    """A tap of this test's own, as the fabric makes them; it goes with its last descriptor."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC | os.O_NONBLOCK)
    flags = 0x0002 | 0x1000 | 0x4000  # IFF_TAP, IFF_NO_PI, IFF_VNET_HDR
    fcntl.ioctl(tap, 0x400454CA, struct.pack("16sH22x", b"fytest%d", flags))
    return tap


async def test_a_domain_with_a_network_card_moves(world: QemuWorld) -> None:
    nic = NicSpec(mac="52:54:00:00:00:01", bridge="br0", mtu_bytes=1400)
    spec = msgspec.structs.replace(boot(world, COUNT).spec, nics=(nic,))
    taps = (open_tap(), open_tap())
    try:
        launches = [
            msgspec.structs.replace(world.launch(), spec=spec, tap_fds=(tap,)) for tap in taps
        ]
        await world.a.driver.start(launches[0])
        await counts(world.a, 1000)
        world.fixed_launch = launches[1]
        await world.switch_over(world.a, world.b)
    finally:
        for tap in taps:
            os.close(tap)
    await world.b.driver.resume(VM)
    await counts(world.b, await counter(world.a))
