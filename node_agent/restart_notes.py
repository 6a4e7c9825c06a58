"""What must outlive the agent, and the host, for a lost domain to be started again.

    STATE/restarts.json   the boot that the agent last saw, the domains that wait for their start,
                          when domains were started again lately, and which are being stopped

The boot is noted together with the domains that were lost with the one before: an agent that dies
in between finds the old boot again, and with it the same domains.
"""

from __future__ import annotations

import abc
import logging
from pathlib import Path
from typing import Final

import msgspec

from migrator.unknown_fields import decode
from node_agent.state_file import StateFile

log = logging.getLogger(__name__)


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
    host_ends: bool = False
    """The host's guests are being shut down, for the boot of `boot_id` ends."""


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
        self._file = StateFile(path)

    async def load(self) -> RestartNotes:
        try:
            content = await self._file.read()
            return RestartNotes() if content is None else decode(content, _decoder)
        except msgspec.DecodeError as error:
            log.error("%s is unreadable, and counts as empty: %s", self._path, error)
            return RestartNotes()

    async def save(self, notes: RestartNotes) -> None:
        await self._file.write(msgspec.json.format(msgspec.json.encode(notes), indent=2))
