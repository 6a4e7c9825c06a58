"""Frames on a blocking socket: what the post-copy streams of both sides are made of."""

from __future__ import annotations

import contextlib
import ctypes
import socket
from collections.abc import Callable, Sequence
from typing import Final

from migrator.engine import frames
from migrator.engine.frames import FrameKind, Header, RegionShape
from migrator.engine.link import TcpFigures, tcp_figures
from migrator.engine.transport import StreamSocket, is_buffered, limit_send_buffer, limit_waits
from migrator.errors import RemoteProtocolError, words
from migrator.ranges import Ranges

_VECTOR_MAX: Final = 1024  # IOV_MAX


class StreamEndedError(Exception):
    """End of file, a reset, or a silence within a frame. It may be connected anew."""


class PageSocket:
    """Owns its socket. One thread reads; one thread writes (another one, or the same)."""

    def __init__(self, sock: StreamSocket, shapes: Sequence[RegionShape], silence_s: float) -> None:
        self._sock = sock
        self._shapes = shapes
        self.carries = False
        """Something came over it."""
        limit_waits(sock, silence_s)
        self._header = memoryview(bytearray(frames.HEADER_BYTES))
        self._ranges = memoryview(bytearray(frames.FRAME_RANGES_MAX * frames.RANGE_BYTES))
        self._payload = bytearray(frames.FRAME_BYTES_MAX)
        self.payload = memoryview(self._payload)
        """Of the PAGES, PACKED or ZSTD frame that was received last."""
        self.payload_address = ctypes.addressof(ctypes.c_char.from_buffer(self._payload))

    def fileno(self) -> int:
        return self._sock.fileno()

    @property
    def buffered(self) -> bool:
        """There is something to receive that poll(2) doesn't know of."""
        return is_buffered(self._sock)

    def shut_down(self) -> None:
        """End it from another thread: whoever reads or writes gets StreamEndedError."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._sock.close()

    def send(
        self, kind: FrameKind, *, region: int = 0, content: Ranges | None = None, sequence: int = 0
    ) -> None:
        """A frame without a payload."""
        self.send_vector([frames.encode(kind, region=region, content=content, sequence=sequence)])

    def send_vector(
        self, vector: list[bytes | memoryview], next_step: Callable[[], int] | None = None
    ) -> None:
        """A frame with its payload. StreamEndedError.

        `next_step`: waits until more may be given to the kernel, and says how many bytes. It takes
        as much as it is given beyond what its buffer is limited to.
        """
        if next_step is None:
            self._send_all(vector)
            return
        whole = memoryview(b"".join(vector))
        while whole:
            step_bytes = next_step()
            self._send_all([whole[:step_bytes]])
            whole = whole[step_bytes:]

    def limit_queue(self, size_bytes: int) -> None:
        """How much may be sent and not yet acknowledged, about.

        A wish: a stream that has ended says so when it is used.
        """
        with contextlib.suppress(OSError):
            limit_send_buffer(self._sock, size_bytes)

    def figures(self) -> TcpFigures | None:
        """What the kernel knows of the connection."""
        return tcp_figures(self._sock)

    def _send_all(self, vector: list[bytes | memoryview]) -> None:
        done = 0
        try:
            while done < len(vector):
                count = self._sock.sendmsg(vector[done : done + _VECTOR_MAX])
                while done < len(vector) and count >= len(vector[done]):
                    count -= len(vector[done])
                    done += 1
                if count:
                    vector[done] = memoryview(vector[done])[count:]
        except OSError as error:
            raise StreamEndedError(f"sending: {words(error)}") from error

    def receive(self) -> tuple[Header, Ranges | None]:
        """The next frame; any time may pass before it. A payload is in `payload` then.

        StreamEndedError, RemoteProtocolError.
        """
        self._fill(self._header, idle=True)
        self.carries = True
        header = frames.parse_header(self._header)
        if not header.count:
            return header, None
        encoded = self._ranges[: header.count * frames.RANGE_BYTES]
        self._fill(encoded)
        content = frames.parse_ranges(header, encoded, self._shapes)
        if header.payload_bytes:
            if header.payload_bytes > len(self._payload):
                raise RemoteProtocolError(f"a payload of {header.payload_bytes} bytes is too long")
            self._fill(self.payload[: header.payload_bytes])
        return header, content

    def _fill(self, view: memoryview, *, idle: bool = False) -> None:
        got = 0
        while got < len(view):
            try:
                count = self._sock.recv_into(view[got:], 0, socket.MSG_WAITALL)
            except BlockingIOError:
                if idle and not got:
                    continue
                raise StreamEndedError("silence within a frame") from None
            except OSError as error:
                raise StreamEndedError(f"receiving: {words(error)}") from error
            if count == 0:
                raise StreamEndedError("the other engine closed the stream")
            got += count
