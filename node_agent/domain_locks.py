"""One lock a domain on this node, shared by its operations and its migrations.

    hold(domain, "start")          one operation: the next one waits for it, for a moment
    claim_for_migration(domain, id)   until release_from_migration: operations are refused at once
    end_migration(domain, id)         it has ended and lets go in a moment: operations wait for it

A migration keeps its claim across many steps and after a restart (it claims again from its
journal), so it isn't a `with` block; releasing is idempotent.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Final

from migrator.errors import ConflictError
from migrator.model import DomainName, MigrationId

WAIT_S: Final = 15.0
"""How long an operation waits for the one before it."""


class DomainLocks:
    """See the module. All calls on the event loop."""

    def __init__(self) -> None:
        self._locks: dict[DomainName, asyncio.Lock] = {}
        self._purpose: dict[DomainName, str] = {}
        self._claims: dict[DomainName, MigrationId] = {}
        self._ending: dict[DomainName, asyncio.Event] = {}
        self._on_release: list[Callable[[DomainName], None]] = []

    def migration_of(self, domain: DomainName) -> MigrationId | None:
        """The migration that has hold of the domain on this node."""
        return self._claims.get(domain)

    def is_ending(self, domain: DomainName) -> bool:
        """Whether that migration has ended, and has only to let go."""
        return domain in self._ending

    @contextlib.asynccontextmanager
    async def hold(
        self, domain: DomainName, purpose: str, *, wait_s: float = WAIT_S
    ) -> AsyncIterator[None]:
        """Run one operation alone.

        ConflictError at once during a migration, or when the operation before this one takes
        longer than `wait_s`; then the body isn't run.
        """
        await self.settle(domain, wait_s=wait_s)
        self._refuse_migrating(domain, purpose)
        lock = self._locks.setdefault(domain, asyncio.Lock())
        try:
            async with asyncio.timeout(wait_s):
                await lock.acquire()
        except TimeoutError:
            raise ConflictError(
                f"domain {domain}: {self._purpose.get(domain, 'another operation')} is still "
                f"going on; {purpose} was not tried"
            ) from None
        try:
            self._refuse_migrating(domain, purpose)
            self._purpose[domain] = purpose
            yield
        finally:
            self._purpose.pop(domain, None)
            lock.release()

    async def claim_for_migration(
        self, domain: DomainName, migration: MigrationId, *, wait_s: float = WAIT_S
    ) -> None:
        """Keep operations off the domain until released. Idempotent for the same migration.

        ConflictError if another migration has it, or an operation doesn't end within `wait_s`.
        """
        if self._claims.get(domain) == migration:
            return
        async with self.hold(domain, f"migration {migration}", wait_s=wait_s):
            self._claims[domain] = migration

    def end_migration(self, domain: DomainName, migration: MigrationId) -> None:
        """From here on what comes waits for the release, instead of being refused. Idempotent.

        A user who sees the end of a migration may begin the next one at once, although this side
        has still to end its copy and its engine, and to write its journal.
        """
        if self._claims.get(domain) == migration:
            self._ending.setdefault(domain, asyncio.Event())

    async def settle(self, domain: DomainName, *, wait_s: float = WAIT_S) -> None:
        """Wait, at most `wait_s`, for a migration that has ended to let go of the domain."""
        ending = self._ending.get(domain)
        if ending is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(wait_s):
                    await ending.wait()

    def release_from_migration(self, domain: DomainName, migration: MigrationId) -> None:
        """Let operations go on. Idempotent; another migration's claim isn't touched."""
        if self._claims.get(domain) == migration:
            del self._claims[domain]
            ending = self._ending.pop(domain, None)
            if ending is not None:
                ending.set()
            for callback in tuple(self._on_release):
                callback(domain)

    def on_release(self, callback: Callable[[DomainName], None]) -> Callable[[], None]:
        """Call back when a migration has let go of a domain. Returns the unsubscriber."""
        self._on_release.append(callback)
        return lambda: self._on_release.remove(callback)

    def _refuse_migrating(self, domain: DomainName, purpose: str) -> None:
        migration = self._claims.get(domain)
        if migration is not None and purpose != f"migration {migration}":
            raise ConflictError(
                f"domain {domain} is being migrated (migration {migration}); {purpose} was not "
                "tried: wait for the migration, or cancel it"
            )
