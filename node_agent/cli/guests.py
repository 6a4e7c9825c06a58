"""`ferry node shutdown-guests`: what a host's shutdown calls, and works without its agent."""

from __future__ import annotations

import asyncio
import importlib
import time
from pathlib import Path
from typing import Annotated, Final
from urllib.parse import quote

import typer

from migrator.errors import FerryError
from node_agent.cli.client import ApiClient
from node_agent.cli.errors import CliError, ExitCode, Unreachable
from node_agent.cli.output import note, show
from node_agent.config import AgentConfig, load_config
from node_agent.resources import GuestsEnded, GuestsShutdown

ANSWER_S: Final = 60.0
"""Beyond the limit, for the agent's answer: more than it takes to end the last guest by force."""
AGAIN_S: Final = 1.0


def shutdown_guests(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="The configuration of this host's agent.")
    ] = Path("/etc/ferry/agent.toml"),
    timeout_s: Annotated[
        float | None,
        typer.Option(
            "--timeout",
            min=1,
            max=1500,
            help="What all guests may take together, s; default: node.guest_shutdown_s.",
        ),
    ] = None,
) -> None:
    """Shut down all guests of this host, as it goes down: ferry-guests.service does this.

    They are started again when the host is up again; until then nothing else is started here. If it
    doesn't go down after all: `systemctl restart ferry-agent` starts them. The lowest priority is
    asked first. What doesn't go in time is ended by force. Works without the agent, too.
    """
    try:
        loaded = load_config(config)
    except FerryError as error:
        raise CliError(str(error), ExitCode.USAGE) from error
    limit_s = loaded.node.guest_shutdown_s if timeout_s is None else timeout_s
    if limit_s == 0:
        note("node.guest_shutdown_s is 0: guests are not shut down, and end with the host")
        return
    ended = _shut_down(loaded, limit_s)
    show(ended, _text(ended))
    raise typer.Exit(ExitCode.FAILED if ended.left else ExitCode.OK)


def _shut_down(config: AgentConfig, limit_s: float) -> GuestsEnded:
    client = ApiClient(f"unix:{config.api.socket}")
    path = f"/v1/nodes/{quote(config.node.name, safe='')}/shutdown-guests"
    until = time.monotonic() + limit_s
    left_s = limit_s
    while True:  # An agent that is just beginning, or ending, has its guests, and no API.
        try:
            body = GuestsShutdown(timeout_s=left_s)
            return client.post(path, GuestsEnded, body, timeout_s=left_s + ANSWER_S)
        except Unreachable as error:
            unreachable = error
        left_s = max(until - time.monotonic(), 1.0)
        try:
            return asyncio.run(_without_agent(config, left_s))
        except FerryError as error:
            if time.monotonic() >= until:
                raise CliError(f"{unreachable}; and without it: {error}") from error
        time.sleep(AGAIN_S)
        left_s = max(until - time.monotonic(), 1.0)


async def _without_agent(config: AgentConfig, limit_s: float) -> GuestsEnded:
    hypervisor = importlib.import_module("node_agent.drivers").make_hypervisor(config)
    shutdown = importlib.import_module("node_agent.host_shutdown")
    notes = importlib.import_module("node_agent.restart_notes")
    store = notes.RestartFile(Path(config.node.state_directory) / "restarts.json")
    ended: GuestsEnded = await shutdown.without_agent(hypervisor, store, limit_s)
    return ended


def _text(ended: GuestsEnded) -> str:
    lines = [f"guests that have shut down: {', '.join(ended.powered_off) or 'none'}"]
    if ended.forced:
        lines.append(f"ended by force: {', '.join(ended.forced)}")
    lines += (f"left: {each.name}: {each.why}" for each in ended.left)
    return "\n".join(lines)
