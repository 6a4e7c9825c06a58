"""A lab's agent that forgets its migrations' network sooner: tests wait for the last one's end.

    python tests/integration/quick_agent.py --config PATH

It changes the configuration file that the lab has just written, and becomes the agent.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Final

import msgspec

from node_agent.config import load_config, render_config

GRACE_S: Final = 0.7
"""The verification is over by then; forwarding is a matter of the blackout's milliseconds."""
COMMAND: Final = (sys.executable, str(Path(__file__).resolve()))


def main() -> None:
    """Never returns."""
    path = Path(sys.argv[sys.argv.index("--config") + 1])
    config = load_config(path)
    fabric = msgspec.structs.replace(config.fabric, grace_s=GRACE_S)
    path.write_text(render_config(msgspec.structs.replace(config, fabric=fabric)))
    os.execv(sys.executable, [sys.executable, "-m", "node_agent", "--config", str(path)])


if __name__ == "__main__":
    main()
