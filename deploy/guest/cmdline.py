"""How a guest is told what to do: its kernel command line.

| word | meaning | read by |
|---|---|---|
| `ferry.name=web1` | host name, shown on its page and in its status | both |
| `ferry.ip=10.77.1.10/24` | IPv4 address of eth0 | /init |
| `ferry.ip6=fd77::10/64` | IPv6 address of eth0 | /init |
| `ferry.gw=10.77.1.1` | default IPv4 route | /init |
| `ferry.gw6=fe80::1` | default IPv6 route | /init |
| `ferry.udp=10.77.1.250:9999` | where the numbered packets go | workload |
| `ferry.udp_per_s=1000` | numbered packets a second | workload |
| `ferry.mem_mib=64` | memory kept and verified; 0 for none | workload |
| `ferry.mem_noise=100` | percent of each page of it that can't be compressed | workload |
| `ferry.dirty_pages_per_s=2000` | pages verified and rewritten, in random order | workload |
| `ferry.verify_pages_per_s=2000` | pages of the sweep, which verifies all in turn | workload |
| `ferry.disk=1` | write records to /dev/vda | workload |
| `ferry.disk_mib=16` | size of the circle that records are written in | workload |
| `ferry.disk_records_per_s=20` | records written synchronously; 0: only verify | workload |
| `ferry.http=1` | serve HTTP on port 80 | workload |

The guest's own words make its boot quick and quiet, and a panic or oops its end: start the
hypervisor with `-no-reboot` if it shall not boot again.
"""

from __future__ import annotations

import ipaddress
import re
from typing import Final

BOOT_OPTIONS: Final = (
    "console=ttyS0",
    "quiet",
    # A panic reboots at once, and an oops is a panic: a broken guest must not linger.
    "panic=-1",
    "oops=panic",
    # The clock must not change its source, or be declared unstable, because a guest stood still.
    "tsc=reliable",
    "no_timer_check",
    # Nothing to find, and looking costs time under emulation.
    "nomodeset",
    "i8042.noaux",
    "cryptomgr.notests",
    "random.trust_cpu=on",
    "mitigations=off",
    # Emulated, patching each lock prefix away at boot takes 0.5 s, and keeping them nothing; to
    # clear all memory at its allocation costs as long as the guest runs.
    "noreplace-smp",
    "init_on_alloc=0",
    # The guest is watched from outside; after a blackout its own watchdogs would cry wolf.
    "nowatchdog",
    "rcupdate.rcu_cpu_stall_suppress=1",
)
"""Words for every guest, whatever it does."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9.-]{0,62}")
_PORT_MAX: Final = 65_535


def guest_cmdline(
    *,
    name: str = "guest",
    address: str | None = None,
    address6: str | None = None,
    gateway: str | None = None,
    gateway6: str | None = None,
    udp: str | None = None,
    udp_per_s: int = 1000,
    memory_mib: int = 64,
    memory_noise_percent: int = 100,
    dirty_pages_per_s: int = 0,
    verify_pages_per_s: int = 2000,
    disk: bool = False,
    disk_mib: int = 16,
    disk_records_per_s: int = 20,
    http: bool = True,
) -> str:
    """The kernel command line of a guest that does what is asked for; the table is above.

    `address` and `address6` are in prefix notation ("10.77.1.10/24"), `gateway` is an IPv4 address,
    `gateway6` an IPv6 one, `udp` is "address:port" (IPv4). Pages are 4,096 bytes. Raises ValueError
    for what the guest would refuse.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"guest name {name!r} is not a host name")
    words = [*BOOT_OPTIONS, f"ferry.name={name}"]
    if address is not None:
        words.append(f"ferry.ip={ipaddress.IPv4Interface(_with_prefix(address))}")
    if address6 is not None:
        words.append(f"ferry.ip6={ipaddress.IPv6Interface(_with_prefix(address6))}")
    else:
        words.append("ipv6.disable=1")  # saves boot time and router solicitations
    if gateway is not None:
        words.append(f"ferry.gw={ipaddress.IPv4Address(gateway)}")
    if gateway6 is not None:
        words.append(f"ferry.gw6={ipaddress.IPv6Address(gateway6)}")
    if udp is not None:
        words.append(f"ferry.udp={_udp_target(udp)}")
    if memory_noise_percent > 100:
        raise ValueError(f"ferry.mem_noise={memory_noise_percent} is more than 100 percent")
    numbers = {
        "udp_per_s": udp_per_s,
        "mem_mib": memory_mib,
        "mem_noise": memory_noise_percent,
        "dirty_pages_per_s": dirty_pages_per_s,
        "verify_pages_per_s": verify_pages_per_s,
        "disk": int(disk),
        "disk_mib": disk_mib,
        "disk_records_per_s": disk_records_per_s,
        "http": int(http),
    }
    for key, number in numbers.items():
        if number < 0:
            raise ValueError(f"ferry.{key}={number} is negative")
        words.append(f"ferry.{key}={number}")
    return " ".join(words)


def _with_prefix(address: str) -> str:
    if "/" not in address:
        raise ValueError(f"guest address {address!r} has no prefix length")
    return address


def _udp_target(target: str) -> str:
    host, _, port = target.rpartition(":")
    if not port.isdecimal() or not 0 < int(port) <= _PORT_MAX:
        raise ValueError(f"UDP target {target!r} is not address:port")
    return f"{ipaddress.IPv4Address(host)}:{int(port)}"
