"""Volumes behind an NBD server: each node and token has an export of its own.

    open    the provisioner begins an export for (node, token); QEMU connects to its port
    fence   it ends every other writing export, and answers when their servers are gone

A writer that was fenced waits for its server (reconnect-delay), then fails, and its guest pauses;
what it sends arrives nowhere. Only raw volumes: a qcow2 file grows, and an export doesn't.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import ClassVar, Final

import msgspec

from migrator.errors import (
    FenceError,
    FerryError,
    InvalidRequest,
    NotFoundError,
    StorageError,
    from_code,
    words,
)
from migrator.model import (
    BlockSource,
    DiskFormat,
    Fencing,
    FencingToken,
    NbdSource,
    NodeName,
    PoolHealth,
    PoolOwner,
    TlsPsk,
    VolumeInfo,
    VolumeName,
)
from migrator.ports import VolumeDriver
from storage import raw_only
from storage.bounded import bounded, run_program
from storage.names import (
    check_volume_name,
)
from storage.nbd import protocol as p
from storage.outage import Outage
from storage.settings import NbdSettings

CALL_TIMEOUT_S: Final = 15.0
HEALTH_TIMEOUT_S: Final = 4.0
COPY_TIMEOUT_S: Final = 3600.0


class NbdPool(VolumeDriver):
    """One provisioner's volumes, as one node uses them."""

    name: ClassVar[str] = "nbd"

    def __init__(
        self, settings: NbdSettings, node: NodeName, *, qemu_img: str = "qemu-img"
    ) -> None:
        """InvalidRequest unless exactly one of provisioner and hook is given."""
        if (settings.provisioner is None) == (settings.hook is None):
            right = "exactly one of provisioner and hook"
            raise InvalidRequest(f"pool {settings.name} must have {right}", {"provisioner": right})
        self._settings = settings
        self._node = node
        self._qemu_img = qemu_img
        self._where = f"pool {settings.name}"
        self._outage = Outage()
        self._host, self._port = "", 0
        if settings.provisioner is not None:
            host, _, port = settings.provisioner.rpartition(":")
            self._host, self._port = host.strip("[]"), int(port)
            if not 1 <= self._port <= 65535:
                right = "a port from 1 to 65535"
                raise InvalidRequest(
                    f"{settings.provisioner} has not {right}", {"provisioner": right}
                )

    @property
    def fencing(self) -> Fencing:
        return Fencing(
            remote_writers=True,
            method="exports: each node and token has one of its own, and the server ends every "
            "other one",
        )

    async def health(self) -> PoolHealth:
        try:
            answer = await self._ask(p.TryOut(), timeout_s=HEALTH_TIMEOUT_S)
        except StorageError as error:
            return PoolHealth(reachable=False, reason=str(error))
        return answer.health or PoolHealth(reachable=True)

    async def mark(self) -> str | None:
        """None also where the provisioner is older, or a hook: they don't know the question."""
        try:
            return (await self._ask(p.Mark(), timeout_s=HEALTH_TIMEOUT_S)).mark
        except StorageError:
            return None

    async def owner(
        self, claimant: PoolOwner | None = None, *, instead_of: str | None = None
    ) -> PoolOwner | None:
        """None also where the provisioner is older, or a hook: they don't know the question."""
        request = p.Owner(claimant=claimant, instead_of=instead_of)
        try:
            return (await self._ask(request, timeout_s=HEALTH_TIMEOUT_S)).owner
        except FerryError as error:
            if self._settings.hook is None and p.NOT_A_REQUEST not in str(error):
                raise
            return None

    # --- volumes -----------------------------------------------------------------------------

    async def create(
        self,
        volume: VolumeName,
        *,
        capacity_bytes: int,
        format: DiskFormat,
        image: Path | None = None,
    ) -> VolumeInfo:
        await raw_only.check_new(
            self._where,
            volume,
            capacity_bytes=capacity_bytes,
            format=format,
            image=image,
            why_raw="an export can't grow, as a qcow2 file must",
        )
        if image is None:
            request = p.Create(volume=volume, capacity_bytes=capacity_bytes)
            return self._one(await self._ask(request))
        drafted = p.Create(volume=volume, capacity_bytes=capacity_bytes, draft=True)
        draft = await self._ask(drafted)
        if draft.draft is None:
            raise StorageError(f"{self._where}: the provisioner made no draft")
        try:
            await self._fill(image, self._place(draft))
            return self._one(await self._ask(p.Publish(volume=volume, draft=draft.draft)))
        except BaseException:
            with contextlib.suppress(StorageError):
                await asyncio.shield(self._ask(p.Discard(draft=draft.draft)))
            raise

    async def inspect(self, volume: VolumeName) -> VolumeInfo:
        check_volume_name(volume)
        return self._one(await self._ask(p.Inspect(volume=volume)))

    async def list_volumes(self) -> Sequence[VolumeInfo]:
        answer = await self._ask(p.ListVolumes())
        return [self._named(each) for each in answer.volumes]

    async def delete(self, volume: VolumeName) -> None:
        check_volume_name(volume)
        await self._ask(p.Delete(volume=volume))

    async def resize(self, volume: VolumeName, capacity_bytes: int) -> VolumeInfo:
        check_volume_name(volume)
        return self._one(await self._ask(p.Resize(volume=volume, capacity_bytes=capacity_bytes)))

    async def clone(
        self, volume: VolumeName, new: VolumeName, *, linked: bool = False
    ) -> VolumeInfo:
        """A full copy, made by the provisioner. ConflictError: a node has it open for writing, or
        has opened it meanwhile, which waits for no copy.
        """
        raw_only.check_clone(self.name, volume, new, linked=linked)
        request = p.Clone(volume=volume, new=new)
        return self._one(await self._ask(request, timeout_s=COPY_TIMEOUT_S))

    # --- who may write -----------------------------------------------------------------------

    async def open(
        self, volume: VolumeName, token: FencingToken, *, read_only: bool
    ) -> BlockSource:
        check_volume_name(volume)
        request = p.Open(volume=volume, node=self._node, token=token, read_only=read_only)
        place = self._place(await self._ask(request))
        return msgspec.structs.replace(place, read_only=read_only)

    async def close(self, volume: VolumeName, token: FencingToken) -> None:
        check_volume_name(volume)
        await self._ask(p.Close(volume=volume, node=self._node, token=token))

    async def evict(self, volume: VolumeName, members: Collection[NodeName]) -> None:
        """Nothing also where the provisioner is older, or a hook: they don't know the request."""
        check_volume_name(volume)
        request = p.Evict(volume=volume, members=tuple(sorted(members)))
        try:
            await self._ask(request)
        except StorageError as error:
            if self._settings.hook is None and p.NOT_A_REQUEST not in str(error):
                raise

    async def fence(self, volume: VolumeName, token: FencingToken) -> None:
        check_volume_name(volume)
        try:
            await self._ask(p.Fence(volume=volume, node=self._node, token=token))
        except (FenceError, NotFoundError):
            raise
        except StorageError as error:
            raise FenceError(f"volume {volume}: fence {token} is unconfirmed: {error}") from error

    async def verify(self, volume: VolumeName) -> FencingToken | None:
        check_volume_name(volume)
        return FencingToken((await self._ask(p.Verify(volume=volume))).token) or None

    async def reach(self, volume: VolumeName) -> None:
        """Also this node's export: the provisioner may answer while that is down."""
        check_volume_name(volume)
        answer = await self._ask(p.Verify(volume=volume))
        if any(node == self._node for node, _ in answer.down):
            why = f": {answer.why_down}" if answer.why_down else ""
            raise StorageError(
                f"{self._where}: the export of volume {volume} to node {self._node} is down; the "
                f"provisioner tries to begin it again{why}"
            )

    async def shows_opened(
        self, volume: VolumeName, node: NodeName, token: FencingToken
    ) -> bool | None:
        check_volume_name(volume)
        openings = (await self._ask(p.Verify(volume=volume))).openings
        return None if openings is None else (node, token) in openings

    # --- the provisioner ---------------------------------------------------------------------

    async def _ask(self, request: p.Request, *, timeout_s: float = CALL_TIMEOUT_S) -> p.Answer:
        """FerryErrors as the provisioner raised them; StorageError: no answer, outcome unknown."""
        if self._settings.hook is not None:
            body = msgspec.json.encode(request)
            printed = await run_program(
                self._where,
                [self._settings.hook],
                stdin=body,
                timeout_s=timeout_s,
                with_group=True,
            )
            text = printed.decode(errors="replace")
        else:
            text = await self._ask_server(request, timeout_s)
        try:
            answer = msgspec.json.decode(text, type=p.Answer)
        except msgspec.DecodeError as error:
            raise StorageError(f"{self._where}: the answer is none: {error}") from error
        if answer.failure is not None:
            failed = from_code(answer.failure.code, f"{self._where}: {answer.failure.message}")
            if isinstance(failed, InvalidRequest):
                failed.fields = dict(answer.failure.fields)
            raise failed
        return answer

    async def _ask_server(self, request: p.Request, timeout_s: float) -> str:
        key = await self._key()
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(timeout_s):
                reader, writer = await asyncio.open_connection(
                    self._host, self._port, limit=p.LINE_BYTES_MAX
                )
                nonce = msgspec.json.decode(await reader.readline(), type=p.Greeting).nonce
                writer.write(p.signed(request, p.TO_PROVISIONER, nonce, key))
                line = await reader.readline()
        except TimeoutError as error:
            raise StorageError(
                f"{self._where}: the provisioner at {self._settings.provisioner} didn't answer in "
                f"{timeout_s:.0f} s{self._outage.failed()}"
            ) from error
        except (OSError, ValueError) as error:
            raise StorageError(
                f"{self._where}: the provisioner at {self._settings.provisioner} can't be asked: "
                f"{words(error)}{self._outage.failed()}"
            ) from error
        finally:
            if writer is not None:
                writer.close()
        self._outage.answered()
        return p.checked(line, p.TO_NODE, nonce, key)

    async def _key(self) -> bytes | None:
        directory = self._settings.tls_directory
        if directory is None:
            return None
        return await bounded(
            lambda: p.read_key(Path(directory), self._settings.tls_username), self._where
        )

    # --- parts -------------------------------------------------------------------------------

    def _place(self, answer: p.Answer) -> NbdSource:
        place = answer.export
        if place is None:
            raise StorageError(f"{self._where}: the provisioner named no export")
        settings = self._settings
        tls = None
        if settings.tls_directory is not None:
            tls = TlsPsk(directory=settings.tls_directory, username=settings.tls_username)
        return NbdSource(
            host=place.host or self._host,
            port=place.port,
            export=place.name,
            tls=tls,
            reconnect_delay_s=settings.reconnect_delay_s,
            format=DiskFormat.RAW,
        )

    async def _fill(self, image: Path, place: NbdSource) -> None:
        """Copy an image over NBD, but for what it has of zeroes: the draft is empty."""
        options: dict[str, object] = {
            "driver": "nbd",
            "server.type": "inet",
            "server.host": place.host,
            "server.port": str(place.port),
            "export": place.export,
        }
        command = [self._qemu_img, "convert"]
        if place.tls is not None:
            credentials = {
                "qom-type": "tls-creds-psk",
                "id": "tls0",
                "endpoint": "client",
                "dir": place.tls.directory,
                "username": place.tls.username,
            }
            command += ["--object", json.dumps(credentials)]
            options["tls-creds"] = "tls0"
        target = ",".join(
            f"{key}={str(value).replace(',', ',,')}" for key, value in options.items()
        )
        command += [
            "-n",
            "--target-is-zero",
            "-f",
            "raw",
            "--target-image-opts",
            str(image),
            target,
        ]
        await run_program(self._where, command, timeout_s=COPY_TIMEOUT_S)

    def _one(self, answer: p.Answer) -> VolumeInfo:
        if len(answer.volumes) != 1:
            raise StorageError(f"{self._where}: the provisioner named no volume")
        return self._named(answer.volumes[0])

    def _named(self, volume: VolumeInfo) -> VolumeInfo:
        return msgspec.structs.replace(volume, pool=self._settings.name)
