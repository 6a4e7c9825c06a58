"""The agent's configuration: one TOML file, checked to the last key before anything starts.

    load_config(path)      file -> AgentConfig, every default filled in
    parse_config(text)     the same from text
    render_config(config)  AgentConfig -> TOML text that `parse_config` reads back as an equal value

Every problem is found in one go: ConfigError has one line a problem, each naming its key
(`api.listen`, `pools[1].path`) and saying what would be right. An unknown key is a problem.

Adding a key: add a field to its table's struct, with a description of what is right. A key whose
default depends on other keys gets it in `_fill_derived`.
"""

from __future__ import annotations

import difflib
import ipaddress
import json
import os
import tomllib
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec

from migrator.errors import ConfigError, words
from migrator.model import Name, NodeName
from migrator.tls import TlsMode
from node_agent.config_table import Table
from node_agent.fabric_config import FabricTable, fabric_contradictions
from storage.settings import BY_DRIVER, DEFAULT_DRIVER, OFFERED, PoolSettings

_GIB: Final = 1024**3


_Endpoint = Annotated[
    str, msgspec.Meta(description='"HOST:PORT", IPv6 in brackets: "[fd00::1]:7780"')
]
_AbsolutePath = Annotated[
    str, msgspec.Meta(description="an absolute path", pattern=r"^/", max_length=4096)
]

_PathOrNone = Annotated[
    str, msgspec.Meta(description="an absolute path", pattern=r"^(/|$)", max_length=4096)
]


class NodeTable(Table, frozen=True, kw_only=True):
    name: Name
    state_directory: _AbsolutePath
    """Journals, consoles and sockets of this node live below it."""
    memory_bytes: Annotated[
        int, msgspec.Meta(ge=16 * 1024**2, description="a whole number of bytes, at least 16 MiB")
    ]
    """What the node offers to domains: more neither start nor come there (`memory_room`). Default:
    `default_memory_bytes`."""
    restart_crashed: Annotated[bool, msgspec.Meta(description="true or false")] = True
    """Start a domain again, here and from its disk, when its hypervisor died under it, or when the
    node was rebooted, shut down or lost power while it ran."""
    guest_shutdown_s: Annotated[
        float, msgspec.Meta(ge=0, le=1500, description="seconds, from 0 to 1500")
    ] = 120.0
    """How long its guests may take, all together, to shut down before the host does; then they are
    ended by force. 0: they aren't asked (`host_shutdown`)."""


class ApiTable(Table, frozen=True, kw_only=True):
    listen: _Endpoint
    socket: _AbsolutePath
    """Unix socket of the same API. Default: STATE_DIRECTORY/api.sock."""

    @property
    def listen_address(self) -> tuple[str, int]:
        """(host, port) of `listen`."""
        return parse_endpoint(self.listen)


class PeerTable(Table, frozen=True, kw_only=True):
    listen: _Endpoint

    @property
    def listen_address(self) -> tuple[str, int]:
        """(host, port) of `listen`."""
        return parse_endpoint(self.listen)


class MigrationTable(Table, frozen=True, kw_only=True):
    address: Annotated[
        str, msgspec.Meta(min_length=1, description="an address or host name, without a port")
    ]
    """Page streams arrive here. Default: the host part of `peer.listen`."""
    streams: Annotated[int, msgspec.Meta(ge=0, le=16, description="1 to 16 page streams, or 0")] = 0
    """0: as many as link and cores are good for."""


class TlsTable(Table, frozen=True, kw_only=True):
    mode: Annotated[TlsMode, msgspec.Meta(description='"required", "auto" or "plain"')] = (
        TlsMode.REQUIRED
    )
    """`required`: the agent serves nobody before `ferry cluster init` or `join`; from then on it's
    mutual TLS between nodes, HTTPS and users. `plain`: no TLS and no authentication, for a lab on
    one machine. `auto`: plain as long as STATE_DIRECTORY/tls has no files."""
    certificate_hours: Annotated[
        float, msgspec.Meta(ge=1, le=87_600, description="hours, from 1 to 87600")
    ] = 720.0
    """How long the certificates hold that this node signs, if it does."""
    announce: Annotated[bool, msgspec.Meta(description="true or false")] = True
    """Whether a joining node may find this one by zeroconf."""


