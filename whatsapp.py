"""The Twilio side: what is sent, looked up and downloaded over Twilio's REST API."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cached_property
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from settings import Settings
from tools import Media, Message, ToolError

if TYPE_CHECKING:
    import requests

log = logging.getLogger("hilo")

LONGEST_WAIT = 3600.0  # seconds, whatever a Retry-After asks for
# What the model reads for a message that has no text and that no plugin reads.
PLACEHOLDERS = {
    "audio": "[El usuario envió un mensaje de voz que no se puede escuchar aquí.]",
    "image": "[El usuario envió una imagen que no se puede ver aquí.]",
    "video": "[El usuario envió un video que no se puede ver aquí.]",
    "application": "[El usuario envió un documento que no se puede leer aquí.]",
    "text": "[El usuario envió un archivo de texto o un contacto que no se puede leer aquí.]",
    "": "[El usuario envió un tipo de mensaje que no se puede leer aquí.]",
}


def message_of(row: Mapping[str, Any]) -> Message:
    """Return a stored inbound row as plugins see it."""
    raw = row["raw"] or {}
    count = int(raw.get("NumMedia") or 0) if (raw.get("NumMedia") or "0").isdigit() else 0
    media = [
        Media(raw[f"MediaUrl{n}"], raw.get(f"MediaContentType{n}", "").split(";")[0].strip().lower())
        for n in range(min(count, 10))
        if f"MediaUrl{n}" in raw
    ]  # fmt: skip
    place = None
    with contextlib.suppress(KeyError, ValueError):
        place = (float(raw["Latitude"]), float(raw["Longitude"]))
    button = raw.get("ButtonPayload") or raw.get("ButtonText") or raw.get("ListId") or None
    name = raw.get("ProfileName", "")
    return Message(row["sid"], row["user_phone"], row["body"], tuple(media), button, place, name, row["at"], raw)


def plain_input(message: Message) -> str:
    """Return what the model reads for a message that no plugin took: never nothing."""
    kinds = [media.content_type.partition("/")[0] for media in message.media]
    said = [message.text] if message.text.strip() else [message.raw.get("ButtonText", "")]
    told = [*said, *(PLACEHOLDERS.get(kind, PLACEHOLDERS[""]) for kind in kinds)]
    return "\n".join(filter(None, told)) or PLACEHOLDERS[""]


class NotSent(Exception):
    """Twilio certainly did not take the part: it may go again after `seconds`."""

    def __init__(self, why: str, seconds: float):
        super().__init__(why)
        self.seconds = seconds


class Refused(Exception):
    """Twilio will never take the part; `code` is its error code (https://www.twilio.com/docs/api/errors)."""

    def __init__(self, code: int, why: str):
        super().__init__(why)
        self.code = code


class InDoubt(Exception):
    """The call broke off: Twilio may or may not have taken the part."""


def make_transport(origin: str | None, seconds: float) -> Any:
    """Return the SDK's HTTP client with a time-out and keep-alive, `origin` in place of Twilio's hosts."""
    import requests
    from requests.adapters import HTTPAdapter
    from twilio.http import HttpClient
    from twilio.http.response import Response as TwilioResponse

    limits = (seconds / 3, seconds * 2 / 3)  # to connect and to answer: each would get the whole time otherwise

    class Transport(HttpClient):
        """Unlike the SDK's own, it returns each thread its own answer and tells Retry-After."""

        def __init__(self) -> None:
            super().__init__(logging.getLogger("twilio"), False, seconds)
            self.session = requests.Session()
            for scheme in ("https://", "http://"):
                self.session.mount(scheme, HTTPAdapter(pool_maxsize=64))
            # What the environment says of proxies and certificates is read once, not for every call.
            known = self.session.merge_environment_settings(origin or "https://api.twilio.com", {}, None, None, None)
            self.session.proxies, self.session.verify = known["proxies"], known["verify"]
            self.session.trust_env = False

        def request(self, method: str, url: str, params: Any = None, data: Any = None, headers: Any = None,
                    auth: Any = None, timeout: float | None = None, allow_redirects: bool = False) -> Any:  # fmt: skip
            parts = urlsplit(url)
            if origin:
                url = origin.rstrip("/") + parts._replace(scheme="", netloc="").geturl()
            answer = self.session.request(
                method, url, params=params, data=data, headers=headers, auth=auth, timeout=timeout or limits,
                allow_redirects=allow_redirects,
            )  # fmt: skip
            if answer.status_code == 429:
                raise NotSent("429 Too Many Requests", retry_after(answer.headers, 2.0))
            return TwilioResponse(answer.status_code, answer.text, answer.headers)

    return Transport()


def never_left(error: requests.ConnectionError) -> str:
    """Return why a call did not even reach Twilio, "" where it may have."""
    from urllib3.exceptions import ConnectTimeoutError, ProxyError

    reason = getattr(next(iter(error.args), None), "reason", None)
    if isinstance(reason, ConnectTimeoutError):  # what is refused, and names that are not known, are of this kind too
        return "no connection to Twilio"
    if isinstance(reason, ProxyError):
        return "no connection to the proxy"
    if "CERTIFICATE_VERIFY_FAILED" in repr(reason):  # a company's proxy shows its own
        return "the certificate shown for Twilio is not trusted: name its authority's file in REQUESTS_CA_BUNDLE"
    return ""


class WhatsApp:
    """Twilio's REST API (https://www.twilio.com/docs/messaging/api), and what came back from it."""

    BUSY = (20429, 63017, 63018)  # rate limits by another name
    WINDOW_SHUT = 63016  # more than 24 hours since the user wrote: only a template gets through
    TEXT = 1600  # UTF-16 code units of one part

    def __init__(self, settings: Settings):
        self.settings = settings
        self.configured = bool(settings.twilio_account_sid and settings.twilio_auth_token and settings.public_url)

    @cached_property
    def client(self) -> Any:
        """The SDK's client, made once."""
        from twilio.rest import Client

        token = self.settings.twilio_auth_token
        return Client(
            self.settings.twilio_account_sid, token.get_secret_value() if token else "",
            http_client=make_transport(self.settings.twilio_api_url, self.settings.call_timeout),
        )  # fmt: skip

    def close(self) -> None:
        """Close the connections that are kept alive."""
        if "client" in vars(self):
            self.client.http_client.session.close()

    def send(self, part: Mapping[str, Any], to: str, own_number: str | None) -> str:
        """Send one part and return its sid; raises NotSent, Refused or InDoubt."""
        import requests
        from twilio.base.exceptions import TwilioException, TwilioRestException

        if not self.configured:
            raise NotSent("Twilio is not configured", 60)
        try:
            return self.client.messages.create(to=to, **self.sender(own_number), **self.content(part)).sid
        except TwilioRestException as error:
            raise self.judged(error) from None
        except requests.ConnectionError as error:
            if why := never_left(error):
                raise NotSent(why, 2) from None
            raise InDoubt("the connection broke") from None
        except (requests.RequestException, TwilioException) as error:
            raise InDoubt(type(error).__name__) from None

    def show_typing(self, sid: str) -> None:
        """Show the typing indicator under a message and mark it as read; a failure is of no account."""
        import requests
        from twilio.base.exceptions import TwilioException

        with contextlib.suppress(requests.RequestException, TwilioException, NotSent):
            self.client.messaging.v2.typing_indicator.create(channel="whatsapp", message_id=sid)

    def judged(self, error: Any) -> Exception:
        """Return what an HTTP error of Twilio's means for the part."""
        if error.status >= 500:
            return InDoubt(f"HTTP {error.status}")
        if error.status in (401, 403, 404, 408) or error.code in self.BUSY:
            return NotSent(f"HTTP {error.status}, code {error.code}", 15)
        return Refused(int(error.code or error.status), f"HTTP {error.status}, code {error.code}")

    def sender(self, own_number: str | None) -> dict[str, str]:
        """Return who sends: the number that was written to, else TWILIO_FROM."""
        chosen = own_number or self.settings.twilio_from or ""
        return {"messaging_service_sid": chosen} if chosen.startswith("MG") else {"from_": chosen}

    def content(self, part: Mapping[str, Any]) -> dict[str, Any]:
        """Return a part as the SDK takes it; the callback's URL carries the row's id."""
        content: dict[str, Any] = {"status_callback": f"{self.settings.origin}/webhooks/twilio/status?m={part['id']}"}
        if part["content_sid"]:
            content |= {"content_sid": part["content_sid"], "content_variables": json.dumps(part["variables"] or {})}
        elif part["body"]:
            content["body"] = part["body"]
        if part["media_url"]:
            content["media_url"] = [part["media_url"]]
        return content

    def find(self, part: Mapping[str, Any], to: str, known: Callable[[list[str]], set[str]]) -> str | None:
        """Return the sid of a part that Twilio took without our learning of it, None where it did not.

        Raises NotSent when Twilio's list cannot be had."""
        import requests
        from twilio.base.exceptions import TwilioException

        since = part["sending_at"] - timedelta(seconds=60)  # the two clocks may differ
        try:
            listed = self.client.messages.list(to=to, limit=100, page_size=100)
        except (requests.RequestException, TwilioException) as error:
            raise NotSent(f"Twilio's list of messages failed ({type(error).__name__})", 5) from None
        recent = [m for m in listed if m.direction == "outbound-api" and (m.date_created or since) >= since]
        same = [m for m in recent if part["content_sid"] or (m.body or "").strip() == part["body"].strip()]
        taken = known([m.sid for m in same])
        return next((m.sid for m in reversed(same) if m.sid not in taken), None)

    def inbound_since(self, since: datetime) -> Iterator[tuple[dict[str, str], datetime]]:
        """Yield what Twilio received from WhatsApp users since a moment, newest first, as forms without files."""
        listed = self.client.messages.stream(date_sent_after=since - timedelta(days=1), page_size=200)
        for m in listed:
            created = m.date_created or m.date_sent
            if created and created < since - timedelta(minutes=10):
                return
            if m.direction == "inbound" and str(m.from_).startswith("whatsapp:") and created and created >= since:
                form = {"MessageSid": m.sid, "AccountSid": m.account_sid, "From": m.from_, "To": m.to,
                        "Body": m.body or "", "NumMedia": str(m.num_media or 0)}  # fmt: skip
                if m.messaging_service_sid:
                    form["MessagingServiceSid"] = m.messaging_service_sid
                yield form, created

    def media_of(self, form: Mapping[str, str]) -> dict[str, str]:
        """Return the form fields of a message's files; none where they cannot be had: then it is of no known kind."""
        import requests
        from twilio.base.exceptions import TwilioException

        if form["NumMedia"] == "0":
            return {}
        fields: dict[str, str] = {}
        host = self.settings.twilio_api_url or "https://api.twilio.com"
        try:
            for n, media in enumerate(self.client.messages(form["MessageSid"]).media.list(limit=10)):
                fields[f"MediaUrl{n}"] = host.rstrip("/") + media.uri.removesuffix(".json")
                fields[f"MediaContentType{n}"] = media.content_type
        except (requests.RequestException, TwilioException, NotSent) as error:
            log.warning("⚠️ Twilio's list of the files of %s failed: %s", form["MessageSid"], type(error).__name__)
        return fields

    def download(self, media: Media, limit: int, seconds: float) -> bytes:
        """Return a file's bytes. Credentials go to Twilio's host only; raises ToolError with the reason."""
        import requests
        import urllib3

        url, token, end = media.url, self.settings.twilio_auth_token, time.monotonic() + seconds
        if not self.is_twilio(url):
            raise ToolError("the file is not at Twilio")
        try:
            for _ in range(4):
                auth = (self.settings.twilio_account_sid or "", token.get_secret_value() if token else "")
                own = auth if self.is_twilio(url) else None
                left = max(0.3, end - time.monotonic())
                limits = (left / 3, left * 2 / 3)
                with requests.get(url, auth=own, stream=True, timeout=limits, allow_redirects=False) as answer:
                    if answer.is_redirect:
                        url = requests.compat.urljoin(url, answer.headers["Location"])
                        if not self.is_safe(url):
                            raise ToolError("the file was redirected to an address without TLS")
                        continue
                    answer.raise_for_status()
                    return self.read(answer, limit, end)
        except (requests.RequestException, urllib3.exceptions.HTTPError) as error:
            raise ToolError(f"the file could not be had: {type(error).__name__}") from None
        raise ToolError("too many redirects")

    @staticmethod
    def read(answer: Any, limit: int, end: float) -> bytes:
        """Return a download's body, at most `limit` bytes and what has come by `end` (monotonic)."""
        data = bytearray()
        # Whatever has arrived, at once: a full chunk of a body that drips would be waited for without an end.
        while chunk := answer.raw.read1(65536, decode_content=True):
            data += chunk
            if len(data) > limit:
                raise ToolError(f"the file is larger than {limit // 1024} KiB")
            if time.monotonic() > end:
                raise ToolError("the download took too long")
        return bytes(data)

    def is_twilio(self, url: str) -> bool:
        """Tell whether a URL is Twilio's own (TWILIO_API_URL stands for it)."""
        parts, local = urlsplit(url), self.settings.twilio_api_url
        if "\\" in url or "@" in parts.netloc:  # who opens such a URL may read another host in it
            return False
        if local and f"{parts.scheme}://{parts.netloc}" == local.rstrip("/"):
            return True
        return parts.scheme == "https" and (parts.hostname or "").endswith(".twilio.com")

    def is_safe(self, url: str) -> bool:
        """Tell whether a redirect may be followed, without credentials: with TLS, or on the host of TWILIO_API_URL."""
        parts, local = urlsplit(url), urlsplit(self.settings.twilio_api_url or "")
        return parts.scheme == "https" or (parts.scheme, parts.hostname) == (local.scheme, local.hostname)


def cut(text: str, limit: int = WhatsApp.TEXT) -> list[str]:
    """Return a text in pieces of at most `limit` UTF-16 units, cut at white space where there is some."""
    pieces = []
    while len(text.encode("utf-16-le", "surrogatepass")) > 2 * limit:
        head = text.encode("utf-16-le", "surrogatepass")[: 2 * limit].decode("utf-16-le", "ignore")
        at = max(head.rfind("\n"), head.rfind(" "))
        at = at if at > limit // 2 else len(head)
        pieces.append(text[:at].strip())
        text = text[at:]
    return [piece for piece in [*pieces, text.strip()] if piece]


def retry_after(headers: Mapping[str, str], default: float) -> float:
    """Return the seconds of a Retry-After header (RFC 9110 10.2.3), `default` where there is none to read."""
    value = headers.get("Retry-After") or headers.get("retry-after") or ""
    if re.fullmatch(r"\d+(\.\d+)?", value.strip()):
        return min(LONGEST_WAIT, float(value))
    with contextlib.suppress(ValueError):
        moment = parsedate_to_datetime(value)
        moment = moment if moment.tzinfo else moment.replace(tzinfo=UTC)  # -0000: UTC, from nobody knows where
        return min(LONGEST_WAIT, max(0.0, (moment - datetime.now(UTC)).total_seconds()))
    return default
