"""What surrounds a message's text, in words: the message it answers, that it was forwarded, the advertisement it came
from, the button, list entry or form, a place, a reaction.

Twilio tells it in fields of the webhook: https://www.twilio.com/docs/messaging/guides/webhook-request. A field that is
not here does no harm: the text is read all the same, and a kind of message without text becomes the core's words for
what cannot be read. How a plugin for another kind is written stands in `_entrada.py`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

from tools import Context, Message, hookimpl
from tools._entrada import Entrada, Lectura, breve, lee_campos, leer

CITA = 200  # characters of a quoted message
FORMULARIO = 2_000  # characters of the answers of a form


@hookimpl
def message_to_input(message: Message, context: Context) -> Entrada | None:
    """What the model reads for a message."""
    return leer(message, context)


# --- Where it comes from --------------------------------------------------------------------------------------


@lee_campos
def anuncio(lectura: Lectura) -> str | None:
    """The advertisement or post that the user touched to write."""
    raw = lectura.message.raw
    titulo, cuerpo = breve(raw.get("ReferralHeadline", ""), 150), breve(raw.get("ReferralBody", ""), 400)
    enlace = raw.get("ReferralSourceUrl", "").strip()[:200]
    dicho = " · ".join(filter(None, (f"«{titulo}»" if titulo else "", cuerpo, enlace)))
    return f"[El usuario llegó desde un anuncio: {dicho}]" if dicho else None


@lee_campos
def reenviado(lectura: Lectura) -> str | None:
    """That the user did not write it."""
    raw = lectura.message.raw
    if raw.get("FrequentlyForwarded", "").lower() == "true":
        return "[Mensaje reenviado muchas veces; no lo escribió el usuario:]"
    if raw.get("Forwarded", "").lower() == "true":
        return "[Mensaje reenviado; no lo escribió el usuario:]"
    return None


@lee_campos
def respuesta(lectura: Lectura) -> str | None:
    """The earlier message that it answers, or reacts to, as the transcript has it."""
    sid = lectura.message.raw.get("OriginalRepliedMessageSid")
    if not sid:
        return None
    que = "Reacción" if es_reaccion(lectura.message) else "En respuesta"
    filas = lectura.context.query(
        """SELECT direction, body, coalesce(media_url, raw ->> 'MediaUrl0') AS archivo, content_sid AS plantilla,
                CASE jsonb_typeof(input) WHEN 'string' THEN input #>> '{}' END AS leido
            FROM messages WHERE sid = :sid AND user_phone = :u""",
        sid=sid,
        u=lectura.message.address,
    )
    if not filas:
        return f"[{que} a un mensaje anterior que ya no está a la mano]"
    return f"[{que} a {cita(filas[0])}]"


def cita(fila: dict[str, Any]) -> str:
    """A quoted message: whose it was, and how it began."""
    de_quien = "lo que le escribiste" if fila["direction"] == "out" else "su propio mensaje"
    dicho = breve(fila["leido"] or fila["body"] or "", CITA)
    if dicho:
        return f"{de_quien}: «{dicho}»"
    return f"{de_quien}, {'un archivo' if fila['archivo'] else 'una plantilla' if fila['plantilla'] else 'sin texto'}"


# --- What was chosen ------------------------------------------------------------------------------------------


@lee_campos
def boton(lectura: Lectura) -> str | None:
    """The button that was touched."""
    raw = lectura.message.raw
    return elegido("Tocó el botón", lectura.message, raw.get("ButtonText", ""), raw.get("ButtonPayload", ""))


@lee_campos
def lista(lectura: Lectura) -> str | None:
    """The entry that was chosen from a list."""
    raw = lectura.message.raw
    return elegido("Eligió de la lista", lectura.message, raw.get("ListTitle", ""), raw.get("ListId", ""))


def elegido(accion: str, message: Message, titulo: str, codigo: str) -> str | None:
    """What was chosen, its code where that says more, and its title where the text does not have it."""
    if not titulo and not codigo:
        return None
    dicho = f" «{breve(titulo)}»" if titulo and titulo.strip() != message.text.strip() else ""
    return f"[{accion}{dicho}{f' ({breve(codigo)})' if codigo and codigo != titulo else ''}]"


@lee_campos
def formulario(lectura: Lectura) -> str | None:
    """What the user filled into a form inside WhatsApp."""
    raw = lectura.message.raw
    datos = raw.get("InteractiveData") or raw.get("FlowData")
    if not datos or raw.get("ListId") or raw.get("ButtonPayload"):
        return None
    try:
        dicho = "; ".join(hojas(json.loads(datos)))
    except ValueError:
        dicho = datos
    return f"[Respondió un formulario: {breve(dicho, FORMULARIO)}]"


def hojas(valor: Any, nombre: str = "") -> Iterator[str]:
    """Each value in nested JSON, with the name it has there."""
    if isinstance(valor, dict):
        for clave, dentro in valor.items():
            if clave != "flow_token":
                yield from hojas(dentro, str(clave))
    elif isinstance(valor, list):
        for dentro in valor:
            yield from hojas(dentro, nombre)
    elif valor not in (None, ""):
        yield f"{nombre}: {valor}" if nombre else str(valor)


# --- Places and reactions -------------------------------------------------------------------------------------


@lee_campos
def ubicacion(lectura: Lectura) -> str | None:
    """A place, by name, by coordinates and as a link to a map."""
    raw, lugar = lectura.message.raw, lectura.message.location
    datos = [breve(raw.get("Label", "")), breve(raw.get("Address", ""))]
    if lugar and all(map(math.isfinite, lugar)):
        punto = f"{lugar[0]},{lugar[1]}"
        datos.append(f"coordenadas {punto}, https://maps.google.com/?q={punto}")
    dicho = " · ".join(dict.fromkeys(filter(None, datos)))
    return f"[El usuario compartió una ubicación: {dicho}]" if dicho else None


@lee_campos
def reaccion(lectura: Lectura) -> str | None:
    """A reaction: its emoji is the text, and none takes the former one back."""
    if not es_reaccion(lectura.message):
        return None
    hizo = "solo reaccionó con un emoji" if lectura.message.text.strip() else "quitó su reacción"
    return f"[El usuario {hizo}]"


def es_reaccion(message: Message) -> bool:
    """Whether a message is an emoji under another one."""
    return message.raw.get("MessageType") == "reaction"
