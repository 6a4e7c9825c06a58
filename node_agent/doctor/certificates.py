"""The node's certificate and the cluster's authority: how long they hold. Reads the files alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from migrator.errors import FerryError
from migrator.tls import TlsMode
from node_agent.config import AgentConfig
from node_agent.doctor.findings import Finding, failure, fine, warning
from node_agent.trust import certificates
from node_agent.trust.files import Identity, TrustFolder
from node_agent.trust.renewal import due_at_s

OVERDUE_S: Final = 86_400.0
"""A renewal that has failed for so long doesn't come by itself, it seems."""

STORE_ENDS_SOON_S: Final = 14 * 86_400.0


def check_certificates(config: AgentConfig, now_s: float) -> Iterator[Finding]:
    """Nothing in plain mode, or where the node may be without."""
    if config.tls.mode is TlsMode.PLAIN:
        return
    folder = TrustFolder(Path(config.node.state_directory))
    if not folder.is_member():
        if config.tls.mode is TlsMode.REQUIRED:
            yield failure(
                "certificate",
                "this node belongs to no cluster",
                "ferry cluster init, or ferry cluster join TOKEN",
            )
        return
    try:
        identity = folder.load(config.node.name)
        authority = certificates.read_authority(identity.authority_pem)
    except FerryError as error:
        yield failure("certificate", str(error), "see docs/cluster.md, Certificates")
        return
    yield _own(identity, now_s)
    yield _of_the_authority(authority, now_s)


def check_store_certificates(config: AgentConfig, now_s: float) -> Iterator[Finding]:
    """Those that the agent shows to etcd, and believes; the operator replaces them."""
    store, name = config.store, "etcd certificate"
    mend = "replace store.tls_certificate or store.tls_authority; the agent reads them again"
    for path in filter(None, (store.tls_certificate, store.tls_authority)):
        try:
            span = certificates.read_authority(Path(path).read_bytes())
        except (OSError, FerryError) as error:
            yield failure(name, f"{path}: {error}", "correct store.tls_*")
            continue
        wrong = certificates.why_not_now(span, now_s)
        until = f"{path} holds until {certificates.moment(span.not_after_s)}"
        if wrong:
            yield failure(name, f"{path}: {wrong}", mend)
        elif span.not_after_s - now_s < STORE_ENDS_SOON_S:
            yield warning(name, until, mend)
        else:
            yield fine(name, until)


def _own(identity: Identity, now_s: float) -> Finding:
    name, certificate = "certificate", identity.certificate
    wrong = certificates.why_not_now(certificate, now_s)
    if wrong and now_s < certificate.not_before_s:
        mend = "set this node's clock, if that is wrong; else its agent renews the certificate"
        return failure(name, f"{wrong}: other nodes refuse it", mend)
    if wrong:
        mend = "ferry cluster token on a member; here ferry cluster join TOKEN --again, and restart"
        if identity.authority_key_pem is not None:
            mend = "start its agent: this node signs, and renews its own"
        return failure(name, f"{wrong}: other nodes refuse it", mend)
    until = f"holds until {certificates.moment(certificate.not_after_s)}"
    if now_s > due_at_s(certificate) + OVERDUE_S:
        due = certificates.moment(due_at_s(certificate))
        return warning(
            name,
            f"{until}, and should have been renewed on {due}",
            "start a node that signs (ferry cluster show); ferry events says what failed",
        )
    return fine(name, until)


def _of_the_authority(span: certificates.Span, now_s: float) -> Finding:
    name, wrong = "authority", certificates.why_not_now(span, now_s)
    if wrong and now_s < span.not_before_s:
        return failure(name, wrong, "set this node's clock, if that is wrong")
    mend = "found the cluster anew, as docs/cluster.md tells (Certificates); guests run on"
    if wrong:
        return failure(name, f"{wrong}: no certificate is accepted any more", mend)
    until = f"the cluster's holds until {certificates.moment(span.not_after_s)}"
    if span.not_after_s - now_s < certificates.AUTHORITY_ENDS_SOON_S:
        return warning(name, f"{until}, and no certificate for longer", mend)
    return fine(name, until)
