"""Every fixed text that a WhatsApp user may read, in Spanish, English and Portuguese.

The texts themselves are in `textos.toml` beside this file, one table a text, so that a team edits them without
touching code. The file is read once, when this module is imported.
"""

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path

ARCHIVO = Path(__file__).with_name("textos.toml")
IDIOMAS = ("es", "en", "pt")
HUECO = re.compile(r"\{(\w+)\}")  # other braces are plain text, and so is whatever a value contains

Textos = Mapping[str, Mapping[str, str]]


class TextosError(ValueError):
    """The file of texts cannot be used; the message names the file and the line."""


# --- the file -------------------------------------------------------------------------------------------------


def cargar(archivo: Path) -> Textos:
    """The texts of a TOML file as {key: {language: text}}; raises TextosError naming the file and the line."""
    try:
        contenido = archivo.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise TextosError(f"{archivo}: cannot be read: {error}") from error
    try:
        tablas = tomllib.loads(contenido)
    except tomllib.TOMLDecodeError as error:
        raise TextosError(f"{archivo}: {_con_linea(str(error), contenido)}") from error
    for clave, tabla in tablas.items():
        fallo = _fallo(tabla)
        if fallo:
            raise TextosError(f"{archivo}, line {_linea(contenido, clave)}: text {clave!r} {fallo}")
    return tablas


def _con_linea(mensaje: str, contenido: str) -> str:
    """The parser's message, with the last line's number where it only says "end of document"."""
    return mensaje.replace("at end of document", f"at line {contenido.count(chr(10)) + 1}, the end of the file")


def _linea(contenido: str, clave: str) -> int:
    """The number of the line that opens a key, from 1; 1 when the key is written in an unusual way."""
    apertura = re.search(rf"^\s*\[?\s*[\"']?{re.escape(clave)}\b", contenido, re.MULTILINE)
    return contenido.count("\n", 0, apertura.end()) + 1 if apertura else 1


def _fallo(tabla: object) -> str | None:
    """What is wrong with one text's table, as the end of a sentence; None when nothing is."""
    if not isinstance(tabla, dict):
        return f"must be a table such as [clave] with es, en and pt, not {tabla!r}"
    for idioma, valor in tabla.items():
        if not re.fullmatch("[a-z]{2}", idioma):
            return f"has the key {idioma!r}, which is no two-letter language"
        if not isinstance(valor, str) or not valor.strip():
            return f"needs a sentence in quotes for {idioma}, not {valor!r}"
    return None if "es" in tabla else "has no es, the language used where another one is missing"


_TEXTOS = cargar(ARCHIVO)


def claves() -> list[str]:
    """The keys of all the texts, in the file's order."""
    return list(_TEXTOS)


def texto(clave: str, idioma: str = "es", **valores: object) -> str:
    """One text with its {placeholders} filled; Spanish where the language is missing.

    Raises KeyError naming the key and the file when there is no such text or a placeholder was given no value.
    """
    if clave not in _TEXTOS:
        raise KeyError(f"no text {clave!r} in {ARCHIVO}")
    versiones = _TEXTOS[clave]

    def valor(hueco: re.Match[str]) -> str:
        if hueco[1] not in valores:
            raise KeyError(f"text {clave!r} in {ARCHIVO} needs a value for {hueco[0]}")
        return str(valores[hueco[1]])

    return HUECO.sub(valor, versiones.get(idioma, versiones["es"]))


# --- the language ---------------------------------------------------------------------------------------------

# Words that tell the languages apart. A strong one decides alone; a weak one only adds to others: "introduction to
# the internet of things" is a course's name and says nothing about who writes it, and "bye" or "please" are also
# written by those who speak Spanish. Words that two of the languages share (curso, de, como, para, no) are left out.
_FUERTES: Mapping[str, frozenset[str]] = {
    "es": frozenset(
        """hola holi ola buenas buenos gracias quiero quisiera necesito tengo tienen tienes cuanto cuánto cuantos
        cuántos cuanta cuánta cuando cuándo donde dónde cual cuál cuales cuáles cuesta cuestan precio precios hay
        inscribirme inscribo informes informacion información estoy soy puedo pueden puedes ustedes usted empieza
        empiezan fechas hacer hago querria querría gustaria gustaría mañana ahora adiós adios chau nada algo pues
        querés tenés busco ofrecen quien quién dale necesitaría""".split()
    ),
    "en": frozenset(
        """hello hi hey what when where which who how much does your you are is have want need would could can
        course courses classes enroll enrol price prices cost costs there interested morning afternoon evening
        goodbye i'm i'd it's what's don't thank""".split()
    ),
    "pt": frozenset(
        """olá oi opa obrigado obrigada obg você vocês voce voces vc vcs não quero queria gostaria preciso tenho tem
        têm quanto quais custa custam preço preco inscrição inscrever matricular uma quando começa comeca começam
        onde também muito bom boa noite tudo posso fazer eu meu minha isso pra pagamento cartão pix são tchau
        valeu falar atendente desconto qual estou iniciantes""".split()
    ),
}
_DEBILES: Mapping[str, frozenset[str]] = {
    "es": frozenset("el la los las y en un una con por mi te del al es son lo mas pero si ya ese eso esa".split()),
    "en": frozenset(
        """the of for and to in with my about any it this that i we on at an one second first tell yes please thanks
        bye sorry looking good sign""".split()
    ),
    "pt": frozenset("os as em do da na ou mais ao pelo pela seu sua é esse dia tarde um com sim bem".split()),
}
_LETRAS: Mapping[str, re.Pattern[str]] = {"es": re.compile("[ñ¿¡]"), "pt": re.compile("[ãõêâô]|ç[aou]")}
_PALABRA = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_MUESTRA = 600  # characters that are read: enough to know a language


def idioma_de(text: str, default: str = "es") -> str:
    """The language that a user's text is written in, "es", "en" or "pt"; `default` where it does not show.

    Short words, numbers and the names of courses show no language: "ok", "2", "Excel", "marketing digital".
    """
    muestra = text[:_MUESTRA].lower().replace("’", "'")
    palabras = set(_PALABRA.findall(muestra))
    puntos = {idioma: _puntos(idioma, muestra, palabras) for idioma in IDIOMAS}
    mejor = max(IDIOMAS, key=puntos.__getitem__)
    empate = sum(valor == puntos[mejor] for valor in puntos.values()) > 1
    return default if empate or puntos[mejor] < 2 else mejor


def _puntos(idioma: str, muestra: str, palabras: set[str]) -> int:
    """How much a text looks like one language; 0 for weak signs of a foreign one alone."""
    letras = _LETRAS.get(idioma)
    fuertes = len(palabras & _FUERTES[idioma]) + bool(letras and letras.search(muestra))
    debiles = len(palabras & _DEBILES[idioma])
    return 2 * fuertes + debiles if fuertes or idioma == "es" else 0
