"""A lab's network can be made again over what is there: `ferry lab up` repairs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.lab.namespaces import remove_namespace
from deploy.lab.network import ensure_network
from deploy.lab.plan import make_plan

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


@pytest.mark.parametrize("index", [0, 250])
def test_a_lab_network_that_is_there_is_left_as_it_is(index: int) -> None:
    """Of lab 0, too, whose IPv6 addresses the kernel tells in another spelling."""
    name = f"a{os.getpid():x}x{index}"
    plan = make_plan(name, index=index, node_count=1, labs_root=Path("/none"))
    made: list[str] = []
    try:
        ensure_network(plan, made.append)
        assert set(made) == set(plan.namespaces)
        ensure_network(plan, made.append)
        assert len(made) == len(plan.namespaces)
    finally:
        for name in made:
            remove_namespace(name)
