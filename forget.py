"""Forget a user: what OpenAI and Twilio keep of them, then every row.

What is elsewhere goes first, and the rows that lead to it only once it is gone: so a run that OpenAI or Twilio broke
off can be repeated, and a second one finds nothing to do.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import pg8000.native
import requests
from twilio.base.exceptions import TwilioException, TwilioRestException

from database import Database
from reports import names_of, users_named
from settings import Settings, mask
from whatsapp import NotSent, WhatsApp

if TYPE_CHECKING:
    from gateway import ThreadsAdapter

# A worker that holds one of the user's runs loses it here, and may write nothing more.
FENCE = """
UPDATE runs SET state = 'done', held = false, attempt = attempt + 1, finished_at = now(), reason = 'forgotten',
    outcome = coalesce(outcome, 'intercepted')
WHERE user_phone = ANY(:who) AND state <> 'done' RETURNING id
"""

# All that was said to and by the user, what others were told of it, and their answers to that.
MESSAGES = """
WITH mine AS (
    SELECT id, sid FROM messages
    WHERE user_phone = ANY(:who) OR run_id IN (SELECT id FROM runs WHERE user_phone = ANY(:who)))
SELECT id, sid, raw ->> 'From' AS sender, direction, user_phone FROM messages
WHERE id IN (SELECT id FROM mine) OR raw ->> 'OriginalRepliedMessageSid' IN (SELECT sid FROM mine)
"""

ADDRESSES = """
SELECT unnest(ARRAY[user_phone, reply_to]) AS address FROM users WHERE user_phone = ANY(:who)
UNION SELECT address FROM addresses WHERE user_phone = ANY(:who)
"""

RESPONSES = "SELECT id FROM responses WHERE run_id IN (SELECT id FROM runs WHERE user_phone = ANY(:who))"

THREADS = """
SELECT thread_id FROM oa_threads_map WHERE user_phone = ANY(:who)
UNION SELECT thread_id FROM runs WHERE user_phone = ANY(:who) AND thread_id IS NOT NULL
"""

# A conversation that was begun meanwhile is deleted by the gateway.
DELETE_THREADS = """
WITH gone AS (DELETE FROM oa_threads_map WHERE user_phone = ANY(:who) RETURNING thread_id)
INSERT INTO discarded_threads (thread_id) SELECT thread_id FROM gone
WHERE starts_with(thread_id, 'conv_') AND thread_id <> ALL(:deleted)
ON CONFLICT DO NOTHING
"""

# Plugins' tables: by convention a user's rows have a column user_phone.
OTHER_TABLES = """
SELECT table_name AS name
FROM information_schema.columns JOIN information_schema.tables USING (table_schema, table_name)
WHERE table_schema = current_schema() AND column_name = 'user_phone' AND table_type = 'BASE TABLE'
    AND table_name NOT IN ('users', 'messages', 'runs', 'oa_threads_map') ORDER BY table_name
"""


class Forgetting:
    """One user to be forgotten; `carry_out` does it, `removed` and `left` say what came of it."""

    def __init__(self, db: Database, settings: Settings, threads: ThreadsAdapter, address: str):
        self.db, self.settings, self.threads = db, settings, threads
        self.whatsapp = WhatsApp(settings)
        self.names = names_of(address)
        self.who = list(dict.fromkeys([*users_named(db, address), *self.names]))
        self.removed: Counter[str] = Counter()
        self.left: list[str] = []

    def carry_out(self) -> bool:
        """Remove all that can be; False where something is left, which `left` names."""
        self.db.rows(FENCE, {"who": self.who})
        messages = self.db.rows(MESSAGES, {"who": self.who})
        openai_done, deleted = self.at_openai()
        twilio_done = self.at_twilio(messages)
        self.delete("tool_calls", "run_id IN (SELECT id FROM runs WHERE user_phone = ANY(:who))")
        if twilio_done:
            self.delete("messages", "id = ANY(:ids)", ids=[row["id"] for row in messages])
        if openai_done:
            self.delete("responses", "run_id IN (SELECT id FROM runs WHERE user_phone = ANY(:who))")
            self.db.rows(DELETE_THREADS, {"who": self.who, "deleted": deleted})
        if openai_done and twilio_done:
            for table in (*(row["name"] for row in self.db.rows(OTHER_TABLES)), "runs", "users"):
                self.delete(table, "user_phone = ANY(:who)")
        return openai_done and twilio_done

    def close(self) -> None:
        """Close the connections that were opened."""
        self.whatsapp.close()
        if "client" in vars(self.threads):
            self.threads.client.close()

    def delete(self, table: str, condition: str, **params: Any) -> None:
        """Delete rows and count them; conditions are this module's own."""
        values = params or {"who": self.who}
        sql = f"DELETE FROM {pg8000.native.identifier(table)} WHERE {condition} RETURNING 1"  # noqa: S608
        self.removed[f"rows of {table}"] += len(self.db.rows(sql, values))

    # OpenAI

    def at_openai(self) -> tuple[bool, list[str]]:
        """Delete the user's responses and conversations; return whether all are gone, and which conversations."""
        responses = [row["id"] for row in self.db.rows(RESPONSES, {"who": self.who})]
        threads = {row["thread_id"] for row in self.db.rows(THREADS, {"who": self.who})}
        threads = {thread for thread in threads if thread.startswith("conv_")}  # the Assistants API's are gone
        if not responses and not threads:
            return True, []
        if not self.settings.openai_api_key:
            what = f"{len(threads)} conversations and {len(responses)} responses"
            self.left.append(f"{what} at OpenAI: OPENAI_API_KEY is not set")
            return False, []
        return self.delete_at_openai(responses, threads), sorted(threads)

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
            for sid in sorted(sids | set(listed)):
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
    yield f"Forgotten of {mask(address)}:" if removed else f"Nothing is known of {mask(address)}."
    yield from removed
    for what in forgetting.left:
        yield f"❌ not removed: {what}"
    if forgetting.left:
        yield "Run the command again once that is mended: what it needs for it has been kept."
