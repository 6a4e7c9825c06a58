"""The port to a hypervisor's own migration: what `migrator.native_driver` drives.

    source                                       destination
                                                 receive ──▶ (host, port)
    prepare    what can be set beforehand
    begin      ══════════ memory, again and again ══════════▶
               PASS_BEGAN at each look at what was dirtied
    switch_over ──▶ PAUSED, PRE_SWITCHOVER
    (HypervisorDriver.continue_switchover, abort_switchover: as with the page engine)
               ══════════ last pages, device state ═════════▶
               DEVICE_STATE_SENT                 DEVICE_STATE_LOADED: stays paused

Between `begin` and DEVICE_STATE_SENT the source's agent may die: the driver sees to it that the
migration is then given up and the guest runs on, as if its agent had cancelled.
"""

from __future__ import annotations

import abc

from migrator.model import DomainName, NodeName
from migrator.struct import Struct
from migrator.tls import TlsFiles


class NativeSettings(Struct, frozen=True, kw_only=True):
    """How a hypervisor is to move a domain. Both ends get the same, but for `bind_address`."""

    bind_address: str
    """Destination: the address to listen at."""
    destination: NodeName
    """Whose certificate the source wants to see."""
    channels: int = 1
    """Connections for the pages."""
    bandwidth_bytes_per_s: int | None = None
    tls: TlsFiles | None = None
    """This node's own; None: in the clear, and whoever connects first is believed."""


class NativeFigures(Struct, frozen=True, kw_only=True):
    """What the hypervisor says of its migration so far; sums since its begin."""

    bytes_sent: int = 0
    """On the wire."""
    remaining_bytes: int = 0
    """Of the guest's memory, known to be dirty."""
    pages: int = 0
    """Sent with their contents."""
    zero_pages: int = 0
    error: str = ""
    """Why it failed, in the hypervisor's words."""


class NativeMigration(abc.ABC):
    """One hypervisor's own migrations. Errors: HypervisorError, NotFoundError."""

    @abc.abstractmethod
    async def receive(self, domain: DomainName, settings: NativeSettings) -> tuple[str, int]:
        """Destination that was started incoming: listen; returns where. It never runs by itself."""

    @abc.abstractmethod
    async def prepare(self, domain: DomainName, settings: NativeSettings) -> None:
        """Source: set all that can be set beforehand. Idempotent."""

    @abc.abstractmethod
    async def begin(self, domain: DomainName, host: str, port: int) -> None:
        """Source, prepared: send the memory, pass after pass, until `switch_over`.

        It may go to PRE_SWITCHOVER by itself where next to nothing is left, and stays there.
        Cancelled, or failed, it may have begun: `abort_switchover` ends that.
        """

    @abc.abstractmethod
    async def switch_over(self, domain: DomainName) -> None:
        """Source: PAUSED and PRE_SWITCHOVER, as soon as may be and whatever is left."""

    @abc.abstractmethod
    async def limit_bandwidth(self, domain: DomainName, bandwidth_bytes_per_s: int | None) -> None:
        """Source: change the cap; None lifts it."""

    @abc.abstractmethod
    async def figures(self, domain: DomainName) -> NativeFigures:
        """Source: how far it is, or how far it got."""
