"""A local Twilio on the wire, for development and tests, on 127.0.0.1 only.

`Simulator` takes the messages that Hilo sends over Twilio's REST API, sends signed webhooks and status callbacks,
serves media, and goes wrong on demand. Paths, fields, error codes and bodies are Twilio's:
https://www.twilio.com/docs/messaging/api/message-resource and https://www.twilio.com/docs/usage/security.

    with Simulator("http://127.0.0.1:8000") as twilio:
        twilio.receive("+5215512345678", "hola")
        print(twilio.wait_for("whatsapp:+5215512345678", 1)[0].body)
"""

from __future__ import annotations

import base64
import contextlib
import heapq
import itertools
import json
import logging
import math
import random
import re
import select
import socket
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import parse_qsl, quote_plus, urlencode, urlsplit

import bottle
import waitress
from bottle import HTTPResponse, request
from twilio.request_validator import HMAC_SHA1, SIGNATURE_HEADER, SIGNATURE_SETTINGS_HEADER, RequestValidator
from waitress import wasyncore

if TYPE_CHECKING:
    from page import ChatPage, PageOptions

log = logging.getLogger("simulator")

HOST = "127.0.0.1"
API = "/2010-04-01/Accounts/<account>"
API_VERSION = "2010-04-01"
ACCOUNT_SID = "AC" + "0" * 31 + "1"
AUTH_TOKEN = "simulated-auth-token"  # opens nothing: the simulator's own, on this machine only
BODY_LIMIT = 1600  # UTF-16 units
WEBHOOK_SECONDS = 15.0
TYPING_SECONDS = 25.0
WINDOW = timedelta(hours=24)  # after a user's message, in which they may be sent what is no template
WINDOW_SHUT = 63016
GATE_SECONDS = 60.0
CALLBACK_POSTERS = 4
PAGE_THREADS = 32  # each open chat page holds one for its events
# What becomes of an accepted message: each state, and the seconds after the one before it.
PROGRESS = (("queued", 0.0), ("sent", 0.02), ("delivered", 0.02), ("read", 0.05))
RANK = {"accepted": 0, "queued": 0, "sent": 1, "undelivered": 2, "failed": 2, "delivered": 3, "read": 4}
ADDRESS = re.compile(r"whatsapp:(\+\d{7,15}|[A-Z]{2}\.[A-Za-z0-9]{1,128})")

# --- Records ----------------------------------------------------------------------------------------------


def new_sid(prefix: str) -> str:
    """A sid as Twilio makes them: two letters and 32 hexadecimal digits."""
    return prefix + random_hex()


def random_hex() -> str:
    """Return 32 hexadecimal digits; nothing here is secret, and asking the system for them costs 0.1 ms."""
    return f"{random.getrandbits(128):032x}"


@dataclass
class Media:
    """A file of a message: inbound with its bytes, outbound with the URL that the gateway named."""

    content_type: str
    data: bytes = b""
    url: str = ""
    sid: str = field(default_factory=lambda: new_sid("ME"))
    deleted: bool = False


@dataclass
class Message:
    """A message, either way; `status` and `error_code` change as it is sent on, delivered and read."""

    sid: str
    direction: str  # inbound, outbound-api (sent over REST), outbound-reply (answered in TwiML)
    from_: str
    to: str
    body: str
    media: tuple[Media, ...] = ()
    content_sid: str | None = None
    variables: dict[str, Any] | None = None
    status: str = "queued"
    error_code: int | None = None
    created: datetime = field(default_factory=lambda: datetime.now(UTC))
    sent: datetime | None = None
    service_sid: str | None = None
    status_callback: str | None = None
    fields: dict[str, str] = field(default_factory=dict)  # an inbound one's, as the webhook carries them
    number: int = 0  # place in the order of arrival

    @property
    def address(self) -> str:
        """The user's address: sender of an inbound message, recipient of an outbound one."""
        return self.from_ if self.direction == "inbound" else self.to


@dataclass(frozen=True)
class Typing:
    """A typing indicator shown to `address`, in answer to its message `message_sid`."""

    address: str
    message_sid: str
    at: datetime


@dataclass(frozen=True)
class Delivery:
    """What came of a webhook: the message's sid, the gateway's HTTP status (0: no answer, or not sent) and body."""

    sid: str
    status: int
    body: str


@dataclass(frozen=True)
class Callback:
    """A status callback that was posted: its URL, its fields and the gateway's HTTP status (0: no answer)."""

    url: str
    fields: dict[str, str]
    status: int


class Records:
    """Every message, typing indicator and callback, in order; safe to use from several threads."""

    def __init__(self) -> None:
        self.messages: list[Message] = []
        self.typing: list[Typing] = []
        self.callbacks: list[Callback] = []
        self._lock = threading.RLock()
        self.changed = threading.Condition(self._lock)
        self._by_sid: dict[str, Message] = {}
        self._by_address: dict[str, list[Message]] = defaultdict(list)
        self._wrote: dict[str, datetime] = {}  # when each user wrote last
        self._arrivals: dict[str, threading.Condition] = {}
        self._listeners: list[Callable[[str], None]] = []
        self._numbers = itertools.count(1)

    def add(self, message: Message) -> bool:
        """File a message; False when its sid is here already (a repeated webhook)."""
        with self.changed:
            if message.sid in self._by_sid:
                return False
            message.number = next(self._numbers)
            self._by_sid[message.sid] = message
            self._by_address[message.address].append(message)
            self.messages.append(message)
            if message.direction == "inbound":
                self._wrote[message.from_] = max(message.created, self._wrote.get(message.from_, message.created))
            if message.address in self._arrivals:
                self._arrivals[message.address].notify_all()
        self.tell(message.address)
        return True

    def get(self, sid: str) -> Message | None:
        """The message with this sid."""
        return self._by_sid.get(sid)

    def remove(self, message: Message) -> None:
        """Forget a message, as Twilio does on DELETE."""
        with self.changed:
            if self._by_sid.pop(message.sid, None):
                self._by_address[message.address].remove(message)
                self.messages.remove(message)
        self.tell(message.address)

    def update(self, message: Message, **changes: Any) -> None:
        """Set attributes of a message and wake who waits for a change."""
        with self.changed:
            for name, value in changes.items():
                setattr(message, name, value)
        self.tell(message.address)

    def show_typing(self, address: str, message_sid: str) -> None:
        """Note a typing indicator for this user."""
        with self.changed:
            self.typing.append(Typing(address, message_sid, datetime.now(UTC)))
        self.tell(address)

    def note_callback(self, callback: Callback, address: str) -> None:
        """Note a status callback that was posted."""
        with self.changed:
            self.callbacks.append(callback)
        self.tell(address)

    def wrote_at(self, address: str) -> datetime | None:
        """When this user wrote last, None where they never did."""
        return self._wrote.get(address)

    def mark_seen(self, message: Message) -> None:
        """Mark a user's message and those before it as read."""
        with self.changed:
            for earlier in self._by_address.get(message.from_, ()):
                if earlier.direction == "inbound" and earlier.number <= message.number:
                    earlier.status = "read"
        self.tell(message.address)

    def tell(self, address: str) -> None:
        """Wake those in `wait_until` and call the listeners: something about this user has changed."""
        with self.changed:
            self.changed.notify_all()
            listeners = tuple(self._listeners)
        for listener in listeners:
            listener(address)

    def listen(self, listener: Callable[[str], None]) -> None:
        """Have `listener(address)` called at every change; it must not block."""
        with self.changed:
            self._listeners.append(listener)

    def conversation(self, address: str) -> list[Message]:
        """All messages from and to this address, in order of arrival."""
        with self.changed:
            return list(self._by_address.get(address, ()))

    def sent_to(self, address: str) -> list[Message]:
        """The outbound messages to this address, in order."""
        return [message for message in self.conversation(address) if message.direction != "inbound"]

    def wait_for(self, address: str, count: int, timeout: float) -> list[Message]:
        """The outbound messages to this address once there are `count`; TimeoutError after `timeout` seconds."""
        ends = time.monotonic() + timeout
        with self.changed:
            arrival = self._arrivals.setdefault(address, threading.Condition(self._lock))
            while len(found := self.sent_to(address)) < count:
                if not arrival.wait(ends - time.monotonic()) and len(found := self.sent_to(address)) < count:
                    texts = [message.body[:60] for message in found]
                    raise TimeoutError(f"{len(found)} of {count} messages to {address} in {timeout:g} s: {texts}")
        return found

    def wait_until(self, condition: Callable[[], Any], timeout: float) -> Any:
        """What `condition()` returns once it is true, looked at at every change; TimeoutError after `timeout` s."""
        with self.changed:
            if result := self.changed.wait_for(condition, timeout):
                return result
        raise TimeoutError(f"{condition} did not come true in {timeout:g} s")


