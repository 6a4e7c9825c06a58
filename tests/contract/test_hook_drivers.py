"""The hooks' drivers against the real thing: a running HAProxy, an HTTP server, programs."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from node_agent.hooks import webhook
from node_agent.hooks.command import CommandDriver
from node_agent.hooks.haproxy import HaproxyDriver
from node_agent.hooks.model import (
    CommandHook,
    HaproxyAway,
    HaproxyHook,
    HookCall,
    HookPoint,
    WebhookHook,
)
from node_agent.hooks.port import HookError
from node_agent.hooks.webhook import WebhookDriver, signature
from tests.contract.haproxy_server import Haproxy, running_haproxy
from tests.time_limits import Limit, Sleeps

PATIENCE_S = 30.0


def call_of(point: HookPoint, **more: object) -> HookCall:
    values = {"domain": "web1", "destination": "n2", "migration": "m1", **more}
    return HookCall(point=point, node="n1", **values)  # type: ignore[arg-type]


# --- HAProxy ---------------------------------------------------------------------------------


@pytest.fixture
async def backend() -> AsyncIterator[int]:
    """A server that holds each connection until its client leaves: its port."""

    async def hold(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.read()
        writer.close()

    server = await asyncio.start_server(hold, "127.0.0.1", 0)
    async with server:
        yield server.sockets[0].getsockname()[1]


@pytest.fixture
async def haproxy(backend: int) -> AsyncIterator[Haproxy]:
    servers = {"web1": ("127.0.0.1", backend), "other": ("127.0.0.1", 9)}
    running = running_haproxy(servers)
    yield await asyncio.to_thread(running.__enter__)
    await asyncio.to_thread(running.__exit__, None, None, None)


async def until(haproxy: Haproxy, holds: Callable[[dict[str, str]], bool]) -> None:
    """HAProxy says nothing by itself: it is asked."""
    async with asyncio.timeout(PATIENCE_S):
        while not holds(await haproxy.server_now("web1")):  # noqa: ASYNC110  It has no event.
            await asyncio.sleep(0.01)


@pytest.mark.parametrize(
    ("away", "state"), [(HaproxyAway.DRAIN, "DRAIN"), (HaproxyAway.MAINT, "MAINT")]
)
async def test_a_server_is_taken_out_and_put_back(
    haproxy: Haproxy, away: HaproxyAway, state: str
) -> None:
    hook = HaproxyHook(address=haproxy.address, backend="web", away=away)
    driver = HaproxyDriver()
    for _ in range(2):  # The same call may come again.
        await driver.run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=PATIENCE_S)
        assert (await haproxy.server_now("web1"))["status"].startswith(state)
    assert not (await haproxy.server_now("other"))["status"].startswith(state)
    for _ in range(2):
        await driver.run(hook, call_of(HookPoint.AFTER_MIGRATION), deadline_s=PATIENCE_S)
        assert (await haproxy.server_now("web1"))["status"] in ("UP", "no check")


async def test_the_last_server_that_could_serve_stays_in(backend: int) -> None:
    both = {"web1": ("127.0.0.1", backend), "web2": ("127.0.0.1", backend)}
    with running_haproxy(both) as haproxy:
        hook = HaproxyHook(address=haproxy.address, backend="web")
        driver = HaproxyDriver()

        async def take_out(domain: str, deadline_s: float) -> str:
            call = call_of(HookPoint.BEFORE_SWITCHOVER, domain=domain)
            return await driver.run(hook, call, deadline_s=deadline_s)

        assert "is in drain" in await take_out("web1", PATIENCE_S)
        assert "web/web2 stays in: no other server" in await take_out("web2", 0.2)
        assert (await haproxy.server_now("web2"))["status"] in ("UP", "no check")
        waiting = asyncio.create_task(take_out("web2", PATIENCE_S))
        await asyncio.sleep(0.1)
        back = call_of(HookPoint.AFTER_RESUME)
        await driver.run(hook, back, deadline_s=PATIENCE_S)
        assert "is in drain" in await waiting
    with running_haproxy({"web1": ("127.0.0.1", backend)}) as haproxy:
        hook = HaproxyHook(address=haproxy.address, backend="web", sessions_below=1)
        call = call_of(HookPoint.BEFORE_SWITCHOVER)
        assert "stays in" in await HaproxyDriver().run(hook, call, deadline_s=PATIENCE_S)


async def test_two_agents_never_take_all_servers_out(backend: int) -> None:
    names = [f"web{number}" for number in range(3)]
    with running_haproxy(dict.fromkeys(names, ("127.0.0.1", backend))) as haproxy:
        hook = HaproxyHook(address=haproxy.address, backend="web")

        async def take_out(name: str) -> str:
            call = call_of(HookPoint.BEFORE_SWITCHOVER, domain=name)
            return await HaproxyDriver().run(hook, call, deadline_s=0.5)

        await asyncio.gather(*(take_out(name) for name in names))
        states = [(await haproxy.server_now(name))["status"] for name in names]
        assert any(state in ("UP", "no check") for state in states), states


async def test_weight_goes_down_and_comes_back(haproxy: Haproxy) -> None:
    hook = HaproxyHook(
        address=haproxy.address, backend="web", away=HaproxyAway.WEIGHT, weight_percent=0
    )
    driver = HaproxyDriver()
    before = (await haproxy.server_now("web1"))["weight"]
    await driver.run(hook, call_of(HookPoint.BEFORE_SWITCHOVER), deadline_s=PATIENCE_S)
    assert (await haproxy.server_now("web1"))["weight"] == "0"
    await driver.run(hook, call_of(HookPoint.ON_FAILURE), deadline_s=PATIENCE_S)
    assert (await haproxy.server_now("web1"))["weight"] == before == "1"


async def test_it_waits_until_the_sessions_have_ended(haproxy: Haproxy) -> None:
    hook = HaproxyHook(address=haproxy.address, backend="web", sessions_below=1)
    clients = [await asyncio.open_connection("127.0.0.1", haproxy.port) for _ in range(4)]
    await until(haproxy, lambda row: row["scur"] != "0")
    waiting = asyncio.create_task(
        HaproxyDriver().run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=PATIENCE_S)
    )
    await until(haproxy, lambda row: row["status"].startswith("DRAIN"))
    assert not waiting.done()
    for _, writer in clients:
        writer.close()
    async with asyncio.timeout(PATIENCE_S):
        assert "0 sessions left" in await waiting


async def test_the_address_follows_the_guest(haproxy: Haproxy) -> None:
    hook = HaproxyHook(address=haproxy.address, backend="web", addresses={"n2": "127.0.0.2:8080"})
    await HaproxyDriver().run(hook, call_of(HookPoint.AFTER_RESUME), deadline_s=PATIENCE_S)
    row = await haproxy.server_now("web1")
    assert (row["srv_addr"], row["srv_port"]) == ("127.0.0.2", "8080")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"backend": "nowhere"}, "No such"),
        ({"server": "{domain}-x"}, "No such"),
        ({"address": "127.0.0.1:9"}, "can't be reached"),
        ({"address": "unix:/nowhere/api.sock"}, "can't be reached"),
    ],
)
async def test_what_is_wrong_with_haproxy_is_said(
    haproxy: Haproxy, change: dict[str, str], said: str
) -> None:
    values = {"driver": "haproxy", "address": haproxy.address, "backend": "web", **change}
    hook = msgspec.convert(values, HaproxyHook)
    with pytest.raises(HookError, match=said):
        await HaproxyDriver().run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=5.0)


# --- webhooks --------------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Serve = Callable[[Handler], Awaitable[str]]


@pytest.fixture
async def serve() -> AsyncIterator[Serve]:
    servers: list[TestServer] = []

    async def start(handler: Handler) -> str:
        app = web.Application()
        app.router.add_post("/hook", handler)
        server = TestServer(app, host="127.0.0.1")
        await server.start_server()
        servers.append(server)
        return str(server.make_url("/hook"))

    yield start
    for server in servers:
        await server.close()


async def test_a_webhook_is_signed_and_repeated_until_acknowledged(serve: Serve) -> None:
    seen: list[tuple[str, dict[str, object]]] = []

    async def receive(request: web.Request) -> web.Response:
        body = await request.read()
        expected = signature("key", request.headers["X-Ferry-Timestamp"], body)
        assert request.headers["X-Ferry-Signature"] == expected
        seen.append((request.headers["X-Ferry-Delivery"], json.loads(body)))
        return web.Response(status=503 if len(seen) < 3 else 204)

    hook = WebhookHook(url=await serve(receive), secret="key")
    call = call_of(HookPoint.BEFORE_SWITCHOVER)
    said = await WebhookDriver().run(hook, call, deadline_s=PATIENCE_S)
    assert said == "acknowledged after 3 attempts"
    assert len({delivery for delivery, _ in seen}) == 1
    assert seen[0][1]["point"] == "before-switchover" and seen[0][1]["domain"] == "web1"


async def test_an_acknowledgement_may_ask_for_more_time(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = 0

    async def receive(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"more_time_s": 50}, status=202) if asked < 4 else web.Response()

    hook = WebhookHook(url=await serve(receive), more_time_s_max=120.0)
    Sleeps(monkeypatch)
    monkeypatch.setattr(webhook, "_ASK_AGAIN_S", PATIENCE_S)
    said = await WebhookDriver().run(
        hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=PATIENCE_S
    )
    assert said.startswith("acknowledged") and asked == 4


async def test_an_answer_may_come_in_pieces(serve: Serve) -> None:
    asked = 0

    async def receive(request: web.Request) -> web.StreamResponse:
        nonlocal asked
        asked += 1
        if asked > 1:
            return web.Response()
        response = web.StreamResponse(status=202)
        await response.prepare(request)
        for piece in (b'{"more', b"_time_s", b'": 20}'):
            await response.write(piece)
            await asyncio.sleep(0.05)
        return response

    hook = WebhookHook(url=await serve(receive))
    await WebhookDriver().run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=PATIENCE_S)
    assert asked == 2


async def test_more_time_than_is_allowed_is_not_given(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def receive(request: web.Request) -> web.Response:
        return web.json_response({"more_time_s": 1000}, status=202)

    hook = WebhookHook(url=await serve(receive), more_time_s_max=60.0)
    Sleeps(monkeypatch)
    with pytest.raises(HookError, match=r"not done in time.*asked for 1000 s more"):
        await WebhookDriver().run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=PATIENCE_S)


async def test_a_refusal_is_final_and_its_reason_is_told(serve: Serve) -> None:
    asked = 0

    async def receive(request: web.Request) -> web.Response:
        nonlocal asked
        asked += 1
        return web.json_response({"reason": "black friday"}, status=409)

    hook = WebhookHook(url=await serve(receive))
    with pytest.raises(HookError, match="refused: black friday"):
        await WebhookDriver().run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=PATIENCE_S)
    assert asked == 1


async def test_a_dead_receiver_is_tried_until_the_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hook = WebhookHook(url="http://127.0.0.1:9/hook")
    Sleeps(monkeypatch)
    with pytest.raises(HookError, match=r"not done in time, ([2-9]|1\d) attempts"):
        await WebhookDriver().run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=PATIENCE_S)


# --- programs --------------------------------------------------------------------------------


def program(folder: Path, text: str) -> str:
    path = folder / "hook"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


async def test_a_program_gets_the_call_and_nothing_of_our_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET_OF_THE_AGENT", "1")
    out = tmp_path / "out"
    path = program(tmp_path, f'cat > "{out}"; env >> "{out}"; echo "$1" >> "{out}"')
    hook = CommandHook(argv=(path, "a b; touch /nowhere"))
    await CommandDriver().run(hook, call_of(HookPoint.ON_FAILURE, reason="x"), deadline_s=30.0)
    first, *rest = out.read_text().splitlines()
    assert json.loads(first)["point"] == "on-failure"
    assert "FERRY_DOMAIN=web1" in rest and rest[-1] == "a b; touch /nowhere"
    assert not any("SECRET" in line for line in rest)


@pytest.mark.parametrize(
    ("text", "said"),
    [("echo first >&2; echo no room >&2; exit 3", "status 3: no room"), ("exit 4", "status 4")],
)
async def test_a_programs_failure_is_told(tmp_path: Path, text: str, said: str) -> None:
    hook = CommandHook(argv=(program(tmp_path, text),))
    with pytest.raises(HookError, match=said):
        await CommandDriver().run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=30.0)


async def test_a_program_that_isnt_there_is_told(tmp_path: Path) -> None:
    hook = CommandHook(argv=(str(tmp_path / "nothing"),))
    with pytest.raises(HookError, match="can't be run"):
        await CommandDriver().run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=30.0)


async def test_a_program_that_takes_too_long_is_killed_with_its_children(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pids = tmp_path / "pids"
    path = program(tmp_path, f'sleep 1000 & echo $! > "{pids}"; wait')
    hook = CommandHook(argv=(path,))
    limit = Limit(monkeypatch, 600.0)
    running = asyncio.create_task(
        CommandDriver().run(hook, call_of(HookPoint.BEFORE_MIGRATION), deadline_s=600.0)
    )
    async with asyncio.timeout(PATIENCE_S):
        while not (pids.exists() and pids.read_text()):  # noqa: ASYNC110  It has no event.
            await asyncio.sleep(0.01)
        child = int(pids.read_text())
        await limit.is_over()
        with pytest.raises(HookError, match="killed"):
            await running
        while await asyncio.to_thread(_runs, child):  # noqa: ASYNC110  Not our child.
            await asyncio.sleep(0.01)


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except (FileNotFoundError, ProcessLookupError):  # The latter: it went as it was read.
        return False
