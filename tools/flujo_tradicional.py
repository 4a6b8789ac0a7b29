"""The traditional flow: a useful answer from the catalogue without a model.

It answers when no assistant is configured, when it is switched off and whenever OpenAI fails or is late. It finds
courses, tells their price, dates or syllabus, explains how to enrol, and understands "el 2", "el de excel" or "¿y
cuánto cuesta?" by reading its own earlier answers in the transcript: nothing else is kept anywhere.

Settings (environment), both free text that the user sees as it is:
    ASESOR_CONTACTO   how to reach a person: "WhatsApp +52 55 5555 0101, de lunes a viernes de 9 a 18 h"
    FORMAS_DE_PAGO    how one may pay: "tarjeta, transferencia y OXXO"

A team changes the sentences in `textos.toml` and the words that are understood in `_flujo_lectura.py`; a plugin of its
own that implements `fallback_reply` is asked before this one.
"""

from __future__ import annotations

import re
import sys
import textwrap
import unicodedata
from collections.abc import Callable, Mapping, Sequence

from tools import Context, Message, Setting, cursos, hookimpl
from tools._flujo_charla import (
    MEDIDAS,
    Charla,
    Curso,
    SinCatalogo,
    cualidad,
    listados,
    llanas,
    los_de_que_se_habla,
    nombrados,
    resuelta,
    tema_anterior,
)
from tools._flujo_lectura import LISTA, leer, llana

LARGO = 1_600  # UTF-16 units of one WhatsApp message, as Twilio counts them
AREAS = 12  # areas that are named when one asks what there is

SETTINGS = {
    "ASESOR_CONTACTO": Setting("how to reach a person, in words"),
    "FORMAS_DE_PAGO": Setting("how one may pay, in words"),
}


@hookimpl(trylast=True)
def fallback_reply(message: Message, reason: str, context: Context) -> str:
    """The traditional flow's answer to a turn, whatever the reason; it never mentions the reason."""
    turno = context.turn or (message,)
    charla = Charla(context, [dicho for dicho in turno if dicho.text[:1] != "/"] or turno)  # commands have their answer
    try:
        respuesta = next(filter(None, (paso(charla) for paso in PASOS)))
    except SinCatalogo:
        respuesta = parrafos(charla.t("flujo_sin_catalogo"), asesor(charla))
    return recortado(parrafos(saludo(charla), respuesta, sin_oir(charla)), LARGO)


# --- What is told about a course ------------------------------------------------------------------------------


def precio(charla: Charla, curso: Curso) -> str:
    """The price with its currency; empty when it is not published."""
    if curso["precio"] is None:
        return ""
    return cursos.precio_legible(curso["precio"], curso["moneda"]) if curso["precio"] else charla.t("flujo_gratis")


def fechas(charla: Charla, curso: Curso) -> str:
    """The next dates on which it starts, three at most."""
    proximas = curso["fechas_inicio"][:3]
    meses = charla.t("flujo_meses").split()
    return " · ".join(charla.t("flujo_fecha", dia=d.day, mes=meses[d.month - 1], año=d.year) for d in proximas)


def nivel(charla: Charla, curso: Curso) -> str:
    """The level, in the user's language."""
    return charla.t(f"flujo_nivel_{curso['nivel']}")


def modalidad(charla: Charla, curso: Curso) -> str:
    """The mode and the place."""
    return ", ".join(filter(None, (curso["modalidad"], curso["sede"])))


def columna(nombre: str) -> Callable[[Charla, Curso], str]:
    """What tells a column as it is stored."""
    return lambda charla, curso: abreviado(curso[nombre])


CAMPOS: Mapping[str, Callable[[Charla, Curso], str]] = {
    "nivel": nivel,
    "precio": precio,
    "fechas": fechas,
    "horario": columna("horario"),
    "duracion": columna("duracion"),
    "modalidad": modalidad,
    "docente": columna("docente"),
    "requisitos": columna("requisitos"),
    "temario": columna("temario"),
    "enlace": lambda charla, curso: curso["enlace"],
}
FICHA = ("nivel", "precio", "fechas", "horario", "duracion", "modalidad", "docente", "requisitos", "enlace")
COMPARACION = ("nivel", "precio", "fechas", "duracion", "modalidad")


def campo(charla: Charla, curso: Curso, nombre: str) -> str:
    """One line about a course: "💰 Precio: $1,290 MXN"."""
    valor = CAMPOS[nombre](charla, curso) or charla.t("flujo_por_confirmar")
    return charla.t(f"flujo_dato_{nombre}", valor=valor)


