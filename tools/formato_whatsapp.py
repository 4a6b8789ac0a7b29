"""WhatsApp formatting: the model's Markdown as messages that WhatsApp shows well and Twilio accepts.

Markdown is parsed into tokens (markdown-it-py), the tokens become atoms (words that know their marks and what stands
before them), and the atoms are packed into parts of at most 1,600 UTF-16 code units. Marks are written only at that
last step, which is why a part can end anywhere and still close what it opened.

What WhatsApp shows: https://faq.whatsapp.com/539178204879377. What Twilio takes:
https://www.twilio.com/docs/api/errors/21617.
"""

import itertools
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline
from markdown_it.token import Token

from tools import Context, Message, Part, hookimpl

LIMIT = 1600  # UTF-16 code units in a message, as Twilio counts them
LONGEST_ATOM = 800  # a longer word is cut, so that an atom always fits with its marks and its line's prefix
DEEPEST = 20  # levels of nested lists and quotes; deeper than that is no formatting

FENCE = "```"
STYLES = {
    **dict.fromkeys(["strong", "b", "h1", "h2", "h3", "h4", "h5", "h6"], "*"),
    **dict.fromkeys(["em", "i"], "_"),
    **dict.fromkeys(["s", "del", "strike"], "~"),
    "code": "`",
}
LINE_TAGS = {"br", "p", "div", "li", "tr"}
SILENT_TAGS = set("u span sub sup small big mark font center details summary ul ol table tbody td th".split())
RULE = "———"
EMPTY = "—"  # a table's cell without content


@hookimpl(trylast=True)
def format_reply(text: str, message: Message, context: Context) -> list[Part] | None:
    """Return the model's text as the parts that WhatsApp shows; None for a text with nothing to show."""
    return [Part(text=part) for part in whatsapp_parts(text)] or None


def whatsapp_parts(text: str) -> list[str]:
    """Return Markdown as WhatsApp messages of at most 1,600 UTF-16 code units, none of them blank."""
    return _pack(_read(_clean(text)))


# --- What is not for the user -----------------------------------------------------------------------------

# Citations as file search and web search leave them: 【4:0†manual.pdf】, [4:0†source], and names between characters of
# Unicode's private use area, from U+E200 to U+E201, of which an "entity" alone has a name to show.
_ENTITY = re.compile('\ue200entity\ue202\\["[^"\n]*", *"([^"\n]*)"[^\ue200\ue201\n]*\ue201')
_MARKER = r"""(?:
    【[^【】\n]{0,80}†[^【】\n]{0,200}】 | 【(?:\d+(?::\d+)?|turn\d\w{1,80})】 | \[\d+(?::\d+)?†[^\[\]\n]{0,200}\]
    | \ue200(?:[^\ue200\ue201\n]*\ue201|[^\ue200\ue201\s]*)
    | \b(?:file|nav)?cite(?:turn\d+[a-z]+\d+)+\b
)"""
_CITATION = re.compile(rf"[ \t]{_MARKER}(?!\w) | {_MARKER} | [\ue201-\ue20f]", re.VERBOSE)
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")


