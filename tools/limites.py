"""Limits: messages of one user a minute and a day, and what the model may cost a day, for the whole gateway.

Who writes past a limit gets one courteous answer in that minute or day, and nothing more. Past the day's budget users
are served by the traditional flow. All is counted in PostgreSQL from the messages and responses themselves, so that it
is right with several processes and after a crash. There is no limit for advisors (ASESORES), for what a user writes to
one, nor for /asesor, /bot and the opt-out words.

Settings (environment); 0 is no limit:
    LIMITE_MINUTO       messages of one user a minute (20)
    LIMITE_DIA          messages of one user a day (200)
    LIMITE_TOKENS_DIA   tokens of all responses a day, input and output together (0)
    LIMITE_COSTO_DIA    US dollars of all responses a day, by LIMITE_PRECIOS (0)
    LIMITE_PRECIOS      dollars for a million input and output tokens of each model: gpt-6-luna=0.25/2,gpt-6-sol=2/16
                        (those are examples: take your provider's); a model that is not named costs as the dearest
    ZONA_HORARIA        where the day begins: America/Mexico_City (the default), Europe/Madrid…

A turn under way when the budget ends is still answered, and each process looks at the bill every two seconds: the day
may end a little above it.
"""

from __future__ import annotations

import re
import threading
import time
import weakref
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from tools import Context, Message, Part, PluginError, Setting, hookimpl
from tools._textos import IDIOMAS, texto

VIGENCIA = 2.0  # seconds for which a sum of the day's tokens is good
FIRME = 900.0  # seconds after which a response's tokens do not change any more

LIBRES = ("/asesor", "/bot")  # commands that whoever is past a limit may still give

# The user's messages of this one's minute and day, this one included, and whether they were told of the limit: the same
# however often it is asked. What an advisor got or nobody answered does not count, nor does a command without a limit.
CUENTA = """SELECT count(*) FILTER (WHERE del_minuto) AS minuto, count(*) FILTER (WHERE del_dia) AS dia,
    coalesce(bool_or(dicho = ANY(:de_minuto)) FILTER (WHERE del_minuto), false) AS minuto_dicho,
    coalesce(bool_or(dicho = ANY(:de_dia)) FILTER (WHERE del_dia), false) AS dia_dicho
    FROM (SELECT at FROM messages WHERE sid = :sid) m, LATERAL (
        SELECT reply -> 0 ->> 'text' AS dicho, date_trunc('minute', at) = date_trunc('minute', m.at) AS del_minuto,
            (at AT TIME ZONE :zona)::date = (m.at AT TIME ZONE :zona)::date AS del_dia
        FROM messages WHERE user_phone = :u AND direction = 'in' AND id <= (SELECT id FROM messages WHERE sid = :sid)
            AND (reply IS NULL OR reply -> 0 ->> 'text' = ANY(:de_minuto::text[] || :de_dia::text[])
                OR reply <> '[]' AND NOT reply @? '$[*] ? (@.to != null)'
                    AND lower(split_part(btrim(body), ' ', 1)) <> ALL(:libres)) ORDER BY id DESC LIMIT :n) c"""

# Tokens of the responses since a moment, but not of before today, by model and by whether they may still change.
GASTO = """SELECT t.inicio, t.corte, r.model, r.created_at < t.corte AS firme,
    coalesce(sum(r.input_tokens), 0)::bigint AS entrada, coalesce(sum(r.output_tokens), 0)::bigint AS salida
    FROM (SELECT date_trunc('day', now() AT TIME ZONE :zona) AT TIME ZONE :zona AS inicio,
        now() - :firme::float8 * interval '1 s' AS corte) t
    LEFT JOIN responses r ON r.created_at >= greatest(t.inicio, :desde::timestamptz)
    GROUP BY 1, 2, 3, 4"""


# --- Settings -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ajustes:
    """The limits, 0 where there is none."""

    minuto: int
    dia: int
    tokens: int
    dolares: float
    precios: dict[str, tuple[float, float]]
    zona: str


