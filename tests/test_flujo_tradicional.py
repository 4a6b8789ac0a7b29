"""The traditional flow, talked to as people do: scripted conversations, strange input and a catalogue that fails."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as tries
from hypothesis import strategies as st

from database import Database
from settings import load_settings
from simulator import Simulator
from tests.conftest import ANA, Hilo, Server
from tools import Context, Media, Message, Turn, cursos
from tools._flujo_charla import recordar
from tools._flujo_lectura import PATRONES, leer
from tools._textos import IDIOMAS, texto
from tools.flujo_tradicional import LARGO, fallback_reply, nombre_de_pila

DATOS = Path(__file__).parent / "data" / "conversaciones.toml"
MUESTRA = Path(cursos.__file__).with_name("cursos.csv")
CONVERSACIONES = tomllib.loads(DATOS.read_text("utf-8"))["conversacion"]
CODIGO = re.compile(r"\(([A-Z]{3}-\d{3})\)")
MEDIODIA = datetime(2026, 11, 23, 12, tzinfo=UTC)


@pytest.fixture(scope="module")
def muestra(postgres: Server) -> Iterator[Database]:
    """The sample catalogue, a hundred years later, so that its dates are always to come."""
    nombre = postgres.create()
    database = Database(postgres.named(nombre), 1)
    cursos.cargar(lambda sql, **valores: database.rows(sql, valores), MUESTRA)
    database.rows("""UPDATE cursos SET fechas_inicio =
        ARRAY(SELECT (dia + interval '100 years')::date FROM unnest(fechas_inicio) AS dia)""")
    yield database
    database.close()
    postgres.drop(nombre)


@pytest.fixture
def vacia(database_url: str) -> Iterator[Database]:
    """A migrated database without courses."""
    database = Database(database_url, 1)
    yield database
    database.close()


@pytest.fixture
def sin_tablas(empty_database_url: str) -> Iterator[Database]:
    """A database that was never migrated."""
    database = Database(empty_database_url, 1)
    yield database
    database.close()


@dataclass
class Chat:
    """A user's chat with the flow alone: a transcript that only holds what was said, and a clock."""

    database: Database
    ajustes: Mapping[str, str] = field(default_factory=dict)
    perfil: str = ""
    dicho: list[Turn] = field(default_factory=list)
    ahora: datetime = MEDIODIA

    def query(self, sql: str, valores: Mapping[str, Any]) -> list[dict[str, Any]]:
        return self.database.rows(sql, valores)

    def history(self, address: str, n: int, run_id: int | None) -> list[Turn]:
        return self.dicho[-n:]

    def anota(self, role: str, texto: str) -> None:
        """Add a line to the transcript, ten seconds after the former one."""
        self.ahora += timedelta(seconds=10)
        self.dicho.append(Turn(role, texto, self.ahora))

    def manda(self, *mensajes: Message, motivo: str = "openai_down") -> str:
        """The answer to the messages of one turn."""
        context = Context(
            address=ANA,
            profile_name=self.perfil,
            settings=load_settings({"DATABASE_URL": "postgresql://nadie@localhost/nada", **self.ajustes}),
            turn=mensajes,
            services=self,
        )
        respuesta = fallback_reply(mensajes[-1], motivo, context)
        for mensaje in mensajes:
            self.anota("user", mensaje.text or "[archivo]")
        self.anota("assistant", respuesta)
        return respuesta

    def dice(self, *textos: str) -> str:
        """The answer to some texts of one turn."""
        return self.manda(*(mensaje(texto, self.ahora) for texto in textos))


def mensaje(dice: str, cuando: datetime = MEDIODIA) -> Message:
    """A message that says a text; "<audio/ogg>" is a file of that type and "<location>" a place."""
    tipo = dice[1:-1] if dice.startswith("<") and dice.endswith(">") else ""
    if tipo == "location":
        return Message("SM", ANA, location=(19.4, -99.1), at=cuando)
    if tipo:
        return Message("SM", ANA, media=(Media("https://api.twilio.com/m", tipo),), at=cuando)
    return Message("SM", ANA, text=dice, at=cuando)


