"""Forget a user: what OpenAI and Twilio keep of them, then every row.

What is elsewhere goes first, and the rows that lead to it only once it is gone: so a run that OpenAI or Twilio broke
off can be repeated, and a second one finds nothing to do. What the user writes meanwhile is a newcomer's: it is
answered, and stays.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pg8000.native
import requests
from twilio.base.exceptions import TwilioException, TwilioRestException

from database import Database
from reports import named, names_of, users_named
from settings import Settings, mask
from whatsapp import NotSent, WhatsApp

if TYPE_CHECKING:
    from gateway import ThreadsAdapter

BEGIN = "SELECT * FROM begin_forgetting(:who)"

# All that was said to and by the user, what others were told of it, their answers to that, and what they wrote to the
# user, with what they were told then; of several messages in a row, those whose reply went to others only are left.
MESSAGES = """
WITH of_user AS (SELECT id FROM runs WHERE user_phone = ANY(:who) AND id <= :last_run),
mine AS (
    SELECT id, sid, run_id FROM messages
    WHERE user_phone = ANY(:who) AND id <= :last_message OR run_id IN (SELECT id FROM of_user)),
relayed AS (
    SELECT r.id, r.user_phone FROM runs r WHERE r.user_phone <> ALL(:who) AND r.id IN (SELECT run_id FROM mine))
SELECT m.id, m.sid, m.raw ->> 'From' AS sender, m.direction, m.user_phone FROM messages m
LEFT JOIN relayed r ON r.id = m.run_id
WHERE m.id IN (SELECT id FROM mine) OR m.raw ->> 'OriginalRepliedMessageSid' IN (SELECT sid FROM mine)
    OR m.direction = 'out' AND m.user_phone = r.user_phone
    OR m.direction = 'in' AND r.id IS NOT NULL AND (m.reply IS NULL
        OR jsonb_path_exists(m.reply, '$[*] ? (@.to == $who[*])', jsonb_build_object('who', to_jsonb(:who::text[]))))
"""

# Others were told of the user: so were their conversations, which are told what was said before they began.
DELETE_MESSAGES = """
WITH gone AS (DELETE FROM messages WHERE id = ANY(:ids) RETURNING user_phone, at),
others AS (SELECT user_phone, min(at) AS since FROM gone WHERE user_phone <> ALL(:who) GROUP BY user_phone),
current AS (DELETE FROM oa_threads_map o USING others WHERE o.user_phone = others.user_phone RETURNING o.thread_id),
threads AS (
    SELECT thread_id FROM current
    UNION SELECT thread_id FROM runs r JOIN others USING (user_phone) WHERE r.created_at >= others.since),
k AS (
    INSERT INTO discarded_threads (thread_id) SELECT thread_id FROM threads WHERE starts_with(thread_id, 'conv_')
    ON CONFLICT DO NOTHING RETURNING 1)
SELECT (SELECT count(*) FROM gone) AS gone, (SELECT count(*) FROM k) AS discarded
"""

NEWER = "SELECT sid FROM messages WHERE user_phone = ANY(:who) AND id > :last_message AND sid IS NOT NULL"

ADDRESSES = """
SELECT unnest(ARRAY[user_phone, reply_to]) AS address FROM users WHERE user_phone = ANY(:who)
UNION SELECT address FROM addresses WHERE user_phone = ANY(:who)
"""

OF_RUNS = "run_id IN (SELECT id FROM runs WHERE user_phone = ANY(:who) AND id <= :last_run)"
RESPONSES = f"SELECT id FROM responses WHERE {OF_RUNS}"  # noqa: S608

THREADS = """
SELECT thread_id FROM oa_threads_map WHERE user_phone = ANY(:who)
UNION SELECT thread_id FROM runs WHERE user_phone = ANY(:who) AND id <= :last_run AND thread_id IS NOT NULL
"""

# What somebody else had sent to the user meanwhile, where that is no newcomer.
ORPHANS = "user_phone = ANY(:who) AND NOT EXISTS (SELECT FROM users u WHERE u.user_phone = messages.user_phone)"

# Plugins' tables: by convention a user's rows have a column user_phone.
OTHER_TABLES = """
SELECT table_name AS name
FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
WHERE table_schema = current_schema() AND column_name = 'user_phone' AND table_type = 'BASE TABLE'
    AND table_name NOT IN ('users', 'addresses', 'messages', 'runs', 'oa_threads_map') ORDER BY table_name
