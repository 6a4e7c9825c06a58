"""What `ferry cluster join` does: find a member, pin its authority, prove the token.

find()      zeroconf, or the address that was given     believed in nothing
pin()       GET /v1/cluster/authority, unverified       its fingerprint must be the token's
join()      POST /v1/cluster/join, verified by it       a signature, a public key: no secret
"""

from __future__ import annotations

import asyncio
import socket
import ssl
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Final

from migrator.errors import ConfigError, ConflictError, FerryError, InvalidRequest, words
from node_agent.cli.client import CONNECT_TIMEOUT_S, Access, ApiClient, pinned_context
from node_agent.cli.errors import CliError, ExitCode, Unreachable
from node_agent.cli.output import note
from node_agent.config import AgentConfig, advertised, format_endpoint, parse_endpoint
from node_agent.trust import certificates, join_token
from node_agent.trust.discovery import find
from node_agent.trust.files import TrustFolder
from node_agent.trust.founding import check_secured
from node_agent.trust.join_token import JoinToken
from node_agent.trust.records import AuthorityView, JoinAnswer, JoinRequest

JOIN_TIMEOUT_S: Final = 30.0
FIND_S: Final = 10.0
SHOWN_OTHERS: Final = 4


def pin(address: str, fingerprint: bytes) -> str:
    """The authority's certificate (PEM) from an agent that isn't trusted yet.

    CliError (refused): it has another fingerprint. Nothing secret was sent, in either case.
    """
    unverified = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    unverified.check_hostname = False
    unverified.verify_mode = ssl.CERT_NONE
    client = ApiClient(f"https://{address}", Access(tls=unverified))
    view = client.get("/v1/cluster/authority", AuthorityView)
    try:
        found = certificates.fingerprint(view.certificate.encode())
    except InvalidRequest as error:
        raise CliError(f"{address} answered with no authority: {error}") from error
    if found != fingerprint:
        raise CliError(
            f"{address} is of another cluster: its authority's fingerprint is {found.hex()}, "
            f"expected was {fingerprint.hex()}; nothing was sent to it",
            ExitCode.REFUSED,
        )
    return view.certificate


def find_members(token: JoinToken, address: str | None, interfaces: Sequence[str]) -> list[str]:
    """HOST:PORT of agents that may be asked. CliError: none."""
    if address is not None:
        try:
            parse_endpoint(address)
        except ConfigError as error:
            raise CliError(f"--address: {error}", ExitCode.USAGE) from error
        return [address]
    try:
        others = set[str]()
        found = asyncio.run(
            find(token.fingerprint.hex(), timeout_s=FIND_S, interfaces=interfaces, others=others)
        )
    except FerryError as error:
        raise CliError(f"{error}; give --address HOST:PORT of a member's API") from error
    if not found:
        none = f"no member of the token's cluster was found within {FIND_S:g} s"
        address_helps = "else give --address HOST:PORT of a member's API"
        if others:
            names = ", ".join(sorted(others)[:SHOWN_OTHERS])
            raise Unreachable(
                f"{none}, but nodes of other clusters ({names}): the token is of a cluster whose "
                f"fingerprint begins with {token.fingerprint.hex()[:8]}; is it the one that is "
                f"meant? {address_helps}"
            )
        raise Unreachable(
            f"{none}: is the token whole, and does multicast reach here? {address_helps}"
        )
    return [format_endpoint(each.host, each.port) for each in found]


def own_host(address: str) -> str:
    """This host's address on the way to a member. Unreachable if there is no way."""
    host, port = parse_endpoint(address)
    try:
        with closing(socket.create_connection((host, port), CONNECT_TIMEOUT_S)) as connection:
            return str(connection.getsockname()[0])
    except OSError as error:
        raise Unreachable(f"{address} can't be reached: {words(error)}") from error


def join(config: AgentConfig, token: JoinToken, address: str) -> JoinAnswer:
    """Join through the agent at `address` and write the certificates.

    CliError: refused, or unreachable; then nothing was written but a key, which is used again.
    """
    check_secured(config)
    node = config.node.name
    folder = TrustFolder(Path(config.node.state_directory))
    authority = pin(address, token.fingerprint)
    key = folder.own_key()
    request = certificates.make_request(node, key)
    peer_address, api_address = advertised(config)
    statement = join_token.statement(
        token.id,
        node,
        peer_address,
        api_address,
        certificates.request_der(certificates.load_request(request, node)),
    )
    # Any member may be asked: what it gets, it can only pass on. So the chain is checked, not the
    # name, which an address found by zeroconf has none of.
    context = pinned_context(authority)
    context.check_hostname = False
    answer = ApiClient(f"https://{address}", Access(tls=context)).post(
        "/v1/cluster/join",
        JoinAnswer,
        JoinRequest(
            token_id=token.id,
            node=node,
            peer_address=peer_address,
            api_address=api_address,
            request=request.decode(),
            proof=token.prove(statement),
        ),
        timeout_s=JOIN_TIMEOUT_S,
    )
    certificate = answer.certificate.encode()
    read = certificates.read_certificate(certificate)
    if read.node != node or not certificates.belongs_to(certificate, key):
        raise CliError(f"{address} answered with a certificate that isn't of this node and its key")
    if not certificates.signed_by(certificate, authority.encode()):
        raise CliError(f"{address} answered with a certificate of another authority")
    folder.write_membership(
        cluster=answer.cluster, authority_pem=authority.encode(), certificate=certificate
    )
    return answer


def join_any(config: AgentConfig, token: JoinToken, addresses: Sequence[str]) -> JoinAnswer:
    """At the first of `addresses` that can be reached."""
    for address in addresses[:-1]:
        try:
            return join(config, token, address)
        except Unreachable as error:
            note(f"{error}; asking the next")
    return join(config, token, addresses[-1])


def check_free(config: AgentConfig, again: bool) -> None:
    """ConflictError if the node has a certificate, unless it is to join `again`."""
    folder = TrustFolder(Path(config.node.state_directory))
    if folder.is_member() and not again:
        raise ConflictError(
            f"node {config.node.name} has a certificate already ({folder.path}); to replace it: "
            "--again, then restart the agent"
        )
