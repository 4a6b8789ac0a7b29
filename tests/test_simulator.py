"""The local Twilio, driven by Twilio's own SDK on one side and a small web application on the other."""

import socket
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest
import requests
from twilio.base.exceptions import TwilioException, TwilioRestException
from twilio.http.http_client import TwilioHttpClient
from twilio.rest import Client

from simulator import Media, Simulator, button_fields, location_fields
from tests.receiver import Receiver

ANA, LUIS = "whatsapp:+5215511110001", "whatsapp:+5215511110002"
SERVICE = "MG" + "a" * 32
CALLBACK = "/webhooks/twilio/status?m=7"


class Redirected(TwilioHttpClient):
    """Twilio's HTTP client with scheme and host of every domain replaced, as TWILIO_API_URL does."""

    def __init__(self, url: str) -> None:
        super().__init__(timeout=5)
        self.url = url

    def request(self, method: str, url: str, *args: Any, **kwargs: Any) -> Any:
        parts = urlsplit(url)
        path = parts.path + (f"?{parts.query}" if parts.query else "")
        return super().request(method, self.url + path, *args, **kwargs)


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.close()


@pytest.fixture
def twilio(receiver: Receiver) -> Iterator[Simulator]:
    with Simulator(receiver.url, open_since=datetime.now(UTC)) as simulator:
        yield simulator


@pytest.fixture
def client(twilio: Simulator) -> Iterator[Client]:
    http_client = Redirected(twilio.url)
    yield Client(twilio.account_sid, twilio.auth_token, http_client=http_client)
    http_client.session.close()


def send(client: Client, twilio: Simulator, to: str = ANA, **kwargs: Any) -> Any:
    return client.messages.create(**{"to": to, "from_": twilio.number, "body": "hola"} | kwargs)


# --- Messages: taking them ------------------------------------------------------------------------------------


def test_a_message_is_sent_by_the_sdk_and_comes_back_as_twilio_shows_it(client: Client, twilio: Simulator) -> None:
    sent = send(client, twilio, body="¡Hola, Ana! 👋")
    assert sent.sid.startswith("SM") and len(sent.sid) == 34
    assert (sent.status, sent.direction, sent.to, sent.from_) == ("queued", "outbound-api", ANA, twilio.number)
    assert sent.body == "¡Hola, Ana! 👋" and sent.error_code is None and sent.date_sent is None
    assert abs(sent.date_created - datetime.now(UTC)) < timedelta(seconds=5)
    assert [message.body for message in twilio.wait_for(ANA, 1)] == ["¡Hola, Ana! 👋"]
    twilio.wait_until(lambda: twilio.sent_to(ANA)[0].status == "read")
    fetched = client.messages(sent.sid).fetch()
    assert fetched.status == "read" and fetched.date_sent is not None


def test_a_template_through_a_messaging_service_is_kept_with_its_variables(
        client: Client, twilio: Simulator) -> None:
    content = "HX" + "b" * 32
    client.messages.create(to=ANA, messaging_service_sid=SERVICE, content_sid=content,
                           content_variables='{"1": "Ana"}')
    message = twilio.sent_to(ANA)[0]
    assert (message.content_sid, message.variables, message.service_sid) == (content, {"1": "Ana"}, SERVICE)


def test_a_messaging_service_accepts_a_message_before_it_has_chosen_a_sender(
        client: Client, twilio: Simulator) -> None:
    sent = client.messages.create(to=ANA, messaging_service_sid=SERVICE, body="hola")
    assert (sent.status, sent.from_) == ("accepted", None)
    twilio.wait_until(lambda: twilio.sent_to(ANA)[0].status == "read")
    assert client.messages(sent.sid).fetch().from_ == twilio.number


