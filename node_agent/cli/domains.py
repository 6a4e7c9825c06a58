"""`ferry domain ...`"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Final

import msgspec
import typer

from migrator.figures import SAMPLE_S_MAX, SAMPLE_S_MIN, DirtyRate
from migrator.model import Boot, KernelBoot, Migration, NicSpec
from node_agent.cli.client import PATIENCE_S, READ_TIMEOUT_S, migration_path, path_of
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.output import (
    aside,
    by_number,
    facts,
    moment,
    note,
    settings,
    show,
    size,
    table,
)
from node_agent.cli.prediction import dirty_rate_text
from node_agent.cli.spec import load_spec, merge_spec
from node_agent.resources import Domain, DomainList, StartRequest, StopRequest, TakeoverRequest

app = typer.Typer(
    help="Domains: define, start, stop, look at.", no_args_is_help=True, rich_markup_mode=None
)

END_S: Final = 90.0
"""What an end by force may take beyond the guest's own time: its disks' I/O is waited for."""

_NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The domain.")]


@app.command()
def define(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Its name.")] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="A .toml or .json file; - for stdin.")
    ] = None,
    memory: Annotated[str | None, typer.Option(help="Like 512M or 4G.")] = None,
    vcpus: Annotated[int | None, typer.Option(help="How many vCPUs.")] = None,
    machine: Annotated[str | None, typer.Option(help="q35, pc or a versioned type.")] = None,
    cpu_model: Annotated[
        str | None, typer.Option("--cpu", help="CPU model, like host; qemu64 unless said.")
    ] = None,
    disk: Annotated[
        list[str] | None, typer.Option(help="VOLUME[,pool=POOL][,ro=true]; repeatable.")
    ] = None,
    nic: Annotated[
        list[str] | None,
        typer.Option(
            help="bridge=BR[,mac=MAC][,ip=IP][,net=NETWORK][,mtu=N][,vlan=ID][,antispoof=true]"
            "[,receive=RATE][,send=RATE], rates in bytes a second, like 50M; ip and net may stand "
            "more than once. Without mac= one is made. Repeatable."
        ),
    ] = None,
    kernel: Annotated[str | None, typer.Option(help="Boot this kernel.")] = None,
    initrd: Annotated[str | None, typer.Option(help="Its initrd.")] = None,
    cmdline: Annotated[str | None, typer.Option(help="Its command line.")] = None,
    start_it: Annotated[bool, typer.Option("--start", help="Start it, too.")] = False,
) -> None:
    """Define a domain from a file, from options, or both (options win)."""
    spec = merge_spec(
        load_spec(file) if file is not None else {},
        name=name,
        memory=memory,
        vcpus=vcpus,
        machine=machine,
        cpu_model=cpu_model,
        disks=disk or (),
        nics=nic or (),
        kernel=kernel,
        initrd=initrd,
        cmdline=cmdline,
    )
    if not spec:
        raise CliError("give a file (-f) or a name and options", ExitCode.USAGE)
    client = settings.client()
    domain = client.post("/v1/domains", Domain, spec)
    for warning in () if start_it else domain.warnings:  # A start is refused for what it needs.
        aside(f"ferry: warning: {warning}")
    done = "is defined"
    if start_it:
        domain = client.post(f"{path_of(domain.name)}/start", Domain)
        done = f"is defined and runs on {domain.node}"
    show(domain, "\n".join((f"domain {domain.name} {done}", *_made_macs(spec, domain))))


def _made_macs(given: dict[str, Any], domain: Domain) -> list[str]:
    """A line for each NIC that was defined without a MAC."""
    pairs = zip(given.get("nics", ()), domain.spec.nics, strict=True)
    return [f"NIC on {nic.bridge}: {nic.mac}" for each, nic in pairs if not each.get("mac")]


@app.command()
def start(
    name: _NameArgument,
    node: Annotated[
        str | None,
        typer.Option(
            help="Where; by default where it ran last, or where it fits, if that node is silent or "
            "kept free."
        ),
    ] = None,
) -> None:
    """Start a domain. Refused where not enough is left of the memory that its node offers."""
    body = StartRequest(node=node)
    domain = settings.client().post(f"{path_of(name)}/start", Domain, body)
    show(domain, f"domain {name} runs on {domain.node}")


@app.command()
def takeover(
    name: _NameArgument,
    to: Annotated[str, typer.Option("--to", help="Where it is to be started, from disk.")],
    powered_off: Annotated[
        str | None,
        typer.Option(
            metavar="NODE",
            help="You have seen that its node is powered off, and give your word in the place of "
            "a fence that its storage doesn't have. The node's name, exactly.",
        ),
    ] = None,
) -> None:
    """Start a domain elsewhere whose node is silent, once the storage has shut that node out.

    What the guest had in memory, and not on disk, is lost. Where the storage can't shut the node
    out, --powered-off NODE vouches for it; if that isn't true, two guests write to one disk. It is
    refused where the node still answers or the fence works, and stays in the domain's history with
    your name.

    A domain that runs on that node already, which a store that was restored from an older copy
    doesn't know, runs on: the store is told.
    """
    body = TakeoverRequest(node=to, powered_off=powered_off)
    domain = settings.client().post(f"{path_of(name)}/takeover", Domain, body)
    show(domain, f"domain {name} was taken over; it runs on {domain.node}")


@app.command()
def stop(
    name: _NameArgument,
    timeout: Annotated[
        float, typer.Option(min=0, max=600, help="Seconds until it is ended by force.")
    ] = 30.0,
) -> None:
    """Power a domain off."""
    domain = settings.client().post(
        f"{path_of(name)}/stop",
        Domain,
        StopRequest(timeout_s=timeout),
        timeout_s=timeout + END_S,
        meanwhile=stop_progress(name, timeout),
    )
    how = ": it was ended by force" if domain.forced else ""
    show(domain, f"domain {name} is {domain.state}{how}")


def stop_progress(name: str, timeout_s: float) -> list[tuple[float, str]]:
    """What to say while a domain is being stopped: after how many seconds, and the text."""
    told: list[tuple[float, str]] = []
    if timeout_s > PATIENCE_S:
        left = f"{timeout_s - PATIENCE_S:.0f} s more"
        text = f"domain {name} hasn't powered itself off yet; it is given {left}, then it is ended"
        told.append((PATIENCE_S, f"{text} by force"))
    text = f"domain {name} was to be ended by force {PATIENCE_S:.0f} s ago, and its node hasn't"
    text += f" said yet that it is: waiting {END_S - PATIENCE_S:.0f} s more"
    return [*told, (timeout_s + PATIENCE_S, f"{text} (does its storage hang?)")]


@app.command()
def pause(name: _NameArgument) -> None:
    """Stop a domain's vCPUs."""
    _operate(name, "pause")


