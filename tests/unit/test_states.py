"""The state tables: what may follow what, that nothing else may, and the diagram made from them."""

from __future__ import annotations

import pytest

from migrator.errors import LocalProtocolError
from migrator.model import ENDED, MigrationState, Role
from migrator.states import TABLES, check_transition, diagram
from tests.unit.session_pair import SessionPair

_S = MigrationState
_PAIRS = [(role, old, new) for role in Role for old in _S for new in _S]


@pytest.mark.parametrize(("role", "old", "new"), _PAIRS)
def test_only_what_the_table_has_is_allowed(
    role: Role, old: MigrationState, new: MigrationState
) -> None:
    if new in TABLES[role][old]:
        check_transition(role, old, new)
        return
    with pytest.raises(LocalProtocolError) as caught:
        check_transition(role, old, new)
    assert caught.value.code == "protocol-local"
    for word in (role, old, new):
        assert str(word) in str(caught.value)


@pytest.mark.parametrize("role", Role)
def test_every_state_is_in_the_table_and_can_be_reached(role: Role) -> None:
    table = TABLES[role]
    assert set(table) == set(_S)
    reached = {_S.CREATED}
    while True:
        more = reached.union(*(table[state] for state in reached))
        if more == reached:
            break
        reached = more
    assert reached == set(_S)


@pytest.mark.parametrize("role", Role)
def test_nothing_follows_the_end_and_all_else_leads_to_it(role: Role) -> None:
    table = TABLES[role]
    for state in _S:
        assert (not table[state]) == (state in ENDED)
        assert state not in table[state]
    leads = set(ENDED)
    while True:
        more = leads | {state for state in _S if table[state] & leads}
        if more == leads:
            break
        leads = more
    assert leads == set(_S)


@pytest.mark.parametrize("role", Role)
def test_a_cancelled_switchover_never_leads_into_the_handoff(role: Role) -> None:
    """HANDOFF is the point of no return: it isn't entered from CANCELLING, nor left backwards."""
    table = TABLES[role]
    assert _S.HANDOFF not in table[_S.CANCELLING]
    for state in (_S.HANDOFF, _S.RECOVERING, _S.CANCELLING):
        assert not table[state] & {_S.CREATED, _S.SETUP, _S.PRECOPY, _S.SWITCHOVER}


@pytest.mark.parametrize("role", Role)
def test_the_diagram_has_each_transition_once(role: Role) -> None:
    lines = [line.strip() for line in diagram(role).splitlines()]
    assert lines[0] == "stateDiagram-v2"
    wanted = [f"{old} --> {new}" for old, news in TABLES[role].items() for new in news]
    wanted += ["[*] --> created", *(f"{state} --> [*]" for state in ENDED)]
    assert sorted(lines[1:]) == sorted(wanted)


def test_an_illegal_transition_changes_nothing() -> None:
    pair = SessionPair()
    pair.run_until_state(_S.PRECOPY)
    session = pair.source
    before = (session.state, list(session.timeline), session.error)
    with pytest.raises(LocalProtocolError):
        session._enter(_S.COMPLETED)
    assert (session.state, session.timeline, session.error) == before
    assert pair.run() == (_S.COMPLETED, _S.COMPLETED)  # And it goes on as if nothing was.
