"""Hooks: a site's own programs that do what Ferry can't know, such as making a LUN on an array.

    argv (no shell) ── stdin: one JSON object, closed after it ──> the program
                    <── stdout: one JSON object, exit status 0

A hook that fails says why in its object, `{"error": {"code": CODE, "message": TEXT}}`, with any
exit status; CODE is `not-found`, `conflict`, `stale` (a newer token has fenced) or anything else.
Without such an object the end of its stderr is the message. It is killed after its time.
docs/storage-iscsi.md has the operations; deploy/samples/ has hooks to start from.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from migrator.errors import ConflictError, FenceError, NotFoundError, StorageError

OUTPUT_BYTES_MAX: Final = 4 * 1024 * 1024
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
}


async def call_hook(
    argv: Sequence[str], request: Mapping[str, Any], answer: type[_T], *, timeout_s: float
) -> _T:
    """Run a hook once. Its answer, validated.

    StorageError (also for one that can't be run, is late, or answers nonsense), NotFoundError,
    ConflictError, FenceError as the hook says. The process and its children are gone then.
    """
    what = f"hook {argv[0]} {request.get('operation', '')}".rstrip()
    try:
        process = await asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            limit=OUTPUT_BYTES_MAX,
        )
    except OSError as error:
        raise StorageError(f"{what} can't be run: {error.strerror}") from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(msgspec.json.encode(request))
    except TimeoutError as error:
        raise StorageError(f"{what}: no answer in {timeout_s:g} s; it was killed") from error
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await asyncio.shield(process.wait())
    return _judge(what, process.returncode or 0, out, err, answer)


def _judge(what: str, status: int, out: bytes, err: bytes, answer: type[_T]) -> _T:
    try:
        complaint = msgspec.json.decode(out, type=_Failed).error if out.strip() else None
    except msgspec.DecodeError:
        complaint = None
    if complaint is not None:
        kind = _ERRORS.get(complaint.code, StorageError)
        raise kind(f"{what}: {complaint.message or complaint.code}")
    if status != 0:
        words = err.decode(errors="replace").strip()[-_STDERR_BYTES_SHOWN:] or "it said nothing"
        raise StorageError(f"{what} failed with status {status}: {words}")
    try:
        return msgspec.json.decode(out, type=answer)
    except msgspec.DecodeError as error:
        raise StorageError(f"{what} answered what it must not: {error}") from error
