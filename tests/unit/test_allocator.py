"""What an engine frees it keeps: measured in a process of its own, by its page faults."""

from __future__ import annotations

import subprocess
import sys

_PROGRAM = """
import resource, sys, threading
import numpy as np
from migrator.engine import codecs
from migrator.engine.allocator import keep_freed_memory
if sys.argv[1] == "kept":
    assert keep_freed_memory()
SIZE = 512 * 1024
GUEST = np.arange(SIZE // 8, dtype=np.uint64)
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def frames(count):
    for _ in range(count):
        frame = np.empty(SIZE // 8, dtype=np.uint64)
        frame[:] = GUEST
        smaller = codecs.compress(codecs.LADDER[0], frame.data.cast("B"))
        again = codecs.decompress(codecs.LADDER[0].kind, memoryview(smaller), SIZE)
        del frame, smaller, again
def work():
    frames(5)
    before = faults()
    frames(50)
    print(faults() - before)
thread = threading.Thread(target=work)  # An arena that isn't the process's first.
thread.start()
thread.join()
"""


def _faults(how: str) -> int:
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, how],
        check=False,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_the_next_frame_costs_no_page_faults() -> None:
    kept, given_back = _faults("kept"), _faults("given back")
    assert kept < 500
    assert kept < given_back / 5 or given_back < 500  # Huge pages leave nothing to gain.
