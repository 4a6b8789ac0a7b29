"""Seconds from process start to the first webhook accepted, and memory at rest.

    python -m bench.startup [times]
"""

from __future__ import annotations

import statistics
import sys
import time

from bench.stage import Sender, Stage, database


def main() -> None:
    """Print the medians."""
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    seconds, memory = [], []
    with database() as url:
        for n in range(times):
            stage = Stage(url, start=False)
            start = time.perf_counter()
            stage.start_gateway()
            while True:
                try:
                    sender = Sender(stage.url)
                    sender.post(*sender.form(n + 1, 0))
                    break
                except OSError:
                    time.sleep(0.01)
            seconds.append(time.perf_counter() - start)
            time.sleep(3)
            memory.append(stage.gateway.status("VmRSS") / 1024)
            stage.stop()
    first, rest = statistics.median(seconds), statistics.median(memory)
    print(f"first webhook after {first:.2f} s, at rest {rest:.0f} MB resident")


if __name__ == "__main__":
    main()
