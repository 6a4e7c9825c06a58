"""Migrations that are cancelled, that don't converge, that lose their link, that are refused."""

from __future__ import annotations

import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest

from deploy import lab
from migrator.model import (
    DiskSpec,
    DomainSpec,
    DomainState,
    Migration,
    MigrationState,
    NicSpec,
    NodeState,
    OnTimeout,
    VolumeInfo,
)
from node_agent.cli.errors import ApiProblem, ExitCode
from node_agent.resources import (
    Domain,
    DryRun,
    MigrationCreate,
    NodeList,
    StartRequest,
    StopRequest,
    VolumeCreate,
)
from tests.integration.cluster import inventory, lesser_qemu
from tests.integration.cluster.world import (
    MIB,
    UNHEARD_UDP_PER_S,
    Cluster,
    Guest,
    Load,
    describe,
    eventually,
)

pytestmark = [pytest.mark.lab, pytest.mark.timeout(240)]

LOAD = Load(dirty_pages_per_s=300, udp_per_s=UNHEARD_UDP_PER_S)
OTHER_LOAD = Load(udp_per_s=UNHEARD_UDP_PER_S)
SLOW_BYTES_PER_S = 20_000_000
"""What a pre-copy's first pages take some seconds at."""
CANCELLED_WITHIN_S = 1.0
"""The quickest of a few, as this machine may be busy with other things."""
DISTURBED_MAX = 6
CUT_S = (3.0, 31.0)
"""How long the link is down: the fault itself, not a wait for anything. The kernel gives a silent
connection up after five seconds; half a minute has to be borne.
"""
COMMAND_S = 60.0
LARGE_BYTES = 600 * MIB
"""Two of these don't fit on a node of the lab."""


@pytest.fixture(scope="module")
def guest(cluster: Cluster) -> Iterator[Guest]:
    with cluster.guest("mover", load=LOAD) as guest:
        for node in ("n2", "n1"):  # What is made once and kept, connections between agents, is.
            cluster.move("mover", node)
        yield guest


@contextmanager
def begun(cluster: Cluster, guest: Guest, phase: str) -> Iterator[Migration]:
    """A migration that stays in `phase` while the body runs."""
    steps = {
        "setup": ("destination", "Prepared"),
        "precopy": ("source", "AskLeave"),
        "switchover": ("source", "ContinueSwitchover"),
    }
    source, destination = guest.node, guest.other_node()
    with cluster.held(*steps[phase]) as point:
        if phase == "precopy":  # In its midst, as a rule; in any case it can't end.
            migration = cluster.migrate(
                guest.name,
                destination,
                via=source,
                bandwidth_bytes_per_s=SLOW_BYTES_PER_S,
                downtime_limit_ms=1000,  # What the guest keeps dirtying takes its time there.
            )
            cluster.in_state(migration.id, MigrationState.PRECOPY, source)
        else:
            migration = cluster.migrate(guest.name, destination, via=source)
            point.wait_reached()
        yield migration


@pytest.mark.parametrize("phase", ["setup", "precopy", "switchover"])
def test_a_cancelled_migration_ends_at_once(cluster: Cluster, guest: Guest, phase: str) -> None:
    source = guest.node
    before = inventory.take_settled(cluster)
    took_s: list[float] = []
    while not took_s or (min(took_s) > CANCELLED_WITHIN_S and len(took_s) < DISTURBED_MAX):
        with begun(cluster, guest, phase) as migration:
            assert phase != "precopy" or inventory.tracked(cluster, source)
            asked = time.monotonic()
            cluster.cancel(migration.id, source)
            ended = cluster.ended(migration.id, source)
            took_s.append(time.monotonic() - asked)
            # Whoever reads that it is over finds the guest free of it.
            assert not inventory.tracked(cluster, source)
        assert ended.state is MigrationState.CANCELLED, describe(ended)
        assert guest.node == source
        eventually("one copy is left", lambda: guest.copies() == [source])
    assert min(took_s) <= CANCELLED_WITHIN_S, took_s
    guest.verify()
    inventory.assert_nothing_left(cluster, before)
    with pytest.raises(ApiProblem) as refused:
        cluster.cancel(migration.id)
    assert refused.value.problem.status == 409
    print(f"cancelled in {phase}: ended after {min(took_s):.3f} s")


