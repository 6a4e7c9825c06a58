"""A domain's definition from a TOML or JSON file, from options, or from both (options win).

The values are passed on as they are: the agent validates them, and names each wrong field.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from migrator.errors import words
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.output import parse_size

_NIC_NUMBERS: Final = {"mtu": "mtu_bytes", "vlan": "vlan"}
_NIC_LIMITS: Final = {"receive": "receive_limit_bytes_per_s", "send": "send_limit_bytes_per_s"}
_NIC_KEYS: Final = frozenset(
    {"bridge", "mac", "ip", "net", "antispoof", *_NIC_NUMBERS, *_NIC_LIMITS}
)
_TRUTH: Final = {
    **dict.fromkeys(("true", "1", "yes", "on"), True),
    **dict.fromkeys(("false", "0", "no", "off"), False),
}
_DISK_KEYS: Final = frozenset({"volume", "pool", "ro"})


def load_spec(path: Path) -> dict[str, Any]:
    """The file's table; "-" reads JSON from standard input. CliError says what is wrong."""
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{path} can't be read: {words(error)}", ExitCode.USAGE) from error
    try:
        values = tomllib.loads(text) if path.suffix == ".toml" else json.loads(text)
    except ValueError as error:
        kind = "TOML" if path.suffix == ".toml" else "JSON"
        raise CliError(f"{path} is not {kind}: {error}", ExitCode.USAGE) from error
    if not isinstance(values, dict):
        raise CliError(f"{path} must hold one domain", ExitCode.USAGE)
    if isinstance(memory := values.pop("memory", None), str):
        values["memory_bytes"] = parse_size(memory, "memory")
    return values


def parse_disk(text: str) -> dict[str, Any]:
    """`VOLUME[,pool=POOL][,ro=true]` or `volume=VOLUME,...`."""
    first, _, rest = text.partition(",")
    if "=" not in first:
        text = f"volume={first},{rest}" if rest else f"volume={first}"
    pairs = _pairs(text, "--disk", _DISK_KEYS)
    disk: dict[str, Any] = {"volume": pairs.get("volume", [""])[-1]}
    if "pool" in pairs:
        disk["pool"] = pairs["pool"][-1]
    if "ro" in pairs:
        disk["read_only"] = _truth(pairs["ro"][-1], f"--disk {text}: ro")
    return disk


def parse_nic(text: str) -> dict[str, Any]:
    """`bridge=BR[,mac=MAC][,ip=ADDRESS ...][,mtu=BYTES][,vlan=ID]...`; `ip`, `net` may be repeated.

    Also `net=NETWORK`, `antispoof=true`, and bytes a second as `receive=10M`, `send=10M`.
    Without `mac` the agent makes one.
    """
    pairs = _pairs(text, "--nic", _NIC_KEYS)
    nic: dict[str, Any] = {"addresses": pairs.get("ip", [])}
    if "bridge" not in pairs:
        raise CliError(f"--nic {text}: bridge= is missing", ExitCode.USAGE)
    nic["bridge"] = pairs["bridge"][-1]
    if "mac" in pairs:
        nic["mac"] = pairs["mac"][-1].lower()
    for key, name in _NIC_NUMBERS.items():
        if key in pairs:
            if not pairs[key][-1].isdigit():
                raise CliError(f"--nic {text}: {key} is not a number", ExitCode.USAGE)
            nic[name] = int(pairs[key][-1])
    nic |= {
        name: parse_size(pairs[key][-1], f"--nic {key}")
        for key, name in _NIC_LIMITS.items()
        if key in pairs
    }
    if "net" in pairs:
        nic["networks"] = pairs["net"]
    if "antispoof" in pairs:
        nic["anti_spoofing"] = _truth(pairs["antispoof"][-1], f"--nic {text}: antispoof")
    return nic


def _truth(text: str, what: str) -> bool:
    """CliError: a mistyped `true` must not make a disk writable, or a NIC unguarded."""
    found = _TRUTH.get(text.lower())
    if found is None:
        raise CliError(f"{what} must be true or false, not {text!r}", ExitCode.USAGE)
    return found


def _pairs(text: str, option: str, known: frozenset[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for part in text.split(","):
        key, separator, value = part.partition("=")
        if not separator or key not in known:
            right = ", ".join(f"{name}=" for name in sorted(known))
            raise CliError(f"{option} {text}: {part!r} is none of {right}", ExitCode.USAGE)
        found.setdefault(key, []).append(value)
    return found


def merge_spec(
    values: dict[str, Any],
    *,
    name: str | None,
    memory: str | None,
    vcpus: int | None,
    machine: str | None,
    cpu_model: str | None,
    disks: Sequence[str],
    nics: Sequence[str],
    kernel: str | None,
    initrd: str | None,
    cmdline: str | None,
) -> dict[str, Any]:
    """`values` with what the options say. CliError if a kernel's options come without a kernel."""
    merged = dict(values)
    simple: dict[str, Any] = {
        "name": name,
        "memory_bytes": parse_size(memory, "--memory") if memory is not None else None,
        "vcpus": vcpus,
        "machine": machine,
        "cpu_model": cpu_model,
    }
    merged |= {key: value for key, value in simple.items() if value is not None}
    if "memory_bytes" not in merged and merged:
        raise CliError("--memory is missing (in a file: memory), like 4G", ExitCode.USAGE)
    if disks:
        merged["disks"] = [parse_disk(text) for text in disks]
    if nics:
        merged["nics"] = [parse_nic(text) for text in nics]
    boot = {"kernel": kernel, "initrd": initrd, "cmdline": cmdline}
    given = {key: value for key, value in boot.items() if value is not None}
    if given:
        before = merged.get("boot")
        merged["boot"] = {**(before if isinstance(before, dict) else {}), "kind": "kernel", **given}
        if "kernel" not in merged["boot"]:
            raise CliError("--initrd and --cmdline need --kernel", ExitCode.USAGE)
        for key in ("kernel", "initrd"):
            if merged["boot"].get(key) and key in given:
                merged["boot"][key] = str(Path(merged["boot"][key]).absolute())
    return merged
