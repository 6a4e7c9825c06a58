"""How the command line writes things down."""

from __future__ import annotations

from node_agent.cli.output import by_number


def test_people_count_to_ten_before_eleven() -> None:
    names = ["n10", "n2", "n1", "web-2-b", "web-10-a", "n1a", "", "7", "n"]
    assert sorted(names, key=by_number) == [
        *("", "7", "n", "n1", "n1a", "n2", "n10"),
        *("web-2-b", "web-10-a"),
    ]
