"""An engine that hangs while its guest waits for pages makes room for another, where one can be.

The engine is a real process, and so is what stands in for the guest.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from migrator import engine_watch
from migrator.engine_watch import EngineWatch
from migrator.session import vocabulary as v
from tests.integration.engine_lab.lab import Guest, engines_of
from tests.integration.engine_lab.source_driver import SourceDriver, signalled, until
from tests.unit.session_pair import SessionPair

LOST = v.EngineLost(reason="it has said nothing for 0.6 s")

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd needs root")


@pytest.fixture
async def serving(
    guest: Guest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> AsyncIterator[SourceDriver]:
    """A source's engine that waits for a destination to ask it for pages."""
    monkeypatch.setattr(engine_watch, "PING_S", 0.2)
    monkeypatch.setattr(engine_watch, "UNANSWERED_MAX", 1_000)  # On a busy host, too.
    made = SourceDriver(guest, tmp_path, SessionPair().source)
    with socket.create_server(("127.0.0.1", 0)) as destination:
        made.perform(v.StartEngine(post_copy=True))
        port = destination.getsockname()[1]
        made.perform(v.ConnectEngine(host="127.0.0.1", port=port, secret=b"s" * 32))
        await made.driver.drained()
        await until(lambda: made.driver._has_spoken is not None)
        yield made
        await made.close()


async def test_an_engine_answers(serving: SourceDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    answers: list[None] = []
    note = EngineWatch.heard

    def heard(watch: EngineWatch) -> None:
        answers.append(None)
        note(watch)

    monkeypatch.setattr(EngineWatch, "heard", heard)
    await until(lambda: len(answers) > 5)


async def test_one_that_is_stopped_is_told_of_as_long_as_it_is(
    serving: SourceDriver, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its last rate stood on the screen, as if pages travelled."""
    monkeypatch.setattr(engine_watch, "UNHEARD_S", 0.5)
    signalled(guest, signal.SIGSTOP)
    await until(lambda: serving.driver.unheard_s is not None)
    signalled(guest, signal.SIGCONT)
    await until(lambda: serving.driver.unheard_s is None)


async def test_one_that_hangs_is_lost(
    serving: SourceDriver, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    signalled(guest, signal.SIGSTOP)
    monkeypatch.setattr(engine_watch, "UNANSWERED_MAX", 3)
    await until(lambda: LOST in serving.heard)
    (hung,) = engines_of(guest)
    serving.perform(v.StartEngine(post_copy=True))
    await serving.driver.drained()
    assert hung not in engines_of(guest)


async def test_one_that_has_the_only_pages_is_kept_and_told_of(
    serving: SourceDriver, guest: Guest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever stopped it may let it go on."""
    serving.hypervisor.gone = True
    signalled(guest, signal.SIGSTOP)
    monkeypatch.setattr(engine_watch, "UNANSWERED_MAX", 3)
    noted = v.ChannelNoted(broken=True, detail="the engine: it has said nothing for 0.6 s")
    await until(lambda: noted in serving.heard)
    signalled(guest, signal.SIGCONT)
    again = v.ChannelNoted(broken=False, detail="the engine answers again")
    await until(lambda: again in serving.heard)
    assert LOST not in serving.heard
