"""The store is restored from an older snapshot, for good; then operators say what is.

Both while no migration is under way, as the documentation asks. It also asks for agents that are
stopped; these live on, but nothing else is under way either: of two starts, one of before the
restore and one of after it, both could win the same token. What was on its way to the store is
lost, and what was on its way to the storage has arrived, or never does.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Final

from migrator.model import NodeName, OwnershipRecord
from node_agent.state.ownership import ownership_key
from node_agent.state.port import Entry
from node_agent.state.typed import decode
from tests.simulation.agent import Agent
from tests.simulation.cluster import Domain
from tests.simulation.guests import G, Guest
from tests.simulation.node import Node
from tests.simulation.stories import LAST_S, Operator, Story

PATIENCE: Final = 5
"""Refusals after which an operator powers such a guest off."""


class Restores(Story):
    """See the module."""

    def __init__(self, operator: Operator) -> None:
        super().__init__(operator)
        self._snapshot: Mapping[str, Entry] = {}
        self._restored = False
        self._tried: dict[str, int] = {}

    @property
    def done(self) -> bool:
        return self.world.elapsed_s > LAST_S or (
            self._restored
            and not any(
                self._newer(domain) or self._stale(domain)
                for domain in self.cluster.domains.values()
            )
        )

    def start(self) -> None:
        self.world.after(0.3 + self.world.delay(5.0), self._save)

    def _save(self) -> None:
        if self._busy():
            self.world.after(0.2, self._save)
            return
        self._snapshot = dict(self.cluster.store.entries)
        self.world.log("store: a snapshot")
        most_s = self.world.faults.restored_after_s_max
        self.world.after(1.0 + self.world.delay(most_s), self._restore)

    def _restore(self) -> None:
        if self.world.elapsed_s > LAST_S:
            return
        if self._busy():
            self.world.after(0.2, self._restore)
            return
        self.world.log("store: restored, for good")
        self._restored = True
        self.cluster.store.restore(self._snapshot)
        for domain in self.cluster.domains.values():
            domain.volume.settle()
            key = ownership_key(domain.name)
            entry = self._snapshot.get(key)
            domain.restored(None if entry is None else decode(key, entry.value, OwnershipRecord))
        self.world.after(self.world.delay(10.0), self._mend)

    def _busy(self) -> bool:
        return any(
            node.sides() or node.open_entries() or _operates(node)
            for node in self.cluster.nodes.values()
        )

    def _newer(self, domain: Domain) -> Guest | None:
        """Its guest, where that is one that the store doesn't know."""
        for guest in domain.guests.values():
            if guest.state in (G.RUNNING, G.IO_ERROR) and domain.is_newer(guest):
                return guest
        return None

    def _mend(self) -> None:
        world = self.world
        for domain in self.cluster.domains.values():
            guest = self._newer(domain)
            if guest is None:
                self._stop_stale(domain)
                continue
            node = self.cluster.nodes[guest.node]
            self._tried[domain.name] = self._tried.get(domain.name, 0) + 1
            if self._tried[domain.name] > PATIENCE:
                world.log("{}: {} is powered off from within", node.name, domain.name)
                node.kill_guest(domain, "powered off", stopped=True)
            elif not self._stop_stale(domain):
                self.operator.run(node, partial(self._keep, node, domain))
        world.after(2.0 + world.delay(5.0), self._mend)

    def _stale(self, domain: Domain) -> Node | None:
        """The node that the store takes for its owner, and that has a copy which was taken over."""
        record = domain.record
        guest = None if record is None else domain.guests.get(NodeName(record.owner))
        if not self._restored or guest is None or not guest.deposed:
            return None
        return self.cluster.nodes[guest.node]

    def _stop_stale(self, domain: Domain) -> bool:
        """Whether there is one. Its writes fail: an operator sees that, and has it stopped."""
        node = self._stale(domain)
        if node is None:
            return False
        self.world.log("{}: stop {}", node.name, domain.name)
        self.operator.run(node, lambda agent: agent.domains.stop(domain.name))
        return True

    async def _keep(self, node: Node, domain: Domain, agent: Agent) -> None:
        self.world.log("{}: is said to run {}", node.name, domain.name)
        await agent.takeover.take_over(domain.name)


def _operates(node: Node) -> bool:
    """Its agent does something to a domain, or goes through them all as it starts."""
    return node.agent is not None and (not node.up or bool(node.agent.locks._purpose))
