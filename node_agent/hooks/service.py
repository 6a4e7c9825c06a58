"""The cluster's hooks: kept in the store, run where a migration or drain is carried out.

All hooks of one moment run at the same time, each within its deadline. A hook that fails says so in
the event log and in the migration's timeline; whether what was about to happen is cancelled is
the hook's own choice (`on_failure`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any, Final

from migrator.errors import ConflictError, InvalidRequest, NotFoundError, WrongStateError
from migrator.model import DomainSpec
from node_agent.events import EventKind, EventLog
from node_agent.hooks.command import CommandDriver
from node_agent.hooks.haproxy import HaproxyDriver
from node_agent.hooks.model import (
    HOOKS,
    CommandHook,
    HaproxyHook,
    HookCall,
    HookFailure,
    HookPoint,
    HookReport,
    HookResult,
    HookSpec,
    WebhookHook,
)
from node_agent.hooks.port import HookDriver, HookError
from node_agent.hooks.webhook import WebhookDriver
from node_agent.state.typed import TypedStore

log = logging.getLogger(__name__)

DRIVERS: Final[Mapping[type, HookDriver[Any]]] = {
    HaproxyHook: HaproxyDriver(),
    WebhookHook: WebhookDriver(),
    CommandHook: CommandDriver(),
}
_RESERVED: Final = frozenset({"pressure"})


class HookService:
    """See the module. `drivers` maps the type of a hook's action to what carries it out; all of
    them by default.
    """

    def __init__(
        self,
        store: TypedStore,
        events: EventLog,
        *,
        drivers: Mapping[type, HookDriver[Any]] | None = None,
    ) -> None:
        self._store = store
        self._events = events
        self._drivers = DRIVERS if drivers is None else drivers

    # --- definitions -------------------------------------------------------------------------

    async def add(self, spec: HookSpec) -> HookSpec:
        """InvalidRequest names each wrong field; ConflictError: the name is taken."""
        check_hook(spec)
        if await self._store.put_if(f"{HOOKS}{spec.name}", spec, None) is None:
            raise ConflictError(f"there is a hook {spec.name} already; remove it first")
        self._events.emit(EventKind.HOOK_ADDED, f"hook {spec.name} was added")
        return spec.shown

    async def list_hooks(self) -> Sequence[HookSpec]:
        """By name, as they may be shown."""
        return [hook.shown for hook in await self._read_all()]

    async def get(self, name: str) -> HookSpec:
        """As it may be shown. NotFoundError if there is none."""
        return (await self._read(name)).shown

    async def remove(self, name: str) -> None:
        """NotFoundError if there is none."""
        key = f"{HOOKS}{name}"
        entry = await self._store.get(key, HookSpec)
        if entry is None or not await self._store.delete_if(key, entry.revision):
            raise NotFoundError(f"there is no hook {name}")
        self._events.emit(EventKind.HOOK_REMOVED, f"hook {name} was removed")

    async def test(self, name: str, call: HookCall) -> HookResult:
        """Really run one hook, as if the moment had come. WrongStateError: it has no such point."""
        hook = await self._read(name)
        if call.point not in hook.points:
            points = " or ".join(hook.points)
            raise WrongStateError(
                f"hook {name}",
                call.point,
                points,
                f"hook {name} was not tried: it is run {points}, not {call.point}",
            )
        return await self._run_one(hook, call, hook.deadline_s)

    # --- moments -----------------------------------------------------------------------------

    async def run(self, call: HookCall, spec: DomainSpec | None = None) -> HookReport:
        """Run all hooks of this moment. Never raises but StoreError, when they can't be known: none
        was run then.

        `spec` is the domain's: its labels choose hooks, its `hook_deadline_s` goes before theirs.
        """
        hooks = [hook for hook in await self._read_all() if applies(hook, call.point, spec)]
        if not hooks:
            return HookReport()
        own_s = spec.hook_deadline_s if spec is not None else None
        results = await asyncio.gather(
            *(self._run_one(hook, call, own_s or hook.deadline_s) for hook in hooks)
        )
        forbidden = [
            f"hook {hook.name}: {result.detail}"
            for hook, result in zip(hooks, results, strict=True)
            if not result.succeeded
            and hook.on_failure is HookFailure.CANCEL
            and call.point.may_forbid
        ]
        return HookReport(results=tuple(results), forbidden="; ".join(forbidden) or None)

    async def _run_one(self, hook: HookSpec, call: HookCall, deadline_s: float) -> HookResult:
        started_s = time.monotonic()
        extra_s = hook.action.more_time_s_max if isinstance(hook.action, WebhookHook) else 0.0
        driver = self._drivers[type(hook.action)]
        try:
            async with asyncio.timeout(deadline_s + extra_s):
                detail = await driver.run(hook.action, call, deadline_s=deadline_s)
            succeeded = True
        except TimeoutError:
            succeeded, detail = False, f"not done within {deadline_s:g} s"
        except HookError as error:
            succeeded, detail = False, str(error)
        except Exception as error:  # A driver's bug must not strand a migration.
            log.exception("hook %s", hook.name)
            succeeded, detail = False, f"internal error: {error!r}"
        seconds = time.monotonic() - started_s
        about = call.domain or f"node {call.node}"
        if not succeeded:
            self._events.emit(
                EventKind.HOOK_FAILED,
                f"hook {hook.name} failed {call.point} of {about}: {detail}",
                domain=call.domain,
                migration=call.migration,
            )
        return HookResult(
            hook=hook.name, point=call.point, succeeded=succeeded, seconds=seconds, detail=detail
        )

    async def _read(self, name: str) -> HookSpec:
        entry = await self._store.get(f"{HOOKS}{name}", HookSpec)
        if entry is None:
            raise NotFoundError(f"there is no hook {name}")
        return entry.value

    async def _read_all(self) -> Sequence[HookSpec]:
        return [entry.value for entry in await self._store.list_prefix(HOOKS, HookSpec)]


def applies(hook: HookSpec, point: HookPoint, spec: DomainSpec | None) -> bool:
    """Whether a hook is run at this moment, for this domain (None: the moment is a node's)."""
    if point not in hook.points:
        return False
    if spec is None:
        return True
    if hook.domains and spec.name not in hook.domains:
        return False
    if hook.label is not None:
        key, _, value = hook.label.partition("=")
        return spec.labels.get(key) == value
    return True


def check_hook(spec: HookSpec) -> None:
    """What the types alone can't say. InvalidRequest names every wrong field."""
    fields: dict[str, str] = {}
    if spec.name in _RESERVED:
        fields["name"] = f"another name than {spec.name}, which the API needs itself"
    if spec.label is not None and "=" not in spec.label:
        fields["label"] = "KEY=VALUE"
    if isinstance(spec.action, CommandHook) and not spec.action.argv[0].startswith("/"):
        fields["action.argv[0]"] = "the absolute path of a program"
    if isinstance(spec.action, HaproxyHook):
        for node, address in spec.action.addresses.items():
            host, _, port = address.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                fields[f"action.addresses.{node}"] = "ADDRESS:PORT"
    if fields:
        wrong = "; ".join(f"{name} must be {right}" for name, right in fields.items())
        raise InvalidRequest(f"hook {spec.name} can't be added: {wrong}", fields)
