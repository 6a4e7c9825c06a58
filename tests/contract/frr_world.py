"""Real FRR daemons in the calling thread's network namespace, a folder for each pair."""

from __future__ import annotations

import contextlib
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from deploy.lab.frr import PROGRAMS, SYSTEM, USER, ZEBRA_OPTIONS
from tests.contract.fabric_worlds import SOON_S


@contextlib.contextmanager
def a_folder() -> Iterator[Path]:
    """That the daemons' user may enter."""
    made = Path(tempfile.mkdtemp(prefix="ferry-evpn", dir="/run"))
    made.chmod(0o755)
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def configuration(
    address: str,
    neighbour: str,
    families: Mapping[str, Sequence[str]],
    *,
    identifier: int | None = None,
) -> str:
    """Of a node with one neighbour; what each address family says beside that it is active."""
    lines = [
        "frr defaults datacenter",
        f"hostname node{address[-1]}",
        *([f"vni {identifier}"] if identifier else []),
        f"router bgp {SYSTEM}",
        f" bgp router-id {address}",
        " no bgp default ipv4-unicast",
        f" neighbor {neighbour} remote-as {SYSTEM}",
        f" neighbor {neighbour} timers connect 1",
        f" neighbor {neighbour} advertisement-interval 0",
    ]
    for family, said in families.items():
        lines += [f" address-family {family}", f"  neighbor {neighbour} activate"]
        lines += [*(f"  {each}" for each in said), " exit-address-family"]
    return "\n".join([*lines, ""])


def start_daemons(
    folder: Path, configuration: str, way_to_zebra: str = "zserv.api"
) -> list[subprocess.Popen[bytes]]:
    """zebra and bgpd; their sockets are in `folder`, which they make.

    `way_to_zebra`: the socket there that bgpd takes for zebra's.
    """
    folder.mkdir(exist_ok=True)
    for old in folder.glob("*.vty"):
        old.unlink()
    path = folder / "frr.conf"
    path.write_text(configuration)
    for each in (folder, path):  # The daemons give up being root.
        shutil.chown(each, USER, USER)
    started = []
    for daemon, zebra in (("zebra", "zserv.api"), ("bgpd", way_to_zebra)):
        command = [
            *(str(PROGRAMS / daemon), "-f", str(path), "-i", str(folder / f"{daemon}.pid")),
            *("-z", str(folder / zebra), "--vty_socket", str(folder), "-P", "0"),
            *("--log", f"file:{folder / daemon}.log"),
            *(ZEBRA_OPTIONS if daemon == "zebra" else ()),
        ]
        with (folder / f"{daemon}.out").open("wb") as out:
            started.append(subprocess.Popen(command, stdout=out, stderr=out))
        # A bgpd that finds no zebra looks again after 10 s.
        deadline = time.monotonic() + SOON_S
        while not (folder / f"{daemon}.vty").is_socket():
            assert time.monotonic() < deadline, f"{daemon} doesn't serve"
            time.sleep(0.01)
    return started


def end(daemons: Sequence[subprocess.Popen[bytes]]) -> None:
    for daemon in daemons:
        daemon.send_signal(signal.SIGTERM)
    for daemon in daemons:
        try:
            daemon.wait(10.0)
        except subprocess.TimeoutExpired:
            daemon.kill()
            daemon.wait(10.0)