def _clean(text: str) -> str:
    """Return the text without citation markers, control characters and halves of surrogate pairs."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CITATION.sub("", _ENTITY.sub(r"\1", text))


# --- Markdown ---------------------------------------------------------------------------------------------

# Emphasis must not begin inside a URL; what punctuation ends it belongs to the sentence.
_URL = re.compile(r"://(?:(?!\*\*|~~)[^\s<>\[\]`\"\\|])*(?<![*_~.,;:!?'()»”])")
_STARS = re.compile(r"(?<=[^\W_])\*(?=[^\W_*])|(?<=\d)\*+(?=\d)")  # 5*3*2, 2**3
_KEYCAP = re.compile("\\*\ufe0f?\u20e3")


def _literal(state: StateInline, silent: bool) -> bool:
    """Inline rule: take URLs and asterisks inside words as they are."""
    patterns = {":": [_URL], "*": [_STARS, _KEYCAP]}.get(state.src[state.pos], [])
    for pattern in patterns:
        match = pattern.match(state.src, state.pos)
        if match and match.end() > state.pos:
            if not silent:
                state.pending += match[0]
            state.pos = match.end()
            return True
    return False


class _Markdown(MarkdownIt):
    """CommonMark with tables and strike-through, without what models do not mean by what they write."""

    def __init__(self) -> None:
        super().__init__("commonmark", {"html": True, "maxNesting": DEEPEST})
        self.enable(["table", "strikethrough"])
        # Four spaces are an indent here, not code; dashes under a line are a rule, not a heading; and references
        # and blocks of HTML would take text away.
        self.disable(["code", "lheading", "reference", "html_block"])
        self.inline.ruler.before("newline", "literal", _literal)
        self.parse("-")  # compiles the rules, which two threads must not do at once

    def normalizeLink(self, url: str) -> str:
        """Return a URL as the model wrote it."""
        return url


_MARKDOWN = _Markdown()


# --- Atoms ------------------------------------------------------------------------------------------------


class Break(IntEnum):
    """How good a place it is to begin a new part; those below WORD are for what fits in no part."""

    INSIDE = 0  # of a long word, a link or a line of code
    CODE_LINE = 1
    WORD = 2
    SENTENCE = 3
    LINE = 4
    PARAGRAPH = 5


@dataclass(slots=True)
class Atom:
    """A word: the marks around it, the white space and line prefix before it, and what replaces both (`lead`)
    where it begins a part."""

    text: str
    marks: tuple[str, ...]
    gap: str
    lead: str
    place: Break


@dataclass(slots=True)
class _Box:
    """A list item or a quote: what its first line begins with, and the others."""

    first: str
    rest: str
    used: bool = False

    @property
    def is_quote(self) -> bool:
        return self.first == self.rest

    def prefix(self) -> str:
        """Return what the next line begins with."""
        prefix = self.rest if self.used else self.first
        self.used = True
        return prefix


@dataclass(slots=True)
class _Row:
    """A table's row: its line in the source and its cells."""

    line: int
    cells: list[Token] = field(default_factory=list)


_NO_BREAK = "\u00a0\u2007\u202f"
_PIECE = re.compile(rf"(?P<space>[^\S{_NO_BREAK}]+)|[\S{_NO_BREAK}]+")
_CODE_PIECE = re.compile(r"\s*\S+|\s+")
_SENTENCE_END = re.compile(r"[.!?…][\"'”’»)]*$")
_TASK = re.compile(r"\[([ xX])\](?:\s+|$)")
_TAG = re.compile(r"<(/?)([a-z][a-z0-9]*)(?=[\s/>])(?:[^>]*?\bhref\s*=\s*[\"']?([^\s\"'>]+))?", re.IGNORECASE)
_WEB = re.compile(r"^(mailto:|tel:|https?://)?(www\.)?")
_LANGUAGE = re.compile(r"[\w+#.-]*")
_CELL_BORDER = re.compile(r"(?<!\\)\|")


def _read(text: str) -> list[Atom]:
    """Return a Markdown text as atoms; its bare words where it has no formatting that makes sense."""
    tokens = _MARKDOWN.parse(text)
    reader = _Reader(text)
    if all(token.level < DEEPEST - 1 for token in tokens):  # the parser leaves out what is deeper
        reader.run(tokens)
    if not reader.atoms:
        for line in text.split("\n"):
            reader.new_line()
            reader.words(line)
    return _without_marks_in_words(reader.atoms)


