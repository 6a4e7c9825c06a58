"""The provisioner: runs beside the storage, makes volumes, and begins and ends their exports.

    python -m storage.nbd --folder /srv/volumes --address 10.0.0.5

What it has promised is written down before it is done (`volumes.VolumeState`), so one that is
killed goes on where it was: exports that should be there are found or begun again on their ports,
those that were fenced are ended. Exports outlive it. One that can't be begun (its port is taken,
its folder isn't mounted yet) is tried again until it can, and told to who asks for its volume.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
import threading
from collections import defaultdict
from collections.abc import Callable
from typing import Final, TypeVar

import msgspec

from migrator.errors import (
    ConflictError,
    FenceError,
    FerryError,
    InvalidRequest,
    NotFoundError,
    StorageError,
)
from migrator.model import VolumeInfo, VolumeName
from storage.bounded import COPIES, bounded
from storage.copying import CopyCancelled
from storage.names import check_volume_name
from storage.nbd import protocol as p
from storage.nbd.copies import Copies
from storage.nbd.exports import Export, Serving, is_free
from storage.nbd.mending import Mending
from storage.nbd.volumes import ExportState, VolumeFolder, VolumeState

REQUEST_TIMEOUT_S: Final = 30.0
COPY_TIMEOUT_S: Final = 3600.0
PORTS: Final = range(10_810, 11_810)

log = logging.getLogger(__name__)
_T = TypeVar("_T")


class Provisioner:
    """See the module. `open` brings exports and states together, `close` lets go of them."""

    def __init__(
        self, folder: VolumeFolder, serving: Serving, key: bytes | None, ports: range = PORTS
    ) -> None:
        self._folder = folder
        self._serving = serving
        self._key = key
        self._ports = ports
        self._exports: dict[str, Export] = {}
        self._drafts: dict[str, Export] = {}
        self._locks: defaultdict[str, asyncio.Lock] = defaultdict(asyncio.Lock)
        self._copies = Copies()
        self._taken: set[int] = set()
        self._mending = Mending(self._mend)

    async def open(self) -> None:
        """StorageError where the folder can't be used."""
        for draft in await self._do(self._folder.exported_drafts):
            try:  # It would keep its port, and the blocks of a file that is gone.
                await self._draft_export(draft, port=0).end()
            except FerryError as error:
                log.error("what a killed provisioner left: %s", error)
        await self._do(self._folder.discard_all)
        for volume in await self._do(self._folder.names):
            try:
                await self._apply(volume, await self._state(volume))
            except FerryError as error:
                self._mending.later(volume, str(error))

    async def close(self) -> None:
        await self._mending.close()
        for export in self._exports.values():
            export.let_go()
        drafts = tuple(self._drafts)
        ended = await asyncio.gather(*map(self._discard, drafts), return_exceptions=True)
        for draft, error in zip(drafts, ended, strict=True):
            if error is not None:
                log.error("draft %s is left to the next provisioner: %r", draft, error)

    # --- requests ----------------------------------------------------------------------------

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, one request."""
        nonce = secrets.token_hex(16)
        try:
            async with asyncio.timeout(REQUEST_TIMEOUT_S):
                writer.write(msgspec.json.encode(p.Greeting(nonce=nonce)) + b"\n")
                line = await reader.readline()
            if line:
                answer = await self._answer_while_asked(line, nonce, reader)
                writer.write(p.signed(answer, p.TO_NODE, nonce, self._key))
                async with asyncio.timeout(REQUEST_TIMEOUT_S):
                    await writer.drain()
        except (OSError, TimeoutError, ValueError) as error:
            log.warning("a connection failed: %s", error)
        finally:
            writer.close()

    async def _answer_while_asked(
        self, line: bytes, nonce: str, reader: asyncio.StreamReader
    ) -> p.Answer:
        hung_up = asyncio.ensure_future(reader.read(1))
        try:
            return await self._answer(line, nonce, hung_up)
        finally:
            hung_up.cancel()
            await asyncio.gather(hung_up, return_exceptions=True)

    async def _answer(self, line: bytes, nonce: str, hung_up: asyncio.Future[bytes]) -> p.Answer:
        try:
            request = p.parse_request(p.checked(line, p.TO_PROVISIONER, nonce, self._key))
            return await self.perform(request, hung_up)
        except FerryError as error:
            fields = error.fields if isinstance(error, InvalidRequest) else {}
            failure = p.Failure(code=error.code, message=str(error), fields=fields)
        except msgspec.DecodeError as error:
            failure = p.Failure(code=StorageError.code, message=f"{p.NOT_A_REQUEST}: {error}")
        return p.Answer(failure=failure)

    async def perform(
        self, request: p.Request, hung_up: asyncio.Future[bytes] | None = None
    ) -> p.Answer:
        """FerryErrors say what is wrong; nothing was changed then.

        `hung_up` is done once nobody waits for the answer: then no copy is made.
        """
        folder = self._folder
        match request:
            case p.TryOut():
                return p.Answer(health=await self._do(folder.health))
            case p.Mark():
                return p.Answer(mark=await self._do(folder.mark))
            case p.Owner(claimant=claimant, instead_of=instead_of):
                owner = await self._do(lambda: folder.owner(claimant, instead_of))
                return p.Answer(owner=owner)
            case p.ListVolumes():
                return p.Answer(volumes=tuple(await self._do(folder.describe_all)))
            case p.Create(volume=volume, capacity_bytes=size, draft=True):
                return await self._open_draft(volume, size)
            case p.Clone(volume=volume, new=new):
                return p.Answer(volumes=(await self._clone(volume, new, hung_up),))
            case p.Discard(draft=draft):
                await self._discard(draft)
                return p.Answer()
        volume = str(getattr(request, "volume", ""))
        check_volume_name(VolumeName(volume))
        async with self._locks[volume]:
            return await self._on_volume(volume, request)

    async def _on_volume(self, volume: str, request: p.Request) -> p.Answer:
        folder = self._folder
        match request:
            case p.Inspect():
                return p.Answer(volumes=(await self._do(lambda: folder.describe(volume)),))
            case p.Create(capacity_bytes=size):
                made = await self._do(
                    lambda: folder.publish(folder.make_draft(volume, size), volume)
                )
                return p.Answer(volumes=(made,))
            case p.Publish(draft=draft):
                await self._end_draft(draft)
                return p.Answer(volumes=(await self._do(lambda: folder.publish(draft, volume)),))
            case p.Resize(capacity_bytes=size):
                await self._refuse_used(volume, "resized")
                self._copies.end(volume, "it was resized meanwhile")
                return p.Answer(volumes=(await self._do(lambda: folder.resize(volume, size)),))
            case p.Delete():
                await self._delete(volume)
            case p.Open():
                return p.Answer(export=await self._open(request))
            case p.Close():
                await self._close(request)
            case p.Evict(members=members):
                for each in (await self._state(volume)).exports:
                    if each.read_only and each.node not in members:
                        await self._drop(volume, each)
            case p.Fence():
                await self._fence(request)
            case p.Verify():
                state = await self._state(volume)
                if down := self._down(volume, state):
                    self._mending.later(volume)
                writing = [each for each in state.exports if each.live and not each.read_only]
                return p.Answer(
                    token=state.fence,
                    openings=tuple((each.node, each.token) for each in writing),
                    down=tuple((each.node, each.token) for each in down),
                    why_down=self._mending.why(volume) if down else "",
                )
        return p.Answer()

    # --- exports -----------------------------------------------------------------------------

    async def _open(self, request: p.Open) -> p.ExportPlace:
        state = await self._state(request.volume)
        if request.token < state.fence:
            raise FenceError(
                f"volume {request.volume} is fenced by token {state.fence}, "
                f"not opened: {request.token}"
            )
        if not request.read_only:
            self._copies.end(
                request.volume,
                f"node {request.node} opened it for writing meanwhile (token {request.token})",
            )
        wanted = next(
            (
                each
                for each in state.exports
                if (each.node, each.token, each.read_only)
                == (request.node, request.token, request.read_only)
            ),
            None,
        )
        if wanted is None:
            wanted = ExportState(
                node=request.node,
                token=request.token,
                port=self._free_port(),
                read_only=request.read_only,
            )
            state = msgspec.structs.replace(state, exports=(*state.exports, wanted))
        elif not wanted.live:
            live = msgspec.structs.replace(wanted, live=True)
            rest = tuple(each for each in state.exports if each is not wanted)
            wanted, state = live, msgspec.structs.replace(state, exports=(*rest, live))
        self._taken.add(wanted.port)
        await self._write(request.volume, state)
        try:
            await self._export(request.volume, wanted).ensure()
        except BaseException:
            await asyncio.shield(self._drop(request.volume, wanted))
            raise
        return p.ExportPlace(name=_name(request.volume, wanted), port=wanted.port)

    async def _close(self, request: p.Close) -> None:
        try:
            state = await self._state(request.volume)
        except NotFoundError:
            return
        for each in state.exports:
            if each.node == request.node and each.token <= request.token:
                await self._drop(request.volume, each)

    async def _fence(self, request: p.Fence) -> None:
        """What is to be is written first: a provisioner that dies here goes on with it."""
        volume, token = request.volume, request.token
        state = await self._state(volume)
        if token <= 0 or token < state.fence:
            raise FenceError(
                f"volume {volume} is fenced by token {state.fence}; {token} is older "
                "and was refused"
            )
        if token > state.fence:
            own = [e.token for e in state.exports if e.node == request.node and not e.read_only]
            winner = (request.node, max(own)) if own else None
            exports = tuple(
                each
                if each.read_only
                else msgspec.structs.replace(each, live=(each.node, each.token) == winner)
                for each in state.exports
            )
            if winner is not None:
                self._copies.end(volume, f"node {request.node} has it for writing (token {token})")
            state = VolumeState(fence=token, winner=winner, exports=exports)
            await self._write(volume, state)
        await self._apply(volume, state)

    async def _apply(self, volume: str, state: VolumeState) -> None:
        """Those that must not be, end; then the others begin."""
        ending = [each for each in state.exports if not each.live]
        await asyncio.gather(*(self._export(volume, each).end() for each in ending))
        for each in state.exports:
            if each.live:
                await self._export(volume, each).ensure()

    async def _drop(self, volume: str, gone: ExportState) -> None:
        """End one for good, and give its port back."""
        await self._export(volume, gone).end()
        state = await self._state(volume)
        left = tuple(each for each in state.exports if each.port != gone.port)
        await self._write(volume, msgspec.structs.replace(state, exports=left))
        self._exports.pop(_name(volume, gone), None)
        self._taken.discard(gone.port)

    async def _delete(self, volume: str) -> None:
        await self._refuse_used(volume, "deleted")
        self._copies.end(volume, "it was deleted meanwhile")
        for each in (await self._state(volume)).exports:
            await self._drop(volume, each)
        await self._do(lambda: self._folder.remove(volume))

    async def _refuse_used(self, volume: str, what: str, *, by_writers: bool = False) -> None:
        used = [
            each
            for each in (await self._state(volume)).exports
            if each.live and not (by_writers and each.read_only)
        ]
        if used:
            raise ConflictError(
                f"node {used[0].node} has volume {volume} open (token {used[0].token}); "
                f"it was not {what}"
            )

    def _export(self, volume: str, state: ExportState) -> Export:
        name = _name(volume, state)
        if name not in self._exports:
            self._exports[name] = Export(
                self._serving,
                name=name,
                port=state.port,
                disk=self._folder.disk(volume),
                read_only=state.read_only,
                pid_file=self._folder.pid_file(name),
                on_death=lambda export: self._ended(volume, export),
            )
        return self._exports[name]

    def _ended(self, volume: str, export: Export) -> None:
        log.warning("export %s ended by itself", export.name)
        self._mending.later(volume)

    def _down(self, volume: str, state: VolumeState) -> list[ExportState]:
        """Those that should be there and aren't."""
        known = ((each, self._exports.get(_name(volume, each))) for each in state.exports)
        return [each for each, export in known if each.live and not (export and export.serves)]

    async def _mend(self, volume: str) -> bool:
        """Bring its exports to what its state says. Whether they are there."""
        async with self._locks[volume]:
            state = await self._state(volume)
            await self._apply(volume, state)
            return not self._down(volume, state)

    def _free_port(self) -> int:
        for port in self._ports:
            if port not in self._taken and is_free(self._serving.address, port):
                return port
        raise StorageError(f"all {len(self._ports)} ports for exports are taken")

    # --- copies ------------------------------------------------------------------------------

    async def _clone(
        self, volume: str, new: str, hung_up: asyncio.Future[bytes] | None
    ) -> VolumeInfo:
        """ConflictError: somebody has it for writing, or had meanwhile. Nothing is left then."""
        check_volume_name(VolumeName(volume))
        async with self._locks[volume]:
            await self._refuse_used(volume, "cloned", by_writers=True)
            copy = self._copies.begin(volume)
        if hung_up is not None:
            hung_up.add_done_callback(lambda _: copy.end("whoever asked for it doesn't wait"))
        try:
            draft = await self._do(
                lambda: self._folder.copy(volume, new, copy.given_up),
                timeout_s=COPY_TIMEOUT_S,
                kind=COPIES,
                given_up=copy.given_up,
                undo=self._folder.discard,
            )
        except (CopyCancelled, StorageError) as error:
            if not copy.why:
                raise
            raise ConflictError(f"volume {volume} was not cloned: {copy.why}") from error
        finally:
            self._copies.done(copy)
        try:
            if copy.why:
                raise ConflictError(f"volume {volume} was not cloned: {copy.why}")
            async with self._locks[new]:
                return await self._do(
                    lambda: self._folder.publish(draft, new), timeout_s=COPY_TIMEOUT_S, kind=COPIES
                )
        except BaseException:
            await asyncio.shield(self._do(lambda: self._folder.discard(draft)))
            raise

    # --- drafts ------------------------------------------------------------------------------

    async def _open_draft(self, volume: str, capacity_bytes: int) -> p.Answer:
        draft = await self._do(lambda: self._folder.make_draft(volume, capacity_bytes))
        for left in await self._do(lambda: self._folder.abandoned_drafts(draft)):
            await self._discard(left)
        port = self._free_port()
        self._taken.add(port)
        export = self._drafts[draft] = self._draft_export(draft, port)
        try:
            await export.ensure()
        except BaseException:
            await asyncio.shield(self._discard(draft))
            raise
        return p.Answer(draft=draft, export=p.ExportPlace(name=draft, port=port))

    def _draft_export(self, draft: str, port: int) -> Export:
        return Export(
            self._serving,
            name=draft,
            port=port,
            disk=self._folder.path / draft,
            read_only=False,
            pid_file=self._folder.pid_file(draft),
            on_death=lambda _: None,
        )

    async def _end_draft(self, draft: str) -> None:
        export = self._drafts.pop(draft, None)
        if export is not None:
            await export.end()
            self._taken.discard(export.port)

    async def _discard(self, draft: str) -> None:
        await self._end_draft(draft)
        await self._do(lambda: self._folder.discard(draft))

    # --- parts -------------------------------------------------------------------------------

    async def _state(self, volume: str) -> VolumeState:
        state = await self._do(lambda: self._folder.read_state(volume))
        self._taken |= {each.port for each in state.exports}  # The folder may be mounted by now.
        return state

    async def _write(self, volume: str, state: VolumeState) -> None:
        await self._do(lambda: self._folder.write_state(volume, state))

    async def _do(
        self,
        work: Callable[[], _T],
        *,
        timeout_s: float = REQUEST_TIMEOUT_S,
        kind: str = "",
        given_up: threading.Event | None = None,
        undo: Callable[[_T], None] | None = None,
    ) -> _T:
        return await bounded(
            work, "the storage", timeout_s=timeout_s, kind=kind, given_up=given_up, undo=undo
        )


def _name(volume: str, state: ExportState) -> str:
    return f"{volume}.{state.node}.{state.token}{'.ro' if state.read_only else ''}"
