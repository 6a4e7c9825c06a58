"""Netlink messages as they are written and taken apart, also where the kernel's answer is cut."""

from __future__ import annotations

import struct

import pytest

from netfabric.netlink_format import (
    NLA_F_NESTED,
    NLM_F_ACK,
    NLM_F_REQUEST,
    attribute,
    attributes_in,
    error_in,
    message,
    messages_in,
)


def test_messages_follow_each_other() -> None:
    data = message(16, NLM_F_ACK, b"abcde") + message(24, 0, b"")
    assert len(data) % 4 == 0
    assert list(messages_in(data)) == [
        (16, NLM_F_REQUEST | NLM_F_ACK, b"abcde"),
        (24, NLM_F_REQUEST, b""),
    ]


@pytest.mark.parametrize("kept", range(16 + 4 + 16))
def test_a_message_that_is_cut_short_is_left_out(kept: int) -> None:
    data = message(16, 0, b"abcd") + message(24, 0, b"")
    assert len(list(messages_in(data[:kept]))) == (kept >= 20)


def test_a_length_that_cannot_be_ends_it() -> None:
    assert list(messages_in(struct.pack("=IHHII", 3, 16, 0, 1, 0))) == []
    assert attributes_in(struct.pack("=HH", 0, 1)) == {}


def test_attributes_by_their_kind_without_flags() -> None:
    data = attribute(3, b"br0\0") + attribute(18 | NLA_F_NESTED, attribute(1, b"x"))
    found = attributes_in(data)
    assert found[3] == b"br0\0"
    assert attributes_in(found[18]) == {1: b"x"}


def test_an_acknowledgement_and_an_error() -> None:
    assert error_in(struct.pack("=i", 0)) == 0
    assert error_in(struct.pack("=i", -17) + b"what it was about") == 17
