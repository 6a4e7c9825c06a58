"""Sampling the dirty log of a real address space: what it counts, and that it leaves nothing."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from pathlib import Path

import pytest

from migrator.dirty_sampler import DirtySampler
from migrator.engine_messages import Configured, DirtySampled, SampleDirty, Stop, Stopped
from migrator.errors import EngineError, HypervisorError
from migrator.model import DomainName, Role
from migrator.ports import GuestMemory
from tests.integration.cluster.world import eventually
from tests.integration.engine_lab.lab import MIB, PAGE, Engine, Guest, configuration, engines_of

WEB = DomainName("web")
DISTURBED_MAX = 6
"""An engine, or a guest, that gets no core for a second sees, or writes, less: one undisturbed
sample of so many counts."""

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd needs root")


class Sampled:
    """A sampler on the guest; it counts how often the memory was opened."""

    def __init__(self, guest: Guest, folder: Path) -> None:
        self.guest = guest
        self.opened = 0
        self.log = folder / "engines.log"
        self.sampler = DirtySampler(self._memory, self.log)

    async def _memory(self, domain: DomainName) -> GuestMemory:
        self.opened += 1
        return self.guest.memory()


async def wait_tracked(guest: Guest) -> None:
    await asyncio.to_thread(eventually, "the guest is tracked", guest.tracked, 20.0)


async def test_it_counts_what_is_written(guest: Guest, tmp_path: Path) -> None:
    guest.tell(f"fill 0 {32 * MIB}")
    guest.tell(f"zero 0 {8 * MIB}")
    sampler = Sampled(guest, tmp_path).sampler
    disturbed: list[object] = []
    while len(disturbed) < DISTURBED_MAX:
        guest.tell(f"run 4000 {16 * MIB} {20 * MIB}")
        began = time.monotonic()
        sampled = await sampler.sample(WEB, 2.0)
        written = guest.tell("pause")
        ran_s = time.monotonic() - began
        assert written > 0
        assert 2.0 <= sampled.seconds <= ran_s
        assert not guest.tracked()
        assert not engines_of(guest)
        assert sampled.memory_in_use_bytes == 32 * MIB
        assert sampled.zero_share == pytest.approx(0.25, abs=0.01)
        # As the guest counts, but a page that is written twice between two scans counts once.
        rate = sampled.fresh_bytes / PAGE / sampled.seconds
        assert rate <= written / sampled.seconds
        # The curve grows, and flattens at the 4 MiB that are written to.
        sizes = [point.bytes for point in sampled.curve]
        assert sizes == sorted(sizes)
        assert sizes[-1] <= 4 * MIB
        assert sampled.curve[-1].seconds == sampled.seconds
        slopes = [point.bytes / point.seconds for point in sampled.curve]
        if (
            rate >= 0.35 * written / ran_s
            and slopes[0] > 2 * slopes[-1]
            and sizes[-1] >= 0.9 * 4 * MIB
        ):
            return
        disturbed.append((sampled, written, ran_s))
    raise AssertionError(f"each saw too little: {disturbed}")


async def test_a_guest_that_does_not_write_is_at_rest(guest: Guest, tmp_path: Path) -> None:
    guest.tell(f"fill 0 {8 * MIB}")
    in_use = guest.in_use_bytes()
    sampled = await Sampled(guest, tmp_path).sampler.sample(WEB, 0.3)
    assert (sampled.fresh_bytes, sampled.curve[-1].bytes) == (0, 0)
    assert guest.in_use_bytes() == in_use


async def test_a_cancelled_sampling_leaves_nothing(guest: Guest, tmp_path: Path) -> None:
    sampling = asyncio.create_task(Sampled(guest, tmp_path).sampler.sample(WEB, 30.0))
    await wait_tracked(guest)
    sampling.cancel()
    with pytest.raises(asyncio.CancelledError):
        await sampling
    assert not guest.tracked()
    assert not engines_of(guest)


async def test_a_killed_engine_is_cleaned_up_after(guest: Guest, tmp_path: Path) -> None:
    made = Sampled(guest, tmp_path)
    sampling = asyncio.create_task(made.sampler.sample(WEB, 30.0))
    await wait_tracked(guest)
    for pid in engines_of(guest):
        os.kill(pid, signal.SIGKILL)
    with pytest.raises(EngineError, match="ended with status -9"):
        await sampling
    assert made.opened == 2
    assert not guest.tracked()
    assert not engines_of(guest)


async def test_memory_that_cannot_be_opened_leaves_no_engine(guest: Guest, tmp_path: Path) -> None:
    async def refuse(domain: DomainName) -> GuestMemory:
        raise HypervisorError("there is no such process")

    with pytest.raises(HypervisorError):
        await DirtySampler(refuse, tmp_path / "log").sample(WEB, 1.0)


async def test_an_engine_whose_agent_dies_unregisters(guest: Guest, tmp_path: Path) -> None:
    engine = await Engine.spawn(tmp_path / "log")
    engine.process.send(configuration(Role.SOURCE, guest), guest.fds)
    await engine.expect(Configured)
    engine.process.send(SampleDirty(seconds=30.0))
    await wait_tracked(guest)
    engine.process._sock.shutdown(2)
    assert await engine.exited() == 0
    assert not guest.tracked()


async def test_a_sampling_can_be_repeated_and_stopped(guest: Guest, tmp_path: Path) -> None:
    engine = await Engine.spawn(tmp_path / "log")
    engine.process.send(configuration(Role.SOURCE, guest), guest.fds)
    await engine.expect(Configured)
    for _ in range(2):
        engine.process.send(SampleDirty(seconds=0.2))
        assert (await engine.expect(DirtySampled)).seconds >= 0.2
    engine.process.send(SampleDirty(seconds=30.0))
    engine.process.send(Stop())
    await engine.expect(Stopped)
    assert await engine.exited() == 0
    assert not guest.tracked()