# --- Faults -----------------------------------------------------------------------------------------------

FAULTS = {
    "send": {"error", "hang", "cut", "refuse", "undeliver", "gate"},
    "list": {"error", "hang", "refuse"},
    "media": {"error", "hang", "refuse"},
    "typing": {"error", "hang", "refuse"},
    "webhook": {"lost", "repeat", "slow"},
    "callback": {"lost", "repeat", "shuffle"},
    "openai": {"error", "slow"},  # on the way through the chat page's proxy
}


@dataclass
class Gate:
    """Holds one send: `arrived` is set once the message is accepted; its answer waits for `release()`."""

    arrived: threading.Event = field(default_factory=threading.Event)
    released: threading.Event = field(default_factory=threading.Event)
    message: Message | None = None

    def release(self) -> None:
        """Let the answer go out (to whoever may still be listening)."""
        self.released.set()


@dataclass
class Fault:
    """Something that goes wrong `left` more times; `Simulator.fault` says which kinds there are."""

    on: str
    kind: str
    left: float = 1
    to: str | None = None
    status: int = 500
    code: int = 20500
    message: str = "An internal server error has occurred"
    retry_after: float | None = None
    seconds: float = 0.0
    gate: Gate | None = None


class Faults:
    """The faults that are armed, each used up in the order in which it was armed."""

    def __init__(self) -> None:
        self._armed: list[Fault] = []
        self._lock = threading.Lock()

    def arm(self, fault: Fault) -> Fault:
        """Arm a fault; ValueError names the kinds when there is no such one."""
        if fault.kind not in FAULTS.get(fault.on, ()):
            kinds = "; ".join(f"{on}: {', '.join(sorted(kinds))}" for on, kinds in FAULTS.items())
            raise ValueError(f"no fault {fault.kind!r} on {fault.on!r}; there are {kinds}")
        with self._lock:
            self._armed.append(fault)
        return fault

    def take(self, on: str, address: str | None = None) -> Fault | None:
        """The first armed fault on this, if any; it is used up by one."""
        with self._lock:
            for fault in self._armed:
                if fault.on == on and fault.left > 0 and fault.to in (None, address):
                    fault.left -= 1
                    return fault
        return None

    def disarm(self, fault: Fault) -> None:
        """End one fault."""
        with self._lock:
            self._armed = [other for other in self._armed if other is not fault]
        fault.left = 0

    def clear(self, on: str | None = None) -> None:
        """Disarm all faults, or all on one thing, and let go of what a gate holds."""
        with self._lock:
            going = [fault for fault in self._armed if on in (None, fault.on)]
            self._armed = [fault for fault in self._armed if fault not in going]
        for fault in going:
            fault.left = 0
            if fault.gate:
                fault.gate.release()


# --- To the gateway ---------------------------------------------------------------------------------------


class Courier:
    """Posts signed forms to the gateway over one kept-alive connection per thread."""

    def __init__(self, secret: str) -> None:
        self._validator = RequestValidator(secret)
        self._local = threading.local()
        self._lines: set[Line] = set()
        self._closed = False

    def post(self, url: str, fields: Mapping[str, str], *, reach: str | None = None, sign: bool = True,
             algorithm: str = HMAC_SHA1) -> tuple[int, str]:
        """Status and body of the answer; status 0 when none came in 15 s.

        The signature is made for `url`; `reach` is where the form really goes (default: the same).
        """
        headers = ""
        if sign:
            signature = self._validator.compute_signature(url, fields, algorithm)
            headers = f"{SIGNATURE_HEADER}: {signature}\r\n"
            if algorithm != HMAC_SHA1:
                headers += f"{SIGNATURE_SETTINGS_HEADER}: key=webhooks_sharedkey_1,algorithm={algorithm}\r\n"
        try:
            status, body = self._line(reach or url).post(reach or url, headers, encoded(fields))
            return status, body.decode("utf-8", "replace")
        except (OSError, ValueError) as error:
            self._drop()
            log.info("no answer from the gateway: %r", error)
            return 0, ""

    def _line(self, url: str) -> Line:
        host, port = urlsplit(url).hostname or HOST, urlsplit(url).port or 80
        line = getattr(self._local, "line", None)
        if line is None or line.place != (host, port) or line.hung_up():
            self._drop()
            if self._closed:
                raise OSError("the simulator has stopped")
            line = self._local.line = Line(host, port)
            self._lines.add(line)
        return line

    def _drop(self) -> None:
        line = getattr(self._local, "line", None)
        self._local.line = None
        if line is not None:
            line.close()
            self._lines.discard(line)

    def close(self) -> None:
        """Close every thread's connection, also one that waits for an answer; nothing is posted any more."""
        self._closed = True
        while self._lines:
            self._lines.pop().close()


