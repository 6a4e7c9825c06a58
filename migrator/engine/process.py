"""One engine process: what `python -m migrator.engine` does once all is imported."""

from __future__ import annotations

import contextlib
import encodings.idna  # noqa: F401 -- a socket's first address needs it: 3 ms of a migration.
import os
import signal
import socket
import sys
import traceback
from pathlib import Path
from types import FrameType
from typing import Final

from migrator import cores, shortage
from migrator.engine.allocator import keep_freed_memory
from migrator.engine.control import AgentGoneError, Control, StoppedError
from migrator.engine.destination import DestinationEngine
from migrator.engine.idle_cores import IdleCores
from migrator.engine.source import SourceEngine
from migrator.engine_messages import EngineFailed
from migrator.errors import FerryError
from migrator.model import Role

_SWITCH_INTERVAL_S: Final = 0.0002
"""A thread that wakes from a system call waits so long for Python's lock at most, not 5 ms."""


def main(arguments: list[str]) -> int:
    """Runs one engine to its end. Returns the exit status."""
    if len(arguments) != 2 or arguments[0] != "--fd" or not arguments[1].isdigit():
        sys.stderr.write("usage: python -m migrator.engine --fd N\n")
        return 2
    sys.setswitchinterval(_SWITCH_INTERVAL_S)
    keep_freed_memory()
    signal.signal(signal.SIGTERM, _terminate)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    shortage.set_adjustment("self", shortage.NEXT)
    control = Control(socket.socket(fileno=int(arguments[1])))
    control.at_switchover = _go_first
    engine: SourceEngine | DestinationEngine | None = None
    try:
        idle_cores = IdleCores()
        configure, descriptors = control.receive_configure(idle_cores.look)
        Path("/proc/self/comm").write_text(f"ferry-{configure.role}"[:15])
        if configure.role is Role.SOURCE:
            engine = SourceEngine(configure, descriptors, control, idle_cores)
        else:
            engine = DestinationEngine(configure, descriptors, control)
        engine.run()
    except StoppedError:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if engine is not None:
            engine.close()
            with contextlib.suppress(AgentGoneError):
                control.send(engine.stopped())
        return 0
    except AgentGoneError as error:
        _close(engine)
        sys.stderr.write(f"the agent is gone: {error}\n")
        return 0
    except BaseException as error:
        traceback.print_exc()
        try:
            _close(engine)
        except Exception:  # It may be half made. Why it failed is what has to be told.
            traceback.print_exc()
        with contextlib.suppress(AgentGoneError):
            control.send(EngineFailed(reason=reason_of(error)))
        return 1
    return 0


def reason_of(error: BaseException) -> str:
    """For an operator. Of what nobody expected the name of its class; the log has the rest."""
    if isinstance(error, ProcessLookupError):
        return "the process that has the guest's memory is gone"
    if isinstance(error, RuntimeError) and "start new thread" in str(error):  # threading's own.
        return shortage.OF_TASKS
    return str(error) if isinstance(error, FerryError) else f"{type(error).__name__}: {error}"


def _close(engine: SourceEngine | DestinationEngine | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if engine is not None:
        engine.close()


def _go_first() -> None:
    cores.set_niceness(os.getpid(), cores.URGENT)  # Refused: the blackout may be longer.


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise StoppedError("SIGTERM")
