"""Which state of a migration may follow which: one table a role, and the diagram made from it.

`python -m migrator.states` prints the diagrams as they stand in ARCHITECTURE.md.
"""

from __future__ import annotations

from typing import Final

from migrator.errors import LocalProtocolError
from migrator.model import ENDED, MigrationState, Role

_S = MigrationState

SOURCE: Final[dict[MigrationState, frozenset[MigrationState]]] = {
    _S.CREATED: frozenset({_S.SETUP, _S.CANCELLED, _S.FAILED, _S.RECOVERING}),
    _S.SETUP: frozenset({_S.PRECOPY, _S.CANCELLING}),
    _S.PRECOPY: frozenset({_S.SWITCHOVER, _S.CANCELLING}),
    _S.SWITCHOVER: frozenset({_S.HANDOFF, _S.CANCELLING}),
    _S.HANDOFF: frozenset({_S.POSTCOPY, _S.COMPLETED, _S.RECOVERING, _S.FAILED}),
    # The guest runs at the destination, which gets the rest of its pages from here. No way back.
    _S.POSTCOPY: frozenset({_S.COMPLETED, _S.FAILED}),
    # Too late to cancel where the device state went out first: then the record decides.
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.FAILED, _S.RECOVERING}),
    _S.RECOVERING: frozenset({_S.POSTCOPY, _S.COMPLETED, _S.CANCELLED, _S.FAILED, _S.CANCELLING}),
    _S.COMPLETED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.FAILED: frozenset(),
}

DESTINATION: Final[dict[MigrationState, frozenset[MigrationState]]] = {
    _S.CREATED: frozenset({_S.SETUP, _S.RECOVERING}),
    _S.SETUP: frozenset({_S.PRECOPY, _S.CANCELLING}),
    _S.PRECOPY: frozenset({_S.SWITCHOVER, _S.CANCELLING}),
    # The device state is loaded, or the source allows the handoff; both are needed.
    # Loaded without a word from the source for long: the record decides, no timeout.
    _S.SWITCHOVER: frozenset({_S.HANDOFF, _S.CANCELLING, _S.RECOVERING}),
    _S.HANDOFF: frozenset({_S.POSTCOPY, _S.COMPLETED, _S.RECOVERING, _S.CANCELLING, _S.FAILED}),
    _S.POSTCOPY: frozenset({_S.COMPLETED, _S.FAILED}),
    _S.RECOVERING: frozenset({_S.POSTCOPY, _S.COMPLETED, _S.HANDOFF, _S.CANCELLING, _S.FAILED}),
    _S.CANCELLING: frozenset({_S.CANCELLED, _S.FAILED}),
    _S.COMPLETED: frozenset(),
    _S.CANCELLED: frozenset(),
    _S.FAILED: frozenset(),
}

BEFORE_HANDOFF: Final = frozenset({_S.SETUP, _S.PRECOPY, _S.SWITCHOVER})
"""Begun, and Commit is neither sent nor acted upon yet."""

TABLES: Final = {Role.SOURCE: SOURCE, Role.DESTINATION: DESTINATION}


def check_transition(role: Role, old: MigrationState, new: MigrationState) -> None:
    """LocalProtocolError if the table doesn't have it: a bug of ours, nothing was changed."""
    if new not in TABLES[role][old]:
        raise LocalProtocolError(f"{role} session: {old} may not become {new}")


def diagram(role: Role) -> str:
    """The table of `role` as a Mermaid state diagram."""
    table = TABLES[role]
    lines = ["stateDiagram-v2", "    [*] --> created"]
    lines += [f"    {old} --> {new}" for old, news in table.items() for new in sorted(news)]
    lines += [f"    {state} --> [*]" for state in table if state in ENDED]
    return "\n".join(lines)


if __name__ == "__main__":
    for each in Role:
        print(f"{each}\n\n{diagram(each)}\n")