class StoreTable(Table, frozen=True, kw_only=True):
    driver: Annotated[Literal["sqlite", "etcd"], msgspec.Meta(description='"sqlite" or "etcd"')] = (
        "sqlite"
    )
    path: _PathOrNone = ""
    """sqlite: the one file that all agents on this machine share."""
    endpoints: Annotated[
        tuple[str, ...], msgspec.Meta(description='an array of the members\' "HOST:PORT"')
    ] = ()
    """etcd: where its members' clients connect. Name all of them."""
    prefix: Annotated[
        str, msgspec.Meta(pattern=r"^/[A-Za-z0-9._/-]*/$", description='"/ferry/", say')
    ] = "/ferry/"
    """etcd: all keys are below it. Clusters that share an etcd have different ones."""
    tls_authority: _PathOrNone = ""
    """etcd: PEM files for mutual TLS; all three or none."""
    tls_certificate: _PathOrNone = ""
    tls_key: _PathOrNone = ""

    @property
    def members(self) -> tuple[tuple[str, int], ...]:
        """(host, port) of each of `endpoints`."""
        return tuple(parse_endpoint(each) for each in self.endpoints)


class HypervisorTable(Table, frozen=True, kw_only=True):
    driver: Annotated[
        Literal["qemu", "simulated"], msgspec.Meta(description='"qemu" or "simulated"')
    ] = "qemu"
    binary: Annotated[
        str, msgspec.Meta(min_length=1, description="a program's name in PATH or absolute path")
    ] = "qemu-system-x86_64"
    accelerator: Annotated[
        Literal["auto", "kvm", "tcg"], msgspec.Meta(description='"auto", "kvm" or "tcg"')
    ] = "auto"


class KnownPeer(Table, frozen=True, kw_only=True):
    name: Name
    address: _Endpoint

    @property
    def endpoint(self) -> tuple[str, int]:
        """(host, port) of `address`."""
        return parse_endpoint(self.address)


class _AnyPool(Table, frozen=True, kw_only=True):
    """Stands for the struct of `storage.settings` that a pool's driver asks for."""


class AgentConfig(Table, frozen=True, kw_only=True):
    """The whole file, every default filled in."""

    node: NodeTable
    api: ApiTable
    peer: PeerTable
    migration: MigrationTable
    store: StoreTable
    hypervisor: HypervisorTable
    fabric: FabricTable
    tls: TlsTable = TlsTable()
    pools: tuple[PoolSettings, ...] = ()
    peers: tuple[KnownPeer, ...] = ()

    @property
    def peer_addresses(self) -> dict[NodeName, tuple[str, int]]:
        """The configured peers, as `PeerHub` takes them."""
        return {NodeName(peer.name): peer.endpoint for peer in self.peers}


def parse_endpoint(text: str) -> tuple[str, int]:
    """(host, port) of "host:port" or "[v6]:port". ConfigError says what is wrong with it."""
    host, separator, port_text = text.rpartition(":")
    if not separator or not host:
        raise ConfigError(f'"{text}" is not HOST:PORT')
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
        try:
            ipaddress.IPv6Address(host)
        except ValueError:
            raise ConfigError(f'"{host}" in brackets is not an IPv6 address') from None
    elif ":" in host:
        raise ConfigError(f'"{text}": an IPv6 address goes in brackets, "[{host}]:{port_text}"')
    elif any(character.isspace() or character in "[]/" for character in host):
        raise ConfigError(f'"{host}" is not an address or host name')
    if not (port_text.isascii() and port_text.isdigit() and 1 <= int(port_text) <= 65535):
        raise ConfigError(f'"{port_text}" is not a port from 1 to 65535')
    return host, int(port_text)


