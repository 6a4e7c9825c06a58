"""From a pool's settings to its driver. No I/O."""

from __future__ import annotations

from pathlib import Path

from migrator.errors import InvalidRequest
from migrator.model import NodeName, PoolName
from storage.iscsi.driver import IscsiPool
from storage.iscsi.provisioner import HookProvisioner, Provisioner
from storage.iscsi.secrets import ChapFile
from storage.iscsi.tgt import TgtFolder, TgtProvisioner
from storage.iscsi.tgt_control import TgtControl
from storage.settings import IscsiSettings


def make_iscsi_pool(settings: IscsiSettings, node: NodeName) -> IscsiPool:
    """InvalidRequest names the settings that don't go together."""
    chap = _chap(settings)
    return IscsiPool(
        PoolName(settings.name),
        node,
        _provisioner(settings, chap),
        initiator_prefix=settings.initiator_prefix,
        chap=chap,
    )


def tgt_folder(settings: IscsiSettings) -> TgtFolder:
    """The volumes of a pool on tgtd. InvalidRequest: it isn't one."""
    portal, folder, socket = settings.portal, settings.tgt_folder, settings.tgt_socket
    if portal is None or folder is None or socket is None or settings.hook is not None:
        raise InvalidRequest(
            f"pool {settings.name}: who makes its LUNs? Either portal, tgt_folder and tgt_socket"
            " (tgtd), or hook",
            {"hook": "a program's path, unless portal, tgt_folder and tgt_socket are given"},
        )
    control = TgtControl(Path(socket))
    return TgtFolder(Path(folder), control, portal=portal, pool=settings.name, chap=_chap(settings))


def _provisioner(settings: IscsiSettings, chap: ChapFile | None) -> Provisioner:
    given = (settings.portal, settings.tgt_folder, settings.tgt_socket)
    if settings.hook is not None and not any(given):
        return HookProvisioner([settings.hook], fences=settings.hook_fences)
    return TgtProvisioner(tgt_folder(settings))


def _chap(settings: IscsiSettings) -> ChapFile | None:
    user, path = settings.chap_user, settings.chap_secret_file
    if (user is None) != (path is None):
        missing = "chap_user" if user is None else "chap_secret_file"
        raise InvalidRequest(
            f"pool {settings.name}: CHAP needs both a user and a secret",
            {missing: "must be there, as the other one is"},
        )
    return ChapFile(user, Path(path)) if user is not None and path is not None else None
