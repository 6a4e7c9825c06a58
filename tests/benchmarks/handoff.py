"""What the storage adds to the blackout: guests on each driver, moved in turns.

    python -m tests.benchmarks.handoff --drivers directory,nfs,iscsi,nbd --moves 10

Every driver has a guest of its own, which writes fsync'd records to its disk; all are alike but for
that, and move in turns, so that what else the machine does falls on all of them. The table has the
medians of the blackout and of its phases, and what each driver adds to a directory without its
fence (its `adds`). Exit status 1 if a bar was missed.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Final

from migrator.model import Migration
from tests.chaos.cells import DRIVERS, pool_of
from tests.chaos.run import chaos_lab
from tests.integration.cluster.world import Cluster, Guest, Load
from tests.interrupts import interruptible

PHASES: Final = (
    "final pass",
    "deactivate",
    "device state",
    "load",
    "ownership record",
    "fence",
    "activate",
)
BARS_MS: Final = {"directory": 5.0, "nfs": 5.0, "iscsi": 10.0}
_LINE: Final = "{:10} {:>5} {:>8} {:>8}" + " {:>16}" * len(PHASES) + " {:>8}"


class Measured:
    """The moves of one driver's guest; milliseconds."""

    def __init__(self) -> None:
        self.blackouts: list[float] = []
        self.phases: dict[str, list[float]] = {name: [] for name in PHASES}

    def note(self, migration: Migration) -> None:
        assert migration.blackout_ms is not None, migration
        self.blackouts.append(migration.blackout_ms)
        for name in PHASES:
            found = [each.seconds for each in migration.timeline if each.name == name]
            self.phases[name].append(1000.0 * sum(found))

    def without_fence_ms(self) -> float:
        """The median blackout, had the fence taken no time."""
        fences = self.phases["fence"]
        pairs = zip(self.blackouts, fences, strict=True)
        return statistics.median(blackout - fence for blackout, fence in pairs)


def measure(cluster: Cluster, drivers: Sequence[str], moves: int) -> dict[str, Measured]:
    measured = {driver: Measured() for driver in drivers}
    with ExitStack() as stack:
        guests: dict[str, Guest] = {}
        for driver in drivers:
            load = Load(
                dirty_pages_per_s=200, memory_mib=8, disk=True, udp=False, pool=pool_of(driver)
            )
            guests[driver] = stack.enter_context(cluster.guest(f"handoff-{driver}", load=load))
        for number in range(moves + 1):
            for driver in drivers if number % 2 else reversed(drivers):
                guest = guests[driver]
                migration = cluster.move(guest.name, guest.other_node())
                if number:  # The first warms up.
                    measured[driver].note(migration)
        for guest in guests.values():
            guest.verify()
    return measured


def show(measured: dict[str, Measured]) -> int:
    """1 if a bar was missed."""
    print(_LINE.format("DRIVER", "MOVES", "BLACKOUT", "WORST", *PHASES, "ADDS"))
    base = measured.get("directory")
    missed = []
    for driver, its in measured.items():
        phases = [f"{statistics.median(values):.2f}" for values in its.phases.values()]
        blackout = statistics.median(its.blackouts)
        adds = None if base is None else blackout - base.without_fence_ms()
        print(
            _LINE.format(
                driver,
                len(its.blackouts),
                f"{blackout:.1f}",
                f"{max(its.blackouts):.1f}",
                *phases,
                "-" if adds is None else f"{adds:+.1f}",
            )
        )
        if adds is not None and adds > BARS_MS.get(driver, adds):
            missed.append(f"{driver} adds {adds:.1f} ms, more than {BARS_MS[driver]:g}")
    print("; ".join(missed) or "every bar was held")
    return 1 if missed else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--drivers", default=",".join(DRIVERS))
    parser.add_argument("--moves", type=int, default=10, help="a driver; one more warms up")
    options = parser.parse_args()
    drivers = options.drivers.split(",")
    with (
        interruptible("handoff"),
        tempfile.TemporaryDirectory() as holds,
        chaos_lab(drivers, Path(holds)) as cluster,
    ):
        return show(measure(cluster, drivers, options.moves))


if __name__ == "__main__":
    sys.exit(main())
