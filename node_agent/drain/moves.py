"""The moves of a drain, as its machine keeps them: which is next, which share each has. Pure."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Collection, Mapping
from typing import Final

import msgspec

from migrator.model import Migration, MigrationState
from node_agent.drain.resources import Drain, Move, MoveState
from node_agent.planner.model import ENGINE_BYTES_PER_S
from node_agent.planner.schedule import pick_next
from node_agent.planner.shares import share_links

STOPS_AT_ONCE: Final = 4
BANDWIDTH_MIN: Final = 65_536
"""What a migration's cap is at least."""
_SETUP: Final = frozenset({MigrationState.CREATED, MigrationState.SETUP})


class Moves:
    """See the module. `phase`s are forgotten in a crash; the moves are the drain's."""

    def __init__(self, drain: Drain) -> None:
        self._moves = {move.domain: move for move in drain.moves}
        self._phases: dict[str, MigrationState] = {}
        self._senders: dict[str, None] = {}
        """In the order in which they began to send."""
        self._unheard_s: dict[str, float] = {}
        """By domain, for how long its migration's engine has said nothing, that should."""
        self.others: tuple[Move, ...] = ()
        """Live moves that other drains make now."""

    def all(self) -> tuple[Move, ...]:
        return tuple(self._moves.values())

    def get(self, domain: str) -> Move | None:
        return self._moves.get(domain)

    def must(self, domain: str) -> Move:
        return self._moves[domain]

    def now(self, move: Move) -> Move:
        """The same move, as it stands."""
        return self._moves[move.domain]

    def put(self, move: Move) -> None:
        if not move.state.active:
            self._phases.pop(move.domain, None)
            self._senders.pop(move.domain, None)
            self._unheard_s.pop(move.domain, None)
        self._moves[move.domain] = move

    def add(self, move: Move) -> None:
        """A further one, or the same domain again."""
        self._moves[move.domain] = move

    def phase(self, domain: str) -> MigrationState | None:
        """Of its migration, as last seen."""
        return self._phases.get(domain)

    def progress(self, move: Move, migration: Migration) -> None:
        """What a migration says of itself."""
        if migration.id != move.migration:
            return
        self._phases[move.domain] = migration.state
        if migration.state not in _SETUP:
            self._senders.setdefault(move.domain)
        seen = migration.progress
        self._unheard_s.pop(move.domain, None)
        if seen.unheard_s is not None:
            self._unheard_s[move.domain] = seen.unheard_s
        self._moves[move.domain] = msgspec.structs.replace(
            self._moves[move.domain],
            bytes_sent=seen.bytes_sent,
            remaining_bytes=seen.remaining_bytes if seen.iteration else None,
            eta_s=seen.eta_s,
            blackout_ms=migration.blackout_ms,
        )

    def unheard(self) -> list[str]:
        """The engines that say nothing, in words."""
        return [f"{name}'s engine, not heard for {s:.0f} s" for name, s in self._unheard_s.items()]

    # --- which is next -----------------------------------------------------------------------

    def waiting(self) -> list[Move]:
        return [move for move in self._moves.values() if move.state is MoveState.WAITING]

    def next_to_start(
        self,
        parallel: int,
        lanes: Mapping[str, int],
        silent: Collection[str] = (),
        unheard: Collection[str] = (),
    ) -> Move | None:
        """The move that may begin now, as in `planner.schedule`; None: none may.

        `lanes`: how many may be on their way to a node at once; any number where it isn't named.
        `silent`: nodes that can't be asked to send anything now. `unheard`: nor, for a moment, be
        sent anything.
        """
        waiting = [
            move
            for move in self.waiting()
            if move.source not in {*silent, *unheard} and move.destination not in unheard
        ]
        waiting.sort(key=lambda move: (-move.priority, move.planned_start_s))
        active = [move for move in self._moves.values() if move.state.active]
        live = [move for move in active if move.live]
        leaving = Counter(move.source for move in live)
        stopping = Counter(move.source for move in active if move not in live)
        for source in dict.fromkeys(move.source for move in waiting):
            here = [move for move in waiting if move.source == source]
            stops = [move for move in here if not move.live]
            if stops and stopping[source] < STOPS_AT_ONCE:
                return stops[0]
            lives = [move for move in here if move.live]
            if not lives or leaving[source] >= parallel:
                continue
            found = _pick(lives, self._arriving(live), lanes)
            if found is not None:
                return lives[found]
        return None

    def _arriving(self, live: list[Move]) -> Counter[str]:
        return Counter(move.destination or "" for move in (*live, *self.others))

    # --- shares ------------------------------------------------------------------------------

    def shares(self, links: Mapping[str, float]) -> dict[str, int]:
        """Bytes a second for each live move that sends, or is about to; {}: links are unknown.

        A move that is still being set up sends nothing: its share is what it will have, while the
        others keep theirs until it begins.
        """
        live = [
            move
            for move in self._moves.values()
            if move.live
            and move.state in (MoveState.STARTING, MoveState.MOVING)
            and move.destination is not None
        ]
        if not links:
            return {}
        sending = [move for move in live if self._sends(move)]
        order = {domain: at for at, domain in enumerate(self._senders)}
        sending.sort(key=lambda move: order[move.domain])
        found = self._rates(sending, links)
        for move in live:
            if not self._sends(move):
                found[move.domain] = self._rates([*sending, move], links)[move.domain]
        return found

    def _rates(self, moves: list[Move], links: Mapping[str, float]) -> dict[str, int]:
        theirs = [move for move in self.others if move.remaining_bytes is not None]
        routes = [(move.source, move.destination or "") for move in (*moves, *theirs)]
        rates = share_links(routes, dict(links), dict(links), ENGINE_BYTES_PER_S)
        return {
            move.domain: max(int(rate), BANDWIDTH_MIN)
            for move, rate in zip(moves, rates, strict=False)  # Theirs come last.
        }

    def _sends(self, move: Move) -> bool:
        phase = self._phases.get(move.domain)
        return phase is not None and phase not in _SETUP


def _pick(lives: list[Move], arriving: Counter[str], lanes: Mapping[str, int]) -> int | None:
    """As the plan was made: `lives` leave one node, `arriving` are on their way to each node."""
    names = sorted({move.destination or "" for move in lives})
    queue = [(move.priority, names.index(move.destination or "")) for move in lives]
    return pick_next(
        queue,
        lambda index: arriving[names[index]],
        lambda index: lanes.get(names[index], sys.maxsize),
    )