"""


class Forgetting:
    """One user to be forgotten; `carry_out` does it, `removed` and `left` say what came of it."""

    def __init__(self, db: Database, settings: Settings, threads: ThreadsAdapter, address: str):
        self.db, self.settings, self.threads = db, settings, threads
        self.whatsapp = WhatsApp(settings)
        self.names = names_of(address)
        self.who = list(dict.fromkeys([*users_named(db, address), *self.names]))
        self.mine: dict[str, Any] = {"who": self.who}  # with the last message and run that are to be forgotten
        self.removed: Counter[str] = Counter()
        self.left: list[str] = []

    def carry_out(self) -> bool:
        """Remove all that can be; False where something is left, which `left` names."""
        self.mine |= self.db.rows(BEGIN, self.mine)[0]
        messages = self.db.rows(MESSAGES, self.mine)
        openai_done, threads = self.at_openai()
        twilio_done = self.at_twilio(messages)
        self.delete("tool_calls", OF_RUNS)
        if twilio_done:
            self.delete_messages([row["id"] for row in messages])
        if openai_done:
            self.delete("responses", OF_RUNS)
            self.delete("oa_threads_map", "user_phone = ANY(:who) AND thread_id = ANY(:threads)", threads=threads)
        if openai_done and twilio_done:
            self.delete_user()
        return openai_done and twilio_done

    def close(self) -> None:
        """Close the connections that were opened."""
        self.whatsapp.close()
        self.threads.close()

    def delete(self, table: str, condition: str, **params: Any) -> None:
        """Delete rows and count them; conditions are this module's own."""
        sql = f"DELETE FROM {pg8000.native.identifier(table)} WHERE {condition} RETURNING 1"  # noqa: S608
        self.removed[f"rows of {table}"] += len(self.db.rows(sql, self.mine | params))

    def delete_messages(self, ids: list[int]) -> None:
        """Delete messages; the conversations of others whom they were told are left to the gateway to delete."""
        row = self.db.rows(DELETE_MESSAGES, {"who": self.who, "ids": ids})[0]
        self.removed["rows of messages"] += row["gone"]
        self.removed["conversations of others, which the gateway deletes"] += row["discarded"]

    def delete_user(self) -> None:
        """Delete the rows that lead to all others, and whatever plugins keep."""
        for row in self.db.rows(OTHER_TABLES):
            self.delete(row["name"], "user_phone = ANY(:who)")
        self.delete("runs", "user_phone = ANY(:who) AND id <= :last_run")
        self.delete("users", "user_phone = ANY(:who) AND last_in_at IS NULL")
        self.delete("messages", ORPHANS)

    # OpenAI

    def at_openai(self) -> tuple[bool, list[str]]:
        """Delete the user's responses and conversations; return whether all are gone, and which conversations."""
        responses = [row["id"] for row in self.db.rows(RESPONSES, self.mine)]
        known = [row["thread_id"] for row in self.db.rows(THREADS, self.mine)]
        threads = {thread for thread in known if thread.startswith("conv_")}  # the Assistants API's are gone
        if not responses and not threads:
            return True, known
        if not self.settings.openai_api_key:
            what = f"{len(threads)} conversations and {len(responses)} responses"
            self.left.append(f"{what} at OpenAI: OPENAI_API_KEY is not set")
            return False, []
        return self.delete_at_openai(responses, threads), known

    def delete_at_openai(self, responses: Iterable[str], threads: set[str]) -> bool:
        """Delete responses, then conversations, also those that only a response knows; return whether all are gone."""
        import openai

        before = len(self.left)
        try:
            for response_id in responses:
                threads |= self.delete_response(response_id)
            for thread_id in sorted(threads):
                self.delete_thread(thread_id)
        except openai.APIConnectionError as error:
            self.left.append(f"something at OpenAI, which cannot be reached ({type(error).__name__})")
        return len(self.left) == before

    def delete_response(self, response_id: str) -> set[str]:
        """Cancel and delete a response; return the conversation that it belongs to."""
        import openai

        client = self.threads.client
        try:
            response = client.responses.retrieve(response_id)
            if response.status in ("queued", "in_progress"):
                client.responses.cancel(response_id)
            client.responses.delete(response_id)
            self.removed["responses at OpenAI"] += 1
            return {response.conversation.id} if response.conversation else set()
        except openai.NotFoundError:
            return set()
        except openai.APIStatusError as error:
            self.left.append(f"response {response_id} at OpenAI: {said(error)}")
            return set()

    def delete_thread(self, thread_id: str) -> None:
        """Delete a conversation with its items, and look whether it is gone."""
        import openai

        try:
            if self.is_at_openai(thread_id):
                self.removed["items at OpenAI"] += self.threads.delete_thread(thread_id)
                self.removed["conversations at OpenAI"] += 1
                if self.is_at_openai(thread_id):
                    self.left.append(f"conversation {thread_id} at OpenAI: it is still there")
        except openai.APIStatusError as error:
            self.left.append(f"conversation {thread_id} at OpenAI: {said(error)}")

    def is_at_openai(self, thread_id: str) -> bool:
        """Tell whether OpenAI has a conversation."""
        import openai

        try:
            self.threads.client.conversations.retrieve(thread_id)
        except openai.NotFoundError:
            return False
        return True

    # Twilio

    def at_twilio(self, messages: list[dict[str, Any]]) -> bool:
        """Delete the user's messages and their files at Twilio, also those that are not in our tables."""
        sids = {row["sid"] for row in messages if row["sid"]}
        if not (self.settings.twilio_account_sid and self.settings.twilio_auth_token):
            if sids:
                self.left.append(f"{len(sids)} messages at Twilio: TWILIO_ACCOUNT_SID or TWILIO_AUTH_TOKEN is not set")
            return not sids
        before = len(self.left)
        try:
            client = self.whatsapp.client
            listed = {m.sid: m for address in self.addresses(messages) for m in every_message(client, address)}
            newer = {row["sid"] for row in self.db.rows(NEWER, self.mine)}
            for sid in sorted((sids | set(listed)) - newer):
                self.delete_message(client, sid, sid not in listed or listed[sid].num_media != "0")
        except (requests.RequestException, TwilioException, NotSent) as error:
            self.left.append(f"messages at Twilio, which does not answer as it should ({said(error)})")
        return len(self.left) == before

    def addresses(self, messages: list[dict[str, Any]]) -> list[str]:
        """Return every address under which Twilio may know the user."""
        known = {row["address"] for row in self.db.rows(ADDRESSES, {"who": self.who})}
        senders = {row["sender"] for row in messages if row["direction"] == "in" and row["user_phone"] in self.who}
        found = known | senders | {name for name in self.names if name.startswith("whatsapp:")}
        return sorted(address for address in found if address)

    def delete_message(self, client: Any, sid: str, has_files: bool) -> None:
        """Delete a message with its files; one that is gone already is no error."""
        try:
            for media in client.messages(sid).media.list() if has_files else ():
                client.messages(sid).media(media.sid).delete()
                self.removed["files at Twilio"] += 1
            client.messages(sid).delete()
            self.removed["messages at Twilio"] += 1
        except TwilioRestException as error:
            if error.status != 404:
                why = "it is still under way" if error.code == 20009 else said(error)
                self.left.append(f"message {sid} at Twilio: {why}")


def every_message(client: Any, address: str) -> Iterator[Any]:
    """Yield what Twilio has from and to an address."""
    yield from client.messages.list(from_=address)
    yield from client.messages.list(to=address)


def said(error: Exception) -> str:
    """Return an error without the addresses that its own words may quote."""
    status = getattr(error, "status", None) or getattr(error, "status_code", None)
    return f"HTTP {status}, code {getattr(error, 'code', None)}" if status else type(error).__name__


def lines(forgetting: Forgetting, address: str) -> Iterator[str]:
    """Yield what was removed, and what was not."""
    removed = [f"{count:>7}  {what}" for what, count in forgetting.removed.items() if count]
    yield f"Forgotten of {mask(address)}:" if removed else f"Nothing is known of {named(address)}."
    yield from removed
    for what in forgetting.left:
        yield f"❌ not removed: {what}"
    if forgetting.left:
        yield "Run the command again once that is mended: what it needs for it has been kept."
