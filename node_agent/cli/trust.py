"""`ferry cluster`: found a cluster, let nodes in, see who is in. Init and join need no agent."""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Annotated, Final

import typer

from migrator.errors import FerryError
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.output import aside, facts, moment, note, settings, show, table
from node_agent.clock_words import span_text
from node_agent.trust.records import (
    TOKEN_TTL_S,
    TOKEN_TTL_S_MAX,
    ClusterView,
    JoinTokenCreate,
    JoinTokenMade,
    Member,
)

app = typer.Typer(
    help="The cluster: found it, join it.", no_args_is_help=True, rich_markup_mode=None
)

DEFAULT_CONFIG: Final = Path("/etc/ferry/agent.toml")
ENDS_SOON_S: Final = 7 * 86_400.0
"""Of a certificate: with the usual 30 days its renewal has failed for three days then."""
_DURATION: Final = re.compile(r"^(\d+(?:\.\d+)?)\s*([smhd]?)$")
_SECONDS: Final = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}

_Config = Annotated[
    Path, typer.Option("--config", "-c", help="This node's configuration; made if it isn't there.")
]
_Name = Annotated[
    str | None, typer.Option("--name", help="This node's name, for a new configuration.")
]
_Host = Annotated[
    str | None,
    typer.Option("--listen", help="This node's own IP address, for a new configuration."),
]


def parse_duration(text: str) -> float:
    """Seconds of "90", "15m", "1.5h", "30d". CliError (usage) otherwise."""
    matched = _DURATION.match(text.strip().lower())
    if matched is None:
        raise CliError(f"{text} is not a duration: 90s, 15m, 1.5h, 30d", ExitCode.USAGE)
    return float(matched[1]) * _SECONDS[matched[2]]


def refused(error: FerryError) -> CliError:
    """An error of the tree, as the command line says it."""
    codes = {400: ExitCode.USAGE, 404: ExitCode.NOT_FOUND, 409: ExitCode.REFUSED}
    return CliError(str(error), codes.get(error.http_status, ExitCode.FAILED))


@app.command()
def init(
    cluster: Annotated[
        str | None, typer.Option("--cluster", help="The cluster's name; by default ferry.")
    ] = None,
    etcd: Annotated[
        list[str] | None,
        typer.Option(
            "--etcd",
            help="HOST:PORT of an etcd member, for a new configuration; repeatable. Without: an "
            "SQLite file, for a cluster on one machine.",
        ),
    ] = None,
    replace: Annotated[
        bool,
        typer.Option(
            "--replace",
            help="A new authority for the cluster that is in the store: the old one ends, or was "
            "stolen. Stop the agents first; guests run on. Every other node joins anew (--again).",
        ),
    ] = False,
    config: _Config = DEFAULT_CONFIG,
    name: _Name = None,
    listen: _Host = None,
) -> None:
    """Found a cluster on this node: its authority, and this node's certificate. As root."""
    from node_agent.cli.new_config import load_or_make, main_address, write_config
    from node_agent.trust.founding import DEFAULT_CLUSTER, found_cluster

    if replace:
        _replace(config, cluster)
        return
    cluster = cluster or DEFAULT_CLUSTER
    try:
        loaded, new = load_or_make(
            config, name, lambda: main_address() if listen is None else listen, etcd or ()
        )
        identity = found_cluster(loaded, cluster)
        if new:
            write_config(config, loaded)
            note(f"wrote {config}; look at it before other nodes join (store, pools)")
        if loaded.store.driver == "sqlite":
            note(
                f"its store is the file {loaded.store.path}: a cluster of agents on this one host. "
                "For several hosts found it with --etcd"
            )
    except FerryError as error:
        raise refused(error) from error
    show(
        {"cluster": cluster, "node": loaded.node.name, "fingerprint": identity.fingerprint},
        f"node {loaded.node.name} founded the cluster {cluster}\n"
        f"fingerprint: {identity.fingerprint}\n"
        f"the authority's key is in {loaded.node.state_directory}/tls/authority-key.pem: back it "
        "up\n\nnext: systemctl enable --now ferry-agent, then `ferry cluster token`",
    )


def _replace(config: Path, cluster: str | None) -> None:
    from node_agent.cli.replacing import replace_authority
    from node_agent.config import load_config

    try:
        loaded = load_config(config)
        identity, kept = replace_authority(loaded, cluster)
    except FerryError as error:
        raise refused(error) from error
    old = "" if kept is None else f"\nwhat was there before is in {kept}; remove it some day"
    show(
        {
            "cluster": identity.cluster,
            "node": loaded.node.name,
            "fingerprint": identity.fingerprint,
        },
        f"node {loaded.node.name} founded the cluster {identity.cluster} anew; users, domains and "
        f"pools stay\nfingerprint: {identity.fingerprint}\nthe authority's key is in "
        f"{loaded.node.state_directory}/tls/authority-key.pem: back it up{old}\n\nnext: "
        "systemctl start ferry-agent; for each other node `ferry cluster token` here, and there "
        "`ferry cluster join TOKEN --again` and systemctl restart ferry-agent; "
        "contexts need the new fingerprint",
    )


