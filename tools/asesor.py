"""Hands a conversation over to a person of the team, and back to the assistant.

The assistant's tool `hablar_con_asesor` and the user's `/asesor` put the conversation in mode human: the assistant is
silent, and what the user writes goes to the advisors, but for the commands that other plugins answer. They get a notice
with the last messages; whoever answers it (swiping it, in WhatsApp) writes to the user through Hilo. `/bot` from either
ends it, and so does the time: the assistant then knows what was said. Where no advisor can be reached, or none answers
in time, the gateway tells the user and the assistant goes on. The advisor who answered last has the conversation;
without quoting a message an advisor writes to the only one that is theirs to answer, and gets a list where there are
several. An advisor who opted out is left out until they return.

Settings (environment); with neither of the first two there are no advisors, and who asks is told ASESOR_CONTACTO:
    ASESORES              WhatsApp addresses, with commas: whatsapp:+5215512345678,whatsapp:+5215587654321
    ASESOR_WEBHOOK_URL    https://…: gets each request and message as JSON (keys: see `publicar`)
    ASESOR_MINUTOS        minutes until the assistant is back; what an advisor writes begins them anew (60)
    ASESOR_TEMPLATE_SID   HX…: a template for the notice, which reaches advisors who have not written for 24 hours;
                          its variable 1 says who, 2 why and what was said
    ASESOR_CONTACTO       how else to reach a person, as the traditional flow says it
"""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from handoff import identity as identidad
from handoff import nobody_came
from tools import Context, Message, Part, Setting, ToolError, hookimpl
from tools._flujo_lectura import leer
from tools._textos import texto

LINEAS, LARGO = 8, 160  # lines of the notice's summary, characters of each
ESPERAS = (0.0, 1.0, 5.0)  # seconds before each attempt to post to the webhook
SIN_SABER = 1.0  # minutes that a user waits, at most, while nobody knows whether the webhook took the request
ARCHIVOS = {"audio": "audio", "image": "imagen", "video": "video"}

Fila = dict[str, Any]


# --- Settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ajustes:
    """Who the advisors are, and for how long a conversation is theirs."""

    asesores: tuple[str, ...]
    webhook: str
    minutos: float
    plantilla: str
    contacto: str


def ajustes_de(context: Context) -> Ajustes:
    """The settings."""
    leer = context.settings.get
    return Ajustes(
        asesores_de(leer("ASESORES")), leer("ASESOR_WEBHOOK_URL"), float(leer("ASESOR_MINUTOS", "60")),
        leer("ASESOR_TEMPLATE_SID"), leer("ASESOR_CONTACTO"),
    )  # fmt: skip


def asesores_de(valor: str) -> tuple[str, ...]:
    """The advisors' addresses; raises ValueError."""
    nombrados = [parte.strip() for parte in valor.split(",") if parte.strip()]
    asesores = tuple(f"whatsapp:{parte}" if parte[0] == "+" else parte for parte in nombrados)
    if not all(re.fullmatch(r"whatsapp:(\+\d{7,15}|[A-Z]{2}\.\w+)", asesor) for asesor in asesores):
        raise ValueError(valor)
    return asesores


URL = r"https://\S+|http://(127\.0\.0\.1|localhost)(:\d+)?(/\S*)?"  # with TLS, or one that does not leave this machine
SETTINGS = {
    "ASESORES": Setting("whatsapp:+ and a number, with commas", asesores_de),
    "ASESOR_WEBHOOK_URL": Setting("https://host/…", URL, secret=True),
    "ASESOR_MINUTOS": Setting("minutes above 0", r"(?=.*[1-9])[0-9]{1,5}(\.[0-9]+)?"),
    "ASESOR_TEMPLATE_SID": Setting("a ContentSid, HX and 32 hexadecimal digits", "HX[0-9a-fA-F]{32}"),
    "ASESOR_CONTACTO": Setting("how else to reach a person, in words"),
}


# --- A user asks for a person ---------------------------------------------------------------------------------


