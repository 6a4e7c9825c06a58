"""Dirty rates of real guests, and predictions beside what came of them."""

from __future__ import annotations

import contextlib
import threading
import time
from pathlib import Path

import pytest

from deploy.lab.processes import Process
from migrator.figures import DirtyRate, LinkOrigin
from migrator.model import Migration, MigrationMode, MigrationState
from node_agent.cli.errors import ApiProblem, Unreachable
from node_agent.resources import DryRun, MigrationCreate
from tests.integration.cluster.world import Cluster, Guest, Load, describe, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(420)]

MIB = 1024**2
TIMEOUT_S = 20.0
LOAD = Load(dirty_pages_per_s=2000, memory_mib=24)
OWN_PAGES_PER_S = 1000
"""What the guest's kernel and busybox write beside the load, at most."""


def sample(cluster: Cluster, seconds: float, via: str = "n1") -> DirtyRate:
    return cluster.api(via).get(f"/v1/domains/writer/dirty-rate?seconds={seconds}", DirtyRate)


def dry_run(cluster: Cluster, to: str, **changes: object) -> DryRun:
    body = MigrationCreate(destination=to, **changes)  # type: ignore[arg-type]
    path = "/v1/domains/writer/migrations?dry_run=true"
    return cluster.api().post(path, DryRun, body)


def tracked(cluster: Cluster, node: str) -> bool:
    """Whether any memory of the guest's hypervisor is write-protected from outside ("uw")."""
    (process,) = cluster.qemus(node, "writer")
    text = Path(f"/proc/{process.pid}/smaps").read_text()
    return any("uw" in line.split() for line in text.splitlines() if line.startswith("VmFlags"))


def busy_engines(cluster: Cluster, node: str) -> list[Process]:
    """Those that have a guest's memory; a spare one has none yet."""
    found = []
    for each in cluster.engines(node):
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # It has just ended.
            if "/memfd:" in Path(f"/proc/{each.pid}/maps").read_text():
                found.append(each)
    return found


def watched(cluster: Cluster) -> None:
    eventually("the guest is tracked", lambda: tracked(cluster, "n1"))


class Sampling:
    """A sampling in the background, and how it ended."""

    def __init__(self, cluster: Cluster, seconds: float) -> None:
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, args=(cluster, seconds))
        self._thread.start()

    def _run(self, cluster: Cluster, seconds: float) -> None:
        try:
            sample(cluster, seconds, via="n2")
        except (ApiProblem, Unreachable) as error:
            self.error = error

    def ended(self) -> Exception | None:
        self._thread.join(30.0)
        assert not self._thread.is_alive()
        return self.error


def test_a_dirty_rate_is_sampled_and_leaves_nothing(cluster: Cluster) -> None:
    with cluster.guest("writer", load=LOAD) as guest:
        time.sleep(1.0)  # What the boot still writes is not the load's.
        cluster.move("writer", "n2")
        cluster.move("writer", "n1")
        began_s, before = time.monotonic(), guest.status().memory_writes
        rate = sample(cluster, 2.0, via="n2")
        written = guest.status().memory_writes - before
        writes_per_s = written / (time.monotonic() - began_s)
        assert rate.node == "n1"
        assert 0.5 * writes_per_s <= rate.pages_per_s <= 2.0 * writes_per_s + OWN_PAGES_PER_S
        assert [point.bytes for point in rate.curve] == sorted(p.bytes for p in rate.curve)
        assert rate.curve[0].bytes < 0.5 * rate.working_set_bytes
        assert rate.working_set_bytes <= rate.memory_in_use_bytes < 128 * MIB
        assert not tracked(cluster, "n1")
        assert not busy_engines(cluster, "n1")
        _refusals(cluster, guest)
        _deaths(cluster)
        assert not busy_engines(cluster, "n1")
        guest.verify()


def _refusals(cluster: Cluster, guest: Guest) -> None:
    sampling = Sampling(cluster, 20.0)
    watched(cluster)
    with pytest.raises(ApiProblem, match="sampled already"):
        sample(cluster, 0.5)
    with cluster.held("source", "AskLeave") as point:
        migration = cluster.migrate("writer", "n2")
        assert "for the sake of a migration" in str(sampling.ended())
        point.wait_reached()
        with pytest.raises(ApiProblem, match="is being migrated"):
            sample(cluster, 0.5)
        dry = dry_run(cluster, "n2")
        assert "is being migrated" in dry.prediction_unknown
        point.release()
        assert cluster.ended(migration.id).state is MigrationState.COMPLETED
    assert guest.node == "n2"
    cluster.move("writer", "n1")
    cluster.api().post("/v1/domains/writer/pause", object)
    with pytest.raises(ApiProblem, match="it must be running"):
        sample(cluster, 0.5)
    cluster.api().post("/v1/domains/writer/resume", object)


