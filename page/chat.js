// The chat page: one person plays several WhatsApp users. Everything shown comes from the simulator's API; the
// server tells by an event when something about a person is new, and the page asks again.
//
// The side pane shows what /chat/api/inspect returns for the chosen person:
// {"thread_id", "assistant", "mode",
//  "runs": [{"id", "state", "outcome", "created_at", "seconds", "assistant", "thread_id", "tokens", "error",
//            "steps": [{"name", "seconds"}], "parts": [{"state", "error"}],
//            "calls": [{"name", "arguments", "output", "ok", "ms"}]}],           newest first
//  "plugins": [{"file", "tools", "hooks", "error"}]}

import { formatted, isBigEmoji, plain } from "./format.js";
import { record, waveform } from "./voice.js";

const $ = (selector) => document.querySelector(selector);
const app = $("#app"), list = $("#messages"), input = $("#text");
const phone = matchMedia("(max-width: 760px)");
const people = new Map();        // address → {address, name, unread, last}
const pending = new Map();       // sid → a message on its way to the simulator
const drafts = new Map();        // address → text not sent yet
let current = null;              // the chosen person's address
let conversation = [];           // its messages
let typingUntil = 0;
let switches = [], actions = [], inspects = false;

// --- Small things -----------------------------------------------------------------------------------------------

/** An element; `children` are nodes or texts, never markup. */
function make(name, properties = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(properties)) {
    if (key === "data") Object.assign(node.dataset, value);
    else if (key.startsWith("aria-") || key === "role" || key === "for") node.setAttribute(key, value);
    else node[key] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return node;
}

function icon(name, label) {
  const space = "http://www.w3.org/2000/svg";
  const svg = document.createElementNS(space, "svg");
  const use = document.createElementNS(space, "use");
  use.setAttribute("href", `#i-${name}`);
  svg.append(use);
  if (label) {
    svg.setAttribute("role", "img");
    svg.setAttribute("aria-label", label);
  } else svg.setAttribute("aria-hidden", "true");
  return svg;
}

async function api(path, body) {
  const options = body === undefined ? {} : {
    method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body),
  };
  const answer = await fetch(`api/${path}`, options);
  const found = answer.headers.get("Content-Type")?.includes("json") ? await answer.json() : {};
  if (!answer.ok) throw new Error(found.error ?? `El simulador respondió ${answer.status}`);
  return found;
}

let toastTimer = 0;

function toast(text) {
  const node = $("#toast");
  node.textContent = text;
  node.hidden = false;
  clearTimeout(toastTimer);
  toastTimer = setTimeout(() => { node.hidden = true; }, 2500 + 50 * text.length);
}

const newSid = (prefix) => `${prefix}${[...crypto.getRandomValues(new Uint8Array(16))].map((b) => b.toString(16).padStart(2, "0")).join("")}`;
const clock = new Intl.DateTimeFormat("es-MX", { hour: "2-digit", minute: "2-digit", hour12: false });
const dayName = new Intl.DateTimeFormat("es-MX", { weekday: "long", day: "numeric", month: "long" });
const dayKey = (date) => date.toDateString();

function day(date) {
  const yesterday = new Date(Date.now() - 86400000);
  return dayKey(date) === dayKey(new Date()) ? "Hoy" : dayKey(date) === dayKey(yesterday) ? "Ayer" : dayName.format(date);
}

const minutes = (seconds) => `${Math.floor(seconds / 60)}:${String(Math.floor(seconds % 60)).padStart(2, "0")}`;
const initials = (name) => name.replace(/\(.*/u, "").split(/\s+/u).slice(0, 2).map((word) => word[0] ?? "").join("").toUpperCase();

function avatar(address, name) {
  const hue = [...people.keys()].indexOf(address) % 6;
  return make("span", { className: `avatar hue${hue}`, "aria-hidden": "true" }, initials(name));
}

// --- People -----------------------------------------------------------------------------------------------------

function previewOf(message) {
  if (!message) return "Sin mensajes todavía";
  const kind = message.media[0]?.type.split("/")[0];
  const file = { image: "📷 Foto", audio: "🎤 Nota de voz", video: "🎬 Video" }[kind] ?? (kind === undefined ? "" : "📄 Documento");
  return plain(message.text) || (message.place ? "📍 Ubicación" : file);
}

function personItem({ address, name, unread, last }) {
  const mine = last?.by === "user";
  const preview = make("span", { className: "preview-line" }, mine ? tick(last) : null, make("span", {}, previewOf(last)));
  const item = make("button", { type: "button", className: "person", data: { address } },
    avatar(address, name),
    make("span", { className: "person-text" },
      make("span", { className: "line" },
        make("span", { className: "name", title: name }, name),
        last ? make("time", { className: unread ? "fresh" : "" }, clock.format(new Date(last.at))) : null),
      make("span", { className: "line" }, preview,
        unread ? make("span", { className: "badge", "aria-label": `${unread} sin leer` }, String(unread)) : null)));
  if (address === current) item.setAttribute("aria-current", "true");
  item.addEventListener("click", () => choose(address, true));
  return make("li", {}, item);
}

function renderPeople() {
  const focused = document.activeElement?.dataset?.address;
  $("#people-list").replaceChildren(...[...people.values()].map(personItem));
  if (focused) document.querySelector(`.person[data-address="${CSS.escape(focused)}"]`)?.focus();
}

async function loadState() {
  const state = await api("state");
  ({ switches, actions, inspect: inspects } = state);
  people.clear();
  state.people.forEach((person) => people.set(person.address, person));
  renderPeople();
  renderTrouble();
}

async function choose(address, focus) {
  view("chat");
  if (current) drafts.set(current, input.value);
  if (current !== address) {
    current = address;
    conversation = [];
    shown.clear();
    list.setAttribute("aria-busy", "true");
    list.replaceChildren();
    input.value = drafts.get(address) ?? "";
    resizeInput();
    answerTo(null);
  }
  const { name } = people.get(address);
  $("#as-whom").title = name;
  $("#as-whom").replaceChildren(avatar(address, name), make("span", {}, make("small", {}, "Escribes como"), name));
  renderPeople();
  history.replaceState(null, "", `#${encodeURIComponent(address)}`);
  await loadConversation();
  list.scrollTop = list.scrollHeight;
  list.removeAttribute("aria-busy");
  if (focus) input.focus();
  loadInspect();
}

$("#people-list").addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  const items = [...document.querySelectorAll(".person")];
  const next = items[items.indexOf(document.activeElement) + step];
  if (!step || !next) return;
  event.preventDefault();
  next.focus();
});

