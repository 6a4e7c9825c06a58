"""The configuration: defaults, every problem by its key, and the round trip through TOML."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
import pytest

from migrator.errors import ConfigError
from node_agent.config import (
    default_memory_bytes,
    format_endpoint,
    load_config,
    parse_config,
    parse_endpoint,
    render_config,
)
from node_agent.foundations import prepare_folders

MINIMAL = """
[node]
name = "n1"
state_directory = "/var/lib/ferry"
[api]
listen = "10.77.0.11:7780"
[peer]
listen = "10.77.0.11:7781"
[store]
path = "/var/lib/ferry/cluster.sqlite"
"""
PEER = '[[peers]]\nname = "n2"\naddress = "10.77.0.12:7781"\n'
POOL = '[[pools]]\nname = "default"\npath = "/pool"\n'


def test_defaults_are_filled_in() -> None:
    config = parse_config(MINIMAL)
    assert config.api.socket == "/var/lib/ferry/api.sock"
    assert config.api.listen_address == ("10.77.0.11", 7780)
    assert config.migration.address == "10.77.0.11"
    assert config.migration.streams == 0
    assert config.node.memory_bytes == default_memory_bytes()
    assert (config.store.driver, config.hypervisor.driver, config.fabric.driver) == (
        "sqlite",
        "qemu",
        "bridge",
    )
    assert config.pools == () and config.peers == ()


def test_memory_default_leaves_a_gibibyte_but_takes_at_least_half() -> None:
    assert default_memory_bytes(8 * 1024**3) == 7 * 1024**3
    assert default_memory_bytes(128 * 1024**3) == 120 * 1024**3
    assert default_memory_bytes(1024**3) == 512 * 1024**2


@pytest.mark.parametrize(
    "text",
    [
        MINIMAL,
        MINIMAL + PEER + POOL,
        MINIMAL + '[[pools]]\nname = "x"\ndriver = "nbd"\nhook = "/bin/x"\nreconnect_delay_s = 9\n',
        MINIMAL.replace("10.77.0.11", "[fd00::1]") + POOL,
    ],
)
def test_render_round_trips(text: str, tmp_path: Path) -> None:
    config = parse_config(text)
    path = tmp_path / "ferry.toml"
    path.write_text(render_config(config), encoding="utf-8")
    assert load_config(path) == config


def test_render_escapes_what_toml_wants_escaped() -> None:
    config = parse_config(MINIMAL)
    odd = msgspec.structs.replace(
        config, store=msgspec.structs.replace(config.store, path='/a "b"\\c\n\x7f\u00fc')
    )
    assert parse_config(render_config(odd)) == odd


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ('name = "n1"', 'name = "N 1"', "node.name: "),
        ('name = "n1"', "", "node.name: missing"),
        ('name = "n1"', 'nmae = "n1"', "node.nmae: unknown key; did you mean node.name?"),
        ("/var/lib/ferry/cluster", "var/cluster", "store.path: "),
        ('"/var/lib/ferry"', '"ferry"', "node.state_directory: "),
        ("10.77.0.11:7780", "10.77.0.11", "api.listen: "),
        ("10.77.0.11:7780", "10.77.0.11:99999", "api.listen: "),
        ("10.77.0.11:7780", "fd00::1:7780", "brackets"),
        ("10.77.0.11:7781", "0.0.0.0:7781", "migration.address: "),
        ("10.77.0.11:7781", "10.77.0.11:7780", "peer.listen: "),
        ("[store]", "[stoer]", "stoer: unknown key; did you mean store?"),
        ("[store]", '[tls]\nmode = "maybe"\n[store]', 'tls.mode: "maybe" is wrong; must be "req'),
        ("[store]", '[peer.tls]\ncertificate = "x"\n[store]', "peer.tls: there is no such table"),
        ("[store]", '[store]\ndriver = "consul"', 'store.driver: "consul" is wrong; must be "sql'),
        ("[store]", '[store]\ndriver = "etcd"', "store.endpoints: missing; must be an array"),
        ("[store]", '[store]\nendpoints = ["n1"]', "store.endpoints[0]: "),
        ("[store]", '[store]\nprefix = "ferry"', "store.prefix: "),
        ("[store]", '[store]\ntls_key = "/k"', "store.tls_authority: missing; mutual TLS takes"),
        (
            'path = "/var/lib/ferry/cluster',
            '# path = "',
            "store.path: missing; must be",
        ),
        ("[store]", "[migration]\nstreams = 17\n[store]", "migration.streams: 17 is wrong"),
        ("[store]", "[[peers]]\n[store]", "peers[0].name: missing"),
        ("[store]", "pools = 3\n[store]", "peer.pools: unknown key"),
        ("[store]", PEER * 2 + "[store]", 'peers[1].name: "n2" is taken'),
        ("[store]", PEER.replace("n2", "n1") + "[store]", 'peers[0].name: "n1" is this node'),
        ("[store]", POOL * 2 + "[store]", 'pools[1].name: "default" is taken'),
        ("[store]", POOL + 'driver = "nsf"\n[store]', 'pools[0].driver: "nsf" is wrong; one of'),
        ("[store]", POOL + 'driver = "nfs"\n[store]', "pools[0].server: missing"),
        ("[store]", POOL.replace("/pool", "pool") + "[store]", "pools[0].path: "),
        ("[store]", POOL + "size = 3\n[store]", "pools[0].size: unknown key"),
        ("[store]", "[store", "not valid TOML"),
    ],
)
def test_each_problem_names_its_key(old: str, new: str, expected: str) -> None:
    assert old in MINIMAL
    with pytest.raises(ConfigError) as caught:
        parse_config(MINIMAL.replace(old, new))
    assert expected in str(caught.value)


def test_all_problems_at_once_and_none_that_only_follows() -> None:
    with pytest.raises(ConfigError) as caught:
        parse_config('[node]\nname = "n1"\n[api]\nlisten = "x"\n[peer]\n')
    keys = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert keys == ["node.state_directory", "api.listen", "peer.listen", "store"]


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"ferry\.toml"):
        load_config(tmp_path / "ferry.toml")


@pytest.mark.parametrize("endpoint", [("10.0.0.1", 1), ("fd00::1", 65535), ("host.example", 80)])
def test_endpoints_round_trip(endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(format_endpoint(*endpoint)) == endpoint


def test_folders_that_cant_be_used_are_named_by_their_keys(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = tmp_path / "state"
    text = MINIMAL.replace('"/var/lib/ferry"', f'"{state}"')
    text += POOL.replace("/pool", str(tmp_path / "pool"))
    prepare_folders(parse_config(text))
    assert (state / "run").is_dir()
    assert "pools[0].path" in caplog.text
    in_a_file = MINIMAL.replace('"/var/lib/ferry"', f'"{tmp_path / "file" / "state"}"')
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"^node\.state_directory: "):
        prepare_folders(parse_config(in_a_file))


def test_a_vxlan_fabric_names_its_bridge_and_identifier() -> None:
    text = MINIMAL + '\n[fabric]\ndriver = "vxlan"\n'
    with pytest.raises(ConfigError) as caught:
        parse_config(text)
    assert "fabric.bridge: missing" in str(caught.value)
    assert "fabric.identifier: missing" in str(caught.value)


EVPN = MINIMAL + '\n[fabric]\ndriver = "vxlan"\nbridge = "g0"\nidentifier = 7\nevpn = true\n'
ROUTED = MINIMAL + '\n[fabric]\ndriver = "routed"\nbridge = "guests"\n'


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (MINIMAL + '\n[fabric]\ndriver = "routed"\n', "fabric.bridge: missing"),
        (MINIMAL + '\n[fabric]\nroutes = "frr"\n', 'only driver "routed" has routes'),
        (MINIMAL + "\n[fabric]\nevpn = true\n", 'only drivers "vxlan" and "routed" have EVPN'),
        (EVPN + 'remotes = ["192.0.2.2"]\n', "fabric.remotes: with evpn, FRR knows"),
        (MINIMAL + '\n[fabric]\ndriver = "macvtap"\n', "fabric.bridge: missing"),
        (MINIMAL + '\n[fabric]\ndriver = "macvtap"\n', "fabric.uplink: missing"),
        (ROUTED + 'local = "here"\n', 'fabric.local: "here" is not an IPv4'),
        (ROUTED + 'local6 = "192.0.2.1"\n', 'fabric.local6: "192.0.2.1" is not an IPv6'),
        (ROUTED + 'gateways = ["10.0.0.0/24"]\n', "fabric.gateways"),
        (ROUTED + 'routes = "netlink"\n', "fabric.route_key_file: missing"),
        (ROUTED + 'routes = "netlink"\n', "fabric.route_peers: missing"),
        (ROUTED + 'routes = "webhook"\nroute_key_file = "/k"\n', "fabric.route_url: missing"),
        (ROUTED + 'routes = "rip"\n', "fabric.routes"),
    ],
)
def test_what_is_wrong_with_a_fabric_is_said(text: str, problem: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(problem)):
        parse_config(text)


def test_a_routed_fabric_is_read_back_as_it_was_written() -> None:
    config = parse_config(
        ROUTED + 'routes = "netlink"\nroute_key_file = "/key"\nroute_peers = ["192.0.2.254"]\n'
    )
    assert config.fabric.route_peers == ("192.0.2.254",)
    assert parse_config(render_config(config)) == config
