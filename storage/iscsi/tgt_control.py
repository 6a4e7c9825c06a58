"""tgtd's management socket: what `tgtadm` does, without `tgtadm`.

Not by running it, because its only way to take a CHAP secret is its command line, which every
user of the host can read. The protocol (tgt 1.0.x): a header of 120 bytes, parameters as text
ending in a zero byte; the answer is an error number and a length, then text. One request a
connection.

Synchronous, every wait bounded: for a thread.
"""

from __future__ import annotations

import enum
import re
import socket
import struct
from pathlib import Path
from typing import Final

from migrator.errors import ConflictError, InvalidRequest, NotFoundError, StorageError

TIMEOUT_S: Final = 5.0
_HEADER: Final = struct.Struct("<II64sIiQQIIIIII")
_ANSWER: Final = struct.Struct("<II")
_ANSWER_BYTES_MAX: Final = 16 * 1024 * 1024
_TARGET_LINE: Final = re.compile(r"^Target (\d+): (\S+)$", re.MULTILINE)
_NO_LUN: Final = (1 << 64) - 1


class _Mode(enum.IntEnum):
    TARGET = 1
    UNIT = 2
    ACCOUNT = 7


class _Operation(enum.IntEnum):
    NEW = 0
    DELETE = 1
    SHOW = 2
    BIND = 3
    UNBIND = 4


class _Error(enum.IntEnum):
    NO_TARGET = 4
    TARGET_EXIST = 9
    LUN_EXIST = 10
    ACL_EXIST = 12
    ACL_NOEXIST = 13
    USER_EXIST = 14
    NO_USER = 15
    INVALID_REQUEST = 17
    TARGET_ACTIVE = 19


class TgtControl:
    """One tgtd, by its socket's path (the daemon's `$TGT_IPC_SOCKET`, a dot, its -C number)."""

    def __init__(self, socket_path: Path) -> None:
        self._path = socket_path

    def targets(self) -> dict[str, int]:
        """Every target's IQN: its number."""
        text = self._request(_Mode.TARGET, _Operation.SHOW)[1]
        return {name: int(number) for number, name in _TARGET_LINE.findall(text)}

    def create_target(self, number: int, iqn: str) -> None:
        """ConflictError: the number or the IQN is taken."""
        error, _ = self._request(_Mode.TARGET, _Operation.NEW, number, targetname=iqn)
        if error == _Error.TARGET_EXIST:
            raise ConflictError(f"tgtd has a target {iqn}, or number {number}, already")
        self._must(error, f"make target {iqn}")

    def delete_target(self, number: int, what: str) -> None:
        """Idempotent. ConflictError while somebody is logged in; it says `what` the target is."""
        error, _ = self._request(_Mode.TARGET, _Operation.DELETE, number)
        if error == _Error.TARGET_ACTIVE:
            raise ConflictError(
                f"{what}: somebody is logged in to its target {number}; nothing was changed"
            )
        if error != _Error.NO_TARGET:
            self._must(error, f"remove target {number}")

    def create_unit(self, number: int, lun: int, path: Path) -> None:
        """A disk of 512-byte blocks, written straight through to the file. Idempotent."""
        error, _ = self._request(
            _Mode.UNIT,
            _Operation.NEW,
            number,
            lun,
            path=str(path),
            bstype="rdwr",
            blocksize="512",
        )
        if error == _Error.INVALID_REQUEST:
            raise NotFoundError(f"tgtd can't open {path}")
        if error != _Error.LUN_EXIST:
            self._must(error, f"make LUN {lun} of target {number}")

    def admit(self, number: int, initiator: str) -> None:
        """Idempotent."""
        error, _ = self._request(
            _Mode.TARGET, _Operation.BIND, number, **{"initiator-name": initiator}
        )
        if error != _Error.ACL_EXIST:
            self._must(error, f"admit {initiator}")

    def strike(self, number: int, initiator: str) -> None:
        """No longer admit. Sessions that are there stay. Idempotent, also without a target."""
        error, _ = self._request(
            _Mode.TARGET, _Operation.UNBIND, number, **{"initiator-name": initiator}
        )
        if error not in (_Error.ACL_NOEXIST, _Error.NO_TARGET):
            self._must(error, f"strike {initiator} off")

    def create_account(self, user: str, secret: str) -> None:
        """Idempotent; the secret of a user that is there stays."""
        error, _ = self._request(_Mode.ACCOUNT, _Operation.NEW, user=user, password=secret)
        if error != _Error.USER_EXIST:
            self._must(error, f"make user {user}")

    def require_account(self, number: int, user: str) -> None:
        """Ask for this user's CHAP at login. Idempotent."""
        error, _ = self._request(_Mode.ACCOUNT, _Operation.BIND, number, user=user)
        if error == _Error.NO_USER:
            raise NotFoundError(f"tgtd has no CHAP user {user}")
        if error != _Error.USER_EXIST:
            self._must(error, f"bind user {user}")

    def _must(self, error: int, what: str) -> None:
        if error:
            raise StorageError(f"tgtd at {self._path} could not {what}: error {error} of tgtadm.h")

    def _request(
        self,
        mode: _Mode,
        operation: _Operation,
        number: int = -1,
        lun: int = _NO_LUN,
        /,
        **parameters: str,
    ) -> tuple[int, str]:
        for name, value in parameters.items():
            if "," in value or "\0" in value:
                raise InvalidRequest(f"tgtd can't take a comma in its {name}", {name: "no comma"})
        words = ",".join(f"{name}={value}" for name, value in parameters.items()).encode()
        body = words + b"\0" if words else b""
        size = _HEADER.size + len(body)
        header = _HEADER.pack(mode, operation, b"iscsi", size, number, 0, lun, 0, 0, 0, 0, 0, 0)
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as connection:
                connection.settimeout(TIMEOUT_S)
                connection.connect(str(self._path))
                connection.sendall(header + body)
                error, length = _ANSWER.unpack(_receive(connection, _ANSWER.size))
                length = min(length, _ANSWER_BYTES_MAX) - _ANSWER.size
                text = _receive(connection, length) if length > 0 else b""
        except OSError as problem:
            raise StorageError(f"tgtd at {self._path} doesn't answer: {problem}") from problem
        return error, text.rstrip(b"\0").decode(errors="replace")


def _receive(connection: socket.socket, count: int) -> bytes:
    data = bytearray()
    while len(data) < count:
        chunk = connection.recv(count - len(data))
        if not chunk:
            raise ConnectionError("it closed the connection")
        data += chunk
    return bytes(data)
