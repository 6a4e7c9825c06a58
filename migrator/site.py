"""What a migration's runner needs of its node, beyond the drivers."""

from __future__ import annotations

import abc
from collections.abc import Callable
from pathlib import Path

from migrator.model import FencingToken, NodeName, Role
from migrator.session.destination import DestinationSession
from migrator.session.messages import SessionMessage
from migrator.session.source import SourceSession
from migrator.session.vocabulary import LeavePart

Session = SourceSession | DestinationSession


class Site(abc.ABC):
    """What a node does for a migration beyond its drivers. Errors: FerryError."""

    @abc.abstractmethod
    async def prepare_incoming(
        self,
        session: DestinationSession,
        device_channel: Path,
        on_memory: Callable[[], None],
    ) -> None:
        """Volumes, taps, the paused hypervisor that listens on `device_channel`; all or nothing.

        `on_memory` is called on the way there, if pages may come before the rest is done.

        RefusedError with every reason if this node can't take the domain.
        """

    @abc.abstractmethod
    async def leave(self, session: SourceSession, part: LeavePart = LeavePart.ALL) -> str:
        """Wait until the guest may be paused, for as long as it takes; says what was done for it.

        RefusedError: it must not be paused.
        """

    @abc.abstractmethod
    async def destroy(self, session: Session) -> None:
        """End this node's copy. Idempotent."""

    @abc.abstractmethod
    async def release(self, session: Session) -> None:
        """After `destroy`: give back what the copy held here. Idempotent; goes on past errors."""

    @abc.abstractmethod
    async def fence(self, session: Session, token: FencingToken) -> str:
        """Shut older tokens out of every volume; what that took, for the timeline."""

    @abc.abstractmethod
    async def announce(self, session: Session) -> None: ...

    @abc.abstractmethod
    async def prepare_departure(self, session: Session) -> None:
        """Source, while the guest runs: the network's part of the preparations. Never fails."""

    @abc.abstractmethod
    async def depart(self, session: Session) -> None:
        """Source, just before the pause: the network sends on what is for the guest. Never fails,
        and is done within a fraction of a second."""

    @abc.abstractmethod
    async def send(
        self, node: NodeName, migration_id: str, to: Role, message: SessionMessage
    ) -> None:
        """Deliver to the session of role `to`, or not, within a few seconds; never an answer."""
