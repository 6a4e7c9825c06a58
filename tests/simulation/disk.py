"""A node's local disk, where its journal is: it may hang, and be back later.

As the production journal, one thread writes, in order. While it hangs, the first write is in the
disk's hands: it is written once the disk is back, whether or not anybody waits for that any more.
What stands behind it is written then, too, unless it was given up before.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from migrator.journal_entry import JournalEntry
from migrator.model import Role

if TYPE_CHECKING:
    from tests.simulation.node import Node
    from tests.simulation.side import Side


@dataclass(slots=True, eq=False)
class Write:
    """One that hangs, or waits for one that does."""

    entry: JournalEntry
    durable: bool
    done: Callable[[], None]
    """Called once it is written, if it wasn't given up."""
    given_up: bool = False


class Disk:
    """See the module."""

    def __init__(self, node: Node) -> None:
        self._node = node
        self._world = node.world
        self._hung: deque[Write] = deque()
        self.hangs = False

    def begin(self) -> bool:
        """A write begins: whether it hangs. It may be the first that does."""
        world = self._world
        if not self.hangs and world.chance(world.faults.disk_hang):
            healed_at_s = world.started_at_s + world.faults.heal_at_s
            self.hangs = True
            world.log("{}: its disk hangs", self._node.name)
            world.after(
                min(world.delay(world.faults.disk_hang_s_max), healed_at_s - world.now_s),
                self._back,
            )
        return self.hangs

    def write(self, entry: JournalEntry, durable: bool, done: Callable[[], None]) -> Write:
        """One that hangs."""
        write = Write(entry, durable, done)
        self._hung.append(write)
        return write

    def _back(self) -> None:
        self._world.log("{}: its disk is back", self._node.name)
        self.hangs = False
        in_its_hands = True
        while self._hung and not self.hangs:
            write = self._hung.popleft()
            if in_its_hands or not write.given_up:
                self._land(write, durable=write.durable)
            if not write.given_up:
                write.done()
            in_its_hands = False

    def _land(self, write: Write, *, durable: bool) -> None:
        self._node.journal[write.entry.migration_id] = write.entry
        if durable:
            self._node.durable[write.entry.migration_id] = write.entry

    def agent_died(self) -> None:
        """With the host, maybe. What is in the disk's hands may be written, may be durable then."""
        chance = self._world.random.random
        if self._hung and chance() < 0.5:
            self._land(self._hung[0], durable=self._hung[0].durable and chance() < 0.5)
        self._hung.clear()


def says_resumed(entry: JournalEntry, side: Side) -> bool:
    """The record does, in place of a source's journal: its guest may have been resumed."""
    record = side.domain.record
    if record is None or entry.role is not Role.SOURCE or record.owner != side.node.name:
        return False
    return record.token in (entry.token + 4, entry.token + 5)
