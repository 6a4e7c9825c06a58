"""A node's certificates on disk: STATE_DIRECTORY/tls/, mode 0700.

    authority.pem        the cluster's authority: whom this node trusts
    certificate.pem      this node's certificate; replaced by each renewal, in one step
    key.pem              its private key, 0600; stays until the node joins anew
    authority-key.pem    only on nodes that sign (`ferry cluster init`), 0600
    cluster.json         the cluster's name

The key stays over renewals: two files can't be replaced in one step, and an engine that starts
between the two would find a pair that doesn't match.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

import msgspec

from migrator import durable
from migrator.errors import ConfigError, FerryError, words
from migrator.ports import Struct
from migrator.tls import TlsFiles
from node_agent.trust import certificates
from node_agent.trust.certificates import NodeCertificate

FOLDER: Final = "tls"


class ClusterNote(Struct, frozen=True, kw_only=True):
    """cluster.json"""

    cluster: str


class Identity(Struct, frozen=True, kw_only=True):
    """What a member has on disk, checked: the certificate is of its key and of its authority."""

    cluster: str
    authority_pem: bytes
    certificate_pem: bytes
    certificate: NodeCertificate
    authority_key_pem: bytes | None
    """None: this node doesn't sign."""

    @property
    def fingerprint(self) -> str:
        """The cluster's identity, in hexadecimal."""
        return certificates.fingerprint(self.authority_pem).hex()


class TrustFolder:
    """See the module. Every method blocks: not for the event loop."""

    def __init__(self, state_directory: Path) -> None:
        self.path = state_directory / FOLDER

    @property
    def authority_key_path(self) -> Path:
        return self.path / "authority-key.pem"

    @property
    def certificate_path(self) -> Path:
        return self.path / "certificate.pem"

    @property
    def files(self) -> TlsFiles:
        """For the engines and the agents' protocol."""
        return TlsFiles(
            authority_path=str(self.path / "authority.pem"),
            certificate_path=str(self.certificate_path),
            key_path=str(self.path / "key.pem"),
        )

    def is_member(self) -> bool:
        """Whether this node has a certificate: written last, so all else is there then."""
        return self.certificate_path.exists()

    def own_key(self) -> certificates.Key:
        """This node's private key; made if there is none. A join that is repeated reuses it."""
        path = Path(self.files.key_path)
        try:
            return certificates.load_key(path.read_bytes())
        except FileNotFoundError:
            key = certificates.make_key()
            self.write(path.name, certificates.key_pem(key))
            return key

    def write_membership(self, *, cluster: str, authority_pem: bytes, certificate: bytes) -> None:
        """What a join or an init brings, the certificate last.

        The key of an authority that was replaced is kept beside, and signs nothing more.
        """
        if self.authority_key_path.exists() and not self._signs_for(authority_pem):
            self.authority_key_path.rename(self.path / "authority-key.replaced.pem")
        self.write("authority.pem", authority_pem)
        self.write("cluster.json", msgspec.json.encode(ClusterNote(cluster=cluster)))
        self.write(self.certificate_path.name, certificate)

    def _signs_for(self, authority_pem: bytes) -> bool:
        try:
            key = certificates.load_key(self.authority_key_path.read_bytes())
        except FerryError:
            return False
        return certificates.belongs_to(authority_pem, key)

    def write(self, name: str, content: bytes) -> None:
        """Replace a file in one step, mode 0600, durably. ConfigError if it can't be written."""
        path = self.path / name
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            durable.replace(path, content)
        except OSError as error:
            raise ConfigError(f"{path} can't be written: {words(error)}") from error

    def load(self, node: str) -> Identity:
        """ConfigError says which file is missing or doesn't fit, and what to do."""
        try:
            authority = (self.path / "authority.pem").read_bytes()
            certificate = self.certificate_path.read_bytes()
            key = certificates.load_key(Path(self.files.key_path).read_bytes())
            note = msgspec.json.decode((self.path / "cluster.json").read_bytes(), type=ClusterNote)
            signing = None
            if self.authority_key_path.exists():
                signing = self.authority_key_path.read_bytes()
            return _checked(node, authority, certificate, key, note, signing)
        except (OSError, msgspec.DecodeError, FerryError) as error:
            raise ConfigError(
                f"the certificates in {self.path} can't be used: {error}; restore them from a "
                "backup, or remove the folder and join again"
            ) from error


def _checked(
    node: str,
    authority: bytes,
    certificate: bytes,
    key: certificates.Key,
    note: ClusterNote,
    signing: bytes | None,
) -> Identity:
    read = certificates.read_certificate(certificate)
    if read.node != node:
        raise ConfigError(f"certificate.pem is of node {read.node}, but node.name is {node}")
    if not certificates.belongs_to(certificate, key):
        raise ConfigError("certificate.pem and key.pem don't belong together")
    if not certificates.signed_by(certificate, authority):
        raise ConfigError("certificate.pem is not signed by authority.pem")
    if signing is not None and not certificates.belongs_to(
        authority, certificates.load_key(signing)
    ):
        raise ConfigError("authority.pem and authority-key.pem don't belong together")
    return Identity(
        cluster=note.cluster,
        authority_pem=authority,
        certificate_pem=certificate,
        certificate=read,
        authority_key_pem=signing,
    )
