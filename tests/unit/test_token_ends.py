"""Users' tokens that end: told ahead, by event and by `ferry doctor`, once each."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager

import pytest

from node_agent.cli.output import moment
from node_agent.cli.users import _until
from node_agent.doctor.findings import Level
from node_agent.doctor.user_tokens import check_user_tokens
from node_agent.events import EventKind, EventLog
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore
from node_agent.trust.records import ApiTokenCreate, ApiTokenView, TokenEnd, UserCreate, token_end
from node_agent.trust.token_ends import TOKEN_ENDS, TokenEndTold, TokenWatch
from node_agent.trust.users import Users

DAY_S = 86_400.0


class Cluster:
    """Two agents that look, and one clock."""

    def __init__(self) -> None:
        self.now_s = 1e9
        data = SimulatedData()
        self.stores = [SimulatedStore(data), SimulatedStore(data)]
        self.typed = [TypedStore(store) for store in self.stores]
        self.logs = [EventLog(typed, "n1") for typed in self.typed]
        self.watches = [
            TokenWatch(typed, events, clock=lambda: self.now_s)
            for typed, events in zip(self.typed, self.logs, strict=True)
        ]
        self.users = Users(self.typed[0], clock=lambda: self.now_s)

    async def issue(self, days: float | None, label: str = "") -> str:
        ttl_s = None if days is None else days * DAY_S
        return (await self.users.issue("bob", ApiTokenCreate(ttl_s=ttl_s, label=label))).id

    async def days(self, count: float) -> None:
        """So many later everybody looks, at once."""
        self.now_s += count * DAY_S
        await asyncio.gather(*(watch.look() for watch in self.watches))

    async def told(self) -> Sequence[str]:
        events = await self.logs[0].read()
        assert {event.kind for event in events} <= {EventKind.USER_TOKEN_ENDS}
        return [event.message for event in events]


@asynccontextmanager
async def open_cluster() -> AsyncIterator[Cluster]:
    cluster = Cluster()
    for store in cluster.stores:
        await store.open()
    await cluster.users.create(UserCreate(name="bob"))
    yield cluster
    for store in cluster.stores:
        await store.close()


@pytest.mark.parametrize(
    ("life", "left", "end"),
    [
        (90.0, 14.1, TokenEnd.FAR),
        (90.0, 14.0, TokenEnd.SOON),
        (3.0, 1.1, TokenEnd.FAR),
        (3.0, 0.9, TokenEnd.SOON),
        (3.0, 0.0, TokenEnd.ENDED),
        (3.0, -400.0, TokenEnd.ENDED),
    ],
)
def test_it_is_soon_two_weeks_or_a_third_of_its_life_before(
    life: float, left: float, end: TokenEnd
) -> None:
    assert token_end(0.0, life * DAY_S, (life - left) * DAY_S) is end
    assert token_end(0.0, None, life * DAY_S) is TokenEnd.FAR


async def test_each_end_is_told_ahead_and_when_it_has_come_whoever_looks() -> None:
    async with open_cluster() as cluster:
        token, _ = await cluster.issue(90, "laptop"), await cluster.issue(None)
        await cluster.days(70)
        assert await cluster.told() == []
        await cluster.days(7)
        await cluster.days(1)
        [ahead] = await cluster.told()
        assert ahead.startswith(f"token {token} (laptop) of user bob holds until 2001-12-08")
        assert ahead.endswith("make another one (ferry user token bob)")
        await cluster.days(20)
        await cluster.days(1)
        ended = (await cluster.told())[1:]
        assert len(ended) == 1
        assert ended[0].endswith("it is refused")


async def test_what_was_told_is_forgotten_with_the_token_which_can_be_removed_as_ever() -> None:
    async with open_cluster() as cluster:
        token = await cluster.issue(30)
        await cluster.days(25)
        assert len(await cluster.told()) == 1
        await cluster.users.revoke("bob", token)
        assert (await cluster.users.get("bob")).tokens == ()
        await cluster.days(1)
        assert await cluster.typed[0].list_prefix(TOKEN_ENDS, TokenEndTold) == []
        assert len(await cluster.told()) == 1


async def test_nobody_hears_of_one_for_hours_nor_of_one_that_ended_long_ago() -> None:
    async with open_cluster() as cluster:
        await cluster.issue(0.5)
        await cluster.issue(30)
        await cluster.days(100)
        assert await cluster.told() == []


async def test_a_clock_that_goes_back_tells_nothing_again() -> None:
    async with open_cluster() as cluster:
        await cluster.issue(30)
        await cluster.days(31)
        await cluster.days(-10)
        await cluster.days(10)
        assert len(await cluster.told()) == 1


async def test_the_doctor_names_each_with_what_to_do() -> None:
    async with open_cluster() as cluster:
        assert list(check_user_tokens(await cluster.users.list_users(), cluster.now_s)) == []
        token = await cluster.issue(30, "ci")
        await cluster.issue(0.5)
        found = {}
        for days in (1, 25, 31):
            now_s = cluster.now_s + days * DAY_S
            found[days] = list(check_user_tokens(await cluster.users.list_users(), now_s))
        assert [each.level for each in found[1]] == [Level.OK]
        for days, word in ((25, "holds until"), (31, "held until")):
            [finding] = found[days]
            assert (finding.level, finding.check) == (Level.WARNING, "token of user bob")
            assert finding.detail.startswith(f"{token} (ci) {word}")
            assert f"ferry user token bob --rm {token}" in finding.mend


def test_the_list_of_users_says_it_beside_the_end() -> None:
    now_s = time.time()
    for left_days, words in ((60, ""), (10, " (ends soon)"), (-1, " (ended)")):
        until_s = now_s + left_days * DAY_S
        made_s = until_s - 90 * DAY_S
        token = ApiTokenView(id="0", label="", created_at_s=made_s, expires_at_s=until_s)
        assert _until(token) == moment(until_s)[:16] + words
