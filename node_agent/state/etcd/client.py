"""One call to etcd, answered by whichever member can.

    call(method, request)
      member A ── refused, or knows no leader: it did nothing ──► member B, at once
               └─ cut off, or silent for a while: it may have done it ──► member B, `uncertain`
      each member tried once: a short pause, then again, until the call's time is over

What a caller gets is the answer, and whether an earlier try may have been carried out as well; a
write finds out what that means (`store.py` marks each write).

Certificates run out and are replaced: when no member answers the files are read again, and where
they have changed everything is connected anew with them. Nobody has to restart an agent for it.

aetcd brings etcd's messages and gRPC stubs. Its own client takes one endpoint, no TLS, and doesn't
fail over, so the calls are made here.
"""

from __future__ import annotations

import asyncio
import functools
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import grpc
import grpc.aio
from aetcd import rpc

from migrator.errors import StoreError
from migrator.ports import Struct
from migrator.tls import TlsFiles

log = logging.getLogger(__name__)

_TRY_S: Final = 1.5
"""A member that is silent for so long is left for the next. An election takes about a second."""
_ROUND_PAUSE_S: Final = 0.1
_MESSAGE_BYTES_MAX: Final = 64 * 1024 * 1024
_OPTIONS: Final = (
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1000),
    ("grpc.max_reconnect_backoff_ms", 1000),
    # etcd closes connections that ask more often than every 5 s, and those that ask while nothing
    # is under way on them (too_many_pings): a member that was asked once, in another's stead. One
    # that is gone meanwhile costs the next call its _TRY_S.
    ("grpc.keepalive_time_ms", 6000),
    ("grpc.keepalive_timeout_ms", 3000),
    ("grpc.keepalive_permit_without_calls", 0),
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_receive_message_length", _MESSAGE_BYTES_MAX),
)
METADATA: Final = (("hasleader", "true"),)
"""A member that is cut off from the others says so, instead of waiting or showing old state."""

_NOTHING_DONE: Final = ("failed to connect", "connection refused", "etcdserver: no leader")
_PASSING: Final = frozenset(
    {grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED, grpc.StatusCode.CANCELLED}
)


class EtcdSettings(Struct, frozen=True, kw_only=True):
    """Where the members are. With `tls` everything goes over mutual TLS."""

    endpoints: tuple[tuple[str, int], ...]
    """(host, port) of each member that may be asked."""
    prefix: str = "/ferry/"
    """All of Ferry's keys are below it; clusters that share an etcd have different ones."""
    tls: TlsFiles | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """`uncertain`: an earlier try of the same request may have been carried out too."""

    response: Any
    uncertain: bool


class Member:
    """One member's channel and stubs."""

    def __init__(self, host: str, port: int, credentials: grpc.ChannelCredentials | None) -> None:
        self.name = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.channel = (
            grpc.aio.insecure_channel(self.name, options=_OPTIONS)
            if credentials is None
            else grpc.aio.secure_channel(self.name, credentials, options=_OPTIONS)
        )
        stub = rpc.KVStub(self.channel)
        self.calls = {
            "range": stub.Range,
            "txn": stub.Txn,
            "compact": stub.Compact,
        }
        self.watch = rpc.WatchStub(self.channel).Watch


