"""An export of which a thread hangs in its disk when it is ended isn't gone: that may write yet."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from migrator.errors import FenceError
from migrator.model import VolumeName
from storage.nbd import exports
from storage.nbd.exports import Export, Serving
from storage.nbd.provisioner import Provisioner
from storage.nbd.volumes import VolumeFolder

ENDS_ITS_FIRST_THREAD = """
import ctypes, threading, time
open("/proc/self/comm", "w").write("qemu-nbd")
threading.Thread(target=time.sleep, args=(60,)).start()
ctypes.CDLL(None).pthread_exit(None)
"""


@pytest.fixture
def ending(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """As one that was killed: its first thread has ended, another hasn't."""
    pid_file = tmp_path / "pid"
    mark = f"--pid-file={pid_file}"
    process = subprocess.Popen([sys.executable, "-c", ENDS_ITS_FIRST_THREAD, mark])
    try:
        pid_file.write_text(str(process.pid))
        stat = Path(f"/proc/{process.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.005)
        yield process
    finally:
        process.kill()
        process.wait(30)


def export_of(pid_file: Path, program: str = "qemu-nbd") -> Export:
    return Export(
        Serving(address="127.0.0.1", program=program),
        name="web.a.1",
        port=1,
        disk=pid_file,
        read_only=False,
        pid_file=pid_file,
        on_death=lambda _: None,
    )


async def test_its_end_is_not_told_before_its_last_thread_has_ended(
    tmp_path: Path, ending: subprocess.Popen[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a provisioner that was restarted, too: it knows it by its pid file alone."""
    hanging = export_of(tmp_path / "pid")
    monkeypatch.setattr(exports, "END_TIMEOUT_S", 0.05)
    with monkeypatch.context() as patch:
        patch.setattr(signal, "pidfd_send_signal", lambda *_: None)  # It comes to nothing now.
        with pytest.raises(FenceError, match="still there"):
            await hanging.end()
    assert (tmp_path / "pid").exists()
    monkeypatch.setattr(exports, "END_TIMEOUT_S", 30.0)
    await hanging.end()
    assert not (tmp_path / "pid").exists()


async def test_who_has_its_number_by_now_is_left_alone(
    tmp_path: Path, ending: subprocess.Popen[bytes]
) -> None:
    other = export_of(tmp_path / "pid", program="another")
    await other.end()
    assert ending.poll() is None


async def test_a_draft_that_can_not_be_ended_keeps_no_other_from_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """When their provisioner closes; those behind it kept their ports until the next one began."""
    ended: list[str] = []
    stuck: set[str] = set()

    async def end(export: Export) -> None:
        if export.name in stuck:
            raise FenceError(f"export {export.name} is still there 5 s after SIGKILL")
        ended.append(export.name)

    monkeypatch.setattr(Export, "end", end)
    folder = VolumeFolder(tmp_path)
    provisioner = Provisioner(folder, Serving(address="127.0.0.1"), None)
    make = partial(folder.make_draft, VolumeName("web"), 4096)
    drafts = [await asyncio.to_thread(make) for _ in range(4)]
    for draft in drafts:
        provisioner._drafts[draft] = provisioner._draft_export(draft, 1)
    stuck.update(drafts[::2])
    await provisioner.close()
    assert ended == drafts[1::2]
    left = await asyncio.to_thread(os.listdir, tmp_path)
    assert sorted(left) == sorted(stuck)
    for draft in stuck:
        assert f"export {draft} is still there" in caplog.text
