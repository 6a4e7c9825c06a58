"""The agent's event loop measures how long it was kept from its work."""

from __future__ import annotations

import asyncio
import time

from node_agent import loop_monitor


def test_a_block_is_measured_and_waiting_is_not() -> None:
    async def work() -> tuple[float, float]:
        monitor = loop_monitor.current()
        assert monitor is not None
        monitor.reset()
        began_s = time.monotonic()
        await asyncio.sleep(0.2)
        late_s = time.monotonic() - began_s - 0.2  # A busy machine's doing.
        idle_ms = monitor.longest_ms - late_s * 1e3
        time.sleep(0.2)  # noqa: ASYNC251 - the block to be found
        await asyncio.sleep(0)
        assert max(block.milliseconds for block in monitor.blocks) == monitor.longest_ms
        return idle_ms, monitor.longest_ms

    with asyncio.Runner(loop_factory=loop_monitor.monitored_loop) as runner:
        idle_ms, longest_ms = runner.run(work())
    assert idle_ms < 200
    assert longest_ms >= 200


async def test_another_loop_has_no_monitor() -> None:
    assert loop_monitor.current() is None