def titulo(curso: Curso) -> str:
    """A course's name and code, as `recordar` reads them back."""
    return f"*{abreviado(curso['nombre'].replace('*', ''), 150)}* ({curso['codigo']})"


def ficha(charla: Charla, curso: Curso, datos: Sequence[str]) -> str:
    """A course with what was asked about it, or all about it when nothing was."""
    if not datos:
        sabidos = "\n".join(campo(charla, curso, nombre) for nombre in FICHA if CAMPOS[nombre](charla, curso))
        return parrafos(titulo(curso), abreviado(curso["descripcion"], 350), sabidos, charla.t("flujo_que_mas"))
    campos = [nombre for nombre in datos if nombre in CAMPOS]
    lineas = [titulo(curso), *(campo(charla, curso, nombre) for nombre in campos)]
    faltan = any(not CAMPOS[nombre](charla, curso) for nombre in campos)
    return parrafos("\n".join(lineas), tramites(charla, curso, datos) or (asesor(charla) if faltan else ""))


def lista(charla: Charla, listado: Sequence[Curso], encabezado: str, datos: Sequence[str] = ()) -> str:
    """A numbered list of courses with their price and what was asked about them."""
    campos = ["modalidad" if nombre == "direccion" else nombre for nombre in datos if nombre != "precio"]
    renglones = [
        "\n".join([f"{n}. {titulo(curso)} · {precio(charla, curso) or charla.t('flujo_por_confirmar')}"]
                  + [campo(charla, curso, nombre) for nombre in campos if nombre in CAMPOS])
        for n, curso in enumerate(listado[:LISTA], 1)
    ]  # fmt: skip
    return parrafos(encabezado, "\n".join(renglones), tramites(charla, None, datos) or charla.t("flujo_elige"))


# --- What is told about the school ----------------------------------------------------------------------------


def asesor(charla: Charla) -> str:
    """How to reach a person."""
    contacto = charla.ajuste("ASESOR_CONTACTO")
    vias = [charla.t("flujo_asesor_comando")] if hay_asesores(charla) else []
    vias += [charla.t("flujo_asesor", contacto=contacto)] if contacto else []
    return "\n".join(vias) or charla.t("flujo_asesor_sin_contacto")


def hay_asesores(charla: Charla) -> bool:
    """Whether there is a command that calls one: another plugin's, which says so in its lines for /ayuda."""
    plugin = sys.modules.get("tools.asesor")
    try:
        return bool(plugin and plugin.ayuda(charla.context))
    except Exception:  # its settings, or the database: an answer without it is better than none
        return False


def inscripcion(charla: Charla, curso: Curso | None) -> list[str]:
    """How to enrol: the course's link, else a person."""
    if curso is None:
        return [charla.t("flujo_inscripcion_cual")]
    if curso["enlace"]:
        return [charla.t("flujo_inscripcion", enlace=curso["enlace"])]
    return [charla.t("flujo_inscripcion_sin_enlace"), asesor(charla)]


def pago(charla: Charla, curso: Curso | None) -> list[str]:
    """The methods of payment that the settings know, else who knows them."""
    formas = charla.ajuste("FORMAS_DE_PAGO")
    return [charla.t("flujo_pagos", formas=formas)] if formas else [charla.t("flujo_pagos_sin_dato"), asesor(charla)]


def direccion(charla: Charla, curso: Curso | None) -> list[str]:
    """Where a course is given, and who tells how to get there."""
    sede = [campo(charla, curso, "modalidad")] if curso else []
    return [*sede, charla.t("flujo_direccion"), asesor(charla)]


def con_asesor(clave: str) -> Callable[[Charla, Curso | None], list[str]]:
    """What sends a question that the catalogue cannot answer to a person."""
    return lambda charla, curso: [charla.t(clave), asesor(charla)]


TRAMITES: Mapping[str, Callable[[Charla, Curso | None], list[str]]] = {
    "inscripcion": inscripcion,
    "pago": pago,
    "comprobante": con_asesor("flujo_comprobante"),
    "descuento": con_asesor("flujo_descuento"),
    "certificado": con_asesor("flujo_certificado"),
    "atencion": con_asesor("flujo_atencion"),
    "factura": con_asesor("flujo_factura"),
    "direccion": direccion,
    "edad": con_asesor("flujo_edad"),
}


def pedidos(charla: Charla) -> list[str]:
    """What the turn asks, in the order in which it is answered."""
    return [nombre for nombre in (*CAMPOS, *TRAMITES) if charla.dice(nombre)]


