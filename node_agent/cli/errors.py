"""The CLI's errors and its exit codes, which scripts rely on."""

from __future__ import annotations

import enum
from typing import Final

import msgspec

from migrator.errors import PeerError
from node_agent.resources import Problem


class ExitCode(enum.IntEnum):
    """What `ferry` says with its exit status. Also in `ferry --help`."""

    OK = 0
    FAILED = 1
    USAGE = 2
    NOT_FOUND = 3
    REFUSED = 4
    UNREACHABLE = 5
    MIGRATION_FAILED = 6
    MIGRATION_CANCELLED = 7
    DRAIN_PARTIAL = 8
    DRAIN_CANCELLED = 9
    NOT_PERMITTED = 10
    REMOVED = 11
    """Of `ferry agent`; deploy/systemd/ferry-agent.service names it."""
    INTERRUPTED = 130


EXIT_CODES_HELP = """\b
Exit codes:
  0    done
  1    failed
  2    wrong usage, or an invalid request
  3    there is no such domain, node, migration, volume or pool
  4    refused, or in conflict with the object's state
  5    the agent can't be reached, or another node's that it has to ask
  6    the migration failed; its error says what that means for the domain
  7    the migration was cancelled; the domain runs on its source
  8    the drain, undrain or balancing is over, but left something; it names each domain and why
  9    the drain was cancelled
  10   no valid token, or the user's role is too low
  11   ferry agent: this node was removed from the cluster; it is no use to start it again
  130  interrupted; a migration or drain that was being watched goes on"""


_BY_STATUS: Final = {
    400: ExitCode.USAGE,
    401: ExitCode.NOT_PERMITTED,
    403: ExitCode.NOT_PERMITTED,
    404: ExitCode.NOT_FOUND,
    409: ExitCode.REFUSED,
    413: ExitCode.USAGE,
    415: ExitCode.USAGE,
}


def exit_code(http_status: int) -> ExitCode:
    """For an error that the API would answer with this status."""
    return _BY_STATUS.get(http_status, ExitCode.FAILED)


class CliError(Exception):
    """One sentence for stderr, and the exit code."""

    def __init__(self, message: str, code: ExitCode = ExitCode.FAILED) -> None:
        super().__init__(message)
        self.code = code


class Unreachable(CliError):
    """The agent can't be asked."""

    def __init__(self, message: str) -> None:
        super().__init__(message, ExitCode.UNREACHABLE)


class ApiProblem(CliError):
    """The agent answered with a problem document."""

    def __init__(self, problem: Problem) -> None:
        away = problem.code == PeerError.code
        super().__init__(
            problem.detail, ExitCode.UNREACHABLE if away else exit_code(problem.status)
        )
        self.problem = problem


def goes_on_unseen(refusal: ApiProblem, what: str) -> ApiProblem:
    """For who watches what is under way, and may look at it no longer: it doesn't end with that."""
    if refusal.code is not ExitCode.NOT_PERMITTED:
        return refusal
    detail = f"{refusal.problem.detail}; {what} goes on unseen"
    return ApiProblem(msgspec.structs.replace(refusal.problem, detail=detail))
