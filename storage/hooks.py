"""Hooks: a site's own programs that do what Ferry can't know, such as making a LUN on an array.

    argv (no shell) ── stdin: one JSON object, closed after it ──> the program
                    <── stdout: one JSON object, exit status 0

A hook that fails says why in its object, `{"error": {"code": CODE, "message": TEXT}}`, with any
exit status; CODE is `not-found`, `conflict`, `stale` (a newer token has fenced), `too-large` (no
volume can have that size there) or anything else.
Without such an object the end of its stderr is the message. It is killed after its time.
docs/storage-iscsi.md has the operations; deploy/samples/ has hooks to start from.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from migrator import programs
from migrator.errors import (
    ConflictError,
    FenceError,
    NotFoundError,
    StorageError,
    TooLargeError,
)

_STDERR_BYTES_SHOWN: Final = 500
_T = TypeVar("_T")


class HookComplaint(msgspec.Struct, frozen=True, kw_only=True):
    code: str = "failed"
    message: str = ""


class _Failed(msgspec.Struct, frozen=True, kw_only=True):
    error: HookComplaint | None = None


_ERRORS: Final[Mapping[str, type[StorageError] | type[NotFoundError] | type[ConflictError]]] = {
    "not-found": NotFoundError,
    "conflict": ConflictError,
    "stale": FenceError,
    "too-large": TooLargeError,
}


async def call_hook(
    argv: Sequence[str], request: Mapping[str, Any], answer: type[_T], *, timeout_s: float
) -> _T:
    """Run a hook once. Its answer, validated.

    StorageError (also for one that can't be run, is late, or answers nonsense), NotFoundError,
    ConflictError, FenceError, TooLargeError as the hook says. Its process group is gone then.
    """
    what = f"hook {argv[0]} {request.get('operation', '')}".rstrip()
    try:
        ended = await programs.run(
            argv, stdin=msgspec.json.encode(request), timeout_s=timeout_s, with_group=True
        )
    except TimeoutError as error:
        raise StorageError(f"{what}: no answer in {timeout_s:g} s; it was killed") from error
    except OSError as error:
        raise StorageError(f"{what} can't be run: {error.strerror}") from error
    return _judge(what, ended, answer)


def _judge(what: str, ended: programs.Ended, answer: type[_T]) -> _T:
    out = ended.out
    try:
        complaint = msgspec.json.decode(out, type=_Failed).error if out.strip() else None
    except msgspec.DecodeError:
        complaint = None
    if complaint is not None:
        kind = _ERRORS.get(complaint.code, StorageError)
        raise kind(f"{what}: {complaint.message or complaint.code}")
    if ended.status != 0:
        said = ended.err.decode(errors="replace").strip()[-_STDERR_BYTES_SHOWN:]
        raise StorageError(f"{what} failed with status {ended.status}: {said or 'it said nothing'}")
    try:
        return msgspec.json.decode(out, type=answer)
    except msgspec.DecodeError as error:
        raise StorageError(f"{what} answered what it must not: {error}") from error