class _Reader:
    """Turns tokens into atoms; each method named like a type of token takes such a token."""

    def __init__(self, text: str) -> None:
        self.atoms: list[Atom] = []
        self.source = text.split("\n")
        self.line = 0  # of the source
        # What waits for the next atom: the white space before it and, where it begins a line, how good a break that is.
        self.gap = ""
        self.line_place: Break | None = Break.PARAGRAPH
        self.lazy = False  # the line stands at the margin in the source, though it belongs to an item or a quote
        self.after_link = False
        self.marks: dict[str, int] = {}  # those open, with how often, the outermost first
        self.html: list[str] = []  # those of them that HTML tags opened
        self.links: list[tuple[str, int]] = []  # the URL of each link that is open, and its first atom
        self.boxes: list[_Box] = []
        self.numbers: list[tuple[str, str]] = []  # for each list, the last number as written and as shown
        self.rows: list[_Row] | None = None

    def run(self, tokens: Iterable[Token]) -> None:
        """Read tokens in order; a type without a method of its own shows nothing."""
        for token in tokens:
            if token.nesting and token.tag in STYLES:
                self.style(STYLES[token.tag], token.nesting)
            handler = getattr(self, token.type, None)
            if handler:
                handler(token)

    # Words

    def words(self, text: str, marks: tuple[str, ...] | None = None) -> None:
        """Add a text word by word, with the marks that are open unless others are given."""
        for piece in _PIECE.finditer(text):
            if not piece["space"]:
                bare = "://" in piece[0] and marks is None  # marks would become part of the URL
                self.put(piece[0], () if bare else tuple(self.marks) if marks is None else marks)
            elif self.line_place is None:
                self.gap += piece[0]

    def put(self, text: str, marks: tuple[str, ...] = (), place: Break | None = None) -> None:
        """Add an atom after the gap that waits for it, and at the beginning of a line after that line's prefix."""
        quoted = "> " if any(box.is_quote for box in self.boxes) else ""
        if self.line_place is not None:
            lead = self.prefix()
            gap, place = self.gap + lead, self.line_place
        else:
            if self.after_link and not self.gap and text[:1].isalnum():
                self.gap = " "  # or it would become part of the URL
            lead, gap = quoted, self.gap
            place = self.word_place() if place is None else place
        first, *others = _cut(text)
        self.atoms.append(Atom(first, marks, gap, lead, place))
        self.atoms += [Atom(other, marks, "", quoted, Break.INSIDE) for other in others]
        self.gap, self.line_place, self.lazy, self.after_link = "", None, False, False

    def prefix(self) -> str:
        """Return what the next line begins with: bullets, quote signs and indents."""
        if self.lazy and all(box.used for box in self.boxes):
            return ""
        return "".join(box.prefix() for box in self.boxes)

    def word_place(self) -> Break:
        """Return how good it is to break the line before the next atom."""
        if not self.gap:
            return Break.INSIDE
        return Break.SENTENCE if _SENTENCE_END.search(self.atoms[-1].text) else Break.WORD

    def new_line(self, blank: bool = False) -> None:
        """Begin a line, after a blank one if so asked."""
        if self.line_place is None:
            introduces = self.atoms[-1].text.endswith(":")  # what follows had better stay with it
            self.line_place = Break.WORD if introduces else Break.PARAGRAPH if blank else Break.LINE
            self.gap = "\n"
        if blank:
            self.gap = "\n\n"

    def glue(self, start: int) -> None:
        """Keep the atoms from `start` on in one line and one part."""
        for atom in self.atoms[start + 1 :]:
            atom.place = Break.INSIDE
            atom.gap = " " if "\n" in atom.gap else atom.gap

    # Inline

    def inline(self, token: Token) -> None:
        if self.rows is not None:
            self.rows[-1].cells.append(token)
            return
        self.run(token.children or ())
        while self.links:
            self.link_close()
        while self.html:
            self.style(self.html.pop(), -1)

    def text(self, token: Token) -> None:
        box = self.boxes[-1] if self.boxes else None
        task = _TASK.match(token.content) if box and not box.used and not box.is_quote else None
        if box and task:
            box.first = "⬜ " if task[1] == " " else "✅ "
        self.words(token.content[task.end() if task else 0 :])

    def style(self, mark: str, change: int) -> None:
        """Open a mark (1) or close it (-1)."""
        self.marks[mark] = self.marks.get(mark, 0) + change
        if not self.marks[mark]:
            del self.marks[mark]

    def softbreak(self, token: Token) -> None:
        self.new_line()
        self.line += 1
        self.lazy = self.line < len(self.source) and not self.source[self.line].startswith((" ", "\t", ">"))

    hardbreak = softbreak

    def code_inline(self, token: Token) -> None:
        start = len(self.atoms)
        mark = FENCE if "`" in token.content else "`"
        self.words(token.content, () if FENCE in token.content else (mark,))
        self.glue(start)

    def html_inline(self, token: Token) -> None:
        tag = _TAG.match(token.content)
        closing, name, href = (tag[1], tag[2].lower(), tag[3]) if tag else ("", "", "")
        if name in LINE_TAGS:
            self.new_line()
        elif name in STYLES:
            self.html_style(STYLES[name], bool(closing))
        elif name == "a" and href:
            self.links.append((href, len(self.atoms)))
        elif name == "a" and closing and self.links:
            self.link_close()
        elif name not in SILENT_TAGS:
            self.words(token.content)  # "escribe <tu nombre>" is text

    def html_style(self, mark: str, closing: bool) -> None:
        """Open a mark, or close one that a tag opened."""
        if not closing:
            self.html.append(mark)
            self.style(mark, 1)
        elif mark in self.html:
            self.html.remove(mark)
            self.style(mark, -1)

    def image(self, token: Token) -> None:
        self.links.append((str(token.attrs["src"]), len(self.atoms)))
        self.run(token.children or ())
        self.link_close()

    def link_open(self, token: Token) -> None:
        self.links.append((str(token.attrs["href"]), len(self.atoms)))

    def link_close(self, token: Token | None = None) -> None:
        href, start = self.links.pop()
        target = _target(href)
        label = "".join(atom.gap + atom.text for atom in self.atoms[start:]).strip()
        if label and target and _same(label, target):
            self.replace(start, target)
        elif target:
            self.gap = "" if label else self.gap
            if label and label[-1] not in ":?" and "://" not in self.atoms[-1].text:
                self.put(":")
            self.gap = " " if label else self.gap
            self.put(target)
        self.glue(start)
        self.after_link = bool(target)

    def replace(self, start: int, text: str) -> None:
        """Put one text without marks in the place of all atoms from `start` on."""
        first = self.atoms[start]
        del self.atoms[start:]
        self.atoms += [Atom(piece, (), "", first.lead, Break.INSIDE) for piece in _cut(text)]
        self.atoms[start].gap, self.atoms[start].place = first.gap, first.place

    # Blocks

    def block(self, token: Token) -> None:
        """Begin a block on a line of its own, after a blank one where the source has one."""
        self.line = token.map[0] if token.map else self.line
        self.lazy = False
        self.new_line(blank=self.line > 0 and not self.source[self.line - 1].strip(" \t>"))

    paragraph_open = block
    heading_open = block

    def heading_close(self, token: Token) -> None:
        if self.line_place is None:
            self.new_line()
            self.line_place = Break.WORD  # a heading had better stay with what follows

    def hr(self, token: Token) -> None:
        self.block(token)
        self.put(RULE)

    def blockquote_open(self, token: Token) -> None:
        nested = any(box.is_quote for box in self.boxes)  # WhatsApp knows one level
        self.boxes.append(_Box("", "") if nested else _Box("> ", "> "))

    def blockquote_close(self, token: Token) -> None:
        self.boxes.pop()

    def bullet_list_open(self, token: Token) -> None:
        self.numbers.append(("", ""))

    ordered_list_open = bullet_list_open

    def bullet_list_close(self, token: Token) -> None:
        self.numbers.pop()

    ordered_list_close = bullet_list_close

    def list_item_open(self, token: Token) -> None:
        self.block(token)
        bullet = "- "
        if token.info:
            written, shown = self.numbers[-1]
            number = str(int(shown) + 1) if written == token.info else token.info  # "1. 1. 1." counts
            self.numbers[-1] = (token.info, number)
            bullet = f"{number}{token.markup} "
        self.boxes.append(_Box(bullet, " " * len(bullet)))

    def list_item_close(self, token: Token) -> None:
        box = self.boxes.pop()
        if not box.used:  # an empty item, or a text such as "2026."
            self.put(box.first.strip())

    def fence(self, token: Token) -> None:
        """A block of code, line by line; outside of quotes, where WhatsApp would show their signs."""
        self.block(token)
        boxes = self.boxes
        self.boxes = [box for box in boxes if not box.is_quote]
        self.lazy = True
        for number, line in enumerate(self.code_lines(token)):
            place = Break.CODE_LINE
            self.gap = "\n" if number else self.gap
            for piece in _CODE_PIECE.findall(line) or [""]:
                self.put(piece, (FENCE,), place)
                place = Break.INSIDE
        self.boxes = boxes

    def code_lines(self, token: Token) -> list[str]:
        """Return the lines of a block of code, without the fences and the language's name."""
        info, content = token.info.strip(), token.content.strip("\n")
        last = self.source[token.map[1] - 1].strip(" \t>") if token.map else ""
        closed = len(last) >= len(token.markup) and not last.strip(token.markup)
        if not closed or not _LANGUAGE.fullmatch(info):  # WhatsApp's own way: ```the code begins on this line
            content = f"{info}\n{content.removesuffix(token.markup)}".strip("\n")
        return content.replace(FENCE, "'''").split("\n") if content.strip() else []

    # Tables

    def table_open(self, token: Token) -> None:
        self.block(token)
        self.rows = []

    def tr_open(self, token: Token) -> None:
        if self.rows is not None and token.map:
            self.rows.append(_Row(token.map[0]))

    def table_close(self, token: Token) -> None:
        (header, *rows), self.rows = self.rows or [], None
        is_named = ["|" in self.source[row.line] for row in rows]
        if not any(is_named) or sum(len(name.content) for name in header.cells) > 200:
            for row in (header, *rows):
                self.plain_row(row)
            return
        for row, named in zip(rows, is_named, strict=True):
            self.new_line(blank=row is not rows[0])
            if named:
                self.named_row(header.cells, row)
            else:
                self.plain_row(row)

    def plain_row(self, row: _Row) -> None:
        """Show a row as one line; also the line of text right below a table, which Markdown takes for a row."""
        self.new_line()
        cells = [cell for cell in self.cells(row) if cell.content.strip()]
        for cell in cells:
            self.inline(cell)
            if cell is not cells[-1]:
                self.words(" | ", ())

    def named_row(self, names: Sequence[Token], row: _Row) -> None:
        """Show each cell as a line with its column's name."""
        for name, cell in itertools.zip_longest(names, self.cells(row)):
            self.new_line()
            if name and name.content.strip():
                self.column_name(name)
                if not cell.content.strip():
                    self.put(EMPTY)
            self.inline(cell)

    def column_name(self, name: Token) -> None:
        """Show a column's name, bold and with a colon."""
        self.style("*", 1)
        self.inline(name)
        self.style("*", -1)
        if not name.content.endswith(":"):
            self.gap = ""
            self.put(":", place=Break.INSIDE)
        self.gap = " "

    def cells(self, row: _Row) -> list[Token]:
        """Return a row's cells, also those beyond the last column, which the parser leaves out."""
        line = self.source[row.line].strip(" \t>").removeprefix("|").removesuffix("|")
        beyond = _CELL_BORDER.split(line)[len(row.cells) :]
        return row.cells + [_MARKDOWN.parseInline(cell.strip())[0] for cell in beyond]


