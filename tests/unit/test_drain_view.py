"""What a watched drain looks like: never done before it is, and honest about what stays."""

from __future__ import annotations

import time
from collections.abc import Callable

import msgspec
import pytest
from rich.console import Console

from migrator.placement import MaintenancePolicy
from node_agent.cli import drain_view
from node_agent.cli.drain import _cancelling
from node_agent.cli.drain_text import moved, outcome, sentence
from node_agent.cli.drain_view import _done_whole, _picture, _whole
from node_agent.cli.errors import ApiProblem, ExitCode, Unreachable
from node_agent.cli.output import settings
from node_agent.drain.resources import Drain, DrainState, Move, MoveState, Operation
from node_agent.resources import Problem


def drain(*moves: Move, state: DrainState = DrainState.RUNNING) -> Drain:
    now = time.time()
    return Drain(
        id="d1",
        operation=Operation.DRAIN,
        node="n1",
        state=state,
        created_at_s=now - 10.0,
        started_at_s=now - 10.0,
        moves=moves,
        planned_s=20.0,
    )


def move(name: str, state: MoveState, **changes: object) -> Move:
    values = {"source": "n1", "destination": "n2", "wire_bytes": 100, "state": state} | changes
    return Move(domain=name, **values)  # type: ignore[arg-type]


def seen(found: Drain) -> str:
    console = Console(width=120, record=True, file=None, force_terminal=False)
    with console.capture() as captured:
        console.print(_picture(found))
    return captured.get()


def test_half_is_half_and_the_end_is_never_told_early() -> None:
    half = drain(
        move("a", MoveState.MOVED),
        move("b", MoveState.MOVING, bytes_sent=50, remaining_bytes=0, eta_s=1.0),
    )
    assert 0.9 < _done_whole(half) < 1.0, "its last page is sent, and it isn't over"
    halves = drain(move("a", MoveState.MOVED), move("b", MoveState.WAITING))
    assert _done_whole(halves) == 0.5
    told = msgspec.structs.replace(halves, left_s=10.0)
    assert "1 of 2 over, 10 s gone, ~10 s left (plan: 20.0 s)" in _whole(told)
    late = _whole(msgspec.structs.replace(halves, left_s=20.0))
    assert "~20 s left (plan: 20.0 s, expected by now: 30 s)" in late
    now_s = halves.started_at_s + 20.0
    alone = msgspec.structs.replace(told, at_s=now_s, unattended_s=76.0)
    assert "96 s gone, 76 s of it without a coordinator, ~10 s left" in _whole(alone)
    checking = drain(move("a", MoveState.MOVED), state=DrainState.CHECKING)
    assert "looking whether the node is empty" in _whole(checking)
    assert _done_whole(checking) < 1.0


def test_what_stays_counts_as_neither_done_nor_to_do() -> None:
    cancelled = drain(
        move("a", MoveState.MOVING, bytes_sent=50, remaining_bytes=50),
        move("b", MoveState.LEFT, error="the drain was cancelled"),
        move("c", MoveState.FAILED, error="no node can take it"),
        state=DrainState.CANCELLING,
    )
    assert _done_whole(cancelled) == 0.5
    cancelled = msgspec.structs.replace(cancelled, left_s=4.0, waits_for="moves under way")
    assert "2 of 3 over, 10 s gone, ~4 s left; no move begins any more" in _whole(cancelled)
    text = seen(cancelled)
    assert text.index("a  ") < text.index("b  "), "what moves stands first"
    assert "waits for moves under way" in text
    assert "`ferry drains cancel d1` stops it" in text
    assert "the drain was cancelled" in text and "no node can take it" in text


def test_a_large_drain_shows_its_most_interesting_moves() -> None:
    many = [move(f"w{number}", MoveState.WAITING) for number in range(50)]
    text = seen(drain(*many, move("busy", MoveState.MOVING, bandwidth_bytes_per_s=1 << 20)))
    assert "busy" in text and "1.0 MiB/s" in text
    assert "and 21 more" in text


def test_what_was_left_isnt_counted_as_moved() -> None:
    partial = drain(
        move("a", MoveState.MOVED),
        move("b", MoveState.LEFT, error="the time was over"),
        state=DrainState.PARTIAL,
    )
    assert moved(partial) == 1
    assert "1 of 2 domains" in outcome(partial)
    assert "`ferry drain n1` once more takes the rest" in outcome(partial)


