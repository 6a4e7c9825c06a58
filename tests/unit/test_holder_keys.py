"""Reservation keys, and the names that iSCSI allows."""

from __future__ import annotations

import pytest

from migrator.errors import FenceError
from migrator.model import FencingToken, NodeName
from storage.holder_keys import TOKEN_MAX, HolderKey, key_of, parse_key
from storage.iscsi.names import iqn_part


def key(node: str, token: int) -> HolderKey:
    return key_of(NodeName(node), FencingToken(token))


@pytest.mark.parametrize("token", [1, 2, 255, 256, 65_536, TOKEN_MAX])
def test_a_key_says_node_and_token(token: int) -> None:
    for node in ("n1", "n2", "a-node-with-a-long-name"):
        made = key(node, token)
        assert made.value < 1 << 64
        assert parse_key(made.value) == made
        assert made.token == token
    assert key("n1", token).node != key("n2", token).node


@pytest.mark.parametrize("token", [0, -1, TOKEN_MAX + 1])
def test_a_token_that_does_not_fit_is_refused(token: int) -> None:
    with pytest.raises(FenceError):
        key("n1", token)


@pytest.mark.parametrize("value", [0, 1, 0xABC, 0xFE << 56, 0xFD << 56 | 1, (1 << 64) - 1 << 24])
def test_a_strangers_key_is_known_as_one(value: int) -> None:
    assert parse_key(value) is None


def test_a_newer_token_outranks_and_a_tie_is_won_by_who_holds_it() -> None:
    assert key("a", 3).outranks(key("b", 2))
    assert key("a", 3).outranks(key("a", 2))
    assert not key("a", 2).outranks(key("b", 3))
    assert not key("a", 2).outranks(key("a", 2))
    assert key("a", 2).outranks(key("b", 2))


def test_an_iscsi_name_keeps_two_names_apart() -> None:
    assert iqn_part("web-1.disk") == "web-1.disk"
    names = ["web_1", "web-1", "Web-1", "WEB_1", "web.1"]
    made = [iqn_part(name) for name in names]
    assert len(set(made)) == len(names)
    for part in made:
        assert part == part.lower()
        assert "_" not in part
