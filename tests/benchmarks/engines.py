"""Who moves the guest: a row here is a row in the table.

To add a variant, add a row; one that needs other agents names their flavour. An engine's guest is
started for one migration, and closed after it: QEMU 7.2's own migration may leave a broken guest
behind when it is emulated, and every repeat shall begin alike.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Final, Protocol

from migrator.model import DomainSpec, EngineKind, MigrationMode
from tests.benchmarks.cases import Case
from tests.benchmarks.ferry import FerryGuest
from tests.benchmarks.libvirt import LibvirtEngine
from tests.benchmarks.native import Method, NativeGuest
from tests.benchmarks.results import Run
from tests.benchmarks.site import PLAIN, Flavour, Site


class Guest(Protocol):
    """A started guest on n1 that can be moved to n2 once."""

    def migrate(self) -> Run: ...

    def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class Engine:
    """One way to move a guest."""

    title: str
    start: Callable[[Site, Case, DomainSpec], Guest]
    cases: frozenset[str] | None = None
    """Only for these cases; None: for all."""
    flavour: Flavour = PLAIN

    def takes(self, case: Case, name: str) -> bool:
        if case.engines is not None and name not in case.engines:
            return False
        return self.cases is None or case.name in self.cases


def _native(method: Method) -> Callable[[Site, Case, DomainSpec], Guest]:
    return lambda site, case, spec: NativeGuest(site, case, spec, method)


_BY_COMMAND: Final = frozenset({"1", "1-noise", "1-10g", "2", "2-noise", "3", "3-10g"})
"""Where users' commands are compared, their own start included."""
STREAMS: Final = 2
"""As many as this benchmark's machine has cores."""

ENGINES: Final[Mapping[str, Engine]] = {
    "ferry": Engine("Ferry paged", lambda site, case, _: FerryGuest(site, case)),
    "ferry-command": Engine(
        "`ferry migrate`",
        lambda site, case, _: FerryGuest(site, case, by_command=True),
        cases=_BY_COMMAND,
    ),
    "ferry-tls": Engine(
        "Ferry paged, TLS",
        lambda site, case, _: FerryGuest(site, case),
        flavour=Flavour(tls=True),
    ),
    "ferry-streams": Engine(
        f"Ferry paged, {STREAMS} streams",
        lambda site, case, _: FerryGuest(site, case),
        flavour=Flavour(streams=STREAMS),
    ),
    "ferry-hybrid": Engine(
        "Ferry hybrid",
        lambda site, case, _: FerryGuest(site, case, mode=MigrationMode.HYBRID),
    ),
    "ferry-native": Engine(
        "Ferry native",
        lambda site, case, _: FerryGuest(site, case, engine=EngineKind.NATIVE),
    ),
    "qemu-10ms": Engine("QEMU, limit 10 ms", _native(Method(downtime_limit_ms=10))),
    "qemu-300ms": Engine("QEMU, limit 300 ms", _native(Method(downtime_limit_ms=300))),
    "qemu-multifd": Engine(
        "QEMU multifd", _native(Method(downtime_limit_ms=300, multifd_channels=2))
    ),
    "qemu-zstd": Engine(
        "QEMU multifd, zstd",
        _native(Method(downtime_limit_ms=300, multifd_channels=2, multifd_compression="zstd")),
        cases=_BY_COMMAND,
    ),
    "libvirt": Engine(
        "virsh migrate --live --p2p",
        LibvirtEngine().start,
        cases=_BY_COMMAND,
    ),
}


def select(names: str | None) -> dict[str, Engine]:
    """The engines named, comma-separated. Raises ValueError: no such one."""
    if names is None:
        return dict(ENGINES)
    chosen = {}
    for name in filter(None, names.split(",")):
        if name not in ENGINES:
            raise ValueError(f"there is no engine {name}; there are {', '.join(ENGINES)}")
        chosen[name] = ENGINES[name]
    return chosen