def hablar_con_asesor(context: Context, motivo: str) -> str:
    """Pasa la conversación a una persona del equipo. Úsala cuando el usuario pida hablar con alguien, o cuando no
    puedas resolver lo que necesita. En `motivo` di en una frase qué es. Después dile que un asesor le escribirá."""
    ajustes = ajustes_de(context)
    if not hay_alguien(context, ajustes):
        raise ToolError(f"Por aquí no hay asesores. {ajustes.contacto or 'Ofrece que deje su pregunta.'}")
    if not pasar(context, ajustes):
        return "El asesor ya estaba avisado, o el usuario pidió no recibir mensajes."
    for parte in avisos(context, ajustes, motivo):
        context.send(parte)
    return "El asesor ya está avisado y escribirá en este mismo chat. Despídete en una frase; desde ahora contesta él."


@hookimpl
def register_tools(register: Any) -> None:
    """Give the assistant the tool."""
    register(hablar_con_asesor, side_effects=True)


@hookimpl(tryfirst=True)
def incoming_message(message: Message, context: Context) -> list[Part] | None:
    """What to do with a message of an advisor, of a user who is with one, or who asks for one; None for any other."""
    ajustes = ajustes_de(context)
    if context.mode == "out":  # the user's word to leave, which the gateway itself answers
        return se_fue(message, context, ajustes)
    if ajustes.asesores and {message.address, message.raw.get("From")} & set(ajustes.asesores):
        hecho = de_asesor(message, context, ajustes)
        if hecho is not None:
            return hecho
    palabra = primera_palabra(message)
    if palabra == "/bot":
        return volver(message, context, ajustes)
    if palabra == "/asesor":
        return pedir(context, ajustes, message.text.strip()[len("/asesor") :].strip() or texto("asesor_sin_motivo"))
    if context.mode == "human" and palabra:  # perhaps another plugin's, whose answer is to be heard
        hacer_oir(context)
        return None
    return con_asesor(message, context, ajustes) if context.mode == "human" else None


@hookimpl(specname="incoming_message", trylast=True)
def sin_dueño(message: Message, context: Context) -> list[Part] | None:
    """Take to the advisor what looks like a command and is none."""
    return con_asesor(message, context, ajustes_de(context)) if context.mode == "human" else None


@hookimpl
def fallback_reply(message: Message, reason: str, context: Context) -> list[Part] | None:
    """What the assistant's tool does, for a turn that asks for a person without an assistant; None for any other."""
    ajustes = ajustes_de(context)
    dicho = "\n".join(dicho.text for dicho in context.turn or (message,) if dicho.text[:1] != "/")
    if "asesor" not in leer(dicho).dice or not hay_alguien(context, ajustes):
        return None
    return pedir(context, ajustes, breve(dicho))


def ayuda(context: Context) -> list[str]:
    """Lines for /ayuda."""
    claves = ("ayuda_asesor", "ayuda_bot") if hay_alguien(context, ajustes_de(context)) else ()
    return [texto(clave, context.language) for clave in claves]


def disponibles(context: Context, ajustes: Ajustes) -> list[str]:
    """The advisors who have not opted out."""
    se_fueron = context.query(
        """SELECT a AS asesor FROM unnest(:asesores::text[]) a
            JOIN users u ON u.user_phone = coalesce((SELECT x.user_phone FROM addresses x WHERE x.address = a), a)
            WHERE u.mode = 'out'""",
        asesores=[*ajustes.asesores],
    )  # fmt: skip
    return [asesor for asesor in ajustes.asesores if {"asesor": asesor} not in se_fueron]


def hay_alguien(context: Context, ajustes: Ajustes) -> bool:
    """Whether there is anybody to hand a conversation to."""
    return bool(ajustes.webhook or (ajustes.asesores and disponibles(context, ajustes)))


def pedir(context: Context, ajustes: Ajustes, motivo: str) -> list[Part]:
    """Hand over, and tell the user."""
    if not hay_alguien(context, ajustes):
        clave = "asesor_contacto" if ajustes.contacto else "asesor_no_hay"
        return [Part(texto(clave, context.language, contacto=ajustes.contacto))]
    avisado = Part(texto("asesor_avisado", context.language))
    if pasar(context, ajustes, otra_vez=True):
        return [avisado, *avisos(context, ajustes, motivo)]
    hacer_oir(context)
    return [avisado]


