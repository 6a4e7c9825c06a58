"""Files that are replaced whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from migrator import durable
from storage.nbd import dh_parameters


def test_a_file_is_replaced_and_nothing_else_is_left(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    durable.replace(path, b"old")
    durable.replace(path, b"new")
    assert path.read_bytes() == b"new"
    assert list(tmp_path.iterdir()) == [path]
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_the_draft_of_a_writer_that_died_is_no_hindrance_nor_does_it_lend_its_mode(
    tmp_path: Path,
) -> None:
    path = tmp_path / "key.pem"
    draft = tmp_path / ".key.pem.new"
    draft.write_bytes(b"half of it")
    draft.chmod(0o644)
    durable.replace(path, b"whole")
    assert path.read_bytes() == b"whole"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not draft.exists()


def test_what_cannot_be_written_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    durable.replace(path, b"old")

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        durable.replace(path, b"new")
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_content_is_on_the_disk_before_its_name_and_the_name_before_the_return(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    durable.replace(path, b"old")
    seen: list[tuple[bool, bytes]] = []

    def watched(descriptor: int) -> None:
        folder = stat.S_ISDIR(os.fstat(descriptor).st_mode)
        seen.append((folder, path.read_bytes()))

    monkeypatch.setattr(os, "fsync", watched)
    durable.replace(path, b"new")
    assert seen == [(False, b"old"), (True, b"new")]


def test_databases_are_nobody_else_s_to_read(tmp_path: Path) -> None:
    path = tmp_path / "ferry.sqlite"
    durable.make_private(path)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    for name, before, after in (("", 0o644, 0o640), ("-wal", 0o666, 0o660), ("-shm", 0o600, 0o600)):
        each = tmp_path / f"ferry.sqlite{name}"
        each.write_bytes(b"x")
        each.chmod(before)
        durable.make_private(path)
        durable.close_to_others(path)
        assert stat.S_IMODE(each.stat().st_mode) == after
        assert each.read_bytes() == b"x"
    durable.close_to_others(tmp_path / "none")


def test_a_group_that_a_power_loss_emptied_is_put_there_anew(tmp_path: Path) -> None:
    path = tmp_path / "dh-params.pem"
    path.touch()
    dh_parameters.ensure(tmp_path)
    assert path.read_text() == dh_parameters.FFDHE2048
    path.write_text("a site's own")
    dh_parameters.ensure(tmp_path)
    assert path.read_text() == "a site's own"


def _full(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, content: bytes, *, mode: int = 0o600) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(durable, "replace", refuse)


def test_where_there_is_no_room_the_old_files_blocks_take_the_new_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "state.json"
    durable.replace(path, b'{"token": 1234567}')
    _full(monkeypatch)
    durable.replace_even_if_full(path, b'{"token": 8}')
    assert path.read_bytes() == b'{"token": 8}      '
    with pytest.raises(OSError, match="No space left"):
        durable.replace_even_if_full(path, b"x" * 1_000_000)
    assert path.read_bytes() == b'{"token": 8}      '
    with pytest.raises(OSError, match="No space left"):
        durable.replace_even_if_full(tmp_path / "none", b"x")
    assert not (tmp_path / "none").exists()