class Line:
    """One kept-alive HTTP/1.1 connection that posts forms; http.client costs three times as much a form."""

    def __init__(self, host: str, port: int) -> None:
        self.place = (host, port)
        self._socket = socket.create_connection((host, port), WEBHOOK_SECONDS)
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._reader = self._socket.makefile("rb")

    def post(self, url: str, headers: str, form: str) -> tuple[int, bytes]:
        """Status and body of the answer; raises OSError or ValueError when there is none that can be read."""
        parts = urlsplit(url)
        path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
        self._socket.sendall(
            f"POST {path} HTTP/1.1\r\nHost: {parts.netloc}\r\n{headers}Accept: */*\r\nUser-Agent: TwilioProxy/1.1\r\n"
            f"I-Twilio-Idempotency-Token: {random_hex()}\r\nContent-Length: {len(form)}\r\n"
            f"Content-Type: application/x-www-form-urlencoded; charset=UTF-8\r\n\r\n{form}".encode("ascii"))
        status = int(self._read_line().split(None, 2)[1])
        found = {}
        while header := self._read_line().rstrip():
            name, _, value = header.partition(b":")
            found[name.lower()] = value.strip().lower()
        body = self._read_body(status, found)
        if found.get(b"connection") == b"close":
            self.close()
        return status, body

    def _read_line(self) -> bytes:
        line = self._reader.readline(65536)
        if not line:
            raise ConnectionResetError("closed without an answer")
        return line

    def _read_body(self, status: int, headers: Mapping[bytes, bytes]) -> bytes:
        if status in (204, 304):
            return b""
        if headers.get(b"transfer-encoding") == b"chunked":
            chunks = []
            while size := int(self._read_line(), 16):
                chunks.append(self._reader.read(size))
                self._read_line()
            self._read_line()
            return b"".join(chunks)
        length = headers.get(b"content-length")
        body = self._reader.read(int(length) if length else -1)
        if length and len(body) < int(length):
            raise ConnectionResetError("closed in the middle of an answer")
        return body

    def hung_up(self) -> bool:
        """True when the connection is closed, or has something to read while nothing was asked."""
        if self._socket.fileno() < 0:
            return True
        poll = select.poll()
        poll.register(self._socket, select.POLLIN)
        return bool(poll.poll(0))

    def close(self) -> None:
        """Close it; a thread that waits for an answer gets none."""
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._reader.close()
        self._socket.close()


def encoded(fields: Mapping[str, str]) -> str:
    """The fields as a form; their names need no quoting."""
    return "&".join([f"{name}={quote_plus(value)}" for name, value in fields.items()])


class Timer:
    """One thread that runs jobs when they are due: quick ones itself, those that post in a small pool."""

    def __init__(self) -> None:
        self._jobs: list[tuple[float, int, Callable[[], None]]] = []
        self._numbers = itertools.count()
        self._changed = threading.Condition()
        self._stopped = False
        self._pool = ThreadPoolExecutor(CALLBACK_POSTERS, "simulator-callback")
        self._thread = threading.Thread(target=self._run, name="simulator-timer", daemon=True)
        self._thread.start()

    def after(self, seconds: float, job: Callable[[], None], posts: bool = False) -> None:
        """Run `job` in `seconds`; in the pool when it `posts`. Dropped once the timer has stopped."""
        what = (lambda: self._post(job)) if posts else job
        with self._changed:
            heapq.heappush(self._jobs, (time.monotonic() + seconds, next(self._numbers), what))
            self._changed.notify()

    def _post(self, job: Callable[[], None]) -> None:
        if not self._stopped:
            self._pool.submit(_logged, job)

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._stopped and (not self._jobs or self._jobs[0][0] > time.monotonic()):
                    self._changed.wait(self._jobs[0][0] - time.monotonic() if self._jobs else None)
                if self._stopped:
                    return
                job = heapq.heappop(self._jobs)[2]
            _logged(job)

    def stop(self) -> None:
        """Drop what is not due yet and wait for what is being posted."""
        with self._changed:
            self._stopped = True
            self._changed.notify()
        self._thread.join()
        self._pool.shutdown(wait=True, cancel_futures=True)


def _logged(job: Callable[[], None]) -> None:
    """Run a job; a defect in it ends in the log, not the thread."""
    try:
        job()
    except Exception:
        log.exception("a job of the simulator failed")


# --- The simulator ----------------------------------------------------------------------------------------


