"""One person under several addresses: a number, a username, an ExternalUserId, in whatever order they come."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo, wait_for
from tests.local_openai import LocalOpenAI, says, script

USERNAME = "whatsapp:MX.ana22"
ID = {"ExternalUserId": "MX.ana22"}
OTHER_ID = {"ExternalUserId": "MX.9f3kq7"}  # one that is not the username itself
SEEN_AS = {
    "phone": (ANA, {}),
    "both": (ANA, ID),
    "username": (USERNAME, {}),
    "username and id": (USERNAME, ID),
    "phone and other id": (ANA, OTHER_ID),
    "username and other id": (USERNAME, OTHER_ID),
}


@pytest.fixture
def woken(start: Callable[..., Hilo]) -> Hilo:
    """A gateway that OpenAI's webhook wakes."""
    return start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)


def write(twilio: Simulator, hilo: Hilo, seen_as: str, text: str) -> str:
    """Write as somebody seen in a certain way, and return the address the answer went to."""
    address, fields = SEEN_AS[seen_as]
    before, runs = len(twilio.sent_to(address)), len(hilo.rows("SELECT id FROM runs"))
    twilio.receive(address, text, fields=fields)
    reply = twilio.wait_for(address, before + 1)[-1]
    hilo.done(runs + 1)
    assert reply.body == f"Eco: {text}"
    return reply.to


def conversation_texts(server: LocalOpenAI) -> list[list[str]]:
    """What each conversation at OpenAI holds, in order."""
    records = server.conversations.values()
    return [[part["text"] for item in record.items for part in item["content"]] for record in records]


# --- One row from the start --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "order",
    [
        ("phone", "both", "username"),
        ("username", "both", "phone"),
        ("username and id", "both", "phone", "username"),
        ("both", "phone", "username", "both"),
        ("username", "username and other id", "username", "phone and other id", "phone"),
    ],
    ids=" > ".join,
)
def test_person_seen_in_different_ways_keeps_one_thread_and_is_answered_where_they_write(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI, order: tuple[str, ...]
) -> None:
    for n, seen_as in enumerate(order):
        assert write(twilio, woken, seen_as, f"m{n}") == SEEN_AS[seen_as][0]
    assert len(woken.rows("SELECT * FROM users")) == 1
    told = [text for n in range(len(order)) for text in (f"m{n}", f"Eco: m{n}")]
    assert conversation_texts(openai_server) == [told]


def test_first_messages_at_the_same_moment_make_one_person(woken: Hilo, twilio: Simulator) -> None:
    ways = ["both", "username and id", "username"] * 4
    with ThreadPoolExecutor(12) as pool:
        seen = [SEEN_AS[way] for way in ways]
        answers = list(pool.map(lambda n: twilio.receive(seen[n][0], f"m{n}", fields=seen[n][1]), range(12)))
    assert [(answer.status, "<Message>" in answer.body) for answer in answers] == [(200, False)] * 12
    woken.done()
    assert len(woken.rows("SELECT * FROM users")) == 1
    assert woken.rows("SELECT count(*) AS n FROM messages WHERE direction = 'in'")[0]["n"] == 12