def format_endpoint(host: str, port: int) -> str:
    """The inverse of `parse_endpoint`."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def advertised(config: AgentConfig) -> tuple[str, str]:
    """The addresses (peer, API) that others reach this node at: never an unspecified one."""

    def reachable(host: str) -> str:
        try:
            unspecified = ipaddress.ip_address(host).is_unspecified
        except ValueError:
            return host  # A host name.
        return config.migration.address if unspecified else host

    (peer, peer_port), (api, api_port) = config.peer.listen_address, config.api.listen_address
    return format_endpoint(reachable(peer), peer_port), format_endpoint(reachable(api), api_port)


def default_memory_bytes(host_bytes: int | None = None) -> int:
    """Host memory less a sixteenth, and 1 GiB at least, but half of it in any case.

    For the host itself, and for what a QEMU takes beside its guest's memory: 50 to 120 MiB.
    """
    total = host_bytes or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return max(total - max(_GIB, total // 16), total // 2)


def load_config(path: Path) -> AgentConfig:
    """Read the file. ConfigError names the file, then one problem a line."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {words(error)}") from error
    try:
        return parse_config(text)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def parse_config(text: str) -> AgentConfig:
    """Check the text and fill in the defaults. ConfigError has one problem a line."""
    try:
        raw = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"not valid TOML: {error}") from error
    problems: list[str] = []
    derived = _fill_derived(raw)
    peer = derived.get("peer")
    if isinstance(peer, dict) and peer.pop("tls", None) is not None:
        problems.append("peer.tls: there is no such table; see tls.mode")
    problems += _problems(AgentConfig, derived, "")
    if not problems:
        config = msgspec.convert(derived, AgentConfig)
        problems += _contradictions(config)
        if not problems:
            return config
    raise ConfigError("\n".join(problems))


