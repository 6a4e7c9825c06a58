"""Watching a migration: one live line on a terminal, plain lines elsewhere.

Ctrl-C on a terminal asks: cancel, detach or go on. Elsewhere it detaches. Detaching leaves the
migration alone. An agent that is being restarted is waited for: its migrations go on meanwhile.
"""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TYPE_CHECKING, Final

import msgspec

from migrator.model import Migration, MigrationState
from node_agent.cli.client import ApiClient, migration_path, path_of
from node_agent.cli.errors import ApiProblem, CliError, ExitCode, Unreachable, goes_on_unseen
from node_agent.cli.output import note, settings, show, size
from node_agent.cli.silence import silence_of, silences
from node_agent.resources import Domain

if TYPE_CHECKING:
    from rich.live import Live

POLL_S: Final = 0.2
POLL_FIRST_S: Final = 0.05
"""While it is younger than `_YOUNG_S`: most migrations are over by then."""
_YOUNG_S: Final = 3.0
LINE_S: Final = 2.0
SILENCE_S: Final = 60.0
"""How long an agent may be away before watching is given up."""
_HANDED_OVER: Final = (MigrationState.POSTCOPY, MigrationState.RECOVERING)
_CHANNEL: Final = ("channel broken", "channel restored")
"""What a timeline says of the connection that the pages take."""
_EXIT: Final = {
    MigrationState.COMPLETED: ExitCode.OK,
    MigrationState.FAILED: ExitCode.MIGRATION_FAILED,
    MigrationState.CANCELLED: ExitCode.MIGRATION_CANCELLED,
}


def watch_migration(client: ApiClient, migration: Migration) -> ExitCode:
    """Show it until it ended. The exit code says how; INTERRUPTED: the user detached."""
    live = _on_terminal() and not settings.json
    watcher = _LiveWatcher(client) if live else _LineWatcher(client)
    while not migration.ended:
        try:
            migration = watcher.until_ended(migration)
        except BrokenPipeError:  # Nobody reads any more, and it goes on.
            return ExitCode.INTERRUPTED
        except KeyboardInterrupt:
            if not live or _ask(client, migration):
                note(
                    f"migration {migration.id} goes on; "
                    f"`ferry migration watch {migration.id}` looks at it again"
                )
                return ExitCode.INTERRUPTED
    text = outcome(migration)
    if migration.state is not MigrationState.COMPLETED:
        where = where_now(client, migration.domain)
        text += f"; {migration.domain} is {where}" if where else ""
    show(migration, text)
    if migration.state is MigrationState.FAILED and settings.json:
        print(f"ferry: {text}", file=sys.stderr)
    return _EXIT[migration.state]


def where_now(client: ApiClient, name: str) -> str:
    """Where a domain is after a migration that came to nothing: the first thing to know."""
    try:
        domain = client.get(path_of(name), Domain)
    except CliError:
        return ""
    return domain.state + (f" on {domain.node}" if domain.node is not None else "")


def _on_terminal() -> bool:
    return sys.stdout.isatty() and sys.stdin.isatty()


def _pause(watched_s: float) -> None:
    time.sleep(POLL_FIRST_S if watched_s < _YOUNG_S else POLL_S)


def outcome(migration: Migration) -> str:
    """One sentence about a migration that ended."""
    name, total = migration.domain, f"{migration.total_s or 0:.1f} s"
    if migration.state is MigrationState.COMPLETED:
        blackout = migration.blackout_ms
        dark = f", blackout {blackout:.1f} ms" if blackout is not None else ""
        return (
            f"domain {name} runs on {migration.destination}{dark}, total {total}, "
            f"{size(migration.progress.bytes_sent)} sent"
        )
    told = f"migration {migration.id} of domain {name}"
    if migration.state is MigrationState.CANCELLED and migration.cancelled_by:
        return f"{told} was cancelled by {migration.cancelled_by}"
    why = f": {migration.error}" if migration.error else ""
    return f"{told} {migration.state.value}{why}"


def describe(migration: Migration, *, heard: bool = True) -> str:
    """One line about a migration that goes on. `heard`: its source speaks, so its rates are new."""
    progress = migration.progress
    if not heard:
        progress = msgspec.structs.replace(
            progress, throughput_bytes_per_s=None, dirty_rate_bytes_per_s=None, eta_s=None
        )
    parts = [f"{migration.domain}: {migration.source} -> {migration.destination}"]
    parts.append(progress.state.value)
    if progress.iteration:
        parts.append(f"iteration {progress.iteration}")
    parts.append(f"{size(progress.bytes_sent)} sent, {size(progress.remaining_bytes)} to go")
    if progress.throughput_bytes_per_s is not None:
        parts.append(f"{size(progress.throughput_bytes_per_s)}/s")
    if progress.dirty_rate_bytes_per_s is not None and migration.blackout_ms is None:
        parts.append(f"dirtied {size(progress.dirty_rate_bytes_per_s)}/s")
    if migration.blackout_ms is not None:
        parts.append(f"blackout {migration.blackout_ms:.1f} ms")  # In post-copy it is over.
    elif progress.predicted_blackout_ms is not None:
        parts.append(f"blackout ~{progress.predicted_blackout_ms:.0f} ms")
    if trouble := _trouble(migration):
        parts.append(trouble)
    elif progress.unheard_s is not None:
        parts.append(unheard(migration))
    elif progress.eta_s is not None:
        parts.append(f"~{progress.eta_s:.0f} s left")
    return ", ".join(parts)


