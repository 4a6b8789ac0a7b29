"""WhatsApp formatting: examples of what models write, and properties that hold for whatever they write."""

import itertools
import re

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from tools import Context, Message, Part
from tools.formato_whatsapp import LIMIT, format_reply, whatsapp_parts

FENCE = "```"
quickly = settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.too_slow])


def units(text: str) -> int:
    """A text's length as Twilio counts it."""
    return len(text.encode("utf-16-le", "surrogatepass")) // 2


# --- examples -------------------------------------------------------------------------------------------------

EXAMPLES = {
    # bold, italics, strike
    "**negrita** y __negrita__": "*negrita* y *negrita*",
    "*cursiva*, _cursiva_ y **negrita**": "_cursiva_, _cursiva_ y *negrita*",
    "Hay *Excel* y _Word_:\n• *Nota:* hoy": "Hay *Excel* y _Word_:\n• *Nota:* hoy",  # as WhatsApp itself has it
    "***todo*** y **muy _bueno_**": "_*todo*_ y *muy _bueno_*",
    "~~antes~~ ~ahora~": "~antes~ ~ahora~",
    "**dos\nlíneas**": "*dos*\n*líneas*",
    "<b>negrita</b> <i>cursiva</i> <u>otro</u>": "*negrita* _cursiva_ otro",
    "**S**istema **O**perativo": "Sistema Operativo",
    "**sin cerrar": "**sin cerrar",
    # marks with a letter on one side and punctuation or a space on the other
    "**Precio:**1,200 y ~~1,500 €~~1,200": "*Precio:* 1,200 y ~1,500 €~ 1,200",
    "**¡Oferta!**Solo hoy, **50 %**de, **(y)**z": "*¡Oferta!* Solo hoy, *50 %* de, *(y)* z",
    "** Excel**: a, **Word **: b, **Access **c": "*Excel*: a, *Word*: b, *Access* c",
    "texto**🎓 Curso**, **🎓 Curso**texto": "texto *🎓 Curso*, 🎓 Cursotexto",
    "**uno**\n**dos**y": "*uno*\ndosy",
    "$100** al mes. **Aplican restricciones": "$100** al mes. **Aplican restricciones",
    # code
    "usa `=SUMA(A1:A5)` aquí": "usa `=SUMA(A1:A5)` aquí",
    "`a_b*c*`": "`a_b*c*`",
    "`` a`b ``": "```a`b```",
    "**usa `pip` hoy**": "*usa* `pip` *hoy*",
    "Mira:\n\n```python\nif a:\n    b = '**c**'\n```\nFin": "Mira:\n\n```if a:\n    b = '**c**'```\nFin",
    "```\nsin cerrar": "```sin cerrar```",
    "```hola\nmundo```": "```hola\nmundo```",
    "a\n```\n```\nb": "a\nb",
    "```pasos\n```": "```pasos```",
    "a ``` b": "a ''' b",
    "`` ```c``` ``": "```'''c'''```",
    "`【1:2†a.pdf】``": "` ``",
    "- paso\n  ```\n  x\n    y\n  ```\n- otro": "- paso\n```x\n  y```\n- otro",
    "> ```\n> x\n> ```\n> fin": "```x```\n> fin",
    # headings and rules
    "# Cursos\nHola": "*Cursos*\nHola",
    "### Nivel **básico** ###\n\nHola": "*Nivel básico*\n\nHola",
    "#hashtag": "#hashtag",
    "uno\n\n---\n\ndos": "uno\n\n———\n\ndos",
    "uno\n---\ndos": "uno\n———\ndos",
    # lists
    "- a\n* b\n+ c": "- a\n- b\n- c",
    "1. a\n2. b\n4. d": "1. a\n2. b\n4. d",
    "1. a\n1. b\n1. c": "1. a\n2. b\n3. c",
    "3) a\n4) b": "3) a\n4) b",
    "1. a\n   - b\n     * c\n2. d": "1. a\n   - b\n     - c\n2. d",
    "- a\n\n- b": "- a\n\n- b",
    "Hay:\n- a\n- b\n¿Cuál quieres?": "Hay:\n- a\n- b\n¿Cuál quieres?",
    "- a\n  sigue": "- a\n  sigue",
    "- [ ] falta\n- [x] hecho": "⬜ falta\n✅ hecho",
    "2026.": "2026.",
    "-": "-",
    # tables
    "| Curso | Precio |\n|---|---:|\n| Excel | **$100** |\n| Word | |": (
        "*Curso*: Excel\n*Precio*: *$100*\n\n*Curso*: Word\n*Precio*: —"
    ),
    "|a|b|\n|-|-|\n|1|2|3|": "*a*: 1\n*b*: 2\n3",
    "|a|b|\n|-|-|\n|1<br>2|3|\nTexto": "*a*: 1\n2\n*b*: 3\n\nTexto",
    "|a|b|\n|-|-|": "a | b",
    "| |b|\n|-|-|\n|1|2|": "1\n*b*: 2",
    # links and images
    "Ve [el temario](https://x.mx/a_b_c), ya": "Ve el temario: https://x.mx/a_b_c, ya",
    "[https://x.mx](https://x.mx) [x.mx](https://www.x.mx/)": "https://x.mx https://www.x.mx/",
    "<https://x.mx/ñ> <a@x.mx>": "https://x.mx/ñ a@x.mx",
    "[correo](mailto:a@x.mx?subject=Hola) [a@x.mx](mailto:a@x.mx)": "correo: a@x.mx a@x.mx",
    "[llama](tel:+525512345678) [+52 (55) 1234-5678](tel:+525512345678)": "llama: +525512345678 +525512345678",
    "**[Inscríbete](https://x.mx)** hoy": "*Inscríbete*: https://x.mx hoy",
    "**Web: https://x.mx/a_b.** Fin": "*Web:* https://x.mx/a_b. Fin",
    "[curso](https://x.mx)s": "curso: https://x.mx s",
    "![Logo](https://x.mx/l.png) ![](https://x.mx/m.png)": "Logo: https://x.mx/l.png https://x.mx/m.png",
    "[![Logo](https://x.mx/l.png)](https://x.mx)": "Logo: https://x.mx/l.png https://x.mx",
    "[baja](sandbox:/mnt/data/a.pdf) o [sube](#arriba)": "baja o sube",
    '<a href="https://x.mx">aquí</a>': "aquí: https://x.mx",
    "[1]: https://x.mx": "[1]: https://x.mx",
    # quotes
    "> uno\n> **dos**": "> uno\n> *dos*",
    "> uno\n>\n> dos": "> uno\n\n> dos",
    "> > uno": "> uno",
    "> - uno": "> - uno",
    "> uno\nfuera": "> uno\nfuera",
    # entities, escapes, HTML
    "a &amp; b &lt;c&gt; &aacute;&nbsp;x": "a & b <c> á\u00a0x",
    "uno<br>dos<br/>tres": "uno\ndos\ntres",
    r"\*no\* 1\. \_x\_ &#42;no&#42;": "∗no∗ 1. ˍxˍ ∗no∗",  # WhatsApp has no escapes: these are look-alikes
    r"\*Aplican restricciones a snake\_case\_name, 2 \~ 3 \~ 4": "*Aplican restricciones a snake_case_name, 2 ~ 3 ~ 4",
    r"**Hoy**\*": "*Hoy*∗",
    r"[https://x.mx/a\_b](https://x.mx/a_b) https://x.mx/\_a\_": "https://x.mx/a_b https://x.mx/_a_",
    '<a href="https://x.mx" rel=a>sin cerrar': '<a href="https://x.mx" rel=a>sin cerrar',
    "Escribe <tu nombre>": "Escribe <tu nombre>",
    # citations
    "Dura 8 h 【4:0†source】. Sí【12†plan 【2】.": "Dura 8 h. Sí【12†plan.",
    "Dura 8 h【4:0†plan_2026.pdf】【4:1†a b.pdf】.": "Dura 8 h.",
    "Dura 8 h[4:0†source] 【Promo】": "Dura 8 h 【Promo】",
    "Dura 8 h \ue200filecite\ue202turn0file1\ue202turn0file2\ue201.": "Dura 8 h.",
    "Hoy \ue203dura\ue204 8 h\ue200cite\ue202turn0search1": "Hoy dura 8 h",
    "Dura 8 h citeturn0search1turn0search2, 【1】 y 【2】cuesta $5": "Dura 8 h, y cuesta $5",
    'Con \ue200entity\ue202["people","Ana Paz",0]\ue201.': "Con Ana Paz.",
    # what only looks like markup
    "5 * 3 * 2 = 30, 5*3*2, 2**3**2, x**2 + y**2": "5 * 3 * 2 = 30, 5*3*2, 2**3**2, x**2 + y**2",
    "snake_case_name y otro_nombre_": "snake_case_name y otro_nombre_",
    "https://x.mx/_a_/*b*/c__d__?e=*f*": "https://x.mx/_a_/*b*/c__d__?e=*f*",
    "*️⃣ uno *️⃣ dos #️⃣": "*️⃣ uno *️⃣ dos #️⃣",
    "C:\\temp\\_x": "C:\\temp_x",
    "~20 o ~30, 3 > 2 < 5, $5*": "~20 o ~30, 3 > 2 < 5, $5*",
    "    con sangría": "con sangría",
    "a\r\nb\x00c": "a\nbc",
}


