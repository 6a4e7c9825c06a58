"""Make tgtd's targets again after its start: `python -m storage.iscsi.restore SETTINGS.json`.

SETTINGS.json is what the API's `GET /v1/pools/NAME` has under `settings` (one pool, or a list).
Waits for tgtd's socket, at most 10 s. Exit status 1 with one sentence, if something is missing.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Final

import msgspec

from migrator.errors import FerryError, StorageError
from storage.iscsi.making import tgt_folder
from storage.settings import IscsiSettings

WAIT_S: Final = 10.0


def restore(settings: IscsiSettings) -> int:
    """How many volumes there are. FerryError."""
    folder = tgt_folder(settings)
    deadline = time.monotonic() + WAIT_S
    while True:
        try:
            folder.health()
            return folder.restore()
        except StorageError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.05)


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print("usage: python -m storage.iscsi.restore SETTINGS.json", file=sys.stderr)
        return 2
    try:
        data = Path(arguments[0]).read_bytes()
        pools = msgspec.json.decode(data, type=list[IscsiSettings] | IscsiSettings)
        for pool in pools if isinstance(pools, list) else [pools]:
            print(f"pool {pool.name}: {restore(pool)} volumes")
    except (OSError, msgspec.DecodeError, FerryError) as error:
        print(f"restore: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
