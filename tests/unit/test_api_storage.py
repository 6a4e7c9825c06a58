"""Pools and volumes over HTTP: who uses what, what grows, and what another agent sees of it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from migrator.errors import InvalidRequest
from migrator.model import DomainName, NodeName, PoolName, VolumeInfo, VolumeName
from node_agent.pools import PoolSet
from storage.directory import DirectoryPool
from storage.drivers import make_pool
from storage.settings import NbdSettings, NfsSettings, SimulatedSettings, same_place
from storage.simulated import SimulatedPool
from tests.unit.agent_world import World
from tests.unit.api_client import SPEC, Client, ask, running


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 - Another node's view has no event to wait for.
            await asyncio.sleep(0.01)


async def test_volumes(client: Client) -> None:
    pools = await ask(client, "GET", "/v1/pools", status=200)
    assert [pool["name"] for pool in pools["pools"]] == ["default"]
    volumes = "/v1/pools/default/volumes"
    made = await ask(client, "POST", volumes, {"name": "v", "capacity_bytes": 4096}, status=201)
    assert (made["name"], made["format"]) == ("v", "raw")
    await ask(client, "POST", volumes, {"name": "v", "capacity_bytes": 4096}, status=409)
    await ask(client, "POST", volumes, {"name": "v", "capacity_bytes": 1}, status=400)
    wrong = {"name": "w", "capacity_bytes": 4096, "image": "here"}
    assert "image" in (await ask(client, "POST", volumes, wrong, status=400))["fields"]
    listed = await ask(client, "GET", volumes, status=200)
    assert sorted(each["name"] for each in listed["volumes"]) == ["root", "v"]
    await ask(client, "DELETE", f"{volumes}/v", status=204)
    await ask(client, "DELETE", f"{volumes}/v", status=404)
    await ask(client, "GET", "/v1/pools/nowhere/volumes", status=404)
    await ask(client, "POST", "/v1/domains", SPEC, status=201)
    problem = await ask(client, "DELETE", f"{volumes}/root", status=409)
    assert "web" in problem["detail"]


async def test_a_size_that_the_pool_does_not_take_is_named_with_what_it_has(client: Client) -> None:
    """Of the simulated pool's 1 TiB `root` has a MiB."""
    volumes = "/v1/pools/default/volumes"
    cases: list[tuple[str, dict[str, Any], int]] = [
        (volumes, {"name": "v"}, (1 << 40) - (1 << 20)),
        (f"{volumes}/root/resize", {}, 1 << 40),
    ]
    for path, more, most in cases:
        body = {"capacity_bytes": 100 << 40} | more
        problem = await ask(client, "POST", path, body, status=400)
        assert problem["fields"]["capacity_bytes"].startswith(f"at most {most} (")
        assert problem["fields"]["capacity_bytes"] in problem["detail"]
        assert f"capacity_bytes, its size, is {100 << 40}" in problem["detail"]
    listed = await ask(client, "GET", volumes, status=200)
    assert [each["capacity_bytes"] for each in listed["volumes"]] == [1 << 20]


async def test_volumes_grow_and_are_cloned(client: Client) -> None:
    volumes = "/v1/pools/default/volumes"
    grown = await ask(
        client, "POST", f"{volumes}/root/resize", {"capacity_bytes": 2 * 1024**2}, status=200
    )
    assert grown["capacity_bytes"] == 2 * 1024**2
    for wrong in ({"capacity_bytes": 1024**2}, {"capacity_bytes": 0}, {"capacity_bytes": 1 << 60}):
        problem = await ask(client, "POST", f"{volumes}/root/resize", wrong, status=400)
        assert "capacity_bytes" in problem["fields"]
    made = await ask(client, "POST", f"{volumes}/root/clone", {"name": "copy"}, status=201)
    assert made["capacity_bytes"] == 2 * 1024**2
    await ask(client, "POST", f"{volumes}/root/clone", {"name": "copy"}, status=409)
    await ask(client, "POST", f"{volumes}/none/clone", {"name": "other"}, status=404)
    linked = {"name": "other", "linked": True}
    problem = await ask(client, "POST", f"{volumes}/root/clone", linked, status=400)
    assert "linked" in problem["fields"]
    await running(client)
    for path, body in (("resize", {"capacity_bytes": 4 * 1024**2}), ("clone", {"name": "other"})):
        problem = await ask(client, "POST", f"{volumes}/root/{path}", body, status=409)
        assert "web" in problem["detail"] and "runs on a" in problem["detail"]