def _target(href: str) -> str:
    """Return a link's target as a person reads it; "" where it leads nowhere from a phone."""
    scheme, _, rest = href.partition(":")
    if scheme.lower() in ("mailto", "tel", "sms"):
        return rest.partition("?")[0]
    return "" if href.startswith("#") or scheme.lower() in ("sandbox", "attachment", "data") else href


def _same(label: str, target: str) -> bool:
    """Return whether a link's text says no more than its target does."""
    bare, bare_target = (_WEB.sub("", text.casefold()).rstrip("/") for text in (label, target))
    return bare == bare_target or (target.strip("+").isdigit() and re.sub(r"[\s()-]", "", label) == target)


def _without_marks_in_words(atoms: list[Atom]) -> list[Atom]:
    """Return the atoms without marks that have a letter or digit on both sides, which WhatsApp shows as they are."""
    for before, after in itertools.pairwise(atoms):
        joined = not after.gap and before.text[-1:].isalnum() and after.text[:1].isalnum()
        if joined and before.marks != after.marks:
            for atom in (before, after):
                atom.marks = tuple(mark for mark in atom.marks if mark not in "*_~")
    return atoms


def _cut(word: str) -> list[str]:
    """Return a word as it is, or as its characters where it is too long to be kept whole."""
    return [word] if _units(word) <= LONGEST_ATOM else list(_characters(word))


