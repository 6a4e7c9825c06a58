"""Drains and their plans in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Final

from node_agent.cli.output import facts, moment, size, table
from node_agent.drain.resources import (
    BalancePlan,
    Drain,
    DrainPlan,
    DrainState,
    Move,
    MoveState,
    NodeLeftOut,
    Operation,
    took_text,
)

_LEFT_OUT_TOLD_MAX: Final = 20


def plan_text(plan: DrainPlan, operation: Operation = Operation.DRAIN) -> str:
    """A plan: a line a move, what stands in the way, and the whole."""
    parts: list[str] = []
    if plan.moves:
        rows = [
            (
                each.domain,
                f"{each.source or '-'} -> {each.destination or 'off'}",
                each.policy.value,
                size(each.wire_bytes) if each.wire_bytes else "-",
                f"{size(each.bandwidth_bytes_per_s)}/s" if each.bandwidth_bytes_per_s else "-",
                f"{each.start_s:.1f} s",
                f"{each.seconds:.1f} s",
                f"{each.start_s + each.seconds:.1f} s",
            )
            for each in plan.moves
        ]
        headings = ("DOMAIN", "MOVE", "HOW", "TO SEND", "SHARE", "START", "TAKES", "END")
        parts.append(table(headings, rows))
        over = plan.planned_s / plan.lower_bound_s if plan.lower_bound_s else 1.0
        parts.append(
            f"{counted(len(plan.moves), 'domain')}, {plan.parallel} at once, "
            f"{plan.planned_s:.1f} s in all ({over:.2f} times the shortest possible); "
            f"link {plan.link}"
        )
    elif operation is Operation.UNDRAIN and not plan.left:
        parts.append(f"nothing is to come back to node {plan.node}: no drain of it is to be undone")
    elif not plan.blockers and not plan.left and not plan.leaving:
        parts.append(f"nothing has to move; node {plan.node} can be emptied at once")
    if plan.leaving:
        lines = [
            f"  {each.domain}: to {each.destination}, by migration {each.migration}"
            + ("" if each.eta_s is None else f", ~{each.eta_s:.0f} s left")
            for each in plan.leaving
        ]
        parts.append("\n".join(["These are leaving already, and are waited for:", *lines]))
    if plan.left:
        lines = [f"  {each.domain}: {each.reason}" for each in plan.left]
        parts.append("\n".join(["These stay where they are:", *lines]))
    if plan.blockers:
        lines = [
            f"  {each.domain}: {each.reason}\n    what would help: {each.remedy}"
            for each in plan.blockers
        ]
        parts.append("\n".join(["BLOCKED: these domains can't leave:", *lines]))
    late = [each.domain for each in plan.moves if each.start_s > (plan.timeout_s or math.inf)]
    if late:
        parts.append(
            f"TOO LONG: after --timeout {plan.timeout_s:g} s no move begins any more; by this plan "
            f"{', '.join(late)} would be left"
        )
    if plan.remarks:
        parts.append("\n".join(["Mind:", *(f"  {each}" for each in plan.remarks)]))
    parts += _left_out(plan.left_out)
    return "\n\n".join(parts)


def counted(count: int, what: str) -> str:
    """1 domain, 2 domains."""
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def moved(drain: Drain) -> int:
    """How many domains are no longer where they were, or on their way already."""
    return sum(
        move.state in (MoveState.MOVED, MoveState.STOPPED)
        or (move.already and move.state is MoveState.GONE)
        for move in drain.moves
    )


def took(drain: Drain) -> str:
    """For a column of a table."""
    if drain.ended_at_s is not None:
        return f"{drain.ended_at_s - drain.started_at_s:.1f} s"
    return "-" if drain.left_s is None else f"~{drain.left_s:.0f} s left"


def balance_text(plan: BalancePlan) -> str:
    """How uneven the nodes are, the moves with their gain and cost, and what that makes of it."""
    rows = [
        (name, f"{plan.before[name]:.0%}", f"{plan.after.get(name, 0.0):.0%}")
        for name in plan.before
    ]
    parts = [table(("DIFFERENCE OF", "NOW", "AFTERWARDS"), rows)]
    if plan.moves:
        moves = [
            (
                each.domain,
                f"{each.source} -> {each.destination}",
                size(each.wire_bytes),
                f"{each.seconds:.1f} s",
                f"{each.gain or 0.0:.4f}",
            )
            for each in plan.moves
        ]
        parts.append(table(("DOMAIN", "MOVE", "TO SEND", "COSTS", "GAINS"), moves))
    parts.append(f"{counted(len(plan.moves), 'move')}: {plan.reason}")
    parts += _left_out(plan.left_out)
    return "\n\n".join(parts)


def _left_out(nodes: Sequence[NodeLeftOut]) -> list[str]:
    if not nodes:
        return []
    lines = [f"  {each.node}: {each.reason}" for each in nodes[:_LEFT_OUT_TOLD_MAX]]
    if len(nodes) > _LEFT_OUT_TOLD_MAX:
        lines.append(f"  and {len(nodes) - _LEFT_OUT_TOLD_MAX} more (`ferry node ls`)")
    return ["\n".join(["Left out of the plan, as nothing moves there now:", *lines])]


def details(drain: Drain) -> str:
    """Everything about one drain."""
    pairs = [
        (drain.operation.value, drain.id),
        ("node", drain.node),
        ("state", drain.state.value),
        ("error", drain.error or ""),
        ("asked by", drain.asked_by),
        ("reason", drain.reason),
        ("cancelled by", drain.cancelled_by),
        ("coordinator", drain.coordinator + (f" (term {drain.term})" if drain.term > 1 else "")),
        ("planned", f"{drain.planned_s:.1f} s, {drain.parallel} at once"),
        ("took", took_text(drain) if drain.ended_at_s is not None else ""),
        ("left", f"~{drain.left_s:.0f} s" if drain.left_s is not None else ""),
        ("waits for", drain.waits_for),
        ("created", moment(drain.created_at_s)),
        ("restores", drain.restores or ""),
        ("restored by", drain.restored_by or ""),
    ]
    rows = [
        (
            move.domain,
            f"{move.source or '-'} -> {goal(move)}",
            move.state.value,
            f"{move.planned_start_s:.1f} + {move.planned_s:.1f} s",
            _actual(drain, move),
            size(move.bytes_sent) if move.bytes_sent else "-",
            f"{move.blackout_ms:.1f} ms" if move.blackout_ms is not None else "-",
            move.migration or "-",
            move.error or "",
        )
        for move in drain.moves
    ]
    headings = ("DOMAIN", "MOVE", "STATE", "PLANNED", "ACTUAL", "SENT", "BLACKOUT", "MIGRATION", "")
    text = facts(pairs) + "\n\n" + table(headings, rows)
    lines = [f"{moment(each.at_s)}  {each.text}" for each in drain.history]
    return text + "\n\n" + "\n".join(lines)


def _actual(drain: Drain, move: Move) -> str:
    if move.started_at_s is None:
        return "-"
    start = move.started_at_s - drain.started_at_s
    if move.ended_at_s is None:
        return f"{start:.1f} s"
    return f"{start:.1f} + {move.ended_at_s - move.started_at_s:.1f} s"


def goal(move: Move) -> str:
    """Where it leads: a node, off, or "?" while none is found for what isn't powered off."""
    return move.destination or ("?" if move.live and not move.powered_off else "off")


