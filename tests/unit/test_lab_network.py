"""What a lab's network work takes for known of a namespace's interfaces, and what it looks at."""

from __future__ import annotations

import errno
from typing import Any

import pytest
from pyroute2 import NetlinkError

from deploy.lab.network import _Namespace


class Route:
    """A namespace with interfaces, of which `dying` are listed and can't be deleted any more."""

    def __init__(self, *names: str) -> None:
        self.names = list(names)
        self.dying: set[str] = set()
        self.refusal = errno.ENODEV
        self.looks = 0

    def get_links(self) -> list[Any]:
        self.looks += 1
        return [_Link(index, name) for index, name in enumerate(self.names, 1)]

    def link(self, command: str, **what: Any) -> None:
        if command == "add":
            self.names.append(what["ifname"])
        elif command == "del":
            name = self.names[what["index"] - 1]
            if name in self.dying:
                raise NetlinkError(self.refusal)
            self.names.remove(name)


class _Link(dict[str, int]):
    def __init__(self, index: int, name: str) -> None:
        super().__init__(index=index)
        self._name = name

    def get_attr(self, name: str) -> str | None:
        return self._name if name == "IFLA_IFNAME" else None


def test_interfaces_are_looked_at_again_after_what_changed_them() -> None:
    route, other = Route("lo"), Route("lo")
    hub, end = _Namespace("hub", route), _Namespace("end", other)
    for _ in range(3):
        assert set(hub.interfaces()) == {"lo"} == set(end.interfaces())
        hub.raise_up("lo")
    assert (route.looks, other.looks) == (1, 1)
    other.names.append("eth0")
    hub.add_veth("port", end, "eth0")
    assert set(hub.interfaces()) == {"lo", "port"}
    assert set(end.interfaces()) == {"lo", "eth0"}
    assert (route.looks, other.looks) == (2, 2)


def test_an_interface_that_goes_by_itself_is_deleted() -> None:
    """A removed namespace's cables end some time after it."""
    route = Route("lo", "port", "gone")
    hub = _Namespace("hub", route)
    assert "gone" in hub.interfaces()
    route.names.remove("gone")
    hub.delete("gone")
    route.dying.add("port")
    hub.delete("port")
    route.refusal = errno.EPERM
    with pytest.raises(NetlinkError):
        hub.delete("port")
