"""The lab's plan: names, addresses and paths that never clash, and every fault said at once."""

from __future__ import annotations

import ipaddress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from deploy.lab.cables import NODE_UPLINK
from deploy.lab.config import agent_config, agent_config_text
from deploy.lab.kinds import OVERLAY_FABRICS, FabricKind, StoreKind
from deploy.lab.network import shaping_bytes
from deploy.lab.plan import (
    LINK_MBIT_MAX,
    NODES_MAX,
    ROUTED_NODES_MAX,
    SOCKET_PATH_BYTES_MAX,
    LabPlan,
    check_fabric,
    lab_of_namespace,
    make_plan,
)
from migrator.errors import InvalidRequest, NotFoundError
from node_agent.config import parse_config

ROOT = Path("/var/lib/ferry/labs")
LAB_NAMES = st.from_regex(r"[a-z0-9]([a-z0-9-]{0,18}[a-z0-9])?", fullmatch=True)


def plan_of(
    name: str = "lab", index: int = 0, nodes: int = 3, link_mbit: int | None = None
) -> LabPlan:
    return make_plan(name, index=index, node_count=nodes, labs_root=ROOT, link_mbit=link_mbit)


def addresses(plan: LabPlan) -> list[str]:
    return [link.address for link in plan.links if link.address is not None]


def test_a_lab_of_two_nodes() -> None:
    plan = plan_of(nodes=2, index=7)
    assert plan.namespaces == (
        "fy-lab-switch",
        "fy-lab-client",
        "fy-lab-storage",
        "fy-lab-n1",
        "fy-lab-n2",
    )
    assert [node.mgmt_address for node in plan.nodes] == ["10.77.7.1", "10.77.7.2"]
    assert plan.node("n2").api_socket == ROOT / "lab" / "n2" / "api.sock"
    assert plan.storage_address == "10.77.7.251"
    assert plan.guest_address(5) == "10.78.7.5"


@given(name=LAB_NAMES, index=st.integers(0, 255), nodes=st.integers(1, NODES_MAX))
def test_everything_is_unique_and_fits(name: str, index: int, nodes: int) -> None:
    plan = plan_of(name, index, nodes)
    ports = [link.port for link in plan.links]
    ends = [(link.namespace, link.interface) for link in plan.links]
    assert len(set(ports)) == len(ports)
    assert len(set(ends)) == len(ends)
    assert all(len(item) <= 15 for link in plan.links for item in (link.port, link.interface))
    held = addresses(plan)
    assert len(set(held)) == len(held)
    networks = [ipaddress.ip_network(plan.mgmt_network), ipaddress.ip_network(plan.guest_network)]
    assert all(any(ipaddress.ip_address(item) in net for net in networks) for item in held)
    assert all(
        len(str(node.api_socket)) <= SOCKET_PATH_BYTES_MAX and node.folder.parent == plan.folder
        for node in plan.nodes
    )


@given(first=LAB_NAMES, second=LAB_NAMES)
def test_a_namespace_belongs_to_one_lab(first: str, second: str) -> None:
    assert {lab_of_namespace(name) for name in plan_of(first).namespaces} == {first}
    if first != second:
        assert not set(plan_of(first).namespaces) & set(plan_of(second).namespaces)


def test_a_lab_called_like_another_ones_node() -> None:
    assert lab_of_namespace("fy-a-n1") == "a"
    assert lab_of_namespace("fy-a-n1-n1") == "a-n1"
    assert lab_of_namespace("fy-a-n1-switch") == "a-n1"
    assert lab_of_namespace("something") is None
    assert lab_of_namespace("fy-a-gate") is None


def test_labs_side_by_side_share_no_address() -> None:
    assert not set(addresses(plan_of("a", 0))) & set(addresses(plan_of("b", 1)))


def test_only_the_nodes_links_are_shaped() -> None:
    plan = plan_of(nodes=2, link_mbit=100)
    shaped = {link.port for link in plan.links if link.shaped}
    assert shaped == {"g-n1", "m-n1", "g-n2", "m-n2"}


@pytest.mark.parametrize("name", ["", "-a", "a-", "Lab", "a" * 21, "a_b", "../x"])
def test_a_bad_name_is_refused(name: str) -> None:
    with pytest.raises(InvalidRequest, match="can't be a lab's name"):
        plan_of(name)


def test_all_faults_at_once() -> None:
    with pytest.raises(InvalidRequest) as caught:
        make_plan(
            "lab", index=256, node_count=0, labs_root=Path("relative"), link_mbit=LINK_MBIT_MAX + 1
        )
    assert set(caught.value.fields) == {"index", "nodes", "labs_root", "link_mbit"}


