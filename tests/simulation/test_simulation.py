"""DESIGN's invariants hold in 10,000 simulated clusters, and a seed replays to the letter."""

from __future__ import annotations

import pytest

from tests.simulation.run import replay_command
from tests.simulation.scenario import Scenario, faults_of, play
from tests.simulation.world import Faults, InvariantViolation

SEEDS = 10_000
CHUNK = 1_000


@pytest.mark.timeout(120)
@pytest.mark.parametrize("first", range(0, SEEDS, CHUNK))
def test_every_invariant_holds(first: int) -> None:
    for seed in range(first, first + CHUNK):
        try:
            play(seed)
        except InvariantViolation as error:
            pytest.fail(f"{error}\n\nreplay: {replay_command(seed)}", pytrace=False)


@pytest.mark.parametrize("seed", [0, 1, 2, 7, 28, 333, 2213, 4396])
def test_a_seed_gives_the_same_transcript_twice(seed: int) -> None:
    transcripts = []
    for _ in range(2):
        scenario = Scenario(seed)
        scenario.play()
        transcripts.append(scenario.world.transcript())
    assert transcripts[0] == transcripts[1]
    assert len(transcripts[0]) > 20


def test_a_seed_without_faults_moves_the_domain_there_and_back() -> None:
    """`Scenario` itself checks that all four sessions ended COMPLETED."""
    assert faults_of(0) == Faults()
    scenario = Scenario(0)
    assert scenario.play() == "n1"
    assert scenario.migrations == 2
    assert scenario.world.record.token == 3


def test_the_faults_reach_every_end() -> None:
    """A simulation in which everything succeeds, or everything dies, would prove little."""
    ends = [play(seed) for seed in range(1_000)]
    for end in ("n1", "n2", "n3", "died"):
        assert end in ends
    assert ends.count("unprovable") < 20
    assert ends.count("died") < 300
