"""Whether packing pays, by which codec, and for which frames: figures in, decisions out. Pure.

    link's rate, idle cores ──► plan: a codec, threads, hashing or not; or none at all
                                  │        (within the budget: cores that are idle, times seconds)
    each frame ──────────────► order: what is tried on it ──► note: what came of it

Of the codecs that one core can run faster than the link, and whose cores are idle, the one that
gets the guest's memory through the soonest: the smallest on a slow link, the quickest on a faster
one. None where a core is no faster than the link.

A codec is measured only on what all of them were tried on, a part of one frame in 17: otherwise one
would be praised for the text that another had no chance to pack. What none of them makes smaller
tells nothing. How small pages become decides between codecs, and how many are packed, but never
that none is: who doesn't pack learns nothing new. A policy that stopped when they had become so
small that packing them fast enough took more than the idle cores stayed so for good. For the same
reason a speed is believed ever less while it keeps packing from going on.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Final

import msgspec

from migrator.engine import codecs
from migrator.engine.codecs import Codec

THREADS_MAX: Final = 2
"""Of a stream, where half as many cores are idle."""
SPEED_MARGIN: Final = 1.25
"""One core has to be so much faster than the link."""
IDLE_MIN: Final = 0.25
"""Of a core. With less packing isn't begun; with more it takes no more than there is, and the rest
goes plain. As usual pages take 0.8 at 1 Gbit/s, a host with 0.7 idle once packed nothing."""
CORES_FACTOR: Final = 1.1
"""Packing needs so much more than its own work: what wakes threads, and waits for Python's lock."""
PACK_BYTES_MAX: Final = 1024 * 1024
"""Of guest memory in one frame: `frames.PACKED_BYTES_MAX`. Each costs both ends half a millisecond
of Python; larger ones don't compress better."""
PACK_BYTES_MIN: Final = 512 * 1024
_PACK_S: Final = 0.01
"""What a frame holds, of the link's time: on a slow link a larger one would fill the pipe later."""
RAW_SHARE: Final = 0.95
"""A frame that doesn't become smaller than this isn't worth unpacking."""
WORTH_MORE: Final = 1.03
"""A codec that takes more of a core has to be so much sooner done."""

_COPY_S_ASSUMED: Final = 0.25e-9
"""Of a core, for each byte: copied and looked at for zeros."""
_HASH_S_ASSUMED: Final = 0.4e-9
"""Likewise: hashed."""
_PRIOR_BYTES: Final = 128 * 1024
_FADING: Final = 0.9
"""What the figures of the frame before still count: the last ten or so matter."""
_TRIAL_FADING: Final = 0.75
"""Likewise where each codec was tried: the last four."""
COMPARED_BYTES: Final = 256 * 1024
"""Of a frame. On all of it a comparison takes as long as LZ4 does for seven frames."""
_TRIALS_APART: Final = 16
_FIRST_TRIAL: Final = 8
"""The first frames are needed at once, but on a slow link."""
_TRIALS_APART_MIN: Final = 4
"""After a trial that nothing could be made smaller in."""
_DOUBT: Final = 0.02
"""Each time that nothing is packed, which is each frame."""
_CHEAP: Final = 2.0
"""Packing so many times faster than the link is always tried."""
_BUDGET_S: Final = 0.05
"""For how long idle cores that weren't used may be used later."""
PLAN_KEPT_S: Final = 0.02
"""As often as a link's rate is known anew. To plan takes 45 us, which each frame needn't pay."""
_LOOKS_APART: Final = 16
"""Where nothing is gained, one frame in so many is compressed to see whether it is now."""


