"""What leaves for WhatsApp: cut, in order, from the right number, held back when Twilio or the user says so."""

from __future__ import annotations

import contextlib
import http.client
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from inbox import opt_word
from settings import load_settings
from simulator import Simulator
from tests.conftest import ANA, Hilo, environment, wait_for
from tests.local_openai import LocalOpenAI, says
from tools import Media, Message, Part, ToolError
from whatsapp import NotSent, WhatsApp, cut, plain_input, retry_after

Start = Callable[..., Hilo]


def units(text: str) -> int:
    """A text's length as Twilio counts it."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


@pytest.fixture
def hilo(start: Start, openai_server: LocalOpenAI) -> Hilo:
    """A gateway on a model that answers at once."""
    openai_server.ignores_background = True
    return start()


def parts(hilo: Hilo) -> list[dict[str, Any]]:
    """The outbound rows, in order."""
    return hilo.rows("SELECT * FROM messages WHERE direction = 'out' ORDER BY id")


def put_back(hilo: Hilo) -> None:
    """Wait until a part waits for its next attempt."""
    waits = """SELECT 1 AS x FROM messages m JOIN runs r ON r.id = m.run_id
        WHERE m.state = 'queued' AND m.sends = 1 AND NOT r.held AND r.due_at > now() + interval '1 s'"""
    wait_for(lambda: hilo.rows(waits))


def answering(hilo: Hilo, *texts: str | Part) -> None:
    """Let every message be answered by these parts."""
    hilo.plug(incoming_message=lambda message: list(texts))


@contextlib.contextmanager
def in_front(twilio: Simulator, certificate: Path | None = None) -> Iterator[tuple[str, list[str]]]:
    """Lend the address of a server that passes calls on to Twilio, and the paths that it was asked for; with a
    certificate it speaks TLS."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            asked.append(self.path)
            body = self.rfile.read(int(self.headers["Content-Length"]))
            del self.headers["Host"]
            twilios = http.client.HTTPConnection(urlsplit(twilio.url).netloc, timeout=10)
            twilios.request("POST", urlsplit(self.path).path, body, dict(self.headers))
            answer = twilios.getresponse()
            told = answer.read()
            twilios.close()
            self.send_response(answer.status)
            self.send_header("Content-Type", answer.headers["Content-Type"])
            self.send_header("Content-Length", str(len(told)))
            self.end_headers()
            self.wfile.write(told)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        if certificate:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(certificate)
            server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}", asked
        finally:
            server.shutdown()
            thread.join()


def sent_by(twilio: Simulator, origin: str) -> str:
    """Send one part to Ana over a client of its own; return its sid."""
    whatsapp = WhatsApp(load_settings(environment("", twilio, None, TWILIO_API_URL=origin)))
    part = {"id": 1, "body": "hola", "media_url": None, "content_sid": None, "variables": None}
    try:
        return whatsapp.send(part, ANA, twilio.number)
    finally:
        whatsapp.close()


# --- Length and order -------------------------------------------------------------------------------------


def test_long_answer_leaves_in_parts_of_at_most_1600_in_order(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    words = [f"palabra{n}" for n in range(600)]
    openai_server.model = says(" ".join(words))
    twilio.receive(ANA, "cuéntame todo")
    sent = twilio.wait_for(ANA, 5)
    assert " ".join(message.body for message in sent).split() == words
    assert max(units(message.body) for message in sent) <= 1600
    assert hilo.done()[0]["outcome"] == "answered"


def test_part_waits_until_the_one_before_it_has_left_twilio(start: Start, twilio: Simulator) -> None:
    hilo = start()
    answering(hilo, "uno", "dos")
    twilio.progress = [("queued", 0.0), ("sent", 0.6), ("delivered", 0.0)]
    twilio.receive(ANA, "hola")
    first, second = twilio.wait_for(ANA, 2)
    assert (second.created - first.created).total_seconds() >= 0.6


def test_lost_callbacks_hold_up_the_next_part_for_two_seconds_at_most(start: Start, twilio: Simulator) -> None:
    hilo = start()
    answering(hilo, "uno", "dos")
    twilio.callbacks_on = False
    twilio.receive(ANA, "hola")
    first, second = twilio.wait_for(ANA, 2, timeout=5)
    assert 1.8 <= (second.created - first.created).total_seconds() < 4
    hilo.done()
    assert [part["state"] for part in parts(hilo)] == ["sent", "sent"]


def test_callbacks_in_any_order_end_in_the_highest_state(hilo: Hilo, twilio: Simulator) -> None:
    answering(hilo, "uno", "dos")
    twilio.fault("callback", "shuffle", times=2)
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 2)
    wait_for(lambda: [part["state"] for part in parts(hilo)] == ["read", "read"])