// --- Messages ---------------------------------------------------------------------------------------------------

const shown = new Map();  // sid → {node, key}
const TICKS = {
  pending: ["wait", "Enviando"], received: ["tick", "Enviado"], delivered: ["ticks", "Entregado"], read: ["ticks", "Leído"],
};

function tick(message) {
  const [name, label] = TICKS[message.status] ?? TICKS.received;
  const node = icon(name, label);
  node.classList.add("tick", message.status);
  return node;
}

function mediaNode(file, message) {
  const [kind] = file.type.split("/");
  if (kind === "audio") return player(file.url);
  if (kind === "image" || (!file.type && message.by === "hilo")) return picture(file.url);
  if (kind === "video") return make("video", { src: file.url, controls: true, className: "photo" });
  return fileCard(file);
}

function fileCard(file) {
  return make("a", { className: "file", href: file.url, target: "_blank", rel: "noopener" }, icon("file"),
    make("span", {}, "Documento", make("small", {}, file.type || "archivo")));
}

function picture(url) {
  const image = make("img", { className: "photo", src: url, alt: "Foto", loading: "lazy" });
  const holder = make("a", { href: url, target: "_blank", rel: "noopener", "aria-label": "Ver la foto" }, image);
  image.addEventListener("load", () => { if (nearEnd(image.offsetHeight)) toEnd(); });
  image.addEventListener("error", () => holder.replaceWith(fileCard({ url, type: "" })));
  return holder;
}

function placeNode({ at, label }) {
  const [latitude, longitude] = at.map((number) => number.toFixed(5));
  const url = `https://www.openstreetmap.org/?mlat=${latitude}&mlon=${longitude}#map=16/${latitude}/${longitude}`;
  return make("a", { className: "place", href: url, target: "_blank", rel: "noopener noreferrer" },
    make("span", { className: "map", "aria-hidden": "true" }, icon("place")),
    make("span", { className: "place-text" }, label || "Ubicación", make("small", {}, `${latitude}, ${longitude}`)));
}

function replies(message) {
  const buttons = message.buttons.map((button) => {
    const node = make("button", { type: "button" }, icon("reply"), button.title);
    node.addEventListener("click", () => sendText(button.title, { id: button.id, sid: message.sid }));
    return node;
  });
  return buttons.length ? make("div", { className: "replies" }, ...buttons) : null;
}

const byWhom = (message) => (message.by === "user" ? "Tú" : "Hilo");

/** The message that another one answers, as it is shown above that. */
function quotation(sid) {
  const original = conversation.find((message) => message.sid === sid);
  return original ? [make("strong", {}, byWhom(original)), make("span", {}, previewOf(original))] : [];
}

function quoted(message) {
  const nodes = quotation(message.quoted);
  return nodes.length ? make("div", { className: "quoted" }, ...nodes) : null;
}

function answerButton(message) {
  const node = make("button", { type: "button", className: "answer", tabIndex: -1, title: "Responder",
    "aria-label": `Responder a: ${previewOf(message).slice(0, 60)}` }, icon("reply"));
  node.addEventListener("click", () => answerTo(message.sid));
  return node;
}

const failed = (message) => message.by === "hilo" && ["undelivered", "failed"].includes(message.status);

