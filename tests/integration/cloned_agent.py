"""The agent of a node's clone: its name and its store, and another host that has booted by itself.

    python tests/integration/cloned_agent.py --config PATH STATE_DIRECTORY

Its own state directory, where PATH's node has another: it must not get as far as to need it.
"""

from __future__ import annotations

import sys
from pathlib import Path

import msgspec

from node_agent import agent, foundations
from node_agent.config import load_config


def main() -> None:
    """As the agent's."""
    state = Path(sys.argv[-1])
    (state / "boot_id").write_text("00000000-0000-0000-0000-000000000001\n")
    setattr(foundations, "BOOT_ID_PATH", state / "boot_id")  # noqa: B010 - final, but for tests
    config = load_config(Path(sys.argv[sys.argv.index("--config") + 1]))
    agent.run(
        msgspec.structs.replace(
            config,
            node=msgspec.structs.replace(config.node, state_directory=str(state)),
            api=msgspec.structs.replace(config.api, socket=str(state / "api.sock")),
        )
    )


if __name__ == "__main__":
    main()
