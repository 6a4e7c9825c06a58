"""The directory driver: volumes are files of a folder that every node sees."""

from storage.directory.driver import DirectoryPool

__all__ = ["DirectoryPool"]