@given(st.text(alphabet="a 😀\nñ\u200d", max_size=300), st.integers(2, 40))
@settings(max_examples=200, deadline=None)
def test_text_is_cut_into_pieces_that_fit_and_lose_nothing(text: str, limit: int) -> None:
    pieces = cut(text, limit)
    assert all(0 < units(piece) <= limit for piece in pieces)
    assert "".join("".join(pieces).split()) == "".join(text.split())
    assert all("\ufffd" not in piece and piece == piece.strip() for piece in pieces)


def test_text_is_cut_between_words() -> None:
    assert cut("uno dos tres cuatro", 9) == ["uno dos", "tres", "cuatro"]


# --- Who sends, and what ----------------------------------------------------------------------------------


def test_reply_leaves_from_the_number_that_was_written_to(hilo: Hilo, twilio: Simulator) -> None:
    twilio.number = "whatsapp:+5215500000042"  # not the one of TWILIO_FROM
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].from_ == twilio.number
    assert twilio.sent_to(ANA)[0].service_sid is None


@pytest.mark.parametrize(
    ("own", "from_", "sender"),
    [
        ("whatsapp:+1", "whatsapp:+2", {"from_": "whatsapp:+1"}),
        (None, "whatsapp:+14155238886", {"from_": "whatsapp:+14155238886"}),
        (None, "MG" + "a" * 32, {"messaging_service_sid": "MG" + "a" * 32}),
        ("whatsapp:+1", "MG" + "a" * 32, {"from_": "whatsapp:+1"}),
    ],
)
def test_sender_is_the_number_written_to_else_the_setting(own: str | None, from_: str, sender: dict[str, str]) -> None:
    values = {"TWILIO_FROM": from_} if len(from_) > 12 else {}
    assert WhatsApp(load_settings(values)).sender(own) == sender


def test_messaging_service_sends_to_whom_nobody_wrote_from(start: Start, twilio: Simulator) -> None:
    hilo = start(TWILIO_FROM="MG" + "a" * 32)
    answering(hilo, "hola")
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    hilo.done()
    hilo.rows("UPDATE users SET own_number = NULL")
    sid = hilo.gateway.journey.whatsapp.send(
        {"id": 1, "body": "x", "media_url": None, "content_sid": None, "variables": None}, ANA, None
    )
    found = twilio.records.get(sid)
    assert found and found.service_sid == "MG" + "a" * 32


def test_reply_goes_to_the_latest_address_of_the_person(hilo: Hilo, twilio: Simulator) -> None:
    twilio.receive(ANA, "hola", fields={"ExternalUserId": "MX.ana2026"})
    twilio.wait_for(ANA, 1)
    hilo.done()
    twilio.receive("whatsapp:MX.ana2026", "ya tengo usuario", fields={"ExternalUserId": "MX.ana2026"})
    assert [message.body for message in twilio.wait_for("whatsapp:MX.ana2026", 1)] == ["Eco: ya tengo usuario"]
    assert len(twilio.sent_to(ANA)) == 1


def test_callback_url_carries_the_row(hilo: Hilo, twilio: Simulator) -> None:
    twilio.receive(ANA, "hola")
    (sent,) = twilio.wait_for(ANA, 1)
    hilo.done()
    assert sent.status_callback == f"{hilo.url}/webhooks/twilio/status?m={parts(hilo)[0]['id']}"


# --- Twilio says no, or later -----------------------------------------------------------------------------


@pytest.mark.parametrize(("status", "code"), [(400, 21610), (400, 21211), (400, 63024), (400, 21617), (410, 20410)])
def test_refused_part_ends_the_run_undelivered_with_twilios_code(
    hilo: Hilo, twilio: Simulator, status: int, code: int
) -> None:
    answering(hilo, "uno", "dos")
    twilio.fault("send", "error", status=status, code=code)
    twilio.receive(ANA, "hola")
    (run,) = hilo.done()
    assert (run["outcome"], run["reason"]) == ("undelivered", str(code))
    assert [(part["state"], part["error_code"]) for part in parts(hilo)] == [("failed", code)] * 2
    assert twilio.sent_to(ANA) == []


