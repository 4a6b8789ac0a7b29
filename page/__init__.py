"""The chat page that `demo` shows: one person plays several WhatsApp users, against a `Simulator`.

Mounted by `Simulator(page=PageOptions(…))` and by nothing else. The page's own files stand beside this one.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

import bottle
import requests
from bottle import HTTPResponse, request

from simulator import (
    ADDRESS,
    TYPING_SECONDS,
    Fault,
    Message,
    Simulator,
    button_fields,
    location_fields,
    reply_fields,
    whatsapp,
)

log = logging.getLogger("page")

FILES = Path(__file__).parent
MEDIA_LIMIT = 16 << 20  # bytes, as WhatsApp's
PAGES = ("/", "/chat", "/chat/")  # what a link may lead to
TYPES = {".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml"}
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; "
                               "media-src 'self' blob:; connect-src 'self' blob:; base-uri 'none'; form-action 'none'; "
                               "frame-ancestors 'none'",
    "Permissions-Policy": "microphone=(self), geolocation=(self), camera=()",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "Cache-Control": "no-store",
}
FILE_HEADERS = HEADERS | {"Content-Security-Policy": "default-src 'none'; sandbox"}
SHOWN_TYPES = re.compile(r"(image/(jpeg|png|gif|webp)|audio/[\w.+-]+|video/(mp4|webm|3gpp))(; ?[\w=.-]+)?")
PEOPLE = (
    ("Ana Torres", "whatsapp:+5215512345671"),
    ("Luis Ortega", "whatsapp:+5218112345672"),
    ("Sofía Méndez", "whatsapp:+5213312345673"),
    ("María (con nombre de usuario)", "whatsapp:MX.Maria2026"),
)


# --- Troubles ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Switch:
    """A trouble that the page can provoke: a fault, under a name that people understand."""

    group: str
    label: str
    on: str
    kind: str
    details: Mapping[str, Any] = field(default_factory=dict)


SWITCHES = {
    "webhook_lost": Switch("Del usuario al gateway", "El webhook se pierde", "webhook", "lost"),
    "webhook_slow": Switch("Del usuario al gateway", "El webhook tarda 5 s", "webhook", "slow", {"seconds": 5.0}),
    "webhook_repeat": Switch("Del usuario al gateway", "El mensaje llega dos veces", "webhook", "repeat"),
    "send_429": Switch("Del gateway al usuario", "Demasiados envíos (HTTP 429, código 20429)", "send", "error",
                       {"status": 429, "code": 20429, "message": "Too Many Requests", "retry_after": 2.0}),
    "send_500": Switch("Del gateway al usuario", "Twilio caído (HTTP 500, código 20500)", "send", "error"),
    "send_21610": Switch("Del gateway al usuario", "El usuario se dio de baja (código 21610)", "send", "error", {
        "status": 400, "code": 21610, "message": "Attempt to send to unsubscribed recipient"}),
    "send_63016": Switch("Del gateway al usuario", "Fuera de la ventana de 24 h (código 63016)", "send",
                         "undeliver", {"code": 63016}),
    "send_63024": Switch("Del gateway al usuario", "Destinatario no válido (código 63024)", "send", "undeliver",
                         {"code": 63024}),
    "send_cut": Switch("Del gateway al usuario", "Twilio acepta el mensaje y no contesta", "send", "cut"),
    "callback_lost": Switch("Del gateway al usuario", "Los avisos de estado se pierden", "callback", "lost"),
    "callback_shuffle": Switch("Del gateway al usuario", "Los avisos de estado llegan en desorden", "callback",
                               "shuffle"),
    "openai_down": Switch("OpenAI", "OpenAI caído (HTTP 503)", "openai", "error", {
        "status": 503, "message": "The server is overloaded or not ready yet."}),
    "openai_slow": Switch("OpenAI", "OpenAI lento (8 s por llamada)", "openai", "slow", {"seconds": 8.0}),
}
TIMES = {"off": 0.0, "once": 1.0, "always": math.inf}


# --- The page ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PageOptions:
    """What the chat page shows and can do.

    `people`: name and address of each user to play. `inspect(address)`: the runs and plugins for the side pane, as
    page/chat.js describes them; None: no such pane. `actions`: label and what its button calls (its text result is
    shown), such as killing the gateway. `templates`: by ContentSid, `{"body": "Hola {{1}}", "actions": [{"title",
    "id"}]}` as in a quick-reply template. `openai_url`: where the proxy at /openai/v1 leads to.
    """

    people: Sequence[tuple[str, str]] = PEOPLE
    inspect: Callable[[str], Mapping[str, Any]] | None = None
    actions: Mapping[str, Callable[[], str | None]] = field(default_factory=dict)
    templates: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    openai_url: str = "https://api.openai.com/v1"


class ChatPage:
    """The page at /chat/, where one person plays several WhatsApp users, and its JSON API."""

    def __init__(self, twilio: Simulator, options: PageOptions) -> None:
        self.twilio = twilio
        self.options = options
        self.people = {whatsapp(address): name for name, address in options.people}
        self._armed: dict[str, Fault] = {}
        self._streams: set[SimpleQueue[str | None]] = set()
        twilio.records.listen(self._tell)

    def mount(self, app: bottle.Bottle) -> None:
        """Add the routes."""
        for method, path, handler in (
            ("GET", "/", lambda: bottle.redirect("/chat/")),
            ("GET", "/chat", lambda: bottle.redirect("/chat/")),
            ("GET", "/chat/", lambda: self.asset("index.html")),
            ("GET", "/chat/<name:re:[a-z]+[.](js|css|svg)>", self.asset),
            ("GET", "/chat/media/<sid>", self.media),
            ("GET", "/chat/api/state", self.state),
            ("GET", "/chat/api/conversation", self.conversation),
            ("GET", "/chat/api/inspect", self.inspect),
            ("GET", "/chat/api/events", self.events),
            ("POST", "/chat/api/send", self.send),
            ("POST", "/chat/api/media", self.send_media),
            ("POST", "/chat/api/read", self.read),
            ("POST", "/chat/api/people", self.add_person),
            ("POST", "/chat/api/switch", self.switch),
            ("POST", "/chat/api/action", self.action),
        ):
            app.route(path, method, self._same_origin(handler))
        app.route("/openai/v1/<path:path>", ["GET", "POST", "DELETE"], self._same_origin(self.openai, page=False))

    def _same_origin(self, handler: Callable[..., Any], page: bool = True) -> Callable[..., Any]:
        """The handler for this page only: another site's page, also one of this machine, is refused."""

        def guarded(**parts: str) -> Any:
            environ = request.environ
            origin = environ.get("HTTP_ORIGIN", None if page and request.method == "POST" else self._origin())
            if opens_a_page():
                return handler(**parts)
            if origin != self._origin() or environ.get("HTTP_SEC_FETCH_SITE", "none") not in ("same-origin", "none"):
                return HTTPResponse("only from the chat page itself", 403)
            return handler(**parts)

        return guarded

    def _origin(self) -> str:
        return f"http://{request.environ.get('HTTP_HOST', '')}"

    def asset(self, name: str) -> HTTPResponse:
        """A file of the page."""
        path = FILES / name
        if not path.is_file():
            return HTTPResponse("", 404)
        headers = HEADERS | {"Content-Type": f"{TYPES[path.suffix]}; charset=utf-8"}
        return HTTPResponse(path.read_bytes(), 200, headers)

    # What is shown

    def state(self) -> HTTPResponse:
        """The people with their last message, the switches and the actions."""
        known = dict(self.people)
        for message in list(self.twilio.messages):
            known.setdefault(message.address, message.address.removeprefix("whatsapp:"))
        return answered({
            "number": self.twilio.number,
            "people": [self._person(address, name) for address, name in known.items()],
            "switches": [{"key": key, "group": switch.group, "label": switch.label, "state": self._switched(key)}
                         for key, switch in SWITCHES.items()],
            "actions": list(self.options.actions),
            "inspect": self.options.inspect is not None,
        })

    def _person(self, address: str, name: str) -> dict[str, Any]:
        messages = self.twilio.records.conversation(address)
        unread = sum(message.direction != "inbound" and message.status in ("sent", "delivered")
                     for message in messages)
        return {"address": address, "name": name, "unread": unread,
                "last": self._shown(messages[-1]) if messages else None}

    def _switched(self, key: str) -> str:
        left = self._armed[key].left if key in self._armed else 0
        return "always" if left == math.inf else "once" if left > 0 else "off"

    def conversation(self) -> HTTPResponse:
        """The messages of the person with this address, oldest first, and the milliseconds left of `typing`."""
        address = request.query.getunicode("address", "")
        messages = self.twilio.records.conversation(address)
        return answered({"address": address, "typing": self._typing_left(address, messages),
                         "messages": [self._shown(message) for message in messages]})

    def _typing_left(self, address: str, messages: Sequence[Message]) -> int:
        shown = [typing.at for typing in list(self.twilio.typing) if typing.address == address]
        replies = [message.created for message in messages if message.direction != "inbound"]
        if not shown or (replies and replies[-1] >= shown[-1]):
            return 0
        return max(0, int(1000 * (TYPING_SECONDS - (datetime.now(UTC) - shown[-1]).total_seconds())))

    def _shown(self, message: Message) -> dict[str, Any]:
        fields, inbound = message.fields, message.direction == "inbound"
        place = [float(fields[name]) for name in ("Latitude", "Longitude")] if "Latitude" in fields else None
        text, actions = self._templated(message)
        return {
            "sid": message.sid, "by": "user" if inbound else "hilo", "text": text, "at": message.created.isoformat(),
            "status": message.status, "error": message.error_code, "buttons": actions,
            "place": {"at": place, "label": fields.get("Label", "")} if place else None,
            "button": "ButtonText" in fields, "quoted": fields.get("OriginalRepliedMessageSid"),
            "media": [{"url": f"/chat/media/{media.sid}", "type": media.content_type} for media in message.media],
        }

    def _templated(self, message: Message) -> tuple[str, list[dict[str, str]]]:
        """Text and buttons of a message; a template that is not known here shows its sid and variables."""
        if not message.content_sid:
            return message.body, []
        template, variables = self.options.templates.get(message.content_sid), message.variables or {}
        if template is None:
            return f"[plantilla {message.content_sid}] {json.dumps(variables, ensure_ascii=False)}", []
        text = re.sub(r"{{(\w+)}}", lambda found: str(variables.get(found[1], found[0])), template["body"])
        return text, [{"title": action["title"], "id": action["id"]} for action in template.get("actions", ())]

    def media(self, sid: str) -> HTTPResponse:
        """A message's file; one that the gateway sent is fetched from the URL that it named, as Twilio does."""
        media = self.twilio.file(sid)
        if media is None or media.deleted:
            return HTTPResponse("", 404, HEADERS)
        if media.url and not media.data:
            try:
                media.data, media.content_type = fetched(media.url)
            except (requests.RequestException, ValueError) as error:
                return HTTPResponse(f"{error}", 502, HEADERS | {"Content-Type": "text/plain"})
        shown = SHOWN_TYPES.fullmatch(media.content_type)
        headers = {"Content-Type": media.content_type if shown else "application/octet-stream",
                   "Content-Disposition": "inline" if shown else "attachment"}
        return HTTPResponse(media.data, 200, FILE_HEADERS | headers)

    def inspect(self) -> HTTPResponse:
        """What the side pane shows of this person's runs."""
        if self.options.inspect is None:
            return HTTPResponse("", 404, HEADERS)
        return answered(dict(self.options.inspect(request.query.getunicode("address", ""))))

    def _tell(self, address: str) -> None:
        for stream in tuple(self._streams):
            stream.put(address)

    def events(self) -> HTTPResponse:
        """Server-sent events: `change` with the address of the person about whom something is new."""
        stream: SimpleQueue[str | None] = SimpleQueue()
        gone = request.environ["waitress.client_disconnected"]
        headers = HEADERS | {"Content-Type": "text/event-stream; charset=utf-8"}
        return HTTPResponse(self._flow(stream, gone), 200, headers)

    def _flow(self, stream: SimpleQueue[str | None], gone: Callable[[], bool]) -> Iterator[bytes]:
        self._streams.add(stream)
        try:
            yield b"retry: 500\n\n"
            while not gone() and not self.twilio.stopping.is_set():
                try:
                    changed = {stream.get(timeout=1.0)}
                    while not stream.empty():
                        changed.add(stream.get())
                except Empty:
                    yield b": \n\n"
                    continue
                for address in changed - {None}:
                    yield f"event: change\ndata: {json.dumps(address)}\n\n".encode()
        finally:
            self._streams.discard(stream)

    def close(self) -> None:
        """End the streams."""
        for stream in tuple(self._streams):
            stream.put(None)

    # What people do

    def send(self) -> HTTPResponse:
        """A text, a tapped button or a place, written by one of the people, perhaps in answer to a message."""
        form = sent_json("address", "text", "sid")
        fields = located(form["place"]) if form.get("place") is not None else {}
        button = form.get("button")
        if button is not None:
            if not isinstance(button, dict) or "id" not in button:
                return HTTPResponse("a button has an id", 400, HEADERS)
            fields = button_fields(form["text"], str(button["id"]), str(button.get("sid", "")), self.twilio.number)
        fields |= self._answering(form["address"], form.get("reply_to"))
        return self._received(form["address"], form["text"], form["sid"], fields=fields)

    def _answering(self, address: str, sid: Any) -> dict[str, str]:
        """The fields of an answer to a message of this conversation; 400 where there is no such message."""
        if not sid:
            return {}
        original = self.twilio.records.get(str(sid))
        if original is None or original.address != address:
            raise HTTPResponse("no such message to answer", 400, HEADERS)
        return reply_fields(original.sid, original.from_)

    def send_media(self) -> HTTPResponse:
        """A file, as the request's body, sent by one of the people."""
        query, kind = request.query, request.content_type
        if not re.fullmatch(r"[\w.+-]+/[\w.+-]+(; ?[\w=.-]+)?", kind) or not 0 < request.content_length <= MEDIA_LIMIT:
            return HTTPResponse("a file of at most 16 MB with its type", 400, HEADERS)
        address = query.getunicode("address", "")
        return self._received(address, query.getunicode("text", ""), query.get("sid", ""),
                              fields=self._answering(address, query.get("reply_to")),
                              media=[(request.body.read(), kind.split(";")[0])])

    def _received(self, address: str, text: str, sid: str, **kwargs: Any) -> HTTPResponse:
        if not ADDRESS.fullmatch(address) or not re.fullmatch("[SM]M[0-9a-f]{32}", sid):
            return HTTPResponse("address or sid is none", 400, HEADERS)
        name = self.people.get(address, "").partition(" (")[0]
        delivery = self.twilio.receive(address, text, sid=sid, profile_name=name, **kwargs)
        return answered({"sid": delivery.sid, "status": delivery.status})

    def read(self) -> HTTPResponse:
        """The person has the conversation before their eyes: what was delivered is read."""
        for message in self.twilio.sent_to(sent_json("address")["address"]):
            self.twilio.mark_read(message)
        return answered({})

    def add_person(self) -> HTTPResponse:
        """One more person to play."""
        form = sent_json("name", "phone")
        address = whatsapp(re.sub(r"[\s()-]", "", form["phone"]))
        if not ADDRESS.fullmatch(address) or not form["name"].strip():
            return answered({"error": "Hace falta un nombre y un teléfono como +52 1 55 1234 5678"}, 400)
        self.people.setdefault(address, form["name"].strip()[:60])
        return answered({"address": address})

    # What goes wrong

    def switch(self) -> HTTPResponse:
        """Turn a trouble off, on for the next time, or on for good."""
        form = sent_json("key", "state")
        key, left = form["key"], TIMES.get(form["state"])
        if key not in SWITCHES or left is None:
            return HTTPResponse("no such switch", 400, HEADERS)
        if key in self._armed:
            self.twilio.faults.disarm(self._armed.pop(key))
        if left:
            switch = SWITCHES[key]
            self._armed[key] = self.twilio.fault(switch.on, switch.kind, times=left, **switch.details)
        return answered({"state": self._switched(key)})

    def action(self) -> HTTPResponse:
        """Do what a button stands for, such as killing the gateway's process."""
        name = sent_json("name")["name"]
        if name not in self.options.actions:
            return HTTPResponse("no such action", 400, HEADERS)
        return answered({"text": self.options.actions[name]() or "Hecho"})

    def openai(self, path: str) -> HTTPResponse:
        """Pass a call of the gateway on to OpenAI, unless a switch keeps it."""
        fault = self.twilio.faults.take("openai")
        if fault and fault.kind == "error":
            return answered({"error": {"message": fault.message, "type": "server_error", "param": None,
                                       "code": None}}, fault.status)
        if fault:
            self.twilio.stopping.wait(fault.seconds)
        kept = {name: value for name, value in request.headers.items() if name.lower() in PASSED_ON
                or name.lower().startswith(("openai-", "x-stainless-"))}
        url = f"{self.options.openai_url.rstrip('/')}/{path}"
        try:
            reply = requests.request(request.method, url, params=request.query_string, data=request.body.read(),
                                     headers=kept, timeout=600, allow_redirects=False)
        except requests.RequestException as error:
            log.info("OpenAI cannot be reached: %r", error)
            return answered({"error": {"message": "OpenAI cannot be reached", "type": "server_error", "param": None,
                                       "code": None}}, 502)
        back = {name: value for name, value in reply.headers.items()
                if name.lower() in PASSED_BACK or name.lower().startswith("x-")}
        return HTTPResponse(reply.content, reply.status_code, back)


