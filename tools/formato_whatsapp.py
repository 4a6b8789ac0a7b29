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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

from markdown_it import MarkdownIt
from markdown_it.rules_inline import StateInline, entity, escape
from markdown_it.rules_inline.emphasis import tokenize as emphasis
from markdown_it.rules_inline.state_inline import Delimiter
from markdown_it.rules_inline.strikethrough import tokenize as strikethrough
from markdown_it.token import Token

from tools import Context, Message, Part, hookimpl

Rule = Callable[[StateInline, bool], bool]

LIMIT = 1600  # UTF-16 code units in a message, as Twilio counts them
LONGEST_ATOM = 800  # a longer word is cut, so that an atom always fits with its marks and its line's prefix
DEEPEST = 20  # levels of nested lists and quotes; deeper than that is no formatting

FENCE = "```"
QUOTES = "'''"  # in place of a fence that would end code too soon, or begin some
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
_BETWEEN_TICKS = re.compile(rf"(?<=`)(?:[ \t]?{_MARKER} | [\ue201-\ue20f])+(?=`)", re.VERBOSE)  # which would meet
_CONTROL = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]")

# WhatsApp has no escapes. A sign that the model escaped is a character of the private use area until it is known what
# stands beside it: then it is itself again, or one that looks like it where WhatsApp would take it for a mark.
SIGNS = "*_~`"
LOOK_ALIKES = dict(zip(SIGNS, "∗ˍ∼ˋ", strict=True))
STAND_INS = dict(zip("\ue210\ue211\ue212\ue213", SIGNS, strict=True))
_ESCAPED = str.maketrans({sign: stand_in for stand_in, sign in STAND_INS.items()})
_PLAIN = str.maketrans(STAND_INS)
_NO_STAND_INS = str.maketrans(dict.fromkeys(STAND_INS, ""))


def _clean(text: str) -> str:
    """Return the text without citation markers, control characters and halves of surrogate pairs."""
    text = text.encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    text = _CONTROL.sub("", text.replace("\r\n", "\n").replace("\r", "\n"))
    return _CITATION.sub("", _BETWEEN_TICKS.sub(" ", _ENTITY.sub(r"\1", text))).translate(_NO_STAND_INS)


# --- Markdown ---------------------------------------------------------------------------------------------

# Emphasis must not begin inside a URL; what punctuation ends it belongs to the sentence.
_URL = re.compile(r"://(?:(?!\*\*|~~)[^\s<>\[\]`\"\\|])*(?<![*_~.,;:!?'()»”])")
_STARS = re.compile(r"(?<=[^\W_])\*(?=[^\W_*])|(?<=\d)\*+(?=\d)")  # 5*3*2, 2**3
_KEYCAP = re.compile("\\*\ufe0f?\u20e3")
_BRACKET = re.compile(r"!?\[")
_LITERAL = {":": (_URL,), "*": (_STARS, _KEYCAP)}


def _literal(state: StateInline, silent: bool) -> bool:
    """Inline rule: take URLs, asterisks inside words and brackets that no link follows as they are."""
    sign = state.src[state.pos]
    patterns = _LITERAL.get(sign, ())
    if sign in "![" and state.src.find("](", state.pos) < 0:  # to look for a link at each takes long
        patterns = (_BRACKET,)
    for pattern in patterns:
        match = pattern.match(state.src, state.pos)
        if match and match.end() > state.pos:
            if not silent:
                state.pending += match[0]
            state.pos = match.end()
            return True
    return False


def _marked(rule: Rule) -> Rule:
    """Return an inline rule that notes where it found marks, and what was escaped."""

    def marked(state: StateInline, silent: bool) -> bool:
        start, count = state.pos, len(state.tokens)
        found = rule(state, silent)
        for token in state.tokens[count:]:
            token.meta["at"] = start
            if token.type == "text_special":
                token.content = token.content.translate(_ESCAPED)
        return found

    return marked


@dataclass(slots=True)
class _Run:
    """Two asterisks or tildes in a row, and where they are in the source."""

    start: int
    delimiters: list[Delimiter]
    before: str  # the characters beside them
    after: str

    @property
    def in_word(self) -> bool:
        return self.before.isalnum() and self.after.isalnum()

    def set(self, opens: bool, closes: bool) -> None:
        """Say what the run may do."""
        for delimiter in self.delimiters:
            delimiter.open, delimiter.close = opens, closes