function bubble(message) {
  const text = make("div", { className: isBigEmoji(message.text) ? "text big" : "text" }, formatted(message.text));
  const inLine = text.lastElementChild?.tagName === "P" && !text.classList.contains("big");
  if (inLine) text.lastElementChild.append(make("span", { className: "space", "aria-hidden": "true" })); // for the time
  const meta = make("span", { className: "meta" },
    make("time", { dateTime: message.at }, clock.format(new Date(message.at))),
    message.by === "user" ? tick(message) : null);
  const body = make("div", { className: "bubble" },
    make("span", { className: "hidden" }, `${byWhom(message)}: `),
    failed(message) ? make("p", { className: "failure" }, icon("warn"),
      `No entregado${message.error ? ` (${message.error})` : ""}: el usuario no ve este mensaje`) : null,
    quoted(message),
    ...message.media.map((file) => mediaNode(file, message)),
    message.place ? placeNode(message.place) : null,
    message.button ? make("small", { className: "tapped" }, icon("button"), "Botón") : null,
    message.text ? text : null, meta, failed(message) ? null : answerButton(message));
  const classes = ["message", message.by, failed(message) ? "failed" : "", message.media.length ? "with-media" : "",
    inLine ? "in-line" : ""];
  return make("article", { className: classes.join(" "), data: { sid: message.sid, status: message.status } },
    body, replies(message));
}

function separator(text) {
  return make("p", { className: "day" }, make("span", {}, text));
}

/** All nodes in order: known ones are kept, so that nothing is read out or loaded twice. */
function wantedNodes() {
  const nodes = [];
  let lastDay = "", lastBy = "";
  for (const message of [...conversation, ...[...pending.values()].filter((one) => one.address === current)]) {
    const when = day(new Date(message.at));
    if (when !== lastDay) nodes.push(separator(when));
    const known = shown.get(message.sid);
    const state = message.by === "user" ? message.status : failed(message); // ours has no ticks
    const key = JSON.stringify([state, message.error, message.text, message.media.length, message.buttons.length]);
    const node = known?.key === key ? known.node : updated(known, message);
    node.dataset.status = message.status;
    node.classList.toggle("first", message.by !== lastBy || when !== lastDay);
    shown.set(message.sid, { node, key, text: message.text });
    nodes.push(node);
    [lastDay, lastBy] = [when, message.by];
  }
  return nodes;
}

/** A message's node with its new ticks; made anew only when more than those has changed. */
function updated(known, message) {
  if (!known || message.by !== "user" || known.text !== message.text) {
    const node = bubble(message);
    if (known?.node.isConnected) known.node.replaceWith(node);
    return node;
  }
  known.node.querySelector(".tick").replaceWith(tick(message));
  return known.node;
}

const nearEnd = (slack = 0) => list.scrollHeight - list.scrollTop - list.clientHeight < 120 + slack;
const toEnd = () => { list.scrollTop = list.scrollHeight; };

function renderMessages() {
  const stay = !nearEnd();
  const nodes = wantedNodes();
  if (Date.now() < typingUntil) nodes.push(typingNode);
  if (!nodes.length) nodes.push(greeting());
  const old = [...list.childNodes];
  nodes.forEach((node, index) => {
    const place = list.childNodes[index];
    if (place === node) return;
    if (node.className === "day" && place?.className === "day" && place.textContent === node.textContent) return;
    list.insertBefore(node, place ?? null);
  });
  while (list.childNodes.length > nodes.length) list.lastChild.remove();
  if (stay) $("#jump").hidden = old.length === nodes.length && $("#jump").hidden;
  else toEnd();
}

const typingNode = make("article", { className: "message hilo typing first" },
  make("div", { className: "bubble" }, make("span", { className: "hidden" }, "Hilo está escribiendo"),
    ...[1, 2, 3].map(() => make("i", { "aria-hidden": "true" }))));

const OPENINGS = ["Hola", "¿Qué cursos de inglés tienen?", "Quiero hablar con un asesor"];

function greeting() {
  return make("div", { className: "greeting" }, make("img", { src: "icon.svg", alt: "", width: 64, height: 64 }),
    make("p", {}, "Escribe el primer mensaje, como lo haría un usuario desde su teléfono."),
    make("div", { className: "chips" }, ...OPENINGS.map((opening) => {
      const chip = make("button", { type: "button" }, opening);
      chip.addEventListener("click", () => sendText(opening));
      return chip;
    })));
}

let atEnd = true;
list.addEventListener("scroll", () => {
  atEnd = nearEnd();
  $("#jump").hidden = atEnd;
});
new ResizeObserver(() => { if (atEnd) toEnd(); }).observe(list); // a keyboard that opens hides nothing
$("#jump").addEventListener("click", toEnd);

let loading = false, again = false;

/** Ask for the conversation; calls that come while one is under way are answered by one more. */
async function loadConversation() {
  if (loading) { again = true; return; }
  loading = true;
  const address = current;
  try {
    const found = await api(`conversation?address=${encodeURIComponent(address)}`);
    if (address === current) showConversation(found);
  } finally {
    loading = false;
    if (again) { again = false; await loadConversation(); }
  }
}

function showConversation(found) {
  conversation = found.messages;
  conversation.forEach((message) => pending.delete(message.sid));
  typingUntil = found.typing ? Date.now() + found.typing : 0;
  if (found.typing) setTimeout(() => { if (Date.now() >= typingUntil) showTyping(); }, found.typing + 50);
  showTyping();
  markRead();
}

function showTyping() {
  $("#presence").textContent = Date.now() < typingUntil ? "escribiendo…" : "en línea";
  renderMessages();
}

