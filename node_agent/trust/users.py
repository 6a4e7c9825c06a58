"""The users of the API: names with a role, and their bearer tokens, of which only hashes are kept.

    ferryapi-ID-SECRET    ID finds the record; SHA-256 of the whole must equal the record's hash

A token is 256 random bits, so a fast hash is enough: there is nothing to guess. Every request reads
the store: a token or user that was removed is refused from the next request on.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Final

import msgspec

from migrator.errors import ConflictError, NotFoundError, UnauthenticatedError
from migrator.ports import Struct
from node_agent.state.typed import TypedStore, Versioned
from node_agent.trust.certificates import moment
from node_agent.trust.records import (
    API_TOKENS,
    USERS,
    ApiTokenCreate,
    ApiTokenMade,
    ApiTokenRecord,
    ApiTokenView,
    Role,
    User,
    UserCreate,
    UserRecord,
)

PREFIX: Final = "ferryapi-"
ATTEMPTS: Final = 5
"""Of a compare-and-set on a user's record, which hardly anybody else writes."""
TOKENS_MAX: Final = 20
"""Of one user."""
_TOKEN: Final = re.compile(rf"{PREFIX}([0-9a-f]{{16}})-[0-9a-f]{{64}}")


class Caller(Struct, frozen=True, kw_only=True):
    """Who asks the API."""

    name: str
    role: Role
    how: str


LOCAL: Final = Caller(name="root", role=Role.ADMIN, how="this node's unix socket")


class Users:
    """See the module. Errors: NotFoundError, ConflictError, UnauthenticatedError, StoreError."""

    def __init__(self, store: TypedStore, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock

    async def create(self, body: UserCreate) -> User:
        """A user without tokens. ConflictError if there is one, who keeps what he has."""
        # Of a namesake whose removal broke off. Found before it is seen that there is no user: so
        # they aren't those of one that is added at the same moment.
        left_over = await self._tokens(body.name)
        if await self._store.get(f"{USERS}{body.name}", UserRecord) is not None:
            raise ConflictError(f"there is a user {body.name} already")
        for entry in left_over:
            await self._store.delete_if(entry.key, entry.revision)
        record = UserRecord(name=body.name, role=body.role, created_at_s=self._clock())
        if await self._store.put_if(f"{USERS}{body.name}", record, None) is None:
            raise ConflictError(f"there is a user {body.name} already")
        return _view(record, ())

    async def list_users(self) -> Sequence[User]:
        """By name."""
        tokens = await self._store.list_prefix(API_TOKENS, ApiTokenRecord)
        return [
            _view(
                entry.value, [each.value for each in tokens if each.value.user == entry.value.name]
            )
            for entry in await self._store.list_prefix(USERS, UserRecord)
        ]

    async def get(self, name: str) -> User:
        """NotFoundError if there is none."""
        entry = await self._user(name)
        return _view(entry.value, [each.value for each in await self._tokens(name)])

    async def set_role(self, name: str, role: Role) -> tuple[Role, User]:
        """Change what a user may, from the next request on. The role before, and the user now."""
        for _ in range(ATTEMPTS):
            entry = await self._user(name)
            before = entry.value.role
            if before is not role:
                changed = msgspec.structs.replace(entry.value, role=role)
                if await self._store.put_if(entry.key, changed, entry.revision) is None:
                    continue
            return before, await self.get(name)
        raise ConflictError(f"user {name} keeps being changed; the role was left as it was")

    async def remove(self, name: str) -> None:
        """The user and all its tokens."""
        entry = await self._user(name)
        if not await self._store.delete_if(entry.key, entry.revision):
            raise ConflictError(f"user {name} was changed at the same moment; nothing was removed")
        await self._remove_tokens(name)

    async def issue(self, name: str, body: ApiTokenCreate) -> ApiTokenMade:
        """A new token of a user: the one time that it is seen."""
        await self._user(name)
        if len(await self._tokens(name)) >= TOKENS_MAX:
            raise ConflictError(f"user {name} has {TOKENS_MAX} tokens; remove one first")
        token_id, now_s = secrets.token_hex(8), self._clock()
        token = f"{PREFIX}{token_id}-{secrets.token_hex(32)}"
        record = ApiTokenRecord(
            id=token_id,
            user=name,
            hash=_hash(token),
            label=body.label,
            created_at_s=now_s,
            expires_at_s=None if body.ttl_s is None else now_s + body.ttl_s,
        )
        if await self._store.put_if(f"{API_TOKENS}{token_id}", record, None) is None:
            raise ConflictError("two tokens have one id; try again")
        return ApiTokenMade(id=token_id, user=name, token=token, expires_at_s=record.expires_at_s)

    async def revoke(self, name: str, token_id: str) -> None:
        """Remove one token of a user."""
        for entry in await self._tokens(name):
            if entry.value.id == token_id:
                await self._store.delete_if(entry.key, entry.revision)
                return
        raise NotFoundError(f"user {name} has no token {token_id}")

    async def authenticate(self, token: str) -> Caller:
        """Whose token this is. UnauthenticatedError says no more than that it isn't valid."""
        matched = _TOKEN.fullmatch(token)
        if matched is None:
            raise UnauthenticatedError("this is not a token of Ferry's API")
        entry = await self._store.get(f"{API_TOKENS}{matched[1]}", ApiTokenRecord)
        if entry is None or not hmac.compare_digest(entry.value.hash, _hash(token)):
            raise UnauthenticatedError("the token is wrong, or was removed")
        record = entry.value
        now_s = self._clock()
        if record.expires_at_s is not None and now_s >= record.expires_at_s:
            raise UnauthenticatedError(
                f"token {record.id} has expired: it held until {moment(record.expires_at_s)}, and "
                f"the clock of the node that was asked says {moment(now_s)}"
            )
        user = await self._store.get(f"{USERS}{record.user}", UserRecord)
        if user is None:
            raise UnauthenticatedError(f"user {record.user} was removed")
        return Caller(name=record.user, role=user.value.role, how=f"token {record.id}")

    async def _user(self, name: str) -> Versioned[UserRecord]:
        entry = await self._store.get(f"{USERS}{name}", UserRecord)
        if entry is None:
            raise NotFoundError(f"there is no user {name}")
        return entry

    async def _tokens(self, name: str) -> Sequence[Versioned[ApiTokenRecord]]:
        entries = await self._store.list_prefix(API_TOKENS, ApiTokenRecord)
        return [entry for entry in entries if entry.value.user == name]

    async def _remove_tokens(self, name: str) -> None:
        for entry in await self._tokens(name):
            await self._store.delete_if(entry.key, entry.revision)


def _hash(token: str) -> bytes:
    return hashlib.sha256(token.encode()).digest()


def _view(record: UserRecord, tokens: Sequence[ApiTokenRecord]) -> User:
    return User(
        name=record.name,
        role=record.role,
        created_at_s=record.created_at_s,
        tokens=tuple(
            ApiTokenView(
                id=each.id,
                label=each.label,
                created_at_s=each.created_at_s,
                expires_at_s=each.expires_at_s,
            )
            for each in sorted(tokens, key=lambda token: token.created_at_s)
        ),
    )
