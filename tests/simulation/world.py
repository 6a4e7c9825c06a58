"""The simulated world: time, chance, and a transcript; one seed drives everything.

Everything that takes time is an entry in one heap, ordered by (time, sequence number); every choice
comes from one random generator. So a seed replays to the letter. The agents' asyncio code runs on
the same heap (`loop`).

    scenario    a seed's faults, its cluster, what its operators do, the verdict
    stories     what operators do: migrations, starts and stops, takeovers
    restores    a store that is restored from an older snapshot, and operators who say what is
    faults      what goes wrong by itself
    cluster     nodes, domains, store, storage, network
    node        a node: agent, journal, clock; crashes and reboots
    disk        a node's local disk, with its journal
    agent       an agent's production parts (domains, ownership, recovery) on simulated drivers
    side        a node's side of one migration: the production session, its engine and timers
    effects     what each command of a session does, and when
    checkers/   the five invariants, a module each
"""

from __future__ import annotations

import asyncio
import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from tests.simulation.loop import SimulatedLoop

STEPS_MAX = 150_000
"""The busiest seeds take about 20,000."""


class InvariantViolation(AssertionError):
    """One of the five invariants (`checkers`) doesn't hold. The text begins with its number."""


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong. Shares are of 1. All faults end at `heal_at_s`; then it must recover."""

    crash_per_command: float = 0.0
    """That an agent dies right before it performs a command."""
    kill_mean_s: float = 0.0
    """Mean time between kills of something (agent, engine, hypervisor, node); 0: never."""
    hypervisor_share: float = 0.0
    reboot_share: float = 0.0
    """Shares of those kills; an engine or an agent is hit otherwise."""
    loss: float = 0.0
    duplicate: float = 0.0
    straggler: float = 0.0
    """That a message takes up to STRAGGLER_S."""
    delay_s_max: float = 0.002
    partition_mean_s: float = 0.0
    """Mean length of partitions (each of one or both directions), and of the gaps between."""
    false_alarm_mean_s: float = 0.0
    """Mean time between one-sided PeerLost, with nothing behind it."""
    store_unknown: float = 0.0
    """That the store's answer to a request is lost; whether it was applied is open."""
    store_late: float = 0.0
    """That such a request is applied only later, up to STORE_LATE_S after its sender gave up."""
    store_outage_mean_s: float = 0.0
    """Mean length of outages, of the store or of one node's way to it, and of the gaps between."""
    store_slow: float = 0.0
    """That an answer of it to a read takes up to STORE_SLOW_S: what it says may be over by then."""
    store_back_mean_s: float = 0.0
    """Mean length of times in which the store is an older copy, and takes no writes."""
    store_restored: bool = False
    """That it is restored from an older snapshot for good, while no migration is under way."""
    restored_after_s_max: float = 8.0
    """For how long that may have been taken before, and a second more."""
    storage_stall_mean_s: float = 0.0
    """Mean length of times in which the storage, or one node's way to it, answers nobody."""
    command_failure: float = 0.0
    journal_failure: float = 0.0
    disk_hang: float = 0.0
    """That a node's disk hangs from a write to its journal on, for up to `disk_hang_s_max`."""
    disk_hang_s_max: float = 20.0
    fence_failure: float = 0.0
    resume_failure: float = 0.0
    death_before_resume: float = 0.0
    """That a hypervisor dies right before its `cont`, which is then certain to have run nothing."""
    hang: float = 0.0
    """That a hypervisor's monitor is stuck for up to HANG_S before a command."""
    stall: float = 0.0
    """That a pass takes up to STALL_S, or the device state a second."""
    aimed: float = 0.0
    """That something is killed within AIM_S after a session came to the switchover or beyond."""
    paused: float = 0.0
    """That an agent is stopped (SIGSTOP) within AIM_S after a session came to the switchover or
    beyond, for up to PAUSED_S; then it goes on, and hears all that it was told meanwhile."""
    forgetful: bool = False
    """Destinations forget a migration as soon as it has ended; else they forget none."""
    long_down: float = 0.0
    """That a dead agent stays down for up to LONG_DOWN_S."""
    takeover: bool = False
    """Operators take domains of silent nodes over."""
    drift: float = 0.0
    """By how much a node's clock goes fast or slow, at most."""
    diverging: bool = False
    """The guest dirties more than passes send."""
    heal_at_s: float = 30.0


STRAGGLER_S = 10.0
STORE_LATE_S = 8.0
STORE_SLOW_S = 2.0
HANG_S = 4.0
STALL_S = 6.0
AIM_S = 0.02
LONG_DOWN_S = 100.0
PAUSED_S = (1.0, 10.0, 60.0)


class World:
    """See the module."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.seed = seed
        self.faults = faults
        self.random = random.Random(seed)
        self.now_s = 1000.0
        self.started_at_s = self.now_s
        self.stopped = False
        self.transcript_entries: list[tuple[float, str, tuple[object, ...]]] = []
        self.loop = SimulatedLoop(lambda: self.now_s, self._push)
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0

    # --- time and chance ---

    @property
    def elapsed_s(self) -> float:
        return self.now_s - self.started_at_s

    @property
    def healed(self) -> bool:
        return self.now_s - self.started_at_s >= self.faults.heal_at_s

    def chance(self, share: float) -> bool:
        return share > 0.0 and not self.healed and self.random.random() < share

    def delay(self, most_s: float) -> float:
        return self.random.random() * most_s

    def around(self, mean_s: float) -> float:
        return self.random.expovariate(1.0 / mean_s)

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._push(self.now_s + seconds, action)

    def _push(self, at_s: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, (max(at_s, self.now_s), self._sequence, action))

    def run(self, until_s: float) -> None:
        """Run what is due up to `until_s` after the start, or until `stopped`."""
        limit = self.started_at_s + until_s
        heap, loop = self._heap, self.loop
        steps = 0
        asyncio._set_running_loop(loop)
        try:
            loop.run_ready()
            while heap and heap[0][0] <= limit and not self.stopped:
                self.now_s, _, action = heapq.heappop(heap)
                action()
                if loop.ready:
                    loop.run_ready()
                if loop.failures:
                    raise loop.failures[0]
                steps += 1
                if steps > STEPS_MAX:
                    raise InvariantViolation(f"5: no rest: {steps} steps, and busy with itself")
        finally:
            asyncio._set_running_loop(None)

    def wind_up(self) -> None:
        """End every task that is left, so that nothing of this world outlives it."""
        loop, heap = self.loop, self._heap
        asyncio._set_running_loop(loop)
        loop.all_go_on()
        try:
            for _ in range(100):  # Cleaning up may make tasks; each is ended in its turn.
                tasks = asyncio.all_tasks(loop)
                if not tasks:
                    break
                for task in tasks:
                    task.cancel()
                loop.run_ready()
        finally:
            asyncio._set_running_loop(None)
            heap.clear()
            loop.ready.clear()
            loop.failures.clear()

    # --- the transcript, formatted only if somebody reads it ---

    def log(self, text: str, *values: object) -> None:
        self.transcript_entries.append((self.now_s, text, values))

    def transcript(self) -> list[str]:
        return [
            f"{at_s - self.started_at_s:10.4f}  {text.format(*map(_short, values))}"
            for at_s, text, values in self.transcript_entries
        ]


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 160 else text[:157] + "..."
