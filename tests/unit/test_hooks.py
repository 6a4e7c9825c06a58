"""Hooks: which a moment has, what their failures do, and how they go through whole migrations."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec
import pytest

from migrator.errors import ConflictError, InvalidRequest, NotFoundError, WrongStateError
from migrator.model import DomainName, DomainSpec, MigrationState, OwnershipRecord
from node_agent.hooks import service as hooks_service
from node_agent.hooks.model import (
    HIDDEN,
    CommandHook,
    HookCall,
    HookFailure,
    HookPoint,
    HookReport,
    HookSpec,
    WebhookHook,
)
from node_agent.hooks.port import HookDriver, HookError
from node_agent.hooks.service import HookService, applies, check_hook
from node_agent.migrations import site
from tests.unit.agent_world import open_world, spec_of
from tests.unit.migration_world import (
    WEB,
    end_first_pass,
    eventually,
    held_in_precopy,
    migration_world,
)

_P = HookPoint
MOVE = (_P.BEFORE_MIGRATION, _P.BEFORE_SWITCHOVER, _P.AFTER_RESUME, _P.AFTER_MIGRATION)


class NotedHooks(HookDriver[CommandHook]):
    """In the place of programs: notes each call; `says` is awaited for its answer."""

    def __init__(self) -> None:
        self.calls: list[HookCall] = []
        self.failing: set[HookPoint] = set()
        self.held: dict[HookPoint, asyncio.Event] = {}

    async def run(self, settings: CommandHook, call: HookCall, *, deadline_s: float) -> str:
        self.calls.append(call)
        if call.point in self.held:
            await self.held[call.point].wait()
        if call.point in self.failing:
            raise HookError("it is not a good time")
        return "noted"

    @property
    def points(self) -> list[HookPoint]:
        return [call.point for call in self.calls]

    @property
    def drivers(self) -> Mapping[type, HookDriver[Any]]:
        return {CommandHook: self}


def hook_of(name: str = "lb", **more: Any) -> HookSpec:
    values = {"points": tuple(HookPoint), "action": CommandHook(argv=("/bin/true",)), **more}
    return HookSpec(name=name, **values)


# --- which hooks -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scope", "expected"),
    [
        ({}, True),
        ({"domains": ("web", "db")}, True),
        ({"domains": ("db",)}, False),
        ({"label": "tier=front"}, True),
        ({"label": "tier=back"}, False),
        ({"label": "other=front"}, False),
        ({"domains": ("web",), "label": "tier=back"}, False),
        ({"points": (_P.ON_FAILURE,)}, False),
    ],
)
def test_a_hook_belongs_to_domains_a_label_or_the_cluster(
    scope: dict[str, Any], expected: bool
) -> None:
    spec = msgspec.structs.replace(spec_of(), labels={"tier": "front"})
    assert applies(hook_of(**scope), _P.BEFORE_MIGRATION, spec) is expected


def test_a_nodes_moment_has_every_hook_of_it() -> None:
    assert applies(hook_of(domains=("db",)), _P.NODE_DRAINING, None)
    assert not applies(hook_of(points=(_P.NODE_DRAINED,)), _P.NODE_DRAINING, None)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"name": "pressure"}, "name"),
        ({"label": "tier"}, "label"),
        ({"action": CommandHook(argv=("relative",))}, "action.argv[0]"),
    ],
)
def test_what_is_wrong_with_a_hook_is_named(change: dict[str, Any], field: str) -> None:
    with pytest.raises(InvalidRequest) as caught:
        check_hook(msgspec.structs.replace(hook_of(), **change))
    assert set(caught.value.fields) == {field}


# --- the service -----------------------------------------------------------------------------


async def test_hooks_are_kept_and_secrets_never_shown(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        service = HookService(world.a.typed, world.a.events)
        secret = WebhookHook(url="http://127.0.0.1:9/", secret="key")
        added = await service.add(hook_of(action=secret))
        assert isinstance(added.action, WebhookHook)
        assert added.action.secret == HIDDEN
        assert [hook.name for hook in await service.list_hooks()] == ["lb"]
        assert await service.get("lb") == added
        assert (await service._read("lb")).action == secret
        with pytest.raises(ConflictError, match="lb already"):
            await service.add(hook_of())
        await service.remove("lb")
        for call in (service.get("lb"), service.remove("lb")):
            with pytest.raises(NotFoundError):
                await call


async def test_one_hooks_failure_forbids_only_where_it_says_so(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        noted = NotedHooks()
        noted.failing = set(HookPoint)
        service = HookService(world.a.typed, world.a.events, drivers=noted.drivers)
        await service.add(hook_of("mild"))
        call = HookCall(point=_P.BEFORE_MIGRATION, node="a", domain="web")
        report = await service.run(call, spec_of())
        assert (report.forbidden, report.results[0].succeeded) == (None, False)
        await service.add(hook_of("strict", on_failure=HookFailure.CANCEL))
        report = await service.run(call, spec_of())
        assert report.forbidden == "hook strict: it is not a good time"
        after = HookCall(point=_P.AFTER_MIGRATION, node="a", domain="web")
        assert (await service.run(after, spec_of())).forbidden is None


async def test_a_hook_ends_at_its_deadline_and_the_domains_goes_before(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        noted = NotedHooks()
        noted.held[_P.BEFORE_MIGRATION] = asyncio.Event()
        service = HookService(world.a.typed, world.a.events, drivers=noted.drivers)
        await service.add(hook_of(deadline_s=3600.0))
        spec = msgspec.structs.replace(spec_of(), hook_deadline_s=0.05)
        call = HookCall(point=_P.BEFORE_MIGRATION, node="a", domain="web")
        async with asyncio.timeout(30):
            report = await service.run(call, spec)
        assert report.results[0].detail == "not done within 0.05 s"


async def test_a_test_is_run_only_at_the_hooks_own_points(tmp_path: Path) -> None:
    async with open_world(tmp_path) as world:
        noted = NotedHooks()
        service = HookService(world.a.typed, world.a.events, drivers=noted.drivers)
        await service.add(hook_of(points=(_P.ON_FAILURE,)))
        with pytest.raises(WrongStateError, match="on-failure"):
            await service.test("lb", HookCall(point=_P.NODE_DRAINED, node="a"))
        assert (await service.test("lb", HookCall(point=_P.ON_FAILURE, node="a"))).succeeded


# --- migrations ------------------------------------------------------------------------------


async def test_a_migration_runs_its_hooks_in_order_and_keeps_what_they_did(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = NotedHooks()
    monkeypatch.setattr(hooks_service, "DRIVERS", noted.drivers)
    async with migration_world(tmp_path, monkeypatch) as world:
        await HookService(world.a.node.typed, world.a.node.events).add(hook_of())
        began = await world.migrate()
        ended = await world.ended(began)
        assert ended.state is MigrationState.COMPLETED

        async def all_run() -> bool:
            return len(noted.calls) >= len(MOVE)

        await eventually(all_run)
        assert noted.points == list(MOVE)
        assert {call.migration for call in noted.calls} == {began.id}
        assert {(call.node, call.destination) for call in noted.calls} == {("a", "b")}

        async def published() -> bool:
            names = {phase.name for phase in (await world.a.manager.get(began.id)).timeline}
            return names >= {"hooks before-migration", "leave", "hooks after-migration"}

        await eventually(published)


@pytest.mark.parametrize("point", [_P.BEFORE_MIGRATION, _P.BEFORE_SWITCHOVER])
async def test_a_hook_that_forbids_leaves_the_guest_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, point: HookPoint
) -> None:
    noted = NotedHooks()
    noted.failing = {point}
    monkeypatch.setattr(hooks_service, "DRIVERS", noted.drivers)
    async with migration_world(tmp_path, monkeypatch) as world:
        service = HookService(world.a.node.typed, world.a.node.events)
        await service.add(hook_of(on_failure=HookFailure.CANCEL))
        ended = await world.ended(await world.migrate())
        assert ended.state is MigrationState.FAILED
        assert ended.error == "hook lb: it is not a good time"

        async def told() -> bool:
            return noted.points[-1] is _P.ON_FAILURE

        await eventually(told)
        assert noted.calls[-1].reason == ended.error
        owned = await world.a.node.ownership.read(WEB)
        assert owned is not None and (owned.owner, owned.token) == ("a", 1)


async def test_it_can_be_cancelled_while_a_hook_takes_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    noted = NotedHooks()
    noted.held[_P.BEFORE_SWITCHOVER] = asyncio.Event()
    monkeypatch.setattr(hooks_service, "DRIVERS", noted.drivers)
    async with migration_world(tmp_path, monkeypatch) as world:
        await HookService(world.a.node.typed, world.a.node.events).add(hook_of(deadline_s=3600.0))
        began = await world.migrate()

        async def asked() -> bool:
            return _P.BEFORE_SWITCHOVER in noted.points

        await eventually(asked)
        await world.a.manager.cancel(began.id)
        assert (await world.ended(began)).state is MigrationState.CANCELLED


@pytest.mark.parametrize("away_during", [False, True])
async def test_a_guest_runs_on_while_the_store_does_not_say_which_hooks_it_has(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, away_during: bool
) -> None:
    """Or goes away while they run. They are run once, and the guest moves when it is back."""
    noted, asked = NotedHooks(), 0
    run = HookService.run

    async def counted(service: HookService, call: HookCall, spec: DomainSpec | None) -> HookReport:
        nonlocal asked
        asked += call.point is _P.BEFORE_SWITCHOVER
        return await run(service, call, spec)

    monkeypatch.setattr(HookService, "run", counted)
    monkeypatch.setattr(hooks_service, "DRIVERS", noted.drivers)
    monkeypatch.setattr(site, "STORE_GAP_S", 0.02)
    async with migration_world(tmp_path, monkeypatch) as world:
        await HookService(world.a.node.typed, world.a.node.events).add(hook_of())
        began, live = await held_in_precopy(world)
        reads, read = 0, world.a.node.ownership.read

        async def counted_read(domain: DomainName) -> OwnershipRecord | None:
            nonlocal reads
            reads += 1
            return await read(domain)

        monkeypatch.setattr(world.a.node.ownership, "read", counted_read)
        faults = world.a.node.store.faults
        if away_during:
            noted.held[_P.BEFORE_SWITCHOVER] = asyncio.Event()
            end_first_pass(world)
            await world.until(lambda: _P.BEFORE_SWITCHOVER in noted.points)
            faults.unavailable = True
            noted.held[_P.BEFORE_SWITCHOVER].set()
            await world.until(lambda: reads > 3)
        else:
            faults.unavailable = True
            end_first_pass(world)
            await world.until(lambda: asked > 3)
        assert live.state is MigrationState.PRECOPY
        assert world.running() == ["a"]
        faults.unavailable = False
        ended = await world.ended(began)
        assert ended.state is MigrationState.COMPLETED, ended.error
        assert noted.points.count(_P.BEFORE_SWITCHOVER) == 1
