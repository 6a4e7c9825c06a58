"""`ferry hook ...`"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import quote

import msgspec
import typer

from migrator.errors import words
from node_agent.cli.errors import CliError, ExitCode
from node_agent.cli.output import facts, note, settings, show, table
from node_agent.hooks.model import (
    DEADLINE_S_MAX,
    CommandHook,
    HaproxyAway,
    HaproxyHook,
    HookFailure,
    HookList,
    HookPoint,
    HookSpec,
    HookTest,
    HookTestResult,
    WebhookHook,
)
from node_agent.pressure.policy import PressureAnswer, PressureKind, PressureReport

app = typer.Typer(
    help="Hooks: load balancers and others are told, asked and waited for around each move.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

_NameArgument = Annotated[str, typer.Argument(metavar="NAME", help="The hook.")]


@app.command()
def add(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="Its name.")] = None,
    file: Annotated[
        Path | None, typer.Option("-f", "--file", help="The whole hook as JSON; - for stdin.")
    ] = None,
    point: Annotated[
        list[HookPoint] | None, typer.Option("--point", help="When; repeatable.")
    ] = None,
    haproxy: Annotated[
        str | None, typer.Option(metavar="SOCKET", help="HAProxy: unix:/PATH or HOST:PORT.")
    ] = None,
    backend: Annotated[str | None, typer.Option(help="HAProxy: the backend.")] = None,
    server: Annotated[
        str, typer.Option(help="HAProxy: the server; {domain} and {node} are filled in.")
    ] = "{domain}",
    away: Annotated[
        HaproxyAway, typer.Option(help="HAProxy: what it becomes during the move.")
    ] = HaproxyAway.DRAIN,
    weight: Annotated[
        int, typer.Option(min=0, max=100, help="HAProxy: percent, with --away weight.")
    ] = 10,
    sessions_below: Annotated[
        int | None, typer.Option(min=1, help="HAProxy: wait until it has fewer sessions.")
    ] = None,
    webhook: Annotated[str | None, typer.Option(metavar="URL", help="POST to this URL.")] = None,
    secret_file: Annotated[
        Path | None, typer.Option(help="Webhook: the key that its signature is made with.")
    ] = None,
    command: Annotated[
        list[str] | None,
        typer.Option("--command", help="Run this program; repeat it for each argument."),
    ] = None,
    domain: Annotated[
        list[str] | None, typer.Option("--domain", help="Only for this domain; repeatable.")
    ] = None,
    label: Annotated[
        str | None, typer.Option(metavar="KEY=VALUE", help="Only for domains with this label.")
    ] = None,
    deadline: Annotated[
        float, typer.Option(min=0.1, max=DEADLINE_S_MAX, help="Seconds that it may take.")
    ] = 30.0,
    on_failure: Annotated[
        HookFailure, typer.Option(help="When it fails: go on, or cancel what it was asked about.")
    ] = HookFailure.GO_ON,
) -> None:
    """Add a hook: to HAProxy, a webhook, or a program (`--file` takes all of them as JSON)."""
    if file is not None:
        body = _load(file)
        if name is not None:
            body["name"] = name
    else:
        actions = [each for each in (haproxy, webhook, command) if each]
        if name is None or not point or len(actions) != 1:
            raise CliError(
                "give a name, at least one --point, and one of --haproxy, --webhook, --command; "
                "or a file (-f)",
                ExitCode.USAGE,
            )
        body = {
            "name": name,
            "points": point,
            "domains": domain or [],
            "label": label,
            "deadline_s": deadline,
            "on_failure": on_failure,
        }
        if haproxy is not None:
            body["action"] = {
                "driver": "haproxy",
                "address": haproxy,
                "backend": backend or "",
                "server": server,
                "away": away,
                "weight_percent": weight,
                "sessions_below": sessions_below,
            }
        elif webhook is not None:
            body["action"] = {"driver": "webhook", "url": webhook, "secret": _secret(secret_file)}
        else:
            body["action"] = {"driver": "command", "argv": command or []}
    hook = settings.client().post("/v1/hooks", HookSpec, body)
    show(hook, f"hook {hook.name} is added; `ferry hook test {hook.name}` tries it")


@app.command("ls")
def list_hooks() -> None:
    """All hooks."""
    hooks = settings.client().get("/v1/hooks", HookList).hooks
    rows = [
        (
            hook.name,
            _action(hook),
            ", ".join(hook.points),
            _scope(hook),
            f"{hook.deadline_s:g} s",
            hook.on_failure.value,
        )
        for hook in hooks
    ]
    show(hooks, table(("NAME", "ACTION", "WHEN", "FOR", "DEADLINE", "ON FAILURE"), rows))


@app.command("show")
def show_hook(name: _NameArgument) -> None:
    """One hook; its secret is not shown."""
    hook = settings.client().get(_path(name), HookSpec)
    given: dict[str, Any] = msgspec.to_builtins(hook.action)
    pairs = [
        ("name", hook.name),
        ("when", ", ".join(hook.points)),
        ("for", _scope(hook)),
        ("deadline", f"{hook.deadline_s:g} s"),
        ("on failure", hook.on_failure.value),
        *((key, str(value)) for key, value in given.items() if value not in (None, "", {})),
    ]
    show(hook, facts(pairs))


@app.command("rm")
def remove(name: _NameArgument) -> None:
    """Remove a hook. What it took out of a load balancer stays out."""
    settings.client().delete(_path(name))
    show({"deleted": name}, f"hook {name} is removed")


@app.command()
def test(
    name: _NameArgument,
    point: Annotated[
        list[HookPoint] | None,
        typer.Option(
            "--point", help="As if this moment had come; repeatable. [default: each that it has]"
        ),
    ] = None,
    domain: Annotated[str | None, typer.Option(help="For this domain.")] = None,
    node: Annotated[str | None, typer.Option(help="For this node; default: the agent's.")] = None,
) -> None:
    """Really run a hook, once for each of its moments. Exit status 1 if it fails at one."""
    client = settings.client()
    points = point
    if not points:  # As they come in a move: what is taken out before is put back after.
        points = sorted(client.get(_path(name), HookSpec).points, key=list(HookPoint).index)
    results = []
    for each in points:
        body = HookTest(point=each, domain=domain, node=node)
        result = client.post(
            f"{_path(name)}/test", HookTestResult, body, timeout_s=2 * DEADLINE_S_MAX
        ).result
        results.append(result)
        word = "succeeded" if result.succeeded else "FAILED"
        if not settings.json:
            note(f"hook {name} {each} {word} in {result.seconds:.2f} s: {result.detail}")
    if settings.json:
        show(results[0] if point and len(point) == 1 else results, "")
    if not all(result.succeeded for result in results):
        raise typer.Exit(ExitCode.FAILED)


@app.command()
def pressure(
    level: Annotated[
        float, typer.Option("--level", min=0, help="Load over capacity: 1.0 is all there is.")
    ],
    domain: Annotated[str | None, typer.Option(help="This domain needs more room.")] = None,
    node: Annotated[str | None, typer.Option(help="This node has too much to do.")] = None,
    kind: Annotated[PressureKind, typer.Option(help="Of what.")] = PressureKind.CPU,
    apply: Annotated[
        bool, typer.Option("--apply", help="Move, once it is due; else only propose.")
    ] = False,
    source: Annotated[str, typer.Option(help="Who says so, for the event log.")] = "",
) -> None:
    """Report pressure, as a load balancer or an alert would; it has to last to count."""
    report = PressureReport(
        domain=domain, node=node, kind=kind, level=level, apply=apply, source=source
    )
    answer = settings.client().post("/v1/hooks/pressure", PressureAnswer, report)
    move = f"{answer.domain}: {answer.source} -> {answer.destination}; " if answer.domain else ""
    show(answer, f"{answer.standing}: {move}{answer.reason}")


def _path(name: str) -> str:
    return f"/v1/hooks/{quote(name, safe='')}"


def _action(hook: HookSpec) -> str:
    match hook.action:
        case HaproxyHook():
            return f"haproxy {hook.action.backend}/{hook.action.server}"
        case WebhookHook():
            return f"webhook {hook.action.url}"
        case CommandHook():
            return f"command {hook.action.argv[0]}"


def _scope(hook: HookSpec) -> str:
    parts = [*hook.domains, *([hook.label] if hook.label else [])]
    return ", ".join(parts) or "the cluster"


def _load(path: Path) -> dict[str, Any]:
    try:
        text = sys.stdin.read() if str(path) == "-" else path.read_text(encoding="utf-8")
        values = json.loads(text)
    except (OSError, ValueError) as error:
        raise CliError(f"{path} can't be read as JSON: {error}", ExitCode.USAGE) from error
    if not isinstance(values, dict):
        raise CliError(f"{path} must hold one hook, a JSON object", ExitCode.USAGE)
    return values


def _secret(path: Path | None) -> str:
    if path is None:
        return ""
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CliError(f"{path} can't be read: {words(error)}", ExitCode.USAGE) from error
