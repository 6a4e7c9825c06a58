"""`ferry completion bash`: what a shell sources once; and how it is answered when it asks.

It asks by running `ferry` with `VARIABLE` set, and the line that was begun in another variable.
"""

from __future__ import annotations

import enum
import os
from collections.abc import Collection
from typing import Annotated, Final

import typer

VARIABLE: Final = "_FERRY_COMPLETE"
_LINES: Final = ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")
"""Where typer's scripts put the line: bash's, the others'."""


class Shell(enum.StrEnum):
    """What there is a script for."""

    BASH = "bash"
    ZSH = "zsh"
    FISH = "fish"


def completion(
    shell: Annotated[Shell, typer.Argument(metavar="SHELL", help="bash, zsh or fish.")],
) -> None:
    """Print what completes commands and options in a shell.

    bash: source <(ferry completion bash)
    """
    from typer._completion_shared import get_completion_script

    print(get_completion_script(prog_name="ferry", complete_var=VARIABLE, shell=shell.value))


def command_asked_of(commands: Collection[str]) -> str | None:
    """A shell asks: the command that stands in its line; None: none does yet."""
    from typer._completion_classes import completion_init

    completion_init()
    line = next((os.environ[name] for name in _LINES if name in os.environ), "")
    return next((word for word in line.split()[1:] if word in commands), None)
