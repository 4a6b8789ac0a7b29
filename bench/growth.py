"""What the statements of the journey cost as the tables grow: milliseconds each, side by side.

    python -m bench.growth [messages …]
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

from bench.stage import database
from database import Database
from inbox import inbound

ROUNDS = 200
FILL = """
WITH u AS (INSERT INTO users (user_phone, reply_to) SELECT 'whatsapp:+1' || n, 'whatsapp:+1' || n
    FROM generate_series(:first::int, :last::int) n RETURNING user_phone),
r AS (INSERT INTO runs (user_phone, state, due_at, outcome, finished_at)
    SELECT user_phone, 'done', now(), 'answered', now() FROM u, generate_series(1, 5) RETURNING id, user_phone),
a AS (INSERT INTO responses (id, run_id) SELECT 'resp_' || id, id FROM r)
INSERT INTO messages (sid, user_phone, direction, body, run_id, state)
SELECT d || id, user_phone, d, 'hola', id, CASE d WHEN 'out' THEN 'sent' END FROM r, unnest(ARRAY['in', 'out']) d
"""
WAIT = """
WITH r AS (INSERT INTO runs (user_phone, state, due_at, deadline, response_id)
    SELECT user_phone, 'waiting', now() + interval '1 hour', now() + interval '1 hour',
        'resp_w' || :n::int || user_phone
    FROM users ORDER BY user_phone LIMIT :n::int RETURNING id, response_id)
INSERT INTO responses (id, run_id) SELECT response_id, id FROM r
"""


def median(call: Callable[[int], Any]) -> float:
    """Return the median milliseconds of a call."""
    taken = []
    for n in range(ROUNDS):
        start = time.perf_counter()
        call(n)
        taken.append((time.perf_counter() - start) * 1000)
    return statistics.median(taken)


def figures(db: Database, tag: str) -> dict[str, float]:
    """Return the median milliseconds of each step."""
    def receive(n: int) -> None:
        form = {"MessageSid": f"SM{tag}{n}", "From": f"whatsapp:+9{tag}{n}", "To": "whatsapp:+1", "Body": "hola"}
        db.one("receive", messages=json.dumps([inbound(form, 0)]), patience="0")

    costs = {"receive": median(receive)}
    claimed: list[dict[str, Any]] = []
    costs["claim"] = median(lambda n: claimed.extend(db.all("claim", n=1, lease=600.0)))
    costs["take"] = median(lambda n: db.all("take", id=claimed[n]["id"], a=claimed[n]["attempt"], timeout=30.0))
    costs["wake"] = median(lambda n: db.one("wake_by_response", resp=f"resp_x{tag}_{n}", lease=10.0))
    costs["history"] = median(lambda n: db.all("history", u=claimed[n]["user_phone"], n=20, run=None, advisors=[]))
    costs["health"] = median(lambda n: db.all("open_runs"))
    db.rows("DELETE FROM runs WHERE held")
    return costs


def main() -> None:
    """Print the costs at each size, and then with more runs in flight."""
    sizes = [int(size) for size in sys.argv[1:]] or [1_000, 100_000, 1_000_000]
    with database() as url:
        db = Database(url, 1)
        users = 0
        for size in sizes:
            while users < size // 10:
                last = min(size // 10, users + 5000)
                db.rows(FILL, {"first": users + 1, "last": last})
                users = last
            show(f"{size} messages", figures(db, f"{size}"), db)
        for n in (10, 1_000, 10_000):
            db.rows("DELETE FROM runs WHERE state <> 'done'")
            db.rows(WAIT, {"n": n})
            show(f"{n} in flight", figures(db, f"7{n}"), db)
        db.close()


def show(name: str, costs: dict[str, float], db: Database) -> None:
    """Print one row, and let the planner know the new size for the next."""
    print(f"{name:>18}: " + ", ".join(f"{step} {cost:.2f} ms" for step, cost in costs.items()), flush=True)
    with db.connection() as connection:
        connection.run("ANALYZE")


if __name__ == "__main__":
    main()
