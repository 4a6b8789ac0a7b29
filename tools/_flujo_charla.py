"""One turn of the traditional flow: what was said before, the catalogue within reach, and which courses are meant.

Nothing is stored: lists and courses are read back from the answers in the transcript, the flow's own and the model's.
"""

from __future__ import annotations

import difflib
import itertools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Any

from tools import Context, Message, Turn, cursos
from tools._flujo_lectura import EN_ESPAÑOL, LISTA, NIVELES, leer, llana, nivel_de
from tools._textos import idioma_de, texto

BUSCADAS = 12  # words of a subject that are searched for
TODOS = 5_000  # courses among which the cheapest, shortest… is looked for
RECUERDO = 40  # lines of the transcript that are read
PAUSA = timedelta(hours=8)  # after it a conversation begins anew

Curso = Mapping[str, Any]


class SinCatalogo(Exception):
    """There is no catalogue to answer from: empty, missing or out of reach."""


# --- What was said before -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Mencion:
    """A course that an earlier answer named; the code is empty where only its name was said."""

    nombre: str
    codigo: str = ""


@dataclass(frozen=True)
class Memoria:
    """What the transcript tells: the last list, the course spoken of since then, and what was last answered.

    `hablados` are the courses that were told one by one since the list, the earliest first."""

    lista: tuple[Mencion, ...] = ()
    foco: Mencion | None = None
    ultima: str = ""
    vistos: frozenset[str] = frozenset()
    hablados: tuple[Mencion, ...] = ()

    @property
    def a_la_vista(self) -> tuple[Mencion, ...]:
        """The courses that a position counts: those of the last list, else those told one by one."""
        return self.lista or (self.hablados if len(self.hablados) > 1 else ())


_CURSO = re.compile(r"[*_]+([^*_\n]{2,200})[*_]+ *\(((?=[^()\n]*\d|[A-Z .-]+\))[^()\n]{1,40})\)")  # *Excel* (EXC-101)
_RENGLON = re.compile(r"^\s*(\d{1,2}[.)]|\d\ufe0f?\u20e3|[•▪–-] )\s*(.+)$", re.MULTILINE)  # numbered or bulleted
_NEGRITA = re.compile(r"^[*_]+([^*_\n]{2,200}?):?[*_]+", re.MULTILINE)


def recordar(historia: Sequence[Turn]) -> Memoria:
    """What earlier answers said about courses, read from the newest to the oldest up to the last list."""
    respuestas = [turno.text for turno in reversed(historia) if turno.role == "assistant"]
    vistos = frozenset(codigo for respuesta in respuestas for _, codigo in _CURSO.findall(respuesta))
    ultima = respuestas[0] if respuestas else ""
    hablados: list[Mencion] = []  # the newest first
    lista: tuple[Mencion, ...] = ()
    for respuesta in respuestas:
        lista, sueltos = menciones(respuesta)
        if lista:
            break
        hablados += sueltos if len(sueltos) == 1 else ()
    foco = hablados[0] if hablados else None
    return Memoria(lista, foco, ultima, vistos, tuple(dict.fromkeys(reversed(hablados))))


def menciones(respuesta: str) -> tuple[tuple[Mencion, ...], tuple[Mencion, ...]]:
    """The courses that an answer lists, and those it names elsewhere; the model's own answers count too."""
    lista = tuple(filter(None, (_de_renglon(*renglon) for renglon in _RENGLON.findall(respuesta))))
    sueltos = tuple(dict.fromkeys(Mencion(nombre, codigo) for nombre, codigo in _CURSO.findall(respuesta)))
    if len(lista) > 1 or (lista and not sueltos):
        return lista, ()
    return (), sueltos or tuple(Mencion(nombre) for nombre in _NEGRITA.findall(respuesta)[:1])


def _de_renglon(marca: str, renglon: str) -> Mencion | None:
    """The course of one line of a list, by its code or, if numbered, in bold type; None for the lines of a syllabus."""
    con_codigo = _CURSO.match(renglon)
    if con_codigo:
        return Mencion(con_codigo[1], con_codigo[2])
    negrita = _NEGRITA.match(renglon) if marca[0].isdigit() else None
    return Mencion(negrita[1].strip()) if negrita else None


# --- The conversation -----------------------------------------------------------------------------------------


