"""How an agent comes by its trust at its start: it waits until it is a member, then checks."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from pathlib import Path
from typing import Final

from migrator.errors import ConfigError
from migrator.tls import TlsMode, files_of_node
from node_agent.config import AgentConfig
from node_agent.events import EventLog
from node_agent.state.typed import TypedStore
from node_agent.trust.contexts import TlsContexts
from node_agent.trust.files import TrustFolder
from node_agent.trust.members import Membership
from node_agent.trust.records import CLUSTER, ClusterRecord
from node_agent.trust.service import Trust

log = logging.getLogger(__name__)

LOOK_EVERY_S: Final = 0.25
REMIND_S: Final = 3600.0


async def wait_for_membership(config: AgentConfig, stop: asyncio.Event) -> bool:
    """Until this node has a certificate, if it needs one; False: it was stopped meanwhile.

    Nothing listens meanwhile. The guests of a node that was removed run on.
    """
    if config.tls.mode is not TlsMode.REQUIRED:
        return True
    folder = TrustFolder(Path(config.node.state_directory))
    waited_s = 0.0
    while not await asyncio.to_thread(folder.is_member):
        if waited_s % REMIND_S == 0:
            log.warning(
                "node %s belongs to no cluster yet and serves nobody: run `ferry cluster init` "
                "here for a new cluster, or `ferry cluster join TOKEN`; waiting",
                config.node.name,
            )
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(LOOK_EVERY_S):
                await stop.wait()
        if stop.is_set():
            return False
        waited_s += LOOK_EVERY_S
    return True


async def open_trust(
    config: AgentConfig, store: TypedStore, events: EventLog, members: Membership
) -> Trust | None:
    """None in plain mode. ConfigError: this node's certificates or its store don't fit."""
    folder = TrustFolder(Path(config.node.state_directory))
    files = await asyncio.to_thread(files_of_node, folder.path.parent, config.tls.mode)
    if files is None and (founded := await store.get(CLUSTER, ClusterRecord)) is not None:
        raise ConfigError(
            f"store: it belongs to the cluster {founded.value.name}, whose nodes have "
            f'certificates, and this node has none (tls.mode is "{config.tls.mode}"): join that '
            "cluster (`ferry cluster join`), or use another store.prefix or store.path; to go "
            f"without TLS for good stop every agent and delete the key {CLUSTER} from the store"
        )
    if files is None:
        log.warning(
            'tls.mode is "%s": no TLS and no authentication; whoever reaches %s or %s may do '
            "everything",
            config.tls.mode,
            config.api.listen,
            config.peer.listen,
        )
        return None
    identity = await asyncio.to_thread(folder.load, config.node.name)
    contexts = await asyncio.to_thread(TlsContexts, folder.files)
    trust = Trust(config, identity, contexts, store, events, members=members)
    members.secured = True
    await trust.open()
    return trust
