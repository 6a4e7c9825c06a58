"""The agents' protocol over mutual TLS: who is served, who is refused and why, also in the log."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import ssl
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trustme

from migrator.errors import PeerError
from migrator.model import NodeName
from migrator.tls import TlsFiles, client_context
from migrator.wire import FrameDecoder, FrameKind, encode_frame
from node_agent.peers import PeerHub, messages
from node_agent.peers.messages import Side
from node_agent.peers.refusals import LONGEST_QUIET_S, QUIET_S, RefusalLog
from node_agent.trust.contexts import TlsContexts
from node_agent.trust.records import MEMBERS, MemberRecord
from tests.unit.peers_world import N1, N2, N3, Text, until
from tests.unit.test_tls import files_of
from tests.unit.trust_world import PATIENT, Member, TrustWorld, trust_world

pytestmark = pytest.mark.allow_blocking("what the command line does runs in a thread")


def hello(node: str) -> bytes:
    greeting = messages.Hello(version=1, node=node, agent_version="1")
    return encode_frame(FrameKind.HELLO, greeting)


async def greet(member: Member, files: TlsFiles, node: str, called: str = "n1") -> str:
    """Dial with these files, say that we are `node`; why we are refused."""
    reader, writer = await asyncio.open_connection(
        *member.hub.address, ssl=client_context(files), server_hostname=called
    )
    try:
        async with asyncio.timeout(30):
            writer.write(hello(node))
            answer = await reader.read()
        if not answer:
            return "closed"
        frames = FrameDecoder().feed(answer)
        notice = frames[-1].decode(messages.notice_decoder)
        return messages.unpack(notice.params, messages.RefusedParams, "").reason
    except ConnectionResetError:
        return "closed"
    finally:
        writer.close()
        with contextlib.suppress(OSError):
            await writer.wait_closed()


@asynccontextmanager
async def hub_with(files: TlsFiles, node: NodeName, peer: PeerHub) -> AsyncIterator[PeerHub]:
    """A hub of somebody who isn't in the cluster, that knows where `peer` is."""
    contexts = TlsContexts(files)
    hub = PeerHub(
        node, ("127.0.0.9", 0), {peer.node: peer.address}, "1",
        ssl_contexts=contexts.peers, timing=PATIENT,
    )  # fmt: skip
    try:
        yield hub
    finally:
        await hub.close()