@app.command()
def resume(name: _NameArgument) -> None:
    """Run a paused domain's vCPUs."""
    _operate(name, "resume")


@app.command()
def reset(name: _NameArgument) -> None:
    """Reset a domain as its reset button would."""
    _operate(name, "reset")


def _operate(name: str, operation: str) -> None:
    domain = settings.client().post(f"{path_of(name)}/{operation}", Domain)
    show(domain, f"domain {name} is {domain.state} on {domain.node}")


@app.command("ls")
def list_domains() -> None:
    """All domains of the cluster."""
    domains = settings.client().get("/v1/domains", DomainList).domains
    rows = [
        (
            domain.name,
            domain.state.value,
            domain.node or "-",
            str(domain.spec.vcpus),
            size(domain.spec.memory_bytes),
            domain.migration or "-",
        )
        for domain in sorted(domains, key=lambda domain: by_number(domain.name))
    ]
    headings = ("NAME", "STATE", "NODE", "VCPUS", "MEMORY", "MIGRATION")
    show(domains, table(headings, rows))


@app.command("show")
def show_domain(name: _NameArgument) -> None:
    """One domain."""
    domain = settings.client().get(path_of(name), Domain)
    spec = domain.spec
    pairs = [
        ("name", domain.name),
        ("state", domain.state.value + (f" ({domain.reason})" if domain.reason else "")),
        ("node", domain.node or ""),
        ("migration", _migration(domain.migration) if domain.migration else ""),
        ("fencing token", str(domain.token or "")),
        ("pid", str(domain.pid or "")),
        ("memory", f"{size(spec.memory_bytes)}, in use {size(domain.memory_in_use_bytes)}"),
        ("vcpus", f"{spec.vcpus} ({spec.cpu_model})"),
        ("machine", spec.machine),
        *_boot(spec.boot),
        ("labels", ", ".join(f"{key}={value}" for key, value in spec.labels.items())),
        ("maintenance", f"{spec.maintenance.value}, priority {spec.priority}"),
        ("pinned to", ", ".join(spec.placement.pinned)),
        ("together with", ", ".join(spec.placement.affinity)),
        ("never with", ", ".join(spec.placement.anti_affinity)),
        *(("disk", f"{disk.pool}/{disk.volume}") for disk in spec.disks),
        *(("nic", _nic(nic)) for nic in spec.nics),
        *(("history", f"{moment(each.at_s)} {each.user}: {each.text}") for each in domain.history),
        *(("seen at", ", ".join(reversed(texts))) for texts in domain.addresses),
    ]
    show(domain, facts(pairs))


