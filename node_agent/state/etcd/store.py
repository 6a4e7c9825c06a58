"""The state store on etcd: the port's calls as transactions that compare a key's revision.

    PREFIX + "k/" + key        16 bytes that name the write, then the value
    PREFIX + "s/" + prefix     the last number given out below `prefix`, marked in the same way

etcd's own revision is the store's revision. Every write is marked with random bytes: when an answer
was lost and the write is tried again at another member, the compare fails if the first try got
through, and the mark says whether it was this write or somebody else's. So a member that dies costs
time and no certainty. Where even that can't tell (somebody has written since), it is a StoreError
with an unknown outcome, as the port says.
"""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import weakref
from collections.abc import AsyncIterator, Iterable, Sequence
from typing import Any, ClassVar, Final

from aetcd import rpc

from migrator.errors import StoreError
from node_agent.state.etcd.client import Answer, EtcdClient, EtcdSettings
from node_agent.state.etcd.watch import WatchStream
from node_agent.state.port import Change, Entry, StateStore, Swap, Written
from node_agent.state.watches import KEPT_CHANGES, StoreClosed, Watch, check_key, sequence_key

MARK_BYTES: Final = 16
_COMPACT_EVERY: Final = 256
"""Revisions of the whole etcd: who makes the last of so many forgets old ones."""
_TRIES: Final = 64
"""Others may write in between so often."""