function markRead() {
  const unread = conversation.some((message) => message.by === "hilo" && message.status === "delivered");
  const visible = document.visibilityState === "visible" && (!phone.matches || app.dataset.view === "chat");
  if (unread && visible) api("read", { address: current }).catch(() => {});
}

document.addEventListener("visibilitychange", () => {
  if (document.visibilityState === "visible" && current) onChange(current); // a hidden page may have missed something
});

/** Arrow keys move between the messages; Enter answers one. */
list.addEventListener("keydown", (event) => {
  const step = { ArrowDown: 1, ArrowUp: -1 }[event.key];
  if (event.key === "Escape") input.focus();
  if (!step || event.target.closest("input")) return;
  const buttons = [...list.querySelectorAll(".answer")], at = buttons.indexOf(document.activeElement);
  const next = at >= 0 ? buttons[at + step] : step < 0 ? buttons.at(-1) : null;
  if (!next) return;
  event.preventDefault();
  next.focus();
});

const SWIPE = 56;  // pixels
let swipe = null;

list.addEventListener("touchstart", ({ touches, target }) => {
  const node = target.closest(".message");
  const can = touches.length === 1 && node?.querySelector(".answer") && !target.closest("input");
  swipe = can ? { node, x: touches[0].clientX, y: touches[0].clientY, by: 0 } : null;
}, { passive: true });
list.addEventListener("touchmove", ({ touches }) => {
  if (!swipe) return;
  if (Math.abs(touches[0].clientY - swipe.y) > SWIPE / 2) { endSwipe(false); return; } // it is the list that moves
  swipe.by = Math.max(0, Math.min(SWIPE + 12, touches[0].clientX - swipe.x));
  swipe.node.style.transform = `translateX(${swipe.by}px)`;
}, { passive: true });
list.addEventListener("touchend", () => endSwipe(true));
list.addEventListener("touchcancel", () => endSwipe(false));

/** Put a message that was swiped to the right back, and answer it where it was swiped far enough. */
function endSwipe(may) {
  if (!swipe) return;
  const { node, by } = swipe;
  swipe = null;
  node.style.transform = "";
  if (may && by >= SWIPE) answerTo(node.dataset.sid);
}

// --- Writing ----------------------------------------------------------------------------------------------------

let answering = null;  // sid of the message that the next one answers

function answerTo(sid) {
  answering = sid;
  $("#quote-text").replaceChildren(...quotation(sid));
  $("#quote").hidden = !sid;
  if (sid) input.focus();
}

/** The sid of the message that is answered now, which is done with. */
function takeAnswer() {
  const sid = answering;
  answerTo(null);
  return sid;
}

$("#quote-cancel").addEventListener("click", () => { answerTo(null); input.focus(); });

function expect(message) {
  const sid = newSid(message.media ? "MM" : "SM");
  pending.set(sid, {
    sid, address: current, by: "user", at: new Date().toISOString(), status: "pending", error: null, text: "", media: [],
    place: null, button: false, buttons: [], quoted: null, ...message,
  });
  renderMessages();
  toEnd();
  return sid;
}

const LOST = "El gateway no contestó al webhook. Recogerá el mensaje de la lista de Twilio en poco más de un minuto "
  + "(en producción, en unos 6 como mucho).";

/** Post what `expect` shows already; tell when the gateway gave no answer. */
async function deliver(sid, post) {
  try {
    const { status } = await post();
    if (status === 0) toast(LOST);
    else if (status >= 300) toast(`El gateway respondió ${status} al webhook.`);
  } catch (error) {
    pending.delete(sid);
    toast(error.message);
    renderMessages();
  }
}

function sendText(text, button = null, place = null) {
  const address = current, quote = button?.sid ?? takeAnswer();
  const shownPlace = place && { at: [Number(place.latitude), Number(place.longitude)], label: place.label };
  const sid = expect({ text, button: Boolean(button), place: shownPlace, quoted: quote });
  return deliver(sid, () => api("send", {
    address, text, sid, ...(button && { button }), ...(place && { place }), ...(quote && { reply_to: quote }),
  }));
}

function sendFile(file, text = "") {
  const type = file.type || "application/octet-stream";
  const quote = takeAnswer();
  const sid = expect({ text, media: [{ url: URL.createObjectURL(file), type }], quoted: quote });
  const query = new URLSearchParams({ address: current, text, sid, reply_to: quote ?? "" });
  return deliver(sid, async () => {
    const answer = await fetch(`api/media?${query}`, { method: "POST", headers: { "Content-Type": type }, body: file });
    if (!answer.ok) throw new Error(answer.status === 400 ? "Elige un archivo de hasta 16 MB." : "No se pudo enviar el archivo.");
    return answer.json();
  });
}

function resizeInput() {
  const empty = !input.value.trim();
  $("#send").hidden = empty;
  $("#record").hidden = !empty;
  input.style.height = "auto";
  input.style.height = `${Math.min(input.scrollHeight, 140)}px`;
}

