"""Run seeds: `python -m tests.simulation.run --seeds 10000`, replay one with `--seed N`.

Seeds are played on all cores. The first violation is printed with its transcript, and ends the run
(`--keep-going`: all are listed).
"""

from __future__ import annotations

import argparse
import gc
import logging
import multiprocessing
import os
import sys
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from tests.simulation.cluster import Cluster
from tests.simulation.scenario import Scenario, play
from tests.simulation.world import InvariantViolation

CHUNK = 100


def replay_command(seed: int) -> str:
    return f"make sim SEED={seed}"


@dataclass(slots=True)
class Played:
    """What came of some seeds."""

    domains: int = 0
    migrations: Counter[str] = field(default_factory=Counter)
    """How they ended, by their sources' word."""
    lost: Counter[str] = field(default_factory=Counter)
    """Why domains stopped running, for a time or for good."""
    failed: dict[int, str] = field(default_factory=dict)

    def add(self, other: Played) -> None:
        self.domains += other.domains
        self.migrations.update(other.migrations)
        self.lost.update(other.lost)
        self.failed.update(other.failed)

    def note(self, cluster: Cluster) -> None:
        self.domains += len(cluster.domains)
        for domain in cluster.domains.values():
            self.lost.update(domain.losses)
        states = [each.source.ended for each in cluster.migrations.values()]
        self.migrations.update(str(state) for state in states if state is not None)


def play_range(first: int, count: int) -> Played:
    """Play seeds in this process, up to its first violation."""
    logging.disable(logging.CRITICAL)
    played = Played()
    try:
        for seed in range(first, first + count):
            try:
                played.note(play(seed).cluster)
            except InvariantViolation as error:
                played.failed[seed] = str(error)
    finally:
        logging.disable(logging.NOTSET)
    gc.collect()
    return played


def _play_chunk(chunk: tuple[int, int]) -> Played:
    return play_range(*chunk)


@contextmanager
def playing(first: int, count: int, processes: int) -> Iterator[Iterator[Played]]:
    """Play seeds on so many cores, in chunks as they come."""
    chunks = [(at, min(CHUNK, first + count - at)) for at in range(first, first + count, CHUNK)]
    if processes == 1:
        yield map(_play_chunk, chunks)
        return
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        yield pool.imap(_play_chunk, chunks)


def replay(seed: int) -> int:
    """Print a seed's transcript and its end; 1 on a violation."""
    logging.disable(logging.CRITICAL)
    scenario = Scenario(seed)
    failure: Exception | None = None
    ends: dict[str, str] = {}
    try:
        ends = scenario.play()
    except Exception as error:  # A bug in a session is a finding, too.
        failure = error
    print("\n".join(scenario.world.transcript()))
    if failure is not None:
        print(f"\nseed {seed}: {type(failure).__name__}: {failure}")
        return 1
    print(f"\nseed {seed} ended well: {ends}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="replay this one and print its transcript")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--keep-going", action="store_true", help="only list what fails")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed)
    started = time.monotonic()
    total = Played()
    done = 0
    with playing(options.first, options.seeds, options.processes) as chunks:
        for played in chunks:
            total.add(played)
            done += CHUNK
            for seed, error in sorted(played.failed.items()):
                if not options.keep_going:
                    print(f"{error}\n\nreplay: {replay_command(seed)}")
                    return 1
                print(f"{seed}: {error.splitlines()[0]}")
            if done % 10_000 == 0:
                print(f"{done} seeds in {time.monotonic() - started:.0f} s", flush=True)
    seconds = time.monotonic() - started
    rate = options.seeds / seconds
    print(f"{options.seeds} seeds in {seconds:.1f} s ({rate:.0f}/s), {total.domains} domains")
    print(f"migrations {dict(total.migrations)}, domains stopped by {dict(total.lost)}")
    print(f"violations: {sorted(total.failed)}" if total.failed else "all invariants held")
    return 1 if total.failed else 0


if __name__ == "__main__":
    sys.exit(main())
