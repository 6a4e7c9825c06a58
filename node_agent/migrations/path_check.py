"""Before a migration: does the guests' network carry the NICs' MTU between the two nodes?

source ── hear(token) ──► destination listens
       ── a short and a full frame, by the guests' network, until that has answered ──►
       ◄── what came; or, behind routers, where it can be asked, and the source asks by ICMP echo

What was wide enough a moment ago is taken to be so: a drain sends many guests the same way. What
was wide enough some minutes ago may begin at once, and is measured again while its pages travel:
its guest doesn't leave before that is known (`renew`, `renewed`).
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import secrets
import time
from collections.abc import Callable
from typing import Final

from migrator.errors import FabricError, FerryError
from migrator.model import DomainSpec, NicSpec, NodeName
from migrator.ports import FabricDriver, Struct, WidthReport
from node_agent.peers.hub import PeerHub

log = logging.getLogger(__name__)

HEAR: Final = "network.hear"
LISTEN_S: Final = 0.5
AGAIN_S: Final = 0.02
TOKEN_BYTES: Final = 8
KNOWN_S: Final = 5.0
"""Long enough for a drain's domains, short enough for whoever has just changed a switch."""
BEGIN_S: Final = 600.0
"""Long enough for whoever moves guests to and fro. Measuring takes 30 to 40 ms of a migration."""
KNOWN_MAX: Final = 1_000
_CALL_S: Final = 2.0


class HearParams(Struct, frozen=True, kw_only=True):
    nic: NicSpec
    token: bytes
    timeout_s: float


class PathCheck:
    """Asks as a source, and listens as a destination. `register` before the hub starts."""

    def __init__(
        self,
        hub: PeerHub,
        fabric: FabricDriver,
        *,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self._hub = hub
        self._fabric = fabric
        self._monotonic = monotonic
        self._wide_at: dict[tuple[NodeName, str, int | None, int], float] = {}
        self._renewals: dict[str, asyncio.Task[list[str]]] = {}

    def register(self) -> None:
        """Serve the other nodes' calls."""
        self._hub.handle(HEAR, HearParams, self._on_hear)

    async def close(self) -> None:
        """End what is being measured."""
        tasks = list(self._renewals.values())
        self._renewals.clear()
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def reasons(
        self, spec: DomainSpec, destination: NodeName, known_s: float = KNOWN_S
    ) -> list[str]:
        """Why its NICs would find too narrow a network there; takes twice LISTEN_S at most.

        `known_s`: what was wide enough as long ago as that isn't measured again. Empty also where
        it can't be told: that is no reason against a migration.
        """
        kinds = {(nic.bridge, nic.vlan, nic.mtu_bytes): nic for nic in spec.nics}
        found = await asyncio.gather(
            *(self._reason(nic, destination, known_s) for nic in kinds.values())
        )
        return [reason for reason in found if reason is not None]

    def renew(self, migration_id: str, spec: DomainSpec, destination: NodeName) -> None:
        """A migration began: measure again what `reasons` took to be so for BEGIN_S."""
        if migration_id not in self._renewals:
            self._renewals[migration_id] = asyncio.create_task(
                self.reasons(spec, destination), name=f"path-{migration_id}"
            )

    async def renewed(
        self, migration_id: str, spec: DomainSpec, destination: NodeName
    ) -> list[str]:
        """What that has found, when it has. An agent that restarted meanwhile measures now."""
        self.renew(migration_id, spec, destination)
        return await asyncio.shield(self._renewals[migration_id])

    async def forget(self, migration_id: str) -> None:
        """The migration ended."""
        task = self._renewals.pop(migration_id, None)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _reason(self, nic: NicSpec, destination: NodeName, known_s: float) -> str | None:
        way = (destination, nic.bridge, nic.vlan, nic.mtu_bytes)
        known_at = self._wide_at.get(way)
        if known_at is not None and self._monotonic() - known_at < known_s:
            return None
        token = secrets.token_bytes(TOKEN_BYTES)
        params = HearParams(nic=nic, token=token, timeout_s=LISTEN_S)
        sending = asyncio.create_task(self._send(nic, token))
        try:
            report = await self._hub.call(
                destination, HEAR, params, WidthReport, timeout_s=LISTEN_S + _CALL_S
            )
            if report.cut_off:
                self._wide_at.pop(way, None)
                return (
                    f"the network of bridge {nic.bridge} leads nowhere from {destination}:"
                    f" {report.cut_off}; `ferry doctor` there says more"
                )
            routed = bool(report.hops)
            if routed:
                report = await self._fabric.measure_width(nic, report.hops, LISTEN_S)
            if report.full and not routed:  # There nobody listens: it is quickly asked again.
                while len(self._wide_at) >= KNOWN_MAX:
                    del self._wide_at[next(iter(self._wide_at))]
                self._wide_at[way] = self._monotonic()
            if report.full or not report.short:
                return None
            self._wide_at.pop(way, None)
            why = ""
            if sending.done() and not sending.cancelled() and sending.exception() is not None:
                why = f" ({sending.exception()})"
            return (
                f"the network of bridge {nic.bridge} doesn't carry frames of {nic.mtu_bytes} bytes"
                f" to {destination}, which NIC {nic.mac} may send; short ones pass{why}"
            )
        except FerryError as error:
            log.info("the way to %s wasn't measured: %s", destination, error)
            return None
        finally:
            sending.cancel()
            with contextlib.suppress(asyncio.CancelledError, FabricError):
                await sending

    async def _send(self, nic: NicSpec, token: bytes) -> None:
        for _ in range(int(LISTEN_S / AGAIN_S)):
            await self._fabric.send_wide(nic, token)
            await asyncio.sleep(AGAIN_S)

    async def _on_hear(self, _: NodeName, params: HearParams) -> WidthReport:
        timeout_s = min(params.timeout_s, _CALL_S)
        return await self._fabric.hear_wide(params.nic, params.token, timeout_s)