class Simulator:
    """A local Twilio for one account, one WhatsApp number and one gateway.

    `gateway_url` is where webhooks go (it can be set later); they are signed with `webhook_secret` (default: the
    auth token) for `public_url` (default: the gateway's). `port` 0 takes a free one. With `callbacks` false no
    status callback is posted; the states advance all the same, after `progress`. With a `page` the chat page is
    mounted at /chat/ and messages become `read` when somebody there sees them. `open_since`: everybody is taken to have
    written at that moment; without it only templates reach who has not written here in the last 24 hours.
    """

    def __init__(self, gateway_url: str = "", account_sid: str = ACCOUNT_SID, auth_token: str = AUTH_TOKEN,
                 number: str = "whatsapp:+14155238886", port: int = 0, webhook_secret: str | None = None,
                 callbacks: bool = True, *, public_url: str | None = None, threads: int = 32,
                 progress: Sequence[tuple[str, float]] = PROGRESS, page: PageOptions | None = None,
                 open_since: datetime | None = None) -> None:
        self.gateway_url = gateway_url
        self.public_url = public_url
        self.account_sid = account_sid
        self.auth_token = auth_token
        self.number = number
        self.callbacks_on = callbacks
        self.open_since = open_since
        self.progress = progress
        self.delay = 0.0  # seconds that every REST call takes
        self.webhook_url: str | None = None  # as set in the console for the number; None: the gateway's own
        self.records = Records()
        self.faults = Faults()
        self.app = bottle.Bottle()
        self.stopping = threading.Event()
        self._courier = Courier(webhook_secret or auth_token)
        self._timer = Timer()
        self._server = Server(self.app, port, threads + (PAGE_THREADS if page else 0))
        self._files: dict[str, Media] = {}
        self.app.add_hook("before_request", self._refuse_other_hosts)
        Rest(self).mount(self.app)
        self._page = self._mount_page(page) if page else None

    def _mount_page(self, options: PageOptions) -> ChatPage:
        from page import ChatPage  # only here: a gateway has no use for it

        page = ChatPage(self, options)
        page.mount(self.app)
        self.progress = [step for step in self.progress if step[0] != "read"]
        return page

    def _refuse_other_hosts(self) -> None:
        """A name that leads here from elsewhere (DNS rebinding) gets nothing."""
        host, _, port = request.environ.get("HTTP_HOST", "").rpartition(":")
        if host not in (HOST, "localhost") or port not in (str(self._server.port), str(self._server.files_port)):
            raise HTTPResponse("only as 127.0.0.1 or localhost", 421)

    # Life

    @property
    def url(self) -> str:
        """Scheme, host and port: what TWILIO_API_URL is set to."""
        return f"http://{HOST}:{self._server.port}"

    @property
    def page_url(self) -> str:
        """Where the chat page is."""
        return f"{self.url}/chat/"

    @property
    def files_url(self) -> str:
        """Where media are really served from, without auth: another origin, as Twilio's are."""
        return f"http://{HOST}:{self._server.files_port}"

    def start(self) -> Simulator:
        """Begin to serve; returns itself."""
        self._server.start()
        return self

    def stop(self) -> None:
        """End every connection and thread; what a gate holds is let go."""
        self.stopping.set()
        self.faults.clear()
        if self._page:
            self._page.close()
        self._courier.close()
        self._timer.stop()
        self._server.stop()

    def __enter__(self) -> Simulator:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What happened

    @property
    def messages(self) -> list[Message]:
        """Every message, both ways, in order of arrival."""
        return self.records.messages

    @property
    def typing(self) -> list[Typing]:
        """Every typing indicator that the gateway has shown, in order."""
        return self.records.typing

    @property
    def callbacks(self) -> list[Callback]:
        """Every status callback posted, in order."""
        return self.records.callbacks

    def sent_to(self, address: str) -> list[Message]:
        """The outbound messages to this address, in order."""
        return self.records.sent_to(whatsapp(address))

    def wait_for(self, address: str, count: int = 1, *, timeout: float = 10.0) -> list[Message]:
        """The outbound messages to this address once there are `count`; TimeoutError after `timeout` seconds."""
        return self.records.wait_for(whatsapp(address), count, timeout)

    def wait_until(self, condition: Callable[[], Any], *, timeout: float = 10.0) -> Any:
        """What `condition()` returns once it is true, looked at at every change; TimeoutError after `timeout` s."""
        return self.records.wait_until(condition, timeout)

    # What goes wrong

    def fault(self, on: str, kind: str, *, times: float | None = 1, to: str | None = None, **details: Any) -> Fault:
        """Make the next `times` calls (None: all, until `clear_faults`) to `to` (None: to anybody) go wrong.

        on "send", "list", "media", "typing": "error" (status, code, message, retry_after in s), "hang" (done, but
        answered after `seconds`), "refuse" (connection closed, nothing done); on "send" also "cut" (accepted, then
        the connection closed without an answer) and "undeliver" (accepted, then undelivered with `code`).
        on "webhook": "lost", "repeat", "slow" (`seconds`). on "callback": "lost", "repeat", "shuffle" (last first).
        on "openai", the way through the chat page: "error" (status, message), "slow" (`seconds`).
        Raises ValueError for another.
        """
        return self.faults.arm(Fault(on, kind, math.inf if times is None else times, to, **details))

    def gate(self, to: str | None = None) -> Gate:
        """Hold the next send (to this address): accepted, and not answered before the gate's `release()`."""
        gate = Gate()
        self.faults.arm(Fault("send", "gate", 1, to, gate=gate))
        return gate

    def clear_faults(self, on: str | None = None) -> None:
        """End all faults (on one thing)."""
        self.faults.clear(on)

    # A user writes

    def receive(self, sender: str, text: str = "", *, media: Iterable[Media | tuple[bytes, str]] = (),
                sid: str | None = None, fields: Mapping[str, str] | None = None, sign: bool = True,
                algorithm: str = HMAC_SHA1, lost: bool = False, at: datetime | None = None,
                profile_name: str = "Alumno") -> Delivery:
        """File a user's message and post its webhook, as Twilio does; returns what the gateway said.

        `media` are Media or (bytes, content type). `fields` go over the form's own. With a `sid` already used the
        same message is delivered again. `lost`: filed, but the webhook never comes. `at`: when it was written.
        """
        files = tuple(item if isinstance(item, Media) else Media(item[1], item[0]) for item in media)
        sid = sid or new_sid("MM" if files else "SM")
        message = self._inbound(whatsapp(sender), text, files, sid, fields or {}, at, profile_name)
        fault = self.faults.take("webhook", message.from_)
        if lost or not self.gateway_url or (fault and fault.kind == "lost"):
            return Delivery(message.sid, 0, "")
        if fault and fault.kind == "slow":
            self.stopping.wait(fault.seconds)
        if fault and fault.kind == "repeat":
            self._deliver(message, sign, algorithm)
        return self._deliver(message, sign, algorithm)

    def _inbound(self, sender: str, text: str, files: tuple[Media, ...], sid: str, extra: Mapping[str, str],
                 at: datetime | None, profile_name: str) -> Message:
        if known := self.records.get(sid):
            return known
        for media in files:
            self._files[media.sid] = media
        created = at or datetime.now(UTC)
        message = Message(sid, "inbound", sender, self.number, text, files, status="received",
                          created=created, sent=created)
        message.fields = inbound_form(message, self.account_sid, self.url, profile_name) | dict(extra)
        self.records.add(message)
        return message

    def _deliver(self, message: Message, sign: bool, algorithm: str) -> Delivery:
        path = "/webhooks/twilio"
        signed = (self.public_url or self.gateway_url).rstrip("/") + path
        reach = self.gateway_url.rstrip("/") + path
        status, body = self._courier.post(signed, message.fields, reach=reach, sign=sign, algorithm=algorithm)
        if 200 <= status < 300:
            if message.status == "received":
                self.records.update(message, status="delivered")
            for text, urls in twiml_messages(body):
                self.accept(Message(new_sid("SM"), "outbound-reply", message.to, message.from_, text,
                                    tuple(Media("", url=url) for url in urls)))
        return Delivery(message.sid, status, body)

    # The gateway sends

    def accept(self, message: Message, undeliver: Fault | None = None) -> None:
        """Take an outbound message and see it through its states, callbacks and all.

        Outside the 24-hour window it is undelivered, unless it is a template; see
        https://www.twilio.com/docs/api/errors/63016.
        """
        for media in message.media:
            self._files[media.sid] = media
        self.records.add(message)
        steps = list(self.progress)
        if not undeliver and not message.content_sid and not self.window_open(message.to):
            undeliver = Fault("send", "undeliver", code=WINDOW_SHUT)
        if undeliver:
            steps = [step for step in steps if step[0] in ("queued", "sent")] + [("undelivered", 0.02)]
        shuffle = self.faults.take("callback", message.to) if message.status_callback else None
        if shuffle and shuffle.kind == "shuffle":
            steps = [("queued", 0.0), *reversed([step for step in steps if step[0] != "queued"])]
            shuffle = None
        self._advance(message, steps, undeliver.code if undeliver else None, shuffle)

    def window_open(self, address: str) -> bool:
        """Whether this user has written within 24 hours."""
        return any(datetime.now(UTC) - at < WINDOW for at in (self.records.wrote_at(address), self.open_since) if at)

    def _advance(self, message: Message, steps: Sequence[tuple[str, float]], code: int | None,
                 fault: Fault | None) -> None:
        if not steps:
            return
        (status, seconds), rest = steps[0], steps[1:]
        posts = bool(self.callbacks_on and message.status_callback)

        def step() -> None:
            self.set_status(message, status, code if status == "undelivered" else None)
            if posts:
                self._call_back(message, status, fault)
            self._advance(message, rest, code, fault)

        self._timer.after(seconds, step, posts)

    def set_status(self, message: Message, status: str, error_code: int | None = None) -> None:
        """Set an outbound message's state; the day it was sent is known from `sent` on."""
        sent = message.sent if status == "queued" else message.sent or datetime.now(UTC)
        with self.records.changed:
            if RANK[status] >= RANK[message.status]:
                self.records.update(message, status=status, error_code=error_code, sent=sent)

    def _call_back(self, message: Message, status: str, fault: Fault | None = None) -> None:
        url = message.status_callback or ""
        form = callback_form(message, status, self.account_sid)
        public = (self.public_url or self.gateway_url).rstrip("/")
        reach = self.gateway_url.rstrip("/") + url.removeprefix(public) if url.startswith(public) else url
        if fault and fault.kind == "lost":
            return
        for _ in range(2 if fault and fault.kind == "repeat" else 1):
            answer, _body = self._courier.post(url, form, reach=reach)
            self.records.note_callback(Callback(url, form, answer), message.to)

    def mark_read(self, message: Message) -> None:
        """The user has seen an outbound message: state `read`, with its callback. One that is only sent may never come
        to their phone."""
        if message.direction != "inbound" and message.status == "delivered":
            self._advance(message, [("read", 0.0)], None, None)

    def file(self, sid: str) -> Media | None:
        """The media with this sid."""
        return self._files.get(sid)