def sentence(move: Move) -> str:
    """One move that has changed."""
    if move.state in (MoveState.LEFT, MoveState.GONE) and not move.source:  # From nowhere.
        return f"{move.domain}: {move.state.value}: {move.error}"
    where = f"{move.source or 'off'} -> {goal(move)}"
    text = f"{move.domain}: {where}: {move.state.value}"
    if move.state is MoveState.MOVED and move.blackout_ms is not None:
        text += f", blackout {move.blackout_ms:.1f} ms"
    if move.error and move.state is not MoveState.MOVED:
        text += f": {move.error}"
    return text


def outcome(drain: Drain) -> str:
    """The end, in a sentence, and each domain that was left."""
    dark = [move.blackout_ms for move in drain.moves if move.blackout_ms is not None]
    text = (
        f"{moved(drain)} of {counted(len(drain.moves), 'domain')} in {took_text(drain)} "
        f"(planned {drain.planned_s:.1f})"
    )
    if dark:
        text += f", longest blackout {max(dark):.1f} ms"
    if drain.operation is Operation.BALANCE and not drain.moves:
        return "the nodes are even enough; nothing was moved"
    if drain.operation is Operation.UNDRAIN and not drain.moves:
        return f"node {drain.node} is open; nothing was brought back"
    if drain.operation is Operation.DRAIN and drain.state is DrainState.DONE:
        head = f"node {drain.node} is empty: "
    elif drain.operation is Operation.UNDRAIN and drain.state is DrainState.DONE:
        head = f"node {drain.node} is open, its domains are back: "
    else:
        node = f" of node {drain.node}" if drain.node else ""
        head = f"{drain.operation.value}{node} is {drain.state.value}: "
    lines = [head + text]
    if drain.error:
        lines.append(f"  {drain.error}")
    lines += [
        f"  {move.domain} ({move.state.value}): {move.error}"
        for move in drain.moves
        if move.state in (MoveState.LEFT, MoveState.FAILED)
    ]
    return "\n".join([*lines, *(f"  {each}" for each in _next(drain))])


def _next(drain: Drain) -> Sequence[str]:
    """What helps after an end that isn't the one that was asked for."""
    again = f"`ferry {drain.operation.value} {drain.node}`"
    match drain.operation, drain.state:
        case Operation.DRAIN, DrainState.PARTIAL:
            return [f"{again} once more takes the rest; `ferry uncordon {drain.node}` gives it up"]
        case Operation.DRAIN, DrainState.CANCELLED if moved(drain):
            return [f"`ferry undrain {drain.node}` brings back what has moved"]
        case Operation.UNDRAIN, DrainState.PARTIAL:
            return [f"{again} brings back what was left, once its reason is gone"]
        case Operation.UNDRAIN, DrainState.CANCELLED:
            return [f"{again} brings back the rest"]
    return []
