"""`ferry user`: who may use the API over the network, and with which tokens."""

from __future__ import annotations

import time
from typing import Annotated
from urllib.parse import quote

import typer

from node_agent.cli.client import ApiClient
from node_agent.cli.errors import ApiProblem, CliError, ExitCode
from node_agent.cli.output import aside, moment, settings, show, table
from node_agent.cli.trust import parse_duration
from node_agent.resources import NodeList
from node_agent.trust.records import (
    ApiTokenCreate,
    ApiTokenMade,
    ApiTokenView,
    AuthorityView,
    Role,
    User,
    UserChange,
    UserCreate,
    UserList,
    token_end,
)

app = typer.Typer(help="Users of the API.", no_args_is_help=True, rich_markup_mode=None)

_Name = Annotated[str, typer.Argument(help="The user.")]
_Ttl = Annotated[
    str | None, typer.Option("--ttl", help="How long the token holds: 8h, 90d. Without: for ever.")
]
_Label = Annotated[str, typer.Option("--label", help="What the token is for.")]


@app.command("add")
def add(
    name: _Name,
    role: Annotated[
        Role, typer.Option("--role", help="viewer: look; operator: run, migrate; admin: all.")
    ] = Role.VIEWER,
    label: _Label = "",
    ttl: _Ttl = None,
) -> None:
    """Add a user and print the first token, which is shown this once."""
    client, wanted = settings.client(), _token(label, ttl)
    client.post("/v1/users", User, UserCreate(name=name, role=role))
    try:
        made = _issue(client, name, wanted)
    except ApiProblem:
        client.delete(_path(name))
        raise
    _print_token(client, made)


@app.command("ls")
def list_users() -> None:
    """All users and their tokens."""
    users = settings.client().get("/v1/users", UserList).users
    rows = []
    for user in users:
        rows += [
            (
                user.name,
                user.role.value,
                token.id,
                token.label or "-",
                moment(token.created_at_s)[:16],
                _until(token),
            )
            for token in user.tokens
        ] or [(user.name, user.role.value, "-", "-", "-", "-")]
    show(users, table(("NAME", "ROLE", "TOKEN", "LABEL", "MADE", "EXPIRES"), rows))


@app.command("token")
def token(
    name: _Name,
    label: _Label = "",
    ttl: _Ttl = None,
    remove: Annotated[
        str | None, typer.Option("--rm", help="Remove this token instead of making one.")
    ] = None,
) -> None:
    """Make another token of a user, shown this once, or remove one."""
    client = settings.client()
    if remove is None:
        _print_token(client, _issue(client, name, _token(label, ttl)))
        return
    client.delete(f"{_path(name)}/tokens/{quote(remove, safe='')}")
    show({"removed": remove}, f"token {remove} of user {name} is removed")


@app.command("role")
def change_role(
    name: _Name,
    role: Annotated[Role, typer.Argument(help="viewer: look; operator: run, migrate; admin: all.")],
) -> None:
    """Change a user's role. The tokens stay, and may what it says from the next request on."""
    user = settings.client().patch(_path(name), User, UserChange(role=role))
    show(user, f"user {name} has the role {user.role}")


@app.command("rm")
def remove_user(name: _Name) -> None:
    """Remove a user, with all tokens."""
    settings.client().delete(_path(name))
    show({"removed": name}, f"user {name} is removed")


def _until(token: ApiTokenView) -> str:
    if token.expires_at_s is None:
        return "never"
    end = token_end(token.created_at_s, token.expires_at_s, time.time())
    return moment(token.expires_at_s)[:16] + (f" ({end.value})" if end.value else "")


def _token(label: str, ttl: str | None) -> ApiTokenCreate:
    return ApiTokenCreate(label=label, ttl_s=None if ttl is None else parse_duration(ttl))


def _issue(client: ApiClient, name: str, wanted: ApiTokenCreate) -> ApiTokenMade:
    return client.post(f"{_path(name)}/tokens", ApiTokenMade, wanted)


def _print_token(client: ApiClient, made: ApiTokenMade) -> None:
    """The token alone on stdout; how to use it on stderr."""
    authority = client.get("/v1/cluster/authority", AuthorityView)
    nodes = client.get("/v1/nodes", NodeList).nodes
    if not nodes:
        raise CliError("the cluster has no nodes", ExitCode.FAILED)
    server = next((each.api_address for each in nodes if each.name == authority.node), "HOST:7780")
    aside(
        f"for {made.user}: ferry context add {authority.cluster} --server {server} "
        f"--fingerprint {authority.fingerprint} --token TOKEN"
    )
    show(made, made.token)


def _path(name: str) -> str:
    return f"/v1/users/{quote(name, safe='')}"