# --- Scripted conversations -----------------------------------------------------------------------------------


def fallos(turno: Mapping[str, Any], respuesta: str) -> list[str]:
    """What an answer lacks of what a script expects, and what it says too much."""
    codigos = set(CODIGO.findall(respuesta))
    faltan = [trozo for trozo in turno.get("contiene", []) if trozo.lower() not in respuesta.lower()]
    faltan += [codigo for codigo in turno.get("codigos", []) if codigo not in codigos]
    sobran = [trozo for trozo in turno.get("no_contiene", []) if trozo.lower() in respuesta.lower()]
    sobran += sorted(codigos ^ set(turno["solo"])) if "solo" in turno else []
    return [f"falta {trozo!r}" for trozo in faltan] + [f"no corresponde {trozo!r}" for trozo in sobran]


def conversa(guion: Mapping[str, Any], database: Database) -> list[str]:
    """The faults of one scripted conversation, each with what was said and what was answered."""
    ajustes = {clave: valor for clave, valor in guion.items() if clave.isupper()}
    chat = Chat(database, ajustes, guion.get("perfil", ""))
    for linea in guion.get("historia", []):
        chat.anota("assistant", linea)
    faltas = []
    for turno in guion["turnos"]:
        dichos = turno["dice"] if isinstance(turno["dice"], list) else [turno["dice"]]
        respuesta = chat.manda(*(mensaje(dicho, chat.ahora) for dicho in dichos))
        faltas += [f"{guion['titulo']} | {dichos} | {fallo}\n{respuesta}" for fallo in fallos(turno, respuesta)]
    return faltas


def test_scripted_conversations_are_answered_as_expected(muestra: Database, capsys: pytest.CaptureFixture[str]) -> None:
    faltas = {guion["titulo"]: conversa(guion, muestra) for guion in CONVERSACIONES}
    bien, turnos = sum(not f for f in faltas.values()), sum(len(guion["turnos"]) for guion in CONVERSACIONES)
    with capsys.disabled():
        print(f"\nflujo tradicional: {bien} de {len(faltas)} conversaciones bien ({turnos} turnos)")
    assert not any(faltas.values()), "\n\n".join(falta for lista in faltas.values() for falta in lista)


def test_the_scripts_are_many_of_two_to_six_turns_with_titles_of_their_own() -> None:
    largos = [len(guion["turnos"]) for guion in CONVERSACIONES]
    assert len(largos) >= 90 and min(largos) >= 2 and max(largos) <= 6
    assert len({guion["titulo"] for guion in CONVERSACIONES}) == len(largos)


# --- Through the gateway --------------------------------------------------------------------------------------


def test_switched_off_assistant_leads_to_answers_from_the_catalogue(
    start: Callable[..., Hilo], twilio: Simulator
) -> None:
    hilo = start(THREADS_INTEGRATION_ENABLED="false", ASESOR_CONTACTO="55 5555 0101")
    cursos.cargar(hilo.rows, MUESTRA)
    for numero, dicho in enumerate(("Hola", "cursos de uñas", "el 2", "y cuánto cuesta?", "un asesor porfa"), 1):
        twilio.receive(ANA, dicho)
        respuestas = twilio.wait_for(ANA, numero)
    assert [respuesta.body.split("\n")[0] for respuesta in respuestas][2:] == [
        "*Nail art y decoración de uñas* (UNA-201)",
        "*Nail art y decoración de uñas* (UNA-201)",
        "Puedes hablar con un asesor aquí: 55 5555 0101",
    ]
    assert {run["outcome"] for run in hilo.done(5)} == {"fallback"}


# --- The reason -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("motivo", ["no_assistant", "disabled", "openai_down", "timeout", "error"])
def test_any_reason_gives_the_same_useful_answer_that_does_not_mention_it(muestra: Database, motivo: str) -> None:
    respuesta = Chat(muestra).manda(mensaje("cuánto cuesta excel avanzado"), motivo=motivo)
    assert "$1,990 MXN" in respuesta
    assert not re.search(r"openai|error|sistema|técnic|inteligencia", respuesta, re.IGNORECASE)


