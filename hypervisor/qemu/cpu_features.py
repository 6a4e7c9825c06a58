"""Which features of a CPU model a guest doesn't get here, as QEMU says.

QEMU leaves out, without a word to anybody, what the host's processor, or the emulation, hasn't; so
one model is not the same on two hosts. A guest that uses what its next host lacks is ended there by
an illegal instruction. Three answers tell it:

    query-cpu-definitions        `unavailable-features` of each model, on this host
    query-cpu-model-expansion    of `max`: what could be added to a model by `+feature`
    qom-get of a vCPU            `unavailable-features` of a guest that runs: what it has not got
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, Iterable, Mapping
from typing import Final

import msgspec

Execute = Callable[[str, Mapping[str, object] | None], Awaitable[object]]
"""A QMP command: its name and arguments."""

_UNAVAILABLE: Final = "unavailable-features"


class CpuFeatures(msgspec.Struct, frozen=True, kw_only=True):
    """Of a host."""

    unavailable: Mapping[str, frozenset[str]] = {}
    """By model; a model that isn't here says nothing."""
    unsupported: frozenset[str] = frozenset()
    """No model can have them here."""

    def lacking(self, model: str) -> Collection[str] | None:
        """Of a model as `-cpu` has it, `Haswell,-pcid,+avx512f`, say; None: that isn't known."""
        name, *changes = model.split(",")
        if name not in self.unavailable:
            return None
        removed = {feature_name(each[1:]) for each in changes if each.startswith("-")}
        added = {feature_name(each[1:]) for each in changes if each.startswith("+")}
        return (self.unavailable[name] - removed) | (added & self.unsupported)


def features_of_host(definitions: object, expansion: object) -> CpuFeatures:
    """From QEMU's answers; what isn't told there isn't known."""
    entries = definitions if isinstance(definitions, Iterable) else ()
    told = (each for each in entries if isinstance(each, Mapping) and _UNAVAILABLE in each)
    return CpuFeatures(
        unavailable={str(each["name"]): _names(each[_UNAVAILABLE]) for each in told},
        unsupported=frozenset(
            feature_name(name) for name, value in _properties(expansion) if value is False
        ),
    )


async def lacking_in_guest(execute: Execute) -> Collection[str] | None:
    """What a guest that runs hasn't got of its model. HypervisorError; None: that isn't told."""
    cpus = await execute("query-cpus-fast", None)
    first = cpus[0] if isinstance(cpus, list) and cpus else None  # All of a guest's are alike.
    if not isinstance(first, Mapping) or "qom-path" not in first:
        return None
    where = {"path": first["qom-path"], "property": _UNAVAILABLE}
    return _names(await execute("qom-get", where))


def feature_name(name: str) -> str:
    """Some have two spellings: kvm_asyncpf, kvm-asyncpf."""
    return name.replace("_", "-")


def _names(answer: object) -> frozenset[str]:
    return frozenset(map(feature_name, map(str, answer if isinstance(answer, list) else ())))


def _properties(expansion: object) -> Iterable[tuple[str, object]]:
    model = expansion.get("model") if isinstance(expansion, Mapping) else None
    properties = model.get("props") if isinstance(model, Mapping) else None
    return properties.items() if isinstance(properties, Mapping) else ()
