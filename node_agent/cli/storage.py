"""`ferry pool ...` and `ferry volume ...`"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Final
from urllib.parse import quote

import msgspec
import typer

from migrator.model import DiskFormat, PoolRoom, VolumeInfo
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.output import facts, parse_size, settings, show, size, table
from node_agent.resources import (
    Pool,
    PoolList,
    PoolTakeover,
    VolumeClone,
    VolumeCreate,
    VolumeList,
    VolumeResize,
)
from storage.settings import BY_DRIVER, OFFERED

pools = typer.Typer(help="Pools.", no_args_is_help=True, rich_markup_mode=None)
volumes = typer.Typer(help="Volumes.", no_args_is_help=True, rich_markup_mode=None)

COPY_TIMEOUT_S = 3700
"""A little more than any driver takes for a copy."""

_PoolOption = Annotated[str, typer.Option("--pool", help="The pool.")]
_PoolArgument = Annotated[str, typer.Argument(metavar="NAME", help="The pool.")]
_VolumeArgument = Annotated[str, typer.Argument(metavar="NAME", help="The volume.")]
_SizeOption = Annotated[str, typer.Option("--size", help="Like 512M or 20G.")]


@pools.command("ls")
def list_pools() -> None:
    """All pools, each tried now by the agent that answers."""
    found = settings.client().get("/v1/pools", PoolList).pools
    rows = [
        (
            pool.name,
            pool.driver,
            _health(pool).partition(":")[0],
            size(pool.health.capacity_bytes),
            size(pool.health.free_bytes),
            "yes" if pool.fencing.remote_writers else "no",
            pool.origin.value,
        )
        for pool in found
    ]
    headings = ("NAME", "DRIVER", "HEALTH", "CAPACITY", "FREE", "FENCES DEAD NODES", "FROM")
    show(found, table(headings, rows))


@pools.command("show")
def show_pool(name: _PoolArgument) -> None:
    """One pool: its settings, its health, and what its fence is worth."""
    pool = settings.client().get(_pool(name), Pool)
    given: dict[str, Any] = msgspec.to_builtins(pool.settings)
    takeover = "yes" if pool.fencing.remote_writers else "no"
    pairs = [
        ("name", pool.name),
        ("driver", pool.driver),
        ("from", pool.origin.value),
        ("health", _health(pool)),
        ("capacity", size(pool.health.capacity_bytes)),
        ("free", size(pool.health.free_bytes)),
        ("fence", pool.fencing.method),
        ("takeover from a dead node", takeover),
        *(
            (key, str(value))
            for key, value in given.items()
            if key not in ("name", "driver") and value is not None
        ),
    ]
    show(pool, facts(pairs))


@pools.command("add")
def add_pool(
    name: _PoolArgument,
    driver: Annotated[str, typer.Argument(help=f"One of: {OFFERED}.")],
    options: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="The driver's settings: `ferry pool drivers`."),
    ] = None,
    take_from: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="IDENTITY",
            help="Of another cluster, whose pool it was, and none of whose nodes uses it any more.",
        ),
    ] = None,
) -> None:
    """Add a pool to the cluster: `ferry pool add fast nfs server=10.0.0.5 export=/ferry`."""
    kind = BY_DRIVER.get(driver)
    if kind is None:
        raise CliError(f"there is no driver {driver}; there are {OFFERED}", ExitCode.USAGE)
    body: dict[str, Any] = {"name": name, "driver": driver}
    known = [field.name for field in msgspec.structs.fields(kind) if field.name != "name"]
    for option in options or ():
        key, separator, value = option.partition("=")
        if not separator or key not in known:
            right = ", ".join(f"{each}=" for each in known) or "none"
            raise CliError(
                f"{option} is no setting of {driver}, which has: {right}", ExitCode.USAGE
            )
        body[key] = _typed(kind, key, value)
    query = "" if take_from is None else f"?from={quote(take_from, safe='')}"
    pool = settings.client().post(f"/v1/pools{query}", Pool, body)
    show(
        pool,
        f"pool {pool.name} ({pool.driver}) is added for every node, and works on the "
        "one that was asked; `ferry doctor` tries it on each",
    )


@pools.command("takeover")
def take_pool_over(
    name: _PoolArgument,
    take_from: Annotated[
        str,
        typer.Option(
            "--from",
            metavar="IDENTITY",
            help="Of the cluster that the pool belongs to, exactly as `ferry pool show` names it.",
        ),
    ],
) -> None:
    """Make a pool this cluster's that says that it is another one's.

    Two clusters with one place run guests from each other's volumes, and delete them. So be sure
    that no node of the other one has a domain on it, or that there is no such cluster any more: its
    state store was lost, say, and begun anew. That stays in the events, with your name.
    """
    body = PoolTakeover(identity=take_from)
    pool = settings.client().post(f"{_pool(name)}/takeover", Pool, body)
    if pool.already_own:
        show(pool, f"pool {name} was this cluster's already; nothing was done")
    else:
        show(pool, f"pool {name} is this cluster's")


@pools.command("drivers")
def list_drivers() -> None:
    """The drivers, and the settings that each takes; those in brackets may be left out."""
    rows = []
    for name, kind in BY_DRIVER.items():
        if name == "simulated":
            continue  # For tests: an agent refuses it.
        fields = [field for field in msgspec.structs.fields(kind) if field.name != "name"]
        words = [field.name if field.required else f"[{field.name}]" for field in fields]
        rows.append((name, " ".join(words)))
    show(dict(rows), table(("DRIVER", "SETTINGS"), rows))


@pools.command("rm")
def remove_pool(name: _PoolArgument) -> None:
    """Remove a pool that no domain has a disk on; its volumes stay on the storage."""
    settings.client().delete(_pool(name))
    show({"removed": name}, f"pool {name} is removed; its volumes stay on the storage")


@volumes.command("ls")
def list_volumes(pool: _PoolOption = "default") -> None:
    """The volumes of a pool."""
    found = settings.client().get(_volumes(pool), VolumeList).volumes
    rows = [
        (
            each.name,
            each.format.value,
            size(each.capacity_bytes),
            size(each.allocated_bytes),
            each.backing or "-",
        )
        for each in found
    ]
    show(found, table(("NAME", "FORMAT", "CAPACITY", "ALLOCATED", "LEANS ON"), rows))


@volumes.command("create")
def create_volume(
    name: _VolumeArgument,
    capacity: _SizeOption,
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
        capacity_bytes=parse_size(capacity, "--size"),
        format=format,
        image=None if image is None else str(image.absolute()),
    )
    made = settings.client().post(_volumes(pool), VolumeInfo, body, timeout_s=COPY_TIMEOUT_S)
    show(made, f"volume {pool}/{made.name} of {size(made.capacity_bytes)} is there")


@volumes.command("resize")
def resize_volume(
    name: _VolumeArgument, capacity: _SizeOption, pool: _PoolOption = "default"
) -> None:
    """Grow a volume while no domain that has it runs."""
    body = VolumeResize(capacity_bytes=parse_size(capacity, "--size"))
    grown = settings.client().post(f"{_volume(pool, name)}/resize", VolumeInfo, body)
    show(grown, f"volume {pool}/{name} is {size(grown.capacity_bytes)} large")


@volumes.command("clone")
def clone_volume(
    name: _VolumeArgument,
    new: Annotated[str, typer.Argument(metavar="NEW", help="The new volume, in the same pool.")],
    pool: _PoolOption = "default",
    linked: Annotated[
        bool,
        typer.Option("--linked", help="A small overlay; the original can't be written any more."),
    ] = False,
) -> None:
    """Copy a volume, or make an overlay that leans on it."""
    body = VolumeClone(name=new, linked=linked)
    made = settings.client().post(
        f"{_volume(pool, name)}/clone", VolumeInfo, body, timeout_s=COPY_TIMEOUT_S
    )
    leans = f", which leans on {made.backing}" if made.backing else ""
    show(made, f"volume {pool}/{made.name} is there{leans}")


@volumes.command("rm")
def remove_volume(name: _VolumeArgument, pool: _PoolOption = "default") -> None:
    """Delete a volume that no domain has."""
    settings.client().delete(_volume(pool, name))
    show({"deleted": f"{pool}/{name}"}, f"volume {pool}/{name} is deleted")


def _health(pool: Pool) -> str:
    if pool.refused:
        return f"refused: {pool.refused}"
    if not pool.health.reachable:
        return f"unreachable: {pool.health.reason}"
    return _ROOM.get(pool.room, "ok")


_ROOM: Final = {
    PoolRoom.NONE: "full: guests that write to it stand still until there is room",
    PoolRoom.LITTLE: "nearly full: guests that write to it stand still once it is",
}


def _typed(kind: type[msgspec.Struct], key: str, value: str) -> object:
    """Text for text, a number where the setting is one; the agent says what is wrong."""
    field = next(each for each in msgspec.structs.fields(kind) if each.name == key)
    try:
        return msgspec.convert(value, field.type, strict=False)
    except msgspec.ValidationError:
        return value


def _pool(pool: str) -> str:
    return f"/v1/pools/{quote(pool, safe='')}"


def _volumes(pool: str) -> str:
    return f"{_pool(pool)}/volumes"


def _volume(pool: str, name: str) -> str:
    return f"{_volumes(pool)}/{quote(name, safe='')}"
