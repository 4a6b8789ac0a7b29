"""The local Twilio as a process of its own: `python -m tests.local_twilio --gateway-url http://127.0.0.1:8000`.

For benchmarks: it takes what the gateway sends without sharing the gateway's interpreter. `GET /_stats` counts.
"""

import argparse
import contextlib
import signal
import threading
from collections import Counter

import bottle

from simulator import Simulator


def stats(simulator: Simulator) -> dict[str, object]:
    """Messages by direction, outbound ones by state, and how many callbacks and typing indicators there were.

    `lag_ms`: from the moment that a text names (seconds since 1970) to its arrival, for texts that name one which is
    later than the query's `since`."""
    messages = list(simulator.messages)
    outbound = [message for message in messages if message.direction != "inbound"]
    since = float(bottle.request.query.get("since", 0))
    lags = []
    for message in outbound:
        with contextlib.suppress(ValueError):
            if (done := float(message.body)) > since and message.created:
                lags.append((message.created.timestamp() - done) * 1000)
    lags.sort()
    return {
        "lag_ms": {f"p{p}": lags[int(len(lags) * p / 100)] for p in (50, 95, 99)} if lags else {},
        "messages": Counter(message.direction for message in messages),
        "states": Counter(message.status for message in outbound),
        "recipients": len({message.to for message in outbound}),
        "callbacks": len(simulator.callbacks),
        "typing": len(simulator.typing),
    }


def main() -> None:
    """Serve until SIGTERM or SIGINT; the URL is the first line printed."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--gateway-url", default="")
    parser.add_argument("--no-callbacks", action="store_true")
    parser.add_argument("--threads", type=int, default=32)
    options = parser.parse_args()
    done = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: done.set())
    simulator = Simulator(options.gateway_url, port=options.port, callbacks=not options.no_callbacks,
                          threads=options.threads)
    simulator.app.route("/_stats", "GET", lambda: stats(simulator))
    with simulator:
        print(simulator.url, flush=True)
        done.wait()


if __name__ == "__main__":
    main()
