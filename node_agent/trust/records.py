"""What the state store keeps about trust, and what the API says of it.

    trust/cluster        ClusterRecord: which cluster this store belongs to
    members/NAME         MemberRecord: a node, its certificates, and whether it was removed
    join-tokens/ID       JoinTokenRecord: the public half of a join token
    users/NAME           UserRecord: a user's role
    api-tokens/ID        ApiTokenRecord: the hash of a bearer token, and whose it is
    token-ends/ID        TokenEndTold: what the event log was last told of its end (`token_ends`)

Nothing here is secret: public keys, serial numbers, and hashes of random 256-bit tokens.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from migrator.model import Name, Value

CLUSTER: Final = "trust/cluster"
MEMBERS: Final = "members/"
JOIN_TOKENS: Final = "join-tokens/"
USERS: Final = "users/"
API_TOKENS: Final = "api-tokens/"

TOKEN_TTL_S: Final = 3600.0
TOKEN_TTL_S_MAX: Final = 7 * 86_400.0
TOKEN_ENDS_SOON_S: Final = 14 * 86_400.0
"""Before the end of a user's token: so long it is told ahead, as with certificates."""


class Role(enum.StrEnum):
    """What a caller of the API may do; each role may do what those before it may."""

    VIEWER = "viewer"
    """Look."""
    OPERATOR = "operator"
    """Also run domains, migrate and drain."""
    ADMIN = "admin"
    """Also say who belongs: nodes, users, join tokens."""

    def allows(self, needed: Role) -> bool:
        """Whether a caller with this role may do what needs `needed`."""
        order = list(Role)
        return order.index(self) >= order.index(needed)


class ClusterRecord(Value, frozen=True, kw_only=True):
    """Written by the first authority that starts; never changed."""

    name: str
    fingerprint: str
    """Of the authority's certificate, in hexadecimal."""
    founded_at_s: float


class IssuedCertificate(Value, frozen=True, kw_only=True):
    serial: str
    not_after_s: float


class MemberRecord(Value, frozen=True, kw_only=True):
    """A node that was let in. It stays here when it is removed, so that it stays out."""

    name: str
    peer_address: str
    """host:port as it was at the join; a newer heartbeat says better."""
    api_address: str
    key_fingerprint: str
    authority: bool = False
    """Whether it holds the authority's key, and so can let others in."""
    certificates: tuple[IssuedCertificate, ...] = ()
    """Those that haven't expired."""
    revoked: tuple[IssuedCertificate, ...] = ()
    joined_at_s: float = 0.0
    removed_at_s: float | None = None

    @property
    def active(self) -> bool:
        return self.removed_at_s is None


class JoinTokenRecord(Value, frozen=True, kw_only=True):
    """`used_by` is set by one compare-and-set: a token lets one node in."""

    id: str
    public_key: bytes
    created_by: str
    created_at_s: float
    expires_at_s: float
    used_by: str | None = None
    used_at_s: float | None = None


class UserRecord(Value, frozen=True, kw_only=True):
    name: str
    role: Role
    created_at_s: float


class ApiTokenRecord(Value, frozen=True, kw_only=True):
    """`hash` is SHA-256 of the whole token, whose 256 random bits need no slow hash."""

    id: str
    user: str
    hash: bytes
    label: str
    created_at_s: float
    expires_at_s: float | None = None


class TokenEnd(enum.StrEnum):
    """How far a bearer token is from its end."""

    FAR = ""
    SOON = "ends soon"
    """Two weeks are left, or a third of its life where that is shorter."""
    ENDED = "ended"

    def comes_before(self, other: TokenEnd) -> bool:
        order = list(TokenEnd)
        return order.index(self) < order.index(other)


def is_brief(created_at_s: float, expires_at_s: float | None) -> bool:
    """Made for less than a day: nobody is told of the end of such a token."""
    return expires_at_s is not None and expires_at_s - created_at_s < 86_400.0


