"""The OpenAPI 3.1 document, made from the route table and the structs that validate the bodies."""

from __future__ import annotations

from collections.abc import Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec

from node_agent.api.problems import CONTENT_TYPE
from node_agent.api.route import PARAMETER_TYPES, Query, Route
from node_agent.resources import Problem

_SCHEME: Final = "token"
_REF: Final = "#/components/schemas/{name}"


def document(routes: Sequence[Route], version: str) -> dict[str, Any]:
    """The document as JSON values."""
    kinds: list[Any] = [Problem]
    for route in routes:
        kinds += [
            kind for kind in (route.body, route.result, *route.also.values()) if kind is not None
        ]
    unique = list(dict.fromkeys(kinds))
    schemas, components = msgspec.json.schema_components(unique, ref_template=_REF)
    by_kind = dict(zip(unique, schemas, strict=True))
    paths: dict[str, dict[str, Any]] = {}
    for route in routes:
        operation = _operation(route, by_kind)
        paths.setdefault(route.path, {})[route.method.lower()] = operation
    described = {
        "openapi": "3.1.0",
        "info": {
            "title": "Ferry",
            "version": version or "0",
            "description": "Moves running virtual machines between hosts. Any agent answers for "
            "the whole cluster. Every error is a problem document (RFC 9457).",
        },
        "paths": paths,
        "components": {
            "schemas": components,
            "securitySchemes": {
                _SCHEME: {
                    "type": "http",
                    "scheme": "bearer",
                    "description": "A token of `ferry user token`. Not asked for over the unix "
                    "socket, nor where the configuration says plain.",
                }
            },
        },
    }
    values: dict[str, Any] = msgspec.json.decode(msgspec.json.encode(described))
    return values


def _operation(route: Route, by_kind: dict[Any, Any]) -> dict[str, Any]:
    operation: dict[str, Any] = {
        "operationId": route.operation_id,
        "summary": route.summary,
        "security": [] if route.public else [{_SCHEME: []}],
        "description": "For everybody."
        if route.public
        else f"The role {route.needed_role} is needed.",
        "parameters": [
            *(_path_parameter(name) for name in route.parameters),
            *(_query_parameter(query) for query in route.query),
            *(
                {"name": name, "in": "header", "required": False, "schema": {"type": "string"}}
                for name in route.headers
            ),
        ],
        "responses": _responses(route, by_kind),
    }
    if route.body is not None:
        operation["requestBody"] = {
            "required": route.body_required,
            "content": {"application/json": {"schema": by_kind[route.body]}},
        }
    return operation


def _responses(route: Route, by_kind: dict[Any, Any]) -> dict[str, Any]:
    success: dict[str, Any] = {"description": HTTPStatus(route.status).phrase}
    content = {kind: {"schema": {"type": "string"}} for kind in route.streams}
    if route.result is not None:
        content["application/json"] = {"schema": by_kind[route.result]}
    if content:
        success["content"] = content
    if route.location:
        success["headers"] = {
            "Location": {"description": "Where it is", "schema": {"type": "string"}}
        }
    responses = {str(route.status): success}
    for status, kind in route.also.items():
        responses[str(status)] = {
            "description": HTTPStatus(status).phrase,
            "content": {"application/json": {"schema": by_kind[kind]}},
        }
    problem = {"content": {CONTENT_TYPE: {"schema": by_kind[Problem]}}}
    takes = route.body is not None or route.query
    common = {*((400,) if takes else ()), *(() if route.public else (401, 403))}
    for status in sorted({*route.errors, *common}):
        responses[str(status)] = {"description": HTTPStatus(status).phrase, **problem}
    responses["default"] = {"description": "Any other error", **problem}
    return responses


def _path_parameter(name: str) -> dict[str, Any]:
    schema = msgspec.json.schema(PARAMETER_TYPES[name])
    return {"name": name, "in": "path", "required": True, "schema": schema}


def _query_parameter(query: Query) -> dict[str, Any]:
    return {
        "name": query.name,
        "in": "query",
        "required": False,
        "description": query.description,
        "schema": msgspec.json.schema(query.kind),
    }
