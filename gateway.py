"""Hilo: a WhatsApp gateway for OpenAI assistants, to be read from top to bottom as a message's journey.

PostgreSQL is the only state. A message is committed before Twilio gets its 200; a run is a row that workers
advance one step at a time; webhooks and polls only wake a row. The tables and their states are in schema.sql, the
statements that move a run in queries.sql.
"""

from __future__ import annotations

import contextlib
import enum
import hashlib
import hmac
import json
import logging
import os
import re
import signal
import ssl
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from functools import cached_property, partial
from html import escape
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl
from zoneinfo import ZoneInfo

if __name__ == "__main__":  # nothing is in hand so early
    ENDS = {"": "TERM INT", "serve": "TERM INT", "worker": "TERM INT", "chat": "TERM INT HUP", "demo": "TERM INT HUP"}
    for name in ENDS.get("".join(sys.argv[1:2]), "").split():
        signal.signal(signal.Signals[f"SIG{name}"], lambda *_: os._exit(0))

import bottle
import pydantic_core
from twilio.request_validator import RequestValidator, get_signature_algorithm

from database import Database, DatabaseDown, DatabaseFault, migrate
from handoff import advisors, remedies, remedy
from health import Health
from inbox import BadRequest, Inbox, inbound
from pace import Breaker, Crowded, Pacer
from runs import Alarm, LeaseLost, Run, Runs, Workers, touched
from server import BODY_LIMIT, Server
from settings import Assistant, ConfigurationError, Settings, legacy_assistant, load_assistants, mask
from tools import Context, Event, Media, Message, Part, Tool, ToolError, Turn, clean, model_input, parts_of
from tools._plugins import UNKNOWN_OUTCOME, Events, Plugins, ToolCall, problem
from tools._textos import idioma_de, texto
from upkeep import Upkeep
from whatsapp import (
    InDoubt,
    NotSent,
    Refused,
    WhatsApp,
    cut,
    message_of,
    plain_input,
    retry_after,
)  # fmt: skip

if TYPE_CHECKING:
    import openai
    from openai.types.responses import Response, ResponseFunctionToolCall

HERE = Path(__file__).parent
VERSION = "1.0.0"
TOOL_ROUNDS = 8  # responses of one run that may end in tool calls
TOOL_OUTPUT = 40_000  # characters of a tool's output that the model gets
TRIES = 3  # responses of one run that may come to nothing before the fallback answers
CRASHES = 3  # claims in a row that found the lease run out before plugins are left aside
SEED_MESSAGES = 20  # lines of the transcript that a new conversation is told; OpenAI takes no more per create
SEND_FOR = 24 * 3600.0  # seconds a reply is tried for; WhatsApp's window is shut afterwards
DRAIN = 25.0  # seconds that SIGTERM leaves to the steps in hand
# Told to the model before messages that were written before its last answer reached the user.
UNREAD = "Tu respuesta anterior se envió antes de que leyeras lo que sigue; el usuario escribió esto sin haberla visto."

log = logging.getLogger("hilo")


# --- Threads and responses: the OpenAI side ---------------------------------------------------------------


class Trouble(enum.Enum):
    """What an error of OpenAI asks for."""

    RETRY = "retry"  # nothing was begun: the same again, a little later
    ROTATE = "rotate"  # the conversation is no use, or what became of the call is unknown
    GIVE_UP = "give up"  # it would fail again


def trouble_of(error: openai.APIError) -> tuple[Trouble, float]:
    """Return what to do about an error, and after how many seconds."""
    import httpx2
    import openai

    if isinstance(error, openai.APIConnectionError):
        refused = isinstance(error.__cause__, (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout))
        return (Trouble.RETRY if refused else Trouble.ROTATE), 0.5
    if not isinstance(error, openai.APIStatusError):
        return Trouble.ROTATE, 0.5
    if error.status_code == 429:
        if error.code == "insufficient_quota":
            return Trouble.GIVE_UP, 0
        return Trouble.RETRY, retry_after(error.response.headers, 1.0)
    if error.status_code >= 500 or error.status_code == 408:
        return Trouble.ROTATE, retry_after(error.response.headers, 0.5)
    if error.code == "conversation_locked":
        return Trouble.RETRY, 0.5
    if error.status_code in (400, 404, 409) and error.code not in ("model_not_found", "invalid_function_parameters"):
        return Trouble.ROTATE, 0
    return Trouble.GIVE_UP, 0


def failure_of(error: openai.APIError) -> str:
    """Return an error's kind, HTTP status and code, without the text, which may quote a user."""
    status = getattr(error, "status_code", None)
    return " ".join(filter(None, (type(error).__name__, str(status or ""), str(error.code or "")[:60])))


