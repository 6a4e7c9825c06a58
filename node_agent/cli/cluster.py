"""`ferry node`, `ferry events`"""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Annotated, Final

import msgspec
import typer

from node_agent.cli.following import Follower
from node_agent.cli.guests import shutdown_guests
from node_agent.cli.nodes import remove_node, round_trip, show_node
from node_agent.cli.output import by_number, moment, note, settings, show, size, table
from node_agent.clock_words import DIFFERS_S, offset_text, span_text
from node_agent.events import ClusterEvent, EventList
from node_agent.resources import Node, NodeList

ENDS_SOON_S: Final = 86_400.0
"""Of a certificate, whatever its life is: the first of those that hold for a month has failed to
be renewed for nine days by then."""

nodes = typer.Typer(help="Nodes.", no_args_is_help=True, rich_markup_mode=None)


nodes.command("show")(show_node)
nodes.command("rm")(remove_node)
nodes.command("shutdown-guests")(shutdown_guests)


@nodes.command("ls")
def list_nodes() -> None:
    """All nodes, with what runs on them."""
    found = settings.client().get("/v1/nodes", NodeList).nodes
    rows = [
        (
            node.name,
            node.state.value,
            str(len(node.domains)),
            f"{size(node.memory_committed_bytes)} of {size(node.memory_bytes)}",
            str(node.cpus),
            f"{node.capabilities.driver} {node.capabilities.version} "
            f"({node.capabilities.accelerator})",
            f"{node.heartbeat_age_s:.1f} s ago",
            round_trip(node.round_trip_ms),
        )
        for node in sorted(found, key=lambda node: by_number(node.name))
    ]
    headings = (
        "NAME",
        "STATE",
        "DOMAINS",
        "MEMORY",
        "CPUS",
        "HYPERVISOR",
        "HEARTBEAT",
        "ROUND TRIP",
    )
    show(found, table(headings, rows))
    for node in found:
        for text in troubles(node, time.time()):
            note(f"ferry: {node.name}: {text}")


def troubles(node: Node, now_s: float) -> Iterator[str]:
    """What an operator must know of a node beside its state."""
    if node.kept_free not in ("", node.state):
        yield f"it is {node.kept_free}"
    if node.judged_in_s and not node.trouble:
        yield (
            "it may be heard yet: the agent that was asked has just begun to listen, or its store "
            f"was away; certain in {node.judged_in_s:.0f} s"
        )
    if node.trouble:
        yield f"its heartbeat isn't written: {node.trouble}"
    if abs(node.clock_offset_s or 0.0) > DIFFERS_S:
        told = offset_text(node.clock_offset_s or 0.0, "that of the node that was asked")
        yield f"its clock is {told}; see `ferry doctor`"
    if node.certificate_until_s is not None:
        left_s = node.certificate_until_s - now_s
        if left_s <= 0:
            yield (
                f"its certificate has ended {span_text(-left_s)} ago: nobody can connect to it, and"
                " nothing moves there; see `ferry doctor` on it"
            )
        elif left_s < ENDS_SOON_S:
            yield f"its certificate ends in {span_text(left_s)}; see `ferry events`"


def events(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new ones.")] = False,
    limit: Annotated[int, typer.Option("-n", min=1, max=10_000, help="At most so many.")] = 50,
) -> None:
    """What happened in the cluster. With --json one object a line.

    With -f until Ctrl-C, also where the agent or the store goes and comes back; none is left out.
    """
    client = settings.client()
    last = 0
    for event in client.get(f"/v1/events?limit={limit}", EventList).events:
        _print_event(event)
        last = event.seq
    if not follow:
        return
    Follower(settings.client, _print_event, last).run()


def _print_event(event: ClusterEvent) -> None:
    print(msgspec.json.encode(event).decode() if settings.json else shown_event(event), flush=True)


def shown_event(event: ClusterEvent) -> str:
    """One line. It ends with what `ferry migration show` or `ferry drains show` tells more of."""
    text = f"{moment(event.at_s)}  {event.node:<12}  {event.kind:<20}  {event.message}"
    for noun, known in (("migration", event.migration), ("drain", event.data.get("drain"))):
        if known and str(known) not in event.message:
            return f"{text} ({noun} {known})"
    return text
