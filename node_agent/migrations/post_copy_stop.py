"""Stopping a domain whose guest runs here and lacks pages that only its source has.

    stop ─► the pages are waited for, for as long as a guest is to power itself off
              └─► they came: it is stopped as any other
              └─► they didn't: the guest is ended, the migration has failed, the domain is stopped

A migration keeps other operations off its domain, and in post-copy it ends by itself. But where
its source is gone for good it never does, nobody is left to say so, and the guest waits.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterable
from typing import Final

from migrator.errors import ConflictError
from migrator.model import DomainName, MigrationState
from migrator.runner import Runner
from migrator.session import vocabulary as v
from migrator.session.destination import DestinationSession
from node_agent.domains import DomainService

_END_S: Final = 15.0
"""That takes milliseconds, where the hypervisor's process can be ended."""


async def stop_in_post_copy(
    domain: DomainName, runners: Iterable[Runner], domains: DomainService, *, timeout_s: float
) -> bool:
    """See the module. Whether it was ended: then there is nothing left to stop.

    False also where the domain isn't in post-copy to this node. ConflictError: it doesn't end.
    """
    moving = [each for each in runners if _lacks_pages(each, domain)]
    if not moving:
        return False
    released = asyncio.Event()

    def note(name: DomainName) -> None:
        if name == domain:
            released.set()

    unsubscribe = domains.locks.on_release(note)
    try:
        if await _within(released, timeout_s):
            return False
        for runner in moving:
            reason = "the domain was stopped before its guest had all of its pages"
            runner.feed(v.CancelRequested(reason=reason))
        if not await _within(released, _END_S):
            raise ConflictError(f"domain {domain}: its guest, which lacks pages, doesn't end")
    finally:
        unsubscribe()
    await domains.ownership.settle(domain)
    return True


def _lacks_pages(runner: Runner, domain: DomainName) -> bool:
    session = runner.session
    if not isinstance(session, DestinationSession) or session.domain != domain:
        return False
    if session.state in (MigrationState.HANDOFF, MigrationState.RECOVERING):
        # Its hypervisor may wait for a page, too, and not say that it has resumed the guest.
        return session.pages_missing and session.may_have_run
    return session.state is MigrationState.POSTCOPY


async def _within(event: asyncio.Event, seconds: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
