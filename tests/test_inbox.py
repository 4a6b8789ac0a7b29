"""Messages that arrive at the same moment: one commit for all, and none suffers from another."""

from __future__ import annotations

import contextlib
import json
import random
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pg8000.native
import pytest

from database import QUERIES, Database, DatabaseDown, DatabaseFault, connection_options
from inbox import Inbox, inbound
from tests.conftest import ANA, Server, free_port, wait_for

OTHERS = [f"whatsapp:+52155{n:08}" for n in range(6)]


@pytest.fixture
def db(database_url: str) -> Iterator[Database]:
    with contextlib.closing(Database(database_url, 8)) as database:
        yield database


def message(sender: str, sid: str, text: str = "hola") -> dict[str, Any]:
    """What is stored of a message."""
    return inbound({"MessageSid": sid, "From": sender, "To": "whatsapp:+14155238886", "Body": text}, 0)


def at_once(inbox: Inbox, messages: list[dict[str, Any]]) -> list[Future[Any]]:
    """Store messages that all wait for the same commit, in this order; returns when each has its outcome."""
    with ThreadPoolExecutor(len(messages)) as pool:
        inbox.leading = True  # as if one were under way
        stored = []
        for each in messages:
            stored.append(pool.submit(inbox.store, each))
            wait_for(lambda: len(inbox.waiting) == len(stored))
        inbox.commit([])  # it ends
    return stored


def test_messages_that_wait_for_a_commit_share_the_next_one(db: Database) -> None:
    stored = at_once(Inbox(db), [message(user, f"SM{n}") for n, user in enumerate(OTHERS)])
    rows = db.rows("SELECT sid, user_phone, xmin::text AS transaction FROM messages ORDER BY sid")
    assert [(row["sid"], row["user_phone"]) for row in rows] == [(f"SM{n}", user) for n, user in enumerate(OTHERS)]
    assert len({row["transaction"] for row in rows}) == 1
    runs = {row["id"]: row["user_phone"] for row in db.rows("SELECT id, user_phone FROM runs")}
    assert [runs[future.result()["id"]] for future in stored] == OTHERS  # each was told of its own


def test_one_users_messages_keep_their_order_and_make_one_run(db: Database) -> None:
    texts = [f"mensaje {n}" for n in range(8)]
    stored = at_once(Inbox(db), [message(ANA, f"SM{n}", text) for n, text in enumerate(texts)])
    assert [row["body"] for row in db.rows("SELECT body FROM messages ORDER BY id")] == texts
    assert db.rows("SELECT pending FROM runs") == [{"pending": 8}]
    assert len({future.result()["id"] for future in stored}) == 1


def test_message_that_came_twice_at_once_is_one_row(db: Database) -> None:
    stored = at_once(Inbox(db), [message(ANA, "SM1"), message(OTHERS[0], "SM2"), message(ANA, "SM1")])
    assert sorted(future.result() is None for future in stored) == [False, False, True]
    assert len(db.rows("SELECT FROM messages")) == 2


def test_message_that_the_database_refuses_costs_no_other_its_place(db: Database) -> None:
    bad = message(ANA, "SM9") | {"at": "ayer"}
    stored = at_once(Inbox(db), [bad, *(message(user, f"SM{n}") for n, user in enumerate(OTHERS))])
    with pytest.raises(DatabaseFault, match="22007"):
        stored[0].result()
    assert all(future.result() for future in stored[1:])
    assert len(db.rows("SELECT FROM messages")) == len(OTHERS)


def test_row_that_somebody_holds_keeps_only_its_own_user_waiting(db: Database, database_url: str) -> None:
    inbox = Inbox(db)
    inbox.store(message(ANA, "SM0"))
    with pg8000.native.Connection(**connection_options(database_url)) as holder, ThreadPoolExecutor(1) as pool:
        holder.run("BEGIN")
        holder.run("SELECT FROM users WHERE user_phone = :u FOR UPDATE", u=ANA)
        both = pool.submit(at_once, inbox, [message(ANA, "SM1"), message(OTHERS[0], "SM2")])
        wait_for(lambda: db.rows("SELECT FROM messages WHERE sid = 'SM2'"))
        assert not both.done()
        inbox.store(message(OTHERS[1], "SM3"))  # nor does who comes next wait for it
        holder.run("ROLLBACK")
        assert all(future.result() for future in both.result())
    assert len(db.rows("SELECT FROM messages")) == 4


def test_database_away_is_told_to_each() -> None:
    inbox = Inbox(Database(f"postgresql://u@127.0.0.1:{free_port()}/d"))
    for future in at_once(inbox, [message(user, f"SM{n}") for n, user in enumerate(OTHERS)]):
        with pytest.raises(DatabaseDown):
            future.result()


def test_row_that_somebody_holds_keeps_nobody_else_waiting_when_its_message_came_alone(
    db: Database, database_url: str
) -> None:
    db.HURRY = 2.0
    inbox = Inbox(db)
    inbox.store(message(ANA, "SM0"))
    with pg8000.native.Connection(**connection_options(database_url)) as holder, ThreadPoolExecutor(1) as pool:
        holder.run("BEGIN")
        holder.run("SELECT FROM users WHERE user_phone = :u FOR UPDATE", u=ANA)
        held = pool.submit(inbox.store, message(ANA, "SM1"))
        for n, user in enumerate(OTHERS, 2):
            inbox.store(message(user, f"SM{n}"))
        assert not held.done()
        with pytest.raises(DatabaseFault, match="55P03"):
            held.result(10)
        inbox.store(message(OTHERS[0], "SM9"))  # the database is not taken to hang
        holder.run("ROLLBACK")
    assert inbox.store(message(ANA, "SM1"))