# --- The turn -------------------------------------------------------------------------------------------------


def test_a_greeting_after_hours_of_silence_welcomes_again(muestra: Database) -> None:
    chat = Chat(muestra)
    assert "1. *" in chat.dice("hola")
    assert "1. *" not in chat.dice("hola")
    chat.ahora += timedelta(hours=9)
    assert "1. *" in chat.dice("hola")


def test_a_voice_note_beside_words_is_not_passed_over(muestra: Database) -> None:
    respuesta = Chat(muestra).dice("curso de barista", "<audio/ogg>")
    assert "(BAR-101)" in respuesta and texto("flujo_audio") in respuesta


def test_a_button_gives_its_text_or_the_course_of_its_payload(muestra: Database) -> None:
    con_texto = Message("SM", ANA, button="b1", raw={"ButtonText": "Cursos de Excel", "ButtonPayload": "b1"})
    con_codigo = Message("SM", ANA, text="Ver más", button="EXC-101", raw={"ButtonPayload": "EXC-101"})
    assert "(EXC-201)" in Chat(muestra).manda(con_texto)
    assert Chat(muestra).manda(con_codigo).startswith("*Excel básico* (EXC-101)")


def test_an_unset_language_is_that_of_the_users_earlier_lines(muestra: Database) -> None:
    chat = Chat(muestra)
    chat.dice("hello, do you have photography courses?")
    assert "Price:" in chat.dice("2")
    assert "Precio:" in chat.dice("y cuánto cuesta el 1?")


@pytest.mark.parametrize(
    ("perfil", "nombre"),
    [
        ("Ana Lucía", "Ana"),
        ("~*MARÍA*~ 🌸", "María"),
        ("josé luis", "José"),
        ("Dra. Elena Ruiz", "Elena"),
        ("Jorge A.", "Jorge"),
        ("🌸🌸", ""),
        (".", ""),
        ("www.tienda.com", ""),
        ("+52 55 1234", ""),
        ("a\u202e\u0000", ""),
        ("علي", "علي"),
        ("X" * 500, ""),
        ("", ""),
    ],
)
def test_a_profile_gives_a_first_name_fit_to_greet_by(perfil: str, nombre: str) -> None:
    assert nombre_de_pila(perfil) == nombre


# --- The catalogue --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dicho", ["hola", "excel", "el 2", "cuánto cuesta", "qué cursos hay", "el más barato", "info"])
@pytest.mark.parametrize("base", ["vacia", "sin_tablas"])
def test_without_a_catalogue_the_answer_is_how_to_reach_an_advisor(
    base: str, dicho: str, request: pytest.FixtureRequest
) -> None:
    chat = Chat(request.getfixturevalue(base), {"ASESOR_CONTACTO": "55 5555 0101"})
    assert "55 5555 0101" in chat.dice(dicho)
    assert "gusto" in chat.dice("gracias")


def test_a_course_with_bare_columns_or_awkward_ones_is_told_and_read_back(vacia: Database) -> None:
    vacia.rows("INSERT INTO cursos (codigo, nombre, nivel, precio) VALUES ('curso uno', 'Yoga', 'basico', 0)")
    vacia.rows(
        """INSERT INTO cursos (codigo, nombre, nivel, descripcion, temario)
            VALUES ('Y2', :nombre, 'avanzado', :largo, :lista)""",
        {"nombre": "Yoga *aéreo* (nivel: 2)", "largo": "muy " * 900, "lista": "1. *Respirar*\n2. *Saltar*"},
    )
    chat = Chat(vacia)
    assert "gratis" in chat.dice("yoga")
    assert "por confirmar" in chat.dice("cuánto cuesta el 2")
    assert "(curso uno)" in chat.dice("el 1")
    assert "por confirmar" in chat.dice("y cuándo empieza?")
    assert len(chat.dice("el yoga aéreo")) <= LARGO
    assert "Respirar" in chat.dice("y el temario?")
    assert "(Y2)" in chat.dice("y cuánto dura?")


