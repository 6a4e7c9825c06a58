"""The table: fault x step x driver, outcome, time to heal.

    python -m tests.chaos.run                                    everything, three times: hours
    python -m tests.chaos.run --drivers iscsi --steps fence,resume --faults 'kill *' --repeats 1
    python -m tests.chaos.run --list

Exit status 1 if a promise was broken.
"""

from __future__ import annotations

import argparse
import fnmatch
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final

import pytest

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from deploy.lab.storage import check_kinds
from migrator import hold_points
from migrator.errors import FerryError, InvalidRequest
from node_agent import domain_restart
from tests.chaos import cells, judge
from tests.chaos.cells import DRIVERS, STEPS, Cell, Result, run_cell
from tests.chaos.faults import FAULTS
from tests.integration.cluster.world import Cluster
from tests.interrupts import interruptible

NODE_MEMORY_BYTES: Final = 1024**3
REMOVAL_S: Final = 60.0
"""By then a storage server has noticed that a client which was cut off is gone."""
_LINE: Final = "{:10} {:11} {:28} {:3} {:12} {:>7}  {}"


def every_cell(drivers: Sequence[str], steps: str, faults: str) -> Iterator[Cell]:
    """Those that the patterns (comma-separated, with wildcards) select and that make sense."""
    for driver in drivers:
        for step in STEPS:
            for fault in FAULTS:
                selected = _matches(step.name, steps) and _matches(fault.name, faults)
                if selected and not (fault.needs_server and driver == "directory"):
                    yield Cell(driver, step, fault)


def _matches(name: str, patterns: str) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))


def known_drivers(wanted: str) -> list[str]:
    """InvalidRequest names one that there isn't; `all` is those that the lab has servers for."""
    if wanted != "all":
        for driver in wanted.split(","):
            if driver != "directory":
                check_kinds([driver])
        return wanted.split(",")
    found = ["directory"]
    for driver in DRIVERS[1:]:
        try:
            found += check_kinds([driver])
        except InvalidRequest:
            print(f"(the lab has no {driver} yet: left out)")
    return found


@contextmanager
def chaos_lab(drivers: Sequence[str], holds: Path) -> Iterator[Cluster]:
    name = f"chaos{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(hold_points.VARIABLE, str(holds))
        try:
            kinds = [driver for driver in drivers if driver != "directory"]
            lab.up(name, nodes=3, node_memory_bytes=NODE_MEMORY_BYTES, storage_kinds=kinds)
            image = build_guest(default_cache_directory())
            yield Cluster(lab.load(name).plan, image, holds)
        finally:
            lab.down(name)


def run(chosen: Sequence[Cell], repeats: int) -> list[Result]:
    drivers = list(dict.fromkeys(cell.driver for cell in chosen))
    results: list[Result] = []
    print(_LINE.format("DRIVER", "STEP", "FAULT", "RUN", "RUNS AT", "HEALED", "REMARK"))
    with tempfile.TemporaryDirectory() as holds, chaos_lab(drivers, Path(holds)) as cluster:
        for driver in drivers:
            mine = [cell for cell in chosen if cell.driver == driver]
            results += run_driver(cluster, driver, mine, repeats)
    return results


def run_driver(cluster: Cluster, driver: str, chosen: Sequence[Cell], repeats: int) -> list[Result]:
    """All cells of a driver, on as few guests as that takes; the disk of each at its end."""
    results: list[Result] = []
    runs = [(cell, number) for cell in chosen for number in range(1, repeats + 1)]
    guests = 0
    while len(results) < len(runs):
        guests += 1
        results += run_guest(cluster, f"chaos-{driver}-{guests}", runs[len(results) :])
    return results


def run_guest(cluster: Cluster, name: str, runs: Sequence[tuple[Cell, int]]) -> list[Result]:
    """The runs, up to the one after which Ferry wouldn't start this guest again."""
    results: list[Result] = []
    driver = runs[0][0].driver
    with cluster.guest(name, load=cells.load(driver), removal_s=REMOVAL_S) as guest:
        for cell, number in runs:
            home = guest.node
            result = run_cell(cluster, guest, cell)
            results.append(result)
            show(result, number)
            if result.verdict is not None and result.verdict.violations:
                cells.revive(cluster, guest, home)
            if sum(each.restarted for each in results) == domain_restart.TRIES:
                break
        acknowledged = guest.status().disk_last_sequence
        problem = cells.check_at_storage(cluster, guest, driver, acknowledged)
        print(f"{driver}: the disk, read at the storage: {problem or 'every record is there'}")
        if problem:
            verdict = judge.Verdict("disk damaged", 0.0, (problem,))
            results[-1] = Result(results[-1].cell, verdict)
            show(results[-1], runs[len(results) - 1][1])
    return results


def show(result: Result, number: int) -> None:
    cell, verdict = result.cell, result.verdict
    if verdict is None:
        outcome, healed, remark = "-", "-", result.remark
    else:
        outcome, healed = verdict.outcome, f"{verdict.heal_s:.1f} s"
        remark = ""
        if verdict.violations:
            remark = "VIOLATION: " + "; ".join(verdict.violations) + f" ({result.remark})"
        elif verdict.heal_s > judge.PROMISE_S:
            remark = f"SLOW; {result.remark}"
    print(
        _LINE.format(cell.driver, cell.step.name, cell.fault.name, number, outcome, healed, remark),
        flush=True,
    )


def summarise(results: Sequence[Result], seconds: float) -> int:
    judged = [result.verdict for result in results if result.verdict is not None]
    broken = [verdict for verdict in judged if verdict.violations]
    slow = [verdict for verdict in judged if verdict.heal_s > judge.PROMISE_S]
    worst = max((verdict.heal_s for verdict in judged), default=0.0)
    print()
    for driver in dict.fromkeys(result.cell.driver for result in results):
        healed = [
            result.verdict.heal_s
            for result in results
            if result.cell.driver == driver and result.verdict is not None
        ]
        if healed:
            print(
                f"{driver}: {len(healed)} runs, healed after {statistics.median(healed):.1f} s "
                f"(median), {max(healed):.1f} s at most"
            )
    print(
        f"{len(judged)} runs in {seconds:.0f} s: {len(broken)} violations; healed within "
        f"{worst:.1f} s after the fault, {len(slow)} times later than {judge.PROMISE_S:g} s"
    )
    return 1 if broken else 0


def main() -> int:
    parser = argparse.ArgumentParser(prog="make chaos", description=__doc__)
    parser.add_argument("--drivers", default="all", help="all, or: directory,nfs,iscsi,nbd")
    parser.add_argument("--steps", default="*", help="patterns, comma-separated")
    parser.add_argument("--faults", default="*", help="patterns, comma-separated")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--list", action="store_true", help="the cells, and nothing else")
    options = parser.parse_args()
    try:
        chosen = list(every_cell(known_drivers(options.drivers), options.steps, options.faults))
        if not chosen:
            names = ", ".join(step.name for step in STEPS)
            faults = ", ".join(fault.name for fault in FAULTS)
            parser.error(f"nothing selected; steps: {names}; faults: {faults}")
        if options.repeats < 1:
            parser.error("--repeats must be 1 or more")
        if options.list:
            print("\n".join(cell.name for cell in chosen))
            return 0
        began = time.monotonic()
        with interruptible("chaos"):
            results = run(chosen, options.repeats)
        return summarise(results, time.monotonic() - began)
    except FerryError as error:
        print(f"chaos: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
