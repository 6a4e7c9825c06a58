"""Many domains, and migrations that have ended, don't hold an agent up; its metrics have them."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator
from typing import Any, Final, cast

import msgspec
import pytest

from migrator.model import (
    Migration,
    MigrationState,
    NodeName,
    OwnershipRecord,
    OwnershipState,
)
from node_agent.cluster_views import running_by_node
from node_agent.domain_records import DomainRecords
from node_agent.migrations import publisher as publisher_module
from node_agent.migrations.outline import MigrationOutline, outline_of
from node_agent.migrations.publisher import Publisher
from node_agent.resources import DOMAINS, MIGRATIONS, DomainRecord
from node_agent.state import typed as typed_module
from node_agent.state.memory import SimulatedStore
from node_agent.state.ownership import PREFIX as OWNERSHIP
from node_agent.state.typed import TypedStore
from tests.unit.agent_world import spec_of
from tests.unit.session_pair import SessionPair
from tests.unit.test_publisher import NoEvents

_MANY: Final = 300


def ended(number: int, source: str = "n1", **changes: Any) -> Migration:
    """As a session leaves it, whole."""
    pair = SessionPair()
    pair.run()
    made = msgspec.structs.replace(
        pair.source.view(), id=f"m-{number}", source=source, created_at_s=float(number)
    )
    return msgspec.structs.replace(made, **changes)


@pytest.fixture
async def typed() -> AsyncIterator[TypedStore]:
    store = SimulatedStore()
    await store.open()
    yield TypedStore(store)
    await store.close()


def publisher_of(typed: TypedStore) -> Publisher:
    return Publisher(typed, cast(Any, NoEvents()))


async def test_an_outline_is_read_from_what_is_published(typed: TypedStore) -> None:
    publisher, whole = publisher_of(typed), ended(1)
    running = ended(2, state=MigrationState.PRECOPY, ended_at_s=None, blackout_ms=None)
    for each in (whole, running):
        await publisher.write(each)
    found = await publisher.read_outlines()
    assert found == [outline_of(running), outline_of(whole)]
    assert [each.ended for each in found] == [False, True]
    assert found[1].blackout_ms == whole.blackout_ms


async def test_own_migrations_stay_when_the_store_has_dropped_them(
    typed: TypedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A histogram that gets smaller is taken for a restart by Prometheus."""
    before = publisher_of(typed)  # An earlier agent's, and another node's.
    for each in (ended(1), ended(2, "n2")):
        await before.write(each)
    monkeypatch.setattr(publisher_module, "KEEP", 1)
    now = publisher_of(typed)
    await now.write(ended(3))
    assert [each.id for each in await now.read_own("n1")] == ["m-1", "m-3"]
    for number in (4, 5):
        await now._write_end(ended(number))
    assert [each.id for each in await now.read_outlines()] == ["m-5"]
    assert [each.id for each in await now.read_own("n1")] == ["m-1", "m-3", "m-4", "m-5"]
    monkeypatch.setattr(publisher_module, "OWN_MAX", 2)
    await now.write(ended(6))
    assert [each.id for each in await now.read_own("n1")] == ["m-5", "m-6"]


async def test_others_have_their_turn_while_many_values_are_read(
    typed: TypedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    one, turns, decoded = ended(1), 0, 0
    for number in range(_MANY):
        await typed.put(f"{MIGRATIONS}{number:04}", one)
    at_turns: list[int] = []
    decode = typed_module._decode

    def counted(*what: Any) -> Any:
        nonlocal decoded
        decoded += 1
        return decode(*what)

    async def other() -> None:
        nonlocal turns
        while True:
            turns += 1
            at_turns.append(decoded)
            await asyncio.sleep(0)

    monkeypatch.setattr(typed_module, "_decode", counted)
    task = asyncio.create_task(other())
    try:
        assert len(await typed.list_prefix(MIGRATIONS, Migration)) == _MANY
    finally:
        task.cancel()
    gaps = [later - earlier for earlier, later in itertools.pairwise(at_turns)]
    assert decoded == _MANY and max(gaps) <= typed_module._AT_A_TIME


async def test_what_was_left_out_of_an_older_value_is_not_remembered_for_a_newer(
    typed: TypedStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Written while the list was being decoded: the older one's fields belong to nobody."""
    monkeypatch.setattr(typed_module, "_AT_A_TIME", 1)
    for name in ("a", "b"):
        raw = {**msgspec.to_builtins(outline_of(ended(1))), "unknown": name}
        await typed.store.put(f"{MIGRATIONS}{name}", msgspec.msgpack.encode(raw))
    listing = asyncio.create_task(typed.list_prefix(MIGRATIONS, _Strict))
    found = await typed.get(f"{MIGRATIONS}b", _Strict)
    assert found is not None
    newer = msgspec.structs.replace(found.value, domain="newer")
    written = await typed.put_if(found.key, newer, found.revision)
    assert written is not None
    await listing
    again = msgspec.structs.replace(newer, domain="again")
    assert await typed.put_if(found.key, again, written) is not None
    entry = await typed.store.get(found.key)
    assert entry is not None
    kept = msgspec.msgpack.decode(entry.value)
    assert (kept["unknown"], kept["domain"]) == ("b", "again")


async def test_what_runs_on_one_node_is_known_without_reading_all(typed: TypedStore) -> None:
    records = DomainRecords(typed)
    states = (("web", "a", True), ("off", "a", False), ("gone", "a", True), ("far", "b", True))
    for name, owner, runs in states:
        state = OwnershipState.RUNNING if runs else OwnershipState.STOPPED
        owned = OwnershipRecord(domain=name, token=1, owner=owner, state=state)
        await typed.put(f"{OWNERSHIP}{name}", owned)
        if name != "gone":
            await typed.put(f"{DOMAINS}{name}", DomainRecord(spec=spec_of(name), defined_at_s=0.0))
    assert list(await records.running_on(NodeName("a"))) == ["web"]
    everywhere = running_by_node(await records.list_records(), await records.list_ownership())
    assert {node: list(found) for node, found in everywhere.items()} == {"a": ["web"], "b": ["far"]}


class _Strict(MigrationOutline, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """As the values that are read to be changed are."""
