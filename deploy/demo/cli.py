"""`ferry demo`: see a virtual machine move, on this one machine."""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, NoReturn

import typer

from migrator.errors import FerryError, RefusedError
from node_agent.cli.errors import CliError, ExitCode

DEFAULT_LAB: Final = "demo"
DEFAULT_PLOT: Final = "ferry-demo.png"
NODES_MAX: Final = 16
"""Of the demo: each agent is a process of some 60 MB."""

app = typer.Typer(
    name="demo",
    help="A web server moves around a cluster on this machine, while a client watches it.",
    invoke_without_command=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


@app.callback()
def demo(
    as_json: Annotated[
        bool, typer.Option("--json", help="The result as one JSON line; the story to stderr.")
    ] = False,
    nodes: Annotated[int, typer.Option(min=2, max=NODES_MAX, help="How many nodes.")] = 3,
    rounds: Annotated[
        int, typer.Option(min=1, max=100, help="How often around all nodes and back.")
    ] = 2,
    keep: Annotated[bool, typer.Option("--keep", help="Leave the lab up.")] = False,
    plot: Annotated[Path, typer.Option(help="Where the picture goes.")] = Path(DEFAULT_PLOT),
    lab: Annotated[str, typer.Option(help="The lab's name.")] = DEFAULT_LAB,
) -> None:
    """Make a cluster of network namespaces, start a web server in a virtual machine on it, and
    migrate it around all nodes while a client downloads from it.

    Exit status: 0 if no user of the guest could have noticed more than a moment's wait, 1 if
    something broke or could not be done, 130 after Ctrl-C. Needs root.
    """
    with _errors_as_sentences():
        from deploy.demo.screen import Screen
        from deploy.demo.story import Options, tell

        screen = Screen(as_json=as_json)
        options = Options(lab=lab, nodes=nodes, rounds=rounds, keep=keep, plot=plot.absolute())
        outcome = tell(options, screen)
        screen.result(outcome.result)
    if outcome.faults:
        raise typer.Exit(ExitCode.FAILED)


@contextmanager
def _errors_as_sentences() -> Iterator[None]:
    """Errors become one sentence and an exit status; SIGTERM ends as orderly as Ctrl-C."""
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

    def interrupt(_number: int, _frame: object) -> NoReturn:
        # One is enough: what follows takes everything down, in bounded time.
        for number in numbers:
            signal.signal(number, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = {number: signal.signal(number, interrupt) for number in numbers}
    try:
        yield
    except RefusedError as error:
        print(f"ferry demo: {error}", file=sys.stderr)
        for reason in error.reasons if len(error.reasons) > 1 else ():
            print(f"  - {reason}", file=sys.stderr)
        raise typer.Exit(ExitCode.FAILED) from None
    except (FerryError, CliError) as error:
        print(f"ferry demo: {error}", file=sys.stderr)
        # In a request Ctrl-C is an error of the client's, which says what may have been done.
        ours = isinstance(error, CliError) and error.code is ExitCode.INTERRUPTED
        raise typer.Exit(ExitCode.INTERRUPTED if ours else ExitCode.FAILED) from None
    except KeyboardInterrupt:
        print("ferry demo: interrupted", file=sys.stderr)
        raise typer.Exit(ExitCode.INTERRUPTED) from None
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