@pytest.mark.parametrize("markdown", EXAMPLES)
def test_markdown_becomes_whatsapp_formatting(markdown: str) -> None:
    assert whatsapp_parts(markdown) == [EXAMPLES[markdown]]


def test_reply_is_a_list_of_parts() -> None:
    assert format_reply("**Hola**", Message("SM1", "whatsapp:+52155"), Context()) == [Part(text="*Hola*")]


@pytest.mark.parametrize("blank", ["", " \n\t ", "【4:0†source】", "\ud83d"])
def test_blank_text_is_left_to_others(blank: str) -> None:
    assert format_reply(blank, Message("SM1", "whatsapp:+52155"), Context()) is None


def test_nesting_beyond_reason_keeps_its_text() -> None:
    assert whatsapp_parts(">" * 60 + " hola **tú**") == [">" * 60 + " hola **tú**"]


# --- where a part ends ----------------------------------------------------------------------------------------


def test_long_text_ends_parts_at_paragraphs() -> None:
    paragraphs = ["palabra " * 87 + f"fin{number}." for number in range(5)]
    assert whatsapp_parts("\n\n".join(paragraphs)) == [
        "\n\n".join(paragraphs[:2]),
        "\n\n".join(paragraphs[2:4]),
        paragraphs[4],
    ]


