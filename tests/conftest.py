"""What every test gets: a mark on its processes, a leak check at the end, no blocking event loop.

- Each session has its own folder for labs ($FERRY_LAB_ROOT) and marks its environment, which every
  process that a test starts inherits. At the end no marked process may live, and no lab or
  namespace of the session may be left: otherwise the session fails, names them and removes them.
- `lab` tests need root and are skipped, with the reason, only where there is none.
- In an async test a blocking call made by Ferry's own code in the event loop raises
  `blockbuster.BlockingError`. `@pytest.mark.allow_blocking("why")` lifts that for one test.
"""

from __future__ import annotations

import contextlib
import inspect
import os
import shutil
import signal
import tempfile
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import hypothesis
import pytest
from blockbuster import blockbuster_ctx

from deploy import lab
from deploy.lab import registry
from deploy.lab.namespaces import lab_namespaces
from deploy.lab.plan import lab_of_namespace

_SESSION_VARIABLE: Final = "FERRY_TEST_SESSION"
_SCANNED: Final = ["node_agent", "migrator", "hypervisor", "storage", "netfabric"]
_GRACE_S: Final = 20.0
"""A process that was told to end may need this long before it counts as left behind."""
_OF_PYTHON: Final = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Helpers of the test process itself, which end with it."""


class _Session:
    """What tells this session's processes and labs from everybody else's."""

    def __init__(self) -> None:
        self.mark = f"{_SESSION_VARIABLE}={uuid.uuid4().hex}"
        self.lab_root = Path(tempfile.mkdtemp(prefix="fy-", dir="/tmp"))
        self.namespaces_before = frozenset(lab_namespaces())
        self.previous = {
            name: os.environ.get(name) for name in (_SESSION_VARIABLE, "FERRY_LAB_ROOT")
        }
        os.environ[_SESSION_VARIABLE] = self.mark.partition("=")[2]
        os.environ["FERRY_LAB_ROOT"] = str(self.lab_root)
        self.leaks: list[str] = []
        if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # By nohup, or a shell's &:
            signal.signal(signal.SIGINT, signal.default_int_handler)  # children would inherit it.

    def processes(self) -> dict[int, str]:
        """Pid and command line of each live process that this session started."""
        found: dict[int, str] = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                if self.mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                    if command and not any(helper in command for helper in _OF_PYTHON):
                        found[int(entry.name)] = command.strip()
        return found

    def labs(self) -> list[str]:
        """Labs of this session, and namespaces of no registered lab that appeared meanwhile.

        Another session's lab is registered before its first namespace is made and until after
        its last is gone: asked before and after, the registry knows it.
        """
        before = registry.registered()
        appeared = map(lab_of_namespace, set(lab_namespaces()) - self.namespaces_before)
        known = [*before, *registry.registered()]
        owned = {item.name for item in known if item.folder.parent == self.lab_root}
        elsewhere = {item.name for item in known} - owned
        owned.update(entry.name for entry in self.lab_root.iterdir())
        return sorted(owned | ({name for name in appeared if name} - elsewhere))

    def finish(self) -> None:
        deadline = time.monotonic() + _GRACE_S
        while self.processes() and time.monotonic() < deadline:
            time.sleep(0.05)
        self.leaks += [f"lab {name}" for name in self.labs()]
        self.leaks += [f"process {pid}: {command}" for pid, command in self.processes().items()]
        for name in self.labs():
            lab.down(name)
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(self.lab_root, ignore_errors=True)
        for name, value in self.previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


# A slow machine is no finding. CI judges the change at hand by examples that stay the same;
# new ones are looked for everywhere else.
hypothesis.settings.register_profile("ferry", deadline=None)
hypothesis.settings.register_profile("ci", deadline=None, derandomize=True)
hypothesis.settings.load_profile("ci" if os.environ.get("CI") else "ferry")

_SESSION_KEY: Final = pytest.StashKey[_Session]()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "allow_blocking(why): the code under test may block the event loop"
    )


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[_SESSION_KEY] = _Session()


def pytest_sessionfinish(session: pytest.Session) -> None:
    own = session.config.stash.get(_SESSION_KEY, None)
    if own is None:
        return
    own.finish()
    if own.leaks and session.exitstatus in (pytest.ExitCode.OK, pytest.ExitCode.NO_TESTS_COLLECTED):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    own = config.stash.get(_SESSION_KEY, None)
    if own is not None and own.leaks:
        terminalreporter.section("left behind by the tests (removed now)", red=True)
        for leak in own.leaks:
            terminalreporter.line(leak)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.geteuid() == 0:
        return
    skip = pytest.mark.skip(reason="needs root, for network namespaces and taps")
    for item in items:
        if item.get_closest_marker("lab"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _no_blocking_calls(request: pytest.FixtureRequest) -> Iterator[None]:
    """Ferry's own code may not block the event loop of an async test."""
    is_async = inspect.iscoroutinefunction(getattr(request.node, "obj", None))
    if not is_async or request.node.get_closest_marker("allow_blocking"):
        yield
        return
    with blockbuster_ctx(_SCANNED):
        yield