# --- Forms ------------------------------------------------------------------------------------------------


def whatsapp(address: str) -> str:
    """The address with its channel: `+52…` becomes `whatsapp:+52…`."""
    return address if ":" in address else f"whatsapp:{address}"


def inbound_form(message: Message, account_sid: str, url: str, profile_name: str) -> dict[str, str]:
    """The fields of the webhook for an inbound WhatsApp message.

    See https://www.twilio.com/docs/messaging/guides/webhook-request.
    """
    kind = message.media[0].content_type.split("/")[0] if message.media else "text"
    form = {
        "SmsMessageSid": message.sid,
        "NumMedia": str(len(message.media)),
        "ProfileName": profile_name,
        "MessageType": kind if kind in ("text", "image", "audio", "video") else "document",
        "SmsSid": message.sid,
        "SmsStatus": "received",
        "Body": message.body,
        "To": message.to,
        "NumSegments": "1",
        "ReferralNumMedia": "0",
        "MessageSid": message.sid,
        "AccountSid": account_sid,
        "From": message.from_,
        "ApiVersion": API_VERSION,
    }
    if message.from_.startswith("whatsapp:+"):  # a username has no number to tell
        form["WaId"] = message.from_.removeprefix("whatsapp:+")
    for index, media in enumerate(message.media):
        form[f"MediaContentType{index}"] = media.content_type
        form[f"MediaUrl{index}"] = (
            f"{url}/{API_VERSION}/Accounts/{account_sid}/Messages/{message.sid}/Media/{media.sid}")
    return form


def location_fields(latitude: float, longitude: float, label: str = "", address: str = "") -> dict[str, str]:
    """What a shared location adds to the form; for `receive(…, fields=…)`."""
    fields = {"MessageType": "location", "Latitude": str(latitude), "Longitude": str(longitude)}
    return fields | ({"Label": label} if label else {}) | ({"Address": address} if address else {})


def button_fields(text: str, payload: str, replied_to: str = "", number: str = "") -> dict[str, str]:
    """What a tapped quick reply adds to the form; for `receive(sender, text, fields=…)`."""
    fields = {"MessageType": "button", "ButtonText": text, "ButtonPayload": payload}
    return fields | (reply_fields(replied_to, number) if replied_to else {})


def reply_fields(sid: str, sender: str) -> dict[str, str]:
    """What an answer to a certain message, by its sid and who sent it, adds to the form."""
    return {"OriginalRepliedMessageSid": sid, "OriginalRepliedMessageSender": sender}


def callback_form(message: Message, status: str, account_sid: str) -> dict[str, str]:
    """The fields of the status callback for a WhatsApp message.

    See https://www.twilio.com/docs/messaging/guides/outbound-message-status-in-status-callbacks.
    """
    form = {
        "ChannelPrefix": "whatsapp",
        "ApiVersion": API_VERSION,
        "MessageStatus": status,
        "SmsSid": message.sid,
        "SmsStatus": status,
        "ChannelInstallSid": "XE" + "0" * 32,
        "To": message.to,
        "From": message.from_,
        "MessageSid": message.sid,
        "StructuredMessage": "false",
        "AccountSid": account_sid,
        "ChannelToAddress": message.to.removeprefix("whatsapp:")[:-4] + "XXXX",
    }
    if status in ("delivered", "read"):
        form["EventType"] = status.upper()
    if message.service_sid:
        form["MessagingServiceSid"] = message.service_sid
    if status in ("undelivered", "failed") and message.error_code:
        form |= {"ErrorCode": str(message.error_code), "ChannelStatusMessage": "The message could not be delivered"}
    return form


def twiml_messages(body: str) -> list[tuple[str, list[str]]]:
    """Text and media URLs of each <Message> in a TwiML answer; none when the answer is something else.

    See https://www.twilio.com/docs/messaging/twiml/message.
    """
    if "<Message" not in body:
        return []
    try:
        root = ElementTree.fromstring(body.encode())
    except ElementTree.ParseError:
        return []
    found = []
    for element in root.iter("Message"):
        inner = element.find("Body")
        text = (inner if inner is not None else element).text or ""
        found.append((text.strip(), [media.text or "" for media in element.iter("Media")]))
    return found


# --- REST -------------------------------------------------------------------------------------------------


def error_body(status: int, code: int, message: str) -> dict[str, Any]:
    """Twilio's error body; see https://www.twilio.com/docs/usage/twilios-response."""
    return {"code": code, "message": message, "more_info": f"https://www.twilio.com/docs/errors/{code}",
            "status": status}


def refuse(status: int, code: int, message: str, **headers: str) -> NoReturn:
    """Answer with an error."""
    body = json.dumps(error_body(status, code, message))
    raise HTTPResponse(body, status, {"Content-Type": "application/json", **headers})


def answer(body: Any, status: int = 200) -> HTTPResponse:
    """A JSON answer."""
    return HTTPResponse(json.dumps(body), status, {"Content-Type": "application/json"})


