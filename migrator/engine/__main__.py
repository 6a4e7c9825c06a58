"""`python -m migrator.engine --fd N`: one engine process. N is its end of the socketpair.

Exit status: 0 after `Stop`, the agent's death or SIGTERM; 1 after `EngineFailed`.
"""

from __future__ import annotations

import os
import sys

from migrator.imports import without_collections

if __name__ == "__main__":
    with without_collections():
        from migrator.engine.process import main
    status = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # Tearing the interpreter down takes 26 ms of CPU that the guest needs now.