def _fill_derived(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of the file's tables, with the defaults that depend on other keys filled in.

    Where a key that a default needs is wrong, the default is a harmless placeholder: the key
    itself is reported, not what follows from it.
    """
    tables: dict[str, Any] = {
        key: dict(value) if isinstance(value, dict) else value for key, value in raw.items()
    }
    for optional in ("migration", "hypervisor", "fabric"):
        tables.setdefault(optional, {})
    node, api = tables.get("node"), tables.get("api")
    peer, migration = tables.get("peer"), tables["migration"]
    if isinstance(node, dict):
        node.setdefault("memory_bytes", default_memory_bytes())
    if isinstance(api, dict):
        directory = node.get("state_directory") if isinstance(node, dict) else None
        api.setdefault("socket", f"{directory or '/'}/api.sock".replace("//", "/"))
    pools = tables.get("pools")
    if isinstance(pools, list):
        tables["pools"] = [
            {"driver": DEFAULT_DRIVER, **pool} if isinstance(pool, dict) else pool for pool in pools
        ]
    if isinstance(migration, dict) and "address" not in migration:
        try:
            migration["address"] = parse_endpoint(str((peer or {})["listen"]))[0]
        except (ConfigError, KeyError, TypeError, AttributeError):
            migration["address"] = "unknown"
    return tables


def _problems(kind: type[msgspec.Struct], table: Any, path: str) -> Iterator[str]:
    """What is wrong with one table, key by key."""
    if not isinstance(table, dict):
        yield f"{path}: must be a table"
        return
    prefix = f"{path}." if path else ""
    if kind is _AnyPool:
        driver = table["driver"]
        if not isinstance(driver, str) or driver not in BY_DRIVER:
            yield f"{prefix}driver: {json.dumps(driver, default=str)} is wrong; one of {OFFERED}"
            return
        kind = BY_DRIVER[driver]
        table = {key: value for key, value in table.items() if key != "driver"}
    fields = {field.name: field for field in msgspec.structs.fields(kind)}
    for key in sorted(table.keys() - fields.keys()):
        close = difflib.get_close_matches(key, fields, n=1)
        known = f"did you mean {prefix}{close[0]}?" if close else f"known: {', '.join(fields)}"
        yield f"{prefix}{key}: unknown key; {known}"
    for name, field in fields.items():
        where, nested, many = f"{prefix}{name}", *_table_type(field.type)
        if name not in table:
            if field.required:
                yield f"{where}: missing; must be {_right(field.type)}"
        elif nested is None:
            yield from _value_problems(field.type, table[name], where)
        elif not many:
            yield from _problems(nested, table[name], where)
        elif not isinstance(table[name], list):
            yield f"{where}: must be an array of tables, [[{where}]]"
        else:
            for index, item in enumerate(table[name]):
                yield from _problems(nested, item, f"{where}[{index}]")


def _value_problems(kind: Any, value: Any, where: str) -> Iterator[str]:
    try:
        msgspec.convert(value, kind)
        if kind == _Endpoint:
            parse_endpoint(value)
    except msgspec.ValidationError:
        yield f"{where}: {json.dumps(value, default=str)} is wrong; must be {_right(kind)}"
    except ConfigError as error:
        yield f"{where}: {error}; must be {_right(kind)}"


def _table_type(kind: Any) -> tuple[type[msgspec.Struct] | None, bool]:
    """(table struct, whether there are many) for a field that holds tables; else (None, False)."""
    if isinstance(kind, type) and issubclass(kind, Table):
        return kind, False
    arguments = typing.get_args(kind)
    if kind == tuple[PoolSettings, ...]:
        return _AnyPool, True
    if typing.get_origin(kind) is tuple and issubclass(arguments[0], Table):
        return arguments[0], True
    return None, False


def _right(kind: Any) -> str:
    """What a right value of this type looks like."""
    for meta in getattr(kind, "__metadata__", ()):
        if isinstance(meta, msgspec.Meta) and meta.description:
            return meta.description
    return "a table" if _table_type(kind)[0] else str(kind)


def _contradictions(config: AgentConfig) -> Iterator[str]:
    """What is wrong between keys that are each right by themselves."""
    seen: set[str] = set()
    for index, pool in enumerate(config.pools):
        if pool.name in seen:
            yield f'pools[{index}].name: "{pool.name}" is taken by an earlier pool'
        seen.add(pool.name)
    seen = set()
    for index, peer in enumerate(config.peers):
        if peer.name == config.node.name:
            yield f'peers[{index}].name: "{peer.name}" is this node itself; list only the others'
        if peer.name in seen:
            yield f'peers[{index}].name: "{peer.name}" is taken by an earlier peer'
        seen.add(peer.name)
    yield from _store_contradictions(config.store)
    yield from fabric_contradictions(config.fabric)
    if config.api.listen == config.peer.listen:
        yield f'peer.listen: "{config.peer.listen}" is api.listen too; must be another port'
    try:
        if ipaddress.ip_address(config.migration.address).is_unspecified:
            yield (
                f'migration.address: "{config.migration.address}" is no place to send pages to; '
                "must be one address of this node that its peers reach"
            )
    except ValueError:
        pass  # A host name.


def _store_contradictions(store: StoreTable) -> Iterator[str]:
    if store.driver == "sqlite" and not store.path:
        yield "store.path: missing; must be an absolute path"
    if store.driver == "etcd" and not store.endpoints:
        yield 'store.endpoints: missing; must be an array of the members\' "HOST:PORT"'
    for index, endpoint in enumerate(store.endpoints):
        try:
            parse_endpoint(endpoint)
        except ConfigError as error:
            yield f"store.endpoints[{index}]: {error}"
    tls = {name: getattr(store, name) for name in ("tls_authority", "tls_certificate", "tls_key")}
    if any(tls.values()):
        yield from (
            f"store.{name}: missing; mutual TLS takes all three files"
            for name, path in tls.items()
            if not path
        )


def render_config(
    config: AgentConfig, without: Mapping[str, Mapping[str, object]] | None = None
) -> str:
    """TOML text with every key, in the file's usual order; without those that `without` has alike.

    A table that has no key left is left out, too.
    """
    known = without or {}
    lines: list[str] = []
    for name, value in msgspec.to_builtins(config).items():
        several = isinstance(value, list | tuple)
        for table in value if several else [value]:
            alike = {} if several else known.get(name, {})
            keys = [
                f"{key} = {_toml(item)}"
                for key, item in table.items()
                if item is not None and alike.get(key, None) != item
            ]
            if keys:
                lines += [f"[[{name}]]" if several else f"[{name}]", *keys, ""]
    return "\n".join(lines)


def _toml(value: str | float) -> str:
    # A JSON string is a TOML basic string, but for DEL, which TOML wants escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
