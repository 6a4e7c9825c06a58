"""From a body to a typed value, and from msgspec's complaint to a field and what would be right.

    Expected `int` >= 16777216 - at `$.memory_bytes`
      ──► {"memory_bytes": "a whole number from 16777216 to 17592186044416"}

What is right is read from the type at that path, so that each field explains itself. Of a map
msgspec says `$.labels[...]` for every key: which one it is, is found by halving the map.
"""

from __future__ import annotations

import bisect
import difflib
import json
import re
from typing import Any, Final, TypeVar

import msgspec
from msgspec import inspect

from migrator.errors import InvalidRequest
from migrator.model import END

T = TypeVar("T")

_AT = re.compile(r"^(?P<what>.*?)(?: - at (?P<key>`key` in )?`(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"(?P<problem>missing required|contains unknown) field `(?P<name>[^`]*)`")
_STEP = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[([^\]]*)\]")
_KEY_SHOWN_MAX: Final = 80
_FOR_TESTS: Final = "simulated"
"""No driver that a user is told of: agents refuse it."""


def decode_body(data: bytes, kind: type[T]) -> T:
    """InvalidRequest names the field and what would be right there."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise explained(error, kind, _plain(data)) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


def explained(error: msgspec.ValidationError, kind: Any, value: object) -> InvalidRequest:
    """The InvalidRequest for a ValidationError of making a `kind` of `value`."""
    matched = _AT.match(str(error))
    what, path = (matched["what"], matched["path"] or "$") if matched else (str(error), "$")
    of_key = matched is not None and matched["key"] is not None
    if of_key:
        path += "[...]"
    steps = [name or "[]" for name, _ in _STEP.findall(path)]
    here = _place(path, str(error), kind, value)
    found = _type_at(inspect.type_info(kind), steps, of_key=of_key)
    named = _FIELD.search(what)
    if named is None:
        right = _right(found) if found is not None else what
        if of_key:
            right = f"left out; a key must be {right}"
        return InvalidRequest(f"{here or 'the body'} must be {right}", {here: right})
    name = named["name"]
    field = f"{here}.{name}" if here else name
    known = {each.encode_name: each.type for each in _fields(found)}
    if named["problem"] == "contains unknown":
        close = difflib.get_close_matches(name, known, n=1)
        right = f"left out; did you mean {close[0]}?" if close else "left out; it is unknown"
        if not close and known:
            right += f" (known: {', '.join(known)})"
        return InvalidRequest(f"{field} must be {right}", {field: right})
    right = _right(known[name]) if name in known else "given"
    return InvalidRequest(f"{field} is missing; it must be {right}", {field: right})


def _fields(kind: inspect.Type | None) -> list[inspect.Field]:
    """Those of a struct, or of all structs of a union."""
    if isinstance(kind, inspect.UnionType):
        return [field for each in kind.types for field in _fields(each)]
    return list(kind.fields) if isinstance(kind, inspect.StructType) else []


def _plain(data: bytes) -> object:
    """The body without types; None if what is behind its first mistake can't be read."""
    try:
        return msgspec.json.decode(data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return None


def _place(path: str, said: str, kind: Any, value: Any) -> str:
    """The path in words, with the key in the place of each `[...]` that it can be found for."""
    told, where = "", list[str | int]()
    for name, index in _STEP.findall(path):
        if index != "...":
            told += f".{name}" if name else f"[{index}]"
            where.append(name or int(index))
            continue
        key = _guilty_key(said, kind, value, where)
        if key is None:
            return path.removeprefix("$").removeprefix(".")
        value = _put(value, where, {key: _get(value, where)[key]})
        where.append(key)
        told += f"[{json.dumps(key[:_KEY_SHOWN_MAX], ensure_ascii=False)}]"
    return told.removeprefix(".")


def _guilty_key(said: str, kind: Any, value: Any, where: list[str | int]) -> str | None:
    """The first key of the map at `where` with which msgspec says the same; None: it's none."""
    keys = None if value is None else _get(value, where)
    if not isinstance(keys, dict):
        return None
    items = list(keys.items())

    def fails(count: int) -> bool:
        try:
            msgspec.convert(_put(value, where, dict(items[:count])), kind)
        except msgspec.ValidationError as error:
            return str(error) == said
        return False

    at = bisect.bisect_left(range(1, len(items) + 1), True, key=fails)
    return str(items[at][0]) if at < len(items) else None


def _get(value: Any, where: list[str | int]) -> Any:
    for step in where:
        value = value[step]
    return value


def _put(value: Any, where: list[str | int], new: Any) -> Any:
    """A copy of `value` with `new` at `where`."""
    if not where:
        return new
    copy = value.copy()
    copy[where[0]] = _put(value[where[0]], where[1:], new)
    return copy


def _type_at(kind: inspect.Type, steps: list[str], *, of_key: bool = False) -> inspect.Type | None:
    """The type that a value at the path has, or its last key; None if the path leads nowhere."""
    if isinstance(kind, inspect.Metadata) and steps:
        return _type_at(kind.type, steps, of_key=of_key)
    if not steps:
        return kind
    if isinstance(kind, inspect.UnionType):
        structs = [each for each in kind.types if isinstance(each, inspect.StructType)]
        tags = [str(each.tag) for each in structs if [each.tag_field] == steps]
        tags = [tag for tag in tags if tag != _FOR_TESTS]
        if tags:
            return inspect.LiteralType(values=tuple(tags))
        found = (_type_at(each, steps, of_key=of_key) for each in kind.types)
        return next((each for each in found if each is not None), None)
    step, rest = steps[0], steps[1:]
    if isinstance(kind, inspect.StructType):
        for field in kind.fields:
            if field.encode_name == step:
                return _type_at(field.type, rest, of_key=of_key)
        if step == kind.tag_field:
            return inspect.LiteralType(values=(str(kind.tag),))
    if isinstance(kind, inspect.VarTupleType | inspect.ListType) and step == "[]":
        return _type_at(kind.item_type, rest, of_key=of_key)
    if isinstance(kind, inspect.DictType) and step == "[]":
        return (
            kind.key_type if of_key and not rest else _type_at(kind.value_type, rest, of_key=of_key)
        )
    return None


def _right(kind: inspect.Type) -> str:
    """What a right value is, in words."""
    if isinstance(kind, inspect.Metadata):
        description = (kind.extra_json_schema or {}).get("description")
        return str(description) if description else _right(kind.type)
    if isinstance(kind, inspect.UnionType):
        parts = (each for each in kind.types if not isinstance(each, inspect.NoneType))
        return ", or ".join(dict.fromkeys(_right(each) for each in parts))
    if isinstance(kind, inspect.IntType | inspect.FloatType):
        return _right_number(kind)
    if isinstance(kind, inspect.EnumType):
        return "one of " + ", ".join(str(each.value) for each in kind.cls)
    if isinstance(kind, inspect.LiteralType):
        return " or ".join(str(each) for each in kind.values)
    if isinstance(kind, inspect.StrType):
        pattern = (kind.pattern or "").replace(END, "$")
        return f"text that matches {pattern}" if pattern else "text"
    if isinstance(kind, inspect.BoolType):
        return "true or false"
    if isinstance(kind, inspect.VarTupleType | inspect.ListType):
        return "a list"
    if isinstance(kind, inspect.StructType | inspect.DictType):
        return "an object"
    return type(kind).__name__.removesuffix("Type").lower()


def _right_number(kind: inspect.IntType | inspect.FloatType) -> str:
    noun = "a whole number" if isinstance(kind, inspect.IntType) else "a number"
    bounds = [
        f"{word} {bound:,}".replace(",", "")
        for word, bound in (
            ("at least", kind.ge),
            ("above", kind.gt),
            ("at most", kind.le),
            ("below", kind.lt),
        )
        if bound is not None
    ]
    if kind.ge is not None and kind.le is not None:
        bounds = [f"from {kind.ge} to {kind.le}"]
    return " ".join([noun, " and ".join(bounds)]).rstrip()
