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


async def admit(
    migration: MigrationId,
    sender: NodeName,
    prepare: Prepare,
    *,
    domains: DomainService,
    hypervisor: HypervisorDriver,
    ownership: OwnershipStore,
) -> Sequence[str]:
    """Claim the domain for the migration; or, with no claim left, every reason why not.

    Other errors (StoreError, HypervisorError): nothing is known; the source asks again.
    """
    domain = DomainName(prepare.spec.name)
    try:
        await domains.locks.claim_for_migration(domain, migration, wait_s=CLAIM_S)
    except ConflictError as error:
        return (str(error),)
    reasons: list[str] = []
    try:
        await domains.ownership.end_stale(domain)
        status = await hypervisor.inspect(domain)
        if status.state is not DomainState.STOPPED:
            reasons.append(f"a copy of domain {domain} is there already ({status.state})")
        owned = await ownership.read(domain)
        if (
            owned is None
            or owned.owner != sender
            or owned.token != prepare.token
            or owned.state is not OwnershipState.RUNNING
        ):
            reasons.append(f"domain {domain} is not {sender}'s under token {prepare.token}")
    except BaseException:
        domains.locks.release_from_migration(domain, migration)
        raise
    if reasons:
        domains.locks.release_from_migration(domain, migration)
    return reasons
