"""The demo's course: a lab, a guest, a client, migrations, what came of it, and nothing left.

    claim the name ─> guest image ─> lab up ─> guest ready ─> client sees a quiet base line
      ─> migrations n1 ─> n2 ─> ... ─> n1, `rounds` times ─> guest's and disk's own checks
      ─> a node with several guests behind HAProxy is drained and undrained (`drain`)
      ─> table, picture ─> lab down (also on any failure and on Ctrl-C; not with `keep`)

All through the HTTP API of the first node's agent. What the client said stands in `watcher`.
"""

from __future__ import annotations

import errno
import importlib.util
import os
import socket
import time
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from deploy import lab
from deploy.demo import drain, figure, guest, report
from deploy.demo.drain import DrainStory
from deploy.demo.guest import WebServer
from deploy.demo.report import ClientSide, DemoResult
from deploy.demo.screen import Screen, milliseconds
from deploy.demo.watcher import Watcher
from deploy.guest.build import GuestImage, build_guest, default_cache_directory
from deploy.guest.kernel import GuestBuildError
from deploy.guest.records import DiskReport
from deploy.lab.balancer import require_haproxy
from deploy.lab.plan import check_lab_name
from deploy.lab.preconditions import remarks, require_root
from deploy.lab.removal import interrupts_ignored
from migrator.errors import ConflictError, FerryError
from migrator.model import Migration, MigrationState
from node_agent.cli.client import ApiClient

STREAM_BYTES_PER_S: Final = 4_000_000
"""What one emulated vCPU serves beside its other work without being late."""
BASE_LINE_S: Final = 3.0
"""What the client sees before the first migration."""
OBSERVED_TIMEOUT_S: Final = 60.0
MARKER: Final = "made-by-demo"
"""In the lab's folder: a demo made it and will take it down, unless it is killed."""

_HOW: Final = (
    "Its memory is copied while it runs; then, again and again (each time is an iteration), what "
    "it has written meanwhile. When little enough is left, it is paused; that rest and the state "
    "of its devices follow, the ownership passes to the destination, and it goes on there. The "
    "pause is the blackout."
)


@dataclass(frozen=True, slots=True)
class Options:
    """What the command line asks for."""

    lab: str
    nodes: int
    rounds: int
    keep: bool
    plot: Path


@dataclass(frozen=True, slots=True)
class Outcome:
    """How it went. `faults` says what a migration must not do to a guest; empty: all well."""

    result: DemoResult
    faults: tuple[str, ...]


def tell(options: Options, screen: Screen) -> Outcome:
    """The whole demo. Raises FerryError or CliError when it can't be told to its end.

    On any way out the lab, its processes and its network are gone, except with `keep`.
    """
    check_before(options)
    with ExitStack() as stack:
        stack.enter_context(_claim(options.lab))
        _clear_left_over(options.lab, screen)
        screen.heading(f"A cluster of {options.nodes} nodes on this machine")
        image = _image(screen)
        record = _lab_up(options, screen, stack)
        api = ApiClient(record.nodes[0].api)
        server = WebServer(api, record.plan)
        _start_guest(server, image, screen)
        watcher = stack.enter_context(
            closing(
                Watcher(
                    options.lab,
                    record.plan.folder / "client.log",
                    guest=server.address,
                    udp_port=guest.UDP_PORT,
                    stream_bytes_per_s=STREAM_BYTES_PER_S,
                )
            )
        )
        migrations = _watch_migrations(options, server, watcher, screen)
        with screen.busy("the guest verifies every page of its memory"):
            side = watcher.finish()
        disk = None if options.keep else _check_disk(server, screen)
        drained = drain.tell(api, record.plan, image, screen)
        return _conclude(options, migrations, side, disk, drained, screen)


def check_before(options: Options) -> None:
    """FerryError for what would only fail at the end."""
    check_lab_name(options.lab)
    require_root()
    require_haproxy()
    if importlib.util.find_spec("matplotlib") is None:
        raise FerryError("the demo draws with matplotlib, which is missing: pip install matplotlib")
    folder = options.plot.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise FerryError(f"the picture can't be written to {folder}: choose another with --plot")


