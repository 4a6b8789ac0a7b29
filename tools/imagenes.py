"""Images and stickers: the model sees them.

They go to the model inside the request, as data URLs, since Twilio's own need credentials. What kind of picture it is
is read from its first bytes and not from what the message says: one that OpenAI cannot open would cost the whole turn
its answer. How a plugin for another kind is written stands in `_entrada.py`.
"""

from __future__ import annotations

import base64

from tools import Context, Media, Message, ToolError, hookimpl
from tools._entrada import Entrada, Lectura, Parte, lee_archivo, leer

LIMITE = 5 * 1024 * 1024  # bytes: what WhatsApp lets through for an image
NO_SE_VIO = "El usuario envió una imagen que no se pudo ver; dilo con amabilidad y pide que escriba qué muestra"
FIRMAS = {b"\xff\xd8\xff": "image/jpeg", b"\x89PNG\r\n\x1a\n": "image/png", b"GIF8": "image/gif"}


@hookimpl
def message_to_input(message: Message, context: Context) -> Entrada | None:
    """What the model reads for a message."""
    return leer(message, context)


@lee_archivo("image/", si_falla=NO_SE_VIO)
def imagen(media: Media, lectura: Lectura) -> list[str | Parte]:
    """A picture as the model sees it; raises ToolError for one that it cannot."""
    if es_sticker(media, lectura.message):
        return sticker(media, lectura)
    return ["[El usuario envió una imagen:]", vista(lectura.descargar(media, LIMITE))]


def es_sticker(media: Media, message: Message) -> bool:
    """Whether a picture is a sticker: WhatsApp sends those, and nothing else of its own, as WebP."""
    tipo = message.raw.get("MessageType", "")
    return tipo == "sticker" or (media.content_type == "image/webp" and tipo not in ("image", "document"))


def sticker(media: Media, lectura: Lectura) -> list[str | Parte]:
    """A sticker; one that moves, or cannot be had, in words: it is small talk and no question."""
    try:
        return ["[El usuario envió un sticker:]", vista(lectura.descargar(media, LIMITE), "low")]
    except ToolError:
        return ["[El usuario envió un sticker, que aquí no se ve.]"]


def vista(datos: bytes, detalle: str = "auto") -> Parte:
    """A picture as an input part (https://platform.openai.com/docs/guides/images-vision); raises ToolError."""
    tipo = tipo_de(datos)
    if tipo is None:
        raise ToolError("no es JPEG, PNG, WebP ni GIF")
    if se_mueve(datos, tipo):
        raise ToolError("es una imagen animada")
    url = f"data:{tipo};base64,{base64.b64encode(datos).decode()}"
    return {"type": "input_image", "image_url": url, "detail": detalle}


def tipo_de(datos: bytes) -> str | None:
    """The media type that a picture's first bytes show; None for one that OpenAI does not take."""
    if datos[:4] == b"RIFF" and datos[8:12] == b"WEBP":
        return "image/webp"
    return next((tipo for firma, tipo in FIRMAS.items() if datos.startswith(firma)), None)


def se_mueve(datos: bytes, tipo: str) -> bool:
    """Whether a picture is animated, which OpenAI does not take.

    WebP: the flag in its VP8X header (RFC 9649, 2.7). GIF: the extension that repeats it."""
    if tipo == "image/webp":
        return datos[12:16] == b"VP8X" and bool(datos[20:21]) and bool(datos[20] & 0x02)
    return tipo == "image/gif" and (b"NETSCAPE2.0" in datos or b"ANIMEXTS1.0" in datos)
