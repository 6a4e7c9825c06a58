"""`make bench`: every engine moves every case's guest, in alternating order, in one run.

    python -m tests.benchmarks.run [--cases 1,2] [--engines ferry,qemu-10ms] [--repeats N] [--quick]

Prints each run as it ends, then the table and the bars; writes build/bench.json,
build/bench-runs.json (each run) and plots, anew after each case. Ctrl-C keeps what was measured; so
does the end of the time that it may take. Needs root. docs/benchmarks.md tells how to read it.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from deploy.guest.build import build_guest, default_cache_directory
from migrator.errors import FerryError
from node_agent.cli.errors import CliError
from tests import interrupts
from tests.benchmarks import (
    bars,
    cases,
    drain,
    engines,
    ferry,
    newer_qemu,
    output,
    planning,
    plots,
    raw_speed,
    slowdown,
)
from tests.benchmarks.cases import MIB, Case
from tests.benchmarks.engines import Engine
from tests.benchmarks.results import Run, with_client, with_work
from tests.benchmarks.schedule import Budget, Turn, turns
from tests.benchmarks.site import ROOT, Client, Sites

Runs = dict[tuple[str, str], list[Run]]

REPEATS: Final = 5
QUICK_REPEATS: Final = 2
QUICK_CASES: Final = "1,2,3"
MINUTES: Final = 90.0
AFTER_S: Final = 0.7
_NODE_MEMORY_BYTES: Final = 16 * 1024 * MIB
_OTHERS: Final = {
    raw_speed.CASE: (raw_speed.REPEATS, [*raw_speed.ENGINES]),
    slowdown.CASE: (slowdown.REPEATS, [*slowdown.ENGINES]),
    **{each: (drain.REPEATS, [*drain.ENGINES]) for each in drain.LINKS_MBIT},
    planning.CASE: (planning.REPEATS, [*planning.ENGINES]),
}
"""Cases that are no migration of one guest: how often at most, and whose."""


def measure(sites: Sites, case: Case, engine: Engine) -> Run:
    """One run, from a guest's start to its end. Raises FerryError when it can't even begin."""
    site = sites.of(engine.flavour, case.link_mbit)
    spec = ferry.define(site, case).spec
    with contextlib.ExitStack() as stack:
        client = Client(site, case)
        stack.callback(client.close)
        guest = engine.start(site, case, spec)
        stack.callback(guest.close)
        client.wait_ready()
        time.sleep(case.settle_s)
        asked_at_s = time.time()
        run = guest.migrate()
        time.sleep(AFTER_S)
        ended_at_s = time.time()
        observed = client.finish()
    run = msgspec.structs.replace(run, load_average=os.getloadavg()[0])
    run = with_work(run, observed.work_at_ns, observed.work, asked_at_s, case.settle_s)
    return with_client(run, observed.arrivals_ns, ended_at_s, observed.corruptions)


class Bench:
    """The runs that were made, and how one is."""

    def __init__(self, sites: Sites, folder: Path, chosen: dict[str, Engine], runs: Runs) -> None:
        self.runs = runs
        self._sites = sites
        self._folder = folder
        self._chosen = chosen

    def plan(self, names: Sequence[str], repeats: int) -> list[list[Turn]]:
        """The turns of each case."""
        found: list[list[Turn]] = []
        for name in names:
            if name in _OTHERS:
                most, known = _OTHERS[name]
                always = (raw_speed.PLAIN, raw_speed.PLAIN_COLD, raw_speed.PREFAULTED)
                takers = [each for each in known if each in (*self._chosen, *always)]
                found.append(list(turns(name, takers, min(repeats, most))))
                continue
            (case,) = cases.select(name)
            takers = [each for each, engine in self._chosen.items() if engine.takes(case, each)]
            repeats_here = min(repeats, case.repeats_max)
            found.append(list(turns(name, takers, repeats_here, case.judged)))
        return [each for each in found if each]

    def run(self, turn: Turn) -> Run:
        """What goes wrong is in the result."""
        if turn.case == raw_speed.CASE:
            return raw_speed.measure(self._folder, turn.engine, raw_speed.SIZE_BYTES)
        if turn.case == slowdown.CASE:
            return slowdown.measure(self._sites, turn.engine)
        if turn.case in drain.LINKS_MBIT:
            return drain.measure(self._sites.image, turn.case)
        if turn.case == planning.CASE:
            return planning.measure()
        (case,) = cases.select(turn.case)
        try:
            return measure(self._sites, case, self._chosen[turn.engine])
        except (FerryError, CliError, OSError) as error:
            return Run(completed=False, error=f"{type(error).__name__}: {error}")

    def work(
        self, plan: Sequence[Sequence[Turn]], budget: Budget, keep: Callable[[], None]
    ) -> bool:
        """All turns, or as many as the budget has; False: not all. `keep` after each case."""
        for turns_of_case in plan:
            for number, turn in enumerate(turns_of_case):
                if not budget.begin(time.monotonic()):
                    return False
                if number == 0:  # What `--add` kept of this case is measured anew.
                    for each in turns_of_case:
                        self.runs.pop((each.case, each.engine), None)
                run = self.run(turn)
                self.runs.setdefault((turn.case, turn.engine), []).append(run)
                output.say_run(budget.where(time.monotonic()), turn.case, turn.engine, run)
            keep()
        return True


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__.partition("\n")[0])
    known = [*(case.name for case in cases.CASES), *_OTHERS]
    parser.add_argument("--cases", help=f"comma-separated, of {', '.join(known)} (default: all)")
    parser.add_argument("--engines", help=f"comma-separated, of {', '.join(engines.ENGINES)}")
    parser.add_argument("--repeats", type=int, help=f"of each run (default: {REPEATS})")
    parser.add_argument("--quick", action="store_true", help="two repeats, the short cases")
    parser.add_argument("--qemu", help="a newer Debian's QEMU for all engines, like trixie")
    parser.add_argument(
        "--minutes", type=float, default=MINUTES, help=f"at most (default: {MINUTES:g})"
    )
    parser.add_argument(
        "--add", action="store_true", help="keep what earlier runs measured of other cases"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder of the results")
    return parser.parse_args()


def _select(options: argparse.Namespace) -> list[str]:
    """The names of the cases. Raises ValueError: none such."""
    if options.cases is None and options.quick:
        options.cases = QUICK_CASES
    if options.cases is None:
        return [*(case.name for case in cases.CASES), *_OTHERS]
    names = [name for name in options.cases.split(",") if name]
    migrations = cases.select(",".join(name for name in names if name not in _OTHERS))
    return [*(case.name for case in migrations), *(name for name in names if name in _OTHERS)]


def _use_qemu(suite: str | None, cache_directory: Path) -> str:
    """Put that QEMU first in everybody's PATH; its version. NewerQemuError."""
    if suite is not None:
        print(f"bench: QEMU of {suite}; the first time it is downloaded", flush=True)
        folder = newer_qemu.install(suite, cache_directory)
        os.environ["PATH"] = f"{folder}:{os.environ['PATH']}"
        return newer_qemu.version(folder)
    found = shutil.which(newer_qemu.BINARY)
    return newer_qemu.version(Path(found).parent) if found else ""


