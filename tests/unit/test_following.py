"""`ferry events -f` outlives the agent and the store that it follows, and says so."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final, cast

import msgspec
import pytest

from migrator.errors import RefusedError, StoreError
from node_agent.cli import following
from node_agent.cli.client import ApiClient
from node_agent.cli.errors import ApiProblem, CliError, ExitCode, Unreachable
from node_agent.cli.following import Follower
from node_agent.events import AWAY, ClusterEvent
from node_agent.resources import Problem

BEAT: Final = b": heartbeat"
Stream = Sequence[int | bytes | CliError]
"""What a stream has: events by number, other lines, an error where it breaks."""


def event(number: int) -> ClusterEvent:
    return ClusterEvent(seq=number, at_s=0.0, kind="x", node="n1", message=f"event {number}")


def problem(status: int, error: type[StoreError | RefusedError]) -> ApiProblem:
    return ApiProblem(
        Problem(type="x", title="x", status=status, detail="it says no", code=error.code)
    )


class Agent:
    """Streams, one a connection; the user interrupts once all have been seen."""

    def __init__(self, *streams: Stream) -> None:
        self._streams = list(streams)
        self.asked_after: list[str] = []

    def lines(self, path: str, headers: Mapping[str, str]) -> Iterator[bytes]:
        if not self._streams:
            raise KeyboardInterrupt
        self.asked_after.append(headers["Last-Event-ID"])
        for each in self._streams.pop(0):
            if isinstance(each, CliError):
                raise each
            yield each if isinstance(each, bytes) else self._data(each)

    def decoded(self, data: bytes, kind: type[ClusterEvent]) -> ClusterEvent:
        return msgspec.json.decode(data, type=kind)

    @staticmethod
    def _data(number: int) -> bytes:
        return b"data: " + msgspec.json.encode(event(number))


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(following, "AGAIN_S", 0.0)


def follow(*streams: Stream) -> tuple[list[int], Agent]:
    """What was shown, to who had seen the third one."""
    agent, shown = Agent(*streams), list[int]()
    follower = Follower(lambda: cast(ApiClient, agent), lambda each: shown.append(each.seq), 3)
    with pytest.raises(KeyboardInterrupt):
        follower.run()
    return shown, agent


def test_an_ended_stream_is_begun_again_where_it_ended(capfd: pytest.CaptureFixture[str]) -> None:
    shown, agent = follow([b"retry: 2000", 4, BEAT, 5], [], [b"retry: 2000", 6])
    assert shown == [4, 5, 6]
    assert agent.asked_after == ["3", "5", "5"]
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("trouble", "told"),
    [
        (f"{AWAY}no member of etcd answers".encode(), "no member of etcd answers"),
        (Unreachable("the agent at n1 can't be reached"), "the agent at n1 can't be reached"),
        (problem(503, StoreError), "it says no"),
    ],
)
@pytest.mark.parametrize("sign", [BEAT, 5])
def test_an_outage_is_told_once_and_that_it_is_over(
    capfd: pytest.CaptureFixture[str], trouble: bytes | CliError, told: str, sign: bytes | int
) -> None:
    began = b"retry: 2000"
    waits = b": waiting for the store"
    shown, agent = follow([began, 4, trouble], [began, waits, trouble], [trouble], [began, sign, 6])
    assert shown == ([4, 6] if sign == BEAT else [4, 5, 6])
    assert agent.asked_after == ["3", "4", "4", "4"]
    out, err = capfd.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"ferry: no event can be read now: {told}; trying again",
        "ferry: events are read again, after 0 s",
    ]


def test_who_may_not_read_them_is_told_at_once() -> None:
    agent = Agent([problem(403, RefusedError)])
    follower = Follower(lambda: cast(ApiClient, agent), lambda each: None, 3)
    with pytest.raises(ApiProblem) as refused:
        follower.run()
    assert refused.value.code is ExitCode.NOT_PERMITTED


def test_another_agent_is_chosen_after_each_trouble() -> None:
    agents = [Agent([4, Unreachable("gone")]), Agent([5])]
    left, shown = list(agents), list[int]()

    def choose() -> ApiClient:
        if not left:
            raise KeyboardInterrupt
        return cast(ApiClient, left.pop(0))

    with pytest.raises(KeyboardInterrupt):
        Follower(choose, lambda each: shown.append(each.seq), 3).run()
    assert shown == [4, 5]
    assert agents[1].asked_after == ["4"]
