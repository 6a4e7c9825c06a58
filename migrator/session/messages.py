"""What the two sessions of a migration say to each other, by way of their agents.

    source                                         destination
      │  Prepare(spec, token, ...) ──────────────────►│  makes the guest, paused, and an engine
      │◄──────────────── Prepared(host, port, secret) │  or Refused(reasons)
      │  ═══ pages, device state: engine to engine ══►│
      │  Commit ─────────────────────────────────────►│  one compare-and-set, fence, `cont`
      │◄──────────────────────── Running(resumed_at)  │
      │  (post-copy only:)
      │◄────────────────────── Prepared(host, port, secret)  of an engine that replaces a dead one
      │◄──────────────────────────────────────── Filled│  holds every page
      │  Lost(reason) ───────────────────────────────►│  the pages are gone, so is the guest
      │  Farewell ───────────────────────────────────►│  the source's copy is gone
      │
      │  Commit(newer token) ────────────────────────►│  the source won the record back, and died:
      │                                               │  the destination's copy is the only one
      │  Abort(reason) ──────────────────────────────►│  discards its copy, unless it won
      │◄────────────────────────────── Aborted(reason)│
      │  Inquire ────────────────────────────────────►│  answers with what is true of it now

Any message may be lost, doubled, late or out of order. So each says a fact that stays true,
handling one twice changes nothing, and timers repeat what is not answered.
"""

from __future__ import annotations

import msgspec

from migrator.model import DomainSpec, MigrationRequest


class Message(msgspec.Struct, frozen=True, kw_only=True, tag_field="type", tag=str.lower):
    pass


class Prepare(Message, frozen=True, kw_only=True):
    """The source's token travels along: the destination would win token + 1."""

    spec: DomainSpec
    source: str
    token: int
    request: MigrationRequest
    asks_whether_arrived: bool = False
    """The source does so before it pauses the guest: so the answer needn't wait until everything is
    prepared, and pages can come meanwhile."""


class Prepared(Message, frozen=True, kw_only=True):
    """`secret` admits the source's page streams to the engine that listens at host:port."""

    host: str
    port: int
    secret: bytes
    no_post_copy: str = ""
    """Why the destination can't take the guest before all its pages; "": it can."""


class Refused(Message, frozen=True, kw_only=True):
    reasons: tuple[str, ...]


class Commit(Message, frozen=True, kw_only=True):
    """The source's hypervisor has sent the device state and won't resume by itself any more.

    `post_copy`: pages are missing at the destination still. `token`: under which the source holds
    the record; newer than Prepare's where it won the record back, and its hypervisor died before
    its vCPUs ran.
    """

    post_copy: bool = False
    token: int = 0


class Running(Message, frozen=True, kw_only=True):
    """The destination won `token`, fenced it, and its vCPUs run since `resumed_at_s`."""

    token: int
    resumed_at_s: float
    won_at_s: float = 0.0
    loaded_at_s: float = 0.0
    fenced_at_s: float = 0.0
    fence_detail: str = ""

    def by_clock_of(self, sent_at_s: float, heard_at_s: float) -> Running:
        """The same by the source's clock, as far as can be told: it sent the device state at
        `sent_at_s` and hears of this at `heard_at_s`, and what is told here was in between. Where
        the clocks disagree it is as late as can be: that makes no blackout shorter than it was.
        """
        first_s = self.won_at_s or self.resumed_at_s
        if not self.resumed_at_s or sent_at_s <= first_s <= self.resumed_at_s <= heard_at_s:
            return self
        ahead_s = self.resumed_at_s - heard_at_s
        times = ("resumed_at_s", "won_at_s", "loaded_at_s", "fenced_at_s")
        moved = {name: at_s - ahead_s for name in times if (at_s := getattr(self, name))}
        return msgspec.structs.replace(self, **moved)


class Pending(Message, frozen=True, kw_only=True):
    """Answer to Inquire: the other side is still at it.

    `cut_off`: the destination lost its engine, and why; unless its hypervisor has been given
    everything already it will never run the guest. It keeps its copy until the source says more.
    `stuck`: the destination has won the guest, but can't run it yet, and why; in post-copy, why its
    engine ends again and again, so that pages don't come, or, with `filled`, when it has all pages,
    why it can't end the migration. `yielded`: the token
    that it had won, never ran under, and has passed on to the source; its copy is kept until the
    source ends.
    """

    state: str
    cut_off: str = ""
    stuck: str = ""
    yielded: int = 0
    filled: bool = False


class Abort(Message, frozen=True, kw_only=True):
    """`over`: the source has ended, and nobody will ever need the destination's copy."""

    reason: str
    over: bool = False


class Aborted(Message, frozen=True, kw_only=True):
    """The destination's copy is discarded; it never ran, and never will, whatever the record says.

    So a source that reads (destination, n+1) may take the record back by a compare-and-set.
    Said, too, for a migration that the destination knows nothing of: `unknown`. It never heard of
    it, or has forgotten its end; then it may have run, and the record tells: nobody ends that
    hasn't run what it has won, before that is passed back.
    """

    reason: str
    unknown: bool = False


class Filled(Message, frozen=True, kw_only=True):
    """Post-copy: the destination needs nothing from the source any more, whose copy may go.

    `lost`: not because it holds every page, but because its guest has ended, and why.
    """

    token: int
    lost: str = ""
    seconds: float = 0.0
    pages: int = 0
    faults: int = 0
    fault_ms_median: float = 0.0
    fault_ms_max: float = 0.0
    packed_ratio: float = 1.0
    """Bytes of pages to one that they took on the link."""


class Lost(Message, frozen=True, kw_only=True):
    """Post-copy: the source's pages are gone, and with them the guest."""

    reason: str


class Inquire(Message, frozen=True, kw_only=True):
    """`whole`: the source still has all of the guest that it has sent away, and can take it back.

    A destination that has won it, can't run it, and never did, passes the record back then.
    """

    whole: bool = False


class Farewell(Message, frozen=True, kw_only=True):
    pass


SessionMessage = (
    Prepare
    | Prepared
    | Refused
    | Commit
    | Running
    | Pending
    | Abort
    | Aborted
    | Filled
    | Lost
    | Inquire
    | Farewell
)
