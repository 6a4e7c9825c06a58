"""An agent that ends waits for what would leave a guest standing still, and for nothing else."""

from __future__ import annotations

import asyncio

import pytest

from migrator.model import MigrationState
from node_agent.migrations.standstill import Standstill

_S = MigrationState


async def test_it_waits_for_a_handoff_and_not_for_pre_copy() -> None:
    states = [_S.PRECOPY, _S.SWITCHOVER]
    standstill = Standstill(lambda: states)
    waiting = asyncio.create_task(standstill.over(30.0))
    for state in (_S.HANDOFF, _S.POSTCOPY):
        states[1] = state
        standstill.changed()
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert not waiting.done()
    states[1] = _S.COMPLETED
    standstill.changed()
    await asyncio.wait_for(waiting, 10.0)


@pytest.mark.parametrize("state", [_S.HANDOFF, _S.RECOVERING, _S.CANCELLING])
async def test_no_longer_than_it_may(state: MigrationState) -> None:
    await asyncio.wait_for(Standstill(lambda: [state]).over(0.02), 10.0)