class ThreadsAdapter:
    """One OpenAI conversation a user, one response a step (https://platform.openai.com/docs/api-reference/responses)."""

    def __init__(self, settings: Settings, db: Database, tools_by_name: Mapping[str, Tool]):
        self.settings, self.db, self.tools = settings, db, tools_by_name
        self.breaker = Breaker()
        self.pacer = Pacer()
        self.lanes: list[openai.OpenAI] = []  # idle ones

    @cached_property
    def client(self) -> openai.OpenAI:
        """The SDK's client, made once; retries are the run row's business."""
        import openai

        key = self.settings.openai_api_key
        return openai.OpenAI(
            api_key=key.get_secret_value() if key else "none", base_url=self.settings.openai_base_url, max_retries=0,
            timeout=self.settings.call_timeout, http_client=openai.DefaultHttpxClient(verify=self.tls),
        )  # fmt: skip

    @cached_property
    def tls(self) -> ssl.SSLContext:
        """The certificates that are trusted, read once for all lanes."""
        import httpx2

        return httpx2.create_ssl_context()

    @contextlib.contextmanager
    def lane(self) -> Iterator[openai.OpenAI]:
        """Lend a client with a connection of its own: at a shared one's pool its threads wait for each other."""
        import openai

        self.db.give_way()
        try:
            client = self.lanes.pop()
        except IndexError:
            client = self.client.copy(http_client=openai.DefaultHttpxClient(verify=self.tls))
        try:
            yield client
        finally:
            self.lanes.append(client)

    def close(self) -> None:
        """Close the connections that are kept alive."""
        for client in [*self.lanes, *filter(None, [vars(self).get("client")])]:
            client.close()

    @cached_property
    def safety_secret(self) -> bytes:
        """The key of the HMAC that stands for a user's address at OpenAI."""
        row = self.db.one("get", key="safety_secret")
        return row["value"].encode() if row else b""

    def warm(self) -> None:
        """Pay for imports and first calls before the first user waits for them."""
        with self.lane() as client:
            _ = client.responses, client.conversations
        if self.settings.openai_webhook_secret:
            with contextlib.suppress(Exception):
                self.unwrap(b"{}", {})

    def unwrap(self, body: bytes, headers: Mapping[str, str]) -> dict[str, Any]:
        """Return a webhook's event, verified (https://www.standardwebhooks.com); raises where anything is wrong."""
        secret = self.settings.openai_webhook_secret
        self.client.webhooks.verify_signature(body, headers, secret=secret.get_secret_value() if secret else None)
        event = json.loads(body)
        if not isinstance(event, dict) or not isinstance(event.get("type"), str):
            raise ValueError("no event")
        return event

    def get_or_create_thread_id(self, run: Run, save: Callable[[str], None]) -> str:
        """Return the user's conversation; a new one is told the last messages of our own transcript, and saved."""
        known = run.turn[0]["thread_id"]
        if known and known.startswith("conv_"):
            run.log.info("🧵 Thread ID: %s (reused)", known)
            return known
        if known:
            run.log.warning("⚠️ thread %s is of the Assistants API, which is gone: replaced", known)
        told = history(self.db, self.settings, run.user_phone, SEED_MESSAGES, run.id) if run.turn[0]["told"] else []
        seeds = [{"type": "message", "role": turn.role, "content": turn.text[:4000]} for turn in told]
        with self.lane() as client:
            raw = client.conversations.with_raw_response.create(extra_body={"items": seeds}, timeout=run.patience)
        thread_id = str(parsed(raw).id)
        save(thread_id)
        run.log.info("🧵 Thread ID: %s (created, %d messages told)", thread_id, len(seeds))
        return thread_id

    def start_run(self, run: Run, assistant: Assistant, input_items: list[dict[str, Any]], timeout: float) -> Response:
        """Start one response on the run's conversation. There is no idempotency: the caller marks the row first."""
        today = datetime.now(ZoneInfo(self.settings.zona_horaria))
        user = hmac.new(self.safety_secret, run.user_phone.encode(), hashlib.sha256).hexdigest()
        body: dict[str, Any] = {
            "model": assistant.model, "instructions": f"{assistant.instructions}\n\nHoy es {today:%Y-%m-%d}.",
            "conversation": run.thread_id, "background": True, "store": True, "metadata": {"run": str(run.id)},
            "safety_identifier": user, "tools": self.definitions(assistant), "input": input_items,
        }  # fmt: skip
        if assistant.reasoning_effort:
            body["reasoning"] = {"effort": assistant.reasoning_effort}
        if assistant.max_output_tokens:
            body["max_output_tokens"] = assistant.max_output_tokens
        with self.lane() as client:  # extra_body: past typed parameters, whose transformation costs twice the call
            raw = client.responses.with_raw_response.create(extra_body=body, timeout=timeout)
        return parsed(raw)

    def tools_of(self, assistant: Assistant) -> dict[str, Tool]:
        """Return the tools that an assistant may call, by name."""
        return {name: t for name, t in self.tools.items() if assistant.tools is None or name in assistant.tools}

    def definitions(self, assistant: Assistant) -> list[dict[str, Any]]:
        """Return what an assistant may call, as OpenAI takes it."""
        functions = [tool.definition for tool in self.tools_of(assistant).values()]
        stores = list(assistant.vector_stores)
        search = {"type": "file_search", "vector_store_ids": stores, "max_num_results": assistant.max_results}
        return [*functions, search] if stores else functions

    def poll_run(self, run: Run) -> Response:
        """Return the run's response as it is now; never waits for the model."""
        with self.lane() as client:
            raw = client.responses.with_raw_response.retrieve(run.response_id or "", timeout=run.patience)
        return parsed(raw)

    def cancel(self, response_id: str) -> Response | None:
        """Cancel a response (idempotent) and return what became of it, None where OpenAI does not say."""
        import openai

        seconds = min(5.0, self.settings.call_timeout)
        try:
            return self.client.responses.cancel(response_id, timeout=seconds)
        except (openai.BadRequestError, openai.ConflictError):  # it has come to its end
            with contextlib.suppress(openai.APIError):
                return parsed(self.client.responses.with_raw_response.retrieve(response_id, timeout=seconds))
        except openai.APIError as error:
            log.warning("⚠️ cancel of %s: %s", response_id, type(error).__name__)
        return None

    def delete_response(self, response_id: str) -> None:
        """Cancel and delete a response that nobody will look at; one that cannot be deleted stays."""
        if self.cancel(response_id):
            with contextlib.suppress(Exception):
                self.client.responses.delete(response_id, timeout=min(5.0, self.settings.call_timeout))

    def delete_thread(self, thread_id: str) -> int:
        """Delete a conversation's items, then it; return how many items. What is gone already is no error."""
        import openai

        count = 0
        if not thread_id.startswith("conv_"):
            return count  # of the old API, which is gone with all that it held
        with contextlib.suppress(openai.NotFoundError):
            items = list(self.client.conversations.items.list(thread_id, limit=100))  # whole, before the first one goes
            for item in items:
                with contextlib.suppress(openai.NotFoundError):
                    self.client.conversations.items.delete(item.id or "", conversation_id=thread_id)
                    count += 1
            self.client.conversations.delete(thread_id)
        return count


class Loose(SimpleNamespace):
    """JSON with attributes, as the SDK's models have them but at a tenth of their cost; what is not there is None."""

    def __getattr__(self, name: str) -> Any:
        return None


def parsed(raw: Any) -> Any:
    """Return the body of one of the SDK's raw responses; raises APIResponseValidationError where it is no object."""
    import openai

    with contextlib.suppress(ValueError, TypeError):
        body = json.loads(raw.content, object_hook=lambda fields: Loose(**fields))
        if isinstance(body, Loose):
            return body
    raise openai.APIResponseValidationError(raw.http_response, None)


def fetch_last_assistant_message(response: Response) -> str:
    """Return the text of a response, or the model's refusal; "" where it has neither."""
    contents = [part for item in response.output or () if item.type == "message" for part in item.content or ()]
    texts = [part.text if part.type == "output_text" else part.refusal for part in contents]
    return str(clean("\n".join(filter(None, texts)))).strip()


def history(db: Database, settings: Settings, address: str, n: int, run_id: int | None) -> list[Turn]:
    """Return the last `n` lines said before a run, oldest first, none from before a fresh start."""
    rows = db.all("history", u=address, n=n, run=run_id, advisors=advisors(settings))
    return [Turn("user" if r["direction"] == "in" else "assistant", said(r), r["at"]) for r in reversed(rows)]


