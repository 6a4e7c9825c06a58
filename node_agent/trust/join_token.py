"""The join token: lets one node into the cluster, once. Pure.

    ferry1-BASE64URL( id (8) | seed of an Ed25519 key (32) | fingerprint of the authority (32) )

The cluster's store keeps the token's public key, never the seed. A joining node proves that it has
the token by a signature over its name, its addresses and its signing request. So the seed never
travels, who passes the request on can't turn it to another key, and what is in the store or on the
wire lets nobody in.
"""

from __future__ import annotations

import base64
import binascii
import secrets
from typing import Final

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import (
    Ed25519PrivateKey,
    Ed25519PublicKey,
)

from migrator.errors import InvalidRequest
from migrator.ports import Struct

PREFIX: Final = "ferry1-"
_ID_BYTES: Final = 8
_SEED_BYTES: Final = 32
_FINGERPRINT_BYTES: Final = 32
_DOMAIN: Final = b"ferry join 1"


class JoinToken(Struct, frozen=True, kw_only=True):
    """See the module. Whoever has it can join until it is used or expires."""

    id: str
    """Hexadecimal; not secret."""
    seed: bytes
    fingerprint: bytes

    def __repr__(self) -> str:
        return f"JoinToken(id={self.id!r})"

    @property
    def public_key(self) -> bytes:
        """32 bytes: what the store keeps."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).public_key().public_bytes_raw()

    def prove(self, statement: bytes) -> bytes:
        """The signature (64 bytes) of a `statement`."""
        return Ed25519PrivateKey.from_private_bytes(self.seed).sign(statement)


def make_token(fingerprint: bytes) -> JoinToken:
    """A fresh token of the cluster with this fingerprint."""
    return JoinToken(
        id=secrets.token_hex(_ID_BYTES),
        seed=secrets.token_bytes(_SEED_BYTES),
        fingerprint=fingerprint,
    )


def format_token(token: JoinToken) -> str:
    """What an operator carries to the new node."""
    raw = bytes.fromhex(token.id) + token.seed + token.fingerprint
    return PREFIX + base64.urlsafe_b64encode(raw).decode().rstrip("=")


def parse_token(text: str) -> JoinToken:
    """The inverse of `format_token`. InvalidRequest: it's damaged, or no join token."""
    wrong = "this is not a join token; `ferry cluster token` on a member prints one"
    text = text.strip()
    if not text.startswith(PREFIX):
        raise InvalidRequest(wrong, {"token": f"begins with {PREFIX}"})
    encoded = text.removeprefix(PREFIX)
    try:
        raw = base64.b64decode(encoded + "=" * (-len(encoded) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raw = b""
    if len(raw) != _ID_BYTES + _SEED_BYTES + _FINGERPRINT_BYTES:
        raise InvalidRequest(f"{wrong} (this one is damaged)", {"token": "copied as a whole"})
    return JoinToken(
        id=raw[:_ID_BYTES].hex(),
        seed=raw[_ID_BYTES : _ID_BYTES + _SEED_BYTES],
        fingerprint=raw[_ID_BYTES + _SEED_BYTES :],
    )


def statement(
    token_id: str, node: str, peer_address: str, api_address: str, request_der: bytes
) -> bytes:
    """What a joining node signs with its token."""
    parts = [token_id.encode(), node.encode(), peer_address.encode(), api_address.encode()]
    return b"\0".join([_DOMAIN, *parts, request_der])


def is_proof(public_key: bytes, signature: bytes, signed: bytes) -> bool:
    """Whether `signature` was made with the token that has this public key."""
    try:
        Ed25519PublicKey.from_public_bytes(public_key).verify(signature, signed)
    except (InvalidSignature, ValueError):
        return False
    return True
