"""Run seeds: `python -m tests.simulation.run --seeds 10000`, replay one with `--seed N`.

Each seed picks its own mix of faults. After the faults heal, the cluster gets time to recover; then
invariant 4 is checked: the domain runs, unless the only process with its memory was killed.
"""

from __future__ import annotations

import argparse
import random
import sys
import time
from collections import Counter

from migrator.model import MigrationRequest, OnTimeout
from migrator.session import vocabulary as v
from tests.simulation.node import Node
from tests.simulation.world import DESTINATION, SOURCE, Faults, InvariantViolation, World

SETTLE_S = 200.0


def faults_of(seed: int) -> Faults:
    """The mix of faults of a seed: none at all for some, everything at once for others."""
    r = random.Random(f"faults {seed}")
    scale = r.choice((0.0, 0.3, 1.0, 1.0, 2.0))

    def rate(most: float) -> float:
        return scale * most * r.random() if r.random() < 0.6 else 0.0

    return Faults(
        crash_per_command=rate(0.05),
        crash_mean_s=1.0 / rate(4.0) if scale and r.random() < 0.5 else 0.0,
        hypervisor_share=r.choice((0.0, 0.0, 0.3)),
        loss=rate(0.3),
        duplicate=rate(0.3),
        partition_mean_s=r.choice((0.0, 0.0, 1.0)) * scale,
        delay_s_max=r.choice((0.001, 0.01, 1.5)),
        store_unknown=rate(0.5),
        store_late=rate(1.0),
        command_failure=rate(0.1),
    )


class Scenario:
    """One migration in one world. `play` raises InvariantViolation with the world's transcript."""

    def __init__(self, seed: int) -> None:
        try:
            faults = faults_of(seed)
        except ZeroDivisionError:
            faults = Faults()
        self.world = World(seed, faults)
        self.nodes = {name: Node(self.world, name) for name in (SOURCE, DESTINATION)}
        self.nodes[SOURCE].other = self.nodes[DESTINATION]
        self.nodes[DESTINATION].other = self.nodes[SOURCE]

    def play(self) -> str:
        """Where the domain ended: the node's name, or "lost"."""
        world = self.world
        world.log(f"faults: {world.faults}")
        request = MigrationRequest(
            destination=DESTINATION,
            on_timeout=world.random.choice(list(OnTimeout)),
            timeout_s=world.random.choice((0.05, 600.0)),
        )
        world.after(0.0, world.guest_runs)
        world.after(0.01, lambda: self.nodes[SOURCE].begin_source(request))
        if world.random.random() < 0.2:
            world.after(world.delay(0.2), self._cancel)
        if world.faults.crash_mean_s:
            world.after(0.02 + world.delay(0.2), self._kill_something)
        if world.faults.partition_mean_s:
            world.after(world.delay(0.1), self._partition)
        world.run(SETTLE_S, step=world.check)
        return self._verdict()

    def _cancel(self) -> None:
        self.nodes[SOURCE].feed(v.CancelRequested())

    def _partition(self) -> None:
        world = self.world
        if world.healed:
            world.cut = False
            return
        world.cut = not world.cut
        world.log("network: cut" if world.cut else "network: back")
        for node in self.nodes.values():
            node.peer_changed(lost=world.cut)
        world.after(world.delay(world.faults.partition_mean_s * 2), self._partition)

    def _kill_something(self) -> None:
        world = self.world
        if world.healed:
            return
        node = world.random.choice(list(self.nodes.values()))
        if world.random.random() < world.faults.hypervisor_share:
            node.kill_guest("killed")
        elif world.random.random() < 0.5:
            node.kill_engine("killed")
        else:
            node.crash("killed")
        world.after(world.random.expovariate(1.0 / world.faults.crash_mean_s), self._kill_something)

    def _verdict(self) -> str:
        world = self.world
        running = [g.node for g in world.guests.values() if g.state == "running"]
        open_entries = [
            f"{name}: {entry.state}"
            for name, entries in world.journals.items()
            for entry in entries.values()
            if not entry.ended
        ]
        if not running and not world.memory_lost:
            states = {g.node: g.state for g in world.guests.values()}
            raise InvariantViolation(
                f"4: the domain runs nowhere: {states}, {world.record}, open: {open_entries}"
            )
        if running and open_entries:
            raise InvariantViolation(f"5: a migration never ended: {open_entries}")
        if len(world.guests) > len(running) and running:
            raise InvariantViolation(f"5: a stale copy was left: {list(world.guests)}")
        return running[0] if running else "lost"


def play(seed: int) -> str:
    """Play one seed. On a violation the error carries the transcript."""
    scenario = Scenario(seed)
    try:
        return scenario.play()
    except Exception as error:
        transcript = "\n".join(scenario.world.transcript[-400:])
        raise InvariantViolation(f"seed {seed}: {error}\n{transcript}") from error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, help="replay this one and print its transcript")
    options = parser.parse_args()
    if options.seed is not None:
        scenario = Scenario(options.seed)
        try:
            print("ended on", scenario.play())
        finally:
            print("\n".join(scenario.world.transcript))
        return 0
    started = time.monotonic()
    ends: Counter[str] = Counter()
    for seed in range(options.first, options.first + options.seeds):
        try:
            ends[play(seed)] += 1
        except InvariantViolation as error:
            print(error)
            print(f"\nreplay: python -m tests.simulation.run --seed {seed}")
            return 1
    seconds = time.monotonic() - started
    print(f"{options.seeds} seeds in {seconds:.1f} s, all invariants held; ended on {dict(ends)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
