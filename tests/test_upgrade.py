"""`migrate` on whatever database it meets, as its owner, no superuser: no row is lost, and what it leaves works."""

from __future__ import annotations

import contextlib
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pg8000.native
import pytest

from checks import Checks
from database import HERE, MIGRATION_LOCK, Database, DatabaseFault, connection_options, migrate, schema_version
from settings import load_settings
from simulator import Simulator
from tests.conftest import ANA, Hilo, Server, environment, wait_for
from tests.local_openai import LocalOpenAI, echo
from tests.owner import owned
from tests.process import Process

SCHEMA = (HERE / "schema.sql").read_text("utf-8")
# N.sql is the last text under that number; N-early.sql was another before it.
KEPT = sorted(
    (Path(__file__).parent / "data" / "schemas").glob("*.sql"),
    key=lambda path: (int(path.stem.partition("-")[0]), "-" not in path.stem),
)
LUIS = "whatsapp:+5218110002222"

# What the program of the original guide, or one of its kind, may have made of "user_phone ↔ thread_id"; and which
# threads give way to a newer one of the same user.
ORIGINAL = {
    "as the guide names it": ("""
        CREATE TABLE oa_threads_map (user_phone TEXT PRIMARY KEY, thread_id TEXT NOT NULL,
            created_at TIMESTAMPTZ DEFAULT now());
        INSERT INTO oa_threads_map VALUES ('+5215511110001', 'thread_a'), ('whatsapp:+5218110002222', 'thread_b')
        """, []),
    "short types, moments without a zone": ("""
        CREATE TABLE oa_threads_map (user_phone VARCHAR(22) PRIMARY KEY, thread_id VARCHAR(40) NOT NULL UNIQUE,
            created_at TIMESTAMP DEFAULT CURRENT_TIMESTAMP,
            updated_at TIMESTAMP NOT NULL DEFAULT CURRENT_TIMESTAMP);
        CREATE INDEX idx_oa_threads_map_thread_id ON oa_threads_map (thread_id);
        INSERT INTO oa_threads_map VALUES ('+5215511110001', 'thread_a', '2025-08-01 12:00', '2025-08-02 12:00')
        """, []),
    "a number as the key": ("""
        CREATE TABLE oa_threads_map (id SERIAL PRIMARY KEY, user_phone VARCHAR(32) UNIQUE NOT NULL,
            thread_id VARCHAR(64) NOT NULL CHECK (thread_id LIKE 'thread\\_%'), created_at DATE);
        INSERT INTO oa_threads_map (user_phone, thread_id) VALUES ('whatsapp:+5215511110001', 'thread_a')""", []),
    "columns that only the old program filled": ("""
        CREATE TABLE leads (phone TEXT PRIMARY KEY);
        INSERT INTO leads VALUES ('whatsapp:+5215511110001');
        CREATE TABLE oa_threads_map (id UUID PRIMARY KEY, user_phone TEXT NOT NULL REFERENCES leads,
            thread_id TEXT NOT NULL, assistant_id VARCHAR(32) NOT NULL, last_used_at BIGINT NOT NULL,
            UNIQUE (user_phone, assistant_id));
        INSERT INTO oa_threads_map VALUES
            (gen_random_uuid(), 'whatsapp:+5215511110001', 'thread_b', 'asst_2', 1755000000),
            (gen_random_uuid(), 'whatsapp:+5215511110001', 'thread_a', 'asst_1', 1754000000)""", ["thread_a"]),
    "no key, and rows twice": ("""
        CREATE TABLE oa_threads_map (user_phone VARCHAR, thread_id VARCHAR, updated_at TIMESTAMP);
        INSERT INTO oa_threads_map VALUES ('whatsapp:+5215511110001', 'thread_new', '2025-09-09'),
            ('whatsapp:+5215511110001', 'thread_old', '2025-08-08'), ('whatsapp:+5215511110001', 'thread_old', NULL),
            ('whatsapp:+5218110002222', NULL, NULL), (NULL, 'thread_x', NULL), (NULL, 'thread_y', NULL)""",
        ["thread_old", "thread_old"]),
}  # fmt: skip

