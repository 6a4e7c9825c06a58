"""iSCSI names. Pure."""

from __future__ import annotations

import hashlib
import re
from typing import Final

_PLAIN: Final = re.compile(r"[a-z0-9.-]+")
_OTHER: Final = re.compile(r"[^a-z0-9.-]")


def iqn_part(name: str) -> str:
    """A name as a part of an IQN, which has no capitals and no underscores (RFC 3722).

    Where letters had to change, a hash of the name keeps two names apart.
    """
    if _PLAIN.fullmatch(name):
        return name
    digest = hashlib.blake2s(name.encode(), digest_size=4).hexdigest()
    return f"{_OTHER.sub('-', name.lower())}.{digest}"
