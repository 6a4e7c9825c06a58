"""`ferry migrate` and `ferry migration ...`"""

from __future__ import annotations

from typing import Annotated

import typer

from migrator.figures import SAMPLE_S_MAX, SAMPLE_S_MIN
from migrator.model import (
    EngineKind,
    Migration,
    MigrationMode,
    MigrationRequest,
    MigrationState,
    OnTimeout,
    PassKind,
    PassReport,
)
from node_agent.cli.client import migration_path, path_of
from node_agent.cli.cutover import cutover_text
from node_agent.cli.errors import ExitCode
from node_agent.cli.output import facts, moment, note, parse_size, settings, show, size, table
from node_agent.cli.prediction import comparison, dry_run_text
from node_agent.cli.progress import unheard, watch_migration, where_now
from node_agent.cli.silence import silence_of, silences
from node_agent.resources import DryRun, MigrationChange, MigrationCreate, MigrationList

app = typer.Typer(
    help="Migrations: list, look at, watch, cancel.", no_args_is_help=True, rich_markup_mode=None
)

_RATIO_TOLD_MIN = 1.02
_IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The migration.")]


def migrate(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The domain.")],
    to: Annotated[
        str | None,
        typer.Option(
            "--to",
            help="Destination; by default the node that a drain would choose, "
            "by the domain's rules, and memory.",
        ),
    ] = None,
    downtime_limit_ms: Annotated[
        int, typer.Option("--downtime-limit", min=1, help="Longest blackout, milliseconds.")
    ] = 50,
    timeout_s: Annotated[float, typer.Option("--timeout", help="Of the pre-copy, seconds.")] = 600,
    mode: Annotated[
        MigrationMode,
        typer.Option(
            help="When memory travels: all before the switchover, all after it, or (hybrid) as "
            "much before it as pays, and after it what would not fit into the downtime limit."
        ),
    ] = MigrationMode.HYBRID,
    on_timeout: Annotated[
        OnTimeout,
        typer.Option(
            help="What then: cancel, or pause the guest anyway. In the other modes what is left "
            "then follows the guest."
        ),
    ] = OnTimeout.CANCEL,
    bandwidth: Annotated[
        str | None, typer.Option(help="Bytes a second at most, like 100M.")
    ] = None,
    engine: Annotated[
        EngineKind,
        typer.Option(
            help="Who moves the memory: Ferry's page engine, the hypervisor itself, or (auto) "
            "the page engine where it can be used."
        ),
    ] = EngineKind.AUTO,
    no_wait: Annotated[bool, typer.Option("--no-wait", help="Don't wait for its end.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only say what is against it, and predict it.")
    ] = False,
    sample_seconds: Annotated[
        float,
        typer.Option(
            min=SAMPLE_S_MIN,
            max=SAMPLE_S_MAX,
            help="With --dry-run: how long to watch what the guest writes.",
        ),
    ] = 1.0,
) -> None:
    """Migrate a running domain to another node, and show how it goes.

    Ctrl-C asks whether to cancel it; where there is no terminal it lets the migration go on.
    """
    body = MigrationCreate(
        destination=to,
        downtime_limit_ms=downtime_limit_ms,
        timeout_s=timeout_s,
        mode=mode,
        on_timeout=on_timeout,
        bandwidth_bytes_per_s=parse_size(bandwidth, "--bandwidth")
        if bandwidth is not None
        else None,
        engine=engine,
    )
    client = settings.client()
    path = f"{path_of(name)}/migrations"
    if dry_run:
        query = f"dry_run=true&sample_seconds={sample_seconds:g}"
        result = client.post(f"{path}?{query}", DryRun, body)
        show(result, dry_run_text(name, result))
        raise typer.Exit(_exit_code(result))
    migration = client.post(path, Migration, body)
    for phase in migration.timeline:
        if phase.name == "engine":  # It isn't the usual one, and may do harm.
            note(f"engine: {phase.detail}")
    if no_wait:
        text = f"migration {migration.id} of {name} to {migration.destination} has begun"
        show(migration, text)
        return
    raise typer.Exit(watch_migration(client, migration))


def _exit_code(result: DryRun) -> ExitCode:
    """What the migration itself would end with at once."""
    if not result.destination_known:
        return ExitCode.NOT_FOUND
    return ExitCode.REFUSED if result.refused else ExitCode.OK


@app.command("ls")
def list_migrations(
    active: Annotated[bool, typer.Option("--active", help="Only those that go on.")] = False,
) -> None:
    """All migrations, newest first."""
    client = settings.client()
    migrations = client.get("/v1/migrations", MigrationList).migrations
    if active:
        migrations = tuple(each for each in migrations if not each.ended)
    rows = [
        (
            each.id,
            each.domain,
            f"{each.source} -> {each.destination}",
            each.state.value,
            f"{each.blackout_ms:.1f} ms" if each.blackout_ms is not None else "-",
            f"{each.total_s:.1f} s" if each.total_s is not None else "-",
            moment(each.created_at_s),
        )
        for each in migrations
    ]
    headings = ("ID", "DOMAIN", "NODES", "STATE", "BLACKOUT", "TOTAL", "CREATED")
    show(migrations, table(headings, rows))
    if not all(each.ended for each in migrations):
        silent = silences(client)
        for each in migrations:
            if said := silence_of(each, silent):
                note(f"ferry: migration {each.id}: {said}")


