"""The routes of cordons and drains: a part of the table in `routes`."""

from __future__ import annotations

from typing import Final

from node_agent.api import drain_handlers as handlers
from node_agent.api.route import Query, Route
from node_agent.drain.resources import (
    BalancePlan,
    CordonRequest,
    Drain,
    DrainList,
    DrainPlan,
    DrainRequest,
    UndrainRequest,
)
from node_agent.resources import Node

_NODE: Final = "/v1/nodes/{node}"
_DRY_RUN: Final = Query(
    name="dry_run", kind=bool, description="Only say (200) what would be done, and what can't be"
)
_ABORT: Final = Query(
    name="abort_moves",
    kind=bool,
    description="Cancel the migrations that are under way, instead of letting them end",
)

DRAIN_ROUTES: Final = (
    Route(
        method="POST",
        path=f"{_NODE}/cordon",
        handler=handlers.cordon_node,
        summary="Let no domain start on a node or move there",
        body=CordonRequest,
        body_required=False,
        result=Node,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_NODE}/uncordon",
        handler=handlers.uncordon_node,
        summary="Open a cordoned or drained node again; nothing is brought back",
        result=Node,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_NODE}/drain",
        handler=handlers.drain_node,
        summary="Empty a node; answers when the drain has begun",
        body=DrainRequest,
        body_required=False,
        status=202,
        result=Drain,
        also={200: DrainPlan},
        location=True,
        query=(_DRY_RUN,),
        errors=(404, 409),
    ),
    Route(
        method="DELETE",
        path=f"{_NODE}/drain",
        handler=handlers.cancel_node_drain,
        summary="Cancel the drain or undrain of a node that is under way",
        status=202,
        result=Drain,
        location=True,
        query=(_ABORT,),
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_NODE}/undrain",
        handler=handlers.undrain_node,
        summary="Open a drained node, and bring its domains back; answers when that has begun",
        body=UndrainRequest,
        body_required=False,
        status=202,
        result=Drain,
        also={200: DrainPlan},
        location=True,
        query=(_DRY_RUN,),
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path="/v1/balance",
        handler=handlers.balance_nodes,
        summary="Even the nodes out by the fewest moves; answers when that has begun",
        status=202,
        result=Drain,
        also={200: BalancePlan},
        location=True,
        query=(_DRY_RUN,),
        errors=(409,),
    ),
    Route(
        method="GET",
        path="/v1/drains",
        handler=handlers.list_drains,
        summary="All drains and undrains, newest first",
        result=DrainList,
    ),
    Route(
        method="GET",
        path="/v1/drains/{id}",
        handler=handlers.get_drain,
        summary="One drain, move by move, with its history",
        result=Drain,
        errors=(404,),
    ),
    Route(
        method="DELETE",
        path="/v1/drains/{id}",
        handler=handlers.cancel_drain,
        summary="Cancel a drain: no further move begins, and the node is opened",
        status=202,
        result=Drain,
        location=True,
        query=(_ABORT,),
        errors=(404, 409),
    ),
)