def test_long_list_ends_parts_at_lines() -> None:
    lines = [f"- curso {number} " + "x" * 60 for number in range(60)]
    parts = whatsapp_parts("Tenemos esto:\n\n" + "\n".join(lines))
    assert "\n".join(parts) == "Tenemos esto:\n\n" + "\n".join(lines)
    assert len(parts) == 3


def test_long_paragraph_ends_parts_at_sentences() -> None:
    parts = whatsapp_parts("Esta es una oración que no dice mucho. " * 80)
    assert all(part.endswith(".") and part.startswith("Esta") for part in parts)


def test_long_sentence_ends_parts_at_words() -> None:
    words = [f"palabra{number}" for number in range(400)]
    assert " ".join(whatsapp_parts(" ".join(words))).split() == words


def test_heading_stays_with_what_follows() -> None:
    parts = whatsapp_parts("a " * 700 + "\n\n## Precios\n\n" + "b " * 300)
    assert [part[:9] for part in parts] == ["a a a a a", "*Precios*"]


def test_introduction_stays_with_its_list() -> None:
    parts = whatsapp_parts("a " * 700 + "\n\nHay:\n\n" + "- uno dos\n" * 40)
    assert [part[:4] for part in parts] == ["a a ", "Hay:"]


def test_formatting_over_the_limit_is_closed_and_opened_again() -> None:
    parts = whatsapp_parts("**" + "muy _bueno_ " * 200 + "fin**")
    assert len(parts) == 2
    assert all(part.startswith("*muy") and part.endswith("*") for part in parts)


def test_quote_over_the_limit_is_quoted_in_each_part() -> None:
    parts = whatsapp_parts("> " + "cita larga " * 200)
    assert len(parts) == 2
    assert all(part.startswith("> cita") for part in parts)


def test_code_over_the_limit_is_fenced_in_each_part() -> None:
    lines = [f"    fila {number} = {{}}" for number in range(200)]
    parts = whatsapp_parts("```js\n" + "\n".join(lines) + "\n```")
    assert len(parts) > 2
    assert all(part.startswith(FENCE) and part.endswith(FENCE) for part in parts)
    assert "\n".join(part.removeprefix(FENCE).removesuffix(FENCE) for part in parts) == "\n".join(lines)