def sent_form() -> dict[str, str]:
    """The fields of the form that was posted; of a repeated one, the last."""
    return dict(sent_fields())


def sent_fields() -> list[tuple[str, str]]:
    """The fields of the form that was posted, repeated ones too."""
    return parse_qsl(request.body.read().decode("utf-8", "replace"), keep_blank_values=True)


def hang_up() -> HTTPResponse:
    """Close the connection without an answer, as a network that fails does."""
    # WSGI has no word for this: the server's channel is reached through the callable that it lends us.
    channel = request.environ["waitress.client_disconnected"].__self__
    channel.socket.shutdown(socket.SHUT_RDWR)
    return HTTPResponse("", 500)


def rfc2822(moment: datetime | None) -> str | None:
    """A date as Twilio's 2010 API writes it: `Sun, 22 Nov 2026 10:00:00 +0000`."""
    return format_datetime(moment) if moment else None


class Rest:
    """The part of Twilio's REST API that Hilo uses, on the paths of api.twilio.com and messaging.twilio.com."""

    def __init__(self, twilio: Simulator) -> None:
        self.twilio = twilio
        token = base64.b64encode(f"{twilio.account_sid}:{twilio.auth_token}".encode()).decode()
        self._basic = f"Basic {token}"

    def mount(self, app: bottle.Bottle) -> None:
        """Add the routes."""
        message = f"{API}/Messages/<sid:re:[A-Z]{{2}}[0-9a-f]{{32}}>"
        media = f"{message}/Media/<media_sid:re:ME[0-9a-f]{{32}}>"
        for method, path, handler, on in (
            ("GET", f"{API}.json", self.account, None),
            ("GET", f"{API}/IncomingPhoneNumbers.json", self.numbers, None),
            ("POST", f"{API}/Messages.json", self.create, None),
            ("GET", f"{API}/Messages.json", self.index, "list"),
            ("GET", f"{message}.json", self.fetch, "list"),
            ("POST", f"{message}.json", self.redact, None),
            ("DELETE", f"{message}.json", self.delete, None),
            ("GET", f"{message}/Media.json", self.media_list, "media"),
            ("GET", f"{media}.json", self.media_fetch, "media"),
            ("GET", media, self.media_redirect, "media"),
            ("DELETE", f"{media}.json", self.media_delete, "media"),
            ("DELETE", media, self.media_delete, "media"),
            ("POST", "/v2/Indicators/Typing.json", self.show_typing, "typing"),
            ("GET", "/v2/Channels/Senders", self.senders, None),
            ("GET", "/v1/Services/<sid:re:MG[0-9a-f]{32}>", self.service, None),
        ):
            app.route(path, method, self._guarded(handler, on))
        app.route("/files/<media_sid>", "GET", self.file)
        app.error(404)(self.not_found)
        app.error(405)(self.not_allowed)

    def not_found(self, _error: object = None) -> str:
        """The body for a path that Twilio has not."""
        bottle.response.content_type = "application/json"
        return json.dumps(error_body(404, 20404, f"The requested resource {request.path} was not found"))

    def not_allowed(self, _error: object = None) -> str:
        """The body for a method that Twilio has not on a path."""
        bottle.response.content_type = "application/json"
        return json.dumps(error_body(405, 20004, "Method not allowed"))

    def _guarded(self, handler: Callable[..., Any], on: str | None) -> Callable[..., Any]:
        """The handler behind Basic auth, the general delay and the faults on this resource."""

        def guarded(account: str | None = None, **parts: str) -> Any:
            if request.environ.get("HTTP_AUTHORIZATION") != self._basic:
                refuse(401, 20003, "Authenticate", **{"WWW-Authenticate": 'Basic realm="Twilio API"'})
            if account not in (None, self.twilio.account_sid):
                refuse(404, 20404, f"The requested resource {request.path} was not found")
            if self.twilio.delay:
                self.twilio.stopping.wait(self.twilio.delay)
            fault = self.twilio.faults.take(on) if on else None
            if fault and fault.kind == "refuse":
                return hang_up()
            if fault and fault.kind == "error":
                self._fail(fault)
            result = handler(**parts)
            if fault and fault.kind == "hang":
                self.twilio.stopping.wait(fault.seconds)
            return result

        return guarded

    def _fail(self, fault: Fault) -> NoReturn:
        headers = {} if fault.retry_after is None else {"Retry-After": f"{fault.retry_after:g}"}
        refuse(fault.status, fault.code, fault.message, **headers)

    # Messages

    def create(self) -> HTTPResponse:
        """Send a message: 201 with its record, or Twilio's refusal."""
        fields = sent_fields()
        form = dict(fields)
        message = self._checked(form, [value for name, value in fields if name == "MediaUrl"])
        fault = self.twilio.faults.take("send", message.to)
        kind = fault.kind if fault else ""
        if fault and kind == "error":
            self._fail(fault)
        if kind == "refuse":
            return hang_up()
        body = self.record(message)
        self.twilio.accept(message, fault if kind == "undeliver" else None)
        if kind == "cut":
            return hang_up()
        if fault and kind == "hang":
            self.twilio.stopping.wait(fault.seconds)
        if fault and fault.gate:
            fault.gate.message = message
            fault.gate.arrived.set()
            fault.gate.released.wait(GATE_SECONDS)
        return answer(body, 201)

    def _checked(self, form: Mapping[str, str], media_urls: list[str]) -> Message:
        """The message that a form describes; refuses what Twilio refuses, by its codes."""
        to, content_sid = form.get("To", ""), form.get("ContentSid")
        service, sender, body = form.get("MessagingServiceSid"), form.get("From", ""), form.get("Body", "")
        if not to:
            refuse(400, 21604, "A 'To' phone number is required.")
        if not sender and not service:
            refuse(400, 21603, "A 'From' phone number is required.")
        if service and not re.fullmatch("MG[0-9a-f]{32}", service):
            refuse(400, 21705, f"The Messaging Service Sid {service} is invalid.")
        if not ADDRESS.fullmatch(to):
            refuse(400, 21211, f"The 'To' number {to} is not a valid phone number.")
        if sender and sender != self.twilio.number:
            refuse(400, 63007, "Twilio could not find a Channel with the specified From address")
        if not (body or media_urls or content_sid):
            refuse(400, 21619, "A text message body or media urls must be specified.")
        if len(body.encode("utf-16-le", "surrogatepass")) // 2 > BODY_LIMIT:
            refuse(400, 21617, "The concatenated message body exceeds the 1600 character limit.")
        if content_sid and not re.fullmatch("HX[0-9a-f]{32}", content_sid):
            refuse(400, 21655, f"The ContentSid {content_sid} is Invalid.")
        self._check_urls(media_urls, form.get("StatusCallback"))
        media = tuple(Media("", url=url) for url in media_urls)
        return Message(new_sid("MM" if media else "SM"), "outbound-api", self.twilio.number, to, body, media,
                       content_sid, content_variables(form), "accepted" if service else "queued",
                       service_sid=service, status_callback=form.get("StatusCallback"))

    def _check_urls(self, media_urls: list[str], callback: str | None) -> None:
        if len(media_urls) > 10:
            refuse(400, 21623, "Number of media files exceeds allowed limit.")
        if not all(urlsplit(url).scheme in ("http", "https") for url in media_urls):
            refuse(400, 21620, "Invalid media URL(s).")
        if callback and urlsplit(callback).scheme not in ("http", "https"):
            refuse(400, 21609, f"The 'StatusCallback' URL {callback} is not a valid URL.")

    def record(self, message: Message) -> dict[str, Any]:
        """The message as the REST API shows it."""
        uri = f"/{API_VERSION}/Accounts/{self.twilio.account_sid}/Messages/{message.sid}"
        return {
            "account_sid": self.twilio.account_sid,
            "api_version": API_VERSION,
            "body": message.body,
            "date_created": rfc2822(message.created),
            "date_sent": rfc2822(message.sent),
            "date_updated": rfc2822(message.sent or message.created),
            "direction": message.direction,
            "error_code": message.error_code,
            "error_message": "The message could not be delivered" if message.error_code else None,
            "from": None if message.status == "accepted" else message.from_,  # the service has not chosen yet
            "messaging_service_sid": message.service_sid,
            "num_media": str(len(message.media)),
            "num_segments": "1",
            "price": None,
            "price_unit": None,
            "sid": message.sid,
            "status": "received" if message.direction == "inbound" else message.status,
            "subresource_uris": {"media": f"{uri}/Media.json"},
            "tags": None,
            "to": message.to,
            "uri": f"{uri}.json",
        }

    def index(self) -> HTTPResponse:
        """Messages, newest first, that fit To, From and DateSent (by day), in pages."""
        query = dict(parse_qsl(request.query_string, keep_blank_values=True))
        size = min(max(number_in(query, "PageSize", "50"), 1), 1000)
        found = self._matching(query)
        if query.get("PageToken"):
            after = number_in(query, "PageToken", "", 16)
            found = found[next((i for i, message in enumerate(found) if message.number == after), -1) + 1:]
        page, path = number_in(query, "Page", "0"), f"/{API_VERSION}/Accounts/{self.twilio.account_sid}/Messages.json"
        shown = found[:size]
        more = dict(query, PageSize=str(size), Page=str(page + 1))
        more["PageToken"] = f"PASM{shown[-1].number:032x}" if shown else ""
        kept = {name: value for name, value in query.items() if name not in ("Page", "PageToken")}
        return answer({
            "messages": [self.record(message) for message in shown],
            "first_page_uri": f"{path}?{urlencode(dict(kept, PageSize=str(size), Page='0'))}",
            "next_page_uri": f"{path}?{urlencode(more)}" if len(found) > size else None,
            "previous_page_uri": None,
            "page": page, "page_size": size, "start": page * size, "end": page * size + max(len(shown) - 1, 0),
            "uri": f"{path}?{request.query_string}",
        })

    def _matching(self, query: Mapping[str, str]) -> list[Message]:
        to, sender = query.get("To"), query.get("From")
        records = self.twilio.records
        user = next((address for address in (to, sender) if address not in (None, "", self.twilio.number)), None)
        with records.changed:
            pool = records.conversation(user) if user else list(records.messages)
        found = [message for message in pool if (not to or message.to == to)
                 and (not sender or message.from_ == sender) and sent_in_range(message.sent, query)]
        return sorted(found, key=lambda message: (message.created, message.number), reverse=True)

    def _message(self, sid: str) -> Message:
        message = self.twilio.records.get(sid)
        if message is None:
            refuse(404, 20404, f"The requested resource {request.path} was not found")
        return message

    def fetch(self, sid: str) -> HTTPResponse:
        """One message."""
        return answer(self.record(self._message(sid)))

    def redact(self, sid: str) -> HTTPResponse:
        """Empty a message's body, the one change that Twilio allows to it."""
        message = self._message(sid)
        if sent_form().get("Body") != "":
            refuse(400, 20001, "The body of a message can only be emptied.")
        self.twilio.records.update(message, body="")
        return answer(self.record(message))

    def delete(self, sid: str) -> HTTPResponse:
        """Forget a message that is not on its way any more."""
        message = self._message(sid)
        if message.status in ("accepted", "queued", "sending"):
            refuse(409, 20009, "Cannot delete this resource before it is complete")
        self.twilio.records.remove(message)
        return HTTPResponse("", 204)

    # Media

    def _media(self, sid: str, media_sid: str) -> Media:
        media = self.twilio.file(media_sid)
        if media is None or media.deleted:
            refuse(404, 20404, f"The requested resource {request.path} was not found")
        return media

    def _media_record(self, sid: str, media: Media, created: datetime | None) -> dict[str, Any]:
        account = self.twilio.account_sid
        return {"sid": media.sid, "account_sid": account, "parent_sid": sid, "content_type": media.content_type,
                "date_created": rfc2822(created), "date_updated": rfc2822(created),
                "uri": f"/{API_VERSION}/Accounts/{account}/Messages/{sid}/Media/{media.sid}.json"}

    def media_list(self, sid: str) -> HTTPResponse:
        """The media of a message that have not been deleted."""
        message = self._message(sid)
        records = [self._media_record(sid, media, message.created) for media in message.media if not media.deleted]
        uri = f"/{API_VERSION}/Accounts/{self.twilio.account_sid}/Messages/{sid}/Media.json?PageSize=50&Page=0"
        return answer({"media_list": records, "first_page_uri": uri, "next_page_uri": None,
                       "previous_page_uri": None, "page": 0, "page_size": 50, "start": 0,
                       "end": max(len(records) - 1, 0), "uri": uri})

    def media_fetch(self, sid: str, media_sid: str) -> HTTPResponse:
        """What is known of a media."""
        message = self.twilio.records.get(sid)
        created = message.created if message else None
        return answer(self._media_record(sid, self._media(sid, media_sid), created))

    def media_redirect(self, sid: str, media_sid: str) -> HTTPResponse:
        """The way to a media's bytes, on another origin that wants no auth."""
        media = self._media(sid, media_sid)
        return HTTPResponse("", 307, {"Location": media.url or f"{self.twilio.files_url}/files/{media.sid}"})

    def media_delete(self, sid: str, media_sid: str) -> HTTPResponse:
        """Delete a media for good."""
        media = self._media(sid, media_sid)
        media.deleted, media.data = True, b""
        return HTTPResponse("", 204)

    def file(self, media_sid: str) -> HTTPResponse:
        """A media's bytes; like the store behind Twilio, 400 to a request that carries credentials."""
        if "HTTP_AUTHORIZATION" in request.environ:
            return HTTPResponse("Only one auth mechanism allowed", 400, {"Content-Type": "text/plain"})
        media = self.twilio.file(media_sid)
        if media is None or media.deleted:
            return HTTPResponse("", 404)
        return HTTPResponse(media.data, 200, {"Content-Type": media.content_type})

    # Typing, and what a check of the credentials asks for

    def show_typing(self) -> HTTPResponse:
        """Show the typing indicator in answer to a message, which becomes read with those before it."""
        form = sent_form()
        message = self.twilio.records.get(form.get("messageId", ""))
        if form.get("channel") != "whatsapp" or message is None or message.direction != "inbound":
            refuse(400, 20001, "channel must be whatsapp and messageId the sid of a message received")
        self.twilio.records.mark_seen(message)
        self.twilio.records.show_typing(message.from_, message.sid)
        return answer({"success": True})

    def account(self) -> HTTPResponse:
        """The account itself."""
        sid, since = self.twilio.account_sid, rfc2822(datetime(2026, 1, 1, tzinfo=UTC))
        return answer({"sid": sid, "owner_account_sid": sid, "friendly_name": "Simulador", "status": "active",
                       "type": "Full", "date_created": since, "date_updated": since, "auth_token": None,
                       "subresource_uris": {}, "uri": f"/{API_VERSION}/Accounts/{sid}.json"})

    def _console_url(self) -> str:
        public = (self.twilio.public_url or self.twilio.gateway_url).rstrip("/")
        return f"{public}/webhooks/twilio" if self.twilio.webhook_url is None else self.twilio.webhook_url

    def numbers(self) -> HTTPResponse:
        """Phone numbers that were bought: none, a WhatsApp sender is no such number."""
        uri = f"/{API_VERSION}/Accounts/{self.twilio.account_sid}/IncomingPhoneNumbers.json?PageSize=50&Page=0"
        return answer({"incoming_phone_numbers": [], "first_page_uri": uri, "next_page_uri": None,
                       "previous_page_uri": None, "page": 0, "page_size": 50, "start": 0, "end": 0, "uri": uri})

    def senders(self) -> HTTPResponse:
        """The WhatsApp senders: one, with the webhook that the console has for it."""
        url = f"https://messaging.twilio.com/v2/Channels/Senders?{request.query_string}"
        sid = "XE" + "0" * 32
        webhook = {"callback_url": self._console_url(), "callback_method": "POST", "fallback_url": None,
                   "fallback_method": None, "status_callback_url": None, "status_callback_method": None}
        sender = {"sid": sid, "status": "ONLINE", "sender_id": self.twilio.number, "configuration": {},
                  "webhook": webhook, "profile": {"name": "Hilo"}, "properties": {}, "offline_reasons": None,
                  "compliance": None, "url": f"https://messaging.twilio.com/v2/Channels/Senders/{sid}"}
        wanted = request.query.get("Channel") == "whatsapp"
        return answer({"senders": [sender] if wanted else [],
                       "meta": {"page": 0, "page_size": 50, "first_page_url": url, "previous_page_url": None,
                                "url": url, "next_page_url": None, "key": "senders"}})

    def service(self, sid: str) -> HTTPResponse:
        """A Messaging Service, whatever its sid: it sends from the one number."""
        since = "2026-01-01T00:00:00Z"
        return answer({"sid": sid, "account_sid": self.twilio.account_sid, "friendly_name": "Simulador",
                       "date_created": since, "date_updated": since, "inbound_request_url": self._console_url(),
                       "inbound_method": "POST", "use_inbound_webhook_on_number": False, "links": {},
                       "url": f"https://messaging.twilio.com/v1/Services/{sid}"})


