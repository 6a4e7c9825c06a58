"""Machine types: `q35` and `pc` are aliases that mean another machine on each QEMU version.

A guest can only move between two QEMUs that build the very same machine, so a domain is pinned
to a versioned type when it is defined. Pure; the caller passes what its nodes offer.
"""

from __future__ import annotations

from collections.abc import Collection

from migrator.errors import InvalidRequest

FAMILIES = {"q35": "pc-q35-", "pc": "pc-i440fx-"}
"""Alias -> prefix of its versioned types."""


def family(machine: str) -> str | None:
    """`q35` or `pc` for an alias or a versioned type; None for anything else."""
    for alias, prefix in FAMILIES.items():
        if machine == alias or machine.startswith(prefix):
            return alias
    return None


def version_key(machine: str) -> tuple[int, ...]:
    """The version of a versioned type as numbers, for ordering: `pc-q35-4.0.1` -> (4, 0, 1)."""
    return tuple(int(part) if part.isdigit() else -1 for part in machine.split("-")[-1].split("."))


def pin_machine(machine: str, available: Collection[str]) -> str:
    """The versioned type that `machine` means where `available` types exist.

    An alias becomes the newest version in `available`: pass the intersection of several nodes'
    types for a domain that shall move between them. A versioned type is checked and returned.
    Raises InvalidRequest (field `machine`) if there is none.
    """
    prefix = FAMILIES.get(machine)
    if prefix is None:
        if machine in available and family(machine) is not None:
            return machine
        raise InvalidRequest(
            f"machine type {machine!r} is not available",
            {"machine": "q35, pc, or one of their versioned types that the node's QEMU has"},
        )
    versions = [name for name in available if name.startswith(prefix)]
    if not versions:
        raise InvalidRequest(
            f"no version of machine type {machine!r} is available", {"machine": "another type"}
        )
    return max(versions, key=version_key)