@pytest.mark.parametrize(("changes", "code"), [
    ({"to": ""}, 21604),
    ({"from_": ""}, 21603),
    ({"body": ""}, 21619),
    ({"to": "whatsapp:5512"}, 21211),
    ({"to": "+5215511110001"}, 21211),
    ({"from_": "whatsapp:+19990000000"}, 63007),
    ({"messaging_service_sid": "MGx"}, 21705),
    ({"body": "a" * 1601}, 21617),
    ({"body": "👋" * 801}, 21617),
    ({"content_sid": "HXx"}, 21655),
    ({"content_variables": "[1]"}, 21656),
    ({"media_url": ["ftp://example.com/x"]}, 21620),
    ({"status_callback": "gateway"}, 21609),
])
def test_a_message_that_twilio_refuses_is_refused_with_its_code(
        client: Client, twilio: Simulator, changes: dict[str, Any], code: int) -> None:
    with pytest.raises(TwilioRestException) as error:
        send(client, twilio, **changes)
    assert (error.value.status, error.value.code) == (400, code)
    assert twilio.messages == []


def test_a_body_of_1600_units_and_a_username_as_address_are_taken(client: Client, twilio: Simulator) -> None:
    send(client, twilio, "whatsapp:US.abcDEF123", body="👋" * 800)
    assert len(twilio.sent_to("whatsapp:US.abcDEF123")) == 1


def test_wrong_credentials_are_refused_as_twilio_does(twilio: Simulator) -> None:
    http_client = Redirected(twilio.url)
    with pytest.raises(TwilioRestException) as error:
        send(Client(twilio.account_sid, "wrong", http_client=http_client), twilio)
    http_client.session.close()
    assert (error.value.status, error.value.code) == (401, 20003)


def test_an_unknown_path_is_answered_with_a_twilio_body(twilio: Simulator) -> None:
    answer = requests.get(f"{twilio.url}/2010-04-01/Nothing.json", timeout=5)
    assert answer.status_code == 404 and answer.json()["code"] == 20404


@pytest.mark.parametrize(("method", "query", "status", "code"), [
    ("PUT", "", 405, 20004),
    ("GET", "?PageSize=many", 400, 20001),
    ("GET", "?Page=x", 400, 20001),
    ("GET", "?PageToken=PASMzz", 400, 20001),
])
def test_a_call_that_twilio_cannot_read_is_refused_with_a_twilio_body(
        twilio: Simulator, method: str, query: str, status: int, code: int) -> None:
    url = f"{twilio.url}/2010-04-01/Accounts/{twilio.account_sid}/Messages.json{query}"
    answer = requests.request(method, url, auth=(twilio.account_sid, twilio.auth_token), timeout=5)
    assert (answer.status_code, answer.json()["code"]) == (status, code)


# --- Messages: listing them -----------------------------------------------------------------------------------


def test_a_list_is_newest_first_filtered_by_address_and_paged(client: Client, twilio: Simulator) -> None:
    for number in range(5):
        send(client, twilio, body=str(number))
    send(client, twilio, LUIS, body="otro")
    assert [m.body for m in client.messages.list(to=ANA, page_size=2)] == ["4", "3", "2", "1", "0"]
    assert [m.body for m in client.messages.list(limit=2)] == ["otro", "4"]
    assert len(client.messages.list(from_=twilio.number)) == 6 and client.messages.list(from_=LUIS) == []


def test_a_message_that_arrives_between_two_pages_shifts_nothing(client: Client, twilio: Simulator) -> None:
    for number in range(4):
        send(client, twilio, body=str(number))
    page = client.messages.page(to=ANA, page_size=2)
    send(client, twilio, body="4")
    assert [m.body for m in page] + [m.body for m in page.next_page()] == ["3", "2", "1", "0"]


def test_date_filters_go_by_the_day_of_sending_and_leave_out_what_is_queued(receiver: Receiver) -> None:
    with Simulator(receiver.url, progress=[("queued", 0.0)], open_since=datetime.now(UTC)) as twilio:
        http_client = Redirected(twilio.url)
        client = Client(twilio.account_sid, twilio.auth_token, http_client=http_client)
        noon = datetime(2026, 11, 22, 12, tzinfo=UTC)
        twilio.receive(ANA, "ayer", at=noon)
        twilio.receive(ANA, "anteayer", at=noon - timedelta(days=1))
        send(client, twilio)
        found = {name: [m.body for m in client.messages.list(**{name: noon + timedelta(hours=6)})]
                 for name in ("date_sent", "date_sent_before", "date_sent_after")}
        http_client.session.close()
    assert found == {"date_sent": ["ayer"], "date_sent_before": ["ayer", "anteayer"], "date_sent_after": ["ayer"]}