input.addEventListener("input", resizeInput);
input.addEventListener("keydown", (event) => {
  if (event.key === "Escape") answerTo(null);
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  $("#compose").requestSubmit();
});
input.addEventListener("paste", (event) => {
  const file = [...event.clipboardData.files].find(({ type }) => type.startsWith("image/"));
  if (file) { event.preventDefault(); previewFile(file); }
});
$("#compose").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = input.value.trim();
  if (!text) return;
  input.value = "";
  resizeInput();
  closePops();
  sendText(text);
});

// --- Emoji and attachments --------------------------------------------------------------------------------------

const EMOJI = ("😀 😂 🥹 😊 😉 😍 😘 🤗 🤔 😅 🙃 😴 😎 🤩 😢 😭 😡 😱 🙄 😬 👋 👍 👎 👏 🙏 💪 🤝 ✌️ 👌 🤞 ❤️ 💔 "
  + "🔥 ✨ 🎉 🎓 📚 📝 💻 📅 ⏰ 📍 💰 ✅ ❌ ❓ ❗ 🚀 🌟 ☕").split(" ");

function closePops() {
  for (const name of ["emoji", "attach"]) {
    $(`#${name}`).hidden = true;
    $(`#${name}-toggle`).setAttribute("aria-expanded", "false");
  }
}

function togglePop(name) {
  const open = $(`#${name}`).hidden;
  closePops();
  $(`#${name}`).hidden = !open;
  $(`#${name}-toggle`).setAttribute("aria-expanded", String(open));
  if (open) $(`#${name} button`).focus();
}

function insertEmoji(emoji) {
  input.setRangeText(emoji, input.selectionStart, input.selectionEnd, "end");
  resizeInput();
}

$("#emoji").append(...EMOJI.map((emoji) => {
  const node = make("button", { type: "button" }, emoji);
  node.addEventListener("click", () => insertEmoji(emoji));
  return node;
}));
$("#emoji-toggle").addEventListener("click", () => togglePop("emoji"));
$("#attach-toggle").addEventListener("click", () => togglePop("attach"));
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || ($("#emoji").hidden && $("#attach").hidden)) return;
  closePops();
  input.focus();
});
document.addEventListener("pointerdown", (event) => { if (!event.target.closest(".composer")) closePops(); });

/** Arrow keys move between the buttons of a group. */
function arrows(group, columns) {
  group.addEventListener("keydown", (event) => {
    const items = [...group.querySelectorAll("button")];
    const step = { ArrowRight: 1, ArrowLeft: -1, ArrowDown: columns(), ArrowUp: -columns() }[event.key];
    const next = items[items.indexOf(document.activeElement) + step];
    if (!step || !next) return;
    event.preventDefault();
    next.focus();
    if (next.role === "tab") next.click();
  });
}

arrows($("#emoji"), () => Math.max(1, Math.floor($("#emoji").clientWidth / 42)));
arrows($("#attach"), () => 1);
arrows($(".tabs"), () => 0);

const ACCEPTED = { image: "image/jpeg,image/png,image/webp", audio: "audio/*", file: "application/pdf,text/plain,.docx,.xlsx" };

$("#attach").addEventListener("click", (event) => {
  const kind = event.target.closest("button")?.dataset.attach;
  if (!kind) return;
  closePops();
  if (kind === "place" || kind === "button") openDialog(`#dialog-${kind}`);
  else Object.assign($("#file"), { accept: ACCEPTED[kind], value: "" }).click();
});
$("#file").addEventListener("change", () => {
  const [file] = $("#file").files;
  if (file?.type.startsWith("image/")) previewFile(file);
  else if (file) sendFile(file);
});

// --- Dialogs ----------------------------------------------------------------------------------------------------

function openDialog(selector) {
  const dialog = $(selector);
  dialog.querySelector("form").reset();
  dialog.showModal();
  dialog.querySelector("input")?.focus();
  return dialog;
}

function onConfirm(selector, confirm) {
  const dialog = $(selector), form = dialog.querySelector("form");
  dialog.querySelector("[value=cancel]").addEventListener("click", () => dialog.close());
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    if (await confirm(Object.fromEntries(new FormData(form))) === false) return;
    dialog.close();
    if (!phone.matches) input.focus();
  });
}

let previewed = null;

function previewFile(file) {
  previewed = file;
  $("#preview").replaceChildren(make("img", { src: URL.createObjectURL(file), alt: "Vista previa de la foto" }));
  openDialog("#dialog-preview");
}

onConfirm("#dialog-preview", ({ caption }) => { sendFile(previewed, caption.trim()); });
onConfirm("#dialog-place", (place) => { sendText("", null, place); });
onConfirm("#dialog-button", ({ title, payload }) => { sendText(title, { id: payload || title }); });
onConfirm("#dialog-person", async (form) => {
  try {
    const { address } = await api("people", form);
    await loadState();
    await choose(address, true);
  } catch (error) {
    $("#dialog-person .error").textContent = error.message;
    return false;
  }
  return true;
});
$("#new-person").addEventListener("click", () => {
  $("#dialog-person .error").textContent = "";
  openDialog("#dialog-person");
});

const PLACES = [["Zócalo, Ciudad de México", 19.43261, -99.13321], ["Macroplaza, Monterrey", 25.66926, -100.30985],
  ["Plaza de Armas, Guadalajara", 20.67661, -103.34696]];

