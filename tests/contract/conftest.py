"""What several drivers' tests begin with."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """An empty one, for a directory pool."""
    path = tmp_path / "pool"
    path.mkdir()
    return path
