"""The fixed texts: complete in three languages, easy to edit, and chosen by what the user writes."""

from pathlib import Path

import pytest

from tools._textos import ARCHIVO as TEXTOS
from tools._textos import HUECO, IDIOMAS, TextosError, cargar, claves, idioma_de, texto

DEL_GATEWAY = (
    "caida disculpa baja alta limite_minuto limite_dia ayuda reiniciado asesor_avisado bot_de_vuelta"
)


# --- the file -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("clave", claves())
def test_each_key_has_three_languages_with_the_same_placeholders(clave: str) -> None:
    versiones = cargar(TEXTOS)[clave]
    assert set(versiones) == set(IDIOMAS)
    assert len({frozenset(HUECO.findall(version)) for version in versiones.values()}) == 1
    assert all(version == version.strip() and len(version) < 700 for version in versiones.values())


def test_the_keys_of_the_gateway_are_there_and_need_no_value() -> None:
    for clave in DEL_GATEWAY.split():
        assert texto(clave) and not HUECO.search(texto(clave))


def test_a_known_key_gives_the_text_of_the_language_with_its_values() -> None:
    assert texto("flujo_saludo_nombre", "pt", nombre="Ana {x}") == "Olá, Ana {x}! 👋"


def test_a_missing_language_falls_back_to_spanish() -> None:
    assert texto("caida", "fr") == texto("caida", "es")


def test_an_unknown_key_raises_keyerror_naming_key_and_file() -> None:
    with pytest.raises(KeyError, match=r"'no_existe' in .*textos\.toml"):
        texto("no_existe")


def test_a_missing_value_raises_keyerror_naming_text_and_placeholder() -> None:
    with pytest.raises(KeyError, match=r"'flujo_saludo_nombre' in .*textos\.toml needs a value for \{nombre\}"):
        texto("flujo_saludo_nombre", "en")


@pytest.mark.parametrize(
    ("contenido", "motivo"),
    [
        ('[a]\nes = "hola\n', r"textos\.toml: .*line 2"),
        ('[a]\nes = "x"\n\n[a]\nes = "y"\n', r"textos\.toml: .*line 4"),
        ('[a]\nes = """x\n', r"textos\.toml: .*line 3, the end of the file"),
        ('[a]\nes = "x"\n[b]\nen = "y"\n', r"textos\.toml, line 3: text 'b' has no es"),
        ('[a]\nes = "x"\n[b]\nes = 5\n', r"textos\.toml, line 3: text 'b' needs a sentence in quotes for es, not 5"),
        ('[a]\nes = " "\n', r"textos\.toml, line 1: text 'a' needs a sentence"),
        ('[a]\nes = "x"\nespañol = "x"\n', r"textos\.toml: .*line 3"),
        ('[a]\nes = "x"\nengl = "x"\n', r"textos\.toml, line 1: text 'a' has the key 'engl', which is no two-letter"),
        ('a = "x"\n', r"textos\.toml, line 1: text 'a' must be a table"),
    ],
)
def test_a_broken_file_raises_naming_file_and_line(tmp_path: Path, contenido: str, motivo: str) -> None:
    archivo = tmp_path / "textos.toml"
    archivo.write_text(contenido, "utf-8")
    with pytest.raises(TextosError, match=motivo):
        cargar(archivo)


def test_a_missing_or_unreadable_file_raises_naming_it(tmp_path: Path) -> None:
    with pytest.raises(TextosError, match=r"nada\.toml: cannot be read"):
        cargar(tmp_path / "nada.toml")
    (tmp_path / "latin.toml").write_bytes('[a]\nes = "adiós"\n'.encode("latin-1"))
    with pytest.raises(TextosError, match=r"latin\.toml: cannot be read"):
        cargar(tmp_path / "latin.toml")


# --- the language ---------------------------------------------------------------------------------------------

