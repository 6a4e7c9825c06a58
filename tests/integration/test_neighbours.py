"""What isn't this cluster's doing: a store that is older than its guests, and a node's clone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import time
from pathlib import Path

import pytest

from deploy import lab
from migrator.model import DomainSpec, DomainState, OwnershipRecord, OwnershipState
from node_agent.cli.errors import ApiProblem
from node_agent.events import EventKind
from node_agent.resources import Domain, StartRequest, StopRequest, TakeoverRequest
from node_agent.state.ownership import ownership_key
from node_agent.state.sqlite import SqliteStore
from node_agent.state.typed import TypedStore
from tests.integration import cloned_agent
from tests.integration.cluster.world import MIB, Cluster, eventually

pytestmark = [pytest.mark.lab, pytest.mark.timeout(120)]


def put_record(cluster: Cluster, record: OwnershipRecord) -> OwnershipRecord:
    """Whoever restores a store asks nobody. What was there before."""

    async def put() -> OwnershipRecord:
        store = SqliteStore(cluster.plan.store_path)
        await store.open()
        try:
            typed = TypedStore(store)
            before = await typed.get(ownership_key(record.domain), OwnershipRecord)
            assert before is not None
            await typed.put(before.key, record)
            return before.value
        finally:
            await store.close()

    return asyncio.run(put())


def test_a_guest_that_is_newer_than_the_store_outlives_its_agents_restart(
    cluster: Cluster,
) -> None:
    """The store was restored from before the guest's last start: it isn't a stale copy."""
    api, name = cluster.api("n1"), "newer"
    api.post("/v1/domains", Domain, DomainSpec(name=name, memory_bytes=64 * MIB))
    try:
        for token in (1, 2):
            api.post(f"/v1/domains/{name}/start", Domain, StartRequest(node="n1"))
            if token == 1:
                api.post(f"/v1/domains/{name}/stop", Domain, StopRequest(timeout_s=0.0))
        before = cluster.qemus("n1", name)
        older = OwnershipRecord(domain=name, token=1, owner="n2", state=OwnershipState.STOPPED)
        newest = put_record(cluster, older)
        try:
            assert (newest.owner, newest.token) == ("n1", 2)
            with pytest.raises(ApiProblem, match="the guest is left as it is"):
                api.post(f"/v1/domains/{name}/start", Domain, StartRequest(node="n1"))

            def told() -> list[str]:
                behind = (EventKind.STORE_BEHIND, name)
                events = cluster.events()
                return [each.message for each in events if (each.kind, each.domain) == behind]

            # When the request is refused it is on its way to the store, and dies with its agent.
            eventually("the first agent has told it", lambda: len(told()) == 1)
            lab.kill_agent(cluster.name, "n1")
            lab.start_agent(cluster.name, "n1")
            eventually("the next one, too", lambda: len(told()) == 2)
            assert "under token 2, and the store knows it under 1, of n2" in told()[0]
            api.post(f"/v1/domains/{name}/takeover", Domain, TakeoverRequest(node="n1"))
            assert cluster.qemus("n1", name) == before
        finally:
            assert put_record(cluster, newest) == newest
        assert cluster.domain(name).state is DomainState.RUNNING
    finally:
        api.post(f"/v1/domains/{name}/stop", Domain, StopRequest(timeout_s=0.0))
        api.delete(f"/v1/domains/{name}")


def test_a_nodes_clone_is_refused_and_the_node_goes_on(cluster: Cluster, tmp_path: Path) -> None:
    """A host that was copied, with its agent's configuration, and booted."""
    node, agent = cluster.plan.node("n1"), cluster.agent("n1")
    began_s = time.time()  # What came before may be written late.
    clone = subprocess.run(
        (
            *(sys.executable, str(Path(cloned_agent.__file__).resolve())),
            *("--config", str(node.config_path), str(tmp_path)),
        ),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert clone.returncode != 0
    assert "another agent speaks as n1 in this store" in clone.stderr
    assert cluster.agent("n1") == agent
    own = [each for each in cluster.events() if each.node == "n1" and each.at_s >= began_s]
    kinds = {each.kind for each in own}
    assert not kinds & {EventKind.AGENT_STARTED, EventKind.DOMAIN_LOST, EventKind.DOMAIN_DESTROYED}
    assert not (tmp_path / "qemu").exists(), "it was about to look for guests"
