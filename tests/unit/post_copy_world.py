"""A whole post-copy: both engines' parts as they are, their agents, a guest, and bad days.

    source's engine: PageServer ◄─ connections ─► Filler: destination's engine ─ kernel ─ guest
       agent: a successor                              agent: a successor

What is told before the guest runs comes in parts, and again; streams may be there by then. A thread
of each vCPU reads and writes pages, and knows what it has to find.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Sequence
from functools import partial
from typing import Final

import numpy as np

from migrator import ranges
from migrator.engine.bandwidth import TokenBucket
from migrator.engine.channel import ChannelHealth
from migrator.engine.codecs import LADDER, Codec
from migrator.engine.filler import Filler
from migrator.engine.frames import StreamHello
from migrator.engine.packing_policy import PACK_BYTES_MIN, Order, PackingPolicy, Plan
from migrator.engine.page_server import PageServer
from migrator.engine.stream import Endpoint
from migrator.errors import EngineError
from migrator.ranges import Ranges
from tests.unit.lockstep import (
    KilledError,
    Lockstep,
    LockstepThread,
    Owner,
)
from tests.unit.post_copy_kernel import PAGE, UFFD, Destination, layouts, pages_of, regions_of
from tests.unit.post_copy_link import End, break_connection, hold_connection

TEXT: Final = [(b"line %9d of a guest's memory\n" % n * PAGE)[:PAGE] for n in range(4)]
CONTENT: Final = [bytes(PAGE), *TEXT, *(random.Random(n).randbytes(PAGE) for n in range(3))]
END_S: Final = 120.0
"""Of the model's clock: all failures are over long before."""
FAULT_S: Final = 0.3
"""A page that is waited for comes sooner, unless something goes wrong."""
SILENCE_S: Final = 5.0
RECONNECT_S: Final = 10.0
Page = tuple[int, int]
"""Region, number."""


class Engine(Owner):
    """A process of either side, and its connections."""

    def __init__(self, world: World) -> None:
        super().__init__()
        self.world = world
        world.engines.append(self)
        self.ends: list[End] = []

    def kill(self) -> None:
        if not self.dead:
            self.dead = True
            for end in self.ends:
                break_connection(self.world.lockstep, end)

    def _check_ended(self, part: Filler | PageServer) -> None:
        """It was closed."""
        threads: list[LockstepThread] = vars(part)["_threads"]
        ended = not any(thread.is_alive() for thread in threads)
        self.world.check(ended, "a thread goes on after the close")