def _deaths(cluster: Cluster) -> None:
    """However the engine or its agent dies, the guest is rid of the tracking."""
    sampling = Sampling(cluster, 20.0)
    watched(cluster)
    for engine in busy_engines(cluster, "n1"):
        cluster.kill(engine)
    assert "ended with status" in str(sampling.ended())
    assert not tracked(cluster, "n1")
    sampling = Sampling(cluster, 20.0)
    watched(cluster)
    cluster.kill(cluster.agent("n1"))
    assert sampling.ended() is not None
    eventually("the tracking is gone", lambda: not tracked(cluster, "n1"))
    cluster.restart_missing_agents()
    eventually("the agent is back", lambda: _answers(cluster))


def _answers(cluster: Cluster) -> bool:
    try:
        return sample(cluster, 0.2, via="n2").node == "n1"
    except (ApiProblem, Unreachable):
        return False


def test_predictions_beside_their_outcomes(
    cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    rows: list[tuple[str, Migration]] = []
    with cluster.guest("writer", load=LOAD) as guest:
        time.sleep(1.0)
        first = dry_run(cluster, "n2").prediction
        assert first is not None
        assert first.converges
        assert first.link.origin in (LinkOrigin.PROBE, LinkOrigin.MIGRATIONS)
        for number in range(4):
            to = guest.other_node()
            dry = dry_run(cluster, to).prediction
            assert dry is not None
            move = cluster.move("writer", to)
            assert move.prediction is not None
            rows.append((f"plain {number}", move))
        # The dirty rate is known from the last dry run, the link from the migrations.
        assert rows[-1][1].prediction is not None
        assert rows[-1][1].prediction.link.origin is LinkOrigin.MIGRATIONS
        rows.append(("capped, 32 MiB/s", _capped(cluster, guest, 32 * MIB, limit_ms=50)))
        # It dirties 8 MiB/s: far more than 10 ms of the link are pending whenever it is looked at.
        rows.append(("capped, 5 MiB/s", _capped(cluster, guest, 5 * MIB, limit_ms=10)))
        guest.verify()
    with capsys.disabled():
        print("\n" + "\n".join(_row(name, move) for name, move in rows))
    for _, move in rows[1:]:
        _check(move)
    plain, capped = rows[1:-2], rows[-2:]
    # A move alone is over in a second, half of which other work on the machine may take.
    assert sum(_time_was_foretold(move) for _, move in plain) > len(plain) / 2
    assert all(_time_was_foretold(move) for _, move in capped)


def _capped(cluster: Cluster, guest: Guest, cap: int, *, limit_ms: int) -> Migration:
    """Through a link that is a cap; the dry run says beforehand whether that converges."""
    to = guest.other_node()
    dry = dry_run(
        cluster,
        to,
        bandwidth_bytes_per_s=cap,
        timeout_s=TIMEOUT_S,
        downtime_limit_ms=limit_ms,
        mode=MigrationMode.PRECOPY,
    ).prediction
    assert dry is not None
    begun = cluster.migrate(
        "writer",
        to,
        bandwidth_bytes_per_s=cap,
        timeout_s=TIMEOUT_S,
        downtime_limit_ms=limit_ms,
    )
    move = cluster.ended(begun.id, timeout_s=60.0)
    assert dry.converges == (move.state is MigrationState.COMPLETED), describe(move)
    return move


def _check(move: Migration) -> None:
    """What two shared cores let one ask for; the table above has the figures."""
    prediction = move.prediction
    assert prediction is not None
    assert prediction.converges == (move.state is MigrationState.COMPLETED), describe(move)
    sent = sum(each.bytes_sent for each in move.iterations)
    assert sent / 2.5 <= prediction.bytes_sent <= 2.5 * sent


def _time_was_foretold(move: Migration) -> bool:
    assert move.prediction is not None and move.total_s is not None
    return move.total_s / 3 - 1.0 <= move.prediction.total_s <= 3 * move.total_s + 1.0


def _row(name: str, move: Migration) -> str:
    prediction = move.prediction
    assert prediction is not None
    sent = sum(each.bytes_sent for each in move.iterations)
    blackout = "-" if move.blackout_ms is None else f"{move.blackout_ms:.1f}"
    return (
        f"{name:18} {move.state:10} predicted converges {prediction.converges!s:5} "
        f"total {prediction.total_s:.2f} / {move.total_s or 0.0:.2f} s, "
        f"sent {prediction.bytes_sent / MIB:.1f} / {sent / MIB:.1f} MiB, "
        f"iterations {prediction.iterations} / {len(move.iterations)}, "
        f"blackout {prediction.blackout_ms:.1f} / {blackout} ms; "
        f"{prediction.link.bytes_per_s / MIB:.0f} MiB/s by {prediction.link.origin}, "
        f"dirty rate: {prediction.dirty_rate_origin}"
    )