def _claim(name: str) -> socket.socket:
    """Hold the demo's name until it is closed; the kernel lets go when this process dies."""
    held = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    try:
        held.bind(f"\0ferry-demo/{name}")
    except OSError as error:
        held.close()
        if error.errno == errno.EADDRINUSE:
            raise ConflictError(f"another `ferry demo` is using the lab {name} now") from error
        raise
    return held


def _clear_left_over(name: str, screen: Screen) -> None:
    """Remove what a killed demo left. ConflictError for a lab that somebody wants."""
    if name not in lab.list_labs():
        return
    if not (lab.labs_root() / name / MARKER).exists():
        raise ConflictError(
            f"a lab {name} is there already, and no demo left it behind by mistake (perhaps an "
            f"earlier one ran with --keep): `ferry lab down --lab {name}` removes it"
        )
    screen.say(f"An earlier demo was killed: its lab {name} is removed first.")
    lab.down(name)


def _image(screen: Screen) -> GuestImage:
    with screen.busy("the guest's image (the first time: 27 MB of Debian's kernel)"):
        try:
            return build_guest(default_cache_directory())
        except GuestBuildError as error:
            raise FerryError(f"the guest's image can't be built: {error}") from error


def _lab_up(options: Options, screen: Screen, stack: ExitStack) -> lab.LabRecord:
    """The lab, and its end on the stack. What is marked goes with the next demo, if need be."""
    marker = lab.labs_root() / options.lab / MARKER

    def marked(_step: str) -> None:
        marker.touch()

    if not options.keep:
        stack.callback(_lab_down, options.lab, screen)
    began_s = time.monotonic()
    with screen.busy(f"the lab {options.lab}: network namespaces, bridges, one agent a node"):
        record = lab.up(options.lab, nodes=options.nodes, report=marked)
    if options.keep:
        marker.unlink(missing_ok=True)
        stack.callback(_explain_kept, options.lab, screen)
    names = ", ".join(node.name for node in record.nodes)
    screen.say(
        f"Lab {options.lab} is up in {time.monotonic() - began_s:.1f} s: the nodes {names} are "
        "network namespaces with an agent each, joined by a switch; a client sits beside them."
    )
    for remark in remarks():
        screen.say(f"Note: {remark}.")
    return record


def _lab_down(name: str, screen: Screen) -> None:
    with interrupts_ignored():
        lab.down(name)
        screen.say(f"Lab {name} is gone; nothing of it is left.", style="dim")


def _explain_kept(name: str, screen: Screen) -> None:
    screen.heading(f"The lab {name} is kept. Go on:")
    for command in (
        f"ferry --lab {name} domain ls",
        f"ferry --lab {name} migrate {guest.NAME} --to n2",
        f"ferry --lab {name} domain console {guest.NAME} --follow",
        f"ferry --lab {name} events",
        f"ferry lab status --lab {name}",
        f"ferry lab down --lab {name}",
    ):
        screen.say(f"  {command}")


def _start_guest(server: WebServer, image: GuestImage, screen: Screen) -> None:
    screen.heading("A web server in a virtual machine")
    began_s = time.monotonic()
    node = server.plan.nodes[0].name
    with screen.busy(f"the guest {guest.NAME} boots on {node}"):
        server.create(image, node)
        server.wait_ready()
    screen.say(
        f"{guest.NAME} runs Linux under QEMU on {node} ({time.monotonic() - began_s:.1f} s to "
        f"boot). It serves HTTP on {server.address}, rewrites {guest.DIRTY_PAGES_PER_S} pages of "
        "its memory a second, keeps a journal on its disk, verifies both all the time, and sends "
        "a numbered packet each millisecond."
    )


