"""This node's part in the cluster's trust: what the agent puts together and the API calls.

TrustFolder ──► Identity ──► TlsContexts ──► PeerHub, HTTPS, engines
store ──► Membership (who may speak), Users (who may ask), Authority (only where its key is)
"""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Final, TypeVar

import msgspec

from migrator.errors import (
    ConfigError,
    ConflictError,
    FerryError,
    PeerError,
    RemovedError,
    UnauthenticatedError,
)
from migrator.model import NodeName
from migrator.own_threads import STATE_DIRECTORY, in_own_thread
from node_agent.config import AgentConfig, advertised, parse_endpoint
from node_agent.events import EventKind, EventLog
from node_agent.peers.hub import PeerHub
from node_agent.peers.refusals import RefusalLog
from node_agent.state.typed import TypedStore
from node_agent.trust import certificates, join_token
from node_agent.trust.authority import Authority, with_certificate
from node_agent.trust.contexts import TlsContexts
from node_agent.trust.discovery import Announcer
from node_agent.trust.files import Identity, TrustFolder
from node_agent.trust.members import AGAIN, Membership, was_removed
from node_agent.trust.records import (
    CLUSTER,
    JOIN_TOKENS,
    MEMBERS,
    TOKEN_TTL_S_MAX,
    AuthorityView,
    ClusterRecord,
    ClusterView,
    JoinAnswer,
    JoinRequest,
    JoinTokenMade,
    JoinTokenRecord,
    Member,
    MemberRecord,
    Renewed,
    RenewRequest,
)
from node_agent.trust.renewal import Renewer
from node_agent.trust.token_ends import TokenWatch
from node_agent.trust.users import Users

log = logging.getLogger(__name__)

JOIN: Final = "trust.join"
RENEW: Final = "trust.renew"
SIGN_TIMEOUT_S: Final = 10.0
HOURS_S: Final = 3600.0
R = TypeVar("R")


