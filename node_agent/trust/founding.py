"""`ferry cluster init`: makes the cluster's authority and the first node's certificate.

Files alone: the agent, which waits for them, enters the cluster into the store when it starts.
"""

from __future__ import annotations

import time
from pathlib import Path

from migrator.errors import ConflictError
from migrator.tls import TlsMode
from node_agent.config import AgentConfig, advertised, parse_endpoint
from node_agent.trust import certificates
from node_agent.trust.files import Identity, TrustFolder

HOUR_S = 3600.0


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
