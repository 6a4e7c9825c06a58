"""`ferry lab`: a cluster on one machine, made, looked at and removed with one command each."""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from typing import Annotated, NoReturn

import msgspec
import typer

from deploy.lab import lab as labs
from deploy.lab.kinds import FabricKind, StoreKind
from deploy.lab.preconditions import remarks, require_root
from deploy.lab.record import DEFAULT_NAME, others
from migrator.errors import FerryError, InvalidRequest, RefusedError
from node_agent.cli.errors import exit_code

app = typer.Typer(
    name="lab", help="A cluster on this one machine, for trying and testing.", no_args_is_help=True
)

_Name = Annotated[
    str, typer.Option("--lab", "--name", "-n", envvar="FERRY_LAB", help="The lab's name.")
]
_INTERRUPTED = 130
_FAILED = 1


class AgentAction(StrEnum):
    START = "start"
    STOP = "stop"
    KILL = "kill"


class MemberAction(StrEnum):
    START = "start"
    KILL = "kill"


@contextmanager
def _errors_as_sentences() -> Iterator[Callable[[], None]]:
    """FerryError becomes its sentence and exit code; SIGTERM ends as orderly as Ctrl-C.

    Yields what raises KeyboardInterrupt once more if one was lost: Python drops what is raised in
    a weak reference's callback or a `__del__`, and a signal may come just then.
    """
    heard = False

    def interrupt(_number: int, _frame: object) -> NoReturn:
        nonlocal heard
        heard = True
        raise KeyboardInterrupt

    def check() -> None:
        if heard:
            raise KeyboardInterrupt

    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    try:
        yield check
    except RefusedError as error:
        if len(error.reasons) > 1:
            print("This machine can't hold a lab:", file=sys.stderr)
            for reason in error.reasons:
                print(f"  - {reason}", file=sys.stderr)
        else:
            print(f"ferry lab: {error}", file=sys.stderr)
        raise typer.Exit(exit_code(error.http_status)) from None
    except FerryError as error:
        print(f"ferry lab: {error}", file=sys.stderr)
        raise typer.Exit(exit_code(error.http_status)) from None
    except KeyboardInterrupt:
        print("Interrupted; nothing was left half-made.", file=sys.stderr)
        raise typer.Exit(_INTERRUPTED) from None


@app.command()
def up(
    name: _Name = DEFAULT_NAME,
    nodes: Annotated[
        int | None, typer.Option("--nodes", min=1, help="How many nodes. New lab: 3.")
    ] = None,
    link_mbit: Annotated[
        int | None,
        typer.Option("--link-mbit", min=0, help="Speed of each node's links, Mbit/s; 0: no limit."),
    ] = None,
    store: Annotated[
        StoreKind | None,
        typer.Option("--store", help="Where the cluster's state is. New lab: sqlite, one file."),
    ] = None,
    storage: Annotated[
        str,
        typer.Option("--storage", help="Storage servers to add, with a pool each: nfs,iscsi,nbd"),
    ] = "",
    tls: Annotated[
        bool | None,
        typer.Option(
            "--tls/--plain",
            help="Found a cluster and join its nodes: mutual TLS, HTTPS, users. New lab: plain.",
        ),
    ] = None,
    fabric: Annotated[
        FabricKind | None,
        typer.Option("--fabric", help="The guests' network; one bridge for all, if not said."),
    ] = None,
    verbose: Annotated[bool, typer.Option("--verbose", "-v", help="Say each step.")] = False,
) -> None:
    """Make the lab, or repair it and let it grow."""
    started = time.monotonic()
    with _errors_as_sentences() as check:

        def step(line: str) -> None:
            check()
            if verbose:
                print(line)

        record = labs.up(
            name,
            nodes=nodes,
            link_mbit=link_mbit,
            store=store,
            storage_kinds=[kind for kind in storage.split(",") if kind],
            tls=tls,
            fabric=fabric,
            report=step,
        )
    names = ", ".join(node.name for node in record.nodes)
    seconds = time.monotonic() - started
    print(f"Lab {name} is up: {len(record.nodes)} nodes ({names}), in {seconds:.1f} s.")
    for remark in remarks():
        print(f"Note: {remark}.")
    print(
        f"\nNext:\n  export FERRY_LAB={name}\n  ferry node ls\n  ferry lab status\n  ferry lab down"
    )


@app.command()
def down(
    name: _Name = DEFAULT_NAME,
    everything: Annotated[bool, typer.Option("--all", help="Every lab of this machine.")] = False,
) -> None:
    """End and remove the lab: its domains, agents, networks, volumes and files."""
    with _errors_as_sentences():
        require_root()
        if everything:
            gone = labs.down_all()
            print(f"Removed: {', '.join(gone)}." if gone else "There are no labs.")
        elif labs.down(name):
            print(f"Lab {name} is gone.")
        else:
            print(f"There is no lab {name}{others()}.")