SIN_CURSO = TRAMITES.keys() - {"inscripcion"}  # what is answered for any course


def tramites(charla: Charla, curso: Curso | None, datos: Sequence[str]) -> str:
    """The answers to what was asked about the school, each line once."""
    lineas = [linea for nombre in datos if nombre in TRAMITES for linea in TRAMITES[nombre](charla, curso)]
    return "\n".join(dict.fromkeys(lineas))


# --- The answers: the first one that has something to say is sent ---------------------------------------------


def sin_palabras(charla: Charla) -> str | None:
    """To a turn without words: what can be done with a voice note, a picture, a place…"""
    if charla.escrito:
        return None
    mensaje = charla.turno[-1]
    tipos = [media.content_type for media in mensaje.media] or ["location" if mensaje.location else ""]
    return charla.t(next(clave for comienzo, clave in TIPOS if tipos[0].startswith(comienzo)))


TIPOS = (  # how a media type begins, and what is answered
    ("audio/", "flujo_audio"),
    ("image/webp", "flujo_sticker"),
    ("image/", "flujo_imagen"),
    ("video/", "flujo_video"),
    ("text/vcard", "flujo_contacto"),
    ("text/x-vcard", "flujo_contacto"),
    ("location", "flujo_ubicacion"),
    ("application/", "flujo_documento"),
    ("text/", "flujo_documento"),
    ("", "flujo_sticker"),
)


def sin_oir(charla: Charla) -> str:
    """After the answer to the words of a turn: that its voice note was not heard; empty where there is none."""
    oidos = any(media.content_type.startswith("audio/") for mensaje in charla.turno for media in mensaje.media)
    return charla.t("flujo_audio") if oidos and charla.escrito else ""


def una_persona(charla: Charla) -> str | None:
    """To one who wants to talk to a person, or has a complaint."""
    if charla.dice("queja"):
        return parrafos(charla.t("flujo_queja"), asesor(charla))
    return asesor(charla) if charla.dice("asesor") else None


def los_nombrados(charla: Charla) -> str | None:
    """To a turn that names courses."""
    elegidos = nombrados(charla)
    if not elegidos:
        return None
    lejos = solo_parecidos(charla, elegidos)
    if len(elegidos) == 1 and not lejos:
        return ficha(charla, elegidos[0], pedidos(charla))
    if charla.lectura.numeros or charla.dice("ambos", "compara"):
        return parrafos(*(ficha(charla, curso, pedidos(charla) or COMPARACION) for curso in elegidos))
    cual = cualidad(charla)
    encabezado = charla.t("flujo_parecidos" if lejos else f"flujo_mas_{cual}" if cual else "flujo_resultados")
    return lista(charla, elegidos, encabezado, [*pedidos(charla), *SE_MIDE.get(cual, ())])


def solo_parecidos(charla: Charla, elegidos: Sequence[Curso]) -> bool:
    """Whether courses have only a part of a subject, and not in their names: "comida vegana", "soldadura"."""
    asunto = [llana(palabra) for palabra in charla.lectura.asunto]
    dichos = {palabra for curso in elegidos for columna in DONDE for palabra in llanas(curso[columna])}
    poco = not pedidos(charla) and all(curso.get("puntaje", 1) < PARECIDO for curso in elegidos)
    return poco and 1 <= len(asunto) <= 2 and not charla.lectura.lugar and not dichos & {*asunto}


PARECIDO = 0.5  # a score below it, of 1, is that of a course which has not all that was asked for
DONDE = ("nombre", "sede", "docente")  # what makes a course the one that was asked for, whatever its score
SE_MIDE: Mapping[str, Sequence[str]] = {"corto": ("duracion",), "pronto": ("fechas",), "facil": ("nivel",)}


def hasta_un_precio(charla: Charla) -> str | None:
    """To one who says how much a course may cost, or that it be free."""
    tope = charla.lectura.tope
    candidatos = los_de_que_se_habla(charla) if tope is not None else []
    if tope is None or not candidatos:
        return None
    clave = "flujo_gratuitos" if not tope else "flujo_hasta"
    caben = [curso for curso in candidatos if curso["precio"] is not None and curso["precio"] <= tope]
    encabezado = charla.t(clave if caben else f"{clave}_ninguno", tope=f"${tope:,f}")
    return lista(charla, sorted(caben or candidatos, key=MEDIDAS["barato"]), encabezado, pedidos(charla))


