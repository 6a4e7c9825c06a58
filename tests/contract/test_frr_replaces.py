"""A router replaces a host route of EVPN's, though its bgpd doesn't run for a moment meanwhile.

    far's bgpd ══ near's bgpd ── 20 ms between any two messages ── near's zebra ── kernel

bgpd changes such a route in two messages, and zebra acts 10 ms after the first, unless it is told
to wait longer (`deploy.lab.frr.ROUTER_HOLD_MS`; here for so long that a busy machine's test holds).
Where it wasn't, both routes of this test went, in each of 3 runs.
"""

from __future__ import annotations

import contextlib
import socket
import struct
import threading
import time
from pathlib import Path
from typing import Final

import pytest
from pyroute2.netlink.rtnl.rtmsg import rtmsg

from deploy.lab.frr import SYSTEM
from netfabric.routes.frr.driver import METRIC_TOP, prefix_of
from tests.contract.fabric_worlds import eventually
from tests.contract.frr_world import start_daemons
from tests.contract.routed_world import NEAR
from tests.contract.test_frr_routes import GUEST, NETWORK, Node, can_tell, configured, two_nodes

pytestmark = pytest.mark.lab

GAP_S: Final = 0.02
HOLD_MS: Final = 1000
"""Four messages, of two addresses, come in it."""
ROUTE_GROUPS: Final = 0x40 | 0x400
RTM_DELROUTE: Final = 25
_WAY: Final = "slow.api"
_HEAD: Final = struct.Struct("!H")


class SlowWay:
    """A socket that leads to zebra's, message by message."""

    def __init__(self, folder: Path) -> None:
        self._zebra = str(folder / "zserv.api")
        path = folder / _WAY
        path.unlink(missing_ok=True)
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(path))
        path.chmod(0o777)
        self._listener.listen()
        self._passing = [threading.Thread(target=self._accept)]
        self._passing[0].start()

    def close(self) -> None:
        """Once bgpd has ended."""
        self._listener.shutdown(socket.SHUT_RDWR)
        for each in self._passing:
            each.join()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                bgpd, _ = self._listener.accept()
                zebra = socket.socket(socket.AF_UNIX)
                zebra.connect(self._zebra)
                for work, ends in ((_slowly, (bgpd, zebra)), (_at_once, (zebra, bgpd))):
                    self._passing.append(threading.Thread(target=work, args=ends))
                    self._passing[-1].start()


def _slowly(bgpd: socket.socket, zebra: socket.socket) -> None:
    with contextlib.suppress(OSError), bgpd, zebra, bgpd.makefile("rb") as words:
        while head := words.read(_HEAD.size):
            zebra.sendall(head + words.read(_HEAD.unpack(head)[0] - _HEAD.size))
            time.sleep(GAP_S)
        zebra.shutdown(socket.SHUT_RDWR)


def _at_once(zebra: socket.socket, bgpd: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while content := zebra.recv(65536):
            bgpd.sendall(content)


class SlowNode(Node):
    async def start_daemons(self, neighbour: str) -> None:
        self.folder.mkdir(exist_ok=True)
        self.way = SlowWay(self.folder)
        text = f"zebra work-queue {HOLD_MS}\n"
        text += configured(self.address, neighbour, NETWORK)
        self._daemons = await self.do(lambda: start_daemons(self.folder, text, _WAY))

    async def stop_daemons(self) -> None:
        await super().stop_daemons()
        self.way.close()


def test_a_route_is_replaced_by_a_bgpd_that_stands_still_meanwhile() -> None:
    async def body(near: Node, far: Node) -> None:
        await far.start(NEAR)
        await far.routes.open()
        await eventually(lambda: can_tell(far.routes))
        lines = [f"router bgp {SYSTEM}", "address-family l2vpn evpn", "advertise ipv6 unicast"]
        await far.vtysh.run(["configure terminal", *lines])
        await far.routes.prepare(GUEST)
        await far.open_port()
        await eventually(lambda: near.leads_to(far))
        with await near.do(_listening) as changes:
            await far.routes.prepare(GUEST)  # What is said of it changes.
            await eventually(lambda: _has(near, far))
            assert _withdrawn(changes) == []
        await far.close_port()

    two_nodes(NETWORK, body, SlowNode)


async def _has(near: Node, far: Node) -> bool:
    """What far says last is what leads near's kernel."""
    for prefix, version in map(prefix_of, GUEST):
        best = (await far.vtysh.prefix(version, prefix)).best
        kind = "ip" if version == 4 else "ipv6"
        text = await near.vtysh.run([f"show {kind} route {prefix} json"])
        if best is None or '"installed":true' not in text:
            return False
        if f'"metric":{METRIC_TOP - best.locPrf},' not in text:
            return False
    return True


def _listening() -> socket.socket:
    opened = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW, socket.NETLINK_ROUTE)
    opened.bind((0, ROUTE_GROUPS))
    opened.setblocking(False)
    return opened


def _withdrawn(changes: socket.socket) -> list[str]:
    """The guest's addresses among the routes that went."""
    found: list[str] = []
    with contextlib.suppress(BlockingIOError):
        while content := changes.recv(65536):
            while content:
                length, kind = struct.unpack_from("=IH", content)
                message = rtmsg(content[:length])
                message.decode()
                if kind == RTM_DELROUTE and message.get_attr("RTA_DST") in GUEST:
                    found.append(message.get_attr("RTA_DST"))
                content = content[(length + 3) & ~3 :]
    return found
