"""A lab's agent that soon forgets its migrations' network, and soon has its spare engines again.

Tests wait for both, after each migration. And its switchovers may be held for longer: a test that
holds one may itself get no core for a while.

    python tests/integration/quick_agent.py --config PATH

The file that the lab has written stays as it is: a lab starts an agent anew whose file differs.
"""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Final

import msgspec

from migrator.imports import without_collections

with without_collections():
    from migrator.engine import spares
    from migrator.session import source_view
    from migrator.session.base import Timing
    from node_agent.agent import run
    from node_agent.config import load_config

GRACE_S: Final = 0.7
"""The verification is over by then; forwarding is a matter of the blackout's milliseconds."""
SWITCHOVER_S: Final = 10.0
COMMAND: Final = (sys.executable, str(Path(__file__).resolve()))


def main() -> None:
    """Until SIGTERM."""
    config = load_config(Path(sys.argv[sys.argv.index("--config") + 1]))
    fabric = msgspec.structs.replace(config.fabric, grace_s=GRACE_S)
    setattr(spares, "RECOVERY_S", GRACE_S)  # noqa: B010 - final, but for tests
    timing = partial(Timing, switchover_s=SWITCHOVER_S)
    setattr(source_view, "Timing", timing)  # noqa: B010 - a class, but for tests
    run(msgspec.structs.replace(config, fabric=fabric))


if __name__ == "__main__":
    main()
