"""Ferry through its real API: one POST to the source's agent in the lab."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import time
from typing import Final

import msgspec

from migrator.errors import FerryError
from migrator.model import EngineKind, Migration, MigrationMode, MigrationState, PassKind
from node_agent.cli.client import ApiClient
from node_agent.cli.errors import CliError
from node_agent.loop_monitor import NOTED_MS
from node_agent.resources import Domain, Health, MigrationCreate, StartRequest
from tests.benchmarks.cases import PAGE_BYTES, Case
from tests.benchmarks.native import WIRE_PER_PAYLOAD
from tests.benchmarks.results import Run
from tests.benchmarks.site import DOMAIN, ROOT, Site

_POLL_S: Final = 0.05
_SETUP_ALLOWANCE_S: Final = 30.0


def api(site: Site, node: str) -> ApiClient:
    return ApiClient(f"unix:{site.plan.node(node).api_socket}")


def define(site: Site, case: Case) -> Domain:
    """The case's domain, defined anew; its spec is pinned to a machine type then."""
    client = api(site, "n1")
    with contextlib.suppress(CliError):
        client.post(f"/v1/domains/{DOMAIN}/stop", Domain, {"timeout_s": 0})
    with contextlib.suppress(CliError):
        client.delete(f"/v1/domains/{DOMAIN}")
    return client.post("/v1/domains", Domain, site.spec(case))


class FerryGuest:
    """The guest as a domain, started on n1."""

    def __init__(
        self,
        site: Site,
        case: Case,
        *,
        by_command: bool = False,
        mode: MigrationMode = MigrationMode.PRECOPY,
        engine: EngineKind = EngineKind.PAGED,
    ) -> None:
        """`by_command`: migrated by `ferry migrate`, as a user does, rather than by one POST."""
        self._site, self._case, self._by_command = site, case, by_command
        self._mode, self._engine = mode, engine
        define(site, case)
        api(site, "n1").post(f"/v1/domains/{DOMAIN}/start", Domain, StartRequest(node="n1"))

    def close(self) -> None:
        client = api(self._site, "n1")
        with contextlib.suppress(CliError):
            client.post(f"/v1/domains/{DOMAIN}/stop", Domain, {"timeout_s": 0})

    def migrate(self) -> Run:
        """One migration from n1 to n2. What goes wrong is in the result."""
        asked_at_s = time.time()
        try:
            migration = self._command() if self._by_command else self._post()
        except FerryError as error:
            return Run(completed=False, error=str(error))
        ended_at_s = time.time() if self._by_command else migration.ended_at_s or time.time()
        run = _run(self._case, migration, ended_at_s - asked_at_s)
        return msgspec.structs.replace(run, loop_blocked_ms=self._loop_blocked_ms(asked_at_s))

    def _post(self) -> Migration:
        """By the API, to the end. Raises FerryError."""
        case, client = self._case, api(self._site, "n1")
        body = MigrationCreate(
            destination="n2",
            timeout_s=case.timeout_s,
            bandwidth_bytes_per_s=case.cap_bytes_per_s,
            mode=self._mode,
            engine=self._engine,
        )
        deadline = time.monotonic() + case.timeout_s + _SETUP_ALLOWANCE_S
        migration = client.post(f"/v1/domains/{DOMAIN}/migrations", Migration, body)
        while not migration.ended:
            if time.monotonic() > deadline:
                raise FerryError(f"migration {migration.id} doesn't end")
            time.sleep(_POLL_S)
            migration = client.get(f"/v1/migrations/{migration.id}", Migration)
        return migration

    def _command(self) -> Migration:
        """By the command line, to its end. Raises FerryError."""
        client = api(self._site, "n1")
        words = ["--api", client.address, "--json", "migrate", DOMAIN, "--to", "n2"]
        try:
            done = subprocess.run(
                [sys.executable, "-m", "node_agent.cli.main", *words],
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=self._case.timeout_s + _SETUP_ALLOWANCE_S,
                check=False,
            )
            return msgspec.json.decode(done.stdout, type=Migration)
        except subprocess.TimeoutExpired:
            raise FerryError("ferry migrate doesn't end") from None
        except msgspec.DecodeError:
            raise FerryError(f"ferry migrate: {done.stderr.decode(errors='replace')}") from None

    def _loop_blocked_ms(self, since_s: float) -> float:
        """The longest block of either agent's event loop since then."""
        longest = 0.0
        for node in ("n1", "n2"):
            health = api(self._site, node).get("/healthz", Health)
            blocks = [each.milliseconds for each in health.loop_blocks if each.ended_at_s > since_s]
            longest = max([longest, min(health.loop_blocked_ms_max, NOTED_MS), *blocks])
        return longest


def _run(case: Case, migration: Migration, total_s: float) -> Run:
    first = next((each for each in migration.iterations if each.kind is PassKind.FIRST), None)
    share = None
    if first is not None and first.seconds > 0 and case.link_bytes_per_s:
        share = first.bytes_sent * WIRE_PER_PAYLOAD / first.seconds / case.link_bytes_per_s
    phases = [(phase.name, phase.seconds * 1e3) for phase in migration.timeline]
    stopped = [
        each.started_at_s + each.seconds for each in migration.timeline if each.name == "stop"
    ]
    passes = migration.iterations
    post_copy = [
        (each.started_at_s, each.started_at_s + each.seconds)
        for each in migration.timeline
        if each.name == MigrationState.POSTCOPY.value
    ]
    setup_s = sum(each.seconds for each in migration.timeline if each.name == "setup")
    return Run(
        completed=migration.state is MigrationState.COMPLETED,
        error=migration.error,
        blackout_ms=migration.blackout_ms,
        total_s=total_s,
        transfer_s=None if migration.total_s is None else migration.total_s - setup_s,
        bytes_sent=migration.progress.bytes_sent,
        line_rate_share=share,
        stopped_at_s=stopped[0] if stopped else None,
        timeline=tuple(phases),
        passes=tuple(passes),
        dirtied_bytes=sum(each.pending_pages for each in passes) * PAGE_BYTES,
        uncompressed_bytes=sum(max(each.bytes_sent, each.payload_bytes) for each in passes),
        compressors=() if first is None else first.compressors,
        post_copy_at_s=post_copy[0] if post_copy else None,
        in_use_bytes=None
        if first is None
        else (first.pages + first.zero_pages + first.deferred_pages) * PAGE_BYTES,
    )
