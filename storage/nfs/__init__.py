"""The NFS driver: volumes on an export that nobody mounts; QEMU's own client uses them."""

from storage.nfs.driver import NfsPool

__all__ = ["NfsPool"]