function fillPlace(label, latitude, longitude) {
  const { elements } = $("#dialog-place form");
  Object.assign(elements.label, { value: label });
  Object.assign(elements.latitude, { value: latitude });
  Object.assign(elements.longitude, { value: longitude });
}

$("#places").append(...PLACES.map(([label, latitude, longitude]) => {
  const chip = make("button", { type: "button" }, label);
  chip.addEventListener("click", () => fillPlace(label, latitude, longitude));
  return chip;
}));
const here = make("button", { type: "button" }, icon("place"), "Donde estoy");
here.addEventListener("click", () => navigator.geolocation.getCurrentPosition(
  ({ coords }) => fillPlace("", coords.latitude.toFixed(5), coords.longitude.toFixed(5)),
  () => toast("El navegador no dio la ubicación.")));
$("#places").append(here);

// --- Voice notes ------------------------------------------------------------------------------------------------

let recording = null, recordTimer = 0;

async function startRecording() {
  try {
    recording = await record();
  } catch {
    toast("No hay micrófono o falta el permiso. Puedes adjuntar un archivo de audio.");
    return;
  }
  const started = Date.now();
  const showTime = () => { $("#record-time").textContent = minutes((Date.now() - started) / 1000); };
  showTime();
  recordTimer = setInterval(showTime, 250);
  $("#compose").hidden = true;
  $("#recording").hidden = false;
  $("#record-send").focus();
}

async function endRecording(send) {
  const ending = recording;
  recording = null;
  clearInterval(recordTimer);
  $("#recording").hidden = true;
  $("#compose").hidden = false;
  input.focus();
  if (!ending) return;
  if (send) sendFile(await ending.stop());
  else await ending.cancel();
}

$("#record").addEventListener("click", startRecording);
$("#record-send").addEventListener("click", () => endRecording(true));
$("#record-cancel").addEventListener("click", () => endRecording(false));
$("#recording").addEventListener("keydown", (event) => { if (event.key === "Escape") endRecording(false); });

const BARS = 36;

/** A voice note: a button, the shape of the sound and a place to seek. */
function player(url) {
  const audio = make("audio", { src: url, preload: "metadata" });
  const button = make("button", { type: "button", className: "play", "aria-label": "Reproducir la nota de voz" }, icon("play"));
  const bars = Array.from({ length: BARS }, () => make("i"));
  const seek = make("input", { type: "range", min: 0, max: 1000, value: 0, "aria-label": "Posición en la nota de voz" });
  const time = make("span", { className: "length" }, "0:00");
  let seconds = 0;
  waveform(url, BARS).then((wave) => {
    seconds = wave.seconds;
    time.textContent = minutes(seconds);
    wave.bars.forEach((height, index) => { bars[index].style.height = `${Math.max(10, Math.round(height * 100))}%`; });
  }).catch(() => { time.textContent = "—"; });
  const show = () => {
    const part = seconds ? audio.currentTime / seconds : 0;
    seek.value = Math.round(part * 1000);
    bars.forEach((bar, index) => bar.classList.toggle("played", index < part * BARS));
    time.textContent = minutes(audio.currentTime || seconds);
  };
  seek.addEventListener("input", () => { audio.currentTime = (seek.value / 1000) * seconds; show(); });
  audio.addEventListener("timeupdate", show);
  audio.addEventListener("ended", () => { audio.currentTime = 0; });
  for (const event of ["play", "pause", "ended"]) {
    audio.addEventListener(event, () => button.replaceChildren(icon(audio.paused ? "play" : "pause")));
  }
  button.addEventListener("click", () => (audio.paused ? audio.play().catch(() => toast("El navegador no puede reproducirla.")) : audio.pause()));
  return make("div", { className: "voice" }, button,
    make("div", { className: "wave" }, ...bars, seek), time, audio);
}

// --- The side pane ----------------------------------------------------------------------------------------------

const STATES = { queued: "en cola", waiting: "con el modelo", writing: "preparando la respuesta", sending: "enviando", done: "terminada" };
const OUTCOMES = {
  answered: "respondida", fallback: "flujo tradicional", intercepted: "respondida sin modelo", undelivered: "no entregada",
};
const REASONS = {
  no_assistant: "no hay asistente configurado", disabled: "el asistente está desactivado", openai_down: "OpenAI no responde",
  timeout: "se acabó el tiempo", error: "hubo un error",
};
let inspected = "", openParts = new Set();

const text = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2) ?? "");

/** JSON made readable; other text as it is. */
function pretty(value) {
  try {
    return JSON.stringify(typeof value === "string" ? JSON.parse(value) : value, null, 2);
  } catch {
    return text(value);
  }
}

function fold(key, summary, ...children) {
  const node = make("details", { open: openParts.has(key) }, make("summary", {}, ...summary), ...children);
  node.addEventListener("toggle", () => (node.open ? openParts.add(key) : openParts.delete(key)));
  return node;
}

function fact(name, value) {
  return value === null || value === undefined || value === "" ? [] : [make("dt", {}, name), make("dd", {}, String(value))];
}

