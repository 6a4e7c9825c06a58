"""Which storage servers a lab may have, and the pools that follow. No server runs here."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deploy.lab.config import agent_config, agent_config_text
from deploy.lab.plan import make_plan
from deploy.lab.storage import check_kinds, pools
from migrator.errors import InvalidRequest
from node_agent.config import parse_config


def test_kinds_are_known_ordered_and_single() -> None:
    assert check_kinds([]) == ()
    assert check_kinds(["nbd", "nfs", "nfs"]) == ("nfs", "nbd")
    with pytest.raises(InvalidRequest, match="nfs"):
        check_kinds(["nfs", "floppy"])


def test_agents_have_a_pool_on_each_server(tmp_path: Path) -> None:
    plan = make_plan("lab", index=3, node_count=2, labs_root=Path("/var/lib/ferry/labs"))
    assert pools(plan) == ()
    plan = msgspec.structs.replace(plan, storage=check_kinds(["nbd", "iscsi", "nfs"]))
    config = agent_config(plan, plan.nodes[0])
    assert [pool.name for pool in config.pools] == ["default", "nfs", "iscsi", "nbd"]
    assert parse_config(agent_config_text(plan, plan.nodes[0])) == config
