"""A message's first step: it is stored, and makes or refreshes its user's run. Those that arrive while a commit is
under way share the next one."""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from database import Database, DatabaseDown, DatabaseFault
from tools import clean
from tools._textos import idioma_de

OTHERS = 1.0  # seconds that a message waits for others' commit
PATIENCE = "200ms"  # for which all wait for a row that one of them needs
LOCKED = "55P03"  # SQLSTATE of one that was not had

OPT_OUT = frozenset(
    ("baja", "stop", "cancelar suscripcion", "cancelar suscripción", "darme de baja", "unsubscribe", "sair")
)
OPT_IN = frozenset({"alta", "start", "unstop"})


class BadRequest(Exception):
    """A webhook that cannot be taken: its HTTP status and one line that says why."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


def inbound(form: Mapping[str, str], burst: float, at: datetime | None = None) -> dict[str, Any]:
    """Return what is stored of Twilio's form of a message; raises BadRequest where it is none."""
    form = clean(form)
    missing = [key for key in ("MessageSid", "From", "To") if not form.get(key)]
    if missing:
        raise BadRequest(400, f"the form lacks {', '.join(missing)}")
    text = form.get("Body", "")
    guess = idioma_de(text, "")
    sure = guess == "es" or idioma_de(text, "", seguro=True)  # only others are doubted
    return {
        "sid": form["MessageSid"], "sender": form["From"], "own": form["To"],
        "profile": form.get("ProfileName", "")[:200], "body": text, "external": form.get("ExternalUserId") or None,
        "raw": form, "opt": opt_word(text), "at": at and at.isoformat(), "burst": burst_of(text, form, burst),
        "language": guess if guess and sure else None, "guess": guess or None,
    }  # fmt: skip


def opt_word(text: str) -> str | None:
    """Return "out" for a message that is an opt-out word and nothing more, "in" for the word to return."""
    word = " ".join(re.sub(r"[^\w\s]", "", text).lower().split())
    return "out" if word in OPT_OUT else "in" if word in OPT_IN else None


def burst_of(text: str, form: Mapping[str, str], burst: float) -> float:
    """Return how long to wait for more, in seconds: less where the message looks complete."""
    if opt_word(text) or text.startswith("/") or form.get("ButtonPayload"):
        return 0.0
    spoken = form.get("MediaContentType0", "").startswith("audio/")  # who sends a voice note has said it
    complete = text.rstrip().endswith(("?", ".", "!")) or len(text) > 80 or spoken
    return burst / 3 if complete else burst


@dataclass(eq=False)
class Entry:
    """A message on its way into the database."""

    message: dict[str, Any]
    called: threading.Condition  # when it is settled, or may be first
    settled: bool = False
    run: dict[str, Any] | None = None
    alone: bool = False  # it could not be stored with others, or need not wait for them any longer
    down: DatabaseDown | None = None


class Inbox:
    """Stores messages: a thread those of all that wait, while no other does."""

    def __init__(self, db: Database):
        self.db = db
        self.lock = threading.RLock()
        self.waiting: list[Entry] = []
        self.leading = False  # a commit is under way

    def store(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Commit a message; return its run, None where its sid is known. Raises DatabaseDown, then it may be stored or
        not, or DatabaseFault. Takes two times HURRY and a little at most."""
        entry, batch, end = Entry(message, threading.Condition(self.lock)), [], time.monotonic() + self.db.HURRY
        with self.lock:
            self.waiting.append(entry)
            entry.called.wait_for(lambda: entry.settled or not self.leading, OTHERS)
            if not self.leading and not entry.settled:
                self.leading, batch, self.waiting = True, self.waiting, []
            elif entry in self.waiting:  # a commit that hangs is not everybody's
                self.waiting.remove(entry)
                entry.alone = True
            elif not entry.called.wait_for(lambda: entry.settled, 2 * self.db.HURRY):
                raise DatabaseDown("does not answer")
        if batch:
            self.commit(batch)
        if entry.alone:
            return self.store_alone(entry, end)
        if entry.down:
            raise DatabaseDown(str(entry.down))
        return entry.run

    def commit(self, entries: list[Entry]) -> None:
        """Store messages in one transaction. Where one of them cannot be, or needs a row that is locked, each is left
        to its own thread."""
        entries.sort(key=lambda entry: entry.message["sender"])  # lest two processes wait for each other
        try:
            for entry, run in zip(entries, self.stored(entries), strict=True):
                entry.run = run
        except DatabaseDown as error:
            for entry in entries:
                entry.down = error
        except BaseException:  # whatever it is, whose message it is will see it
            for entry in entries:
                entry.alone = True
        finally:
            with self.lock:
                self.leading = False
                for entry in entries:
                    entry.settled = True
                for entry in [*entries, *self.waiting[:1]]:
                    entry.called.notify()

    def store_alone(self, entry: Entry, end: float) -> dict[str, Any] | None:
        """Store one message and return its run. While its user's row is locked it holds no connection, and tries again
        until `end` (monotonic)."""
        while True:
            try:
                return self.stored([entry])[0]
            except DatabaseFault as error:
                if error.sqlstate != LOCKED or time.monotonic() > end:
                    raise
            time.sleep(0.1)

    def stored(self, entries: list[Entry]) -> list[dict[str, Any] | None]:
        """Return the runs of messages that are stored in one statement."""
        messages = json.dumps([entry.message for entry in entries])
        runs = {row["place"]: row for row in self.db.hurried("receive", messages=messages, patience=PATIENCE)}
        return [runs.get(place) for place in range(1, len(entries) + 1)]
