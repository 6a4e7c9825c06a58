"""The client as the story sees it: a process in the client's namespace, and what it has said."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

import msgspec

from deploy import lab
from deploy.demo import client
from deploy.demo.observations import Observation, decode_line
from deploy.demo.report import ClientSide, sort_observations
from deploy.lab.processes import tail
from migrator.errors import FerryError

_ROOT: Final = Path(client.__file__).resolve().parents[2]
"""Where `-m deploy.demo.client` is found, installed or not."""
_END_TIMEOUT_S: Final = 2 * client.REQUEST_TIMEOUT_S + client.VERIFY_TIMEOUT_S
_KILL_TIMEOUT_S: Final = 10.0
_POLL_S: Final = 0.05


class Watcher:
    """Started when made; `close` ends it, also in the midst of something."""

    def __init__(
        self, lab_name: str, log_path: Path, *, guest: str, udp_port: int, stream_bytes_per_s: int
    ) -> None:
        """Raises FerryError if the lab isn't there, OSError if it can't be started."""
        options = (
            *("--guest", guest, "--udp-port", str(udp_port)),
            *("--stream-bytes-per-s", str(stream_bytes_per_s)),
        )
        command = [sys.executable, "-m", "deploy.demo.client", *options]
        self._log_path = log_path
        self._observations: list[Observation] = []
        with log_path.open("ab") as log:
            self._process = subprocess.Popen(
                lab.command_in(lab_name, "client", command),
                cwd=_ROOT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                start_new_session=True,  # Ctrl-C is for us: it is told by the end of its input.
            )
        self._reader = threading.Thread(target=self._read, name="watcher", daemon=True)
        self._reader.start()

    def seen(self) -> ClientSide:
        """All that it has said so far; a second behind."""
        return sort_observations(list(self._observations))

    def wait_for(self, what: str, holds: Callable[[ClientSide], bool], timeout_s: float) -> None:
        """Wait until `holds`. Raises FerryError: not in time, or the client has ended."""
        deadline_s = time.monotonic() + timeout_s
        while not holds(self.seen()):
            if self._process.poll() is not None:
                raise FerryError(f"the client has ended; its last words:\n{tail(self._log_path)}")
            if time.monotonic() > deadline_s:
                raise FerryError(f"the client has not seen {what} within {timeout_s:g} s")
            time.sleep(_POLL_S)

    def finish(self) -> ClientSide:
        """Tell it to stop, and wait for its farewell. Raises FerryError if there is none."""
        self._close_input()
        try:
            self._process.wait(_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            raise FerryError(f"the client doesn't end within {_END_TIMEOUT_S:g} s") from None
        self._reader.join(_KILL_TIMEOUT_S)
        side = self.seen()
        if side.farewell is None:
            raise FerryError(
                f"the client ended without a farewell; its last words:\n{tail(self._log_path)}"
            )
        return side

    def close(self) -> None:
        """End it by force if it hasn't ended. May be repeated."""
        self._close_input()
        if self._process.poll() is None:
            self._process.kill()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(_KILL_TIMEOUT_S)
        self._reader.join(_KILL_TIMEOUT_S)
        if self._process.stdout is not None and not self._reader.is_alive():
            self._process.stdout.close()

    def _close_input(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()

    def _read(self) -> None:
        stream = self._process.stdout
        assert stream is not None
        for line in stream:
            # A line that was cut off by a kill is no observation.
            with contextlib.suppress(msgspec.DecodeError):
                self._observations.append(decode_line(line))
