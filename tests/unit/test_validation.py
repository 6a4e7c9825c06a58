"""A wrong body names the very field, also in maps; through the API: test_api_http."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from migrator.errors import InvalidRequest
from migrator.model import DomainSpec, FileName, LabelKey, LabelValue, MacAddress, Name
from node_agent.api.validation import decode_body
from storage.settings import AbsolutePath, Endpoint, Host


class Nested(msgspec.Struct):
    racks: dict[str, dict[str, int]]


def refusal(data: bytes, kind: Any = DomainSpec) -> InvalidRequest:
    with pytest.raises(InvalidRequest) as refused:
        decode_body(data, kind)
    return refused.value


def spec(labels: object) -> bytes:
    return json.dumps({"name": "web", "memory_bytes": 2**28, "labels": labels}).encode()


@pytest.mark.parametrize(
    ("labels", "field", "right"),
    [
        ({"a": "1", "tier": "two words", "z": "/"}, 'labels["tier"]', "at most 63 letters"),
        ({"a": "1", "tier": 7}, 'labels["tier"]', "at most 63 letters"),
        ({"a": "1", "Tier": "x"}, 'labels["Tier"]', "left out; a key must be 1 to 63 lower-case"),
        ({"": "x"}, 'labels[""]', "left out; a key must be 1 to 63 lower-case"),
        ({"k" * 200: "x"}, f'labels["{"k" * 80}"]', "left out; a key must be"),
        ({f"k{n}": "x" if n != 777 else "/" for n in range(1_000)}, 'labels["k777"]', "at most"),
        (["tier"], "labels", "an object"),
    ],
)
def test_a_wrong_label_is_named_by_its_key(labels: object, field: str, right: str) -> None:
    error = refusal(spec(labels))
    assert list(error.fields) == [field]
    assert error.fields[field].startswith(right)
    assert str(error).startswith(f"{field} must be {right}")


def test_maps_in_maps() -> None:
    error = refusal(b'{"racks": {"r1": {"n1": 1}, "r2": {"n1": 1, "n2": "x"}}}', Nested)
    assert error.fields == {'racks["r2"]["n2"]': "a whole number"}


@pytest.mark.parametrize(
    "data",
    [
        b'{"labels": {"a": "two words"}, ',
        b'{"labels": {"a": "two words"}, "name": ' + b"[" * 5000,
        spec({"a": "1"}).replace(b'"a": "1"', b'"a": "two words", "a": "1"'),
    ],
    ids=["no JSON behind it", "too deep behind it", "twice in it"],
)
def test_where_no_key_can_be_found_the_map_is_named(data: bytes) -> None:
    assert list(refusal(data).fields) == ["labels[...]"]


@pytest.mark.parametrize(
    ("kind", "right"),
    [
        (Name, "web"),
        (FileName, "web.raw"),
        (MacAddress, "52:54:00:00:00:01"),
        (LabelKey, "tier"),
        (LabelValue, "front"),
        (LabelValue, ""),
        (AbsolutePath, "/srv/disks"),
        (Host, "nfs.example"),
        (Endpoint, "[fd00::1]:10809"),
    ],
)
def test_a_name_ends_without_a_line_break(kind: Any, right: str) -> None:
    assert msgspec.convert(right, kind) == right
    for end in ("\n", "\n\n", "\r", "\0"):
        with pytest.raises(msgspec.ValidationError):
            msgspec.convert(right + end, kind)


def test_what_is_wrong_with_a_line_break_is_said() -> None:
    error = refusal(b'{"name": "web\\n", "memory_bytes": 268435456}')
    assert error.fields["name"].startswith("1 to 40 lower-case letters")
    error = refusal(b'{"name": "web", "memory_bytes": 268435456, "machine": "q35\\n"}')
    assert error.fields["machine"] == "text that matches ^[a-z0-9.-]{1,40}$"
