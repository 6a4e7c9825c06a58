"""`ferry events -f`: the event log as it grows, whatever becomes of the agent and its store.

A stream ends with its agent, with the store, and after a day. It is begun again after the last
event that was shown, at whichever agent answers then, until Ctrl-C: who follows wants most of all
to see what comes after an outage. That it is one, and that it is over, goes to stderr.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final

from node_agent.cli.client import ApiClient
from node_agent.cli.errors import ApiProblem, CliError, ExitCode
from node_agent.cli.output import aside
from node_agent.events import AWAY, HEARTBEAT, ClusterEvent

AGAIN_S: Final = 2.0
_DATA: Final = b"data: "


class Follower:
    """`choose` gives the agent to ask, anew after each trouble; `show` gets each event."""

    def __init__(
        self, choose: Callable[[], ApiClient], show: Callable[[ClusterEvent], None], last: int
    ) -> None:
        self._choose = choose
        self._show = show
        self._last = last
        """The newest event that was shown."""
        self._away_since_s: float | None = None

    def run(self) -> None:
        """Until interrupted. CliError: the agent refuses, which waiting doesn't mend."""
        while True:
            try:
                self._one_stream(self._choose())
            except CliError as error:
                passing = error.code is ExitCode.UNREACHABLE or _overloaded(error)
                if not passing:
                    raise
                self._trouble(str(error))
            time.sleep(AGAIN_S)

    def _one_stream(self, client: ApiClient) -> None:
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(self._last)}
        for line in client.lines("/v1/events", headers):
            if line.startswith(_DATA):
                self._is_back()
                event = client.decoded(line.removeprefix(_DATA), ClusterEvent)
                self._show(event)
                self._last = event.seq
            elif line.startswith(AWAY.encode()):
                self._trouble(line.removeprefix(AWAY.encode()).decode(errors="replace"))
            elif line == HEARTBEAT.encode():  # Nothing happens, and it would be told.
                self._is_back()

    def _trouble(self, why: str) -> None:
        if self._away_since_s is None:
            self._away_since_s = time.monotonic()
            aside(f"ferry: no event can be read now: {why}; trying again")

    def _is_back(self) -> None:
        if self._away_since_s is not None:
            away_s = time.monotonic() - self._away_since_s
            self._away_since_s = None
            aside(f"ferry: events are read again, after {away_s:.0f} s")


def _overloaded(error: CliError) -> bool:
    return isinstance(error, ApiProblem) and error.problem.status >= 500
