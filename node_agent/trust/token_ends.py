"""Tells ahead that a user's token ends, and once it has: else a refusal tells it to who uses it.

    each agent, now and then ──► token-ends/ID, by compare-and-set, with the event user-token-ends

As with a silent node, the first to notice tells, and record and event are one write. The token's
own record isn't touched: whoever removes it does so at the revision that it was read at.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable
from typing import Final

from migrator.errors import StoreError
from migrator.model import Value
from node_agent.background import Background
from node_agent.events import EventKind, EventLog
from node_agent.state.typed import TypedStore
from node_agent.trust.certificates import moment
from node_agent.trust.records import (
    API_TOKENS,
    TOKEN_ENDS_SOON_S,
    ApiTokenRecord,
    TokenEnd,
    is_brief,
    token_end,
)

log = logging.getLogger(__name__)

TOKEN_ENDS: Final = "token-ends/"
LOOK_S: Final = 600.0


class TokenEndTold(Value, frozen=True, kw_only=True):
    """`token-ends/ID` in the store: what was told last of a token."""

    end: TokenEnd


class TokenWatch:
    """See the module. `open` starts the one task behind it."""

    def __init__(
        self,
        store: TypedStore,
        events: EventLog,
        *,
        clock: Callable[[], float] = time.time,
        look_s: float = LOOK_S,
    ) -> None:
        self._store = store
        self._events = events
        self._clock = clock
        self._look_s = look_s
        self._task = Background("token-ends")

    def open(self) -> None:
        self._task.start(self._run())

    async def close(self) -> None:
        await self._task.close()

    async def look(self) -> None:
        """Tell what nobody has told yet. StoreError: some of it may be told."""
        now_s = self._clock()
        told = {
            entry.key.removeprefix(TOKEN_ENDS): entry
            for entry in await self._store.list_prefix(TOKEN_ENDS, TokenEndTold)
        }
        tokens = await self._store.list_prefix(API_TOKENS, ApiTokenRecord)
        for token in (entry.value for entry in tokens):
            before = told.pop(token.id, None)
            end = token_end(token.created_at_s, token.expires_at_s, now_s)
            if before is None or before.value.end.comes_before(end):
                await self._tell(token, end, now_s, None if before is None else before.revision)
        for left_over in told.values():  # Of tokens that were removed.
            await self._store.delete_if(left_over.key, left_over.revision)

    async def _tell(
        self, token: ApiTokenRecord, end: TokenEnd, now_s: float, revision: int | None
    ) -> None:
        until_s = token.expires_at_s
        if until_s is None or is_brief(token.created_at_s, until_s) or end is TokenEnd.FAR:
            return
        if now_s - until_s > TOKEN_ENDS_SOON_S:
            return  # Nobody has missed it for weeks.
        label = f" ({token.label})" if token.label else ""
        text = f"token {token.id}{label} of user {token.user} "
        if end is TokenEnd.SOON:
            text += f"holds until {moment(until_s)}, and is refused after that: make another one "
            text += f"(ferry user token {token.user})"
        else:
            text += f"held until {moment(until_s)}: it is refused"
        await self._events.emit_if(
            EventKind.USER_TOKEN_ENDS,
            text,
            key=f"{TOKEN_ENDS}{token.id}",
            replacing=TokenEndTold(end=end),
            expected_revision=revision,
            user=token.user,
            token=token.id,
            left_s=round(until_s - now_s),
        )

    async def _run(self) -> None:
        while True:
            try:
                await self.look()
            except StoreError as error:
                log.warning("which users' tokens end can't be told now: %s", error)
            except Exception:
                log.exception("telling which users' tokens end failed")
            await asyncio.sleep(self._look_s)
