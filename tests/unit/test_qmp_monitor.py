"""What the monitor's client does for a QEMU that sleeps over a command."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import pytest
from qemu.qmp import QMPClient, Runstate

from hypervisor.qemu.qmp import Monitor, QmpTimeout


class Sleeper:
    """Answers a command only when the next one has come."""

    runstate = Runstate.RUNNING

    def __init__(self) -> None:
        self.heard: list[str] = []
        self._next = asyncio.Event()

    async def execute(self, command: str, *_: Any, **__: Any) -> object:
        self.heard.append(command)
        self._next.set()
        self._next = asyncio.Event()
        await self._next.wait()
        return command


def monitor_of(sleeper: Sleeper) -> Monitor:
    monitor = Monitor("vm", lambda _: None, lambda: None)
    monitor._client = cast(QMPClient, sleeper)
    return monitor


async def end(monitor: Monitor) -> None:
    """What keeps company waits for the next command, as it would with a QEMU."""
    for poke in tuple(monitor._pokes):
        poke.cancel()
        await asyncio.wait([poke])


async def test_a_command_that_qemu_sleeps_over_is_woken() -> None:
    sleeper = Sleeper()
    monitor = monitor_of(sleeper)
    async with asyncio.timeout(2.0):
        assert await monitor.execute("cont", timeout_s=5.0) == "cont"
    assert sleeper.heard == ["cont", "query-status"]
    await end(monitor)


@pytest.mark.parametrize("out_of_band", [False, True])
async def test_what_is_over_in_time_or_is_out_of_band_wakes_nobody(out_of_band: bool) -> None:
    sleeper = Sleeper()
    monitor = monitor_of(sleeper)
    execute = monitor.execute_out_of_band if out_of_band else monitor.execute
    with pytest.raises(QmpTimeout):
        await execute("yank", timeout_s=0.15 if out_of_band else 0.01)
    await asyncio.sleep(0.15)
    assert sleeper.heard == ["yank"]
