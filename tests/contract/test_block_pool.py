"""Block pools on real loop devices: the contract, hooks that fail, a stale writer, the sample."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from migrator.errors import FenceError, InvalidRequest, NotFoundError, StorageError
from migrator.model import BlockDeviceSource, DiskFormat, NodeName, PoolName, VolumeName
from storage.block import BlockPool
from storage.holder_keys import key_of
from tests.contract.volume_contract import DISK, MIB, STALE_S, VolumeContract, t
from tests.contract.writers import Writer

HOOK = Path(__file__).with_name("loop_hook.py")
SAMPLE = Path(__file__).parents[2] / "deploy" / "samples" / "block-fence"
Pools = tuple[BlockPool, BlockPool]


def loop_devices_missing() -> bool:
    if os.geteuid() != 0 or not Path("/dev/loop-control").exists() or not shutil.which("losetup"):
        return True
    return subprocess.run(["losetup", "--find"], capture_output=True, check=False).returncode != 0


pytestmark = [
    pytest.mark.lab,
    pytest.mark.allow_blocking("qemu-io and the hooks are driven by plain pipes"),
]
needs_loop = pytest.mark.skipif(loop_devices_missing(), reason="needs root and loop devices")


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    for part in ("a", "b", "files", "tokens"):
        (tmp_path / part).mkdir()
    yield tmp_path
    for link in (*(tmp_path / "a").iterdir(), *(tmp_path / "b").iterdir()):
        subprocess.run(["losetup", "--detach", link.resolve()], check=False, timeout=30)


@pytest.fixture
def nodes(folder: Path) -> Pools:
    hook = [sys.executable, "-I", "-S", str(HOOK)]
    first, second = (
        BlockPool(
            PoolName("default"),
            NodeName(name),
            folder / name,
            folder / "state",
            hook=hook,
            fence_hook=hook,
        )
        for name in "ab"
    )
    return first, second


@needs_loop
class TestContract(VolumeContract):
    """What every driver keeps to. A device is as large as it is: nothing is sparse."""

    formats = frozenset({DiskFormat.RAW})
    tells_owner = False

    async def test_a_created_volume_is_there_on_every_node(  # type: ignore[override]
        self, nodes: Pools
    ) -> None:
        made = await nodes[0].create(DISK, capacity_bytes=64 * MIB, format=DiskFormat.RAW)
        assert (made.pool, made.name, made.capacity_bytes) == ("default", DISK, 64 * MIB)
        for node in nodes:
            assert await node.inspect(DISK) == made
            assert list(await node.list_volumes()) == [made]


@needs_loop
async def test_a_stale_writer_is_ended_before_the_fence_returns(nodes: Pools) -> None:
    source, destination = nodes
    await source.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    opened = await source.open(DISK, t(1), read_only=False)
    assert isinstance(opened, BlockDeviceSource)
    await source.fence(DISK, t(1))
    old = Writer(opened, 0xA1)
    new = Writer(await destination.open(DISK, t(2), read_only=False), 0xB2)
    assert old.write()
    await destination.fence(DISK, t(2))
    assert new.write()
    assert not old.write(within_s=STALE_S)
    assert new.reads(0xB2)
    with pytest.raises(FenceError, match="token 2"):
        await source.fence(DISK, t(1))
    for writer in (old, new):
        writer.end()


@needs_loop
async def test_an_image_and_a_clone_carry_their_bytes(nodes: Pools, tmp_path: Path) -> None:
    image = tmp_path / "image"
    image.write_bytes(b"begin" + bytes(4091) + b"end" + bytes(509))
    await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW, image=image)
    await nodes[0].clone(DISK, VolumeName("copy"))
    data = (tmp_path / "b" / "copy").read_bytes()
    assert data[:4608] == image.read_bytes()
    assert not any(data[4608:])


async def test_without_hooks_it_says_what_it_can_not_do(tmp_path: Path) -> None:
    pool = BlockPool(PoolName("san"), NodeName("a"), tmp_path, tmp_path / "state")
    assert not pool.fences_remote_writers
    assert "nothing stops a writer" in pool.fencing.method
    with pytest.raises(InvalidRequest, match="no hook that could create") as raised:
        await pool.create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    assert "hook" in raised.value.fields
    (tmp_path / "plain").touch()
    with pytest.raises(StorageError, match="no block device"):
        await pool.inspect(VolumeName("plain"))
    assert list(await pool.list_volumes()) == []
    with pytest.raises(NotFoundError):
        await pool.open(DISK, t(1), read_only=False)
    absent = BlockPool(PoolName("san"), NodeName("a"), tmp_path / "none", tmp_path)
    health = await absent.health()
    assert not health.reachable
    assert "none" in (health.reason or "")


@needs_loop
@pytest.mark.parametrize(
    ("script", "complaint"),
    [
        ("exit 3", "status 3"),
        ("echo broken >&2; exit 1", "broken"),
        ("echo no json", "must not"),
        ("sleep 60", "no answer"),
        ('echo \'{"error": {"code": "stale", "message": "token 9"}}\'', "token 9"),
    ],
)
async def test_a_fence_hook_that_fails_is_no_fence(
    nodes: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, script: str, complaint: str
) -> None:
    monkeypatch.setattr("storage.block.driver.FENCE_TIMEOUT_S", 0.3 if "sleep" in script else 10.0)
    await nodes[0].create(DISK, capacity_bytes=MIB, format=DiskFormat.RAW)
    hook = ["/bin/sh", "-c", f"cat >/dev/null; {script}"]
    pool = BlockPool(
        PoolName("default"), NodeName("a"), tmp_path / "a", tmp_path / "state", fence_hook=hook
    )
    with pytest.raises(FenceError, match=complaint):
        await pool.fence(DISK, t(1))


async def test_the_sample_fences_by_sg_persist(tmp_path: Path) -> None:
    """Against a stand-in for sg_persist, which keeps one device's registrations in a file."""
    tools = tmp_path / "bin"
    tools.mkdir()
    stand_in = Path(__file__).with_name("sg_persist_stand_in.py")
    (tools / "sg_persist").write_text(f'#!/bin/sh\nexec {sys.executable} -I -S {stand_in} "$@"\n')
    (tools / "sg_persist").chmod(0o755)
    state = tmp_path / "device"
    state.write_text(json.dumps({"holder": 0, "keys": {}}))

    def ask(node: str, operation: str, token: int = 0) -> dict[str, object]:
        key = key_of(NodeName(node), t(token)).value if token else 0
        request = {"operation": operation, "device": str(state), "node": node, "token": token}
        request["key"] = f"{key:#x}"
        done = subprocess.run(
            [sys.executable, "-I", "-S", str(SAMPLE)],
            input=json.dumps(request),
            env={"PATH": f"{tools}:/usr/bin:/bin", "STAND_IN_NODE": node},
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        answer: dict[str, object] = json.loads(done.stdout)
        return answer

    def registered() -> set[str]:
        return set(json.loads(state.read_text())["keys"])

    def code(answer: dict[str, object]) -> object:
        error = answer["error"]
        assert isinstance(error, dict)
        return error["code"]

    def story() -> None:
        assert ask("a", "token") == {"token": None}
        assert ask("a", "fence", 1) == {}
        assert registered() == {"a"}
        assert ask("b", "fence", 2) == {}
        assert registered() == {"b"}
        assert ask("b", "fence", 2) == {}
        assert ask("b", "token") == {"token": 2}
        assert code(ask("a", "fence", 2)) == "stale"
        assert registered() == {"b"}
        assert ask("a", "fence", 3) == {}
        assert registered() == {"a"}
        strange = {"holder": 0xABC, "keys": {"x": 0xABC}}
        state.write_text(json.dumps(strange))
        assert code(ask("a", "fence", 4)) == "conflict"
        assert json.loads(state.read_text()) == strange

    await asyncio.to_thread(story)
