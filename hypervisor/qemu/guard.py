"""Gives QEMU's own migration up when the agent that supervised it dies. A program of its own.

QEMU would go on by itself, stop the guest at the switchover, and wait there for an agent. The page
engine needs no such guard: its relay dies with its agent, and QEMU notices.

    python -I -S guard.py MONITOR [MONITOR...]      unix sockets; the first that answers

A byte on standard input: all is over, end. End of file: the agent is gone; unless QEMU is past the
switchover already (then the ownership record decides), `migrate_cancel`: the guest runs on.
It goes to the background at once; its first process ends when it has begun. Only the standard
library's lightest parts: it is started before each such migration.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time

ANSWER_S = 5.0
TRIES = 100
PAUSE_S = 0.1
LAST_WORDS_S = 0.05
"""That QEMU is given to carry out what the agent said last."""
ABORTABLE = ("setup", "active", "pre-switchover")


def main(monitors: list[str]) -> int:
    if os.fork():
        return 0  # It has begun.
    os.setsid()
    if os.read(0, 1):
        return 0
    time.sleep(LAST_WORDS_S)
    for attempt in range(TRIES):
        try:
            give_up(monitors[attempt % len(monitors)])
        except FileNotFoundError:
            return 0  # The guest is gone.
        except (OSError, ValueError, KeyError):  # Nobody is left to be told.
            time.sleep(PAUSE_S)
        else:
            return 0
    return 1


def give_up(path: str) -> None:
    """OSError, ValueError, KeyError: QEMU didn't answer, or not as QEMU does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
        connection.settimeout(ANSWER_S)
        folder, name = os.path.split(path)
        os.chdir(folder)  # The whole path may be too long for a socket address.
        connection.connect(name)
        with connection.makefile("r") as answers:
            json.loads(answers.readline())["QMP"]
            for command in ("qmp_capabilities", "query-migrate"):
                found = ask(connection, answers, command)
            if found.get("status") in ABORTABLE:
                ask(connection, answers, "migrate_cancel")


def ask(connection: socket.socket, answers: object, command: str) -> dict[str, object]:
    connection.sendall(json.dumps({"execute": command}).encode() + b"\n")
    while True:
        line = answers.readline()  # type: ignore[attr-defined]
        message: dict[str, dict[str, object]] = json.loads(line)
        if "event" not in message:
            return message["return"]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
