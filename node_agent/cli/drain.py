"""`ferry cordon`, `uncordon`, `drain`, `undrain` and `ferry drains ...`"""

from __future__ import annotations

from typing import Annotated
from urllib.parse import quote

import typer

from migrator.model import NodeState
from node_agent.cli.drain_text import balance_text, counted, details, moved, plan_text, took
from node_agent.cli.drain_view import watch_drain
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.output import moment, settings, show, table
from node_agent.drain.resources import (
    BalancePlan,
    CordonRequest,
    Drain,
    DrainList,
    DrainPlan,
    DrainPolicy,
    DrainRequest,
    Operation,
    UndrainRequest,
)
from node_agent.resources import Node

drains = typer.Typer(
    help="Drains and undrains: list, look at, watch.", no_args_is_help=True, rich_markup_mode=None
)
_NodeArgument = Annotated[str, typer.Argument(metavar="NODE", help="The node.")]
_IdArgument = Annotated[str, typer.Argument(metavar="ID", help="The drain.")]
_Reason = Annotated[
    str, typer.Option(help="Why, for those who ask later; `ferry node ls` tells it.")
]
_NoWait = Annotated[bool, typer.Option("--no-wait", help="Don't wait for its end.")]


def cordon(node: _NodeArgument, reason: _Reason = "") -> None:
    """Let no domain start on a node or move there; what runs there goes on."""
    body = CordonRequest(reason=reason)
    found = settings.client().post(f"{_path(node)}/cordon", Node, body)
    there = counted(len(found.domains), "domain")
    show(found, f"node {node} is {_stands(found, NodeState.CORDONED)}; {there} there")


def uncordon(node: _NodeArgument) -> None:
    """Open a cordoned or drained node again. `undrain` brings its domains back, too."""
    found = settings.client().post(f"{_path(node)}/uncordon", Node)
    show(found, f"node {node} is {_stands(found, NodeState.READY)}")


def _stands(found: Node, intended: NodeState) -> str:
    """A silent node's state is its silence; what was asked for holds all the same."""
    if found.state is not NodeState.UNREACHABLE:
        return found.state.value
    return f"{'open' if intended is NodeState.READY else intended.value}, and unreachable"


def drain(
    node: _NodeArgument,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the plan, its times and its blockers.")
    ] = False,
    parallel: Annotated[
        int | None,
        typer.Option(min=1, max=64, help="Moves at once; by default what the links need."),
    ] = None,
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=1,
            help="Seconds after which no move begins any more. [default: an hour, or twice the "
            "plan]",
        ),
    ] = None,
    policy: Annotated[
        DrainPolicy,
        typer.Option(help="Each as its own policy says (auto), all live, or all stopped."),
    ] = DrainPolicy.AUTO,
    exclude: Annotated[
        list[str] | None,
        typer.Option(help="A domain that stays there; repeatable, or with commas."),
    ] = None,
    reboot_hint: Annotated[
        bool,
        typer.Option(
            "--reboot-hint", help="The node will be rebooted: when it is back, so are its domains."
        ),
    ] = False,
    cancel: Annotated[
        bool,
        typer.Option("--cancel", help="Cancel the node's drain: no move begins any more; open it."),
    ] = False,
    abort_moves: Annotated[
        bool,
        typer.Option("--abort-moves", help="With --cancel: cancel the migrations under way, too."),
    ] = False,
    reason: _Reason = "",
    no_wait: _NoWait = False,
) -> None:
    """Empty a node for maintenance: cordon it, and move everything away.

    Ctrl-C detaches; the drain goes on. It is done when the node is empty, and not before.
    """
    if cancel and dry_run:
        raise CliError("--cancel does it, --dry-run doesn't: one of them", ExitCode.USAGE)
    client = settings.client()
    if cancel:
        query = "?abort_moves=true" if abort_moves else ""
        answer = client.delete(f"{_path(node)}/drain{query}")
        asked = client.decoded(answer, Drain)
        if no_wait:
            show(asked, _cancelling(asked))
            return
        code = watch_drain(asked)
        raise typer.Exit(ExitCode.OK if code is ExitCode.DRAIN_CANCELLED else code)
    if abort_moves:
        raise CliError("--abort-moves belongs to --cancel", ExitCode.USAGE)
    body = DrainRequest(
        parallel=parallel,
        timeout_s=timeout_s,
        policy=policy,
        exclude=tuple(name for each in exclude or () for name in each.split(",") if name),
        reboot_hint=reboot_hint,
        reason=reason,
    )
    if dry_run:
        plan = client.post(f"{_path(node)}/drain?dry_run=true", DrainPlan, body)
        show(plan, plan_text(plan))
        raise typer.Exit(ExitCode.REFUSED if plan.blockers else ExitCode.OK)
    begun = client.post(f"{_path(node)}/drain", Drain, body)
    _follow(begun, f"drain {begun.id} of node {node} has begun", no_wait)