def token_end(created_at_s: float, expires_at_s: float | None, now_s: float) -> TokenEnd:
    """By the clock of who asks. Pure."""
    if expires_at_s is None:
        return TokenEnd.FAR
    if now_s >= expires_at_s:
        return TokenEnd.ENDED
    soon_s = min(TOKEN_ENDS_SOON_S, (expires_at_s - created_at_s) / 3)
    return TokenEnd.SOON if expires_at_s - now_s <= soon_s else TokenEnd.FAR


# --- the API ---------------------------------------------------------------------------------


class JoinTokenCreate(Value, frozen=True, kw_only=True):
    """Body of a new join token; may be left out."""

    ttl_s: Annotated[float, msgspec.Meta(ge=1, le=TOKEN_TTL_S_MAX)] = TOKEN_TTL_S


class JoinTokenMade(Value, frozen=True, kw_only=True):
    """The one time that a join token is shown."""

    token: str
    expires_at_s: float


class AuthorityView(Value, frozen=True, kw_only=True):
    """Public: what a node or a client pins."""

    cluster: str
    node: str
    """The node that answered."""
    fingerprint: str
    certificate: str
    """The authority's, in PEM."""


class JoinRequest(Value, frozen=True, kw_only=True):
    """What a node that wants to join sends, after it has pinned the authority."""

    token_id: Annotated[str, msgspec.Meta(max_length=64)]
    node: Name
    peer_address: Annotated[str, msgspec.Meta(max_length=256)]
    api_address: Annotated[str, msgspec.Meta(max_length=256)]
    request: Annotated[str, msgspec.Meta(max_length=16_384)]
    """The signing request, in PEM."""
    proof: bytes
    """The join token's signature over all of this (`join_token.statement`)."""


class JoinAnswer(Value, frozen=True, kw_only=True):
    """All that a new member needs."""

    cluster: str
    certificate: str
    authority: str
    members: dict[str, str]
    """Peer address by name, the new node's own left out."""
    store: dict[str, str | int | float | bool | tuple[str, ...]]
    """The table [store] of the node that was asked."""


class RenewRequest(Value, frozen=True, kw_only=True):
    """From a member, over its own connection."""

    peer_address: str
    api_address: str
    request: str


class Renewed(Value, frozen=True, kw_only=True):
    certificate: str


class Member(Value, frozen=True, kw_only=True):
    """A member, as the API shows it."""

    name: str
    peer_address: str
    authority: bool
    joined_at_s: float
    certificate_expires_at_s: float
    removed_at_s: float | None = None


class ClusterView(Value, frozen=True, kw_only=True):
    name: str
    fingerprint: str
    members: tuple[Member, ...]
    authority_expires_at_s: float | None = None
    """No certificate holds for longer."""


class UserCreate(Value, frozen=True, kw_only=True):
    """Body of a new user."""

    name: Name
    role: Role = Role.VIEWER


class UserChange(Value, frozen=True, kw_only=True):
    """What may be changed of a user; the tokens stay."""

    role: Role


class ApiTokenCreate(Value, frozen=True, kw_only=True):
    """Body of a new bearer token; may be left out."""

    label: Annotated[str, msgspec.Meta(max_length=100)] = ""
    ttl_s: Annotated[float, msgspec.Meta(gt=0, le=3650 * 86_400)] | None = None
    """None: until it is removed."""


class ApiTokenMade(Value, frozen=True, kw_only=True):
    """The one time that a bearer token is shown."""

    id: str
    user: str
    token: str
    expires_at_s: float | None


class ApiTokenView(Value, frozen=True, kw_only=True):
    id: str
    label: str
    created_at_s: float
    expires_at_s: float | None


class User(Value, frozen=True, kw_only=True):
    name: str
    role: Role
    created_at_s: float
    tokens: tuple[ApiTokenView, ...] = ()


class UserList(Value, frozen=True, kw_only=True):
    users: tuple[User, ...]


class WhoAmI(Value, frozen=True, kw_only=True):
    """Whom the API takes the caller for."""

    name: str
    role: Role
    how: str
