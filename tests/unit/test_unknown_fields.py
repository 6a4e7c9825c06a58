"""Two versions at once: what a newer agent has added is ignored, and kept where it was stored."""

from __future__ import annotations

import copy
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from msgspec import inspect

from migrator.errors import StoreError
from migrator.model import (
    DiskSpec,
    DomainName,
    DomainSpec,
    KernelBoot,
    NicSpec,
    NodeName,
    OwnershipRecord,
    OwnershipState,
)
from migrator.names import Value
from migrator.unknown_fields import decode, decode_keeping, merged
from node_agent.drain.resources import Drain, DrainState, Move, MoveState, Note, Operation
from node_agent.hooks.model import CommandHook, HookPoint, HookSpec
from node_agent.state.memory import SimulatedStore
from node_agent.state.ownership import StoreOwnership, ownership_key
from node_agent.state.typed import TypedStore
from tests.unit.peers_world import N2, world

SPEC = DomainSpec(
    name="web",
    memory_bytes=1 << 30,
    disks=(DiskSpec(volume="a", pool="p"), DiskSpec(volume="b", pool="p")),
    nics=(NicSpec(mac="52:54:00:00:00:01", bridge="br0", addresses=("10.0.0.1",)),),
    boot=KernelBoot(kernel="/k", initrd="/i", cmdline="quiet"),
    labels={"app": "web"},
)
DRAIN = Drain(
    id="d1",
    operation=Operation.DRAIN,
    node="n1",
    state=DrainState.RUNNING,
    created_at_s=1.0,
    started_at_s=1.0,
    moves=(
        Move(domain="a", source="n1", destination="n2"),
        Move(domain="b", source="n1", destination="n3"),
    ),
    links={"n1": 1e8},
    history=(Note(at_s=1.0, text="one"), Note(at_s=1.0, text="two")),
)
HOOK = HookSpec(
    name="note", points=(HookPoint.AFTER_RESUME,), action=CommandHook(argv=("/bin/true",))
)
VALUES = (SPEC, DRAIN, HOOK)


def raw_of(value: object) -> Any:
    return msgspec.msgpack.decode(msgspec.msgpack.encode(value))


def with_additions(raw: Any, kind: inspect.Type, draw: Any) -> Any:
    """As a newer version might have written it: some of its objects have further fields."""
    if isinstance(kind, inspect.Metadata):
        return with_additions(raw, kind.type, draw)
    if isinstance(kind, inspect.UnionType) and isinstance(raw, dict):
        fitting = [
            each
            for each in kind.types
            if isinstance(each, inspect.StructType)
            and (each.tag_field is None or raw.get(each.tag_field) == each.tag)
        ]
        return with_additions(raw, fitting[0], draw)
    if isinstance(kind, inspect.StructType) and isinstance(raw, dict):
        types = {each.encode_name: each.type for each in kind.fields}
        added = {
            name: with_additions(raw[name], types[name], draw) for name in raw if name in types
        }
        tag = {name: raw[name] for name in raw if name not in types}
        more = draw(st.dictionaries(st.sampled_from(["x_new", "x_more"]), additions, max_size=2))
        return tag | added | more
    if isinstance(kind, inspect.VarTupleType) and isinstance(raw, list):
        return [with_additions(each, kind.item_type, draw) for each in raw]
    return raw


