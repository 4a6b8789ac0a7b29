"""What has to be done now and then, by whichever process gets to it first: nobody waits for it.

Inbound messages whose webhook failed are fetched from Twilio's own list, conversations that were left for good are
deleted at OpenAI, and advisors' conversations go back to the assistant when their time is up.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from database import DatabaseDown, DatabaseFault
from handoff import hand_back

if TYPE_CHECKING:
    from gateway import Gateway

SETTLED = 60.0  # seconds: a message younger than this may still come by webhook
OVERLAP = timedelta(seconds=30)  # looked at again, for messages that Twilio lists late
EVERY = 300.0  # seconds between catch-ups; SETTLED after an outage of the database
TICK = 5.0  # seconds
UNSTORABLE = ("22", "23")  # classes of SQLSTATE: the message itself is what the database refuses
LONG_AGO = 24 * 3600.0  # seconds: WhatsApp's window is shut
PRUNE_EVERY = 24 * 3600.0  # seconds, by one of all processes
PRUNE_BATCH = 1000  # rows looked at in one transaction

log = logging.getLogger("hilo")


class Upkeep:
    """Two threads a process do what is due: deletions at OpenAI may take long, and nobody's message waits for them."""

    def __init__(self, gateway: Gateway):
        self.gateway = gateway
        self.stopping = threading.Event()
        self.every = EVERY
        self.chores: list[Callable[[], None]] = [self.widen, self.catch_up, self.hand_back, self.prune]
        self.threads = [
            threading.Thread(target=self.work, args=(jobs,), name="upkeep", daemon=True)
            for jobs in (self.chores, [self.delete_discarded])
        ]
        self.next_catch_up = self.next_prune = time.monotonic()
        self.last_outage = time.monotonic()  # what came while no process was there is missing too

    def start(self) -> None:
        """Begin."""
        for thread in self.threads:
            thread.start()

    def work(self, jobs: list[Callable[[], None]]) -> None:
        """Tick until stopped; a failure is logged and tried again."""
        while not self.stopping.is_set():
            for job in list(jobs):
                self.attempt(job)
            self.stopping.wait(TICK)

    def attempt(self, job: Callable[[], None]) -> None:
        """Do one job; the database or Twilio being away is no reason to stop the others."""
        name = getattr(job, "func", job).__name__
        try:
            job()
        except DatabaseDown as error:
            log.debug("upkeep: %s: %s", name, error)
            self.outage()
        except DatabaseFault as error:
            log.warning("⚠️ upkeep: %s failed: %s", name, error)
        except Exception as error:
            log.warning("⚠️ upkeep: %s failed: %s", name, error)

    def outage(self) -> None:
        """Take note that messages could not be stored just now: they are fetched as soon as they have settled."""
        self.last_outage = time.monotonic()
        self.next_catch_up = min(self.next_catch_up, self.last_outage + SETTLED + TICK)

    def widen(self) -> None:
        """Once, allow as many connections as the settings say and the server has for us."""
        self.gateway.db.widen(self.gateway.settings.db_connections)
        self.chores.remove(self.widen)

    def catch_up(self) -> None:
        """Store inbound messages that Twilio has and Hilo lacks, each by the door that webhooks use. Those for numbers
        whose webhooks go elsewhere are another program's."""
        if time.monotonic() < self.next_catch_up:
            return
        configured = self.gateway.journey.whatsapp.configured
        now = datetime.now(UTC).isoformat()
        self.gateway.db.one("begin_now", now=now, seconds=LONG_AGO if configured else 0.0)
        if not configured:
            self.next_catch_up = time.monotonic() + self.every
            return
        row = self.gateway.db.one("get", key="caught_up_to")  # with the database away, again at the next tick
        began = time.monotonic()
        self.next_catch_up = began + SETTLED  # where what follows fails, soon again
        until = datetime.now(UTC) - timedelta(seconds=SETTLED)
        since = datetime.fromisoformat(row["value"]) if row else until
        whatsapp, known = self.gateway.journey.whatsapp, self.gateway.journey.known_sids
        found = self.ours([pair for pair in whatsapp.inbound_since(since - OVERLAP) if pair[1] <= until])
        found.reverse()  # oldest first; Twilio's times are whole seconds, within which its own order stands
        there = known([form["MessageSid"] for form, _ in found])
        missing = sorted((pair for pair in found if pair[0]["MessageSid"] not in there), key=lambda pair: pair[1])
        stored = 0
        for form, at in missing:
            try:
                stored += self.store(form | whatsapp.media_of(form), at)
            except DatabaseFault as error:  # of the database, not of the message: this far again next time
                log.error("⚠️ message %s cannot be stored yet: %s", form["MessageSid"], error)
                until = min(until, at)
        self.gateway.db.one("put", key="caught_up_to", value=until.isoformat())
        if stored:
            log.warning("⚠️ %d messages had not come by webhook: fetched from Twilio's list", stored)
        settled = self.last_outage + SETTLED + TICK
        self.next_catch_up = settled if settled > began else began + self.every

    def ours(self, found: list[tuple[dict[str, str], datetime]]) -> list[tuple[dict[str, str], datetime]]:
        """Return those of Twilio's messages that were written to a number of ours: TWILIO_FROM, a sender of that
        Messaging Service, or one that a webhook has told of."""
        numbers = list({form["To"] for form, _ in found})
        known = self.gateway.db.all("our_numbers", numbers=numbers) if numbers else []
        sender = self.gateway.settings.twilio_from
        ours = {sender, *self.gateway.numbers, *(row["number"] for row in known)}
        return [pair for pair in found if pair[0]["To"] in ours or pair[0].get("MessagingServiceSid", "") == sender]

    def store(self, form: dict[str, str], at: datetime) -> bool:
        """Store one message that was missed; False where it was known, or is such that no database would take it."""
        try:
            return self.gateway.receive(form, at)
        except DatabaseDown:
            raise
        except Exception as error:
            if isinstance(error, DatabaseFault) and error.sqlstate[:2] not in UNSTORABLE:
                raise
            log.error("⚠️ message %s cannot be stored: %s", form["MessageSid"], type(error).__name__)
            return False

    def delete_discarded(self) -> None:
        """Delete conversations at OpenAI that their users left for good, items first."""
        if not self.gateway.settings.openai_api_key:
            return
        for row in self.gateway.db.all("discarded"):
            thread_id = row["thread_id"]
            try:
                count = self.gateway.journey.threads.delete_thread(thread_id)
            except Exception as error:
                self.gateway.db.one("discard_later", thread=thread_id)
                log.warning("⚠️ thread %s not deleted yet: %s", thread_id, type(error).__name__)
                continue
            self.gateway.db.one("discard_done", thread=thread_id)
            log.info("🧵 Thread ID: %s (deleted, %d items)", thread_id, count)

    def hand_back(self) -> None:
        """Give conversations back to the assistant when an advisor's time is up, or nobody could be told."""
        for told in hand_back(self.gateway.db, self.gateway.settings):
            why = "no advisor came" if told else "an advisor's time is up"
            log.info("🧵 %s: back to the assistant", why)
            if told:
                self.gateway.workers.woken(0)

    def prune(self) -> None:
        """Once a day, in small batches, remove what is older than RETENTION_DAYS; never what is not done."""
        days = self.gateway.settings.retention_days
        if not days or time.monotonic() < self.next_prune:
            return
        self.next_prune = time.monotonic() + PRUNE_EVERY / 24
        if not self.gateway.db.one("take_turn", key="pruned_at", seconds=PRUNE_EVERY - 60):
            return
        gone = {name: self.sweep(f"prune_{name}", days) for name in ("messages", "runs", "responses")}
        if any(gone.values()):
            log.info("older than %d days: %d messages and %d runs removed", days, gone["messages"], gone["runs"])

    def sweep(self, statement: str, days: int) -> int:
        """Return how many rows one pass over a table has removed, from the oldest on."""
        after = gone = 0
        while not self.stopping.wait(0.02):
            row = self.gateway.db.one(statement, after=after, n=PRUNE_BATCH, days=days)
            if row is None or not row["old"]:
                break
            after, gone = row["upto"], gone + row["gone"]
        return gone

    def stop(self, seconds: float) -> None:
        """Wait so long for the jobs in hand, of threads that were started."""
        self.stopping.set()
        end = time.monotonic() + seconds
        for thread in self.threads:
            with contextlib.suppress(RuntimeError):
                thread.join(max(0.0, end - time.monotonic()))
