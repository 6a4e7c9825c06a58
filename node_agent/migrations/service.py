"""The migration service, as the API and the cluster layer see it.

A service belongs to one node: it makes and cancels the migrations whose source this node is.
`list_migrations` and `get` know every migration of the cluster, from the store; the progress
of one that runs is newest on its source, so `ClusterService` asks there first.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence

from migrator.figures import DirtyRate, Prediction
from migrator.model import Migration, MigrationRequest
from node_agent.migrations.engine_choice import EngineChoice
from node_agent.migrations.outline import MigrationOutline


class MigrationService(abc.ABC):
    """Errors: NotFoundError, ConflictError, RefusedError (all reasons), StoreError."""

    @abc.abstractmethod
    async def create(self, domain: str, request: MigrationRequest) -> Migration:
        """Begin to migrate a domain that this node owns, and return at once.

        RefusedError with every reason when it can't be carried out; then nothing was changed.
        """

    @abc.abstractmethod
    async def check(self, domain: str, request: MigrationRequest) -> Sequence[str]:
        """Why `create` would refuse; empty if it would accept. Changes nothing."""

    @abc.abstractmethod
    async def choose_engine(self, domain: str, request: MigrationRequest) -> EngineChoice:
        """Which engine `create` would take, and why. Changes nothing."""

    @abc.abstractmethod
    async def dirty_rate(self, domain: str, seconds: float) -> DirtyRate:
        """Sample how fast a domain that runs here dirties its memory, for `seconds`.

        WrongStateError if it doesn't run; ConflictError if it is migrating or sampled already.
        """

    @abc.abstractmethod
    async def predict(
        self, domain: str, request: MigrationRequest, sample_seconds: float
    ) -> Prediction:
        """How such a migration would go. Errors as `dirty_rate`; PeerError: the link is unknown."""

    @abc.abstractmethod
    async def get(self, id: str) -> Migration:
        """NotFoundError if there is none."""

    @abc.abstractmethod
    async def list_migrations(self) -> Sequence[Migration]:
        """Newest first."""

    @abc.abstractmethod
    async def list_outlines(self) -> Sequence[MigrationOutline]:
        """The same, of each what tells whether it is under way, and how it ended."""

    @abc.abstractmethod
    async def list_own(self) -> Sequence[MigrationOutline]:
        """Of those whose source this node is, from the oldest on. For metrics: nothing that was
        told once is missing later."""

    @abc.abstractmethod
    async def limit(self, id: str, bandwidth_bytes_per_s: int | None) -> Migration:
        """Change the cap of a migration of this node; None lifts it. In force within a frame.

        WrongStateError on one that ended.
        """

    @abc.abstractmethod
    async def cancel(self, id: str, by: str = "") -> Migration:
        """Ask a migration of this node to give up. Idempotent on one that is cancelling.

        `by`: who wants it; "": that isn't known.

        WrongStateError from the handoff on, and on one that ended: it is too late.
        """

    @abc.abstractmethod
    async def stop_in_post_copy(self, domain: str, timeout_s: float) -> bool:
        """End a guest that moved here and whose missing pages don't come for `timeout_s`.

        Whether it was ended; its domain is stopped then. False: it lacks none, or not any more.
        ConflictError: it doesn't end.
        """