def pasar(context: Context, ajustes: Ajustes, otra_vez: bool = False) -> bool:
    """Put the conversation in the advisors' hands; False where it was, or the user wants no messages.

    `otra_vez`: also where this very run did so before and has told nobody yet, as when it is taken up after a crash."""
    minutos = ajustes.minutos if disponibles(context, ajustes) else min(ajustes.minutos, SIN_SABER)
    return bool(context.query(
        """SELECT set_mode(user_phone, 'human', :run, now() + :minutos::float8 * interval '1 minute') AS modo
            FROM users u WHERE user_phone = :u AND (mode = 'bot' OR mode = 'human' AND (mode_until <= now()
                OR :otra_vez AND mode_run = :run AND NOT EXISTS (SELECT 1 FROM messages m
                    WHERE m.run_id = :run AND m.direction = 'out' AND m.user_phone <> u.user_phone)))""",
        u=context.address, run=context.run_id, minutos=minutos, otra_vez=otra_vez,
    ))  # fmt: skip


def hacer_oir(context: Context) -> None:
    """Let this run's reply reach a user who is with an advisor."""
    context.query("UPDATE users SET mode_run = :run WHERE user_phone = :u AND mode = 'human'",
                  run=context.run_id, u=context.address)  # fmt: skip


def volver(message: Message, context: Context, ajustes: Ajustes) -> list[Part]:
    """The user's /bot: back to the assistant, and whoever had the conversation knows."""
    fin = para_asesores(context, ajustes, texto("asesor_fin_usuario", quien=quien(context, message)))
    if devolver(context, context.address):
        publicar(context, ajustes, "fin", message)
    else:
        fin = []
    return [Part(texto("bot_de_vuelta", context.language)), *fin]


def se_fue(message: Message, context: Context, ajustes: Ajustes) -> list[Part] | None:
    """Tell whoever had the conversation of a user who opted out; None where nobody had."""
    con_alguien = "SELECT 1 AS si FROM users WHERE user_phone = :u AND mode = 'out' AND mode_until > now()"
    if not context.query(con_alguien, u=context.address):
        return None
    publicar(context, ajustes, "fin", message)
    return para_asesores(context, ajustes, texto("asesor_usuario_baja", quien=quien(context, message)))


def devolver(context: Context, usuario: str) -> bool:
    """Give a conversation back to the assistant; False where it had it."""
    return bool(context.query(
        "SELECT set_mode(user_phone, 'bot', NULL, NULL) AS modo FROM users WHERE user_phone = :u AND mode = 'human'",
        u=usuario,
    ))  # fmt: skip


def con_asesor(message: Message, context: Context, ajustes: Ajustes) -> list[Part] | None:
    """Take what a user says to the advisors. When their time is up the assistant answers, which is None.

    Only where an advisor has answered does it give them more time: nobody waits for ever for one who does not."""
    atendido = encargado(context, context.address) is not None
    filas = context.query(
        "UPDATE users SET mode_until = CASE WHEN :atendido THEN now() + :minutos::float8 * interval '1 minute'"
        " ELSE mode_until END WHERE user_phone = :u AND mode = 'human' AND mode_until > now() RETURNING 1 AS sigue",
        u=context.address, minutos=ajustes.minutos, atendido=atendido,
    )  # fmt: skip
    if not filas or not hay_alguien(context, ajustes):
        if devolver(context, context.address) and not atendido:
            context.send(nobody_came(context.settings, context.language))
        return None
    publicar(context, ajustes, "mensaje", message)
    dicho = texto("asesor_dice_usuario", quien=quien(context, message), texto=en_palabras(message, "es"))
    return para_asesores(context, ajustes, dicho)


# --- What the advisors get ------------------------------------------------------------------------------------


def avisos(context: Context, ajustes: Ajustes, motivo: str) -> list[Part]:
    """The notice for each advisor; the webhook gets its own."""
    publicar(context, ajustes, "pedido", context.turn[-1] if context.turn else None, motivo)
    nombre, lineas = quien(context), resumen(context)
    if ajustes.plantilla:  # templates take no line breaks
        en_corto = " · ".join([motivo, *lineas[-3:]])
        aviso = Part(content_sid=ajustes.plantilla, variables={"1": nombre, "2": " ".join(en_corto.split())[:600]})
    else:
        aviso = Part(texto("asesor_aviso", quien=nombre, motivo=motivo, resumen="\n".join(lineas)))
    return [replace(aviso, to=asesor) for asesor in disponibles(context, ajustes)]