def main() -> int:
    options = _parse()
    try:
        names = _select(options)
        chosen = engines.select(options.engines)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if os.geteuid() != 0:
        print("bench: root is needed, for namespaces and taps", file=sys.stderr)
        return 2
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    interrupts.end_as_by_ctrl_c()
    options.output.mkdir(parents=True, exist_ok=True)
    runs: Runs = output.read(options.output) if options.add else {}
    status = 0
    try:
        with contextlib.ExitStack() as stack:
            status = _measure(options, names, chosen, repeats, runs, stack)
    except FerryError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted; what was measured is kept", file=sys.stderr)
        status = interrupts.EXIT_STATUS
    output.write(options.output, runs, bars.judge(runs))
    output.show(runs, bars.judge(runs), options.output)
    for path in plots.draw(options.output, runs):
        print(f"         {path}")
    return status


def _measure(
    options: argparse.Namespace,
    names: Sequence[str],
    chosen: dict[str, Engine],
    repeats: int,
    runs: Runs,
    stack: contextlib.ExitStack,
) -> int:
    """All of it; fills `runs`. FerryError: it can't begin."""
    qemu = _use_qemu(options.qemu, default_cache_directory())
    print(f"bench: {qemu}; {os.cpu_count()} cores; load {os.getloadavg()[0]:.1f}", flush=True)
    folder = Path(tempfile.mkdtemp(prefix="fb-", dir="/tmp"))
    stack.callback(shutil.rmtree, folder, ignore_errors=True)
    os.environ["FERRY_LAB_ROOT"] = str(folder / "labs")
    image = build_guest(default_cache_directory())
    sites = Sites(image, folder, node_memory_bytes=_NODE_MEMORY_BYTES)
    stack.callback(sites.close)
    bench = Bench(sites, folder, chosen, runs)
    plan = bench.plan(names, repeats)
    budget = Budget(options.minutes * 60.0, sum(map(len, plan)), time.monotonic())

    def keep() -> None:
        output.write(options.output, runs, bars.judge(runs))

    if not bench.work(plan, budget, keep):
        print(f"bench: {options.minutes:g} minutes are over: the rest wasn't measured")
    return 0


if __name__ == "__main__":
    sys.exit(main())