def test_a_folder_too_deep_for_sockets_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="FERRY_LAB_ROOT"):
        make_plan("lab", index=0, node_count=1, labs_root=Path("/" + "x" * 80))


def test_an_unknown_node_and_guest_address_are_refused() -> None:
    with pytest.raises(NotFoundError, match="n1, n2, n3"):
        plan_of().node("n4")
    with pytest.raises(InvalidRequest, match="1 to 249"):
        plan_of().guest_address(250)


def test_where_a_command_can_run_is_named_whole() -> None:
    """As `ferry lab exec` takes it: not only the nodes."""
    plan = msgspec.structs.replace(plan_of(), fabric=FabricKind.ROUTED, store=StoreKind.ETCD)
    known = "n1, n2, n3, client, storage, switch, router, etcd1, etcd2, etcd3"
    with pytest.raises(NotFoundError, match=f"lab lab has no 'n4'; it has {known}$"):
        plan.namespace_of("n4")
    assert {plan.namespace_of(where) for where in known.split(", ")} == set(plan.namespaces)
    with pytest.raises(NotFoundError, match=r"it has n1, n2, n3, client, storage, switch$"):
        plan_of().namespace_of("router")


def test_the_agents_configuration_is_one_that_the_agent_reads() -> None:
    plan = plan_of()
    for node in plan.nodes:
        config = agent_config(plan, node)
        assert parse_config(agent_config_text(plan, node)) == config
        assert [peer.name for peer in config.peers] == sorted({"n1", "n2", "n3"} - {node.name})
        assert config.node.memory_bytes == 4 * 1024**3
    stores = {agent_config(plan, node).store.path for node in plan.nodes}
    assert stores == {str(plan.store_path)}


def test_a_lab_with_etcd_has_three_members_on_hosts_of_their_own() -> None:
    plan = msgspec.structs.replace(plan_of(), store=StoreKind.ETCD)
    members = plan.etcd_members
    assert len({member.address for member in members}) == len(members) == 3
    assert {member.namespace for member in members} < set(plan.namespaces)
    assert len(plan.links) == len(plan_of().links) + 3
    assert all(lab_of_namespace(name) == plan.name for name in plan.namespaces)
    for node in plan.nodes:
        config = parse_config(agent_config_text(plan, node))
        assert config.store.members == tuple((each.address, 2379) for each in members)


@given(link_mbit=st.integers(1, LINK_MBIT_MAX))
def test_a_shaped_link_takes_a_whole_gso_packet(link_mbit: int) -> None:
    burst, queue = shaping_bytes(link_mbit)
    assert 65_536 < burst < queue


@given(index=st.integers(0, 255), nodes=st.integers(1, ROUTED_NODES_MAX))
def test_a_routed_labs_subnets_share_nothing(index: int, nodes: int) -> None:
    plan = msgspec.structs.replace(plan_of(index=index, nodes=nodes), fabric=FabricKind.ROUTED)
    subnets = [link.subnet for link in plan.links if link.subnet is not None]
    assert len(subnets) == nodes + 1
    networks = [
        ipaddress.ip_interface(f"{each.address}/{each.prefix_bits}").network for each in subnets
    ]
    assert len(set(networks)) == len(networks)
    for subnet, network in zip(subnets, networks, strict=True):
        assert ipaddress.ip_address(subnet.router) in network
    assert "fy-lab-router" in plan.namespaces
    for node in plan.nodes[:3]:
        config = parse_config(agent_config_text(plan, node))
        assert config.fabric.local not in config.fabric.route_peers
        assert len(config.fabric.route_peers) == nodes


@pytest.mark.parametrize("fabric", OVERLAY_FABRICS)
def test_the_ends_of_an_overlay_know_each_other_or_have_frr(fabric: FabricKind) -> None:
    plan = msgspec.structs.replace(plan_of(nodes=3, index=7), fabric=fabric)
    ends = {plan.subnet(number).address for number in (1, 2, 3)} | {plan.client_subnet.address}
    for node in plan.nodes:
        table = parse_config(agent_config_text(plan, node)).fabric
        assert {table.local, *table.remotes} == ({table.local} if table.evpn else ends)
    assert ends == {link.address for link in plan.links if link.interface == NODE_UPLINK}
    assert plan.guest_gateway is None, "guests have a layer 2"
    assert plan.client_guest_address == "10.78.7.250"


def test_a_routed_lab_has_room_for_so_many_nodes() -> None:
    check_fabric(ROUTED_NODES_MAX, FabricKind.BGP)
    with pytest.raises(InvalidRequest, match="a lab with a router has"):
        check_fabric(ROUTED_NODES_MAX + 1, FabricKind.ROUTED)
