"""Agents that break a rule on purpose in what they do, and what they note (see `mutants`)."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from migrator.journal_entry import JournalEntry
from migrator.model import DomainName, DomainSpec, OwnershipRecord
from migrator.session import messages as m
from migrator.session import vocabulary as v
from node_agent.restart_notes import RestartNotes
from tests.simulation.agent import Agent
from tests.simulation.node import Node
from tests.simulation.side import Envelope, Sessions, Side


class AdmitsEveryPrepare(Node):
    """A late Prepare, of a migration that has ended, is taken for a new one."""

    found_as: ClassVar = ("4:",)
    first_seed: ClassVar = 659

    async def _admit(
        self, agent: Agent, side: Side, envelope: Envelope, prepare: m.Prepare
    ) -> None:
        await agent.locks.claim_for_migration(side.domain.name, side.migration_id)
        side.begin(self.cluster.sessions.destination(side, prepare))
        side.feed(v.Begin())


class ForgetsCancels(Sessions):
    """After a restart nobody knows that somebody asked for what is being undone."""

    found_as: ClassVar = ("cancel:",)
    first_seed: ClassVar = 204

    def journalled(self, side: Side, entry: JournalEntry) -> JournalEntry:
        return msgspec.structs.replace(entry, cancel=None)


class LeavesStaleCopies(Node):
    """A node that finds that its domain was taken over lets its copy be."""

    found_as: ClassVar = ("1:", "2:", "3:", "5:")
    first_seed: ClassVar = 16

    def boot_up(self) -> None:
        super().boot_up()
        assert self.agent is not None

        async def nothing(*_: object) -> None:
            pass

        self.agent.domains.ownership._end_copy = nothing  # type: ignore[method-assign,assignment]


class TakesOverWithoutAFence(Node):
    """The record was won, so the silent node's guest will stand still."""

    found_as: ClassVar = ("3:",)

    def boot_up(self) -> None:
        super().boot_up()
        assert self.agent is not None
        for pool in self.agent.pools.values():
            pool.forget_fences = True


class TakesOverAsAHandoffWould(Node):
    """The record of a takeover looks like the outcome of the handoff that the silent node began."""

    found_as: ClassVar = ("1:", "2:")
    mix: ClassVar = "takeovers"
    first_seed: ClassVar = 162

    def boot_up(self) -> None:
        super().boot_up()
        assert self.agent is not None
        ownership = self.agent.domains.ownership

        async def take_over(
            domain: DomainName, spec: DomainSpec, owned: OwnershipRecord, vouched: object = ()
        ) -> OwnershipRecord:
            await ownership.end_stale(domain)
            return await ownership._win(domain, spec, owned)

        ownership.take_over = take_over  # type: ignore[method-assign]


class TakesBeforeItLooks(Node):
    """A start takes the record of a domain that runs elsewhere."""

    found_as: ClassVar = ("1:",)

    def boot_up(self) -> None:
        super().boot_up()
        assert self.agent is not None
        ownership = self.agent.domains.ownership

        async def take(domain: DomainName, spec: DomainSpec) -> OwnershipRecord:
            return await ownership._win(domain, spec, await ownership._ownership.read(domain))

        ownership.take = take  # type: ignore[method-assign]


class ForgetsWhatItLost(Node):
    """What was to be started again is known to nobody but the agent that noticed, in its boot."""

    found_as: ClassVar = ("4:",)

    def boot_up(self) -> None:
        self.restarts = RestartNotes(boot_id=self.boot_id)
        super().boot_up()
