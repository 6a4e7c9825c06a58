"""How moves that send at the same time share the links: max-min fair by weight, and all is used.

All rates grow together, each as fast as its weight says, until a link is full; the moves over it
are fixed, the others grow on. So no link carries more than it can, and none is left idle while a
move could use it.

The move that has been sending longest from its node weighs most. Equal shares would end together:
all guests of a node in their blackouts at once, and then the link idle while the next destinations
are made ready. So they end one after the other, and each set-up falls into another's transfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

FOLLOWER: Final = 0.25
"""Weight of a move that began to send after another one of its source; the first one has 1."""

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def weights(sources: Ints) -> Floats:
    """Of moves in the order in which they began to send."""
    found = np.full(len(sources), FOLLOWER)
    found[np.unique(sources, return_index=True)[1]] = 1.0
    return found


def least_shares(number: int) -> tuple[float, float]:
    """Of a source's link, with `number` moves at once: the first one's and another one's."""
    whole = 1.0 + FOLLOWER * (number - 1)
    return 1.0 / whole, (FOLLOWER if number > 1 else 1.0) / whole


def fair_rates(
    sources: Ints, destinations: Ints, egress: Floats, ingress: Floats, cap: float
) -> Floats:
    """A rate for each move, in the order in which they began to send.

    `sources` and `destinations` index `egress` and `ingress`.
    """
    count = len(sources)
    rates = np.zeros(count)
    weight = weights(sources)
    open_moves = np.ones(count, dtype=np.bool_)
    left_out, left_in = egress.astype(np.float64), ingress.astype(np.float64)
    for _ in range(len(egress) + len(ingress) + 2):
        if not open_moves.any():
            break
        heavy = np.where(open_moves, weight, 0.0)
        out_weight = np.bincount(sources, weights=heavy, minlength=len(egress))
        in_weight = np.bincount(destinations, weights=heavy, minlength=len(ingress))
        with np.errstate(divide="ignore", invalid="ignore"):
            out_level = np.where(out_weight > 0, left_out / out_weight, np.inf)
            in_level = np.where(in_weight > 0, left_in / in_weight, np.inf)
        level = np.minimum(out_level[sources], in_level[destinations])
        level = np.minimum(level, cap / weight)
        least = max(float(level[open_moves].min()), 0.0)
        fixed = open_moves & (level <= least * (1 + 1e-9))
        rates[fixed] = least * weight[fixed]
        left_out = left_out - np.bincount(
            sources[fixed], weights=rates[fixed], minlength=len(egress)
        )
        left_in = left_in - np.bincount(
            destinations[fixed], weights=rates[fixed], minlength=len(ingress)
        )
        np.clip(left_out, 0.0, None, out=left_out)
        np.clip(left_in, 0.0, None, out=left_in)
        open_moves &= ~fixed
    return rates


def share_links(
    moves: Sequence[tuple[str, str]],
    egress: dict[str, float],
    ingress: dict[str, float],
    cap: float,
) -> list[float]:
    """The same by names: a rate for each (source, destination), in the order in which they began
    to send. Unknown links are not full."""
    if not moves:
        return []
    sources = {name: index for index, name in enumerate(sorted({move[0] for move in moves}))}
    targets = {name: index for index, name in enumerate(sorted({move[1] for move in moves}))}
    rates = fair_rates(
        np.array([sources[source] for source, _ in moves]),
        np.array([targets[target] for _, target in moves]),
        np.array([egress.get(name, cap * len(moves)) for name in sources]),
        np.array([ingress.get(name, cap * len(moves)) for name in targets]),
        cap,
    )
    return [float(rate) for rate in rates]
