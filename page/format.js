// WhatsApp's formatting as DOM nodes: *bold* _italic_ ~struck~ `code` ```mono```, lists, quotes and links.
// Text only ever becomes text nodes, so nothing that a message says can become markup.

const INLINE = new RegExp([
  "```([^`]+?)```|`([^`\\n]+)`",                                                     // 1, 2 code
  "((?:https?:\\/\\/|www\\.)[^\\s<>]+)",                                             // 3 link
  "([\\w.+-]+@[\\w-]+(?:\\.[\\w-]+)+)",                                              // 4 e-mail
  "(?<![\\p{L}\\p{N}])([*_~])(?=[^\\s*_~]|[*_~][^\\s])(.+?)(?<=\\S)\\5(?![\\p{L}\\p{N}])", // 5 mark, 6 what it marks
].join("|"), "gu");
const MARKS = { "*": "strong", _: "em", "~": "s" };

const element = (name, ...children) => {
  const node = document.createElement(name);
  node.append(...children);
  return node;
};

function link(text) {
  const shown = text.replace(/[.,;:!?)\]}»”"'*_~]+$/u, "");
  const href = shown.startsWith("www.") ? `https://${shown}` : shown;
  if (!URL.canParse(href)) return [text];
  const anchor = element("a", shown);
  Object.assign(anchor, { href, target: "_blank", rel: "noopener noreferrer" });
  return [anchor, text.slice(shown.length)];
}

function mail(text) {
  const anchor = element("a", text);
  anchor.href = `mailto:${text}`;
  return anchor;
}

/** The nodes of a piece of text without line breaks. */
function inline(text) {
  const nodes = [];
  let end = 0;
  for (const found of text.matchAll(INLINE)) {
    nodes.push(text.slice(end, found.index));
    end = found.index + found[0].length;
    if (found[1] ?? found[2]) nodes.push(element("code", found[1] ?? found[2]));
    else if (found[3]) nodes.push(...link(found[3]));
    else if (found[4]) nodes.push(mail(found[4]));
    else nodes.push(element(MARKS[found[5]], ...inline(found[6])));
  }
  nodes.push(text.slice(end));
  return nodes.filter((node) => node !== "");
}

const KINDS = [
  ["blockquote", /^> ?(.*)$/u],
  ["ul", /^[-*•] +(.*)$/u],
  ["ol", /^(?:\d{1,3})[.)] +(.*)$/u],
];

function kindOf(line) {
  for (const [kind, pattern] of KINDS) {
    const found = pattern.exec(line);
    if (found) return [kind, found[1]];
  }
  return ["p", line];
}

function block(kind, lines, first) {
  if (kind === "ul" || kind === "ol") {
    const list = element(kind, ...lines.map((line) => element("li", ...inline(line))));
    if (kind === "ol") list.start = parseInt(first, 10);
    return list;
  }
  const nodes = lines.flatMap((line, index) => (index ? [element("br"), ...inline(line)] : inline(line)));
  return element(kind, ...nodes);
}

function blocks(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const [kind, rest] = kindOf(line);
    const last = found.at(-1);
    if (last?.kind === kind) last.lines.push(rest);
    else found.push({ kind, lines: [rest], first: line });
  }
  return found.map(({ kind, lines, first }) => block(kind, lines, first));
}

/** A fragment that shows a message's text as WhatsApp does. */
export function formatted(text) {
  const fragment = document.createDocumentFragment();
  text.split(/```([^`]*\n[^`]*)```/u).forEach((part, index) => {
    if (index % 2) fragment.append(element("pre", part.replace(/^\n|\n$/gu, "")));
    else if (part.trim()) fragment.append(...blocks(part.replace(/^\n|\n$/gu, "")));
  });
  return fragment;
}

/** The text on one line and without its marks, for previews. */
export const plain = (text) => text.replaceAll("```", "").split("\n").map(
  (line) => inline(line).map((node) => node.textContent ?? node).join("")).join(" ").replace(/\s+/gu, " ").trim();

const EMOJI = /^(?:\p{Extended_Pictographic}|\p{Emoji_Modifier}|\p{Regional_Indicator}|\u200d|\ufe0f|\s)+$/u;

/** True for a message of one to three emoji, which is shown large. */
export function isBigEmoji(text) {
  return EMOJI.test(text) && [...new Intl.Segmenter("es").segment(text.replace(/\s/gu, ""))].length <= 3;
}