def test_number_that_comes_to_another_person_leaves_the_former_ones_history_with_them(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    write(twilio, woken, "both", "soy Ana")
    luis = "whatsapp:MX.luis"
    twilio.receive(luis, "soy Luis")
    twilio.wait_for(luis, 1)
    woken.done(2)
    twilio.receive(ANA, "cambié de número", fields={"ExternalUserId": "MX.luis"})
    twilio.wait_for(ANA, 2)
    woken.done(3)
    mine = "SELECT body FROM messages WHERE user_phone = :u AND direction = 'in' ORDER BY id"
    assert woken.rows(mine, u=luis) == [{"body": "soy Luis"}, {"body": "cambié de número"}]
    assert woken.rows(mine, u=ANA) == [{"body": "soy Ana"}]
    assert write(twilio, woken, "username", "sigo siendo Ana") == USERNAME
    assert woken.rows(mine, u=ANA)[-1] == {"body": "sigo siendo Ana"}


def test_newcomer_with_somebody_elses_former_number_is_told_nothing_of_them(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    twilio.receive(ANA, "soy Ana, mi clave es 7", fields={"ExternalUserId": "MX.x1"}, profile_name="Ana")
    twilio.wait_for(ANA, 1)
    woken.done(1)
    first = set(openai_server.conversations)
    woken.rows("SELECT set_mode(user_phone, 'human', NULL, now() + interval '1 hour') FROM users")
    twilio.receive(ANA, "soy Luis", fields={"ExternalUserId": "MX.x2"}, profile_name="Luis")
    twilio.wait_for(ANA, 2)
    woken.done(2)
    assert conversation_texts(openai_server)[-1] == ["soy Luis", "Eco: soy Luis"]
    (row,) = woken.rows("SELECT profile_name, mode, external_user_id FROM users")
    assert row == {"profile_name": "Luis", "mode": "bot", "external_user_id": "MX.x2"}
    gone = woken.rows("SELECT thread_id FROM discarded_threads WHERE due_at <= now()")
    assert {row["thread_id"] for row in gone} | (first - set(openai_server.conversations)) == first
    twilio.receive(ANA, "sigo", fields={"ExternalUserId": "MX.x2"}, profile_name="Luis")
    twilio.wait_for(ANA, 3)
    assert conversation_texts(openai_server)[-1][0] == "soy Luis"


def test_senders_without_a_channel_are_each_their_own_person(woken: Hilo, twilio: Simulator) -> None:
    for number in ("+5215511110001", "+5215511110002"):
        form = {"MessageSid": f"SM{number[1:]:0>32}", "From": number, "To": "+14155238886", "Body": "hola"}
        woken.gateway.receive(form)
    found = woken.rows("SELECT user_phone, external_user_id, reply_to FROM users ORDER BY 1")
    assert [(row["user_phone"], row["external_user_id"], row["reply_to"]) for row in found] == [
        (number, None, number) for number in ("+5215511110001", "+5215511110002")
    ]


# --- Two rows that turn out to be one person ---------------------------------------------------------------


@pytest.fixture
def two_rows(woken: Hilo, twilio: Simulator) -> Hilo:
    """A gateway that knows Ana twice: by her number, and by her username."""
    write(twilio, woken, "phone", "por número")
    write(twilio, woken, "username", "por usuario")
    assert len(woken.rows("SELECT * FROM users")) == 2
    return woken


def test_two_rows_of_one_person_become_one_whose_next_conversation_is_told_both_histories(
    two_rows: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    before = set(openai_server.conversations)
    write(twilio, two_rows, "both", "soy la misma")
    assert [row["user_phone"] for row in two_rows.rows("SELECT * FROM users")] == [USERNAME]
    left = two_rows.rows("SELECT thread_id FROM discarded_threads WHERE due_at > now() + interval '50 minutes'")
    assert {row["thread_id"] for row in left} == before and len(before) == 2
    told = ["por número", "Eco: por número", "por usuario", "Eco: por usuario", "soy la misma", "Eco: soy la misma"]
    assert conversation_texts(openai_server)[-1] == told
    write(twilio, two_rows, "phone", "y por número otra vez")
    assert len(two_rows.rows("SELECT * FROM users")) == 1
    assert conversation_texts(openai_server)[-1] == [*told, "y por número otra vez", "Eco: y por número otra vez"]


def test_person_who_left_under_one_address_has_left_under_both(two_rows: Hilo, twilio: Simulator) -> None:
    twilio.receive(ANA, "BAJA")
    twilio.wait_for(ANA, 2)
    two_rows.done(3)
    twilio.receive(ANA, "hola", fields=ID)
    two_rows.done(4)
    assert len(twilio.sent_to(ANA)) == 2
    assert [row["mode"] for row in two_rows.rows("SELECT * FROM users")] == ["out"]


def test_row_that_is_being_answered_is_made_one_with_the_other_afterwards(
    two_rows: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    with openai_server.gate("POST /v1/responses$") as gate:
        twilio.receive(ANA, "por número aún")
        assert gate.arrived.wait(5)
        twilio.receive(ANA, "soy la misma", fields=ID)
        assert len(two_rows.rows("SELECT * FROM users")) == 2
    replies = twilio.wait_for(ANA, 3)
    assert sorted(reply.body for reply in replies[1:]) == ["Eco: por número aún", "Eco: soy la misma"]
    two_rows.done(4)
    write(twilio, two_rows, "both", "listo")
    assert len(two_rows.rows("SELECT * FROM users")) == 1
    assert len(two_rows.rows("SELECT * FROM messages WHERE user_phone = :u", u=USERNAME)) == 10


def test_merged_rows_refer_to_one_user_everywhere(two_rows: Hilo, twilio: Simulator) -> None:
    write(twilio, two_rows, "both", "soy la misma")
    for table in ("messages", "runs", "oa_threads_map", "addresses"):
        found: list[dict[str, Any]] = two_rows.rows(f"SELECT DISTINCT user_phone FROM {table}")  # noqa: S608
        assert found == [{"user_phone": USERNAME}], table


# --- The language -----------------------------------------------------------------------------------------


def test_language_is_the_one_of_the_latest_text_that_shows_one(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = script([says("Hi.")] * 9)
    texts = [("ok", None), ("hello, how much is it?", "en"), ("2", "en"), ("obrigada", "pt"), ("ola", "pt"),
             ("Price Shoes", "pt"), ("hola, quiero Price Shoes", "es")]  # fmt: skip
    for n, (text, language) in enumerate(texts, 1):
        twilio.receive(ANA, text)
        twilio.wait_for(ANA, n)
        assert woken.rows("SELECT language FROM users") == [{"language": language}]


@pytest.mark.parametrize(
    ("text", "confirmation"),
    [
        ("hola", "Listo, ya no te"),
        ("hello, I need a course", "Done, we will"),
        ("oi, tudo bem?", "Pronto, não"),
    ],
)
def test_opt_out_is_confirmed_in_the_language_of_what_was_written_before(
    woken: Hilo, twilio: Simulator, text: str, confirmation: str
) -> None:
    twilio.receive(ANA, text)
    twilio.wait_for(ANA, 1)
    twilio.receive(ANA, "STOP")
    assert twilio.wait_for(ANA, 2)[1].body.startswith(confirmation)
    wait_for(lambda: woken.rows("SELECT mode FROM users") == [{"mode": "out"}])
