"""A pool's mark: random text in a file beside its volumes, by which two nodes tell places apart.

.ferry.mark      one line; whoever makes it first wins, by link(2), which is atomic on NFS too
"""

from __future__ import annotations

import contextlib
import logging
import os
import uuid
from pathlib import Path
from typing import Final

from migrator import durable
from migrator.errors import words

MARK: Final = ".ferry.mark"

_log = logging.getLogger(__name__)


def new_mark() -> str:
    """A text that nobody else has."""
    return uuid.uuid4().hex


def folder_mark(folder: Path, where: str) -> str | None:
    """The folder's, made where there is none. None: it can't be written now. For a thread."""
    mark = folder / MARK
    with contextlib.suppress(FileNotFoundError):
        return mark.read_text().strip() or None
    fresh = folder / f"{MARK}.{uuid.uuid4().hex}.tmp"
    try:
        fresh.write_text(f"{new_mark()}\n")
        durable.sync(fresh)
        with contextlib.suppress(FileExistsError):
            os.link(fresh, mark)
        return mark.read_text().strip() or None
    except OSError as error:
        _log.warning("%s: %s can't be made: %s", where, mark, words(error))
        return None
    finally:
        fresh.unlink(missing_ok=True)
