"""A lab's agent with what a lab doesn't set: page streams, keys for TLS.

    python tests/benchmarks/agent.py [--streams N] [--tls FOLDER] --config PATH

It changes the configuration file that the lab has just written, puts the node's keys
(FOLDER/NODE/*.pem) where an agent looks for them, and becomes the agent.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path

import msgspec

from node_agent.config import load_config, render_config


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--streams", type=int, default=1)
    parser.add_argument("--tls", type=Path)
    parser.add_argument("--config", type=Path, required=True)
    options = parser.parse_args()
    config = load_config(options.config)
    migration = msgspec.structs.replace(config.migration, streams=options.streams)
    text = render_config(msgspec.structs.replace(config, migration=migration))
    options.config.write_text(text)
    if options.tls is not None:
        keys = Path(config.node.state_directory) / "tls"
        shutil.copytree(options.tls / config.node.name, keys, dirs_exist_ok=True)
    os.execv(sys.executable, [sys.executable, "-m", "node_agent", "--config", str(options.config)])


if __name__ == "__main__":
    main()