additions = st.recursive(
    st.none() | st.integers(-5, 5) | st.text(max_size=3) | st.binary(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=4,
)


@given(st.sampled_from(VALUES), st.data())
def test_what_is_added_is_ignored_and_comes_back(value: Value, data: st.DataObject) -> None:
    newer = with_additions(raw_of(value), inspect.type_info(type(value)), data.draw)
    decoder = msgspec.msgpack.Decoder(type(value))
    found, left_out = decode_keeping(msgspec.msgpack.encode(newer), decoder)
    assert found == value
    assert (left_out is None) == (newer == raw_of(value))
    if left_out is not None:
        assert merged(raw_of(found), left_out) == newer


def test_json_too_and_what_is_wrong_stays_wrong() -> None:
    decoder = msgspec.json.Decoder(DomainSpec)
    text = msgspec.json.encode(raw_of(SPEC) | {"x": 1})
    assert decode(text, decoder) == SPEC
    with pytest.raises(msgspec.ValidationError, match="unknown field"):
        decoder.decode(text)  # What a user writes is still checked strictly.
    wrong = msgspec.json.encode(raw_of(SPEC) | {"x": 1, "memory_bytes": "much"})
    with pytest.raises(msgspec.ValidationError, match="memory_bytes"):
        decode(wrong, decoder)
    drain = raw_of(DRAIN) | {"x": 1, "state": "meditating"}
    with pytest.raises(msgspec.ValidationError, match="meditating"):
        decode(msgspec.json.encode(drain), msgspec.json.Decoder(Drain))


async def test_a_read_modify_write_keeps_what_it_does_not_know() -> None:
    store = SimulatedStore()
    await store.open()
    typed = TypedStore(store)
    newer = raw_of(DRAIN)
    newer["x_pace"] = "gentle"
    newer["moves"][1]["x_budget"] = {"ms": 5}
    await store.put("drains/d1", msgspec.msgpack.encode(newer))

    entry = await typed.get("drains/d1", Drain)
    assert entry is not None and entry.value == DRAIN
    changed = msgspec.structs.replace(
        DRAIN,
        beat=7,
        moves=(
            Move(domain="new", source="n1", destination=None),
            *(msgspec.structs.replace(each, state=MoveState.MOVED) for each in DRAIN.moves),
        ),
    )
    first = await typed.put_if("drains/d1", changed, entry.revision)
    # And again, without a read in between, as a coordinator does.
    again = msgspec.structs.replace(changed, beat=8)
    assert first is not None and await typed.put_if("drains/d1", again, first) is not None
    stored = await store.get("drains/d1")
    assert stored is not None
    found = msgspec.msgpack.decode(stored.value)
    assert found["x_pace"] == "gentle" and found["beat"] == 8
    assert [move.get("x_budget") for move in found["moves"]] == [None, None, {"ms": 5}]
    assert found["moves"][2]["state"] == "moved"


async def test_what_a_watch_showed_may_be_changed_too() -> None:
    store = SimulatedStore()
    await store.open()
    typed = TypedStore(store)
    changes = typed.watch("drains/", Drain)
    await store.put("drains/d1", msgspec.msgpack.encode(raw_of(DRAIN) | {"x_pace": "gentle"}))
    change = await anext(changes)
    assert change.value == DRAIN
    await typed.put_if("drains/d1", DRAIN, change.revision)
    stored = await store.get("drains/d1")
    assert stored is not None and msgspec.msgpack.decode(stored.value)["x_pace"] == "gentle"
    # Another one's write in between isn't ours to add to.
    await store.put("drains/d1", msgspec.msgpack.encode(DRAIN))
    assert (await anext(changes)).value == DRAIN
    entry = await typed.get("drains/d1", Drain)
    assert entry is not None
    await typed.put_if("drains/d1", DRAIN, entry.revision)
    stored = await store.get("drains/d1")
    assert stored is not None and "x_pace" not in msgspec.msgpack.decode(stored.value)


async def test_a_handoff_keeps_what_a_newer_agent_wrote_into_the_record() -> None:
    store = SimulatedStore()
    await store.open()
    ownership = StoreOwnership(store)
    before = OwnershipRecord(domain="web", token=1, owner="n1", state=OwnershipState.RUNNING)
    key = ownership_key("web")
    await store.put(key, msgspec.msgpack.encode(raw_of(before) | {"x_zone": "b"}))
    assert await ownership.read(DomainName("web")) == before
    after = before.passed_to(NodeName("n2"))
    assert await ownership.compare_and_set(before, after)
    assert await ownership.read(DomainName("web")) == after
    stored = await store.get(key)
    assert stored is not None and msgspec.msgpack.decode(stored.value)["x_zone"] == "b"


async def test_a_value_that_is_wrong_is_left_as_it_is() -> None:
    store = SimulatedStore()
    await store.open()
    await store.put("drains/d1", msgspec.msgpack.encode({"id": "d1", "x": 1}))
    with pytest.raises(StoreError, match="drains/d1 is not a Drain"):
        await TypedStore(store).get("drains/d1", Drain)


class Question(Value, frozen=True, kw_only=True):
    spec: DomainSpec


class NewerSpec(DomainSpec, frozen=True, kw_only=True):
    x_sockets: int = 2


class NewerQuestion(Value, frozen=True, kw_only=True):
    spec: NewerSpec
    x_hurry: bool = True


async def test_agents_of_two_versions_understand_each_other() -> None:
    """Both ways: a newer caller's params, and a newer agent's answer."""
    async with world() as agents:
        heard: list[DomainSpec] = []

        async def older(_: NodeName, params: Question) -> Question:
            heard.append(params.spec)
            return params

        async def newer(_: NodeName, params: Question) -> NewerQuestion:
            return asked

        agents.two.handle("older", Question, older)
        agents.two.handle("newer", Question, newer)
        values = {name: getattr(SPEC, name) for name in SPEC.__struct_fields__}
        asked = NewerQuestion(spec=NewerSpec(**values))
        answer = await agents.one.call(N2, "older", asked, Question)
        assert answer == Question(spec=SPEC) and heard == [SPEC]
        assert await agents.one.call(N2, "newer", answer, Question) == answer


def test_values_without_unknown_fields_are_left_alone() -> None:
    before = copy.deepcopy(raw_of(DRAIN))
    found, left_out = decode_keeping(msgspec.msgpack.encode(DRAIN), msgspec.msgpack.Decoder(Drain))
    assert (found, left_out) == (DRAIN, None)
    assert raw_of(found) == before