# A user in the middle of a turn, and one row of each other kind, in the columns that version 1 has.
ROWS = f"""
INSERT INTO users (user_phone, external_user_id, reply_to, own_number, profile_name, mode)
    VALUES ('{ANA}', 'MX.ana', '{ANA}', 'whatsapp:+14155238886', 'Ana', 'bot'),
        ('{LUIS}', NULL, '{LUIS}', 'whatsapp:+14155238886', 'Luis', 'out');
INSERT INTO oa_threads_map (user_phone, thread_id, assistant_id) VALUES ('{LUIS}', 'conv_luis', 'cursos');
INSERT INTO discarded_threads (thread_id, due_at) VALUES ('conv_gone', now() + interval '1 day');
INSERT INTO runs (user_phone, state, due_at, outcome, finished_at) VALUES ('{LUIS}', 'done', now(), 'answered', now());
INSERT INTO runs (user_phone, due_at, pending) VALUES ('{ANA}', now(), 1);
INSERT INTO messages (sid, user_phone, direction, body, run_id, raw)
    VALUES ('SM{1:032}', '{LUIS}', 'in', 'hola', 1, '{{"Body": "hola"}}');
INSERT INTO messages (sid, user_phone, direction, body, run_id, state)
    VALUES ('SM{2:032}', '{LUIS}', 'out', '¡Hola!', 1, 'read');
INSERT INTO messages (sid, user_phone, direction, body, raw)
    VALUES ('SM{3:032}', '{ANA}', 'in', '¿sigues ahí?', '{{"From": "{ANA}", "Body": "¿sigues ahí?"}}');
INSERT INTO responses (id, run_id, status) VALUES ('resp_1', 1, 'completed');
INSERT INTO tool_calls (call_id, run_id, response_id, name, arguments, output, ok)
    VALUES ('call_1', 1, 'resp_1', 'buscar_curso', '{{}}', '[]', true);
INSERT INTO cursos (codigo, nombre, nivel, precio) VALUES ('EXC-101', 'Excel básico', 'basico', 990)
"""  # noqa: S608

TABLES = """
SELECT relname::text FROM pg_class WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' ORDER BY 1
"""

# Columns, keys and checks, indexes, functions and triggers: what an upgraded database must have like a new one.
STRUCTURE = """
SELECT attrelid::regclass || '.' || attname || ' ' || format_type(atttypid, atttypmod) || ' ' || attnotnull || ' '
    || coalesce(pg_get_expr(adbin, adrelid), '') AS part
FROM pg_attribute a LEFT JOIN pg_attrdef ON adrelid = attrelid AND adnum = attnum JOIN pg_class c ON c.oid = attrelid
WHERE relnamespace = 'public'::regnamespace AND relkind = 'r' AND attnum > 0 AND NOT attisdropped
UNION ALL SELECT conrelid::regclass || ' ' || pg_get_constraintdef(oid) FROM pg_constraint
    WHERE connamespace = 'public'::regnamespace AND conrelid <> 0
UNION ALL SELECT indexdef FROM pg_indexes WHERE schemaname = 'public'
UNION ALL SELECT pg_get_functiondef(oid) FROM pg_proc p WHERE pronamespace = 'public'::regnamespace AND prokind = 'f'
    AND NOT EXISTS (SELECT FROM pg_depend d WHERE d.objid = p.oid AND d.deptype = 'e')
UNION ALL SELECT pg_get_triggerdef(oid) FROM pg_trigger WHERE NOT tgisinternal
ORDER BY 1
"""