# --- Answers ----------------------------------------------------------------------------------------------

PASSED_ON = {"authorization", "content-type", "accept", "user-agent", "idempotency-key"}
PASSED_BACK = {"content-type", "retry-after", "retry-after-ms"}


def opens_a_page() -> bool:
    """Whether a browser is about to show one of the pages, wherever the link to it was; not so in a frame."""
    mode, shown = request.environ.get("HTTP_SEC_FETCH_MODE"), request.environ.get("HTTP_SEC_FETCH_DEST")
    return request.method == "GET" and request.path in PAGES and (mode, shown) == ("navigate", "document")


def located(place: Any) -> dict[str, str]:
    """The fields of a shared place; 400 for what is no place on Earth."""
    try:
        latitude, longitude, label = float(place["latitude"]), float(place["longitude"]), str(place.get("label", ""))
    except (TypeError, KeyError, ValueError, OverflowError):
        latitude = math.nan
    if not (abs(latitude) <= 90 and abs(longitude) <= 180):
        raise HTTPResponse("a place has a latitude and a longitude", 400, HEADERS)
    return location_fields(latitude, longitude, label)


def answered(body: Any, status: int = 200) -> HTTPResponse:
    """A JSON answer to the page."""
    headers = HEADERS | {"Content-Type": "application/json"}
    return HTTPResponse(json.dumps(body, default=str), status, headers)


def sent_json(*names: str) -> dict[str, Any]:
    """The JSON object that the page has posted; 400 unless these keys are there and are strings."""
    form = request.json if request.content_type == "application/json" else None
    if not isinstance(form, dict) or not all(isinstance(form.get(name), str) for name in names):
        raise HTTPResponse(f"a JSON object with {', '.join(names)}", 400, HEADERS)
    return form


def fetched(url: str) -> tuple[bytes, str]:
    """Bytes and media type behind a URL; raises RequestException, or ValueError past 16 MB."""
    with requests.get(url, timeout=10, stream=True) as reply:
        reply.raise_for_status()
        data = b""
        for chunk in reply.iter_content(1 << 16):
            data += chunk
            if len(data) > MEDIA_LIMIT:
                raise ValueError(f"{url} has more than 16 MB")
        return data, reply.headers.get("Content-Type", "application/octet-stream")