def _pair_in_lines(state: StateInline) -> None:
    """Inline rule, run before marks are paired: ** and ~~ are a pair with the next of their kind in the line.

    CommonMark leaves marks that have a letter on one side and punctuation on the other, "**Precio:**100"."""
    for delimiters in (state.delimiters, *(meta["delimiters"] for meta in state.tokens_meta if meta)):
        for sign in "*~":
            runs = _runs(state, [d for d in delimiters if d.marker == ord(sign)])
            n = 0
            while n + 1 < len(runs):
                first, second = runs[n : n + 2]
                between = state.src[first.start + 2 : second.start]
                paired = "\n" not in between and _is_pair(first, second, between, n + 2 == len(runs))
                if paired:
                    first.set(opens=True, closes=False)
                    second.set(opens=False, closes=True)
                    last = state.tokens[second.delimiters[0].token - 1]
                    if second.after in ",.:;!?" and last.type == "text":  # "**Excel **: …"
                        last.content = last.content.rstrip(" ")
                n += 2 if paired else 1


def _runs(state: StateInline, delimiters: list[Delimiter]) -> list[_Run]:
    """Return the runs of exactly two signs among delimiters of one sign."""
    runs = []
    for start, group in itertools.groupby(delimiters, key=lambda d: state.tokens[d.token].meta.get("at", -1)):
        members = list(group)
        if sum(len(state.tokens[d.token].content) for d in members) == 2 and start >= 0:
            before, after = state.src[start - 1 : start] if start else "", state.src[start + 2 : start + 3]
            runs.append(_Run(start, members, before or "\n", after or "\n"))
    return runs


def _is_pair(first: _Run, second: _Run, between: str, last: bool) -> bool:
    """Return whether two runs in a line are the beginning and the end of one span."""
    if first.in_word and second.in_word and " " in between:  # x**2 + y**2
        first.set(opens=False, closes=False)
        second.set(opens=False, closes=False)
        return False
    opens = not first.after.isspace() or (first.before.isspace() and not second.before.isspace())
    closes = not second.before.isspace() or not second.after.isalnum() or (last and not first.in_word)
    return opens and closes and bool(between.strip()) and not (first.after.isspace() and second.before.isspace())


class _Markdown(MarkdownIt):
    """CommonMark with tables and strike-through, without what models do not mean by what they write."""

    def __init__(self) -> None:
        super().__init__("commonmark", {"html": True, "maxNesting": DEEPEST})
        self.enable(["table", "strikethrough"])
        # Four spaces are an indent here, not code; dashes under a line are a rule, not a heading; and references
        # and blocks of HTML would take text away.
        self.disable(["code", "lheading", "reference", "html_block"])
        self.inline.ruler.before("newline", "literal", _literal)
        for rule in (escape, entity):
            self.inline.ruler.at(rule.__name__, _marked(rule))
        self.inline.ruler.at("emphasis", _marked(emphasis))
        self.inline.ruler.at("strikethrough", _marked(strikethrough))
        self.inline.ruler2.before("balance_pairs", "pair_in_lines", _pair_in_lines)
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
# A text with none of these may well be written as WhatsApp has it, where *one* asterisk is bold.
_OF_MARKDOWN = re.compile(r"\*\*|\]\(|^[ \t]*(?:#{1,6}\s|\|)", re.MULTILINE)


def _read(text: str) -> list[Atom]:
    """Return a Markdown text as atoms; its bare words where it has no formatting that makes sense."""
    tokens = _MARKDOWN.parse(text)
    reader = _Reader(text, star="_" if _OF_MARKDOWN.search(text) else "*")
    if all(token.level < DEEPEST - 1 for token in tokens):  # the parser leaves out what is deeper
        reader.run(tokens)
    if not reader.atoms:
        for line in text.split("\n"):
            reader.new_line()
            reader.words(line)
    return _unescaped(_with_marks_that_show(reader.atoms))


class _Reader:
    """Turns tokens into atoms; each method named like a type of token takes such a token."""

    def __init__(self, text: str, star: str) -> None:
        self.star = star  # what one asterisk means
        self.anchors = 0  # </a> to come in the paragraph
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
                self.style(self.star if token.markup == "*" else STYLES[token.tag], token.nesting)
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
        children = token.children or ()
        self.anchors = sum(child.type == "html_inline" and child.content[:3].lower() == "</a" for child in children)
        self.run(children)
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
        self.words(token.content.replace(FENCE, QUOTES), (mark,))
        self.glue(start)

    def html_inline(self, token: Token) -> None:
        tag = _TAG.match(token.content)
        closing, name, href = (tag[1], tag[2].lower(), tag[3]) if tag else ("", "", "")
        if name in LINE_TAGS:
            self.new_line()
        elif name in STYLES:
            self.html_style(STYLES[name], bool(closing))
        elif name == "a" and href and self.anchors:
            self.links.append((href, len(self.atoms)))
        elif name == "a" and closing and self.links:
            self.anchors -= 1
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
        label = "".join(atom.gap + atom.text for atom in self.atoms[start:]).translate(_PLAIN).strip()
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
        return (content if content.strip() else info).replace(FENCE, QUOTES).split("\n") if content or info else []

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