@app.command()
def status(
    name: _Name = DEFAULT_NAME,
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """How the lab is. Exit status 1 if it is damaged."""
    with _errors_as_sentences():
        found = labs.status(name)
    if as_json:
        print(json.dumps(msgspec.to_builtins(found), indent=2))
    else:
        rate = f"{found.link_mbit} Mbit/s" if found.link_mbit else "not shaped"
        print(f"Lab {name}: {found.state}; links {rate}; guests {found.guest_network}")
        line = "{:6} {:9} {:>8} {:>10}  {:15} {}"
        print(line.format("NODE", "AGENT", "PID", "PROCESSES", "ADDRESS", "API"))
        for node in found.nodes:
            pid = node.agent_pid or "-"
            address = node.mgmt_address
            print(line.format(node.name, node.agent, pid, node.processes, address, node.api))
        if found.missing:
            print(f"Missing: {', '.join(found.missing)}.")
        if found.state != "ready":
            print(f"`ferry lab up --lab {name}` repairs it.")
    if found.state != "ready":
        raise typer.Exit(_FAILED)


@app.command("ls")
def list_labs(
    as_json: Annotated[bool, typer.Option("--json", help="For programs.")] = False,
) -> None:
    """The labs of this machine, half-made ones too."""
    with _errors_as_sentences():
        names = labs.list_labs()
    print(json.dumps(names) if as_json else "\n".join(names) or "There are no labs.")


@app.command(
    "exec", context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
def execute(
    where: Annotated[
        str, typer.Argument(help="A node, client, storage, switch, router, etcd1 to 3.")
    ],
    command: Annotated[list[str], typer.Argument(help="The command and its arguments.")],
    name: _Name = DEFAULT_NAME,
) -> None:
    """Run a command in the network of a node, or of another host of the lab.

    As in `ferry lab exec client -- ping 10.78.0.5`. The exit status is the command's.
    """
    with _errors_as_sentences():
        require_root()
        # Without interspersed options, click leaves the separator to us.
        words = command[1:] if command[0] == "--" else command
        if not words:
            raise InvalidRequest("which command? e.g. `ferry lab exec n1 -- ip address`")
        vector = labs.command_in(name, where, words)
    sys.stdout.flush()
    os.execv(vector[0], vector)


@app.command()
def agent(
    node: Annotated[str, typer.Argument(help="The node.")],
    action: Annotated[AgentAction, typer.Argument(help="kill: SIGKILL, as a crash would.")],
    name: _Name = DEFAULT_NAME,
) -> None:
    """Start, stop or kill one node's agent. Its domains go on running."""
    with _errors_as_sentences():
        if action is AgentAction.START:
            process = labs.start_agent(name, node)
            print(f"The agent of {node} answers (pid {process.pid}).")
            return
        ended = labs.stop_agent(name, node, kill=action is AgentAction.KILL)
    word = "killed" if action is AgentAction.KILL else "stopped"
    print(f"The agent of {node} is {word}." if ended else f"The agent of {node} wasn't running.")


@app.command("storage")
def storage_server(
    kind: Annotated[str, typer.Argument(help="nfs, nbd, ...: one that the lab has.")],
    action: Annotated[MemberAction, typer.Argument(help="kill: SIGKILL, as a crash would.")],
    name: _Name = DEFAULT_NAME,
) -> None:
    """Start or kill one of the lab's storage servers (`up --storage nfs`)."""
    with _errors_as_sentences():
        changed = labs.storage_server(name, kind, run=action is MemberAction.START)
    if action is MemberAction.START:
        print(f"{kind} serves." if changed else f"{kind} was running.")
    else:
        print(f"{kind} is killed." if changed else f"{kind} wasn't running.")


@app.command("etcd")
def etcd_member(
    member: Annotated[str, typer.Argument(help="etcd1, etcd2 or etcd3.")],
    action: Annotated[MemberAction, typer.Argument(help="kill: SIGKILL, as a crash would.")],
    name: _Name = DEFAULT_NAME,
) -> None:
    """Start or kill one member of the lab's etcd (`up --store etcd`)."""
    with _errors_as_sentences():
        changed = labs.etcd_member(name, member, run=action is MemberAction.START)
    if action is MemberAction.START:
        print(
            f"{member} runs; etcd serves where two of its members do."
            if changed
            else f"{member} was running."
        )
    else:
        print(f"{member} is killed." if changed else f"{member} wasn't running.")


if __name__ == "__main__":
    app()
