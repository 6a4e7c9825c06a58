"""A cluster on one machine: nodes as network namespaces, real agents, real QEMU guests.

`plan` works everything out, `lab` makes, repairs, inspects and removes it, `cli` is `ferry lab`.
What this module offers is imported when it is asked for: a command of the CLI that only looks for a
lab's address has no need of the rest.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from deploy.lab.lab import (
        LabStatus,
        command_in,
        down,
        down_all,
        kill_agent,
        list_labs,
        namespace_of,
        restart_agent,
        run_in,
        start_agent,
        status,
        stop_agent,
        up,
    )
    from deploy.lab.plan import LabPlan, NodePlan, make_plan
    from deploy.lab.record import LabRecord, labs_root, load

__all__ = [
    "LabPlan",
    "LabRecord",
    "LabStatus",
    "NodePlan",
    "command_in",
    "down",
    "down_all",
    "kill_agent",
    "labs_root",
    "list_labs",
    "load",
    "make_plan",
    "namespace_of",
    "restart_agent",
    "run_in",
    "start_agent",
    "status",
    "stop_agent",
    "up",
]

_ELSEWHERE: Final = {
    "LabPlan": "plan",
    "NodePlan": "plan",
    "make_plan": "plan",
    "LabRecord": "record",
    "labs_root": "record",
    "load": "record",
}
"""Where they are that `lab` hasn't."""


def __getattr__(name: str) -> object:
    if name not in __all__:
        raise AttributeError(f"module {__name__} has no attribute {name}")
    return getattr(importlib.import_module(f"{__name__}.{_ELSEWHERE.get(name, 'lab')}"), name)
