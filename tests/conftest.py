"""What every test stands on: a real PostgreSQL, a local Twilio, a local OpenAI and the gateway between them."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import threading
import time
import types
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pg8000.native
import pytest

import gateway
import localdb
from database import connection_options, migrate
from settings import Settings, load_settings
from simulator import Simulator
from tests.local_openai import LocalOpenAI
from tools import hookimpl
from tools._plugins import PluginReport

ANA = "whatsapp:+5215511110001"
WEBHOOK_SECRET = "whsec_" + "c2VjcmV0byBkZSBwcnVlYmFz"


def free_port() -> int:
    """Return a TCP port that nobody listens on, below those that the system gives to outgoing connections."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


def wait_for(condition: Callable[[], Any], timeout: float = 10.0) -> Any:
    """Return the first true value of `condition`; fails after `timeout` seconds."""
    end = time.monotonic() + timeout
    while not (value := condition()):
        assert time.monotonic() < end, f"not within {timeout} s"
        threading.Event().wait(0.01)
    return value


# What a test that changed rows only leaves as it was: each catalog's number of rows and latest change, and what the
# planner knows.
STATE = " UNION ALL ".join(
    f"SELECT '{catalog}', count(*), max(xmin::text::bigint), {known} FROM {catalog}"  # noqa: S608
    for catalog, known in (
        ("pg_class", "sum(relpages) FILTER (WHERE relnamespace = 'public'::regnamespace AND relkind = 'r')"),
        *((f"pg_{name}", "0") for name in ("attribute", "attrdef", "constraint", "extension", "index", "namespace",
            "proc", "statistic", "trigger", "type")),
    )
)  # fmt: skip
EMPTY = """
DO $$
DECLARE
    c record;
BEGIN
    SET LOCAL session_replication_role = replica; -- in any order
    FOR c IN SELECT relname AS name, relkind AS kind FROM pg_class
            WHERE relnamespace = 'public'::regnamespace AND relkind IN ('r', 'S') LOOP
        IF c.kind = 'S' THEN
            PERFORM setval(c.name::regclass, 1, false);
        ELSE
            EXECUTE format('DELETE FROM %I', c.name);
        END IF;
    END LOOP;
END $$
"""


