"""A lab's network can be made again over what is there: `ferry lab up` repairs."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from deploy.lab import labs_root
from deploy.lab.namespaces import remove_namespace
from deploy.lab.network import ensure_network
from deploy.lab.plan import make_plan
from deploy.lab.registry import lab_lock

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="namespaces need root")


@pytest.mark.parametrize("index", [0, 250])
def test_a_lab_network_that_is_there_is_left_as_it_is(index: int) -> None:
    """Of lab 0, too, whose IPv6 addresses the kernel tells in another spelling.

    It is in the registry meanwhile: another test session takes it for nobody's otherwise.
    """
    name = f"a{os.getpid():x}x{index}"
    plan = make_plan(name, index=index, node_count=1, labs_root=Path("/none"))
    made: list[str] = []
    with lab_lock(name) as lock:
        lock.claim(labs_root() / name)
        try:
            ensure_network(plan, made.append)
            assert set(made) == set(plan.namespaces)
            ensure_network(plan, made.append)
            assert len(made) == len(plan.namespaces)
        finally:
            for namespace in made:
                remove_namespace(namespace)
            lock.release()
