"""How often OpenAI is asked: polls within a budget, and hardly at all while it fails."""

from __future__ import annotations

import logging
import threading
import time

POLLS_PER_SECOND = 100.0

log = logging.getLogger("hilo")


class Breaker:
    """After `limit` failures in a row OpenAI is left alone, but for one probe every `pause` seconds."""

    def __init__(self, limit: int = 5, pause: float = 15.0):
        self.limit, self.pause = limit, pause
        self.failures, self.next_probe = 0, 0.0
        self.lock = threading.Lock()

    def allows(self) -> bool:
        """Tell whether a new turn may go to the model; while open, the one that is allowed is the probe."""
        with self.lock:
            if self.failures < self.limit:
                return True
            if time.monotonic() < self.next_probe:
                return False
            self.next_probe = time.monotonic() + self.pause
            return True

    def failed(self) -> None:
        """Count a failure of OpenAI itself."""
        with self.lock:
            self.failures += 1
            if self.failures == self.limit:
                self.next_probe = time.monotonic() + self.pause
                log.error("⚠️ OpenAI failed %d times in a row: the traditional flow answers", self.failures)

    def succeeded(self) -> None:
        """Take note that OpenAI has completed a response; that it took or showed one says little."""
        if self.failures:
            with self.lock:
                if self.failures >= self.limit:
                    log.info("✅ OpenAI is back")
                self.failures = 0


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
