"""How moves that send at the same time share the links: max-min fair, by progressive filling.

All rates grow together until a link is full; the moves over it are fixed, the others grow on. So
no link carries more than it can, none is left idle while a move could use it, and no move gets more
at the cost of one that has less.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]


def fair_rates(
    sources: Ints, destinations: Ints, egress: Floats, ingress: Floats, cap: float
) -> Floats:
    """A rate for each move. `sources` and `destinations` index `egress` and `ingress`."""
    count = len(sources)
    rates = np.zeros(count)
    open_moves = np.ones(count, dtype=np.bool_)
    left_out, left_in = egress.astype(np.float64), ingress.astype(np.float64)
    for _ in range(len(egress) + len(ingress) + 1):
        if not open_moves.any():
            break
        out_count = np.bincount(sources[open_moves], minlength=len(egress))
        in_count = np.bincount(destinations[open_moves], minlength=len(ingress))
        with np.errstate(divide="ignore", invalid="ignore"):
            out_share = np.where(out_count > 0, left_out / out_count, np.inf)
            in_share = np.where(in_count > 0, left_in / in_count, np.inf)
        share = np.minimum(out_share[sources], in_share[destinations])
        least = min(float(share[open_moves].min()), cap)
        fixed = open_moves & (share <= least * (1 + 1e-9)) if least < cap else open_moves.copy()
        rates[fixed] = max(least, 0.0)
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
    """The same by names: a rate for each (source, destination). Unknown links are not full."""
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
