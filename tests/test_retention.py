"""What is old goes, in batches; what is not done, and what a new conversation is told, stays."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.conftest import ANA, Hilo, wait_for

FILL = """
WITH u AS (INSERT INTO users (user_phone, reply_to) VALUES (:u, :u)),
r AS (INSERT INTO runs (user_phone, state, due_at, outcome, created_at, finished_at)
    SELECT :u, 'done', now(), 'answered', now() - make_interval(days => :age), now() - make_interval(days => :age)
    FROM generate_series(1, :n) RETURNING id)
INSERT INTO messages (sid, user_phone, direction, body, run_id, at)
SELECT :u || id, :u, 'in', 'hola', id, now() - make_interval(days => :age) FROM r
"""


def fill(hilo: Hilo, user: str, n: int, age: int) -> None:
    """Give a user `n` turns that were done so many days ago."""
    hilo.db.rows(FILL, {"u": user, "n": n, "age": age})


def counts(hilo: Hilo) -> dict[str, Any]:
    return hilo.rows("SELECT (SELECT count(*) FROM messages) AS messages, (SELECT count(*) FROM runs) AS runs")[0]


def test_old_turns_are_removed_but_the_last_twenty_lines(start: Callable[..., Hilo]) -> None:
    hilo = start(RETENTION_DAYS="0")
    fill(hilo, ANA, 30, 400)
    fill(hilo, "whatsapp:+5215511110002", 5, 400)
    hilo.rows(
        "INSERT INTO tool_calls (call_id, run_id, response_id, name, arguments) "
        "SELECT 'c' || id, id, 'r', 'f', '{}' FROM runs"
    )
    later = start(RETENTION_DAYS="90")
    wait_for(lambda: counts(later) == {"messages": 25, "runs": 25})
    assert later.rows("SELECT count(*) AS n FROM tool_calls")[0]["n"] == 0


def test_what_is_not_done_stays_whatever_its_age(start: Callable[..., Hilo]) -> None:
    hilo = start(RETENTION_DAYS="0", WORKER_THREADS="0")
    fill(hilo, ANA, 30, 400)
    hilo.rows(
        "UPDATE runs SET state = 'waiting', due_at = now() + interval '1 day' WHERE id = (SELECT min(id) FROM runs)"
    )
    later = start(RETENTION_DAYS="90", WORKER_THREADS="0")
    wait_for(lambda: counts(later) == {"messages": 21, "runs": 21})
    assert later.rows("SELECT count(*) AS n FROM runs WHERE state = 'waiting'")[0]["n"] == 1


def test_zero_days_keep_everything(start: Callable[..., Hilo]) -> None:
    hilo = start(RETENTION_DAYS="0")
    fill(hilo, ANA, 30, 4000)
    hilo.gateway.upkeep.prune()
    assert counts(hilo) == {"messages": 30, "runs": 30}
