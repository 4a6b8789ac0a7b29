"""What the gateway owes a conversation that is with an advisor: word of what could not arrive, and an end to the wait.

Handing over is the plugin `tools/asesor.py`; what stands here goes on without it. Settings (environment), as there:
ASESORES, ASESOR_WEBHOOK_URL, ASESOR_CONTACTO.
"""

from __future__ import annotations

import json

from database import Database
from settings import Settings, mask
from tools import Part
from tools._textos import IDIOMAS, texto


def advisors(settings: Settings) -> list[str]:
    """Return the addresses of ASESORES."""
    named = (part.strip() for part in settings.get("ASESORES").split(","))
    return [f"whatsapp:{address}" if address[0] == "+" else address for address in named if address]


def identity(name: str, address: str) -> str:
    """Return a user as advisors see them, the profile's name and the masked address: *Ana* (+52…1234)."""
    return f"*{name.replace('*', '') or 'Usuario'}* ({mask(address).removeprefix('whatsapp:')})"


def remedies(db: Database, settings: Settings, user: str, run_id: int) -> list[Part]:
    """Return what follows a part that WhatsApp's 24-hour window kept from `user`: a template, and a line to the advisor
    who wrote it. The template is for users: nothing follows a part for an advisor."""
    row = db.one("window", u=user, run=run_id, advisors=advisors(settings))
    if row is None or row["advisor"]:
        return []
    template, parts = settings.twilio_template_sid, []
    if template:
        parts.append(Part(content_sid=template, to=user))
    if row["writer"]:
        parts.append(Part(texto("asesor_ventana", quien=identity(row["name"], user)), to=row["writer"]))
    return parts


def remedy(db: Database, settings: Settings, user: str, run_id: int) -> bool:
    """Send the remedies for a part of a run that is done; return whether there is a new run with them, due now."""
    parts = [vars(part) for part in remedies(db, settings, user, run_id)]
    return bool(parts and db.one("remedy_run", u=user, run=run_id, parts=json.dumps(parts)))


def hand_back(db: Database, settings: Settings) -> list[bool]:
    """Give conversations back to the assistant whose time is up, or of which nobody could be told; return for each
    whether the user is told, in a run that is due now, that no advisor came."""
    texts = {language: nobody_came(settings, language) for language in IDIOMAS}
    webhook = bool(settings.get("ASESOR_WEBHOOK_URL"))  # it may have reached somebody: only the time tells
    return [row["told"] for row in db.all("hand_back", texts=json.dumps(texts), webhook=webhook)]


def nobody_came(settings: Settings, language: str) -> str:
    """Return what a user is told whom no advisor has answered, with how else to reach a person, if that is known."""
    contact = settings.get("ASESOR_CONTACTO")
    elsewhere = [texto("asesor_contacto", language, contacto=contact)] if contact else []
    return " ".join([texto("asesor_nadie", language), *elsewhere])