def _characters(text: str) -> Iterator[str]:
    """Yield a text's characters as a person sees them: with their accents, emoji sequences and flags whole
    (https://unicode.org/reports/tr29/, without Hangul and the rules for Indic scripts)."""
    character = ""
    for sign in text:
        flag = len(character) == 1 and _is_regional(character) and _is_regional(sign)
        if character and len(character) < 100 and (flag or _extends(sign) or character.endswith("\u200d")):
            character += sign
        else:
            if character:
                yield character
            character = sign
    yield character


def _is_regional(sign: str) -> bool:
    """Return whether two such signs make a flag."""
    return "\U0001f1e6" <= sign <= "\U0001f1ff"


def _extends(sign: str) -> bool:
    """Return whether a sign belongs to the one before: accents, variations, skin tones, tags, joiners."""
    tone_or_tag = "\U0001f3fb" <= sign <= "\U0001f3ff" or "\U000e0020" <= sign <= "\U000e007f"
    return tone_or_tag or sign in "\u200c\u200d" or unicodedata.category(sign)[0] == "M"


# --- Parts ------------------------------------------------------------------------------------------------


def _pack(atoms: list[Atom]) -> list[str]:
    """Return the atoms written as parts, each as full as a good place to end it allows."""
    parts = []
    start = 0
    while start < len(atoms):
        end, part = _fill(atoms, start)
        if any(atom.text.strip() for atom in atoms[start:end]):
            parts.append(part)
        start = end
    return parts


