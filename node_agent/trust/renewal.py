"""A node's certificate renews itself: at two thirds of its life, and at once where it doesn't name
an address that the node has now; then again every few minutes until it has worked. The key stays,
the file is replaced in one step, open connections stay as they are.
"""

from __future__ import annotations

import asyncio
import logging
import random
import time
from collections.abc import Awaitable, Callable, Sequence
from typing import Final

from migrator.errors import FerryError
from node_agent.background import Background
from node_agent.trust import certificates
from node_agent.trust.certificates import NodeCertificate
from node_agent.trust.contexts import TlsContexts
from node_agent.trust.files import TrustFolder

log = logging.getLogger(__name__)

RENEW_AT: Final = 2 / 3
RETRY_S: Final = 300.0
"""After a failure; within the last third of a certificate's life there are thousands of tries."""
LONGEST_SLEEP_S: Final = 3600.0
"""The clock may be set: look at it now and then."""


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
        renewed: Callable[[NodeCertificate], None] = lambda certificate: None,
        clock: Callable[[], float] = time.time,
        retry_s: float = RETRY_S,
    ) -> None:
        """`addresses`: the node's IP addresses, which its certificate is to name."""
        self.certificate = certificate
        self._readdress = not set(addresses) <= set(certificate.addresses)
        self._node = node
        self._folder = folder
        self._contexts = contexts
        self._request = request
        self._renewed = renewed
        self._clock = clock
        self._retry_s = retry_s
        self._task = Background("certificate renewal")

    def open(self) -> None:
        """Begin to watch the clock."""
        self._task.start(self._run())

    async def close(self) -> None:
        """Stop. A renewal under way is given up; the old certificate holds."""
        await self._task.close()

    async def renew(self) -> NodeCertificate:
        """Now. FerryError: the old certificate stays in use."""
        key = await asyncio.to_thread(self._folder.own_key)
        pem = await self._request(certificates.make_request(self._node, key))
        fresh = certificates.read_certificate(pem)
        if fresh.node != self._node or not certificates.belongs_to(pem, key):
            raise FerryError("the renewed certificate is not of this node and its key; not used")
        await asyncio.to_thread(self._folder.write, self._folder.certificate_path.name, pem)
        await asyncio.to_thread(self._contexts.reload)
        self.certificate = fresh
        self._readdress = False  # What the authority leaves out it would leave out again.
        self._renewed(fresh)
        return fresh

    async def _run(self) -> None:
        while True:
            wait_s = due_at_s(self.certificate) - self._clock()
            if wait_s > 0 and not self._readdress:
                await asyncio.sleep(min(wait_s, LONGEST_SLEEP_S))
                continue
            try:
                await self.renew()
            except FerryError as error:
                left_s = self.certificate.not_after_s - self._clock()
                log.warning(
                    "the certificate can't be renewed (%s); it holds for %.1f h more",
                    error,
                    left_s / 3600,
                )
                await asyncio.sleep(self._retry_s * random.uniform(0.8, 1.2))
