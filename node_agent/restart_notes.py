"""What must outlive the agent, and the host, for a lost domain to be started again.

    STATE/restarts.json   the boot that the agent last saw, the domains that wait for their start,
                          when domains were started again lately, and which are being stopped

The boot is noted together with the domains that were lost with the one before: an agent that dies
in between finds the old boot again, and with it the same domains.
"""

from __future__ import annotations

import abc
import asyncio
from pathlib import Path
from typing import Final

import msgspec

from migrator import durable
from migrator.errors import StoreError, words
from migrator.own_threads import STATE_DIRECTORY, in_own_thread
from migrator.unknown_fields import decode
from node_agent.domain_launch import uninterrupted

DISK_S: Final = 3.0
"""For a disk that is slow. One that hangs holds nobody up: what is lost is settled all the same."""


class Wanted(msgspec.Struct, frozen=True, kw_only=True):
    """A domain that is to be started again."""

    token: int | None
    """That of its record when it was lost. None: a migration's recovery has yet to say."""
    why: str
    since_s: float
    """Wall clock."""


class RestartNotes(msgspec.Struct, frozen=True, kw_only=True):
    """The file. Immutable: what is changed is written whole."""

    boot_id: str = ""
    """Of the boot in which it was written; empty before the first."""
    wanted: dict[str, Wanted] = {}
    tries: dict[str, tuple[float, ...]] = {}
    """Wall clock, oldest first, of the latest starts of each domain."""
    ending: dict[str, int] = {}
    """Those whose end somebody asked for, with the token that they run under."""


class RestartStore(abc.ABC):
    """Where the notes are kept."""

    @abc.abstractmethod
    async def load(self) -> RestartNotes:
        """The notes as they were last saved. StoreError: they can't be read."""

    @abc.abstractmethod
    async def save(self, notes: RestartNotes) -> None:
        """Replace them, durably, all or nothing. StoreError: they are as before."""


_decoder: Final = msgspec.json.Decoder(RestartNotes)


class RestartFile(RestartStore):
    """See the module. A file that no release could have written counts as empty."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._writing = asyncio.Lock()
        self._under_way: asyncio.Future[None] | None = None
        """The last write, which may hang. Another one beside it might be overwritten by it."""

    async def load(self) -> RestartNotes:
        try:
            return decode(await in_own_thread(STATE_DIRECTORY, self._path.read_bytes), _decoder)
        except (FileNotFoundError, msgspec.DecodeError):
            return RestartNotes()
        except OSError as error:
            raise StoreError(f"{self._path} can't be read: {words(error)}") from error

    async def save(self, notes: RestartNotes) -> None:
        encoded = msgspec.json.format(msgspec.json.encode(notes), indent=2)
        async with self._writing:  # In their order.
            try:
                await uninterrupted(self._write(encoded))
            except OSError as error:
                raise StoreError(f"{self._path} can't be written: {words(error)}") from error

    async def _write(self, encoded: bytes) -> None:
        if self._under_way is not None:
            await _done(self._under_way)
        self._under_way = in_own_thread(
            STATE_DIRECTORY, lambda: durable.replace(self._path, encoded)
        )
        self._under_way.add_done_callback(_forget)
        await _done(self._under_way)
        self._under_way.result()


async def _done(writing: asyncio.Future[None]) -> None:
    """TimeoutError: it isn't, and goes on."""
    if not (await asyncio.wait({writing}, timeout=DISK_S))[0]:
        raise TimeoutError(f"its disk gave no answer in {DISK_S:g} s")


def _forget(writing: asyncio.Future[None]) -> None:
    if not writing.cancelled():
        writing.exception()
