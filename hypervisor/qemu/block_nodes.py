"""How a disk is opened -> QEMU's `-object` and `-blockdev` arguments. Pure.

    disk0-secret, disk0-tls   objects: secrets by the file that holds them, never by their value
    disk0-file                the protocol: file, host_device, nfs, nbd, iscsi
    disk0                     the format on top of it, always explicit
    disk0-base, ...           what a qcow2 file leans on, read-only; never what its header names

The cache is bypassed everywhere: another host may be the next writer.
"""

from __future__ import annotations

import json

from migrator.model import (
    BlockDeviceSource,
    BlockSource,
    DiskFormat,
    FileSource,
    IscsiSource,
    NbdSource,
    NfsSource,
)

_CACHE: dict[str, object] = {"direct": True, "no-flush": False}


def block_nodes(name: str, source: BlockSource, host_devices: frozenset[str]) -> list[str]:
    """The arguments that make the node `name`. `host_devices`: file paths that are devices."""
    arguments: list[str] = []
    backing = source.backing if isinstance(source, FileSource) else None
    if backing is not None:
        arguments += block_nodes(f"{name}-base", backing, host_devices)
    arguments += _objects(name, source)
    common: dict[str, object] = {
        "read-only": source.read_only,
        "auto-read-only": False,
        "cache": _CACHE,
        "discard": "unmap",
    }
    protocol = {"node-name": f"{name}-file", **_protocol(name, source, host_devices), **common}
    layout: dict[str, object] = {
        "node-name": name,
        "driver": source.format.value,
        "file": f"{name}-file",
        **common,
    }
    if source.format is DiskFormat.QCOW2:
        layout["backing"] = None if backing is None else f"{name}-base"
    return [*arguments, "-blockdev", _json(protocol), "-blockdev", _json(layout)]


def _objects(name: str, source: BlockSource) -> list[str]:
    """Credentials, by their files."""
    value: dict[str, object]
    match source:
        case NbdSource(tls=tls) if tls is not None:
            value = {
                "qom-type": "tls-creds-psk",
                "id": f"{name}-tls",
                "endpoint": "client",
                "dir": tls.directory,
                "username": tls.username,
            }
        case IscsiSource(chap_secret_file=path) if path is not None:
            value = {"qom-type": "secret", "id": f"{name}-secret", "file": path}
        case _:
            return []
    return ["-object", _json(value)]


def _protocol(name: str, source: BlockSource, host_devices: frozenset[str]) -> dict[str, object]:
    """The options of the protocol's driver."""
    match source:
        case FileSource():
            driver = "host_device" if source.path in host_devices else "file"
            return {"driver": driver, "filename": source.path}
        case BlockDeviceSource():
            return {"driver": "host_device", "filename": source.path}
        case NfsSource():
            return {
                "driver": "nfs",
                "server": {"type": "inet", "host": source.server},
                "path": source.path,
                "user": source.user,
                "group": source.group,
            }
        case NbdSource():
            nbd: dict[str, object] = {
                "driver": "nbd",
                "server": {"type": "inet", "host": source.host, "port": str(source.port)},
                "export": source.export,
                "reconnect-delay": source.reconnect_delay_s,
            }
            if source.tls is not None:
                nbd["tls-creds"] = f"{name}-tls"
            return nbd
        case IscsiSource():
            iscsi: dict[str, object] = {
                "driver": "iscsi",
                "transport": "tcp",
                "portal": source.portal,
                "target": source.target,
                "lun": source.lun,
                "initiator-name": source.initiator_name,
            }
            if source.chap_user is not None:
                iscsi["user"] = source.chap_user
            if source.chap_secret_file is not None:
                iscsi["password-secret"] = f"{name}-secret"
            return iscsi


def _json(value: dict[str, object]) -> str:
    """QEMU's JSON form of an option: no quoting rules, a path may hold any character."""
    return json.dumps(value, separators=(",", ":"))