def undrain(
    node: _NodeArgument,
    no_restore: Annotated[
        bool, typer.Option("--no-restore", help="Only open it; what it lost stays where it is.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print what would come back, and what not.")
    ] = False,
    no_wait: _NoWait = False,
) -> None:
    """Open a drained node again, and bring back the domains that the drain took away."""
    client = settings.client()
    if dry_run:
        plan = client.post(f"{_path(node)}/undrain?dry_run=true", DrainPlan)
        show(plan, plan_text(plan, Operation.UNDRAIN))
        return
    body = UndrainRequest(restore=not no_restore)
    begun = client.post(f"{_path(node)}/undrain", Drain, body)
    _follow(begun, f"undrain {begun.id} of node {node} has begun", no_wait)


def balance(
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Only print the moves; so it is without --apply.")
    ] = False,
    apply: Annotated[bool, typer.Option("--apply", help="Make the moves.")] = False,
    no_wait: _NoWait = False,
) -> None:
    """Even CPU, memory and network load out between the nodes, by the fewest moves.

    By what the domains have used in the last minutes. Nodes that are even enough are left alone.
    """
    if dry_run and apply:
        raise CliError("either --dry-run or --apply", ExitCode.USAGE)
    client = settings.client()
    if not apply:
        plan = client.post("/v1/balance?dry_run=true", BalancePlan)
        show(plan, balance_text(plan))
        return
    begun = client.post("/v1/balance", Drain)
    moves = counted(len(begun.moves), "move")
    _follow(begun, f"balancing {begun.id} has begun: {moves}", no_wait)


def _follow(begun: Drain, said: str, no_wait: bool) -> None:
    """Watch it to its end, and exit as that says; or only say that it has begun."""
    if no_wait:
        show(begun, said)
        return
    raise typer.Exit(watch_drain(begun))


@drains.command("ls")
def list_drains() -> None:
    """All drains and undrains, newest first."""
    found = settings.client().get("/v1/drains", DrainList).drains
    rows = [
        (
            each.id,
            each.operation.value,
            each.node or "-",
            each.state.value,
            f"{moved(each)} of {len(each.moves)}",
            f"{each.planned_s:.1f} s",
            took(each),
            each.coordinator,
            moment(each.created_at_s),
        )
        for each in found
    ]
    headings = (
        "ID",
        "KIND",
        "NODE",
        "STATE",
        "DOMAINS",
        "PLANNED",
        "TOOK",
        "COORDINATOR",
        "CREATED",
    )
    show(found, table(headings, rows))


@drains.command("show")
def show_drain(id: _IdArgument) -> None:
    """One drain, domain by domain: planned and actual times, and its history."""
    found = settings.client().get(_drain_path(id), Drain)
    show(found, details(found))


@drains.command("watch")
def watch(id: _IdArgument) -> None:
    """Show how a drain goes, until it ends."""
    raise typer.Exit(watch_drain(settings.client().get(_drain_path(id), Drain)))


@drains.command("cancel")
def cancel_drain(
    id: _IdArgument,
    abort_moves: Annotated[
        bool, typer.Option("--abort-moves", help="Cancel the migrations under way, too.")
    ] = False,
) -> None:
    """Begin no move of it any more, and open the node."""
    query = "?abort_moves=true" if abort_moves else ""
    client = settings.client()
    found = client.decoded(client.delete(f"{_drain_path(id)}{query}"), Drain)
    show(found, _cancelling(found))


def _cancelling(asked: Drain) -> str:
    node = f" of node {asked.node}" if asked.node else ""  # A balancing has none.
    return f"{asked.operation} {asked.id}{node} is being cancelled"


def _path(node: str) -> str:
    return f"/v1/nodes/{quote(node, safe='')}"


def _drain_path(id: str) -> str:
    return f"/v1/drains/{quote(id, safe='')}"