class Charla:
    """One turn with all that its answer may need; what costs a query is asked for when it is needed."""

    def __init__(self, context: Context, turno: Sequence[Message]) -> None:
        self.context = context
        self.turno = turno
        self.historia = context.history(RECUERDO)
        self.lineas = [_AVISO.sub("", turno.text) for turno in self.historia if turno.role == "user"]
        self.escrito = "\n".join(filter(None, (escrito(mensaje) for mensaje in turno)))
        self.lectura = leer(self.escrito)
        self.memoria = recordar(self.historia)
        self.idioma = self._idioma()
        self._cursos: dict[str, Curso | None] = {}

    def _idioma(self) -> str:
        """The language of this turn; that of the user's earlier lines where it does not show."""
        idioma = "es"
        for linea in [*self.lineas, self.escrito]:
            idioma = idioma_de(linea, idioma)
        return idioma

    def t(self, clave: str, **valores: object) -> str:
        """A fixed text in the language of the conversation."""
        return texto(clave, self.idioma, **valores)

    def dice(self, *nombres: str) -> bool:
        """Whether the turn says any of these, by their names in PATRONES."""
        return not self.lectura.dice.isdisjoint(nombres)

    def ajuste(self, variable: str) -> str:
        """A setting of this plugin; empty where it is not set."""
        return str(self.context.settings.get(variable, "") or "").strip()

    @property
    def señala_uno(self) -> bool:
        """Whether the turn points at one course by what it is about: "el de excel"."""
        return bool(_EL_DE.search(self.escrito.lower()))

    @property
    def reciente(self) -> bool:
        """Whether something was said a short while ago."""
        ahora = self.turno[-1].at
        return bool(self.historia) and (ahora is None or ahora - self.historia[-1].at < PAUSA)

    # The catalogue: any failure of it is SinCatalogo, so that the answer is never lost with it.

    def buscar(self, palabras: Sequence[str], nivel: str | None = None, limite: int = LISTA) -> list[Curso]:
        """The courses that answer to some words, the best first; words of another language count in Spanish too."""
        frase = " ".join(nivel_de(palabra) or palabra for palabra in palabras[:BUSCADAS])
        filas = self._consulta(cursos.buscar, frase, nivel=nivel, limite=limite)
        traducida = " ".join(EN_ESPAÑOL.get(llana(palabra), palabra) for palabra in frase.split())
        if not filas and traducida != frase:
            filas = self._consulta(cursos.buscar, traducida, nivel=nivel, limite=limite)
        return self._detalles(filas)

    def cercanos(self, palabras: Sequence[str]) -> list[Curso]:
        """The courses nearest to some words that `buscar` did not find."""
        return self._detalles(self._consulta(cursos.cercanos, " ".join(palabras[:BUSCADAS])))

    def detalle(self, codigo: str) -> Curso | None:
        """All about the course of a code; None when there is none."""
        if codigo not in self._cursos:
            self._cursos[codigo] = self._consulta(cursos.detalle, codigo)
        return self._cursos[codigo]

    def ejemplos(self, excepto: Iterable[str] = (), limite: int = LISTA) -> list[Curso]:
        """A few courses of different areas, but for some codes."""
        return self._consulta(_ejemplos, vistos=list(excepto), limite=limite)

    def algunos(self, limite: int = LISTA) -> list[Curso]:
        """Courses to choose from; raises SinCatalogo when there is none at all."""
        ejemplos = self.ejemplos(limite=limite)
        if not ejemplos:
            raise SinCatalogo
        return ejemplos

    def areas(self) -> list[str]:
        """The names of the catalogue's areas, the largest first."""
        return [fila["area"] for fila in self._consulta(cursos.areas)]

    def cuantos(self) -> int:
        """How many courses there are."""
        return int(self._consulta(_cuantos)[0]["cursos"])

    def sedes(self) -> list[str]:
        """The places where courses are given on site."""
        return [fila["sede"] for fila in self._consulta(_sedes)]

    def _detalles(self, filas: Iterable[Curso]) -> list[Curso]:
        """The rows of a search with all about each course."""
        return [{**fila, **curso} for fila in filas if (curso := self.detalle(fila["codigo"]))]

    def _consulta(self, pregunta: Callable[..., Any], *argumentos: object, **valores: object) -> Any:
        """What a function of the catalogue answers; raises SinCatalogo where it cannot."""
        try:
            return pregunta(self.context.query, *argumentos, **valores)
        except Exception as error:
            self.context.log.warning("traditional flow: the catalogue cannot be read: %s", error)
            raise SinCatalogo from error


