"""A writer on a volume: qemu-io, which opens it as a guest's QEMU would, by the same options."""

from __future__ import annotations

import json
import os
import select
import shutil
import subprocess
import time
from typing import Any, Final

from hypervisor.qemu.block_nodes import block_nodes
from hypervisor.qemu.kernel import SHIM
from migrator.model import BlockSource, IscsiSource

ANSWER_S: Final = 30.0
_PROMPT: Final = b"qemu-io> "


class Writer:
    """One qemu-io. Each byte that it writes is its `mark`; `end` it."""

    def __init__(self, source: BlockSource, mark: int) -> None:
        objects, node = _options(source)
        self.mark = mark
        arguments = [part for each in objects for part in ("--object", json.dumps(each))]
        self._process = subprocess.Popen(
            [
                "qemu-io",
                *(["-r"] if source.read_only else []),
                *arguments,
                f"json:{json.dumps(node)}",
            ],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            bufsize=0,
            env=_environment(source),
        )
        try:
            self._until_prompt(ANSWER_S)
        except BaseException:
            self.end()
            raise

    def write(self, offset: int = 0, length: int = 4096, *, within_s: float = ANSWER_S) -> bool:
        """Whether it was acknowledged in time, flush included; a refused one is not."""
        said = self._ask(f"write -P {self.mark} {offset} {length}", within_s)
        if said is None or "wrote" not in said:
            return False
        flushed = self._ask("flush", within_s)
        return flushed is not None and "fail" not in flushed

    def reads(self, mark: int, offset: int = 0, length: int = 4096) -> bool:
        """Whether all of that reads as `mark`."""
        said = self._ask(f"read -P {mark} {offset} {length}", ANSWER_S)
        assert said is not None and "read" in said, said
        return "verification failed" not in said

    def end(self) -> None:
        """Idempotent; by force, as a fenced one may hang."""
        self._process.kill()
        self._process.wait(10)
        for stream in (self._process.stdin, self._process.stdout):
            if stream is not None:
                stream.close()

    def _ask(self, command: str, within_s: float) -> str | None:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(command.encode() + b"\n")
        except BrokenPipeError:
            return None
        return self._until_prompt(within_s)

    def _until_prompt(self, within_s: float) -> str | None:
        """What it said up to its next prompt; None: it didn't come to it in time."""
        assert self._process.stdout is not None
        fd, said = self._process.stdout.fileno(), b""
        deadline_s = time.monotonic() + within_s
        while not said.endswith(_PROMPT):
            left_s = deadline_s - time.monotonic()
            if left_s <= 0 or not select.select([fd], [], [], left_s)[0]:
                return None
            piece = os.read(fd, 65536)
            if not piece:
                raise AssertionError(f"qemu-io ended: {said.decode(errors='replace')}")
            said += piece
        return said.removesuffix(_PROMPT).decode(errors="replace")


def _environment(source: BlockSource) -> dict[str, str]:
    """With the shim, where the hypervisor has it: it registers iSCSI sessions."""
    key = source.reservation_key if isinstance(source, IscsiSource) else None
    if key is None:
        return dict(os.environ)
    program = shutil.which("qemu-io") or "qemu-io"
    mine = {"LD_PRELOAD": str(SHIM), "FERRY_UFFD_FD": "200", "FERRY_QEMU": program}
    return {**os.environ, **mine, "FERRY_ISCSI_KEY": f"{key:#x}"}


def _options(source: BlockSource) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The objects, and the node as one nested value."""
    objects: list[dict[str, Any]] = []
    nodes: dict[str, dict[str, Any]] = {}
    arguments = block_nodes("d", source, frozenset())
    for text in arguments[1::2]:
        value = json.loads(text)
        if "qom-type" in value:
            objects.append(value)
        else:
            nodes[value["node-name"]] = value
    node = nodes["d"]
    node["file"] = nodes["d-file"]
    return objects, node
