"""`ferry node`, `ferry pool`, `ferry volume`, `ferry events`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated
from urllib.parse import quote

import msgspec
import typer

from migrator.model import DiskFormat, VolumeInfo
from node_agent.cli.output import moment, parse_size, settings, show, size, table
from node_agent.events import ClusterEvent, EventList
from node_agent.resources import NodeList, PoolList, VolumeCreate, VolumeList

nodes = typer.Typer(help="Nodes.", no_args_is_help=True, rich_markup_mode=None)
pools = typer.Typer(help="Pools.", no_args_is_help=True, rich_markup_mode=None)
volumes = typer.Typer(help="Volumes.", no_args_is_help=True, rich_markup_mode=None)

_PoolOption = Annotated[str, typer.Option("--pool", help="The pool.")]
_VolumeArgument = Annotated[str, typer.Argument(metavar="NAME", help="The volume.")]


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
        )
        for node in found
    ]
    headings = ("NAME", "STATE", "DOMAINS", "MEMORY", "CPUS", "HYPERVISOR", "HEARTBEAT")
    show(found, table(headings, rows))


@pools.command("ls")
def list_pools() -> None:
    """All pools."""
    found = settings.client().get("/v1/pools", PoolList).pools
    rows = [
        (pool.name, pool.driver, "yes" if pool.fences_remote_writers else "no") for pool in found
    ]
    show(found, table(("NAME", "DRIVER", "FENCES REMOTE WRITERS"), rows))


@volumes.command("ls")
def list_volumes(pool: _PoolOption = "default") -> None:
    """The volumes of a pool."""
    found = settings.client().get(_volumes(pool), VolumeList).volumes
    rows = [
        (each.name, each.format.value, size(each.capacity_bytes), size(each.allocated_bytes))
        for each in found
    ]
    show(found, table(("NAME", "FORMAT", "CAPACITY", "ALLOCATED"), rows))


@volumes.command("create")
def create_volume(
    name: _VolumeArgument,
    capacity: Annotated[str, typer.Option("--size", help="Like 512M or 20G.")],
    pool: _PoolOption = "default",
    format: Annotated[DiskFormat, typer.Option(help="How its bytes are laid out.")] = (
        DiskFormat.RAW
    ),
    image: Annotated[
        Path | None, typer.Option(help="An image of this format, on the agent's host, to copy.")
    ] = None,
) -> None:
    """Create a volume, empty or as a copy of an image."""
    body = VolumeCreate(
        name=name,
        capacity_bytes=parse_size(capacity),
        format=format,
        image=None if image is None else str(image.absolute()),
    )
    made = settings.client().post(_volumes(pool), VolumeInfo, body, timeout_s=1800)
    show(made, f"volume {pool}/{made.name} of {size(made.capacity_bytes)} is there")


@volumes.command("rm")
def remove_volume(name: _VolumeArgument, pool: _PoolOption = "default") -> None:
    """Delete a volume that no domain has."""
    settings.client().delete(f"{_volumes(pool)}/{quote(name, safe='')}")
    show({"deleted": f"{pool}/{name}"}, f"volume {pool}/{name} is deleted")


def events(
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on with new ones.")] = False,
    limit: Annotated[int, typer.Option("-n", min=1, max=10_000, help="At most so many.")] = 50,
) -> None:
    """What happened in the cluster. With --json one object a line."""
    client = settings.client()
    last = 0
    for event in client.get(f"/v1/events?limit={limit}", EventList).events:
        _print_event(event)
        last = event.seq
    if not follow:
        return
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(last)}
    for line in client.lines("/v1/events", headers):
        if line.startswith(b"data: "):
            event = msgspec.json.decode(line.removeprefix(b"data: "), type=ClusterEvent)
            _print_event(event)


def _print_event(event: ClusterEvent) -> None:
    if settings.json:
        print(msgspec.json.encode(event).decode(), flush=True)
    else:
        text = f"{moment(event.at_s)}  {event.node:<12}  {event.kind:<20}  {event.message}"
        print(text, flush=True)


def _volumes(pool: str) -> str:
    return f"/v1/pools/{quote(pool, safe='')}/volumes"
