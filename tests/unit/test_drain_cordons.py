"""What becomes of a cordon where the agent that planned its drain dies at it, or is in doubt."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, cast

import pytest

from migrator.errors import ConflictError
from migrator.model import NodeName, NodeState
from node_agent.cli.cluster import troubles
from node_agent.cluster_views import node_view
from node_agent.drain.cordons import CORDONS, Cordon, Cordons
from node_agent.drain.records import DrainRecords
from node_agent.drain.resources import (
    CancelMode,
    Drain,
    DrainRequest,
    DrainState,
    Move,
    Operation,
)
from node_agent.drain.service import DrainService
from node_agent.migrations.checks import cordon_reasons
from node_agent.nodes import GOING_DOWN, NodeRegistry, NodeView
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore
from tests.unit.heartbeats import heartbeat, speak

N1 = NodeName("n1")
S = NodeState


class Nodes:
    """In the place of the drains' world. Nothing can be moved in it."""

    trouble = ""
    judges_in_s = 0.0

    def __init__(self, **states: NodeState) -> None:
        self._states = states

    async def views(self) -> dict[str, NodeView]:
        return {
            name: NodeView(
                info=heartbeat(name, memory_bytes=2**32, cpus=2), state=state, heartbeat_age_s=9.0
            )
            for name, state in self._states.items()
        }


class Told:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def emit(self, _kind: object, text: str, **_: object) -> None:
        self.texts.append(text)


@asynccontextmanager
async def service_of(
    store: TypedStore, events: Told, **states: NodeState
) -> AsyncIterator[DrainService]:
    """n3's."""
    rest: Any = None
    service = DrainService(
        NodeName("n3"),
        store=store,
        world=cast(Any, Nodes(**states)),
        hub=rest,
        events=cast(Any, events),
        silent_s=0.03,
        look_s=0.01,
    )
    await service.open()
    try:
        yield service
    finally:
        await service.close()


async def store_of(*cordons: Cordon) -> TypedStore:
    store = SimulatedStore(SimulatedData())
    await store.open()
    typed = TypedStore(store)
    for cordon in cordons:
        await typed.put_if(f"{CORDONS}{cordon.node}", cordon, None)
    return typed


def planned(by: str, **changes: Any) -> Cordon:
    """Of n1, whose drain has no record yet."""
    return Cordon(node="n1", state=S.DRAINING, drain="d", since_s=1.0, planned_by=by, **changes)


async def until(found: Callable[[], Any]) -> None:
    async with asyncio.timeout(10):
        while not await found():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(("by", "n2"), [("n2", S.UNREACHABLE), ("n3", S.READY), ("gone", S.READY)])
async def test_a_node_whose_planner_died_is_what_it_was(by: str, n2: NodeState) -> None:
    """It was kept for two minutes, in which it could be neither drained nor opened, and then
    cordoned. n3 is this agent: it was restarted."""
    earlier = Cordon(node="n1", state=S.DRAINED, drain="earlier", since_s=0.5, reason="disk")
    before = planned(by, before=earlier)
    store, events = await store_of(before), Told()
    async with service_of(store, events, n1=S.READY, n2=n2, n3=S.READY):
        cordons = Cordons(store)

        async def back() -> bool:
            return await cordons.state(N1) is S.DRAINED

        await until(back)
        found = await cordons.read(N1)
    assert found == earlier
    assert events.texts == [f"node n1 is drained again: {by} died while it planned drain d"]


async def test_who_lives_is_left_to_plan_for_as_long_as_it_takes() -> None:
    store = await store_of(planned("n2"))
    async with service_of(store, Told(), n1=S.READY, n2=S.READY, n3=S.READY) as service:
        await asyncio.sleep(0.2)
        assert await Cordons(store).state(N1) is S.DRAINING
        with pytest.raises(ConflictError, match="still being planned by n2"):
            await service.cancel_of(N1, CancelMode.LET_END)


async def test_a_drain_that_is_recorded_after_all_keeps_its_node_free() -> None:
    """Its planner heard of no answer when it wrote it down, and took the cordon back."""
    store = await store_of()
    drain = Drain(
        id="d",
        operation=Operation.DRAIN,
        node="n1",
        state=DrainState.RUNNING,
        created_at_s=1.0,
        started_at_s=1.0,
        hooked=True,
        coordinator="n2",
        moves=(Move(domain="web", source="n1", destination="n2"),),
    )
    await DrainRecords(store).add(drain)
    async with service_of(store, Told(), n1=S.UNREACHABLE, n2=S.READY, n3=S.READY):
        cordons = Cordons(store)

        async def kept() -> bool:
            return await cordons.state(N1) is S.DRAINING

        await until(kept)