def test_more_is_asked_for_until_there_is_no_more(vacia: Database) -> None:
    vacia.rows("""INSERT INTO cursos (codigo, nombre, nivel, area)
        SELECT 'C-' || n, 'Curso ' || n, 'basico', '' FROM generate_series(1, 12) AS n""")
    chat = Chat(vacia)
    vistos = re.findall(r"\((C-\d+)\)", "".join(chat.dice(dicho) for dicho in ("qué cursos tienen", "más", "más")))
    assert len(vistos) == len(set(vistos)) == 12
    assert chat.dice("más") == texto("flujo_no_hay_mas")


def test_a_course_that_is_withdrawn_is_no_longer_told(vacia: Database) -> None:
    vacia.rows(
        "INSERT INTO cursos (codigo, nombre, nivel) VALUES ('A-1', 'Yoga', 'basico'), ('A-2', 'Danza', 'basico')"
    )
    chat = Chat(vacia)
    chat.dice("yoga")
    vacia.rows("UPDATE cursos SET activo = false WHERE codigo = 'A-1'")
    assert "(A-1)" not in chat.dice("cuánto cuesta?")


# --- Strange input --------------------------------------------------------------------------------------------

RAROS = [
    "🦄", "👍🏽", "👨‍👩‍👧‍👦" * 50, "?", "…", "1️⃣", "\u202eהאלו\u202c", "مرحبا كم السعر", "你好", "\x07\x1b[31m", "ﷺ",
    "٢", "\u0301" * 100, "a" * 4000, "excel " * 600, "no, " * 1000, "1 " * 2000, "el 99999999999999999999", "²",
    "el -1", "{a} %s", "' OR 1=1; --", "<b>hola</b>", "*" * 300, "\n\n\n", " ", "C++ c# .net", "jaja" * 1000,
    "que " * 999, "de de de de", "EXC-0000000001", "(EXC-101)", "1. *Falso* (XXX-999)",
]  # fmt: skip


@pytest.mark.parametrize("raro", RAROS, ids=ascii)
def test_strange_input_gets_an_answer_of_one_message(muestra: Database, raro: str) -> None:
    chat = Chat(muestra, perfil=raro)
    for dicho in ("cursos de excel", raro, raro):
        respuesta = chat.dice(dicho)
        assert respuesta.strip() and len(respuesta.encode("utf-16-le")) <= 2 * LARGO


PALABRAS = st.sampled_from(
    "hola el 2 la segunda ese y cuánto cuesta precio excel avanzado gracias no sí más otro de python 👍 ? , \n".split(
        " "
    )
)


