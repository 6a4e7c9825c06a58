"""What is asked of `ferry lab up`, over the lab that there is. Pure, but for the labs' folder."""

from __future__ import annotations

from typing import Final

import msgspec

from deploy.lab.kinds import FabricKind, StoreKind
from deploy.lab.plan import LabPlan, check_fabric, make_plan
from deploy.lab.record import LabRecord, labs_root
from migrator.errors import ConflictError

DEFAULT_NODES: Final = 3


def merge(
    name: str,
    index: int,
    present: LabRecord | None,
    nodes: int | None,
    link_mbit: int | None,
    node_memory_bytes: int | None,
    store: StoreKind | None,
    tls: bool | None,
) -> LabPlan:
    """What is asked for over what there is. Raises ConflictError if the lab would shrink, or its
    state would be left behind in another store.
    """
    count, rate = DEFAULT_NODES, None
    extra: dict[str, int] = {}
    extra_storage: tuple[str, ...] = ()
    if present is not None:
        count, rate = present.plan.node_count, present.plan.link_mbit
        extra["node_memory_bytes"] = present.plan.node_memory_bytes
        if nodes is not None and nodes < count:
            raise ConflictError(
                f"lab {name} has {count} nodes and can't shrink to {nodes}; take it down first"
            )
        if store not in (None, present.plan.store):
            raise ConflictError(
                f"lab {name} keeps its state in {present.plan.store}, which can't become {store}; "
                "take it down first"
            )
        store = present.plan.store
        extra_storage = present.plan.storage
        if tls not in (None, present.plan.tls):
            raise ConflictError(
                f"lab {name} was made {'with' if present.plan.tls else 'without'} TLS; take it "
                "down first"
            )
        tls = present.plan.tls
    if node_memory_bytes is not None:
        extra["node_memory_bytes"] = node_memory_bytes
    if link_mbit is not None:
        rate = link_mbit or None
    return make_plan(
        name,
        index=index,
        node_count=count if nodes is None else nodes,
        labs_root=labs_root(),
        link_mbit=rate,
        store=store or StoreKind.SQLITE,
        storage=extra_storage,
        tls=bool(tls),
        **extra,
    )


def with_fabric(plan: LabPlan, present: LabRecord | None, fabric: FabricKind | None) -> LabPlan:
    """Raises ConflictError if a lab's network would become another."""
    if present is not None and fabric not in (None, present.plan.fabric):
        raise ConflictError(
            f"lab {plan.name} was made with fabric {present.plan.fabric}, which can't become"
            f" {fabric}; take it down first"
        )
    wanted = present.plan.fabric if present is not None else fabric or FabricKind.BRIDGE
    check_fabric(plan.node_count, wanted)
    return msgspec.structs.replace(plan, fabric=wanted)
