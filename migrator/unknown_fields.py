"""Values of a newer version: fields that this one doesn't know are ignored, and kept.

What a user writes is checked strictly (`migrator.names.Value`): there an unknown field is a typing
error. Between agents, and in the state store, it is what a newer agent has added. So

    decode(data, decoder)       as decoder.decode; unknown fields are left out
    decode_keeping(...)         the same, and what was left out
    merged(raw, left_out)       a changed value with what was left out put back

Pure. What is known costs nothing extra: the value is taken apart only where the strict decoder has
met an unknown field. A member of a list is found again by its first field, which is what it is
known by (a move's domain, a disk's volume, a NIC's MAC); of equal ones the n-th is the n-th.
Unknown values of an enum, and unknown kinds of a tagged union, stay errors: nobody can act on them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

T = TypeVar("T")
Decoder = msgspec.msgpack.Decoder[T] | msgspec.json.Decoder[T]

_MARK: Final = "unknown field"
"""In msgspec's message; it has no type of its own for this."""


@dataclass(slots=True)
class LeftOut:
    """What was left out of one object, and of those inside it."""

    fields: dict[str, Any] = field(default_factory=dict)
    """Unknown fields of this object, as they came."""
    inside: dict[str, LeftOut] = field(default_factory=dict)
    """By known field, or by the key of a mapping."""
    members: dict[tuple[str, int], LeftOut] = field(default_factory=dict)
    """Of a list, by `_names`."""

    def __bool__(self) -> bool:
        return bool(self.fields or self.inside or self.members)


def decode(data: bytes, decoder: Decoder[T]) -> T:
    """As `decoder.decode`, which see for errors, without regard to unknown fields."""
    return decode_keeping(data, decoder)[0]


def decode_keeping(data: bytes, decoder: Decoder[T]) -> tuple[T, LeftOut | None]:
    """The value, and what was left out of it; None: nothing."""
    try:
        return decoder.decode(data), None
    except msgspec.ValidationError as error:
        if _MARK not in str(error):
            raise
    codec: Any = msgspec.json if isinstance(decoder, msgspec.json.Decoder) else msgspec.msgpack
    known, left_out = _split(codec.decode(data), inspect.type_info(decoder.type))
    return decoder.decode(codec.encode(known)), left_out or None


def merged(raw: Any, left_out: LeftOut) -> Any:
    """A value in builtin types with what had been left out of an earlier one. `raw` is changed.

    What belonged to an object that isn't there any more is gone with it.
    """
    if isinstance(raw, dict):
        for name, inner in left_out.inside.items():
            if name in raw:
                raw[name] = merged(raw[name], inner)
        for name, value in left_out.fields.items():
            raw.setdefault(name, value)
    elif isinstance(raw, list):
        for at, known_by in enumerate(_names(raw)):
            if known_by in left_out.members:
                raw[at] = merged(raw[at], left_out.members[known_by])
    return raw


def _split(raw: Any, kind: inspect.Type) -> tuple[Any, LeftOut]:
    """What the type knows of `raw`, and the rest."""
    if isinstance(kind, inspect.Metadata):
        return _split(raw, kind.type)
    if isinstance(kind, inspect.UnionType):
        chosen = _variant(raw, kind)
        return (raw, LeftOut()) if chosen is None else _split(raw, chosen)
    if isinstance(kind, inspect.StructType) and isinstance(raw, dict):
        return _split_struct(raw, kind)
    if isinstance(kind, inspect.DictType) and isinstance(raw, dict):
        found = {key: _split(value, kind.value_type) for key, value in raw.items()}
        inside = {key: left for key, (_, left) in found.items() if left}
        return {key: value for key, (value, _) in found.items()}, LeftOut(inside=inside)
    if isinstance(kind, _COLLECTIONS) and isinstance(raw, list):
        return _split_list(raw, [kind.item_type] * len(raw))
    if isinstance(kind, inspect.TupleType) and isinstance(raw, list):
        return _split_list(raw, list(kind.item_types))
    return raw, LeftOut()


def _split_struct(raw: dict[str, Any], kind: inspect.StructType) -> tuple[Any, LeftOut]:
    """In the order in which the type is encoded, so that its first field is the first."""
    known: dict[str, Any] = {}
    left_out = LeftOut()
    if kind.tag_field is not None and kind.tag_field in raw:
        known[kind.tag_field] = raw[kind.tag_field]
    for each in kind.fields:
        name = each.encode_name
        if name in raw:
            known[name], inner = _split(raw[name], each.type)
            if inner:
                left_out.inside[name] = inner
    left_out.fields = {name: value for name, value in raw.items() if name not in known}
    return known, left_out


def _split_list(raw: list[Any], types: list[inspect.Type]) -> tuple[Any, LeftOut]:
    found = [_split(member, kind) for member, kind in zip(raw, types, strict=False)]
    known = [value for value, _ in found] + raw[len(found) :]
    members = {name: inner for name, (_, inner) in zip(_names(known), found, strict=False) if inner}
    return known, LeftOut(members=members)


def _names(members: list[Any]) -> list[tuple[str, int]]:
    """What each is known by: its first field, and how many before it have the same."""
    seen: Counter[str] = Counter()
    names = []
    for member in members:
        first = repr(next(iter(member.items()), None)) if isinstance(member, dict) else ""
        names.append((first, seen[first]))
        seen[first] += 1
    return names


def _variant(raw: Any, kind: inspect.UnionType) -> inspect.Type | None:
    """The member of a union that `raw` is of, if that can hold unknown fields at all."""
    if isinstance(raw, dict):
        structs = [each for each in kind.types if isinstance(each, inspect.StructType)]
        for each in structs:
            if each.tag_field is not None and raw.get(each.tag_field) == each.tag:
                return each
        if len(structs) == 1 and structs[0].tag_field is None:
            return structs[0]
        return next((each for each in kind.types if isinstance(each, inspect.DictType)), None)
    if isinstance(raw, list):
        return next((each for each in kind.types if isinstance(each, _LISTS)), None)
    return None


_COLLECTIONS: Final = (
    inspect.ListType,
    inspect.VarTupleType,
    inspect.SetType,
    inspect.FrozenSetType,
    inspect.CollectionType,
)
_LISTS: Final = (*_COLLECTIONS, inspect.TupleType)