@app.command("show")
def show_migration(id: _IdArgument) -> None:
    """One migration: what was asked, what was done, why it ended."""
    client = settings.client()
    each = client.get(migration_path(id), Migration)
    request, progress = each.request, each.progress
    silence = "" if each.ended else silence_of(each, silences(client))
    failed = each.ended and each.state is not MigrationState.COMPLETED
    where = where_now(client, each.domain) if failed else ""
    cap, speed = request.bandwidth_bytes_per_s, progress.throughput_bytes_per_s
    pairs = [
        ("migration", each.id),
        ("domain", f"{each.domain} ({where} now)" if where else each.domain),
        ("nodes", f"{each.source} -> {each.destination}"),
        ("state", f"{each.state.value} ({silence})" if silence else each.state.value),
        ("error", each.error or ""),
        ("blackout", f"{each.blackout_ms:.1f} ms" if each.blackout_ms is not None else ""),
        ("total", f"{each.total_s:.2f} s" if each.total_s is not None else ""),
        ("sent", _sent(each)),
        ("to go", "" if each.ended else size(progress.remaining_bytes)),
        ("speed", "" if each.ended or speed is None else f"{size(speed)}/s{_unheard(each)}"),
        ("engine", request.engine.value),
        ("mode", request.mode.value),
        ("bandwidth", "" if cap is None else f"{size(cap)}/s at most"),
        ("downtime limit", f"{request.downtime_limit_ms} ms"),
        ("timeout", _timeout(request)),
        ("created", moment(each.created_at_s)),
    ]
    text = facts(pairs)
    if each.prediction is not None:
        text += "\n\n" + comparison(each, each.prediction)
    if each.timeline:
        rows = [(phase.name, f"{phase.seconds:.3f} s", phase.detail) for phase in each.timeline]
        text += "\n\n" + table(("PHASE", "TIME", "DETAIL"), rows)
    if each.cutover is not None:
        text += "\n\n" + cutover_text(each.cutover)
    if each.iterations:
        passes = [
            (
                str(one.number),
                one.kind.value,
                str(one.pages),
                size(one.bytes_sent),
                compression_of(one),
                f"{one.seconds:.3f} s",
                str(one.pending_pages),
            )
            for one in each.iterations
        ]
        headings = ("ITERATION", "KIND", "PAGES", "SENT", "RATIO", "TIME", "DIRTIED MEANWHILE")
        text += "\n\n" + table(headings, passes)
    show(each, text)


def _unheard(migration: Migration) -> str:
    said = unheard(migration)
    return f" ({said})" if said else ""


def _sent(migration: Migration) -> str:
    """All that was sent; and what of it no iteration has: pages that the guest, moved, lacked."""
    sent_bytes, passes = migration.progress.bytes_sent, migration.iterations
    later_bytes = sent_bytes - sum(each.bytes_sent for each in passes)
    if later_bytes <= 0 or all(each.kind is not PassKind.MISSING for each in passes):
        return size(sent_bytes)
    return f"{size(sent_bytes)}, {size(later_bytes)} of it in post-copy"


def compression_of(one: PassReport) -> str:
    """Guest memory to bytes on the wire, and by what; "" where nothing was compressed."""
    if not one.bytes_sent or one.payload_bytes < _RATIO_TOLD_MIN * one.bytes_sent:
        return ""
    by = f" {', '.join(one.compressors)}" if one.compressors else ""
    return f"{one.payload_bytes / one.bytes_sent:.2f}{by}"


@app.command()
def watch(id: _IdArgument) -> None:
    """Show how a migration goes, until it ends."""
    client = settings.client()
    raise typer.Exit(watch_migration(client, client.get(migration_path(id), Migration)))


@app.command()
def cancel(id: _IdArgument) -> None:
    """Cancel a migration; refused from the handoff on."""
    client = settings.client()
    each = client.decoded(client.delete(migration_path(id)), Migration)
    show(each, f"migration {id} is {each.state.value}")


@app.command()
def limit(
    id: _IdArgument,
    bandwidth: Annotated[str, typer.Argument(help="Bytes a second, as 50M or 1G; or none.")],
) -> None:
    """Change the bandwidth cap of a migration that runs."""
    cap = None if bandwidth == "none" else parse_size(bandwidth, "the bandwidth")
    change = MigrationChange(bandwidth_bytes_per_s=cap)
    settings.client().patch(migration_path(id), Migration, change)
    each = settings.client().get(migration_path(id), Migration)
    allowed = "as fast as it can" if cap is None else f"{bandwidth}/s"
    show(each, f"migration {id} may send {allowed}")


def _timeout(request: MigrationRequest) -> str:
    if request.mode is MigrationMode.PRECOPY:
        return f"{request.timeout_s:g} s, then {request.on_timeout.value}"
    return f"{request.timeout_s:g} s, then post-copy"
