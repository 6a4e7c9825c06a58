"""The folder of tgtd's volumes, as an agent leaves it that is killed in the middle of something."""

from __future__ import annotations

from pathlib import Path
from typing import cast

import pytest

from migrator.errors import NotFoundError, StorageError
from migrator.model import VolumeName
from storage.iscsi.tgt import TgtFolder
from storage.iscsi.tgt_control import TgtControl

WEB, DB = VolumeName("web"), VolumeName("db")
MIB = 2**20


class Killed(BaseException):
    """Stands for SIGKILL: nothing is undone after it."""


class Tgtd:
    """What it has been told."""

    def __init__(self) -> None:
        self.known: dict[str, int] = {}
        self.disks: set[str] = set()
        self.refuses = ""

    def targets(self) -> dict[str, int]:
        return dict(self.known)

    def create_target(self, number: int, iqn: str) -> None:
        self.known[iqn] = number

    def delete_target(self, number: int, _what: str) -> None:
        self.known = {iqn: each for iqn, each in self.known.items() if each != number}

    def create_unit(self, _number: int, _lun: int, path: Path) -> None:
        if path.name == self.refuses:
            raise StorageError(f"{path.name}: error 1 of tgtadm.h")
        self.disks.add(path.name)

    def admit(self, _number: int, _initiator: str) -> None: ...


@pytest.fixture
def tgtd() -> Tgtd:
    return Tgtd()


@pytest.fixture
def folder(tmp_path: Path, tgtd: Tgtd) -> TgtFolder:
    control = cast(TgtControl, tgtd)
    return TgtFolder(tmp_path, control, portal="127.0.0.1:3260", pool="p")


def test_what_is_half_made_can_be_deleted_and_made_again(
    folder: TgtFolder, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file was there, and nothing that said so: it could be neither made nor deleted."""
    for step in ("_write", "_image", "_ensure"):
        with monkeypatch.context() as patch:
            calls: list[str] = []

            def killed(*_: object, step: str = step, calls: list[str] = calls) -> Path:
                calls.append(step)
                if step == "_image" and len(calls) == 1:
                    return folder.folder / "none"  # The look whether it is there.
                raise Killed

            patch.setattr(folder, step, killed)
            patch.setattr(Path, "unlink", lambda *_, **__: None)
            with pytest.raises(Killed):
                folder.create(WEB, MIB)
        try:
            folder.delete(WEB)
        except NotFoundError:
            assert step == "_write"
        assert folder.create(WEB, MIB).capacity_bytes == MIB
        folder.delete(WEB)
        assert not [path for path in folder.folder.iterdir() if path.name != ".lock"]


def test_one_without_its_file_keeps_no_other_from_being_listed_and_restored(
    folder: TgtFolder, tgtd: Tgtd
) -> None:
    """As a delete leaves it that is cut short; after a restart of tgtd no target was made again."""
    folder.create(DB, MIB)
    folder.create(WEB, MIB)
    (folder.folder / f"{DB}.raw").unlink()
    tgtd.known, tgtd.disks = {}, set()
    assert list(folder.list_luns()) == [WEB]
    assert folder.restore() == 1
    assert tgtd.disks == {"web.raw"}
    folder.delete(DB)


def test_one_that_tgtd_refuses_keeps_no_other_from_being_restored(
    folder: TgtFolder, tgtd: Tgtd
) -> None:
    folder.create(DB, MIB)
    folder.create(WEB, MIB)
    tgtd.known, tgtd.disks, tgtd.refuses = {}, set(), "db.raw"
    with pytest.raises(StorageError, match=r"db.raw: error 1"):
        folder.restore()
    assert tgtd.disks == {"web.raw"}