class Base:
    """A database of the owner's, asked over a connection of its own."""

    def __init__(self, url: str):
        self.url = url
        self.connection = pg8000.native.Connection(**connection_options(url))

    def run(self, sql: str, **params: Any) -> Any:
        return self.connection.run(sql, **params)

    def rows(self, table: str) -> list[dict[str, Any]]:
        """Return a table's rows as JSON, in no order."""
        return [row for (row,) in self.run(f"SELECT to_jsonb(t) FROM {table} t")]  # noqa: S608

    def everything(self) -> dict[str, list[dict[str, Any]]]:
        """Return every row of every table by the table's name."""
        return {table: self.rows(table) for (table,) in self.run(TABLES)}

    def structure(self) -> list[str]:
        return [part for (part,) in self.run(STRUCTURE)]

    def version(self) -> int:
        """Return the schema's version, 0 where there is none."""
        there = self.run("SELECT to_regclass('hilo')")[0][0]
        return int(self.run("SELECT value FROM hilo WHERE key = 'schema_version'")[0][0]) if there else 0

    def age(self) -> None:
        """Let the schema look older than it is, so that it is applied once more."""
        self.run("UPDATE hilo SET value = '0' WHERE key = 'schema_version'")


@pytest.fixture
def make(postgres: Server) -> Iterator[Callable[[], Base]]:
    """Make an empty database whose owner is no superuser."""
    with contextlib.ExitStack() as stack:

        def maker() -> Base:
            base = Base(stack.enter_context(owned(postgres)))
            stack.callback(base.connection.close)
            return base

        yield maker


@pytest.fixture
def base(make: Callable[[], Base]) -> Base:
    """An empty database whose owner is no superuser."""
    return make()


def lost(before: dict[str, list[dict[str, Any]]], after: dict[str, list[dict[str, Any]]]) -> list[Any]:
    """Return the rows that are not there any more, with at least the columns that they had, but for the version."""
    missing = []
    for table, rows in before.items():
        left = [*after[table], *after.get(f"{table}_older", ())]
        for row in rows:
            found = next((other for other in left if row.items() <= other.items()), None)
            if found:
                left.remove(found)
            elif row.get("key") != "schema_version":
                missing.append((table, row))
    return missing


@contextlib.contextmanager
def gateway_on(base: Base, twilio: Simulator, openai_server: LocalOpenAI) -> Iterator[Hilo]:
    """Lend a gateway that runs on a database, with a model that repeats what it is told."""
    openai_server.model = echo
    hilo = Hilo(load_settings(environment(base.url, twilio, openai_server))).start()
    try:
        yield hilo
    finally:
        hilo.stop()


# --- An earlier schema.sql --------------------------------------------------------------------------------


def test_schema_of_this_release_is_kept_as_test_data() -> None:
    kept = Path(__file__).parent / "data" / "schemas" / f"{schema_version(SCHEMA)}.sql"
    assert kept.exists() and kept.read_text("utf-8") == SCHEMA, (
        f"cp schema.sql {kept.relative_to(HERE)}; where that version has been released, raise the number first"
    )


def test_schema_has_the_same_version_at_its_head_and_end() -> None:
    for path in [HERE / "schema.sql", *KEPT]:
        text = path.read_text("utf-8")
        assert re.findall(r"'schema_version', '(\d+)'", text) == [str(schema_version(text))], path


