"""A QEMU monitor for the benchmark: blocking, every wait bounded, events kept with QEMU's times."""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from migrator.errors import FerryError

_COMMAND_TIMEOUT_S: Final = 30.0
_CONNECT_TIMEOUT_S: Final = 10.0


class Monitor:
    """One connection. `events` has what QEMU told: (name, wall clock in s, data)."""

    def __init__(self, path: Path) -> None:
        self.events: list[tuple[str, float, dict[str, Any]]] = []
        self._buffer = b""
        deadline = time.monotonic() + _CONNECT_TIMEOUT_S
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        while True:
            try:
                self._socket.connect(str(path))
                break
            except (FileNotFoundError, ConnectionRefusedError):
                if time.monotonic() > deadline:
                    raise FerryError(f"no QEMU answers on {path}") from None
                time.sleep(0.002)
        self._read(deadline)
        self.command("qmp_capabilities")

    def command(self, name: str, arguments: Mapping[str, object] | None = None) -> Any:
        """QEMU's answer. Raises FerryError: refused, silent or gone."""
        request: dict[str, object] = {"execute": name}
        if arguments is not None:
            request["arguments"] = arguments
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        deadline = time.monotonic() + _COMMAND_TIMEOUT_S
        while True:
            message = self._read(deadline)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise FerryError(f"QEMU refused {name}: {message['error']['desc']}")

    def wait_event(
        self, names: frozenset[str], deadline: float, status: str = ""
    ) -> tuple[str, float]:
        """The first of these events, (name, wall clock); for MIGRATION, of this status.

        Raises FerryError at the deadline (monotonic), or when QEMU's migration fails.
        """
        seen = 0
        while True:
            for name, at_s, data in self.events[seen:]:
                state = data.get("status", "")
                if name == "MIGRATION" and state in ("failed", "cancelled"):
                    raise FerryError(f"QEMU's migration has {state}")
                if name in names and (not status or state == status):
                    return name, at_s
            seen = len(self.events)
            self._read(deadline)

    def close(self) -> None:
        self._socket.close()

    def _read(self, deadline: float) -> dict[str, Any]:
        """The next message; an event is kept too."""
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0:
                raise FerryError("QEMU said nothing in time")
            self._socket.settimeout(left)
            try:
                data = self._socket.recv(65_536)
            except TimeoutError:
                raise FerryError("QEMU said nothing in time") from None
            if not data:
                raise FerryError("QEMU is gone")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        message: dict[str, Any] = json.loads(line)
        if "event" in message:
            stamp = message["timestamp"]
            at_s = stamp["seconds"] + stamp["microseconds"] / 1e6
            self.events.append((message["event"], at_s, message.get("data", {})))
        return message
