"""Webhooks acknowledged a second, against an empty handler on the same server, and their latency under steady work.

    python -m bench.webhooks [seconds]
"""

from __future__ import annotations

import http.client
import statistics
import sys
import threading
import time
from collections.abc import Callable
from urllib.parse import urlsplit

from bench.stage import Process, Sender, Stage, database, free_port

EMPTY = """
import bottle, sys, waitress
app = bottle.Bottle()
app.route("/webhooks/twilio", "POST", lambda: "<Response/>")
server = waitress.create_server(app, host="127.0.0.1", port=int(sys.argv[1]), threads=8, connection_limit=1500,
                                backlog=2048, asyncore_use_poll=True)
print("ready", flush=True)
server.run()
"""
CLIENTS = 8
ROUNDS = 4
WARM_UP = 4.0  # seconds that do not count: a gateway that has just started still imports what it will need


def rate(url: str, seconds: float, first_user: int) -> float:
    """Return how many webhooks a second are answered to a few clients that never pause."""
    counts = [0] * CLIENTS
    prepared = [[Sender(url).form(first_user + client, n) for n in range(3000)] for client in range(CLIENTS)]
    end = time.monotonic() + seconds

    def client(index: int) -> None:
        sender = Sender(url)
        for body, headers in prepared[index]:
            if time.monotonic() >= end:
                return
            sender.post(body, headers)
            counts[index] += 1

    run(client, CLIENTS)
    return sum(counts) / seconds


def run(target: Callable[[int], None], count: int) -> None:
    """Run a function in so many threads and wait for all."""
    threads = [threading.Thread(target=target, args=(index,)) for index in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def latencies(stage: Stage, per_second: int, seconds: int) -> list[float]:
    """Return the seconds that each webhook took, sorted, at a fixed rate while the workers answer them."""
    taken: list[float] = []
    start = time.monotonic()

    def client(index: int) -> None:
        sender = Sender(stage.url)
        for n in range(index, per_second * seconds, 4):
            time.sleep(max(0.0, start + n / per_second - time.monotonic()))
            taken.append(sender.post(*sender.form(5_000_000 + n, 0)))

    run(client, 4)
    return sorted(taken)


def alive(port: int) -> None:
    """Return when something listens on a port."""
    while True:
        try:
            http.client.HTTPConnection(urlsplit(f"http://127.0.0.1:{port}").netloc, timeout=1).connect()
            return
        except OSError:
            time.sleep(0.05)


def main() -> None:
    """Print the two rates with their ratio, medians of rounds in turn, and the latencies."""
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 16
    port = free_port()
    empty = Process("-c", EMPTY, str(port))
    with database() as database_url:
        # Web only: the acknowledgement is what is measured; the messages wait for a worker.
        stage = Stage(database_url, WORKER_THREADS="0")
        try:
            alive(port)
            urls = f"http://127.0.0.1:{port}", stage.url
            for n, url in enumerate(urls):
                rate(url, WARM_UP, 9000 + n * 100)
            rounds = [[rate(url, seconds / ROUNDS, n * 1000) for url in urls] for n in range(ROUNDS)]
        finally:
            stage.stop()
            empty.stop()
        bare, ours = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(ours / bare for bare, ours in rounds)
        print(f"acknowledged: empty handler {bare:.0f}/s, gateway {ours:.0f}/s, ratio {ratio:.2f}", flush=True)
    with database() as url:
        stage = Stage(url)
        try:
            taken = latencies(stage, 100, int(seconds))
        finally:
            stage.stop()
        p50, p99 = taken[len(taken) // 2], taken[int(len(taken) * 0.99)]
        print(f"at 100/s with the workers busy: p50 {p50 * 1000:.1f} ms, p99 {p99 * 1000:.1f} ms")


if __name__ == "__main__":
    main()