@pytest.mark.parametrize(("status", "code"), [(401, 20003), (403, 20403), (400, 63018), (429, 20429)])
def test_part_that_twilio_does_not_take_for_now_is_sent_later(
    hilo: Hilo, twilio: Simulator, status: int, code: int
) -> None:
    twilio.fault("send", "error", status=status, code=code)
    twilio.receive(ANA, "hola")
    put_back(hilo)
    assert twilio.sent_to(ANA) == []
    hilo.age(20)
    assert twilio.wait_for(ANA, 1)[0].body == "Eco: hola"
    assert hilo.done()[0]["outcome"] == "answered" and parts(hilo)[0]["sends"] == 2


def test_callbacks_of_the_first_part_do_not_cut_short_what_a_429_asks_for(hilo: Hilo, twilio: Simulator) -> None:
    answering(hilo, "uno", "dos")
    twilio.progress = [("queued", 0.0), ("sent", 0.0), ("delivered", 0.5), ("read", 0.1)]
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    refusal = twilio.fault("send", "error", status=429, code=20429, retry_after=30)
    wait_for(lambda: refusal.left == 0)
    wait_for(lambda: parts(hilo)[0]["state"] == "read")
    put_back(hilo)
    due = hilo.rows("SELECT extract(epoch FROM due_at - now())::float8 AS s FROM runs WHERE state = 'sending'")
    assert due[0]["s"] > 20 and len(twilio.sent_to(ANA)) == 1
    hilo.age(40)
    assert twilio.wait_for(ANA, 2)[1].body == "dos"


def test_part_that_cannot_be_sent_for_a_day_is_given_up(hilo: Hilo, twilio: Simulator) -> None:
    twilio.fault("send", "error", times=None, status=401, code=20003)
    twilio.receive(ANA, "hola")
    put_back(hilo)
    hilo.rows("UPDATE runs SET created_at = created_at - interval '25 hours'")
    hilo.age(20)
    wait_for(lambda: parts(hilo)[0]["state"] == "failed")
    hilo.age(20)
    (run,) = hilo.done()
    assert run["outcome"] == "undelivered" and run["reason"] != "None"


@pytest.mark.parametrize(
    ("value", "seconds"),
    [("3", 3.0), (" 2.5 ", 2.5), ("", 7.0), ("pronto", 7.0), ("-5", 7.0), ("nan", 7.0), ("9" * 30, 3600.0)],
)
def test_retry_after_is_read_as_seconds(value: str, seconds: float) -> None:
    assert retry_after({"Retry-After": value}, 7.0) == seconds


def test_retry_after_of_a_zone_that_nobody_knows_is_utc() -> None:
    soon = (datetime.now(UTC) + timedelta(seconds=30)).strftime("%a, %d %b %Y %H:%M:%S -0000")
    assert 25 < retry_after({"Retry-After": soon}, 7.0) <= 30


def test_retry_after_is_read_as_a_date() -> None:
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < retry_after({"retry-after": soon}, 7.0) <= 30
    assert retry_after({"Retry-After": format_datetime(datetime(2020, 1, 1, tzinfo=UTC), usegmt=True)}, 7.0) == 0.0


# --- Opt-out words and modes ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("BAJA", "out"), (" baja. ", "out"), ("Stop!", "out"), ("*STOP*", "out"), ("darme de baja", "out"),
        ("Cancelar suscripción", "out"), ("cancelar  suscripcion", "out"), ("ALTA", "in"), ("start", "in"),
        ("¿cómo me doy de baja?", None), ("baja el precio", None), ("stop it", None), ("", None),
        ("👍", None), ("altavoz", None),
    ],
)  # fmt: skip
def test_opt_out_word_is_a_message_of_its_own(text: str, word: str | None) -> None:
    assert opt_word(text) == word


def test_user_who_left_is_told_nothing_until_they_return(hilo: Hilo, twilio: Simulator) -> None:
    for count, (text, replies) in enumerate([("BAJA", 1), ("hola", 1), ("¿hay alguien?", 1), ("ALTA", 2), ("hola", 3)]):
        twilio.receive(ANA, text)
        hilo.done(count + 1)
        assert len(twilio.sent_to(ANA)) == replies, text
    outcomes = [run["outcome"] for run in hilo.done(5)]
    assert outcomes == ["intercepted"] * 4 + ["answered"]


