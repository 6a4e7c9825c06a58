"""A lab's agent with what a lab doesn't set: the number of page streams.

    python tests/benchmarks/agent.py --streams N --config PATH

The file that the lab has written stays as it is: a lab starts an agent anew whose file differs.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import msgspec

from node_agent.agent import run
from node_agent.config import load_config


def main() -> None:
    """Until SIGTERM."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args()
    config = load_config(options.config)
    migration = msgspec.structs.replace(config.migration, streams=options.streams)
    run(msgspec.structs.replace(config, migration=migration))


if __name__ == "__main__":
    main()
