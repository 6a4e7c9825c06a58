#!/usr/bin/env python3
"""A QEMU that says it has no machine type pc-q35-7.2 and no CPU model qemu64: an older one, say.

Put where an agent's configuration names its hypervisor. Only the agent's first question, which
starts QEMU with `-machine none`, goes through here; anything else becomes the real QEMU.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import socket
import subprocess
import sys

REAL = "qemu-system-x86_64"
LACKING = ("pc-q35-7.2", "qemu64")
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    if "none" not in arguments:
        os.execvp(REAL, [REAL, *arguments])
    at = next(i for i, word in enumerate(arguments) if ",fd=" in word)
    agent = socket.socket(fileno=int(arguments[at].rpartition("=")[2]))
    ours, theirs = socket.socketpair()
    arguments[at] = arguments[at].rpartition("=")[0] + f"={theirs.fileno()}"
    subprocess.Popen(
        [REAL, *arguments],
        pass_fds=[theirs.fileno()],
        preexec_fn=die_with_the_parent,  # noqa: PLW1509, this process has one thread
    )
    theirs.close()
    if os.fork() == 0:
        die_with_the_parent()
        while data := agent.recv(65_536):
            ours.sendall(data)
        return
    for line in ours.makefile("rb"):
        message = json.loads(line)
        if isinstance(message.get("return"), list):
            message["return"] = [
                entry for entry in message["return"] if entry.get("name") not in LACKING
            ]
        agent.sendall(json.dumps(message).encode() + b"\r\n")


def die_with_the_parent() -> None:
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


if __name__ == "__main__":
    main(sys.argv[1:])