def content_variables(form: Mapping[str, str]) -> dict[str, Any] | None:
    """The variables of a content template; refuses what is no JSON object."""
    text = form.get("ContentVariables")
    if not text:
        return None
    try:
        variables = json.loads(text)
    except ValueError:
        variables = None
    if not isinstance(variables, dict):
        refuse(400, 21656, "The ContentVariables Parameter is invalid.")
    return variables


def number_in(query: Mapping[str, str], name: str, default: str, base: int = 10) -> int:
    """A number of the query, in hexadecimal behind a prefix where it is a token; refuses what is none."""
    prefix = "PASM" if base == 16 else ""
    found = re.fullmatch(f"{prefix}([0-9{'a-f' if base == 16 else ''}]{{1,32}})", query.get(name, default))
    return int(found[1], base) if found else refuse(400, 20001, f"Invalid {name}: {query[name]}")


def sent_in_range(sent: datetime | None, query: Mapping[str, str]) -> bool:
    """True when the day of sending fits the DateSent filters; a message not sent yet fits none of them."""
    limits = {sign: query.get(f"DateSent{sign}", "")[:10] for sign in ("", "<", ">")}
    if not any(limits.values()):
        return True
    if sent is None:
        return False
    day = sent.astimezone(UTC).strftime("%Y-%m-%d")
    return (day == (limits[""] or day)) and day <= (limits["<"] or day) and day >= limits[">"]