class EtcdStore(StateStore):
    """See the module. `operation_timeout_s` bounds each call, over all members."""

    name: ClassVar[str] = "etcd"

    def __init__(self, settings: EtcdSettings, *, operation_timeout_s: float = 5.0) -> None:
        if not settings.endpoints:
            raise StoreError("etcd: no member is named")
        self._client = EtcdClient(settings, timeout_s=operation_timeout_s)
        self._keys = (settings.prefix + "k/").encode()
        self._sequences = (settings.prefix + "s/").encode()
        self._open = False
        self._streams: set[WatchStream] = set()
        self._seen: dict[str, int] = {}
        """The revision at which a key was last written by `put`."""
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._compaction: asyncio.Task[None] | None = None

    # --- life --------------------------------------------------------------------------------

    async def open(self) -> None:
        if self._open:
            raise StoreError("etcd: the store is open already")
        await self._client.open()
        self._open = True
        try:
            await self.get("nodes/none")  # Says now, and not later, that nobody answers.
        except BaseException:
            await self.close()
            raise

    async def close(self) -> None:
        """End every watch and close the channels. Idempotent."""
        if not self._open:
            return
        self._open = False
        for stream in list(self._streams):
            await stream.close()
        if self._compaction is not None:
            self._compaction.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._compaction
        await self._client.close()

    # --- reads -------------------------------------------------------------------------------

    async def get(self, key: str) -> Entry | None:
        answer = await self._ask("range", rpc.RangeRequest(key=self._key(key)))
        return next((self._entry(kv) for kv in answer.response.kvs), None)

    async def list_prefix(self, prefix: str) -> Sequence[Entry]:
        first = self._key(prefix)
        answer = await self._ask("range", rpc.RangeRequest(key=first, range_end=_after(first)))
        return [self._entry(kv) for kv in answer.response.kvs]

    async def list_written(self, prefix: str, since_revision: int) -> Written:
        """`era` is the term of the members' leader: a restored etcd begins anew."""
        first = self._key(prefix)
        request = rpc.RangeRequest(
            key=first, range_end=_after(first), min_mod_revision=since_revision + 1
        )
        response = (await self._ask("range", request)).response
        return Written(
            entries=[self._entry(kv) for kv in response.kvs],
            count=int(response.count),
            revision=int(response.header.revision),
            era=int(response.header.raft_term),
        )

    def watch(self, prefix: str, since_revision: int | None = None) -> AsyncIterator[Change]:
        """As SqliteStore.watch. A member that is lost is replaced by the next, without a gap."""
        if not self._open:
            raise StoreClosed("etcd: the store is not open")
        watch = Watch(prefix)
        first = self._key(prefix)
        stream = WatchStream(
            self._client, watch, first, _after(first), since_revision, self._changes
        )
        self._streams.add(stream)
        stream.task.add_done_callback(lambda _: self._streams.discard(stream))
        return watch

    # --- writes ------------------------------------------------------------------------------

    async def put_if(self, key: str, value: bytes, expected_revision: int | None) -> int | None:
        check_key(key)
        mark = secrets.token_bytes(MARK_BYTES)
        answer = await self._write(
            compare=[_at(self._key(key), expected_revision)],
            success=[_put(self._key(key), mark + value)],
            failure=[_get(self._key(key))],
        )
        if answer.response.succeeded:
            return int(answer.response.header.revision)
        if not answer.uncertain:
            return None
        for kv in answer.response.responses[0].response_range.kvs:
            if kv.value[:MARK_BYTES] == mark:
                return int(kv.mod_revision)
            if kv.mod_revision == expected_revision:
                return None  # Unreachable unless etcd lies; it says that nothing was written.
        raise StoreError(
            f"etcd: an answer about {key} was lost and the key was written since; whether this "
            "write was carried out is unknown"
        )

    async def put(self, key: str, value: bytes) -> int:
        """Compares all the same: a try that was thought lost must not overwrite a later one."""
        check_key(key)
        async with self._own_turn(key):
            expected = self._seen.get(key)
            for _ in range(_TRIES):
                written = await self.put_if(key, value, expected)
                if written is not None:
                    self._seen[key] = written
                    return written
                entry = await self.get(key)
                expected = None if entry is None else entry.revision
        raise StoreError(f"etcd: {key} is written by somebody else all the time; nothing was done")

    async def append(self, prefix: str, value: bytes, *, keep: int) -> int:
        sequence_key(prefix, 0)
        async with self._own_turn(prefix):
            for _ in range(_TRIES):
                mark = secrets.token_bytes(MARK_BYTES)
                number, unchanged, writes = await self._next(prefix, value, keep, mark)
                counter = self._counter(prefix)
                answer = await self._write(
                    compare=[unchanged], success=writes, failure=[_get(counter)]
                )
                if answer.response.succeeded or _has(mark, _found(answer)):
                    return number
                if answer.uncertain:
                    raise StoreError(
                        f"etcd: an answer about {prefix} was lost; whether it was appended to is "
                        "unknown"
                    )
        raise StoreError(f"etcd: {prefix} is written by others all the time; nothing was done")

    async def append_if(self, prefix: str, value: bytes, *, keep: int, swap: Swap) -> bool:
        """The key says how it went, and not the counter, which others may raise meanwhile."""
        check_key(swap.key)
        sequence_key(prefix, 0)
        key, mark, uncertain = self._key(swap.key), secrets.token_bytes(MARK_BYTES), False
        async with self._own_turn(prefix):
            for _ in range(_TRIES):
                _, unchanged, writes = await self._next(prefix, value, keep, mark)
                answer = await self._write(
                    compare=[_at(key, swap.expected_revision), unchanged],
                    success=[*writes, _put(key, mark + swap.value)],
                    failure=[_get(key)],
                )
                kv = None if answer.response.succeeded else _found(answer)
                if answer.response.succeeded or _has(mark, kv):
                    return True
                uncertain = uncertain or answer.uncertain
                revision = None if kv is None else int(kv.mod_revision)
                if revision != swap.expected_revision and not uncertain:
                    return False
                if revision != swap.expected_revision:
                    break
        if uncertain:
            raise StoreError(
                f"etcd: an answer about {swap.key} was lost; whether this write was carried out "
                "is unknown"
            )
        raise StoreError(f"etcd: {prefix} is written by others all the time; nothing was done")

    async def _next(
        self, prefix: str, value: bytes, keep: int, mark: bytes
    ) -> tuple[int, Any, list[Any]]:
        """The next number below `prefix`, what it rests on, and the writes of that entry."""
        counter = self._counter(prefix)
        found = await self._ask("range", rpc.RangeRequest(key=counter))
        kv = next(iter(found.response.kvs), None)
        number = 1 + (0 if kv is None else int(kv.value[MARK_BYTES:]))
        oldest = self._key(sequence_key(prefix, max(0, number - max(keep, 1) + 1)))
        writes = [
            _put(counter, mark + str(number).encode()),
            _delete(self._key(sequence_key(prefix, 0)), oldest),
            _put(self._key(sequence_key(prefix, number)), mark + value),
        ]
        return number, _at(counter, None if kv is None else int(kv.mod_revision)), writes

    def _counter(self, prefix: str) -> bytes:
        return self._sequences + prefix.encode()

    async def delete_if(self, key: str, expected_revision: int) -> bool:
        name = self._key(key)
        answer = await self._write(
            compare=[_at(name, expected_revision)], success=[_delete(name)], failure=[_get(name)]
        )
        if answer.response.succeeded or not answer.uncertain:
            return bool(answer.response.succeeded)
        raise StoreError(f"etcd: an answer about {key} was lost; whether it was deleted is unknown")

    # --- inside ------------------------------------------------------------------------------

    def _own_turn(self, name: str) -> asyncio.Lock:
        """So that a read and the write that compares with it contend with other agents only."""
        lock = self._locks.get(name)
        if lock is None:
            lock = self._locks[name] = asyncio.Lock()
        return lock

    def _key(self, key: str) -> bytes:
        return self._keys + key.encode()

    def _entry(self, kv: Any) -> Entry:
        key = kv.key[len(self._keys) :].decode()
        return Entry(key=key, value=_unmarked(key, kv.value), revision=int(kv.mod_revision))

    def _changes(self, events: Iterable[Any]) -> Iterable[Change]:
        for event in events:
            key = event.kv.key[len(self._keys) :].decode()
            deleted = event.type == rpc.Event.DELETE
            yield Change(
                key=key,
                value=None if deleted else _unmarked(key, event.kv.value),
                revision=int(event.kv.mod_revision),
            )

    async def _ask(self, method: str, request: Any) -> Answer:
        if not self._open:
            raise StoreClosed("etcd: the store is not open")
        beginning = [stream.began for stream in self._streams if not stream.began.done()]
        if beginning:  # A watch begins before every later call.
            await asyncio.wait(beginning)
        return await self._client.call(method, request)

    async def _write(
        self, *, compare: Sequence[Any], success: Sequence[Any], failure: Sequence[Any]
    ) -> Answer:
        answer = await self._ask(
            "txn", rpc.TxnRequest(compare=compare, success=success, failure=failure)
        )
        revision = int(answer.response.header.revision)
        due = answer.response.succeeded and revision % _COMPACT_EVERY == 0
        at_it = self._compaction is not None and not self._compaction.done()
        if due and revision > KEPT_CHANGES and not at_it:
            self._compaction = asyncio.create_task(self._compact(revision - KEPT_CHANGES))
        return answer

    async def _compact(self, revision: int) -> None:
        """Forget old revisions, or etcd's database fills up.

        By whoever made a revision that is due: one agent, however many there are. If that dies,
        or etcd is away, the next one forgets more.
        """
        with contextlib.suppress(StoreError):
            await self._client.call("compact", rpc.CompactionRequest(revision=revision))