def resumen(context: Context) -> list[str]:
    """The last lines said, the turn's own too."""
    dicho = [(turno.role, turno.text) for turno in context.history(LINEAS)]
    dicho += [("user", en_palabras(mensaje, "es")) for mensaje in context.turn]
    nombres = {"user": context.profile_name or "Usuario", "assistant": "Asistente"}
    return [f"— {nombres[rol]}: {breve(linea)}" for rol, linea in dicho[-LINEAS:]]


def breve(linea: str) -> str:
    """A line of at most LARGO characters."""
    linea = " ".join(linea.split())
    return linea if len(linea) <= LARGO else linea[: LARGO - 1] + "…"


def quien(context: Context, message: Message | None = None) -> str:
    """A user as advisors see them: the profile's name and the masked address."""
    return identidad(context.profile_name or (message.profile_name if message else ""), context.address)


def para_asesores(context: Context, ajustes: Ajustes, dicho: str) -> list[Part]:
    """A text for the advisor who has the user's conversation, or for all where nobody has it yet."""
    suyo = encargado(context, context.address)
    return [Part(dicho, to=asesor) for asesor in ([suyo] if suyo else disponibles(context, ajustes))]


ENCARGADO = """SELECT r.user_phone
    FROM messages m JOIN runs r ON r.id = m.run_id JOIN users a ON a.user_phone = r.user_phone
    WHERE m.user_phone = u.user_phone AND m.direction = 'out' AND m.at >= u.mode_since AND r.user_phone <> u.user_phone
        AND a.mode <> 'out'
    ORDER BY m.id DESC LIMIT 1"""


def encargado(context: Context, usuario: str) -> str | None:
    """The advisor who last wrote to a user since the conversation was handed over, and may still be written to."""
    filas = context.query(f"SELECT ({ENCARGADO}) AS asesor FROM users u WHERE u.user_phone = :u", u=usuario)  # noqa: S608
    asesor: str | None = filas[0]["asesor"] if filas else None
    return asesor


def en_palabras(message: Message, idioma: str) -> str:
    """A message as text: files cannot be passed on, since Twilio gives them to the account only, so they are named."""
    partes = [message.text.strip() or message.raw.get("ButtonText", "")]
    for archivo in message.media:
        tipo = texto("archivo_" + ARCHIVOS.get(archivo.content_type.partition("/")[0], "documento"), idioma)
        partes.append(texto("archivo_no_pasa", idioma, tipo=tipo))
    if message.location:
        partes.append("📍 https://maps.google.com/?q={},{}".format(*message.location))
    return "\n".join(filter(None, partes)) or texto("archivo_no_pasa", idioma, tipo=texto("archivo_otro", idioma))


# --- What the advisors write ----------------------------------------------------------------------------------


def de_asesor(message: Message, context: Context, ajustes: Ajustes) -> list[Part] | None:
    """Take an advisor's message to the user it is for; None where the advisor just writes as anybody does."""
    citada = conversacion_citada(message, context)
    suyas = [] if citada else conversaciones(context)
    if not citada and not suyas:
        return None
    palabra = primera_palabra(message)
    if palabra not in ("", "/bot") or (not citada and len(suyas) != 1):  # a mistyped command is not for the user
        return [lista(suyas or conversaciones(context))]
    usuario = citada or suyas[0]
    return terminar(context, usuario) if palabra == "/bot" else decir(message, context, ajustes, usuario)


def conversacion_citada(message: Message, context: Context) -> Fila | None:
    """The user whom the quoted message was about: its run is the user's."""
    filas = context.query(
        """SELECT u.user_phone, u.profile_name, u.language, u.mode, u.last_in_at < now() - interval '24 hours' AS tarde
            FROM messages m JOIN runs r ON r.id = m.run_id JOIN users u ON u.user_phone = r.user_phone
            WHERE m.sid = :sid AND m.direction = 'out' AND m.user_phone = ANY(:mias)
                AND r.user_phone <> m.user_phone""",
        sid=message.raw.get("OriginalRepliedMessageSid", ""), mias=[message.address, message.raw.get("From", "")],
    )  # fmt: skip
    return filas[0] if filas and filas[0]["user_phone"] != message.address else None


