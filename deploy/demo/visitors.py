"""Users of a web service: each asks its load balancer for a page, again and again.

Every request is a connection of its own, from the lab's client namespace. An answer that isn't 200,
or doesn't come, is an error; a slow one is not.
"""

from __future__ import annotations

import http.client
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

from deploy.lab.balancer import SERVED_BY
from deploy.lab.enter import enter

ANSWER_S: Final = 30.0
GAP_S: Final = 0.1
"""Between an answer and the next request."""


class Visits:
    """What all visitors saw so far; they fill it in while they ask."""

    def __init__(self) -> None:
        self.errors: list[str] = []
        self.slowest_s = 0.0
        self.served: Counter[str] = Counter()
        """Answers by the guest that gave them."""
        self._lock = threading.Lock()

    @property
    def answers(self) -> int:
        return sum(self.served.values())

    @property
    def asked(self) -> int:
        return self.answers + len(self.errors)

    def note(self, seconds: float, *, served_by: str = "", error: str = "") -> None:
        """One request's end."""
        with self._lock:
            self.slowest_s = max(self.slowest_s, seconds)
            if error:
                self.errors.append(f"{time.time():.3f} {error}")
            else:
                self.served[served_by] += 1


class _Visitor(threading.Thread):
    def __init__(self, namespace: str, frontend: str, gap_s: float, visits: Visits) -> None:
        super().__init__(daemon=True, name="visitor")
        self._namespace = namespace
        self._frontend = frontend
        self._gap_s = gap_s
        self._visits = visits
        self.stopped = threading.Event()

    def run(self) -> None:
        enter(self._namespace)
        while not self.stopped.wait(self._gap_s):
            began_s = time.monotonic()
            served_by, error = self._ask()
            self._visits.note(time.monotonic() - began_s, served_by=served_by, error=error)

    def _ask(self) -> tuple[str, str]:
        """The guest that answered, and what went wrong."""
        connection = http.client.HTTPConnection(self._frontend, timeout=ANSWER_S)
        try:
            connection.request("GET", "/")
            answer = connection.getresponse()
            answer.read()
            served_by = answer.getheader(SERVED_BY) or ""
            wrong = answer.status != http.HTTPStatus.OK
            return served_by, f"{served_by} answered {answer.status}" if wrong else ""
        except (OSError, http.client.HTTPException) as error:
            return "", repr(error)
        finally:
            connection.close()


@contextmanager
def visitors(
    namespace: str, frontend: str, count: int, *, gap_s: float = GAP_S
) -> Iterator[Visits]:
    """So many of them, until the block ends."""
    found = Visits()
    threads = [_Visitor(namespace, frontend, gap_s, found) for _ in range(count)]
    for thread in threads:
        thread.start()
    try:
        yield found
    finally:
        for thread in threads:
            thread.stopped.set()
        for thread in threads:
            thread.join(2 * ANSWER_S)
