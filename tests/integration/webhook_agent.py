"""A routed lab's agent whose routes somebody else's controller sets, told by webhook.

    python tests/integration/webhook_agent.py --config PATH

The file that the lab has written stays as it is: a lab starts an agent anew whose file differs.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import msgspec

from node_agent.agent import run
from node_agent.config import load_config

PORT: Final = 7790
"""TCP, at each address of the lab's router."""
GRACE_S: Final = 0.7
"""Longer than what may still be under way; then the old node asks where the guest is."""
COMMAND: Final = (sys.executable, str(Path(__file__).resolve()))


def main() -> None:
    """Until SIGTERM."""
    config = load_config(Path(sys.argv[sys.argv.index("--config") + 1]))
    router = config.fabric.route_peers[0]
    fabric = msgspec.structs.replace(
        config.fabric,
        routes="webhook",
        route_url=f"http://{router}:{PORT}/routes",
        route_peers=(),
        grace_s=GRACE_S,
    )
    run(msgspec.structs.replace(config, fabric=fabric))


if __name__ == "__main__":
    main()
