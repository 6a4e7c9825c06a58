"""Who gets the cores first where they are all taken: engines that wait last, a blackout first.

A blackout is some twelve wake-ups, of two hypervisors, two engines and two agents, each of a
moment's work. On a host whose cores are taken each waits its turn, and a guest stands still for it.
So what a blackout waits for goes before what else runs, for as long as it lasts, and an engine
that is started ahead (`engine.spares`) comes after everything else.

    agents             `favour_ourselves`, once
    hypervisors        from the switchover's begin, or at the destination from their start, until
                       the guest has run for a moment (its driver)
    engines            from the first byte of device state (`engine.relay`) to their end

A niceness alone says nothing about such processes on most machines: Linux makes a group of each
session (`kernel.sched_autogroup_enabled`, sched(7)), shares the cores between the groups, and
compares niceness within a group only. Two sessions that spin on one core, one of them with
niceness 19, get half of it each; with the group's niceness set as well that one gets 3 %
(measured). So both are set: the group's counts where there are groups, the process's where a
control group took their place.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

WAITING: Final = 5
"""A third of what others get. With 19 an engine doesn't get through its imports on a host whose
cores are taken: not for the next migration, nor to see that its agent has died."""
URGENT: Final = -10
_PROC: Final = Path("/proc")


def usual() -> int:
    """What this process was started with, and so what it starts."""
    return os.getpriority(os.PRIO_PROCESS, 0)


def set_niceness(pid: int, niceness: int) -> bool:
    """Of `pid`, the leader of a session, with all its threads; False: the kernel refuses.

    Call it in a thread: a group's niceness takes locks of the whole host.
    """
    try:
        os.setpriority(os.PRIO_PGRP, pid, niceness)
        return _set_group(str(pid), niceness)
    except OSError:
        return False


def favour_ourselves() -> bool:
    """This process's session goes first, and not what is started by it: that has its own."""
    try:
        return os.getsid(0) == os.getpid() and _set_group("self", URGENT)
    except OSError:
        return False


def group_niceness(pid: int) -> int | None:
    """Of the session's group: "/autogroup-7 nice 19"; None where there are none, or it is gone."""
    try:
        return int((_PROC / str(pid) / "autogroup").read_text().rpartition(" ")[2])
    except (OSError, ValueError):
        return None


def _set_group(process: str, niceness: int) -> bool:
    group = _PROC / process / "autogroup"
    if group.exists():  # No such kernel option: no such file.
        group.write_text(str(niceness))
    return True
