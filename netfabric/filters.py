"""What a guest may send, and how fast it sends and receives: nftables and tc on its own tap.

    guest ── tap ── ingress hook: another's MAC, ARP or IP address? VLAN tag? too much? ── drop
                                                                                  else ── bridge

Each NIC that asks for it has a table of the netdev family, named after its tap. The rules stand at
the tap's ingress, before any bridge, route or connection tracking sees the frame; they are made
with the tap, so they are at the destination before the guest is, and go with it.

libnftables parses and commits a whole table in one transaction; nothing is shelled out. What a
guest receives is shaped by a token bucket (tbf), since that may wait; what it sends is policed.

Synchronous; belongs into a thread.
"""

from __future__ import annotations

import ctypes
import enum
import ipaddress
import re
from collections.abc import Iterable, Iterator
from typing import Final

from migrator.errors import FabricError
from migrator.model import NicSpec

_LIBRARY: Final = "libnftables.so.1"
_TABLE: Final = re.compile(r"table netdev (ferry_fy[0-9a-f]{10}n[0-9]{1,2})\b")
_BURST_BYTES_MIN: Final = 80 * 1024
"""One full GSO packet."""
_BURST_S: Final = 0.02
_QUEUE_S: Final = 0.05


class Side(enum.Enum):
    """Which of its ends a guest's interface turns to the node."""

    BESIDE = "beside"
    """A tap: what the guest sends comes in by it."""
    ABOVE = "above"
    """A macvtap above an uplink: what the guest sends goes out by it. No queue is behind it, so
    what the guest receives can only be policed, too."""


def wanted(nic: NicSpec) -> bool:
    """Whether the NIC has rules at all."""
    return nic.anti_spoofing or nic.send_limit_bytes_per_s is not None


def filter_reasons(nic: NicSpec) -> list[str]:
    """Why this node can't filter for the NIC; empty if it can, or needn't."""
    if not wanted(nic):
        return []
    try:
        _library()
    except OSError:
        return [f"NIC {nic.mac} asks for filtering: install {_LIBRARY} (Debian: libnftables1)"]
    return []


def table_of(tap: str) -> str:
    """The name of the tap's table."""
    return f"ferry_{tap}"


def ruleset(tap: str, nic: NicSpec, side: Side = Side.BESIDE) -> str:
    """The table, as nft reads it: made anew whatever was there. Pure."""
    name = table_of(tap)
    chains = _chain("sent", tap, "ingress" if side is Side.BESIDE else "egress", _rules(nic))
    if side is Side.ABOVE and nic.receive_limit_bytes_per_s is not None:
        chains += _chain("received", tap, "ingress", [_limit(nic.receive_limit_bytes_per_s)])
    return f"table netdev {name}\ndelete table netdev {name}\ntable netdev {name} {{\n{chains}}}\n"


def _chain(name: str, tap: str, hook: str, rules: Iterable[str]) -> str:
    lines = "".join(f"    {rule}\n" for rule in rules)
    return (
        f"  chain {name} {{\n"
        f'    type filter hook {hook} device "{tap}" priority 0; policy accept;\n{lines}  }}\n'
    )


def _limit(bytes_per_s: int) -> str:
    burst = burst_bytes(bytes_per_s)
    return f"limit rate over {bytes_per_s} bytes/second burst {burst} bytes counter drop"


def _rules(nic: NicSpec) -> Iterator[str]:
    if nic.anti_spoofing:
        yield f"ether saddr != {nic.mac} counter drop"
        yield "ether type { 0x8100, 0x88a8 } counter drop"
        yield f"ether type arp arp saddr ether != {nic.mac} counter drop"
        addresses = [ipaddress.ip_address(text) for text in nic.addresses]
        v4 = [str(each) for each in addresses if each.version == 4]
        v6 = [str(each) for each in addresses if each.version == 6]
        if addresses:
            own4 = f"{{ {', '.join(['0.0.0.0', *v4])} }}"
            yield f"ether type arp arp saddr ip != {own4} counter drop"
            # From nowhere a guest may ask for an address, and no more.
            yield "ether type ip ip saddr 0.0.0.0 udp dport != 67 counter drop"
            yield f"ether type ip ip saddr != {own4} counter drop"
            yield f"ether type ip6 ip6 saddr != {{ {', '.join(['::', 'fe80::/10', *v6])} }} drop"
    if nic.send_limit_bytes_per_s is not None:
        yield _limit(nic.send_limit_bytes_per_s)


def burst_bytes(bytes_per_s: int) -> int:
    """How much may come at once."""
    return max(_BURST_BYTES_MIN, int(bytes_per_s * _BURST_S))


def queue_bytes(bytes_per_s: int) -> int:
    """How much may wait."""
    return burst_bytes(bytes_per_s) + max(_BURST_BYTES_MIN, int(bytes_per_s * _QUEUE_S))


def apply(tap: str, nic: NicSpec, side: Side = Side.BESIDE) -> None:
    """Make the tap's rules, in one transaction. FabricError: none were made."""
    limited = side is Side.ABOVE and nic.receive_limit_bytes_per_s is not None
    if wanted(nic) or limited:
        run(ruleset(tap, nic, side), f"can't filter on {tap}")


def remove(tap: str) -> None:
    """Remove the tap's rules. Idempotent. FabricError if nft refuses."""
    name = table_of(tap)
    try:
        _library()
    except OSError:
        return  # So there are none.
    run(f"table netdev {name}\ndelete table netdev {name}\n", f"can't remove the rules of {tap}")


def tables() -> frozenset[str]:
    """The names of all tables of ours in this network namespace. FabricError."""
    return frozenset(_TABLE.findall(run("list tables netdev\n", "can't list the rules")))


def run(commands: str, what: str) -> str:
    """Let libnftables run the commands; their output. FabricError, beginning with `what`."""
    try:
        library = _library()
    except OSError as error:
        raise FabricError(f"{what}: {error}") from error
    context = library.nft_ctx_new(0)
    if not context:
        raise FabricError(f"{what}: libnftables can't start")
    try:
        library.nft_ctx_buffer_output(context)
        library.nft_ctx_buffer_error(context)
        failed = library.nft_run_cmd_from_buffer(context, commands.encode())
        if failed:
            message = (library.nft_ctx_get_error_buffer(context) or b"").decode(errors="replace")
            first = message.strip().splitlines()[:1] or ["nftables refuses"]
            raise FabricError(f"{what}: {first[0]}")
        output: bytes = library.nft_ctx_get_output_buffer(context) or b""
        return output.decode(errors="replace")
    finally:
        library.nft_ctx_free(context)


def _library() -> ctypes.CDLL:
    """OSError if it isn't installed."""
    library = ctypes.CDLL(_LIBRARY)
    library.nft_ctx_new.restype = ctypes.c_void_p
    library.nft_ctx_new.argtypes = [ctypes.c_uint32]
    for name in ("nft_ctx_buffer_output", "nft_ctx_buffer_error", "nft_ctx_free"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
    for name in ("nft_ctx_get_output_buffer", "nft_ctx_get_error_buffer"):
        getattr(library, name).argtypes = [ctypes.c_void_p]
        getattr(library, name).restype = ctypes.c_char_p
    library.nft_run_cmd_from_buffer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
    return library