def _migration(id: str) -> str:
    """With its state, and why the guest waits, where it does: it looks well from outside."""
    try:
        migration = settings.client().get(migration_path(id), Migration)
    except CliError:
        return id
    return f"{id}, {migration.state}" + (f": {migration.error}" if migration.error else "")


def _boot(boot: Boot) -> list[tuple[str, str]]:
    if not isinstance(boot, KernelBoot):
        return [("boot", "from its first disk")]
    return [("kernel", boot.kernel), ("initrd", boot.initrd or ""), ("cmdline", boot.cmdline)]


def _nic(nic: NicSpec) -> str:
    text = f"{nic.mac} on {nic.bridge} {' '.join(nic.addresses)}".rstrip()
    if nic.vlan is not None:
        text += f", VLAN {nic.vlan}"
    return f"{text}, anti-spoofing" if nic.anti_spoofing else text


@app.command("rm")
def remove(name: _NameArgument) -> None:
    """Delete a stopped domain's definition; its volumes stay."""
    settings.client().delete(path_of(name))
    show({"deleted": name}, f"domain {name} is deleted; its volumes stay")


@app.command()
def console(
    name: _NameArgument,
    follow: Annotated[bool, typer.Option("-f", "--follow", help="Go on, also after it.")] = False,
) -> None:
    """What a domain's serial console printed; with --json an object a line, a piece in each."""
    suffix = "?follow=true" if follow else ""
    for chunk in settings.client().chunks(f"{path_of(name)}/console{suffix}"):
        piece = {"console": chunk.decode(errors="replace")}
        sys.stdout.buffer.write(msgspec.json.encode(piece) + b"\n" if settings.json else chunk)
        sys.stdout.buffer.flush()
    if follow:
        note("the console's stream has ended")


@app.command("dirty-rate")
def dirty_rate(
    name: _NameArgument,
    seconds: Annotated[
        float, typer.Option(min=SAMPLE_S_MIN, max=SAMPLE_S_MAX, help="How long to sample.")
    ] = 1.0,
) -> None:
    """How fast a running domain dirties its memory, and how much of it."""
    path = f"{path_of(name)}/dirty-rate?seconds={seconds:g}"
    rate = settings.client().get(path, DirtyRate, timeout_s=seconds + READ_TIMEOUT_S)
    show(rate, dirty_rate_text(rate))
