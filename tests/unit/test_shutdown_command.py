"""`ferry node shutdown-guests`: by the agent, without it, and while it is only beginning."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from hypervisor.qemu.driver import QemuDriver
from node_agent.api.server import ApiServer, create_app
from node_agent.cli import guests
from node_agent.cli.errors import ExitCode
from node_agent.config import parse_config, render_config
from node_agent.host_shutdown import HostShutdown
from tests.unit.agent_world import World
from tests.unit.ferry_command import Ferry, ferry_command
from tests.unit.node_life import started

pytestmark = pytest.mark.allow_blocking


@pytest.fixture
def ferry(
    capfd: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Ferry:
    monkeypatch.setattr(guests, "AGAIN_S", 0.05)
    return ferry_command(capfd, "--config", str(_config(tmp_path)))


def _config(folder: Path, name: str = "a", more: str = "") -> Path:
    text = (
        f'[node]\nname = "{name}"\nstate_directory = "{folder}/state"\n{more}\n'
        f'[api]\nlisten = "127.0.0.1:1"\nsocket = "{folder}/api.sock"\n'
        f'[peer]\nlisten = "127.0.0.1:2"\n[store]\npath = "{folder}/store"\n'
    )
    path = folder / f"{name}.toml"
    path.write_text(render_config(parse_config(text)), encoding="utf-8")
    return path


@asynccontextmanager
async def _serving(world: World, folder: Path) -> AsyncIterator[None]:
    shutdown = HostShutdown(
        world.a.name,
        hypervisor=world.a.hypervisor,
        domains=world.a.domains,
        cancel=world.a.cluster.cancel_migration,
        events=world.a.events,
    )
    app = create_app(world.a.cluster, shutdown=shutdown)
    server = ApiServer(app, listen=None, socket_path=folder / "api.sock")
    await server.start()
    try:
        yield
    finally:
        await server.close()


async def test_the_agent_shuts_them_down(ferry: Ferry, world: World, tmp_path: Path) -> None:
    await started(world.a)
    async with _serving(world, tmp_path):
        assert (await ferry("node", "shutdown-guests")).out == "guests that have shut down: web\n"
        assert (await ferry("node", "shutdown-guests")).out == "guests that have shut down: none\n"
    assert not world.a.host.guests


async def test_what_was_ended_by_force_or_is_left_is_said(
    ferry: Ferry, world: World, tmp_path: Path
) -> None:
    await started(world.a)
    world.a.host.faults.ignores_power_button = True
    async with _serving(world, tmp_path):
        done = await ferry("node", "shutdown-guests", "--timeout", "1")
    assert done.out == "guests that have shut down: none\nended by force: web\n"


async def test_a_guest_that_is_left_is_a_failure(
    ferry: Ferry, world: World, tmp_path: Path
) -> None:
    await started(world.a)
    world.a.host.faults.failing["stop"] = 1
    async with _serving(world, tmp_path):
        done = await ferry("node", "shutdown-guests", code=ExitCode.FAILED)
    assert "left: web: simulated fault: stop failed" in done.out


async def test_another_node_s_agent_refuses(
    capfd: pytest.CaptureFixture[str], world: World, tmp_path: Path
) -> None:
    await started(world.a)
    other = ferry_command(capfd, "--config", str(_config(tmp_path, "b")))
    async with _serving(world, tmp_path):
        refused = await other("node", "shutdown-guests", code=ExitCode.REFUSED)
    assert "only the agent of b itself shuts its guests down" in refused.err
    assert world.a.host.guests


async def test_a_host_without_agent_and_guests_is_done_at_once(ferry: Ferry) -> None:
    assert (await ferry("node", "shutdown-guests")).out == "guests that have shut down: none\n"


async def test_an_agent_that_only_begins_is_waited_for(
    ferry: Ferry, world: World, tmp_path: Path
) -> None:
    await started(world.a)
    beginning = QemuDriver(tmp_path / "state" / "qemu")
    await beginning.open()
    try:
        asked = asyncio.create_task(ferry("node", "shutdown-guests"))
        await asyncio.sleep(0.3)
        assert not asked.done()
        async with _serving(world, tmp_path):
            assert (await asked).out == "guests that have shut down: web\n"
    finally:
        await beginning.close()


async def test_an_agent_that_never_answers_is_not_waited_for_for_ever(
    ferry: Ferry, tmp_path: Path
) -> None:
    hanging = QemuDriver(tmp_path / "state" / "qemu")
    await hanging.open()
    try:
        done = await ferry("node", "shutdown-guests", "--timeout", "1", code=ExitCode.FAILED)
    finally:
        await hanging.close()
    assert "can't be reached" in done.err and "another agent uses" in done.err


async def test_it_can_be_switched_off(
    capfd: pytest.CaptureFixture[str], world: World, tmp_path: Path
) -> None:
    await started(world.a)
    off = ferry_command(capfd, "--config", str(_config(tmp_path, "a", "guest_shutdown_s = 0")))
    async with _serving(world, tmp_path):
        done = await off("node", "shutdown-guests")
    assert "node.guest_shutdown_s is 0" in done.out
    assert world.a.host.guests
