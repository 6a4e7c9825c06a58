"""The network's port: what a migration needs of the fabrics of its two nodes (see `ports`)."""

from __future__ import annotations

import abc
from collections.abc import Collection, Sequence
from typing import ClassVar

from migrator.model import DomainName, NicSpec
from migrator.struct import Struct


class Tunnel(Struct, frozen=True, kw_only=True):
    """How a migration's two nodes reach each other, for frames that arrive at the old one."""

    name: str
    """The same at both ends: the migration's."""
    local: str
    remote: str
    """Addresses of the two nodes, as this end sees them."""
    port: int
    """UDP, at both ends."""


class ProbeReport(Struct, frozen=True, kw_only=True):
    """What one node found out when it asked the network for a NIC."""

    able: bool
    """False: this node has no way into the NIC's network; `detail` says why."""
    answered: tuple[str, ...] = ()
    """Addresses that answered a question sent to the NIC's own MAC."""
    heard: tuple[str, ...] = ()
    """Kinds of frames (arp, rarp, ipv4, ipv6, other) of the NIC that arrived meanwhile."""
    learnt_at: str = ""
    """The port at which this node's bridge has the MAC; "" if it has none."""
    routed: bool = False
    """It asked the routers, by ICMP, and not the switches."""
    detail: str = ""


class WidthReport(Struct, frozen=True, kw_only=True):
    """Which test frames of another node came by the guests' network."""

    short: bool = False
    full: bool = False
    hops: tuple[str, ...] = ()
    """No frame of another node comes to this one: routers lie between. Here it can be asked."""
    cut_off: str = ""
    """Why the NIC's network leads to no other node from here, where that is certain."""


class TunnelReport(Struct, frozen=True, kw_only=True):
    """Which test frames have come out of the tunnel of one NIC."""

    made: bool = True
    """False: this node has no end of it."""
    short: bool = False
    full: bool = False
    """As long as the NIC's MTU."""


class FirstFrames(Struct, frozen=True, kw_only=True):
    """Wall-clock time (s) of the first frame in each direction; None: none seen in time."""

    to_guest_at_s: float | None = None
    from_guest_at_s: float | None = None


