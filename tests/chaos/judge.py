"""What must be true after a fault: one copy, its memory right, no acknowledged record lost."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from deploy.guest.protocol import GuestStatus
from migrator.model import DomainState
from node_agent.cli.errors import ApiProblem, Unreachable
from tests.chaos.faults import Stage
from tests.integration.cluster.world import Guest

HEAL_LIMIT_S: Final = 60.0
"""The longest that is waited for; the table says what was slower than the promise."""
PROMISE_S: Final = 15.0
BOOT_S: Final = 120.0
"""How long a guest that was started again may take to boot, emulated and on a busy machine."""
_POLL_S: Final = 0.1
WITNESS: Final = "n3"


@dataclass(frozen=True, slots=True)
class Before:
    """What the guest had acknowledged before the fault."""

    boot_id: str
    sequence: int


@dataclass(frozen=True, slots=True)
class Verdict:
    outcome: str
    """Where it runs, in words of the table: `source`, `destination`, or what is wrong."""
    heal_s: float
    violations: tuple[str, ...]


def before(stage: Stage) -> Before:
    status = stage.guest.status()
    return Before(boot_id=status.boot_id, sequence=status.disk_last_sequence)


def judge(stage: Stage, migration: str, was: Before, over_s: float, *, lost: bool) -> Verdict:
    """Wait until the cluster is whole again, then check it. `over_s`: when the fault was over.

    `lost`: the fault may have destroyed the only copy of the guest's memory.
    """
    deadline = time.monotonic() + HEAL_LIMIT_S + (BOOT_S if lost else 0.0)
    missing = "it hasn't been looked at"
    running_s: float | None = None
    while time.monotonic() < deadline:
        missing = _not_running(stage, migration)
        if missing:
            running_s = None
        else:
            running_s = running_s or time.monotonic()
            missing = _not_answering(stage)
        if not missing or (lost and time.monotonic() > over_s + PROMISE_S and _is_stopped(stage)):
            break
        time.sleep(_POLL_S)
    heal_s = time.monotonic() - over_s
    if missing:
        outcome = "stopped" if _is_stopped(stage) else "not healed"
        blame = f"{missing}, {heal_s:.0f} s after the fault"
        if outcome == "stopped" and lost:
            blame = "its memory was lost with its hypervisor, and nobody started it again"
        return Verdict(outcome, heal_s, (blame,))
    at = stage.guest.node
    where = "source" if at == stage.source else "destination"
    status = answers(stage.guest)
    if lost and running_s is not None and status is not None and status.boot_id != was.boot_id:
        # A guest's boot takes as long as it takes; started again is healed.
        where, heal_s = "restarted", running_s - over_s
    return Verdict(where, heal_s, tuple(_violations(stage, was, lost=lost)))


def _not_running(stage: Stage, migration: str) -> str:
    """What isn't whole yet; "" if it runs, once."""
    try:
        found = stage.cluster.migration(migration, WITNESS)
        if not found.ended:
            return f"the migration is {found.state}"
        domain = stage.cluster.domain(stage.guest.name, WITNESS)
        if domain.state is not DomainState.RUNNING:
            return f"the domain is {domain.state} ({domain.reason})"
        copies = stage.guest.copies()
        if copies != [domain.node]:
            return f"it should run on {domain.node}, and has copies on {copies}"
        return ""
    except (ApiProblem, Unreachable, AssertionError) as error:
        return str(error) or type(error).__name__


def _not_answering(stage: Stage) -> str:
    status = answers(stage.guest)
    if status is None:
        return "the guest doesn't answer"
    return "" if status.ready else "the guest isn't ready"


def _is_stopped(stage: Stage) -> bool:
    try:
        domain = stage.cluster.domain(stage.guest.name, WITNESS)
    except (ApiProblem, Unreachable):
        return False
    return domain.state is DomainState.STOPPED


def _violations(stage: Stage, was: Before, *, lost: bool) -> Sequence[str]:
    found = []
    status = _verified(stage)
    if status is None:
        return ["the guest answered, and then didn't"]
    if status.corruptions:
        found.append(f"{status.corruptions} corruptions of memory or disk")
    if status.boot_id != was.boot_id and not lost:
        found.append("the guest has booted again, though no hypervisor was killed")
    if status.disk_last_sequence < was.sequence:
        found.append(f"records {status.disk_last_sequence + 1} to {was.sequence} are lost")
    if not _writes_on(stage, status.disk_last_sequence):
        found.append("the guest doesn't write to its disk any more")
    report = stage.guest.report()
    found += [*report.corruptions, *report.errors]
    return found


def _verified(stage: Stage) -> GuestStatus | None:
    """The guest's word after it has looked at every page and record."""
    for _ in range(5):
        status = _status(stage, "/verify")
        if status is not None:
            return status
    return None


def _writes_on(stage: Stage, sequence: int) -> bool:
    deadline = time.monotonic() + PROMISE_S
    while time.monotonic() < deadline:
        status = _status(stage)
        if status is not None and status.disk_last_sequence > sequence:
            return True
        time.sleep(_POLL_S)
    return False


def answers(guest: Guest) -> GuestStatus | None:
    """Its counters; None: it doesn't answer."""
    return _ask(guest, "/status")


def _status(stage: Stage, target: str = "/status") -> GuestStatus | None:
    return _ask(stage.guest, target)


def _ask(guest: Guest, target: str) -> GuestStatus | None:
    try:
        return guest.status(target)
    except (OSError, AssertionError, msgspec.DecodeError, ValueError):
        return None
