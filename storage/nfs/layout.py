"""What a volume is on the server: a folder, and what its files' names say. Pure.

    NAME/                        0711, root's
      disk.raw or disk.qcow2     0664; its owner is the only one that may write
      fence.TOKEN.UID            the newest fence: its token, and the owner that it gave the disk to
      open.NODE.TOKEN.MODE       the node has it open under the token; MODE is rw or ro
    .NAME.RANDOM.tmp/            being made or deleted
    .ferry.mark, .ferry.owner    which export this is, and which cluster's (`storage.marks`)

Names, not contents: a rename is one round trip, and atomic, so a fence that finds another token
than it expected changes nothing.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from migrator.errors import StorageError
from migrator.model import DiskFormat, FencingToken, NodeName

FOLDER_MODE: Final = 0o711
DISK_MODE: Final = 0o664

_FIRST_ID: Final = 0x7000_0000
_IDS: Final = 0x0FFF_0000
"""Above every range that systems give to users and containers, within a C int."""
READER_ID: Final = _FIRST_ID - 1
"""Whoever only reads: neither owner nor group of any disk."""
NOBODY_ID: Final = _FIRST_ID - 2
"""The owner of a disk that nobody has opened yet."""


def identity(node: NodeName, token: FencingToken) -> int:
    """The uid and gid of what `node` opens under `token`: no other node's, no other token's."""
    digest = hashlib.sha256(f"{node}\0{token}".encode()).digest()
    return _FIRST_ID + int.from_bytes(digest[:8], "big") % _IDS


def new_identity() -> int:
    """The uid and gid of a writer that is no domain's: nobody else's, as far as chance can say."""
    return _FIRST_ID + secrets.randbelow(_IDS)


@dataclass(frozen=True, slots=True)
class Fence:
    """The newest fence; token 0: none yet."""

    token: FencingToken
    owner: int

    @property
    def name(self) -> str:
        return f"fence.{self.token}.{self.owner}"


UNFENCED: Final = Fence(FencingToken(0), NOBODY_ID)


@dataclass(frozen=True, slots=True)
class Opening:
    """A node has the volume open."""

    node: NodeName
    token: FencingToken
    read_only: bool

    @property
    def name(self) -> str:
        return f"open.{self.node}.{self.token}.{'ro' if self.read_only else 'rw'}"


@dataclass(frozen=True, slots=True)
class Contents:
    """A volume's folder, read."""

    format: DiskFormat
    fence: Fence
    openings: tuple[Opening, ...]

    @property
    def disk(self) -> str:
        return f"disk.{self.format.value}"

    def opened_by(self, node: NodeName) -> FencingToken | None:
        """The newest token under which the node has it open for writing."""
        tokens = [each.token for each in self.openings if each.node == node and not each.read_only]
        return max(tokens, default=None)

    def in_use(self) -> list[Opening]:
        """Who has it open, but for writers that the newest fence has shut out."""
        return [
            each
            for each in self.openings
            if each.read_only
            or each.token > self.fence.token
            or identity(each.node, each.token) == self.fence.owner
        ]


def read_contents(names: Iterable[str]) -> Contents | None:
    """None: no volume's folder. StorageError: it was one, but something is missing or twofold."""
    formats, fences, openings = [], [], []
    for name in names:
        kind, *rest = name.split(".")
        match kind, rest:
            case "disk", [suffix] if suffix in set(DiskFormat):
                formats.append(DiskFormat(suffix))
            case "fence", [token, owner] if token.isdecimal() and owner.isdecimal():
                fences.append(Fence(FencingToken(int(token)), int(owner)))
            case "open", [node, token, ("rw" | "ro") as mode] if token.isdecimal():
                opening = Opening(NodeName(node), FencingToken(int(token)), mode == "ro")
                openings.append(opening)
    if not formats and not fences:
        return None
    if len(formats) != 1 or len(fences) != 1:
        raise StorageError(f"it holds {len(formats)} disks and {len(fences)} fences, not one each")
    return Contents(formats[0], fences[0], tuple(openings))
