"""A pass's deliveries, run to their end: here if they are short, else in a thread for each."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from migrator.engine.channel import ChannelHealth
from migrator.engine.control import Waiter
from migrator.engine.delivery import Delivery
from migrator.engine.helpers import run_in_threads

_HELPERS_BYTES_MIN: Final = 16 * 1024 * 1024
"""Below this, starting threads costs more than several streams gain."""


def run_deliveries(
    deliveries: Sequence[Delivery], health: ChannelHealth, reconnect_s: float, waiter: Waiter
) -> None:
    """Until each has been acknowledged. Errors as `Delivery.run`."""
    busy = [delivery for delivery in deliveries if not delivery.empty]
    left_bytes = sum(delivery.left_bytes for delivery in deliveries)
    if len(busy) < 2 or left_bytes < _HELPERS_BYTES_MIN:
        for delivery in busy:
            delivery.run(health, reconnect_s, waiter)
    else:
        run_in_threads(
            [functools.partial(delivery.run, health, reconnect_s) for delivery in busy], waiter
        )
