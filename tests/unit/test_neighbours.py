"""Other clusters nearby: on the same link, with the same names, in the same store."""

from __future__ import annotations

from pathlib import Path

import pytest

from migrator.errors import ConfigError
from migrator.model import NodeName
from node_agent.cli import joining
from node_agent.cli.errors import Unreachable
from node_agent.events import EventLog
from node_agent.namesake import LOOK_S, refuse_namesake
from node_agent.state.memory import SimulatedStore
from node_agent.state.typed import TypedStore
from node_agent.trust.discovery import SERVICE, Found, is_of
from node_agent.trust.join_token import make_token
from node_agent.trust.members import Membership
from node_agent.trust.opening import open_trust
from tests.unit.heartbeats import heartbeat, speak
from tests.unit.trust_world import node_config, trust_world

pytestmark = pytest.mark.allow_blocking("what the command line does runs in a thread")

N1 = NodeName("n1")


async def test_a_second_agent_of_a_node_s_name_is_refused() -> None:
    store = SimulatedStore()
    await store.open()
    typed, slept = TypedStore(store), list[float]()

    async def still(seconds: float) -> None:
        slept.append(seconds)

    async def beating(seconds: float) -> None:
        slept.append(seconds)
        await speak(typed, heartbeat(N1, sum(slept), boot_id="theirs"))

    await refuse_namesake(typed, N1, "ours", beating)  # The first of its name.
    await speak(typed, heartbeat(N1, 1.0, boot_id="ours"))
    await refuse_namesake(typed, N1, "ours", beating)  # A restart of the agent.
    await speak(typed, heartbeat(N1, 1.0, boot_id=""))
    await refuse_namesake(typed, N1, "ours", beating)  # An older agent's.
    assert slept == []
    await speak(typed, heartbeat(N1, 1.0, boot_id="before"))
    await refuse_namesake(typed, N1, "ours", still)  # A reboot of the host.
    assert sum(slept) == pytest.approx(LOOK_S)
    with pytest.raises(ConfigError, match=r"speaks as n1 in this store, from 192\.0\.2\.1:7781"):
        await refuse_namesake(typed, N1, "ours", beating)
    await store.close()


async def test_a_node_without_certificates_stays_out_of_a_secured_clusters_store(
    tmp_path: Path,
) -> None:
    """It would be nobody's peer, and take domains of the node whose name it has for its own."""
    async with trust_world(tmp_path) as world:
        typed = world.one.typed
        events = EventLog(typed, N1)
        for mode in ("plain", "auto"):
            config = node_config(tmp_path / "stranger", 1, f'mode = "{mode}"')
            with pytest.raises(ConfigError, match="it belongs to the cluster c1, whose nodes have"):
                await open_trust(config, typed, events, Membership(N1, typed, static={}))
    empty = SimulatedStore()
    await empty.open()
    typed = TypedStore(empty)
    config = node_config(tmp_path / "lab", 1, 'mode = "plain"')
    assert await open_trust(config, typed, events, Membership(N1, typed, static={})) is None
    await empty.close()


def test_announced_names_tell_their_cluster() -> None:
    fingerprint = "0123456789abcdef"
    assert is_of(f"n1-01234567.{SERVICE}", fingerprint)
    assert is_of(f"n1-01234567-2.{SERVICE}", fingerprint)
    assert not is_of(f"n1-89abcdef.{SERVICE}", fingerprint)


def test_a_token_of_a_cluster_that_is_not_here_is_told_from_silence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    token = make_token(bytes(32))

    async def nobody(fingerprint: str, **_: object) -> list[Found]:
        return []

    async def strangers(fingerprint: str, *, others: set[str], **_: object) -> list[Found]:
        others |= {"n1-89abcdef", "n2-89abcdef"}
        return []

    monkeypatch.setattr(joining, "find", nobody)
    with pytest.raises(Unreachable, match="is the token whole, and does multicast reach here"):
        joining.find_members(token, None, ())
    monkeypatch.setattr(joining, "find", strangers)
    with pytest.raises(
        Unreachable,
        match=r"but nodes of other clusters \(n1-89abcdef, n2-89abcdef\): the token is of a cluster"
        " whose fingerprint begins with 00000000",
    ):
        joining.find_members(token, None, ())
