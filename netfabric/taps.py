"""Taps: made through /dev/net/tun, named after their domain, gone with their last descriptor.

A tap's name is `fy`, ten hexadecimal digits of the domain's name (BLAKE2), `n` and the NIC's
index: at most 15 characters, the kernel's limit, and the same after an agent's restart.

A tap is never persistent. The kernel removes it when the last descriptor closes, so a dead
hypervisor leaves none behind. It carries IFF_VNET_HDR, which QEMU finds out by itself
(TUNGETIFF) and which lets guests offload segmentation and checksums: a frame read from or
written to the descriptor has a 10-byte virtio-net header in front.

Everything here is synchronous and belongs into a thread.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import re
import struct
from pathlib import Path
from typing import Final

from migrator.errors import FabricError
from migrator.model import DomainName

TAP_NAME: Final = re.compile(r"fy[0-9a-f]{10}n[0-9]{1,2}")
TUNNEL_NAME: Final = re.compile(r"fx[0-9a-f]{10}n[0-9]{1,2}")
"""The ends of our own tunnels (`tunnels`): ports of a bridge, but no way to anybody."""
NICS_MAX: Final = 100
TAP_MTU_BYTES_MAX: Final = 65521
VNET_HEADER_BYTES: Final = 10

_TUN_DEVICE: Final = "/dev/net/tun"
_TUNSETIFF: Final = 0x400454CA
_IFF_TAP: Final = 0x0002
_IFF_NO_PI: Final = 0x1000
_IFF_VNET_HDR: Final = 0x4000
_IPV6_SETTINGS: Final = Path("/proc/sys/net/ipv6/conf")
"""Of the calling thread's network namespace, other than /sys."""


def tap_name(domain: DomainName, index: int) -> str:
    """The name of the tap of a domain's NIC `index`. FabricError for an index over 99."""
    if not 0 <= index < NICS_MAX:
        raise FabricError(f"NIC {index} of domain {domain}: the index must be 0 to {NICS_MAX - 1}")
    digest = hashlib.blake2b(domain.encode(), digest_size=5).hexdigest()
    return f"fy{digest}n{index}"


def tunnel_name(domain: DomainName, index: int) -> str:
    """The name of the tunnel's end for a domain's NIC `index`. FabricError for an index over 99."""
    return "fx" + tap_name(domain, index)[2:]


def open_tap(name: str) -> int:
    """Make the tap and return its descriptor (non-blocking, closed on exec).

    FabricError: no right to, no tun driver, or a tap of that name has a holder already.
    Nothing is left then.
    """
    try:
        fd = os.open(_TUN_DEVICE, os.O_RDWR | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise FabricError(f"can't open {_TUN_DEVICE}: {error.strerror}") from error
    try:
        flags = _IFF_TAP | _IFF_NO_PI | _IFF_VNET_HDR
        fcntl.ioctl(fd, _TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
    except OSError as error:
        os.close(fd)
        reason = error.strerror or str(error)
        if error.errno == errno.EBUSY:
            reason = "another process holds it: is the domain running here already?"
        raise FabricError(f"can't make tap {name}: {reason}") from error
    return fd


def host_side_mac(guest_mac: bytes) -> bytes:
    """The tap's own MAC address: the guest's with another first byte.

    It must differ from the guest's, and begin high: a bridge without a MAC of its own takes its
    lowest port's, and must not change it whenever a guest comes or goes.
    """
    first = 0xFE if guest_mac[0] != 0xFE else 0xFA
    return bytes([first]) + guest_mac[1:]


def made_mac(name: str) -> bytes:
    """The MAC address of an interface of ours that no guest has, from what makes it the only one.

    It begins high, as that of `host_side_mac`.
    """
    return b"\xfe" + hashlib.blake2b(name.encode(), digest_size=5).digest()


def be_mute(interface: str) -> None:
    """The node itself says nothing by it: what IPv6 would say may bear a guest's MAC."""
    with contextlib.suppress(OSError):  # a kernel without IPv6
        (_IPV6_SETTINGS / interface / "disable_ipv6").write_text("1")