class FabricDriver(abc.ABC):
    """One node's guest network. Errors: FabricError.

    A domain that moves, seen by the fabrics of both its nodes:

        source                                     destination
        prepare_departure   tunnel's end           plug, prepare_arrival   port closed, tunnel's end
        send_through   test frames ──────────────► heard_through
                                                   open_arrival     frames for the guest wait for it
        divert   frames for the guest take the tunnel
        shut     (paused) the port is shut
                                                   announce_now     (resumed) the first frames
                                                   announce         and on, until it is verified
        end_departure                              end_arrival      after the grace time
        reopen   instead, where it stays
    """

    name: ClassVar[str]

    @abc.abstractmethod
    async def open(self) -> None:
        """At the agent's start: remove what an earlier one left of unfinished moves."""

    @abc.abstractmethod
    async def check(self, nic: NicSpec) -> Sequence[str]:
        """Why this NIC can't be plugged here (missing bridge, MTU); empty if it can."""

    @abc.abstractmethod
    async def plug(self, domain: DomainName, index: int, nic: NicSpec) -> int:
        """Make a tap on the NIC's bridge and return its descriptor (the caller closes it).

        The tap lives as long as a descriptor to it is open: a dead hypervisor leaves none behind.
        """

    @abc.abstractmethod
    async def unplug(self, domain: DomainName, index: int) -> None:
        """Remove the tap, and its end of a tunnel that waits for a guest. Idempotent."""

    @abc.abstractmethod
    async def watch(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        """Learn the addresses of a domain that was plugged before this agent started."""

    @abc.abstractmethod
    def learnt(self, domain: DomainName, nics: Sequence[NicSpec]) -> Sequence[tuple[str, ...]]:
        """The addresses that each NIC was seen to use since it was plugged, the newest last."""

    @abc.abstractmethod
    def addresses_here(self) -> frozenset[str]:
        """The addresses, defined or learnt, of every NIC that is plugged here."""

    @abc.abstractmethod
    async def announce(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        """Tell the network where the NICs are now; the first frames are out when this returns.

        Repeats with growing gaps go on in the background, owned and ended by the driver. Without
        NICs: ends the repeats.
        """

    @abc.abstractmethod
    async def close(self) -> None:
        """End the background announcements. Taps stay: their hypervisors hold them."""

    # A move. Idempotent, all of it, and of a domain that isn't known: nothing happens.

    @abc.abstractmethod
    async def prepare_departure(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        """Source, long before the pause: make what `divert` needs. Changes no frame's way."""

    @abc.abstractmethod
    async def send_through(self, domain: DomainName, nics: Sequence[NicSpec]) -> Sequence[bool]:
        """Source, after `prepare_departure`: a short and a full test frame into each tunnel.

        NIC by NIC, whether there is an end to send them into. They reach no guest.
        """

    @abc.abstractmethod
    async def divert(self, domain: DomainName, without: Collection[int] = ()) -> None:
        """Source, just before the pause: what is for the guest goes to the destination.

        But not what is for the NICs `without`, by index, whose tunnels pass nothing: they get it
        as before, until the pause.
        """

    @abc.abstractmethod
    async def shut(self, domain: DomainName) -> None:
        """Source, paused: nothing comes from the guest's ports any more, so nobody learns them."""

    @abc.abstractmethod
    async def reopen(self, domain: DomainName, nics: Sequence[NicSpec]) -> None:
        """Source: the guest stays. Everything as before `prepare_departure`, also after a restart.

        What was diverted meanwhile is lost.
        """

    @abc.abstractmethod
    async def end_departure(self, domain: DomainName) -> int:
        """Source, after the grace time: forward no more. Frames forwarded in all."""

    @abc.abstractmethod
    async def prepare_arrival(
        self, domain: DomainName, nics: Sequence[NicSpec], tunnel: Tunnel
    ) -> None:
        """Destination, after `plug`: the ports take nothing, the announcement is ready to go."""

    @abc.abstractmethod
    async def heard_through(
        self, domain: DomainName, nics: Sequence[NicSpec]
    ) -> Sequence[TunnelReport]:
        """Destination, after `prepare_arrival`: what `send_through` sent that came so far, by NIC.

        Doesn't wait.
        """

    @abc.abstractmethod
    async def open_arrival(self, domain: DomainName, learnt: Sequence[Sequence[str]] = ()) -> None:
        """Destination, just before the source's pause: frames for the guest wait in its ports.

        `learnt`: each NIC's addresses as the source saw them, announced beside the NIC's own.
        """

    @abc.abstractmethod
    def announce_now(self, domain: DomainName) -> float | None:
        """Destination, in the moment of the resume: one round of announcements, without waiting.

        The wall-clock time (s) at which the first frame was sent; None if none could be.
        """

    @abc.abstractmethod
    async def end_arrival(self, domain: DomainName) -> int:
        """Destination, after the grace time: close the tunnel. Frames that came out of it."""

    @abc.abstractmethod
    async def first_frames(
        self, domain: DomainName, since_s: float, timeout_s: float
    ) -> FirstFrames:
        """The first frame each way since then (wall clock, s), waited for until time is up.

        Its ports are watched from `open_arrival` on.
        """

    @abc.abstractmethod
    async def probe(self, nic: NicSpec, timeout_s: float) -> ProbeReport:
        """Ask the network beyond this node for the NIC, at its own MAC and each of its addresses.

        Proves that frames sent by this node find the NIC. Sends no frame that moves it.
        """

    @abc.abstractmethod
    async def send_wide(self, nic: NicSpec, token: bytes) -> None:
        """Send a short frame and one as long as the NIC's MTU to the other nodes of its network.

        FabricError: this node's own uplink takes none so long.
        """

    @abc.abstractmethod
    async def hear_wide(self, nic: NicSpec, token: bytes, timeout_s: float) -> WidthReport:
        """Which of the two that another node sends with `token` come here, within `timeout_s`."""

    async def measure_width(
        self, nic: NicSpec, hops: Sequence[str], timeout_s: float
    ) -> WidthReport:
        """Which packets of the NIC's length, and short ones, the routers carry to a node at `hops`.

        Nothing where this node's fabric asks no routers.
        """
        return WidthReport()
