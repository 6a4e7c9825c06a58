"""What names a block device, read from folders that look as sysfs does."""

from __future__ import annotations

from pathlib import Path

from storage.block.identity import identity_in_sysfs


def made(folder: Path, **files: str) -> Path:
    """A device's folder; two underscores stand for a slash."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        path = folder / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return folder


def test_a_scsi_disk_and_an_nvme_namespace_tell_it_themselves(tmp_path: Path) -> None:
    disk = made(tmp_path / "sda", device__wwid="naa.600a0980383")
    assert identity_in_sysfs(disk) == "wwid naa.600a0980383"
    assert identity_in_sysfs(made(tmp_path / "nvme0n1", wwid="eui.0025")) == "wwid eui.0025"


def test_multipath_is_its_disk_whichever_paths_there_are(tmp_path: Path) -> None:
    """One node may have a single path, and no multipath over it."""
    disks = [made(tmp_path / name, device__wwid="naa.6") for name in ("sda", "sdb")]
    multipath = made(tmp_path / "dm-0", dm__uuid="mpath-3600a")
    (multipath / "slaves").mkdir()
    assert identity_in_sysfs(multipath) is None, "without a path it can't tell"
    for disk in disks:
        (multipath / "slaves" / disk.name).symlink_to(disk)
        assert identity_in_sysfs(multipath) == identity_in_sysfs(disk) == "wwid naa.6"


def test_lvm_and_partitions(tmp_path: Path) -> None:
    volume = made(tmp_path / "dm-1", dm__uuid="LVM-abcdef")
    assert identity_in_sysfs(volume) == "dm LVM-abcdef"
    disk = made(tmp_path / "sdc", device__wwid="naa.7")
    assert identity_in_sysfs(made(disk / "sdc2", partition="2")) == "wwid naa.7 partition 2"


def test_others_have_none(tmp_path: Path) -> None:
    assert identity_in_sysfs(made(tmp_path / "loop0", size="2048")) is None
    assert identity_in_sysfs(tmp_path / "gone") is None
    assert identity_in_sysfs(made(tmp_path / "loop1" / "loop1p1", partition="1")) is None
