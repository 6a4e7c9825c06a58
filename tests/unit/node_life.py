"""An agent, or its host, that ends and begins again, and what is looked for afterwards."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence

from migrator.model import DomainName, MigrationId, OwnershipRecord, OwnershipState
from tests.unit.agent_world import SimulatedNode, spec_of

WEB = DomainName("web")
RUNNING, STOPPED = OwnershipState.RUNNING, OwnershipState.STOPPED


async def eventually(check: Callable[[], Awaitable[bool]]) -> None:
    async with asyncio.timeout(30):
        while not await check():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def record_of(node: SimulatedNode, domain: DomainName = WEB) -> OwnershipRecord:
    record = await node.ownership.read(domain)
    assert record is not None
    return record


async def started(node: SimulatedNode) -> OwnershipRecord:
    await node.domains.define(spec_of())
    return await node.domains.start(WEB)


async def agent_dies(node: SimulatedNode) -> None:
    await node.domains.close()
    await node.hypervisor.close()


async def host_dies(node: SimulatedNode) -> None:
    await agent_dies(node)
    for domain in tuple(node.host.guests):
        node.host.kill(domain)


async def agent_starts(
    node: SimulatedNode,
    boot_id: str = "boot-1",
    claimed: Sequence[DomainName] = (),
    *,
    restart: bool = True,
) -> None:
    node.domains = node.make_domains(boot_id, restart=restart)
    for domain in claimed:
        await node.domains.locks.claim_for_migration(domain, MigrationId("m-1"))
    await node.domains.open(await node.hypervisor.open(), claimed)


async def runs_under(node: SimulatedNode, token: int) -> None:
    """Its process is there, and nothing is left to be started."""

    async def check() -> bool:
        record = await record_of(node)
        here = WEB in node.host.guests and not node.restarts.notes.wanted
        return here and record.state is RUNNING and (record.owner, record.token) == ("a", token)

    await eventually(check)


async def stays(node: SimulatedNode, state: OwnershipState, token: int, owner: str = "a") -> None:
    """Nothing is wanted, and the record says so."""

    async def check() -> bool:
        record = await record_of(node)
        restarts = node.domains.ownership.restarts
        at_rest = not node.restarts.notes.wanted and not restarts._running
        return at_rest and record.state is state

    await eventually(check)
    await node.domains.ownership.settle(WEB)
    assert not node.domains.ownership.restarts._running
    record = await record_of(node)
    assert (record.owner, record.token, record.state) == (owner, token, state)
    assert WEB not in node.host.guests


async def history(node: SimulatedNode) -> str:
    return "\n".join(note.text for note in (await node.records.get(WEB)).history)


async def told(node: SimulatedNode, text: str) -> None:
    async def check() -> bool:
        return any(text in event.message for event in await node.events.read())

    await eventually(check)