async def test_a_copy_of_what_was_written_to_meanwhile_is_none(
    client: Client, world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where it has been stopped again by the end of the copy."""
    await ask(client, "POST", "/v1/domains", SPEC, status=201)
    clone = SimulatedPool.clone

    async def copy_for_long(
        pool: SimulatedPool, volume: VolumeName, new: VolumeName, *, linked: bool = False
    ) -> VolumeInfo:
        made = await clone(pool, volume, new, linked=linked)
        await world.b.domains.start(DomainName("web"))
        await world.b.domains.stop(DomainName("web"), timeout_s=0)
        return made

    monkeypatch.setattr(SimulatedPool, "clone", copy_for_long)
    path = "/v1/pools/default/volumes/root/clone"
    problem = await ask(client, "POST", path, {"name": "copy"}, status=409)
    assert "was not cloned: the domain was started meanwhile" in problem["detail"]
    await ask(client, "GET", "/v1/pools/default/volumes/copy", status=404)
    monkeypatch.setattr(SimulatedPool, "clone", clone)
    await ask(client, "POST", path, {"name": "copy"}, status=201)


async def test_pools_are_added_for_every_node_and_removed(client: Client, world: World) -> None:
    fast = {"name": "fast", "driver": "simulated"}
    made = await ask(client, "POST", "/v1/pools", fast, status=201)
    assert (made["origin"], made["health"]["reachable"]) == ("cluster", True)
    await until(lambda: "fast" in world.b.pools)
    await ask(client, "POST", "/v1/pools", fast, status=409)
    shown = await ask(client, "GET", "/v1/pools/fast", status=200)
    assert shown["fencing"]["remote_writers"] is True
    problem = await ask(client, "DELETE", "/v1/pools/default", status=409)
    assert "configuration" in problem["detail"]
    body = {"name": "v", "capacity_bytes": 4096}
    await ask(client, "POST", "/v1/pools/fast/volumes", body, status=201)
    two = {**SPEC, "disks": [{"volume": "root"}, {"volume": "v", "pool": "fast"}]}
    await ask(client, "POST", "/v1/domains", two, status=201)
    problem = await ask(client, "DELETE", "/v1/pools/fast", status=409)
    assert "web" in problem["detail"]
    await ask(client, "POST", "/v1/domains/web/start", {"node": "b"}, status=200)
    await ask(client, "POST", "/v1/domains/web/stop", {"timeout_s": 0}, status=200)
    await ask(client, "DELETE", "/v1/domains/web", status=204)
    await ask(client, "DELETE", "/v1/pools/fast", status=204)
    await ask(client, "GET", "/v1/pools/fast", status=404)
    await until(lambda: "fast" not in world.b.pools)
    await ask(client, "POST", "/v1/pools", fast, status=201)
    kept = await ask(client, "GET", "/v1/pools/fast/volumes", status=200)
    assert [volume["name"] for volume in kept["volumes"]] == ["v"]


@pytest.mark.parametrize(
    ("settings", "field"),
    [
        ({"name": "x"}, "driver"),
        ({"name": "x", "driver": "floppy"}, "driver"),
        ({"name": "x/../y", "driver": "simulated"}, "name"),
        ({"name": "x", "driver": "directory", "path": "here"}, "path"),
        ({"name": "x", "driver": "nfs", "export": "/x"}, "server"),
        ({"name": "x", "driver": "nfs", "server": "a b", "export": "/x"}, "server"),
        ({"name": "x", "driver": "nbd", "reconnect_delay_s": 0}, "reconnect_delay_s"),
        ({"name": "x", "driver": "simulated", "password": "x"}, "password"),
    ],
)
async def test_a_wrong_pool_names_the_field(
    client: Client, settings: dict[str, Any], field: str
) -> None:
    problem = await ask(client, "POST", "/v1/pools", settings, status=400)
    assert problem["fields"][field]


async def test_a_wrong_driver_names_those_that_a_user_can_have(client: Client) -> None:
    wrong = {"name": "x", "driver": "floppy"}
    problem = await ask(client, "POST", "/v1/pools", wrong, status=400)
    assert "directory" in problem["fields"]["driver"]
    assert "simulated" not in problem["fields"]["driver"]


async def test_a_pool_that_cant_be_used_is_not_added(
    client: Client, world: World, tmp_path: Path
) -> None:
    world.a.pools._make = lambda settings: DirectoryPool(
        PoolName(settings.name), Path(getattr(settings, "path", ""))
    )
    gone = {"name": "gone", "driver": "directory", "path": str(tmp_path / "gone")}
    problem = await ask(client, "POST", "/v1/pools", gone, status=409)
    assert "mounted" in problem["detail"] and problem["reasons"]
    await ask(client, "GET", "/v1/pools/gone", status=404)
    assert await world.a.store.list_prefix("pools/") == []


async def test_one_place_has_no_two_names(client: Client, world: World, tmp_path: Path) -> None:
    """By two names, one volume could be a disk of two domains."""
    world.a.pools._make = lambda settings: make_pool(settings, NodeName("a"), tmp_path)
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        body = {"name": folder, "driver": "directory", "path": str(tmp_path / folder)}
        await ask(client, "POST", "/v1/pools", body, status=201)
    (tmp_path / "link").symlink_to(tmp_path / "two")
    for path, known in (("one", "one"), ("link", "two")):
        again = {"name": "again", "driver": "directory", "path": str(tmp_path / path)}
        problem = await ask(client, "POST", "/v1/pools", again, status=409)
        assert f"the place of pool {known} under a second name" in problem["detail"]
        await ask(client, "GET", "/v1/pools/again", status=404)


def test_settings_tell_whether_two_pools_are_one_place() -> None:
    nfs = NfsSettings(name="a", server="10.0.0.5", export="/srv")
    assert same_place(nfs, NfsSettings(name="b", server="10.0.0.5", export="/srv"))
    assert not same_place(nfs, NfsSettings(name="b", server="10.0.0.5", export="/other"))
    nbd = NbdSettings(name="a", provisioner="10.0.0.5:10808")
    assert same_place(nbd, NbdSettings(name="b", provisioner="10.0.0.5:10808", tls_username="x"))
    assert not same_place(nfs, nbd)
    hooked = NbdSettings(name="a", hook="/usr/local/lib/nbd")
    assert not same_place(hooked, NbdSettings(name="b", hook="/usr/local/lib/nbd"))


async def test_a_stored_pool_that_nobody_understands_keeps_no_agent_from_starting(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    await world.a.store.put("pools/strange", b"\x81\xa1x\x01")
    fresh = PoolSet([], world.a._make_pool, world.a.typed)
    await fresh.open()
    assert list(fresh) == []
    assert "pools/strange" in caplog.text
    await fresh.close()


def test_simulated_pools_are_for_tests(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match="for tests"):
        make_pool(SimulatedSettings(name="x"), NodeName("a"), tmp_path)