def ajustes_de(context: Context) -> Ajustes:
    """The settings."""
    leer = context.settings.get
    return Ajustes(
        minuto=int(float(leer("LIMITE_MINUTO", "20"))), dia=int(float(leer("LIMITE_DIA", "200"))),
        tokens=int(float(leer("LIMITE_TOKENS_DIA", "0"))), dolares=float(leer("LIMITE_COSTO_DIA", "0")),
        precios=precios_de(leer("LIMITE_PRECIOS")), zona=leer("ZONA_HORARIA", "America/Mexico_City"),
    )  # fmt: skip


def precios_de(valor: str) -> dict[str, tuple[float, float]]:
    """The prices of each model in "gpt-6-luna=0.25/2,gpt-6-sol=2/16"; raises ValueError."""
    precios = dict(precio(parte) for parte in valor.split(",") if parte.strip())
    if valor and not precios:
        raise ValueError(valor)
    return precios


def precio(parte: str) -> tuple[str, tuple[float, float]]:
    """A model and its prices: "gpt-6-luna=0.25/2"; raises ValueError."""
    leido = re.fullmatch(r"\s*([\w.:-]+)\s*=\s*(\d+(?:\.\d+)?)\s*/\s*(\d+(?:\.\d+)?)\s*", parte)
    if not leido:
        raise ValueError(parte)
    return leido[1], (float(leido[2]), float(leido[3]))


NUMERO = Setting("a number, 0 for no limit", r"[0-9]{1,12}(\.[0-9]+)?")
SETTINGS = {
    "LIMITE_MINUTO": NUMERO,
    "LIMITE_DIA": NUMERO,
    "LIMITE_TOKENS_DIA": NUMERO,
    "LIMITE_COSTO_DIA": NUMERO,
    "LIMITE_PRECIOS": Setting(
        "model=input/output, with commas, in dollars for a million tokens, where there is a LIMITE_COSTO_DIA",
        precios_de, required=lambda settings: settings.get("LIMITE_COSTO_DIA").strip("0."),
    ),
}  # fmt: skip


def contar(context: Context, ajustes: Ajustes, sql: str, **valores: Any) -> list[dict[str, Any]]:
    """The rows of a statement about days, which begin where ZONA_HORARIA is; raises PluginError where it is nowhere."""
    try:
        return context.query(sql, zona=ajustes.zona, **valores)
    except Exception as error:
        if getattr(error, "sqlstate", "") != "22023":
            raise
        raise PluginError(f"ZONA_HORARIA={ajustes.zona!r} cannot be used: it needs Area/City") from None


# --- Messages -------------------------------------------------------------------------------------------------


@hookimpl(tryfirst=True)
def incoming_message(message: Message, context: Context) -> list[Part] | None:
    """The answer to a message past a limit; None to one within both."""
    if context.mode != "bot" or libre(message) or es_asesor(message, context):
        return None
    return pasado_de(message, context, ajustes_de(context))


@hookimpl(specname="incoming_message", trylast=True)
def sin_dueño(message: Message, context: Context) -> list[Part] | None:
    """The same for a command without a limit that no plugin has answered: the assistant would."""
    if context.mode != "bot" or not libre(message) or es_asesor(message, context):
        return None
    return pasado_de(message, context, ajustes_de(context))


def libre(message: Message) -> bool:
    """Whether a message is one of the commands without a limit."""
    return message.text.lower().split()[:1] in ([comando] for comando in LIBRES)


def es_asesor(message: Message, context: Context) -> bool:
    """Whether the message is from one of ASESORES."""
    nombrados = {parte.strip().removeprefix("whatsapp:") for parte in context.settings.get("ASESORES").split(",")}
    return not nombrados.isdisjoint(
        direccion.removeprefix("whatsapp:") or None for direccion in (message.address, message.raw.get("From", ""))
    )


