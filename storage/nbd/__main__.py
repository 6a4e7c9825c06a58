"""`python -m storage.nbd`: the provisioner's command line. Runs until SIGTERM."""

from __future__ import annotations

import argparse
import asyncio
import fcntl
import logging
import os
import resource
import signal
import sys
from pathlib import Path
from typing import Final

from migrator.errors import FerryError, StorageError, words
from storage.nbd import dh_parameters
from storage.nbd.exports import Serving
from storage.nbd.protocol import LINE_BYTES_MAX, PORT, read_key
from storage.nbd.provisioner import PORTS, Provisioner
from storage.nbd.volumes import VolumeFolder

DESCRIPTORS: Final = 65_536
"""Each export has one; a process may have 1,024, where nobody says otherwise."""


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m storage.nbd", description=__doc__)
    parser.add_argument("--folder", type=Path, required=True, help="where the volumes lie")
    parser.add_argument("--address", required=True, help="listen on, and export from, this address")
    parser.add_argument("--port", type=int, default=PORT, help="for requests (%(default)s)")
    parser.add_argument("--first-export-port", type=int, default=PORTS.start)
    parser.add_argument("--exports-max", type=int, default=len(PORTS))
    parser.add_argument(
        "--tls-directory",
        type=Path,
        help="a folder with keys.psk: encrypt; gets a dh-params.pem, too",
    )
    parser.add_argument("--tls-username", default="ferry", help="whose key requests are signed by")
    return parser.parse_args()


async def _serve(given: argparse.Namespace) -> None:
    tls: Path | None = given.tls_directory
    key = None
    if tls is not None:
        key = await asyncio.to_thread(read_key, tls, given.tls_username)
        await asyncio.to_thread(dh_parameters.ensure, tls)
    serving = Serving(address=given.address, tls_directory=tls, tls_username=given.tls_username)
    first: int = given.first_export_port
    ports = range(first, first + given.exports_max)
    folder = VolumeFolder(given.folder.absolute())
    await asyncio.to_thread(folder.path.mkdir, parents=True, exist_ok=True)
    await asyncio.to_thread(_be_the_only_one, folder.path)
    provisioner = Provisioner(folder, serving, key, ports)
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    await provisioner.open()
    server = await asyncio.start_server(
        provisioner.serve, given.address, given.port, limit=LINE_BYTES_MAX
    )
    logging.info("serving %s on %s:%d", folder.path, given.address, given.port)
    async with server:
        await stop.wait()
    await provisioner.close()


def _be_the_only_one(folder: Path) -> None:
    """Hold the folder for the life of this process. StorageError: another one serves it.

    A fence of one provisioner wouldn't end the exports that another one thinks should be there.
    """
    opened = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise StorageError(
            f"another provisioner serves {folder}; two would each fence their own exports alone"
        ) from error
    except OSError as error:
        logging.warning("%s can't be locked against another provisioner: %s", folder, words(error))


def main() -> None:
    """Exit status 1 with one sentence where it can't serve."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY and hard != resource.RLIM_INFINITY:
        wanted = max(soft, min(hard, DESCRIPTORS))
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        asyncio.run(_serve(_arguments()))
    except (FerryError, OSError) as error:
        sys.exit(f"the NBD provisioner can't serve: {words(error)}")


if __name__ == "__main__":
    main()