# From the largest area to the smallest one, a course of each; then a second one of each. The columns are those of
# `cursos.detalle`.
EJEMPLOS = """
    SELECT codigo, nombre, area, nivel, descripcion, temario, requisitos, precio, moneda, duracion, modalidad, sede,
        horario, docente, enlace,
        ARRAY(SELECT dia FROM unnest(fechas_inicio) AS dia WHERE dia >= current_date ORDER BY dia) AS fechas_inicio
    FROM (SELECT *, count(*) OVER (PARTITION BY area) AS del_area,
            row_number() OVER (PARTITION BY area ORDER BY nivel <> 'basico', nombre) AS vuelta
        FROM cursos WHERE activo AND NOT codigo = ANY (CAST(:vistos AS text[]))) AS curso
    ORDER BY vuelta, del_area DESC, nombre LIMIT CAST(:limite AS int)"""


def _ejemplos(query: Callable[..., list[Curso]], **valores: object) -> list[Curso]:
    """The rows of EJEMPLOS."""
    return query(EJEMPLOS, **valores)


# "Ciudad de México, Roma Norte, o por Zoom" is told as its city.
SEDES = """
    SELECT DISTINCT btrim(split_part(sede, ',', 1)) AS sede FROM cursos
    WHERE activo AND sede <> '' AND cursos_plano(modalidad) ~ 'presencial|hibrid' ORDER BY 1 LIMIT 12"""


def _cuantos(query: Callable[..., list[Curso]]) -> list[Curso]:
    """The number of active courses, in one row."""
    return query("SELECT count(*) AS cursos FROM cursos WHERE activo")


def _sedes(query: Callable[..., list[Curso]]) -> list[Curso]:
    """The rows of SEDES."""
    return query(SEDES)


_EL_DE = re.compile(r"\b(el|la|[eé]se|[eé]sa|al|del|o|a) (curso )?(del?|d[oa]|sobre|que)\b|\bthe (one|\w+ one)\b")
_AVISO = re.compile(r"^\[.*\]$", re.MULTILINE)  # what the transcript says of a voice note or a picture


def escrito(mensaje: Message) -> str:
    """What a message says in words: its text, or the text of the button that was pressed."""
    return mensaje.text.strip() or mensaje.raw.get("ButtonText", "") or mensaje.button or ""


# --- Which courses the turn is about --------------------------------------------------------------------------


def nombrados(charla: Charla) -> list[Curso]:
    """The courses that the turn itself names, in the first of the ways that finds any."""
    return next(filter(None, (manera(charla) for manera in MANERAS)), [])


def por_codigo(charla: Charla) -> list[Curso]:
    """The courses whose codes were written, or stand behind the button pressed."""
    botones = [mensaje.button for mensaje in charla.turno if mensaje.button]
    return hallados(charla.detalle(codigo) for codigo in (*charla.lectura.codigos, *botones))


def por_posicion(charla: Charla) -> list[Curso]:
    """The courses of the last list at the positions said: "el 2", "la última", "los dos"."""
    lista, posiciones = charla.memoria.a_la_vista, charla.lectura.numeros
    if not posiciones and (charla.dice("ambos") or (charla.dice("compara") and not charla.lectura.tema)):
        lista, posiciones = charla.memoria.hablados[-2:], (1, 2)
        lista = lista if len(lista) == 2 else charla.memoria.lista
    elegidos = [lista[n - 1 if n > 0 else n] for n in posiciones if n <= len(lista) and lista]
    return hallados(resuelta(charla, mencion) for mencion in dict.fromkeys(elegidos))


def por_cualidad(charla: Charla) -> list[Curso]:
    """The cheapest, shortest, easiest or first to start: of a subject, else of the last list, else of all."""
    cual = cualidad(charla)
    if not cual:
        return []
    tema = charla.lectura.tema
    candidatos = charla.buscar(tema, limite=4 * LISTA) if tema else listados(charla)
    if not candidatos and charla.dice("senala"):  # "de esos", after the only course that was told of them
        candidatos = charla.buscar(tema_anterior(charla), limite=4 * LISTA)
    return sorted(candidatos, key=MEDIDAS[cual])[:1] or sorted(charla.algunos(TODOS), key=MEDIDAS[cual])[:LISTA]


