"""Every error that Ferry raises on purpose, as one tree.

    FerryError
    ├── InvalidRequest          the caller's fault: a field is wrong; names each one
    │   └── RefusedError        valid, but refused before anything moved; carries all reasons
    │       └── NoSuchNodeError it names a node that there isn't; that is one of the reasons
    ├── UnauthenticatedError    nobody knows who asks: no token, or a wrong, old or revoked one
    ├── ForbiddenError          it is known who asks, and that they may not
    ├── NotFoundError           no such domain, node, migration, volume
    ├── ConflictError           the object's state forbids it, or somebody else was faster
    │   └── WrongStateError     a call in the wrong state; says actual and required
    ├── ProtocolError           a peer or engine sent something that we don't accept
    │   ├── LocalProtocolError  our own side broke the protocol: a bug
    │   └── RemoteProtocolError the other side did
    ├── PeerError               another agent can't be reached, or answered too late
    ├── HypervisorError         the hypervisor refused, failed or died
    │   └── NotResumedError     a resume that is certain to have run no vCPU
    ├── StorageError            a volume or pool operation failed
    │   ├── FenceError          a fence could not be set or confirmed
    │   └── TooLargeError       the storage takes no volume of that size, however empty it is
    ├── FabricError             a tap, bridge or announcement failed
    ├── EngineError             the page engine failed
    ├── StoreError              the cluster's state store can't be used now
    ├── NoThreadError           no thread is left to do it in; nothing was begun
    └── ConfigError             the configuration is wrong; names the key

Each error says in its message whose fault it is and what was left as it was. `code` is the
stable, machine-readable name that the HTTP API and the agents' protocol carry.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Sequence
from typing import ClassVar


def words(error: Exception) -> str:
    """Why, in words, for a sentence that names the file or address: "Connection refused".

    Of an error of the kernel's neither its number nor what the library adds to it.
    """
    # Name resolution, TLS and others have numbers of their own.
    if isinstance(error, OSError) and type(error).__module__ == "builtins":
        number = error.errno
        if number is not None and number in errno.errorcode:
            return os.strerror(number)
    if type(error).__name__ == "SSLEOFError":  # By name: nothing here needs ssl.
        return "the other end is gone, without a word"
    named = type(error).__name__ == "gaierror" or getattr(error, "filename", None) is not None
    if isinstance(error, OSError) and error.strerror and named:
        return error.strerror  # Of name resolution, and libnfs's: the sentence names the path.
    return str(error) or type(error).__name__


class FerryError(Exception):
    """Root of the tree. `str(error)` is one sentence for an operator."""

    code: ClassVar[str] = "internal"
    http_status: ClassVar[int] = 500


class InvalidRequest(FerryError):
    """The request is wrong. `fields` maps each wrong field's path to what would be right."""

    code = "invalid-request"
    http_status = 400

    def __init__(self, message: str, fields: dict[str, str] | None = None) -> None:
        super().__init__(message)
        self.fields = dict(fields or {})


class RefusedError(InvalidRequest):
    """A well-formed request that can't be carried out. Nothing was changed. All reasons at once."""

    code = "refused"
    http_status = 409

    def __init__(
        self, message: str, reasons: Sequence[str], fields: dict[str, str] | None = None
    ) -> None:
        """`fields`: of the object's definition, where the refusal is about some of them."""
        super().__init__(message, fields)
        self.reasons = tuple(reasons)


class NoSuchNodeError(RefusedError):
    """One of the reasons, which nothing but another name mends: there is no such node."""

    code = "no-such-node"
    http_status = 404


class UnauthenticatedError(FerryError):
    code = "unauthenticated"
    http_status = 401


class ForbiddenError(FerryError):
    code = "forbidden"
    http_status = 403


class NotFoundError(FerryError):
    code = "not-found"
    http_status = 404


class ConflictError(FerryError):
    code = "conflict"
    http_status = 409


class WrongStateError(ConflictError):
    """A call in the wrong state. Nothing was changed."""

    code = "wrong-state"

    def __init__(self, what: str, actual: str, required: str, sentence: str = "") -> None:
        """`sentence`: instead of the usual one, where there is more to say than the two states."""
        super().__init__(sentence or f"{what}: the state is {actual}, it must be {required}")
        self.actual = actual
        self.required = required


class ProtocolError(FerryError):
    code = "protocol"
    http_status = 502


class LocalProtocolError(ProtocolError):
    code = "protocol-local"


class RemoteProtocolError(ProtocolError):
    code = "protocol-remote"


class PeerError(FerryError):
    code = "peer-unreachable"
    http_status = 502


class HypervisorError(FerryError):
    code = "hypervisor"


class NotResumedError(HypervisorError):
    """It is certain that no vCPU ran by this resume: `cont` wasn't sent, was refused, or the
    hypervisor's process died before it took effect. What memory it had is as it was before.
    """

    code = "hypervisor-not-resumed"


class StorageError(FerryError):
    code = "storage"


class FenceError(StorageError):
    code = "fence"


class TooLargeError(StorageError):
    code = "too-large"


class FabricError(FerryError):
    code = "fabric"


class EngineError(FerryError):
    code = "engine"


class StoreError(FerryError):
    code = "store-unavailable"
    http_status = 503


class NoThreadError(FerryError, OSError):
    """The host, or the limit of the agent's control group, has none left. Nothing was begun.

    An OSError as well: what a full process table, or memory that is gone, else raises.
    """

    code = "no-thread"
    http_status = 503


class ConfigError(FerryError):
    code = "config"


class RemovedError(ConfigError):
    """This node was removed from the cluster: nothing brings it back but joining again."""

    code = "removed-node"


def _tree(root: type[FerryError]) -> dict[str, type[FerryError]]:
    found = {root.code: root}
    for child in root.__subclasses__():
        found.update(_tree(child))
    return found


BY_CODE: dict[str, type[FerryError]] = _tree(FerryError)


def from_code(code: str, message: str, details: Sequence[str] = ()) -> FerryError:
    """Rebuild an error that crossed the wire. An unknown code becomes the root type."""
    kind = BY_CODE.get(code, FerryError)
    if issubclass(kind, RefusedError):
        return kind(message, tuple(details))
    if issubclass(kind, WrongStateError):
        return ConflictError(message)
    return kind(message)