def _found(answer: Answer) -> Any | None:
    """What a write that failed its compare has read instead."""
    return next(iter(answer.response.responses[0].response_range.kvs), None)


def _has(mark: bytes, kv: Any | None) -> bool:
    return kv is not None and bool(kv.value[:MARK_BYTES] == mark)


def _unmarked(key: str, value: bytes) -> bytes:
    if len(value) < MARK_BYTES:
        raise StoreError(f"etcd: {key} was not written by Ferry; it was left as it is")
    return value[MARK_BYTES:]


def _after(prefix: bytes) -> bytes:
    """The first key behind all that begin with `prefix`."""
    return prefix[:-1] + bytes([prefix[-1] + 1])


def _at(key: bytes, revision: int | None) -> Any:
    """Compare: the key was last written at `revision`; None (0 in etcd): it isn't there."""
    return rpc.Compare(
        key=key, target=rpc.Compare.MOD, result=rpc.Compare.EQUAL, mod_revision=revision or 0
    )


def _put(key: bytes, value: bytes) -> Any:
    return rpc.RequestOp(request_put=rpc.PutRequest(key=key, value=value))


def _get(key: bytes) -> Any:
    return rpc.RequestOp(request_range=rpc.RangeRequest(key=key))


def _delete(first: bytes, end: bytes = b"") -> Any:
    return rpc.RequestOp(request_delete_range=rpc.DeleteRangeRequest(key=first, range_end=end))
