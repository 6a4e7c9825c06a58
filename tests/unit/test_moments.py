"""What the timeline says of a migration's hooks."""

from __future__ import annotations

import time
from typing import cast

import pytest

from migrator.model import DomainSpec
from node_agent.hooks.model import HookCall, HookReport, HookResult
from node_agent.hooks.service import HookService
from node_agent.migrations.moments import MigrationMoments
from tests.unit.session_pair import SessionPair


class SetsTheClock:
    """While its hook runs somebody sets the host's clock by an hour."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, step_s: float) -> None:
        self._monkeypatch = monkeypatch
        self._step_s = step_s

    async def run(self, call: HookCall, spec: DomainSpec) -> HookReport:
        set_s = time.time() + self._step_s
        self._monkeypatch.setattr(time, "time", lambda: set_s)
        result = HookResult(hook="balancer", point=call.point, succeeded=True, seconds=0.0)
        return HookReport(results=(result,))


@pytest.mark.parametrize("step_s", [3600.0, -3600.0])
async def test_a_hook_takes_what_it_takes_though_the_clock_is_set(
    monkeypatch: pytest.MonkeyPatch, step_s: float
) -> None:
    session = SessionPair().source
    hooks = cast("HookService", SetsTheClock(monkeypatch, step_s))
    assert await MigrationMoments(hooks).at_end(session)
    (phase,) = (each for each in session.timeline if each.name.startswith("hooks "))
    assert 0.0 < phase.seconds < 60.0