def conversaciones(context: Context) -> list[Fila]:
    """The open conversations that this advisor has; where there is none, those that nobody has yet, and those of this
    advisor whose user has just opted out: what was meant for them is for nobody else."""
    filas = context.query(
        f"""SELECT u.user_phone, u.profile_name, u.language, u.mode,
                u.last_in_at < now() - interval '24 hours' AS tarde,
                (extract(epoch FROM now() - u.mode_since) / 60)::int AS minutos, ({ENCARGADO}) AS asesor
            FROM users u WHERE u.mode IN ('human', 'out') AND u.mode_until > now() AND u.user_phone <> :yo
            ORDER BY u.mode_since LIMIT 100""",  # noqa: S608
        yo=context.address,
    )
    abiertas = [fila for fila in filas if fila["mode"] == "human"]
    suyas = [fila for fila in abiertas if fila["asesor"] == context.address]
    cerradas = [fila for fila in filas if fila["mode"] == "out" and fila["asesor"] == context.address]
    return suyas or [*cerradas, *(fila for fila in abiertas if fila["asesor"] is None)]


def decir(message: Message, context: Context, ajustes: Ajustes, usuario: Fila) -> list[Part]:
    """Pass on what an advisor writes; the user is, or is again, in the advisor's hands."""
    nombre = identidad(usuario["profile_name"], usuario["user_phone"])
    if usuario["mode"] == "out":
        return [Part(texto("asesor_usuario_baja", quien=nombre))]
    antes = encargado(context, usuario["user_phone"]) if usuario["mode"] == "human" else None
    tomar(context, ajustes, usuario["user_phone"])
    idioma = usuario["language"] or "es"
    dicho = f"👤 *{firma(context, idioma)}:* {en_palabras(message, idioma)}"
    partes = [Part(dicho, to=usuario["user_phone"]), *sin_contestar(context, usuario["user_phone"], nombre)]
    if antes not in (None, context.address):
        partes.append(Part(texto("asesor_relevo", quien=nombre, asesor=firma(context)), to=antes))
    if usuario["tarde"]:
        partes.append(Part(texto("asesor_ventana", quien=nombre)))
    if message.media:
        partes.append(Part(texto("asesor_sin_archivos")))
    return partes


def tomar(context: Context, ajustes: Ajustes, usuario: str) -> None:
    """Put a conversation in this advisor's hands, or leave it there for longer."""
    context.query(
        """SELECT set_mode(user_phone, 'human', :run, now() + :minutos::float8 * interval '1 minute') AS modo
            FROM users WHERE user_phone = :u AND mode = 'bot'""",
        u=usuario, run=context.run_id, minutos=ajustes.minutos,
    )  # fmt: skip
    context.query(
        """UPDATE users SET mode_until = now() + :minutos::float8 * interval '1 minute'
            WHERE user_phone = :u AND mode = 'human'""",
        u=usuario, minutos=ajustes.minutos,
    )  # fmt: skip


def sin_contestar(context: Context, usuario: str, nombre: str) -> list[Part]:
    """For the advisor who has just taken a conversation: what the user had asked the assistant, whose answer does not
    leave any more."""
    filas = context.query(
        """SELECT m.body FROM users u JOIN runs r USING (user_phone) JOIN messages m ON m.run_id = r.id
            WHERE u.user_phone = :u AND u.mode = 'human' AND u.mode_run = :run AND r.state <> 'done'
                AND m.direction = 'in' AND m.reply IS NULL ORDER BY m.id""",
        u=usuario, run=context.run_id,
    )  # fmt: skip
    nada = texto("archivo_no_pasa", tipo=texto("archivo_otro"))
    return [Part(texto("asesor_dice_usuario", quien=nombre, texto=fila["body"] or nada)) for fila in filas]


def firma(context: Context, idioma: str = "es") -> str:
    """The advisor's name, as others see it."""
    return (context.profile_name or texto("asesor_nombre", idioma)).replace("*", "")