class Figures:
    """What became of some bytes, of late."""

    def __init__(self, seconds_a_byte: float, share: float = 1.0, fading: float = _FADING) -> None:
        self._fading = fading
        self._assumed = seconds_a_byte
        self._bytes = float(_PRIOR_BYTES)
        self._core_seconds = _PRIOR_BYTES * seconds_a_byte
        self._wire_bytes = _PRIOR_BYTES * share

    @property
    def seconds_a_byte(self) -> float:
        """Of one core."""
        return self._core_seconds / self._bytes

    @property
    def share(self) -> float:
        """What is left of a byte; above 0."""
        return max(self._wire_bytes / self._bytes, 1e-3)

    def note(self, size: float, core_seconds: float, wire_bytes: float) -> None:
        self._bytes = self._fading * self._bytes + size
        self._core_seconds = self._fading * self._core_seconds + core_seconds
        self._wire_bytes = self._fading * self._wire_bytes + wire_bytes

    def doubt_speed(self) -> None:
        """Back towards what was assumed."""
        self._core_seconds += _DOUBT * (self._assumed * self._bytes - self._core_seconds)


@dataclass(frozen=True, slots=True)
class Offer:
    """What a codec is like, by what was measured, on pages that can be made smaller at all."""

    codec: Codec
    seconds_a_byte: float
    """Of one core, with all that comes before the codec but hashing."""
    share: float


@dataclass(frozen=True, slots=True)
class Plan:
    """How a stream is packed for now."""

    codec: Codec
    usable: tuple[Codec, ...]
    """What the other side can undo."""
    threads: int
    frame_bytes: int
    """Of guest memory, at most."""
    hashing: bool
    """Whether the cores suffice for telling which pages the destination has already."""
    cheap: bool
    """Trying is: what can be made small may lie in between what can't."""


class Order(msgspec.Struct, frozen=True):
    """What is to be done with one frame."""

    codec: Codec | None
    """None: it goes as it is."""
    compared: tuple[Codec, ...] = ()
    """Tried on a part of it (COMPARED_BYTES): what comes of that tells what each is like."""


class Trial(msgspec.Struct, frozen=True):
    """One codec on one frame."""

    codec: Codec
    size: int
    wire_bytes: int
    core_seconds: float


class CoreBudget:
    """Core seconds that packing may take: as many cores as are idle. Clockless."""

    def __init__(self) -> None:
        self._left_s = 0.0
        self._at_s: float | None = None

    @property
    def empty(self) -> bool:
        return self._left_s <= 0.0

    def refill(self, now: float, idle_cores: float) -> None:
        """What wasn't taken is kept for a moment, and a debt until it is paid."""
        seconds = _BUDGET_S if self._at_s is None else now - self._at_s
        self._at_s = now
        self._left_s = min(self._left_s + idle_cores * seconds, idle_cores * _BUDGET_S)

    def spend(self, core_seconds: float) -> None:
        self._left_s -= core_seconds


def cores_needed(seconds_a_byte: float, share: float, link_bytes_per_s: float) -> float:
    """To keep the link busy with what is packed."""
    return CORES_FACTOR * seconds_a_byte * link_bytes_per_s / share


def frame_bytes(link_bytes_per_s: float) -> int:
    """How much a packed frame holds; whole pages."""
    if _PACK_S * link_bytes_per_s >= PACK_BYTES_MAX:
        return PACK_BYTES_MAX
    return PACK_BYTES_MIN


def _presses(size: int) -> bool:
    """Whether the link is so fast that its first frames are needed before codecs are compared."""
    return size == PACK_BYTES_MAX


def packed_rate(offer: Offer, link_bytes_per_s: float, cores: float) -> float:
    """Bytes of guest memory a second: what is packed, and plain pages on what the link has left."""
    at_most = cores / (CORES_FACTOR * offer.seconds_a_byte)
    packed = min(at_most, link_bytes_per_s / offer.share)
    return link_bytes_per_s + packed * (1.0 - offer.share)


def choose(offers: Sequence[Offer], link_bytes_per_s: float, idle_cores: float) -> Offer | None:
    """The codec that gets pages through a link of this rate soonest.

    One core has to be faster than the link, and as many idle as usual pages take, or IDLE_MIN.
    None: pages should go as they are.
    """
    cores = min(idle_cores, THREADS_MAX)
    chosen, best = None, 0.0
    for offer in sorted(offers, key=lambda each: each.seconds_a_byte):
        if offer.seconds_a_byte * SPEED_MARGIN * link_bytes_per_s > 1.0:
            continue
        usually = cores_needed(offer.seconds_a_byte, offer.codec.share_assumed, link_bytes_per_s)
        if idle_cores < min(usually, IDLE_MIN):
            continue
        rate = packed_rate(offer, link_bytes_per_s, cores)
        if rate > WORTH_MORE * best:
            chosen, best = offer, rate
    return chosen


