"""Where a domain starts or moves that nobody named a node for, and what is said of a wrong name."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Final

import msgspec

from migrator.errors import ConflictError, NoSuchNodeError, NotFoundError, RefusedError
from migrator.model import (
    DomainName,
    MaintenancePolicy,
    NodeName,
    NodeState,
    OwnershipRecord,
    OwnershipState,
)
from node_agent.drain.survey import make_survey
from node_agent.migrations.checks import said_of_destination
from node_agent.nodes import NodeView, not_yet
from node_agent.planner.placement import Placement, place
from node_agent.resources import Domain

DESTINATIONS_MAX: Final = 4
"""That are asked, one after the other, where nobody named one: each may take some seconds."""


async def where_to_start(
    domain: DomainName,
    asked: NodeName | None,
    owned: OwnershipRecord | None,
    here: NodeName,
    views: Mapping[NodeName, NodeView],
    list_domains: Callable[[], Awaitable[Sequence[Domain]]],
) -> NodeName:
    """The node to ask; `asked` for by the user, or None. `here`: that agent's own.

    Of a domain that runs, its owner, which says that, or that it doesn't any more. `views` of this
    moment; empty: nothing is known of who is silent. ConflictError: it may run elsewhere;
    RefusedError: no node can take it.
    """
    last = here if owned is None else NodeName(owned.owner)
    if owned is not None and owned.state is OwnershipState.RUNNING:
        if views and last != here:
            _refuse_silent(owned, asked, views.get(last))
        if asked is not None and asked != last:
            raise ConflictError(f"domain {domain} runs on {last}; it was not started on {asked}")
        return last
    if asked is not None:
        return asked
    return await choose_home(domain, last, views, list_domains) if views else last


async def choose_home(
    domain: DomainName,
    last: NodeName,
    views: Mapping[NodeName, NodeView],
    list_domains: Callable[[], Awaitable[Sequence[Domain]]],
) -> NodeName:
    """`last`, where it ran before; where that is silent, kept free or no more, the node that a
    drain would choose, by the domain's rules, what it needs, and memory.

    Of a domain whose record says that nobody runs it: then a silent node has no process of it.
    RefusedError: `last` can't be asked, and no other node can take it, each for its own reason. One
    that is kept free is its own answer.
    """
    view = views.get(last)
    if view is not None and view.state.admits:
        return last
    found = _place(domain, None, views, await list_domains())
    if domain in found.destinations:
        return NodeName(found.destinations[domain])
    if view is not None and view.state is not NodeState.UNREACHABLE:
        return last
    away = "silent" if view is not None else "no node of the cluster any more"
    (blocker,) = found.blockers
    reason = f"{last}, where it ran last, is {away}, and {blocker.reason}"
    raise RefusedError(f"domain {domain} was not started: {reason}", [reason])


def _refuse_silent(owned: OwnershipRecord, asked: NodeName | None, view: NodeView | None) -> None:
    """ConflictError: its owner runs it, by its record, and can't be asked. `view` of the owner."""
    if view is not None and view.state is not NodeState.UNREACHABLE:
        return
    domain, owner = owned.domain, owned.owner
    how = f"silent for {view.heartbeat_age_s:.0f} s" if view is not None else "removed"
    there = asked if asked is not None and asked != owner else "NODE"
    raise ConflictError(
        f"domain {domain} was not started: {owner}, which ran it last, has been {how} and may run "
        f"it still{not_yet(view)}. `ferry domain takeover {domain} --to {there}` starts it "
        f"elsewhere, once its storage has shut {owner} out (docs/bad-day.md)"
    )


def refuse_unknown_voucher(
    powered_off: NodeName, owned: OwnershipRecord | None, views: Mapping[NodeName, NodeView]
) -> None:
    """NotFoundError: no node of that name is known that somebody could vouch for. One that was
    removed may still be the domain's owner."""
    if powered_off in views or (owned is not None and owned.owner == powered_off):
        return
    known = ", ".join(sorted(views)) or "none"
    raise NotFoundError(f"powered_off: there is no node {powered_off}; known: {known}")


async def choose_destination(
    domain: DomainName,
    source: NodeName,
    views: Mapping[NodeName, NodeView],
    list_domains: Callable[[], Awaitable[Sequence[Domain]]],
    refusals: Mapping[NodeName, str],
) -> NodeName:
    """The node that a drain of `source` would choose: the domain's rules hold where nobody chose.

    `refusals`: what nodes have said that were asked. RefusedError: none can take it, each for its
    own reason.
    """
    found = _place(domain, source, views, await list_domains(), refusals)
    if found.blockers:
        reason = found.blockers[0].reason
        raise RefusedError(f"there is no destination: {reason}", [reason])
    return NodeName(found.destinations[domain])


def _place(
    domain: DomainName,
    source: NodeName | None,
    views: Mapping[NodeName, NodeView],
    domains: Sequence[Domain],
    refusals: Mapping[NodeName, str] = MappingProxyType({}),
) -> Placement:
    """Where a drain would put it, whatever its own policy says of maintenance, which this isn't.

    `source`: the node that it leaves, running; None: it is off, and boots.
    """
    known = {str(name): view for name, view in views.items()}
    survey = make_survey(known, domains, {}, places={domain: source or ""})
    (wanted,) = (each for each in survey.domains if each.name == domain)
    policy = MaintenancePolicy.STOP if source is None else MaintenancePolicy.LIVE
    wanted = msgspec.structs.replace(wanted, policy=policy, restart=True)
    said = {(str(domain), str(node)): reason for node, reason in refusals.items()}
    options = msgspec.structs.replace(survey.options(), forbidden=frozenset(said), refusals=said)
    return place(survey.nodes, survey.domains, [wanted], options)


def note_refusal(node: NodeName, reasons: Sequence[str], refusals: dict[NodeName, str]) -> bool:
    """Whether another destination is to be asked: what speaks against this one, which is noted, is
    its own alone, and there weren't DESTINATIONS_MAX yet.
    """
    its_own = [said for reason in reasons if (said := said_of_destination(node, reason))]
    if not its_own or len(its_own) < len(reasons) or len(refusals) + 1 >= DESTINATIONS_MAX:
        return False
    refusals[node] = "; ".join(its_own)
    return True


def no_such_destination(
    domain: DomainName, node: NodeName, reasons: Sequence[str]
) -> NoSuchNodeError:
    """For a migration that was refused for `reasons`: that there is no such node is the first."""
    told = f"there is no node {node}"
    said = next((reason for reason in reasons if reason.startswith(told)), told)
    return NoSuchNodeError(f"domain {domain} was not migrated: {said}", reasons)