def cualidad(charla: Charla) -> str:
    """By what the turn would have courses ordered, a name of MEDIDAS; empty where it does not say."""
    return next((nombre for nombre in MEDIDAS if charla.dice(nombre)), "")


def por_condicion(charla: Charla) -> list[Curso]:
    """The courses of any subject that are given in a way or at a time: "cursos en línea", "algo los sábados"."""
    if charla.lectura.tema or not charla.dice("modalidad", "horario") or not _CURSOS.search(charla.escrito.lower()):
        return []
    dicho = " ".join(llanas(charla.escrito))
    cumple = [condicion for expresion, condicion in CONDICIONES.items() if re.search(rf"\b({expresion})\b", dicho)]
    todos = charla.ejemplos(limite=TODOS) if cumple else []
    return [curso for curso in todos if all(condicion(curso) for condicion in cumple)][:LISTA]


def el_otro(charla: Charla) -> list[Curso]:
    """The course of a list of two that was not the one spoken of."""
    foco = charla.memoria.foco
    if not charla.dice("otro") or charla.lectura.tema or foco is None:
        return []
    return hallados(resuelta(charla, otro) for otro in charla.memoria.lista if otro.codigo != foco.codigo)


def por_nivel(charla: Charla) -> list[Curso]:
    """The courses of a level said alone ("¿y el avanzado?"): of the list, else of the subject in hand."""
    niveles = charla.lectura.niveles
    if not niveles or charla.lectura.asunto:
        return []
    del_nivel = [curso for curso in listados(charla) if curso["nivel"] in niveles]
    tema = tema_anterior(charla)
    return del_nivel or (charla.buscar(tema, nivel=niveles[0]) if tema else [])


def por_lista(charla: Charla) -> list[Curso]:
    """The one course of the last list that the turn describes: "el de excel"."""
    if not charla.lectura.asunto or not charla.señala_uno:
        return []
    descritos = exactos(charla.lectura.tema, listados(charla))
    return descritos if len(descritos) == 1 else []


def por_tema(charla: Charla) -> list[Curso]:
    """The courses found for what the turn says, one alone where it can mean no other."""
    tema = charla.lectura.tema
    if "ya_sabe" in charla.lectura.dice:
        tema += charla.lectura.niveles
    encontrados = charla.buscar(tema) if charla.lectura.tema else []
    llamados = exactos(tema, encontrados) or exactos(charla.lectura.asunto, encontrados)
    if len(llamados) == 1 and (len(tema) > 1 or charla.señala_uno or solo(llamados[0], encontrados)):
        return llamados
    llamados.sort(key=rango)  # "excel": from the basic one to the advanced one, then what else there is
    return llamados + [curso for curso in encontrados if curso not in llamados]


def los_de_que_se_habla(charla: Charla) -> list[Curso]:
    """The courses of which some begin in a month or cost less; empty where the turn means one of them.

    Those of the turn's subject, else all if it asks in general or nothing was searched for, else those last listed."""
    if charla.lectura.numeros or charla.lectura.codigos:
        return []
    seguidas = list(itertools.takewhile(_condiciona, reversed(charla.lineas)))  # "¿y en enero?" goes on with them
    tema = next(filter(None, (leer(linea).tema for linea in (charla.escrito, *seguidas))), ())
    general = any(_CURSOS.search(linea.lower()) for linea in (charla.escrito, *seguidas))
    if not general and not tema:
        if charla.memoria.foco:
            return []
        tema = tema_anterior(charla)
        if tema and not seguidas:
            return listados(charla)
    return charla.buscar(tema, limite=4 * LISTA) if tema else charla.ejemplos(limite=TODOS)


def _condiciona(linea: str) -> bool:
    """Whether a line says a month or the most to pay."""
    lectura = leer(linea)
    return bool(lectura.meses) or lectura.tope is not None


MEDIDAS: Mapping[str, Callable[[Curso], Any]] = {
    "barato": lambda curso: (curso["precio"] is None, curso["precio"]),
    "caro": lambda curso: -(curso["precio"] or 0),
    "corto": lambda curso: int((re.findall(r"\d{1,9}", curso["duracion"]) or ["1000000000"])[0]),
    "pronto": lambda curso: min(curso["fechas_inicio"], default=date.max),
    "facil": lambda curso: rango(curso),
}


