"""`ferry cluster init`: makes the cluster's authority and the first node's certificate.

Files alone: the agent, which waits for them, enters the cluster into the store when it starts.

`ferry cluster init --replace`: a new authority for a cluster whose old one ends, or was stolen.
Users, domains, pools and all else that is in the store stay; the members join anew, one by one.
"""

from __future__ import annotations

import asyncio
import shutil
import time
from pathlib import Path

from migrator.errors import ConfigError, ConflictError, words
from migrator.tls import TlsMode
from node_agent.config import AgentConfig, advertised, parse_endpoint
from node_agent.state.typed import TypedStore
from node_agent.trust import certificates
from node_agent.trust.files import Identity, TrustFolder
from node_agent.trust.records import (
    CLUSTER,
    JOIN_TOKENS,
    MEMBERS,
    ClusterRecord,
    JoinTokenRecord,
    MemberRecord,
)

HOUR_S = 3600.0
DEFAULT_CLUSTER = "ferry"


def check_secured(config: AgentConfig) -> None:
    """ConflictError in plain mode."""
    if config.tls.mode is TlsMode.PLAIN:
        raise ConflictError(
            'tls.mode is "plain" in the configuration: set it to "required" on every node first'
        )


def found_cluster(config: AgentConfig, cluster: str) -> Identity:
    """Make everything. ConflictError: the node belongs to a cluster; ConfigError: can't write.

    Blocks. A failure in between may leave a key, which the next try asks to move away.
    """
    check_secured(config)
    folder = TrustFolder(Path(config.node.state_directory))
    if folder.is_member():
        known = folder.load(config.node.name)
        raise ConflictError(
            f"node {config.node.name} belongs to the cluster {known.cluster} already "
            f"({folder.path})"
        )
    if folder.authority_key_path.exists():
        raise ConflictError(
            f"{folder.authority_key_path} is there already, from a cluster that was given up: "
            "move it away first if nobody needs it"
        )
    now_s = time.time()
    authority_key = certificates.make_key()
    authority = certificates.make_authority(cluster, authority_key, now_s)
    key = folder.own_key()
    request = certificates.make_request(config.node.name, key)
    certificate = certificates.sign_request(
        certificates.load_request(request, config.node.name),
        config.node.name,
        [parse_endpoint(address)[0] for address in advertised(config)],
        authority_pem=authority,
        authority_key=authority_key,
        now_s=now_s,
        life_s=config.tls.certificate_hours * HOUR_S,
    )
    folder.write(folder.authority_key_path.name, certificates.key_pem(authority_key))
    folder.write_membership(cluster=cluster, authority_pem=authority, certificate=certificate)
    return folder.load(config.node.name)


async def replace_cluster(
    config: AgentConfig, cluster: str | None, store: TypedStore
) -> tuple[Identity, Path | None]:
    """A new authority in the place of the store's. Who is first member, and the old files' folder.

    `cluster` None: it keeps its name, by the store, or by this node's files. ConflictError: the
    store was written meanwhile; StoreError, ConfigError. Then this node's files are as they were,
    unless the store failed last: another try ends what was begun. Agents that run go on with what
    they have, and see no peer any more.
    """
    check_secured(config)
    entry = await store.get(CLUSTER, ClusterRecord)
    members = await store.list_prefix(MEMBERS, MemberRecord)
    tokens = await store.list_prefix(JOIN_TOKENS, JoinTokenRecord)
    name = cluster or (entry.value.name if entry is not None else "")
    identity, kept = await asyncio.to_thread(_found_anew, config, name)
    name = identity.cluster
    record = ClusterRecord(name=name, fingerprint=identity.fingerprint, founded_at_s=time.time())
    # First, so that no agent of the old authority can enter its cluster again.
    if await store.put_if(CLUSTER, record, None if entry is None else entry.revision) is None:
        raise ConflictError("the store's cluster was changed at the same moment; try again")
    for member in members:
        await store.delete_if(member.key, member.revision)
    for token in tokens:
        await store.delete_if(token.key, token.revision)
    return identity, kept


def _found_anew(config: AgentConfig, cluster: str) -> tuple[Identity, Path | None]:
    """`cluster` "": as this node's files have it."""
    folder = TrustFolder(Path(config.node.state_directory)).path
    kept = folder.with_name(f"{folder.name}.{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}")
    if not cluster:
        try:
            cluster = TrustFolder(folder.parent).load(config.node.name).cluster
        except ConfigError:
            cluster = DEFAULT_CLUSTER
    try:
        if not folder.exists():
            return found_cluster(config, cluster), None
        folder.rename(kept)
    except OSError as error:
        raise ConfigError(f"{folder} can't be moved away: {words(error)}") from error
    try:
        return found_cluster(config, cluster), kept
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        kept.rename(folder)
        raise
