"""`ferry agent`"""

from __future__ import annotations

import importlib
from pathlib import Path
from typing import Annotated

import typer

from migrator.errors import FerryError, RemovedError
from migrator.imports import without_collections
from node_agent.cli.errors import CliError, ExitCode
from node_agent.config import load_config


def agent(
    config: Annotated[Path, typer.Option("--config", "-c", help="Its TOML file.")] = Path(
        "/etc/ferry/agent.toml"
    ),
) -> None:
    """Run the agent of this node, until SIGTERM."""
    try:
        loaded = load_config(config)
        with without_collections():
            run = importlib.import_module("node_agent.agent").run
        code = run(loaded)
    except RemovedError as error:
        raise CliError(str(error), ExitCode.REMOVED) from error
    except FerryError as error:
        raise CliError(str(error)) from error
    raise typer.Exit(int(code or 0))