function tokens(value) {
  if (value === null || value === undefined) return "";
  if (typeof value !== "object") return value;
  return Object.entries(value).map(([name, count]) => `${count} ${{ input: "de entrada", output: "de salida" }[name] ?? name}`).join(", ");
}

function callNode(run, call, index) {
  return fold(`${run.id}/${index}`,
    [make("code", {}, call.name), make("span", { className: `state ${call.ok === false ? "bad" : call.ok ? "good" : "busy"}` },
      call.ok === false ? "error" : call.ok ? "ok" : "en curso"),
    make("span", { className: "ms" }, call.ms === null || call.ms === undefined ? "" : `${Math.round(call.ms)} ms`)],
    make("h4", {}, "Argumentos"), make("pre", { tabIndex: 0 }, pretty(call.arguments)),
    make("h4", {}, "Resultado"), make("pre", { tabIndex: 0 }, pretty(call.output ?? "…")));
}

function stepsNode(steps) {
  return make("ol", { className: "steps" }, ...steps.map(({ name, seconds }) => make("li", {},
    make("span", {}, STATES[name] ?? name),
    seconds === null || seconds === undefined ? "" : make("span", { className: "ms" }, `${Number(seconds).toFixed(2)} s`))));
}

const PARTS = {
  queued: "por enviar", sending: "enviando", sent: "enviado", delivered: "entregado", read: "leído", undelivered: "no entregado",
  failed: "rechazado", withheld: "retenido",
};

/** What became of each part of the reply. */
const partsText = (parts = []) => parts.map(({ state, error }) => `${PARTS[state] ?? state}${error ? ` (${error})` : ""}`).join(", ");

const BAD = new Set(["undelivered", "error", "failed"]);

function runNode(run, thread) {
  const state = run.state === "done" ? OUTCOMES[run.outcome] ?? run.outcome ?? "terminada" : STATES[run.state] ?? run.state;
  const kind = run.state !== "done" ? "busy" : BAD.has(run.outcome) ? "bad" : run.outcome === "fallback" ? "warn" : "good";
  const when = typeof run.created_at === "number" ? new Date(run.created_at * 1000) : new Date(run.created_at);
  return make("article", { className: "run", data: { run: run.id, state: run.state } },
    make("header", {}, make("strong", {}, `Ejecución ${run.id}`), make("span", { className: `state ${kind}` }, state),
      make("span", { className: "ms" }, `${clock.format(when)}${run.seconds === null || run.seconds === undefined ? "" : ` · ${Number(run.seconds).toFixed(1)} s`}`)),
    run.steps?.length ? stepsNode(run.steps) : null,
    make("dl", {}, ...fact("Asistente", run.assistant),
      ...(run.thread_id === thread ? [] : fact("Hilo", run.thread_id)), ...fact("Tokens", tokens(run.tokens)),
      ...fact("Mensajes", partsText(run.parts)), ...fact("Motivo", REASONS[run.error] ?? run.error)),
    ...(run.calls ?? []).map((call, index) => callNode(run, call, index)));
}

function renderRuns(found) {
  const runs = found.runs ?? [];
  const about = [...fact("Hilo", found.thread_id), ...fact("Asistente", found.assistant),
    ...fact("Modo", { bot: "", human: "lo atiende una persona", out: "dado de baja" }[found.mode] ?? found.mode)];
  $("#panel-runs").replaceChildren(
    make("h3", {}, people.get(current)?.name ?? ""),
    about.length ? make("dl", { className: "about" }, ...about) : "",
    ...runs.map((run) => runNode(run, found.thread_id)),
    runs.length ? "" : make("p", { className: "empty" }, "Aquí se ve cada ejecución: sus estados, las herramientas que llamó el asistente y cuánto tardó."));
}

function pluginNode({ file, tools = [], hooks = [], error }) {
  return make("article", { className: error ? "plugin broken" : "plugin" },
    make("header", {}, make("code", {}, file), make("span", { className: error ? "state bad" : "state good" }, error ? "no carga" : "cargado")),
    error ? make("pre", { tabIndex: 0, role: "alert" }, error) : null,
    make("dl", {}, ...fact("Herramientas", tools.join(", ")), ...fact("Hooks", hooks.join(", "))));
}

function renderPlugins(found) {
  const plugins = found.plugins ?? [];
  const broken = plugins.filter(({ error }) => error).length;
  $("#tab-plugins").dataset.alert = broken || "";
  $("#panel-plugins").replaceChildren(
    make("p", { className: "empty" }, "Un archivo de tools/ que se guarda se carga de nuevo aquí mismo."),
    ...plugins.map(pluginNode));
}

let inspectTimer = 0;

async function loadInspect() {
  clearTimeout(inspectTimer);
  if (!inspects || !current) return;
  const busy = () => conversation.at(-1)?.by === "user" || inspected.includes('"waiting"');
  try {
    if (document.visibilityState === "visible" && getComputedStyle($("#side")).display !== "none") await inspectNow();
  } catch (error) {
    $("#panel-runs").replaceChildren(make("p", { className: "empty" }, `No se pudo leer: ${error.message}`));
    inspected = "";
  }
  clearTimeout(inspectTimer);
  inspectTimer = setTimeout(loadInspect, busy() ? 700 : 2500);
}