def terminar(context: Context, usuario: Fila) -> list[Part]:
    """An advisor's /bot: the user is told that the assistant is back, and so is another advisor who had them."""
    nombre = identidad(usuario["profile_name"], usuario["user_phone"])
    if usuario["mode"] == "out":
        cerrar = "UPDATE users SET mode_until = NULL WHERE user_phone = :u AND mode = 'out'"
        context.query(cerrar, u=usuario["user_phone"])
        return [Part(texto("asesor_usuario_baja", quien=nombre))]
    antes = encargado(context, usuario["user_phone"])
    if not devolver(context, usuario["user_phone"]):
        return [Part(texto("asesor_ya_devuelta", quien=nombre))]
    de_vuelta = texto("bot_de_vuelta", usuario["language"] or "es")
    partes = [Part(de_vuelta, to=usuario["user_phone"]), Part(texto("asesor_fin", quien=nombre))]
    if antes not in (None, context.address):
        partes.append(Part(texto("asesor_fin_otro", quien=nombre, asesor=firma(context)), to=antes))
    return partes


def lista(filas: list[Fila]) -> Part:
    """The conversations that an advisor may answer, and how."""
    renglones = [
        f"• {identidad(fila['profile_name'], fila['user_phone'])}, {texto('asesor_hace', minutos=fila['minutos'])}"
        for fila in filas[:20]
    ]
    return Part(texto("asesor_lista", cuantas=len(filas), lista="\n".join(renglones) or "—"))


def primera_palabra(message: Message) -> str:
    """The command that a message begins with, "" where it is none."""
    texto_ = message.text.strip().lower()
    return texto_.split()[0] if texto_.startswith("/") else ""


# --- The webhook ----------------------------------------------------------------------------------------------


def publicar(context: Context, ajustes: Ajustes, evento: str, message: Message | None, motivo: str = "") -> None:
    """Post an event to ASESOR_WEBHOOK_URL beside the journey: nobody waits for it.

    Keys: evento (pedido, mensaje or fin), direccion (the user's whole address), nombre, texto, motivo, resumen (lines;
    for a request) and sid, the message's own, by which a repeated event is known."""
    if not ajustes.webhook:
        return
    datos = {
        "evento": evento, "direccion": context.address, "nombre": context.profile_name, "motivo": motivo,
        "texto": en_palabras(message, "es") if message else "", "sid": message.sid if message else "",
        "resumen": resumen(context) if evento == "pedido" else [],
    }  # fmt: skip
    threading.Thread(target=entregar, args=(context, ajustes, datos), name="asesor", daemon=True).start()


def entregar(context: Context, ajustes: Ajustes, datos: Mapping[str, Any]) -> None:
    """Post an event. A request that was taken waits its whole time; one that reached nobody is over now, and where this
    process ends before it knows, SIN_SABER minutes after it was made."""
    tomado = enviar(ajustes.webhook, datos, context.log)
    if datos["evento"] != "pedido":
        return
    with contextlib.suppress(Exception):  # the gateway ends, or the database is away
        context.query(
            """UPDATE users u SET mode_until = CASE WHEN :tomado
                    THEN greatest(mode_until, mode_since + :minutos::float8 * interval '1 minute') ELSE now() END
                WHERE user_phone = :u AND mode = 'human' AND (:tomado OR NOT EXISTS (SELECT 1 FROM messages m
                    LEFT JOIN runs r ON r.id = m.run_id WHERE m.direction = 'out' AND m.at >= u.mode_since
                        AND m.state NOT IN ('failed', 'undelivered', 'withheld')
                        AND (m.run_id = :run AND m.user_phone <> :u OR m.user_phone = :u AND r.user_phone <> :u)))""",
            u=context.address, run=context.run_id, tomado=tomado, minutos=ajustes.minutos,
        )  # fmt: skip


def enviar(url: str, datos: Mapping[str, Any], log: Any) -> bool:
    """Post once, and twice more where it fails; whether it was taken. The log says what failed, not what was sent."""
    import requests

    for espera in ESPERAS:
        time.sleep(espera)
        try:
            respuesta = requests.post(url, json=datos, timeout=5, allow_redirects=False)
            if respuesta.status_code < 300:
                return True
            fallo = f"HTTP {respuesta.status_code}"
        except requests.RequestException as error:
            fallo = type(error).__name__
    log.warning("⚠️ ASESOR_WEBHOOK_URL did not take an event: %s", fallo)
    return False
