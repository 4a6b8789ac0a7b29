"""The pool of PostgreSQL connections, the statements of queries.sql by name, and the schema's migration."""

from __future__ import annotations

import bisect
import contextlib
import re
import select
import ssl
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pg8000.native

from settings import ConfigurationError

HERE = Path(__file__).parent
SCHEMA = HERE / "schema.sql"
PROCESSES = 6  # that share the server's connections: two webs, a worker, and their successors at a release
CONNECT_TIMEOUT = 10.0  # seconds, to connect and to wait for a free connection
PATIENCE = 30.0  # seconds that a connection may be silent for, which a statement_timeout does not bound
HUNG_PAUSE = 5.0  # seconds for which whoever is in a hurry does not ask a database that did not answer
FULL_PAUSE = 0.1  # seconds until the next attempt, while the server allows no more connections
# A plan lives as long as its connection: none that suits an empty table may read the whole of it once it has grown.
SESSION = {"statement_timeout": "15000", "enable_seqscan": "off", "jit": "off"}
STATEMENTS = 200  # prepared on a connection; the oldest goes
DEADLOCKS = 3  # times a statement is tried again after one
MIGRATION_LOCK = 4815162342  # PostgreSQL advisory lock, also in schema.sql
MIGRATION_TRIES = 12  # of five seconds, while others hold a table
# What leaves a connection as it was; SET and the like would change it for whoever gets it next.
PLAIN = re.compile(r"(?is)(?>[\s(]+|--[^\n]*\n|/\*.*?\*/)*+(?:select|with|insert|update|delete|merge|values|table)\b")
OUTSIDE = b"I"  # no transaction is open, in the server's words
MISSING = {"42P01": "table", "42703": "column", "42883": "function"}  # what an earlier schema may lack, by SQLSTATE


def load_queries(path: Path = HERE / "queries.sql") -> dict[str, str]:
    """Return the statements of a file by the name in the line `-- name: …` above each."""
    sections = re.split(r"(?m)^-- name: (\w+)$", path.read_text("utf-8"))
    # Comments go: pg8000 would take a colon in one for a parameter.
    statements = zip(sections[1::2], sections[2::2], strict=True)
    return {name: re.sub(r"(?m)--.*$", "", sql).strip() for name, sql in statements}


QUERIES = load_queries()


class DatabaseFault(Exception):
    """A statement that PostgreSQL refused. Holds SQLSTATE and constraint only: the rest may quote a user. Of a
    migration, `what` is PostgreSQL's sentence."""

    def __init__(self, sqlstate: str, what: str = ""):
        if not what and sqlstate in MISSING:
            what = f"(no such {MISSING[sqlstate]}): where it is one of Hilo's, run python gateway.py migrate"
        super().__init__(f"SQLSTATE {sqlstate}{' ' + what if what else ''}")
        self.sqlstate = sqlstate


class DatabaseDown(Exception):
    """No connection to the database can be had."""


class DatabaseFull(DatabaseDown):
    """The server, or the plan, allows no more connections at this time."""


class Cut(DatabaseDown):
    """The connection broke while a statement was under way, which may have been done or not."""


class AllInUse(DatabaseDown):
    """Others of this process use all connections of the pool, which says nothing of the server."""


def connection_options(url: str) -> dict[str, Any]:
    """Return pg8000's arguments for a DATABASE_URL (libpq's form); raises ConfigurationError without quoting it."""
    try:
        parts = urlsplit(url)
        query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        if parts.scheme not in ("postgres", "postgresql") or not parts.path.strip("/"):
            raise ValueError
        # A percent-encoded directory of a socket keeps its capitals; urlsplit would lower them.
        given = parts.netloc.rpartition("@")[2].partition(":")[0]
        host = unquote(given if "%" in given else parts.hostname or "") or query.get("host", "localhost")
        port = parts.port or int(query.get("port", 5432))
        mode = query.get("sslmode", "prefer")
    except ValueError:
        raise ConfigurationError("DATABASE_URL=(secret) cannot be used: it needs postgresql://…/database") from None
    options = {
        "user": unquote(parts.username or query.get("user", "postgres")),
        "password": unquote(parts.password) if parts.password else query.get("password"),
        "database": unquote(parts.path.strip("/")),
        "application_name": "hilo",
        "startup_params": {**SESSION, "options": query.get("options")},  # -csearch_path=…
    }
    if host.startswith("/"):
        return {**options, "unix_sock": f"{host}/.s.PGSQL.{port}", "ssl_context": False}
    return {**options, "host": host, "port": port, "ssl_context": tls(mode, query.get("sslrootcert"))}