def en_un_mes(charla: Charla) -> str | None:
    """To one who asks what begins in a month."""
    meses = charla.lectura.meses
    candidatos = los_de_que_se_habla(charla) if meses else []
    if not candidatos:
        return None
    empiezan = [curso for curso in candidatos if any(dia.month in meses for dia in curso["fechas_inicio"])]
    nombres = " / ".join(charla.t("flujo_meses").split()[mes - 1] for mes in meses)
    clave = "flujo_mes_algunos" if len(empiezan) > LISTA else "flujo_mes" if empiezan else "flujo_mes_ninguno"
    orden = empiezan or sorted(candidatos, key=MEDIDAS["pronto"])
    return lista(charla, orden, charla.t(clave, mes=nombres), pedidos(charla))


def fuera_de_lista(charla: Charla) -> str | None:
    """To a position that the last list does not have."""
    if not charla.lectura.numeros or charla.lectura.tema:
        return None
    total = len(charla.memoria.lista)
    return charla.t("flujo_fuera_de_lista", total=total) if total else cual(charla)


def recado(charla: Charla) -> str | None:
    """To one who leaves a number, or a name after asking for a person."""
    if pedidos(charla) or charla.lectura.explicita or "?" in charla.escrito:
        return None
    pidio = charla.lineas and leer(charla.lineas[-1]).dice & {"asesor", "queja"}
    nombre = charla.lectura.tema or charla.dice("presentacion")
    return charla.t("flujo_recado") if charla.dice("privado") or (pidio and nombre) else None


def un_lugar(charla: Charla) -> str | None:
    """To one who asks whether courses are given in a place that none has."""
    sedes = charla.sedes() if charla.lectura.lugar else []
    return charla.t("flujo_lugares", sedes="; ".join(sedes)) if sedes else None


def desconocido(charla: Charla) -> str | None:
    """To a subject that the catalogue does not have; only one asked for as a course is said not to be there."""
    tema, lectura = charla.lectura.tema, charla.lectura
    tal_vez = lectura.ofrecida and not charla.dice(*CHARLAS, *SIN_CURSO)
    if not tema or not (lectura.explicita or tal_vez):
        return None
    dicho, algunos = " ".join(tema[:5]), charla.algunos()
    if not lectura.explicita:
        return charla.t("flujo_no_aparece", tema=dicho)
    cercanos = charla.cercanos(tema)
    if cercanos:
        return lista(charla, cercanos, charla.t("flujo_cercanos", tema=dicho))
    return lista(charla, algunos, charla.t("flujo_sin_resultados", tema=dicho))


def otra_lista(charla: Charla) -> str | None:
    """To one who asks what there is, or what else there is."""
    if charla.dice("senala") or not charla.dice("catalogo", "mas"):
        return None
    vistos = charla.memoria.vistos if charla.dice("mas") else frozenset()
    tema = tema_anterior(charla) if charla.dice("mas") else ()
    nuevos = [c for c in charla.buscar(tema, limite=4 * LISTA) if c["codigo"] not in vistos] if tema else []
    nuevos = nuevos or charla.ejemplos(vistos)
    if vistos and not nuevos:
        return charla.t("flujo_no_hay_mas")
    encabezado = charla.t("flujo_mas_resultados") if vistos else que_hay(charla)
    return lista(charla, nuevos or charla.algunos(), encabezado, pedidos(charla))


def que_hay(charla: Charla) -> str:
    """How many courses there are, and the largest areas of the catalogue in words."""
    areas = "; ".join(area.lower() for area in charla.areas()[:AREAS])
    return charla.t("flujo_areas", total=charla.cuantos(), areas=areas) if areas else charla.t("flujo_resultados")


def el_de_antes(charla: Charla) -> str | None:
    """To a question, or a yes, about the course or the list of an earlier answer."""
    quiere = charla.dice("interes", "si") and not charla.dice("no", "despedida")
    if not (quiere or pedidos(charla) or charla.dice("senala", "detalle")):
        return None
    foco = charla.memoria.foco and resuelta(charla, charla.memoria.foco)
    if foco:
        return ficha(charla, foco, pedidos(charla) or (["inscripcion"] if quiere else []))
    listado = listados(charla)
    if listado and pedidos(charla):
        return lista(charla, listado, "", pedidos(charla))
    return charla.t("flujo_elige") if listado else None


def sin_curso(charla: Charla) -> str | None:
    """To a question about no course in particular."""
    generales = tramites(charla, None, pedidos(charla))
    if generales:
        return generales
    return cual(charla) if pedidos(charla) or charla.dice("senala") else None


