"""What a check finds. Pure."""

from __future__ import annotations

import enum

from migrator.model import Value


class Level(enum.StrEnum):
    OK = "ok"
    WARNING = "warning"
    """Ferry works, but something that is asked for later won't, or not well."""
    FAILURE = "failure"
    """Ferry, or migrations to and from this node, don't work."""


class Finding(Value, frozen=True, kw_only=True):
    """One thing that was looked at. `mend` says what to do about it; empty if nothing."""

    check: str
    level: Level
    detail: str
    mend: str = ""


class Diagnosis(Value, frozen=True, kw_only=True):
    """All of a node's findings."""

    node: str
    findings: tuple[Finding, ...]

    @property
    def healthy(self) -> bool:
        """No failure; warnings are allowed."""
        return all(each.level is not Level.FAILURE for each in self.findings)


def fine(check: str, detail: str) -> Finding:
    return Finding(check=check, level=Level.OK, detail=detail)


def warning(check: str, detail: str, mend: str) -> Finding:
    return Finding(check=check, level=Level.WARNING, detail=detail, mend=mend)


def failure(check: str, detail: str, mend: str) -> Finding:
    return Finding(check=check, level=Level.FAILURE, detail=detail, mend=mend)
