"""Which state store drivers there are, by the name in `store.driver`."""

from __future__ import annotations

from typing import Final

from node_agent.state.etcd import EtcdStore
from node_agent.state.memory import SimulatedStore
from node_agent.state.port import StateStore
from node_agent.state.sqlite import SqliteStore

DRIVERS: Final[dict[str, type[StateStore]]] = {
    SqliteStore.name: SqliteStore,
    EtcdStore.name: EtcdStore,
    SimulatedStore.name: SimulatedStore,
}
