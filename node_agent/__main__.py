"""`python -m node_agent --config PATH`: the agent without the command line's other commands."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from migrator.errors import FerryError, RemovedError
from migrator.imports import without_collections

with without_collections():
    from node_agent.agent import run
    from node_agent.cli.errors import ExitCode
    from node_agent.config import load_config


def main() -> int:
    parser = argparse.ArgumentParser(prog="node_agent", description="The agent of one Ferry node.")
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args()
    try:
        run(load_config(options.config))
    except FerryError as error:
        print(f"ferry agent: {error}", file=sys.stderr)
        return ExitCode.REMOVED if isinstance(error, RemovedError) else ExitCode.FAILED
    return 0


if __name__ == "__main__":
    sys.exit(main())
