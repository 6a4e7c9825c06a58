"""A simulated cluster of two nodes and one domain, driven by one seed: time, chance, shared parts.

The sessions are the production ones (`migrator.session`), and so are the journal's entries and the
answers for ended migrations. Simulated are: hypervisors, engines, networks, the ownership store,
the volume, journals, clocks and processes. Everything that takes time is an entry in one heap,
ordered by (time, sequence number); every choice comes from one random generator. So a seed replays
to the letter.

    scenario   the faults of a seed, two migrations (there, and back or again), the verdict
    node       a node: the agent and its session, journal, clock; crashes and reboots
    effects    what each command does, and when
    guests     hypervisor processes, and a guest that is real enough to be corrupted
    checkers   DESIGN's invariants, looked at after every step
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass

from migrator.model import DiskSpec, DomainSpec, NodeName, OwnershipRecord, OwnershipState
from tests.simulation.guests import Guest

STEPS_MAX = 60_000
"""The busiest seeds take about 10,000."""
N1 = NodeName("n1")
N2 = NodeName("n2")
N3 = NodeName("n3")
"""Takes no part in migrations: where a silent owner's domain is started again from disk."""
SPEC = DomainSpec(name="vm", memory_bytes=64 * 1024**2, disks=(DiskSpec(volume="vm.raw"),))


class InvariantViolation(AssertionError):
    """One of DESIGN's five invariants doesn't hold. The text begins with its number."""


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
    """Mean length of outages in which nothing is known, and of a third of the gaps between."""
    command_failure: float = 0.0
    journal_failure: float = 0.0
    fence_failure: float = 0.0
    resume_failure: float = 0.0
    death_before_resume: float = 0.0
    """That a hypervisor dies right before its `cont`, which is then certain to have run nothing."""
    hang: float = 0.0
    """That a hypervisor's monitor is stuck for up to HANG_S before a command."""
    stall: float = 0.0
    """That a pass takes up to STALL_S."""
    aimed: float = 0.0
    """That something is killed within AIM_S after a session came to the switchover or beyond."""
    long_down: float = 0.0
    """That a dead agent stays down for up to LONG_DOWN_S."""
    takeover: bool = False
    """An owner that is silent for long is powered off, and the domain started elsewhere."""
    diverging: bool = False
    """The guest dirties more than passes send."""
    heal_at_s: float = 30.0


STRAGGLER_S = 10.0
STORE_LATE_S = 8.0
HANG_S = 4.0
STALL_S = 6.0
AIM_S = 0.02
LONG_DOWN_S = 100.0


@dataclass(slots=True)
class Volume:
    """Shared storage that enforces nothing: the checker looks at who wrote under which token."""

    fenced_token: int = 1
    last_writer_token: int = 1


class World:
    """See the module."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.seed = seed
        self.faults = faults
        self.random = random.Random(seed)
        self.now_s = 1000.0
        self.started_at_s = self.now_s
        self.log: Callable[..., None] = self._log
        self.volume = Volume()
        self.record = OwnershipRecord(
            domain=SPEC.name, token=1, owner=N1, state=OwnershipState.RUNNING
        )
        self.guests: dict[NodeName, Guest] = {N1: Guest.born_running(N1)}
        self.epoch = 0
        """Counts the times that vCPUs were set going: a copy of another epoch is stale."""
        self.paused_memory: list[int] | None = None
        self.cut_from: set[NodeName] = set()
        """Senders whose messages to the other agent are lost."""
        self.pages_cut = False
        self.store_down = False
        self.memory_lost: str | None = None
        """Why invariant 4 makes its exception: what died had the only whole copy."""
        self.stopped = False
        self.transcript_entries: list[tuple[float, str, tuple[object, ...]]] = []
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._sequence = 0

    # --- time and chance ---

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
        self._sequence += 1
        heapq.heappush(self._heap, (self.now_s + seconds, self._sequence, action))

    def run(self, until_s: float, *, step: Callable[[], None]) -> None:
        """Run what is due up to `until_s` after the start, or `stopped`; `step` after each."""
        limit = self.started_at_s + until_s
        heap = self._heap
        steps = 0
        while heap and heap[0][0] <= limit and not self.stopped:
            self.now_s, _, action = heapq.heappop(heap)
            action()
            step()
            steps += 1
            if steps > STEPS_MAX:
                raise InvariantViolation(f"5: no rest: {steps} steps, and busy with itself")

    # --- the transcript, formatted only if somebody reads it ---

    def _log(self, text: str, *values: object) -> None:
        self.transcript_entries.append((self.now_s, text, values))

    def transcript(self) -> list[str]:
        return [
            f"{at_s - self.started_at_s:10.4f}  {text.format(*map(_short, values))}"
            for at_s, text, values in self.transcript_entries
        ]


def _short(value: object) -> str:
    text = value if isinstance(value, str) else repr(value)
    return text if len(text) < 160 else text[:157] + "..."
