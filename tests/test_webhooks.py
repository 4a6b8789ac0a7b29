"""What Twilio and OpenAI call: what is taken, what is refused and how, and the two health pages."""

from __future__ import annotations

import http.client
import json
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any
from urllib.parse import quote_plus, urlencode

import pytest
from twilio.request_validator import RequestValidator

from health import SCHEMA
from settings import load_settings
from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo, Server, environment, serving, wait_for
from tests.local_openai import LocalOpenAI, sign

FORM = {"Content-Type": "application/x-www-form-urlencoded"}
SHARED_KEY = {"X-Twilio-Webhooks-Signature-Settings": "key=webhooks_sharedkey_1,algorithm=HMAC_SHA256"}
INBOUND = "/webhooks/twilio"
Start = Callable[..., Hilo]


@pytest.fixture(scope="module")
def web(postgres: Server) -> Iterator[Hilo]:
    """A gateway that takes messages and answers none."""
    with serving(postgres, WORKER_THREADS="0", OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET) as (hilo, _, _):
        yield hilo


def request(
    hilo: Hilo, method: str, path: str, body: bytes | str = b"", headers: Mapping[str, str] | None = None
) -> tuple[int, str]:
    """The status and body of one HTTP request."""
    connection = http.client.HTTPConnection("127.0.0.1", hilo.settings.port, timeout=10)
    try:
        connection.request(method, path, body.encode() if isinstance(body, str) else body, dict(headers or {}))
        answer = connection.getresponse()
        return answer.status, answer.read().decode()
    finally:
        connection.close()


def fields(**more: str) -> dict[str, str]:
    """The form of an inbound message with a new sid."""
    fields.count += 1  # type: ignore[attr-defined]
    sid = f"SM{fields.count:032}"  # type: ignore[attr-defined]
    return {"MessageSid": sid, "From": ANA, "To": "whatsapp:+14155238886", "Body": "hola"} | more


fields.count = 0  # type: ignore[attr-defined]


def signature(hilo: Hilo, path: str, form: Mapping[str, str], algorithm: str = "HMAC_SHA1", token: str = "") -> str:
    """Twilio's signature of a form posted to PUBLIC_URL and this path."""
    validator = RequestValidator(token or hilo.settings.webhook_secret)
    return str(validator.compute_signature(hilo.settings.origin + path, form, algorithm))


def post(
    hilo: Hilo, form: Mapping[str, str], path: str = INBOUND, algorithm: str = "HMAC_SHA1", **headers: str
) -> tuple[int, str]:
    """Post a form as Twilio does, signed."""
    signed = {"X-Twilio-Signature": signature(hilo, path, form, algorithm), **FORM, **headers}
    return request(hilo, "POST", path, urlencode(form), signed)


def stored(hilo: Hilo, sid: str) -> dict[str, Any] | None:
    """The row of a message."""
    return next(iter(hilo.rows("SELECT * FROM messages WHERE sid = :sid", sid=sid)), None)


# --- Twilio: what is taken --------------------------------------------------------------------------------


def test_signed_message_is_stored_and_answered_with_empty_twiml(web: Hilo) -> None:
    form = fields()
    assert post(web, form) == (200, '<?xml version="1.0" encoding="UTF-8"?><Response/>')
    row = stored(web, form["MessageSid"])
    assert row and (row["body"], row["direction"], row["raw"]) == ("hola", "in", form)
    assert web.rows("SELECT user_phone FROM runs WHERE user_phone = :u AND state = 'queued'", u=ANA)


@pytest.mark.parametrize(
    "more",
    [
        {"Body": ""},
        {"ButtonText": "", "ReferralBody": "", "Zeta": ""},
        {"InventadoEn2027": "sí", "Otro[campo]": "a&b=c"},
        {"Body": "¿Cuánto cuesta? 👩‍🏫 + 50 % = ñ"},
        {"Body": "x" * 60_000},
        {"NumMedia": "²", "Latitude": "norte", "MessageType": "?"},
    ],
    ids=["empty body", "blank fields", "unknown parameters", "emoji", "long", "nonsense"],
)
def test_form_of_any_content_is_stored_whole(web: Hilo, more: dict[str, str]) -> None:
    form = fields(**more)
    assert post(web, form)[0] == 200
    row = stored(web, form["MessageSid"])
    assert row and row["raw"] == form and row["body"] == form["Body"]