class Server:
    """A PostgreSQL server on which each test gets a database of its own, copied from a migrated one."""

    how = ""  # a database is copied

    def __init__(self, url: str):
        self.url = url
        self.template = self.new_name()
        self.run(f"CREATE DATABASE {self.template}")
        migrate(self.named(self.template))
        self.clean: list[str] = []  # databases that are as new
        with self.connection(self.template) as connection:
            self.facts = connection.run("SELECT jsonb_object_agg(key, value) FROM hilo")[0][0]
            self.like_new = connection.run(STATE)

    @staticmethod
    def new_name() -> str:
        return f"hilo_test_{uuid.uuid4().hex[:12]}"

    def named(self, name: str) -> str:
        """Return the URL of another database on the same server."""
        head, _, query = self.url.partition("?")
        return f"{head.rsplit('/', 1)[0]}/{name}{'?' + query if query else ''}"

    @contextlib.contextmanager
    def connection(self, name: str = "") -> Iterator[pg8000.native.Connection]:
        """Lend a connection to a database, or to the one that the URL names."""
        connection = pg8000.native.Connection(**connection_options(self.named(name) if name else self.url))
        try:
            yield connection
        finally:
            connection.close()

    def run(self, sql: str) -> Any:
        with self.connection() as connection:
            return connection.run(sql)

    def create(self, template: str | None = None) -> str:
        if template is None and self.clean:
            return self.clean.pop()
        name = self.new_name()
        self.run(f"CREATE DATABASE {name} TEMPLATE {template or self.template} {self.how}")
        return name

    def hasten(self) -> None:
        """Wait for no disk: this server need not outlive the machine. Those that tests kill do. Nor does it do anything
        by itself, so that a database which nobody uses stays as it is."""
        for setting in ("fsync", "synchronous_commit", "full_page_writes", "autovacuum"):
            self.run(f"ALTER SYSTEM SET {setting} = off")
        self.run("SELECT pg_reload_conf()")
        self.how = "STRATEGY FILE_COPY"

    def drop(self, name: str) -> None:
        self.run(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")

    def give_back(self, name: str) -> None:
        """Make a database as new for the next test, by another name, so that whoever still writes to it cannot find it;
        where more than rows has changed, or that cannot be done, drop it."""
        new = self.new_name()
        try:
            with self.connection() as connection:
                others = "SELECT pg_terminate_backend(pid, 5000) FROM pg_stat_activity WHERE datname = :name"
                connection.run(others, name=name)
                connection.run(f"ALTER DATABASE {name} RENAME TO {new}")
        except pg8000.DatabaseError:  # it is gone, or somebody has come back
            return self.drop(name)
        with self.connection(new) as connection:
            like_new = connection.run(STATE) == self.like_new
            if like_new:
                connection.run(EMPTY)
                connection.run("INSERT INTO hilo SELECT * FROM jsonb_each_text(:facts::jsonb)", facts=self.facts)
        if not like_new:
            return self.drop(new)
        self.clean.append(new)


@pytest.fixture(scope="session")
def postgres(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """The server: the one of TEST_DATABASE_URL, else the embedded one."""
    if url := os.environ.get("TEST_DATABASE_URL"):
        server = Server(url)
        yield server
        server.drop(server.template)
        return
    database = localdb.start(tmp_path_factory.mktemp("postgres"))
    server = Server(database.url)
    server.hasten()
    yield server
    database.stop()


@pytest.fixture
def database_url(postgres: Server) -> Iterator[str]:
    """The URL of a migrated, empty database."""
    name = postgres.create()
    yield postgres.named(name)
    postgres.give_back(name)


@pytest.fixture
def empty_database_url(postgres: Server) -> Iterator[str]:
    """The URL of a database without tables."""
    name = postgres.create("template1")
    yield postgres.named(name)
    postgres.drop(name)


@pytest.fixture
def openai_server() -> Iterator[LocalOpenAI]:
    with LocalOpenAI() as server:
        yield server


@pytest.fixture
def twilio() -> Iterator[Simulator]:
    with Simulator() as simulator:
        yield simulator


@pytest.fixture(scope="session")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A key and a certificate that it signed itself, for 127.0.0.1."""
    if not shutil.which("openssl"):
        pytest.skip("there is no openssl here to make a certificate")
    path = tmp_path_factory.mktemp("tls") / "server.pem"
    command = (
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -subj /CN=nobody "
        "-addext subjectAltName=IP:127.0.0.1 -keyout -"
    )
    done = subprocess.run(command.split(), capture_output=True, check=True, timeout=30)
    path.write_bytes(done.stdout)
    return path


class Hilo:
    """A gateway in this process, started with the real web server and workers."""

    def __init__(self, settings: Settings):
        assert settings.database_url
        self.settings = settings
        self.gateway = gateway.Gateway(settings, settings.database_url.get_secret_value())
        self.server = gateway.Server(self.gateway, "127.0.0.1", settings.port)
        self.url = settings.origin
        self.running = False

    @property
    def db(self) -> Any:
        return self.gateway.db

    def start(self) -> Hilo:
        self.gateway.start()
        self.server.thread.start()
        self.running = True
        return self

    def stop(self) -> None:
        if self.running:
            self.running = False
            self.server.drain()
            self.gateway.stop()

    def plug(self, **hooks: Callable[..., Any]) -> PluginReport:
        """Load a plugin made of these hooks; it is asked before those that are there."""
        module = types.ModuleType(f"plugin_{uuid.uuid4().hex[:8]}")
        for name, function in hooks.items():
            setattr(module, name, function if hasattr(function, "hilo_impl") else hookimpl(function))
        self.gateway.plugins.load(module.__name__, lambda: module, "tools/prueba.py")
        return self.gateway.plugins.reports[module.__name__]

    def unplug(self, report: PluginReport) -> None:
        """Take out a plugin that `plug` loaded."""
        plugins = self.gateway.plugins
        plugins.unload(next(name for name, known in plugins.reports.items() if known is report))

    def tool(self, *functions: Callable[..., Any], **options: Any) -> None:
        """Let the assistant call these functions."""
        report = self.plug(register_tools=lambda register: [register(function, **options) for function in functions])
        assert report.error is None, report.error

    def age(self, seconds: float) -> None:
        """Let time pass for what waits: the stored moments of open runs and unfinished parts lie further back."""
        wait_for(lambda: not self.rows("SELECT 1 AS x FROM runs WHERE state <> 'done' AND held"))
        back = "- :s::float8 * interval '1 s'"
        self.rows(f"UPDATE messages SET sending_at = sending_at {back} WHERE state = 'sending'", s=seconds)  # noqa: S608
        self.rows(f"UPDATE runs SET due_at = due_at {back} WHERE state <> 'done' AND NOT held", s=seconds)  # noqa: S608
        self.gateway.alarm.wake_in(0)

    def rows(self, sql: str, **params: Any) -> list[dict[str, Any]]:
        return self.gateway.db.rows(sql, params)

    def done(self, count: int = 1, timeout: float = 15.0) -> list[dict[str, Any]]:
        """Return the runs, once `count` of them are done and no other is open."""

        def finished() -> list[dict[str, Any]] | None:
            runs = self.rows("SELECT * FROM runs ORDER BY id")
            return runs if len(runs) >= count and all(run["state"] == "done" for run in runs) else None

        found: list[dict[str, Any]] = wait_for(finished, timeout)
        return found


def environment(database_url: str, twilio: Simulator, openai_server: LocalOpenAI | None, **more: str) -> dict[str, str]:
    """Return the settings of a gateway between the local servers, as variables."""
    port = free_port()
    env = {
        "DATABASE_URL": database_url,
        "PORT": str(port),
        "PUBLIC_URL": f"http://127.0.0.1:{port}",
        "TWILIO_ACCOUNT_SID": twilio.account_sid,
        "TWILIO_AUTH_TOKEN": twilio.auth_token,
        "TWILIO_FROM": twilio.number,
        "TWILIO_API_URL": twilio.url,
        "BURST_SECONDS": "0",
        "LOG_LEVEL": "DEBUG",
    }
    if openai_server:
        env |= {"OPENAI_API_KEY": "sk-local", "OPENAI_BASE_URL": openai_server.url, "ASSISTANT_ID": "cursos"}
    env |= more
    twilio.gateway_url = env["PUBLIC_URL"]
    return {key: value for key, value in env.items() if value}


@contextlib.contextmanager
def serving(postgres: Server, **more: str) -> Iterator[tuple[Hilo, Simulator, LocalOpenAI]]:
    """A running gateway with a database, a Twilio and an OpenAI of its own, for the tests of a whole module."""
    name = postgres.create()
    with Simulator() as twilio, LocalOpenAI() as openai_server:
        hilo = Hilo(load_settings(environment(postgres.named(name), twilio, openai_server, **more))).start()
        yield hilo, twilio, openai_server
        hilo.stop()
    postgres.give_back(name)


@pytest.fixture
def start(database_url: str, twilio: Simulator, openai_server: LocalOpenAI) -> Iterator[Callable[..., Hilo]]:
    """Start a gateway with other settings than the usual ones, by keyword; an empty value leaves one out."""
    running: list[Hilo] = []

    def starter(**more: str) -> Hilo:
        if more.get("OPENAI_WEBHOOK_SECRET"):
            openai_server.webhook_secret = more["OPENAI_WEBHOOK_SECRET"]
        hilo = Hilo(load_settings(environment(database_url, twilio, openai_server, **more)))
        if more.get("OPENAI_WEBHOOK_SECRET"):
            openai_server.webhook_url = hilo.url + "/webhooks/openai"
        running.append(hilo.start())
        return hilo

    yield starter
    for hilo in running:
        hilo.stop()


@pytest.fixture
def hilo(start: Callable[..., Hilo]) -> Hilo:
    """A gateway with the usual settings."""
    return start()


@pytest.fixture(autouse=True)
def _no_env_file(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Keep a developer's own `.env` and variables out of the tests."""
    for name in list(os.environ):
        if name.startswith(("TWILIO_", "OPENAI_", "DATABASE_URL", "PUBLIC_URL", "ASSISTANT_ID")):
            monkeypatch.delenv(name)
