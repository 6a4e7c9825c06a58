"""A node's agent that begins as after its host's reboot: it sees another boot id."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deploy import lab
from deploy.lab.processes import spawn_in
from tests.integration.cluster.world import Cluster


@contextmanager
def after_reboot(cluster: Cluster, node: str, folder: Path) -> Iterator[None]:
    """The next agent of `node`, which is stopped. One of this boot follows."""
    lab.stop_agent(cluster.name, node)
    boot_id = folder / "boot_id"
    boot_id.write_text("another-boot\n")
    plan = cluster.plan.node(node)
    rebooted = (
        "import sys; from pathlib import Path; from node_agent import __main__, foundations; "
        f"foundations.BOOT_ID_PATH = Path({str(boot_id)!r}); sys.exit(__main__.main())"
    )
    command = [sys.executable, "-c", rebooted, "--config", str(plan.config_path)]
    try:
        spawn_in(plan.namespace, command, plan.log_path)
        yield
    finally:
        lab.restart_agent(cluster.name, node)
