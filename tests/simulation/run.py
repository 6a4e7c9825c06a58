"""Run seeds: `python -m tests.simulation.run --seeds 10000`, replay one with `--seed N`."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.simulation.scenario import Scenario, play
from tests.simulation.world import InvariantViolation


def replay_command(seed: int) -> str:
    return f"make sim SEED={seed}"


def replay(seed: int) -> int:
    """Print a seed's transcript and its end; 1 on a violation."""
    scenario = Scenario(seed)
    failure: Exception | None = None
    end = ""
    try:
        end = scenario.play()
    except Exception as error:  # A bug in a session is a finding, too.
        failure = error
    print("\n".join(scenario.world.transcript()))
    if failure is not None:
        print(f"\nseed {seed}: {type(failure).__name__}: {failure}")
        return 1
    print(f"\nseed {seed} ended on: {end}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, default=10_000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="the first of them")
    parser.add_argument("--seed", type=int, help="replay this one and print its transcript")
    parser.add_argument("--keep-going", action="store_true", help="only list what fails")
    options = parser.parse_args()
    if options.seed is not None:
        return replay(options.seed)
    started = time.monotonic()
    ends: Counter[str] = Counter()
    failed: list[int] = []
    for seed in range(options.first, options.first + options.seeds):
        try:
            ends[play(seed)] += 1
        except InvariantViolation as error:
            failed.append(seed)
            if options.keep_going:
                print(f"{seed}: {str(error).splitlines()[0]}")
                continue
            print(f"{error}\n\nreplay: {replay_command(seed)}")
            return 1
    seconds = time.monotonic() - started
    rate = options.seeds / seconds
    print(f"{options.seeds} seeds in {seconds:.1f} s ({rate:.0f}/s); ended on {dict(ends)}")
    print(f"violations: {failed}" if failed else "all invariants held")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
