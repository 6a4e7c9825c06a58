"""A signal to `ferry lab` isn't lost, wherever Python was when it came."""

from __future__ import annotations

import os
import signal
import weakref
from collections.abc import Iterator

import pytest
import typer

from deploy.lab import cli

_NUMBERS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class _Referred:
    """Weak references can be made to it."""


@pytest.fixture(autouse=True)
def _handlers() -> Iterator[None]:
    before = {number: signal.getsignal(number) for number in _NUMBERS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("number", _NUMBERS)
def test_what_python_drops_is_raised_at_the_next_step(number: signal.Signals) -> None:
    steps = []
    with pytest.raises(typer.Exit) as ended, cli._errors_as_sentences() as check:
        referred = _Referred()
        kept = weakref.ref(referred, lambda _: os.kill(os.getpid(), number))
        del referred
        steps.append("dropped")
        check()
        steps.append("not reached")
    assert steps == ["dropped"]
    assert ended.value.exit_code == 130
    assert kept() is None
