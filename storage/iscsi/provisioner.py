"""Who makes LUNs, and whom the target admits: the port, and the driver that asks a site's hook.

A volume is one LUN. `grant` and `fence` are the second fence, which outlives a restart of
the target (that may forget every reservation): the target admits only the initiator names that
were granted, and a fence strikes all but the winner's off, for good.
"""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeVar

import msgspec

from migrator.errors import FenceError, NotFoundError
from migrator.model import FencingToken, PoolHealth, PoolOwner, VolumeName
from storage.hooks import call_hook
from storage.iscsi.session import LunAddress

HOOK_TIMEOUT_S: Final = 60.0
HOOK_FENCE_TIMEOUT_S: Final = 10.0
_T = TypeVar("_T")


class Lun(msgspec.Struct, frozen=True, kw_only=True):
    """One volume's LUN."""

    portal: str
    """ADDRESS:PORT"""
    target: str
    """The target's IQN."""
    lun: int
    capacity_bytes: int
    allocated_bytes: int | None = None
    """What it occupies; None: not known."""

    @property
    def address(self) -> LunAddress:
        return LunAddress(self.portal, self.target, self.lun)


class Provisioner(abc.ABC):
    """Errors: StorageError, NotFoundError (no such volume), ConflictError, FenceError."""

    @abc.abstractmethod
    async def create(self, volume: VolumeName, capacity_bytes: int) -> Lun:
        """ConflictError if it exists. On failure nothing is left."""

    @abc.abstractmethod
    async def inspect(self, volume: VolumeName) -> Lun: ...

    @abc.abstractmethod
    async def list_luns(self) -> Mapping[VolumeName, Lun]: ...

    @abc.abstractmethod
    async def resize(self, volume: VolumeName, capacity_bytes: int) -> Lun:
        """Grow. ConflictError while it is in use, where that doesn't work in use."""

    @abc.abstractmethod
    async def delete(self, volume: VolumeName) -> None:
        """With its token. ConflictError while somebody is logged in to it."""

    @abc.abstractmethod
    async def grant(self, volume: VolumeName, initiator: str) -> Lun:
        """Let `initiator` log in, from now on. Idempotent."""

    @abc.abstractmethod
    async def fence(self, volume: VolumeName, token: FencingToken, initiator: str) -> None:
        """Let only `initiator` log in, also after the target's restart, and remember the token.

        Idempotent. FenceError if a newer token was remembered, or another initiator has won this
        one; nothing was changed.
        """

    @abc.abstractmethod
    async def token(self, volume: VolumeName) -> FencingToken | None:
        """The newest token that fenced the volume; None: none did."""

    @abc.abstractmethod
    async def health(self) -> PoolHealth:
        """Try the storage. StorageError: why it can't be reached."""

    async def mark(self) -> str | None:
        """As the port's; None: its settings say it all, or it can't tell."""
        return None

    async def owner(self, claimant: PoolOwner | None, instead_of: str | None) -> PoolOwner | None:
        """As the port's; None also where it can't tell."""
        return None

    @property
    @abc.abstractmethod
    def fences(self) -> bool:
        """Whether `fence` does what it says. Where not, grant, fence and token do nothing."""


class _Nothing(msgspec.Struct, frozen=True, kw_only=True):
    pass


class _Token(msgspec.Struct, frozen=True, kw_only=True):
    token: int | None = None


class _Volumes(msgspec.Struct, frozen=True, kw_only=True):
    volumes: dict[str, Lun]


class HookProvisioner(Provisioner):
    """Asks a site's program; see `storage.hooks` and docs/storage-iscsi.md."""

    def __init__(self, argv: Sequence[str], *, fences: bool = False) -> None:
        """`fences`: the hook has the operations grant, fence and token."""
        self._argv = tuple(argv)
        self._fences = fences

    @property
    def fences(self) -> bool:
        return self._fences

    async def create(self, volume: VolumeName, capacity_bytes: int) -> Lun:
        return await self._ask("create", Lun, volume=volume, capacity_bytes=capacity_bytes)

    async def inspect(self, volume: VolumeName) -> Lun:
        return await self._ask("inspect", Lun, volume=volume)

    async def list_luns(self) -> Mapping[VolumeName, Lun]:
        found = await self._ask("list", _Volumes)
        return {VolumeName(name): lun for name, lun in found.volumes.items()}

    async def resize(self, volume: VolumeName, capacity_bytes: int) -> Lun:
        return await self._ask("resize", Lun, volume=volume, capacity_bytes=capacity_bytes)

    async def delete(self, volume: VolumeName) -> None:
        await self._ask("delete", _Nothing, volume=volume)

    async def grant(self, volume: VolumeName, initiator: str) -> Lun:
        if not self._fences:
            return await self.inspect(volume)
        return await self._ask("grant", Lun, volume=volume, initiator=initiator)

    async def fence(self, volume: VolumeName, token: FencingToken, initiator: str) -> None:
        if not self._fences:
            return
        try:
            await self._ask(
                "fence",
                _Nothing,
                timeout_s=HOOK_FENCE_TIMEOUT_S,
                volume=volume,
                token=token,
                initiator=initiator,
            )
        except (FenceError, NotFoundError):
            raise
        except Exception as error:
            raise FenceError(f"volume {volume}: fence {token} is unconfirmed: {error}") from error

    async def token(self, volume: VolumeName) -> FencingToken | None:
        if not self._fences:
            return None
        found = (await self._ask("token", _Token, volume=volume)).token
        return None if found is None else FencingToken(found)

    async def health(self) -> PoolHealth:
        return await self._ask("health", PoolHealth)

    async def _ask(
        self, operation: str, answer: type[_T], *, timeout_s: float = HOOK_TIMEOUT_S, **fields: Any
    ) -> _T:
        request = {"operation": operation, **fields}
        return await call_hook(self._argv, request, answer, timeout_s=timeout_s)
