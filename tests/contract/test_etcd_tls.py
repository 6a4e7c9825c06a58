"""`store.tls_*`: a real etcd that wants certificates, and what happens with wrong ones."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from migrator.errors import StoreError
from migrator.tls import TlsFiles
from node_agent.state.etcd import EtcdSettings, EtcdStore
from node_agent.state.etcd.client import _read
from node_agent.trust import certificates
from tests.contract.etcd_members import EtcdMember, running_members

PATIENCE_S = 20.0
REFUSED_S = 5.0
"""For those that aren't let in: they ask until it is over."""


def made(folder: Path, cluster: str, name: str) -> TlsFiles:
    """A new authority, and a key and a certificate that it signed, for 127.0.0.1."""
    folder.mkdir()
    authority_key, key = certificates.make_key(), certificates.make_key()
    authority = certificates.make_authority(cluster, authority_key, time.time())
    signed = certificates.sign_request(
        certificates.load_request(certificates.make_request(name, key), name),
        name,
        ["127.0.0.1"],
        authority_pem=authority,
        authority_key=authority_key,
        now_s=time.time(),
        life_s=86_400.0,
    )
    files = TlsFiles(
        authority_path=str(folder / "authority.pem"),
        certificate_path=str(folder / "certificate.pem"),
        key_path=str(folder / "key.pem"),
    )
    Path(files.authority_path).write_bytes(authority)
    Path(files.certificate_path).write_bytes(signed)
    Path(files.key_path).write_bytes(certificates.key_pem(key))
    return files


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> TlsFiles:
    return made(tmp_path_factory.mktemp("tls") / "right", "main", "etcd")


@pytest.fixture(scope="module")
def member(files: TlsFiles) -> Iterator[EtcdMember]:
    with running_members(1, files) as (member,):
        yield member


def store_with(
    member: EtcdMember, tls: TlsFiles | None, timeout_s: float = PATIENCE_S
) -> EtcdStore:
    settings = EtcdSettings(endpoints=(member.endpoint,), prefix="/tls/", tls=tls)
    return EtcdStore(settings, operation_timeout_s=timeout_s)


async def test_the_store_works_over_mutual_tls(member: EtcdMember, files: TlsFiles) -> None:
    store = store_with(member, files)
    await store.open()
    try:
        changes = store.watch("d/")
        written = await store.put_if("d/a", b"1", None)
        assert written is not None
        assert await store.put_if("d/a", b"2", None) is None
        entry = await store.get("d/a")
        assert entry is not None and entry.value == b"1"
        assert (await anext(changes)).value == b"1"
    finally:
        await store.close()


async def test_who_is_not_believed_is_refused_with_a_reason(
    member: EtcdMember, files: TlsFiles, tmp_path: Path
) -> None:
    other = made(tmp_path / "other", "other", "etcd")
    half = TlsFiles(
        authority_path=files.authority_path,
        certificate_path=other.certificate_path,
        key_path=other.key_path,
    )
    missing = TlsFiles(
        authority_path=files.authority_path,
        certificate_path=files.certificate_path,
        key_path=str(tmp_path / "nowhere.pem"),
    )
    cases = {"plain": None, "another authority": other, "its own key only": half, "no key": missing}

    async def refusal(tls: TlsFiles | None) -> str:
        store = store_with(member, tls, REFUSED_S)
        try:
            with pytest.raises(StoreError) as refused:
                await store.open()
                await store.get("d/a")
        finally:
            await store.close()
        return str(refused.value)

    words = await asyncio.gather(*map(refusal, cases.values()))
    said = dict(zip(cases, words, strict=True))
    assert "nowhere.pem" in said["no key"]
    assert "CERTIFICATE_VERIFY_FAILED" in said["another authority"]
    assert all(str(member.endpoint[1]) in said[name] for name in cases if name != "no key")


async def test_certificates_that_were_replaced_are_used_without_a_restart(
    member: EtcdMember, files: TlsFiles, tmp_path: Path
) -> None:
    """As when the old ones have run out, and a connection breaks."""
    wrong = made(tmp_path / "own", "other", "etcd")
    store = store_with(member, files)
    await store.open()
    store._client._settings = msgspec.structs.replace(store._client._settings, tls=wrong)
    try:
        await store.put_if("t/a", b"1", None)
        store._client._keys = await asyncio.to_thread(_read, wrong)
        await asyncio.to_thread(_replace, wrong, files)
        for each in store._client._members:
            await each.channel.close()
        store._client._connect()  # Of the other authority: refused.
        entry = await store.get("t/a")
        assert entry is not None and entry.value == b"1"
        assert store._client._retired
    finally:
        await store.close()


def _replace(old: TlsFiles, new: TlsFiles) -> None:
    for name in ("authority_path", "certificate_path", "key_path"):
        Path(getattr(old, name)).write_bytes(Path(getattr(new, name)).read_bytes())
