"""Hilo on this machine alone: `chat` in the terminal, `demo` in the browser.

Both put a local Twilio (simulator.py) where the real one would be and leave the rest as in production: a message comes
in by a signed webhook, the answer leaves over Twilio's REST API. They know nothing of DATABASE_URL, TWILIO_* and
PUBLIC_URL. Each works on a database of its own in the embedded PostgreSQL, a copy of the local one without its users:
so a team's catalogue and tables are there, no real user's message is answered here, and several may run at once.
What is the demo's alone is in demo.py.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import re
import secrets
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pg8000.native

import gateway
import localdb
from database import HERE, Database, connection_options, migrate
from settings import Settings, environment, load_settings, start_log
from simulator import Message, Simulator

DIRECTORY = Path(".data")
ORIGIN = "http://chat.invalid"  # what webhooks are signed for; they go straight to the gateway's port
USER = "whatsapp:+5215512345678"
NAME = "Ana"
PREFIX = "trial_"  # of the databases made here
MAKING = 4815162343  # PostgreSQL advisory lock: one at a time makes a database, or removes what others left
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGALRM)  # the last one is our own
AGAIN = 0.1  # seconds until a signal that nobody heard comes again
PATIENCE = 30.0  # seconds that an answer may take after the run's deadline

# Autovacuum is in nobody's way: PostgreSQL ends it by itself.
USERS = "SELECT count(*) FROM pg_stat_activity WHERE datname = :name AND backend_type <> 'autovacuum worker'"
REMAINS = """SELECT datname FROM pg_database d WHERE starts_with(datname, :prefix)
    AND NOT EXISTS (SELECT FROM pg_stat_activity a WHERE a.datid = d.oid AND a.backend_type <> 'autovacuum worker')"""
GONE = 10  # looks, 0.05 s apart

# Settings of a production `.env` that have no meaning here; nor have Twilio's, nor a team's own webhooks.
NOT_OURS = {"DATABASE_URL", "PUBLIC_URL", "PORT", "OPENAI_WEBHOOK_SECRET", "WORKER_THREADS"}

log = logging.getLogger("hilo")


class Stopped(KeyboardInterrupt):
    """A signal asked to stop. As Ctrl-C does, it goes through what catches the errors of plugins."""


def ignore_signals() -> None:
    """Let nothing disturb the clearing up."""
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def stop(*_: Any) -> None:
    """Raise Stopped, and again until it is heard: Python drops what is raised in a weak reference's callback, and such
    are called at any time, above all while modules are imported."""
    if not is_ending(sys.exception()):
        signal.setitimer(signal.ITIMER_REAL, AGAIN)
        raise Stopped


def is_ending(error: BaseException | None) -> bool:
    """Tell whether Stopped is what is being dealt with, so that a further signal may not disturb that."""
    while error and not isinstance(error, Stopped):
        error = error.__context__
    return error is not None


def note_unraisable(what: sys.UnraisableHookArgs) -> None:
    """Report what Python had to drop, but for Stopped, which comes again."""
    if not isinstance(what.exc_value, Stopped):
        sys.__unraisablehook__(what)


@contextlib.contextmanager
def until_stopped() -> Iterator[contextlib.ExitStack]:
    """Lend a stack for what has to be cleared up; SIGTERM, Ctrl-C or a closed terminal end the block in good order."""
    sys.unraisablehook = note_unraisable
    for number in SIGNALS:
        signal.signal(number, stop)
    with contextlib.suppress(Stopped), contextlib.ExitStack() as stack:
        try:
            yield stack
        finally:
            ignore_signals()


def say(text: str = "") -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


# --- What chat and demo share -----------------------------------------------------------------------------


def named(url: str, name: str) -> str:
    """Return the URL of another database on the embedded server."""
    head, _, query = url.partition("?")
    return f"{head.rsplit('/', 1)[0]}/{name}?{query}"


def trial_settings(twilio: Simulator, origin: str, defaults: dict[str, str], ours: dict[str, str]) -> Settings:
    """Return the settings of the environment with the local Twilio in place of the real one, and no database."""
    kept = {name: value for name, value in environment().items() if value.strip() and not is_real(name)}
    for name in filter(is_real, list(os.environ)):  # nor may an SDK or a plugin find them
        del os.environ[name]
    local = {
        "PUBLIC_URL": origin, "TWILIO_ACCOUNT_SID": twilio.account_sid, "TWILIO_AUTH_TOKEN": twilio.auth_token,
        "TWILIO_FROM": twilio.number, "TWILIO_API_URL": twilio.url,
    }  # fmt: skip
    settings = load_settings({"ASSISTANT_ID": "cursos", **defaults, **kept, **local, **ours})
    gateway.check_assistant(settings)
    return settings


def is_real(name: str) -> bool:
    """Tell whether a variable leads to something real that a trial keeps away from."""
    return name in NOT_OURS or name.startswith("TWILIO_") or name.endswith("_WEBHOOK_URL")


@contextlib.contextmanager
def trial_database() -> Iterator[str]:
    """Lend the URL of a fresh database in the embedded PostgreSQL, with schema and catalogue; it goes in the end."""
    name = PREFIX + secrets.token_hex(4)
    with localdb.start(DIRECTORY) as server, contextlib.ExitStack() as held:
        url, place = named(server.url, name), named(server.url, "postgres")
        held.callback(drop_at_last, place, name)
        with connect(place) as admin:  # gives the lock back at its end, whatever becomes of it
            admin.run("SELECT pg_advisory_lock(:lock)", lock=MAKING)
            remove_remains(admin)
            copied = create(admin, name)
            keeper = held.enter_context(connect(url))  # tells others that it is in use
        migrate(url)
        if copied:
            forget_users(keeper)
        load_sample(url)
        yield url


def connect(url: str) -> pg8000.native.Connection:
    """Return a new connection of its own, to be used with `with`."""
    return pg8000.native.Connection(**connection_options(url))


def create(admin: pg8000.native.Connection, name: str) -> bool:
    """Make a database; return whether it is a copy of the local one, which cannot be had while others use that."""
    if is_free(admin, "hilo"):
        with contextlib.suppress(pg8000.native.DatabaseError):
            admin.run(f"CREATE DATABASE {name} TEMPLATE hilo")
            return True
    say(f"(Otro proceso usa la base local de {DIRECTORY}/: aquí va el catálogo de ejemplo.)")
    admin.run(f"CREATE DATABASE {name} TEMPLATE template0")
    return False


def is_free(admin: pg8000.native.Connection, name: str) -> bool:
    """Tell whether nobody uses a database, asked before PostgreSQL is told to do what that hinders: it would wait five
    seconds for them to leave. A session that has just been closed takes a moment to go."""
    for _ in range(GONE):
        if not admin.run(USERS, name=name)[0][0]:
            return True
        time.sleep(0.05)
    return False


def drop(admin: pg8000.native.Connection, name: str, how: str = "") -> None:
    """Remove a database; one that is in use stays, unless forced."""
    with contextlib.suppress(pg8000.native.Error, OSError):
        admin.run(f"DROP DATABASE IF EXISTS {name} {how}")


def drop_at_last(place: str, name: str) -> None:
    """Remove a database over a connection of its own: the one that made it may have been broken off in the middle of an
    answer. What that one began holds the lock until the server has ended it."""
    with contextlib.suppress(pg8000.native.Error, OSError), connect(place) as admin:
        admin.run("SET lock_timeout = '3s'")
        with contextlib.suppress(pg8000.native.DatabaseError):  # somebody else makes theirs all this time
            admin.run("SELECT pg_advisory_lock(:lock)", lock=MAKING)
        drop(admin, name, "WITH (FORCE)")


def remove_remains(admin: pg8000.native.Connection) -> None:
    """Remove the databases of chats and demos that were killed: nobody uses them."""
    for (name,) in admin.run(REMAINS, prefix=PREFIX):
        drop(admin, name)


def forget_users(connection: pg8000.native.Connection) -> None:
    """Empty every table that holds something of a user, in a copy."""
    found = connection.run("""SELECT quote_ident(table_name) FROM information_schema.columns
        JOIN information_schema.tables USING (table_schema, table_name)
        WHERE table_schema = current_schema() AND column_name = 'user_phone' AND table_type = 'BASE TABLE'""")
    tables = [name for (name,) in found]
    connection.run(f"TRUNCATE {', '.join(tables)}, responses, tool_calls, discarded_threads CASCADE")


def load_sample(url: str) -> None:
    """Load the sample catalogue into an empty one, where a team has not removed it."""
    sample = HERE / "tools" / "cursos.csv"
    try:
        from tools.cursos import cargar
    except Exception:  # removed, or broken: the plugins' reports tell
        return
    if sample.exists():
        with contextlib.closing(Database(url, 1)) as database:
            cargar(lambda sql, **values: database.rows(sql, values), sample)


# --- chat -------------------------------------------------------------------------------------------------


def chat(options: argparse.Namespace) -> int:
    """Talk to Hilo in the terminal; a line is a message. Ends with the input."""
    with until_stopped() as stack:
        say("Hilo: preparo la base de datos local…")
        twilio = stack.enter_context(Simulator(public_url=ORIGIN, threads=8))
        settings = trial_settings(twilio, ORIGIN, {"BURST_SECONDS": "0"}, {})
        show_log(settings, options.log)
        url = stack.enter_context(trial_database())
        hilo = stack.enter_context(running(settings, url, twilio))
        say(who_answers(hilo.health.assistant(), settings))
        say("Escribe un mensaje y Enter; Ctrl-D o Ctrl-C para terminar.")
        Conversation(hilo, twilio).hold()
    return 0


def show_log(settings: Settings, wanted: bool) -> None:
    """Send the log to stderr: all of it where it is wanted, else what is worth a warning."""
    start_log(settings, sys.stderr)
    if not wanted:
        log.setLevel(logging.WARNING)


@contextlib.contextmanager
def running(settings: Settings, url: str, twilio: Simulator) -> Iterator[gateway.Gateway]:
    """Lend a gateway that runs in this process, on a free port of 127.0.0.1."""
    hilo = gateway.Gateway(settings, url)
    hilo.plugins.check_settings(settings)
    server = gateway.Server(hilo, "127.0.0.1", 0)
    twilio.gateway_url = f"http://127.0.0.1:{server.port}"
    hilo.start()
    server.thread.start()
    try:
        yield hilo
    finally:
        stop_at_once(hilo, server)


def stop_at_once(hilo: gateway.Gateway, server: gateway.Server) -> None:
    """Stop a gateway without waiting for the model: what is under way here is of no more use."""
    log.setLevel(logging.CRITICAL)
    server.drain(1)
    hilo.upkeep.stopping.set()
    hilo.workers.stop(time.monotonic() + 2)
    hilo.db.close()


def who_answers(assistant: Mapping[str, Any], settings: Settings) -> str:
    """Return a sentence that says whether the assistant or the traditional flow answers, and why."""
    if assistant["enabled"]:
        return f"Contesta el asistente {assistant['id']} ({assistant['model']})."
    why = "el asistente no está disponible" if settings.openai_api_key else "sin OPENAI_API_KEY"
    return f"Contesta el flujo tradicional ({why})."


class Conversation:
    """One user at the terminal: lines go in by webhook, answers are printed as Twilio gets them."""

    def __init__(self, hilo: gateway.Gateway, twilio: Simulator):
        self.hilo, self.twilio = hilo, twilio
        self.printed = 0
        self.typed = sys.stdin.isatty()
        if isinstance(sys.stdin, io.TextIOWrapper):  # a byte that is no text is no reason to end
            sys.stdin.reconfigure(errors="replace")

    def hold(self) -> None:
        """Read line after line, each once the one before it is answered."""
        while (line := self.read()) is not None:
            if line.strip():
                delivery = self.twilio.receive(USER, line.strip(), profile_name=NAME)
                if delivery.status == 200:
                    self.show_answer()
                else:
                    say(f"hilo> (el gateway respondió {delivery.status}: {delivery.body})")

    def read(self) -> str | None:
        """Return the next line, None at the end; one that was not typed here is shown."""
        if not self.typed:
            line = sys.stdin.readline()
            if line.strip():
                say(f"tú>   {line.strip()}")
            return line or None
        with contextlib.suppress(EOFError):
            return input("tú>   ")
        say()
        return None

    def show_answer(self) -> None:
        """Print what is sent to the user until no run of theirs is open."""
        end = time.monotonic() + self.hilo.settings.threads_run_timeout + PATIENCE
        before = self.printed
        busy = True
        while busy and time.monotonic() < end:
            busy = bool(self.hilo.db.rows("SELECT FROM runs WHERE user_phone = :u AND state <> 'done'", {"u": USER}))
            self.show()
            time.sleep(0.03 if busy else 0)
        if self.printed == before:
            say("hilo> (todavía sin respuesta)" if busy else "hilo> (nada: el mensaje no tiene respuesta)")

    def show(self) -> None:
        """Print what was sent since the last time."""
        sent = self.twilio.sent_to(USER)
        for message in sent[self.printed :]:
            say("hilo> " + re.sub(r"\n(?=.)", "\n      ", shown(message)))
        self.printed = len(sent)


def shown(message: Message) -> str:
    """Return a message as a terminal can show it."""
    template = f"[plantilla {message.content_sid} {message.variables or ''}]" if message.content_sid else ""
    return "\n".join(filter(None, [message.body, template, *(f"[archivo {media.url}]" for media in message.media)]))
