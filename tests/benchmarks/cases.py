"""What is moved: the guest, its load, the link between the nodes. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Final

from deploy.guest.cmdline import guest_cmdline

MBIT: Final = 1_000_000 // 8
"""Bytes a second."""
MIB: Final = 1024**2
UDP_PORT: Final = 9999
PAGE_BYTES: Final = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What the client does to the guest."""

    download_bytes_per_s: int = 0
    """One long HTTP download, paced by the guest; 0: none."""
    players: int = 0
    """Game clients: each sends the guest numbered packets, and the guest answers each."""
    player_packets_per_s: int = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One guest under one load over one link."""

    name: str
    title: str
    memory_mib: int
    link_mbit: int = 1_000
    cap_bytes_per_s: int | None = None
    """The migration's own bandwidth cap."""
    kept_mib: int = 64
    """Memory that the guest fills with its pattern and verifies."""
    noise_percent: int = 100
    """Of that memory, what can't be compressed."""
    dirty_pages_per_s: int = 0
    verify_pages_per_s: int = 500
    load: Load = dataclasses.field(default_factory=Load)
    watch_work: bool = False
    """The client asks ten times a second how far the guest's own work is."""
    settle_s: float = 1.0
    """Between the guest's first packet and the migration: its boot's last work is done then."""
    timeout_s: float = 120.0
    """For one migration, whoever does it."""
    repeats_max: int = 1_000
    engines: frozenset[str] | None = None
    """Only these; None: all."""
    judged: str | None = None
    """The one engine that bars are about; the others are shown by one run. None: all are."""

    def command_line(self, *, address: str, udp_target: str) -> str:
        """The guest's kernel command line. `address` with its prefix length."""
        return guest_cmdline(
            name="bench",
            address=address,
            udp=udp_target,
            memory_mib=self.kept_mib,
            memory_noise_percent=self.noise_percent,
            dirty_pages_per_s=self.dirty_pages_per_s,
            verify_pages_per_s=self.verify_pages_per_s,
        )

    @property
    def link_bytes_per_s(self) -> int:
        """What a migration may use: the link, or its cap where that is lower; 0: nothing bounds."""
        return min(self.link_mbit * MBIT, self.cap_bytes_per_s or self.link_mbit * MBIT)


NOISE_PERCENT: Final = 33
"""Of what an everyday guest keeps: no less than in a Linux guest's own memory can't be compressed,
and more than zram's users find in theirs (docs/benchmarks.md, "What guests keep")."""
_HYBRID: Final = "ferry-hybrid"
_SLOW_MBIT: Final = 200
_WEB = Case(
    name="2",
    title="web server, 800 MiB, under download",
    memory_mib=800,
    kept_mib=512,
    noise_percent=NOISE_PERCENT,
    load=Load(download_bytes_per_s=100 * MBIT),
)


def _dirty_case(percent: int) -> Case:
    pages_per_s = _SLOW_MBIT * MBIT * percent // 100 // PAGE_BYTES
    return Case(
        name=f"5-{percent}",
        title=f"dirty rate {percent} % of the link ({_SLOW_MBIT} Mbit/s)",
        memory_mib=512,
        link_mbit=_SLOW_MBIT,
        kept_mib=128,
        dirty_pages_per_s=pages_per_s,
        verify_pages_per_s=0,
        judged=_HYBRID,
        timeout_s=45.0,
        watch_work=True,
        settle_s=2.5,
    )


_IDLE: Final = Case(name="1", title="idle, 512 MiB", memory_mib=512, noise_percent=NOISE_PERCENT)
_GAME: Final = Case(
    name="3",
    title="game server, 64 MB, 6 players",
    memory_mib=96,
    kept_mib=16,
    noise_percent=NOISE_PERCENT,
    dirty_pages_per_s=200,
    load=Load(players=6),
)
_FAST_MBIT: Final = 10_000
"""Where the wire isn't what bounds a guest of this size."""

