"""Whether systemd, where it runs the agent, shuts the guests down before this host."""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator
from typing import Final

from node_agent.doctor.findings import Finding, fine, warning

AGENT: Final = "ferry-agent.service"
GUESTS: Final = "ferry-guests.service"
_CHECK: Final = "host's shutdown"
_ANSWER_S: Final = 5.0


def check_units(
    guest_shutdown_s: float, is_active: Callable[[str], bool] | None = None
) -> Iterator[Finding]:
    """Nothing where the agent isn't systemd's, or guests are to be left alone."""
    is_active = is_active or _is_active
    if guest_shutdown_s == 0 or not is_active(AGENT):
        return
    if is_active(GUESTS):
        yield fine(_CHECK, f"guests have {guest_shutdown_s:g} s to shut down before it")
    else:
        yield warning(
            _CHECK,
            f"guests end as by a power cut: {GUESTS} isn't active",
            f"copy deploy/systemd/{GUESTS} and {AGENT} to /etc/systemd/system, then "
            "`systemctl daemon-reload && systemctl restart ferry-agent`, which leaves guests alone",
        )


def _is_active(unit: str) -> bool:
    try:
        asked = subprocess.run(
            ["systemctl", "--quiet", "is-active", unit],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_ANSWER_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return False
    return asked.returncode == 0
