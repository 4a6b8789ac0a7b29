"""Conversations in flight at one moment: what they cost a gateway that holds rows, and one that holds threads.

    python -m bench.in_flight [conversations] [steady messages a second]

All the messages come in while the model thinks; then memory and threads are read, and every message must be
answered. At a steady rate afterwards: the time from "response completed" to "reply at Twilio". The baseline is what
the usual samples do: one thread a message that polls until the model is done.
"""

from __future__ import annotations

import sys
import threading
import time

from bench.stage import ACCOUNT, NUMBER, TOKEN, Process, Sender, Stage, database, get, raise_descriptors, until_ready

BLOCKING = """
import sys, threading, time, bottle, openai, waitress
from twilio.rest import Client
from whatsapp import make_transport
port, openai_url, twilio_url, account, token, number = sys.argv[1:]
client = openai.OpenAI(api_key="sk-local", base_url=openai_url, max_retries=0)
twilio = Client(account, token, http_client=make_transport(twilio_url, 30.0))
def turn(sender, text):
    conversation = client.conversations.create()
    made = client.responses.create(
        model="gpt-6-luna", conversation=conversation.id, background=True, store=True, input=text)
    while made.status in ("queued", "in_progress"):
        time.sleep(0.5)
        made = client.responses.retrieve(made.id)
    twilio.messages.create(to=sender, from_=number, body=made.output_text)
app = bottle.Bottle()
@app.post("/webhooks/twilio")
def webhook():
    threading.Thread(target=turn, args=(bottle.request.forms.From, bottle.request.forms.Body), daemon=True).start()
    return "<Response/>"
@app.get("/")
def health():
    return "{}"
waitress.serve(app, host="127.0.0.1", port=int(port), threads=8, connection_limit=1500, asyncore_use_poll=True)
"""

RAMP = 25.0  # messages a second, which must leave the machine time for the looks at those in flight


def send(url: str, first: int, count: int, per_second: float) -> None:
    """Send messages of new users at a rate."""
    start = time.monotonic()

    def client(index: int) -> None:
        sender = Sender(url)
        for n in range(index, count, 4):
            time.sleep(max(0.0, start + n / per_second - time.monotonic()))
            sender.post(*sender.form(first + n, 0))

    threads = [threading.Thread(target=client, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def held(process: Process) -> str:
    """Return a process's memory and threads."""
    return f"{process.status('VmRSS') / 1024:.0f} MB resident, {process.status('Threads')} threads"


def answered(stage: Stage, count: int, timeout: float) -> int:
    """Return how many users have their reply, once it is `count` or time is up."""
    end = time.monotonic() + timeout
    while (replies := stage.replies()) < count and time.monotonic() < end:
        time.sleep(0.5)
    return replies


def ours(count: int, ramp: float, steady: float) -> None:
    """Print what the gateway holds with `count` runs waiting, and how soon a reply follows the model."""
    with database() as url:
        think = count / ramp + 20
        stage = Stage(url, think=[think], model="clock", THREADS_RUN_TIMEOUT=str(int(think) + 300))
        try:
            print(f"gateway at rest: {held(stage.gateway)}", flush=True)
            send(stage.url, 1, count, ramp)
            while (now := stage.openai_stats()["in_flight"]) < count * 0.99 and stage.replies() == 0:
                time.sleep(0.5)
            print(f"gateway, {now} in flight: {held(stage.gateway)}", flush=True)
            print(f"gateway: {answered(stage, count, think + 240)} of {count} answered", flush=True)
            get(stage.openai_url.removesuffix("/v1") + "/_control", {"think_seconds": 2})
            since = time.time()
            send(stage.url, 1_000_000, int(steady * 20), steady)
            answered(stage, count + int(steady * 20), 30)
            lag = get(f"{stage.twilio_url}/_stats?since={since}")["lag_ms"]
            times = f"p50 {lag['p50']:.0f} ms, p95 {lag['p95']:.0f} ms"
            print(f"gateway at {steady:.0f}/s: completed to reply {times}", flush=True)
        finally:
            stage.stop()


def blocking(count: int, ramp: float) -> None:
    """Print the same of one thread a message."""
    with database() as url:
        stage = Stage(url, webhooks=False, think=[count / ramp + 20])
        port = stage.port + 1
        sample = Process("-c", BLOCKING, str(port), stage.openai_url, stage.twilio_url, ACCOUNT, TOKEN, NUMBER)
        try:
            until_ready(f"http://127.0.0.1:{port}")
            send(f"http://127.0.0.1:{port}", 1, count, ramp)
            print(f"one thread a message, {stage.openai_stats()['in_flight']} in flight: {held(sample)}", flush=True)
            print(f"one thread a message: {answered(stage, count, count / ramp + 60)} of {count} answered", flush=True)
        finally:
            sample.stop()
            stage.stop()


def main() -> None:
    """Run both; the blocking one with as many as it can reasonably hold."""
    raise_descriptors()
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    steady = float(sys.argv[2]) if len(sys.argv) > 2 else 15.0
    ours(count, RAMP, steady)
    blocking(min(count, 1000), 40.0)


if __name__ == "__main__":
    main()