def tls(mode: str, root: str | None) -> ssl.SSLContext | bool | None:
    """Return pg8000's ssl_context for an sslmode; None takes TLS where the server offers it, unverified."""
    if mode in ("disable", "allow"):
        return False
    if mode == "prefer":
        return None
    if mode == "require":
        return True
    if mode not in ("verify-ca", "verify-full"):
        known = "disable, allow, prefer, require, verify-ca, verify-full"
        raise ConfigurationError(f"DATABASE_URL: sslmode={mode!r} is none of {known}")
    try:
        context = ssl.create_default_context(cafile=root)
    except OSError as error:
        raise ConfigurationError(f"DATABASE_URL: sslrootcert={root!r} cannot be used: {error.strerror}") from None
    context.check_hostname = mode == "verify-full"
    return context


class Connection(pg8000.native.Connection):
    """The driver's connection, which closes its socket at once: the driver's own leaves that to the garbage collector
    where the server has hung up."""

    changed = False  # by a statement, so that it is for nobody else

    def __init__(self, *arguments: Any, **options: Any) -> None:
        """Connect, as the driver does; closes its socket also where the server dies before the first word."""
        try:
            super().__init__(*arguments, **options)
        except BaseException:
            if getattr(self, "_usock", None) is not None:
                with contextlib.suppress(pg8000.exceptions.InterfaceError, OSError):
                    self.close()
            raise

    def close(self) -> None:
        """Say goodbye and close; raises InterfaceError or OSError where nobody listens any more."""
        stream = self._sock
        try:
            super().close()
        finally:
            with contextlib.suppress(OSError, AttributeError):  # nobody listens, or it was closed before
                stream.close()


@dataclass(eq=False)
class Place:
    """A place in the queue for a connection."""

    since: float  # monotonic
    called: threading.Condition


