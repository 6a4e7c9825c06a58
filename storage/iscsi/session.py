"""One iSCSI session to one LUN, driven by the event loop.

    connect ── command, command, ... ── close       every call has a deadline

libiscsi never blocks here: its descriptor is watched by the loop, and `iscsi_service` does what is
ready. So a target that hangs costs a timeout, and no thread. A session that broke, timed out or was
cancelled in a command is dead for good: make another.
"""

from __future__ import annotations

import asyncio
import ctypes
import select
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Final

from migrator.errors import StorageError
from storage.iscsi import library

CONNECT_TIMEOUT_S: Final = 5.0
COMMAND_TIMEOUT_S: Final = 5.0
_LOGOUT_TIMEOUT_S: Final = 1.0
_ISID_MASK: Final = 0xFFFFFF


@dataclass(frozen=True, slots=True)
class Credentials:
    """CHAP. Never printed."""

    user: str
    secret: str

    def __repr__(self) -> str:
        return f"Credentials(user={self.user!r})"


@dataclass(frozen=True, slots=True)
class LunAddress:
    """Where a LUN is: `portal` is "ADDRESS:PORT"."""

    portal: str
    target: str
    lun: int

    def __str__(self) -> str:
        return f"LUN {self.lun} of {self.target} at {self.portal}"


class ReservationConflictError(StorageError):
    """The LUN refused a command because of somebody's persistent reservation."""


class LoginError(StorageError):
    """The portal can't be reached, or the target refused the login. Nothing was changed."""


class _BrokenError(StorageError):
    """The connection ended."""


