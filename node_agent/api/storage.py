"""Pools and volumes: the handlers, and their part of the route table."""

from __future__ import annotations

from typing import Final

from aiohttp import web

from migrator.model import VolumeInfo
from node_agent.api.auth import caller_of
from node_agent.api.requests import CLUSTER, pool_of, read_body, reply, volume_of
from node_agent.api.route import Query, Route
from node_agent.resources import (
    Pool,
    PoolList,
    PoolTakeover,
    VolumeClone,
    VolumeCreate,
    VolumeList,
    VolumeResize,
)
from node_agent.trust.records import Role
from storage.settings import PoolSettings

_POOL: Final = "/v1/pools/{pool}"
_VOLUMES: Final = f"{_POOL}/volumes"
_VOLUME: Final = f"{_VOLUMES}/{{volume}}"


async def list_pools(request: web.Request) -> web.StreamResponse:
    """By name."""
    return reply(PoolList(pools=tuple(await request.app[CLUSTER].volumes.list_pools())))


async def get_pool(request: web.Request) -> web.StreamResponse:
    """One."""
    return reply(await request.app[CLUSTER].volumes.get_pool(pool_of(request)))


async def add_pool(request: web.Request) -> web.StreamResponse:
    """201."""
    settings: PoolSettings = await read_body(request, PoolSettings)  # type: ignore[arg-type]
    take_from = request.query.get("from") or None
    pool = await request.app[CLUSTER].volumes.add_pool(settings, take_from=take_from)
    return reply(pool, status=201, location=f"/v1/pools/{pool.name}")


async def take_pool_over(request: web.Request) -> web.StreamResponse:
    """When it is this cluster's."""
    body = await read_body(request, PoolTakeover)
    user = caller_of(request).name
    volumes = request.app[CLUSTER].volumes
    return reply(await volumes.take_pool_over(pool_of(request), body.identity, user))


async def remove_pool(request: web.Request) -> web.StreamResponse:
    """204."""
    await request.app[CLUSTER].volumes.remove_pool(pool_of(request))
    return web.Response(status=204)


async def list_volumes(request: web.Request) -> web.StreamResponse:
    """Of one pool."""
    volumes = await request.app[CLUSTER].volumes.list_volumes(pool_of(request))
    return reply(VolumeList(volumes=tuple(volumes)))


async def get_volume(request: web.Request) -> web.StreamResponse:
    """One."""
    volumes = request.app[CLUSTER].volumes
    return reply(await volumes.get_volume(pool_of(request), volume_of(request)))


async def create_volume(request: web.Request) -> web.StreamResponse:
    """201."""
    pool = pool_of(request)
    body = await read_body(request, VolumeCreate)
    made = await request.app[CLUSTER].volumes.create(pool, body)
    return reply(made, status=201, location=f"/v1/pools/{pool}/volumes/{made.name}")


async def resize_volume(request: web.Request) -> web.StreamResponse:
    """When it has grown."""
    body = await read_body(request, VolumeResize)
    volumes = request.app[CLUSTER].volumes
    return reply(await volumes.resize(pool_of(request), volume_of(request), body))


async def clone_volume(request: web.Request) -> web.StreamResponse:
    """201."""
    pool = pool_of(request)
    body = await read_body(request, VolumeClone)
    made = await request.app[CLUSTER].volumes.clone(pool, volume_of(request), body)
    return reply(made, status=201, location=f"/v1/pools/{pool}/volumes/{made.name}")


async def delete_volume(request: web.Request) -> web.StreamResponse:
    """204."""
    await request.app[CLUSTER].volumes.delete(pool_of(request), volume_of(request))
    return web.Response(status=204)


ROUTES: Final = (
    Route(
        method="GET",
        path="/v1/pools",
        handler=list_pools,
        summary="The pools, each tried now by the agent that answers",
        result=PoolList,
    ),
    Route(
        method="POST",
        path="/v1/pools",
        handler=add_pool,
        role=Role.ADMIN,
        summary="Add a pool to the cluster; refused where this agent can't use it",
        body=PoolSettings,
        status=201,
        result=Pool,
        location=True,
        query=(
            Query(
                name="from",
                kind=str,
                description="The identity of another cluster, whose pool it was: take it over",
            ),
        ),
        errors=(409,),
    ),
    Route(
        method="POST",
        path=f"{_POOL}/takeover",
        handler=take_pool_over,
        role=Role.ADMIN,
        summary="Make a pool this cluster's that another one uses no more",
        body=PoolTakeover,
        result=Pool,
        errors=(404, 409),
    ),
    Route(
        method="GET",
        path=_POOL,
        handler=get_pool,
        summary="A pool: its settings, whether it works, and what its fence is worth",
        result=Pool,
        errors=(404,),
    ),
    Route(
        method="DELETE",
        path=_POOL,
        handler=remove_pool,
        role=Role.ADMIN,
        summary="Remove a pool that no domain has a disk on; its volumes stay",
        status=204,
        errors=(404, 409),
    ),
    Route(
        method="GET",
        path=_VOLUMES,
        handler=list_volumes,
        summary="The volumes of a pool",
        result=VolumeList,
        errors=(404,),
    ),
    Route(
        method="POST",
        path=_VOLUMES,
        handler=create_volume,
        summary="Create a volume, empty or as a copy of an image",
        body=VolumeCreate,
        status=201,
        result=VolumeInfo,
        location=True,
        errors=(404, 409),
    ),
    Route(
        method="GET",
        path=_VOLUME,
        handler=get_volume,
        summary="A volume",
        result=VolumeInfo,
        errors=(404,),
    ),
    Route(
        method="POST",
        path=f"{_VOLUME}/resize",
        handler=resize_volume,
        summary="Grow a volume while no domain that has it runs",
        body=VolumeResize,
        result=VolumeInfo,
        errors=(404, 409),
    ),
    Route(
        method="POST",
        path=f"{_VOLUME}/clone",
        handler=clone_volume,
        summary="Copy a volume, or make an overlay that leans on it",
        body=VolumeClone,
        status=201,
        result=VolumeInfo,
        location=True,
        errors=(404, 409),
    ),
    Route(
        method="DELETE",
        path=_VOLUME,
        handler=delete_volume,
        summary="Delete a volume that no domain has",
        status=204,
        errors=(404, 409),
    ),
)
