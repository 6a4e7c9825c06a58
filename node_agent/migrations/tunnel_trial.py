"""Before frames are diverted: does the tunnel between a migration's two nodes pass any?

    destination                                   source
      │ (setup) its end is made, and listens        (setup) its end is made
      │ try ─────────────────────────────────────► a short and a full frame into each NIC's tunnel
      │ ◄───────────────────────────────────────── for which NICs
      │ what came? again, with growing gaps, until all has
      │ ◄─────────────────────────────────── expect
      │ what came of how many ─────────────────────► diverts, or doesn't, and says why

All of it beside the set-up and the pre-copy. A node that doesn't know the question, or hasn't asked
it often enough by then, leaves it open: then frames are diverted as if nobody had asked.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import logging
from collections.abc import Callable, Sequence
from typing import Final

from migrator.errors import FerryError
from migrator.model import DomainName, NodeName
from migrator.ports import FabricDriver, Struct, Tunnel, TunnelReport
from node_agent.migrations.witnesses import Move
from node_agent.peers.hub import PeerHub

log = logging.getLogger(__name__)

TRY: Final = "network.try"
GAPS_S: Final = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.4)
TRIES_MIN: Final = 4
"""So many tries of which nothing came out are no accident."""
VERDICT_S: Final = 0.25
"""Of a very short pre-copy, the pause waits so long for what a trial finds."""
_CALL_S: Final = 1.0


class TryParams(Struct, frozen=True, kw_only=True):
    migration_id: str
    domain: DomainName


class Tried(Struct, frozen=True, kw_only=True):
    sent: tuple[bool, ...] = ()
    """NIC by NIC; nothing: the source has no ends yet, or none any more."""


class TunnelTrial(Struct, frozen=True, kw_only=True):
    """What the destination found out about one NIC's tunnel."""

    tries: int = 0
    report: TunnelReport = TunnelReport()


class Passage(enum.Enum):
    """What a tunnel does with frames."""

    UNKNOWN = "unknown"
    PASSES = "passes"
    NARROW = "passes short ones alone"
    BLOCKED = "passes none"
    MISSING = "has no end at the destination"


def passage(trial: TunnelTrial) -> Passage:
    """Pure."""
    if not trial.report.made:
        return Passage.MISSING
    if trial.report.full:
        return Passage.PASSES
    if trial.tries < TRIES_MIN:
        return Passage.UNKNOWN
    return Passage.NARROW if trial.report.short else Passage.BLOCKED


def closed(trials: Sequence[TunnelTrial]) -> frozenset[int]:
    """The NICs, by index, whose frames must not be diverted. Pure."""
    never = (Passage.BLOCKED, Passage.MISSING)
    return frozenset(index for index, each in enumerate(trials) if passage(each) in never)


def complaint(move: Move, trials: Sequence[TunnelTrial], tunnel: Tunnel) -> str | None:
    """What isn't forwarded, why most likely, and what would help; None: nothing is wrong. Pure."""
    found = [
        f"NIC {nic.mac}: {_suspect(move, trial, tunnel)}"
        for nic, trial in zip(move.nics, trials, strict=False)
        if passage(trial) not in (Passage.PASSES, Passage.UNKNOWN)
    ]
    return "; ".join(found) or None


def _suspect(move: Move, trial: TunnelTrial, tunnel: Tunnel) -> str:
    way = f"UDP port {tunnel.port} from {tunnel.local} to {tunnel.remote}"
    match passage(trial):
        case Passage.MISSING:
            return f"{move.destination} couldn't make its end of the tunnel: its log says why"
        case Passage.NARROW:
            return (
                f"full frames aren't forwarded, only short ones pass the tunnel: look for a"
                f" firewall that drops IP fragments of {way}, or widen that network by 50 bytes"
            )
        case _:
            return (
                f"nothing is forwarded, none of {2 * trial.tries} test frames came out of the"
                f" tunnel: look for a firewall on {way}, and let it pass"
            )


class Trial:
    """One that is under way, at the destination."""

    def __init__(self, move: Move) -> None:
        self.move = move
        self.tries = [0] * len(move.nics)
        self.over = asyncio.Event()


class TunnelTrials:
    """Asks as a destination, and sends as a source. `register` before the hub starts."""

    def __init__(
        self,
        hub: PeerHub,
        fabric: FabricDriver,
        *,
        departing: Callable[[DomainName], Move | None],
    ) -> None:
        """`departing`: the move for which a domain's tunnels were made here, if any."""
        self._hub = hub
        self._fabric = fabric
        self._departing = departing

    def register(self) -> None:
        """Serve the other nodes' questions."""
        self._hub.handle(TRY, TryParams, self._on_try)

    async def run(self, trial: Trial) -> None:
        """After the destination's ends were made. Bounded; never fails."""
        move = trial.move
        params = TryParams(migration_id=move.migration_id, domain=move.domain)
        try:
            for gap_s in GAPS_S:
                await asyncio.sleep(gap_s)
                tried = await self._hub.call(move.source, TRY, params, Tried, timeout_s=_CALL_S)
                for index, sent in enumerate(tried.sent[: len(trial.tries)]):
                    trial.tries[index] += sent
                trials = await self._trials(trial)
                if all(passage(each) in (Passage.PASSES, Passage.MISSING) for each in trials):
                    return
        except FerryError as error:  # It is an older agent, or away: nothing is known.
            log.info("migration %s: its tunnels weren't tried: %s", move.migration_id, error)
        finally:
            trial.over.set()

    async def verdict(self, trial: Trial | None) -> tuple[TunnelTrial, ...]:
        """What is known of each NIC's tunnel now; waits for it for VERDICT_S at most."""
        if trial is None:
            return ()
        if not trial.over.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(VERDICT_S):
                    await trial.over.wait()
        return await self._trials(trial)

    async def _trials(self, trial: Trial) -> tuple[TunnelTrial, ...]:
        reports = await self._fabric.heard_through(trial.move.domain, trial.move.nics)
        return tuple(
            TunnelTrial(tries=tries, report=report)
            for tries, report in zip(trial.tries, reports, strict=True)
        )

    async def _on_try(self, sender: NodeName, params: TryParams) -> Tried:
        move = self._departing(params.domain)
        if move is None or (move.migration_id, move.destination) != (params.migration_id, sender):
            return Tried()
        return Tried(sent=tuple(await self._fabric.send_through(move.domain, move.nics)))
