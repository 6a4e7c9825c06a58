"""A service's loop that fails says so at once, and not when its agent ends."""

from __future__ import annotations

import asyncio

import pytest

from node_agent.background import Background


async def fails() -> None:
    await asyncio.sleep(0)
    raise ZeroDivisionError("a bug")


async def test_a_loop_that_fails_is_in_the_log_before_it_is_closed(
    caplog: pytest.LogCaptureFixture,
) -> None:
    loop = Background("heartbeat")
    loop.start(fails())
    for _ in range(5):
        await asyncio.sleep(0)
    (record,) = caplog.records
    assert record.getMessage() == "heartbeat has failed, and doesn't go on"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ZeroDivisionError)
    with pytest.raises(ZeroDivisionError):
        await loop.close()
    await loop.close()


async def test_a_loop_that_is_closed_says_nothing(caplog: pytest.LogCaptureFixture) -> None:
    loop = Background("heartbeat")
    loop.start(asyncio.sleep(3600.0))
    await asyncio.sleep(0)
    await loop.close()
    assert not caplog.records
