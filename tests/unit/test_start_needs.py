"""What a start needs of its node, told before a hypervisor is started: by field, with the path."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from migrator.errors import RefusedError
from migrator.model import DomainName, VolumeName
from node_agent.cli.errors import ExitCode
from node_agent.peers import messages
from tests.unit.agent_world import World, spec_of
from tests.unit.api_client import SPEC, Client, ask
from tests.unit.ferry_command import Ferry
from tests.unit.test_takeover import owner, silence

pytestmark = pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")

WEB = DomainName("web")
ROOT = VolumeName("root")


def booting(kernel: Path, initrd: Path | None = None) -> dict[str, Any]:
    boot = {"kind": "kernel", "kernel": str(kernel)}
    return {**SPEC, "boot": boot | ({} if initrd is None else {"initrd": str(initrd)})}


@pytest.mark.parametrize("node", ["a", "b"])
async def test_a_start_without_its_boot_files_names_field_and_path(
    client: Client, world: World, tmp_path: Path, node: str
) -> None:
    """Also where another agent is asked than the one that starts it."""
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    made = await ask(client, "POST", "/v1/domains", booting(kernel, initrd), status=201)
    assert made["warnings"] == [
        f"on a: boot.kernel: {kernel} is not there",
        f"on a: boot.initrd: {initrd} is not there",
    ]
    initrd.mkdir()
    start = ("POST", "/v1/domains/web/start", {"node": node})
    problem = await ask(client, *start, status=409)
    assert problem["fields"] == {
        "boot.kernel": f"{kernel} is not there",
        "boot.initrd": f"{initrd} is no file",
    }
    assert problem["detail"].startswith(f"domain web can't be booted on {node}: boot.kernel: ")
    assert (await ask(client, "GET", "/v1/domains/web", status=200))["state"] == "stopped"
    assert not world.volumes.volumes[ROOT].opened
    initrd.rmdir()
    for file in (kernel, initrd):
        file.touch()
    assert (await ask(client, *start, status=200))["state"] == "running"


def world_root(world: World) -> Any:
    return next(iter(world.volumes.volumes))


async def test_a_relative_boot_file_is_a_wrong_field(client: Client) -> None:
    """It would be relative to wherever each node's agent was started."""
    wrong = booting(Path("vmlinuz"), Path("initrd"))
    problem = await ask(client, "POST", "/v1/domains", wrong, status=400)
    assert set(problem["fields"]) == {"boot.kernel", "boot.initrd"}
    assert "absolute" in problem["detail"]


async def test_whoever_defines_is_warned_and_scripts_are_not_disturbed(
    ferry: Ferry, tmp_path: Path
) -> None:
    kernel = tmp_path / "vmlinuz"
    options = ["--memory", "64M", "--disk", "none", "--kernel", str(kernel), "--cpu", "zork,+avx"]
    done = await ferry("domain", "define", "web", *options)
    assert done.out == "domain web is defined\n"
    assert f"warning: on a: boot.kernel: {kernel} is not there" in done.err
    assert "warning: on a: disks[0].volume: " in done.err and "none" in done.err
    assert "warning: on a: cpu_model: its hypervisor (1) has no CPU model zork" in done.err
    shown = (await ferry("domain", "show", "web")).out.splitlines()
    assert ["kernel:", str(kernel)] in [line.split() for line in shown]
    options = ["--memory", "64M", "--kernel", str(kernel), "--start"]
    refused = await ferry("domain", "define", "other", *options, code=ExitCode.REFUSED)
    assert refused.err.count(str(kernel)) == 1  # The refusal says it; a warning would say it twice.


async def test_a_takeover_to_where_it_cant_boot_changes_nothing(
    world: World, tmp_path: Path
) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.touch()
    await world.a.domains.define(spec_of(boot={"kind": "kernel", "kernel": str(kernel)}))
    await world.a.domains.start(WEB)
    before = await owner(world.b)
    await silence(world)
    kernel.unlink()
    with pytest.raises(RefusedError, match=f"b can't boot it: {kernel} is not there"):
        await world.b.takeover.take_over(WEB)
    assert await owner(world.b) == before


def test_a_refusals_fields_cross_from_agent_to_agent() -> None:
    """What an older agent says has none."""
    error = RefusedError("no", ["one"], {"boot.kernel": "/k is not there"})
    again = messages.from_failure(messages.to_failure(error))
    assert isinstance(again, RefusedError)
    assert (again.reasons, again.fields) == (("one",), error.fields)
