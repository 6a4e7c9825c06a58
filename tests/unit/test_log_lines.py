"""Nobody who may put a name or a text into the log writes lines of their own."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import os
import socket
from unittest.mock import Mock

import pytest

from migrator.errors import PeerError, StoreError
from node_agent.events import EventKind, EventLog
from node_agent.log_lines import FewerRepeats, LogLines, one_line
from node_agent.state.memory import SimulatedData, SimulatedStore
from node_agent.state.typed import TypedStore

FORGED = "/v1/domains/a\n2026-11-29 05:00:00,000 INFO node_agent.api.auth: DELETE by root\x1b[2K"


def test_a_record_is_one_line() -> None:
    record = logging.LogRecord("ferry", logging.INFO, "", 1, "POST %s by %s", (FORGED, "ops"), None)
    line = LogLines("%(levelname)s %(name)s: %(message)s").format(record)
    assert line.startswith("INFO ferry: POST /v1/domains/a\\n2026-11-29")
    assert line.endswith("\\x1b[2K by ops")
    assert "\n" not in line


def test_a_failure_keeps_its_lines() -> None:
    try:
        raise ValueError("wrong")
    except ValueError as error:
        where = (type(error), error, error.__traceback__)
    record = logging.LogRecord("ferry", logging.ERROR, "", 1, "it failed", (), where)
    lines = LogLines().format(record).splitlines()
    assert lines[0] == "it failed"
    assert lines[-1] == "ValueError: wrong"
    assert len(lines) > 2


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Größe: 5 µs, “so”", "Größe: 5 µs, “so”"),
        ("a\r\nb\tc", "a\\r\\nb\\tc"),
        ("\u2028\u202e\x9b\ud800", "\\u2028\\u202e\\x9b\\ud800"),
        ("", ""),
    ],
)
def test_one_line(text: str, shown: str) -> None:
    assert one_line(text) == shown


async def test_an_event_is_one_line() -> None:
    store = SimulatedStore(SimulatedData())
    await store.open()
    events = EventLog(TypedStore(store), "n1")
    await events.open()
    events.emit(EventKind.DRAIN, f"asked by {FORGED}")
    await events.close()
    (event,) = await events.read()
    assert event.message == one_line(f"asked by {FORGED}")


def of_the_store(text: str, *names: str, why: str = "away") -> logging.LogRecord:
    args = (*names, StoreError(why), 1.0)
    return logging.LogRecord("node_agent.nodes", logging.WARNING, "", 1, text, args, None)


def test_a_store_that_is_away_is_told_of_by_each_part_once_a_minute() -> None:
    now_s = 0.0
    fewer = FewerRepeats(lambda: now_s)
    heartbeat, following = "heartbeat failed: %s; %g", "following %s: %s; %g"
    assert fewer.filter(of_the_store(heartbeat))
    assert fewer.filter(of_the_store(following, "drains/"))
    assert fewer.filter(of_the_store(following, "pools/"))
    now_s = 5.0
    assert not fewer.filter(of_the_store(heartbeat, why="no member answers"))
    assert not fewer.filter(of_the_store(following, "drains/"))
    now_s = 61.0
    assert fewer.filter(of_the_store(heartbeat))


def test_that_no_connection_can_be_accepted_is_told_in_one_line_a_minute(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """It was a traceback for each place in the backlog, each second."""
    now_s = 0.0
    fewer, lines = FewerRepeats(lambda: now_s), LogLines("%(levelname)s %(name)s: %(message)s")
    listening = Mock(spec=socket.socket)
    listening.fileno.return_value = 0
    listening.accept.side_effect = OSError(errno.EMFILE, os.strerror(errno.EMFILE))

    def told() -> list[str]:
        caplog.clear()
        with contextlib.closing(asyncio.new_event_loop()) as loop:
            loop._accept_connection(  # type: ignore[attr-defined]
                asyncio.Protocol, listening, backlog=3
            )
        return [lines.format(each) for each in caplog.records if fewer.filter(each)]

    line = "ERROR asyncio: connections to this process wait, as none can be accepted now"
    assert told() == [f"{line}: [Errno 24] Too many open files"]
    now_s = 59.0
    assert told() == []
    now_s = 61.0
    assert len(told()) == 1


def test_whatever_else_goes_wrong_is_told_each_time() -> None:
    fewer = FewerRepeats(lambda: 0.0)
    other = logging.LogRecord(
        "x", logging.WARNING, "", 1, "it failed: %s", (PeerError("gone"),), None
    )
    plain = logging.LogRecord("x", logging.INFO, "", 1, "it is done", None, None)
    assert [fewer.filter(each) for each in (other, other, plain, plain)] == [True] * 4