ESPAÑOL = (
    """
ok|hola|ola|2|👍||excel|Excel|marketing digital|business intelligence|project management|power bi|data science|jaja
machine learning|el 2|la segunda|ese|sí|si|no|gracias|muchas gracias|buenas|buenos dias|buen día|info|informes
cuanto cuesta|cuánto sale|que cursos tienen|quiero el curso de community manager|cuando empieza|ayuda|precio
hola quiero info del curso de english for business|me llamo João y quiero un curso
introduction to the internet of things
qual es el precio|quanto cuesta el curso|quando empieza el curso|bye|ok bye|thanks|please|asesor|inscripción|temario
che cuánto sale el curso de excel?|oye parce cuánto vale|dame informes porfa|adiós|una pregunta|full stack developer
tenés algo de diseño?|¿en qué horario es?|www.ejemplo.com|curso de portugués|clases de inglés|excel avansado|da lo mismo
me das el temario|los dos|no gracias|de nada|nos vemos|hasta luego|quiero pagar con pix|1|dos|7️⃣|🙏🙏|¿?|sesión 3|hoy
vivo en São Paulo y quiero un curso en línea|machine learning for beginners|growth hacking|social media|scrum master
trabajo en Price Shoes|el curso de Hi Tech|vivo en EU|la app Oi|curso de help desk|me interesa el curso Python for you
""".strip()
    .replace("\n", "|")
    .split("|")
)

INGLÉS = (
    """
hello|hi|Hi there!|how much is the excel course?|what courses do you have|do you have anything about marketing
I want to enroll|when does it start|thank you so much|where are you located|is there a discount?|good morning
can I talk to an advisor|I'm interested in the second one|what's the price|which one is cheaper|price of excel
i need a course for beginners|hola, do you have courses in english? what is the price?
help|please help|talk to a human|speak to an agent|hello Ana
""".strip()
    .replace("\n", "|")
    .split("|")
)

PORTUGUÉS = (
    """
oi|olá|Oi, tudo bem?|bom dia|boa noite|obrigado|obrigada!|quanto custa o curso de excel?|qual o preço|quero me inscrever
quais cursos vocês têm?|quando começa|vc tem curso de marketing?|não entendi|tem desconto?|posso pagar com pix?
gostaria de falar com um atendente|quero saber mais sobre o curso|excel para iniciantes|informação|tchau|valeu
nao|aceita cartao?|ajuda|aceitam cartão|é grátis?|oi Marta
""".strip()
    .replace("\n", "|")
    .split("|")
)


@pytest.mark.parametrize(
    ("idioma", "frase"),
    [("es", f) for f in ESPAÑOL] + [("en", f) for f in INGLÉS] + [("pt", f) for f in PORTUGUÉS],
)
def test_a_users_text_gives_its_language(idioma: str, frase: str) -> None:
    assert idioma_de(frase) == idioma


@pytest.mark.parametrize("frase", ["Price Shoes", "Hello Kitty", "Oi Telecom", "ola", "trabajo en Price Shoes"])
def test_one_word_that_may_be_a_name_is_not_sure(frase: str) -> None:
    assert idioma_de(frase, "", seguro=True) in ("", "es")


@pytest.mark.parametrize("frase", ["hello", "hi there", "obrigada", "quanto custa", "talk to a human"])
def test_a_text_that_is_nothing_but_foreign_is_sure(frase: str) -> None:
    assert idioma_de(frase, "", seguro=True) in ("en", "pt")


@pytest.mark.parametrize("frase", ["2", "ok", "Excel", "👍", "", "marketing digital", "bye", "\u202e\u0007" * 900])
def test_a_text_without_signs_gives_the_default(frase: str) -> None:
    assert idioma_de(frase, "en") == "en"


def test_a_clearly_spanish_text_does_not_give_the_default() -> None:
    assert idioma_de("hola", "en") == "es"
    assert idioma_de("y cuánto cuesta el segundo", "pt") == "es"