_LARGE_ENGINES: Final = frozenset({"ferry", _HYBRID, "qemu-10ms", "qemu-multifd"})
"""What is mostly untouched is a matter of each engine, not of its variants."""
NOISE_ENGINES: Final = frozenset(
    {"ferry", "ferry-command", "qemu-10ms", "qemu-multifd", "qemu-zstd", "libvirt"}
)


def _noise(case: Case) -> Case:
    """The same, with nothing to compress in what the guest keeps: only its kernel's memory is."""
    return dataclasses.replace(
        case,
        name=f"{case.name}-noise",
        title=f"{case.title}, incompressible",
        noise_percent=100,
        engines=NOISE_ENGINES,
        repeats_max=2,
    )


CASES: Final[tuple[Case, ...]] = (
    _IDLE,
    dataclasses.replace(
        _IDLE,
        name="1-10g",
        title=f"{_IDLE.title}, 10 Gbit/s",
        link_mbit=_FAST_MBIT,
        repeats_max=2,
    ),
    dataclasses.replace(
        _IDLE,
        name="1-200m",
        title=f"{_IDLE.title}, 200 Mbit/s",
        link_mbit=_SLOW_MBIT,
        engines=frozenset({"ferry", "qemu-10ms"}),
        repeats_max=2,
    ),
    _noise(_IDLE),
    _WEB,
    _noise(_WEB),
    dataclasses.replace(
        _WEB,
        name="2-capped",
        title="web server, capped at 100 Mbit/s",
        cap_bytes_per_s=100 * MBIT,
        timeout_s=240.0,
        engines=frozenset({"ferry", "qemu-10ms"}),
        repeats_max=3,
    ),
    _GAME,
    dataclasses.replace(
        _GAME,
        name="3-10g",
        title=f"{_GAME.title}, 10 Gbit/s",
        link_mbit=_FAST_MBIT,
        repeats_max=2,
    ),
    Case(
        name="4",
        title="memory muncher, 512 MiB, 256 MiB rewritten constantly",
        memory_mib=512,
        kept_mib=256,
        dirty_pages_per_s=1_000_000,
        verify_pages_per_s=0,
        judged=_HYBRID,
        timeout_s=45.0,
        watch_work=True,
        settle_s=2.5,
    ),
    *(_dirty_case(percent) for percent in (50, 100, 200)),
    dataclasses.replace(
        _dirty_case(200),
        name="5-200-packed",
        title="dirty rate 200 % of the link, an everyday guest's contents",
        noise_percent=NOISE_PERCENT,
        engines=frozenset({_HYBRID}),
    ),
    Case(
        name="6-4GiB",
        title="4 GiB guest, 200 MiB in use",
        memory_mib=4096,
        kept_mib=100,
        engines=_LARGE_ENGINES,
    ),
    Case(
        name="6-8GiB",
        title="8 GiB guest, 200 MiB in use",
        memory_mib=8192,
        kept_mib=80,
        engines=_LARGE_ENGINES,
    ),
    Case(
        name="demo",
        title="the demo's web server, unshaped link",
        memory_mib=256,
        link_mbit=0,
        kept_mib=64,
        dirty_pages_per_s=1000,
        verify_pages_per_s=1000,
        load=Load(download_bytes_per_s=100 * MBIT),
        repeats_max=10,
        engines=frozenset({"ferry", "qemu-300ms"}),
    ),
)


def select(names: str | None) -> list[Case]:
    """The cases named, comma-separated; `5`: `5-50`, `5-100`, ... Raises ValueError: none such."""
    if names is None:
        return list(CASES)
    chosen: list[Case] = []
    for name in filter(None, names.split(",")):
        found = [case for case in CASES if case.name == name]
        found = found or [case for case in CASES if case.name.partition("-")[0] == name]
        if not found:
            known = ", ".join(case.name for case in CASES)
            raise ValueError(f"there is no case {name}; there are {known}")
        chosen += [case for case in found if case not in chosen]
    return chosen
