"""Messages a second from webhook to reply, with a model that answers at once, against the bare SDK calls.

    python -m bench.throughput [messages]

The bare script makes the same SDK calls (conversation, response, look, send) from as many threads, with no database
and no durability. Every message is from a new user in both.
"""

from __future__ import annotations

import statistics
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bench.stage import ACCOUNT, NUMBER, TOKEN, Sender, Stage, database

THREADS = 16
ROUNDS = 5


def through_gateway(stage: Stage, messages: int) -> float:
    """Return messages a second from the first webhook to the last reply."""
    before = stage.replies()
    offset = int(time.time() * 10) % 10_000_000 * 10  # users that nobody has seen
    local = threading.local()

    def post(n: int) -> None:
        if not hasattr(local, "sender"):
            local.sender = Sender(stage.url)
        local.sender.post(*local.sender.form(offset + n, 0))

    start = time.perf_counter()
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(post, range(messages)))
    while stage.replies() < before + messages:
        time.sleep(0.2)  # each look costs the local Twilio time
    return messages / (time.perf_counter() - start)


def bare(stage: Stage, messages: int) -> float:
    """Return messages a second of the same SDK calls alone."""
    import openai
    from twilio.rest import Client

    from settings import load_assistants
    from tools._plugins import Plugins
    from whatsapp import make_transport

    assistant = load_assistants()[0]["cursos"]
    definitions: list[Any] = [tool.definition for tool in Plugins().tools.values()]
    client = openai.OpenAI(api_key="sk-local", base_url=stage.openai_url, max_retries=0)
    twilio = Client(ACCOUNT, TOKEN, http_client=make_transport(stage.twilio_url, 10.0))

    def turn(n: int) -> None:
        conversation = client.conversations.create()
        made = client.responses.create(
            model=assistant.model, instructions=assistant.instructions, conversation=conversation.id, background=True,
            store=True, tools=definitions, input=[{"role": "user", "content": f"hola {n}"}],
        )  # fmt: skip
        while made.status in ("queued", "in_progress"):
            made = client.responses.retrieve(made.id)
        twilio.messages.create(to=f"whatsapp:+52199{n:08d}", from_=NUMBER, body=made.output_text)

    start = time.perf_counter()
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(turn, range(messages)))
    return messages / (time.perf_counter() - start)


def main() -> None:
    """Print both figures and their ratio, without and with status callbacks: the medians of rounds in turn, for the
    machine's own speed changes from one minute to the next."""
    messages = (int(sys.argv[1]) if len(sys.argv) > 1 else 1500) // ROUNDS
    with database() as url:
        for callbacks in (False, True):
            stage = Stage(url, callbacks=callbacks)
            rounds = []
            try:
                through_gateway(stage, 100)
                bare(stage, 50)
                for _ in range(ROUNDS):
                    spent = time.process_time()
                    alone = bare(stage, messages)
                    bare_cpu = (time.process_time() - spent) / messages * 1000
                    before = stage.gateway.cpu()
                    ours = through_gateway(stage, messages)
                    cpu = (stage.gateway.cpu() - before) / messages * 1000
                    rounds.append((alone, ours, ours / alone, bare_cpu, cpu))
            finally:
                stage.stop()
            alone, ours, ratio, bare_cpu, cpu = (statistics.median(column) for column in zip(*rounds, strict=True))
            name = "with status callbacks" if callbacks else "without status callbacks"
            print(f"{name}: bare SDK {alone:.0f}/s, gateway {ours:.0f}/s, ratio {ratio:.2f}, "
                  f"CPU a message: bare {bare_cpu:.1f} ms, gateway {cpu:.1f} ms", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
