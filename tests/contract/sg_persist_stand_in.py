"""A stand-in for sg_persist: it speaks as sg3-utils 1.46 does, about a device that is a JSON file.

Only what deploy/samples/block-fence asks for. The node that it is called on is $STAND_IN_NODE.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

CONFLICT = 24


def main(arguments: list[str]) -> int:
    path = Path(arguments[-1])
    state = json.loads(path.read_text())
    keys: dict[str, int] = state["keys"]
    node = os.environ["STAND_IN_NODE"]
    values = dict(word.split("=", 1) for word in arguments if "=" in word)
    own, other = (int(values.get(name, "0"), 16) for name in ("--param-rk", "--param-sark"))
    if "--read-keys" in arguments:
        print(f"  PR generation=0x1, {len(keys)} registered reservation keys follow:")
        for key in keys.values():
            print(f"    {key:#x}")
        return 0
    if "--read-reservation" in arguments:
        if state["holder"]:
            print(f"  PR generation=0x1, Reservation follows:\n    Key={state['holder']:#x}")
            print("    scope: LU_SCOPE,  type: Write Exclusive, registrants only")
        else:
            print("  PR generation=0x1, there is NO reservation held")
        return 0
    if "--register-ignore" in arguments:
        keys[node] = other
    elif keys.get(node) != own:
        print("persistent reserve out: Reservation conflict", file=sys.stderr)
        return CONFLICT
    elif "--reserve" in arguments:
        if state["holder"] not in (0, own):
            return CONFLICT
        state["holder"] = own
    elif "--preempt" in arguments:
        if other not in keys.values():
            return CONFLICT
        state["keys"] = {name: key for name, key in keys.items() if key != other or name == node}
        if state["holder"] == other:
            state["holder"] = own
    path.write_text(json.dumps(state))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
