"""What a host gets beside the programs: the sample of its configuration, and units of systemd."""

from __future__ import annotations

import configparser
import re
import typing
from pathlib import Path

import msgspec
import pytest

from node_agent.cli.errors import ExitCode
from node_agent.config import AgentConfig, parse_config
from node_agent.config_table import Table

DEPLOY = Path(__file__).resolve().parents[2] / "deploy"
SAMPLE = (DEPLOY / "samples" / "agent.toml").read_text(encoding="utf-8")
SECTION = re.compile(r"^\[+(\w+)\]+.*$", re.MULTILINE)
KEY = re.compile(r"^(?:# )?(\w+) = ", re.MULTILINE)


def tables() -> dict[str, type[Table]]:
    """By name, but for the pools', whose keys are their driver's."""
    found: dict[str, type[Table]] = {}
    for field in msgspec.structs.fields(AgentConfig):
        kind = (*typing.get_args(field.type), field.type)[0]
        if isinstance(kind, type) and issubclass(kind, Table):
            found[field.name] = kind
    return found


def test_the_sample_is_a_configuration() -> None:
    assert parse_config(SAMPLE).node.name == "n1"


@pytest.mark.parametrize("table", tables())
def test_the_sample_has_every_key_and_no_other(table: str) -> None:
    parts = SECTION.split(SAMPLE)
    sections = dict(zip(parts[1::2], parts[2::2], strict=True))
    known = {field.name for field in msgspec.structs.fields(tables()[table])}
    assert set(KEY.findall(sections[table])) == known


@pytest.mark.parametrize("name", ["ferry-agent", "ferry-nbd"])
def test_systemd_never_gives_it_up_and_leaves_what_guests_need(name: str) -> None:
    unit = configparser.ConfigParser(interpolation=None)
    unit.read(DEPLOY / "systemd" / f"{name}.service", encoding="utf-8")
    assert unit["Unit"]["StartLimitIntervalSec"] == "0"
    assert unit["Service"]["Restart"] == "always"
    assert unit["Service"]["KillMode"] == "process"
    # Guests and exports are in the same control group: when the kernel has killed one of them for
    # want of memory systemd would stop the unit, and systemd-oomd ends all of a group at once.
    assert unit["Service"]["OOMPolicy"] == "continue"
    assert unit["Service"]["ManagedOOMPreference"] == "omit"
    assert unit["Service"]["TasksMax"] == "infinity"
    assert not [key for key in unit["Service"] if key.startswith(("memory", "cpuquota"))]


def test_systemd_starts_no_agent_of_a_removed_node_again() -> None:
    """It was started each second, to be refused, until somebody disabled it."""
    unit = configparser.ConfigParser(interpolation=None)
    unit.read(DEPLOY / "systemd" / "ferry-agent.service", encoding="utf-8")
    assert int(unit["Service"]["RestartPreventExitStatus"]) == ExitCode.REMOVED


def test_systemd_stops_guests_with_the_host_and_with_nothing_else() -> None:
    """Before the agent, the network and mounts; a restart of the agent must not reach them."""
    units = {name: configparser.ConfigParser(interpolation=None) for name in ("agent", "guests")}
    for name, unit in units.items():
        unit.read(DEPLOY / "systemd" / f"ferry-{name}.service", encoding="utf-8")
    guests = units["guests"]
    after = set(guests["Unit"]["After"].split())
    assert {"ferry-agent.service", "network-online.target", "remote-fs.target"} <= after
    bound = {"requires", "bindsto", "partof", "requisite", "stopwhenunneeded", "conflicts"}
    assert not bound & set(guests["Unit"])
    assert not (bound | {"propagatesstopto"}) & set(units["agent"]["Unit"])
    assert guests["Unit"]["RefuseManualStop"] == "yes"
    assert "ferry-guests.service" in units["agent"]["Unit"]["Wants"].split()
    assert (guests["Service"]["Type"], guests["Service"]["RemainAfterExit"]) == ("oneshot", "yes")
    assert " node shutdown-guests " in guests["Service"]["ExecStop"]
