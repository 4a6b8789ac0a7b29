"""What the model reads for a WhatsApp message, put together from what each kind of content gives.

One message is often several things at once: an answer to an earlier one, forwarded, a photo with a caption. Since the
first result of `message_to_input` wins, a plugin for one kind does not answer for the whole message: it registers a
reader for its kind, and its hook returns `leer`, which puts together what all readers say. The one that is asked first
reads everything, and without a file of `tools/` only its kind is missing: it becomes words that say so.

A team adds a kind with a file of its own, here for the files of a drawing program:

    from tools import Context, Media, Message, hookimpl
    from tools._entrada import Entrada, Lectura, leer, lee_archivo

    @lee_archivo("image/vnd.dwg", si_falla="El usuario envió un plano que no se pudo abrir")
    def plano(media: Media, lectura: Lectura) -> str:
        return f"[Plano con las capas {capas(lectura.descargar(media, 1_000_000))}]"

    @hookimpl
    def message_to_input(message: Message, context: Context) -> Entrada | None:
        return leer(message, context)

A reader returns words, an OpenAI input content part (`input_image`, `input_file`:
https://platform.openai.com/docs/api-reference/responses/create) or a list of both. When it raises, the model reads the
words it was registered with and the reason, so it raises ToolError with a reason fit to be told. `lee_campos` registers
a reader of the other fields of Twilio's form. What a reader calls outside has to end within `lectura.segundos`.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tools import Context, Media, Message, ToolError, clean

Parte = dict[str, Any]
Entrada = str | list[Parte]
Piezas = str | Parte | list[str | Parte]

DESCARGA = 10.0  # seconds for one file
SIN_LECTOR = {"audio": "un mensaje de voz", "image": "una imagen", "video": "un video"}


@dataclass(frozen=True)
class Lectura:
    """The message that is being read, and until when (monotonic clock)."""

    message: Message
    context: Context
    hasta: float

    @property
    def segundos(self) -> float:
        """Seconds left for reading; 0 when there are none."""
        return max(0.0, self.hasta - time.monotonic())

    def descargar(self, media: Media, limite: int) -> bytes:
        """The bytes of a file, at most `limite`; raises ToolError when it cannot be had in time."""
        if self.segundos < 0.5:
            raise ToolError("no hubo tiempo de abrirlo")
        return self.context.download(media, limite, min(DESCARGA, self.segundos))


# --- Readers --------------------------------------------------------------------------------------------------

LectorDeArchivo = Callable[[Media, Lectura], Piezas]
LectorDeCampos = Callable[[Lectura], str | None]

_ARCHIVOS: dict[str, tuple[LectorDeArchivo, str]] = {}
_CAMPOS: dict[str, LectorDeCampos] = {}


def lee_archivo(*tipos: str, si_falla: str) -> Callable[[LectorDeArchivo], LectorDeArchivo]:
    """Register the reader of the files whose media type begins with one of `tipos`, and what is said when it raises.

    The longest beginning that fits wins; of two equal ones, the reader registered last."""

    def registra(lector: LectorDeArchivo) -> LectorDeArchivo:
        for tipo in tipos:
            _ARCHIVOS[tipo] = (lector, si_falla)
        return lector

    return registra


def lee_campos(lector: LectorDeCampos) -> LectorDeCampos:
    """Register a reader of the form's fields: words that go before the text, or None where they are not there."""
    _CAMPOS[f"{lector.__module__}.{lector.__qualname__}"] = lector
    return lector


# --- Putting together -----------------------------------------------------------------------------------------


def leer(message: Message, context: Context) -> Entrada | None:
    """What the model reads for a message: fields, text and files in this order; None for a text and nothing more."""
    lectura = Lectura(message, context, time.monotonic() + plazo(message, context))
    campos = [palabras for lector in _CAMPOS.values() if (palabras := del_campo(lector, lectura))]
    archivos = [pieza for media in message.media for pieza in del_archivo(media, lectura)]
    if not campos and not archivos:
        return None
    return unido([*campos, message.text.strip(), *archivos])


def plazo(message: Message, context: Context) -> float:
    """Seconds for reading a message's files, so that the model keeps a part of the turn's time, and the lease lasts."""
    if not message.media:
        return 5.0
    filas = context.query(
        "SELECT extract(epoch FROM deadline - now())::float8 AS quedan FROM runs WHERE id = :id", id=context.run_id
    )
    quedan = filas[0]["quedan"] if filas and filas[0]["quedan"] is not None else 30.0
    return max(1.0, min(2 * context.settings.call_timeout, 0.7 * quedan))


def del_campo(lector: LectorDeCampos, lectura: Lectura) -> str | None:
    """What a reader of fields says, or that it could not."""
    try:
        return lector(lectura)
    except Exception as error:
        lectura.context.log.warning("⚠️ %s not read: %s", lector.__name__, type(error).__name__)
        return "[Una parte del mensaje no se pudo leer.]"


def del_archivo(media: Media, lectura: Lectura) -> list[str | Parte]:
    """What a file's reader says, or that there is none or that it failed."""
    tipos = [tipo for tipo in _ARCHIVOS if media.content_type.startswith(tipo)]
    if not tipos:
        que = SIN_LECTOR.get(media.content_type.partition("/")[0], "un archivo")
        return [f"[El usuario envió {que} que no se puede abrir aquí.]"]
    lector, si_falla = _ARCHIVOS[max(tipos, key=len)]
    try:
        piezas = lector(media, lectura)
    except Exception as error:
        motivo = str(error) if isinstance(error, ToolError) else ""
        lectura.context.log.warning("⚠️ %s not read: %s", media.content_type, motivo or type(error).__name__)
        return [f"[{si_falla}{f' ({motivo})' if motivo else ''}.]"]
    return piezas if isinstance(piezas, list) else [piezas]


def unido(piezas: list[str | Parte]) -> Entrada:
    """The pieces as one text; as content parts, with words side by side in one, where some are no words."""
    partes: list[Parte] = []
    for pieza in piezas:
        if not isinstance(pieza, str):
            partes.append(pieza)
        elif palabras := clean(pieza).strip():
            if partes and partes[-1]["type"] == "input_text":
                palabras = f"{partes.pop()['text']}\n{palabras}"
            partes.append({"type": "input_text", "text": palabras})
    if len(partes) == 1 and partes[0]["type"] == "input_text":
        return str(partes[0]["text"])
    return partes


# --- Words ----------------------------------------------------------------------------------------------------


def breve(texto: str, largo: int = 200) -> str:
    """A text in one line of at most `largo` characters, cut at a space where there is one near."""
    linea = " ".join(texto.split())
    if len(linea) <= largo:
        return linea
    cabeza = linea[: largo - 1]
    espacio = cabeza.rfind(" ")
    return (cabeza[:espacio] if espacio > largo // 2 else cabeza).rstrip(" ,;:.") + "…"