class IscsiSession:
    """Made by `connect`. Errors: LoginError, ReservationConflictError, StorageError."""

    def __init__(
        self, address: LunAddress, initiator: str, credentials: Credentials | None
    ) -> None:
        self.address = address
        self._library = library.load()
        self._loop = asyncio.get_running_loop()
        self._callback = library.Callback(self._completed)
        self._waiting: dict[int, asyncio.Future[int]] = {}
        self._number = 0
        self._watched: tuple[int, int] | None = None
        context = self._library.iscsi_create_context(initiator.encode())
        if not context:
            raise StorageError("libiscsi: out of memory")
        self._context: int | None = context
        self._library.iscsi_set_noautoreconnect(context, 1)
        self._library.iscsi_set_targetname(context, address.target.encode())
        self._library.iscsi_set_session_type(context, library.SESSION_NORMAL)
        self._library.iscsi_set_header_digest(context, library.HEADER_DIGEST_NONE)
        if credentials is not None:
            self._library.iscsi_set_initiator_username_pwd(
                context, credentials.user.encode(), credentials.secret.encode()
            )

    @classmethod
    async def connect(
        cls,
        address: LunAddress,
        initiator: str,
        credentials: Credentials | None,
        *,
        isid: int | None = None,
        timeout_s: float = CONNECT_TIMEOUT_S,
    ) -> IscsiSession:
        """Log in. LoginError says whether it was the portal, the secret or the target.

        `isid` (24 bits): a session of the same initiator with the same one is ended by the target.
        """
        session = cls(address, initiator, credentials)
        try:
            await session._log_in(isid, timeout_s)
        except BaseException:
            session._destroy()
            raise
        return session

    async def _log_in(self, isid: int | None, timeout_s: float) -> None:
        if isid is not None:
            self._library.iscsi_set_isid_en(self._context, isid & _ISID_MASK, 0)
        portal, lun = self.address.portal.encode(), self.address.lun
        number, done = self._expect()
        try:
            async with asyncio.timeout(timeout_s):
                if self._library.iscsi_full_connect_async(
                    self._context, portal, lun, self._callback, number
                ):
                    raise LoginError(f"{self.address}: {self._error()}")
                self._watch()
                status = await done
        except TimeoutError as error:
            raise LoginError(
                f"{self.address}: no answer to the login in {timeout_s:g} s"
            ) from error
        except _BrokenError as error:
            raise LoginError(f"{self.address}: the portal can't be reached ({error})") from error
        finally:
            self._waiting.pop(number, None)
        if status != library.STATUS_GOOD:
            raise LoginError(self._explain_login(self._error()))

    def _explain_login(self, words: str) -> str:
        lower = words.lower()
        if "authentication" in lower or "chap" in lower:
            return f"{self.address}: the target refused the CHAP user or secret ({words})"
        if "not_supported" in lower:
            return f"{self.address}: the target has no such LUN ({words})"
        if "not found" in lower or "authorization" in lower or "denied" in lower:
            return (
                f"{self.address}: there is no such target, or it doesn't admit this node ({words})"
            )
        if "connect" in lower:
            return f"{self.address}: the portal can't be reached ({words})"
        return f"{self.address}: the login failed ({words})"

    async def command(
        self,
        cdb: bytes,
        *,
        data_out: bytes = b"",
        data_in_bytes: int = 0,
        timeout_s: float = COMMAND_TIMEOUT_S,
    ) -> bytes:
        """One SCSI command; its data. Unit attentions, which only tell news, are passed over."""
        for _ in range(8):
            status, data = await self._once(cdb, data_out, data_in_bytes, timeout_s)
            if status == library.STATUS_GOOD:
                return data
            if status == library.STATUS_RESERVATION_CONFLICT:
                raise ReservationConflictError(f"{self.address}: reservation conflict")
            if status not in (library.STATUS_CHECK_CONDITION, library.STATUS_BUSY):
                self._destroy()
                raise StorageError(f"{self.address}: the session broke: {self._last_error}")
        raise StorageError(f"{self.address} refused SCSI command {cdb[0]:#04x}: {self._error()}")

    async def _once(
        self, cdb: bytes, data_out: bytes, data_in_bytes: int, timeout_s: float
    ) -> tuple[int, bytes]:
        if self._context is None:
            raise StorageError(f"{self.address}: the session is closed")
        direction = library.XFER_NONE
        if data_out:
            direction = library.XFER_WRITE
        elif data_in_bytes:
            direction = library.XFER_READ
        task = self._library.scsi_create_task(
            len(cdb), cdb, direction, len(data_out) or data_in_bytes
        )
        # What libiscsi points to stays alive in this frame until the command is over.
        buffer = ctypes.create_string_buffer(data_in_bytes) if data_in_bytes else None
        out = library.Data(len(data_out), data_out)
        if buffer is not None:
            self._library.scsi_task_add_data_in_buffer(task, data_in_bytes, buffer)
        number, done = self._expect()
        try:
            async with asyncio.timeout(timeout_s):
                if self._library.iscsi_scsi_command_async(
                    self._context,
                    self.address.lun,
                    task,
                    self._callback,
                    ctypes.byref(out) if data_out else None,
                    number,
                ):
                    raise StorageError(f"{self.address}: {self._error()}")
                self._watch()
                status = await done
        except BaseException as error:
            self._destroy()  # The command may still be under way; with its session it isn't.
            if isinstance(error, TimeoutError):
                raise StorageError(f"{self.address}: no answer in {timeout_s:g} s") from error
            if isinstance(error, _BrokenError):
                raise StorageError(f"{self.address}: the session broke ({error})") from error
            raise
        finally:
            self._waiting.pop(number, None)
            self._library.scsi_free_scsi_task(task)
        return status, buffer.raw if buffer is not None else b""

    async def close(self) -> None:
        """Log out, if the target answers at once. Idempotent."""
        if self._context is None:
            return
        number, done = self._expect()
        try:
            async with asyncio.timeout(_LOGOUT_TIMEOUT_S):
                if not self._library.iscsi_logout_async(self._context, self._callback, number):
                    self._watch()
                    await done
        except (TimeoutError, _BrokenError):
            pass  # Then it is over, too.
        finally:
            self._waiting.pop(number, None)
            self._destroy()

    async def __aenter__(self) -> IscsiSession:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self.close()

    # --- libiscsi and the event loop ---

    def _expect(self) -> tuple[int, asyncio.Future[int]]:
        self._number += 1
        future: asyncio.Future[int] = self._loop.create_future()
        self._waiting[self._number] = future
        return self._number, future

    def _completed(self, _context: Any, status: int, _data: Any, number: int) -> None:
        future = self._waiting.get(number)
        if future is not None and not future.done():
            future.set_result(status)

    def _service(self, events: int) -> None:
        if self._context is None:
            return
        if self._library.iscsi_service(self._context, events) < 0:
            self._last_error = self._error()
            for future in list(self._waiting.values()):
                if not future.done():
                    future.set_exception(_BrokenError(self._last_error))
            self._unwatch()
            return
        self._watch()

    _last_error: str = "the target ended it"

    def _watch(self) -> None:
        """Have the loop watch what libiscsi waits for now."""
        fd = self._library.iscsi_get_fd(self._context)
        wanted = (fd, self._library.iscsi_which_events(self._context))
        if wanted == self._watched:
            return
        self._unwatch()
        if fd < 0:
            return
        if wanted[1] & select.POLLIN:
            self._loop.add_reader(fd, self._service, select.POLLIN)
        if wanted[1] & select.POLLOUT:
            self._loop.add_writer(fd, self._service, select.POLLOUT)
        self._watched = wanted

    def _unwatch(self) -> None:
        if self._watched is not None:
            self._loop.remove_reader(self._watched[0])
            self._loop.remove_writer(self._watched[0])
            self._watched = None

    def _error(self) -> str:
        words = self._library.iscsi_get_error(self._context) if self._context else None
        return words.decode(errors="replace").strip() if words else "no reason given"

    def _destroy(self) -> None:
        if self._context is None:
            return
        self._unwatch()
        context, self._context = self._context, None
        self._library.iscsi_destroy_context(context)
