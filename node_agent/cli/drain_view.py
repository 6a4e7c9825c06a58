"""Watching a drain: a live table on a terminal, plain lines elsewhere. Ctrl-C detaches.

An agent that dies is no reason to stop watching: another is asked, if the settings name one.
"""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Final
from urllib.parse import quote

import msgspec

from node_agent.cli.drain_text import goal, outcome, sentence
from node_agent.cli.errors import ApiProblem, CliError, ExitCode, Unreachable, goes_on_unseen
from node_agent.cli.output import note, settings, show, size
from node_agent.drain.resources import (
    CancelMode,
    Drain,
    DrainState,
    Move,
    MoveState,
    unattended_text,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

POLL_S: Final = 0.3
LINE_S: Final = 5.0
SILENCE_S: Final = 60.0
_EXIT: Final = {
    DrainState.DONE: ExitCode.OK,
    DrainState.PARTIAL: ExitCode.DRAIN_PARTIAL,
    DrainState.CANCELLED: ExitCode.DRAIN_CANCELLED,
}
_STAYS: Final = frozenset({MoveState.FAILED, MoveState.LEFT})
_SHOWN_MAX: Final = 30
_BAR: Final = 30
_SECONDS: Final = re.compile(r"\d+ s\b")
_AS_PLANNED: Final = 0.15
"""Within it a plan is said to be right (docs/drain.md)."""


def watch_drain(drain: Drain) -> ExitCode:
    """Show it until it has ended. The exit code says how; INTERRUPTED: the user detached."""
    live = sys.stdout.isatty() and not settings.json
    try:
        drain = _watch_live(drain) if live else _watch_lines(drain)
    except BrokenPipeError:  # Nobody reads any more, and it goes on.
        return ExitCode.INTERRUPTED
    except KeyboardInterrupt:
        note(
            f"{drain.operation} {drain.id} goes on; `ferry drains watch {drain.id}` looks at it "
            f"again, `ferry drains cancel {drain.id}` stops it"
        )
        return ExitCode.INTERRUPTED
    show(drain, outcome(drain))
    if settings.json and drain.state is not DrainState.DONE:
        print(f"ferry: {outcome(drain)}", file=sys.stderr)
    return _exit_code(drain)


def _exit_code(drain: Drain) -> ExitCode:
    """A node may be empty, and a domain that was on it started nowhere."""
    failed = any(move.state is MoveState.FAILED for move in drain.moves)
    if failed and drain.state is DrainState.DONE:
        return ExitCode.DRAIN_PARTIAL
    return _EXIT[drain.state]


def _until_ended(drain: Drain, saw: Callable[[Drain], None]) -> Drain:
    path = f"/v1/drains/{quote(drain.id, safe='')}"
    answered_at = time.monotonic()
    client = settings.client()
    while not drain.ended:
        saw(drain)
        time.sleep(POLL_S)
        try:
            drain = client.get(path, Drain)
            answered_at = time.monotonic()
        except (Unreachable, ApiProblem) as error:
            if isinstance(error, ApiProblem) and error.problem.status < 500:
                raise goes_on_unseen(error, f"{drain.operation} {drain.id}") from error
            silent_s = time.monotonic() - answered_at
            still_s = max(SILENCE_S - silent_s, 0.0)
            waits_for = f"an answer, for {still_s:.0f} s more: {error}; it may well go on"
            drain = msgspec.structs.replace(drain, waits_for=waits_for)
            if silent_s > SILENCE_S:
                raise CliError(
                    f"{error}; whether {drain.operation} {drain.id} goes on is unknown",
                    ExitCode.UNREACHABLE,
                ) from error
            try:
                client = settings.client()
            except CliError:
                continue
    saw(drain)
    return drain


def _watch_lines(drain: Drain) -> Drain:
    states: dict[str, tuple[MoveState, int]] = {}
    printed_at, waited = 0.0, ""

    def saw(now: Drain) -> None:
        nonlocal printed_at, waited
        for move in now.moves:
            mark = (move.state, move.attempts)
            if states.get(move.domain) != mark and move.state is not MoveState.WAITING:
                states[move.domain] = mark
                note(sentence(move))
        waits = _SECONDS.sub("", now.waits_for)
        if not now.ended and (time.monotonic() - printed_at > LINE_S or waits != waited):
            printed_at, waited = time.monotonic(), waits
            note("; ".join([_whole(now), *_waiting(now)]))

    if not drain.ended:
        note(_ways_out(drain))
    return _until_ended(drain, saw)


def _watch_live(drain: Drain) -> Drain:
    from rich.live import Live

    with Live(_picture(drain), transient=True, refresh_per_second=4) as live:
        return _until_ended(drain, lambda now: live.update(_picture(now)))


def _picture(drain: Drain) -> RenderableType:
    from rich.console import Group
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text

    rows = Table(box=None, pad_edge=False)
    for heading in ("DOMAIN", "MOVE", "STATE", "", "SENT", "SHARE", "LEFT"):
        rows.add_column(heading, no_wrap=True)
    shown = sorted(drain.moves, key=_interest)[:_SHOWN_MAX]
    for move in shown:
        share = move.bandwidth_bytes_per_s if move.state is MoveState.MOVING else None
        eta = f"{move.eta_s:.0f} s" if move.eta_s is not None and not move.state.ended else ""
        rows.add_row(
            move.domain,
            f"{move.source or '-'} -> {goal(move)}",
            move.state.value,
            ProgressBar(total=100, completed=100 * _done(move), width=_BAR),
            size(move.bytes_sent) if move.bytes_sent else "",
            f"{size(share)}/s" if share else "",
            eta if not move.error else move.error[:60],
        )
    if len(drain.moves) > len(shown):
        rows.add_row(f"and {len(drain.moves) - len(shown)} more", "", "", "", "", "", "")
    bar = ProgressBar(total=100, completed=100 * _done_whole(drain), width=60)
    told = [_whole(drain), *_waiting(drain)]
    return Group(rows, *map(Text, told), bar, Text(_ways_out(drain), style="dim"))


def _interest(move: Move) -> tuple[int, float]:
    if move.state.active or move.state is MoveState.SEEKING:
        return (0, move.started_at_s or 0.0)
    if move.state in _STAYS:
        return (1, 0.0)
    if move.state is MoveState.WAITING:
        return (2, move.planned_start_s)
    return (3, -(move.ended_at_s or 0.0))


def _done(move: Move) -> float:
    """0 to 1; never 1 before the move has ended, and 0 if the domain stays where it is."""
    if move.state.ended:
        return 0.0 if move.state in _STAYS else 1.0
    if move.remaining_bytes is None:
        return 0.0
    return min(0.99, move.bytes_sent / max(move.bytes_sent + move.remaining_bytes, 1))


def _done_whole(drain: Drain) -> float:
    going = [move for move in drain.moves if move.state not in _STAYS]
    total = sum(_weight(move) for move in going)
    done = sum(_weight(move) * _done(move) for move in going)
    return 1.0 if drain.ended else min(0.99, done / max(total, 1))


def _weight(move: Move) -> float:
    """By time: what is powered off sends nothing, and takes its time."""
    return move.planned_s or float(max(move.wire_bytes, 1))


def _waiting(drain: Drain) -> list[str]:
    return [f"waits for {drain.waits_for}"] if drain.waits_for else []


def _ways_out(drain: Drain) -> str:
    cancel, what = f"ferry drains cancel {drain.id}", "stops it"
    if drain.cancel is not CancelMode.NO:
        cancel, what = f"{cancel} --abort-moves", "ends the moves under way, too"
    return f"Ctrl-C: it goes on without you; `{cancel}` {what}"


def _whole(drain: Drain) -> str:
    """One line about the whole."""
    ended = sum(move.state.ended for move in drain.moves)
    now_s = drain.at_s + drain.unattended_s if drain.at_s else time.time()
    elapsed = now_s - drain.started_at_s
    node = f" {drain.node}" if drain.node else ""
    text = f"{drain.operation.value}{node}: {drain.state.value}, {ended} of {len(drain.moves)} over"
    if drain.state is DrainState.CHECKING:
        return f"{text}; looking whether the node is empty"
    text += f", {elapsed:.0f} s gone{unattended_text(drain)}"
    if drain.left_s is not None:
        text += f", ~{drain.left_s:.0f} s left"
    if drain.state is DrainState.CANCELLING:
        return f"{text}; no move begins any more"
    said = f"plan: {drain.planned_s:.1f} s"
    if drain.left_s is not None and drain.planned_s > 0.0:
        whole_s = elapsed + drain.left_s
        if abs(whole_s - drain.planned_s) > _AS_PLANNED * drain.planned_s:
            said += f", expected by now: {whole_s:.0f} s"
    return f"{text} ({said})"
