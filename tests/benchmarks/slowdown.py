"""What tracking dirty pages costs the guest: its own work before, in and after a pre-copy.

The guest rewrites 2,000 pages a second and verifies its memory as fast as it can: that is its work.
The migration is capped so low that copying takes hardly any of the machine's time, and cancelled.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import Final

import msgspec

from migrator.errors import FerryError
from migrator.model import EngineKind, Migration, MigrationState
from node_agent.cli.errors import CliError
from node_agent.resources import MigrationCreate
from tests.benchmarks.cases import Case
from tests.benchmarks.ferry import FerryGuest, api
from tests.benchmarks.results import Run, work_rate
from tests.benchmarks.site import DOMAIN, PLAIN, Client, Sites

CASE: Final = "slow"
REPEATS: Final = 3
ENGINES: Final = {"ferry": EngineKind.PAGED, "ferry-native": EngineKind.NATIVE}
WATCH_S: Final = 4.0
"""For each of the three."""
_PAUSE_S: Final = 0.5
"""For what begins or ends to be over."""
_CANCEL_S: Final = 20.0
_GUEST: Final = Case(
    name=CASE,
    title="work of a guest that rewrites 2,000 pages/s, in a pre-copy",
    memory_mib=512,
    kept_mib=256,
    dirty_pages_per_s=2_000,
    verify_pages_per_s=1_000_000,
    cap_bytes_per_s=8_000_000,
    watch_work=True,
)


def measure_one(sites: Sites, engine: EngineKind) -> Run:
    """One guest. FerryError when it can't be measured."""
    site = sites.of(PLAIN, _GUEST.link_mbit)
    with contextlib.ExitStack() as stack:
        client = Client(site, _GUEST)
        stack.callback(client.close)
        guest = FerryGuest(site, _GUEST)
        stack.callback(guest.close)
        client.wait_ready()
        windows: list[tuple[float, float]] = []

        def watch() -> None:
            time.sleep(_PAUSE_S)
            began_at_s = time.time()
            time.sleep(WATCH_S)
            windows.append((began_at_s, time.time()))

        watch()
        agent = api(site, "n1")
        body = MigrationCreate(
            destination="n2", engine=engine, bandwidth_bytes_per_s=_GUEST.cap_bytes_per_s
        )
        migration = agent.post(f"/v1/domains/{DOMAIN}/migrations", Migration, body)
        path = f"/v1/migrations/{migration.id}"
        _wait(lambda: agent.get(path, Migration).state is MigrationState.PRECOPY, "it begins")
        watch()
        if agent.get(path, Migration).state is not MigrationState.PRECOPY:
            raise FerryError("the pre-copy was over before it was measured")
        agent.delete(path)
        _wait(lambda: agent.get(path, Migration).ended, "it is cancelled")
        watch()
        seen = client.finish()
    rates = [work_rate(seen.work_at_ns, seen.work, *window) for window in windows]
    return Run(
        completed=True,
        corruptions=seen.corruptions,
        work_before=rates[0],
        work_during=rates[1],
        work_after=rates[2],
    )


def _wait(holds: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + _CANCEL_S
    while not holds():
        if time.monotonic() > deadline:
            raise FerryError(f"not within {_CANCEL_S:g} s: {what}")
        time.sleep(0.02)


def measure(sites: Sites, engine: str) -> Run:
    """One run of an engine's; what goes wrong is in it."""
    try:
        return measure_one(sites, ENGINES[engine])
    except (FerryError, CliError, OSError, msgspec.DecodeError) as error:
        return Run(completed=False, error=f"{type(error).__name__}: {error}")