class PackingPolicy:
    """Remembers over passes and streams what was measured. Pure but for what it is given."""

    def __init__(
        self,
        idle_cores: Callable[[], float],
        *,
        sharers: Callable[[], int] = lambda: 1,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[float], None] = lambda core_seconds: None,
    ) -> None:
        """`sharers`: so many streams share the idle cores by now. `used`: is told what packing took
        of a core.
        """
        self._idle_cores = idle_cores
        self._used = used
        self._sharers = sharers
        self._clock = clock
        self._budget = CoreBudget()
        self._copying = Figures(_COPY_S_ASSUMED)
        self._hashing = Figures(_HASH_S_ASSUMED)
        self._codecs = {
            codec: Figures(1.0 / codec.speed_assumed, codec.share_assumed, _TRIAL_FADING)
            for codec in codecs.LADDER
        }
        self._of_late = Figures(0.0, 0.0)
        self._level = Figures(0.0)
        """What came out, of what the trials had let expect."""
        self._trial_in = _FIRST_TRIAL
        self._look_in = 0
        self._asked = False
        """For a comparison."""
        self._compared = False
        """At least once. Until then the cheapest codec is taken, but on a slow link."""

    @property
    def ratio(self) -> float:
        """Bytes of guest memory to one on the wire, of late, incompressible ones included."""
        return 1.0 / min(self._of_late.share, 1.0)

    def offers(self, usable: Sequence[Codec]) -> list[Offer]:
        """What each codec is like by now, on pages like the last, if these were the better ones."""
        level = min(self._level.share, 1.0)
        copying = self._copying.seconds_a_byte
        return [
            Offer(codec, copying + found.seconds_a_byte, min(level * found.share, 1.0))
            for codec in usable
            for found in (self._codecs[codec],)
        ]

    def plan(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> Plan | None:
        """How a stream on a link of this rate (None: not the bottleneck) should be packed.

        None: not at all.
        """
        if link_bytes_per_s is None:
            return None
        all_idle = self._refill()
        idle = all_idle / self._sharers()
        size = frame_bytes(link_bytes_per_s)
        offers = self.offers(usable)
        if _presses(size) and not self._compared:
            offers = offers[:1]
        offer = choose(offers, link_bytes_per_s, idle)
        if offer is None:
            for figures in (self._copying, *self._codecs.values()):
                figures.doubt_speed()
            if self._compared:
                self._trial_in = 0
            return None
        with_hashing = offer.seconds_a_byte + self._hashing.seconds_a_byte
        return Plan(
            codec=offer.codec,
            usable=tuple(usable),
            threads=max(1, min(THREADS_MAX, math.ceil(2 * idle))),
            frame_bytes=size,
            hashing=cores_needed(with_hashing, offer.share, link_bytes_per_s) <= idle,
            cheap=offer.seconds_a_byte * _CHEAP * link_bytes_per_s <= 1.0,
        )

    def could_pay(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> bool:
        """Whether a stream on such a link would be packed if the cores were idle."""
        if link_bytes_per_s is None:
            return False
        return choose(self.offers(usable), link_bytes_per_s, THREADS_MAX) is not None

    @property
    def affordable(self) -> bool:
        """Whether the idle cores have time for another frame by now."""
        self._refill()
        return not self._budget.empty

    def _refill(self) -> float:
        """The budget; returns how many cores are idle."""
        idle = self._idle_cores()
        self._budget.refill(self._clock(), idle)
        return idle

    def order(self, plan: Plan, guest_bytes: int, *, hashing: bool = False) -> Order:
        """For the next frame, of so many bytes of guest memory. `hashing`: they are hashed, too."""
        order = self._next(plan)
        seconds = self._copying.seconds_a_byte
        if order.codec is not None:
            seconds += self._codecs[order.codec].seconds_a_byte
        if hashing:
            seconds += self._hashing.seconds_a_byte
        comparing = sum(self._codecs[codec].seconds_a_byte for codec in order.compared)
        comparing *= min(guest_bytes, COMPARED_BYTES)
        self._budget.spend(CORES_FACTOR * (seconds * guest_bytes + comparing))
        return order

    def _next(self, plan: Plan) -> Order:
        self._trial_in -= 1
        # Where it is doubtful whether it pays, or time doesn't press, that is found out first.
        at_once = not (plan.cheap and _presses(plan.frame_bytes))
        if self._trial_in < 0 or (at_once and not self._asked):
            self._asked = True
            self._trial_in = _TRIALS_APART
            return Order(plan.codec, compared=plan.usable)
        if self._of_late.share < RAW_SHARE or plan.cheap:
            return Order(plan.codec)
        self._look_in -= 1
        if self._look_in < 0:
            self._look_in = _LOOKS_APART
            return Order(plan.codec)
        return Order(None)

    def note(
        self,
        guest_bytes: int,
        trial: Trial | None,
        compared: Sequence[Trial] = (),
        *,
        copy_seconds: float,
        hash_seconds: float | None = None,
    ) -> None:
        """A frame was packed as ordered. `hash_seconds`: None, it wasn't hashed.

        `trial`: of the order's codec; `compared`: likewise.
        """
        trials = compared if trial is None else (trial, *compared)
        packing = sum(each.core_seconds for each in trials)
        self._used(copy_seconds + (hash_seconds or 0.0) + packing)
        self._copying.note(guest_bytes, copy_seconds, 0)
        if hash_seconds is not None:
            self._hashing.note(guest_bytes, hash_seconds, 0)
        if compared:
            self._compare(compared)
        if trial is not None:
            self._of_late.note(trial.size, 0.0, trial.wire_bytes)
            expected = trial.size * self._codecs[trial.codec].share
            self._level.note(expected, 0.0, trial.wire_bytes)

    def _compare(self, trials: Sequence[Trial]) -> None:
        self._compared = True
        if all(each.wire_bytes >= RAW_SHARE * each.size for each in trials):
            self._trial_in = min(self._trial_in, _TRIALS_APART_MIN)
            return
        for each in trials:
            self._codecs[each.codec].note(each.size, each.core_seconds, each.wire_bytes)


class StreamPlan:
    """One stream's plan, made anew now and then. What isn't packed is looked at for each frame."""

    def __init__(self, policy: PackingPolicy, clock: Callable[[], float] = time.monotonic) -> None:
        self._policy = policy
        self._clock = clock
        self._plan: Plan | None = None
        self._made_for: tuple[float | None, Sequence[Codec]] = None, ()
        self._until_s = 0.0

    def __call__(
        self,
        link_bytes_per_s: float | None,
        usable: Sequence[Codec],
        expected_bytes_per_s: float | None = None,
    ) -> Plan | None:
        """As PackingPolicy.plan, of a moment ago at most.

        `expected_bytes_per_s`: what earlier streams found of the link. It counts where it is less
        than what is known, and packing is cheap by it.
        """
        expected = expected_bytes_per_s
        if expected is None or expected >= (link_bytes_per_s or math.inf):
            return self._of_late(link_bytes_per_s, usable)
        plan = self._of_late(expected, usable)
        return plan if plan is not None and plan.cheap else None

    def _of_late(self, link_bytes_per_s: float | None, usable: Sequence[Codec]) -> Plan | None:
        now, wanted = self._clock(), (link_bytes_per_s, usable)
        if self._plan is None or now >= self._until_s or wanted != self._made_for:
            self._plan = self._policy.plan(link_bytes_per_s, usable)
            self._made_for, self._until_s = wanted, now + PLAN_KEPT_S
        return self._plan
