"""Reservation keys: which node holds a LUN, and under which fencing token. Pure.

    63      56 55                            24 23                    0
    ┌─────────┬────────────────────────────────┬───────────────────────┐
    │  mark   │  node (32 bits of its name's   │     fencing token     │
    │  0xFE   │  BLAKE2)                       │                       │
    └─────────┴────────────────────────────────┴───────────────────────┘

`hypervisor/qemu/iscsi_shim.c` reads the same layout. Two nodes of one cluster whose names give the
same 32 bits could not be told apart: with 200 nodes the odds are 5 in a million.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Final

from migrator.errors import FenceError
from migrator.model import FencingToken, NodeName

MARK: Final = 0xFE
TOKEN_BITS: Final = 24
TOKEN_MAX: Final = (1 << TOKEN_BITS) - 1
_NODE_BITS: Final = 32


@dataclass(frozen=True, slots=True)
class HolderKey:
    """A key of Ferry's."""

    node: int
    token: FencingToken

    @property
    def value(self) -> int:
        return MARK << (_NODE_BITS + TOKEN_BITS) | self.node << TOKEN_BITS | self.token

    def outranks(self, other: HolderKey) -> bool:
        """Whether this key's holder has won over `other`: a newer token, or a tie of two nodes.

        Two nodes never win the same token, so a tie means that `other` never won it.
        """
        return self.token > other.token or (self.token == other.token and self.node != other.node)


def key_of(node: NodeName, token: FencingToken) -> HolderKey:
    """The key of `node` under `token`. FenceError if the token doesn't fit."""
    if not 0 < token <= TOKEN_MAX:
        raise FenceError(f"{token} is no fencing token: a reservation key holds 1 to {TOKEN_MAX}")
    digest = hashlib.blake2s(node.encode(), digest_size=_NODE_BITS // 8).digest()
    return HolderKey(node=int.from_bytes(digest), token=token)


def parse_key(value: int) -> HolderKey | None:
    """What a key says; None: it isn't Ferry's."""
    if value >> (_NODE_BITS + TOKEN_BITS) != MARK or not value & TOKEN_MAX:
        return None
    node = value >> TOKEN_BITS & ((1 << _NODE_BITS) - 1)
    return HolderKey(node=node, token=FencingToken(value & TOKEN_MAX))