def cual(charla: Charla) -> str:
    """The question which course is meant, with some to choose from."""
    return lista(charla, charla.algunos(), charla.t("flujo_cual_curso"))


def bienvenida(charla: Charla) -> str | None:
    """To a greeting, or to one who wants information and nothing else."""
    if charla.dice("detalle") or (charla.dice("saludo") and not charla.reciente and not charla.dice(*CORTESIAS)):
        return lista(charla, charla.algunos(), charla.t("flujo_bienvenida"))
    return None


def cortesia(charla: Charla) -> str | None:
    """To small talk; it never names a course, so what was being spoken of stays."""
    pregunta = "?" in charla.escrito and len(charla.escrito.split()) > 2
    oidas = (nombre for nombre in CORTESIAS if charla.dice(nombre) and not (pregunta and nombre in RESPUESTAS))
    return next((charla.t(CORTESIAS[nombre]) for nombre in oidas), None)


CORTESIAS: Mapping[str, str] = {
    "quien_soy": "flujo_quien_soy",
    "ayuda": "flujo_ayuda",
    "presentacion": "flujo_mucho_gusto",
    "como_estas": "flujo_como_estas",
    "espera": "flujo_espera",
    "despedida": "flujo_despedida",
    "gracias": "flujo_gracias",
    "recomienda": "flujo_recomienda",
    "duda": "flujo_bienvenida_de_nuevo",
    "no": "flujo_no",
    "interes": "flujo_bienvenida_de_nuevo",
    "risa": "flujo_risa",
    "acuerdo": "flujo_de_acuerdo",
    "si": "flujo_de_acuerdo",
}
RESPUESTAS = ("no", "interes", "acuerdo", "si")  # none of them is what a longer question asks
CHARLAS = ("como_estas", "despedida", "espera", "presentacion", "quien_soy", "recomienda", "risa")


def no_entendido(charla: Charla) -> str:
    """To anything else: how to ask, and after the second time how to reach a person."""
    if charla.dice("saludo"):
        return charla.t("flujo_bienvenida_de_nuevo")
    otra_vez = charla.t("flujo_no_entendi") in charla.memoria.ultima
    en_curso = charla.memoria.foco or charla.memoria.lista
    como = charla.t("flujo_preguntas" if en_curso else "flujo_ayuda")
    return parrafos(charla.t("flujo_no_entendi"), como, asesor(charla) if otra_vez else "")


PASOS: tuple[Callable[[Charla], str | None], ...] = (
    sin_palabras,
    una_persona,
    hasta_un_precio,
    en_un_mes,
    los_nombrados,
    fuera_de_lista,
    recado,
    un_lugar,
    desconocido,
    otra_lista,
    el_de_antes,
    sin_curso,
    bienvenida,
    cortesia,
    no_entendido,
)


def saludo(charla: Charla) -> str:
    """The greeting that goes before the answer to one who greets; empty for others."""
    if not charla.dice("saludo"):
        return ""
    nombre = nombre_de_pila(charla.context.profile_name or charla.turno[-1].profile_name)
    return charla.t("flujo_saludo_nombre", nombre=nombre) if nombre else charla.t("flujo_saludo")


# --- Words ----------------------------------------------------------------------------------------------------

_TRATAMIENTOS = frozenset("sr sra srta dr dra lic ing prof profe don dona mr mrs ms c".split())


def nombre_de_pila(perfil: str) -> str:
    """The first name of a WhatsApp profile, fit to be greeted by; empty where there is none ("🌸", "www.x.com")."""
    if re.search(r"[@/\d]|\w\.\w", perfil):
        return ""
    palabras = re.findall(r"\b[^\W\d_]{2,20}\b", unicodedata.normalize("NFC", perfil))
    nombre = next((palabra for palabra in palabras if llana(palabra) not in _TRATAMIENTOS), "")
    return nombre.capitalize() if nombre.isupper() or nombre.islower() else nombre


def parrafos(*trozos: str) -> str:
    """Some texts, those that are not empty, with a blank line between them."""
    return "\n\n".join(filter(None, trozos))


def abreviado(escrito: str, largo: int = 700) -> str:
    """A text in one line of at most so many characters, cut between words."""
    return textwrap.shorten(escrito, largo, placeholder="…")


def recortado(respuesta: str, unidades: int) -> str:
    """An answer of at most so many UTF-16 units, cut at the end of a line."""
    while len(respuesta.encode("utf-16-le")) > 2 * unidades:
        antes = respuesta.rpartition("\n")[0].rstrip()
        respuesta = antes or respuesta[: unidades // 2]
    return respuesta
