"""What is told of members that didn't answer."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from types import SimpleNamespace
from typing import Any, cast

import grpc
import grpc.aio
import pytest

from migrator.errors import StoreError
from node_agent.state.etcd import client as client_module
from node_agent.state.etcd.client import EtcdClient, EtcdSettings, Member
from tests.time_limits import Sleeps

TIME_S = 30.0


def failing(*codes: grpc.StatusCode) -> Callable[..., Awaitable[Any]]:
    """A member's call that fails with these, and with the last of them from then on."""
    left = list(codes)

    async def call(request: Any, **_: object) -> Any:
        code = left.pop(0) if len(left) > 1 else left[0]
        details = "" if code is grpc.StatusCode.DEADLINE_EXCEEDED else "a wrong certificate"
        metadata = grpc.aio.Metadata()
        raise grpc.aio.AioRpcError(code, metadata, metadata, details)

    return call


async def said(monkeypatch: pytest.MonkeyPatch, try_s: float, *codes: grpc.StatusCode) -> str:
    monkeypatch.setattr(client_module, "_TRY_S", try_s)
    client = EtcdClient(EtcdSettings(endpoints=()), timeout_s=TIME_S)
    member = SimpleNamespace(name="m1", calls={"range": failing(*codes)})
    client._members = [cast(Member, member)]
    with pytest.raises(StoreError) as raised:
        await client.call("range", None)
    return str(raised.value)


REFUSED, SILENT = grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED


async def test_a_try_with_little_time_left_takes_no_reason_away(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A connection that was just being tried again made "no answer" of a wrong certificate."""
    Sleeps(monkeypatch)
    little, enough = 2 * TIME_S, 0.0
    assert "m1: a wrong certificate" in await said(monkeypatch, little, REFUSED, SILENT)
    assert "m1: no answer" in await said(monkeypatch, little, SILENT)
    assert "m1: no answer" in await said(monkeypatch, enough, REFUSED, SILENT)
