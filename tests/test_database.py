"""The pool, DATABASE_URL in its forms, the migration, and the queue's statements where two workers meet."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import ssl
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from database import QUERIES, Database, DatabaseDown, DatabaseFault, connection_options, migrate, schema_version
from settings import ConfigurationError
from tests.conftest import ANA, Server, free_port, wait_for
from tests.owner import owned

HOST = {"host": "db.example", "port": 5432, "database": "hilo", "user": "u", "password": "p"}


@pytest.fixture
def db(database_url: str) -> Any:
    database = Database(database_url, 3)
    yield database
    database.close()


# --- DATABASE_URL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "options"),
    [
        ("postgresql://u:p@db.example/hilo", HOST | {"ssl_context": None}),
        ("postgres://u:p@db.example:6543/hilo", HOST | {"port": 6543}),
        ("postgresql://u:p@db.example/hilo?sslmode=prefer", HOST | {"ssl_context": None}),
        ("postgresql://u:p@db.example/hilo?sslmode=disable", HOST | {"ssl_context": False}),
        ("postgresql://u:p@db.example/hilo?sslmode=require", HOST | {"ssl_context": True}),
        (
            "postgresql://u%40x:p%3A%2F%23%25@db.example/hi%20lo",
            {"user": "u@x", "password": "p:/#%", "database": "hi lo"},
        ),
        ("postgresql://u@db.example/hilo", {"user": "u"}),
        ("postgresql://[::1]:6543/hilo", {"host": "::1", "port": 6543}),
        ("postgresql:///hilo?host=/var/run/pg&user=u", {"unix_sock": "/var/run/pg/.s.PGSQL.5432", "user": "u"}),
        ("postgresql://u@/hilo?host=/Tmp/Un Lugar", {"unix_sock": "/Tmp/Un Lugar/.s.PGSQL.5432", "ssl_context": False}),
        ("postgresql://u@%2FTmp%2FDatos/hilo", {"unix_sock": "/Tmp/Datos/.s.PGSQL.5432", "database": "hilo"}),
        ("postgresql://u@%2FTmp%2FDatos:6543/hilo", {"unix_sock": "/Tmp/Datos/.s.PGSQL.6543"}),
        ("postgresql:///hilo?host=/tmp&port=6543&password=x", {"unix_sock": "/tmp/.s.PGSQL.6543", "password": "x"}),
        ("postgresql:///hilo", {"host": "localhost", "port": 5432}),
        ("postgresql://DB.Example/hilo?connect_timeout=10&application_name=x", {"host": "db.example"}),
    ],
)
def test_url_becomes_the_drivers_options(url: str, options: dict[str, Any]) -> None:
    got = connection_options(url)
    assert {name: got.get(name) for name in options} == options


def test_verified_tls_checks_the_certificate_and_full_the_name_too() -> None:
    options = [
        connection_options(f"postgresql://h/d?sslmode={mode}")["ssl_context"] for mode in ("verify-ca", "verify-full")
    ]
    assert [context.verify_mode for context in options] == [ssl.CERT_REQUIRED] * 2
    assert [context.check_hostname for context in options] == [False, True]


@pytest.mark.parametrize(
    "url",
    [
        "", "hilo", "mysql://u:clave@h/d", "postgresql://u:clave@h", "postgresql://u:clave@h/", "postgresql://u:clave@h:x/d",
        "postgresql://u:clave@h:99999/d", "postgresql://u:clave@[h/d", "postgresql://u:clave@h/d?sslmode=maybe",
        "postgresql://u:clave@h/d?sslmode=verify-full&sslrootcert=/no/hay.pem", "postgresql:///d?port=clave",
        "postgresql://u:clave@h:5432:1/d",
    ],
)  # fmt: skip
def test_url_that_cannot_be_used_is_one_line_without_the_password(url: str) -> None:
    with pytest.raises(ConfigurationError, match="DATABASE_URL") as caught:
        connection_options(url)
    assert "clave" not in str(caught.value) and "\n" not in str(caught.value)


# --- The pool ---------------------------------------------------------------------------------------------


def test_fault_is_an_sqlstate_and_a_constraint_and_quotes_nobody(db: Database) -> None:
    db.rows("CREATE TABLE t (x text CONSTRAINT corta CHECK (length(x) < 3))")
    with pytest.raises(DatabaseFault) as caught:
        db.rows("INSERT INTO t VALUES (:x)", {"x": "un secreto"})
    assert str(caught.value) == "SQLSTATE 23514 corta" and caught.value.__cause__ is None
    for statement, missing in (
        ("SELECT * FROM no_existe", r"42P01 \(no such table\)"),
        ("SELECT no_existe(1)", r"42883 \(no such function\)"),
        ("SELECT no_existe FROM t", r"42703 \(no such column\)"),
    ):
        words = f"^SQLSTATE {missing}: where it is one of Hilo's, run python gateway.py migrate$"
        with pytest.raises(DatabaseFault, match=words):
            db.rows(statement)
    assert db.rows("SELECT 1 AS n") == [{"n": 1}]  # the connection is as good as before


def test_server_that_is_not_there_is_down_in_few_words() -> None:
    database = Database(f"postgresql://u:clave@127.0.0.1:{free_port()}/d")
    with pytest.raises(DatabaseDown) as caught:
        database.rows("SELECT 1")
    assert "clave" not in str(caught.value) and "\n" not in str(caught.value)


def test_connection_that_the_server_closed_is_replaced_unseen(db: Database) -> None:
    (pid,) = [row["pid"] for row in db.rows("SELECT pg_backend_pid() AS pid")]
    killer = Database(db_url(db), 1)
    killer.rows("SELECT pg_terminate_backend(:p, 10000)", {"p": pid})  # and waits until it has ended
    killer.close()
    assert db.rows("SELECT pg_backend_pid() AS pid")[0]["pid"] != pid


def db_url(db: Database) -> str:
    """The URL of a database on a socket."""
    folder = db.options["unix_sock"].rpartition("/")[0]
    return f"postgresql://{db.options['user']}@/{db.options['database']}?host={folder}"


def test_connection_killed_in_the_middle_of_a_statement_is_down_and_the_next_one_works(db: Database) -> None:
    pid = db.rows("SELECT pg_backend_pid() AS pid")[0]["pid"]
    killer = Database(db_url(db), 1)
    with ThreadPoolExecutor(1) as pool:
        hanging = pool.submit(db.rows, "SELECT pg_sleep(20)")
        running = (
            "SELECT count(*) AS n FROM pg_stat_activity WHERE pid = :p AND query LIKE '%pg_sleep%' AND state = 'active'"
        )
        while not killer.rows(running, {"p": pid})[0]["n"]:
            threading.Event().wait(0.01)
        killer.rows("SELECT pg_terminate_backend(:p)", {"p": pid})
        with pytest.raises(DatabaseDown):
            hanging.result(10)
    killer.close()
    assert db.rows("SELECT 1 AS n") == [{"n": 1}]


def test_connection_that_broke_is_closed_at_once_not_when_it_is_collected(db: Database) -> None:
    with pytest.raises(DatabaseDown) as kept, db.connection() as connection:
        descriptor = connection._usock.fileno()
        connection._usock.shutdown(socket.SHUT_RDWR)  # the server is gone: not even goodbye can be said
        connection.run("SELECT 1")
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(descriptor)
    assert kept.tb is not None  # as a log may keep the error, and with it all that its frames refer to


def test_value_that_cannot_be_encoded_leaves_the_pool_whole(db: Database) -> None:
    for _ in range(5):  # more often than there are connections
        with pytest.raises(UnicodeEncodeError):
            db.rows("SELECT :x::text", {"x": "\ud800"})
    assert db.rows("SELECT :x::text AS x", {"x": "bien"}) == [{"x": "bien"}]


def test_value_that_cannot_be_read_leaves_nothing_behind_for_the_next_statement(db: Database) -> None:
    for _ in range(5):
        with pytest.raises(ValueError, match="24:00:00"):
            db.rows("SELECT time '24:00:00' AS x UNION ALL SELECT time '23:00'")
        assert db.rows("SELECT 1 AS y") == [{"y": 1}]


def test_transaction_that_a_plugin_begins_is_refused_and_nobody_elses_rows_are_in_it(
    db: Database, database_url: str
) -> None:
    with pytest.raises(ValueError, match="transaction of its own"):
        db.guest_rows("BEGIN", {})
    db.rows("INSERT INTO hilo VALUES ('a', 'b')")
    other = Database(database_url, 1)
    assert other.rows("SELECT value FROM hilo WHERE key = 'a'") == [{"value": "b"}]
    other.close()


@pytest.mark.parametrize("change", ["SET TIME ZONE 'Asia/Tokyo'", "/* hola */ -- x\n SET TIME ZONE 'Asia/Tokyo'"])
def test_what_a_plugin_sets_is_for_no_other_statement(db: Database, change: str) -> None:
    for _ in range(4):
        db.guest_rows(change, {})
    assert db.rows("SELECT current_setting('TimeZone') AS zone") != [{"zone": "Asia/Tokyo"}]
    backends = {db.rows("-- una\n SELECT pg_backend_pid() AS pid")[0]["pid"] for _ in range(4)}
    assert len(backends) == 1  # what only reads keeps its connection


def test_many_threads_share_few_connections_and_each_gets_its_own_rows(db: Database) -> None:
    with ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda n: db.rows("SELECT :n::int AS n", {"n": n})[0]["n"], range(200)))
    assert answers == list(range(200))
    with_me = db.rows("SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database()")[0]["n"]
    assert with_me <= 3


def test_plan_made_stale_by_a_migration_is_made_anew(db: Database, database_url: str) -> None:
    db.rows("CREATE TABLE t (x int)")
    db.rows("INSERT INTO t VALUES (1)")
    assert db.rows("SELECT * FROM t") == [{"x": 1}]
    release = Database(database_url, 1)
    release.rows("ALTER TABLE t ADD y int DEFAULT 2")
    release.close()
    with pytest.raises(DatabaseDown):
        db.rows("SELECT * FROM t")
    assert db.rows("SELECT * FROM t") == [{"x": 1, "y": 2}]


def test_closed_pool_keeps_no_connection_not_even_one_that_was_lent(db: Database) -> None:
    with db.connection():
        db.close()
    other = Database(db_url(db), 1)
    left = "SELECT count(*) AS n FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"
    while other.rows(left)[0]["n"]:
        threading.Event().wait(0.01)
    with pytest.raises(DatabaseDown):
        db.rows("SELECT 1")
    other.close()


@pytest.mark.parametrize(("limit", "size"), [(20, 2), (24, 3), (30, 4), (40, 4), (6, 2)])
def test_pool_takes_no_more_of_the_servers_connections_than_leaves_others_as_many(
    postgres: Server, limit: int, size: int
) -> None:
    with owned(postgres, limit=limit) as url, contextlib.closing(Database(url, 2)) as database:
        database.widen(4)
        assert database.size == size
        held = [database.take(time.monotonic() + 5) for _ in range(size)]
        with pytest.raises(DatabaseDown, match="all connections are in use"):
            database.take(time.monotonic())
        for connection in held:
            database.give_back(connection)


def test_who_is_in_a_hurry_gets_the_next_connection_but_not_every_one(database_url: str) -> None:
    ended: list[str] = []
    with contextlib.closing(Database(database_url, 1)) as database, ThreadPoolExecutor(3) as pool:

        def ask(who: str, hurry: bool, seconds: float) -> None:
            end = time.monotonic() + 30
            database.rows("SELECT pg_sleep(:s)", {"s": seconds}, end if hurry else None)
            ended.append(who)

        database.FAIR = 30.0
        with database.connection():
            pool.submit(ask, "worker", False, 0)
            wait_for(lambda: len(database.queue) == 1)
            pool.submit(ask, "webhook", True, 0)
            wait_for(lambda: len(database.queue) == 2)
        wait_for(lambda: len(ended) == 2)
        assert ended == ["webhook", "worker"]
        database.FAIR = 0.2
        flood = [pool.submit(ask, "webhook", True, 0.3) for _ in range(12)]  # there is always one that waits
        wait_for(lambda: database.queue)
        ask("worker", False, 0)
        assert not all(future.done() for future in flood)


def test_statement_gives_way_to_a_message_that_arrives_but_not_one_that_writes_down_a_fact(db: Database) -> None:
    ended: list[str] = []
    db.GIVE_WAY = 30.0

    def work() -> None:
        db.one("get", key="schema_version")
        ended.append("worker")

    with ThreadPoolExecutor(1) as pool:
        with db.arrival():
            worker = pool.submit(work)
            db.hurried("get", key="schema_version")
            assert db.one("save_output", id="call_1", output="{}", ok=True, ms=1) is None
            time.sleep(0.03)
            ended.append("message")
        worker.result()
    assert ended == ["message", "worker"]


# --- The migration ----------------------------------------------------------------------------------------


def test_schema_is_applied_once_and_may_be_applied_again(empty_database_url: str) -> None:
    assert migrate(empty_database_url) is True and migrate(empty_database_url) is False
    database = Database(empty_database_url, 1)
    before = database.rows("SELECT value FROM hilo WHERE key = 'safety_secret'")
    database.rows("UPDATE hilo SET value = '0' WHERE key = 'schema_version'")
    assert migrate(empty_database_url) is True
    assert database.rows("SELECT value FROM hilo WHERE key = 'safety_secret'") == before
    database.close()


def test_two_processes_that_migrate_at_once_both_end_well(empty_database_url: str) -> None:
    with ThreadPoolExecutor(4) as pool:
        applied = list(pool.map(migrate, [empty_database_url] * 4))
    assert sorted(applied) == [False, False, False, True]


def test_schema_of_a_newer_release_is_left_alone(empty_database_url: str) -> None:
    migrate(empty_database_url)
    database = Database(empty_database_url, 1)
    database.rows("UPDATE hilo SET value = '9999' WHERE key = 'schema_version'")
    assert migrate(empty_database_url) is False
    assert database.rows("SELECT value FROM hilo WHERE key = 'schema_version'") == [{"value": "9999"}]
    database.close()


def test_schema_says_its_version_twice_alike() -> None:
    text = (Path(__file__).parent.parent / "schema.sql").read_text("utf-8")
    assert f"('schema_version', '{schema_version(text)}')" in text


def test_owner_who_is_no_superuser_can_migrate(postgres: Server) -> None:
    name, role = postgres.create("template1"), postgres.new_name()
    postgres.run(f"CREATE ROLE {role} LOGIN")
    postgres.run(f"ALTER DATABASE {name} OWNER TO {role}")
    try:
        url = postgres.named(name).replace("postgres@", f"{role}@")
        assert migrate(url) is True
    finally:
        postgres.drop(name)
        postgres.run(f"DROP ROLE {role}")


def test_every_statement_is_one_that_the_schema_knows(db: Database) -> None:
    with db.connection() as connection:
        for name in QUERIES:
            connection.prepare(QUERIES[name]).close()


# --- Two workers on one run -------------------------------------------------------------------------------


def received(db: Database, sid: str = "SM1", **more: Any) -> Any:
    """What the receiving statement returns for one message."""
    given: dict[str, Any] = {
        "sid": sid, "sender": ANA, "own": "whatsapp:+1", "external": None, "profile": "", "body": "hola",
        "raw": {}, "opt": None, "burst": 0.0, "at": None, "language": None, "guess": None,
    }  # fmt: skip
    return db.one("receive", messages=json.dumps([{**given, **more}]), patience="0")


def test_run_is_claimed_by_one_worker_only(db: Database) -> None:
    received(db)
    with ThreadPoolExecutor(8) as pool:
        claims = list(pool.map(lambda _: db.all("claim", n=5, lease=10.0), range(8)))
    assert sorted(len(claim) for claim in claims) == [0] * 7 + [1]


def test_worker_that_lost_its_lease_touches_no_row(db: Database) -> None:
    received(db)
    (old,) = db.all("claim", n=1, lease=0.0)
    (new,) = db.all("claim", n=1, lease=10.0)
    assert (new["id"], new["attempt"], new["crashes"]) == (old["id"], old["attempt"] + 1, 1)
    fence = {"id": old["id"], "a": old["attempt"]}
    assert db.all("take", **fence, timeout=30.0) == []
    assert db.one("renew", **fence, lease=99.0) is None
    assert db.one("put_down", **fence, seconds=0.0, seen=0, tries=0, creating=False, failure=None) is None
    assert db.one("rotate", **fence, failure="x") is None
    assert (db.one("finish", **fence, burst=0.0, part=None, sid=None) or {})["outcome"] is None
    assert db.one("save_thread", **fence, lease=99.0, thread="conv_x", assistant="cursos") is None
    assert db.rows("SELECT state, held, attempt FROM runs") == [
        {"state": "queued", "held": True, "attempt": new["attempt"]}
    ]
    assert db.rows("SELECT run_id FROM messages") == [{"run_id": None}]


def test_wake_between_claim_and_put_down_is_not_lost(db: Database) -> None:
    received(db)
    (run,) = db.all("claim", n=1, lease=10.0)
    assert received(db, "SM2")["held"] is True
    fence = {"id": run["id"], "a": run["attempt"]}
    row = db.one("put_down", **fence, seconds=60.0, seen=run["wakes"], tries=0, creating=False, failure=None)
    assert row and row["seconds"] <= 0


def test_create_of_unknown_outcome_stays_unknown_to_whoever_only_gives_the_run_back(db: Database) -> None:
    received(db)
    (run,) = db.all("claim", n=1, lease=10.0)
    fence = {"id": run["id"], "a": run["attempt"]}
    db.one("begin_create", **fence, lease=0.0, thread="conv_1", assistant="cursos")
    (again,) = db.all("claim", n=1, lease=10.0)
    fence["a"] = again["attempt"]
    db.one("put_down", **fence, seconds=0.0, seen=0, tries=0, creating=again["creating"], failure=None)
    assert db.rows("SELECT creating, held FROM runs") == [{"creating": True, "held": False}]


def waiting(db: Database) -> dict[str, Any]:
    """The fence of a run that has been put down with response resp_1 under way."""
    received(db)
    (run,) = db.all("claim", n=1, lease=10.0)
    fence = {"id": run["id"], "a": run["attempt"]}
    db.all("take", **fence, timeout=30.0)
    facts = {"model": "m", "rounds": 0, "held": False, "net": 5.0, "assistant": "cursos", "u": ANA, "thread": "conv_1"}
    assert db.one("save_response", **fence, resp="resp_1", **facts)
    return fence


WRITTEN = {"outcome": "answered", "reason": None, "leave": False, "failure": None, "lease": 10.0, "resp": None,
           "status": None, "i": None, "o": None}  # fmt: skip


def test_run_whose_response_ended_is_claimed_by_one_webhook_only(db: Database) -> None:
    fence = waiting(db)
    with ThreadPoolExecutor(8) as pool:
        woken = list(pool.map(lambda _: db.one("wake_by_response", resp="resp_1", lease=10.0), range(8)))
    (ours,) = [row for row in woken if row and row["ours"]]
    assert (ours["attempt"], ours["crashes"], [row["body"] for row in ours["turn"]]) == (fence["a"] + 1, 0, ["hola"])
    assert not any(row["due"] for row in woken if row and row is not ours)
    assert db.all("claim", n=5, lease=10.0) == []
    assert db.one("put_down", **fence, seconds=0.0, seen=0, tries=0, creating=False, failure=None) is None
    assert db.rows("SELECT wakes, held FROM runs") == [{"wakes": 8, "held": True}]


def test_run_whose_response_ended_is_due_for_others_where_no_worker_is_free(db: Database) -> None:
    fence = waiting(db)
    row = db.one("wake_by_response", resp="resp_1", lease=None)
    assert row and (row["due"], row["ours"], row["turn"]) == (True, False, None)
    (run,) = db.all("claim", n=5, lease=10.0)
    assert (run["id"], run["attempt"]) == (fence["id"], fence["a"] + 1)


def test_first_part_may_leave_as_soon_as_it_is_written(db: Database) -> None:
    fence = waiting(db)
    part = db.one("write", **fence, parts='[{"text": "uno"}, {"text": "dos"}]', **WRITTEN)
    assert part and (part["body"], part["address"], part["late"], part["sends"]) == ("uno", ANA, False, 1)
    shown = "SELECT body, state, sent_to, sending_at IS NULL AS idle FROM messages WHERE state IS NOT NULL ORDER BY id"
    rows = db.rows(shown)
    assert rows == [
        {"body": "uno", "state": "sending", "sent_to": ANA, "idle": False},
        {"body": "dos", "state": "queued", "sent_to": None, "idle": True},
    ]
    row = db.one("finish", **fence, burst=0.0, part=part["id"], sid="SMuno")
    assert row and row["more"] and row["outcome"] is None
    assert db.rows("SELECT state FROM runs") == [{"state": "sending"}]


def test_part_that_a_tool_put_before_the_reply_leaves_first(db: Database) -> None:
    fence = waiting(db)
    more = {"media": None, "content": None, "variables": None}
    db.one("queue_part", run=fence["id"], to=ANA, text="antes", **more)
    row = db.one("write", **fence, parts='[{"text": "respuesta"}]', **WRITTEN)
    assert row and row["id"] is None
    part = db.one("next_part", **fence, lease=10.0)
    assert part and part["body"] == "antes"


def test_reply_to_somebody_who_left_meanwhile_is_not_marked_for_sending(db: Database) -> None:
    fence = waiting(db)
    db.rows("UPDATE users SET mode = 'out' RETURNING mode")
    row = db.one("write", **fence, parts='[{"text": "respuesta"}]', **WRITTEN)
    assert row and row["id"] is None
    part = db.one("next_part", **fence, lease=10.0)
    assert part and part["state"] == "withheld"


def test_worker_that_lost_its_lease_writes_no_reply_but_notes_what_was_sent(db: Database) -> None:
    fence = waiting(db)
    part = db.one("write", **fence, parts='[{"text": "uno"}]', **WRITTEN)
    db.rows("UPDATE runs SET attempt = attempt + 1 RETURNING id")
    assert part and db.one("write", **fence, parts='[{"text": "otra"}]', **WRITTEN) is None
    row = db.one("finish", **fence, burst=0.0, part=part["id"], sid="SMuno")
    assert row and (row["more"], row["outcome"]) == (False, None)
    rows = db.rows("SELECT m.body, m.state, m.sid, r.state AS run FROM messages m JOIN runs r ON r.id = m.run_id"
                   " WHERE direction = 'out'")  # fmt: skip
    assert rows == [{"body": "uno", "state": "sent", "sid": "SMuno", "run": "sending"}]


def test_callback_that_comes_while_the_run_ends_is_counted(db: Database) -> None:
    received(db)
    (run,) = db.all("claim", n=1, lease=10.0)
    fence = {"id": run["id"], "a": run["attempt"]}
    db.all("take", **fence, timeout=30.0)
    part = db.one("write", **fence, parts='[{"text": "hola"}]', **WRITTEN)
    assert part and part["state"] == "sending"
    told = {"id": part["id"], "sid": "SM2", "state": "undelivered", "code": 63016, "gone": True}
    with ThreadPoolExecutor(1) as pool, db.connection() as connection:
        connection.run("BEGIN")
        connection.prepare(QUERIES["finish"]).run(**fence, burst=0.0, part=part["id"], sid="SM2")
        callback = pool.submit(db.one, "part_status", **told)
        waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        while not db.rows(waits):
            threading.Event().wait(0.01)
        connection.run("COMMIT")
        row = callback.result(10)
    assert row and (row["done"], row["wake"]) == (True, False)
    assert db.rows("SELECT outcome, reason FROM runs") == [{"outcome": "undelivered", "reason": "63016"}]


def test_part_that_a_tool_adds_while_the_run_ends_is_not_forgotten(db: Database) -> None:
    fence = waiting(db)
    part = db.one("write", **fence, parts='[{"text": "uno"}]', **WRITTEN)
    assert part
    late = {"run": fence["id"], "to": ANA, "text": "tarde", "media": None, "content": None, "variables": None}
    end = partial(db.one, "finish", **fence, burst=0.0, part=part["id"], sid="SM2")
    with ThreadPoolExecutor(1) as pool, db.connection() as connection:
        connection.run("BEGIN")
        connection.prepare(QUERIES["queue_part"]).run(**late)
        first = pool.submit(end)
        waits = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
        while not db.rows(waits):
            threading.Event().wait(0.01)
        connection.run("COMMIT")
        row = first.result(10)
    assert row and row["outcome"] is None
    again = end()
    assert again and (again["more"], again["outcome"]) == (True, None)
    assert db.rows("SELECT state FROM runs") == [{"state": "sending"}]


def test_message_that_comes_at_the_last_moment_becomes_the_next_turn(db: Database) -> None:
    received(db)
    (run,) = db.all("claim", n=1, lease=10.0)
    db.all("take", id=run["id"], a=run["attempt"], timeout=30.0)
    received(db, "SM2")
    assert db.one("finish", id=run["id"], a=run["attempt"], burst=0.0, part=None, sid=None)
    states = db.rows("SELECT state, pending FROM runs ORDER BY id")
    assert states == [{"state": "done", "pending": 1}, {"state": "queued", "pending": 1}]


def test_second_open_run_of_a_user_is_impossible(db: Database) -> None:
    received(db)
    with pytest.raises(DatabaseFault, match=r"^SQLSTATE 23505 runs_one_open$"):
        db.rows("INSERT INTO runs (user_phone, due_at) VALUES (:u, now())", {"u": ANA})
