"""`ferry context`: adds, lists, chooses and forgets the clusters of `context_file`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from migrator.errors import ConfigError, words
from node_agent.cli.context_file import Context, ContextFile, read_contexts, write_contexts
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.output import show, table
from node_agent.config import parse_endpoint

app = typer.Typer(
    help="The clusters that you work with.", no_args_is_help=True, rich_markup_mode=None
)


@app.command("add")
def add(
    name: Annotated[str, typer.Argument(help="What to call it.")],
    server: Annotated[str, typer.Option("--server", help="HOST:PORT of any node's API.")],
    token: Annotated[
        str, typer.Option("--token", help='Of `ferry user token`; "-": from stdin.')
    ] = "-",
    ca: Annotated[
        Path | None, typer.Option("--ca", help="The cluster's authority, a PEM file.")
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option("--fingerprint", help="Of the authority, which is fetched then."),
    ] = None,
    server_name: Annotated[
        str | None,
        typer.Option("--server-name", help="The node's name, if HOST isn't in its certificate."),
    ] = None,
) -> None:
    """Add a cluster, or replace it; the first one becomes the current one."""
    from node_agent.cli.joining import pin
    from node_agent.trust.records import WhoAmI

    host = server.removeprefix("https://").rstrip("/")
    if (ca is None) == (fingerprint is None):
        raise CliError("either --ca FILE or --fingerprint HEX is needed", ExitCode.USAGE)
    try:
        parse_endpoint(host)
    except ConfigError as error:
        raise CliError(f"--server: {error}", ExitCode.USAGE) from error
    if ca is not None:
        try:
            authority = ca.read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise CliError(f"--ca: {ca} can't be read: {words(error)}", ExitCode.USAGE) from error
    else:
        authority = pin(host, _fingerprint(fingerprint or ""))
    text = typer.get_text_stream("stdin").readline() if token == "-" else token
    context = Context(
        name=name,
        endpoint=f"https://{host}",
        authority=authority,
        token=text.strip(),
        server_name=server_name,
    )
    who = context.client().get("/v1/whoami", WhoAmI)
    contexts = read_contexts()
    write_contexts(
        ContextFile(current=contexts.current or name, contexts=(*contexts.without(name), context))
    )
    replaced = "" if len(contexts.without(name)) == len(contexts.contexts) else ", replaced"
    show(who, f"context {name}{replaced}: {who.name} ({who.role}) at {host}")


@app.command("ls")
def list_contexts() -> None:
    """All, the current one marked."""
    contexts = read_contexts()
    rows = [
        ("*" if each.name == contexts.current else "", each.name, each.endpoint)
        for each in contexts.contexts
    ]
    shown = [
        {
            "name": each.name,
            "endpoint": each.endpoint,
            "current": each.name == contexts.current,
        }
        for each in contexts.contexts
    ]
    show(shown, table(("", "NAME", "SERVER"), rows))


@app.command("use")
def use(
    name: Annotated[str, typer.Argument(help='Which; "-": none, the local agent again.')],
) -> None:
    """Choose the one that is used where no other is named."""
    contexts = read_contexts()
    current = None if name == "-" else contexts.get(name).name
    write_contexts(ContextFile(current=current, contexts=contexts.contexts))
    show({"current": current}, f"using {current or 'the local agent'}")


@app.command("rm")
def remove(name: Annotated[str, typer.Argument(help="Which.")]) -> None:
    """Forget one, with its token. The token stays valid: `ferry user token --rm`."""
    contexts = read_contexts()
    contexts.get(name)
    current = None if contexts.current == name else contexts.current
    write_contexts(ContextFile(current=current, contexts=contexts.without(name)))
    show({"removed": name}, f"context {name} is forgotten")


def _fingerprint(text: str) -> bytes:
    try:
        raw = bytes.fromhex(text.replace(":", ""))
    except ValueError:
        raw = b""
    if len(raw) != 32:
        raise CliError(
            "--fingerprint must be 64 hexadecimal digits; `ferry cluster show` prints them",
            ExitCode.USAGE,
        )
    return raw
