"""A lab's agent with what a lab doesn't set: the number of page streams.

    python tests/benchmarks/agent.py --streams N --config PATH

It changes the configuration file that the lab has just written, and becomes the agent.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import msgspec

from node_agent.config import load_config, render_config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, required=True)
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args()
    config = load_config(options.config)
    migration = msgspec.structs.replace(config.migration, streams=options.streams)
    changed = msgspec.structs.replace(config, migration=migration)
    options.config.write_text(render_config(changed))
    command = [sys.executable, "-m", "node_agent", "--config", str(options.config)]
    os.execv(sys.executable, command)


if __name__ == "__main__":
    main()
