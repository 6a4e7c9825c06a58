"""Mutual TLS 1.3 between nodes: the agents' protocol and the engines' page streams.

A node's certificate is signed by the cluster's authority and names the node as a DNS name in its
subject alternative name (a node's name is a valid DNS label). Both ends check the other's chain;
the end that dials also checks the name, by `server_hostname`. The end that listens asks
`peer_node(...)` after the handshake whom it speaks to.

The files are read when a context is made, so that a renewed certificate needs no restart: make one
for each connection, dialled or accepted.
"""

from __future__ import annotations

import enum
import ssl
from pathlib import Path
from typing import Final, Protocol

from migrator.errors import ConfigError, RemoteProtocolError
from migrator.model import NodeName
from migrator.struct import Struct


class TlsFiles(Struct, frozen=True, kw_only=True):
    """Absolute paths of PEM files of one node."""

    authority_path: str
    """Certificates of the authorities that are trusted."""
    certificate_path: str
    """This node's certificate, with its intermediates if it has any."""
    key_path: str
    """Its private key, unencrypted, readable by root alone."""


class TlsMode(enum.StrEnum):
    """What a node's configuration says of the connections between nodes (`tls.mode`)."""

    AUTO = "auto"
    """TLS where the node has its files, plain where it has none."""
    REQUIRED = "required"
    PLAIN = "plain"


def files_of_node(state_directory: Path, mode: TlsMode = TlsMode.AUTO) -> TlsFiles | None:
    """The node's files, STATE_DIRECTORY/tls/{authority,certificate,key}.pem; None: go plain.

    Looks each time, for a node may join a cluster while its agent runs. ConfigError if a file is
    missing and `mode` requires it, or others are there: half of them is no reason to go plain.
    """
    if mode is TlsMode.PLAIN:
        return None
    paths = [
        state_directory / "tls" / f"{name}.pem" for name in ("authority", "certificate", "key")
    ]
    missing = [path for path in paths if not path.exists()]
    if not missing:
        authority, certificate, key = map(str, paths)
        return TlsFiles(authority_path=authority, certificate_path=certificate, key_path=key)
    if mode is TlsMode.AUTO and len(missing) == len(paths):
        return None
    raise ConfigError(
        f'tls.mode is "{mode}" and {", ".join(map(str, missing))} '
        f"{'is' if len(missing) == 1 else 'are'} missing"
    )


class HasPeerCertificate(Protocol):
    """An `ssl.SSLSocket` or `ssl.SSLObject`."""

    def getpeercert(self) -> object: ...


def server_context(files: TlsFiles) -> ssl.SSLContext:
    """For the end that listens. ConfigError if the files can't be used."""
    return _context(files, ssl.PROTOCOL_TLS_SERVER)


def client_context(files: TlsFiles) -> ssl.SSLContext:
    """For the end that dials; give the node's name as `server_hostname`.

    ConfigError if the files can't be used.
    """
    return _context(files, ssl.PROTOCOL_TLS_CLIENT)


def _context(files: TlsFiles, protocol: int) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    try:
        context.load_verify_locations(cafile=files.authority_path)
        context.load_cert_chain(files.certificate_path, files.key_path)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(
            f"tls: {files.authority_path}, {files.certificate_path} or {files.key_path} "
            f"can't be used: {error}"
        ) from error
    return context


def peer_node(connection: HasPeerCertificate) -> NodeName:
    """The node that the peer's checked certificate names. RemoteProtocolError if it names none."""
    certificate = connection.getpeercert()
    names = certificate.get("subjectAltName", ()) if isinstance(certificate, dict) else ()
    nodes = [value for kind, value in names if kind == "DNS"]
    if len(nodes) != 1:
        raise RemoteProtocolError(f"the peer's certificate names {len(nodes)} nodes, not one")
    return NodeName(nodes[0])


_OF_ANOTHER: Final = frozenset({2, 7, 18, 19, 20, 21})
"""OpenSSL's X509_V_ERR_*: no issuer found, self-signed, or not the authority's signature."""
_OF_ANOTHER_TIME: Final = frozenset({9, 10})
"""Not yet valid, expired."""


def verification_words(error: ssl.SSLCertVerificationError) -> str:
    """Why a certificate was not accepted, for an operator. No moment in it: it may be repeated."""
    if error.verify_code in _OF_ANOTHER:
        return (
            f"another authority than the trusted one has signed it, another cluster's maybe "
            f"({error.verify_message})"
        )
    if error.verify_code in _OF_ANOTHER_TIME:
        return f"{error.verify_message}, by the clock here"
    return error.verify_message