async def test_a_forged_certificate_is_refused_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Right in all but the signature: another authority, of the same name, signed it."""
    async with trust_world(tmp_path, 2) as world:
        forger = trustme.CA()
        forged = files_of(tmp_path, forger, "n2")
        forged = msgspec.structs.replace(
            forged, authority_path=world.one.folder.files.authority_path
        )
        assert await greet(world.one, forged, "n2") == "closed"
        await until(lambda: "n1 refused 127.0.0.1: its certificate was not accepted" in caplog.text)


async def test_a_peer_of_another_cluster_is_refused_both_ways_and_logged(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with (
        trust_world(tmp_path / "ours") as ours,
        trust_world(tmp_path / "theirs", 2, cluster="c2") as theirs,
    ):
        stranger = theirs.members["n2"]
        async with hub_with(stranger.folder.files, N2, ours.one.hub) as hub:
            with pytest.raises(PeerError, match="another authority than the trusted one has"):
                await hub.call(N1, "echo", Text("hi"), Text, timeout_s=60)
        files = msgspec.structs.replace(
            stranger.folder.files, authority_path=ours.one.folder.files.authority_path
        )
        async with hub_with(files, N2, ours.one.hub) as hub:
            with pytest.raises(PeerError, match="if it doesn't accept our certificate"):
                await hub.call(N1, "echo", Text("hi"), Text, timeout_s=60)
        await until(lambda: "its certificate was not accepted" in caplog.text)


async def test_nobody_speaks_for_another_node(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trust_world(tmp_path, 2, 3) as world:
        reason = await greet(world.one, world.members["n3"].folder.files, "n2")
        assert reason == "its certificate is of n3, but it says that it is 'n2'"
        assert f"n1 refused 127.0.0.1: {reason}" in caplog.text
        three = world.members["n3"]
        world.members["n2"].hub.set_peers({N1: three.hub.address})  # n3 where n1 should be.
        with pytest.raises(PeerError, match=r"certificate was not accepted.*n1"):
            await world.members["n2"].hub.call(N1, "echo", Text("hi"), Text, timeout_s=60)


async def test_without_tls_and_without_a_certificate_nobody_gets_in(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trust_world(tmp_path) as world:
        _, knocking = await asyncio.open_connection(*world.one.hub.address)
        knocking.close()  # As `ferry doctor` does: nobody was refused anything.
        reader, writer = await asyncio.open_connection(*world.one.hub.address)
        writer.write(hello("n2"))
        with contextlib.suppress(ConnectionResetError):
            assert FrameKind.HELLO.value not in (await reader.read())[:4]
        writer.close()
        await until(lambda: "n1 refused 127.0.0.1: the TLS handshake failed" in caplog.text)
        context = ssl.create_default_context(cafile=world.one.folder.files.authority_path)
        reader, writer = await asyncio.open_connection(
            *world.one.hub.address, ssl=context, server_hostname="n1"
        )
        with contextlib.suppress(ConnectionResetError):
            assert await reader.read() == b""
        writer.close()
        await until(lambda: "peer did not return a certificate" in caplog.text)
        assert caplog.text.count("n1 refused 127.0.0.1") == 2


async def remove(world: TrustWorld, node: str) -> None:
    """As `ferry node rm` leaves the record."""
    entry = await world.one.typed.get(f"{MEMBERS}{node}", MemberRecord)
    assert entry is not None
    record = msgspec.structs.replace(
        entry.value, removed_at_s=world.clock(), revoked=entry.value.certificates, certificates=()
    )
    assert await world.one.typed.put_if(entry.key, record, entry.revision)


async def test_a_removed_node_is_cut_off_and_refused_by_all(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with trust_world(tmp_path, 2, 3) as world:
        gone = world.members["n3"]
        await gone.hub.call(N1, "echo", Text("before"), Text, timeout_s=60)
        await remove(world, "n3")
        await asyncio.wait_for(gone.removed.wait(), 30)
        for name in ("n1", "n2"):
            stays = world.members[name]
            await until(partial(stays.members.admit, "n3", ""))
            reason = await greet(stays, gone.folder.files, "n3", name)
            assert reason == "n3 was removed from the cluster"
            assert N3 not in stays.hub._links
        assert "n3 was removed from the cluster" in caplog.text
        async with hub_with(gone.folder.files, N3, world.one.hub) as hub:
            with pytest.raises(PeerError, match="it refused: n3 was removed from the cluster"):
                await hub.call(N1, "echo", Text("after"), Text, timeout_s=60)


async def test_a_revoked_certificate_stays_out_when_its_node_is_back(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2) as world:
        old = world.members.pop("n2")
        await old.close()
        stolen = {path.name: path.read_bytes() for path in old.folder.path.iterdir()}
        await remove(world, "n2")
        back = await world.join(2)
        await back.hub.call(N1, "echo", Text("I am back"), Text, timeout_s=60)
        folder = tmp_path / "stolen"
        folder.mkdir()
        for name, content in stolen.items():
            (folder / name).write_bytes(content)
        files = TlsFiles(
            authority_path=str(folder / "authority.pem"),
            certificate_path=str(folder / "certificate.pem"),
            key_path=str(folder / "key.pem"),
        )
        assert "was revoked" in await greet(world.one, files, "n2")


async def test_a_recorded_connection_cannot_be_played_again(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Every byte that n2 sent, sent once more: TLS takes none of it."""
    async with trust_world(tmp_path, 2) as world:
        heard: list[str] = []

        async def note(caller: NodeName, params: Text) -> Text:
            heard.append(params.text)
            return params

        world.one.hub.handle("note", Text, note)
        sent = bytearray()
        relay = await asyncio.start_server(
            lambda *ends: tap(world.one.hub.address, sent, *ends), "127.0.0.1", 0
        )
        async with relay:
            address = relay.sockets[0].getsockname()[:2]
            async with hub_with(world.members["n2"].folder.files, N2, world.one.hub) as hub:
                hub.set_peers({N1: address})
                await hub.call(N1, "note", Text("once"), Text, timeout_s=60)
        reader, writer = await asyncio.open_connection(*world.one.hub.address)
        writer.write(bytes(sent))
        with contextlib.suppress(ConnectionResetError):
            async with asyncio.timeout(30):
                await reader.read()
                await reader.read()
        writer.close()
        await until(lambda: "n1 refused 127.0.0.1: the TLS handshake failed" in caplog.text)
        assert heard == ["once"]


