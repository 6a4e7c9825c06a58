"""A node's certificate renews itself: at two thirds of its life, and at once where it doesn't name
an address that the node has now; then again every few minutes until it has worked. The key stays,
the file is replaced in one step, open connections stay as they are.

Clocks may be wrong, and may be set meanwhile. So a fresh certificate that doesn't hold yet, or no
more, by the clock here is not used: the old one is better. One that was made while the clock was
ahead holds later: it is renewed as well. While the clock is before the authority's own beginning
nothing is: it will be set.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from migrator.errors import FerryError
from migrator.own_threads import STATE_DIRECTORY, in_own_thread
from node_agent.background import Background
from node_agent.trust import certificates
from node_agent.trust.certificates import NodeCertificate, Span
from node_agent.trust.contexts import TlsContexts
from node_agent.trust.files import TrustFolder

log = logging.getLogger(__name__)

RENEW_AT: Final = 2 / 3
RETRY_S: Final = 300.0
"""After a failure; within the last third of a certificate's life there are thousands of tries."""
LONGEST_SLEEP_S: Final = 60.0
"""The clock may be set: look at it now and then."""
REMIND_S: Final = 86_400.0
"""How often it is told that a certificate can't be renewed."""
ALWAYS: Final = Span(not_before_s=0.0, not_after_s=float("inf"))


def due_at_s(certificate: NodeCertificate, backdated_s: float = certificates.BACKDATED_S) -> float:
    """When a certificate is to be renewed."""
    life_s = certificate.not_after_s - certificate.not_before_s
    start_s = certificate.not_before_s + min(backdated_s, life_s / 2)
    return start_s + (certificate.not_after_s - start_s) * RENEW_AT


class Renewer:
    """`request(node, CSR)` gives the new certificate, from whichever node signs."""

    def __init__(
        self,
        node: str,
        certificate: NodeCertificate,
        *,
        folder: TrustFolder,
        contexts: TlsContexts,
        request: Callable[[bytes], Awaitable[bytes]],
        addresses: Sequence[str] = (),
        authority: Span = ALWAYS,
        renewed: Callable[[NodeCertificate], None] = lambda certificate: None,
        failing: Callable[[NodeCertificate, str], None] = lambda certificate, why: None,
        clock: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
        retry_s: float = RETRY_S,
    ) -> None:
        """`addresses`: the node's IP addresses, which its certificate is to name. `authority`: when
        its certificate holds. `failing` hears once a day that it can't be renewed, and why."""
        self.certificate = certificate
        self._readdress = not set(addresses) <= set(certificate.addresses)
        self._node = node
        self._folder = folder
        self._contexts = contexts
        self._request = request
        self._authority = authority
        self._renewed = renewed
        self._failing = failing
        self._clock = clock
        self._monotonic = monotonic
        self._retry_s = retry_s
        self._told_at: tuple[float, bool] | None = None
        """When `failing` last heard, and whether the certificate had ended then."""
        self._task = Background("certificate renewal")

    def open(self) -> None:
        """Begin to watch the clock."""
        self._task.start(self._run())

    async def close(self) -> None:
        """Stop. A renewal under way is given up; the old certificate holds."""
        await self._task.close()

    def due(self) -> bool:
        """Whether the certificate is to be renewed now."""
        now_s = self._clock()
        if now_s < self._authority.not_before_s:
            return False
        if self._readdress or now_s < self.certificate.not_before_s:
            return True
        # With the authority's own end in sight another one wouldn't hold for longer.
        lasts = self.certificate.not_after_s >= self._authority.not_after_s
        return now_s >= due_at_s(self.certificate) and not lasts

    async def renew(self) -> NodeCertificate:
        """Now. FerryError: the old certificate stays in use."""
        key = await in_own_thread(STATE_DIRECTORY, self._folder.own_key)
        pem = await self._request(certificates.make_request(self._node, key))
        fresh = certificates.read_certificate(pem)
        if fresh.node != self._node or not certificates.belongs_to(pem, key):
            raise FerryError("the renewed certificate is not of this node and its key; not used")
        wrong = certificates.why_not_now(fresh, self._clock())
        if wrong:
            raise FerryError(
                f"the renewed certificate is not used: {wrong}; the clock of the node that signed "
                "it or of this one is wrong: mend it (`ferry doctor` compares them)"
            )
        await in_own_thread(
            STATE_DIRECTORY, lambda: self._folder.write(self._folder.certificate_path.name, pem)
        )
        await in_own_thread(STATE_DIRECTORY, self._contexts.reload)
        self.certificate = fresh
        self._readdress = False  # What the authority leaves out it would leave out again.
        self._told_at = None
        self._renewed(fresh)
        return fresh

    async def _run(self) -> None:
        while True:
            if not self.due():
                wait_s = due_at_s(self.certificate) - self._clock()
                await asyncio.sleep(min(max(wait_s, 1.0), LONGEST_SLEEP_S))
                continue
            try:
                await self.renew()
            except FerryError as error:
                self._tell(str(error))
            if self.due():  # Still, or again: a signer's clock is far behind.
                await asyncio.sleep(self._retry_s * random.uniform(0.8, 1.2))

    def _tell(self, why: str) -> None:
        """Each failure to the log; to the operator the first, one a day, and that at the end."""
        left_s, now = self.certificate.not_after_s - self._clock(), self._monotonic()
        log.warning(
            "the certificate can't be renewed (%s); it holds for %.1f h more", why, left_s / 3600
        )
        told_at, ended = self._told_at or (0.0, False), left_s <= 0
        if self._told_at is None or now - told_at[0] >= REMIND_S or ended != told_at[1]:
            self._told_at = (now, ended)
            self._failing(self.certificate, why)