def test_url_over_the_limit_is_kept_in_order() -> None:
    url = "https://x.mx/" + "a_b" * 1000
    parts = whatsapp_parts(f"Ve [aquí]({url}) **ya**")
    assert parts[0] == "Ve"
    assert "".join(parts[1:]) == f"aquí: {url} *ya*"


def test_astral_characters_count_twice() -> None:
    assert [units(part) for part in whatsapp_parts("🙂" * 801)] == [1600, 2]
    assert len(whatsapp_parts("🙂" * 800)) == 1


# --- properties -----------------------------------------------------------------------------------------------

EMOJI = ["👨‍👩‍👧‍👦", "🇲🇽", "🇧🇷", "👍🏽", "❤️", "1️⃣", "🏴󠁧󠁢󠁥󠁮󠁧󠁿", "e\u0301\u0323", "🙂", "ñ", "字"]
MARKUP = [
    *"*_~`[]()<>#|-+.!&;:\\ \n\t19aá=\"'/",
    "**",
    "\n\n",
    FENCE,
    "](",
    "![",
    "\n- ",
    "\n> ",
    "\n1. ",
    "\n|-|\n",
    "://",
]
SOUP = st.lists(st.sampled_from(MARKUP) | st.sampled_from(EMOJI) | st.characters(), max_size=80).map("".join)


@quickly
@given(SOUP, st.integers(1, 60))
def test_any_text_gives_parts_that_twilio_takes(text: str, times: int) -> None:
    parts = whatsapp_parts(text * times)
    assert all(part.strip() and units(part) <= LIMIT for part in parts)
    assert bool(parts) or not re.search(r"[a-z]", re.sub(r"[^ -~]", "", text)) or "\ue200" in text


WORD = st.just("palabra")
SIGNS = st.sampled_from(
    [*"   *_~|`<>[])\\\n", "\n\n", ". ", "**", "**: ", "~~", "](", "![", "<br>", "&amp;", "<a href=palabra>"]
)
BLOCKS = st.sampled_from(["\n- ", "\n  - ", "\n2. ", "\n# ", "\n> ", "\n```\n", "\n---\n", "\n    "])
MIXED = st.lists(st.one_of(WORD, WORD, SIGNS, BLOCKS), max_size=100)


def in_order(words: list[str], text: str) -> bool:
    """Whether all words are in a text, one after the other."""
    found = 0
    for word in words:
        found = text.find(word, found)
        if found < 0:
            return False
        found += len(word)
    return True


@quickly
@given(MIXED, st.integers(0, 3))
def test_any_markup_keeps_every_word_in_order(pieces: list[str], filler: int) -> None:
    words = [piece.replace("palabra", f"palabra{number}q") for number, piece in enumerate(pieces)]
    text = ("relleno de texto " * 60 * filler) + re.sub("``+(?!\n)", "`", "".join(words))  # ```word is a language
    assume(not re.search(r"\n```(?!\n)", text))
    assert in_order(re.findall(r"palabra\d+q", text), "".join(whatsapp_parts(text)))


# Spans and lines of code are made of a few words over and over: quick to draw, and long enough to fill several parts.
PLAIN_WORD = st.sampled_from(["a", "ñandú", "curso", "Excel", "¿qué?", "fin.", "electroencefalografista", "🙂"])
SPAN = st.builds(lambda a, b, n: " ".join(([a, b] * n)[1:]), PLAIN_WORD, PLAIN_WORD, st.integers(1, 12))
STYLED = st.builds(
    lambda text, mark: f"{mark}{text}{mark}", SPAN, st.sampled_from(["**", "*", "***", "~~", "`", "__", ""])
)
NESTED = st.builds(lambda a, b, c: f"**{a} *{b}* ~~{c}~~**", SPAN, SPAN, SPAN)
INLINE = st.lists(STYLED | NESTED, min_size=1, max_size=4).map(" ".join)
BLOCK = st.builds(
    lambda start, text: start + text,
    st.sampled_from(["", "# ", "- ", "> ", "1. ", "- [ ] ", "|a|b|\n|-|-|\n|c|"]),
    INLINE,
)
CODE = st.builds(lambda line, n: FENCE + ("\n" + line) * n + "\n" + FENCE, SPAN, st.integers(1, 20))
DOCUMENT = st.lists(BLOCK | BLOCK | CODE, min_size=1, max_size=6).map("\n\n".join)


