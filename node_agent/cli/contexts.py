"""`ferry context`: the clusters that this user works with, each an address, an authority, a token.

They are in contexts.json of $FERRY_CONFIG_HOME, $XDG_CONFIG_HOME/ferry or ~/.config/ferry, mode
0600: a file that others may read is refused, for it holds tokens.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
from pathlib import Path
from typing import Annotated, Final

import msgspec
import typer

from migrator.errors import ConfigError, words
from migrator.ports import Struct
from node_agent.cli.client import Access, ApiClient
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.output import show, table
from node_agent.config import parse_endpoint

app = typer.Typer(
    help="The clusters that you work with.", no_args_is_help=True, rich_markup_mode=None
)

VARIABLE: Final = "FERRY_CONTEXT"


class Context(Struct, frozen=True, kw_only=True):
    """One cluster."""

    name: str
    endpoint: str
    """https://HOST:PORT of any node's API."""
    authority: str
    """The cluster's authority, in PEM."""
    token: str
    server_name: str | None = None
    """The node's name, where HOST isn't in its certificate."""

    def client(self) -> ApiClient:
        """Towards that cluster."""
        from node_agent.cli.joining import pinned_context

        try:
            tls = pinned_context(self.authority)
        except (ssl.SSLError, ValueError) as error:
            raise CliError(
                f"the authority of context {self.name} is not a certificate in PEM: {error}",
                ExitCode.USAGE,
            ) from error
        access = Access(token=self.token, tls=tls, server_name=self.server_name)
        return ApiClient(self.endpoint, access)


class ContextFile(Struct, frozen=True, kw_only=True):
    current: str | None = None
    contexts: tuple[Context, ...] = ()

    def get(self, name: str) -> Context:
        """CliError (not found) if there is none."""
        for each in self.contexts:
            if each.name == name:
                return each
        raise CliError(f"there is no context {name}; see `ferry context ls`", ExitCode.NOT_FOUND)

    def without(self, name: str) -> tuple[Context, ...]:
        return tuple(each for each in self.contexts if each.name != name)


def file_path() -> Path:
    """Where the contexts are."""
    home = os.environ.get("FERRY_CONFIG_HOME")
    if home:
        return Path(home) / "contexts.json"
    base = os.environ.get("XDG_CONFIG_HOME")
    return (Path(base) if base else Path.home() / ".config") / "ferry" / "contexts.json"


def read_contexts() -> ContextFile:
    """Empty where there is no file. CliError: it can't be read, or others can."""
    path = file_path()
    try:
        mode = path.stat().st_mode
        content = path.read_bytes()
    except FileNotFoundError:
        return ContextFile()
    except (OSError, RuntimeError) as error:
        raise CliError(f"{path} can't be read: {words(error)}") from error
    if stat.S_IMODE(mode) & 0o077:
        raise CliError(f"{path} holds tokens and may be read by others: chmod 600 {path}")
    try:
        return msgspec.json.decode(content, type=ContextFile)
    except msgspec.DecodeError as error:
        raise CliError(f"{path} is damaged: {error}") from error


def write_contexts(contexts: ContextFile) -> None:
    """Replace the file in one step; mode 0600 from its first moment."""
    path = file_path()
    draft = path.with_name(f".{path.name}.new")
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        draft.unlink(missing_ok=True)
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "wb") as file:
            file.write(msgspec.json.format(msgspec.json.encode(contexts), indent=2))
        draft.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            draft.unlink(missing_ok=True)
        raise CliError(f"{path} can't be written: {words(error)}") from error


def chosen(name: str | None) -> Context | None:
    """The context that is asked for, else the current one; None: there is none."""
    contexts = read_contexts()
    if name is not None:
        return contexts.get(name)
    return contexts.get(contexts.current) if contexts.current else None


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
