"""What users send besides text, from the signed webhook to what the model reads, and what is shown while it answers."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from settings import load_settings
from simulator import Simulator, button_fields, location_fields
from tests.conftest import ANA, Hilo
from tests.local_openai import Fault, LocalOpenAI, says
from tools import Context, Media, Message, ToolError, mensajes
from tools._entrada import breve, leer
from tools._textos import texto
from tools.documentos import contactos
from tools.imagenes import se_mueve
from whatsapp import PLACEHOLDERS, WhatsApp

LUIS = "whatsapp:+5215511110002"
Start = Callable[..., Hilo]
Entrada = str | list[dict[str, Any]]

OGG = b"OggS" + bytes(60)
PNG = base64.b64decode(
    "iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5ErkJggg=="
)
STICKER = b"RIFF\x1a\x00\x00\x00WEBPVP8L\x0d\x00\x00\x00" + bytes(14)
STICKER_QUE_SE_MUEVE = b"RIFF\x1a\x00\x00\x00WEBPVP8X\x0a\x00\x00\x00\x02" + bytes(12)
PDF = b"%PDF-1.7\n%%EOF\n"
VCARD = b"""BEGIN:VCARD\r
VERSION:3.0\r
N:P\xc3\xa9rez;Luc\xc3\xada;;;\r
FN:Luc\xc3\xada P\xc3\xa9rez\r
ORG:Escuela Norte;\r
item1.TEL;waid=5215522223333:+52 1 55 2222 3333\r
TEL;TYPE=CELL:+52 1 55 1111 0001\r
END:VCARD\r
"""


def imagen(datos: bytes, tipo: str = "image/png", detalle: str = "auto") -> dict[str, Any]:
    """A picture as the model gets it."""
    return {"type": "input_image", "image_url": data_url(datos, tipo), "detail": detalle}


def data_url(datos: bytes, tipo: str) -> str:
    return f"data:{tipo};base64,{base64.b64encode(datos).decode()}"


def palabras(dichas: str) -> dict[str, Any]:
    """Words beside a picture or file."""
    return {"type": "input_text", "text": dichas}


def leido(openai_server: LocalOpenAI) -> list[Entrada]:
    """What the model was given to read, one entry a message, in order."""
    cuerpos = [r.body for r in openai_server.requests if (r.method, r.path) == ("POST", "/v1/responses")]
    return [item["content"] for cuerpo in cuerpos for item in cuerpo["input"] if item.get("role") == "user"]


def guardado(hilo: Hilo) -> list[Any]:
    """What the transcript keeps as read, in order."""
    return [row["input"] for row in hilo.rows("SELECT input FROM messages WHERE direction = 'in' ORDER BY id")]


# --- Every kind, through the whole journey --------------------------------------------------------------------


@dataclass(frozen=True)
class Caso:
    """A message that a user sends, and what the model reads."""

    lee: Entrada
    text: str = ""
    media: tuple[tuple[bytes, str], ...] = ()
    fields: Mapping[str, str] = field(default_factory=dict)


UN_PDF = {"type": "input_file", "filename": "temario.pdf", "file_data": data_url(PDF, "application/pdf")}
BOTON = button_fields("Ver temario", "EXC-101")
PIDE = "dilo con amabilidad y pide que escriba lo que necesita"

CASOS = {
    "voice note": Caso("[Nota de voz] Hola, busco un curso de Excel.", media=((OGG, "audio/ogg; codecs=opus"),)),
    "voice in a format that OpenAI does not take": Caso(
        "[Nota de voz que no se pudo escuchar; dilo con amabilidad y pide que lo escriba "
        "(llegó en el formato audio/amr).]",
        media=((b"#!AMR", "audio/amr"),),
    ),
    "image": Caso([palabras("[El usuario envió una imagen:]"), imagen(PNG)], media=((PNG, "image/png"),)),
    "image with caption": Caso(
        [palabras("¿este cuánto cuesta?\n[El usuario envió una imagen:]"), imagen(PNG)],
        text="¿este cuánto cuesta?",
        media=((PNG, "image/jpeg"),),
    ),
    "several images": Caso(
        [palabras("[El usuario envió una imagen:]"), imagen(PNG)] * 2, media=((PNG, "image/png"), (PNG, "image/png"))
    ),
    "image of a kind that OpenAI does not take": Caso(
        "¿y este?\n[El usuario envió una imagen que no se pudo ver; dilo con amabilidad y pide que escriba qué muestra "
        "(no es JPEG, PNG, WebP ni GIF).]",
        text="¿y este?",
        media=((b"\x00\x00\x00\x18ftypheic", "image/heic"),),
    ),
    "sticker": Caso(
        [palabras("[El usuario envió un sticker:]"), imagen(STICKER, "image/webp", "low")],
        media=((STICKER, "image/webp"),),
        fields={"MessageType": "sticker"},
    ),
    "sticker that moves": Caso(
        "[El usuario envió un sticker, que aquí no se ve.]",
        media=((STICKER_QUE_SE_MUEVE, "image/webp"),),
        fields={"MessageType": "sticker"},
    ),
    "location": Caso(
        "[El usuario compartió una ubicación: Sucursal Centro · Av. Juárez 10 · coordenadas 19.43,-99.13, "
        "https://maps.google.com/?q=19.43,-99.13]",
        fields=location_fields(19.43, -99.13, "Sucursal Centro", "Av. Juárez 10"),
    ),
    "contact": Caso(
        "[El usuario compartió un contacto: Lucía Pérez, Escuela Norte, +52 1 55 2222 3333, +52 1 55 1111 0001]",
        media=((VCARD, "text/vcard"),),
        fields={"MessageType": "contacts"},
    ),
    "document": Caso(
        [palabras("temario.pdf\n[El usuario envió el documento «temario.pdf»:]"), UN_PDF],
        text="temario.pdf",
        media=((PDF, "application/pdf"),),
    ),
    "text file": Caso(
        "[El usuario envió el archivo «de texto»:]\nÁlgebra, niño\n[Fin del archivo.]",
        media=(("Álgebra, niño".encode("cp1252"), "text/plain"),),
    ),
    "document of another kind": Caso(
        "notas.xlsx\n[El usuario envió el archivo «notas.xlsx» (application/vnd.ms-excel), "
        f"que aquí no se puede abrir: solo PDF y texto; {PIDE}.]",
        text="notas.xlsx",
        media=((b"PK", "application/vnd.ms-excel"),),
    ),
    "video": Caso(f"[El usuario envió un video, que aquí no se puede ver; {PIDE}.]", media=((b"..", "video/mp4"),)),
    "button": Caso("[Tocó el botón (EXC-101)]\nVer temario", "Ver temario", fields=BOTON),
    "button without text": Caso("[Tocó el botón «Ver temario» (EXC-101)]", fields=BOTON),
    "list entry": Caso(
        "[Eligió de la lista (EXC-101)]\nExcel básico",
        text="Excel básico",
        fields={"MessageType": "interactive", "ListId": "EXC-101", "ListTitle": "Excel básico"},
    ),
    "form": Caso(
        "[Respondió un formulario: nombre: Ana; cursos: EXC-101; cursos: PBI-1]",
        fields={
            "MessageType": "interactive",
            "InteractiveData": json.dumps({"flow_token": "x", "nombre": "Ana", "cursos": ["EXC-101", "PBI-1"]}),
        },
    ),
    "forwarded": Caso(
        "[Mensaje reenviado; no lo escribió el usuario:]\nOferta", text="Oferta", fields={"Forwarded": "true"}
    ),
    "forwarded often": Caso(
        "[Mensaje reenviado muchas veces; no lo escribió el usuario:]\nOferta",
        text="Oferta",
        fields={"Forwarded": "true", "FrequentlyForwarded": "true"},
    ),
    "from an advertisement": Caso(
        "[El usuario llegó desde un anuncio: «Aprende Excel» · Desde cero · https://fb.me/x]\nquiero informes",
        text="quiero informes",
        fields={
            "ReferralHeadline": "Aprende Excel",
            "ReferralBody": "Desde cero",
            "ReferralSourceUrl": "https://fb.me/x",
            "ReferralSourceType": "ad",
        },
    ),
    "reply to a message that is gone": Caso(
        "[En respuesta a un mensaje anterior que ya no está a la mano]\nese",
        text="ese",
        fields={"OriginalRepliedMessageSid": "SM" + "0" * 32},
    ),
    "reaction": Caso(
        "[Reacción a un mensaje anterior que ya no está a la mano]\n[El usuario solo reaccionó con un emoji]\n👍",
        text="👍",
        fields={"MessageType": "reaction", "OriginalRepliedMessageSid": "SM" + "0" * 32},
    ),
    "reaction taken back": Caso("[El usuario quitó su reacción]", fields={"MessageType": "reaction"}),
    "kind that nobody knows": Caso(PLACEHOLDERS[""], fields={"MessageType": "order"}),
    "text": Caso("hola", text="hola"),
}


def test_every_kind_of_message_reaches_the_model_as_words_or_parts(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = says("Claro.")
    for n, caso in enumerate(CASOS.values()):
        twilio.receive(f"whatsapp:+52155333300{n:02}", caso.text, media=caso.media, fields=caso.fields)
    assert {run["outcome"] for run in hilo.done(len(CASOS))} == {"answered"}
    read: dict[str, Entrada] = {}
    users = {row["id"]: row["user_phone"] for row in hilo.rows("SELECT id, user_phone FROM runs")}
    for request in openai_server.requests:
        if (request.method, request.path) == ("POST", "/v1/responses"):
            n = int(users[int(request.body["metadata"]["run"])][-2:])
            read[list(CASOS)[n]] = request.body["input"][0]["content"]
    assert read == {name: caso.lee for name, caso in CASOS.items()}


# --- Voice notes ----------------------------------------------------------------------------------------------


def test_voice_note_is_answered_like_text_and_kept_in_the_transcript(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(VOZ_PALABRAS="Power BI, Canva", VOZ_IDIOMA="es,en")
    twilio.receive(ANA, media=[(OGG, "audio/ogg; codecs=opus")])
    twilio.wait_for(ANA, 1)
    upload = openai_server.transcriptions[0]
    assert upload.filename == "voz.ogg" and upload.content == OGG
    assert upload.fields["model"] == "gpt-transcribe"
    hilo.done()
    assert guardado(hilo) == ["[Nota de voz] Hola, busco un curso de Excel."]
    body = openai_server.requests[-1].body
    assert "5511110001" not in str(body)


def test_user_whose_language_is_known_is_heard_in_it(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(VOZ_MODELO="whisper-1")
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    hilo.rows("UPDATE users SET language = 'pt'")
    twilio.receive(ANA, media=[(OGG, "audio/mpeg")])
    twilio.wait_for(ANA, 2)
    upload = openai_server.transcriptions[0]
    assert (upload.fields["language"], upload.fields["model"], upload.filename) == ("pt", "whisper-1", "voz.mp3")


def test_transcription_that_fails_is_told_kindly(hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.faults.append(Fault("POST /v1/audio", status=500, repeat=None))
    openai_server.model = says("No pude escucharte, ¿me lo escribes?")
    twilio.receive(ANA, media=[(OGG, "audio/ogg")])
    assert twilio.wait_for(ANA, 1)[0].body == "No pude escucharte, ¿me lo escribes?"
    assert leido(openai_server) == [
        "[Nota de voz que no se pudo escuchar; dilo con amabilidad y pide que lo escriba.]"
    ]


def test_transcription_that_hangs_leaves_the_model_its_time(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(THREADS_RUN_TIMEOUT="4")
    openai_server.faults.append(Fault("POST /v1/audio", hang=30, repeat=None))
    openai_server.model = says("¿Me lo escribes?")
    twilio.receive(ANA, media=[(OGG, "audio/ogg")])
    assert twilio.wait_for(ANA, 1)[0].body == "¿Me lo escribes?"
    assert hilo.done()[0]["outcome"] == "answered"


def test_run_whose_file_is_read_for_long_is_kept_by_a_short_lease_and_read_once(
    start: Start, twilio: Simulator
) -> None:
    hilo, calls, leases = start(LEASE_SECONDS="0.5"), [], []

    def message_to_input(message: Message) -> str:
        calls.append(message.sid)
        until = time.monotonic() + 4  # the lease alone, with a call's time in it, is three
        while time.monotonic() < until:
            leases.append(hilo.rows("SELECT extract(epoch FROM due_at - now())::float8 AS s FROM runs")[0]["s"])
            time.sleep(0.05)
        return "[Nota de voz] hola"

    hilo.plug(message_to_input=message_to_input)
    twilio.receive(ANA, media=[(OGG, "audio/ogg")])
    assert twilio.wait_for(ANA, 1)[0].body == "Eco: [Nota de voz] hola"
    limit = hilo.settings.call_timeout + hilo.settings.grace
    assert len(calls) == 1 and 0 < min(leases) and max(leases) <= limit


def test_voice_note_that_is_too_large_is_not_transcribed(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    twilio.receive(ANA, media=[(bytes(16 * 1024 * 1024 + 1), "audio/ogg")])
    twilio.wait_for(ANA, 1)
    assert "the file is larger than 16384 KiB" in str(leido(openai_server)[0])
    assert openai_server.transcriptions == []


def test_voice_note_without_openai_is_answered_by_the_traditional_flow(start: Start, twilio: Simulator) -> None:
    start(OPENAI_API_KEY="", ASSISTANT_ID="")
    twilio.receive(ANA, media=[(OGG, "audio/ogg")])
    assert texto("flujo_audio") in twilio.wait_for(ANA, 1)[0].body


# --- Images and files -----------------------------------------------------------------------------------------


def test_image_is_kept_as_words_once_the_turn_is_done(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    twilio.receive(ANA, "mira", media=[(PNG, "image/png")])
    twilio.wait_for(ANA, 1)
    hilo.done()
    assert guardado(hilo) == ["mira\n[El usuario envió una imagen:]"]
    assert hilo.gateway.journey.history(ANA, 10, None)[0].text == "mira\n[El usuario envió una imagen:]"


def test_image_is_read_again_from_the_row_when_the_first_response_fails(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.faults.append(Fault("POST /v1/responses$", status=500))
    openai_server.model = says("Bonita.")
    twilio.receive(ANA, media=[(PNG, "image/png")])
    assert twilio.wait_for(ANA, 1)[0].body == "Bonita."
    first, second = leido(openai_server)
    assert first == second == [palabras("[El usuario envió una imagen:]"), imagen(PNG)]


def test_image_that_twilio_does_not_give_leaves_its_caption(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    twilio.fault("media", "error", times=None)
    twilio.receive(ANA, "¿este curso?", media=[(PNG, "image/png")])
    twilio.wait_for(ANA, 1)
    read = leido(openai_server)[0]
    assert isinstance(read, str) and read.startswith("¿este curso?\n[El usuario envió una imagen que no se pudo ver")


def test_photo_and_the_question_about_it_are_one_turn(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(BURST_SECONDS="1")
    twilio.receive(ANA, media=[(PNG, "image/png")])
    twilio.receive(ANA, "¿tienen este?")
    twilio.wait_for(ANA, 1)
    assert len(hilo.done()) == 1
    assert leido(openai_server) == [[palabras("[El usuario envió una imagen:]"), imagen(PNG)], "¿tienen este?"]


# --- Replies to a message -------------------------------------------------------------------------------------


def test_reply_quotes_what_it_answers_and_never_what_others_said(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = says("Tenemos Excel y Canva.")
    voice = twilio.receive(ANA, media=[(OGG, "audio/ogg")])
    ours = twilio.wait_for(ANA, 1)[0]
    hilo.done(1)
    for n, sid in enumerate((ours.sid, voice.sid), 2):
        twilio.receive(ANA, "ese", fields={"OriginalRepliedMessageSid": sid})
        twilio.wait_for(ANA, n)
    twilio.receive(LUIS, "ese", fields={"OriginalRepliedMessageSid": ours.sid})
    twilio.wait_for(LUIS, 1)
    assert leido(openai_server)[1:] == [
        "[En respuesta a lo que le escribiste: «Tenemos Excel y Canva.»]\nese",
        "[En respuesta a su propio mensaje: «[Nota de voz] Hola, busco un curso de Excel.»]\nese",
        "[En respuesta a un mensaje anterior que ya no está a la mano]\nese",
    ]


@pytest.mark.parametrize(("direction", "archivo", "plantilla", "words"), [
    ("out", None, "HX1", "lo que le escribiste, una plantilla"),
    ("out", "https://x/y.pdf", None, "lo que le escribiste, un archivo"),
    ("in", "https://x/y.jpg", None, "su propio mensaje, un archivo"),
    ("in", None, None, "su propio mensaje, sin texto"),
])  # fmt: skip
def test_quoted_message_without_text_is_named_for_what_it_is(
    direction: str, archivo: str | None, plantilla: str | None, words: str
) -> None:
    row = {"direction": direction, "leido": None, "body": "", "archivo": archivo, "plantilla": plantilla}
    assert mensajes.cita(row) == words


# --- Plugins that are not there -------------------------------------------------------------------------------

LECTORES = ("mensajes", "voz", "imagenes", "documentos")


def test_without_any_reader_the_journey_says_what_it_cannot_read(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    for name in LECTORES:
        hilo.gateway.plugins.unload(f"tools.{name}")
    twilio.receive(ANA, media=[(OGG, "audio/ogg")])
    twilio.wait_for(ANA, 1)
    twilio.receive(ANA, "¿este?", media=[(PNG, "image/png")], fields={"Forwarded": "true"})
    twilio.wait_for(ANA, 2)
    assert leido(openai_server) == [PLACEHOLDERS["audio"], f"¿este?\n{PLACEHOLDERS['image']}"]


SOLO = """
from tools import Context, Media, Message
from tools._plugins import Plugins
plugins = Plugins()
assert all(report.error is None for report in plugins.reports.values()), plugins.reports
message = Message("SM1", "whatsapp:+52155", "hola", (Media("https://x", "video/mp4"),), raw={"Forwarded": "true"})
class Services:
    def query(self, sql, params): return []
