"""The NBD driver, and the provisioner beside the storage that makes and ends its exports."""

from storage.nbd.driver import NbdPool

__all__ = ["NbdPool"]
