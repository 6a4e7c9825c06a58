"""A node's first configuration file, for those who have none yet."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from migrator.errors import ConfigError, words
from node_agent.cli.errors import CliError, ExitCode
from node_agent.config import AgentConfig, load_config, parse_config, render_config

STATE_DIRECTORY: Final = "/var/lib/ferry"
API_SOCKET: Final = "/run/ferry/api.sock"
API_PORT: Final = 7780
PEER_PORT: Final = 7781
_SAID: Final = (
    ("node", "name"),
    ("node", "state_directory"),
    ("api", "listen"),
    ("api", "socket"),
    ("peer", "listen"),
    ("migration", "address"),
    ("store", "driver"),
)
"""What a new file says in any case."""


def load_or_make(
    path: Path, name: str | None, host: Callable[[], str], etcd: Sequence[str] = ()
) -> tuple[AgentConfig, bool]:
    """(configuration, whether it is new and not written yet)."""
    if path.exists():
        loaded = load_config(path)
        if name is not None and name != loaded.node.name:
            raise ConfigError(f"{path}: node.name is {loaded.node.name}, not {name} (--name)")
        if etcd and tuple(etcd) != loaded.store.endpoints:
            raise ConfigError(f"{path} is there already, with another [store]: edit it instead")
        return loaded, False
    return make_config(name or default_name(), host(), etcd), True


def default_name() -> str:
    """The host's name up to the first dot, made fit to be a node's."""
    text = re.sub(r"[^a-z0-9-]", "-", socket.gethostname().partition(".")[0].lower())
    return text.strip("-")[:40] or "node"


def make_config(name: str, host: str, etcd: Sequence[str] = ()) -> AgentConfig:
    """One address for everything; the store is `etcd`, or an SQLite file. ConfigError as usual."""
    store = f'path = "{STATE_DIRECTORY}/cluster.sqlite"'
    if etcd:
        store = f'driver = "etcd"\nendpoints = {msgspec.json.encode(list(etcd)).decode()}'
    host = _address(host)
    bracketed = f"[{host}]" if ":" in host else host
    text = f"""
[node]
name = {msgspec.json.encode(name).decode()}
state_directory = "{STATE_DIRECTORY}"
[api]
listen = "{bracketed}:{API_PORT}"
socket = "{API_SOCKET}"
[peer]
listen = "{bracketed}:{PEER_PORT}"
[store]
{store}
"""
    return parse_config(text)


def _address(text: str) -> str:
    """An IP address, without a port. CliError (usage): it is something else."""
    try:
        return str(ipaddress.ip_address(text.removeprefix("[").removesuffix("]")))
    except ValueError:
        raise CliError(
            f'--listen is "{text}"; must be an IP address of this host without a port, like '
            f"192.0.2.11: the API is at {API_PORT}, the other nodes' agents at {PEER_PORT}",
            ExitCode.USAGE,
        ) from None


def with_store(config: AgentConfig, store: Mapping[str, Any]) -> AgentConfig:
    """With the [store] table of the cluster that was joined."""
    try:
        table = msgspec.convert(dict(store), type(config.store))
    except msgspec.ValidationError as error:
        raise ConfigError(f"the cluster's [store] isn't understood here: {error}") from error
    return msgspec.structs.replace(config, store=table)


def write_config(path: Path, config: AgentConfig) -> None:
    """Only where there is none. ConfigError if it can't be written.

    What is as it is by default isn't in it: a release may change that, and an older one may not
    know the key.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write("# Written by ferry. Every key: deploy/samples/agent.toml.\n\n")
            file.write(render_config(config, without=_defaults()))
    except OSError as error:
        raise ConfigError(f"{path} can't be written: {words(error)}") from error


def _defaults() -> dict[str, dict[str, Any]]:
    """By table and key, what an agent takes where its file says nothing."""
    tables: dict[str, dict[str, Any]] = msgspec.to_builtins(make_config("any", "192.0.2.1"))
    for table, key in _SAID:
        del tables[table][key]
    tables["store"]["path"] = ""
    return tables


def store_problem(config: AgentConfig, store: Mapping[str, Any]) -> str | None:
    """Why this configuration's [store] isn't the cluster's; None: it is."""
    own = msgspec.to_builtins(config.store)
    for key in ("driver", "path", "endpoints", "prefix"):
        if _shown(own.get(key)) != _shown(store.get(key)):
            theirs = _shown(store.get(key))
            return f"store.{key} is {_shown(own.get(key))}, the cluster's is {theirs}"
    if config.store.driver == "sqlite" and not Path(config.store.path).exists():
        return (
            f"the cluster's store is the SQLite file {config.store.path}, which isn't on this "
            "host: a cluster of several hosts needs etcd"
        )
    return None


def main_address() -> str:
    """This host's address towards the default route. ConfigError if there is no such route."""
    try:
        with contextlib.closing(socket.socket(socket.AF_INET, socket.SOCK_DGRAM)) as probe:
            probe.connect(("192.0.2.1", 9))  # Sends nothing.
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"this host has no default route ({words(error)}): give its address with --listen"
        ) from error


def _shown(value: object) -> str:
    return msgspec.json.encode(value).decode()
