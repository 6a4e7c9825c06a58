"""From a body to a typed value, and from msgspec's complaint to a field and what would be right.

    Expected `int` >= 16777216 - at `$.memory_bytes`
      ──► {"memory_bytes": "a whole number from 16777216 to 17592186044416"}

What is right is read from the type at that path, so that each field explains itself.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, TypeVar

import msgspec
from msgspec import inspect

from migrator.errors import InvalidRequest

T = TypeVar("T")

_AT = re.compile(r"^(?P<what>.*?)(?: - at `(?P<path>[^`]*)`)?$", re.DOTALL)
_FIELD = re.compile(r"(?P<problem>missing required|contains unknown) field `(?P<name>[^`]*)`")
_STEP = re.compile(r"\.([A-Za-z_][A-Za-z0-9_]*)|\[([^\]]*)\]")


def decode_body(data: bytes, kind: type[T]) -> T:
    """InvalidRequest names the field and what would be right there."""
    try:
        return msgspec.json.decode(data, type=kind)
    except msgspec.ValidationError as error:
        raise explained(error, kind) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"the body is not JSON: {error}") from error


def convert(value: object, kind: type[T]) -> T:
    """As `decode_body`, for a value that came from elsewhere (a query, TOML)."""
    try:
        return msgspec.convert(value, kind)
    except msgspec.ValidationError as error:
        raise explained(error, kind) from error


def explained(error: msgspec.ValidationError, kind: Any) -> InvalidRequest:
    """The InvalidRequest for a ValidationError of decoding a `kind`."""
    matched = _AT.match(str(error))
    what, path = (matched["what"], matched["path"] or "$") if matched else (str(error), "$")
    steps = [name or "[]" for name, _ in _STEP.findall(path)]
    here = path.removeprefix("$").removeprefix(".")
    found = _type_at(inspect.type_info(kind), steps)
    named = _FIELD.search(what)
    if named is None:
        right = _right(found) if found is not None else what
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


def _type_at(kind: inspect.Type, steps: list[str]) -> inspect.Type | None:
    """The type that a value at the path has; None if the path leads nowhere."""
    if isinstance(kind, inspect.Metadata) and steps:
        return _type_at(kind.type, steps)
    if not steps:
        return kind
    if isinstance(kind, inspect.UnionType):
        structs = [each for each in kind.types if isinstance(each, inspect.StructType)]
        tags = [str(each.tag) for each in structs if [each.tag_field] == steps]
        if tags:
            return inspect.LiteralType(values=tuple(tags))
        found = (_type_at(each, steps) for each in kind.types)
        return next((each for each in found if each is not None), None)
    step, rest = steps[0], steps[1:]
    if isinstance(kind, inspect.StructType):
        for field in kind.fields:
            if field.encode_name == step:
                return _type_at(field.type, rest)
        if step == kind.tag_field:
            return inspect.LiteralType(values=(str(kind.tag),))
    if isinstance(kind, inspect.VarTupleType | inspect.ListType) and step == "[]":
        return _type_at(kind.item_type, rest)
    if isinstance(kind, inspect.DictType) and step == "[]":
        return _type_at(kind.value_type, rest)
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
        return f"text that matches {kind.pattern}" if kind.pattern else "text"
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