def _watch_migrations(
    options: Options, server: WebServer, watcher: Watcher, screen: Screen
) -> list[Migration]:
    """All migrations up to the first that doesn't complete."""
    screen.heading("A client watches it")
    with screen.busy("the client connects"):
        watcher.wait_for("a download and packets", _base_line_seen, OBSERVED_TIMEOUT_S)
    screen.say(
        f"It keeps one TCP download going ({STREAM_BYTES_PER_S / 1e6:g} MB/s, every byte checked), "
        "asks for a page four times a second, and counts the packets."
    )
    screen.heading("Now the guest moves, under this load")
    screen.say(_HOW)
    names = [node.name for node in server.plan.nodes]
    migrations: list[Migration] = []
    for destination in (names[1:] + names[:1]) * options.rounds:
        with screen.busy(f"to {destination}"):
            migration = server.migrate(destination)
            migrations.append(migration)
            until_s = (migration.ended_at_s or migration.created_at_s) + report.SETTLE_S
            watcher.wait_for(
                "what followed the migration",
                lambda side, until_s=until_s: side.seen_until_s >= until_s,  # type: ignore[misc]
                OBSERVED_TIMEOUT_S,
            )
        screen.say(_sentence(migrations, watcher.seen()))
        if migration.state is not MigrationState.COMPLETED:
            break
    return migrations


def _base_line_seen(side: ClientSide) -> bool:
    if side.stream_error is not None:
        raise FerryError(f"the client's download broke before any migration: {side.stream_error}")
    full = [each for each in side.samples if each.packets and each.stream_bytes]
    return bool(full) and side.seen_until_s - full[0].at_s >= BASE_LINE_S


def _sentence(migrations: list[Migration], side: ClientSide) -> str:
    """About the newest migration."""
    migration = migrations[-1]
    move = f"  {migration.source} -> {migration.destination}: "
    if migration.state is not MigrationState.COMPLETED:
        return f"{move}{migration.state}: {migration.error or 'no reason was given'}"
    one = report.results(migrations, side)[-1]
    return (
        f"{move}{one.total_s:.2f} s; no vCPU ran for {milliseconds(one.blackout_ms)}, the client "
        f"waited at most {milliseconds(one.client_longest_gap_ms)} for a packet and missed "
        f"{one.packets_lost}"
    )


def _check_disk(server: WebServer, screen: Screen) -> DiskReport:
    with screen.busy("the guest powers off, its disk is checked"):
        return server.stop()


def _conclude(
    options: Options,
    migrations: list[Migration],
    side: ClientSide,
    disk: DiskReport | None,
    drained: DrainStory,
    screen: Screen,
) -> Outcome:
    with screen.busy("the picture"):
        title = f"{guest.NAME} moves around {options.nodes} nodes while a client watches"
        figure.draw(options.plot, title, migrations, side)
    status = side.farewell.status if side.farewell else None
    result = DemoResult(
        migrations=tuple(report.results(migrations, side)),
        tcp_connection_survived=report.tcp_survived(side, migrations),
        http_errors=side.http_errors,
        guest_corruptions=(status.corruptions if status else 0)
        + (len(disk.problems) if disk else 0),
        plot=str(options.plot),
        drain=drained.result,
    )
    faults = [*report.faults(migrations, side, disk), *drained.faults]
    screen.heading("What happened")
    screen.summary(result.migrations)
    if slowest := report.slowest_blackout(migrations):
        screen.say(f"Where the longest blackout went: {slowest}.")
    quiet_ms = report.longest_quiet_gap_ms(side.samples, report.windows(migrations))
    downloaded = sum(each.stream_bytes for each in side.samples) / 1e6
    for line in (
        f"TCP connection: {'survived' if result.tcp_connection_survived else 'BROKEN'}, "
        f"{downloaded:.0f} MB through one connection",
        f"HTTP requests:  {len(side.requests)}, of which {result.http_errors} failed; the slowest "
        f"took {max((each.seconds for each in side.requests), default=0.0):.2f} s",
        f"Packets:        {sum(each.packets for each in side.samples)} arrived, "
        f"{len(side.duplicates)} twice; without a migration the longest gap was "
        f"{milliseconds(quiet_ms)}",
        f"Guest's checks: {result.guest_corruptions} corruptions"
        + (f" in {status.memory_checks} page checks" if status else "")
        + (f", {disk.records} disk records" if disk else ""),
        f"Picture:        {options.plot}",
    ):
        screen.say(line)
    for fault in faults:
        screen.say(f"FAULT: {fault}", style="bold red")
    return Outcome(result=result, faults=tuple(faults))
