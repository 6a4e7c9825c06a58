"""An agent's stand-in, to be killed: opens the QEMU driver, starts guests, says so, and waits."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import msgspec

from hypervisor.qemu.driver import QemuDriver
from migrator.ports import Launch


class Orders(msgspec.Struct, frozen=True):
    state_directory: str
    start: list[Launch]
    start_incoming: list[Launch]


async def main() -> None:
    orders = msgspec.json.decode(sys.argv[1], type=Orders)
    driver = QemuDriver(Path(orders.state_directory), accelerator="tcg")
    await driver.open()
    for launch in orders.start:
        await driver.start(launch)
    for launch in orders.start_incoming:
        await driver.start_incoming(launch)
    print("ready", flush=True)
    await asyncio.sleep(60)


if __name__ == "__main__":
    asyncio.run(main())