def test_any_agent_answers_for_a_migration(cluster: Cluster, guest: Guest) -> None:
    """The third node has nothing to do with it, and takes the request, tells of it, cancels it."""
    source, destination = guest.node, guest.other_node()
    with cluster.held("destination", "Prepared") as point:
        migration = cluster.migrate(guest.name, destination, via="n3")
        point.wait_reached()
        for via in ("n1", "n2", "n3"):
            seen = cluster.migration(migration.id, via)
            assert (seen.source, seen.state) == (source, MigrationState.SETUP)
            assert cluster.domain(guest.name, via).migration == migration.id
            assert migration.id in [each.id for each in cluster.migrations_of(guest.name, via)]
        cluster.cancel(migration.id, "n3")
    states = {cluster.ended(migration.id, via).state for via in ("n1", "n2", "n3")}
    assert states == {MigrationState.CANCELLED}


def test_a_guest_that_does_not_converge(cluster: Cluster) -> None:
    """Cancelled with the figures that say why, cancelled by its timeout, or forced."""
    # A guest with a seventh of these cycles is still ahead of the link.
    load = Load(dirty_pages_per_s=10_000, memory_mib=8, udp=False)
    with cluster.guest("busy", load=load) as guest:

        def end(on_timeout: OnTimeout, timeout_s: float = 60.0) -> Migration:
            migration = cluster.migrate(
                "busy",
                "n2",
                bandwidth_bytes_per_s=6_000_000,
                downtime_limit_ms=20,
                on_timeout=on_timeout,
                timeout_s=timeout_s,
            )
            return cluster.ended(migration.id)

        by_figures = end(OnTimeout.CANCEL)
        assert by_figures.state is MigrationState.FAILED, describe(by_figures)
        assert "doesn't converge" in (by_figures.error or "")
        assert "MB/s" in (by_figures.error or "")
        by_timeout = end(OnTimeout.CANCEL, timeout_s=1.0)
        assert by_timeout.state is MigrationState.FAILED, describe(by_timeout)
        assert "within 1 s" in (by_timeout.error or "")
        assert guest.node == "n1"
        guest.verify()
        forced = end(OnTimeout.FORCE)
        assert forced.state is MigrationState.COMPLETED, describe(forced)
        assert any("forced" in phase.detail for phase in forced.timeline), describe(forced)
        assert guest.node == "n2"
        guest.verify()
        print(f"{by_figures.error}; forced: blackout {forced.blackout_ms} ms")


@pytest.mark.parametrize("cut_s", CUT_S)
def test_a_link_that_is_cut_for_a_while_costs_only_time(
    cluster: Cluster, guest: Guest, cut_s: float
) -> None:
    destination = guest.other_node()

    def set_link(state: str) -> None:
        command = ["ip", "link", "set", f"m-{destination}", state]
        assert lab.run_in(cluster.name, "switch", command, COMMAND_S).returncode == 0

    with begun(cluster, guest, "precopy") as migration:
        set_link("down")
        try:
            time.sleep(cut_s)
            assert cluster.migration(migration.id, migration.source).state is MigrationState.PRECOPY
        finally:
            set_link("up")
    ended = cluster.ended(migration.id, migration.source)
    assert ended.state is MigrationState.COMPLETED, describe(ended)
    print(f"link cut for {cut_s} s: {describe(ended)}")
    assert guest.node == destination
    guest.verify()


def test_two_domains_migrate_at_once(cluster: Cluster, guest: Guest) -> None:
    """Towards each other, so that each node is a source and a destination."""
    with cluster.guest("other", guest.other_node(), OTHER_LOAD) as other:
        pairs = [(guest, guest.other_node()), (other, other.other_node())]
        migrations = [cluster.migrate(each.name, to) for each, to in pairs]
        for migration, (each, to) in zip(migrations, pairs, strict=True):
            ended = cluster.ended(migration.id)
            assert ended.state is MigrationState.COMPLETED, describe(ended)
            assert each.node == to
            each.verify()


# --- the command line ------------------------------------------------------------------------


def ferry(cluster: Cluster, *words: str) -> list[str]:
    api = f"unix:{cluster.plan.node('n3').api_socket}"
    return [sys.executable, "-m", "node_agent.cli.main", "--api", api, *words]


def run_ferry(cluster: Cluster, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ferry(cluster, *words), capture_output=True, text=True, timeout=COMMAND_S, check=False
    )


def _at_its_end(migration: Migration) -> Migration:
    """Without what is still found out of it afterwards: whether the network has followed."""
    return msgspec.structs.replace(migration, cutover=None, timeline=())


