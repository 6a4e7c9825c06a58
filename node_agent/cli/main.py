"""`ferry`: the command line. Everything goes through the HTTP API of one agent.

`--api`, `--context`, `--lab` and `--json` may stand anywhere. Results go to stdout, errors to
stderr as one sentence; `ExitCode` lists the exit codes. Of the commands only the one that is called
is imported and mounted, all of them where the help lists them; nothing heavy before a command needs
it. `lab` and `demo` bring options of their own.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from typing import Annotated, Final

import msgspec
import typer

from migrator.errors import words
from node_agent.cli import completion
from node_agent.cli.client import ApiClient
from node_agent.cli.errors import EXIT_CODES_HELP, ApiProblem, CliError, ExitCode
from node_agent.cli.output import settings

_COMMANDS: Final = {
    "domain": "domains.app",
    "migrate": "migrations.migrate",
    "migration": "migrations.app",
    "drain": "drain.drain",
    "undrain": "drain.undrain",
    "balance": "drain.balance",
    "cordon": "drain.cordon",
    "uncordon": "drain.uncordon",
    "drains": "drain.drains",
    "node": "cluster.nodes",
    "cluster": "trust.app",
    "user": "users.app",
    "context": "contexts.app",
    "volume": "storage.volumes",
    "pool": "storage.pools",
    "hook": "hooks.app",
    "events": "cluster.events",
    "agent": "agent.agent",
    "doctor": "doctor.doctor",
    "completion": "completion.completion",
}
"""Where each is, in `node_agent.cli`."""
_MOUNTED: Final = {
    "lab": ("deploy.lab.cli", "A cluster on this one machine, for trying and testing."),
    "demo": ("deploy.demo.cli", "A demonstration."),
}
_HELP: Final = f"""Moves running virtual machines between hosts without their users noticing.

These options may stand anywhere:

\b
  --api ADDRESS  the agent: unix:/PATH or http(s)://HOST:PORT ($FERRY_API)
  --context NAME a cluster of `ferry context` ($FERRY_CONTEXT)
  --lab NAME     the first agent of this lab that answers ($FERRY_LAB)
  --json         machine-readable output, to stdout only; an answer that is an
                 error is the last line on stderr

Without them: the current context, /run/ferry/api.sock, or the only lab of this machine.

When something is wrong: `ferry doctor`, and docs/bad-day.md (in /usr/share/doc/ferry).

{EXIT_CODES_HELP}
"""


def build_app(called: str | None = None) -> typer.Typer:
    """The application, with the command that is called alone; with all if there is none such."""
    app = typer.Typer(
        name="ferry",
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.callback()(_version)  # Without any, one command alone would be the application itself.
    if called in _COMMANDS:
        _mount(app, called)
        return app
    for name in _COMMANDS:
        _mount(app, name)
    for name, (module, help_text) in _MOUNTED.items():
        if name == called:
            app.add_typer(importlib.import_module(module).app, name=name)
        elif importlib.util.find_spec(module.rpartition(".")[0]) is not None:
            app.add_typer(typer.Typer(help=help_text, callback=_nothing), name=name)
    return app


def _mount(app: typer.Typer, name: str) -> None:
    module, _, attribute = _COMMANDS[name].partition(".")
    found = getattr(importlib.import_module(f"node_agent.cli.{module}"), attribute)
    if isinstance(found, typer.Typer):
        app.add_typer(found, name=name)
    else:
        app.command(name)(found)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"ferry {version('ferry')}")
        raise typer.Exit


def _version(
    version: Annotated[
        bool,
        typer.Option(
            "--version", is_eager=True, callback=_show_version, help="Show the version and exit."
        ),
    ] = False,
) -> None:
    """For its option."""


def _nothing() -> None:
    """In the place of a command that isn't called."""


def take_settings(arguments: Sequence[str]) -> list[str]:
    """Put the options that may stand anywhere into `settings`; the rest is returned.

    CliError if one lacks its value. After `--` nothing is taken.
    """
    settings.api, settings.lab, settings.json, settings.context = None, None, False, None
    rest: list[str] = []
    remaining = iter(arguments)
    for argument in remaining:
        name, separator, value = argument.partition("=")
        if argument == "--":
            return [*rest, argument, *remaining]
        if argument == "--json":
            settings.json = True
        elif name in {"--api", "--lab", "--context"}:
            found = value if separator else next(remaining, None)
            if not found:
                raise CliError(f"{name} needs a value", ExitCode.USAGE)
            if name == "--api":
                settings.api = found
            elif name == "--context":
                settings.context = found
            else:
                settings.lab = found
        else:
            rest.append(argument)
    return rest


def take_leading(arguments: Sequence[str]) -> list[str]:
    """The arguments from the command's name on, for a mounted one; `settings` has what was before.

    It has options of its own, also its own --json: those behind its name are left to it. The lab
    that is named before it is its default.
    """
    first = 0
    while first < len(arguments) and arguments[first].startswith("--"):
        first += 2 if arguments[first] in {"--api", "--lab", "--context"} else 1
    if first >= len(arguments) or arguments[first] not in _MOUNTED:
        return []
    take_settings(arguments[:first])
    if settings.lab is not None:
        os.environ["FERRY_LAB"] = settings.lab
    return [*arguments[first:], *(["--json"] if settings.json else [])]


def run(arguments: Sequence[str]) -> int:
    """Run one command line and return its exit code; errors are on stderr by then."""
    try:
        code = _run(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # `ferry ... | head`: who reads has seen enough.
        _drop_output()
        return ExitCode.OK
    except OSError as error:
        _drop_output()
        what = error.filename or "the output"
        print(f"ferry: {what} can't be written: {words(error)}", file=sys.stderr)
        return ExitCode.FAILED
    return code


def _run(arguments: Sequence[str]) -> int:
    try:
        rest = take_leading(arguments)
        rest = rest or take_settings(arguments)
        called = rest[0] if rest else None
        if completion.VARIABLE in os.environ:
            called = completion.command_asked_of({*_COMMANDS, *_MOUNTED})
        build_app(called)(args=rest, prog_name="ferry", standalone_mode=True)
    except SystemExit as ended:
        if isinstance(ended.__context__, BrokenPipeError):
            raise ended.__context__ from None  # Typer makes a failure of it.
        told = ended.__context__  # Typer makes an exit of an interrupt.
        if told is not None and isinstance(told.__cause__, KeyboardInterrupt):
            return _interrupted()
        return ended.code if isinstance(ended.code, int) else ExitCode.OK
    except ModuleNotFoundError as error:
        print(f"ferry: this installation has no {error.name}", file=sys.stderr)
        return ExitCode.FAILED
    except CliError as error:
        _report(error)
        return error.code
    except KeyboardInterrupt:
        return _interrupted()
    return ExitCode.OK


def _interrupted() -> int:
    """Where nobody has said yet what that means: who watches something tells that it goes on."""
    if ApiClient.asked_for_change:
        print("ferry: interrupted; what was asked for is done, or goes on", file=sys.stderr)
    return ExitCode.INTERRUPTED


def _drop_output() -> None:
    """What is left in the buffer can't be written either, and Python would say so at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _report(error: CliError) -> None:
    """One sentence, then every reason of a refusal that it doesn't name."""
    print(f"ferry: {error}", file=sys.stderr)
    if isinstance(error, ApiProblem):
        for reason in error.problem.reasons:
            if reason not in str(error):
                print(f"  - {reason}", file=sys.stderr)
        if settings.json:
            print(msgspec.json.encode(error.problem).decode(), file=sys.stderr)


def main() -> None:
    """The entry point."""
    sys.exit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