def test_a_detached_balance_names_a_way_to_cancel_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It has no node that a `ferry drain NODE --cancel` could name."""

    def interrupt(now: Drain) -> Drain:
        raise KeyboardInterrupt

    monkeypatch.setattr(drain_view, "_watch_lines", interrupt)
    balance = msgspec.structs.replace(drain(), operation=Operation.BALANCE, node="")
    assert drain_view.watch_drain(balance) == ExitCode.INTERRUPTED
    assert "`ferry drains cancel d1`" in "".join(capsys.readouterr())
    assert _cancelling(balance) == "balance d1 is being cancelled"
    ended = msgspec.structs.replace(balance, state=DrainState.DONE)
    assert outcome(ended) == "the nodes are even enough; nothing was moved"


def test_a_domain_that_was_left_is_not_told_to_be_off() -> None:
    left = move("a", MoveState.LEFT, source="", error="no node can take it")
    assert sentence(left) == "a: left: no node can take it"


def test_what_a_place_is_looked_for_is_not_told_to_be_off() -> None:
    seeking = move("a", MoveState.SEEKING, destination=None)
    assert sentence(seeking) == "a: n1 -> ?: seeking"
    stopped = move("a", MoveState.STOPPED, destination=None, policy=MaintenancePolicy.STOP)
    assert sentence(stopped) == "a: n1 -> off: stopped"


def test_an_empty_node_is_no_success_where_a_domain_was_started_nowhere() -> None:
    lost = move("a", MoveState.FAILED, error="it is powered off", powered_off=True)
    done = drain(move("b", MoveState.MOVED), lost, state=DrainState.DONE)
    assert drain_view._exit_code(done) is ExitCode.DRAIN_PARTIAL
    assert "a (failed): it is powered off" in outcome(done)
    assert drain_view._exit_code(drain(state=DrainState.DONE)) is ExitCode.OK


def test_plain_lines_tell_what_is_waited_for_once_not_each_second(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = [drain(), *(_waits(second) for second in range(3)), drain(state=DrainState.DONE)]

    def play(_: Drain, saw: Callable[[Drain], None]) -> Drain:
        for each in seen:
            saw(each)
        return seen[-1]

    monkeypatch.setattr(drain_view, "_until_ended", play)
    drain_view._watch_lines(seen[0])
    told = "".join(capsys.readouterr())
    assert told.count("waits for the hooks of node-draining") == 1
    assert told.count("`ferry drains cancel d1` stops it") == 1


def _waits(second: int) -> Drain:
    waits_for = f"the hooks of node-draining, for {second} s now"
    return msgspec.structs.replace(drain(), waits_for=waits_for)


def test_a_cancelled_drain_says_how_to_get_back_what_has_moved() -> None:
    state = DrainState.CANCELLED
    some = drain(move("a", MoveState.MOVED), move("b", MoveState.LEFT), state=state)
    assert "`ferry undrain n1` brings back what has moved" in outcome(some)
    assert "undrain" not in outcome(drain(move("b", MoveState.LEFT), state=state))


def test_a_watched_agent_that_gives_no_answer_is_told_of(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The last line was shown again and again, as if it were news."""
    answers: list[Drain | Exception] = [Unreachable("refused"), drain(state=DrainState.DONE)]

    class Client:
        def get(self, _path: str, _kind: type[Drain]) -> Drain:
            answer = answers.pop(0)
            if isinstance(answer, Exception):
                raise answer
            return answer

    monkeypatch.setattr(type(settings), "client", lambda _: Client())
    monkeypatch.setattr(drain_view, "POLL_S", 0.0)
    seen: list[str] = []
    drain_view._until_ended(drain(), lambda now: seen.append(now.waits_for))
    assert seen == ["", "an answer, for 60 s more: refused; it may well go on", ""]


def test_a_token_that_ends_while_a_drain_is_watched_doesnt_end_the_drain(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expired, gone = (
        ApiProblem(Problem(type="x", title="x", status=status, detail="no", code="x"))
        for status in (401, 404)
    )
    answers = [expired, gone]

    class Client:
        def get(self, _path: str, _kind: type[Drain]) -> Drain:
            raise answers.pop(0)

    monkeypatch.setattr(type(settings), "client", lambda _: Client())
    monkeypatch.setattr(drain_view, "POLL_S", 0.0)
    with pytest.raises(ApiProblem, match=r"^no; drain d1 goes on unseen$"):
        drain_view._until_ended(drain(), lambda _: None)
    with pytest.raises(ApiProblem, match=r"^no$"):
        drain_view._until_ended(drain(), lambda _: None)
