"""What sentences say of an error that isn't Ferry's."""

from __future__ import annotations

import asyncio
import errno
import socket
import ssl
from pathlib import Path

import pytest

from migrator.errors import words
from storage.bounded import explained
from storage.nfs.libnfs import NfsError


def test_a_file_is_named_by_the_sentence_alone(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="Errno 2") as caught:
        (tmp_path / "nothing").read_bytes()
    assert words(caught.value) == "No such file or directory"


async def test_a_refused_connection_is_told_without_a_number() -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = free.getsockname()
        with pytest.raises(OSError, match="Connect call failed") as caught:
            await asyncio.open_connection(*address)
    assert words(caught.value) == "Connection refused"


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"), "Name or service not known"),
        (ssl.SSLError(1, "wrong version number"), "wrong version number"),
        (ssl.SSLEOFError(8, "EOF occurred in violation of protocol (_ssl.c:9)"), "other end is"),
        (ValueError("a key of 3 bytes"), "a key of 3 bytes"),
        (OSError("timed out"), "timed out"),
        (TimeoutError(), "TimeoutError"),
    ],
)
def test_other_errors_are_told_as_they_are(error: Exception, said: str) -> None:
    assert said in words(error)
    assert "[Errno" not in words(error)


def test_what_a_pool_says_of_an_error_has_no_number_in_it() -> None:
    refused = OSError(errno.EACCES, "Permission denied", "/pool/a")
    assert str(explained("pool p", refused)) == (
        "pool p: this agent may not: Permission denied (/pool/a)"
    )
    other = NfsError(errno.ENODEV, "it isn't exported", "10.0.0.5:/x")
    assert str(explained("pool p", other)) == "pool p: it isn't exported (10.0.0.5:/x)"
    assert str(explained("pool p", OSError(errno.EFBIG, "x"))) == "pool p: File too large"
    assert str(explained("pool p", OSError(errno.ENOSPC, "No space"))) == "pool p is full: No space"