def test_form_without_a_body_field_is_stored(web: Hilo) -> None:
    form = fields()
    del form["Body"]
    assert post(web, form)[0] == 200
    row = stored(web, form["MessageSid"])
    assert row and row["body"] == ""


def test_nul_characters_are_stripped_from_names_and_values(web: Hilo) -> None:
    form = fields(Body="ho\x00la\x00", **{"Cam\x00po": "v\x00"})
    assert post(web, form)[0] == 200
    row = stored(web, form["MessageSid"])
    assert row and row["body"] == "hola" and row["raw"]["Campo"] == "v"


@pytest.mark.parametrize(
    "path",
    [
        INBOUND + "?canal=a%20b&vacio=&x=1",
        "/webhooks/%74wilio",
        INBOUND + "?b=2&a=1&b=3",
        INBOUND + "?caf%C3%A9=s%C3%AD",
    ],
)
def test_signature_covers_path_and_query_as_they_came(web: Hilo, path: str) -> None:
    form = fields()
    assert post(web, form, path)[0] == 200
    assert stored(web, form["MessageSid"])


def test_signature_of_another_query_is_refused(web: Hilo) -> None:
    form = fields()
    signed = {"X-Twilio-Signature": signature(web, INBOUND + "?a=1", form), **FORM}
    assert request(web, "POST", INBOUND + "?a=2", urlencode(form), signed)[0] == 403


def test_host_header_plays_no_part(web: Hilo) -> None:
    form = fields()
    assert post(web, form, Host="interno.example:1234", **{"X-Forwarded-Host": "otro.example"})[0] == 200
    assert stored(web, form["MessageSid"])


def test_public_url_with_a_slash_at_its_end_is_the_same(start: Start, twilio: Simulator) -> None:
    hilo = start(WORKER_THREADS="0", PUBLIC_URL="https://hilo.example/")
    assert hilo.settings.origin == "https://hilo.example"
    assert post(hilo, fields())[0] == 200


def test_shared_key_signature_is_accepted(web: Hilo) -> None:
    form = fields()
    assert post(web, form, algorithm="HMAC_SHA256", **SHARED_KEY)[0] == 200
    assert stored(web, form["MessageSid"])


def test_webhook_secret_takes_the_place_of_the_token(start: Start, twilio: Simulator) -> None:
    hilo = start(WORKER_THREADS="0", TWILIO_WEBHOOK_SECRET="otra-llave-compartida")
    assert post(hilo, fields(), algorithm="HMAC_SHA256", **SHARED_KEY)[0] == 200
    form = fields()
    by_token = {"X-Twilio-Signature": signature(hilo, INBOUND, form, token=twilio.auth_token), **FORM}
    assert request(hilo, "POST", INBOUND, urlencode(form), by_token)[0] == 403


def test_one_message_delivered_many_times_at_once_is_one_row(web: Hilo) -> None:
    form = fields(From="whatsapp:+5215577770000")
    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(lambda _: post(web, form)[0], range(16)))
    assert statuses == [200] * 16
    assert web.rows("SELECT pending FROM runs WHERE user_phone = :u", u=form["From"]) == [{"pending": 1}]
    assert len(web.rows("SELECT id FROM messages WHERE sid = :s", s=form["MessageSid"])) == 1


def test_profile_number_and_username_make_one_user(web: Hilo) -> None:
    known = "whatsapp:+5215598765432"
    post(web, fields(From=known, ExternalUserId="MX.maria", ProfileName="María"))
    post(web, fields(From="whatsapp:MX.maria", ExternalUserId="MX.maria", ProfileName=""))
    rows = web.rows("SELECT user_phone, reply_to, profile_name FROM users WHERE external_user_id = 'MX.maria'")
    assert rows == [{"user_phone": known, "reply_to": "whatsapp:MX.maria", "profile_name": "María"}]


