"""A router's end: hears which node each guest's address is on, and routes it there.

    python -m netfabric.routes.netlink --listen 192.0.2.254 --key-file KEY --network 10.78.0.0/24

Runs until SIGTERM; the routes stay. Needs CAP_NET_ADMIN, and forwarding switched on.
"""

from __future__ import annotations

import argparse
import asyncio
import logging
import signal
from pathlib import Path

from migrator.errors import FabricError
from netfabric.routes.netlink.messages import KEY_BYTES_MIN, Claim
from netfabric.routes.netlink.speaker import PORT, Speaker, SpeakerSettings


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--listen", default="0.0.0.0", help="an address of this router")
    parser.add_argument("--port", type=int, default=PORT, help="UDP")
    parser.add_argument("--key-file", type=Path, required=True, help="shared with the nodes")
    parser.add_argument(
        "--network", action="append", default=[], help="the guests' network; again for more"
    )
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(levelname)s %(message)s")
    key = options.key_file.read_bytes().strip()
    if len(key) < KEY_BYTES_MIN:
        parser.error(f"{options.key_file} must have {KEY_BYTES_MIN} bytes or more")
    settings = SpeakerSettings(
        listen=options.listen, port=options.port, key=key, networks=tuple(options.network)
    )
    try:
        asyncio.run(serve(settings))
    except FabricError as error:
        parser.exit(1, f"{error}\n")


async def serve(settings: SpeakerSettings) -> None:
    """Until SIGTERM or SIGINT."""
    ended = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, ended.set)
    speaker = Speaker(settings, heard=_tell)
    await speaker.open()
    try:
        await ended.wait()
    finally:
        await speaker.close()


def _tell(claim: Claim) -> None:
    logging.info("%s by %s (%d)", claim.address, claim.hop or "nobody", claim.sequence)


if __name__ == "__main__":
    main()
