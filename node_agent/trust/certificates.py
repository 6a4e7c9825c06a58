"""The cluster's certificates: one self-signed authority, and one certificate a node. No I/O.

    authority  "Ferry cluster NAME", ten years, may sign nodes only (path length 0)
      └── node  DNS name = the node's name, exactly one (see `migrator.tls`), IP addresses of its
                listeners, for both ends of a connection, 30 days by default

Keys are ECDSA on P-256, not Ed25519: the same certificate serves HTTPS, and browsers, older TLS
libraries and hardware modules don't take Ed25519 there. P-256 is as strong (128 bits), signs in
tens of microseconds, and a node signs once a handshake. A cluster's identity is the SHA-256
fingerprint of its authority's certificate.
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
from collections.abc import Sequence
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from migrator.errors import ConflictError, InvalidRequest
from migrator.ports import Struct

AUTHORITY_DAYS: Final = 3650
AUTHORITY_ENDS_SOON_S: Final = 365 * 86_400.0
"""So long before its end it is told of: a new one takes planning."""
BACKDATED_S: Final = 86_400.0
"""The clock of the node that signs may be ahead of the others' by so much."""
PEM_BYTES_MAX: Final = 16_384

Key = ec.EllipticCurvePrivateKey


class NodeCertificate(Struct, frozen=True, kw_only=True):
    """What matters of a node's certificate."""

    node: str
    serial: str
    """As `ssl` prints it: upper-case hexadecimal."""
    not_before_s: float
    not_after_s: float
    """Seconds since the epoch, as are all times here."""
    addresses: tuple[str, ...] = ()
    """The IP addresses that it names beside the node."""


class Span(Struct, frozen=True, kw_only=True):
    """From when until when a certificate holds."""

    not_before_s: float
    not_after_s: float


def moment(at_s: float) -> str:
    """A time as an operator reads it."""
    return _moment(at_s).strftime("%Y-%m-%d %H:%M UTC")


def why_not_now(span: Span | NodeCertificate, now_s: float) -> str:
    """Why a certificate isn't accepted at this moment; "": it is."""
    if now_s < span.not_before_s:
        return f"it holds from {moment(span.not_before_s)} on, and the clock here says " + moment(
            now_s
        )
    if now_s >= span.not_after_s:
        return f"it held until {moment(span.not_after_s)}, and the clock here says {moment(now_s)}"
    return ""


def make_key() -> Key:
    """A fresh private key."""
    return ec.generate_private_key(ec.SECP256R1())


def key_pem(key: Key) -> bytes:
    """PKCS #8, unencrypted: the file's mode protects it."""
    return key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )


def load_key(pem: bytes) -> Key:
    """The inverse of `key_pem`. InvalidRequest if it isn't one of ours."""
    try:
        key = serialization.load_pem_private_key(pem, password=None)
    except (ValueError, TypeError) as error:
        raise InvalidRequest(f"this is not an unencrypted private key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise InvalidRequest("the private key must be an elliptic curve key")
    return key


def make_authority(cluster: str, key: Key, now_s: float) -> bytes:
    """The self-signed certificate (PEM) of a new authority."""
    name = x509.Name(
        [
            x509.NameAttribute(NameOID.ORGANIZATION_NAME, "Ferry"),
            x509.NameAttribute(NameOID.COMMON_NAME, f"Ferry cluster {cluster}"),
        ]
    )
    public = key.public_key()
    builder = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(public)
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now_s - BACKDATED_S))
        .not_valid_after(_moment(now_s + AUTHORITY_DAYS * 86_400))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public), critical=False)
    )
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def make_request(node: str, key: Key) -> bytes:
    """The signing request (PEM) of a node: its name, and that it holds the key."""
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)])
    builder = x509.CertificateSigningRequestBuilder().subject_name(name)
    return builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def load_request(pem: bytes, node: str) -> x509.CertificateSigningRequest:
    """A request that is sound, for `node`, and signed by its own key. Else InvalidRequest."""
    if len(pem) > PEM_BYTES_MAX:
        raise InvalidRequest(f"the signing request is larger than {PEM_BYTES_MAX} bytes")
    try:
        request = x509.load_pem_x509_csr(pem)
        names = request.subject.get_attributes_for_oid(NameOID.COMMON_NAME)
        key, sound = request.public_key(), request.is_signature_valid
    except (ValueError, TypeError, InvalidSignature) as error:
        raise InvalidRequest(f"the signing request can't be read: {error}") from error
    if not sound:
        raise InvalidRequest("the signing request isn't signed by its own key")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidRequest("the key of the signing request must be on the curve P-256")
    if [str(name.value) for name in names] != [node]:
        raise InvalidRequest(f"the signing request is not for {node}")
    return request


