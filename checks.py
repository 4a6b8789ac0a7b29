"""`check`: a line for each thing that Hilo needs, and what to do about each fault."""

from __future__ import annotations

import contextlib
import difflib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from datetime import UTC, date, datetime, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import requests
from twilio.base.exceptions import TwilioException
from twilio.request_validator import RequestValidator

import gateway
import localdb
from database import SCHEMA, Database, DatabaseDown, DatabaseFault, in_the_way, installed_version, schema_version
from forget import said
from settings import ConfigurationError, legacy_assistant, load_assistants, mask, read_environment, read_settings, scrub
from settings import variables as known_variables
from tools._plugins import Plugins
from whatsapp import NotSent, WhatsApp

OLDEST_POSTGRESQL = 14  # functions with a body that is bound when they are made
SOON = timedelta(days=90)  # a model that is shut down within it is worth a warning
SHORTEST_TOKEN = 16
LONGEST_DESCRIPTION = 1_024  # characters of a tool's
OVERDUE = 60.0  # seconds: a run that waits longer for a worker is no accident
TIMEOUT = 10.0  # seconds for a request to ourselves
SANDBOX = "whatsapp:+14155238886"  # the number of Twilio's WhatsApp sandbox, the same for everybody
EVENTS = {"response.completed", "response.failed", "response.incomplete", "response.cancelled"}
SERVER = "SELECT current_setting('server_version') AS version, current_setting('server_version_num')::int AS number"
WAITING = """
SELECT count(*) AS n, extract(epoch FROM now() - min(due_at))::float8 AS seconds FROM runs
WHERE state <> 'done' AND due_at < now()
"""
OPENAI_STATUS = "look at https://status.openai.com and at this machine's network"
CONSOLE = "see https://console.twilio.com"
MARKS = {"ok": "✅", "warning": "⚠️", "fault": "❌"}


# --- Findings ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Finding:
    """What was found of one thing, and what to do about it."""

    check: str
    status: Literal["ok", "warning", "fault"]
    text: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{MARKS[self.status]} {self.check}: {self.text}{' → ' + self.todo if self.todo else ''}"


def ok(check: str, text: str) -> Finding:
    """Return a finding that needs nothing."""
    return Finding(check, "ok", text)


def warning(check: str, text: str, todo: str = "") -> Finding:
    """Return a finding with which Hilo works, perhaps not as it was meant."""
    return Finding(check, "warning", text, todo)


def fault(check: str, text: str, todo: str) -> Finding:
    """Return a finding with which something does not work."""
    return Finding(check, "fault", text, todo)


# --- Checks -----------------------------------------------------------------------------------------------


