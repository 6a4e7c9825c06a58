"""One route of the API: how it is served and how it is documented, in the same value."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Mapping
from typing import Any

from aiohttp import web

from migrator.model import Name
from migrator.ports import Struct
from node_agent.trust.records import Role

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Query(Struct, frozen=True, kw_only=True):
    """A parameter behind the `?`; always optional."""

    name: str
    kind: Any
    description: str


class Route(Struct, frozen=True, kw_only=True):
    """See the module. `path` has its parameters in braces, as aiohttp and OpenAPI both want."""

    method: str
    path: str
    handler: Handler
    summary: str
    body: Any = None
    """The type of the JSON body; None: no body."""
    body_required: bool = True
    status: int = 200
    result: Any = None
    """The type of the JSON result; None: no JSON."""
    also: Mapping[int, Any] = {}
    """Further JSON results by status."""
    streams: tuple[str, ...] = ()
    """Content types other than JSON of the same status."""
    query: tuple[Query, ...] = ()
    headers: tuple[str, ...] = ()
    """Request headers that matter."""
    location: bool = False
    """Whether the response has a Location."""
    errors: tuple[int, ...] = ()
    """Statuses of the problem documents that are special to it."""
    role: Role | None = None
    """What a caller must be at least; None: viewer to read (GET), operator for all else."""
    public: bool = False
    """Whether it is served without a token."""

    @property
    def needed_role(self) -> Role:
        """See `role`."""
        if self.role is not None:
            return self.role
        return Role.VIEWER if self.method == "GET" else Role.OPERATOR

    @property
    def operation_id(self) -> str:
        """Unique name: the handler's."""
        return self.handler.__name__

    @property
    def parameters(self) -> list[str]:
        """The names in braces."""
        return [part[1:-1] for part in self.path.split("/") if part.startswith("{")]


PARAMETER_TYPES: Mapping[str, Any] = {
    "name": Name,
    "node": Name,
    "pool": Name,
    "id": str,
    "volume": str,
}
