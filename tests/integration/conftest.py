"""One lab for all tests of whole clusters: three nodes, real agents, which tests may hold.

And what the tests of engines begin with: a stand-in for a guest, the ends of a page stream.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

from deploy import lab
from deploy.guest.build import build_guest, default_cache_directory
from deploy.lab.processes import tail
from migrator import hold_points
from tests.integration import quick_agent
from tests.integration.cluster.world import Cluster
from tests.integration.engine_lab.lab import MIB, Guest, compile_guest
from tests.integration.stream_ends import Ends

NODE_MEMORY_BYTES = 1024**3
LOG_LINES = 60


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """A failed test of the cluster shows the ends of its agents' and engines' logs."""
    report = yield
    cluster = getattr(item, "funcargs", {}).get("cluster")
    if report.failed and isinstance(cluster, Cluster):
        for node in cluster.plan.nodes:
            engines = sorted(node.state_path.glob("logs/engines.log"))[-3:]
            for path in (node.log_path, *engines):
                report.sections.append((f"{node.name} {path.name}", tail(path, LOG_LINES)))
    return report


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    folder: Path = tmp_path_factory.mktemp("holds")
    name = f"c{os.getpid()}"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(hold_points.VARIABLE, str(folder))
        try:
            lab.up(
                name,
                nodes=3,
                node_memory_bytes=NODE_MEMORY_BYTES,
                agent_command=quick_agent.COMMAND,
            )
            image = build_guest(default_cache_directory())
            yield Cluster(lab.load(name).plan, image, folder)
        finally:
            lab.down(name)


@pytest.fixture(scope="session")
def binary(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The stand-in for a guest, compiled."""
    return compile_guest(tmp_path_factory.mktemp("guest"))


@pytest.fixture
def ends() -> Iterator[Ends]:
    """Both ends of a page stream, which must not have failed by themselves."""
    made = Ends()
    yield made
    made.close()
    assert not made.host.faults


@pytest.fixture
def guest(binary: Path) -> Iterator[Guest]:
    """A stand-in with 128 MiB of memory. Modules with a guest of their own call it so, too."""
    made = Guest(binary, 128 * MIB)
    try:
        yield made
    finally:
        made.close()