@pytest.mark.parametrize("path", KEPT, ids=lambda path: path.stem)
def test_earlier_schema_with_rows_becomes_the_present_one_and_its_open_run_is_answered(
    path: Path, make: Callable[[], Base], twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    old, new = make(), make()
    old.run(f"BEGIN;\n{path.read_text('utf-8')}\nCOMMIT")
    old.run(ROWS)
    if old.version() == schema_version(SCHEMA):
        old.age()
    before = old.everything()
    assert all(before[table] for table in ("users", "runs", "messages", "responses", "tool_calls", "cursos"))
    assert migrate(old.url) and migrate(new.url)
    assert lost(before, old.everything()) == []
    assert old.structure() == new.structure()
    with gateway_on(old, twilio, openai_server) as hilo:
        hilo.done(2)
    assert [message.body for message in twilio.sent_to(ANA)] == ["Eco: ¿sigues ahí?"]
    assert twilio.sent_to(LUIS) == []


# --- The original guide's table ---------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ORIGINAL)
def test_table_of_the_original_guide_keeps_its_rows_and_takes_ours(
    shape: str, base: Base, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    create, give_way = ORIGINAL[shape]
    base.run(create)
    kept = sorted(str((row["user_phone"], row["thread_id"])) for row in base.rows("oa_threads_map"))
    for _ in range(2):
        assert migrate(base.url) and not migrate(base.url)
        older = base.rows("oa_threads_map_older") if give_way else []
        rows = [*base.rows("oa_threads_map"), *older]
        assert sorted(str((row["user_phone"], row["thread_id"])) for row in rows) == kept
        assert [row["thread_id"] for row in older] == give_way
        base.age()
    with gateway_on(base, twilio, openai_server) as hilo:
        for user in (ANA, LUIS):
            twilio.receive(user, "hola")
        hilo.done(2)
    assert [m.body for user in (ANA, LUIS) for m in twilio.sent_to(user)] == ["Eco: hola"] * 2
    threads = base.run("SELECT user_phone FROM oa_threads_map WHERE starts_with(thread_id, 'conv_')")
    assert sorted(user for (user,) in threads) == [ANA, LUIS]


def test_moments_without_a_zone_are_taken_as_utc(base: Base) -> None:
    base.run(ORIGINAL["short types, moments without a zone"][0])
    migrate(base.url)
    [row] = base.rows("oa_threads_map")
    assert row["created_at"].startswith("2025-08-01T12:00:00+00")
    assert row["updated_at"] == "2025-08-02T12:00:00"  # not ours: left as it was


def test_column_of_a_type_that_holds_no_moment_is_kept_under_another_name(base: Base) -> None:
    base.run(ORIGINAL["columns that only the old program filled"][0])
    migrate(base.url)
    [row] = base.rows("oa_threads_map")
    assert row["last_used_at_before"] == 1755000000 and row["last_used_at"][:2] == "20"


IN_THE_WAY = {
    "messages, users": "CREATE TABLE users (id int PRIMARY KEY); CREATE TABLE messages (id int)",
    "cursos": "CREATE TABLE cursos (id int)",
    "cursos_vocabulario": "CREATE VIEW cursos_vocabulario AS SELECT 1 AS uno",
    "hilo": "CREATE TABLE hilo (id int)",
    "oa_threads_map (no table with user_phone and thread_id), users": """
        CREATE TABLE oa_threads_map (phone text, thread_id text); CREATE TYPE users AS (id int)""",
    "oa_threads_map (no table with user_phone and thread_id)": """
        CREATE TABLE leads (phone text); INSERT INTO leads VALUES ('+52');
        CREATE VIEW oa_threads_map AS SELECT phone AS user_phone, '' AS thread_id FROM leads""",
}


@pytest.mark.parametrize("names", IN_THE_WAY)
def test_tables_of_another_program_are_left_alone_and_named_by_migrate_and_check(names: str, base: Base) -> None:
    base.run(IN_THE_WAY[names])
    before, structure = base.everything(), base.structure()
    sentence = f"another program has tables of these names here: {names}"
    with pytest.raises(DatabaseFault, match=rf"^SQLSTATE 42P07 {re.escape(sentence)}\. Give Hilo .*another schema"):
        migrate(base.url)
    assert base.everything() == before and base.structure() == structure
    with contextlib.closing(Database(base.url, 1)) as db:
        [found] = [found for found in Checks(offline=True).schema(db) if found.check == "schema"]
    assert (found.status, found.text) == ("fault", sentence) and found.todo.startswith("Give Hilo another database")


def test_schema_of_its_own_in_the_url_keeps_hilo_apart_from_another_program(base: Base) -> None:
    base.run("CREATE TABLE users (id int PRIMARY KEY); INSERT INTO users VALUES (1); CREATE SCHEMA hilo")
    joint = "&" if "?" in base.url else "?"
    assert migrate(f"{base.url}{joint}options=-csearch_path%3Dhilo")
    assert base.everything() == {"users": [{"id": 1}]}
    assert base.run("SELECT count(*) FROM hilo.users") == [[0]]


# --- Twice, at once, interrupted --------------------------------------------------------------------------


@pytest.fixture
def old(base: Base) -> Base:
    """A database of the first version, with rows."""
    base.run(f"BEGIN;\n{KEPT[0].read_text('utf-8')}\nCOMMIT")
    base.run(ROWS)
    base.age()
    return base


def migration(base: Base, tmp_path: Path) -> Process:
    """Start `python gateway.py migrate`."""
    return Process(tmp_path, {"DATABASE_URL": base.url}, "migrate")


@contextlib.contextmanager
def midway(base: Base, table: str = "messages") -> Iterator[None]:
    """Hold a table, so that a migration stands still in its middle."""
    with pg8000.native.Connection(**connection_options(base.url)) as holder:
        holder.run(f"BEGIN; LOCK TABLE {table} IN ACCESS EXCLUSIVE MODE")
        yield
        holder.run("ROLLBACK")


def stands_still(base: Base) -> Any:
    """Return the server's process of a migration that waits for a table, None where there is none."""
    rows = base.run("SELECT pid FROM pg_stat_activity WHERE wait_event = 'relation' AND datname = current_database()")
    return rows and rows[0][0]


def test_two_processes_at_once_apply_the_schema_once(old: Base, tmp_path: Path) -> None:
    before = old.everything()
    with migration(old, tmp_path) as one, migration(old, tmp_path) as other:
        assert (one.exit_code(), other.exit_code()) == (0, 0)
        said = sorted(one.lines() + other.lines())
    assert said == ["schema applied", "schema is up to date"]
    assert lost(before, old.everything()) == [] and old.version() == schema_version(SCHEMA)


def test_process_killed_midway_loses_nothing_and_the_next_one_finishes(old: Base, tmp_path: Path) -> None:
    before = old.everything()
    with midway(old), migration(old, tmp_path) as process:
        wait_for(lambda: stands_still(old), 30)
        process.kill()
        assert process.exit_code() == -signal.SIGKILL
    migrate(old.url)
    assert lost(before, old.everything()) == [] and old.version() == schema_version(SCHEMA)


def test_connection_lost_midway_leaves_everything_as_it_was(old: Base, tmp_path: Path) -> None:
    before, structure = old.everything(), old.structure()
    with midway(old), migration(old, tmp_path) as process:
        old.run("SELECT pg_terminate_backend(:pid::int)", pid=wait_for(lambda: stands_still(old), 30))
        assert process.exit_code() == 1
        assert process.lines() == ["database: network error"]
    assert old.everything() == before and old.structure() == structure
    assert migrate(old.url)


def test_failing_statement_undoes_all_and_is_told_in_postgresqls_words(old: Base, tmp_path: Path) -> None:
    old.run("DROP TABLE cursos CASCADE; CREATE VIEW cursos AS SELECT 1 AS uno")
    before, structure = old.everything(), old.structure()
    with migration(old, tmp_path) as process:
        assert process.exit_code() == 1
        [line] = process.lines()
    assert line.startswith("database: SQLSTATE 42") and '"cursos"' in line
    assert old.everything() == before and old.structure() == structure
    old.run("DROP VIEW cursos")
    assert migrate(old.url) and lost(before, old.everything()) == []


def test_table_held_for_a_while_delays_the_migration_and_holds_up_nobody_else(old: Base, tmp_path: Path) -> None:
    with contextlib.ExitStack() as stack:
        reader = stack.enter_context(pg8000.native.Connection(**connection_options(old.url)))
        reader.run("BEGIN")
        reader.run("SELECT count(*) FROM users")  # as a dump does, for as long as it lasts
        process = stack.enter_context(migration(old, tmp_path))
        wait_for(lambda: stands_still(old), 30)
        began = time.monotonic()
        old.run("INSERT INTO users (user_phone, reply_to) VALUES ('whatsapp:+1', 'whatsapp:+1')")
        assert time.monotonic() - began < 10
        reader.run("ROLLBACK")
        assert process.exit_code() == 0 and old.version() == schema_version(SCHEMA)


def test_messages_under_way_are_answered_once_while_the_schema_is_applied(
    base: Base, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    migrate(base.url)
    users = [f"whatsapp:+52155{n:08}" for n in range(24)]
    with gateway_on(base, twilio, openai_server) as hilo, ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(twilio.receive, user, "hola") for user in users]
        applied = 0
        while applied < 3 or not all(future.done() for future in sent):
            base.age()
            applied += migrate(base.url)
        assert {future.result().status for future in sent} == {200}
        hilo.done(len(users), 60)
    assert [[m.body for m in twilio.sent_to(user)] for user in users] == [["Eco: hola"]] * len(users)


def test_older_release_meets_a_newer_schema_and_leaves_it(old: Base, tmp_path: Path, twilio: Simulator) -> None:
    migrate(old.url)
    old.run("ALTER TABLE users ADD COLUMN of_the_future text")
    old.run("UPDATE hilo SET value = '999' WHERE key = 'schema_version'")
    structure = old.structure()
    assert not migrate(old.url)
    with Process(tmp_path, environment(old.url, twilio, None)) as process:
        process.ready()
        process.send_signal(signal.SIGTERM)
        assert process.exit_code() == 0
    assert old.version() == 999 and old.structure() == structure


# --- By hand ----------------------------------------------------------------------------------------------


def psql(url: str) -> str:
    """Run schema.sql as a person does; return what psql complained of."""
    program = shutil.which("psql")
    if not program:
        pytest.skip("there is no psql here")
    command = [program, url, "-X", "-q", "-f", str(HERE / "schema.sql")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env={"PGCONNECT_TIMEOUT": "10"})
    assert done.stdout.strip() == ""
    return done.stderr


@pytest.mark.parametrize("earlier", ["", *(path.stem for path in KEPT[:1])])
def test_psql_does_the_same_also_twice(earlier: str, make: Callable[[], Base]) -> None:
    base, new = make(), make()
    migrate(new.url)
    if earlier:
        base.run(f"BEGIN;\n{KEPT[0].read_text('utf-8')}\nCOMMIT")
        base.run(ROWS)
    before = base.everything()
    for _ in range(2):
        assert psql(base.url) == ""
        assert base.structure() == new.structure()
        assert lost(before, base.everything()) == [] and not migrate(base.url)


def test_psql_that_fails_leaves_everything_as_it_was(old: Base) -> None:
    old.run("DROP TABLE cursos CASCADE; CREATE VIEW cursos AS SELECT 1 AS uno")
    before, structure = old.everything(), old.structure()
    assert "cursos" in psql(old.url)
    assert old.everything() == before and old.structure() == structure


def test_psql_waits_for_a_migration_that_is_under_way(old: Base) -> None:
    with pg8000.native.Connection(**connection_options(old.url)) as holder, ThreadPoolExecutor(1) as pool:
        holder.run(f"SELECT pg_advisory_lock({MIGRATION_LOCK})")
        by_hand = pool.submit(psql, old.url)
        waits = "SELECT FROM pg_stat_activity WHERE wait_event = 'advisory' AND datname = current_database()"
        wait_for(lambda: by_hand.done() or old.run(waits), 30)
        assert not by_hand.done() and old.version() == 0
        holder.run(f"SELECT pg_advisory_unlock({MIGRATION_LOCK})")
        assert by_hand.result() == ""
    assert old.version() == schema_version(SCHEMA)
