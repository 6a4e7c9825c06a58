"""What a lab's folder says about it: lab.json, where it lies, and how it's written.

lab.json holds the plan that `up` repairs to. It is a note, not the truth: which processes and
namespaces exist is always asked of the machine.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import msgspec

from deploy.lab import registry
from deploy.lab.plan import LabPlan, check_lab_name
from deploy.lab.processes import Process
from migrator.errors import NotFoundError

DEFAULT_NAME: Final = "lab"
DEFAULT_ROOT: Final = Path("/var/lib/ferry/labs")
_FILE: Final = "lab.json"


class AgentRecord(msgspec.Struct, frozen=True, kw_only=True):
    """One node in lab.json."""

    name: str
    namespace: str
    mgmt_address: str
    api: str
    """What `$FERRY_API` takes: unix:PATH."""
    agent: Process | None


class LabRecord(msgspec.Struct, frozen=True, kw_only=True):
    """lab.json: the lab, for `status`, the CLI and people. `plan` is what `up` repairs to."""

    plan: LabPlan
    nodes: tuple[AgentRecord, ...]
    agent_command: tuple[str, ...]


def labs_root() -> Path:
    """The folder that labs live in: $FERRY_LAB_ROOT or /var/lib/ferry/labs."""
    return Path(os.environ.get("FERRY_LAB_ROOT") or DEFAULT_ROOT)


def recorded() -> list[str]:
    """The labs that have a lab.json, by name: those that `load` finds."""
    names = {entry.name for entry in registry.registered() if (entry.folder / _FILE).exists()}
    root = labs_root()
    if root.is_dir():
        names.update(entry.name for entry in root.iterdir() if (entry / _FILE).exists())
    return sorted(names)


def load(name: str = DEFAULT_NAME) -> LabRecord:
    """The lab as its lab.json describes it. Raises NotFoundError."""
    check_lab_name(name)
    entered = registry.find(name)
    record = read_record(entered.folder if entered else labs_root() / name)
    if record is None:
        raise NotFoundError(
            f"there is no lab {name}{others()}; `ferry lab up --lab {name}` makes one"
        )
    return record


def others() -> str:
    """ ", but demo": for a sentence that says that there is no such lab; empty without any."""
    names = recorded()
    return f", but {', '.join(names)}" if names else ""


def write_record(
    plan: LabPlan, command: tuple[str, ...], agents: Mapping[str, Process]
) -> LabRecord:
    record = LabRecord(
        plan=plan,
        agent_command=command,
        nodes=tuple(
            AgentRecord(
                name=node.name,
                namespace=node.namespace,
                mgmt_address=node.mgmt_address,
                api=f"unix:{node.api_socket}",
                agent=agents.get(node.name),
            )
            for node in plan.nodes
        ),
    )
    encoded = msgspec.json.encode(record, enc_hook=str)
    write_atomically(plan.record_path, msgspec.json.format(encoded, indent=2) + b"\n")
    return record


def read_record(folder: Path) -> LabRecord | None:
    """lab.json of this folder; None: there's none, or not one that this version wrote."""
    try:
        text = (folder / _FILE).read_bytes()
        return msgspec.json.decode(text, type=LabRecord, dec_hook=lambda kind, value: kind(value))
    except (FileNotFoundError, msgspec.DecodeError):
        return None


def write_atomically(path: Path, content: bytes) -> None:
    """The old file or the new one, never half of it."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_bytes(content)
    draft.replace(path)
