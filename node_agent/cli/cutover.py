"""How the network followed a migrated guest, for `ferry migration show`."""

from __future__ import annotations

from collections.abc import Iterator

from migrator.model import Cutover, MovedConnections, Witness
from node_agent.cli.output import facts, table


def cutover_text(cutover: Cutover) -> str:
    """What happened after the resume, in its order, and who saw it."""
    verified = "not verified"
    if cutover.verified_ms is not None:
        verified = f"verified {cutover.verified_ms:.1f} ms after the resume"
    elif cutover.left_early:
        verified = f"not verified: the guest {cutover.left_early} before it was seen to follow"
    pairs = [
        ("network", verified),
        ("announced", _after(cutover.first_announcement_ms)),
        ("first to the guest", _after(cutover.first_to_guest_ms)),
        ("first from the guest", _after(cutover.first_from_guest_ms)),
        ("rounds", str(cutover.rounds)),
        ("forwarded", _forwarded(cutover.forwarded_frames)),
        ("connections", _connections(cutover.connections)),
        ("suspect", cutover.suspect),
    ]
    pairs += [("problem", problem) for problem in cutover.problems]
    text = facts(pairs)
    if cutover.witnesses:
        headings = ("ASKED FROM", "NIC", "ANSWERED", "HEARD")
        text += "\n\n" + table(headings, list(_rows(cutover.witnesses)))
    return text


def _rows(witnesses: tuple[Witness, ...]) -> Iterator[tuple[str, str, str, str]]:
    for witness in witnesses:
        answered = ", ".join(witness.answered) or "-"
        if not witness.able:
            answered = "has no way there"
        yield witness.node, witness.mac, answered, ", ".join(witness.heard) or "-"


def _after(at_ms: float | None) -> str:
    return f"+{at_ms:.1f} ms" if at_ms is not None else ""


def _forwarded(frames: int | None) -> str:
    return f"{frames} frames by the old node" if frames is not None else ""


def _connections(connections: MovedConnections | None) -> str:
    if connections is None:
        return ""
    text = f"{connections.moved} of stateful rules moved, told in {connections.told_ms:.1f} ms"
    if connections.begun_late:
        text += f"; {connections.begun_late} of them began meanwhile"
    return text + (f"; {connections.left} are translated here, left" if connections.left else "")