async def tap(
    address: tuple[str, int],
    sent: bytearray,
    reader: asyncio.StreamReader,
    writer: asyncio.StreamWriter,
) -> None:
    """Passes bytes on, both ways, and keeps those of the one that dialed."""
    there, back = await asyncio.open_connection(*address)

    async def pump(
        source: asyncio.StreamReader, sink: asyncio.StreamWriter, keep: bytearray | None
    ) -> None:
        with contextlib.suppress(ConnectionError):
            while data := await source.read(65_536):
                if keep is not None:
                    keep += data
                sink.write(data)
        sink.close()

    await asyncio.gather(pump(reader, back, sent), pump(there, writer, None))


async def test_a_renewal_drops_no_connection_and_is_used_by_new_ones(tmp_path: Path) -> None:
    async with trust_world(tmp_path, 2) as world:
        one, two = world.one, world.members["n2"]
        before = two.identity.certificate.serial
        await two.hub.call(N1, "echo", Text("before"), Text, timeout_s=60)
        connection = two.hub._links[N1]._connection
        assert connection is not None
        renewed = await two.trust.renew()
        assert renewed.serial != before
        assert two.folder.load("n2").certificate.serial == renewed.serial
        await two.hub.call(N1, "echo", Text("after"), Text, timeout_s=60)
        assert two.hub._links[N1]._connection is connection
        connection.abort("a test")
        await until(lambda: two.hub._links[N1]._connection is not connection)
        await two.hub.call(N1, "echo", Text("anew"), Text, timeout_s=60)
        inbound = [each.connection for each in one.hub._inbound if each.connection is not None]
        assert renewed.serial in [each.certificate.serial for each in inbound if each.certificate]
        _, writer = await asyncio.open_connection(
            *two.hub.address, ssl=one.contexts.peers(Side.DIALING), server_hostname="n2"
        )
        shown = writer.get_extra_info("peercert")["serialNumber"]
        assert shown == renewed.serial
        writer.close()


async def test_a_silent_handshake_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("node_agent.peers.acceptor.HANDSHAKE_S", 0.1)
    async with trust_world(tmp_path) as world:
        reader, writer = await asyncio.open_connection(*world.one.hub.address)
        async with asyncio.timeout(30):
            with contextlib.suppress(ConnectionResetError):
                assert await reader.read() == b""
        writer.close()
        assert "no TLS handshake within 0.1 s" in caplog.text


async def test_a_refusal_is_logged_once_a_minute(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    told: list[tuple[str, str]] = []
    log = RefusalLog(logging.getLogger("test"), "n1", monotonic=lambda: now[0])
    log.on_refusal = lambda who, why: told.append((who, why))
    for at_s in (0.0, 1.0, QUIET_S - 1, QUIET_S):
        now[0] = at_s
        log.note("n9", "unknown")
    log.note("n8", "unknown")
    assert told == [("n9", "unknown"), ("n9", "unknown"), ("n8", "unknown")]


def test_who_tries_for_weeks_does_not_fill_the_event_log() -> None:
    now, told = [0.0], list[float]()
    log = RefusalLog(logging.getLogger("test"), "n1", monotonic=lambda: now[0])
    log.on_refusal = lambda who, why: told.append(now[0])
    for at_s in range(0, 86_400, 10):
        now[0] = float(at_s)
        log.note("n9", "its certificate has expired")
    assert told[:4] == [0.0, 60.0, 180.0, 420.0]
    assert len(told) < 32
    now[0] += LONGEST_QUIET_S  # It was away, and is back.
    log.note("n9", "its certificate has expired")
    log.note("n9", "its certificate has expired")
    now[0] += QUIET_S
    log.note("n9", "its certificate has expired")
    assert told[-2:] == [now[0] - QUIET_S, now[0]]
