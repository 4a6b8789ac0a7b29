"""Voice notes: written down by OpenAI, and then answered like a text.

Where one cannot be heard (too long, a format that OpenAI does not take, the service is away), the model is told to ask
kindly for it in writing. Without OpenAI the traditional flow answers the same.

Settings (environment):
    VOZ_MODELO     model that transcribes: gpt-transcribe
    VOZ_IDIOMA     languages that are expected besides the user's own, the first of them most: "es" or "es,en,pt"
    VOZ_PALABRAS   names that are hard to hear, with commas: "Power BI, AutoCAD, Canva"

How a plugin for another kind is written stands in `_entrada.py`.
"""

from __future__ import annotations

import re
from typing import Any

from tools import Context, Media, Message, Setting, ToolError, hookimpl
from tools._entrada import Entrada, Lectura, lee_archivo, leer

MODELO = "gpt-transcribe"
LIMITE = 16 * 1024 * 1024  # bytes: what WhatsApp lets through, and less than OpenAI's 25 MB
LARGO = 12_000  # characters of a transcript, some fifteen minutes of speech

# OpenAI knows the format by the file's name. It takes no amr, aac or 3gpp.
# https://platform.openai.com/docs/api-reference/audio/createTranscription
SUFIJOS = {
    "audio/ogg": "ogg",
    "audio/opus": "ogg",
    "audio/mpeg": "mp3",
    "audio/mp3": "mp3",
    "audio/mp4": "m4a",
    "audio/m4a": "m4a",
    "audio/x-m4a": "m4a",
    "audio/wav": "wav",
    "audio/x-wav": "wav",
    "audio/vnd.wave": "wav",
    "audio/webm": "webm",
    "audio/flac": "flac",
    "audio/x-flac": "flac",
}


SETTINGS = {
    "VOZ_MODELO": Setting("the name of a model that transcribes", r"\S+"),
    "VOZ_IDIOMA": Setting("languages of two letters, with commas: es,en,pt", r"(?i)[a-z]{2}(\s*,\s*[a-z]{2})*"),
    "VOZ_PALABRAS": Setting("names, with commas"),
}


@hookimpl
def message_to_input(message: Message, context: Context) -> Entrada | None:
    """What the model reads for a message."""
    return leer(message, context)


@lee_archivo("audio/", si_falla="Nota de voz que no se pudo escuchar; dilo con amabilidad y pide que lo escriba")
def nota_de_voz(media: Media, lectura: Lectura) -> str:
    """What a voice note says; raises ToolError or one of OpenAI's errors."""
    sufijo = SUFIJOS.get(media.content_type)
    if sufijo is None:
        raise ToolError(f"llegó en el formato {media.content_type}")
    lectura.context.openai()  # without a key nothing is downloaded
    audio = lectura.descargar(media, LIMITE)
    if not audio:
        raise ToolError("llegó vacía")
    dicho = transcrita(audio, sufijo, lectura)
    if not dicho:
        return "[Nota de voz en la que no se oyen palabras; dilo con amabilidad y pide que la repita o lo escriba.]"
    return f"[Nota de voz] {dicho}"


def transcrita(audio: bytes, sufijo: str, lectura: Lectura) -> str:
    """The transcript of an audio file; raises openai.OpenAIError, in the time that is left for reading."""
    import openai

    segundos = max(1.0, lectura.segundos)
    transcripcion = lectura.context.openai().audio.transcriptions.create(
        file=(f"voz.{sufijo}", audio),
        timeout=openai.Timeout(segundos, connect=min(3.0, segundos)),
        **pistas(lectura.context),
    )
    return str(transcripcion.text).strip()[:LARGO]


def pistas(context: Context) -> dict[str, Any]:
    """The model, and what it is told to expect; only gpt-transcribe takes more than one language."""
    modelo = context.settings.get("VOZ_MODELO", MODELO)
    idiomas = idiomas_de(context)
    if modelo != MODELO:
        return {"model": modelo, "language": idiomas[0]}
    palabras = en_lista(context.settings.get("VOZ_PALABRAS"))
    return {"model": modelo, "languages": idiomas} | ({"keywords": palabras} if palabras else {})


def idiomas_de(context: Context) -> list[str]:
    """The languages that the user may speak, the user's own first (ISO 639-1)."""
    filas = context.query("SELECT language FROM users WHERE user_phone = :u", u=context.address)
    propio = (filas[0]["language"] or "") if filas else ""
    esperados = en_lista(context.settings.get("VOZ_IDIOMA", "es").lower())
    idiomas = [idioma for idioma in (propio, *esperados) if re.fullmatch("[a-z]{2}", idioma)]
    return list(dict.fromkeys(idiomas)) or ["es"]


def en_lista(valor: str) -> list[str]:
    """The entries of a setting with commas."""
    return [entrada.strip() for entrada in valor.split(",") if entrada.strip()]