@app.command()
def token(
    ttl: Annotated[
        str, typer.Option("--ttl", help="How long it can be used: 15m, 1h, at most 7d.")
    ] = f"{TOKEN_TTL_S / 3600:g}h",
) -> None:
    """Make a join token, which lets one node in. Treat it as a password."""
    ttl_s = parse_duration(ttl)
    if not 1.0 <= ttl_s <= TOKEN_TTL_S_MAX:
        raise CliError(f"--ttl {ttl}: a join token holds from 1s to 7d", ExitCode.USAGE)
    body = JoinTokenCreate(ttl_s=ttl_s)
    made = settings.client().post("/v1/cluster/tokens", JoinTokenMade, body)
    until = moment(made.expires_at_s)
    aside(f"for one node, until {until}; on that node: ferry cluster join TOKEN")
    show(made, made.token)


@app.command()
def join(
    join_token: Annotated[str, typer.Argument(metavar="TOKEN", help='From a member; "-": stdin.')],
    address: Annotated[
        str | None,
        typer.Option("--address", help="HOST:PORT of a member's API; by default by zeroconf."),
    ] = None,
    interface: Annotated[
        list[str] | None,
        typer.Option("--interface", help="Look for members on this own IP address; repeatable."),
    ] = None,
    again: Annotated[
        bool, typer.Option("--again", help="Replace the certificate that the node has.")
    ] = False,
    config: _Config = DEFAULT_CONFIG,
    name: _Name = None,
    listen: _Host = None,
) -> None:
    """Let this node join a cluster, with a token of `ferry cluster token`. As root."""
    from node_agent.cli import joining
    from node_agent.cli.new_config import load_or_make, store_problem, with_store, write_config
    from node_agent.trust import certificates
    from node_agent.trust.join_token import parse_token

    text = typer.get_text_stream("stdin").readline() if join_token == "-" else join_token
    try:
        parsed = parse_token(text)
        addresses = joining.find_members(parsed, address, interface or ())
        loaded, new = load_or_make(
            config, name, lambda: joining.own_host(addresses[0]) if listen is None else listen
        )
        joining.check_free(loaded, again)
        answer = joining.join_any(loaded, parsed, addresses)
        if new:
            loaded = with_store(loaded, answer.store)
            write_config(config, loaded)
            note(f"wrote {config}")
        problem = store_problem(loaded, answer.store)
        joined = certificates.read_certificate(answer.certificate.encode())
        wrong = certificates.why_not_now(joined, time.time())
    except FerryError as error:
        raise refused(error) from error
    show(
        {"cluster": answer.cluster, "node": loaded.node.name, "members": answer.members},
        f"node {loaded.node.name} joined the cluster {answer.cluster}, with "
        f"{', '.join(sorted(answer.members)) or 'nobody else'}\n\nnext: "
        + ("systemctl restart ferry-agent" if again else "systemctl enable --now ferry-agent"),
    )
    if wrong:
        raise CliError(
            f"joined, but nobody accepts the certificate: {wrong}; set the clock that is wrong, "
            "here or on the node that signs, and join once more, with another token and --again"
        )
    if problem:
        raise CliError(f"joined, but the agent can't work with {config} yet: {problem}")


@app.command("show")
def show_cluster() -> None:
    """The cluster and its members, removed ones too."""
    view = settings.client().get("/v1/cluster", ClusterView)
    rows = [
        (
            each.name,
            "removed" if each.removed_at_s is not None else "member",
            "yes" if each.authority else "no",
            each.peer_address,
            moment(each.joined_at_s)[:16],
            _until(each),
        )
        for each in view.members
    ]
    headings = ("NAME", "STATE", "SIGNS", "ADDRESS", "JOINED", "CERTIFICATE UNTIL")
    known: list[tuple[str, str]] = [("cluster", view.name), ("fingerprint", view.fingerprint)]
    if view.authority_expires_at_s is not None:
        known.append(("authority until", moment(view.authority_expires_at_s)[:16]))
    head = facts(known)
    show(view, f"{head}\n\n{table(headings, rows)}")


def _until(member: Member) -> str:
    """When its certificate ends, and whether that is near: it should have been renewed by then."""
    at_s = member.certificate_expires_at_s
    if not at_s:
        return "-"
    left_s = at_s - time.time()
    told = ""
    if member.removed_at_s is None and left_s < ENDS_SOON_S:
        told = " (expired)" if left_s <= 0 else f" ({span_text(left_s)} more)"
    return moment(at_s)[:16] + told