class Database:
    """A small pool of connections, opened when needed, each with its prepared statements."""

    GIVE_WAY = 0.1  # seconds that a statement waits for messages that arrive
    AT_ONCE = ("save_response", "save_output", "finish")  # what has happened elsewhere, and is known nowhere else
    FAIR = 0.2  # seconds that who is in a hurry is taken to have waited for a connection already
    HURRY = 6.0  # seconds in all for a statement that somebody outside waits for: Twilio gives up after 15
    # The server is going or gone; or (0A000) a migration made a prepared plan stale: a new connection mends all.
    LOST = ("57P01", "57P02", "57P03", "08000", "08003", "08006", "0A000")

    def __init__(self, url: str, connections: int = 2, time_zone: str | None = None):
        self.options = connection_options(url)
        if time_zone:  # where current_date is the users' own day
            self.options["startup_params"] |= {"TimeZone": time_zone}
        self.options["password"] = self.options["password"] or ""  # the driver fails on None where SCRAM is wanted
        self.closed = False
        self.lock = threading.Lock()
        self.queue: list[Place] = []  # of those who wait for a connection, the first one first
        self.idle: list[Connection] = []  # the last to come back goes first
        self.size = self.room = connections  # how many may be open, and how many more
        self.full_until = 0.0  # monotonic: the server allowed no more just now
        self.hung_until = 0.0  # monotonic: the server did not answer just now
        self.arriving, self.counting = 0, threading.Lock()  # messages that are not stored yet
        self.quiet = threading.Event()  # there are none
        self.for_guests = threading.Semaphore(max(1, connections - 1))

    @contextlib.contextmanager
    def arrival(self) -> Iterator[None]:
        """While this is open, whoever is in no hurry gives way."""
        with self.counting:
            self.arriving += 1
            self.quiet.clear()
        try:
            yield
        finally:
            with self.counting:
                self.arriving -= 1
                if not self.arriving:
                    self.quiet.set()

    def give_way(self) -> None:
        """Let messages that arrive go first, for GIVE_WAY seconds: with many threads at work each of them is slow."""
        if self.arriving:
            self.quiet.wait(self.GIVE_WAY)

    def widen(self, connections: int) -> None:
        """Allow more connections, up to so many, where the server allows this role as many for PROCESSES such pools;
        raises DatabaseDown or DatabaseFault."""
        if connections <= self.size:
            return
        allowed = self.all("connections_allowed")[0]["n"]
        more = min(connections, allowed // PROCESSES - 1) - self.size  # one listens
        if more > 0:
            self.for_guests.release(more)
            with self.lock:
                self.size, self.room = self.size + more, self.room + more
                self.call_first()

    def connect(self, seconds: float = CONNECT_TIMEOUT) -> Connection:
        """Return a new connection; raises DatabaseDown where there is none in so many seconds."""
        try:
            connection = Connection(timeout=seconds, **self.options)
            connection._usock.settimeout(PATIENCE)
        except (pg8000.native.Error, OSError) as error:
            kind = DatabaseFull if fault_of(error) == "SQLSTATE 53300" else DatabaseDown
            raise kind(f"cannot connect: {fault_of(error)}") from None
        connection.statements = {}
        return connection

    def take(self, end: float, hurry: bool = False) -> Connection:
        """Return a live connection, idle or new. Where the server allows no more, one of our own comes back, or
        somebody else's goes, before `end` (monotonic); raises DatabaseDown."""
        while True:
            connection = self.idle_or_leave(end, hurry)
            if connection is not None and not hung_up(connection):
                return connection
            discard(connection)
            try:
                connection = self.connect(max(0.1, end - time.monotonic()))
                self.full_until = 0.0
                return connection
            except BaseException as error:
                if full := isinstance(error, DatabaseFull):
                    self.full_until = time.monotonic() + FULL_PAUSE
                self.give_back(None)
                if not full or time.monotonic() + FULL_PAUSE > end:
                    raise

    def idle_or_leave(self, end: float, hurry: bool) -> Connection | None:
        """Return an idle connection, or None: one may be opened. Raises DatabaseDown at `end` (monotonic)."""
        with self.lock:
            if self.idle and not self.queue:
                return self.idle.pop()
            mine = Place(time.monotonic() + (0.0 if hurry else self.FAIR), threading.Condition(self.lock))
            bisect.insort(self.queue, mine, key=lambda place: place.since)
            try:
                while not self.closed:
                    now, first = time.monotonic(), self.queue[0] is mine
                    if first and self.idle:
                        return self.idle.pop()
                    if first and self.room and now >= self.full_until:
                        self.room -= 1
                        if self.full_until:  # one tries, the others wait
                            self.full_until = now + FULL_PAUSE
                        return None
                    if now >= end:
                        raise AllInUse("all connections are in use")
                    mine.called.wait(min(end, self.full_until if first and self.room else end) - now)
            finally:
                self.queue.remove(mine)
                self.call_first()
        raise DatabaseDown("closed")

    def call_first(self) -> None:
        """Wake who is first in the queue, if there is a connection. Called with the lock held."""
        if self.queue and (self.idle or self.room or self.closed):
            self.queue[0].called.notify()

    def give_back(self, connection: Connection | None) -> None:
        """Put a connection back, or None for one that is no more."""
        with self.lock:
            if connection is not None and not connection.changed and not self.closed:
                self.idle.append(connection)
            else:
                discard(connection)
                self.room += 1
            self.call_first()

    @property
    def full(self) -> bool:
        """Whether somebody waits because the server allows no more connections."""
        return time.monotonic() < self.full_until + 1

    @contextlib.contextmanager
    def connection(self, end: float | None = None) -> Iterator[Connection]:
        """Lend a live connection; one that failed is thrown away, never handed out again."""
        lent = self.take(end or time.monotonic() + CONNECT_TIMEOUT, end is not None)
        connection: Connection | None = lent
        try:
            yield lent
        except (pg8000.native.InterfaceError, OSError) as error:
            discard(lent)
            connection = None
            raise Cut(fault_of(error)) from None
        except pg8000.native.DatabaseError as error:
            fields = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
            if fields.get("C") not in self.LOST:
                raise DatabaseFault(fields.get("C", "?"), fields.get("n", "")) from None
            discard(connection)
            connection = None
            raise Cut(f"SQLSTATE {fields.get('C')}") from None
        except BaseException:  # broken off at some point of the protocol: nobody can tell what it would answer next
            discard(connection)
            connection = None
            raise
        finally:
            self.give_back(connection)

    def rows(
        self, sql: str, params: Mapping[str, Any] | None = None, end: float | None = None
    ) -> list[dict[str, Any]]:
        """Return the rows of one statement, which is one transaction; raises DatabaseFault or DatabaseDown, also where
        it has not ended by `end` (monotonic)."""
        for _ in range(DEADLOCKS):
            try:
                return self.once(sql, params, end)
            except DatabaseFault as error:  # of two transactions PostgreSQL ends one: nothing of it has happened
                if error.sqlstate != "40P01":
                    raise
        return self.once(sql, params, end)

    def once(self, sql: str, params: Mapping[str, Any] | None, end: float | None) -> list[dict[str, Any]]:
        """Return the rows of one statement, tried once; raises ValueError where it begins a transaction, where it lacks
        a parameter, or for a value that the driver cannot turn into Python's."""
        with self.connection(end) as connection:
            patience = max(0.1, end - time.monotonic()) if end else PATIENCE
            if patience != connection._usock.gettimeout():  # a call to the system
                connection._usock.settimeout(patience)
            statement = connection.statements.get(sql)
            if statement is None and len(connection.statements) >= STATEMENTS:
                connection.statements.pop(next(iter(connection.statements))).close()
            if statement is None:
                statement = connection.statements[sql] = connection.prepare(sql)
                connection.changed = not PLAIN.match(sql)
            try:
                found = statement.run(**(params or {}))
            except pg8000.native.InterfaceError as error:
                if "parameter" in str(error):  # not the connection's fault but the caller's
                    raise ValueError(str(error)) from None
                raise
            if connection._transaction_status != OUTSIDE:
                raise ValueError("a statement is a transaction of its own: BEGIN would keep what others write from all")
            names = [column["name"] for column in statement.columns or ()]
            return [dict(zip(names, row, strict=True)) for row in found or ()]

    def guest_rows(self, sql: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of a plugin's statement: however slow those are, one connection is left to the gateway."""
        if not self.for_guests.acquire(timeout=CONNECT_TIMEOUT):
            raise DatabaseDown("statements of plugins hold all the connections that they may")
        try:
            return self.rows(sql, params)
        finally:
            self.for_guests.release()

    def hurried(self, name: str, /, **params: Any) -> list[dict[str, Any]]:
        """Return the rows of the statement of that name in queries.sql within HURRY seconds, for somebody outside who
        waits. It must be one that may be done twice: where its connection is cut it is tried on others, which may have
        been cut at that moment too. A database that just failed to answer is not asked: others would wait behind who
        asks."""
        if time.monotonic() < self.hung_until:
            raise DatabaseDown("does not answer")
        end = time.monotonic() + self.HURRY
        try:
            for _ in range(self.size):
                try:
                    return self.rows(QUERIES[name], params, end)
                except Cut:
                    if time.monotonic() >= end:
                        raise
            return self.rows(QUERIES[name], params, end)
        except DatabaseDown as error:
            if time.monotonic() >= end and not isinstance(error, AllInUse):
                self.hung_until = time.monotonic() + HUNG_PAUSE
            raise

    def all(self, name: str, /, **params: Any) -> list[dict[str, Any]]:
        """Return the rows of the statement of that name in queries.sql."""
        if name not in self.AT_ONCE:
            self.give_way()
        return self.rows(QUERIES[name], params)

    def one(self, name: str, /, **params: Any) -> dict[str, Any] | None:
        """Return the first row of the statement of that name, None where there is none."""
        return next(iter(self.all(name, **params)), None)

    def close(self) -> None:
        """Close the connections that are idle, and the others when their users put them back."""
        with self.lock:
            self.closed = True
            while self.idle:
                discard(self.idle.pop())
            self.call_first()  # who leaves calls the next


def fault_of(error: BaseException) -> str:
    """Return what a database error may say in a log: SQLSTATE, or the system's own words."""
    chain = [error]  # pg8000 closes a connection that was refused, and that may fail in its turn
    while (before := chain[-1].__context__) is not None:
        chain.append(before)
    for each in chain:
        if each.args and isinstance(each.args[0], dict):
            return f"SQLSTATE {each.args[0].get('C', '?')}"
    words = next((each.strerror for each in chain if isinstance(each, OSError) and each.strerror), None)
    return words or (str(error) if isinstance(error, pg8000.native.InterfaceError) else type(error).__name__)


def hung_up(connection: Connection) -> bool:
    """Tell whether an idle connection has something to say unasked: then the server has closed it."""
    poll = select.poll()  # not select(): a busy process has descriptors above 1,024
    poll.register(connection._usock, select.POLLIN)
    return bool(poll.poll(0))


def discard(connection: Connection | None) -> None:
    """Close a connection that may be broken."""
    with contextlib.suppress(Exception):
        if connection is not None:
            connection.close()


def schema_version(text: str) -> int:
    """Return the number in the first line of schema.sql."""
    return int(text.splitlines()[0].removeprefix("-- version:"))


def migrate(url: str) -> bool:
    """Apply schema.sql where it is missing or old; return whether it was. Raises DatabaseDown or DatabaseFault."""
    text = SCHEMA.read_text("utf-8")
    database = Database(url, 1)
    try:
        with database.connection() as connection:
            connection._usock.settimeout(None)
            connection.run("SET statement_timeout = 0")
            # Of two processes at once, one waits here and then finds the work done.
            connection.run(f"SELECT pg_advisory_lock({MIGRATION_LOCK})")
            if installed_version(connection) >= schema_version(text):
                return False
            apply(connection, text)
            return True
    finally:
        database.close()


def apply(connection: Connection, text: str) -> None:
    """Run schema.sql, which is one transaction. Where others hold a table it steps back and tries again, lest whoever
    needs that table next waits behind it; raises DatabaseFault."""
    connection.run("SET lock_timeout = '4s'")
    for left in reversed(range(MIGRATION_TRIES)):
        try:
            connection.run(text)
            return
        except pg8000.native.DatabaseError as error:
            fields = error.args[0] if isinstance(error.args[0], dict) else {}
            if fields.get("C", "")[:2] in ("08", "57"):  # the connection is gone, and the transaction with it
                raise
            connection.run("ROLLBACK")
            if fields.get("C") not in ("40P01", "55P03") or not left:
                raise DatabaseFault(fields.get("C", "?"), fields.get("M", "")) from None
        time.sleep(1)


def installed_version(connection: Connection) -> int:
    """Return the version of the schema in a database, 0 where there is none."""
    ours = "SELECT count(*) = 2 FROM pg_attribute WHERE attrelid = to_regclass('hilo') AND attname IN ('key', 'value')"
    if not connection.run(ours)[0][0]:
        return 0
    rows = connection.run("SELECT value FROM hilo WHERE key = 'schema_version'")
    return int(rows[0][0]) if rows else 0


def in_the_way(connection: Connection) -> str:
    """Return what schema.sql would say of another program's tables, "" where none is in its way."""
    question = re.search(r"(?ms)^DO \$\$ -- Is there another program's.*?^END \$\$;", SCHEMA.read_text("utf-8"))
    try:
        connection.run(question[0] if question else "")
    except pg8000.native.DatabaseError as error:
        if error.args[0].get("C") != "42P07":
            raise
        return str(error.args[0]["M"])
    return ""
