"""Whose dirty log it is; the kernel's part is left out."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator

import pytest

from migrator.engine import dirty_log, kernel
from migrator.engine.dirty_log import DirtyLog, LogClaim
from migrator.engine_messages import RegionLayout
from migrator.errors import EngineError
from migrator.ports import RegionMapping

SIZE = 16 * 4096
MAPPING = RegionMapping(address=0x7000_0000, length_bytes=SIZE, region_offset_bytes=0)
LAYOUT = RegionLayout(name="ram", size_bytes=SIZE, page_size_bytes=4096, mappings=(MAPPING,))


@pytest.fixture
def memory() -> Iterator[int]:
    fd = os.memfd_create("guest")
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the kernel is asked for."""
    found: list[str] = []

    def note(what: str) -> Callable[..., None]:
        return lambda *arguments: found.append(what)

    monkeypatch.setattr(kernel, "uffd_initialise", note("initialise"))
    monkeypatch.setattr(kernel, "uffd_register_wp", note("register"))
    monkeypatch.setattr(kernel, "uffd_unregister", note("unregister"))
    monkeypatch.setattr(kernel.PagemapScanner, "arm", note("arm"))
    monkeypatch.setattr(dirty_log, "_ANOTHER_S", 0.05)
    return found


def log_of(memory: int) -> DirtyLog:
    return DirtyLog(-1, -1, [LAYOUT], LogClaim(memory))


def test_a_guest_s_writes_are_tracked_by_one_engine_at_a_time(
    memory: int, asked: list[str]
) -> None:
    """One that an agent's death left behind may still be at it. What is its own stays as it is."""
    first, second = log_of(memory), log_of(memory)
    first.register()
    asked.clear()
    with pytest.raises(EngineError, match="another engine"):
        second.register()
    second.unregister()
    assert asked == []
    first.unregister()
    second.register()
    assert asked == ["unregister", "initialise", "unregister", "register", "arm"]
    second.register()  # Again, by the same.
    second.unregister()


def test_an_engine_waits_for_one_that_ends(
    memory: int, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    first, second = log_of(memory), log_of(memory)
    first.register()
    monkeypatch.setattr(dirty_log, "_ANOTHER_S", 30.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: first.unregister())
    second.register()
    second.unregister()


def test_where_it_cant_be_claimed_it_is_used_as_it_is(asked: list[str]) -> None:
    log = DirtyLog(-1, -1, [LAYOUT], LogClaim(-1))
    log.register()
    assert "register" in asked
