"""A named CPU model isn't the same on two hosts: what QEMU tells of that, and who is refused."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

import pytest

from hypervisor.qemu.cpu_features import CpuFeatures, features_of_host, lacking_in_guest
from migrator.errors import RefusedError
from tests.unit.migration_world import migration_world

DEFINITIONS = [
    {"name": "Haswell", "unavailable-features": ["pcid", "hle"]},
    {"name": "qemu64", "unavailable-features": []},
    {"name": "older"},
]
EXPANSION = {"model": {"name": "max", "props": {"avx512f": False, "avx_2": True, "level": 13}}}


@pytest.mark.parametrize(
    ("model", "lacking"),
    [
        ("Haswell", {"pcid", "hle"}),
        ("Haswell,-pcid", {"hle"}),
        ("Haswell,-hle,-pcid", set()),
        ("Haswell,+avx512f,+avx-2", {"pcid", "hle", "avx512f"}),
        ("qemu64", set()),
        ("older", None),
        ("zork", None),
    ],
)
def test_what_a_model_lacks(model: str, lacking: set[str] | None) -> None:
    assert features_of_host(DEFINITIONS, EXPANSION).lacking(model) == lacking


@pytest.mark.parametrize(
    ("definitions", "expansion"), [(None, None), ({}, []), ([1], {"model": 1})]
)
def test_answers_of_another_shape_tell_nothing(definitions: object, expansion: object) -> None:
    assert features_of_host(definitions, expansion) == CpuFeatures()


@pytest.mark.parametrize(
    ("cpus", "lacking"), [([{"qom-path": "/cpu0"}], {"kvm-asyncpf"}), ([], None), ([{}], None)]
)
async def test_what_a_guest_lacks(cpus: object, lacking: set[str] | None) -> None:
    async def execute(command: str, arguments: object) -> object:
        if command == "query-cpus-fast":
            return cpus
        assert (command, arguments) == (
            "qom-get",
            {"path": "/cpu0", "property": "unavailable-features"},
        )
        return ["kvm_asyncpf"]

    assert await lacking_in_guest(execute) == lacking


@pytest.mark.parametrize(
    ("there", "here", "refused"),
    [
        (("hle",), ("hle", "pcid", "avx2"), True),
        (("hle", "pcid"), ("hle",), False),
        (None, ("hle",), False),
        (("hle",), None, False),
    ],
)
async def test_a_destination_that_lacks_what_the_guest_has_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    there: Collection[str] | None,
    here: Collection[str] | None,
    refused: bool,
) -> None:
    """It was let go there, and ended by an illegal instruction. What isn't known refuses nobody."""
    async with migration_world(tmp_path, monkeypatch) as world:
        world.a.node.host.cpu_lacks, world.b.node.host.cpu_lacks = there, here
        if not refused:
            await world.ended(await world.migrate())
            assert world.running() == ["b"]
            return
        with pytest.raises(RefusedError) as error:
            await world.migrate()
        assert error.value.reasons == (
            "node b: its CPU lacks avx2, pcid of qemu64, which the guest has at the source",
        )
        assert world.running() == ["a"]
