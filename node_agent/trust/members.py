"""Who the members are, as this agent knows it: from the store, kept current, asked without waiting.

    members/ (store) ──► Membership ──► admit(): may a peer with this certificate speak to us?
    nodes/ (heartbeats) ──►        └──► PeerHub.set_peers(): who there is, at which address

With TLS a peer must be an active member, and its certificate not revoked. A removal reaches every
agent by the store's watch, within a second; connections that are open then are closed. While the
store is away the last known members stay: nobody new comes in, and nobody is thrown out.

Without TLS (`tls.mode = "plain"`) the peers are those of the configuration and all that ever
wrote a heartbeat.

Each node keeps a connection to its next neighbours by name, so that there are measured round
trips before anybody needs one.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Mapping
from typing import Final

from migrator.errors import ConfigError, FerryError
from migrator.model import NodeName, NodeState
from node_agent.background import Background
from node_agent.config import parse_endpoint
from node_agent.nodes import NodeView
from node_agent.peers.hub import Address, PeerHub
from node_agent.state.typed import TypedStore
from node_agent.trust.records import MEMBERS, MemberRecord

log = logging.getLogger(__name__)

NEIGHBOURS: Final = 16
"""Connections kept to the next so many nodes by name; in a small cluster that is everybody."""
REACH_EVERY_S: Final = 1.0
REACH_S: Final = 2.0


AGAIN: Final = "`ferry cluster token` on a member, then `ferry cluster join TOKEN --again` here"


def was_removed(node: str) -> str:
    """For its own operator. Its agent isn't started again by systemd."""
    return (
        f"this node ({node}) was removed from the cluster; its guests, if it has any, run on. To "
        f"come back: {AGAIN}, and `systemctl start ferry-agent`; to stay away: `systemctl disable "
        "ferry-agent`"
    )


class Membership:
    """See the module. `static`: the peers of the configuration, for plain mode."""

    def __init__(
        self,
        node: NodeName,
        store: TypedStore,
        *,
        static: Mapping[NodeName, Address],
        on_removed: Callable[[], None] = lambda: None,
        reach_every_s: float = REACH_EVERY_S,
    ) -> None:
        self.node = node
        self.members: dict[str, MemberRecord] = {}
        self._store = store
        self.secured = False
        """Whether only members are peers. Set before `open`."""
        self._static = dict(static)
        self._on_removed = on_removed
        self.removed = False
        """Whether this node was, while it was open."""
        self.on_gone: Callable[[NodeName], None] = lambda node: None
        """Hears of each other node that isn't a member any more. Set before `open`."""
        self._reach_every_s = reach_every_s
        self._heard: dict[NodeName, tuple[Address, bool]] = {}
        """The address in each node's heartbeat, and whether the node still speaks."""
        self._hub: PeerHub | None = None
        self._following = Background("members")
        self._reaching = Background("neighbours")

    async def read(self) -> None:
        """Know the members before the first connection. StoreError."""
        if self.secured:
            entries = await self._store.list_prefix(MEMBERS, MemberRecord)
            self.members = {entry.value.name: entry.value for entry in entries}

    def open(self, hub: PeerHub) -> None:
        """Tell `hub` who its peers are, from now on."""
        self._hub = hub
        self._apply()
        if self.secured:
            self._following.start(self._follow())
        self._reaching.start(self._reach())

    async def close(self) -> None:
        """End both tasks."""
        await self._reaching.close()
        await self._following.close()

    def admit(self, node: str, serial: str) -> str | None:
        """Why a peer with a certificate of this serial number isn't served; None if it is."""
        member = self.members.get(node)
        if member is None:
            return f"{node} is not a member of this cluster"
        if not member.active:
            return f"{node} was removed from the cluster"
        if any(each.serial == serial for each in member.revoked):
            return f"this certificate of {node} was revoked"
        return None

    def counts(self, node: str) -> bool:
        """Whether a node of this name is one of the cluster's. Without TLS whoever says so is."""
        member = self.members.get(node)
        return not self.secured or (member is not None and member.active)

    def saw(self, views: Mapping[NodeName, NodeView]) -> None:
        """The heartbeats as they were just read."""
        heard: dict[NodeName, tuple[Address, bool]] = {}
        for name, view in views.items():
            try:
                address = parse_endpoint(view.info.peer_address)
            except ConfigError as error:
                log.warning("node %s: peer_address: %s", name, error)
                continue
            heard[name] = (address, view.state is not NodeState.UNREACHABLE)
        if heard != self._heard:
            self._heard = heard
            self._apply()

    def round_trips_ms(self) -> dict[str, float]:
        """The last round trip to each peer that we are connected to."""
        if self._hub is None:
            return {}
        measured = {name: self._hub.round_trip_ms(name) for name in self.peers()}
        return {name: round(ms, 3) for name, ms in sorted(measured.items()) if ms is not None}

    def peers(self) -> dict[NodeName, Address]:
        """The other nodes, and where each listens; known before the first heartbeat is read."""
        peers: dict[NodeName, Address] = {}
        if self.secured:
            for name, member in self.members.items():
                if member.active:
                    address, _ = self._heard.get(NodeName(name), (None, False))
                    peers[NodeName(name)] = address or parse_endpoint(member.peer_address)
        else:
            peers = {name: address for name, (address, _) in self._heard.items()}
            for name, address in self._static.items():
                if not self._heard.get(name, (None, False))[1]:
                    peers[name] = address
        peers.pop(self.node, None)
        return peers

    def _apply(self) -> None:
        if self._hub is not None:
            self._hub.set_peers(self.peers())

    async def _follow(self) -> None:
        async for change in self._store.follow(MEMBERS, MemberRecord):
            name = change.key.removeprefix(MEMBERS)
            if change.value is None:
                self.members.pop(name, None)
            else:
                self.members[name] = change.value
            if self._hub is not None:
                self._hub.recheck()
            self._apply()
            found = self.members.get(name)
            if name != self.node and (found is None or not found.active):
                self.on_gone(NodeName(name))
            own = self.members.get(self.node)
            if own is not None and not own.active:
                log.critical("this node was removed from the cluster; its agent ends")
                self.removed = True
                self._on_removed()

    async def _reach(self) -> None:
        assert self._hub is not None
        while True:
            await asyncio.sleep(self._reach_every_s)
            wanted = [
                name
                for name in neighbours(self.node, self.peers())
                if self._hub.round_trip_ms(name) is None and self._heard.get(name, (None, True))[1]
            ]
            await asyncio.gather(*(self._reach_one(self._hub, name) for name in wanted))

    async def _reach_one(self, hub: PeerHub, name: NodeName) -> None:
        try:
            await hub.reach(name, timeout_s=REACH_S)
        except FerryError as error:
            log.debug("%s", error)


def neighbours(node: NodeName, peers: Mapping[NodeName, Address]) -> list[NodeName]:
    """The next `NEIGHBOURS` peers after `node` by name, in a ring."""
    ring = sorted(peers)
    after = [name for name in ring if name > node] + [name for name in ring if name < node]
    return after[:NEIGHBOURS]
