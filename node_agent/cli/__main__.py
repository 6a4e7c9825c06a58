"""Where `ferry` begins: whatever is imported after this, Ctrl-C ends it without a traceback.

On a host whose cores are all taken the imports alone may last seconds.
"""

from __future__ import annotations

import sys


def main() -> None:
    """The entry point."""
    try:
        from node_agent.cli.main import run

        code = run(sys.argv[1:])
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)


if __name__ == "__main__":
    main()