# --- The server -------------------------------------------------------------------------------------------


class Server:
    """waitress in a thread, on two ports of 127.0.0.1: the API's and, for media, another origin's."""

    def __init__(self, app: Any, port: int, threads: int) -> None:
        sockets = [_listening(port), _listening(0)]
        self.port, self.files_port = (listener.getsockname()[1] for listener in sockets)
        self._waitress: Any = waitress.create_server(
            app, sockets=sockets, threads=threads, connection_limit=1500, backlog=2048, asyncore_use_poll=True,
            channel_timeout=120, channel_request_lookahead=1, log_socket_errors=False, ident="TwilioSimulator",
            max_request_body_size=32 << 20)
        self._stopped = False
        self._thread = threading.Thread(target=self._run, name="simulator-web", daemon=True)

    def start(self) -> None:
        """Begin to serve; the ports are taken, and connections queued, from the constructor on."""
        self._thread.start()

    def _run(self) -> None:
        while not self._stopped:
            wasyncore.loop(timeout=1, use_poll=True, map=self._waitress.map, count=1)

    def stop(self) -> None:
        """End the loop, then the workers, then every connection."""
        self._stopped = True
        if self._thread.is_alive():
            self._wake()
            self._thread.join()
        self._waitress.close()

    def _wake(self) -> None:
        for server in list(self._waitress.map.values()):
            if isinstance(server, waitress.server.BaseWSGIServer):
                server.pull_trigger()
                return


def _listening(port: int) -> socket.socket:
    """A socket bound to 127.0.0.1; OSError when the port is taken."""
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((HOST, port))
    except OSError:
        listener.close()
        raise
    return listener
