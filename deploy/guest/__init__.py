"""The guest that tests, the lab and the demo boot: a small, real Linux that checks itself.

A newcomer's path: `build.py` makes the kernel and initrd, `cmdline.py` says how a guest is
configured, `workload/` is what runs inside, `protocol.py` and `records.py` describe what a host
reads back from it, and `disk_check.py` verifies a guest's disk image.

Lines that the guest writes on its console, each at the start of a line:

- `FERRY-READY ...` once everything that was asked for is up;
- `FERRY-STATUS {json}` every second, the same JSON as `GET /status`;
- `FERRY-CORRUPTION memory page=... ...` and `FERRY-CORRUPTION disk record=... ...`;
- `FERRY-POWEROFF ...` when the power button was pressed;
- `FERRY-ERROR ...` before it gives up (a kernel panic follows), `FERRY-DISK-ERROR ...` for a
  request that failed and is repeated, `FERRY-NOTE ...` for the rest.
"""