class Settings:
    call_timeout = 10.0
context = Context(settings=Settings(), services=Services())
print(plugins.first("message_to_input", lambda value: value, message=message, context=context))
"""


@pytest.mark.parametrize("name", LECTORES)
def test_each_reader_works_without_the_others(name: str, tmp_path: Path) -> None:
    tools = Path(__file__).parent.parent / "tools"
    (tmp_path / "tools").mkdir()
    for stem in ("__init__", "_plugins", "_entrada", name):
        shutil.copy(tools / f"{stem}.py", tmp_path / "tools")
    run = subprocess.run([sys.executable, "-c", SOLO], cwd=tmp_path, capture_output=True, text=True, timeout=30)
    forwarded = "[Mensaje reenviado; no lo escribió el usuario:]\n" if name == "mensajes" else ""
    video = f"[El usuario envió un video, que aquí no se puede ver; {PIDE}.]"
    video = video if name == "documentos" else "[El usuario envió un video que no se puede abrir aquí.]"
    assert (run.stdout.strip(), run.stderr) == (f"{forwarded}hola\n{video}", "")


# --- Downloads ------------------------------------------------------------------------------------------------


@contextmanager
def server(*answers: bytes, drip: float = 0.0) -> Iterator[tuple[str, list[bytes]]]:
    """A raw HTTP server that gives these answers in turn, byte by byte where it drips; its URL, and its requests."""
    asked: list[bytes] = []
    over = threading.Event()

    def serve(listener: socket.socket) -> None:
        for answer in answers:
            connection, _ = listener.accept()
            with connection:
                asked.append(connection.recv(65536))
                for piece in [answer] if not drip else [answer[n : n + 1] for n in range(len(answer))]:
                    if over.wait(drip if drip else 0):
                        return
                    try:
                        connection.sendall(piece)
                    except OSError:
                        return

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}", asked
        over.set()
        thread.join(5)


def twilio_at(url: str) -> WhatsApp:
    """Twilio's REST API at another address."""
    return WhatsApp(
        load_settings({"TWILIO_API_URL": url, "TWILIO_ACCOUNT_SID": "AC" + "1" * 32, "TWILIO_AUTH_TOKEN": "secreto"})
    )


