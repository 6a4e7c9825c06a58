"""`ferry hook`: what adding says can be tried, and what trying says."""

from __future__ import annotations

import json

import pytest

from node_agent.cli.errors import ExitCode
from tests.unit.ferry_command import Ferry

pytestmark = pytest.mark.allow_blocking("the CLI is synchronous; it runs in a thread")

BOTH = ("--point", "on-failure", "--point", "before-migration")


async def test_a_hook_is_tried_as_adding_it_says(ferry: Ferry) -> None:
    said = (await ferry("hook", "add", "note", "--command", "/bin/true", *BOTH)).out
    command = said.partition("`ferry ")[2].partition("`")[0].split()
    tried = (await ferry(*command)).out.splitlines()
    assert [line.split()[:4] for line in tried] == [
        ["hook", "note", "before-migration", "succeeded"],
        ["hook", "note", "on-failure", "succeeded"],
    ]
    assert len(json.loads((await ferry(*command, "--json")).out)) == 2
    one = json.loads((await ferry(*command, "--point", "on-failure", "--json")).out)
    assert one["succeeded"]


async def test_a_hook_that_fails_at_one_moment_fails(ferry: Ferry) -> None:
    only = 'test "$FERRY_HOOK_POINT" = before-migration'
    shell = ("--command", "/bin/sh", "--command=-c", "--command", only)
    await ferry("hook", "add", "half", *shell, *BOTH)
    tried = (await ferry("hook", "test", "half", code=ExitCode.FAILED)).out
    assert "before-migration succeeded" in tried and "on-failure FAILED" in tried
    other = ("hook", "test", "half", "--point", "after-resume")
    assert (
        "it is run on-failure or before-migration, not after-resume"
        in (await ferry(*other, code=ExitCode.REFUSED)).err
    )


async def test_a_webhook_that_can_t_be_reached_is_told_in_words(ferry: Ferry) -> None:
    where = ("--webhook", "http://127.0.0.1:1/x", "--deadline", "0.1")
    await ferry("hook", "add", "gone", *where, "--point", "on-failure")
    tried = (await ferry("hook", "test", "gone", code=ExitCode.FAILED)).out
    assert "last: 127.0.0.1 port 1 can't be reached: Connection refused" in tried
    assert "ssl" not in tried
