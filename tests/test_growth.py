"""The cost of a turn does not grow with what is stored: every statement finds its rows by an index."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable
from typing import Any

import pg8000.native
import pytest

from database import QUERIES, Database
from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo
from tests.local_openai import LocalOpenAI, course_assistant

BIG = ("messages", "runs", "responses", "tool_calls", "users", "oa_threads_map")
ONCE_A_DAY = {"prune_messages", "prune_runs"}  # they walk along the primary key, a window at a time
FIRST_ENTRY = {"next_due"}  # and no other
ALL_OPEN = {"open_runs"}  # it counts them

FILL = """
WITH u AS (INSERT INTO users (user_phone, reply_to) SELECT 'whatsapp:+1' || n, 'whatsapp:+1' || n
    FROM generate_series(1, 2000) n RETURNING user_phone),
t AS (INSERT INTO oa_threads_map (user_phone, thread_id) SELECT user_phone, 'conv_' || user_phone FROM u),
r AS (INSERT INTO runs (user_phone, state, due_at, outcome, finished_at)
    SELECT user_phone, CASE WHEN k > 9 THEN 'waiting' ELSE 'done' END, now() + interval '1 day', 'answered', now()
    FROM u, generate_series(1, 10) k RETURNING id, user_phone),
a AS (INSERT INTO responses (id, run_id) SELECT 'resp_' || id, id FROM r),
c AS (INSERT INTO tool_calls (call_id, run_id, response_id, name, arguments)
    SELECT 'call_' || id, id, 'resp_' || id, 'f', '{}' FROM r)
INSERT INTO messages (sid, user_phone, direction, body, run_id, state)
SELECT d || id, user_phone, d, 'hola', id, CASE d WHEN 'out' THEN 'sent' END FROM r, unnest(ARRAY['in', 'out']) d
"""

# Messages that a run has not taken yet, of users who write much at this moment.
WAITING = """
INSERT INTO messages (sid, user_phone, direction, body)
SELECT 'waiting' || id, user_phone, 'in', 'hola' FROM runs WHERE state = 'waiting'
"""


def scans(db: Database) -> dict[str, int]:
    """Return how often each table was read from end to end, as finished sessions reported it."""
    rows = db.rows("SELECT relname, seq_scan FROM pg_stat_user_tables")
    return {row["relname"]: row["seq_scan"] for row in rows if row["relname"] in BIG}


def test_turns_on_a_full_database_read_no_table_from_end_to_end(
    start: Callable[..., Hilo], database_url: str, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    own = Database(database_url, 1)
    own.rows(FILL)
    with own.connection() as connection:
        connection.run("ANALYZE")
    hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET, RETENTION_DAYS="0")
    openai_server.model = course_assistant
    before = scans(own)
    talk(twilio, 0, 3)
    hilo.stop()
    own.close()
    own = Database(database_url, 1)
    assert scans(own) == before
    own.close()


def talk(twilio: Simulator, first: int, last: int) -> None:
    """Have some turns, up to the last callback."""
    for n in range(first, last):
        twilio.receive(ANA, f"curso de excel {n}")
        twilio.wait_for(ANA, n + 1)
    twilio.wait_until(lambda: all(message.status == "read" for message in twilio.sent_to(ANA)))


def test_plan_that_was_made_for_empty_tables_reads_none_of_them_whole_once_they_are_full(
    start: Callable[..., Hilo], database_url: str, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    own = Database(database_url, 1)
    if int(own.rows("SHOW server_version_num")[0]["server_version_num"]) < 150000:
        pytest.skip("pg_stat_force_next_flush came with PostgreSQL 15")
    hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET, RETENTION_DAYS="0", DB_CONNECTIONS="1", LIMITE_MINUTO="0")
    openai_server.model = course_assistant
    talk(twilio, 0, 7)  # from the sixth time on PostgreSQL keeps a statement's plan, as long as the connection lives
    own.rows(FILL)  # without ANALYZE, which would make all plans anew
    own.rows(WAITING)
    own.rows("SELECT pg_stat_force_next_flush()")
    own.close()
    before = reads(database_url)
    talk(twilio, 7, 9)
    hilo.stop()
    after = reads(database_url)
    assert not {name: after[name] - n for name, n in before.items() if after[name] - n >= 1000}


def reads(url: str) -> dict[str, int]:
    """Return how many rows were read of each big table from end to end, and entries of each of their indexes."""
    with contextlib.closing(Database(url, 1)) as db:
        db.rows("SELECT pg_stat_force_next_flush()")
        tables = db.rows("SELECT relname AS name, seq_tup_read AS n FROM pg_stat_user_tables")
        indexes = db.rows("SELECT relname, indexrelname AS name, idx_tup_read AS n FROM pg_stat_user_indexes")
    return {row["name"]: row["n"] for row in [*tables, *indexes] if row.get("relname", row["name"]) in BIG}


def test_statement_needs_no_scan_of_a_table_whatever_the_planner_knows(database_url: str) -> None:
    db = Database(database_url, 1)
    with db.connection() as connection:
        if int(connection.run("SHOW server_version_num")[0][0]) < 160000:
            pytest.skip("EXPLAIN (GENERIC_PLAN) came with PostgreSQL 16")
        found = scanning(connection, "empty tables", set())
        connection.run(FILL)
        connection.run(WAITING)
        for tables in ["", *itertools.combinations(BIG, 1), *itertools.combinations(BIG, 2), BIG]:
            if tables:
                connection.run("BEGIN")
                connection.run(f"ANALYZE {', '.join(tables)}")
            found += scanning(connection, f"analyzed: {tables}", ALL_OPEN)
            if tables:
                connection.run("ROLLBACK")
        for table in ("runs", *BIG):  # this leaves how large it is, without what is in it
            connection.run(f"VACUUM {table}")
            found += scanning(connection, f"vacuumed: {table}", ALL_OPEN)
    db.close()
    assert not found


def scanning(connection: pg8000.native.Connection, when: str, but: set[str]) -> list[str]:
    """Return the statements, except those named, whose plan for any parameters reads a big table from end to end."""
    found = []
    for name in sorted(set(QUERIES) - ONCE_A_DAY - FIRST_ENTRY - but):
        statement, _ = pg8000.native.to_statement(QUERIES[name])
        plan = connection.run(f"EXPLAIN (GENERIC_PLAN, FORMAT JSON) {statement}")[0][0]
        found += [f"{when}: {name}: {node}" for node in nodes(plan[0]["Plan"]) if scanned(node)]
    return found


def nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    """Return a plan's nodes."""
    return [plan, *(node for child in plan.get("Plans", ()) for node in nodes(child))]


def scanned(node: dict[str, Any]) -> bool:
    """Tell whether a node reads a big table, or an index without a condition, from end to end."""
    whole = node["Node Type"] == "Seq Scan" or (
        node["Node Type"] in ("Index Scan", "Index Only Scan") and "Index Cond" not in node
    )
    return whole and node["Relation Name"] in BIG
