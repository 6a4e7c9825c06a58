"""The part of the table of routes that is about members and users."""

from __future__ import annotations

from typing import Final

from node_agent.api import trust_handlers as handlers
from node_agent.api.route import Query, Route
from node_agent.resources import Node, NodeRemoved
from node_agent.trust.records import (
    ApiTokenCreate,
    ApiTokenMade,
    AuthorityView,
    ClusterView,
    JoinAnswer,
    JoinRequest,
    JoinTokenCreate,
    JoinTokenMade,
    Role,
    User,
    UserCreate,
    UserList,
    WhoAmI,
)

_USER: Final = "/v1/users/{name}"

TRUST_ROUTES: Final = (
    Route(
        method="GET",
        path="/v1/cluster",
        handler=handlers.get_cluster,
        summary="The cluster's members, removed ones too",
        result=ClusterView,
        errors=(409,),
    ),
    Route(
        method="GET",
        path="/v1/cluster/authority",
        handler=handlers.get_authority,
        summary="The certificate of the cluster's authority, to be pinned by its fingerprint",
        result=AuthorityView,
        errors=(409,),
        public=True,
    ),
    Route(
        method="POST",
        path="/v1/cluster/tokens",
        handler=handlers.create_join_token,
        summary="Make a join token: short-lived, for one node, shown once",
        body=JoinTokenCreate,
        body_required=False,
        status=201,
        result=JoinTokenMade,
        errors=(409,),
        role=Role.ADMIN,
    ),
    Route(
        method="POST",
        path="/v1/cluster/join",
        handler=handlers.join_cluster,
        summary="Join with a token (what `ferry cluster join` does); refusals are 401, 403 and 409",
        body=JoinRequest,
        result=JoinAnswer,
        errors=(401, 403, 409),
        public=True,
    ),
    Route(
        method="GET",
        path="/v1/nodes/{name}",
        handler=handlers.get_node,
        summary="One node",
        result=Node,
        errors=(404,),
    ),
    Route(
        method="DELETE",
        path="/v1/nodes/{name}",
        handler=handlers.remove_node,
        summary="Remove a node from the cluster; its certificates are refused from then on",
        result=NodeRemoved,
        query=(
            Query(
                name="force",
                kind=bool,
                description="Though domains are recorded there, if the node is unreachable",
            ),
        ),
        errors=(404, 409),
        role=Role.ADMIN,
    ),
    Route(
        method="GET",
        path="/v1/whoami",
        handler=handlers.who_am_i,
        summary="Whom the API takes you for",
        result=WhoAmI,
    ),
    Route(
        method="GET",
        path="/v1/users",
        handler=handlers.list_users,
        summary="The users of the API, with their tokens' labels",
        result=UserList,
        errors=(409,),
        role=Role.ADMIN,
    ),
    Route(
        method="POST",
        path="/v1/users",
        handler=handlers.create_user,
        summary="Add a user",
        body=UserCreate,
        status=201,
        result=User,
        location=True,
        errors=(409,),
        role=Role.ADMIN,
    ),
    Route(
        method="GET",
        path=_USER,
        handler=handlers.get_user,
        summary="One user",
        result=User,
        errors=(404, 409),
        role=Role.ADMIN,
    ),
    Route(
        method="DELETE",
        path=_USER,
        handler=handlers.delete_user,
        summary="Remove a user, with all tokens",
        status=204,
        errors=(404, 409),
        role=Role.ADMIN,
    ),
    Route(
        method="POST",
        path=f"{_USER}/tokens",
        handler=handlers.create_api_token,
        summary="Make a bearer token of a user; shown once",
        body=ApiTokenCreate,
        body_required=False,
        status=201,
        result=ApiTokenMade,
        errors=(404, 409),
        role=Role.ADMIN,
    ),
    Route(
        method="DELETE",
        path=f"{_USER}/tokens/{{id}}",
        handler=handlers.delete_api_token,
        summary="Remove a bearer token",
        status=204,
        errors=(404, 409),
        role=Role.ADMIN,
    ),
)
