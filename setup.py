"""Builds the C shim (hypervisor/qemu/uffd_shim.c) that is preloaded into QEMU, at install time."""

import os
import subprocess
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

SHIM = Path("hypervisor/qemu/uffd_shim.c")


class BuildWithShim(build_py):
    """build_py, and a shared object beside the shim's source (in place when editable)."""

    def run(self) -> None:
        super().run()
        root = Path() if self.editable_mode else Path(self.build_lib)
        target = root / SHIM.with_suffix(".so")
        target.parent.mkdir(parents=True, exist_ok=True)
        compiler = os.environ.get("CC", "cc")
        flags = ["-O2", "-shared", "-fPIC", "-Wall", "-Werror"]
        subprocess.run([compiler, *flags, "-o", str(target), str(SHIM)], check=True)


setup(cmdclass={"build_py": BuildWithShim})
