"""A node that was removed from the cluster: the migrations with it end, and their connections.

Its certificate is good by its dates, and its engines may still be connected: the agents' own
connections are closed by the hub (`PeerHub.recheck`), the page streams end here, with the engines.

    source here           cancelled, as by an operator: the guest runs on here
    destination here      its copy is given up, as if the source had said Abort
    after the handoff     nothing: the guest runs at one place, by its record
    post-copy from here   the guest runs at the removed node, which is given no page more: it waits
                          there for ever, and is to be taken over from its disk, behind a fence
    post-copy to here     goes on. The guest is ours and needs what only its old node has; that had
                          all of its memory a moment ago, so nobody is trusted anew

A restarted agent hears of each removed node again, from the store; nothing of it is journalled.
"""

from __future__ import annotations

from collections.abc import Iterable

from migrator.runner import Runner
from migrator.session import vocabulary as v
from migrator.session.messages import Abort
from migrator.session.source import SourceSession


def part_with(node: str, runners: Iterable[Runner]) -> None:
    """`runners`: those of migrations with that node. A session that is past it ignores this."""
    reason = f"{node} was removed from the cluster"
    for runner in runners:
        if isinstance(runner.session, SourceSession):
            runner.feed(v.CancelRequested(reason=reason))
            runner.feed(v.PeerRemoved(reason=reason))
        else:
            runner.feed(v.Received(message=Abort(reason=reason)))
