"""The clusters that a user works with, each an address, an authority, a token.

They are in contexts.json of $FERRY_CONFIG_HOME, $XDG_CONFIG_HOME/ferry or ~/.config/ferry, mode
0600: a file that others may read is refused, for it holds tokens.
"""

from __future__ import annotations

import contextlib
import os
import ssl
import stat
from pathlib import Path

import msgspec

from migrator.errors import words
from migrator.ports import Struct
from node_agent.cli.client import Access, ApiClient, pinned_context
from node_agent.cli.errors import CliError, ExitCode


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
