"""Run a command with a /run of its own: `python private.py FOLDER COMMAND [ARGUMENT...]`.

Storage servers keep sockets and pid files at fixed places below /run; two labs, or a lab and the
machine's own servers, must not meet there. A file of its own, without imports beyond the standard
library, because it runs between fork and exec: the process is the command from then on, same pid.
Exit status 126 if the folder can't be mounted, 127 if the command can't be started.
"""

import ctypes
import os
import sys

_CLONE_NEWNS = 0x20000
_MS_BIND = 0x1000
_MS_REC = 0x4000
_MS_PRIVATE = 0x40000


def main(arguments: list[str]) -> None:
    folder, *command = arguments
    libc = ctypes.CDLL(None, use_errno=True)
    if (
        libc.unshare(_CLONE_NEWNS) != 0
        or libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) != 0
        or libc.mount(os.fsencode(folder), b"/run", None, _MS_BIND, None) != 0
    ):
        print(f"{folder} can't be /run: {os.strerror(ctypes.get_errno())}", file=sys.stderr)
        sys.exit(126)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"{command[0]} can't be started: {error}", file=sys.stderr)
        sys.exit(127)


if __name__ == "__main__":
    main(sys.argv[1:])