def test_a_deleted_message_is_gone_and_one_on_its_way_cannot_be_deleted(receiver: Receiver) -> None:
    with Simulator(receiver.url, progress=[("queued", 0.0)]) as twilio:
        http_client = Redirected(twilio.url)
        client = Client(twilio.account_sid, twilio.auth_token, http_client=http_client)
        sid = twilio.receive(ANA, "hola").sid
        assert client.messages(sid).update(body="").body == ""
        assert client.messages(sid).delete()
        with pytest.raises(TwilioRestException) as gone:
            client.messages(sid).fetch()
        with pytest.raises(TwilioRestException) as busy:
            client.messages(send(client, twilio).sid).delete()
        http_client.session.close()
    assert (gone.value.status, busy.value.code) == (404, 20009)


# --- Webhooks -------------------------------------------------------------------------------------------------


def test_a_users_text_reaches_the_gateway_signed_with_the_fields_of_whatsapp(
        twilio: Simulator, receiver: Receiver) -> None:
    delivery = twilio.receive(ANA, "¿Hay cursos de inglés & más?", profile_name="Ana Pérez")
    form = receiver.forms[0]
    assert (delivery.status, delivery.body, receiver.signed) == (200, "<Response/>", [True])
    assert form["Body"] == "¿Hay cursos de inglés & más?" and form["MessageSid"] == delivery.sid
    assert (form["From"], form["To"], form["WaId"]) == (ANA, twilio.number, "5215511110001")
    assert (form["MessageType"], form["NumMedia"], form["ProfileName"]) == ("text", "0", "Ana Pérez")


def test_a_username_has_no_number_in_the_form(twilio: Simulator, receiver: Receiver) -> None:
    twilio.receive("whatsapp:US.abc", "hola", fields={"ExternalUserId": "u1"})
    assert "WaId" not in receiver.forms[0] and receiver.forms[0]["ExternalUserId"] == "u1"


def test_a_location_and_a_button_carry_their_fields(twilio: Simulator, receiver: Receiver) -> None:
    twilio.receive(ANA, fields=location_fields(19.43, -99.13, "Zócalo"))
    twilio.receive(ANA, "Sí", fields=button_fields("Sí", "si"))
    place, button = receiver.forms
    assert (place["MessageType"], place["Latitude"], place["Label"]) == ("location", "19.43", "Zócalo")
    assert (button["MessageType"], button["ButtonPayload"], button["Body"]) == ("button", "si", "Sí")


def test_signatures_by_a_shared_key_for_another_public_url_are_right(receiver: Receiver) -> None:
    receiver.public_url, receiver.secret = "https://hilo.example", "shared"
    with Simulator(receiver.url, webhook_secret="shared", public_url="https://hilo.example") as twilio:
        twilio.receive(ANA, "hola", algorithm="HMAC_SHA256")
    assert receiver.signed == [True]


def test_an_unsigned_webhook_carries_no_signature(twilio: Simulator, receiver: Receiver) -> None:
    twilio.receive(ANA, "hola", sign=False)
    assert receiver.signed == [False]


def test_a_message_is_on_the_list_though_its_webhook_was_lost(client: Client, twilio: Simulator,
                                                              receiver: Receiver) -> None:
    delivery = twilio.receive(ANA, "hola", lost=True)
    assert (delivery.status, receiver.forms) == (0, [])
    assert [m.sid for m in client.messages.list(from_=ANA)] == [delivery.sid]


def test_a_gateway_that_is_down_gives_status_0() -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # taken, and nobody listens
        with Simulator(f"http://127.0.0.1:{closed.getsockname()[1]}") as twilio:
            assert twilio.receive(ANA, "hola").status == 0


