"""Builds the C shim (hypervisor/qemu/*_shim.c) that is preloaded into QEMU, at install time."""

import os
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SOURCES = (Path("hypervisor/qemu/uffd_shim.c"), Path("hypervisor/qemu/iscsi_shim.c"))
SHIM = SOURCES[0].with_suffix(".so")


class BuildWithShim(build_py):
    """build_py, and a shared object beside the shim's sources (in place when editable)."""

    def run(self) -> None:
        super().run()
        root = Path() if self.editable_mode else Path(self.build_lib)
        target = root / SHIM
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        flags = ["-O2", "-shared", "-fPIC", "-Wall", "-Werror"]
        command = [compiler, *flags, "-o", str(target), *map(str, SOURCES), "-ldl", "-lpthread"]
        subprocess.run(command, check=True)


setup(cmdclass={"build_py": BuildWithShim})
