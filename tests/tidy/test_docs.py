"""What the pages name is there: files, headings, commands, options, events, metrics, paths.

Every `ferry ...` is looked up in the command line itself. In a block of code it is parsed whole, so
that an argument that it lacks, or doesn't know, is found; in a sentence only its words are.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from typing import Any

import pytest
from typer.main import get_command

from node_agent.api.routes import ROUTES
from node_agent.cli import main
from node_agent.events import EventKind
from tests.tidy.test_imports import PACKAGES, ROOT, modules

PAGES = sorted(
    path.relative_to(ROOT).as_posix()
    for path in (*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"))
)
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
CODE = re.compile(r"`([^`]+)`")
DRAWN = re.compile(r"[─►◄│═▼▲└┘┌┐├┤]")
WORD = re.compile(r"[a-z][a-z-]*")
PAGE = re.compile(r"(?:docs/)?[A-Za-z-]+\.md")
SECTION = re.compile(rf'({PAGE.pattern}),\s+"([^"]+)"')
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
HEADING = re.compile(r"^#+ (.+)$", re.MULTILINE)
SOURCE = re.compile(r"^[\w/.-]+\.(?:py|c|h|sh)$")
METRIC = re.compile(r"\bferry_[a-z_]+\b")
ROUTE = re.compile(r"/v1/[A-Za-z0-9/_-]+")
ANYWHERE = ("--api", "--context", "--lab", "--json")
PUNCTUATION = frozenset("();<>|&")


def text_of(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf-8")


def prose_of(page: str) -> str:
    """Without its blocks of code."""
    return FENCE.sub("", text_of(page))


def headings_of(page: str) -> list[str]:
    return [found.replace("`", "") for found in HEADING.findall(prose_of(page))]


def anchor_of(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")


# --- files and headings ----------------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_links_lead_somewhere(page: str) -> None:
    for target in LINK.findall(prose_of(page)):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = (ROOT / page).parent / name if name else ROOT / page
        assert path.exists(), target
        if anchor:
            there = path.resolve().relative_to(ROOT).as_posix()
            assert anchor in map(anchor_of, headings_of(there)), target


@pytest.mark.parametrize("page", PAGES)
def test_other_pages_and_their_sections_are_there(page: str) -> None:
    text = text_of(page)
    for name in PAGE.findall(text):
        assert (ROOT / name).exists() or (ROOT / "docs" / name).exists(), name
    for name, section in SECTION.findall(text):
        there = name if (ROOT / name).exists() else f"docs/{name}"
        assert " ".join(section.split()) in headings_of(there), (name, section)


@pytest.mark.parametrize("path", modules(*(name for name in PACKAGES if name != "tests")))
def test_pages_that_the_code_names_are_there(path: str) -> None:
    for name in re.findall(r"docs/[a-z-]+\.md", text_of(path)):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize("page", PAGES)
def test_source_files_are_there(page: str) -> None:
    files = [
        f"/{path.relative_to(ROOT).as_posix()}"
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
    ]
    for name in filter(SOURCE.match, CODE.findall(prose_of(page))):
        assert any(path.endswith(f"/{name}") for path in files), name


# --- commands --------------------------------------------------------------------------------


def leaf_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that `words` lead to, or the group; and what is left of them."""
    command: Any = get_command(main.build_app(words[0]))
    rest = list(words)
    while hasattr(command, "commands") and rest and WORD.fullmatch(rest[0]):
        assert rest[0] in command.commands, f"{rest[0]} is none of {', '.join(command.commands)}"
        command = command.commands[rest.pop(0)]
    return command, rest


def commands_in(line: str) -> Iterator[list[str]]:
    """The arguments of each `ferry` in a line of shell."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    found: list[str] | None = None
    for word in [*lexer, ";"]:
        if set(word) <= PUNCTUATION:
            if found:
                yield found
            found = None
        elif found is not None:
            found.append(word)
        elif word == "ferry":
            found = []


def typed_commands(page: str) -> list[list[str]]:
    """In its blocks of shell: those without a language that are no picture."""
    found = []
    for language, block in FENCE.findall(text_of(page)):
        if language or DRAWN.search(block):
            continue
        for line in block.replace("\\\n", " ").splitlines():
            if re.search(r"\bferry (-|[a-z])", line):
                found += list(commands_in(line))
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_can_be_typed(page: str) -> None:
    for arguments in typed_commands(page):
        words = main.take_settings(arguments)
        if words[-1:] == ["..."]:  # And so on.
            words.pop()
        if not words or words[0].startswith("-"):
            continue
        command, rest = leaf_of(words)
        if hasattr(command, "commands") and not rest:
            continue
        try:
            command.make_context(command.name, rest)
        except Exception as error:
            said = getattr(error, "message", None) or error
            pytest.fail(f"ferry {' '.join(arguments)}: {said}")


def named_commands(page: str) -> list[list[str]]:
    """In its sentences: `ferry hook add|rm` is two."""
    found = []
    for code in CODE.findall(prose_of(page)):
        words = code.replace("[", "").replace("]", "").split()
        if words[0] != "ferry" or not words[1:]:
            continue
        words = [word for word in words[1:] if word.partition("=")[0] not in ANYWHERE]
        each: list[list[str]] = [[]]
        for index, word in enumerate(words):
            choices = word.split("|") if index < 2 and WORD.fullmatch(word[:1]) else [word]
            each = [[*before, choice] for before in each for choice in choices]
        found += each
    return found


@pytest.mark.parametrize("page", PAGES)
def test_commands_in_sentences_are_known(page: str) -> None:
    for words in named_commands(page):
        if not WORD.fullmatch(words[0]):
            continue
        command, rest = leaf_of(words)
        known = {"--help"}
        for each in command.params:
            known |= {*each.opts, *each.secondary_opts}
        for word in rest:
            if word == "--":
                break
            if word.startswith("--"):
                name = word.partition("=")[0].rstrip(",;:.")
                assert name in known, f"ferry {' '.join(words)}: {name} is none of {sorted(known)}"


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        ("ferry node ls      # n1's", [["node", "ls"]]),
        ("for d in $(ferry domain ls | awk '$3'); do ferry domain stop $d; done",
         [["domain", "ls"], ["domain", "stop", "$d"]]),
        ("ferry cluster token | ssh n2 ferry cluster join -",
         [["cluster", "token"], ["cluster", "join", "-"]]),
        ("ls /var/lib/ferry", []),
    ],
)  # fmt: skip
def test_commands_are_found(line: str, commands: list[list[str]]) -> None:
    assert list(commands_in(line)) == commands


# --- the API, events, metrics ----------------------------------------------------------------


@pytest.mark.parametrize("page", PAGES)
def test_paths_of_the_api_are_served(page: str) -> None:
    known = [re.sub(r"\{\w+\}", "[^/]+", route.path) for route in ROUTES]
    for path in ROUTE.findall(text_of(page)):
        assert any(re.fullmatch(each, path) for each in known), path


@pytest.mark.parametrize("page", PAGES)
def test_metrics_are_told(page: str) -> None:
    told = set(METRIC.findall(text_of("node_agent/metrics.py")))
    assert set(METRIC.findall(text_of(page))) <= told


def test_events_worth_an_alarm_are_told() -> None:
    _, _, rest = text_of("docs/bad-day.md").partition("\n## Worth an alarm\n")
    rows = [row for row in rest.partition("\n## ")[0].splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in CODE.findall(row.split("|")[1])}
    assert named and named <= {kind.value for kind in EventKind}