class Checks:
    """Everything that is checked, in the order in which it is printed."""

    def __init__(self, offline: bool):
        self.environ, self.unread = read_environment()
        self.settings, self.bad = read_settings(self.environ)
        self.offline = offline
        self.whatsapp = WhatsApp(self.settings)
        self.assistants, self.bad_assistants = load_assistants()

    def findings(self) -> Iterator[Finding]:
        """Yield the findings, scrubbed; a check that breaks does not stop the others."""
        here: list[Callable[[], Iterator[Finding]]] = [
            self.variables, self.database, self.plugin_files, self.assistant_files, self.assistant,
        ]  # fmt: skip
        away = [self.openai, self.openai_webhook, self.twilio, self.sender, self.public_url]
        for check in here if self.offline else here + away:
            name = check.__name__.replace("_", " ")
            try:
                for found in check():
                    yield self.scrubbed(found)
            except Exception as error:
                text = f"could not be checked ({type(error).__name__}: {error})"
                yield self.scrubbed(fault(name, text, "please report this"))
        if self.offline:
            yield warning("network", "OpenAI, Twilio and PUBLIC_URL were not asked", "run it without --offline")

    def scrubbed(self, found: Finding) -> Finding:
        """Return a finding in which no address is whole and no secret is left."""
        secrets = self.settings.secrets()
        return Finding(found.check, found.status, *(scrub(text, secrets) for text in (found.text, found.todo)))

    def close(self) -> None:
        """Close the connections that were opened."""
        self.whatsapp.close()
        if "client" in vars(self):
            self.client.close()

    # here

    def variables(self) -> Iterator[Finding]:
        """Check the variables: all that cannot be used, those that belong together, and names that look misspelt."""
        known = known_variables()
        for line in self.unread:
            yield fault("settings", line, "correct that file")
        for line in self.bad:
            yield fault("settings", line, "correct it in the environment or .env")
        level = self.environ.get("LOG_LEVEL", "INFO").upper()
        if level not in logging.getLevelNamesMapping():
            yield fault("settings", f"LOG_LEVEL={level!r} cannot be used", "set DEBUG, INFO, WARNING or ERROR")
        own = self.plugins.unusable(self.settings)
        for line in own:
            yield fault("settings", line, "correct it in the environment or .env")
        names = {*known, *self.plugins.variables(), "LOG_LEVEL"}
        for name in set(self.environ) - names:
            close = difflib.get_close_matches(name, names, 1, 0.88)
            if close and not self.environ.get(close[0]):
                yield warning("settings", f"{name} is no variable of Hilo's", f"was {close[0]} meant?")
        token = self.settings.admin_token
        if token and len(token.get_secret_value()) < SHORTEST_TOKEN:
            todo = f"use {SHORTEST_TOKEN} random characters or more"
            yield warning("settings", "ADMIN_TOKEN is so short that it can be guessed", todo)
        wrong = {re.split(r"\W", line)[0] for line in [*self.bad, *own]}
        number = sum(bool(self.environ.get(name, "").strip()) for name in names - wrong)
        yield ok("settings", f"{number} of {len(names)} variables are set and can be used")

    def database(self) -> Iterator[Finding]:
        """Check the database, and what is in it."""
        if not self.settings.database_url and not Path(".data/postgres").exists():
            todo = "set DATABASE_URL in production"
            yield warning("database", "DATABASE_URL is not set: `serve` makes an embedded PostgreSQL in .data/", todo)
            return
        began = time.monotonic()
        try:
            with gateway.database_of(self.settings) as url, contextlib.closing(Database(url, 1)) as db:
                yield from self.server(db, began)
                yield from self.schema(db)
        except ConfigurationError as error:
            yield fault("database", str(error), "correct DATABASE_URL")
        except localdb.LocalDatabaseError as error:
            yield fault("database", " ".join(str(error).split()), "see the log that it names")
        except (DatabaseDown, DatabaseFault) as error:
            yield fault("database", str(error), advice(str(error)))

    def server(self, db: Database, began: float) -> Iterator[Finding]:
        """Check the PostgreSQL server."""
        row = db.rows(SERVER)[0]
        kind = "" if self.settings.database_url else " (embedded, in .data/)"
        milliseconds = (time.monotonic() - began) * 1000
        yield ok("database", f"PostgreSQL {row['version']}{kind}, first answer after {milliseconds:.0f} ms")
        if row["number"] // 10000 < OLDEST_POSTGRESQL:
            yield fault("database", f"PostgreSQL {row['version']} is too old", f"it needs {OLDEST_POSTGRESQL} or later")

    def schema(self, db: Database) -> Iterator[Finding]:
        """Check the tables' version, the extensions, and what is in the tables."""
        text = SCHEMA.read_text("utf-8")
        with db.connection() as connection:
            installed = installed_version(connection)
            theirs, _, instead = ("" if installed else in_the_way(connection)).partition(". ")
        wanted = schema_version(text)
        for name in sorted(set(re.findall(r"(?mi)^CREATE EXTENSION IF NOT EXISTS (\w+)", text))):
            yield extension(db, name)
        state = f"version {installed} of {wanted}" if installed else "not there yet"
        may = db.rows("SELECT has_schema_privilege(current_schema(), 'CREATE') AS create")[0]["create"]
        if theirs:
            yield fault("schema", theirs, instead)
        elif installed < wanted and not may:
            yield fault("schema", f"{state}, and this user may make no tables", "run migrate as the database's owner")
        elif installed < wanted:
            yield warning("schema", f"{state}: `serve` applies it when it starts", "or run python gateway.py migrate")
        elif installed > wanted:
            yield warning("schema", f"version {installed} is newer than this code's {wanted}", "deploy the newer code")
        else:
            yield ok("schema", f"version {installed}")
        if installed:
            yield from rows_to_look_at(db)

    @cached_property
    def plugins(self) -> Plugins:
        """The plugins, loaded once."""
        return Plugins()

    def plugin_files(self) -> Iterator[Finding]:
        """Check that each plugin can be loaded."""
        reports = self.plugins.reports.values()
        for report in reports:
            if report.error:
                text = f"{report.file} is left out: {report.error}"
                yield fault("plugins", text, "correct that file")
        for tool in self.plugins.tools.values():
            if len(tool.description) > LONGEST_DESCRIPTION:
                text = f"the docstring of {tool.name} has {len(tool.description):,} characters"
                yield warning("plugins", text, f"OpenAI takes {LONGEST_DESCRIPTION:,}: make it shorter")
        loaded = [report for report in reports if not report.error]
        yield ok("plugins", f"{len(loaded)} loaded, with the tools {', '.join(sorted(self.plugins.tools)) or '(none)'}")

    def assistant_files(self) -> Iterator[Finding]:
        """Check the files of assistants/."""
        for name, why in self.bad_assistants.items():
            yield fault("assistants", f"assistants/{name}: {why}", "correct that file")
        for name, assistant in self.assistants.items():
            unknown = sorted(set(assistant.tools or ()) - set(self.plugins.tools))
            if unknown:
                text = f"assistants/{name}.md names tools that no plugin has: {', '.join(unknown)}"
                yield fault("assistants", text, "correct them: `python gateway.py tools` lists what there is")
        if self.assistants:
            yield ok("assistants", ", ".join(f"{a.name} ({a.model})" for a in self.assistants.values()))

    def assistant(self) -> Iterator[Finding]:
        """Check that ASSISTANT_ID names one of them."""
        name = self.settings.assistant_id
        if legacy := legacy_assistant(self.environ.get("ASSISTANT_ID", "").strip()):
            what, _, todo = legacy.partition("; ")
            yield fault("assistant", f"{what}, so the traditional flow answers", todo)
        elif not name:
            todo = f"set it to one of: {', '.join(self.assistants)}"
            yield warning("assistant", "ASSISTANT_ID is not set: the traditional flow answers", todo)
        elif name not in self.assistants:
            todo = f"set it to one of: {', '.join(self.assistants) or '(none)'}"
            yield fault("assistant", f"ASSISTANT_ID={name!r}: there is no usable assistants/{name}.md", todo)
        elif not self.settings.threads_integration_enabled:
            text = f"{name} is switched off: the traditional flow answers"
            yield warning("assistant", text, "set THREADS_INTEGRATION_ENABLED=true to use it")
        else:
            yield ok("assistant", f"{name} answers")

    # away: OpenAI

    @cached_property
    def client(self) -> Any:
        """The OpenAI SDK's client."""
        import openai

        key = self.settings.openai_api_key
        return openai.OpenAI(
            api_key=key.get_secret_value() if key else "", base_url=self.settings.openai_base_url, timeout=TIMEOUT,
            max_retries=1,
        )  # fmt: skip

    def openai(self) -> Iterator[Finding]:
        """Check the key, and each assistant's model: that it is there and for how long."""
        import openai

        if not self.settings.openai_api_key:
            text = "OPENAI_API_KEY is not set: the traditional flow answers"
            yield warning("openai", text, "set it to use the assistant")
            return
        for model in sorted({assistant.model for assistant in self.assistants.values()}):
            try:
                yield dated(model, getattr(self.client.models.retrieve(model), "shutdown_date", None))
            except openai.NotFoundError:
                yield fault("openai", f"this key cannot use the model {model}", "correct `model:` in assistants/")
            except (openai.AuthenticationError, openai.PermissionDeniedError) as error:
                yield fault("openai", f"the key is refused (HTTP {error.status_code})", "set a valid OPENAI_API_KEY")
                return
            except openai.APIError as error:
                yield fault("openai", f"cannot be asked: {said(error)}", OPENAI_STATUS)
                return

    def openai_webhook(self) -> Iterator[Finding]:
        """Check OpenAI's webhook with a test event, which OpenAI sends and Hilo judges."""
        import openai

        name = "openai webhook"
        if not self.settings.openai_webhook_secret:
            yield warning(name, "OPENAI_WEBHOOK_SECRET is not set: answers are polled for, which is a little slower")
            return
        if not self.settings.openai_api_key or not self.settings.origin:
            yield warning(name, "cannot be tested without OPENAI_API_KEY and PUBLIC_URL", "set them")
            return
        try:
            yield from self.test_event(name, f"{self.settings.origin}/webhooks/openai")
        except openai.BadRequestError:
            yield tested(400)
        except openai.APIStatusError as error:
            text = f"this key may not test it ({said(error)})"
            yield warning(name, text, "send a test event from the project's settings at OpenAI")
        except openai.APIError as error:
            yield fault(name, f"cannot be tested: {said(error)}", OPENAI_STATUS)

    def test_event(self, name: str, url: str) -> Iterator[Finding]:
        """Have OpenAI send a test event to its webhook endpoint for our URL; raises the SDK's errors."""
        endpoint = next((e for e in self.client.webhooks.list() if e.url.rstrip("/") == url), None)
        if endpoint is None:
            yield fault(name, f"this OpenAI project has none for {url}", "add it in the project's settings at OpenAI")
            return
        if missing := EVENTS - set(endpoint.event_types):
            text = f"lacks the events {', '.join(sorted(missing))}"
            yield fault(name, text, "add them in the project's settings at OpenAI")
        yield tested(self.client.webhooks.test(endpoint.id, event_type="response.completed").status_code)

    # away: Twilio

    def twilio(self) -> Iterator[Finding]:
        """Check the account and its credentials."""
        needed = ("TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "PUBLIC_URL")
        missing = [name for name in needed if not getattr(self.settings, name.lower())]
        if missing:
            yield fault("twilio", f"{', '.join(missing)} missing: no message can be taken or answered", "set them")
        if {"TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN"} & set(missing):
            return
        try:
            account = self.whatsapp.client.api.v2010.accounts(self.settings.twilio_account_sid).fetch()
        except (requests.RequestException, TwilioException, NotSent) as error:
            if getattr(error, "status", None) == 401:
                todo = "correct TWILIO_ACCOUNT_SID and TWILIO_AUTH_TOKEN"
                yield fault("twilio", "the account sid and token are refused", todo)
            else:
                yield fault("twilio", f"cannot be asked: {said(error)}", "look at https://status.twilio.com")
            return
        if account.status != "active":
            yield fault("twilio", f"the account is {account.status}", CONSOLE)
        elif account.type == "Trial":
            yield warning("twilio", "the account is a trial", "upgrade it for production")
        else:
            yield ok("twilio", "the account is active")

    def sender(self) -> Iterator[Finding]:
        """Check who sends, and that what is sent to it comes here."""
        chosen = self.settings.twilio_from
        if not self.whatsapp.configured:
            return
        if not chosen:
            text = "TWILIO_FROM is not set: replies leave from the number that was written to"
            yield warning("sender", text, "set it to write to users first")
            return
        try:
            if chosen.startswith("MG"):
                service = self.whatsapp.client.messaging.v1.services(chosen).fetch()
                yield self.leads_here(chosen, service.inbound_request_url, bool(service.use_inbound_webhook_on_number))
            else:
                senders = self.whatsapp.client.messaging.v2.channels_senders.list(channel="whatsapp")
                yield from self.whatsapp_sender(chosen, senders)
        except (requests.RequestException, TwilioException, NotSent) as error:
            judge = fault if getattr(error, "status", None) == 404 else warning
            yield judge("sender", f"{mask(chosen)} cannot be asked for: {said(error)}", CONSOLE)

    def whatsapp_sender(self, number: str, senders: list[Any]) -> Iterator[Finding]:
        """Check a WhatsApp number among the account's senders."""
        found = next((sender for sender in senders if sender.sender_id == number), None)
        if found is None and number == SANDBOX:
            yield warning("sender", "Twilio's sandbox", "for production register a WhatsApp sender of your own")
        elif found is None:
            todo = "correct TWILIO_FROM, or register it in the Twilio console"
            yield fault("sender", f"{mask(number)} is no WhatsApp sender of this account", todo)
        else:
            if found.status and not str(found.status).startswith("ONLINE"):
                yield fault("sender", f"{mask(number)} is {found.status}", CONSOLE)
            yield self.leads_here(mask(number), dict(found.webhook or {}).get("callback_url"))

    def leads_here(self, name: str, url: str | None, elsewhere: bool = False) -> Finding:
        """Return whether a sender's messages come to our webhook."""
        ours = f"{self.settings.origin}/webhooks/twilio"
        if elsewhere:
            return warning("sender", f"{name}: its numbers decide where messages go", f"see that each has {ours}")
        if url != ours:
            todo = f"set {ours} in the Twilio console"
            return fault("sender", f"{name} sends what it receives to {url or 'nowhere'}", todo)
        return ok("sender", f"{name} sends what it receives to {ours}")

    def public_url(self) -> Iterator[Finding]:
        """Check that PUBLIC_URL leads to a Hilo that takes what Twilio signs: a status callback that says nothing."""
        origin, secret = self.settings.origin, self.settings.webhook_secret
        if not origin:
            return
        if not origin.startswith("https://") and not re.match(r"http://(127\.|localhost)", origin):
            yield warning("public url", f"{origin} has no TLS", "use https://")
        try:
            answer = requests.get(f"{origin}/", timeout=TIMEOUT, allow_redirects=False)
            health = answer.json() if "json" in answer.headers.get("Content-Type", "") else {}
            if "version" not in health:
                where = answer.headers.get("Location") or f"something else (HTTP {answer.status_code})"
                yield fault("public url", f"{origin} leads to {where}", "set PUBLIC_URL to where Hilo itself answers")
            elif secret:
                yield judged(health, signed_callback(f"{origin}/webhooks/twilio/status", secret))
        except requests.RequestException as error:
            text = f"{origin} does not answer ({type(error).__name__})"
            yield fault("public url", text, "is Hilo running, and is this its address?")


def signed_callback(url: str, secret: str) -> int:
    """Post a status callback that says nothing, signed as Twilio signs; return its HTTP status."""
    form = {"MessageSid": "SM" + "0" * 32, "MessageStatus": ""}
    headers = {"X-Twilio-Signature": RequestValidator(secret).compute_signature(url, form)}
    return requests.post(url, form, headers=headers, timeout=TIMEOUT, allow_redirects=False).status_code


# --- What an answer means ---------------------------------------------------------------------------------


def advice(error: str) -> str:
    """Return what to do about a database error."""
    known = {
        "28": "correct user and password in DATABASE_URL",
        "3D": "make that database, or correct its name in DATABASE_URL",
        "42": "run python gateway.py migrate as the database's owner",
        "53": "the server has no connection left: raise its limit, or lower DB_CONNECTIONS",
        "57": "the server is starting or stopping: try again",
    }
    found = re.search(r"SQLSTATE (\w\w)", error)
    elsewhere = "is PostgreSQL running at the host and port of DATABASE_URL, and may this machine connect?"
    return known.get(found[1], "look at the server's log") if found else elsewhere


def extension(db: Database, name: str) -> Finding:
    """Return whether an extension is there, or can be made."""
    what = f"extension {name}"
    if db.rows("SELECT FROM pg_extension WHERE extname = :name", {"name": name}):
        return ok(what, "installed")
    rows = db.rows("""SELECT bool_or(trusted OR (SELECT usesuper FROM pg_user WHERE usename = current_user)) AS may
        FROM pg_available_extension_versions WHERE name = :name""", {"name": name})  # fmt: skip
    if rows[0]["may"]:
        return warning(what, "not installed: it comes with the schema")
    lacking = "is not available on this server" if rows[0]["may"] is None else "can be made by a superuser only"
    return fault(what, lacking, f"have the server's administrator run CREATE EXTENSION {name}")


def rows_to_look_at(db: Database) -> Iterator[Finding]:
    """Yield what in the tables wants attention: the old API's threads, no courses, runs that nobody takes."""
    old = db.rows("SELECT count(*) AS n FROM oa_threads_map WHERE NOT starts_with(thread_id, 'conv_')")[0]["n"]
    if old:
        todo = "nothing has to be done: each moves to a new conversation with its user's next message"
        text = f"{old} rows of oa_threads_map are of the Assistants API, which ended on 2026-08-26"
        yield warning("threads", text, todo)
    with contextlib.suppress(DatabaseFault):  # a team may have no use for the catalogue
        if not db.rows("SELECT FROM cursos LIMIT 1"):
            yield warning("catalogue", "there are no courses", "load them: python -m tools.cursos catalogo.csv")
    late = db.rows(WAITING)[0]
    if late["n"] and late["seconds"] > OVERDUE:
        text = f"{late['n']} wait for a worker, the oldest for {late['seconds']:.0f} s"
        yield fault("runs", text, "start a serve or worker process, or look at its log")


def dated(model: str, shutdown: str | None) -> Finding:
    """Return how long a model will be there."""
    try:
        day = date.fromisoformat(str(shutdown)[:10])
    except ValueError:
        return ok("openai", f"the key can use {model}, no end of which is announced")
    todo = "choose another as `model:` in assistants/"
    left = day - datetime.now(UTC).date()
    if left <= timedelta(0):
        return fault("openai", f"the model {model} was shut down on {day}", todo)
    if left <= SOON:
        return warning("openai", f"the model {model} will be shut down on {day}", todo)
    return ok("openai", f"the key can use {model}, which will be there until {day}")


def tested(status: int) -> Finding:
    """Return what the answer to OpenAI's test event means."""
    if 200 <= status < 300:
        return ok("openai webhook", "a test event came through and its signature is right")
    if status == 400:
        text = "a test event was refused: its signature does not match"
        return fault("openai webhook", text, "set OPENAI_WEBHOOK_SECRET to this endpoint's, and restart")
    text = f"a test event got HTTP {status}"
    return fault("openai webhook", text, "does that address lead to Hilo, and is the secret set there?")


def judged(health: dict[str, Any], status: int) -> Finding:
    """Return what the answer to a signed callback of our own says about the process behind PUBLIC_URL."""
    name = "public url"
    if status == 403:
        todo = "give it the same TWILIO_AUTH_TOKEN and PUBLIC_URL, and restart it"
        return fault(name, "the process there refuses our signature", todo)
    if status != 200:
        return fault(name, f"a signed callback got HTTP {status}", "look at that process's log")
    if health.get("status") != "ok":
        return fault(name, "it leads to a Hilo that is not well", "open that address: it says what is wrong")
    return ok(name, f"leads to Hilo {health['version']}, which takes our signature")


# --- The command ------------------------------------------------------------------------------------------


def check(offline: bool, as_json: bool) -> bool:
    """Print a line for each finding; return whether nothing is wrong."""
    logging.disable()
    found = []
    with contextlib.closing(Checks(offline)) as checks:
        for finding in checks.findings():
            found.append(finding)
            if not as_json:
                print(finding, flush=True)
    good = not any(finding.status == "fault" for finding in found)
    if as_json:
        print(json.dumps({"ok": good, "checks": [asdict(finding) for finding in found]}, ensure_ascii=False, indent=2))
    return good
