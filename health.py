"""What `GET /` and `GET /webhooks/openai/health` say: how each part of a process is, and what it lacks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from database import HERE, Database, DatabaseDown, DatabaseFault, schema_version
from settings import Settings, legacy_assistant, scrub

if TYPE_CHECKING:
    from gateway import Journey

SCHEMA = schema_version((HERE / "schema.sql").read_text("utf-8"))
EVENT = "openai_event_at"  # key in the table hilo
NOTE_EVERY = 60.0  # seconds between two notes of events, of which one process tells the others
MIGRATE = "run python gateway.py migrate"


class Health:
    """How each part is. Anybody may ask, so there is no secret in it and no text of a plugin's own."""

    def __init__(self, settings: Settings, db: Database, journey: Journey, version: str):
        self.settings, self.db, self.journey, self.version = settings, db, journey, version
        self.last_event: datetime | None = None  # of OpenAI's webhook, in this process
        self.next_note = 0.0

    def page(self) -> tuple[int, dict[str, Any]]:
        """Return the page and its HTTP status: 200 when messages can be taken and answered, 503 when not."""
        facts, runs, problem = self.read()
        installed = facts.get("schema_version")
        twilio = self.settings.lacks("TWILIO_ACCOUNT_SID", "TWILIO_AUTH_TOKEN", "PUBLIC_URL")
        good = problem is None and twilio is None
        return 200 if good else 503, {
            "status": "ok" if good else "error",
            "version": self.version,
            "database": {
                "ok": problem is None, "error": problem,
                "schema": {"version": int(installed) if installed else None, "needed": SCHEMA},
            },
            "assistant": self.assistant(),
            "twilio": {"configured": twilio is None, "error": twilio},
            "openai_webhook": self.webhook(facts),
            "plugins": self.plugins(),
            "runs": {row["state"]: row["n"] for row in runs}
            | {"oldest_due_seconds": max((row["late"] or 0 for row in runs), default=0)},
        }  # fmt: skip

    def read(self) -> tuple[dict[str, str], list[dict[str, Any]], str | None]:
        """Return what the database says of itself, its open runs by state, and what is wrong with it."""
        facts: dict[str, str] = {}
        try:
            facts = self.facts()
            runs = self.db.hurried("open_runs")
        except DatabaseDown as error:
            return facts, [], str(error)
        except DatabaseFault as error:
            return facts, [], f"the schema is missing: {MIGRATE}" if error.sqlstate == "42P01" else str(error)
        installed = int(facts.get("schema_version", 0))
        old = f"the schema is of version {installed}, this code needs {SCHEMA}: {MIGRATE}"
        return facts, runs, old if installed < SCHEMA else None

    def facts(self) -> dict[str, str]:
        """Return the schema's version, and the moment of OpenAI's last event as some process noted it."""
        return {row["key"]: row["value"] for row in self.db.hurried("facts", keys=["schema_version", EVENT])}

    def assistant(self) -> dict[str, Any]:
        """Say which assistant answers, or why none does."""
        name, switched_on = self.settings.assistant_id, self.settings.threads_integration_enabled
        assistant = self.journey.assistants.get(name or "")
        lacking = self.settings.lacks("OPENAI_API_KEY", "ASSISTANT_ID")
        why = None if switched_on else "switched off by THREADS_INTEGRATION_ENABLED"
        why = legacy_assistant(name) or why or lacking
        if assistant is None and why is None:
            why = f"assistants/{name}.md: {self.journey.bad_assistants.get(f'{name}.md', 'no such file')}"
        enabled = bool(assistant and switched_on and not lacking)
        return {"id": name, "model": assistant and assistant.model, "enabled": enabled, "error": why}

    def plugins(self) -> list[dict[str, Any]]:
        """Say what each plugin gave, or why it failed; its whole error is for `tools` and `check`."""
        secrets = self.settings.secrets()
        return [
            {"file": r.file, "tools": r.tools, "hooks": r.hooks, "error": r.brief and scrub(r.brief, secrets)}
            for r in self.journey.plugins.reports.values()
        ]

    def webhook(self, facts: Mapping[str, str] | None = None) -> dict[str, Any]:
        """Say whether OpenAI's webhook is configured, and when its last event came, to whichever process."""
        configured = self.settings.openai_webhook_secret is not None
        if configured and facts is None:
            with contextlib.suppress(DatabaseDown, DatabaseFault):
                facts = self.facts()
        moments = [self.last_event] if self.last_event else []
        if facts and EVENT in facts:
            moments.append(datetime.fromisoformat(facts[EVENT]))
        return {"configured": configured, "last_event": max(moments).isoformat() if configured and moments else None}

    def event_came(self) -> None:
        """Take the time of an event of OpenAI's webhook."""
        self.last_event = datetime.now(UTC)

    def note_event(self) -> None:
        """Write the last event's moment where other processes find it, once in NOTE_EVERY seconds."""
        if self.last_event and time.monotonic() >= self.next_note:
            self.next_note = time.monotonic() + NOTE_EVERY
            with contextlib.suppress(DatabaseDown, DatabaseFault):
                self.db.hurried("put", key=EVENT, value=self.last_event.isoformat())
