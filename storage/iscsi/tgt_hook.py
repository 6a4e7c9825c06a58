"""The other half of deploy/samples/iscsi-hook, for a storage host with tgtd.

    python -m storage.iscsi.tgt_hook SETTINGS.json < request > answer

SETTINGS.json holds one pool as `storage.iscsi.restore` reads it. A request and its answer are one
JSON object each: see `storage.hooks`. The status is always 0: what is wrong stands in the answer.
"""

from __future__ import annotations

import errno
import sys
from pathlib import Path
from typing import Any

import msgspec

from migrator.errors import (
    ConflictError,
    FenceError,
    FerryError,
    NotFoundError,
    StorageError,
    words,
)
from migrator.model import FencingToken, VolumeName
from storage.iscsi.making import tgt_folder
from storage.iscsi.tgt import TgtFolder
from storage.names import check_volume_name
from storage.settings import IscsiSettings


class Request(msgspec.Struct, frozen=True, kw_only=True):
    operation: str
    volume: str = ""
    capacity_bytes: int = 0
    token: int = 0
    initiator: str = ""


def answer(folder: TgtFolder, request: Request) -> Any:
    """What the hook says. FerryError."""
    volume = VolumeName(request.volume)
    if request.operation not in ("list", "health"):
        check_volume_name(volume)
    match request.operation:
        case "create":
            return folder.create(volume, request.capacity_bytes)
        case "inspect":
            return folder.inspect(volume)
        case "list":
            return {"volumes": folder.list_luns()}
        case "resize":
            return folder.resize(volume, request.capacity_bytes)
        case "delete":
            folder.delete(volume)
            return {}
        case "health":
            return folder.health()
        case "grant":
            return folder.grant(volume, request.initiator)
        case "fence":
            folder.fence(volume, FencingToken(request.token), request.initiator)
            return {}
        case "token":
            return {"token": folder.token(volume)}
        case _:
            raise StorageError(f"there is no operation {request.operation!r}")


def main(arguments: list[str]) -> int:
    try:
        if len(arguments) != 1:
            raise StorageError("usage: python -m storage.iscsi.tgt_hook SETTINGS.json")
        settings = _settings(Path(arguments[0]))
        request = msgspec.json.decode(sys.stdin.buffer.read(), type=Request)
        said = answer(tgt_folder(settings), request)
    except (OSError, msgspec.DecodeError, FerryError) as error:
        said = {"error": {"code": _code(error), "message": _message(error)}}
    sys.stdout.buffer.write(msgspec.json.encode(said))
    return 0


def _settings(path: Path) -> IscsiSettings:
    try:
        return msgspec.json.decode(path.read_bytes(), type=IscsiSettings)
    except OSError as error:
        raise StorageError(f"{path}: {words(error)}") from error


def _message(error: Exception) -> str:
    """Without the name of a half-made file, which is gone by now."""
    if isinstance(error, OSError):
        return f"the folder of tgtd's volumes: {words(error)}"
    return str(error)


def _code(error: Exception) -> str:
    match error:
        case FenceError():
            return "stale"
        case NotFoundError():
            return "not-found"
        case ConflictError():
            return "conflict"
        case OSError(errno=errno.EFBIG):
            return "too-large"
        case _:
            return "failed"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
