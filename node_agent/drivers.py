"""The drivers of a node, made as its configuration says: the store's, the hypervisor's, the pools'.

A part of the composition root (`agent`), which names drivers.
"""

from __future__ import annotations

from pathlib import Path

from hypervisor.qemu.driver import QemuDriver
from migrator.model import NodeName
from migrator.ports import HypervisorDriver
from migrator.tls import TlsFiles
from node_agent.config import AgentConfig
from node_agent.pools import PoolSet
from node_agent.state.port import StateStore
from node_agent.state.sqlite import SqliteStore
from node_agent.state.typed import TypedStore
from storage.drivers import make_pool


def make_store(config: AgentConfig) -> StateStore:
    table = config.store
    if table.driver == SqliteStore.name:
        return SqliteStore(Path(table.path))
    # Here, because gRPC takes 0.14 s of a core, for nothing where the store is a file. An agent
    # makes its store first of all, so where the library isn't there it doesn't start.
    from node_agent.state.etcd import EtcdSettings, EtcdStore

    tls = TlsFiles(
        authority_path=table.tls_authority,
        certificate_path=table.tls_certificate,
        key_path=table.tls_key,
    )
    return EtcdStore(
        EtcdSettings(
            endpoints=table.members, prefix=table.prefix, tls=tls if table.tls_authority else None
        )
    )


def make_hypervisor(config: AgentConfig) -> HypervisorDriver:
    table = config.hypervisor
    return QemuDriver(
        Path(config.node.state_directory) / "qemu",
        binary=table.binary,
        accelerator=table.accelerator,
    )


def make_pools(config: AgentConfig, store: TypedStore) -> PoolSet:
    node, state = NodeName(config.node.name), Path(config.node.state_directory) / "storage"
    return PoolSet(config.pools, lambda settings: make_pool(settings, node, state), store, node)