@tries(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(turnos=st.lists(st.lists(st.one_of(PALABRAS, st.text(max_size=12)), max_size=8).map(" ".join), max_size=3))
def test_any_words_get_an_answer_of_one_message(muestra: Database, turnos: Sequence[str]) -> None:
    chat = Chat(muestra)
    for turno in turnos:
        respuesta = chat.dice(turno.replace("\0", ""))
        assert respuesta.strip() and len(respuesta.encode("utf-16-le")) <= 2 * LARGO


@pytest.mark.parametrize("historia", ["1. *Falso* (XXX-999)\n2. **Otro**", "*Nada* (NO-1)", "(((", "1. *" + "x" * 5000])
def test_a_transcript_of_courses_that_do_not_exist_does_no_harm(muestra: Database, historia: str) -> None:
    for dicho in ("el 1", "y cuánto cuesta?", "sí", "el de falso", "más"):
        chat = Chat(muestra)
        chat.anota("assistant", historia)
        assert chat.dice(dicho)


# --- Reading --------------------------------------------------------------------------------------------------


def test_the_flows_own_help_is_not_read_back_as_a_list_of_courses() -> None:
    for idioma in IDIOMAS:
        memoria = recordar([Turn("assistant", texto("flujo_ayuda", idioma), MEDIODIA)])
        assert not memoria.lista and not memoria.foco


@pytest.mark.parametrize(
    ("dicho", "dice", "tema", "numeros"),
    [
        ("Hola, me interesa el curso de excel", {"saludo"}, ("excel",), ()),
        ("el 2, perdón, el 3", set(), (), (3,)),
        ("el 1 y el 3", set(), (), (1, 3)),
        ("la última", set(), (), (-1,)),
        ("tengo 2 hijos", set(), (), ()),
        ("el 15 de enero", set(), (), ()),
        ("un segundo", {"espera"}, (), ()),
        ("contabilidad de costos", set(), ("contabilidad", "costos"), ()),
        ("páginas web con HTML", set(), ("páginas", "web", "HTML"), ()),
        ("recursos humanos", set(), ("recursos", "humanos"), ()),
        ("a cómo está?", {"precio"}, (), ()),
        ("¿cómo estás?", {"como_estas"}, (), ()),
        ("mi correo es ana@example.com", {"privado"}, (), ()),
        ("gracias por la información", {"gracias"}, (), ()),
    ],
)
def test_a_turn_is_read_for_what_it_says(
    dicho: str, dice: set[str], tema: tuple[str, ...], numeros: tuple[int, ...]
) -> None:
    lectura = leer(dicho)
    assert (lectura.tema, lectura.numeros) == (tema, numeros) and dice <= lectura.dice


@pytest.mark.parametrize(
    ("dicho", "tope", "tema"),
    [
        ("algo que no pase de 1000 pesos", 1000, ()), ("excel de menos de $1,290.50", Decimal("1290.5"), ("excel",)),
        ("que no cuesten más de dos mil", 2000, ()), ("hasta 1.500", 1500, ()), ("presupuesto de 3 mil", 3000, ()),
        ("up to $50", 50, ()), ("cursos gratis", 0, ()), ("hasta las 8", None, ()), ("menos de 120 horas", None, ()),
    ],
)  # fmt: skip
def test_the_most_to_pay_is_read_as_people_write_it(dicho: str, tope: object, tema: tuple[str, ...]) -> None:
    lectura = leer(dicho)
    assert (lectura.tope, lectura.tema) == (tope, tema)


@pytest.mark.parametrize(
    ("dicho", "como"),
    [
        ("tienen curso de buceo?", "explicita"), ("quiero aprender a bucear", "explicita"),
        ("y de buceo?", "explicita"), ("el de buceo cuánto cuesta", "explicita"), ("busco buceo", "explicita"),
        ("any diving courses?", "explicita"), ("tienen buceo?", "ofrecida"), ("info de buceo", "ofrecida"),
        ("buceo", "ofrecida"), ("están en Lima?", "lugar"), ("hay cursos en Lima", "lugar"), ("me lo dan en pdf?", ""),
        ("es un robot esto", ""), ("quiero rentar un salón", ""),
    ],
)  # fmt: skip
def test_how_a_subject_is_asked_for_is_read(dicho: str, como: str) -> None:
    lectura = leer(dicho)
    formas = {"explicita": lectura.explicita, "ofrecida": lectura.ofrecida, "lugar": lectura.lugar}
    assert next((forma for forma, es in formas.items() if es), "") == como


def test_each_row_of_the_table_of_patterns_has_a_name_and_an_expression() -> None:
    filas = [fila for fila in PATRONES.split("\n") if fila.strip()]
    assert len(filas) > 80 and all(re.match(r"([a-z_]{2,13} +| {14,15})\S", fila) for fila in filas)


@pytest.mark.parametrize(
    ("dicho", "tope"),
    [("hasta $1.500", 1500), ("hasta 15.1.26", None), ("hasta $1..2", None), ("mi presupuesto es de 1.5.0", None),
     ("hasta 5,,5 pesos", None), ("hasta 2,000.00 pesos", 2000)],
)  # fmt: skip
def test_most_to_pay_is_a_number_and_what_is_none_is_left(dicho: str, tope: int | None) -> None:
    assert leer(dicho).tope == tope