# --- Twilio: what is refused ------------------------------------------------------------------------------


def refused(hilo: Hilo, body: bytes | str, headers: Mapping[str, str]) -> tuple[int, str]:
    """Post what is to be refused: nothing may be stored, and the reason is one plain line."""
    count = "SELECT (SELECT count(*) FROM messages) + (SELECT count(*) FROM runs) + (SELECT count(*) FROM users) AS n"
    before = hilo.rows(count)
    status, reason = request(hilo, "POST", INBOUND, body, headers)
    assert hilo.rows(count) == before
    assert reason and "\n" not in reason and "<" not in reason and "Traceback" not in reason
    return status, reason


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"X-Twilio-Signature": ""},
        {"X-Twilio-Signature": "bm8="},
        {"X-Twilio-Signature": "señal"},
        {"X-Twilio-Signature": "x" * 4000},
        {"X-Twilio-Signature": "{good}", "X-Twilio-Webhooks-Signature-Settings": "algorithm=HMAC_MD5"},
        {"X-Twilio-Signature": "{good}", **SHARED_KEY},
        {"X-Twilio-Signature": "{other token}"},
    ],
    ids=["missing", "empty", "wrong", "non-ASCII", "long", "unknown algorithm", "wrong algorithm", "other token"],
)
def test_bad_signature_is_a_403_and_stores_nothing(web: Hilo, headers: dict[str, str]) -> None:
    form = fields()
    known = {"{good}": signature(web, INBOUND, form), "{other token}": signature(web, INBOUND, form, token="otro")}
    given = {name: known.get(value, value) for name, value in headers.items()}
    assert refused(web, urlencode(form), {**FORM, **given})[0] == 403


def test_changed_field_is_a_403(web: Hilo) -> None:
    form = fields()
    signed = {"X-Twilio-Signature": signature(web, INBOUND, form), **FORM}
    assert refused(web, urlencode(form | {"Body": "adiós"}), signed)[0] == 403


@pytest.mark.parametrize("kind", ["application/json", "multipart/form-data; boundary=x", "text/plain", ""])
def test_body_that_is_no_form_is_a_415(web: Hilo, kind: str) -> None:
    assert refused(web, "{}", {"X-Twilio-Signature": "x", "Content-Type": kind})[0] == 415


def test_form_with_a_charset_in_its_type_is_taken(web: Hilo) -> None:
    kind = {"Content-Type": "application/x-www-form-urlencoded; charset=UTF-8"}
    assert post(web, fields(), **kind)[0] == 200


@pytest.mark.parametrize("size", [64 * 1024 + 1, 200_000])
def test_body_over_64_kib_is_a_413(web: Hilo, size: int) -> None:
    assert refused(web, b"Body=" + b"x" * (size - 5), {"X-Twilio-Signature": "x", **FORM})[0] == 413


def test_body_of_64_kib_is_read(web: Hilo) -> None:
    form = fields()
    form["Body"] = "x" * (64 * 1024 - len(urlencode(form | {"Body": ""})))
    assert len(urlencode(form)) == 64 * 1024
    assert post(web, form)[0] == 200


def test_enormous_body_is_a_413_before_it_is_read(web: Hilo) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", web.settings.port, timeout=10)
    connection.putrequest("POST", INBOUND)
    for name, value in {"X-Twilio-Signature": "x", "Content-Length": str(1 << 40), **FORM}.items():
        connection.putheader(name, value)
    connection.endheaders()
    assert connection.getresponse().status == 413
    connection.close()


@pytest.mark.parametrize("body", [b"Body=\xff\xfe", b"Body=%FF%FE", b"Body=%ED%A0%80", b"&".join([b"a=1"] * 600)])
def test_body_that_is_not_utf_8_or_no_form_at_all_is_a_400(web: Hilo, body: bytes) -> None:
    assert refused(web, body, {"X-Twilio-Signature": "x", **FORM})[0] == 400


