"""`ferry doctor`"""

from __future__ import annotations

import asyncio
import importlib
from pathlib import Path
from typing import Annotated

import typer

from migrator.errors import FerryError
from migrator.model import HypervisorCapabilities
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.output import show, table
from node_agent.config import AgentConfig, load_config
from node_agent.doctor.findings import Diagnosis, Level

_MARKS = {Level.OK: "ok", Level.WARNING: "WARN", Level.FAILURE: "FAIL"}


def doctor(
    config: Annotated[
        Path | None,
        typer.Option("--config", "-c", help="The node's configuration; default: the installed."),
    ] = None,
) -> None:
    """Check this node: kernel, QEMU, bridges, ports, storage, and the ways to the other nodes.

    Says how to mend what it finds. Exit code 1 if something doesn't work; warnings are no failure.
    Run it on the node itself, as root. It changes nothing.
    """
    from node_agent.doctor.examination import default_config, examine  # Brings netlink in.

    try:
        loaded = load_config(config or default_config())
    except FerryError as error:
        raise CliError(str(error), ExitCode.USAGE) from error
    found = examine(loaded, lambda: _capabilities(loaded))
    show(found, _text(found))
    raise typer.Exit(ExitCode.OK if found.healthy else ExitCode.FAILED)


def _capabilities(config: AgentConfig) -> HypervisorCapabilities | str:
    hypervisor = importlib.import_module("node_agent.drivers").make_hypervisor(config)
    try:
        found: HypervisorCapabilities = asyncio.run(hypervisor.capabilities())
    except FerryError as error:
        return str(error)
    return found


def _text(found: Diagnosis) -> str:
    rows = [(_MARKS[each.level], each.check, each.detail) for each in found.findings]
    text = table(("", "CHECK", f"FOUND ON {found.node}"), rows)
    mends = [f"  {each.check}: {each.mend}" for each in found.findings if each.mend]
    failures = sum(each.level is Level.FAILURE for each in found.findings)
    warnings = sum(each.level is Level.WARNING for each in found.findings)
    if mends:
        text += "\n\nHow to mend it:\n" + "\n".join(mends)
    return f"{text}\n\n{_count(failures, 'failure')}, {_count(warnings, 'warning')}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"
