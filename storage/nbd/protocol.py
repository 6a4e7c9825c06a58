"""What a node asks a provisioner, and what that answers. Values and bytes only.

    provisioner ── {"nonce": ...} ──────────────────► node
    node ───────── {"body": "{...}", "mac": ...} ───► provisioner       a request
    provisioner ── {"body": "{...}", "mac": ...} ───► node              its answer; then it hangs up

One line of JSON each. Where the pool has a key, each side proves by the MAC (HMAC-SHA256 over the
nonce, its direction and the body) that it has it too, so nobody else can ask, repeat or answer. The
bodies hold no secret. A hook gets a request's body on its standard input and prints an answer's.
"""

from __future__ import annotations

import hmac
from pathlib import Path
from typing import Any, Final

import msgspec

from migrator.errors import StorageError
from migrator.model import PoolHealth, PoolOwner, VolumeInfo

LINE_BYTES_MAX: Final = 8 * 1024 * 1024
"""A listing of some ten thousand volumes."""
PORT: Final = 10808
NOT_A_REQUEST: Final = "not a request"
"""How a provisioner's words begin about what it doesn't know, a newer node's request maybe."""


class Request(msgspec.Struct, frozen=True, kw_only=True, tag_field="op"):
    """Base of all requests. Every one may be repeated."""


class TryOut(Request, frozen=True, kw_only=True, tag="health"):
    """-> health"""


class Mark(Request, frozen=True, kw_only=True, tag="mark"):
    """-> mark. Older provisioners, and hooks, may not know it."""


class Owner(Request, frozen=True, kw_only=True, tag="owner"):
    """-> owner: the cluster whose pool it is. Hooks and older provisioners may not know it.

    `claimant` is written down where nobody is, and in the place of the one whose identity is
    `instead_of`.
    """

    claimant: PoolOwner | None = None
    instead_of: str | None = None


class ListVolumes(Request, frozen=True, kw_only=True, tag="list"):
    """-> volumes"""


class Inspect(Request, frozen=True, kw_only=True, tag="inspect"):
    """-> volumes: the one"""

    volume: str


class Create(Request, frozen=True, kw_only=True, tag="create"):
    """-> volumes: the one. With `draft`: -> export and draft, to be filled, then published."""

    volume: str
    capacity_bytes: int
    draft: bool = False


class Publish(Request, frozen=True, kw_only=True, tag="publish"):
    """-> volumes: the one that the draft has become"""

    volume: str
    draft: str


class Discard(Request, frozen=True, kw_only=True, tag="discard"):
    """A draft."""

    draft: str


class Delete(Request, frozen=True, kw_only=True, tag="delete"):
    volume: str


class Resize(Request, frozen=True, kw_only=True, tag="resize"):
    """-> volumes: the one"""

    volume: str
    capacity_bytes: int


class Clone(Request, frozen=True, kw_only=True, tag="clone"):
    """-> volumes: the new one. Whoever hangs up before the answer gets no copy.

    A conflict while a node has the volume for writing, or if one opens it meanwhile, which isn't to
    wait for the copy.
    """

    volume: str
    new: str


class Open(Request, frozen=True, kw_only=True, tag="open"):
    """-> export: one that is this node's under this token alone"""

    volume: str
    node: str
    token: int
    read_only: bool


class Close(Request, frozen=True, kw_only=True, tag="close"):
    """End the node's exports of this token and older ones."""

    volume: str
    node: str
    token: int


class Fence(Request, frozen=True, kw_only=True, tag="fence"):
    """End every writing export but the node's newest, and answer when they are gone."""

    volume: str
    node: str
    token: int


class Evict(Request, frozen=True, kw_only=True, tag="evict"):
    """What nodes other than these have to read ends for good: they were removed from the cluster.

    Older provisioners, and hooks, may not know it.
    """

    volume: str
    members: tuple[str, ...]


class Verify(Request, frozen=True, kw_only=True, tag="verify"):
    """-> token, openings, and what is down"""

    volume: str


AnyRequest = (
    TryOut
    | Mark
    | Owner
    | ListVolumes
    | Inspect
    | Create
    | Publish
    | Discard
    | Delete
    | Resize
    | Clone
    | Evict
    | Open
    | Close
    | Fence
    | Verify
)


class ExportPlace(msgspec.Struct, frozen=True, kw_only=True):
    """Where an export is. `host` None: where the provisioner is."""

    name: str
    port: int
    host: str | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """A `FerryError`, as it travels."""

    code: str
    message: str
    fields: dict[str, str] = {}


class Answer(msgspec.Struct, frozen=True, kw_only=True, omit_defaults=True):
    """What belongs to the request is there; with `failure` nothing was changed."""

    failure: Failure | None = None
    health: PoolHealth | None = None
    volumes: tuple[VolumeInfo, ...] = ()
    export: ExportPlace | None = None
    draft: str | None = None
    token: int = 0
    mark: str | None = None
    owner: PoolOwner | None = None
    openings: tuple[tuple[str, int], ...] | None = None
    """Node and token of each export that may write; None: an older provisioner doesn't say."""
    down: tuple[tuple[str, int], ...] = ()
    """Node and token of each export that should be there and isn't; it is tried again."""
    why_down: str = ""
    """Of the last try; "": there was none yet."""


class Greeting(msgspec.Struct, frozen=True, kw_only=True):
    nonce: str


class Signed(msgspec.Struct, frozen=True, kw_only=True):
    """A request or an answer, as JSON text, with its MAC where the pool has a key."""

    body: str
    mac: str = ""


TO_PROVISIONER: Final = "request"
TO_NODE: Final = "answer"

_requests: Final[msgspec.json.Decoder[Any]] = msgspec.json.Decoder(AnyRequest)


def parse_request(body: str | bytes) -> Request:
    """msgspec.DecodeError if it is none."""
    request: Request = _requests.decode(body)
    return request


def signed(value: msgspec.Struct, direction: str, nonce: str, key: bytes | None) -> bytes:
    """One line."""
    body = msgspec.json.encode(value).decode()
    message = Signed(body=body, mac=_mac(body, direction, nonce, key))
    return msgspec.json.encode(message) + b"\n"


def checked(line: bytes, direction: str, nonce: str, key: bytes | None) -> str:
    """The body. StorageError: no such line, or its MAC is wrong."""
    try:
        message = msgspec.json.decode(line, type=Signed)
    except msgspec.DecodeError as error:
        raise StorageError(f"what came is no {direction}: {error}") from error
    if not hmac.compare_digest(message.mac, _mac(message.body, direction, nonce, key)):
        raise StorageError(f"the {direction} isn't signed with this pool's key")
    return message.body


def _mac(body: str, direction: str, nonce: str, key: bytes | None) -> str:
    if key is None:
        return ""
    return hmac.digest(key, f"{nonce}\n{direction}\n{body}".encode(), "sha256").hex()


def read_key(directory: Path, username: str) -> bytes:
    """The user's key in a folder's keys.psk. StorageError names the file, never what it holds."""
    path = directory / "keys.psk"
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"the keys in {path} can't be read ({type(error).__name__})") from error
    for line in lines:
        user, _, key = line.partition(":")
        if user == username:
            try:
                return bytes.fromhex(key.strip())
            except ValueError:
                raise StorageError(f"{path}: the key of {username} is not hexadecimal") from None
    raise StorageError(f"{path} has no key of {username}")