@pytest.mark.parametrize("name", ["MessageSid", "From", "To"])
@pytest.mark.parametrize("value", [None, "", "\x00"])
def test_form_without_a_needed_field_is_a_400_that_names_it(web: Hilo, name: str, value: str | None) -> None:
    form = {key: text for key, text in fields(**{name: value or ""}).items() if key != name or value is not None}
    signed = {"X-Twilio-Signature": signature(web, INBOUND, form), **FORM}
    status, reason = refused(web, urlencode(form), signed)
    assert status == 400 and name in reason


@pytest.mark.parametrize(
    ("lacking", "more"),
    [
        ("TWILIO_AUTH_TOKEN", {"TWILIO_AUTH_TOKEN": ""}),
        ("PUBLIC_URL", {"PUBLIC_URL": ""}),
    ],
)
def test_without_token_or_public_url_webhooks_are_a_503_that_names_it(
    start: Start, lacking: str, more: dict[str, str]
) -> None:
    hilo = start(WORKER_THREADS="0", **more)
    status, reason = refused(hilo, urlencode(fields()), {"X-Twilio-Signature": "x", **FORM})
    assert status == 503 and lacking in reason
    assert request(hilo, "POST", INBOUND + "/status?m=1", "", {"X-Twilio-Signature": "x", **FORM})[0] == 503
    status, page = request(hilo, "GET", "/")
    assert status == 503
    assert json.loads(page)["twilio"] == {"configured": False, "error": f"{lacking} is not set"}


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", INBOUND, 405), ("PUT", INBOUND, 405), ("GET", "/nada", 404), ("POST", "/", 405)],
)
def test_address_that_is_none_is_one_line(web: Hilo, method: str, path: str, status: int) -> None:
    got, reason = request(web, method, path)
    assert got == status and reason and "\n" not in reason and "<" not in reason


def test_refusal_is_logged_without_the_text_or_the_number(web: Hilo, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "hilo")
    form = fields(Body="muy privado")
    request(web, "POST", INBOUND, urlencode(form), {"X-Twilio-Signature": "bm8=", **FORM})
    assert "403" in caplog.text
    assert "privado" not in caplog.text and "5511110001" not in caplog.text


# --- The database is away ---------------------------------------------------------------------------------


@pytest.fixture
def cut_off(twilio: Simulator, openai_server: LocalOpenAI) -> Iterator[Hilo]:
    """A gateway whose database is not there."""
    url = "postgresql://hilo:clave-secreta@127.0.0.1:9/hilo"
    more = {"WORKER_THREADS": "0", "OPENAI_WEBHOOK_SECRET": WEBHOOK_SECRET}
    hilo = Hilo(load_settings(environment(url, twilio, openai_server, **more))).start()
    yield hilo
    hilo.stop()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [("quiero un curso", "respondemos"), ("what courses do you have?", "we will answer"), ("", "respondemos")],
)
def test_database_away_is_told_to_the_user_at_once(cut_off: Hilo, text: str, sentence: str) -> None:
    status, body = post(cut_off, fields(Body=text))
    assert status == 200 and body.startswith("<Response><Message>") and sentence in body


def test_database_away_leaves_callbacks_to_be_sent_again(cut_off: Hilo) -> None:
    status, reason = post(cut_off, {"MessageSid": "SM1", "MessageStatus": "sent"}, INBOUND + "/status?m=1")
    assert (status, "secreta" in reason) == (503, False)
    assert deliver(cut_off, EVENT)[0] == 503


def test_database_away_is_a_503_at_the_health_page_without_the_password(cut_off: Hilo) -> None:
    status, body = request(cut_off, "GET", "/")
    assert status == 503 and json.loads(body)["database"]["ok"] is False
    assert "clave-secreta" not in body