def test_the_same_sid_is_delivered_again_but_recorded_once(twilio: Simulator, receiver: Receiver) -> None:
    sid = twilio.receive(ANA, "hola").sid
    twilio.receive(ANA, "hola", sid=sid)
    assert [form["MessageSid"] for form in receiver.forms] == [sid, sid] and len(twilio.messages) == 1


def test_twiml_in_the_answer_becomes_messages_to_the_user(twilio: Simulator, receiver: Receiver) -> None:
    receiver.reply = ("<?xml version='1.0'?><Response><Message>Hola &amp; adiós</Message>"
                      "<Message><Body>dos</Body><Media>https://example.com/a.png</Media></Message></Response>")
    twilio.receive(ANA, "hola")
    first, second = twilio.sent_to(ANA)
    assert (first.body, first.direction) == ("Hola & adiós", "outbound-reply")
    assert (second.body, second.media[0].url) == ("dos", "https://example.com/a.png")


def test_many_threads_deliver_all_their_messages(twilio: Simulator, receiver: Receiver) -> None:
    def write(user: int) -> None:
        for number in range(50):
            twilio.receive(f"+52155{user:08}", str(number))

    threads = [threading.Thread(target=write, args=(user,)) for user in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len({form["MessageSid"] for form in receiver.forms}) == 400 == len(twilio.messages)
    assert all(receiver.signed)


# --- Media ----------------------------------------------------------------------------------------------------


def test_media_are_fetched_with_auth_and_by_a_redirect_without(client: Client, twilio: Simulator,
                                                               receiver: Receiver) -> None:
    sid = twilio.receive(ANA, media=[(b"OggS", "audio/ogg"), Media("image/png", b"PNG")]).sid
    form = receiver.forms[0]
    url, auth = form["MediaUrl0"], (twilio.account_sid, twilio.auth_token)
    assert (form["NumMedia"], form["MessageType"], form["MediaContentType0"]) == ("2", "audio", "audio/ogg")
    assert requests.get(url, timeout=5).status_code == 401
    assert requests.get(url, auth=auth, timeout=5).content == b"OggS"
    moved = requests.get(url, auth=auth, timeout=5, allow_redirects=False)
    assert moved.status_code == 307 and urlsplit(moved.headers["Location"]).netloc != urlsplit(url).netloc
    assert requests.get(moved.headers["Location"], auth=auth, timeout=5).status_code == 400
    listed = client.messages(sid).media.list()
    assert [media.content_type for media in listed] == ["audio/ogg", "image/png"]
    assert client.messages(sid).media(listed[0].sid).fetch().parent_sid == sid


def test_deleted_media_are_gone(client: Client, twilio: Simulator, receiver: Receiver) -> None:
    sid = twilio.receive(ANA, media=[(b"OggS", "audio/ogg")]).sid
    media = client.messages(sid).media.list()[0]
    assert media.delete() and client.messages(sid).media.list() == []
    auth = (twilio.account_sid, twilio.auth_token)
    assert requests.get(receiver.forms[0]["MediaUrl0"], auth=auth, timeout=5).status_code == 404


# --- Typing and credentials -----------------------------------------------------------------------------------


def test_a_typing_indicator_is_kept_and_marks_the_message_and_those_before_it_read(
        client: Client, twilio: Simulator) -> None:
    twilio.receive(ANA, "¿hola?")
    sid = twilio.receive(ANA, "hola").sid
    twilio.receive(ANA, "¿estás?")
    assert client.messaging.v2.typing_indicator.create(channel="whatsapp", message_id=sid).success
    assert [(typing.address, typing.message_sid) for typing in twilio.typing] == [(ANA, sid)]
    assert [message.status for message in twilio.messages] == ["read", "read", "delivered"]
    with pytest.raises(TwilioRestException):
        client.messaging.v2.typing_indicator.create(channel="whatsapp", message_id="SM" + "0" * 32)


def test_credentials_sender_and_service_can_be_looked_up(client: Client, twilio: Simulator) -> None:
    assert client.api.accounts(twilio.account_sid).fetch().status == "active"
    assert client.incoming_phone_numbers.list() == []
    sender = client.messaging.v2.channels_senders.list(channel="whatsapp")[0]
    assert sender.sender_id == twilio.number
    assert sender.webhook["callback_url"] == f"{twilio.gateway_url}/webhooks/twilio"
    assert client.messaging.v1.services(SERVICE).fetch().sid == SERVICE


# --- Status callbacks -----------------------------------------------------------------------------------------


def test_callbacks_follow_the_states_signed_with_their_query(client: Client, twilio: Simulator,
                                                             receiver: Receiver) -> None:
    sid = send(client, twilio, status_callback=twilio.gateway_url + CALLBACK).sid
    twilio.wait_until(lambda: len(twilio.callbacks) == 4)
    assert [form["MessageStatus"] for form in receiver.callbacks] == ["queued", "sent", "delivered", "read"]
    assert all(receiver.signed) and {(form["MessageSid"], form["m"]) for form in receiver.callbacks} == {(sid, "7")}


@pytest.mark.parametrize(("kind", "states"), [
    ("lost", []),
    ("repeat", ["queued", "queued", "sent", "sent", "delivered", "delivered", "read", "read"]),
    ("shuffle", ["queued", "read", "delivered", "sent"]),
])
def test_callbacks_go_wrong_on_demand(client: Client, twilio: Simulator, receiver: Receiver, kind: str,
                                      states: list[str]) -> None:
    twilio.fault("callback", kind, to=ANA)
    sid = send(client, twilio, status_callback=twilio.gateway_url + CALLBACK).sid
    send(client, twilio, LUIS, status_callback=twilio.gateway_url + CALLBACK)
    twilio.wait_until(lambda: twilio.sent_to(ANA)[0].status == "read" and len(twilio.callbacks) == len(states) + 4)
    assert [form["MessageStatus"] for form in receiver.callbacks if form["MessageSid"] == sid] == states


def test_an_undelivered_message_is_told_by_callback_with_its_code(client: Client, twilio: Simulator,
                                                                  receiver: Receiver) -> None:
    twilio.fault("send", "undeliver", code=63016)
    sid = send(client, twilio, status_callback=twilio.gateway_url + CALLBACK).sid
    twilio.wait_until(lambda: len(twilio.callbacks) == 3)
    last = receiver.callbacks[-1]
    assert (last["MessageStatus"], last["ErrorCode"], last["MessageSid"]) == ("undelivered", "63016", sid)
    assert client.messages(sid).fetch().error_code == 63016


@pytest.mark.parametrize(("wrote", "more", "state"), [
    (None, {}, "undelivered"),
    (timedelta(hours=25), {}, "undelivered"),
    (timedelta(hours=23), {}, "read"),
    (None, {"body": "", "content_sid": "HX" + "b" * 32}, "read"),
])
def test_outside_the_window_of_24_hours_only_a_template_is_delivered(
        client: Client, twilio: Simulator, receiver: Receiver, wrote: timedelta | None, more: dict[str, str],
        state: str) -> None:
    twilio.open_since = None
    if wrote:
        twilio.receive(ANA, "hola", at=datetime.now(UTC) - wrote)
    assert send(client, twilio, status_callback=twilio.gateway_url + CALLBACK, **more).status == "queued"
    twilio.wait_until(lambda: twilio.sent_to(ANA)[0].status == state)
    twilio.wait_until(lambda: twilio.callbacks and twilio.callbacks[-1].fields["MessageStatus"] == state)
    assert receiver.callbacks[-1].get("ErrorCode") == ("63016" if state == "undelivered" else None)


def test_with_callbacks_off_none_is_posted_and_the_states_advance(receiver: Receiver) -> None:
    with Simulator(receiver.url, callbacks=False, open_since=datetime.now(UTC)) as twilio:
        http_client = Redirected(twilio.url)
        send(Client(twilio.account_sid, twilio.auth_token, http_client=http_client), twilio,
             status_callback=receiver.url + CALLBACK)
        twilio.wait_until(lambda: twilio.sent_to(ANA)[0].status == "read")
        http_client.session.close()
    assert receiver.callbacks == []


# --- Faults ---------------------------------------------------------------------------------------------------


def test_an_armed_error_answers_as_many_sends_as_told_with_its_code(client: Client, twilio: Simulator) -> None:
    twilio.fault("send", "error", times=2, status=429, code=20429, retry_after=3)
    form = {"To": ANA, "From": twilio.number, "Body": "hola"}
    url = f"{twilio.url}/2010-04-01/Accounts/{twilio.account_sid}/Messages.json"
    answer = requests.post(url, form, auth=(twilio.account_sid, twilio.auth_token), timeout=5)
    assert (answer.status_code, answer.json()["code"], answer.headers["Retry-After"]) == (429, 20429, "3")
    with pytest.raises(TwilioRestException):
        send(client, twilio)
    assert send(client, twilio).sid


@pytest.mark.parametrize(("kind", "accepted"), [("cut", 1), ("refuse", 0)])
def test_a_connection_that_breaks_leaves_the_message_accepted_or_not(
        client: Client, twilio: Simulator, kind: str, accepted: int) -> None:
    twilio.fault("send", kind)
    with pytest.raises(requests.ConnectionError):
        send(client, twilio)
    assert len(twilio.sent_to(ANA)) == accepted


def test_a_gate_holds_the_answer_of_an_accepted_message(client: Client, twilio: Simulator) -> None:
    gate = twilio.gate(ANA)
    sent: list[Any] = []
    sender = threading.Thread(target=lambda: sent.append(send(client, twilio)))
    sender.start()
    assert gate.arrived.wait(5) and len(twilio.sent_to(ANA)) == 1 and not sent
    gate.release()
    sender.join(5)
    assert sent[0].sid == twilio.sent_to(ANA)[0].sid


def test_a_hang_answers_late_and_an_end_of_the_simulator_frees_it(receiver: Receiver) -> None:
    started = time.monotonic()
    with Simulator(receiver.url) as twilio:
        twilio.fault("send", "hang", seconds=60)
        http_client = Redirected(twilio.url)
        client = Client(twilio.account_sid, twilio.auth_token, http_client=http_client)
        sender = threading.Thread(target=lambda: send(client, twilio))
        sender.start()
        twilio.wait_for(ANA, 1)
    sender.join(5)
    http_client.session.close()
    assert not sender.is_alive() and time.monotonic() - started < 10


def test_a_failing_list_raises_the_sdks_plain_exception(client: Client, twilio: Simulator) -> None:
    twilio.fault("list", "error", status=503, code=20503)
    with pytest.raises(TwilioException) as error:
        client.messages.list(to=ANA)
    assert not isinstance(error.value, TwilioRestException)
    assert client.messages.list(to=ANA) == []


def test_webhooks_go_wrong_on_demand(twilio: Simulator, receiver: Receiver) -> None:
    twilio.fault("webhook", "lost")
    twilio.fault("webhook", "repeat")
    assert twilio.receive(ANA, "uno").status == 0
    assert twilio.receive(ANA, "dos").status == 200
    assert [form["Body"] for form in receiver.forms] == ["dos", "dos"]


def test_a_fault_that_does_not_exist_names_those_that_do(twilio: Simulator) -> None:
    with pytest.raises(ValueError, match="no fault 'vanish' on 'send'; there are send: cut, error"):
        twilio.fault("send", "vanish")


def test_cleared_faults_are_over(client: Client, twilio: Simulator) -> None:
    twilio.fault("send", "error", times=None)
    twilio.clear_faults()
    assert send(client, twilio).sid


def test_waiting_in_vain_says_what_came(twilio: Simulator) -> None:
    with pytest.raises(TimeoutError, match="0 of 1 messages to whatsapp"):
        twilio.wait_for(ANA, 1, timeout=0.05)
    with pytest.raises(TimeoutError):
        twilio.wait_until(lambda: False, timeout=0.05)


def test_the_simulator_listens_on_this_machine_only(twilio: Simulator) -> None:
    assert urlsplit(twilio.url).hostname == "127.0.0.1" == urlsplit(twilio.files_url).hostname
