"""Signs certificates: for a node that has a join token, and for a member that renews its own.

Only nodes that hold the authority's key have an `Authority`; the others pass requests on to one. A
token is spent by one compare-and-set before anything is signed, and a certificate is in the
member's record before it is handed out: one that the store doesn't know was never issued here.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec
from cryptography import x509

from migrator.errors import (
    ConfigError,
    ConflictError,
    ForbiddenError,
    InvalidRequest,
    UnauthenticatedError,
)
from migrator.model import NodeName
from node_agent.config import parse_endpoint
from node_agent.state.typed import TypedStore, Versioned
from node_agent.trust import certificates, join_token
from node_agent.trust.files import Identity
from node_agent.trust.records import (
    JOIN_TOKENS,
    MEMBERS,
    IssuedCertificate,
    JoinRequest,
    JoinTokenRecord,
    MemberRecord,
    RenewRequest,
)

ATTEMPTS: Final = 5
"""Of a compare-and-set on a member's record, which hardly anybody else writes."""


class Authority:
    """See the module. `life_s`: how long the certificates hold. StoreError: try again."""

    def __init__(
        self,
        identity: Identity,
        store: TypedStore,
        *,
        life_s: float,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if identity.authority_key_pem is None:
            raise ValueError("this node has no authority's key")
        self._authority_pem = identity.authority_pem
        self._key = certificates.load_key(identity.authority_key_pem)
        self._store = store
        self._life_s = life_s
        self._clock = clock

    async def admit(self, join: JoinRequest) -> bytes:
        """The certificate of a new member; its token is spent.

        UnauthenticatedError: no or a wrong token. ForbiddenError: used or expired. ConflictError:
        the name or an address is a member's. InvalidRequest: the signing request. Then nothing
        was changed, unless the message says that the token is spent.
        """
        token = await self._check_token(join)
        request = certificates.load_request(join.request.encode(), join.node)
        entry = await self._store.get(f"{MEMBERS}{join.node}", MemberRecord)
        key = certificates.key_fingerprint(request)
        if entry is not None and entry.value.active and entry.value.key_fingerprint != key:
            raise ConflictError(
                f"there is a member {join.node} already, with another key; if that node is gone, "
                f"remove it first: ferry node rm {join.node}"
            )
        addresses = (join.peer_address, join.api_address)
        await self._check_addresses(join.node, addresses)
        now_s = self._clock()
        spent = msgspec.structs.replace(token.value, used_by=join.node, used_at_s=now_s)
        if await self._store.put_if(token.key, spent, token.revision) is None:
            raise ForbiddenError(f"join token {join.token_id} was used a moment ago")
        pem = await self._sign(request, join.node, addresses)
        record = MemberRecord(
            name=join.node,
            peer_address=join.peer_address,
            api_address=join.api_address,
            key_fingerprint=key,
            joined_at_s=now_s,
        )
        if entry is not None:  # What was revoked stays so; a removal has revoked all there was.
            old = entry.value
            record = msgspec.structs.replace(
                record,
                authority=old.authority and old.active,
                certificates=old.certificates,
                revoked=old.revoked,
            )
        record = with_certificate(record, pem, now_s)
        revision = entry.revision if entry is not None else None
        if await self._store.put_if(f"{MEMBERS}{join.node}", record, revision) is None:
            raise ConflictError(
                f"another node joined as {join.node} at the same moment; token {join.token_id} is "
                "spent"
            )
        return pem

    async def renew(self, caller: NodeName, renewal: RenewRequest) -> bytes:
        """A fresh certificate for a member that asks over its own connection."""
        request = certificates.load_request(renewal.request.encode(), caller)
        addresses = (renewal.peer_address, renewal.api_address)
        await self._check_addresses(caller, addresses)
        pem = await self._sign(request, caller, addresses)
        for _ in range(ATTEMPTS):
            entry = await self._store.get(f"{MEMBERS}{caller}", MemberRecord)
            if entry is None or not entry.value.active:
                raise ForbiddenError(f"{caller} is no member of this cluster")
            if entry.value.key_fingerprint != certificates.key_fingerprint(request):
                raise ForbiddenError(f"{caller} joined with another key; it must join again")
            record = with_certificate(entry.value, pem, self._clock())
            record = msgspec.structs.replace(
                record, peer_address=renewal.peer_address, api_address=renewal.api_address
            )
            if await self._store.put_if(entry.key, record, entry.revision) is not None:
                return pem
        raise ConflictError(f"the record of member {caller} keeps changing; try again")

    async def _check_token(self, join: JoinRequest) -> Versioned[JoinTokenRecord]:
        entry = await self._store.get(f"{JOIN_TOKENS}{join.token_id}", JoinTokenRecord)
        wrong = "the join token is wrong: this cluster has given out none like it, or removed it"
        if entry is None:
            raise UnauthenticatedError(wrong)
        token = entry.value
        signed = join_token.statement(
            join.token_id,
            join.node,
            join.peer_address,
            join.api_address,
            certificates.request_der(certificates.load_request(join.request.encode(), join.node)),
        )
        if not join_token.is_proof(token.public_key, join.proof, signed):
            raise UnauthenticatedError(wrong)
        if token.used_by is not None:
            raise ForbiddenError(
                f"join token {token.id} was used already, by {token.used_by}; a token lets one "
                "node in: make another with `ferry cluster token`"
            )
        now_s = self._clock()
        if now_s >= token.expires_at_s:
            raise ForbiddenError(
                f"join token {token.id} has expired: it held until "
                f"{certificates.moment(token.expires_at_s)}, and the clock of the node that signs "
                f"says {certificates.moment(now_s)}; make another with `ferry cluster token`"
            )
        return entry

    async def _check_addresses(self, node: str, addresses: Sequence[str]) -> None:
        """A certificate names IP addresses: nobody gets one that names another member's."""
        hosts = set(_hosts(addresses))
        for entry in await self._store.list_prefix(MEMBERS, MemberRecord):
            other = entry.value
            if other.active and other.name != node:
                taken = hosts & set(_hosts((other.peer_address, other.api_address)))
                if taken:
                    raise ConflictError(f"{taken.pop()} is the address of member {other.name}")

    async def _sign(
        self, request: x509.CertificateSigningRequest, node: str, addresses: Sequence[str]
    ) -> bytes:
        return await asyncio.to_thread(
            certificates.sign_request,
            request,
            node,
            _hosts(addresses),
            authority_pem=self._authority_pem,
            authority_key=self._key,
            now_s=self._clock(),
            life_s=self._life_s,
        )


def _hosts(addresses: Sequence[str]) -> list[str]:
    """InvalidRequest names the address that is none."""
    try:
        return [parse_endpoint(address)[0] for address in addresses]
    except ConfigError as error:
        raise InvalidRequest(str(error), {"peer_address": "HOST:PORT"}) from error


def with_certificate(record: MemberRecord, pem: bytes, now_s: float) -> MemberRecord:
    """The record with one more certificate, and without those that have expired."""
    read = certificates.read_certificate(pem)
    issued = IssuedCertificate(serial=read.serial, not_after_s=read.not_after_s)
    kept = [each for each in record.certificates if each.serial != issued.serial]
    return msgspec.structs.replace(
        record,
        certificates=tuple(each for each in (*kept, issued) if each.not_after_s > now_s),
        revoked=tuple(each for each in record.revoked if each.not_after_s > now_s),
    )
