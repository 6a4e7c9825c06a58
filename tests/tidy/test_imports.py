"""The house's rules that a linter doesn't know: which folder may import which, and module sizes.

node_agent -> hypervisor, storage, netfabric (drivers: only in its composition root), migrator
hypervisor | storage | netfabric -> migrator.model, .errors, .ports, .native_port, .unknown_fields,
                                    .cores, .durable, .own_threads, .programs, .shortage
migrator -> no sibling; its pure modules no clock, randomness, sockets, event loop, threads
deploy, tests -> anything
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("node_agent", "migrator", "hypervisor", "storage", "netfabric", "deploy", "tests")
DRIVER_PACKAGES = ("hypervisor", "storage", "netfabric")
DRIVERS_MAY_IMPORT = (
    "migrator.model",
    "migrator.errors",
    "migrator.ports",
    "migrator.native_port",
    "migrator.unknown_fields",
    "migrator.cores",
    "migrator.durable",
    "migrator.own_threads",
    "migrator.programs",
    "migrator.shortage",
)
COMPOSITION_ROOT = tuple(
    f"node_agent/{name}.py" for name in ("agent", "foundations", "drivers", "fabrics")
)
NOT_DRIVERS = ("hypervisor.machine_types", "storage.settings")
"""Pure modules beside the drivers, which all of node_agent/ may use."""

SHELL = (
    "migrator/engine/",
    "migrator/cores.py",
    "migrator/durable.py",
    "migrator/own_threads.py",
    "migrator/programs.py",
    "migrator/shortage.py",
    "migrator/runner.py",
    "migrator/lane.py",
    "migrator/journal.py",
    "migrator/engine_driver.py",
    "migrator/native_driver.py",
    "migrator/turns.py",
    "migrator/steady_clock.py",
    "migrator/dirty_sampler.py",
    "migrator/left_tracking.py",
    "migrator/engine_watch.py",
    "migrator/tls.py",
    "migrator/hold_points.py",
)
"""The parts of migrator/ that do I/O: paths, or folders that end in a slash."""
IMPURE = {
    "aiohttp", "asyncio", "concurrent", "ctypes", "fcntl", "logging", "mmap", "multiprocessing",
    "os", "queue", "random", "secrets", "select", "selectors", "shutil", "signal", "socket",
    "sqlite3", "ssl", "subprocess", "tempfile", "threading", "time", "urllib", "uuid",
}  # fmt: skip
IMPURE_ALLOWED = {("migrator/ports.py", "os"), ("migrator/errors.py", "os")}
"""GuestMemory.close() closes descriptors that it owns: it has to live with them. strerror(3)."""

MODULE_LINES_MAX = 450
BARE_SUPPRESSION = re.compile(r"#\s*type:\s*ignore(?!\[)|#\s*noqa(?!:\s*[A-Z]+[0-9]+)", re.I)


def modules(*packages: str) -> list[str]:
    """Every module of the packages, as a path below the root."""
    return sorted(
        path.relative_to(ROOT).as_posix()
        for package in packages
        for path in (ROOT / package).rglob("*.py")
    )


def imports(path: str, source: str) -> Iterator[str]:
    """The dotted name of everything that a module imports, also inside functions."""
    package = Path(path).parent.parts
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *([node.module] if node.module else [])))
            yield from (f"{module}.{alias.name}" for alias in node.names)


def below(name: str, module: str) -> bool:
    """Whether `name` is `module` or something in it."""
    return name == module or name.startswith(f"{module}.")


def forbidden(path: str, source: str) -> list[str]:
    """The imports of a module that break a rule."""
    package = path.split("/")[0]
    siblings = [name for name in PACKAGES if name != package]
    pure = package == "migrator" and not any(
        path.startswith(part) if part.endswith("/") else path == part for part in SHELL
    )
    found = []
    for name in imports(path, source):
        top = name.split(".")[0]
        if package in ("deploy", "tests"):
            allowed = True
        elif package == "node_agent":
            allowed = top not in ("deploy", "tests") and (
                top not in DRIVER_PACKAGES
                or path in COMPOSITION_ROOT
                or any(below(name, ok) for ok in NOT_DRIVERS)
            )
        elif package in DRIVER_PACKAGES:
            allowed = top not in siblings or any(below(name, ok) for ok in DRIVERS_MAY_IMPORT)
        else:
            allowed = top not in siblings
            if pure and top in IMPURE:
                allowed = (path, top) in IMPURE_ALLOWED
        if not allowed:
            found.append(name)
    return found


@pytest.mark.parametrize("path", modules(*PACKAGES))
def test_imports_point_at_migrator(path: str) -> None:
    assert forbidden(path, (ROOT / path).read_text(encoding="utf-8")) == []


@pytest.mark.parametrize("path", modules(*PACKAGES))
def test_modules_are_short(path: str) -> None:
    lines = len((ROOT / path).read_text(encoding="utf-8").splitlines())
    assert lines <= MODULE_LINES_MAX, f"{lines} lines: split it"


@pytest.mark.parametrize("path", modules(*PACKAGES))
def test_suppressions_name_what_they_suppress(path: str) -> None:
    source = (ROOT / path).read_text(encoding="utf-8")
    if not any(map(BARE_SUPPRESSION.search, source.split("\n"))):
        return  # Telling comments from strings takes fifty times as long.
    comments = (
        token
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT
    )
    bare = [
        f"line {token.start[0]}: {token.string}"
        for token in comments
        if BARE_SUPPRESSION.search(token.string)
    ]
    assert bare == []


# --- the rule itself -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source", "expected"),
    [
        ("migrator/states.py", "import asyncio", ["asyncio"]),
        ("migrator/states.py", "def f():\n    from time import time", ["time.time"]),
        ("migrator/engine/x.py", "import asyncio, socket, os", []),
        ("migrator/ports.py", "import os", []),
        ("migrator/runner.py", "from storage import x", ["storage.x"]),
        ("hypervisor/qemu/x.py", "from migrator.ports import A\nimport asyncio", []),
        ("hypervisor/qemu/x.py", "from migrator import model, wire", ["migrator.wire"]),
        ("hypervisor/qemu/x.py", "import migrator", ["migrator"]),
        ("hypervisor/qemu/x.py", "from . import y\nfrom ..qemu import z", []),
        ("hypervisor/qemu/x.py", "from storage.x import y", ["storage.x.y"]),
        ("storage/x.py", "from node_agent import config", ["node_agent.config"]),
        ("node_agent/api/x.py", "from hypervisor.drivers import D", ["hypervisor.drivers.D"]),
        ("node_agent/api/x.py", "from hypervisor.machine_types import pin", []),
        ("node_agent/agent.py", "from hypervisor.drivers import D", []),
        ("node_agent/agent.py", "from tests import x", ["tests.x"]),
        ("tests/x.py", "import hypervisor, deploy", []),
    ],
)
def test_the_rule_finds_what_it_should(path: str, source: str, expected: list[str]) -> None:
    assert forbidden(path, source) == expected


@pytest.mark.parametrize(
    ("comment", "bare"),
    [
        ("# type: ignore", True),
        ("# type: ignore[arg-type]", False),
        ("# noqa", True),
        ("# noqa: BLE001 - why", False),
        ("#noqa", True),
    ],
)
def test_bare_suppressions_are_found(comment: str, bare: bool) -> None:
    assert bool(BARE_SUPPRESSION.search(comment)) is bare
