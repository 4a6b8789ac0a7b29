"""How often OpenAI is asked: polls within a budget, and hardly at all while it fails."""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Iterator

POLLS_PER_SECOND = 100.0

log = logging.getLogger("hilo")


class Crowded(Exception):
    """Enough others are asking OpenAI already, while it fails."""


class Breaker:
    """After `limit` failures in a row OpenAI is left alone, but for one probe at a time, every `pause` seconds."""

    LOOKS = 2  # polls at one time while it fails: more workers would only hang with them
    LONGEST = 4  # pauses that a probe may take to report

    def __init__(self, limit: int = 5, pause: float = 15.0):
        self.limit, self.pause = limit, pause
        self.failures, self.next_probe = 0, 0.0
        self.probe: int | None = None  # the run that tries it
        self.looks = threading.Semaphore(self.LOOKS)
        self.lock = threading.Lock()

    @property
    def is_open(self) -> bool:
        """Whether OpenAI fails."""
        return self.failures >= self.limit

    def allows(self, run: int) -> bool:
        """Tell whether a turn may go to the model; while open, the one that is allowed is the probe."""
        with self.lock:
            now = time.monotonic()
            if not self.is_open or run == self.probe:
                return True
            if now < self.next_probe + (0.0 if self.probe is None else (self.LONGEST - 1) * self.pause):
                return False
            self.probe, self.next_probe = run, now + self.pause
            return True

    @contextlib.contextmanager
    def narrow(self) -> Iterator[None]:
        """Lend a place to look at a response; while open there are few, and without one it raises Crowded."""
        placed = self.is_open
        if placed and not self.looks.acquire(blocking=False):
            raise Crowded
        try:
            yield
        finally:
            if placed:
                self.looks.release()

    def failed(self, run: int) -> None:
        """Count a failure of OpenAI itself, in a run's call."""
        with self.lock:
            self.failures += 1
            self.probe = None if run == self.probe else self.probe
            if self.failures == self.limit:
                self.next_probe = time.monotonic() + self.pause
                log.error("⚠️ OpenAI failed %d times in a row: the traditional flow answers", self.failures)

    def succeeded(self) -> None:
        """Take note that OpenAI has completed a response; that it took or showed one says little."""
        if self.failures:
            with self.lock:
                if self.is_open:
                    log.info("✅ OpenAI is back")
                self.failures, self.probe = 0, None


class Pacer:
    """Hands out moments for polls: each run no faster than its own interval, all together within the budget."""

    def __init__(self, per_second: float = POLLS_PER_SECOND):
        self.gap = 1 / per_second
        self.next = 0.0
        self.lock = threading.Lock()

    def delay(self, least: float) -> float:
        """Return in how many seconds to poll, at least `least`."""
        with self.lock:
            now = time.monotonic()
            self.next = max(self.next, now) + self.gap
            return max(least, self.next - now)
