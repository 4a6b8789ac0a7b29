"""Documents, contacts and videos: PDF go to the model as files, texts and contacts as words; of the rest it is told.

How a plugin for another kind is written stands in `_entrada.py`.
"""

from __future__ import annotations

import base64
import quopri
import re
from dataclasses import dataclass, field

from tools import Context, Media, Message, ToolError, hookimpl
from tools._entrada import Entrada, Lectura, Parte, breve, lee_archivo, leer

PDF = 8 * 1024 * 1024  # bytes
TEXTO = 1024 * 1024  # bytes
CARACTERES = 20_000  # of a text file that the model gets
CONTACTOS = 10  # of one message
TELEFONOS = 5  # of one contact

PIDE = "dilo con amabilidad y pide que escriba lo que necesita"
NO_SE_ABRIO = f"El usuario envió un documento que no se pudo abrir; {PIDE}"
TEXTOS = ("text/plain", "text/csv", "text/tab-separated-values", "text/markdown", "application/json")
VCARDS = ("text/vcard", "text/x-vcard", "text/directory")


@hookimpl
def message_to_input(message: Message, context: Context) -> Entrada | None:
    """What the model reads for a message."""
    return leer(message, context)


# --- Documents ------------------------------------------------------------------------------------------------


@lee_archivo("application/pdf", si_falla=NO_SE_ABRIO)
def pdf(media: Media, lectura: Lectura) -> list[str | Parte]:
    """A PDF as the model reads it (https://platform.openai.com/docs/guides/pdf-files)."""
    datos = lectura.descargar(media, PDF)
    if b"%PDF-" not in datos[:1024]:
        raise ToolError("no es un PDF")
    nombre = nombre_de(lectura.message) or "documento.pdf"
    url = f"data:application/pdf;base64,{base64.b64encode(datos).decode()}"
    archivo = {"type": "input_file", "filename": nombre, "file_data": url}
    return [f"[El usuario envió el documento «{nombre}»:]", archivo]


@lee_archivo(*TEXTOS, si_falla=NO_SE_ABRIO)
def texto(media: Media, lectura: Lectura) -> str:
    """What a text file says, the beginning of a long one."""
    dicho = descifrado(lectura.descargar(media, TEXTO)).strip()
    corte = ", del que este es el comienzo" if len(dicho) > CARACTERES else ""
    nombre = nombre_de(lectura.message) or "de texto"
    return f"[El usuario envió el archivo «{nombre}»{corte}:]\n{dicho[:CARACTERES]}\n[Fin del archivo.]"


@lee_archivo("video/", si_falla=NO_SE_ABRIO)
def video(media: Media, lectura: Lectura) -> str:
    """That there is a video: the model sees none."""
    return f"[El usuario envió un video, que aquí no se puede ver; {PIDE}.]"


@lee_archivo("", si_falla=NO_SE_ABRIO)
def otro(media: Media, lectura: Lectura) -> str:
    """That there is a file of a kind that nobody else reads, and its name."""
    nombre = nombre_de(lectura.message)
    que = f"el archivo «{nombre}»" if nombre else "un archivo"
    tipo = breve(media.content_type, 80) or "de tipo desconocido"
    return f"[El usuario envió {que} ({tipo}), que aquí no se puede abrir: solo PDF y texto; {PIDE}.]"


def nombre_de(message: Message) -> str:
    """A document's file name, which Twilio puts into the text; empty where that is something else."""
    dicho = message.text.strip()
    return dicho if re.fullmatch(r"[^\n/\\<>]{1,150}\.\w{1,5}", dicho) else ""


def descifrado(datos: bytes) -> str:
    """Text in UTF-8, or else as Windows writes it."""
    try:
        return datos.decode("utf-8-sig")
    except UnicodeDecodeError:
        return datos.decode("utf-16" if datos[:2] in (b"\xff\xfe", b"\xfe\xff") else "cp1252", "replace")


# --- Contacts -------------------------------------------------------------------------------------------------


@dataclass
class Contacto:
    """What a vCard says of a person."""

    nombre: str = ""
    empresa: str = ""
    telefonos: list[str] = field(default_factory=list)
    correos: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        datos = (self.nombre, self.empresa, *self.telefonos[:TELEFONOS], *self.correos[:TELEFONOS])
        return ", ".join(filter(None, datos)) or "sin datos"


@lee_archivo(*VCARDS, si_falla="El usuario compartió un contacto que no se pudo abrir; pide que lo escriba")
def contacto(media: Media, lectura: Lectura) -> str:
    """The contacts of a vCard file in words, without the user's own number, which no prompt has."""
    tarjetas = contactos(descifrado(lectura.descargar(media, TEXTO)))
    if not tarjetas:
        raise ToolError("no trae ningún contacto")
    for tarjeta in tarjetas:
        tarjeta.telefonos = [sin_el_propio(t, lectura.message.address) for t in tarjeta.telefonos]
    mas = f"; y {len(tarjetas) - CONTACTOS} más" if len(tarjetas) > CONTACTOS else ""
    return f"[El usuario compartió un contacto: {'; '.join(map(str, tarjetas[:CONTACTOS]))}{mas}]"


def contactos(vcard: str) -> list[Contacto]:
    """The people in a vCard file (RFC 6350, and the 2.1 that telephones still write)."""
    lineas = re.sub(r"=\r?\n", "=0A", re.sub(r"\r?\n[ \t]", "", vcard)).splitlines()
    tarjetas: list[Contacto] = []
    for linea in lineas:
        cabeza, _, valor = linea.partition(":")
        clave, *parametros = cabeza.upper().split(";")
        if clave == "BEGIN":
            tarjetas.append(Contacto())
        elif tarjetas:
            anota(tarjetas[-1], clave.rpartition(".")[2], legible(valor, parametros))
    return tarjetas


def anota(tarjeta: Contacto, clave: str, valor: str) -> None:
    """Keep what one line of a vCard says, where it is of use."""
    if clave == "FN":
        tarjeta.nombre = breve(valor, 100)
    elif clave == "N" and not tarjeta.nombre:
        tarjeta.nombre = breve(" ".join(reversed(valor.split(";")[:2])), 100)
    elif clave == "ORG":
        tarjeta.empresa = breve(valor.replace(";", " "), 100)
    elif clave == "TEL":
        tarjeta.telefonos.append(breve(valor.removeprefix("tel:"), 30))
    elif clave == "EMAIL":
        tarjeta.correos.append(breve(valor, 80))


def legible(valor: str, parametros: list[str]) -> str:
    """A vCard's value without its encoding."""
    if any(parametro.endswith("QUOTED-PRINTABLE") for parametro in parametros):
        valor = quopri.decodestring(valor.encode("utf-8", "ignore")).decode("utf-8", "replace")
    return re.sub(r"\\([,;:\\])", r"\1", re.sub(r"\\[nN]", " ", valor)).strip()


def sin_el_propio(telefono: str, address: str) -> str:
    """A telephone number, or that it is the user's own."""
    cifras, propias = (re.sub(r"\D", "", numero)[-10:] for numero in (telefono, address))
    return "su propio número" if len(cifras) >= 8 and cifras == propias else telefono
