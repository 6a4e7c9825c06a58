"""What the engines' parts wait for in a whole post-copy is the model's; frames hold few pages."""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator

import pytest

from migrator.engine import filler as filler_module
from migrator.engine import frames, missing, page_server
from migrator.engine.control import Pollable, StoppedError, Waiter
from migrator.engine.frames import StreamHello, StreamWelcome
from migrator.engine.stream import Endpoint, StreamBrokenError
from migrator.ranges import Ranges
from tests.unit.lockstep import Lockstep, LockstepEvent, LockstepSignal, LockstepThread
from tests.unit.post_copy_kernel import PAGE, UFFD
from tests.unit.post_copy_link import End, connect
from tests.unit.post_copy_world import DestinationEngine, SourceEngine, World


class _Waiter:
    """In the place of `HelperWaiter`."""

    def __init__(self, lockstep: Lockstep, stop: LockstepSignal) -> None:
        self._lockstep = lockstep
        self._stop = stop

    def wait(self, source: Pollable | None, events: int, timeout_s: float) -> bool:
        self._lockstep.wait(lambda: self._stop.is_set, timeout_s)
        self.tick()
        return False

    def tick(self) -> None:
        self._lockstep.pause()
        if self._stop.is_set:
            raise StoppedError("the pass was given up")


@contextlib.contextmanager
def small(world: World) -> Iterator[None]:
    """Frames of a few pages; and what the engines' parts wait for is the world's."""
    lockstep = world.lockstep
    signals: dict[int, LockstepSignal] = {}

    def signal() -> LockstepSignal:
        made = LockstepSignal(lockstep, len(signals))
        signals[made.fileno()] = made
        return made

    def thread(
        *, target: Callable[..., None], args: tuple[object, ...] = (), daemon: bool
    ) -> object:
        return LockstepThread(lockstep, lambda: target(*args), lockstep.owner)

    def poll(watched: dict[int, int], timeout_s: float) -> dict[int, int]:
        def happened() -> dict[int, int]:
            return {number: events for number, events in watched.items() if is_ready(number)}

        lockstep.wait(lambda: bool(happened()), timeout_s)
        return happened()

    def is_ready(number: int) -> bool:
        if number == UFFD:
            return world.memory.has_faults()
        if number in signals:
            return signals[number].is_set
        return any(
            end.readable() for each in world.engines for end in each.ends if end.fileno() == number
        )

    def open_welcomed(
        endpoint: Endpoint, hello: StreamHello, waiter: Waiter
    ) -> tuple[End, StreamWelcome]:
        lockstep.pause()
        there = world.engines[endpoint.port]
        here = lockstep.owner
        assert isinstance(there, DestinationEngine)
        assert isinstance(here, SourceEngine)
        if there.dead or there.filler is None:
            waiter.wait(None, 0, 0.5)
            raise StreamBrokenError("nobody listens")
        ours, theirs = connect(lockstep)
        here.ends.append(ours)
        there.ends.append(theirs)
        filler = there.filler
        lockstep.spawn(lambda: filler.offer(hello.kind, theirs), there)  # type: ignore[arg-type]
        world.served_from_s = lockstep.now_s
        lockstep.pause()
        return ours, StreamWelcome(pull_codecs=("lz4", "zstd") if world.packs else ())

    class Missing(missing.MissingPages):
        """Is looked at."""

        def filled(self, region: int, start: int, end: int) -> None:
            lockstep.pause()
            world.check_filled(region, start, end)
            super().filled(region, start, end)

        def is_missing(self, region: int, offset: int) -> bool:
            lockstep.pause()
            found = super().is_missing(region, offset)
            lockstep.pause()
            return found

        def ask(self, pages_max: int) -> tuple[int, Ranges] | None:
            lockstep.pause()
            return super().ask(pages_max)

    threading = types.SimpleNamespace(
        Thread=thread,
        Event=lambda: LockstepEvent(lockstep),
        Lock=contextlib.nullcontext,
        current_thread=lambda: None,
    )
    time = types.SimpleNamespace(monotonic=lambda: lockstep.now_s)
    with pytest.MonkeyPatch.context() as patch:
        world.memory.replace(patch)
        for module in (filler_module, page_server):
            patch.setattr(module, "threading", threading)
            patch.setattr(module, "time", time)
            patch.setattr(module, "Signal", signal)
        patch.setattr(filler_module, "poll", poll)
        patch.setattr(filler_module, "MissingPages", Missing)
        patch.setattr(filler_module, "CHUNK_PAGES", 6)
        patch.setattr(filler_module, "_WINDOW_BYTES_FIRST", 12 * PAGE)
        patch.setattr(filler_module, "_WINDOW_BYTES_MAX", 24 * PAGE)
        patch.setattr(missing, "_WINDOW_PAGES", 8)
        patch.setattr(page_server, "open_welcomed", open_welcomed)
        patch.setattr(page_server, "HelperWaiter", lambda stop: _Waiter(lockstep, stop))
        patch.setattr(page_server, "PACK_BYTES_MIN", 2 * PAGE)
        patch.setattr("migrator.engine.page_socket.tcp_figures", lambda sock: None)
        patch.setattr(frames, "FRAME_BYTES_MAX", 8 * PAGE)
        patch.setattr(frames, "FRAME_RANGES_MAX", 8)
        yield