def pasado_de(message: Message, context: Context, ajustes: Ajustes) -> list[Part] | None:
    """What a user gets past their limit: a text for the first message, nothing for those after it."""
    limites = {"dia": ajustes.dia, "minuto": ajustes.minuto}
    if not any(limites.values()):
        return None
    n = max(limites.values()) + 2  # more need not be counted
    textos = {f"de_{nombre}": [texto(f"limite_{nombre}", idioma) for idioma in IDIOMAS] for nombre in limites}
    cuenta = contar(context, ajustes, CUENTA, u=context.address, sid=message.sid, n=n, **textos, libres=[*LIBRES])[0]
    for nombre, limite in limites.items():
        if limite and cuenta[nombre] > limite:
            context.log.info("🚦 over LIMITE_%s", nombre.upper())
            return [] if cuenta[f"{nombre}_dicho"] else [Part(texto(f"limite_{nombre}", context.language))]
    return None


# --- The day's budget -----------------------------------------------------------------------------------------


@hookimpl(tryfirst=True)
def choose_assistant(message: Message, context: Context) -> str | None:
    """No assistant once the day's budget is used up."""
    if not agotado(context, ajustes_de(context)):
        return None
    context.log.warning("🚦 the day's budget is used up: the traditional flow answers")
    return ""


@hookimpl(trylast=True)
def fallback_reply(message: Message, reason: str, context: Context) -> str | None:
    """What a user is told past the budget where there is no traditional flow."""
    sin_presupuesto = reason == "no_assistant" and agotado(context, ajustes_de(context))
    return texto("limite_gasto", context.language) if sin_presupuesto else None


@dataclass
class Cuenta:
    """The day's tokens by model: those that stand, and until when; a process begins anew with the whole day."""

    firmes: dict[str, tuple[int, int]] = field(default_factory=dict)
    total: dict[str, tuple[int, int]] = field(default_factory=dict)
    inicio: datetime | None = None
    desde: datetime | None = None
    mirada: float = float("-inf")  # monotonic
    cerrojo: threading.Lock = field(default_factory=threading.Lock)


CUENTAS: weakref.WeakKeyDictionary[Any, Cuenta] = weakref.WeakKeyDictionary()  # one a gateway, of which tests have more


def agotado(context: Context, ajustes: Ajustes) -> bool:
    """Whether today's responses have used up what the day allows."""
    if not (ajustes.tokens or ajustes.dolares):
        return False
    cuenta = CUENTAS.setdefault(context.services, Cuenta())
    with cuenta.cerrojo:
        if time.monotonic() - cuenta.mirada > VIGENCIA:
            mirar(context, ajustes, cuenta)
            cuenta.mirada = time.monotonic()
        gastado = dict(cuenta.total)
    tokens = sum(entrada + salida for entrada, salida in gastado.values())
    return bool(ajustes.tokens and tokens >= ajustes.tokens) or bool(
        ajustes.dolares and costo(gastado, ajustes.precios) >= ajustes.dolares
    )


def mirar(context: Context, ajustes: Ajustes, cuenta: Cuenta) -> None:
    """Bring the day's tokens up to date, reading only the responses that may have changed since the last time."""
    firme = max(FIRME, 2 * context.settings.threads_run_timeout)
    filas = contar(context, ajustes, GASTO, firme=firme, desde=cuenta.desde)
    if filas[0]["inicio"] != cuenta.inicio:
        cuenta.inicio, cuenta.firmes = filas[0]["inicio"], {}
    cuenta.firmes = sumadas(cuenta.firmes, [fila for fila in filas if fila["firme"]])
    cuenta.total = sumadas(cuenta.firmes, [fila for fila in filas if not fila["firme"]])
    cuenta.desde = filas[0]["corte"]


def sumadas(base: dict[str, tuple[int, int]], filas: list[dict[str, Any]]) -> dict[str, tuple[int, int]]:
    """Tokens by model with those of some rows added."""
    suma = dict(base)
    for fila in filas:
        entrada, salida = suma.get(fila["model"] or "", (0, 0))
        suma[fila["model"] or ""] = (entrada + fila["entrada"], salida + fila["salida"])
    return suma


def costo(gastado: dict[str, tuple[int, int]], precios: dict[str, tuple[float, float]]) -> float:
    """US dollars; a model without a price costs as the dearest one."""
    caro = max(precios.values(), key=sum)
    return sum(
        (entrada * precios.get(modelo, caro)[0] + salida * precios.get(modelo, caro)[1]) / 1e6
        for modelo, (entrada, salida) in gastado.items()
    )