def test_file_that_comes_byte_by_byte_is_given_up_in_time() -> None:
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n"
    with server(answer + bytes(1000), drip=0.01) as (url, _):
        began = time.monotonic()
        with pytest.raises(ToolError, match="too long"):
            twilio_at(url).download(Media(f"{url}/x", "image/png"), 10**6, 1.0)
        assert time.monotonic() - began < 2.5


def test_file_that_ends_too_early_is_refused() -> None:
    with server(b"HTTP/1.1 200 OK\r\nContent-Length: 100\r\n\r\n0123456789") as (url, _):
        with pytest.raises(ToolError, match="could not be had"):
            twilio_at(url).download(Media(f"{url}/x", "image/png"), 10**6, 5.0)


def test_credentials_stay_at_twilio_when_it_redirects() -> None:
    with server(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok") as (store, asked_store):
        moved = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {store}/f\r\nContent-Length: 0\r\n\r\n".encode()
        with server(moved) as (url, asked):
            assert twilio_at(url).download(Media(f"{url}/x", "image/png"), 10, 5.0) == b"ok"
    assert b"Authorization: Basic" in asked[0] and b"authorization" not in asked_store[0].lower()


@pytest.mark.parametrize("location", ["http://example.com/f", "ftp://127.0.0.1/f", "file:///etc/passwd"])
def test_redirect_without_tls_is_not_followed(location: str) -> None:
    moved = f"HTTP/1.1 307 Temporary Redirect\r\nLocation: {location}\r\nContent-Length: 0\r\n\r\n".encode()
    with server(moved) as (url, _):
        with pytest.raises(ToolError, match="without TLS"):
            twilio_at(url).download(Media(f"{url}/x", "image/png"), 10, 5.0)


@pytest.mark.parametrize(
    "url", ["https://example.com/x", "https://twilio.com.example.com/x", "http://api.twilio.com/x", "file:///etc/passwd"]
)
def test_file_that_is_not_at_twilio_is_not_asked_for(url: str) -> None:
    with pytest.raises(ToolError, match="not at Twilio"):
        twilio_at("http://127.0.0.1:9").download(Media(url, "image/png"), 10, 1.0)


# --- Contacts, pictures and words, piece by piece -------------------------------------------------------------


def test_vcard_of_an_old_telephone_is_read() -> None:
    vcard = (
        "BEGIN:VCARD\nVERSION:2.1\nN;CHARSET=UTF-8;ENCODING=QUOTED-PRINTABLE:P=C3=A9rez;Jos=C3=A9=\n;;\n"
        "TEL;CELL:5522223333\nEMAIL:jose@example.com\nEND:VCARD\n"
        "BEGIN:VCARD\nFN:Ana\\, la de\n  ventas\nTEL:tel:+525511112222\nEND:VCARD\n"
    )
    assert list(map(str, contactos(vcard))) == [
        "José Pérez, 5522223333, jose@example.com",
        "Ana, la de ventas, +525511112222",
    ]


@dataclass
class Archivo:
    """What a plugin reaches when a message has this one file."""

    datos: bytes = b""

    def query(self, sql: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        return []

    def download(self, media: Media, limit: int, seconds: float) -> bytes:
        return self.datos


def lee(message: Message, datos: bytes = b"") -> Any:
    """What the model reads for a message whose file has these bytes."""
    settings = load_settings({"DATABASE_URL": "postgresql://nadie@localhost/nada"})
    return leer(message, Context(address=ANA, settings=settings, services=Archivo(datos)))


def test_contact_with_the_users_own_number_does_not_tell_it() -> None:
    read = lee(Message("SM1", ANA, media=(Media("https://x", "text/vcard"),)), VCARD)
    assert read == (
        "[El usuario compartió un contacto: Lucía Pérez, Escuela Norte, +52 1 55 2222 3333, su propio número]"
    )


def test_long_text_file_is_cut() -> None:
    read = lee(Message("SM1", ANA, media=(Media("https://x", "text/csv"),)), b"a" * 50_000)
    assert "del que este es el comienzo" in read and len(read) < 20_200


def test_file_that_is_not_what_it_says_is_not_given_to_the_model() -> None:
    assert "no es un PDF" in lee(Message("SM1", ANA, media=(Media("https://x", "application/pdf"),)), b"MZ")
    assert "no es JPEG" in lee(Message("SM1", ANA, media=(Media("https://x", "image/png"),)), b"<svg/>")


def test_gif_that_moves_is_known() -> None:
    assert se_mueve(b"GIF89a....\x21\xff\x0bNETSCAPE2.0", "image/gif") and not se_mueve(b"GIF89a....", "image/gif")


def test_long_quote_is_cut_at_a_word() -> None:
    assert breve("uno   dos\ntres cuatro", 14) == "uno dos tres…"
    assert breve("x" * 300, 10) == "x" * 9 + "…"


@tries(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    st.dictionaries(
        st.sampled_from(
            ["ButtonText", "ButtonPayload", "ListId", "ListTitle", "InteractiveData", "Label", "Address", "Forwarded",
             "ReferralBody", "ReferralSourceUrl", "OriginalRepliedMessageSid", "MessageType"]
        ),
        st.text() | st.sampled_from(["true", "reaction", "[" * 5000, '{"a": {"b": [1, null]}}']),
    ),
    st.text(),
    st.sampled_from(["", "text/vcard", "text/plain", "image/png", "application/pdf", "audio/ogg", "x"]),
    st.binary(max_size=200),
)  # fmt: skip
def test_whatever_twilio_sends_becomes_something_that_can_be_stored(
    raw: dict[str, str], text: str, tipo: str, datos: bytes
) -> None:
    media = (Media("https://x", tipo),) if tipo else ()
    read = lee(Message("SM1", ANA, text, media, location=(float("nan"), 1.0), raw=raw), datos)
    assert read or not media
    stored = json.dumps(read, ensure_ascii=False)
    stored.encode()
    assert "\\u0000" not in stored


# --- Typing ---------------------------------------------------------------------------------------------------


def test_typing_is_shown_once_a_turn_under_its_last_message(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(BURST_SECONDS="1")
    twilio.receive(ANA, "hola")
    last = twilio.receive(ANA, "info del curso")
    twilio.wait_for(ANA, 1)
    hilo.done()
    hilo.gateway.journey.events.stop()
    assert [typing.message_sid for typing in twilio.typing] == [last.sid]


def test_command_that_a_plugin_answers_shows_no_typing(hilo: Hilo, twilio: Simulator) -> None:
    hilo.plug(incoming_message=lambda message: "Listo." if message.text == "/orden" else None)
    twilio.receive(ANA, "/orden")
    assert twilio.wait_for(ANA, 1)[0].body == "Listo."
    hilo.done()
    hilo.gateway.journey.events.stop()
    assert twilio.typing == []


def test_user_who_talks_to_an_advisor_sees_no_typing(hilo: Hilo, twilio: Simulator) -> None:
    hilo.gateway.plugins.unload("tools.asesor")
    twilio.receive(ANA, "hola")
    hilo.done()
    hilo.rows("UPDATE users SET mode = 'human'")
    twilio.receive(ANA, "gracias")
    hilo.done(2)
    hilo.gateway.journey.events.stop()
    assert len(twilio.typing) == 1


def test_typing_that_twilio_refuses_does_not_touch_the_answer(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    twilio.fault("typing", "error", times=None)
    openai_server.model = says("Hola.")
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "Hola."
    assert hilo.done()[0]["outcome"] == "answered"
