#!/usr/bin/env python3
"""A block pool's hooks for the tests: devices are loop devices, one a node, over one file.

    FOLDER/files/NAME          the bytes
    FOLDER/NODE/NAME           each node's device, a link to its own /dev/loopN
    FOLDER/tokens/NAME         the newest token

It fences as a power switch does: it ends whoever has another node's device open.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

NODES = ("a", "b")


class Refused(Exception):
    """What the hook answers; the first argument is the code."""


def main() -> None:
    request = json.load(sys.stdin)
    device = Path(request["device"])
    folder, name = device.parent.parent, device.name
    lock = os.open(folder, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)
    try:
        answer = act(folder, name, request)
    except Refused as refused:
        answer = {"error": {"code": refused.args[0], "message": refused.args[1]}}
    json.dump(answer, sys.stdout)


def act(folder: Path, name: str, request: dict[str, object]) -> dict[str, object]:
    file, token = folder / "files" / name, folder / "tokens" / name
    newest = int(token.read_text()) if token.exists() else 0
    match request["operation"]:
        case "create":
            create(folder, name, int(str(request["capacity_bytes"])))
        case "resize":
            os.truncate(file, int(str(request["capacity_bytes"])))
            for node in NODES:
                losetup("--set-capacity", os.path.realpath(folder / node / name))
        case "delete":
            remove(folder, name)
        case "token":
            return {"token": newest or None}
        case "fence":
            wanted = int(str(request["token"]))
            if wanted < newest:
                raise Refused("stale", f"fenced by token {newest}")
            token.write_text(str(wanted))
            for node in NODES:
                if node != request["node"]:
                    end_users(os.path.realpath(folder / node / name))
        case other:
            raise Refused("failed", f"no operation {other}")
    return {}


def create(folder: Path, name: str, capacity_bytes: int) -> None:
    file = folder / "files" / name
    if file.exists():
        raise Refused("conflict", f"there is a {name} already")
    file.touch()
    os.truncate(file, capacity_bytes)
    for node in NODES:
        device = losetup("--find", "--show", str(file)).strip()
        (folder / node / name).symlink_to(device)


def remove(folder: Path, name: str) -> None:
    for node in NODES:
        link = folder / node / name
        losetup("--detach", os.path.realpath(link))
        link.unlink()
    for part in ("files", "tokens"):
        (folder / part / name).unlink(missing_ok=True)


def losetup(*arguments: str) -> str:
    done = subprocess.run(
        ["losetup", *arguments], capture_output=True, text=True, timeout=30, check=False
    )
    if done.returncode != 0:
        raise Refused("failed", done.stderr.strip())
    return done.stdout


def end_users(device: str) -> None:
    """SIGKILL every process that has it open; returns when none has."""
    deadline = time.monotonic() + 10
    while found := users(device):
        if time.monotonic() > deadline:
            raise Refused("failed", f"{found} won't end")
        for pid in found:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.01)


def users(device: str) -> list[int]:
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                if any(os.path.realpath(fd) == device for fd in (entry / "fd").iterdir()):
                    found.append(int(entry.name))
    return found


if __name__ == "__main__":
    main()