async def test_who_keeps_a_node_free_and_why_is_kept_through_a_drain() -> None:
    """At three in the morning somebody else asks why the node takes nothing."""
    store, events = await store_of(), Told()
    async with service_of(store, events, n1=S.READY, n2=S.READY, n3=S.READY) as service:
        await service.cordons.cordon(N1, "user ann", "its disk is replaced")
        assert events.texts == ["node n1 is cordoned by user ann: its disk is replaced"]
        before = await service.cordons.read(N1)
        with pytest.raises(AttributeError):  # This world can't be planned in.
            await service.drain(N1, DrainRequest(reason="firmware"), "user bob")
        assert await service.cordons.read(N1) == before
        await service.cordons.claim(N1, S.DRAINING, "d", "user bob", "firmware")
        drain = Drain(
            id="d",
            operation=Operation.DRAIN,
            node="n1",
            state=DrainState.DONE,
            created_at_s=1.0,
            started_at_s=1.0,
            asked_by="user bob",
            reason="firmware",
        )
        await service.cordons.settle(drain, S.DRAINED)
        found = await service.cordons.read(N1)
    assert found is not None and found.told == "drained by user bob: firmware"
    assert cordon_reasons(N1, found.state, found.told) == [
        "node n1 is drained by user bob: firmware; nothing may come there "
        "(`ferry undrain n1` opens it)"
    ]


async def test_a_list_of_nodes_tells_who_keeps_one_free_and_why() -> None:
    cordon = Cordon(node="n1", state=S.CORDONED, since_s=1.0, by="user ann", reason="new disk")
    store, rest = await store_of(cordon), cast(Any, None)
    for name in ("n1", "n2"):
        await speak(store, heartbeat(name, at_s=time.time()))
    views = await NodeRegistry(store, rest).read()
    told = {
        str(name): list(troubles(node_view(view, {}, None), 0.0)) for name, view in views.items()
    }
    assert told == {"n1": ["it is cordoned by user ann: new disk"], "n2": []}


@pytest.mark.parametrize(
    ("before", "meanwhile"),
    [
        (S.READY, S.GOING_DOWN),
        (S.RESTORING, S.GOING_DOWN),
        (S.CORDONED, S.CORDONED),
        (S.DRAINED, S.DRAINED),
    ],
)
async def test_a_node_whose_host_goes_down_takes_nothing(before: S, meanwhile: S) -> None:
    store, rest = await store_of(Cordon(node="n1", state=before, since_s=1.0)), cast(Any, None)
    await speak(store, heartbeat("n1", at_s=time.time(), going_down=True))
    view = (await NodeRegistry(store, rest).read())[N1]
    assert view.state is meanwhile
    assert not view.state.admits
    assert ("going down" in view.kept_free) == (meanwhile is S.GOING_DOWN)


def test_what_opens_a_node_is_what_its_state_allows() -> None:
    """While a drain is under way an undrain is refused."""
    why = "node n1 is {}; nothing may come there (`ferry {}` opens it)"
    for state, how in {
        S.DRAINING: "drain n1 --cancel",
        S.DRAINED: "undrain n1",
        S.CORDONED: "uncordon n1",
    }.items():
        assert cordon_reasons(N1, state) == [why.format(state, how)]
    assert cordon_reasons(N1, S.RESTORING) == []


def test_what_opens_a_node_that_goes_down_is_named() -> None:
    assert cordon_reasons(N1, S.GOING_DOWN, GOING_DOWN) == [
        "node n1 is going down, and its guests with it; nothing may come there (if it stays up, "
        "`systemctl restart ferry-agent` there opens it)"
    ]


async def test_who_cancels_a_drain_that_is_over_hears_how_it_is_undone() -> None:
    store = await store_of(Cordon(node="n1", state=S.DRAINED, drain="d", since_s=1.0))
    async with service_of(store, Told(), n1=S.READY) as service:
        with pytest.raises(ConflictError, match="`ferry undrain n1` undoes"):
            await service.cancel_of(N1, CancelMode.LET_END)


async def test_a_cordon_that_a_drain_needs_is_opened_by_a_command_that_is_named() -> None:
    store = await store_of(Cordon(node="n1", state=S.DRAINING, drain="d", since_s=1.0))
    async with service_of(store, Told(), n1=S.READY) as service:
        told = r"`ferry drains cancel d` stops it\); it must be cordoned or drained or ready"
        with pytest.raises(ConflictError, match=told):
            await service.cordons.uncordon(N1)
