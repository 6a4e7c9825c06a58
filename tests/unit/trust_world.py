"""Clusters with real certificates in one process: what the tests of trust share.

n1 founds the cluster as `ferry cluster init` does, and serves HTTPS; the others join it as
`ferry cluster join` does. Node nN is at 127.0.0.N. What the command line does runs in a thread.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from migrator.model import NodeName, NodeState
from node_agent.api.server import ApiServer, create_app
from node_agent.cli import joining
from node_agent.config import AgentConfig, format_endpoint, parse_config
from node_agent.events import EventLog
from node_agent.nodes import NodeView
from node_agent.peers.connection import Timing
from node_agent.peers.hub import PeerHub
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore
from node_agent.trust.contexts import TlsContexts
from node_agent.trust.files import TrustFolder
from node_agent.trust.founding import found_cluster
from node_agent.trust.join_token import JoinToken, parse_token
from node_agent.trust.members import Membership
from node_agent.trust.records import TOKEN_TTL_S
from node_agent.trust.removal import NodeRemoval
from node_agent.trust.service import Trust
from tests.unit.agent_world import World, open_world
from tests.unit.heartbeats import heartbeat
from tests.unit.peers_world import Text, until

PATIENT = Timing(
    hello_s=30.0,
    ping_every_s=0.05,
    silence_s=30.0,
    linger_s=0.5,
    dial_s=30.0,
    backoff_longest_s=0.1,
)
"""Handshakes cost, and the machine may be busy: here nothing is found out by waiting."""


def node_config(folder: Path, number: int, tls: str = "") -> AgentConfig:
    """The configuration of node nNUMBER; `tls` are further lines of its table."""
    return parse_config(f"""
[node]
name = "n{number}"
state_directory = "{folder / f"n{number}"}"
[api]
listen = "127.0.0.{number}:7780"
[peer]
listen = "127.0.0.{number}:7781"
[store]
path = "{folder / "cluster.sqlite"}"
[tls]
announce = false
{tls}
""")


class Clock:
    """Wall-clock seconds, which a test may move on."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def __call__(self) -> float:
        return time.time() + self.ahead_s


class Member:
    """A node that has certificates: its trust, its hub, and `echo`, which the hub serves."""

    def __init__(self, config: AgentConfig, data: SimulatedData, clock: Clock) -> None:
        self.name = NodeName(config.node.name)
        self.config = config
        self.store = SimulatedStore(data)
        self.typed = TypedStore(self.store)
        self.events = EventLog(self.typed, self.name)
        self.folder = TrustFolder(Path(config.node.state_directory))
        self.identity = self.folder.load(self.name)
        self.contexts = TlsContexts(self.folder.files)
        self.removed = asyncio.Event()
        self.members = Membership(
            self.name, self.typed, static={}, on_removed=self.removed.set, reach_every_s=0.05
        )
        self.members.secured = True
        self.trust = Trust(
            config,
            self.identity,
            self.contexts,
            self.typed,
            self.events,
            members=self.members,
            clock=clock,
        )
        self.hub = PeerHub(
            self.name,
            (config.peer.listen_address[0], 0),
            {},
            "test",
            ssl_contexts=self.contexts.peers,
            admit=self.members.admit,
            timing=PATIENT,
        )
        self.hub.handle("echo", Text, self._echo)

    async def _echo(self, caller: NodeName, params: Text) -> Text:
        return Text(f"{caller} said {params.text}")

    async def open(self) -> None:
        await self.store.open()
        await self.events.open()
        await self.trust.open()
        self.trust.attach(self.hub)
        await self.hub.start()
        self.members.open(self.hub)

    async def close(self) -> None:
        await self.trust.close()
        await self.members.close()
        await self.hub.close()
        await self.events.close()
        await self.store.close()

    @property
    def view(self) -> NodeView:
        """Its heartbeat, with the port that its hub really has."""
        info = heartbeat(
            self.name,
            time.time(),
            api_address=self.config.api.listen,
            peer_address=format_endpoint(*self.hub.address),
            migration_address="127.0.0.1",
        )
        return NodeView(info=info, state=NodeState.READY, heartbeat_age_s=0.0)


class TrustWorld:
    """A cluster of `Member`s, and the HTTPS API of n1."""

    def __init__(self, folder: Path, agents: World, cluster: str, clock: Clock) -> None:
        self.folder = folder
        self.agents = agents
        self.cluster = cluster
        self.clock = clock
        self.data = SimulatedData()
        self.members: dict[str, Member] = {}
        self.api: ApiServer | None = None

    @property
    def one(self) -> Member:
        return self.members["n1"]

    @property
    def server(self) -> str:
        """HOST:PORT of n1's API."""
        assert self.api is not None and self.api.address is not None
        return format_endpoint(*self.api.address)

    async def found(self) -> None:
        config = node_config(self.folder, 1)
        await asyncio.to_thread(found_cluster, config, self.cluster)
        await self.start(config)
        trust = self.one.trust
        removal = NodeRemoval(
            self.one.name,
            self.one.typed,
            nodes=self.agents.a.registry,
            records=self.agents.a.records,
            migrations=self.agents.a.migrations,
            secured=True,
        )
        self.api = ApiServer(
            create_app(self.agents.a.cluster, trust=trust, removal=removal, heartbeat_s=0.05),
            listen=("127.0.0.1", 0),
            socket_path=self.folder / "api.sock",
            ssl_context=trust.contexts.api,
        )
        await self.api.start()

    async def start(self, config: AgentConfig) -> Member:
        member = await asyncio.to_thread(Member, config, self.data, self.clock)
        self.members[member.name] = member
        await member.open()
        self.tell_addresses()
        return member

    def tell_addresses(self) -> None:
        """As the heartbeats do."""
        views = {member.name: member.view for member in self.members.values()}
        for member in self.members.values():
            member.members.saw(views)

    async def token(self, ttl_s: float = TOKEN_TTL_S) -> JoinToken:
        return parse_token((await self.one.trust.make_join_token(ttl_s, "test")).token)

    async def join(self, number: int, token: JoinToken | None = None) -> Member:
        """What `ferry cluster join` does, and the agent's start after it."""
        config = node_config(self.folder, number)
        token = token or await self.token()
        await asyncio.to_thread(joining.join, config, token, self.server)
        joined = await self.start(config)
        everybody = list(self.members.values())
        await until(lambda: all(each.members.admit(joined.name, "") is None for each in everybody))
        return joined

    async def close(self) -> None:
        if self.api is not None:
            await self.api.close()
        for member in self.members.values():
            await member.close()


@asynccontextmanager
async def trust_world(
    folder: Path, *numbers: int, cluster: str = "c1"
) -> AsyncIterator[TrustWorld]:
    """A cluster of n1 and the nodes of these numbers."""
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    async with open_world(folder) as agents:
        world = TrustWorld(folder, agents, cluster, Clock())
        try:
            await world.found()
            for number in numbers:
                await world.join(number)
            yield world
        finally:
            await world.close()
