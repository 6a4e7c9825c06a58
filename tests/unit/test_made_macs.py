"""NICs that are defined without a MAC: what they get, and that nobody else has it."""

from __future__ import annotations

import asyncio
import json
import secrets
from collections.abc import Callable

import msgspec
import pytest

from migrator.errors import ConflictError, InvalidRequest
from migrator.model import DomainDefinition, DomainName
from node_agent.cli.errors import ExitCode
from node_agent.domain_records import ATTEMPTS
from node_agent.mac_addresses import made, with_macs
from tests.unit.agent_world import MAC, World, spec_of
from tests.unit.api_client import Client, ask
from tests.unit.ferry_command import Ferry

ONE, OTHER = bytes([0xFF, 1, 2, 3, 4, 5]), bytes([0x31, 1, 2, 3, 4, 6])
ONE_MAC, OTHER_MAC = "f2:01:02:03:04:05", "32:01:02:03:04:06"
BARE: dict[str, object] = {"bridge": "br0"}


def definition(name: str, /, *nics: dict[str, object], **changes: object) -> DomainDefinition:
    values = {"name": name, "memory_bytes": 64 << 20, "nics": nics or (BARE,)}
    return msgspec.convert(values | changes, DomainDefinition)


def falling(*numbers: bytes) -> Callable[[int], bytes]:
    """Dice that fall so; a test fails that throws them more often."""
    each = iter(numbers)
    return lambda count: next(each)[:count]


def test_a_made_mac_is_unicast_and_locally_administered() -> None:
    macs = {with_macs(definition("web"), secrets.token_bytes).nics[0].mac for _ in range(256)}
    assert len(macs) == 256
    assert {int(mac[:2], 16) & 0x0F for mac in macs} == {0x02}
    assert len({mac[0] for mac in macs}) > 4, "the rest is left to chance"
    for mac in macs:
        assert len(mac) == len(MAC) and mac == mac.lower()


def test_what_is_given_stays_and_is_not_made_again() -> None:
    given = definition("web", BARE, BARE | {"mac": ONE_MAC, "mtu_bytes": 1400}, BARE, priority=7)
    spec = with_macs(given, falling(ONE, OTHER, OTHER, ONE, b"\0" * 6))
    assert [nic.mac for nic in spec.nics] == [OTHER_MAC, ONE_MAC, "02:00:00:00:00:00"]
    assert (spec.nics[1].mtu_bytes, spec.priority) == (1400, 7)
    assert made(given, spec) == {OTHER_MAC, "02:00:00:00:00:00"}
    whole = spec_of()
    assert with_macs(whole, falling()) == whole


async def test_a_mac_that_is_taken_is_made_anew(world: World) -> None:
    await world.a.domains.define(definition("web", BARE | {"mac": ONE_MAC}))
    world.b.domains._roll = falling(ONE, ONE, OTHER)  # Once to see whether the rest is right.
    record = await world.b.domains.define(definition("db"))
    assert record.spec.nics[0].mac == OTHER_MAC
    assert await world.a.records.get(DomainName("db")) == record


async def test_of_two_nodes_that_make_the_same_at_once_one_makes_another(world: World) -> None:
    for node in (world.a, world.b):
        node.domains._roll = falling(ONE, ONE, OTHER)
    await asyncio.gather(
        world.a.domains.define(definition("one")), world.b.domains.define(definition("two"))
    )
    records = await world.a.records.list_records()
    assert {nic.mac for each in records.values() for nic in each.spec.nics} == {ONE_MAC, OTHER_MAC}


async def test_it_ends_where_chance_finds_nothing_else(world: World) -> None:
    await world.a.domains.define(definition("web", BARE | {"mac": ONE_MAC}))
    world.a.domains._roll = falling(*[ONE] * (1 + ATTEMPTS))
    with pytest.raises(ConflictError, match=f"MAC {ONE_MAC} belongs to domain web"):
        await world.a.domains.define(definition("db"))
    assert list(await world.a.records.list_records()) == ["web"]


@pytest.mark.parametrize(
    ("other", "error"),
    [
        ({"name": "web"}, "defined already"),
        ({"disks": [{"volume": "root"}]}, "default/root belongs to domain web"),
        ({"nics": [BARE, BARE | {"mac": MAC}]}, f"MAC {MAC} belongs to domain web"),
        ({"nics": [BARE, BARE | {"mac": "01:00:5e:00:00:01"}]}, r"nics\[1\].mac must be a unicast"),
    ],
)
async def test_what_is_refused_for_another_reason_is_tried_once(
    world: World, other: dict[str, object], error: str
) -> None:
    await world.a.domains.define(spec_of())
    world.a.domains._roll = falling(ONE, OTHER)
    with pytest.raises((ConflictError, InvalidRequest), match=error):
        await world.a.domains.define(definition("db", **other))


async def test_the_api_makes_and_shows_it(client: Client) -> None:
    nics = [BARE, BARE | {"mac": None}]
    body: dict[str, object] = {"name": "web", "memory_bytes": 64 << 20, "nics": nics}
    answer = await ask(client, "POST", "/v1/domains", body, status=201)
    macs = [nic["mac"] for nic in answer["spec"]["nics"]]
    assert len(set(macs)) == 2
    await ask(client, "POST", "/v1/domains/web/start", {"node": "b"}, status=200)
    shown = await ask(client, "GET", "/v1/domains/web", status=200)
    assert [nic["mac"] for nic in shown["spec"]["nics"]] == macs, "it stays"
    wrong = body | {"name": "db", "nics": [{"mac": "x", "bridge": "br0"}]}
    problem = await ask(client, "POST", "/v1/domains", wrong, status=400)
    assert "nics[0].mac" in json.dumps(problem)
    document = await ask(client, "GET", "/openapi.json", status=200)
    schemas = document["components"]["schemas"]
    assert schemas["NicDefinition"]["required"] == ["bridge"]
    assert schemas["NicSpec"]["required"] == ["mac", "bridge"]
    assert "DomainDefinition" in json.dumps(document["paths"]["/v1/domains"]["post"]["requestBody"])


@pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")
async def test_the_cli_says_which_was_made(ferry: Ferry) -> None:
    flags = ("--memory", "64M", "--nic", f"bridge=br0,mac={MAC}", "--nic", "bridge=br0,ip=10.0.0.7")
    said = (await ferry("domain", "define", "web", *flags, "--start")).out.splitlines()
    assert said[0] == "domain web is defined and runs on a"
    (line,) = said[1:]
    mac = line.removeprefix("NIC on br0: ")
    assert line.startswith("NIC on br0: ") and int(mac[:2], 16) & 0x0F == 0x02
    assert f"{mac} on br0 10.0.0.7" in (await ferry("domain", "show", "web")).out
    nic = ("--memory", "64M", "--nic", f"mac={MAC}")
    refused = await ferry("domain", "define", "x", *nic, code=ExitCode.USAGE)
    assert "bridge= is missing" in refused.err