def test_migrate_without_a_terminal_says_json(cluster: Cluster, guest: Guest) -> None:
    destination = guest.other_node()
    dry = run_ferry(cluster, "migrate", "mover", "--to", destination, "--dry-run", "--json")
    assert msgspec.json.decode(dry.stdout, type=DryRun).refused == ()
    assert dry.returncode == ExitCode.OK
    done = run_ferry(cluster, "migrate", "mover", "--to", destination, "--json")
    assert done.returncode == ExitCode.OK, done.stderr
    migration = msgspec.json.decode(done.stdout, type=Migration)
    assert migration.state is MigrationState.COMPLETED
    assert _at_its_end(migration) == _at_its_end(cluster.migration(migration.id))
    assert guest.node == destination
    refused = run_ferry(cluster, "migrate", "mover", "--to", destination, "--json")
    assert refused.returncode == ExitCode.REFUSED
    assert "already" in refused.stderr
    assert refused.stdout == ""


def test_ctrl_c_without_a_terminal_detaches(cluster: Cluster, guest: Guest) -> None:
    destination = guest.other_node()
    command = ferry(cluster, "migrate", "mover", "--to", destination)
    with cluster.held("destination", "Prepared") as point:
        with subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stdout is not None
            assert "mover: " in (first := process.stdout.readline()), first
            process.send_signal(signal.SIGINT)
            assert process.wait(COMMAND_S) == ExitCode.INTERRUPTED
            assert "goes on" in process.stdout.read()
        point.wait_reached()
    (migration, *_) = cluster.migrations_of("mover")
    ended = cluster.ended(migration.id)
    assert ended.state is MigrationState.COMPLETED, describe(ended)
    assert guest.node == destination


# --- refusals --------------------------------------------------------------------------------


def reasons(cluster: Cluster, domain: str, to: str, status: int = 409) -> tuple[str, ...]:
    """Why it is refused: the dry run and the request must say the same, and change nothing."""
    refused, said = both_refusals(cluster, domain, to, status)
    assert without_times(said) == without_times(refused)
    return refused