class EtcdClient:
    """See the module. Made and used on one event loop. `close` ends its channels."""

    def __init__(self, settings: EtcdSettings, *, timeout_s: float) -> None:
        self._settings = settings
        self._timeout_s = timeout_s
        self._members: list[Member] = []
        self._retired: list[Member] = []
        """Of the keys before: calls that had begun may use them yet."""
        self._keys: _Keys | None = None
        self._first = 0
        """The member that answered last."""
        self._silent_since_s: float | None = None
        """No member has answered since; None: one has."""

    async def open(self) -> None:
        """Read the keys. StoreError if they can't be read; nothing is connected yet."""
        _keep_grpc_alive()
        if self._settings.tls is not None:
            self._keys = await asyncio.to_thread(_read, self._settings.tls)
        self._connect()

    def _connect(self) -> None:
        credentials = None if self._keys is None else grpc.ssl_channel_credentials(*self._keys)
        self._members = [Member(host, port, credentials) for host, port in self._settings.endpoints]

    async def _connect_anew(self) -> None:
        """If the files aren't what they were."""
        if self._settings.tls is None:
            return
        try:
            keys = await asyncio.to_thread(_read, self._settings.tls)
        except StoreError as error:
            log.warning("%s; going on with what was read before", error)
            return
        if keys == self._keys or not self._members:
            return
        log.warning("etcd: no member answers, and store.tls_* have changed: connecting with them")
        retired, self._retired = self._retired, self._members
        self._keys = keys
        self._connect()
        for member in retired:
            await member.channel.close()

    async def close(self) -> None:
        members = [*self._members, *self._retired]
        self._members, self._retired = [], []
        for member in members:
            await member.channel.close()

    @property
    def name(self) -> str:
        """For messages: etcd and its members."""
        return "etcd at " + ", ".join(f"{host}:{port}" for host, port in self._settings.endpoints)

    def in_order(self) -> Sequence[Member]:
        """The members, the one that answered last first."""
        return self._members[self._first :] + self._members[: self._first]

    def prefer(self, member: Member) -> None:
        """Ask this one first from now on."""
        if member in self._members:  # Else it is of the keys before.
            self._first = self._members.index(member)

    async def call(self, method: str, request: Any) -> Answer:
        """Ask until a member answers. StoreError after `timeout_s`, or at once if etcd refuses."""
        loop = asyncio.get_running_loop()
        deadline_s = loop.time() + self._timeout_s
        uncertain, reasons = False, dict[str, str]()
        while True:
            for member in self.in_order():
                left_s = deadline_s - loop.time()
                if left_s <= 0:
                    self._silent_since_s = self._silent_since_s or deadline_s - self._timeout_s
                    raise self._silent(uncertain, reasons)
                try:
                    response = await member.calls[method](
                        request, timeout=min(_TRY_S, left_s), metadata=METADATA
                    )
                except grpc.aio.AioRpcError as error:
                    if not _is_passing(error):
                        raise StoreError(f"{self.name}: {_words(error)}") from error
                    uncertain = uncertain or not did_nothing(error)
                    silent = error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
                    if not (silent and left_s < _TRY_S and member.name in reasons):
                        reasons[member.name] = _words(error)  # Who had little time said nothing.
                else:
                    if member is not self._members[self._first]:
                        log.warning("etcd: %s answers instead of %s", member.name, _told(reasons))
                        self.prefer(member)
                    self._answered()
                    return Answer(response, uncertain)
            await self._connect_anew()
            await asyncio.sleep(_ROUND_PAUSE_S)

    def _answered(self) -> None:
        if self._silent_since_s is not None:
            silent_s = asyncio.get_running_loop().time() - self._silent_since_s
            self._silent_since_s = None
            log.warning("%s answers again, after %.0f s", self.name, silent_s)

    def _silent(self, uncertain: bool, reasons: dict[str, str]) -> StoreError:
        outcome = "whether a write was carried out is unknown" if uncertain else "nothing was done"
        return StoreError(
            f"no member of etcd answered within {self._timeout_s:g} s ({_told(reasons)}); {outcome}"
        )


@functools.cache
def _keep_grpc_alive() -> None:
    """Else gRPC ends its thread with its last channel, and blocks the event loop meanwhile."""
    grpc.aio.init_grpc_aio()


def _is_passing(error: grpc.aio.AioRpcError) -> bool:
    # A member whose own deadline passed, since it has no majority, gives it no code of its own.
    return error.code() in _PASSING or "context deadline exceeded" in (error.details() or "")


def did_nothing(error: grpc.aio.AioRpcError) -> bool:
    """Whether the member certainly didn't carry the call out."""
    details = (error.details() or "").lower()
    return error.code() is grpc.StatusCode.UNAVAILABLE and any(
        words in details for words in _NOTHING_DONE
    )


_LAST_ERROR: Final = re.compile(r"^[A-Z_]+: (ipv[46]:\S+: )?")
"""gRPC's code and address before what happened: both are told otherwise."""
_WORDS_MAX: Final = 200


def _words(error: grpc.aio.AioRpcError) -> str:
    if error.code() is grpc.StatusCode.DEADLINE_EXCEEDED:
        return "no answer"
    details = str(error.details() or error.code().name.lower())
    said, _, last = details.partition("; last error: ")
    return _LAST_ERROR.sub("", last)[:_WORDS_MAX] or said.split(";")[0]


def _told(reasons: dict[str, str]) -> str:
    return "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or "no time left"


_Keys = tuple[bytes, bytes, bytes]
"""Authorities, private key, certificate: as gRPC takes them."""


def _read(files: TlsFiles) -> _Keys:
    paths = (files.authority_path, files.key_path, files.certificate_path)
    try:
        authority, key, certificate = (Path(path).read_bytes() for path in paths)
    except OSError as error:
        raise StoreError(f"store.tls: {error}") from error
    return authority, key, certificate
