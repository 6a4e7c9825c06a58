"""A simulated cluster of two nodes and one domain, driven by one seed.

The sessions are the production ones (`migrator.session`), and so are the journal's entries and the
answers for ended migrations. Simulated are: hypervisors, engines, the agents' network, the
ownership store, the volume, clocks and processes. Everything that takes time is an entry in one
heap, ordered by (time, sequence number); every choice comes from one random generator. So a seed
replays to the letter.

The guest is real enough to be corrupted: its memory is an array of page versions that it goes on
rewriting while it runs, and it writes to its volume under the token that it was given.
"""

from __future__ import annotations

import heapq
import random
from collections.abc import Callable
from dataclasses import dataclass, field

from migrator.journal_entry import JournalEntry
from migrator.model import (
    DiskSpec,
    DomainSpec,
    NodeName,
    OwnershipRecord,
    OwnershipState,
)

PAGES = 24
STEPS_MAX = 200_000
"""A quiet run takes about 20,000."""
SOURCE = NodeName("n1")
DESTINATION = NodeName("n2")
SPEC = DomainSpec(name="vm", memory_bytes=64 * 1024**2, disks=(DiskSpec(volume="vm.raw"),))


@dataclass(frozen=True, slots=True)
class Faults:
    """What goes wrong, as rates. All faults end at `heal_at_s`; then the cluster must recover."""

    crash_per_command: float = 0.0
    """That an agent dies right before it performs a command."""
    crash_mean_s: float = 0.0
    """Mean time between kills of a random process (agent, engine or hypervisor); 0: never."""
    hypervisor_share: float = 0.0
    """Share of those kills that hit a hypervisor."""
    loss: float = 0.0
    duplicate: float = 0.0
    partition_mean_s: float = 0.0
    delay_s_max: float = 0.01
    store_unknown: float = 0.0
    """That the store's answer to a request is lost; whether it was applied is open."""
    store_late: float = 0.0
    """That such a request is applied only later, after its sender gave up on it."""
    command_failure: float = 0.0
    heal_at_s: float = 30.0


@dataclass(slots=True)
class Guest:
    """One hypervisor process. `state` is what its monitor would say."""

    node: NodeName
    token: int
    state: str
    memory: list[int]
    device_version: int = -1
    """Destination: the version of the device state that was loaded."""
    writes: int = 0
    ever_ran: bool = False


@dataclass(slots=True)
class Volume:
    """Shared storage that enforces nothing: the checker looks at who wrote under which token."""

    fenced_token: int = 1
    last_writer_token: int = 1


@dataclass(order=True, slots=True)
class _Due:
    at_s: float
    sequence: int
    action: Callable[[], None] = field(compare=False)


class InvariantViolation(AssertionError):
    """One of DESIGN's five invariants doesn't hold."""


class World:
    """Time, chance, the guest on its nodes, the store and the volume. See the module."""

    def __init__(self, seed: int, faults: Faults) -> None:
        self.seed = seed
        self.faults = faults
        self.random = random.Random(seed)
        self.now_s = 1000.0
        self.started_at_s = self.now_s
        self.transcript: list[str] = []
        self.guests: dict[NodeName, Guest] = {}
        self.volume = Volume()
        self.record: OwnershipRecord | None = OwnershipRecord(
            domain=SPEC.name, token=1, owner=SOURCE, state=OwnershipState.RUNNING
        )
        self.journals: dict[NodeName, dict[str, JournalEntry]] = {SOURCE: {}, DESTINATION: {}}
        self.cut = False
        """The network between the agents carries nothing."""
        self.memory_lost = False
        """A hypervisor with the only whole copy was killed: invariant 4 makes an exception."""
        self.paused_memory: list[int] | None = None
        self._heap: list[_Due] = []
        self._sequence = 0
        self.guests[SOURCE] = Guest(
            node=SOURCE, token=1, state="running", memory=[0] * PAGES, ever_ran=True
        )

    # --- time and chance ---

    @property
    def healed(self) -> bool:
        return self.now_s - self.started_at_s >= self.faults.heal_at_s

    def chance(self, share: float) -> bool:
        return share > 0.0 and not self.healed and self.random.random() < share

    def after(self, seconds: float, action: Callable[[], None]) -> None:
        self._sequence += 1
        heapq.heappush(self._heap, _Due(self.now_s + seconds, self._sequence, action))

    def delay(self, most_s: float) -> float:
        return self.random.random() * most_s

    def log(self, text: str) -> None:
        self.transcript.append(f"{self.now_s - self.started_at_s:10.4f}  {text}")

    def run(self, until_s: float, *, step: Callable[[], None]) -> None:
        """Run what is due up to `until_s` after the start; `step` after each action."""
        limit = self.started_at_s + until_s
        steps = 0
        while self._heap and self._heap[0].at_s <= limit:
            due = heapq.heappop(self._heap)
            self.now_s = due.at_s
            due.action()
            step()
            steps += 1
            if steps > STEPS_MAX:
                raise InvariantViolation(f"no rest: {steps} steps, the cluster is busy with itself")
        self.now_s = limit

    # --- the guest ---

    def guest_runs(self) -> None:
        """A bit of work of whatever guest runs: dirty some pages, write to the volume."""
        for guest in list(self.guests.values()):
            if guest.state != "running":
                continue
            for _ in range(self.random.randrange(4)):
                guest.memory[self.random.randrange(PAGES)] += 1
            if self.random.random() < 0.3:
                guest.writes += 1
                self.check_write(guest)
                self.volume.last_writer_token = guest.token
        self.after((2.0 if self.healed else 0.002) + self.delay(0.08), self.guest_runs)

    def check_write(self, guest: Guest) -> None:
        newest = max(self.volume.fenced_token, self.volume.last_writer_token)
        if guest.token < newest:
            raise InvariantViolation(
                f"3: {guest.node} wrote under token {guest.token}, {newest} is newer"
            )

    # --- invariants 1 and 2, after every step ---

    def check(self) -> None:
        running = [guest for guest in self.guests.values() if guest.state == "running"]
        if len(running) > 1:
            raise InvariantViolation("1: the domain runs on two nodes")
        for guest in running:
            record = self.record
            if record is None or record.owner != guest.node or record.token != guest.token:
                raise InvariantViolation(
                    f"1: {guest.node} runs under token {guest.token}, the record is {record}"
                )

    def resume(self, guest: Guest, token: int) -> None:
        """`cont`, with invariant 2 checked where a destination runs for the first time."""
        if guest.state == "running":
            return
        if guest.state == "loaded" and self.paused_memory not in (None, guest.memory):
            raise InvariantViolation("2: the destination's memory isn't the source's")
        if guest.state == "incoming":
            raise InvariantViolation("2: resumed without device state")
        guest.state = "running"
        guest.token = token
        guest.ever_ran = True
