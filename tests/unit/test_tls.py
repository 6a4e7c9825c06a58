"""Mutual TLS between nodes, over in-memory connections, with a throw-away authority."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import trustme

from migrator.engine.transport import ListenerTls, TlsPeer
from migrator.errors import ConfigError, RemoteProtocolError
from migrator.tls import (
    TlsFiles,
    TlsMode,
    client_context,
    files_of_node,
    peer_node,
    server_context,
)


def files_of(folder: Path, authority: trustme.CA, *names: str) -> TlsFiles:
    """PEM files of a certificate for `names`, in a folder of their own."""
    home = folder / f"{names[0]}-{id(authority)}"
    home.mkdir()
    issued = authority.issue_cert(*names)
    authority.cert_pem.write_to_path(home / "authority.pem")
    issued.private_key_pem.write_to_path(home / "key.pem")
    for index, blob in enumerate(issued.cert_chain_pems):
        blob.write_to_path(home / "certificate.pem", append=index > 0)
    return TlsFiles(
        authority_path=str(home / "authority.pem"),
        certificate_path=str(home / "certificate.pem"),
        key_path=str(home / "key.pem"),
    )


def shake_hands(
    source: TlsFiles, destination: TlsFiles, name: str
) -> tuple[ssl.SSLObject, ssl.SSLObject]:
    """The dialing and the listening end, after their handshake."""
    to_server, to_client = ssl.MemoryBIO(), ssl.MemoryBIO()
    client = client_context(source).wrap_bio(to_client, to_server, server_hostname=name)
    server = server_context(destination).wrap_bio(to_server, to_client, server_side=True)
    for _ in range(4):
        for end in (client, server):
            try:
                end.do_handshake()
            except ssl.SSLWantReadError:
                continue
    return client, server


def test_each_end_learns_who_the_other_is(tmp_path: Path) -> None:
    authority = trustme.CA()
    n1, n2 = (files_of(tmp_path, authority, name) for name in ("n1", "n2"))
    client, server = shake_hands(n1, n2, "n2")
    assert (peer_node(client), peer_node(server)) == ("n2", "n1")
    assert client.version() == "TLSv1.3"


def test_another_node_than_the_dialed_one_is_refused(tmp_path: Path) -> None:
    authority = trustme.CA()
    n1, n3 = (files_of(tmp_path, authority, name) for name in ("n1", "n3"))
    with pytest.raises(ssl.SSLCertVerificationError, match="n2"):
        shake_hands(n1, n3, "n2")


@pytest.mark.parametrize("stranger", ["n1", "n2"])
def test_another_clusters_certificate_is_refused(tmp_path: Path, stranger: str) -> None:
    authorities = {name: trustme.CA() if name == stranger else None for name in ("n1", "n2")}
    ours = trustme.CA()
    n1, n2 = (files_of(tmp_path, authorities[name] or ours, name) for name in ("n1", "n2"))
    with pytest.raises(ssl.SSLError):
        shake_hands(n1, n2, "n2")


def test_a_certificate_of_two_nodes_names_nobody(tmp_path: Path) -> None:
    authority = trustme.CA()
    both, n2 = files_of(tmp_path, authority, "n1", "n3"), files_of(tmp_path, authority, "n2")
    _, server = shake_hands(both, n2, "n2")
    with pytest.raises(RemoteProtocolError, match="2 nodes"):
        peer_node(server)


def test_missing_files_are_named(tmp_path: Path) -> None:
    lost = str(tmp_path / "lost.pem")
    files = TlsFiles(authority_path=lost, certificate_path=lost, key_path=lost)
    with pytest.raises(ConfigError, match=r"lost\.pem"):
        server_context(files)


def test_a_node_without_files_goes_plain_unless_it_must_not(tmp_path: Path) -> None:
    assert files_of_node(tmp_path) is None
    with pytest.raises(ConfigError, match=r'"required" and .*authority\.pem.* are missing'):
        files_of_node(tmp_path, TlsMode.REQUIRED)


def test_half_of_the_files_is_an_error_and_all_of_them_are_used(tmp_path: Path) -> None:
    (tmp_path / "tls").mkdir()
    for name in ("authority", "certificate"):
        (tmp_path / "tls" / f"{name}.pem").write_text("")
    with pytest.raises(ConfigError, match=r"key\.pem is missing"):
        files_of_node(tmp_path)
    (tmp_path / "tls" / "key.pem").write_text("")
    found = files_of_node(tmp_path)
    assert found is not None and found.key_path == str(tmp_path / "tls" / "key.pem")
    assert files_of_node(tmp_path, TlsMode.PLAIN) is None


@pytest.mark.parametrize("end", [ListenerTls, partial(TlsPeer, node="n1")])
def test_an_engine_reads_its_files_anew_and_goes_on_with_what_it_had(
    tmp_path: Path, end: Callable[[TlsFiles], ListenerTls | TlsPeer]
) -> None:
    n2 = files_of(tmp_path, trustme.CA(), "n2")
    tls = end(n2)
    first, second = tls.context(), tls.context()
    assert first is not second
    Path(n2.certificate_path).write_text("half of one")
    assert tls.context() is second
    with pytest.raises(ConfigError, match="can't be used"):
        end(n2).context()