def said(row: Mapping[str, Any]) -> str:
    """Return a line of the transcript as text."""
    if row["direction"] == "out":
        return row["body"] or f"[{row['media_url'] or 'plantilla'}]"
    if isinstance(row["input"], list):  # the words beside an image or a file
        return "\n".join(part["text"] for part in row["input"] if "text" in part) or plain_input(message_of(row))
    return row["input"] or plain_input(message_of(row))


# --- The journey: one step at a time ----------------------------------------------------------------------


class Journey:
    """Advances a claimed run: queued, waiting, sending, done. `advance` is the whole story."""

    def __init__(self, settings: Settings, db: Database, plugins: Plugins, wake_in: Callable[[float], None]):
        self.settings, self.db, self.plugins = settings, db, plugins
        self.runs = Runs(db, settings, wake_in)
        self.threads = ThreadsAdapter(settings, db, plugins.tools)
        self.whatsapp = WhatsApp(settings)
        self.assistants, self.bad_assistants = load_assistants()
        self.events = Events(plugins)
        self.crowded: Callable[[], bool] = lambda: False  # told by the workers
        # Seconds during which a call that somebody still holds may bring a part to Twilio.
        self.doubtful = settings.call_timeout + settings.grace

    def warm(self) -> None:
        """Pay for imports and first calls before a run is claimed: they may take longer than a short lease."""
        with contextlib.suppress(Exception):
            if self.settings.openai_api_key or self.settings.openai_webhook_secret:
                self.threads.warm()
        with contextlib.suppress(Exception):
            if self.whatsapp.configured:
                _ = self.whatsapp.client.messages

    def close(self) -> None:
        """Let what waits be done, and close the connections to the outside."""
        self.events.stop()
        self.whatsapp.close()
        self.threads.close()

    def advance(self, run: Run) -> None:
        """Take a run as far as it goes without waiting; LeaseLost means that another worker has it."""
        step("claimed", run)
        if run.creating and run.state != "sending":  # whoever began a create is gone: its outcome is not known
            self.runs.rotate(run, "a response may have been made that nobody knows of")
        while run.held:
            if run.state == "queued":
                self.start(run)
            elif run.state == "waiting":
                self.follow(run)
            elif run.state == "sending":
                self.deliver(run)

    # queued: the messages are taken, and somebody is asked

    def start(self, run: Run) -> None:
        """Take the waiting messages; answer by plugin, by assistant or by the traditional flow."""
        if not self.runs.take(run):
            return self.runs.write(run, [], "intercepted")
        step("taken", run)
        if run.crashes >= CRASHES:
            return self.fall_back(run, "error")
        self.intercept(run)
        open_rows = [row for row in run.turn if row["reply"] is None and row["id"] > row["seed_after"]]
        if not open_rows or run.mode != "bot":
            return self.runs.write(run, self.replies(run), "intercepted", leave=True)
        reason = self.why_not(run)
        if reason:
            return self.fall_back(run, reason)
        assistant = self.assistant_for(run, message_of(open_rows[-1]))
        if assistant is None:
            return self.fall_back(run, "no_assistant")
        self.ask(run, assistant, lambda: [*self.inputs(run, open_rows), *(self.calls_so_far(run) if run.tries else ())])

    def why_not(self, run: Run) -> str | None:
        """Return the reason why this turn is not for the model, None where it is."""
        if not self.settings.threads_integration_enabled:
            return "disabled"
        if not self.settings.openai_api_key:
            return "no_assistant"
        if run.seconds_left <= 0:
            return "timeout"
        if run.tries >= TRIES:
            return "error"
        return None if self.threads.breaker.allows(run.id) else "openai_down"

    def assistant_for(self, run: Run, message: Message) -> Assistant | None:
        """Return the assistant that a plugin chose ("": none), else ASSISTANT_ID's; None where there is none."""
        chosen = self.hook(run, "choose_assistant", str, message=message)
        if chosen and chosen not in self.assistants:
            run.log.warning("⚠️ choose_assistant named %r, which is not in assistants/", chosen)
            chosen = None
        run.assistant = self.settings.assistant_id if chosen is None else chosen
        return self.assistants.get(run.assistant or "")

    def intercept(self, run: Run) -> None:
        """Ask the plugins about each message in order; an answer is kept with the message and not asked for again."""
        for row in run.turn:
            if row["reply"] is not None:
                continue
            if row["opt"]:
                parts: list[Part] | None = self.opt(run, row)
            elif run.mode == "out":
                parts = []
            else:
                # Where a plugin stands between the user and an advisor, nobody else would read this: tried again.
                strict = run.mode == "human" and run.crashes + 1 < CRASHES
                parts = self.hook(run, "incoming_message", parts_of, strict=strict, message=message_of(row))
            if parts is not None:
                row["reply"] = pydantic_core.to_jsonable_python(parts)
                self.db.one("save_reply", id=row["id"], reply=json.dumps(row["reply"]))
            if parts is not None or run.mode != "bot":  # a plugin may have changed where the user stands
                now = self.db.one("standing", u=run.user_phone) or {"mode": run.mode}
                run.mode = now.pop("mode")
                for line in run.turn:
                    line.update(now)

    def opt(self, run: Run, row: Mapping[str, Any]) -> list[Part]:
        """Confirm that a user leaves, of which plugins may tell others, or returns: the mode was set on receipt."""
        self.db.one("own_mode", run=run.id, u=run.user_phone)
        self.tell("opted_" + row["opt"], run)
        if row["opt"] == "in":
            return [Part(text=texto("alta", run.language or "es"))]
        run.mode = "out"
        told = self.hook(run, "incoming_message", parts_of, message=message_of(row))
        return [Part(text=texto("baja", run.language or "es")), *(part for part in told or () if part.to)]

    def replies(self, run: Run) -> list[Part]:
        """Return what plugins answered to the messages of this turn, in order."""
        return sized([Part(**part) for row in run.turn for part in row["reply"] or ()])

    def inputs(self, run: Run, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the turn's messages as input items, asking the plugins once about each."""
        for row in rows:
            if row["input"] is None:
                row["input"] = self.read(run, message_of(row))
                if not isinstance(row["input"], str) or row["input"] != row["body"]:
                    self.db.one("save_input", id=row["id"], input=json.dumps(row["input"]))
        items = [{"role": "user", "content": row["input"]} for row in rows]
        begun_anew = run.turn[0]["id"] <= run.turn[0]["seed_after"]
        unread = rows[0]["answered_at"] and rows[0]["at"] < rows[0]["answered_at"] and not begun_anew
        return [{"role": "developer", "content": UNREAD}, *items] if unread else items

    def read(self, run: Run, message: Message) -> str | list[dict[str, Any]]:
        """Return what the model reads for a message, from the first plugin that knows its kind."""
        run.reading = bool(message.media)  # Workers.keep lengthens the lease
        try:
            found = self.hook(run, "message_to_input", model_input, message=message)
        finally:
            run.reading = False
        return plain_input(message) if found is None else found

    # asking: the one call whose outcome can stay unknown

    def ask(self, run: Run, assistant: Assistant, items: Callable[[], list[dict[str, Any]]], round_: int = 0) -> None:
        """Start a response and save its id, having marked the row first."""
        import openai

        try:
            content = items()
            if run.state == "queued":
                self.runs.renew_if_short(run)
                save = partial(self.begin_create, run, assistant, "save_thread")
                run.thread_id = self.threads.get_or_create_thread_id(run, save)
                step("thread", run)
            if not run.creating:
                self.begin_create(run, assistant, "begin_create", run.thread_id)
            response = self.threads.start_run(run, assistant, content, run.create_timeout)
        except openai.APIError as error:
            return self.mend(run, error)
        step("created", run)
        self.save_response(run, assistant, response, round_)

    def begin_create(self, run: Run, assistant: Assistant, statement: str, thread_id: str | None) -> None:
        """Mark the row: from here on a response may exist that nobody knows of."""
        lease = min(run.create_timeout, self.settings.call_timeout)  # Workers.keep lengthens it
        self.runs.renew(run, lease, statement, thread=thread_id, assistant=assistant.name)
        run.creating = True
        run.check_lease(lease)

    def save_response(self, run: Run, assistant: Assistant, response: Response, round_: int) -> None:
        """Save a response's id; one that is at its end already is looked at without putting the run down."""
        ended = response.status not in ("queued", "in_progress")
        net = self.poll_delay(0)
        try:
            row = self.runs.insist(run, lambda: self.runs.fenced(
                run, "save_response", resp=response.id, model=assistant.model, rounds=run.rounds + round_, held=ended,
                net=net, assistant=assistant.name, u=run.user_phone, thread=run.thread_id,
            ))  # fmt: skip
        except (LeaseLost, DatabaseDown, DatabaseFault):  # nobody will look at it
            self.threads.delete_response(response.id)
            raise
        run.state, run.response_id, run.creating, run.rounds = "waiting", response.id, False, run.rounds + round_
        step("waiting", run)
        if ended:
            return self.judge(run, response)
        run.held = False
        self.runs.wake_in(row["seconds"])

    def poll_delay(self, age: float) -> float:
        """Return in how many seconds to look at a response that is `age` seconds old; a webhook comes sooner."""
        if self.settings.openai_webhook_secret:
            return self.threads.pacer.delay(5.0)
        return self.threads.pacer.delay(min(5.0, max(0.3, age / 8)))

    def mend(self, run: Run, error: openai.APIError) -> None:
        """Decide what follows an error of OpenAI: again, on a new conversation, or without the model."""
        trouble, seconds = trouble_of(error)
        status = getattr(error, "status_code", None)
        run.failure = failure_of(error)
        run.log.warning("⚠️ OpenAI: %s", run.failure)
        if status is None or status >= 500 or status in (401, 403, 429):
            self.threads.breaker.failed(run.id)
        if trouble is Trouble.GIVE_UP:
            return self.fall_back(run, "openai_down")
        if run.tries + 1 >= TRIES or run.seconds_left < seconds + 1:
            return self.fall_back(run, "openai_down")
        if trouble is Trouble.RETRY and not (error.code == "conversation_locked" and run.tries):
            run.creating = False
            return self.runs.put_down(run, seconds * 2**run.tries, tries=1, asked=True)
        self.runs.rotate(run, error.code or type(error).__name__)
        if seconds:
            self.runs.put_down(run, seconds * 2**run.tries, asked=True)

    # waiting: the response is looked at, its tool calls are answered

    def follow(self, run: Run) -> None:
        """Look at the run's response."""
        import openai

        if run.crashes >= CRASHES:
            return self.fall_back(run, "error")
        if run.seconds_left <= 0:
            return self.judge(run, None)
        try:
            self.runs.renew_if_short(run)
            with self.threads.breaker.narrow():
                response = self.threads.poll_run(run)
        except openai.NotFoundError:
            return self.runs.rotate(run, f"response {run.response_id} is not there")
        except openai.APIError as error:
            run.failure = f"poll: {failure_of(error)}"
            run.log.warning("⚠️ poll failed: %s", type(error).__name__)
            self.threads.breaker.failed(run.id)
            return self.runs.put_down(run, min(1.0, max(0.0, run.seconds_left)))
        except Crowded:
            return self.runs.put_down(run, min(1.0, run.seconds_left))
        self.judge(run, response)

    def judge(self, run: Run, response: Response | None) -> None:
        """Go on with a response as its status says; None: it was not looked at, for the time is up."""
        if response is not None and response.status in ("queued", "in_progress") and run.seconds_left > 0:
            return self.runs.put_down(run, self.poll_delay(time.time() - response.created_at))
        if response is None or response.status in ("queued", "in_progress"):
            response = self.last_look(run)
            if response is None or response.status != "completed":
                self.threads.breaker.failed(run.id)
                return self.fall_back(run, "timeout")
        usage = response.usage
        tokens = {"i": usage.input_tokens if usage else None, "o": usage.output_tokens if usage else None}
        run.ended = {"resp": response.id, "status": response.status, **tokens}
        if response.status == "completed":
            self.threads.breaker.succeeded()
        calls = [item for item in response.output or () if item.type == "function_call"]
        text = fetch_last_assistant_message(response)
        if response.status == "completed" and calls:
            return self.use_tools(run, response, calls)
        if response.status in ("completed", "incomplete") and text:
            return self.reply(run, text, leave=response.status != "completed")
        self.came_to_nothing(run, response)

    def last_look(self, run: Run) -> Response | None:
        """Cancel a response whose time is up and return it: it may have just come. None where OpenAI does not say, and
        is not asked while it fails, lest all who wait wait for each other."""
        if self.threads.breaker.is_open:
            self.events.errand(partial(self.threads.cancel, run.response_id or ""))
            return None
        self.runs.renew(run, self.settings.call_timeout)
        return self.threads.cancel(run.response_id or "")

    def came_to_nothing(self, run: Run, response: Response) -> None:
        """A response failed, was cancelled or says nothing: once more on a new conversation, or the fallback."""
        code = response.error.code if response.error else response.status
        passing = code in ("server_error", "rate_limit_exceeded")
        if passing:
            self.threads.breaker.failed(run.id)
        if run.tries + 1 < TRIES and run.seconds_left > 3 and (passing or code in ("completed", "cancelled")):
            self.db.one("note_response", **run.ended)
            self.runs.rotate(run, f"the response ended as {code}")
            return self.runs.put_down(run, 0.5)
        run.failure = f"the response ended as {code}"
        run.log.warning("⚠️ response %s ended as %s", response.id, code)
        self.fall_back(run, "timeout" if run.seconds_left <= 0 else "error")

    def use_tools(self, run: Run, response: Response, calls: list[ResponseFunctionToolCall]) -> None:
        """Run a response's tool calls, in parallel, and start the next response with all their outputs."""
        assistant = self.assistants.get(run.assistant or "")
        if assistant is None or run.rounds >= TOOL_ROUNDS or run.seconds_left <= 0:
            run.log.warning("⚠️ no more tool calls after %d rounds", run.rounds)
            return self.fall_back(run, "timeout" if run.seconds_left <= 0 else "error")
        outputs = self.answer_tool_calls(run, assistant, response, calls)
        step("tools", run)
        self.ask(run, assistant, lambda: outputs, round_=1)

    def answer_tool_calls(
        self, run: Run, assistant: Assistant, response: Response, calls: list[ResponseFunctionToolCall]
    ) -> list[dict[str, Any]]:
        """Return an output for every call, each recorded by its call_id; one recorded already is not run again."""
        tools = self.threads.tools_of(assistant)
        rows = [{"call_id": c.call_id, "name": c.name, "arguments": clean(c.arguments)} for c in calls]
        ids = [call.call_id for call in calls]
        longest = max((tools[c.name].timeout for c in calls if c.name in tools), default=0.0)
        facts = {"calls": json.dumps(rows), "ids": ids, **run.ended}
        longest = max(0.0, min(longest, run.seconds_left))
        begun = self.runs.renew(run, longest, "begin_calls", **facts)["known"] or {}
        run.check_lease(longest)
        jobs = [self.begin_call(run, call, tools.get(call.name), begun.get(call.call_id)) for call in calls]
        for job in jobs:
            if job is not None:
                job.wait(time.monotonic() + max(0.1, run.seconds_left - 1.0))
        outputs = {row["call_id"]: row["output"] for row in self.db.all("outputs", ids=ids)}
        return [{"type": "function_call_output", "call_id": id, "output": touched(outputs.get(id))} for id in ids]

    def begin_call(
        self, run: Run, call: ResponseFunctionToolCall, tool: Tool | None, before: bool | None
    ) -> ToolCall | None:
        """Start a call in a thread of its own, None where its output is known; `before`: whether a worker that is gone
        left an output, None where none had begun."""
        save = partial(self.save_output, run, call)
        if before:
            return None
        if tool is None:
            save(problem(f"no existe la herramienta {call.name}"), False, 0)
        elif before is False and tool.side_effects:  # not a second time
            save(UNKNOWN_OUTCOME, False, 0)
        elif ToolCall.too_many_hang(tool.name):
            save(problem("no está disponible en este momento"), False, 0)
        else:
            return ToolCall(tool, call.arguments, self.context(run), save)
        return None

    def save_output(self, run: Run, call: ResponseFunctionToolCall, output: str, ok: bool, milliseconds: int) -> bool:
        """Record a call's output; False where it has one already, which stays. A fact, so it needs no fence."""
        facts = {"id": call.call_id, "output": output[:TOOL_OUTPUT], "ok": ok, "ms": milliseconds}
        if not self.runs.insist(run, partial(self.db.one, "save_output", **facts)):
            return False
        if ok:
            run.log.info("🔧 Tool ejecutado: %s (%d ms)", call.name, milliseconds)
        else:
            run.log.warning("⚠️ Tool fallido: %s (%d ms)", call.name, milliseconds)
        return True

    def calls_so_far(self, run: Run) -> list[dict[str, Any]]:
        """Return this run's calls and outputs as items, for a conversation that has not seen them."""
        items: list[dict[str, Any]] = []
        for row in self.db.all("calls_of_run", id=run.id):
            tool = self.plugins.tools.get(row["name"])
            if row["output"] is None and not (tool and tool.side_effects):
                continue
            items.append({"type": "function_call", **{key: row[key] for key in ("call_id", "name", "arguments")}})
            output = UNKNOWN_OUTCOME if row["output"] is None else row["output"]
            items.append({"type": "function_call_output", "call_id": row["call_id"], "output": output})
        return items

    # the reply: written first, then sent

    def reply(self, run: Run, text: str, leave: bool) -> None:
        """Write the model's answer as parts."""
        parts = self.hook(run, "format_reply", parts_of, text=text, message=self.last_message(run))
        parts = [Part(text=text)] if parts is None else parts
        self.runs.write(run, [*self.replies(run), *sized(parts)], "answered", leave=leave)
        step("written", run)

    def fall_back(self, run: Run, reason: str) -> None:
        """Write the traditional flow's answer; the conversation, which lacks it, is left behind."""
        if run.response_id and run.state == "waiting" and reason != "timeout":
            self.runs.renew(run, self.settings.call_timeout)
            self.threads.cancel(run.response_id)
        message = self.last_message(run)
        parts = None
        if run.crashes < CRASHES:
            parts = self.hook(run, "fallback_reply", parts_of, message=message, reason=reason)
        if parts is None:
            parts = [Part(text=texto("disculpa", run.language or "es"))]
        run.log.info("⚠️ Flujo tradicional: %s", reason)
        self.runs.write(run, [*self.replies(run), *sized(parts)], "fallback", reason, leave=True)
        step("written", run)

    def last_message(self, run: Run) -> Message:
        """Return the last message of the turn."""
        return message_of(run.turn[-1])

    # sending: one part after the other

    def deliver(self, run: Run) -> None:
        """Send the parts that are not sent yet, in order; put the run down where one has to wait."""
        if run.doubt and not self.settle_doubt(run):
            return
        while run.held:
            part = self.next_part(run)
            if part is None:
                self.done(run)
            elif part["state"] == "withheld":
                run.log.info("🤐 Part withheld: the user is in mode %s", part["mode"])
            elif part["hold_for"] is not None:
                self.runs.put_down(run, part["hold_for"])
            elif part["state"] is not None:  # None: a callback told meanwhile what became of it
                self.send(run, part)

    def next_part(self, run: Run) -> dict[str, Any] | None:
        """Return the next part, now in state `sending`; None where all have been dealt with."""
        row, run.next_part = run.next_part, None
        row = row or self.runs.renew(run, self.settings.call_timeout, "next_part")
        return row if row["id"] else None

    def send(self, run: Run, part: Mapping[str, Any]) -> None:
        """Hand one part to Twilio; the last one ends the turn, one that has to wait puts the run down."""
        step("sending", run)
        self.db.give_way()
        run.check_lease(self.settings.call_timeout)
        try:
            if part["late"] and not part["content_sid"]:
                raise Refused(WhatsApp.WINDOW_SHUT, "the user last wrote more than 24 hours ago")
            sid = self.whatsapp.send(part, part["address"], part["own_number"] or run.own_number)
        except Refused as refusal:
            return self.refused(run, part, refusal)
        except NotSent as delay:
            return self.back_to_queue(run, part, str(delay), max(delay.seconds, min(60, 2 ** part["sends"])))
        except InDoubt as doubt:
            run.log.warning("⚠️ Part in doubt: %s", doubt)
            return self.runs.put_down(run, self.doubtful)
        step("accepted", run)
        self.done(run, part["id"], sid)

    def back_to_queue(self, run: Run, part: Mapping[str, Any], why: str, seconds: float) -> None:
        """Try a part again later: it was certainly not sent. After a day it is given up."""
        row = self.runs.fenced(run, "not_sent", part=part["id"], long=SEND_FOR)
        then = f"again in {seconds:.0f} s" if row["state"] == "queued" else row["state"]
        run.log.warning("⚠️ Part not sent (%s): %s", why, then)
        self.runs.put_down(run, seconds, asked=True)

    def refused(self, run: Run, part: Mapping[str, Any], refusal: Refused) -> None:
        """Twilio will not take a part: it and what was to follow it to that address end as failed, with the code."""
        self.db.all("refused", code=refusal.code, run=run.id, u=part["user_phone"], part=part["id"])
        run.log.warning("⚠️ Part refused: %s", refusal)
        if refusal.code == WhatsApp.WINDOW_SHUT and not part["content_sid"]:
            for piece in remedies(self.db, self.settings, part["user_phone"], run.id):
                self.send_part(self.context(run), piece)
        self.tell("message_failed", run, code=refusal.code)

    def settle_doubt(self, run: Run) -> bool:
        """Find out what became of a part that a broken call or a crash left in `sending`; False to wait."""
        part = self.db.one("in_doubt", id=run.id)
        if part is None:
            return True
        wait = self.doubtful - part["age"]
        if wait > 0:
            self.runs.put_down(run, wait)
            return False
        self.runs.renew(run, self.settings.call_timeout)
        try:
            sid = self.whatsapp.find(part, part["address"], self.known_sids)
        except NotSent as delay:
            run.log.warning("⚠️ %s", delay)
            self.runs.put_down(run, delay.seconds)
            return False
        if sid is None:
            run.log.info("📤 Part was not sent before: it goes again")
            self.back_to_queue(run, part, "Twilio does not have it", 0)
            return False
        run.log.info("📤 Part had been sent: %s", sid)
        self.done(run, part["id"], sid)
        return True

    def known_sids(self, sids: list[str]) -> set[str]:
        """Return those of `sids` that belong to rows of ours."""
        return {row["sid"] for row in self.db.all("known_sids", sids=sids)}

    def done(self, run: Run, part: int | None = None, sid: str | None = None) -> None:
        """Record Twilio's sid for a part; with the last one end the turn, and say how it went."""
        row = self.runs.insist(run, partial(self.runs.finish, run, part, sid))
        if part:
            step("sent", run)
        if row is None:
            return
        seconds = f"{row['seconds']:.1f}".replace(".", ",")
        if row["sent"]:
            plural = "s" if row["sent"] != 1 else ""
            run.log.info("📤 Respuesta enviada (%d parte%s, %s s desde el mensaje)", row["sent"], plural, seconds)
        run.log.info("%s %s", "⚠️" if row["outcome"] == "undelivered" else "✅", row["outcome"])
        step("done", run)
        if row["shut"] and remedy(self.db, self.settings, row["shut"], run.id):
            self.runs.wake_in(0)
        self.tell("run_finished", run, outcome=row["outcome"], seconds=row["seconds"])

    # what plugins are given

    def hook(self, run: Run, name: str, convert: Callable[[Any], Any], strict: bool = False, **arguments: Any) -> Any:
        """Return what the first plugin says that has something to say, asked with a lease that leaves it time. With
        `strict` it raises HookFailed where nobody has, but one has failed."""
        self.runs.renew_if_short(run)
        return self.plugins.first(name, convert, strict, context=self.context(run), **arguments)

    def context(self, run: Run) -> Context:
        """Return what a hook or a tool may use during this turn."""
        turn = tuple(message_of(row) for row in run.turn)
        return Context(
            run.id, run.user_phone, run.profile_name, run.assistant, self.settings, run.log, turn, self,
            language=run.language or "es", mode=run.mode,
        )  # fmt: skip

    def query(self, sql: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Context.query: one statement on the pool."""
        return self.db.guest_rows(sql, params)

    def history(self, address: str, n: int, run_id: int | None) -> list[Turn]:
        """Context.history: the transcript before this turn."""
        return history(self.db, self.settings, address, n, run_id)

    def send_part(self, context: Context, part: str | Part) -> None:
        """Context.send: one more part of the run, which leaves before its reply."""
        for piece in sized(parts_of(part)):
            variables = json.dumps(dict(piece.variables)) if piece.variables else None
            touched(self.db.one(
                "queue_part", to=piece.to or context.address, text=piece.text, run=context.run_id,
                media=piece.media_url, content=piece.content_sid, variables=variables,
            ))  # fmt: skip

    def show_typing(self, message: Message) -> None:
        """Context.show_typing: an errand beside the journey, left out when there is much to do."""
        if not self.crowded():
            self.events.errand(partial(self.whatsapp.show_typing, message.sid))

    def download(self, media: Media, limit: int, seconds: float) -> bytes:
        """Context.download: a file from Twilio."""
        return self.whatsapp.download(media, limit, seconds)

    def openai(self) -> Any:
        """Context.openai: the SDK's client."""
        if not self.settings.openai_api_key:
            raise ToolError("OPENAI_API_KEY is not set")
        return self.threads.client

    def tell(self, name: str, run: Run, **data: Any) -> None:
        """Put an event before the track_event plugins, outside the journey."""
        self.events.put(Event(name, datetime.now(UTC), run.id, run.user_phone, data))


def step(name: str, run: Run) -> None:
    """Name a point between two durable states in the log; the kill tests stop a process at one."""
    run.log.debug("· %s", name)


def sized(parts: list[Part]) -> list[Part]:
    """Return parts of which none is longer than Twilio takes."""
    whole = []
    for part in parts:
        pieces = cut(part.text)
        head = [Part(text=piece, to=part.to) for piece in pieces[:-1]]
        last = Part(pieces[-1] if pieces else "", part.media_url, part.content_sid, part.variables, part.to)
        whole += [*head, last]
    return whole


# --- Web: what Twilio, OpenAI and operators call ----------------------------------------------------------

NO_REPLY = '<?xml version="1.0" encoding="UTF-8"?><Response/>'
STATES = {"accepted": "sent", "scheduled": "sent", "queued": "sent", "sending": "sent", "sent": "sent",
          "delivered": "delivered", "read": "read", "undelivered": "undelivered", "failed": "failed"}  # fmt: skip

LEFT_TWILIO = ("sent", "delivered", "read", "undelivered", "failed")


def read_form(request: Any) -> dict[str, str]:
    """Return the fields of a form body, blank ones too; raises BadRequest."""
    if request.content_type.partition(";")[0].strip().lower() != "application/x-www-form-urlencoded":
        raise BadRequest(415, "the body is no application/x-www-form-urlencoded form")
    body = request.environ["wsgi.input"].read(BODY_LIMIT + 1)
    if len(body) > BODY_LIMIT:
        raise BadRequest(413, f"the body is larger than {BODY_LIMIT} bytes")
    try:
        return dict(parse_qsl(body.decode("utf-8"), keep_blank_values=True, errors="strict", max_num_fields=500))
    except UnicodeDecodeError:
        raise BadRequest(400, "the body is not UTF-8") from None
    except ValueError as error:
        raise BadRequest(400, f"the body is no form: {error}") from None


def number_of(text: str | None, digits: int) -> int | None:
    """Return a number of at most so many digits, None for any other text."""
    return int(text) if text and re.fullmatch(f"[0-9]{{1,{digits}}}", text) else None


class Gateway:
    """The parts of one process, and the web application in front of them."""

    def __init__(self, settings: Settings, database_url: str):
        self.settings = settings
        self.db = Database(database_url, settings.first_connections, settings.zona_horaria)
        self.inbox = Inbox(self.db)
        self.plugins = Plugins()
        self.numbers: set[str] = set()  # of ours, that webhooks have told of
        self.alarm = Alarm()
        self.workers = Workers(settings, self.db, self.alarm)
        self.journey = Journey(settings, self.db, self.plugins, self.workers.woken)
        self.upkeep = Upkeep(self)
        self.health = Health(settings, self.db, self.journey, VERSION)

    def start(self) -> None:
        """Start everything but the web server."""
        self.journey.events.thread.start()
        self.workers.start(self.journey)
        self.upkeep.start()
        if not self.settings.worker_threads:  # workers begin with it
            threading.Thread(target=self.journey.warm, daemon=True).start()

    def stop(self, until: float | None = None) -> None:
        """Finish the steps in hand, by `until` (monotonic; default: in DRAIN seconds); what is left is a row."""
        until = time.monotonic() + DRAIN if until is None else until
        self.upkeep.stopping.set()
        self.workers.stop(until - 4)  # what follows takes its seconds too
        self.journey.close()
        self.upkeep.stop(2)
        self.db.close()

    def receive(self, form: Mapping[str, str], at: datetime | None = None) -> bool:
        """Store an inbound message and wake its run; False where it was known."""
        run = self.inbox.store(inbound(form, self.settings.burst_seconds, at))
        if run is None:  # whoever stored it may not have come to tell when its run is due
            self.alarm.blind = True
            self.workers.woken(0)
        else:
            if log.isEnabledFor(logging.DEBUG):
                log.debug("%s · stored", mask(form["From"]))
            if not run["held"]:
                self.workers.woken(max(0.0, run["seconds"]))
        return run is not None

    def app(self) -> bottle.Bottle:
        """Return the WSGI application."""
        app = bottle.Bottle()
        app.route("/", callback=self.page)
        app.route("/webhooks/twilio", "POST", self.twilio_webhook)
        app.route("/webhooks/twilio/status", "POST", self.status_webhook)
        app.route("/webhooks/openai", "POST", self.openai_webhook)
        app.route("/webhooks/openai/health", callback=self.health.webhook)
        app.default_error_handler = lambda error: self.plain(error.status_code, error.status_line)
        context = Context(settings=self.settings, log=log, services=self.journey)
        self.plugins.each("register_routes", app=app, context=context)
        return app

    @staticmethod
    def plain(status: int, text: str, kind: str = "text/plain") -> Any:
        """Return a small answer."""
        if status == 200:  # a webhook's, at half the cost
            bottle.response.content_type = f"{kind}; charset=utf-8"
            return text.encode()
        return bottle.HTTPResponse(text, status, headers={"Content-Type": f"{kind}; charset=utf-8"})

    def signed_form(self, request: Any) -> dict[str, str]:
        """Return the fields of a request that Twilio signed (https://www.twilio.com/docs/usage/security); raises
        BadRequest with the reason."""
        secret = self.settings.webhook_secret
        if not secret or not self.settings.origin:
            lacking = "PUBLIC_URL" if secret else "TWILIO_AUTH_TOKEN"
            raise BadRequest(503, f"{lacking} is not set, so signatures cannot be checked")
        signature = request.environ.get("HTTP_X_TWILIO_SIGNATURE")
        if not signature:
            raise BadRequest(403, "the X-Twilio-Signature header is missing")
        form = read_form(request)
        algorithm = get_signature_algorithm(request.environ.get("HTTP_X_TWILIO_WEBHOOKS_SIGNATURE_SETTINGS"))
        url, validator = self.settings.origin + request.environ["REQUEST_URI"], RequestValidator(secret)
        try:
            valid = hmac.compare_digest(validator.compute_signature(url, form, algorithm), signature)
            valid = valid or validator.validate(url, form, signature, algorithm)  # with the port, or without
        except (ValueError, TypeError):
            valid = False
        if not valid:
            raise BadRequest(403, "the signature does not match: check TWILIO_AUTH_TOKEN and PUBLIC_URL")
        return form

    def twilio_webhook(self) -> Any:
        """Take an inbound message: one commit, then 200 with no reply. It is answered over the REST API."""
        form: dict[str, str] = {}
        try:
            with self.db.arrival():
                form = self.signed_form(bottle.request)
                self.numbers.add(form.get("To", ""))
                new = self.receive(form)
            if not new:
                log.info("%s received again: nothing to do", form["MessageSid"])
        except BadRequest as refusal:
            log.warning("⚠️ webhook refused (%d): %s", refusal.status, refusal)
            return self.plain(refusal.status, str(refusal))
        except (DatabaseDown, DatabaseFault) as error:
            log.error("⚠️ message %s not stored: %s; it will be fetched from Twilio", form.get("MessageSid"), error)
            self.upkeep.outage()
            sentence = escape(texto("caida", idioma_de(form.get("Body", ""))), quote=False)
            return self.plain(200, f"<Response><Message>{sentence}</Message></Response>", "text/xml")
        return self.plain(200, NO_REPLY, "text/xml")

    def status_webhook(self) -> Any:
        """Take what became of a part; the row's id is in the URL that we gave Twilio."""
        try:
            form = self.signed_form(bottle.request)
            state = STATES.get(form.get("MessageStatus", ""))
            rows = state and self.db.hurried(
                "part_status", id=number_of(bottle.request.query.get("m"), 18),
                sid=clean(form.get("MessageSid")) or None, state=state,
                code=number_of(form.get("ErrorCode"), 9), gone=form.get("MessageStatus") in LEFT_TWILIO,
            )  # fmt: skip
            for row in rows or ():
                if row["wake"]:
                    self.workers.woken(0)
                if row["changed"] and row["state"] in ("failed", "undelivered"):
                    self.undelivered(row)
        except BadRequest as refusal:
            log.warning("⚠️ callback refused (%d): %s", refusal.status, refusal)
            return self.plain(refusal.status, str(refusal))
        except (DatabaseDown, DatabaseFault) as error:
            return self.plain(503, str(error))
        return self.plain(200, NO_REPLY, "text/xml")

    def undelivered(self, row: Mapping[str, Any]) -> None:
        """A part will not arrive, as a callback says: tell it, and send a template where that is the remedy."""
        run_id, user, code = row["run_id"], row["user_phone"], row["error_code"]
        log.warning("⚠️ run=%s %s part %s: %s", run_id, mask(user), row["state"], code)
        self.journey.events.put(Event("message_failed", datetime.now(UTC), run_id, user, {"code": code}))
        if code == WhatsApp.WINDOW_SHUT and row["done"] and not row["content_sid"]:
            if remedy(self.db, self.settings, user, run_id):
                self.workers.woken(0)

    def openai_webhook(self) -> Any:
        """Wake the run of a response that ended; the event says no more than its id."""
        if not self.settings.openai_webhook_secret:
            return self.plain(404, "OPENAI_WEBHOOK_SECRET is not set")
        try:
            body = bottle.request.environ["wsgi.input"].read(BODY_LIMIT)
            headers = {name.lower(): value for name, value in bottle.request.headers.items()}
            event = self.journey.threads.unwrap(body, headers)
        except Exception as error:  # the SDK raises many kinds, and each means that the event is not to be believed
            log.warning("⚠️ OpenAI webhook refused: %s", type(error).__name__)
            return self.plain(400, "the webhook's signature or body is not valid")
        self.health.event_came()
        data = event.get("data")
        response_id = str(data.get("id")) if isinstance(data, dict) else ""
        if event["type"].startswith("response.") and re.fullmatch(r"resp_\w{1,190}", response_id, re.ASCII):
            try:
                self.workers.wake(self.journey.runs, response_id)
            except (DatabaseDown, DatabaseFault) as error:
                return self.plain(503, str(error))  # OpenAI sends it again
        self.health.note_event()
        return self.plain(200, "")

    def page(self) -> Any:
        """Answer with how each part is."""
        status, page = self.health.page()
        return self.plain(status, json.dumps(page, ensure_ascii=False), "application/json")


# --- Main -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def database_of(settings: Settings, chores: list[Callable[[], None]] | None = None) -> Iterator[str]:
    """Lend the URL of DATABASE_URL, or of an embedded PostgreSQL that stops with the last process that uses it; what
    keeps that one alive is added to `chores`."""
    if settings.database_url:
        yield settings.database_url.get_secret_value()
        return
    import localdb

    database = localdb.start(Path(".data"))
    if chores is not None:
        chores.append(database.revive)
    try:
        yield database.url
    finally:
        database.stop()


def check_assistant(settings: Settings) -> None:
    """Raise ConfigurationError where ASSISTANT_ID names no usable file; an old API's id only loses the assistant."""
    good, bad = load_assistants()
    name = settings.assistant_id
    if legacy_assistant(name):
        log.warning("⚠️ %s", legacy_assistant(name))
    elif name and name not in good:
        why = bad.get(f"{name}.md") or f"no such file; there is {', '.join(good) or 'none'}"
        raise ConfigurationError(f"ASSISTANT_ID={name!r} cannot be used: assistants/{name}.md: {why}")


def serve(settings: Settings, web: bool = True) -> int:
    """Run until SIGTERM or SIGINT; returns the exit code. `web=False` is the command `worker`."""
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    check_assistant(settings)
    if not web and not settings.worker_threads:
        raise ConfigurationError("WORKER_THREADS=0 cannot be used: it needs 1 or more for the command worker")
    chores: list[Callable[[], None]] = []
    with database_of(settings, chores) as url:
        gateway = Gateway(settings, url)
        gateway.plugins.check_settings(settings)
        gateway.upkeep.chores += chores
        prepare(gateway, url)
        server = Server(gateway, "0.0.0.0", settings.port) if web else None  # before anything has to be stopped
        gateway.start()
        if server:
            server.thread.start()
        log.info("✅ Hilo %s %s", VERSION, f"listens on port {server.port}" if server else "works")
        stop.wait()
        until = time.monotonic() + DRAIN
        log.info("stopping: the steps in hand are finished first")
        if server:
            server.drain()
        gateway.stop(until)
    log.info("✅ stopped")
    return 0


def prepare(gateway: Gateway, url: str) -> None:
    """Apply the schema; with the database away, go on trying while webhooks answer that there is an outage."""
    try:
        if migrate(url):
            log.info("✅ schema applied")
    except DatabaseDown as error:
        log.error("⚠️ database: %s; trying again", error)
        gateway.upkeep.chores.insert(0, partial(retry_migration, gateway, url))


def retry_migration(gateway: Gateway, url: str) -> None:
    """Apply the schema once the database is back."""
    migrate(url)
    chores = gateway.upkeep.chores
    chores[:] = [chore for chore in chores if getattr(chore, "func", None) is not retry_migration]


if __name__ == "__main__":
    sys.modules["gateway"] = sys.modules["__main__"]  # one module, whatever imports it
    import commands

    sys.exit(commands.main(sys.argv[1:]))
