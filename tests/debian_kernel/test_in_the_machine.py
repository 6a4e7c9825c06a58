"""The network drivers on a kernel of Debian's, whatever the kernel at hand can do (see machine.py).

What runs there: `inside`, whose files pytest finds only when it is told of them, and those of the
kernel's contracts that a kernel with VLANs may see otherwise. It is emulated, so it begins with
little: no plugins and no conftest, which take it half a minute to import.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Final

import pytest

from tests.debian_kernel import machine

pytestmark = pytest.mark.lab

_ROOT: Final = Path(__file__).parents[2]
_INSIDE: Final = Path(__file__).parent / "inside"
_CONTRACTS: Final = ("link_table", "filters", "connections_contract", "moves_contract")
_LIMIT_S: Final = 600.0
"""Some 100 s where a core is free."""


@pytest.mark.timeout(_LIMIT_S + 180)  # And a download of 70 MB.
def test_networks_with_vlans_and_connection_tracking_on_bridges() -> None:
    files = [
        *sorted(str(path) for path in _INSIDE.glob("*.py") if path.name != "__init__.py"),
        *(str(_ROOT / f"tests/contract/test_{name}.py") for name in _CONTRACTS),
    ]
    command = [
        *(sys.executable, "-m", "pytest", "-q", "--color=no", "--durations=5"),
        *("-c", str(_INSIDE / "pytest.ini"), "--rootdir", str(_ROOT), "--noconftest"),
        *("-p", "no:cacheprovider", "-p", "pytest_timeout", *files),
    ]
    ended = machine.run(
        machine.prepare(),
        command,
        _ROOT,
        _LIMIT_S,
        environment={"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
    )
    print(f"{ended.output}\nstatus {ended.status} after {ended.took_s:.0f} s")
    if ended.status is None:
        pytest.fail(f"the machine ended before its tests:\n{ended.console}")
    summary = ended.output.strip().splitlines()[-1:]
    assert ended.status == 0, summary
    assert "passed" in summary[0], summary
    assert "skipped" not in summary[0], summary