def test_database_without_tables_is_a_503_and_an_outage(
    empty_database_url: str, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = Hilo(load_settings(environment(empty_database_url, twilio, openai_server, WORKER_THREADS="0"))).start()
    try:
        assert "<Message>" in post(hilo, fields())[1]
        status, page = request(hilo, "GET", "/")
        database = json.loads(page)["database"]
        assert (status, database["ok"], database["schema"]) == (503, False, {"version": None, "needed": SCHEMA})
        assert database["error"] == "the schema is missing: run python gateway.py migrate"
    finally:
        hilo.stop()


def test_message_that_could_not_be_stored_is_fetched_from_twilio_and_answered_once(
    start: Start, twilio: Simulator
) -> None:
    hilo = start(WORKER_THREADS="0")
    wait_for(lambda: hilo.gateway.upkeep.next_catch_up > time.monotonic() + 62)  # the one at the start is over
    hilo.rows("UPDATE hilo SET value = '2026-01-01T00:00:00Z' WHERE key = 'caught_up_to'")
    twilio.receive(ANA, "esta llegó")
    missed = twilio.receive(ANA, "esta se perdió", lost=True)
    for message in twilio.messages:
        message.created = message.sent = message.created - timedelta(minutes=2)
    fresh = twilio.receive(ANA, "esta puede llegar todavía", lost=True)
    hilo.gateway.upkeep.next_catch_up = 0.0
    hilo.gateway.upkeep.catch_up()
    bodies = [row["body"] for row in hilo.rows("SELECT body FROM messages ORDER BY id")]
    assert bodies == ["esta llegó", "esta se perdió"]
    assert stored(hilo, missed.sid) and not stored(hilo, fresh.sid)
    hilo.gateway.upkeep.next_catch_up = 0.0
    hilo.gateway.upkeep.catch_up()
    assert hilo.rows("SELECT count(*) AS n FROM messages")[0]["n"] == 2


# --- Status callbacks -------------------------------------------------------------------------------------


def part(hilo: Hilo, state: str = "sending", sid: str | None = None) -> int:
    """The id of an outbound row."""
    sql = """INSERT INTO messages (user_phone, direction, body, state, sid, run_id)
        VALUES ('whatsapp:+520000000', 'out', 'x', :s, :sid, 0) RETURNING id"""
    return int(hilo.rows(sql, s=state, sid=sid)[0]["id"])


def call_back(hilo: Hilo, number: int | str | None, status: str, sid: str = "", **more: str) -> int:
    """Post a status callback."""
    path = f"{INBOUND}/status" + ("" if number is None else f"?m={quote_plus(str(number))}")
    return post(hilo, {"MessageSid": sid or f"SMx{number}", "MessageStatus": status, **more}, path)[0]


def state(hilo: Hilo, number: int) -> dict[str, Any]:
    return hilo.rows("SELECT state, sid, error_code FROM messages WHERE id = :id", id=number)[0]


@pytest.mark.parametrize(
    ("statuses", "ends"),
    [
        (["queued", "sent", "delivered", "read"], "read"),
        (["read", "delivered", "sent", "queued"], "read"),
        (["delivered", "undelivered", "failed"], "delivered"),
        (["undelivered", "sent", "queued"], "undelivered"),
        (["failed", "delivered"], "delivered"),
        (["sent", "inventado", ""], "sent"),
    ],
    ids=" ".join,
)
def test_state_of_a_part_only_rises(web: Hilo, statuses: list[str], ends: str) -> None:
    number = part(web, "queued")
    assert [call_back(web, number, status) for status in statuses] == [200] * len(statuses)
    assert state(web, number)["state"] == ends


def test_callback_before_the_sender_saved_the_sid_supplies_it(web: Hilo) -> None:
    number = part(web)
    call_back(web, number, "sent", sid="SMtemprano")
    assert state(web, number)["sid"] == "SMtemprano"
    web.db.one("finish", id=0, a=0, burst=0.0, part=number, sid="SMtemprano")
    assert state(web, number) == {"state": "sent", "sid": "SMtemprano", "error_code": None}


def test_sender_that_saves_late_does_not_lower_the_state(web: Hilo) -> None:
    number = part(web)
    call_back(web, number, "delivered", sid="SMrapido")
    web.db.one("finish", id=0, a=0, burst=0.0, part=number, sid="SMrapido")
    assert state(web, number)["state"] == "delivered"


def test_callback_without_the_row_finds_it_by_the_sid(web: Hilo) -> None:
    number = part(web, "sent", "SMporSid")
    assert call_back(web, None, "delivered", sid="SMporSid") == 200
    assert state(web, number)["state"] == "delivered"


def test_nul_in_the_sid_of_a_callback_is_no_part_of_it(web: Hilo) -> None:
    number = part(web)
    assert [call_back(web, number, "sent", sid=sid) for sid in ("\x00", "SMnu\x00lo")] == [200, 200]
    assert state(web, number)["sid"] == "SMnulo"


@pytest.mark.parametrize("number", [987654321, "²", "9" * 30, "-1", "abc", "", "1 OR 1=1", None])
def test_callback_for_no_row_of_ours_changes_nothing(web: Hilo, number: Any) -> None:
    everything = "SELECT id, state, sid FROM messages ORDER BY id"
    before = web.rows(everything)
    assert call_back(web, number, "delivered", sid="SMajeno") == 200
    assert web.rows(everything) == before


def test_callback_for_an_inbound_row_changes_nothing(web: Hilo) -> None:
    form = fields()
    post(web, form)
    row = stored(web, form["MessageSid"])
    assert row and call_back(web, row["id"], "failed") == 200
    assert stored(web, form["MessageSid"]) == row


@pytest.mark.parametrize("code", ["abc", "9" * 20, "²", "-5", ""])
def test_error_code_that_is_none_is_left_out(web: Hilo, code: str) -> None:
    number = part(web, "sent")
    assert call_back(web, number, "undelivered", ErrorCode=code) == 200
    assert state(web, number)["error_code"] is None and state(web, number)["state"] == "undelivered"


def test_forged_callback_is_a_403(web: Hilo) -> None:
    number = part(web)
    body = urlencode({"MessageSid": "SM", "MessageStatus": "read"})
    headers = {"X-Twilio-Signature": "bm8=", **FORM}
    assert request(web, "POST", f"{INBOUND}/status?m={number}", body, headers)[0] == 403
    other = {
        "X-Twilio-Signature": signature(web, f"{INBOUND}/status?m=1", {"MessageSid": "SM", "MessageStatus": "read"})
    }
    assert request(web, "POST", f"{INBOUND}/status?m={number}", body, {**other, **FORM})[0] == 403
    assert state(web, number)["state"] == "sending"


# --- OpenAI's webhook -------------------------------------------------------------------------------------

EVENT = {
    "object": "event",
    "id": "evt_1",
    "type": "response.completed",
    "created_at": 0,
    "data": {"id": "resp_desconocida"},
}


def deliver(hilo: Hilo, event: Any, **changes: str | None) -> tuple[int, str]:
    """Post an event, signed; `changes` replace headers (without "webhook-"), None leaves one out."""
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    now = int(changes.pop("at", None) or time.time())
    headers: dict[str, str | None] = {
        "webhook-id": "evt_1",
        "webhook-timestamp": str(now),
        "webhook-signature": sign(WEBHOOK_SECRET, "evt_1", now, body),
        "Content-Type": "application/json",
    }
    headers |= {f"webhook-{name}": value for name, value in changes.items()}
    return request(hilo, "POST", "/webhooks/openai", body, {k: v for k, v in headers.items() if v is not None})


def test_event_of_a_response_is_noted_though_the_response_is_not_known_yet(web: Hilo) -> None:
    event = {**EVENT, "data": {"id": "resp_temprana"}}
    assert deliver(web, event) == (200, "") == deliver(web, event)
    assert web.rows("SELECT ended_at IS NOT NULL AS ended FROM responses WHERE id = 'resp_temprana'") == [
        {"ended": True}
    ]


@pytest.mark.parametrize(
    "changes",
    [
        {"id": None}, {"timestamp": None}, {"signature": None}, {"signature": ""}, {"signature": "v1,bm8="},
        {"signature": "v1,señal"}, {"signature": "v1"}, {"id": "evt_2"}, {"timestamp": "ayer"}, {"timestamp": "1"},
        {"timestamp": "99999999999"}, {"at": "1000000000"}, {"timestamp": "9" * 5000},
    ],
    ids=str,
)  # fmt: skip
def test_event_that_is_not_signed_well_is_a_400(web: Hilo, changes: dict[str, str | None]) -> None:
    status, reason = deliver(web, EVENT, **changes)
    assert status == 400 and reason and "\n" not in reason


@pytest.mark.parametrize(
    "body", [b"", b"{", b"\xff\xfe", b"null", b"[]", b'"texto"', b"7", b"{}", b'{"type": null}'], ids=repr
)
def test_signed_body_that_is_no_event_is_a_400(web: Hilo, body: bytes) -> None:
    assert deliver(web, body)[0] == 400


@pytest.mark.parametrize(
    "event",
    [
        {**EVENT, "type": "inventado.en_2027", "data": {"id": "x_1"}},
        {**EVENT, "type": "inventado.en_2027", "data": {}},
        {**EVENT, "type": "inventado.en_2027", "data": None},
        {"id": "evt_1", "type": "safety.alert.created"},
        {**EVENT, "type": "batch.completed", "data": {"id": "batch_1"}},
        {**EVENT, "type": "realtime.call.incoming", "data": {"call_id": "rtc_1", "sip_headers": []}},
        {**EVENT, "type": "response.inventado", "data": {"id": 7}},
    ],
    ids=lambda event: f"{event['type']} {event.get('data')}",
)
def test_event_of_another_kind_is_accepted_and_ignored(web: Hilo, event: dict[str, Any]) -> None:
    before = web.rows("SELECT count(*) AS n FROM responses")
    assert deliver(web, event) == (200, "")
    assert web.rows("SELECT count(*) AS n FROM responses") == before


def test_response_id_that_no_database_takes_is_accepted_and_ignored(web: Hilo) -> None:
    assert deliver(web, {**EVENT, "data": {"id": "resp_\x00"}})[0] == 200
    assert deliver(web, {**EVENT, "data": {"id": "resp_\ud800"}})[0] == 200


def test_one_of_several_signatures_suffices_while_a_secret_is_changed(web: Hilo) -> None:
    body, now = json.dumps(EVENT).encode(), int(time.time())
    both = sign(f"whsec_bnVldm8= {WEBHOOK_SECRET}", "evt_1", now, body)
    assert deliver(web, body, at=str(now), signature=both)[0] == 200


def test_without_a_secret_the_webhook_is_a_404(start: Start) -> None:
    hilo = start(WORKER_THREADS="0")
    status, reason = deliver(hilo, EVENT)
    assert status == 404 and "OPENAI_WEBHOOK_SECRET" in reason
    assert json.loads(request(hilo, "GET", "/webhooks/openai/health")[1]) == {"configured": False, "last_event": None}


def test_webhook_is_verified_without_an_api_key(start: Start) -> None:
    hilo = start(WORKER_THREADS="0", OPENAI_API_KEY="", OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    assert deliver(hilo, EVENT)[0] == 200
    assert deliver(hilo, EVENT, signature="v1,bm8=")[0] == 400


def test_openai_health_says_when_the_last_event_came(web: Hilo) -> None:
    deliver(web, EVENT)
    body = json.loads(request(web, "GET", "/webhooks/openai/health")[1])
    assert body["configured"] is True and body["last_event"].startswith(time.strftime("%Y-%m-%dT", time.gmtime()))


def test_last_event_is_known_to_every_process_and_after_a_restart(start: Start) -> None:
    more = {"WORKER_THREADS": "0", "OPENAI_WEBHOOK_SECRET": WEBHOOK_SECRET}
    hilo, other = start(**more), start(**more)
    assert [deliver(hilo, EVENT)[0] for _ in range(2)] == [200, 200]
    pages = [json.loads(request(one, "GET", "/webhooks/openai/health")[1]) for one in (hilo, other)]
    ours, theirs = (page["last_event"] for page in pages)
    assert ours > theirs > "2026"  # the first of the two was noted for others, the second came too soon after it
    assert json.loads(request(other, "GET", "/")[1])["openai_webhook"] == {"configured": True, "last_event": theirs}


# --- The health page --------------------------------------------------------------------------------------


def test_health_page_has_every_part_and_no_secret_or_number(web: Hilo) -> None:
    post(web, fields())
    status, body = request(web, "GET", "/")
    page = json.loads(body)
    assert status == 200 and page["status"] == "ok"
    assert set(page) >= {"status", "database", "assistant", "twilio", "openai_webhook", "plugins", "runs", "version"}
    assert page["database"] == {"ok": True, "error": None, "schema": {"version": SCHEMA, "needed": SCHEMA}}
    assert page["runs"]["queued"] >= 1 and page["runs"]["oldest_due_seconds"] >= 0
    assert page["assistant"] == {"id": "cursos", "model": "gpt-6-luna", "enabled": True, "error": None}
    files = {plugin["file"]: plugin for plugin in page["plugins"]}
    assert "buscar_curso" in files["tools/cursos.py"]["tools"] and files["tools/cursos.py"]["error"] is None
    for secret in (*web.settings.secrets(), "5511110001"):
        assert secret not in body


def test_health_page_shows_a_plugin_that_failed_and_serves_on(start: Start) -> None:
    hilo = start(WORKER_THREADS="0")

    def fallback_repply() -> None:
        """A misspelt hook."""

    hilo.plug(fallback_repply=fallback_repply)
    status, body = request(hilo, "GET", "/")
    assert status == 200
    assert ["fallback_repply" in plugin["error"] for plugin in json.loads(body)["plugins"] if plugin["error"]] == [True]


def test_health_page_shows_of_a_failed_plugins_own_error_its_place_and_class_only(start: Start) -> None:
    hilo = start(WORKER_THREADS="0")
    token = hilo.settings.webhook_secret

    def fails(error: Exception) -> Callable[[], Any]:
        def load() -> Any:
            raise error

        return load

    for n, error in enumerate((RuntimeError("clave-del-crm"), ImportError(f"no {token} +5215511110001 (/srv/x/y.so)"))):
        hilo.gateway.plugins.load(f"malo{n}", fails(error), f"tools/malo{n}.py")
    _, body = request(hilo, "GET", "/")
    found = [plugin["error"].partition(": ") for plugin in json.loads(body)["plugins"] if plugin["error"]]
    assert [place.partition(":")[0] for place, _, _ in found] == ["test_webhooks.py"] * 2
    assert [what for _, _, what in found] == ["RuntimeError", "ImportError: no (secret) +52…0001 (y.so)"]
    assert "clave-del-crm" in (hilo.gateway.plugins.reports["malo0"].error or "")  # for `tools` and `check`


def test_schema_older_than_the_code_is_a_503_that_says_so(start: Start) -> None:
    hilo = start(WORKER_THREADS="0")
    hilo.rows("UPDATE hilo SET value = '3' WHERE key = 'schema_version'")
    status, body = request(hilo, "GET", "/")
    database = json.loads(body)["database"]
    assert (status, database["ok"], database["schema"]["version"]) == (503, False, 3)
    assert "version 3" in database["error"] and "gateway.py migrate" in database["error"]


@pytest.mark.parametrize(
    ("more", "error"),
    [
        ({"ASSISTANT_ID": "asst_abc123"}, "2026-08-26"),
        ({"ASSISTANT_ID": "pmpt_abc123"}, "2026-11-30"),
        ({"ASSISTANT_ID": "ventas"}, "assistants/ventas.md: no such file"),
        ({"OPENAI_API_KEY": ""}, "OPENAI_API_KEY is not set"),
        ({"ASSISTANT_ID": ""}, "ASSISTANT_ID is not set"),
        ({"OPENAI_API_KEY": "", "ASSISTANT_ID": ""}, "OPENAI_API_KEY and ASSISTANT_ID are not set"),
        ({"THREADS_INTEGRATION_ENABLED": "false"}, "switched off"),
    ],
)
def test_health_page_says_why_no_assistant_answers(start: Start, more: dict[str, str], error: str) -> None:
    status, body = request(start(WORKER_THREADS="0", **more), "GET", "/")
    assistant = json.loads(body)["assistant"]
    assert status == 200 and assistant["enabled"] is False
    assert error in assistant["error"] and ("not set" not in error or assistant["error"] == error)