class World:
    """See the module."""

    def __init__(self, seed: int, stack: contextlib.ExitStack) -> None:
        self.chance = chance = random.Random(seed)
        self.lockstep = Lockstep(chance)
        shapes = layouts()
        self.source = regions_of(shapes, stack)
        self.memory = Destination(self.lockstep, regions_of(shapes, stack))
        self.expected: dict[Page, bytes] = {}
        """What the guest has to find."""
        self.pages: list[Page] = [
            (r, p) for r, layout in enumerate(shapes) for p in pages_of(layout)
        ]
        self.stale = [self._lay(page) for page in self.pages]
        self.cap_bytes_per_s = chance.choice((None, None, 200_000))
        self.packs = chance.random() < 0.5
        self.bad_days = 0
        self.served_from_s = 0.0
        """By the last stream that was opened."""
        self.engines: list[Engine] = []
        self.listening: DestinationEngine | None = None
        self.known: DestinationEngine | None = None
        """To the source."""
        self.serving: SourceEngine | None = None
        self.armed = self.runs = self.complete = False
        self.vcpus: list[LockstepThread] = []

    def _lay(self, page: Page) -> bool:
        """A page at both sides, as pre-copy leaves it. Whether the destination's is stale."""
        region, number = page
        content = self.chance.choice(CONTENT)
        here, there = self.source[region], self.memory.regions[region]
        part = slice(number * PAGE, (number + 1) * PAGE)
        if any(content) or self.chance.random() < 0.5:  # Else it is a hole.
            here.view[part] = content
        self.expected[page] = content
        stale = self.chance.random() < 0.7
        older = self.chance.choice(CONTENT) if stale else content
        if any(older):
            there.view[part] = older
        return stale

    def content_of(self, stale: list[Page]) -> list[tuple[int, Ranges]]:
        """As it is told: by region."""
        found = []
        for region in range(len(self.source)):
            starts = [number * PAGE for index, number in stale if index == region]
            if starts:
                array = np.array(sorted(starts), dtype=np.int64)
                found.append((region, ranges.from_page_starts(array, PAGE)))
        return found

    # --- what must be so ---

    def check(self, holds: bool, what: str) -> None:
        self.lockstep.check(holds, what)

    def check_page(self, page: Page, what: str) -> None:
        found = self.memory.read(*page)
        self.check(found == self.expected[page], f"page {page} {what}")

    def check_whole(self, what: str) -> None:
        for page in self.pages:
            self.check_page(page, what)

    def check_filled(self, region: int, start: int, end: int) -> None:
        """They are said to be in place."""
        for offset in range(start, end, PAGE):
            self.check_page((region, offset // PAGE), "isn't there and is told to be")

    # --- the guest ---

    def vcpu(self) -> None:
        self.lockstep.wait(lambda: self.runs)
        for _ in range(self.chance.randint(0, 12)):
            page = self.chance.choice(self.pages)
            began_s = self.lockstep.now_s
            self.memory.touch(*page)
            waited_s = self.lockstep.now_s - max(began_s, self.served_from_s)
            self.check(self.bad_days > 0 or waited_s < FAULT_S, f"{page} came after {waited_s} s")
            self.check_page(page, "is another one for the guest")
            if self.chance.random() < 0.5:
                self.expected[page] = self.chance.choice(CONTENT[1:])
                self.memory.write(*page, self.expected[page])
            self.lockstep.pause()
            self.check_page(page, "is no longer what the guest wrote")
            if self.chance.random() < 0.3:
                self.lockstep.wait(lambda: False, self.chance.random() * 0.1)

    def hypervisor(self) -> None:
        """Before the guest runs its devices are loaded, which look at its memory."""
        self.lockstep.wait(lambda: self.armed)
        for page in self.chance.sample(self.pages, 2):
            self.memory.touch(*page)
            self.check_page(page, "is another one for a device")
        self.runs = True
        if self.listening is not None and self.listening.filler is not None:
            self.listening.filler.pull_all()

    # --- agents ---

    def destination_agent(self) -> None:
        engine = DestinationEngine(self, successor=False)
        while True:
            self.lockstep.wait(partial(self._destination_has_to_act, engine))
            if self.complete:
                return
            self.listening = None
            self.lockstep.wait(lambda: False, self.chance.choice((0.0, 0.05, 1.0, 12.0)))
            if engine.retired and self.chance.random() < 0.5:
                engine.kill()
            engine = DestinationEngine(self, successor=True)

    def _destination_has_to_act(self, engine: DestinationEngine) -> bool:
        return engine.dead or engine.retired or self.complete

    def source_agent(self) -> None:
        while not self.complete:
            self.lockstep.wait(lambda: self.complete or self._source_has_to_act())
            self.lockstep.wait(lambda: False, self.chance.choice((0.0, 0.05, 1.0)))
            self.known = self.listening or self.known
            if self.known is None or self.complete:
                continue
            if self.serving is None or self.serving.dead:
                self.serving = SourceEngine(self)
            self.serving.wanted = self.known

    def _source_has_to_act(self) -> bool:
        news = self.listening is not None and self.listening is not self.known
        return news or (self.serving is not None and self.serving.dead)

    def bad_day(self) -> None:
        """Something goes wrong in a while."""
        at = self.lockstep.steps + self.chance.choice((30, 300, 1500)) * self.chance.random()
        self.lockstep.wait(lambda: self.complete or self.lockstep.steps >= at, 3.0)
        if self.chance.random() < 0.3:
            self.lockstep.wait(lambda: self.listening is not None and self.listening.filled)
            for _ in range(self.chance.randint(0, 12)):
                self.lockstep.pause()
        self.lockstep.wait(lambda: self.armed)
        alive = [engine for engine in self.engines if not engine.dead]
        ends = [end for engine in alive for end in engine.ends]
        match self.chance.randrange(6):
            case 0 | 1 if ends:
                break_connection(self.lockstep, self.chance.choice(ends))
            case 2 if self.serving is not None:
                self.serving.kill()
            case 3 if self.listening is not None:
                self.listening.kill()
            case 4 if self.listening is not None:
                self.listening.retired = True
            case 5 if ends:
                hold_connection(self.lockstep, self.chance.choice(ends))
            case _:
                pass

    # --- all of it ---

    def run(self, bad_days: int) -> None:
        self.bad_days = bad_days
        agents = [self.destination_agent, self.source_agent, self.hypervisor]
        threads = [self.lockstep.spawn(work) for work in agents]
        self.vcpus = [self.lockstep.spawn(self.vcpu) for _ in range(3)]
        for _ in range(bad_days):
            self.lockstep.spawn(self.bad_day)
        try:
            self.lockstep.run(
                lambda: self.complete and not any(t.is_alive() for t in (*self.vcpus, *threads)),
                END_S,
            )
            self.check_whole("is another one in the end")
        finally:
            self.lockstep.end(list(self.engines))


class DestinationEngine(Engine):
    """The part of `DestinationEngine` that a post-copy needs."""

    def __init__(self, world: World, *, successor: bool) -> None:
        super().__init__(world)
        self.retired = False
        """Its agent is gone: it ends by itself, in a while."""
        self.filler: Filler | None = None
        self.filled = False
        world.lockstep.spawn(self._take_over if successor else self._begin, self)

    def _make(self) -> Filler:
        self.filler = Filler(
            UFFD,
            self.world.memory.regions,
            silence_s=SILENCE_S,
            on_done=self._done,
            fault=self._fault,
        )
        return self.filler

    def _begin(self) -> None:
        world = self.world
        self._make()
        world.listening = self
        stale = [page for page, is_stale in zip(world.pages, world.stale, strict=True) if is_stale]
        world.chance.shuffle(stale)
        early = world.chance.randint(0, len(stale))
        self._tell(world.content_of(stale[:early]), arms=False)
        self._tell(world.content_of(stale[early:]), arms=True)
        self._finish()

    def _tell(self, told: list[tuple[int, Ranges]], *, arms: bool) -> None:
        """Again, where the stream broke before the source heard."""
        assert self.filler is not None
        while True:
            count = self.world.chance.randint(0, len(told) + 1)
            for region, content in told[:count]:
                self.filler.note(region, content)
            if count <= len(told):
                continue
            if arms:
                self.filler.arm()
                self.world.armed = True
            if self.world.chance.random() < 0.7:
                return

    def _take_over(self) -> None:
        if self._make().take_over():
            self.world.listening = self
        else:
            self.filled = True
        self._finish()

    def _finish(self) -> None:
        assert self.filler is not None
        lockstep = self.world.lockstep
        lockstep.wait(lambda: self.filled or self.retired)
        if self.retired:
            self.filler.close()
            self._check_ended(self.filler)
            self.kill()
            return
        self.filler.finish()
        self._check_ended(self.filler)
        lockstep.pause()
        self.world.check_whole("isn't there, and none is missing")
        self.world.complete = self.world.complete or not self.retired  # Nobody hears that word.

    def _done(self) -> None:
        self.world.check_whole("is missing, and none is told to be")
        self.filled = True

    def _fault(self, error: BaseException) -> None:
        """ENOENT: an earlier engine, whose agent was gone, had every page, and let go of them."""
        if self.dead or isinstance(error, KilledError):
            return
        if not isinstance(error, EngineError) or "No such file" not in str(error):
            self.world.lockstep.failure = self.world.lockstep.failure or error
        self.kill()


class SourceEngine(Engine):
    """The part of `SourceEngine` that a post-copy needs."""

    def __init__(self, world: World) -> None:
        super().__init__(world)
        self.wanted: DestinationEngine | None = None
        world.lockstep.spawn(self._serve, self)

    def _serve(self) -> None:
        world, lockstep = self.world, self.world.lockstep
        while not world.complete:
            lockstep.wait(lambda: self.wanted is not None or world.complete)
            if self.wanted is None:
                return
            self.ends, told = [], self.wanted
            server = self._server(told)
            server.start()
            lockstep.wait(partial(self._has_to_go, told))
            server.close()
            self._check_ended(server)
            world.check(not server.over or told.filled, "the server ended and pages are missing")

    def _has_to_go(self, told: DestinationEngine) -> bool:
        return self.wanted is not told or self.world.complete

    def _server(self, told: DestinationEngine) -> PageServer:
        world = self.world
        return PageServer(
            Endpoint(host="destination", port=world.engines.index(told)),
            lambda kind: StreamHello(version=1, migration_id="m", secret=b"", kind=kind),
            world.source,
            TokenBucket(world.cap_bytes_per_s, world.lockstep.now_s),
            ChannelHealth(lambda message: None),
            Packs(world.chance),
            reconnect_s=RECONNECT_S,
            fault=self._fault,
        )

    def _fault(self, error: BaseException) -> None:
        if not self.dead and not isinstance(error, KilledError):
            self.world.lockstep.failure = self.world.lockstep.failure or error


class Packs(PackingPolicy):
    """As chance will have it."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(lambda: 8.0)
        self._chance = chance

    @property
    def affordable(self) -> bool:
        return self._chance.random() < 0.8

    def plan(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> Plan | None:
        if self._chance.random() < 0.2:
            return None
        return Plan(LADDER[0], LADDER, 2, PACK_BYTES_MIN, hashing=False, cheap=True)

    def order(self, plan: Plan, guest_bytes: int, *, hashing: bool = False) -> Order:
        return Order(self._chance.choice(LADDER))