def sign_request(
    request: x509.CertificateSigningRequest,
    node: str,
    addresses: Sequence[str],
    *,
    authority_pem: bytes,
    authority_key: Key,
    now_s: float,
    life_s: float,
) -> bytes:
    """A node's certificate (PEM), of the request's key. `addresses`: those that are IP addresses.

    Nothing of the request but its key is taken over. No certificate outlives the authority's:
    whoever checks the one checks the other. ConflictError: the authority's has ended.
    """
    authority = x509.load_pem_x509_certificate(authority_pem)
    ends_s = read_authority(authority_pem).not_after_s
    if now_s >= ends_s:
        raise ConflictError(
            f"the cluster's authority held until {moment(ends_s)}, and the clock here says "
            f"{moment(now_s)}: nothing more can be signed by it (docs/cluster.md, Certificates)"
        )
    names: list[x509.GeneralName] = [x509.DNSName(node)]
    names += [x509.IPAddress(ipaddress.ip_address(text)) for text in ip_addresses(addresses)]
    usage = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
    builder = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, node)]))
        .issuer_name(authority.subject)
        .public_key(request.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(_moment(now_s - min(BACKDATED_S, life_s)))
        .not_valid_after(_moment(min(now_s + life_s, ends_s)))
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage(usage), critical=False)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .add_extension(
            x509.AuthorityKeyIdentifier.from_issuer_public_key(authority_key.public_key()),
            critical=False,
        )
    )
    return builder.sign(authority_key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


def ip_addresses(hosts: Sequence[str]) -> tuple[str, ...]:
    """Those of `hosts` that are IP addresses, each once, as certificates name them."""
    found: dict[str, None] = {}
    for text in hosts:
        with contextlib.suppress(ValueError):  # A host name: a node has one DNS name, its own.
            found[str(ipaddress.ip_address(text))] = None
    return tuple(found)


def read_certificate(pem: bytes) -> NodeCertificate:
    """InvalidRequest if it isn't a node's certificate."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
        extension = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName)
        names = extension.value.get_values_for_type(x509.DNSName)
        addresses = extension.value.get_values_for_type(x509.IPAddress)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise InvalidRequest(f"this is not a node's certificate: {error}") from error
    if len(names) != 1:
        raise InvalidRequest(f"the certificate names {len(names)} nodes, not one")
    return NodeCertificate(
        node=names[0],
        serial=format_serial(certificate.serial_number),
        not_before_s=certificate.not_valid_before_utc.timestamp(),
        not_after_s=certificate.not_valid_after_utc.timestamp(),
        addresses=tuple(map(str, addresses)),
    )


def read_authority(pem: bytes) -> Span:
    """When the authority's certificate holds. InvalidRequest if it isn't a certificate."""
    try:
        certificate = x509.load_pem_x509_certificate(pem)
    except ValueError as error:
        raise InvalidRequest(f"this is not a certificate in PEM: {error}") from error
    return Span(
        not_before_s=certificate.not_valid_before_utc.timestamp(),
        not_after_s=certificate.not_valid_after_utc.timestamp(),
    )


def format_serial(serial: int) -> str:
    """As `ssl.SSLObject.getpeercert()["serialNumber"]`: hexadecimal, an even number of digits."""
    text = f"{serial:X}"
    return text.zfill(len(text) + len(text) % 2)


def signed_by(pem: bytes, authority_pem: bytes) -> bool:
    """Whether the certificate was signed by the authority."""
    certificate = x509.load_pem_x509_certificate(pem)
    try:
        certificate.verify_directly_issued_by(x509.load_pem_x509_certificate(authority_pem))
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def belongs_to(pem: bytes, key: Key) -> bool:
    """Whether the certificate is of this key."""
    return x509.load_pem_x509_certificate(pem).public_key() == key.public_key()


def fingerprint(authority_pem: bytes) -> bytes:
    """SHA-256 of the certificate (DER): 32 bytes. InvalidRequest if it isn't one."""
    try:
        certificate = x509.load_pem_x509_certificate(authority_pem)
    except ValueError as error:
        raise InvalidRequest(f"this is not a certificate in PEM: {error}") from error
    return certificate.fingerprint(hashes.SHA256())


def key_fingerprint(request: x509.CertificateSigningRequest) -> str:
    """SHA-256 of the request's public key, in hexadecimal."""
    der = request.public_key().public_bytes(
        serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    return hashlib.sha256(der).hexdigest()


def request_der(request: x509.CertificateSigningRequest) -> bytes:
    """The request as bytes that two sides agree on."""
    return request.public_bytes(serialization.Encoding.DER)


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        encipher_only=False,
        decipher_only=False,
    )


def _moment(at_s: float) -> datetime.datetime:
    return datetime.datetime.fromtimestamp(int(at_s), tz=datetime.UTC)