def _fill(atoms: list[Atom], start: int) -> tuple[int, str]:
    """Return one part that begins with the atom at `start`, and the index of the atom that begins the next."""
    pieces = [atoms[start].lead + "".join(atoms[start].marks) + atoms[start].text]
    sizes = [_units(pieces[0])]  # the part's size up to each atom, without the marks that it closes
    end = start + 1
    while end < len(atoms):
        piece = _joined(atoms[end - 1], atoms[end])
        size = sizes[-1] + _units(piece)
        if size + len(_closed(atoms[end].marks)) > LIMIT:
            end = _best_end(atoms, start, sizes)
            break
        pieces.append(piece)
        sizes.append(size)
        end += 1
    return end, "".join(pieces[: end - start]) + _closed(atoms[end - 1].marks)


def _best_end(atoms: list[Atom], start: int, sizes: list[int]) -> int:
    """Return the index of the atom before which a part had better end: the best place in its second half, and in
    its first half only rather than inside a link or code."""

    def worth(end: int) -> tuple[bool, bool, Break, int]:
        place = atoms[end].place
        return place >= Break.WORD, sizes[end - start - 1] >= LIMIT // 2, place, end

    return max(range(start + 1, start + len(sizes) + 1), key=worth)


def _joined(before: Atom, atom: Atom) -> str:
    """Return an atom as it is written after another: marks that both have stay open, though only code's over a line
    (https://faq.whatsapp.com/539178204879377)."""
    kept = 0
    if "\n" not in atom.gap or atom.place is Break.CODE_LINE:
        pairs = zip(before.marks, atom.marks, strict=False)
        kept = sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
    return _closed(before.marks[kept:]) + atom.gap + "".join(atom.marks[kept:]) + atom.text


def _closed(marks: tuple[str, ...]) -> str:
    """Return what closes marks, the last one first."""
    return "".join(reversed(marks))


def _units(text: str) -> int:
    """Return a text's length in UTF-16 code units."""
    return len(text) + sum(sign > "\uffff" for sign in text)