def _tiene(columna: str, expresion: str) -> Callable[[Curso], bool]:
    """Whether a column of a course says something."""
    return lambda curso: bool(re.search(rf"\b({expresion})\b", " ".join(llanas(curso[columna]))))


def _a_las(desde: int, hasta: int) -> Callable[[Curso], bool]:
    """Whether a course begins at an hour of the day: "18:00 a 21:00" begins at 18."""
    horas = re.compile(r"(\d{1,2}):\d\d(?: a \d{1,2}:\d\d)?")
    return lambda curso: any(desde <= int(hora) < hasta for hora in horas.findall(curso["horario"]))


CONDICIONES: Mapping[str, Callable[[Curso], bool]] = {  # what is said, and which courses are so
    r"en linea|on ?line|virtual(es)?|a distancia": _tiene("modalidad", r"linea|on ?line|virtual"),
    r"presencial(es)?|in person": _tiene("modalidad", "presencial"),
    r"hibrid[oa]s?": _tiene("modalidad", "hibrid[oa]"),
    r"grabad[oa]s": _tiene("sede", "grabad[oa]s"),
    r"fin(es)? de semana|weekends?": _tiene("horario", "sabados?|domingos?"),
    r"entre semana": _tiene("horario", "lunes|martes|miercoles|jueves|viernes"),
    **{f"{dia}s?": _tiene("horario", f"{dia}s?") for dia in "lunes martes miercoles jueves viernes".split()},
    **{f"{dia}s?": _tiene("horario", f"{dia}s?") for dia in ("sabado", "domingo")},
    r"(la|las) mananas?|matutin[oa]s?": _a_las(5, 12),
    r"(la|las) tardes?|vespertin[oa]s?": _a_las(12, 19),
    r"(la|las) noches?|nocturn[oa]s?": _a_las(18, 24),
}
MANERAS = (por_codigo, por_cualidad, por_posicion, por_condicion, el_otro, por_nivel, por_lista, por_tema)
_CURSOS = re.compile(r"\b(cursos|talleres|diplomados|algo|alg[uú]n[oa]?s?|courses|anything)\b")


def rango(curso: Curso) -> int:
    """The place of a course's level, from the basic one."""
    return list(NIVELES).index(curso["nivel"])


def solo(curso: Curso, encontrados: Iterable[Curso]) -> bool:
    """Whether no other course found is of the same area: "canva" is one course, "repostería" a group of them."""
    return all(otro is curso or otro["area"] != curso["area"] for otro in encontrados)


def hallados(candidatos: Iterable[Curso | None]) -> list[Curso]:
    """The courses that there are among some."""
    return [curso for curso in candidatos if curso]


def listados(charla: Charla) -> list[Curso]:
    """The courses of the last list."""
    return [curso for mencion in charla.memoria.a_la_vista if (curso := resuelta(charla, mencion))]


def resuelta(charla: Charla, mencion: Mencion) -> Curso | None:
    """The course that an earlier answer named, as it is today; None when it is no more, or never was one."""
    if mencion.codigo:
        return charla.detalle(mencion.codigo)
    palabras = mencion.nombre.split()
    return next((c for c in charla.buscar(palabras, limite=1) if llanas(c["nombre"]) == llanas(mencion.nombre)), None)


def exactos(tema: Sequence[str], candidatos: Iterable[Curso]) -> list[Curso]:
    """The courses whose name has every word of a subject, give or take a letter."""
    junto = llana("".join(tema))  # "power point" is PowerPoint
    nombres = ((curso, llanas(curso["nombre"])) for curso in candidatos)
    return [curso for curso, nombre in nombres if junto in nombre or all(_en_nombre(p, nombre) for p in tema)]


def _en_nombre(palabra: str, nombre: Sequence[str]) -> bool:
    """Whether a word, or another one for the same level, is in a name."""
    nivel = nivel_de(palabra)
    if nivel:
        return any(nivel_de(otra) == nivel for otra in nombre)
    return bool(difflib.get_close_matches(llana(palabra), nombre, 1, 0.75))


def llanas(nombre: str) -> list[str]:
    """The words of a name in lower case without accents."""
    return [llana(palabra) for palabra in re.findall(r"\w+", nombre)]


def tema_anterior(charla: Charla) -> tuple[str, ...]:
    """The subject that the user last searched for, without its level; empty when there was none."""
    return next(filter(None, (leer(linea).asunto for linea in reversed(charla.lineas))), ())
