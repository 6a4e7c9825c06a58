"""`make bench`: every engine moves every case's guest, in alternating order, in one run.

    python -m tests.benchmarks.run [--cases 1,2] [--engines ferry,qemu-10ms] [--repeats N] [--quick]

Prints the table; writes build/bench.json, build/bench-runs.json (each run) and plots. Needs root.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from types import FrameType
from typing import Final

import msgspec

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from migrator.errors import FerryError
from migrator.model import DomainSpec
from tests.benchmarks import bars, cases, engines, ferry, output, plots, raw_speed
from tests.benchmarks.cases import MIB, Case
from tests.benchmarks.engines import Engine
from tests.benchmarks.results import Run, with_client
from tests.benchmarks.site import ROOT, Client, Site

Runs = dict[tuple[str, str], list[Run]]

REPEATS: Final = 5
QUICK_REPEATS: Final = 2
QUICK_CASES: Final = "1,2,3"
RAW_REPEATS: Final = 3
SETTLE_S: Final = 1.0
"""Between the guest's first packet and the migration: its boot's last work is done then."""
AFTER_S: Final = 0.7
_NODE_MEMORY_BYTES: Final = 16 * 1024 * MIB


def measure(site: Site, case: Case, engine: Engine, spec: DomainSpec) -> Run:
    """One run, from a guest's start to its end. Raises FerryError when it can't even begin."""
    with contextlib.ExitStack() as stack:
        client = Client(site, case)
        stack.callback(client.close)
        guest = engine.start(site, case, spec)
        stack.callback(guest.close)
        client.wait_ready()
        time.sleep(SETTLE_S)
        run = guest.migrate()
        time.sleep(AFTER_S)
        ended_at_s = time.time()
        observed = client.finish()
    run = msgspec.structs.replace(run, load_average=os.getloadavg()[0])
    return with_client(run, observed.arrivals_ns, ended_at_s, observed.corruptions)


def measure_case(
    site: Site, case: Case, chosen: dict[str, Engine], repeats: int, runs: Runs
) -> None:
    """All engines, alternating; the order is turned round with each repeat. Fills `runs`."""
    lab.up(site.lab_name, link_mbit=case.link_mbit)
    spec = ferry.define(site, case).spec
    for name in chosen:
        runs.pop((case.name, name), None)
    for repeat in range(min(repeats, case.repeats_max)):
        names = [name for name, engine in chosen.items() if engine.takes(case, name)]
        for name in names if repeat % 2 == 0 else reversed(names):
            try:
                run = measure(site, case, chosen[name], spec)
            except (FerryError, OSError) as error:
                run = Run(completed=False, error=f"{type(error).__name__}: {error}")
            runs.setdefault((case.name, name), []).append(run)
            output.say_run(case.name, name, run)


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="make bench", description=__doc__)
    parser.add_argument("--cases", help="comma-separated, like 1,2 (default: all)")
    parser.add_argument("--engines", help=f"comma-separated, of {', '.join(engines.ENGINES)}")
    parser.add_argument("--repeats", type=int, help=f"of each run (default: {REPEATS})")
    parser.add_argument("--quick", action="store_true", help="two repeats, the short cases")
    parser.add_argument("--qemu", help="a newer QEMU, like trixie, for both sides")
    parser.add_argument(
        "--add", action="store_true", help="keep what earlier runs measured of other cases"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "build", help="folder of the results")
    return parser.parse_args()


def _select(options: argparse.Namespace) -> tuple[list[Case], bool]:
    """The cases, and whether the engine's raw speed is measured. Raises ValueError: none such."""
    if options.cases is None:
        if options.quick:
            return cases.select(QUICK_CASES), False
        return cases.select(None), True
    names = options.cases.split(",")
    rest = [name for name in names if name != raw_speed.CASE]
    return cases.select(",".join(rest)), raw_speed.CASE in names


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> int:
    options = _parse()
    try:
        chosen_cases, raw = _select(options)
        chosen = engines.select(options.engines)
    except ValueError as error:
        print(f"bench: {error}", file=sys.stderr)
        return 2
    if options.qemu:
        print(
            f"bench: QEMU={options.qemu} can't be measured yet: only the installed QEMU can",
            file=sys.stderr,
        )
        return 2
    repeats = options.repeats or (QUICK_REPEATS if options.quick else REPEATS)
    signal.signal(signal.SIGTERM, _interrupt)
    options.output.mkdir(parents=True, exist_ok=True)
    runs: Runs = output.read(options.output) if options.add else {}
    with contextlib.ExitStack() as stack:
        folder = Path(tempfile.mkdtemp(prefix="fb-", dir="/tmp"))
        stack.callback(shutil.rmtree, folder, ignore_errors=True)
        os.environ["FERRY_LAB_ROOT"] = str(folder / "labs")
        image = build_guest(default_cache_directory())
        site = Site(f"bench-{os.getpid()}", image, folder)
        stack.callback(lab.down, site.lab_name)
        stack.enter_context(site.resources)
        try:
            lab.up(site.lab_name, nodes=2, node_memory_bytes=_NODE_MEMORY_BYTES)
            for case in chosen_cases:
                measure_case(site, case, chosen, repeats, runs)
                output.write(options.output, runs, bars.judge(runs))
            if raw:
                runs |= raw_speed.measure(folder, raw_speed.SIZE_BYTES, min(repeats, RAW_REPEATS))
                output.write(options.output, runs, bars.judge(runs))
        except FerryError as error:
            print(f"bench: {error}", file=sys.stderr)
            return 1
        except KeyboardInterrupt:
            # What was measured until then is kept.
            output.write(options.output, runs, bars.judge(runs))
            print("bench: interrupted", file=sys.stderr)
            return 130
    output.show(runs, bars.judge(runs), options.output)
    for path in plots.draw(options.output, runs):
        print(f"         {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