def test_commit_that_hangs_is_not_everybodys(db: Database) -> None:
    inbox = Inbox(db)
    inbox.leading = True  # and stays so
    assert inbox.store(message(ANA, "SM1"))
    assert inbox.waiting == []


def test_who_was_stored_by_another_thread_learns_it_though_the_next_commit_hangs(db: Database) -> None:
    inbox = Inbox(db)
    inbox.leading = True
    with ThreadPoolExecutor(1) as pool:
        stored = pool.submit(inbox.store, message(ANA, "SM1"))
        wait_for(lambda: inbox.waiting)
        with inbox.lock:
            batch, inbox.waiting = inbox.waiting, []
            inbox.commit(batch)
            inbox.leading = True  # and stays so
        assert stored.result(10)
    assert [row["sid"] for row in db.rows("SELECT sid FROM messages")] == ["SM1"]


def test_language_that_a_message_shows_surely_outlasts_a_guess_from_the_next_of_the_same_commit(db: Database) -> None:
    sure = message(ANA, "SM1", "Olá, bom dia, quero informações sobre cursos")
    guessed = message(ANA, "SM2", "hello excel")
    assert (sure["language"], guessed["language"], guessed["guess"]) == ("pt", None, "en")
    at_once(Inbox(db), [sure, guessed])
    assert db.rows("SELECT language FROM users") == [{"language": "pt"}]


# --- One statement for all, or one function for each -------------------------------------------------------

ONE_BY_ONE = """
SELECT r.* FROM jsonb_to_recordset(:messages::jsonb) AS m (sid text, sender text, own text, external text, profile text,
        body text, raw jsonb, opt text, burst float8, at timestamptz, language text, guess text),
    receive_message(sid, sender, own, external, profile, body, raw, opt, burst, at,
        coalesce(m.language, (SELECT language FROM users WHERE user_phone = sender), guess)) r
"""
STORED = """
SELECT (SELECT jsonb_agg(to_jsonb(u) - 'created_at' ORDER BY user_phone) FROM users u) AS users,
    (SELECT jsonb_agg(to_jsonb(m) - 'id' ORDER BY sid) FROM messages m) AS messages,
    (SELECT jsonb_agg(to_jsonb(r) - '{id,created_at,due_at,started_at}'::text[]
        || jsonb_build_object('in', round(extract(epoch FROM due_at - now()) / 5)) ORDER BY user_phone, id)
        FROM runs r) AS runs
"""
MEANWHILE = (  # what workers make of a run between two commits
    "UPDATE runs SET held = true, due_at = now() + interval '45 s' WHERE user_phone = :u AND state <> 'done'",
    "UPDATE runs SET state = 'waiting', due_at = now() + interval '35 s' WHERE user_phone = :u AND state <> 'done'",
    "UPDATE runs SET tries = 1, due_at = now() + interval '25 s' WHERE user_phone = :u AND state <> 'done'",
    "UPDATE runs SET state = 'done' WHERE user_phone = :u AND state <> 'done'",
    "UPDATE runs SET created_at = now() - interval '95 s' WHERE user_phone = :u AND state <> 'done'",
    "UPDATE users SET mode = 'human' WHERE user_phone = :u",
)


def test_messages_stored_by_one_statement_leave_what_each_would_leave_by_itself(
    db: Database, postgres: Server
) -> None:
    dice, name = random.Random(3), postgres.create()
    texts = ["hola, quiero un curso", "hello, how are you?", "oi, tudo bem?", "ok", "hello excel", "¿y eso?", ""]
    with contextlib.closing(Database(postgres.named(name), 1)) as other:
        for round_ in range(60):
            batch = []
            for user in sorted(dice.sample(OTHERS, dice.randint(1, 5))):
                written = datetime(2026, 11, 26, tzinfo=UTC) + timedelta(minutes=dice.randint(-round_, round_))
                form = {
                    "MessageSid": f"SM{user[-1]}-{dice.randint(0, 25)}", "From": user, "Body": dice.choice(texts),
                    "To": f"whatsapp:+1415523888{dice.randint(0, 2)}", "ProfileName": dice.choice(["", "Ana", "Luis"]),
                }  # fmt: skip
                batch.append(inbound(form, dice.choice([0.0, 10.0, 30.0]), written))
            together = db.rows(QUERIES["receive"], {"messages": json.dumps(batch), "patience": "1s"})
            together.sort(key=lambda row: row["place"])
            apart = other.rows(ONE_BY_ONE, {"messages": json.dumps(batch)})
            assert [row["held"] for row in together] == [row["held"] for row in apart]
            assert db.rows(STORED) == other.rows(STORED), batch
            if dice.random() < 0.6:
                change, user = dice.choice(MEANWHILE), dice.choice(OTHERS)
                for each in (db, other):
                    each.rows(change, {"u": user})
    postgres.give_back(name)