def _with_marks_that_show(atoms: list[Atom]) -> list[Atom]:
    """Return the atoms without marks that WhatsApp would show as they are, having a letter or digit outside: those in
    the middle of a word go, others get a space."""
    for n in range(1, len(atoms)):
        before, after = atoms[n - 1], atoms[n]
        if after.gap or before.marks == after.marks:
            continue
        kept = _kept(before, after)
        closing, opening = ([mark for mark in atom.marks[kept:] if mark in "*_~"] for atom in (before, after))
        ends, begins = before.text[-1:].isalnum(), after.text[:1].isalnum()
        if ends and begins:
            _unmark(_line(atoms, n - 1, -1), closing)
            _unmark(_line(atoms, n, 1), opening)
        elif (begins and closing and not opening) or (ends and opening and not closing):
            after.gap = " "
    return atoms


def _unmark(atoms: Iterable[Atom], marks: Sequence[str]) -> None:
    """Take marks off the first atoms, as far as they have them."""
    line = list(atoms) if marks else []
    for mark in marks:
        for atom in itertools.takewhile(lambda atom: mark in atom.marks, line):  # noqa: B023
            atom.marks = tuple(other for other in atom.marks if other != mark)


def _line(atoms: list[Atom], n: int, step: int) -> Iterator[Atom]:
    """Yield the atoms from the nth on, forwards (1) or backwards (-1), to the end of its line."""
    yield atoms[n]
    while 0 <= n + step < len(atoms) and "\n" not in atoms[max(n, n + step)].gap:
        n += step
        yield atoms[n]


def _unescaped(atoms: list[Atom]) -> list[Atom]:
    """Return the atoms with what the model escaped, and fences that begin no code, as WhatsApp shows them."""
    for atom in atoms:
        if not {"`", FENCE} & set(atom.marks):
            atom.text = atom.text.replace(FENCE, QUOTES)
    starts = [n for n, atom in enumerate(atoms) if n == 0 or "\n" in atom.gap]
    for start, end in itertools.pairwise([*starts, len(atoms)]):
        if any(stand_in in atom.text for atom in atoms[start:end] for stand_in in STAND_INS):
            _unescape_line(atoms[start:end])
    return atoms


def _unescape_line(atoms: list[Atom]) -> None:
    """Put signs in the place of those that stand for them in a line: look-alikes where they could be a mark."""
    line, ends = atoms[0].gap + "".join(atoms[0].marks) + atoms[0].text, []
    for before, atom in itertools.pairwise(atoms):
        ends.append(len(line))
        line += _joined(before, atom)
    signs = line.translate(_PLAIN)
    alone = [sign for sign in SIGNS if signs.count(sign) == 1]

    def shown(at: int, bare: bool) -> str:
        around = [signs[at - 1 : at] or " ", signs[at + 1 : at + 2] or " "]
        harmless = all(sign.isalnum() for sign in around) or all(sign.isspace() for sign in around)
        return signs[at] if bare or harmless or signs[at] in alone else LOOK_ALIKES[signs[at]]

    for atom, end in zip(atoms, [*ends, len(line)], strict=True):
        begin, bare = end - len(atom.text), "://" in atom.text
        atom.text = "".join(shown(begin + n, bare) if sign in STAND_INS else sign for n, sign in enumerate(atom.text))


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
    kept = _kept(before, atom)
    return _closed(before.marks[kept:]) + atom.gap + "".join(atom.marks[kept:]) + atom.text


def _kept(before: Atom, atom: Atom) -> int:
    """Return how many of an atom's marks, the outermost first, are open already after another."""
    if "\n" in atom.gap and atom.place is not Break.CODE_LINE:
        return 0
    pairs = zip(before.marks, atom.marks, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))


def _closed(marks: tuple[str, ...]) -> str:
    """Return what closes marks, the last one first."""
    return "".join(reversed(marks))


def _units(text: str) -> int:
    """Return a text's length in UTF-16 code units."""
    return len(text) + sum(sign > "\uffff" for sign in text)