def test_user_who_leaves_while_the_model_works_gets_the_confirmation_alone(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start()
    with openai_server.gate("POST /v1/responses$") as gate:
        twilio.receive(ANA, "¿qué cursos hay?")
        assert gate.arrived.wait(5)
        twilio.receive(ANA, "STOP")
    hilo.done(2)
    assert [message.body.split(",")[0] for message in twilio.sent_to(ANA)] == ["Listo"]
    assert parts(hilo)[0]["state"] == "withheld"


def test_with_an_advisor_the_assistant_is_silent_and_plugins_still_hear(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    heard = []
    hilo.gateway.plugins.unload("tools.asesor")  # which would pass the messages on
    hilo.plug(incoming_message=lambda message, context: heard.append((message.text, context.mode)))
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    hilo.done()
    hilo.rows("SELECT set_mode(:u, 'human', NULL, NULL)", u=ANA)
    twilio.receive(ANA, "¿me ayudas?")
    hilo.done(2)
    assert len(twilio.sent_to(ANA)) == 1 and heard[-1] == ("¿me ayudas?", "human")
    asked = [request for request in openai_server.requests if request.path == "/v1/responses"]
    assert len(asked) == 1


# --- What comes in besides text ---------------------------------------------------------------------------


def message(**fields: Any) -> Message:
    """A message with these fields."""
    return Message("SM1", ANA, **fields)


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (message(text="hola"), "hola"),
        (message(media=(Media("u", "audio/ogg"),)), "mensaje de voz"),
        (message(text="mira", media=(Media("u", "image/png"),)), "mira\n[El usuario envió una imagen"),
        (message(media=(Media("u", "application/pdf"), Media("v", "video/mp4"))), "un documento"),
        (message(media=(Media("u", ""),)), "un tipo de mensaje"),
        (message(media=(Media("u", "font/woff"),)), "un tipo de mensaje"),
        (message(text=" "), "un tipo de mensaje"),
        (message(raw={"ButtonText": "Sí"}), "Sí"),
    ],
)
def test_message_without_a_reader_is_never_nothing(given: Message, words: str) -> None:
    assert words in plain_input(given)


def test_file_is_had_from_twilio_with_its_credentials_and_from_nowhere_else(hilo: Hilo, twilio: Simulator) -> None:
    seen: dict[str, Any] = {}

    def incoming_message(message: Message, context: Any) -> list[Part]:
        seen["bytes"] = context.download(message.media[0])
        for url in ("https://evil.example/a.ogg", twilio.url.replace("http:", "https:") + "/x", "file:///etc/passwd"):
            try:
                context.download(Media(url, "audio/ogg"))
            except ToolError as error:
                seen[url] = str(error)
        try:
            context.download(message.media[0], limit=3)
        except ToolError as error:
            seen["limit"] = str(error)
        return []

    hilo.plug(incoming_message=incoming_message)
    twilio.receive(ANA, "", media=[(b"OggS datos", "audio/ogg")])
    hilo.done()
    assert seen.pop("bytes") == b"OggS datos"
    assert "larger" in seen.pop("limit")
    assert [text for text in seen.values()] == ["the file is not at Twilio"] * 3


def test_reply_is_quick_when_nothing_holds_it_up(hilo: Hilo, twilio: Simulator) -> None:
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    hilo.done()
    began = time.monotonic()
    twilio.receive(ANA, "otra vez")
    twilio.wait_for(ANA, 2)
    assert time.monotonic() - began < 3  # no net of five seconds, no poll of anything


# --- What stands between here and Twilio ------------------------------------------------------------------


def test_calls_take_the_proxy_that_the_environment_names(twilio: Simulator, monkeypatch: pytest.MonkeyPatch) -> None:
    with in_front(twilio) as (address, asked):
        monkeypatch.setenv("http_proxy", f"http://{address}")
        assert sent_by(twilio, "http://twilio.invalid") == twilio.sent_to(ANA)[0].sid
        assert [urlsplit(path).netloc for path in asked] == ["twilio.invalid"]
        monkeypatch.setenv("no_proxy", "twilio.invalid")
        with pytest.raises(NotSent, match="no connection to Twilio"):  # nobody knows that name
            sent_by(twilio, "http://twilio.invalid")
        assert len(asked) == 1
        monkeypatch.delenv("no_proxy")
    with pytest.raises(NotSent, match="no connection to the proxy"):
        sent_by(twilio, "http://twilio.invalid")


def test_certificates_that_the_environment_names_are_trusted_and_no_others(
    twilio: Simulator, certificate: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with in_front(twilio, certificate) as (address, asked):
        with pytest.raises(NotSent, match=r"certificate .*REQUESTS_CA_BUNDLE"):
            sent_by(twilio, f"https://{address}")
        assert asked == []
        monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificate))
        assert sent_by(twilio, f"https://{address}") == twilio.sent_to(ANA)[0].sid
