"""A cluster on one machine: nodes as network namespaces, real agents, real QEMU guests.

`plan` works everything out, `lab` makes, repairs, inspects and removes it, `cli` is `ferry lab`.
"""

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
