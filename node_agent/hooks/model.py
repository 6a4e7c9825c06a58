"""Hooks as users define them, and what one call of a hook says and hears.

    before-migration    nothing has moved; a hook may forbid it
    before-switchover   the guest still runs at the source; a hook may take its time, or forbid it
    after-resume        it runs at the destination
    after-migration     the migration is complete, the source's copy is gone
    on-failure          the migration failed or was cancelled; the domain runs where it ran
    node-draining       a node is about to be emptied; a hook may forbid it
    node-drained        it is empty
    node-opened         it takes domains again: an undrain is over, a drain was cancelled, or a
                        drained node was uncordoned

Every call may come twice (after an agent's crash): a hook must bear that. The calls of one
migration carry its id.
"""

from __future__ import annotations

import enum
from typing import Annotated, Final

import msgspec

from migrator.model import END, DomainSelector, Name, Value
from migrator.ports import Struct

HOOKS: Final = "hooks/"
"""Where the store keeps them."""
DEADLINE_S_MAX: Final = 3600.0
HIDDEN: Final = "********"
"""What the API shows in the place of a secret."""


class HookPoint(enum.StrEnum):
    """The moments; see the module."""

    BEFORE_MIGRATION = "before-migration"
    BEFORE_SWITCHOVER = "before-switchover"
    AFTER_RESUME = "after-resume"
    AFTER_MIGRATION = "after-migration"
    ON_FAILURE = "on-failure"
    NODE_DRAINING = "node-draining"
    NODE_DRAINED = "node-drained"
    NODE_OPENED = "node-opened"

    @property
    def may_forbid(self) -> bool:
        """Whether a failure with `cancel` stops what is about to happen."""
        return self in _FORBIDDING


_FORBIDDING: Final = frozenset(
    {HookPoint.BEFORE_MIGRATION, HookPoint.BEFORE_SWITCHOVER, HookPoint.NODE_DRAINING}
)


class HookFailure(enum.StrEnum):
    """What happens when a hook fails, or isn't done by its deadline."""

    GO_ON = "go-on"
    CANCEL = "cancel"
    """Cancel what the hook was asked about, where that is still possible."""


class HaproxyAway(enum.StrEnum):
    """What a server becomes while its guest moves."""

    DRAIN = "drain"
    """No new sessions but persistent ones; those there are go on."""
    MAINT = "maint"
    """No sessions at all."""
    WEIGHT = "weight"
    """Fewer new sessions: `weight_percent`."""


class HaproxyHook(Value, frozen=True, kw_only=True, tag="haproxy", tag_field="driver"):
    """HAProxy's runtime API: takes the guest's server out before the move, and back after it."""

    address: Annotated[
        str,
        msgspec.Meta(
            pattern=r"^(unix:/.+|.+:[0-9]{1,5})" + END,
            description="the runtime API's socket: unix:/PATH or HOST:PORT",
        ),
    ]
    backend: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:-]{1,200}" + END)]
    server: Annotated[str, msgspec.Meta(pattern=r"^[A-Za-z0-9_.:{}-]{1,200}" + END)] = "{domain}"
    """Its name there; {domain} and {node} (the source) are filled in."""
    away: HaproxyAway = HaproxyAway.DRAIN
    weight_percent: Annotated[int, msgspec.Meta(ge=0, le=100)] = 10
    """With `weight`: of the weight in HAProxy's configuration."""
    sessions_below: Annotated[int, msgspec.Meta(ge=1, le=1_000_000)] | None = None
    """Wait until the server has fewer sessions than that; None: don't wait."""
    addresses: dict[Name, str] = msgspec.field(default_factory=dict)
    """After the move: the server's ADDRESS:PORT on each node, where it differs by node."""


class WebhookHook(Value, frozen=True, kw_only=True, tag="webhook", tag_field="driver"):
    """A POST with JSON, signed; repeated until it is acknowledged or the deadline has passed."""

    url: Annotated[
        str, msgspec.Meta(pattern=r"^https?://[^\s]+" + END, description="an http or https URL")
    ]
    secret: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    """Key of the HMAC-SHA256 in X-Ferry-Signature; "": not signed. Never shown again."""
    more_time_s_max: Annotated[float, msgspec.Meta(ge=0, le=DEADLINE_S_MAX)] = 300.0
    """How much time its acknowledgements may ask for altogether, beyond the deadline."""


class CommandHook(Value, frozen=True, kw_only=True, tag="command", tag_field="driver"):
    """A program on the node that carries the move out: argv, no shell, JSON on standard input."""

    argv: Annotated[
        tuple[str, ...], msgspec.Meta(min_length=1, max_length=64, description="program, arguments")
    ]
    """The program's absolute path first."""


HookDriverSettings = HaproxyHook | WebhookHook | CommandHook


class HookSpec(Value, frozen=True, kw_only=True):
    """One hook. Without `domains` and `label` it belongs to the whole cluster."""

    name: Name
    points: Annotated[tuple[HookPoint, ...], msgspec.Meta(min_length=1)]
    action: HookDriverSettings
    domains: tuple[Name, ...] = ()
    """Only for these domains."""
    label: DomainSelector | None = None
    """Only for domains with this label, KEY=VALUE."""
    deadline_s: Annotated[float, msgspec.Meta(gt=0, le=DEADLINE_S_MAX)] = 30.0
    on_failure: HookFailure = HookFailure.GO_ON

    @property
    def shown(self) -> HookSpec:
        """Without its secret."""
        if isinstance(self.action, WebhookHook) and self.action.secret:
            action = msgspec.structs.replace(self.action, secret=HIDDEN)
            return msgspec.structs.replace(self, action=action)
        return self


class HookList(Value, frozen=True, kw_only=True):
    hooks: tuple[HookSpec, ...]


class HookCall(Value, frozen=True, kw_only=True):
    """What a hook is told: the JSON of webhooks and commands."""

    point: HookPoint
    node: str
    """The source of a move, or the node that is drained or opened."""
    domain: str | None = None
    destination: str | None = None
    migration: str | None = None
    addresses: tuple[str, ...] = ()
    """The domain's, of all its NICs."""
    reason: str | None = None
    """On failure: why."""


class HookResult(Value, frozen=True, kw_only=True):
    """How one hook went. `detail` says what was done, or why it failed."""

    hook: str
    point: HookPoint
    succeeded: bool
    seconds: float
    detail: str = ""


class HookReport(Struct, frozen=True, kw_only=True):
    """How all hooks of one moment went."""

    results: tuple[HookResult, ...] = ()
    forbidden: str | None = None
    """Why it must not happen; None: it may."""

    @property
    def sentence(self) -> str:
        """For a timeline."""
        return "; ".join(
            f"{each.hook} {'done' if each.succeeded else 'FAILED'} in {each.seconds:.2f} s"
            + (f" ({each.detail})" if each.detail else "")
            for each in self.results
        )


class HookTest(Value, frozen=True, kw_only=True):
    """Body of a test: the hook is really run, as if this moment had come."""

    point: HookPoint
    domain: Name | None = None
    node: Name | None = None


class HookTestResult(Value, frozen=True, kw_only=True):
    result: HookResult
