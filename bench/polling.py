"""Without OpenAI's webhook: how late a finished response is noticed, and how many requests that takes.

    python -m bench.polling [conversations in flight …]

Beside each other: the gateway with its poll budget, the gateway with webhooks, and the usual sample, which has a
thread a message that asks every half second. The model thinks for any time between 8 and 16 seconds, so that all of
the conversations are in flight at one moment.
"""

from __future__ import annotations

import sys
import time

from bench.in_flight import BLOCKING, answered, send
from bench.stage import ACCOUNT, NUMBER, TOKEN, Process, Stage, database, get, until_ready

THINK = (8.0, 16.0)  # seconds
RAMP = 80.0  # messages a second


def figures(stage: Stage, url: str, count: int) -> tuple[dict[str, float], int]:
    """Return the lags in milliseconds from "completed" to the reply at Twilio, and how often OpenAI was asked."""
    since = time.time()
    before = looks(stage)
    send(url, 1, count, RAMP)
    replies = answered(stage, count, 60)
    if replies < count:
        raise SystemExit(f"only {replies} of {count} were answered")
    lags: dict[str, float] = get(f"{stage.twilio_url}/_stats?since={since}")["lag_ms"]
    return lags, looks(stage) - before


def looks(stage: Stage) -> int:
    """Return how often the local OpenAI was asked for a response."""
    return int(stage.openai_stats()["polls"])


def gateway(count: int, webhooks: bool) -> tuple[dict[str, float], int]:
    """Return the figures of the gateway, told by webhooks or not."""
    with database() as url:
        stage = Stage(url, webhooks=webhooks, think=THINK, model="clock")
        try:
            return figures(stage, stage.url, count)
        finally:
            stage.stop()


def sample(count: int) -> tuple[dict[str, float], int]:
    """Return the figures of one thread a message."""
    with database() as url:
        stage = Stage(url, webhooks=False, think=THINK, model="clock")
        port = stage.port + 1
        process = Process("-c", BLOCKING, str(port), stage.openai_url, stage.twilio_url, ACCOUNT, TOKEN, NUMBER)
        try:
            until_ready(f"http://127.0.0.1:{port}")
            return figures(stage, f"http://127.0.0.1:{port}", count)
        finally:
            process.stop()
            stage.stop()


def main() -> None:
    """Print a row for each way and number of conversations, with its requests against the sample's."""
    for count in [int(argument) for argument in sys.argv[1:]] or [50, 200, 500]:
        rows = {
            "one thread a message": sample(count),
            "gateway, polling": gateway(count, webhooks=False),
            "gateway, webhooks": gateway(count, webhooks=True),
        }
        usual = rows["one thread a message"][1]
        for name, (lags, asked) in rows.items():
            late = f"completed to reply p50 {lags['p50']:.0f} ms, p95 {lags['p95']:.0f} ms"
            often = f"OpenAI asked {asked / count:.1f} times a turn, ratio {asked / usual:.2f}"
            print(f"{count:>4} in flight, {name:>20}: {late}; {often}", flush=True)


if __name__ == "__main__":
    main()
