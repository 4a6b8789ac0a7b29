"""Deployed: the Procfile as a runner starts it, a database as a hosting plan gives it, one release after another."""

from __future__ import annotations

import contextlib
import json
import os
import re
import select
import shutil
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import pg8000.native
import pytest

import localdb
from database import HERE, DatabaseDown, connection_options, migrate
from settings import load_settings, read_settings
from simulator import Simulator
from tests.conftest import ANA, Hilo, Server, environment, free_port, wait_for
from tests.local_openai import LocalOpenAI
from tests.owner import PASSWORD, owned, signed_in
from tests.process import Process
from tests.test_docs import env_example

PLAN = 20  # connections of a small plan
USERS = [f"whatsapp:+52155{n:08}" for n in range(60)]
CUT = """
SELECT pg_terminate_backend(pid) FROM pg_stat_activity
WHERE datname = current_database() AND application_name = 'hilo' AND pid <> pg_backend_pid()
"""


def sql(url: str, statement: str, **params: Any) -> Any:
    """Run a statement over a connection of its own."""
    with pg8000.native.Connection(**connection_options(url)) as connection:
        return connection.run(statement, **params)


def url_of(hilo: Hilo) -> str:
    """Return a gateway's DATABASE_URL."""
    assert hilo.settings.database_url
    return hilo.settings.database_url.get_secret_value()


def answers(twilio: Simulator, users: list[str]) -> dict[str, list[str]]:
    """Return what each user was sent."""
    return {user: [message.body for message in twilio.sent_to(user)] for user in users}


# --- The Procfile -----------------------------------------------------------------------------------------


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of the project, without what a developer may keep beside it."""
    beside = shutil.ignore_patterns(".*cache", ".git", ".data", ".env", ".venv", "venv", ".hypothesis", "__pycache__")
    return shutil.copytree(HERE, tmp_path / "checkout", ignore=beside)


# honcho tells how the shell ended that ran a line of the Procfile; this `python` tells how python itself did.
PYTHON = f"""#!/bin/sh
trap : TERM
{sys.executable} "$@"
code=$?
echo "python $* ended with $code"
exit $code
"""


class Honcho:
    """`honcho start` of some of the Procfile's processes, with these variables and no others."""

    def __init__(self, checkout: Path, environ: dict[str, str], *processes: str):
        programs = checkout.parent / "bin"
        programs.mkdir(exist_ok=True)
        (programs / "python").write_text(PYTHON)
        (programs / "python").chmod(0o755)
        path = os.pathsep.join([str(programs), os.environ["PATH"]])
        self.log = checkout.parent / f"{'-'.join(processes)}.log"
        with self.log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, "-m", "honcho", "--no-colour", "start", *processes], cwd=checkout,
                env={**environ, "PATH": path, "LANG": "C.UTF-8"}, stdout=output, stderr=output,
            )  # fmt: skip

    def __enter__(self) -> Honcho:
        return self

    def __exit__(self, *_: object) -> None:
        if self.popen.poll() is None:
            self.popen.terminate()  # its processes are in sessions of their own
        self.popen.wait(30)

    def said(self, pattern: str) -> list[str]:
        """Return what a pattern finds in the log so far."""
        return re.findall(pattern, self.log.read_text("utf-8"))


def test_procfile_run_by_honcho_answers_a_message_and_stops_with_0(
    checkout: Path, postgres: Server, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    with owned(postgres) as url:
        environ = environment(url, twilio, openai_server)
        with Honcho(checkout, environ, "release") as release:
            assert release.popen.wait(60) == 0, release.log.read_text("utf-8")
        assert release.said(r"release\.1 +\| schema applied")
        with Honcho(checkout, environ, "web", "worker") as honcho:
            for ready in (r"web\.1 .*✅ Hilo .* listens", r"worker\.1 .*✅ Hilo .* works"):
                wait_for(partial(honcho.said, ready), 60)
            assert twilio.receive(ANA, "hola").status == 200
            assert twilio.wait_for(ANA, timeout=30)[0].body == "Eco: hola"
            honcho.popen.send_signal(signal.SIGTERM)
            honcho.popen.wait(60)
        assert honcho.said(r"web\.1 +\| (python .*)") == ["python gateway.py serve ended with 0"]
        assert honcho.said(r"worker\.1 +\| (python .*)") == ["python gateway.py worker ended with 0"]
        assert not honcho.said("Traceback|ERROR|⚠️|SIGKILL")
        assert (checkout / "gateway.py").exists() and not (checkout / ".data").exists()


def test_release_that_cannot_migrate_ends_with_1_and_says_why(checkout: Path, postgres: Server) -> None:
    with owned(postgres) as url:
        sql(url, "CREATE TABLE runs ()")
        with Honcho(checkout, {"DATABASE_URL": url}, "release") as release:
            assert release.popen.wait(60) == 1
        assert release.said(r"database: SQLSTATE 42P07 another program has tables of these names here: runs")


# --- DATABASE_URL as Heroku gives it ----------------------------------------------------------------------


class Front:
    """A TCP port in front of a PostgreSQL."""

    def __init__(self) -> None:
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.accept, daemon=True).start()

    def accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self.listener.accept()
                threading.Thread(target=self.serve, args=(client,), daemon=True).start()

    def serve(self, client: socket.socket) -> None:
        """Stand between a client and the server until one of them goes."""
        raise NotImplementedError

    def close(self) -> None:
        self.listener.close()