class Trust:
    """The trust of a node that is a member. `open` it before anything listens."""

    def __init__(
        self,
        config: AgentConfig,
        identity: Identity,
        contexts: TlsContexts,
        store: TypedStore,
        events: EventLog,
        *,
        members: Membership,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self.node = NodeName(config.node.name)
        self.folder = TrustFolder(Path(config.node.state_directory))
        self.identity = identity
        self.authority_span = certificates.read_authority(identity.authority_pem)
        self.contexts = contexts
        self.members = members
        self.users = Users(store, clock=clock)
        self._token_watch = TokenWatch(store, events, clock=clock)
        self.peer_address, self.api_address = advertised(config)
        self._store_table = msgspec.to_builtins(config.store)
        self._announce = config.tls.announce
        self._listen = config.api.listen_address
        self._store = store
        self._events = events
        self._clock = clock
        self._refusals = RefusalLog(log, self.node)
        self._refusals.on_refusal = lambda who, why: events.emit(
            EventKind.JOIN_REFUSED, f"{self.node} refused {who}: {why}"
        )
        self._hub: PeerHub | None = None
        self._announcer: Announcer | None = None
        self._authority: Authority | None = None
        if identity.authority_key_pem is not None:
            life_s = config.tls.certificate_hours * HOURS_S
            self._authority = Authority(identity, store, life_s=life_s, clock=clock)
        self._renewer = Renewer(
            self.node,
            identity.certificate,
            folder=self.folder,
            contexts=contexts,
            request=self._renewed_certificate,
            addresses=certificates.ip_addresses(
                [parse_endpoint(each)[0] for each in (self.peer_address, self.api_address)]
            ),
            authority=self.authority_span,
            renewed=self._note_renewal,
            failing=self._note_failing,
            clock=clock,
        )

    async def open(self) -> None:
        """Check that the store is this cluster's, and this node a member. ConfigError if not."""
        for whose, span in (
            ("this node's certificate", self.identity.certificate),
            ("the cluster's authority", self.authority_span),
        ):
            wrong = certificates.why_not_now(span, self._clock())
            if wrong:
                log.error("%s isn't accepted by its peers: %s", whose, wrong)
        await self._check_cluster()
        await self._check_member()
        await self.members.read()

    def attach(self, hub: PeerHub) -> None:
        """Serve joins and renewals that other nodes pass on; before the hub starts."""
        self._hub = hub
        hub.refusals.on_refusal = lambda who, why: self._events.emit(
            EventKind.PEER_REFUSED, f"{self.node} refused {who}: {why}"
        )
        hub.handle(JOIN, JoinRequest, self._sign_join)
        hub.handle(RENEW, RenewRequest, self._sign_renewal)

    async def start(self) -> None:
        """Announce this node and watch its certificate's age, and the users' tokens'; once the API
        listens."""
        self._renewer.open()
        self._token_watch.open()
        if not self._announce:
            return
        announcer = Announcer(self.node, self.identity.fingerprint, *self._listen)
        try:
            await announcer.open()
            self._announcer = announcer
        except PeerError as error:
            log.warning("not announced by zeroconf: %s; joining needs --address", error)

    async def close(self) -> None:
        """End all of that."""
        await self._token_watch.close()
        await self._renewer.close()
        if self._announcer is not None:
            await self._announcer.close()

    # --- what the API calls ------------------------------------------------------------------

    def authority_view(self) -> AuthorityView:
        """Public."""
        return AuthorityView(
            cluster=self.identity.cluster,
            node=self.node,
            fingerprint=self.identity.fingerprint,
            certificate=self.identity.authority_pem.decode(),
        )

    def cluster_view(self) -> ClusterView:
        """The members, removed ones too, by name."""
        members = [
            Member(
                name=each.name,
                peer_address=each.peer_address,
                authority=each.authority,
                joined_at_s=each.joined_at_s,
                certificate_expires_at_s=(  # The last is in use; one of a wrong clock's ends later.
                    each.certificates[-1].not_after_s if each.certificates else 0.0
                ),
                removed_at_s=each.removed_at_s,
            )
            for _, each in sorted(self.members.members.items())
        ]
        return ClusterView(
            name=self.identity.cluster,
            fingerprint=self.identity.fingerprint,
            authority_expires_at_s=self.authority_span.not_after_s,
            members=tuple(members),
        )

    async def make_join_token(self, ttl_s: float, created_by: str) -> JoinTokenMade:
        """A new join token; those that expired long ago are tidied away."""
        token = join_token.make_token(certificates.fingerprint(self.identity.authority_pem))
        now_s = self._clock()
        record = JoinTokenRecord(
            id=token.id,
            public_key=token.public_key,
            created_by=created_by,
            created_at_s=now_s,
            expires_at_s=now_s + ttl_s,
        )
        if await self._store.put_if(f"{JOIN_TOKENS}{token.id}", record, None) is None:
            raise ConflictError("two join tokens have one id; try again")
        for entry in await self._store.list_prefix(JOIN_TOKENS, JoinTokenRecord):
            if entry.value.expires_at_s + TOKEN_TTL_S_MAX < now_s:
                await self._store.delete_if(entry.key, entry.revision)
        self._events.emit(
            EventKind.JOIN_TOKEN_MADE, f"{created_by} made join token {token.id} on {self.node}"
        )
        return JoinTokenMade(token=join_token.format_token(token), expires_at_s=record.expires_at_s)

    async def join(self, request: JoinRequest, origin: str) -> JoinAnswer:
        """Let a node in, here or at a node that signs. Errors as `Authority.admit`."""
        try:
            signed = await self._at_authority(JOIN, request, Renewed, self._sign_join)
        except UnauthenticatedError as error:  # Anybody may say any name: it counts for nothing.
            self._refusals.note(origin, f"it may not join: {error}")
            raise
        except FerryError as error:
            self._refusals.note(origin, f"{request.node} may not join: {error}")
            raise
        self._events.emit(
            EventKind.NODE_JOINED,
            f"{request.node} at {request.peer_address} joined with token {request.token_id}",
        )
        members = {
            each.name: each.peer_address
            for each in self.members.members.values()
            if each.active and each.name != request.node
        }
        return JoinAnswer(
            cluster=self.identity.cluster,
            certificate=signed.certificate,
            authority=self.identity.authority_pem.decode(),
            members=members,
            store=self._store_table,
        )

    @property
    def certificate(self) -> certificates.NodeCertificate:
        """This node's, as it is used now."""
        return self._renewer.certificate

    async def renew(self) -> certificates.NodeCertificate:
        """Renew this node's certificate now. FerryError: the old one stays in use."""
        return await self._renewer.renew()

    # --- inside ------------------------------------------------------------------------------

    async def _sign_join(self, _: NodeName, request: JoinRequest) -> Renewed:
        pem = await self._own_authority().admit(request)
        return Renewed(certificate=pem.decode())

    async def _sign_renewal(self, caller: NodeName, request: RenewRequest) -> Renewed:
        pem = await self._own_authority().renew(caller, request)
        return Renewed(certificate=pem.decode())

    async def _renewed_certificate(self, request: bytes) -> bytes:
        renewal = RenewRequest(
            peer_address=self.peer_address,
            api_address=self.api_address,
            request=request.decode(),
        )
        answer = await self._at_authority(RENEW, renewal, Renewed, self._sign_renewal)
        return answer.certificate.encode()

    def _note_renewal(self, certificate: certificates.NodeCertificate) -> None:
        text = f"{self.node} has a certificate until {certificates.moment(certificate.not_after_s)}"
        ends_s = self.authority_span.not_after_s
        if ends_s - self._clock() < certificates.AUTHORITY_ENDS_SOON_S:
            text += (
                f"; the cluster's authority itself holds until {certificates.moment(ends_s)}, and "
                "nothing after that: plan a new one (docs/cluster.md, Certificates)"
            )
        self._events.emit(EventKind.CERTIFICATE_RENEWED, text)

    def _note_failing(self, certificate: certificates.NodeCertificate, why: str) -> None:
        left_s = certificate.not_after_s - self._clock()
        until = certificates.moment(certificate.not_after_s)
        text = f"the certificate of {self.node} can't be renewed: {why}; it "
        if left_s > 0:
            text += f"holds until {until}, and after that nobody can connect to it anew"
        else:
            text += f"held until {until}: nobody can connect to {self.node} anew"
        self._events.emit(
            EventKind.CERTIFICATE_NOT_RENEWED, text, node=self.node, left_s=round(left_s)
        )

    def _own_authority(self) -> Authority:
        if self._authority is None:
            raise ConflictError(f"{self.node} doesn't hold the authority's key")
        return self._authority

    async def _at_authority(
        self,
        method: str,
        params: object,
        kind: type[R],
        own: Callable[[NodeName, Any], Awaitable[R]],
    ) -> R:
        """Here if this node signs, else at the first that answers. PeerError: none does."""
        if self._authority is not None:
            return await own(self.node, params)
        signers = [
            NodeName(each.name)
            for each in self.members.members.values()
            if each.authority and each.active
        ]
        failures: list[str] = []
        for signer in sorted(signers):
            assert self._hub is not None
            try:
                return await self._hub.call(signer, method, params, kind, timeout_s=SIGN_TIMEOUT_S)
            except PeerError as error:
                failures.append(str(error))
        raise PeerError(
            "no node that holds the authority's key can be reached: "
            + ("; ".join(failures) or "the store names none")
        )

    async def _check_cluster(self) -> None:
        entry = await self._store.get(CLUSTER, ClusterRecord)
        if entry is None and self._authority is not None:
            record = ClusterRecord(
                name=self.identity.cluster,
                fingerprint=self.identity.fingerprint,
                founded_at_s=self._clock(),
            )
            await self._store.put_if(CLUSTER, record, None)
            entry = await self._store.get(CLUSTER, ClusterRecord)
        if entry is None:
            raise ConfigError(
                "store: it holds no cluster yet, and this node didn't found one; is it the store "
                "that the other members use?"
            )
        if entry.value.fingerprint != self.identity.fingerprint:
            raise ConfigError(
                f"store: it belongs to another cluster ({entry.value.name}, fingerprint "
                f"{entry.value.fingerprint[:16]}...), this node's certificate to "
                f"{self.identity.cluster} ({self.identity.fingerprint[:16]}...); if the "
                f"cluster has a new authority: {AGAIN}"
            )

    async def _check_member(self) -> None:
        """An authority vouches for itself; everybody else was entered when it joined."""
        key = f"{MEMBERS}{self.node}"
        entry = await self._store.get(key, MemberRecord)
        if entry is not None and not entry.value.active:
            raise RemovedError(was_removed(self.node))
        signs = self._authority is not None
        if entry is None:
            if not signs:
                raise ConfigError(
                    f"store: it doesn't know a member {self.node}; is it the store that the other "
                    "members use? If it was restored from a copy of before this node joined: "
                    f"{AGAIN}"
                )
            record = MemberRecord(
                name=self.node,
                peer_address=self.peer_address,
                api_address=self.api_address,
                key_fingerprint=await in_own_thread(STATE_DIRECTORY, self._key_fingerprint),
                authority=True,
                joined_at_s=self._clock(),
            )
            record = with_certificate(record, self.identity.certificate_pem, self._clock())
            await self._store.put_if(key, record, None)
        elif entry.value.authority != signs:
            changed = msgspec.structs.replace(entry.value, authority=signs)
            await self._store.put_if(key, changed, entry.revision)

    def _key_fingerprint(self) -> str:
        pem = certificates.make_request(self.node, self.folder.own_key())
        return certificates.key_fingerprint(certificates.load_request(pem, self.node))
