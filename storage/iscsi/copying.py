"""Filling a LUN by `qemu-img convert`, which has an iSCSI client of its own.

The secret goes by its file, as in QEMU. The copy is bounded in time, and qemu-img is dead when the
call returns or raises.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

from storage.bounded import run_program
from storage.iscsi.provisioner import Lun

COPY_TIMEOUT_S: Final = 3600.0


@dataclass(frozen=True, slots=True)
class LunEnd:
    """A LUN as qemu-img is to open it."""

    lun: Lun
    initiator: str
    chap_user: str | None
    chap_file: str | None

    def options(self) -> str:
        lun = self.lun
        words = [
            "driver=raw",
            "file.driver=iscsi",
            "file.transport=tcp",
            f"file.portal={_escape(lun.portal)}",
            f"file.target={_escape(lun.target)}",
            f"file.lun={lun.lun}",
            f"file.initiator-name={_escape(self.initiator)}",
        ]
        if self.chap_user is not None:
            words += [f"file.user={_escape(self.chap_user)}", "file.password-secret=chap"]
        return ",".join(words)


async def copy_to_lun(where: str, source: Path | LunEnd, target: LunEnd) -> None:
    """Copy a raw image or LUN onto a LUN of at least its size. StorageError: it is half written."""
    command = ["qemu-img", "convert", "-n", "-t", "none"]
    if target.chap_file is not None:
        command += ["--object", f"secret,id=chap,file={_escape(target.chap_file)}"]
    command += ["--image-opts", "--target-image-opts"]
    command += [_options(source), target.options()]
    await run_program(where, command, timeout_s=COPY_TIMEOUT_S)


def _options(source: Path | LunEnd) -> str:
    if isinstance(source, LunEnd):
        return source.options()
    return f"driver=raw,file.driver=file,file.filename={_escape(str(source))}"


def _escape(value: str) -> str:
    return value.replace(",", ",,")
