"""Run a command in a network namespace: `python enter.py NAMESPACE COMMAND [ARGUMENT...]`.

A file of its own, without imports beyond the standard library, because it runs between fork and
exec of every process that a lab starts: the process is the command from then on, same pid.
Exit status 126 if the namespace can't be entered, 127 if the command can't be started.
"""

import ctypes
import os
import sys

CLONE_NEWNET = 0x40000000
NAMESPACES_FOLDER = "/run/netns"


def enter(namespace: str) -> None:
    """Move the calling thread into the namespace. Raises OSError; then it hasn't moved."""
    descriptor = os.open(f"{NAMESPACES_FOLDER}/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.setns(descriptor, CLONE_NEWNET) != 0:
            code = ctypes.get_errno()
            raise OSError(code, os.strerror(code), namespace)
    finally:
        os.close(descriptor)


def main(arguments: list[str]) -> None:
    namespace, *command = arguments
    try:
        enter(namespace)
    except OSError as error:
        sys.exit(_complain(126, f"the namespace {namespace} can't be entered: {error}"))
    try:
        os.execvp(command[0], command)
    except OSError as error:
        sys.exit(_complain(127, f"{command[0]} can't be started: {error}"))


def _complain(status: int, message: str) -> int:
    print(message, file=sys.stderr)
    return status


if __name__ == "__main__":
    main(sys.argv[1:])