class Tls(Front):
    """A TCP port with TLS, and a certificate that nobody vouches for, in front of a PostgreSQL on a Unix socket
    (https://www.postgresql.org/docs/current/protocol-flow.html#PROTOCOL-FLOW-SSL)."""

    REQUEST = bytes.fromhex("0000000804d2162f")

    def __init__(self, socket_path: str, certificate: Path, offered: bool = True):
        self.socket_path, self.offered = socket_path, offered
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(certificate)
        self.encrypted = 0  # connections
        super().__init__()

    def serve(self, client: socket.socket) -> None:
        """Answer the request for TLS, then pass everything on, both ways."""
        with client, socket.socket(socket.AF_UNIX) as server, contextlib.suppress(OSError):
            assert client.recv(8, socket.MSG_WAITALL) == self.REQUEST
            client.sendall(b"S" if self.offered else b"N")
            with self.context.wrap_socket(client, server_side=True) if self.offered else client as inner:
                self.encrypted += self.offered
                server.connect(self.socket_path)
                back = threading.Thread(target=self.pump, args=(server, inner), daemon=True)
                back.start()
                self.pump(inner, server)
                back.join(10)

    @staticmethod
    def pump(source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(65536):
                target.sendall(data)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="module")
def guarded(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server that wants every role's password, but the superuser's."""
    directory = tmp_path_factory.mktemp("guarded")
    with localdb.start(directory) as database:
        server = Server(database.url)
        rules = directory / "postgres" / "pg_hba.conf"
        rules.write_text("local all postgres trust\nlocal all all scram-sha-256\n")
        server.run("SELECT pg_reload_conf()")
        yield server


@pytest.fixture
def plan(guarded: Server) -> Iterator[str]:
    """The URL of an owner's database that is only to be had with the password."""
    with owned(guarded) as url:
        yield url


def at_port(url: str, port: int, query: str = "") -> str:
    """Return a URL for a TCP port in place of the socket."""
    parts = urlsplit(url)
    netloc = f"{parts.netloc.rpartition('@')[0]}@127.0.0.1:{port}"
    return urlunsplit(parts._replace(netloc=netloc, query=query))


@pytest.mark.parametrize("offered", [True, False], ids=["with TLS", "without TLS"])
def test_url_without_sslmode_takes_tls_where_it_is_offered_and_verifies_nothing(
    offered: bool, plan: str, certificate: Path, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    options = connection_options(plan)
    assert options["password"] == PASSWORD
    proxy = Tls(options["unix_sock"], certificate, offered)
    url = at_port(plan, proxy.port)
    assert url.startswith("postgres://") and "sslmode" not in url
    assert migrate(url)
    hilo = Hilo(load_settings(environment(url, twilio, openai_server))).start()
    try:
        twilio.receive(ANA, "hola")
        assert twilio.wait_for(ANA)[0].body == "Eco: hola"
    finally:
        hilo.stop()
        proxy.close()
    assert (proxy.encrypted > 0) is offered


@pytest.mark.parametrize(
    ("query", "offered", "why"),
    [
        ("sslmode=require", False, "Server refuses SSL"),
        ("sslmode=verify-full", True, "certificate verify failed"),
    ],
)
def test_tls_that_was_asked_for_and_cannot_be_had_is_told(
    query: str, offered: bool, why: str, plan: str, certificate: Path
) -> None:
    proxy = Tls(connection_options(plan)["unix_sock"], certificate, offered)
    with pytest.raises(DatabaseDown, match=why):
        migrate(at_port(plan, proxy.port, query))
    proxy.close()


def test_verified_tls_with_the_own_root_connects(plan: str, certificate: Path) -> None:
    proxy = Tls(connection_options(plan)["unix_sock"], certificate)
    assert migrate(at_port(plan, proxy.port, f"sslmode=verify-ca&sslrootcert={certificate}"))
    proxy.close()


@pytest.mark.parametrize("password", ["wrong", ""])
def test_wrong_or_missing_password_is_told_without_quoting_it(password: str, plan: str) -> None:
    name = urlsplit(plan).username or ""
    with pytest.raises(DatabaseDown, match=r"^cannot connect: SQLSTATE 28P01$"):
        migrate(signed_in(plan, name, password))


def test_nobody_at_the_address_is_told_in_the_systems_words() -> None:
    with pytest.raises(DatabaseDown, match=r"^cannot connect: Connection refused$"):
        migrate(f"postgres://a:b@127.0.0.1:{free_port()}/c")
    with pytest.raises(DatabaseDown, match=r"^cannot connect: .*[Nn]ame"):
        migrate("postgres://a:b@no.such.host.invalid/c")


def test_password_rotated_under_way_loses_no_message_and_the_restart_with_the_new_one_answers(
    guarded: Server, plan: str, tmp_path: Path, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    migrate(plan)
    name = urlsplit(plan).username or ""
    environ = environment(plan, twilio, openai_server, LEASE_SECONDS="1")
    gate = openai_server.gate("POST /v1/responses$")
    with Process(tmp_path, environ) as before:
        before.ready()
        assert twilio.receive(ANA, "hola").status == 200
        assert gate.arrived.wait(15)
        guarded.run(f"ALTER ROLE {name} PASSWORD 'n€w/2'")
        sql(guarded.url, "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE usename = :name", name=name)
        gate.release()
        wait_for(lambda: before.lines("28P01"), 30)
        before.send_signal(signal.SIGTERM)
        assert before.exit_code() == 0
    assert twilio.sent_to(ANA) == []
    with Process(tmp_path, environ | {"DATABASE_URL": signed_in(plan, name, "n€w/2")}) as after:
        after.ready()
        assert [message.body for message in twilio.wait_for(ANA, timeout=30)] == ["Eco: hola"]


def test_connections_cut_under_load_are_opened_again_and_every_message_is_answered_once(
    hilo: Hilo, twilio: Simulator
) -> None:
    users = USERS[:40]
    with ThreadPoolExecutor(4) as pool:
        sent = [pool.submit(twilio.receive, user, "hola") for user in users]
        for count in range(8, len(users), 8):
            wait_for(partial(lambda least: sum(future.done() for future in sent) >= least, count), 30)
            sql(url_of(hilo), CUT)
        assert {future.result().status for future in sent} == {200}
    hilo.done(len(users), 30)
    assert answers(twilio, users) == {user: ["Eco: hola"] for user in users}  # nobody was told of an outage


class Relay(Front):
    """A TCP port in front of a database. The statement that `lost` names is done there, and its answer does not come
    back: the connection is cut."""

    READY = b"Z\0\0\0\5I"  # ReadyForQuery, outside a transaction: it has been committed

    def __init__(self, url: str):
        self.options, self.lost = connection_options(url), b""
        super().__init__()
        self.url = at_port(url, self.port)

    def connect(self) -> socket.socket:
        """Return a connection to the database itself."""
        if "host" in self.options:
            return socket.create_connection((self.options["host"], self.options["port"]))
        server = socket.socket(socket.AF_UNIX)
        server.connect(self.options["unix_sock"])
        return server

    def serve(self, client: socket.socket) -> None:
        """Pass everything on, both ways, until an answer is to be lost."""
        with client, self.connect() as server, contextlib.suppress(OSError):
            ends = {client: server, server: client}
            while True:
                for source in select.select(list(ends), [], [])[0]:
                    data = source.recv(65536)
                    if not data:
                        return
                    ends[source].sendall(data)
                    if source is client and self.lost and self.lost in data:
                        self.lost, answer = b"", b""
                        while not answer.endswith(self.READY):
                            answer += server.recv(65536)
                        return


def test_message_that_was_stored_and_whose_answer_was_lost_is_answered_once_and_soon(
    database_url: str, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    relay = Relay(database_url)
    hilo = Hilo(load_settings(environment(f"{relay.url}?sslmode=disable", twilio, openai_server))).start()
    try:
        twilio.receive(ANA, "hola")
        hilo.done()  # the workers have looked once, and do so by themselves every five seconds
        relay.lost = b"perdido"
        assert twilio.receive(ANA, "perdido").status == 200
        assert relay.lost == b""
        twilio.wait_for(ANA, 2, timeout=4)
        hilo.done(2)
        assert answers(twilio, [ANA]) == {ANA: ["Eco: hola", "Eco: perdido"]}
        stored = [row["body"] for row in hilo.rows("SELECT body FROM messages ORDER BY id")]
        assert stored == ["hola", "Eco: hola", "perdido", "Eco: perdido"]
    finally:
        hilo.stop()
        relay.close()


# --- A plan of twenty connections -------------------------------------------------------------------------


class Meter:
    """Counts a role's connections to the server, over and over; `peak` is the most it has seen."""

    def __init__(self, server: Server, role: str):
        self.server, self.role = server, role
        self.peak = 0
        self.stopping = threading.Event()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        with pg8000.native.Connection(**connection_options(self.server.url)) as connection:
            count = connection.prepare("SELECT count(*) FROM pg_stat_activity WHERE usename = :role")
            while not self.stopping.wait(0.005):
                self.peak = max(self.peak, count.run(role=self.role)[0][0])

    def __enter__(self) -> Meter:
        self.thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stopping.set()
        self.thread.join()


class Router:
    """Sends users' messages to web processes in turn, as a platform's router does."""

    PUBLIC = "http://hilo.example"

    def __init__(self, twilio: Simulator):
        self.twilio = twilio
        self.twilio.public_url = self.PUBLIC
        self.webs: list[str] = []

    def post(self, number: int) -> int:
        """Let a user write; return the status of the webhook."""
        self.twilio.gateway_url = self.webs[number % len(self.webs)]
        return self.twilio.receive(USERS[number], "hola").status


class Release:
    """Two webs and a worker, with the settings that a deployment has: nothing is made smaller."""

    def __init__(self, url: str, tmp_path: Path, twilio: Simulator, openai_server: LocalOpenAI):
        environs = [environment(url, twilio, openai_server, PUBLIC_URL=Router.PUBLIC) for _ in range(3)]
        self.processes = [
            Process(tmp_path, environ, command)
            for environ, command in zip(environs, ("serve", "serve", "worker"), strict=True)
        ]
        self.webs = [f"http://127.0.0.1:{environ['PORT']}" for environ in environs[:2]]

    def __enter__(self) -> Release:
        """Return itself once all take messages, or work."""
        for process in self.processes:
            process.ready()
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            process.kill()

    def stop(self) -> list[int]:
        """Send all of them SIGTERM; return how they ended."""
        for process in self.processes:
            process.send_signal(signal.SIGTERM)
        return [process.exit_code() for process in self.processes]

    def lines(self, containing: str) -> list[str]:
        return [line for process in self.processes for line in process.lines(containing)]


def test_two_webs_and_a_worker_with_their_successors_fit_a_plan_of_20_connections(
    postgres: Server, tmp_path: Path, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    router = Router(twilio)
    with contextlib.ExitStack() as stack:
        url = stack.enter_context(owned(postgres, limit=PLAN))
        migrate(url)
        old = stack.enter_context(Release(url, tmp_path, twilio, openai_server))
        meter = stack.enter_context(Meter(postgres, urlsplit(url).username or ""))
        pool = stack.enter_context(ThreadPoolExecutor(6))
        router.webs = old.webs
        sent = [pool.submit(router.post, n) for n in range(20)]
        with Process(tmp_path, {"DATABASE_URL": url}, "migrate") as migration:
            assert migration.exit_code() == 0
        new = stack.enter_context(Release(url, tmp_path, twilio, openai_server))
        router.webs = old.webs + new.webs
        sent += [pool.submit(router.post, n) for n in range(20, 50)]
        with Process(tmp_path, {"DATABASE_URL": url}, "runs") as runs:  # whoever looks after it, at the same time
            assert runs.exit_code() == 0
        assert [future.result() for future in sent] == [200] * 50
        router.webs = new.webs
        sent = [pool.submit(router.post, n) for n in range(50, len(USERS))]
        assert old.stop() == [0, 0, 0]
        assert [future.result() for future in sent] == [200] * 10
        wait_for(lambda: all(answers(twilio, USERS).values()), 60)
        assert answers(twilio, USERS) == {user: ["Eco: hola"] for user in USERS}
        assert old.lines("53300") + new.lines("53300") == []
    print(f"at most {meter.peak} connections at a time")
    assert 6 <= meter.peak <= PLAN


def test_plan_smaller_than_the_pool_is_shared_and_nothing_fails(
    postgres: Server, twilio: Simulator, openai_server: LocalOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    with owned(postgres, limit=3) as url:
        migrate(url)
        hilo = Hilo(load_settings(environment(url, twilio, openai_server, DB_CONNECTIONS="16"))).start()
        try:
            with ThreadPoolExecutor(8) as pool:
                statuses = list(pool.map(lambda user: twilio.receive(user, "hola").status, USERS[:30]))
            hilo.done(30, 60)
        finally:
            hilo.stop()
    assert statuses == [200] * 30
    assert answers(twilio, USERS[:30]) == {user: ["Eco: hola"] for user in USERS[:30]}
    assert "53300" not in caplog.text


def test_message_that_meets_a_full_server_waits_for_a_place(
    postgres: Server, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    with owned(postgres, limit=1) as url, contextlib.ExitStack() as stack:
        migrate(url)
        hilo = Hilo(load_settings(environment(url, twilio, openai_server)))
        stack.callback(hilo.stop)
        other = pg8000.native.Connection(**connection_options(url))
        hilo.start()
        with ThreadPoolExecutor(1) as pool:
            webhook = pool.submit(twilio.receive, ANA, "hola")
            wait_for(lambda: hilo.db.full)
            assert not webhook.done()
            other.close()
            assert webhook.result().status == 200
        assert [message.body for message in twilio.wait_for(ANA)] == ["Eco: hola"]


def test_connection_that_only_listens_gives_way_to_work(
    postgres: Server, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    with owned(postgres, limit=1) as url:
        migrate(url)
        hilo = Hilo(load_settings(environment(url, twilio, openai_server)))
        try:
            listener = threading.Thread(target=hilo.gateway.workers.listen, daemon=True)
            listener.start()
            listens = "SELECT FROM pg_stat_activity WHERE query = 'LISTEN hilo' AND usename = :role"
            wait_for(lambda: sql(postgres.url, listens, role=urlsplit(url).username))
            hilo.start()
            assert twilio.receive(ANA, "hola").status == 200
            assert [message.body for message in twilio.wait_for(ANA)] == ["Eco: hola"]
        finally:
            hilo.stop()
            listener.join(10)


def test_slow_statements_of_plugins_leave_the_gateway_a_connection(
    start: Callable[..., Hilo], twilio: Simulator
) -> None:
    hilo = start(DB_CONNECTIONS="2")
    asked = threading.Barrier(3)

    def incoming_message(message: Any, context: Any) -> None:
        if message.text == "lento":
            asked.wait(10)
            context.query("SELECT pg_advisory_xact_lock_shared(1)")

    hilo.plug(incoming_message=incoming_message)
    with pg8000.native.Connection(**connection_options(url_of(hilo))) as other:
        other.run("SELECT pg_advisory_lock(1)")
        for user in USERS[:2]:
            assert twilio.receive(user, "lento").status == 200
        asked.wait(10)
        waiting = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_for(lambda: other.run(waiting) == [[1]])
        assert twilio.receive(ANA, "hola").status == 200
        assert hilo.rows("SELECT count(*) AS n FROM messages WHERE direction = 'in'") == [{"n": 3}]
        assert other.run(waiting) == [[1]]
    hilo.done(3)
    assert [message.body for message in twilio.sent_to(ANA)] == ["Eco: hola"]


# --- What a platform reads --------------------------------------------------------------------------------


def test_app_json_asks_for_settings_that_exist_and_explains_each_as_env_example_does() -> None:
    app = json.loads((HERE / "app.json").read_text("utf-8"))
    explained = {entry.name: entry.text for entry in env_example()}
    assert {name: entry["description"] for name, entry in app["env"].items()}.items() <= explained.items()
    needed = {name for name, entry in app["env"].items() if entry.get("required", True) and "generator" not in entry}
    assert needed == {"TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "TWILIO_FROM"}
    lines = (HERE / "Procfile").read_text("utf-8").splitlines()
    assert set(app["formation"]) | {"release"} == {line.partition(":")[0] for line in lines}


def test_env_example_as_it_stands_is_usable() -> None:
    settings, faults = read_settings({entry.name: entry.default for entry in env_example() if entry.shown})
    assert not faults and settings.assistant_id == "cursos"


def test_python_version_of_the_platform_is_one_that_hilo_supports() -> None:
    wanted = tuple(map(int, (HERE / ".python-version").read_text().split(".")))
    least = re.search(r'requires-python = ">=(\d+)\.(\d+)"', (HERE / "pyproject.toml").read_text("utf-8"))
    assert least and wanted >= tuple(map(int, least.groups()))
