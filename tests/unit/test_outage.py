"""For how long a server hasn't answered, and how an NFS server's silence is told."""

from __future__ import annotations

import errno

import pytest

from storage.nfs.connection import Server
from storage.nfs.libnfs import Export, NfsError
from storage.outage import Outage


def test_an_outage_lasts_from_the_first_failure_to_the_next_answer() -> None:
    now_s = 100.0
    outage = Outage(lambda: now_s)
    assert outage.failed() == ""
    now_s = 140.4
    assert outage.failed() == "; it hasn't answered this node for 40 s"
    outage.answered()
    now_s = 500.0
    assert outage.failed() == ""


def test_an_nfs_server_that_is_away_is_named_and_told_what_to_look_at() -> None:
    now_s = 0.0
    server = Server("10.0.0.5", "/srv/ferry", Outage(lambda: now_s))
    broken = NfsError(errno.EIO, "Input/output error (nfs_service failed)", "10.0.0.5:/srv/ferry")
    away = "pool fast: NFS server 10.0.0.5 (export /srv/ferry) can't be reached: "
    look = ". Is it up, and do its ports for rpcbind (111), mount and nfs (2049) let this node in?"
    assert str(server.explained("pool fast", broken)) == f"{away}the connection broke{look}"
    now_s = 40.0
    silent = NfsError(errno.ETIMEDOUT, "no answer in 5 s")
    lasted = "; it hasn't answered this node for 40 s"
    assert str(server.explained("pool fast", silent)) == f"{away}no answer in 5 s{lasted}{look}"


def test_a_server_that_libnfs_cant_even_begin_with_has_refused_nothing() -> None:
    """Its -1 was taken for EPERM: "doesn't let this node mount"."""
    with pytest.raises(NfsError) as caught:  # No name server is asked for it.
        Export("no..host", "/srv/ferry", uid=0, gid=0, timeout_s=1)
    server = Server("no..host", "/srv/ferry")
    told = str(server.explained("pool fast", caught.value))
    assert "can't be reached: Invalid address:no..host" in told


def test_what_an_nfs_server_answers_is_its_word() -> None:
    server = Server("10.0.0.5", "/srv/ferry")
    for code, said, where, told in (
        (errno.EIO, "Input/output error (NFS: WRITE failed with NFS3ERR_IO)", "/web", "NFS3ERR_IO"),
        (errno.ENOSPC, "No space left on device", "/web", "pool fast is full"),
        (
            errno.ENOENT,
            "No such file or directory",
            "10.0.0.5:/srv/ferry",
            "doesn't let this node mount /srv/ferry",
        ),
    ):
        text = str(server.explained("pool fast", NfsError(code, said, where)))
        assert told in text
        assert "can't be reached" not in text