@quickly
@given(DOCUMENT)
def test_formatting_is_balanced_in_each_part(text: str) -> None:
    for part in whatsapp_parts(text):
        outside, *fenced = part.split(FENCE)[::2], *part.split(FENCE)[1::2]
        assert part.count(FENCE) == 2 * len(fenced)
        for line in "\n".join(outside).split("\n"):
            assert all(line.count(mark) % 2 == 0 for mark in "*_~`"), line
            assert not re.search(r"(?<!\S)[*_~]+(?!\S)", line), line  # no mark stands alone


# Spans whose marks do not stand as CommonMark wants them to.
SLOPPY = st.builds(
    lambda before, mark, space, text, end, after: f"{before}{mark}{space}{text}{end}{mark}{after}",
    st.sampled_from(["", "", "y ", "(", "¡", "texto", "1"]),
    st.sampled_from(["**", "~~"]),
    st.sampled_from(["", "", " "]),
    st.sampled_from(["Precio:", "50 %", "(y)", "🎓 Curso", "¡Oferta!", "Excel", "a _b_ c"]),
    st.sampled_from(["", "", " "]),
    st.sampled_from(["", "texto", "1,200", ": x", ", y", "… z", " w"]),
)
SHOWN = re.compile(r"(?<![^\W_])([*~_])(?=\S)[^\n]*?(?<=\S)\1(?![^\W_])")  # what WhatsApp takes for a span


@quickly
@given(SLOPPY)
def test_sloppy_marks_become_formatting_or_go_and_no_text_with_them(markdown: str) -> None:
    literal = r"\S(**|~~) .*(**|~~)|(^| )(**|~~) .* (**|~~)|\w(**|~~)\w[^*~]* "  # $5** al, 2 ** 3 ** 4, x**2 + y**2
    assume(not re.search(literal.replace("**", r"\*\*"), markdown))
    (part,) = whatsapp_parts(markdown)
    assert re.sub(r"[\s*~_]", "", part) == re.sub(r"[\s*~_]", "", markdown)
    assert not re.search(r"[*~]", SHOWN.sub(lambda span: re.sub(r"[*~_]", "", span[0]), part)), part


@quickly
@given(st.lists(st.sampled_from([*r"\* \_ \~ \`".split(), "a", "1", " ", ".", "\n", "🙂"]), max_size=30).map("".join))
def test_escaped_signs_never_become_formatting(markdown: str) -> None:
    assert not any(SHOWN.search(part) for part in whatsapp_parts(f"x {markdown}"))


@quickly
@given(DOCUMENT, st.integers(20, 700))
def test_link_stays_in_one_part(text: str, length: int) -> None:
    link = "ver el temario completo: https://x.mx/" + "a" * length
    markdown = f"{text}\n\nPuedes [ver el temario completo](https://x.mx/{'a' * length}), dijo.\n\n{text}"
    assert sum(link in part for part in whatsapp_parts(markdown)) == 1


@quickly
@given(DOCUMENT, st.lists(st.text("abc {}=", min_size=1, max_size=60), min_size=1, max_size=20))
def test_code_that_fits_stays_in_one_part(text: str, lines: list[str]) -> None:
    code = "\n".join(["def f():", *lines, "end"])
    parts = whatsapp_parts(f"{text}\n\n{FENCE}py\n{code}\n{FENCE}\n\n{text}")
    assert sum(FENCE + code + FENCE in part for part in parts) == 1


@quickly
@given(st.lists(st.sampled_from(EMOJI), min_size=1, max_size=12), st.integers(1, 120))
def test_characters_are_never_cut(characters: list[str], times: int) -> None:
    text = "".join(characters) * times
    ends = set(itertools.accumulate(len(character) for character in characters * times))
    parts = whatsapp_parts(text)
    assert "".join(parts) == text
    assert {end for end in itertools.accumulate(map(len, parts))} <= ends


PLAIN = st.lists(
    st.tuples(
        st.text("abcñáéüXYZ,;:¿?¡!()'\"%/@$", min_size=1, max_size=10)
        | st.sampled_from([*EMOJI, "5", "x.", "...", "a-b"]),
        st.sampled_from([" ", " ", " ", "  ", "\n", "\n\n"]),
    ),
    min_size=1,
    max_size=120,
)


@quickly
@given(PLAIN)
def test_plain_text_is_unchanged(words: list[tuple[str, str]]) -> None:
    text = "".join(word + space for word, space in words).strip()
    text = re.sub(r" +\n", "\n", text)
    assert whatsapp_parts(text) == [text]