def both_refusals(
    cluster: Cluster, domain: str, to: str, status: int = 409
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """What the dry run says, and then the request. They change nothing."""
    path, body = f"/v1/domains/{domain}/migrations", MigrationCreate(destination=to)
    before = cluster.domain(domain), len(cluster.migrations_of(domain))
    refused = cluster.api().post(f"{path}?dry_run=true", DryRun, body).refused
    with pytest.raises(ApiProblem) as problem:
        cluster.api().post(path, Migration, body)
    assert problem.value.problem.status == status
    after = cluster.domain(domain), len(cluster.migrations_of(domain))
    assert placed(after[0]) == placed(before[0])
    assert after[1] == before[1]
    return refused, tuple(problem.value.problem.reasons)


def without_times(reasons: tuple[str, ...]) -> list[str]:
    """A node that is silent for 5 s is silent for 6 s a moment later."""
    return [re.sub(r"\d+ s\b", "N s", reason) for reason in reasons]


def placed(domain: Domain) -> tuple[object, ...]:
    return domain.node, domain.token, domain.state, domain.pid, domain.migration


@contextmanager
def idle(cluster: Cluster, spec: DomainSpec, node: str) -> Iterator[None]:
    """A domain whose firmware finds nothing to boot; gone when this ends."""
    api = cluster.api()
    api.post("/v1/domains", Domain, spec)
    try:
        api.post(f"/v1/domains/{spec.name}/start", Domain, StartRequest(node=node))
        yield
    finally:
        if cluster.domain(spec.name).state is not DomainState.STOPPED:
            api.post(f"/v1/domains/{spec.name}/stop", Domain, StopRequest(timeout_s=0.0))
        api.delete(f"/v1/domains/{spec.name}")


def assert_reasons(found: tuple[str, ...], *parts: str) -> None:
    """Each part is in one reason, and there is no other."""
    assert len(found) == len(parts), found
    for part in parts:
        assert any(part in reason for reason in found), (part, found)


def test_no_place_to_go(cluster: Cluster, guest: Guest) -> None:
    known = f"there is no node n9; known: n1, n2, n3 (the domain runs on {guest.node})"
    assert_reasons(reasons(cluster, "mover", "n9", 404), known)
    assert_reasons(reasons(cluster, "mover", guest.node), "runs on")
    api = cluster.api(guest.node)
    api.post("/v1/domains/mover/pause", Domain)
    try:
        assert_reasons(reasons(cluster, "mover", "n9", 404), "there is no node n9", "paused")
    finally:
        api.post("/v1/domains/mover/resume", Domain)


def test_a_dead_destination(cluster: Cluster, guest: Guest) -> None:
    lab.kill_agent(cluster.name, "n3")
    try:
        # Not silent for long enough to count as dead, but it doesn't answer: its connection is
        # lost, or can't be made again.
        for refused in both_refusals(cluster, "mover", "n3"):
            assert_reasons(refused, "n3")
        eventually(
            "n3 counts as unreachable",
            lambda: has_state(cluster, "n3", NodeState.UNREACHABLE, by=guest.node),
        )
        assert_reasons(reasons(cluster, "mover", "n3"), "n3 is unreachable")
    finally:
        lab.start_agent(cluster.name, "n3")
    for node in ("n1", "n2"):
        eventually("n3 is back", partial(has_state, cluster, "n3", NodeState.READY, node))


def has_state(cluster: Cluster, name: str, state: NodeState, by: str) -> bool:
    """What the node `by` thinks: each measures the others' silence for itself."""
    nodes = cluster.api(by).get("/v1/nodes", NodeList).nodes
    return any(node.name == name and node.state is state for node in nodes)


def test_every_reason_is_given_at_once(cluster: Cluster) -> None:
    """A paused guest whose destination has neither the memory, nor the bridge, nor the volume."""
    api = cluster.api()
    assert (
        lab.run_in(
            cluster.name, "n1", ["ip", "link", "add", "br9", "up", "type", "bridge"], COMMAND_S
        ).returncode
        == 0
    )
    volume = api.post(
        "/v1/pools/default/volumes", VolumeInfo, VolumeCreate(name="lost", capacity_bytes=MIB)
    )
    demanding = DomainSpec(
        name="demanding",
        memory_bytes=LARGE_BYTES,
        disks=(DiskSpec(volume=volume.name),),
        nics=(NicSpec(mac="52:54:00:fe:02:01", bridge="br9"),),
    )
    neighbour = DomainSpec(name="neighbour", memory_bytes=LARGE_BYTES)
    try:
        with idle(cluster, demanding, "n1"), idle(cluster, neighbour, "n3"):
            api.post("/v1/domains/demanding/pause", Domain)
            (cluster.plan.volumes_path / "lost.raw").unlink()
            assert_reasons(
                reasons(cluster, "demanding", "n3"),
                "demanding is paused",
                "not enough memory",
                "br9",
                "volume default/lost",
            )
    finally:
        lab.run_in(cluster.name, "n1", ["ip", "link", "del", "br9"], COMMAND_S)


def test_a_migration_that_goes_on_counts(cluster: Cluster, guest: Guest) -> None:
    """The domain on its way can't be migrated again, and its memory is taken at its destination."""
    first = DomainSpec(name="first", memory_bytes=LARGE_BYTES)
    second = DomainSpec(name="second", memory_bytes=LARGE_BYTES)
    home = guest.node
    with idle(cluster, first, home), idle(cluster, second, guest.other_node()):
        with cluster.held("destination", "Prepared") as point:
            migration = cluster.migrate("first", "n3")
            point.wait_reached()
            assert_reasons(reasons(cluster, "first", "n3"), "being migrated already", "copy")
            assert_reasons(reasons(cluster, "second", "n3"), "not enough memory")
        ended = cluster.ended(migration.id)
        assert ended.state is MigrationState.COMPLETED, describe(ended)
        assert_reasons(reasons(cluster, "second", "n3"), "not enough memory")


def test_a_destination_with_another_hypervisor(
    cluster: Cluster, guest: Guest, tmp_path: Path
) -> None:
    """Its QEMU has neither the domain's machine type nor its CPU model."""
    script = tmp_path / "qemu-lesser"
    shutil.copy(lesser_qemu.__file__, script)
    script.chmod(0o755)
    config = cluster.plan.node("n3").config_path
    before = config.read_text()
    changed = before.replace('binary = "qemu-system-x86_64"', f'binary = "{script}"')
    assert changed != before
    config.write_text(changed)
    try:
        lab.restart_agent(cluster.name, "n3")
        assert_reasons(
            reasons(cluster, guest.name, "n3"), "no machine type pc-q35-7.2", "no CPU model qemu64"
        )
    finally:
        config.write_text(before)
        lab.restart_agent(cluster.name, "n3")
