"""What a drain's machine hears (events), and what it asks for (commands). Values only."""

from __future__ import annotations

from collections.abc import Mapping

from migrator.model import Migration, NodeState
from migrator.ports import Struct
from node_agent.drain.resources import CancelMode, Move
from node_agent.hooks.model import HookPoint

# --- events --------------------------------------------------------------------------------------


class Event(Struct, frozen=True, kw_only=True):
    pass


class Took(Event, frozen=True, kw_only=True):
    """This agent coordinates now: it made the drain, or took it over from a silent one.

    `unheard`: as in `Tick`.
    """

    unheard: Mapping[str, float] = {}


class Tick(Event, frozen=True, kw_only=True):
    """Time has passed. `unreachable`: the nodes that are silent now.

    `unheard`: those that haven't been listened for long enough to call them so, and for how many
    seconds they will be yet.
    """

    unreachable: frozenset[str] = frozenset()
    unheard: Mapping[str, float] = {}
    others: tuple[Move, ...] = ()
    """Live moves that other drains make now, over the same links."""


class HookDone(Event, frozen=True, kw_only=True):
    point: HookPoint
    error: str | None = None
    """Why the drain must not go on."""


class Looked(Event, frozen=True, kw_only=True):
    """Where a domain is, and the migration that has hold of it, or that the move knows."""

    domain: str
    owner: str | None
    """None: it doesn't run, or isn't defined any more."""
    migration: Migration | None = None


class Accepted(Event, frozen=True, kw_only=True):
    """A migration has begun."""

    domain: str
    migration: Migration


class Refused(Event, frozen=True, kw_only=True):
    """It was not begun, and nothing was changed."""

    domain: str
    reason: str
    elsewhere: bool
    """Another destination might take it; else the domain itself is the reason."""


class NotYet(Event, frozen=True, kw_only=True):
    """It was not begun: its source doesn't know yet whether the destination is silent."""

    domain: str
    reason: str


class Unclear(Event, frozen=True, kw_only=True):
    """Whether what was asked for was done is unknown: it must be looked at."""

    domain: str
    reason: str


class Seen(Event, frozen=True, kw_only=True):
    """A move's migration, as it stands."""

    domain: str
    migration: Migration


class PoweredOff(Event, frozen=True, kw_only=True):
    domain: str
    forced: bool = False
    """It was ended, as it didn't power itself off in time."""


class Booted(Event, frozen=True, kw_only=True):
    domain: str
    node: str


class Failed(Event, frozen=True, kw_only=True):
    """A stop or a start came to nothing. `node`: where it was to be started."""

    domain: str
    error: str
    node: str | None = None


class Found(Event, frozen=True, kw_only=True):
    """A destination for a domain whose first one came to nothing, or that came late."""

    domain: str
    destination: str | None
    """None: it is to be powered off, and stay off."""
    wire_bytes: int


class NoPlace(Event, frozen=True, kw_only=True):
    domain: str
    reason: str


class CancelAsked(Event, frozen=True, kw_only=True):
    mode: CancelMode
    by: str = ""
    """Who wants it; "": that isn't known, or a hook forbids the drain."""


class Checked(Event, frozen=True, kw_only=True):
    """What is on the node: by the ownership records, and by its own list of processes."""

    owned: tuple[str, ...]
    processes: tuple[str, ...]
    incoming: tuple[str, ...] = ()
    """On their way there, by migrations that began before the node was cordoned."""
    boot_id: str = ""


class CheckFailed(Event, frozen=True, kw_only=True):
    """The node, or the store, can't be asked now."""

    reason: str


# --- commands ------------------------------------------------------------------------------------


class Command(Struct, frozen=True, kw_only=True):
    pass


class RunHook(Command, frozen=True, kw_only=True):
    point: HookPoint


class Look(Command, frozen=True, kw_only=True):
    """Find out where it is; answered by Looked."""

    domain: str
    migration: str | None


class Begin(Command, frozen=True, kw_only=True):
    """Migrate; answered by Accepted, Refused or Unclear, then Seen again and again."""

    domain: str
    destination: str
    bandwidth_bytes_per_s: int | None


class Follow(Command, frozen=True, kw_only=True):
    """Report this migration by Seen until it ends."""

    domain: str
    migration: str


class Limit(Command, frozen=True, kw_only=True):
    migration: str
    bandwidth_bytes_per_s: int | None


class CancelMigration(Command, frozen=True, kw_only=True):
    migration: str
    because: str
    """A clause about the drain: what made it do that."""


class PowerOff(Command, frozen=True, kw_only=True):
    """Answered by PoweredOff or Failed."""

    domain: str


class Boot(Command, frozen=True, kw_only=True):
    """Start; answered by Booted or Failed."""

    domain: str
    node: str


class Seek(Command, frozen=True, kw_only=True):
    """Another destination than `tried`; answered by Found, NoPlace or Looked."""

    domain: str
    tried: tuple[str, ...]


class Check(Command, frozen=True, kw_only=True):
    """What is on the node; answered by Checked or CheckFailed."""


class SetCordon(Command, frozen=True, kw_only=True):
    state: NodeState


class Tell(Command, frozen=True, kw_only=True):
    """An entry for the cluster's event log."""

    text: str
    domain: str | None = None
