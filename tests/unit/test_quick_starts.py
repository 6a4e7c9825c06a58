"""What keeps the starts of agents and engines short."""

from __future__ import annotations

import gc
import subprocess
import sys

from migrator.imports import without_collections


def test_an_agent_imports_no_library_that_its_configuration_may_not_need() -> None:
    """gRPC, for etcd. The collector works again, and numpy's threads aren't wanted."""
    program = (
        "import gc, os, sys\n"
        "import node_agent.__main__\n"
        "print(sorted({'grpc', 'google.protobuf'} & sys.modules.keys()), gc.isenabled(), "
        "os.environ['OPENBLAS_NUM_THREADS'])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout == "[] True 1\n"


def test_nothing_is_collected_amid_imports_whatever_happens() -> None:
    try:
        with without_collections():
            assert not gc.isenabled()
            raise ImportError
    except ImportError:
        assert gc.isenabled()
    gc.unfreeze()
