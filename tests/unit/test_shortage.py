"""What is said of who was killed, and what is done where the kernel refuses."""

from __future__ import annotations

import signal
import subprocess

from migrator import shortage


def test_the_kernels_log_is_named_where_the_kernel_may_have_done_it() -> None:
    assert shortage.WHO_KNOWS in shortage.killed_by(signal.SIGKILL)
    assert shortage.killed_by(signal.SIGSEGV) == "was killed by signal 11"


def test_one_that_is_gone_is_nobodys_error() -> None:
    gone = subprocess.Popen(["true"])
    gone.wait()
    shortage.set_adjustment(gone.pid, shortage.FIRST)
