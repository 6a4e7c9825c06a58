"""`ferry`: the command line. Everything goes through the HTTP API of one agent.

`--api`, `--context`, `--lab` and `--json` may stand anywhere. Results go to stdout, errors to
stderr as one sentence; `ExitCode` lists the exit codes. Nothing heavy is imported until a command
needs it, and `lab` and `demo`, which bring their own options, are mounted only when called.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from node_agent.cli import (
    cluster,
    contexts,
    domains,
    drain,
    hooks,
    migrations,
    storage,
    trust,
    users,
)
from node_agent.cli.doctor import doctor
from node_agent.cli.errors import EXIT_CODES_HELP, ApiProblem, CliError, ExitCode
from node_agent.cli.output import settings

_MOUNTED: Final = {
    "lab": ("deploy.lab.cli", "A cluster on this one machine, for trying and testing."),
    "demo": ("deploy.demo.cli", "A demonstration."),
}
_HELP: Final = f"""Moves running virtual machines between hosts without their users noticing.

These options may stand anywhere:

\b
  --api ADDRESS  the agent: unix:/PATH or http://HOST:PORT ($FERRY_API)
  --context NAME a cluster of `ferry context` ($FERRY_CONTEXT)
  --lab NAME     the first agent of this lab that answers ($FERRY_LAB)
  --json         machine-readable output, to stdout only

Without them: the current context, /run/ferry/api.sock, or the only lab of this machine.

{EXIT_CODES_HELP}
"""


def build_app(mounted: str | None = None) -> typer.Typer:
    """The application; `mounted` names the sub-application that is really called."""
    app = typer.Typer(
        name="ferry",
        help=_HELP,
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
    )
    app.add_typer(domains.app, name="domain")
    app.command("migrate")(migrations.migrate)
    app.add_typer(migrations.app, name="migration")
    app.command("drain")(drain.drain)
    app.command("undrain")(drain.undrain)
    app.command("balance")(drain.balance)
    app.command("cordon")(drain.cordon)
    app.command("uncordon")(drain.uncordon)
    app.add_typer(drain.drains, name="drains")
    app.add_typer(cluster.nodes, name="node")
    app.add_typer(trust.app, name="cluster")
    app.add_typer(users.app, name="user")
    app.add_typer(contexts.app, name="context")
    app.add_typer(storage.volumes, name="volume")
    app.add_typer(storage.pools, name="pool")
    app.add_typer(hooks.app, name="hook")
    app.command("events")(cluster.events)
    app.command("agent")(agent)
    app.command("doctor")(doctor)
    for name, (module, help_text) in _MOUNTED.items():
        if name == mounted:
            app.add_typer(importlib.import_module(module).app, name=name)
        elif importlib.util.find_spec(module.rpartition(".")[0]) is not None:
            app.add_typer(typer.Typer(help=help_text, callback=_never), name=name)
    return app


def _never() -> None:
    """Only for the line in the help: the real application is mounted when it is called."""


def agent(
    config: Annotated[Path, typer.Option("--config", "-c", help="Its TOML file.")],
) -> None:
    """Run the agent of this node, until SIGTERM."""
    from migrator.errors import FerryError
    from node_agent.config import load_config

    try:
        loaded = load_config(config)
        run = importlib.import_module("node_agent.agent").run
        code = run(loaded)
    except FerryError as error:
        raise CliError(str(error)) from error
    raise typer.Exit(int(code or 0))


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
        rest = take_leading(arguments)
        mounted = rest[0] if rest else None
        rest = rest or take_settings(arguments)
        build_app(mounted)(args=rest, prog_name="ferry", standalone_mode=True)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else ExitCode.OK
    except ModuleNotFoundError as error:
        print(f"ferry: this installation has no {error.name}", file=sys.stderr)
        return ExitCode.FAILED
    except CliError as error:
        _report(error)
        return error.code
    except KeyboardInterrupt:
        return ExitCode.INTERRUPTED
    except BrokenPipeError:  # `ferry ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return ExitCode.OK
    return ExitCode.OK


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
