"""Whether a node takes a migration in: asked once, before there is a session that could harm.

A Prepare may come late: of a migration that has ended, when the domain has been here again since
then, or runs here now. A session that was begun for it would end what is here when it is refused.
So the domain is claimed for it, and is seen not to be here, before the session is made and
journalled: what is found here after a restart is then the migration's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from migrator.errors import ConflictError
from migrator.model import DomainName, DomainState, MigrationId, NodeName, OwnershipState
from migrator.ports import HypervisorDriver, OwnershipStore
from migrator.session.messages import Prepare
from node_agent.domains import DomainService

CLAIM_S: Final = 5.0
"""How long an operation on the domain that goes on here is waited for."""


class Admissions:
    """See the module. One at a time a migration: a Prepare is sent again until it is answered."""

    def __init__(
        self, domains: DomainService, hypervisor: HypervisorDriver, ownership: OwnershipStore
    ) -> None:
        self._domains = domains
        self._hypervisor = hypervisor
        self._ownership = ownership
        self._under_way: set[MigrationId] = set()

    async def admit(
        self, migration: MigrationId, sender: NodeName, prepare: Prepare
    ) -> Sequence[str] | None:
        """Claim the domain for the migration; or, with no claim left, every reason why not.

        None: that is being found out already. Errors (StoreError, HypervisorError): nothing is
        known; the source asks again.
        """
        if migration in self._under_way:
            return None
        self._under_way.add(migration)
        try:
            return await self._admit(migration, sender, prepare)
        finally:
            self._under_way.discard(migration)

    async def _admit(
        self, migration: MigrationId, sender: NodeName, prepare: Prepare
    ) -> Sequence[str]:
        domain = DomainName(prepare.spec.name)
        try:
            await self._domains.locks.claim_for_migration(domain, migration, wait_s=CLAIM_S)
        except ConflictError as error:
            return (str(error),)
        reasons: list[str] = []
        try:
            await self._domains.ownership.end_stale(domain)
            status = await self._hypervisor.inspect(domain)
            if status.state is not DomainState.STOPPED:
                reasons.append(f"a copy of domain {domain} is there already ({status.state})")
            owned = await self._ownership.read(domain)
            if (
                owned is None
                or owned.owner != sender
                or owned.token != prepare.token
                or owned.state is not OwnershipState.RUNNING
            ):
                reasons.append(f"domain {domain} is not {sender}'s under token {prepare.token}")
        except BaseException:
            self._domains.locks.release_from_migration(domain, migration)
            raise
        if reasons:
            self._domains.locks.release_from_migration(domain, migration)
        return reasons
