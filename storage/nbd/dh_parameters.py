"""A well-known Diffie-Hellman group for TLS-PSK servers.

Without a file dh-params.pem beside the keys, each qemu-nbd makes a group of its own when it starts,
which takes seconds, in the middle of a start or a migration.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from migrator import durable

FFDHE2048: Final = """\
-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""RFC 7919, appendix A.1."""


def ensure(directory: Path) -> None:
    """Put the file there unless there is one. OSError."""
    path = directory / "dh-params.pem"
    if not path.exists() or not path.stat().st_size:  # What a power loss may leave of one.
        durable.replace(path, FFDHE2048.encode(), mode=0o644)