def unheard(migration: Migration) -> str:
    """Whose engine isn't heard, and for how long; "": it is."""
    unheard_s = migration.progress.unheard_s
    if unheard_s is None:
        return ""
    if migration.state is MigrationState.POSTCOPY:
        ends = f"{migration.source} or {migration.destination}"
        return f"an engine, of {ends}, hasn't been heard for {unheard_s:.0f} s"
    return f"its engine hasn't been heard for {unheard_s:.0f} s"


def _trouble(migration: Migration) -> str:
    """Why no pages travel now, or what the guest waits for."""
    if migration.state in _HANDED_OVER:
        return migration.error or ""
    noted = [each for each in migration.timeline if each.name in _CHANNEL]
    if migration.state is not MigrationState.PRECOPY or not noted or noted[-1].name != _CHANNEL[0]:
        return ""
    return f"{noted[-1].name}: {noted[-1].detail}"


class _Watcher:
    """Polls; what it does with each state of things is its subclasses'."""

    def __init__(self, client: ApiClient) -> None:
        self._client = client
        self._still: tuple[MigrationState, int] | None = None
        self._looked_at_s = 0.0
        self._silence = ""
        self._unanswered_s = 0.0

    def until_ended(self, migration: Migration) -> Migration:
        """The migration when it ended. Unreachable after `SILENCE_S` without an answer."""
        path = migration_path(migration.id)
        answered_at = began = time.monotonic()
        while not migration.ended:
            self.saw(migration)
            _pause(time.monotonic() - began)
            try:
                migration = self._client.get(path, Migration)
                answered_at, self._unanswered_s = time.monotonic(), 0.0
            except (Unreachable, ApiProblem) as error:
                if isinstance(error, ApiProblem) and error.problem.status < 500:
                    raise goes_on_unseen(error, f"migration {migration.id}") from error
                self._unanswered_s = time.monotonic() - answered_at
                if self._unanswered_s > SILENCE_S:
                    raise CliError(
                        f"{error}; whether migration {migration.id} goes on is unknown",
                        ExitCode.UNREACHABLE,
                    ) from error
                with contextlib.suppress(CliError):  # Where several agents may be asked: another.
                    self._client = settings.client()
        return migration

    def saw(self, migration: Migration) -> None:
        raise NotImplementedError

    def line(self, migration: Migration) -> str:
        """`describe`; and once nothing has moved for `LINE_S`, which node is silent."""
        now, figures = time.monotonic(), (migration.state, migration.progress.bytes_sent)
        if figures != self._still:
            self._still, self._looked_at_s, self._silence = figures, now, ""
        elif now - self._looked_at_s >= LINE_S:
            self._looked_at_s = now
            self._silence = silence_of(migration, silences(self._client))
        said = self._silence
        if self._unanswered_s >= 1.0:
            said = f"no agent has answered for {self._unanswered_s:.0f} s"
        return describe(migration, heard=not said) + (f"; {said}" if said else "")


class _LineWatcher(_Watcher):
    """A line a change of state, and one every `LINE_S`."""

    def __init__(self, client: ApiClient) -> None:
        super().__init__(client)
        self._state: MigrationState | None = None
        self._printed_at = 0.0

    def saw(self, migration: Migration) -> None:
        now, line = time.monotonic(), self.line(migration)
        if migration.state is not self._state or now - self._printed_at >= LINE_S:
            note(line)
            self._state, self._printed_at = migration.state, now


class _LiveWatcher(_Watcher):
    """A bar that is redrawn."""

    _live: Live | None = None

    def until_ended(self, migration: Migration) -> Migration:
        from rich.live import Live

        with Live(transient=True, refresh_per_second=5) as live:
            self._live = live
            return super().until_ended(migration)

    def saw(self, migration: Migration) -> None:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.text import Text

        progress = migration.progress
        total = progress.bytes_sent + progress.remaining_bytes
        bar = ProgressBar(total=max(total, 1), completed=progress.bytes_sent, width=60)
        if self._live is not None:
            self._live.update(Group(Text(self.line(migration)), bar))


def _ask(client: ApiClient, migration: Migration) -> bool:
    """After Ctrl-C on a terminal. True: detach. Cancelling or going on: False."""
    try:
        answer = input("\n[c]ancel the migration, [d]etach and let it go on, or Enter to stay? ")
    except (KeyboardInterrupt, EOFError):
        return True
    choice = answer.strip().lower()[:1]
    if choice == "c":
        try:
            client.delete(migration_path(migration.id))
        except ApiProblem as error:
            note(f"not cancelled: {error}")
    return choice == "d"