async function inspectNow() {
  const address = current;
  const found = await api(`inspect?address=${encodeURIComponent(address)}`);
  const key = address + JSON.stringify(found);
  if (key === inspected || address !== current) return;
  inspected = key;
  renderRuns(found);
  renderPlugins(found);
}

// --- Trouble ----------------------------------------------------------------------------------------------------

const TIMES = [["off", "No"], ["once", "1 vez"], ["always", "Siempre"]];

function switchNode(one) {
  const group = make("div", { className: "times", role: "radiogroup", "aria-label": one.label });
  group.append(...TIMES.map(([state, label]) => {
    const radio = make("input", { type: "radio", name: one.key, value: state });
    radio.addEventListener("change", () => api("switch", { key: one.key, state }).then(loadState).catch((error) => toast(error.message)));
    return make("label", {}, radio, make("span", {}, label));
  }));
  return make("div", { className: "switch", data: { key: one.key } }, make("span", {}, one.label), group);
}

function actionNode(name) {
  const button = make("button", { type: "button", className: "danger" }, name);
  button.addEventListener("click", async () => {
    button.disabled = true;
    try {
      toast((await api("action", { name })).text);
    } catch (error) {
      toast(error.message);
    }
    button.disabled = false;
  });
  return button;
}

/** Build the switches once, then keep them as the simulator has them: one that was for 1 time goes off by itself. */
function renderTrouble() {
  $("#tab-trouble").dataset.alert = switches.filter(({ state }) => state !== "off").length || "";
  if (!$("#panel-trouble").childElementCount) buildTrouble();
  for (const { key, state } of switches) {
    for (const radio of document.getElementsByName(key)) radio.checked = radio.value === state;
  }
}

function buildTrouble() {
  const groups = switches.reduce((found, one) => found.set(one.group, [...(found.get(one.group) ?? []), one]), new Map());
  $("#panel-trouble").append(
    make("p", { className: "empty" }, "Provoca lo que en producción es difícil de provocar y mira qué recibe el usuario."),
    ...[...groups].map(([name, members]) => make("fieldset", {}, make("legend", {}, name), ...members.map(switchNode))),
    actions.length ? make("fieldset", {}, make("legend", {}, "Proceso"), ...actions.map(actionNode)) : "");
}

const tabs = [...document.querySelectorAll("[role=tab]")];

function showTab(tab) {
  for (const other of tabs) {
    const chosen = other === tab;
    other.setAttribute("aria-selected", String(chosen));
    other.tabIndex = chosen ? 0 : -1;
    document.getElementById(other.getAttribute("aria-controls")).hidden = !chosen;
  }
}

tabs.forEach((tab) => tab.addEventListener("click", () => showTab(tab)));

// --- Views ------------------------------------------------------------------------------------------------------

/** On a phone one of people, chat and side fills the window; on a desktop the side pane comes and goes. */
function view(name) {
  app.dataset.view = name;
  const open = phone.matches ? name === "side" : !app.classList.contains("no-side");
  $("#toggle-side").setAttribute("aria-expanded", String(open));
  if (name === "side") loadInspect();
  if (name === "chat" && current) markRead();
}

$("#toggle-side").addEventListener("click", () => {
  if (phone.matches) view("side");
  else { app.classList.toggle("no-side"); view("chat"); }
  loadInspect();
});
$("#hide-side").addEventListener("click", () => view("chat"));
$("#show-people").addEventListener("click", () => {
  view("people");
  document.querySelector(".person[aria-current]")?.focus();
});

// --- Events and start -------------------------------------------------------------------------------------------

let stateTimer = 0;

function onChange(address) {
  if (address === current) loadConversation().catch(() => {});
  clearTimeout(stateTimer);
  stateTimer = setTimeout(() => loadState().catch(() => {}), 120);
}

const others = new BroadcastChannel("hilo-events");
others.addEventListener("message", ({ data }) => heard(data));

function heard({ address, online }) {
  if (address) onChange(address);
  if (online === undefined) return;
  document.body.classList.toggle("offline", !online);
  if (!online) $("#presence").textContent = "sin conexión con el simulador";
  else if (current) onChange(current);
}

function listen() {
  const events = new EventSource("api/events");
  const tell = (news) => { heard(news); others.postMessage(news); };
  events.addEventListener("change", (event) => tell({ address: JSON.parse(event.data) }));
  events.addEventListener("open", () => tell({ online: true }));
  events.addEventListener("error", () => tell({ online: false }));
}

async function start() {
  await loadState();
  if (!inspects) for (const name of ["runs", "plugins"]) $(`#tab-${name}`).hidden = true;
  showTab(inspects ? tabs[0] : tabs[2]);
  app.classList.toggle("no-side", matchMedia("(max-width: 1080px)").matches);
  const wanted = decodeURIComponent(location.hash.slice(1));
  await choose(people.has(wanted) ? wanted : people.keys().next().value, !phone.matches);
  // A browser keeps six connections to a host: of its pages one listens, until it is closed, and tells the others.
  navigator.locks.request("hilo-events", () => new Promise(listen));
}

start().catch((error) => toast(error.message));
