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

# Words that tell the languages apart. A strong one decides alone where nothing speaks against it, for it may be a name
# ("trabajo en Price Shoes", "vivo en EU"); a weak one only adds to others: "introduction to the internet of things" is
# a course's name and says nothing about who writes it, and "bye" or "please" are also written by those who speak
# Spanish. Words that two of the languages share (curso, de, como, para, no, and ola without its accent) are left out.
_FUERTES: Mapping[str, frozenset[str]] = {
    "es": frozenset(
        """hola holi buenas buenos gracias quiero quisiera necesito tengo tienen tienes cuanto cuánto cuantos
        cuántos cuanta cuánta cuando cuándo donde dónde cual cuál cuales cuáles cuesta cuestan precio precios hay
        inscribirme inscribo informes informacion información estoy soy puedo pueden puedes ustedes usted empieza
        empiezan fechas hacer hago querria querría gustaria gustaría mañana ahora adiós adios chau nada algo pues
        querés tenés busco ofrecen quien quién dale necesitaría interesa trabajo vivo""".split()
    ),
    "en": frozenset(
        """hello hi hey what when where which who how much does your you are is have want need would could can
        course courses classes enroll enrol price prices cost costs there interested morning afternoon evening
        goodbye i'm i'd it's what's don't thank help talk speak""".split()
    ),
    "pt": frozenset(
        """olá oi opa obrigado obrigada obg você vocês voce voces vc vcs não quero queria gostaria preciso tenho tem
        têm quanto quais custa custam preço preco inscrição inscrever matricular uma quando começa comeca começam
        onde também muito bom boa noite tudo posso fazer eu meu minha isso pra pagamento cartão pix são tchau
        valeu falar atendente desconto qual estou iniciantes nao cartao aceita aceitam ajuda informacao inscricao
        horário horários grátis""".split()
    ),
}
_DEBILES: Mapping[str, frozenset[str]] = {
    "es": frozenset("el la los las y en un una con mi del al es son lo pero si ya ese eso esa".split()),
    "en": frozenset(
        """the of for and to in with my about any it this that i we on at an one second first tell yes please thanks
        bye sorry looking good sign""".split()
    ),
    "pt": frozenset("os as em do da na ou mais ao pelo pela seu sua é esse dia tarde um com sim bem".split()),
}
_LETRAS: Mapping[str, re.Pattern[str]] = {"es": re.compile("[ñ¿¡]"), "pt": re.compile("[ãõêâô]|ç[aou]")}
_IBÉRICAS = frozenset("curso cursos de para que como por favor se te o e sí".split())
_PALABRA = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)?")
_MUESTRA = 600  # characters that are read: enough to know a language


def idioma_de(text: str, default: str = "es", seguro: bool = False) -> str:
    """The language that a user's text is written in, "es", "en" or "pt"; `default` where it does not show. With
    `seguro`, one foreign word among unknown ones is not enough: the user may be known to speak another language.

    Short words, numbers and the names of courses show no language: "ok", "2", "Excel", "marketing digital".
    """
    muestra = text[:_MUESTRA].lower().replace("’", "'")
    palabras = set(_PALABRA.findall(muestra))
    señales = {idioma: _señales(idioma, muestra, palabras) for idioma in IDIOMAS}
    puntos = {idioma: 2 * fuertes + debiles for idioma, (fuertes, debiles) in señales.items()}
    mejor = max(IDIOMAS, key=puntos.__getitem__)
    empate = sum(valor == puntos[mejor] for valor in puntos.values()) > 1
    if empate or puntos[mejor] < 2:
        return default
    return default if _dudoso(mejor, señales, palabras, seguro) else mejor


def _señales(idioma: str, muestra: str, palabras: set[str]) -> tuple[int, int]:
    """How many strong and weak signs of one language are in a text; none for weak ones of a foreign language alone."""
    letras = _LETRAS.get(idioma)
    con_letras = {palabra for palabra in palabras if letras and letras.search(palabra)}
    fuertes = len(palabras & _FUERTES[idioma] | con_letras) + (idioma == "es" and bool(set("¿¡") & set(muestra)))
    return (fuertes, len(palabras & _DEBILES[idioma])) if fuertes or idioma == "es" else (0, 0)


def _dudoso(idioma: str, señales: Mapping[str, tuple[int, int]], palabras: set[str], seguro: bool) -> bool:
    """Whether a foreign language shows by one strong word only, which may be a name."""
    fuertes, debiles = señales[idioma]
    if idioma == "es" or fuertes > 1:
        return False
    ajenas = any(señales["es"]) or (idioma == "en" and bool(palabras & _IBÉRICAS))
    return ajenas or (seguro and not debiles and len(palabras) > 1)
