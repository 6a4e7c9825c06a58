"""Old revisions are forgotten by one agent, not by each of them."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any, Final

import pytest

from node_agent.state.etcd import EtcdSettings, EtcdStore
from node_agent.state.etcd import store as store_module
from tests.contract.etcd_members import EtcdMember, running_members

_AGENTS: Final = 8
_ROUNDS: Final = 120


def test_many_agents_forget_old_revisions_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "KEPT_CHANGES", 128)
    monkeypatch.setattr(store_module, "_COMPACT_EVERY", 64)
    with running_members(1) as (member,):
        asked, revision = asyncio.run(_write(member))
    due = [number for number in range(64, revision + 1, 64) if number > 128]
    # One that still waits for its answer lets the next one be.
    assert set(asked) <= {number - 128 for number in due} and len(asked) == len(set(asked))
    assert len(asked) >= len(due) // 2


async def _write(member: EtcdMember) -> tuple[list[int], int]:
    """Which revisions were to be forgotten, and the newest one."""
    asked: list[int] = []
    async with contextlib.AsyncExitStack() as stack:
        stores = [EtcdStore(EtcdSettings(endpoints=(member.endpoint,))) for _ in range(_AGENTS)]
        for store in stores:
            await store.open()
            stack.push_async_callback(store.close)
            _count(store, asked)
        newest = 0
        for _ in range(_ROUNDS):
            written = [store.put(f"beats/n{n}", b"x") for n, store in enumerate(stores)]
            newest = max(newest, *await asyncio.gather(*written))
    return asked, newest


def _count(store: EtcdStore, asked: list[int]) -> None:
    call = store._client.call

    async def counted(method: str, request: Any) -> Any:
        if method == "compact":
            asked.append(request.revision)
        return await call(method, request)

    store._client.call = counted  # type: ignore[method-assign]
