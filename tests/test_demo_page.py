"""The chat page: its API over HTTP, and the page itself in a real browser, at phone and desktop width."""

from __future__ import annotations

import base64
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import bottle
import pytest
import requests

from page import FILES, SWITCHES, PageOptions
from page.inspection import Inspection
from simulator import Simulator
from tests.conftest import Hilo
from tests.local_openai import Answer, LocalOpenAI, calls, course_assistant, script
from tests.receiver import Receiver
from tests.test_chat import read_until
from tools import cursos

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Error, Page

Scheme = Literal["light", "dark"]

ANA, LUIS = "whatsapp:+5215512345671", "whatsapp:+5218112345672"
PATIENCE = 20.0  # seconds
SIZES = {"desktop": (1280, 800), "phone": (390, 844)}
BROWSER_ARGS = ("--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
                "--disable-component-update --disable-sync --use-fake-device-for-media-stream "
                "--use-fake-ui-for-media-stream").split()
PIXEL = base64.b64decode("iVBORw0KGgoAAAANSUhEUgAAAAEAAAABCAYAAAAfFcSJAAAADUlEQVR42mNk+M9QDwADhgGAWjR9awAAAABJRU5E"
                         "rkJggg==")
SENT = {"address": ANA, "text": "hola", "sid": "SM" + "a" * 32}
CATALOGUE = Path(cursos.__file__).with_name("cursos.csv")
SCREENSHOT = FILES / "screenshot.png"  # the README's; made anew with HILO_SCREENSHOT=1
TEMPLATE = "HX" + "c" * 32
REPLY = """*Inglés básico* (_en línea_), ~$2,400~ `HOLA10`
- Lunes
- Miércoles
1. Escribe su código
> Inicia el 12 de enero
<img src=x onerror=alert(1)> https://hilo.example/cursos. 2*3*4 snake_case_name"""


class Echo:
    """What a gateway does with a message, without one: a typing indicator, then an answer."""

    def __init__(self) -> None:
        self.twilio: Simulator | None = None
        self.inspect: Callable[[str], dict[str, Any]] = inspected
        self.may_answer = threading.Event()
        self.may_answer.set()

    def __call__(self, form: dict[str, str]) -> None:
        self._post("/v2/Indicators/Typing.json", {"channel": "whatsapp", "messageId": form["MessageSid"]})
        self.may_answer.wait(10)
        assert self.twilio
        sent = {"To": form["From"], "From": self.twilio.number, "Body": REPLY}
        if form["Body"] == "plantilla":
            sent |= {"Body": "", "ContentSid": TEMPLATE, "ContentVariables": '{"1": "Ana"}'}
        elif form["Body"] == "foto":
            sent |= {"Body": "El folleto", "MediaUrl": f"{self.twilio.gateway_url}/folleto.png"}
        elif form["MessageType"] != "text":
            sent["Body"] = f"Recibido: {form['MessageType']}"
        self._post(f"/2010-04-01/Accounts/{self.twilio.account_sid}/Messages.json", sent)

    def _post(self, path: str, form: dict[str, str]) -> None:
        assert self.twilio
        auth = (self.twilio.account_sid, self.twilio.auth_token)
        with requests.post(self.twilio.url + path, form, auth=auth, timeout=5):
            pass


def inspected(address: str) -> dict[str, Any]:
    """What a demo tells of a conversation: one run with two calls, and a plugin that does not load."""
    calls = [{"name": "buscar_curso", "arguments": '{"nombre": "inglés"}', "output": '[{"codigo": "INGB-01"}]',
              "ok": True, "ms": 12.4},
             {"name": "detalle_curso", "arguments": '{"codigo": "X"}', "output": "No existe", "ok": False, "ms": 3}]
    run = {"id": 7, "state": "done", "outcome": "answered", "created_at": "2026-11-23T10:10:00+00:00", "seconds": 3.4,
           "assistant": "cursos", "thread_id": "conv_1", "tokens": {"input": 1204, "output": 181}, "calls": calls,
           "steps": [{"name": "queued", "seconds": 1.5}, {"name": "waiting", "seconds": 1.2}]}
    return {"thread_id": "conv_1", "assistant": "cursos", "mode": "bot", "runs": [run], "plugins": [
        {"file": "tools/cursos.py", "tools": ["buscar_curso"], "hooks": ["register_tools"], "error": None},
        {"file": "tools/roto.py", "tools": [], "hooks": [], "error": "SyntaxError: '(' was never closed (línea 12)"}]}


@pytest.fixture
def echo() -> Echo:
    return Echo()


@pytest.fixture
def receiver(echo: Echo) -> Iterator[Receiver]:
    receiver = Receiver(echo)
    yield receiver
    receiver.close()


@pytest.fixture
def killed() -> list[str]:
    return []


@pytest.fixture
def twilio(receiver: Receiver, echo: Echo, killed: list[str], openai_server: LocalOpenAI) -> Iterator[Simulator]:
    template = {"body": "Hola {{1}}, ¿te inscribo?", "actions": [{"title": "Sí, quiero", "id": "si"}]}

    def kill() -> str:
        killed.append("kill")
        return "El proceso volvió en 1 s"

    options = PageOptions(inspect=lambda address: echo.inspect(address), actions={"Matar el proceso": kill},
                          templates={TEMPLATE: template}, openai_url=openai_server.url)
    with Simulator(receiver.url, page=options) as simulator:
        echo.twilio = simulator
        yield simulator
        echo.may_answer.set()
        receiver.settle()


# --- The API --------------------------------------------------------------------------------------------------


def call(twilio: Simulator, method: str, path: str, **kwargs: Any) -> requests.Response:
    """A call as the page makes it."""
    headers = {"Origin": twilio.url, "Sec-Fetch-Site": "same-origin"} | kwargs.pop("headers", {})
    return requests.request(method, twilio.url + path, headers={k: v for k, v in headers.items() if v}, timeout=5,
                            **kwargs)


@pytest.mark.parametrize("path", ["/", "/chat", "/chat/", "/chat/chat.js", "/chat/api/state", "/openai/v1/models"])
def test_without_a_page_none_of_its_routes_exist(path: str) -> None:
    with Simulator() as plain:
        assert requests.get(plain.url + path, timeout=5).status_code == 404


def test_a_gateway_that_serves_has_none_of_the_pages_routes(hilo: Hilo) -> None:
    for path in ("/chat", "/chat/", "/chat/chat.js", "/chat/api/state", "/openai/v1/models", "/v2/Channels/Senders"):
        assert requests.get(hilo.url + path, timeout=5).status_code == 404


def test_the_page_comes_with_a_policy_that_lets_nothing_foreign_in(twilio: Simulator) -> None:
    answer = requests.get(twilio.page_url, timeout=5)
    policy = dict(part.strip().split(" ", 1) for part in answer.headers["Content-Security-Policy"].split(";"))
    assert policy["default-src"] == "'none'" and policy["frame-ancestors"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == "'self'"
    assert answer.headers["X-Content-Type-Options"] == "nosniff" and "no-store" in answer.headers["Cache-Control"]
    assert not re.search(r"(src|href)=\"(https?:)?//|\sstyle=|\son\w+=", answer.text)


def test_every_file_that_the_page_names_is_served(twilio: Simulator) -> None:
    page = requests.get(twilio.page_url, timeout=5).text
    script = requests.get(twilio.page_url + "chat.js", timeout=5).text
    named = re.findall(r'(?:src|href)="([\w.]+)"', page) + re.findall(r'from "\./([\w.]+)"', script)
    assert {"chat.css", "chat.js", "format.js", "icon.svg", "voice.js"} == set(named)
    for name in named:
        assert requests.get(twilio.page_url + name, timeout=5).status_code == 200
    for name in ("nothing.js", "..%2fsimulator.js", "__init__.py"):
        assert requests.get(twilio.page_url + name, timeout=5).status_code == 404


@pytest.mark.parametrize(("headers", "status"), [
    ({"Host": "evil.example"}, 421),
    ({"Host": "evil.example:80"}, 421),
    ({"Origin": "https://evil.example"}, 403),
    ({"Origin": "http://127.0.0.1:1"}, 403),
    ({"Origin": "null"}, 403),
    ({"Origin": ""}, 403),
    ({"Sec-Fetch-Site": "cross-site"}, 403),
    ({"Sec-Fetch-Site": "same-site"}, 403),
])
def test_another_pages_request_is_refused(twilio: Simulator, headers: dict[str, str], status: int) -> None:
    assert call(twilio, "POST", "/chat/api/read", json={"address": ANA}, headers=headers).status_code == status


@pytest.mark.parametrize("path", ["/", "/chat", "/chat/"])
def test_a_link_on_another_site_opens_the_page_but_frames_and_scripts_do_not(twilio: Simulator, path: str) -> None:
    followed = {"Origin": "", "Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate",
                "Sec-Fetch-Dest": "document"}
    assert call(twilio, "GET", path, headers=followed).status_code == 200
    assert call(twilio, "GET", path, headers=followed | {"Sec-Fetch-Dest": "iframe"}).status_code == 403
    assert call(twilio, "GET", path, headers=followed | {"Sec-Fetch-Mode": "no-cors"}).status_code == 403
    assert call(twilio, "GET", "/chat/api/state", headers=followed).status_code == 403


def test_another_site_cannot_read_the_conversation_either(twilio: Simulator) -> None:
    headers = {"Origin": "", "Sec-Fetch-Site": "cross-site"}
    assert call(twilio, "GET", f"/chat/api/conversation?address={ANA}", headers=headers).status_code == 403


@pytest.mark.parametrize(("path", "form"), [
    ("send", {"address": ANA, "text": "hola"}),
    ("send", {"address": "ana", "text": "hola", "sid": "SM" + "a" * 32}),
    ("send", {"address": ANA, "text": "hola", "sid": "../x"}),
    ("send", ["hola"]),
    ("send", SENT | {"place": "x"}),
    ("send", SENT | {"place": {}}),
    ("send", SENT | {"place": {"latitude": "nan", "longitude": "1e999", "label": ""}}),
    ("send", SENT | {"button": "x"}),
    ("send", SENT | {"reply_to": "SM" + "b" * 32}),
    ("switch", {"key": "nothing", "state": "once"}),
    ("switch", {"key": "send_500", "state": "often"}),
    ("action", {"name": "nothing"}),
    ("people", {"name": "Eva", "phone": "dos"}),
])
def test_a_call_that_makes_no_sense_is_a_400(twilio: Simulator, path: str, form: Any) -> None:
    assert call(twilio, "POST", f"/chat/api/{path}", json=form).status_code == 400
    assert twilio.messages == []


def test_a_form_instead_of_json_is_refused(twilio: Simulator) -> None:
    assert call(twilio, "POST", "/chat/api/read", data={"address": ANA}).status_code == 400


def test_the_gateway_reaches_openai_through_the_page_and_finds_it_down_when_told(twilio: Simulator) -> None:
    headers = {"Authorization": "Bearer sk-local", "Origin": "", "Sec-Fetch-Site": ""}
    passed = call(twilio, "POST", "/openai/v1/conversations", json={}, headers=headers)
    assert passed.json()["id"].startswith("conv_")
    call(twilio, "POST", "/chat/api/switch", json={"key": "openai_down", "state": "once"})
    refused = call(twilio, "POST", "/openai/v1/conversations", json={}, headers=headers)
    assert (refused.status_code, refused.json()["error"]["type"]) == (503, "server_error")
    assert call(twilio, "POST", "/openai/v1/conversations", json={}, headers=headers).status_code == 200


def test_events_name_the_person_concerned_and_end_with_the_simulator(twilio: Simulator, receiver: Receiver) -> None:
    receiver.on_message = None
    with requests.get(f"{twilio.url}/chat/api/events", stream=True, timeout=5) as events:
        lines = events.iter_lines()
        assert next(lines) == b"retry: 500"
        twilio.receive(ANA, "hola")
        assert next(line for line in lines if line.startswith(b"data:")) == f'data: "{ANA}"'.encode()
        started = time.monotonic()
        twilio.stop()
        assert time.monotonic() - started < 3


def test_every_switch_can_be_turned_on_and_off(twilio: Simulator) -> None:
    for state in ("always", "once", "off"):
        for key in SWITCHES:
            assert call(twilio, "POST", "/chat/api/switch", json={"key": key, "state": state}).json()["state"] == state
    assert {one["state"] for one in call(twilio, "GET", "/chat/api/state").json()["switches"]} == {"off"}


def test_a_file_of_a_dangerous_type_is_only_a_download(twilio: Simulator) -> None:
    query = f"/chat/api/media?sid=SM{'a' * 32}&address=whatsapp:%2B5215512345671"
    call(twilio, "POST", query, data=b"<script>", headers={"Content-Type": "text/html"})
    answer = call(twilio, "GET", f"/chat/media/{twilio.messages[0].media[0].sid}")
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"] == "attachment"
    assert "sandbox" in answer.headers["Content-Security-Policy"]


# --- The page in a browser ------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    """Debian's Chromium; without one these tests are skipped, but not in CI."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        reason = "no chromium found: apt-get install chromium"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=BROWSER_ARGS)
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def windows(browser: Browser) -> dict[str, Page]:
    """A window of each size, used again by every test: to open one takes a second."""
    return {size: new_window(browser, size) for size in SIZES}


def new_window(browser: Browser, size: str, scheme: Scheme = "light", **more: Any) -> Page:
    """A window of this size, in Spanish."""
    width, height = SIZES[size]
    context = browser.new_context(
        viewport={"width": width, "height": height}, has_touch=size == "phone", is_mobile=size == "phone",
        color_scheme=scheme, locale="es-MX", timezone_id="America/Mexico_City", **more)
    context.set_default_timeout(PATIENCE * 1000)
    return context.new_page()


class Chat:
    """Somebody at the page: what they do and what they see. `complaints` are the browser's own errors."""

    def __init__(self, page: Page, url: str) -> None:
        self.page = page
        self.is_phone = page.viewport_size == {"width": 390, "height": 844}
        self.complaints: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", self._note)
        page.goto(url)
        page.wait_for_selector(".person", state="attached")
        page.wait_for_selector("#messages:not([aria-busy])", state="attached")

    def leave(self) -> None:
        """Close the page, not the window."""
        self.page.remove_listener("console", self._note)
        self.page.remove_listener("pageerror", self._note)
        self.page.goto("about:blank")

    def _note(self, message: ConsoleMessage | Error) -> None:
        if getattr(message, "type", "error") == "error":
            self.complaints.append(str(message))

    def write(self, text: str) -> None:
        self.page.fill("#text", text)
        self.page.keyboard.press("Enter")

    def see(self, selector: str, text: str | None = None) -> Any:
        """The last such element, once it is visible (and has this text)."""
        found = self.page.locator(selector, has_text=text) if text else self.page.locator(selector)
        found.last.wait_for(state="visible")
        return found.last

    def until(self, expression: str) -> None:
        """Wait for a JavaScript expression to be true (the page's policy forbids Playwright's own way)."""
        end = time.monotonic() + PATIENCE
        while not self.page.evaluate(expression):
            assert time.monotonic() < end, f"not within {PATIENCE} s: {expression}"
            self.page.wait_for_timeout(50)

    def gone(self, selector: str) -> None:
        """Wait until there is no such element."""
        self.page.wait_for_selector(selector, state="detached")

    def answer(self, text: str) -> Any:
        return self.see(".message.hilo:not(.typing)", text)

    def choose(self, name: str) -> None:
        if self.is_phone:
            self.page.click("#show-people")
        self.page.locator(".person", has_text=name).click()
        self.see("#as-whom", name)

    def open_side(self, tab: str) -> None:
        if self.is_phone and not self.page.locator("#side").is_visible():
            self.page.click("#toggle-side")
        self.page.click(f"#tab-{tab}")

    def close_side(self) -> None:
        if self.is_phone:
            self.page.click("#hide-side")

    def attach(self, kind: str) -> None:
        self.page.click("#attach-toggle")
        self.page.click(f"[data-attach={kind}]")


@pytest.fixture(params=sorted(SIZES))
def chat(windows: dict[str, Page], twilio: Simulator, request: pytest.FixtureRequest) -> Iterator[Chat]:
    chat = Chat(windows[request.param], twilio.page_url)
    yield chat
    chat.leave()
    assert chat.complaints == []


def test_a_text_is_ticked_answered_and_formatted(chat: Chat, twilio: Simulator, echo: Echo) -> None:
    echo.may_answer.clear()
    chat.write("¿Tienen cursos de *inglés*?")
    chat.see(".message.typing")
    chat.see("#presence", "escribiendo…")
    chat.see(".message.user .tick[aria-label=Leído]")
    echo.may_answer.set()
    answer = chat.answer("Inglés básico")
    assert answer.locator("strong").inner_text() == "Inglés básico" and answer.locator("s").inner_text() == "$2,400"
    assert answer.locator("li").all_inner_texts() == ["Lunes", "Miércoles", "Escribe su código"]
    assert answer.locator("a").get_attribute("href") == "https://hilo.example/cursos"
    assert "<img src=x onerror=alert(1)>" in answer.inner_text() and answer.locator("img").count() == 0
    assert "2*3*4 snake_case_name" in answer.inner_text() and answer.locator("blockquote").count() == 1
    chat.gone(".message.typing")
    twilio.wait_until(lambda: twilio.sent_to(ANA)[0].status == "read")


def test_ticks_go_from_sent_to_delivered_to_read(chat: Chat, twilio: Simulator, receiver: Receiver) -> None:
    receiver.on_message = None
    twilio.fault("webhook", "slow", seconds=60.0)
    chat.write("hola")
    chat.see(".message.user[data-status=received] .tick[aria-label=Enviado]")
    twilio.receive(ANA, sid=twilio.messages[0].sid)
    chat.see(".message.user[data-status=delivered] .tick[aria-label=Entregado]")
    echo = Echo()
    echo.twilio = twilio
    echo(twilio.messages[0].fields)
    chat.see(".message.user[data-status=read] .tick[aria-label=Leído]")


def test_each_person_has_a_conversation_of_their_own(chat: Chat, twilio: Simulator, echo: Echo) -> None:
    chat.write("soy Ana")
    chat.answer("Inglés básico")
    chat.choose("Luis Ortega")
    chat.gone(".message")
    echo.may_answer.clear()
    chat.write("soy Luis")
    chat.see(".message.typing")
    chat.choose("Ana Torres")
    chat.answer("Inglés básico")
    chat.gone(".message.typing")
    if chat.is_phone:
        chat.page.click("#show-people")
    echo.may_answer.set()
    chat.see(".person:has-text('Luis Ortega') .badge", "1")
    assert [message.body for message in twilio.messages if message.from_ == LUIS] == ["soy Luis"]


def test_a_recorded_voice_note_arrives_as_ogg_and_can_be_heard(
        chat: Chat, twilio: Simulator, receiver: Receiver) -> None:
    chat.page.click("#record")
    chat.see("#record-time", "0:01")
    chat.page.click("#record-send")
    chat.answer("Recibido: audio")
    form = receiver.forms[0]
    assert form["MediaContentType0"] == "audio/ogg"
    data = requests.get(form["MediaUrl0"], auth=(twilio.account_sid, twilio.auth_token), timeout=5).content
    assert data.startswith(b"OggS") and b"OpusHead" in data[:64]
    chat.page.reload()
    chat.see(".voice .length", "0:01")
    chat.page.click(".voice .play")
    chat.until("document.querySelector('.voice audio').currentTime > 0.2")


def test_a_voice_note_that_is_discarded_is_not_sent(chat: Chat, twilio: Simulator) -> None:
    chat.page.click("#record")
    chat.page.click("#record-cancel")
    chat.see("#compose")
    assert twilio.messages == []


def test_photo_document_place_and_button_reach_the_gateway(chat: Chat, receiver: Receiver) -> None:
    with chat.page.expect_file_chooser() as choosing:
        chat.attach("image")
    choosing.value.set_files({"name": "foto.png", "mimeType": "image/png", "buffer": PIXEL})
    chat.page.fill("#dialog-preview [name=caption]", "mi credencial")
    chat.page.click("#dialog-preview .primary")
    chat.answer("Recibido: image")
    chat.see(".message.user .photo")
    with chat.page.expect_file_chooser() as choosing:
        chat.attach("file")
    choosing.value.set_files({"name": "cv.pdf", "mimeType": "application/pdf", "buffer": b"%PDF-"})
    chat.answer("Recibido: document")
    chat.attach("place")
    chat.page.click("#places button >> nth=0")
    chat.page.click("#dialog-place .primary")
    chat.answer("Recibido: location")
    chat.attach("button")
    chat.page.fill("#dialog-button [name=title]", "Sí")
    chat.page.fill("#dialog-button [name=payload]", "si")
    chat.page.click("#dialog-button .primary")
    chat.answer("Recibido: button")
    photo, document, place, button = receiver.forms
    assert (photo["Body"], document["MediaContentType0"]) == ("mi credencial", "application/pdf")
    assert (place["Latitude"], place["Label"]) == ("19.43261", "Zócalo, Ciudad de México")
    assert (button["Body"], button["ButtonPayload"]) == ("Sí", "si")


def test_a_templates_button_and_a_photo_from_the_gateway_are_shown(chat: Chat, receiver: Receiver) -> None:
    receiver.app.route("/folleto.png", "GET", lambda: bottle.HTTPResponse(PIXEL, 200, {"Content-Type": "image/png"}))
    chat.write("plantilla")
    assert "Hola Ana, ¿te inscribo?" in chat.answer("Hola Ana").inner_text()
    chat.page.click(".replies button")
    chat.answer("Recibido: button")
    tapped = receiver.forms[1]
    assert tapped["ButtonPayload"] == "si" and tapped["OriginalRepliedMessageSid"].startswith("SM")
    chat.write("foto")
    chat.answer("El folleto")
    chat.until("document.querySelector('.hilo .photo')?.naturalWidth === 1")


def test_a_message_is_answered_by_mouse_by_touch_and_by_keyboard(
        chat: Chat, twilio: Simulator, receiver: Receiver) -> None:
    chat.write("hola_mundo")
    answer = chat.answer("Inglés básico")
    if chat.is_phone:
        for kind, x in (("touchstart", 40), ("touchmove", 120), ("touchend", 120)):
            answer.evaluate("""(node, [kind, x]) => {
                const at = new Touch({ identifier: 1, target: node, clientX: x, clientY: 9 });
                node.dispatchEvent(new TouchEvent(kind, { bubbles: true, touches: [at] })); }""", [kind, x])
    else:
        answer.hover()
        answer.locator(".answer").click()
    assert chat.see("#quote").inner_text().startswith("Hilo\nInglés básico (en línea), $2,400 HOLA10")
    chat.page.keyboard.press("Escape")
    chat.gone("#quote:visible")
    chat.page.focus("#messages")
    for key in ("ArrowUp", "ArrowUp", "Enter"):
        chat.page.keyboard.press(key)
    assert chat.see("#quote").inner_text() == "Tú\nhola_mundo"
    chat.write("esto")
    assert chat.see(".message.user .quoted").inner_text() == "Tú\nhola_mundo"
    twilio.wait_for(ANA, 2)
    form = receiver.forms[1]
    assert (form["OriginalRepliedMessageSid"], form["OriginalRepliedMessageSender"]) == (twilio.messages[0].sid, ANA)
    chat.gone("#quote:visible")
    chat.page.reload()
    chat.see(".message.user .quoted", "hola_mundo")


def test_many_open_pages_still_work_and_learn_what_is_new(browser: Browser, twilio: Simulator) -> None:
    first = new_window(browser, "desktop")
    chats = [Chat(page, twilio.page_url) for page in (first, *(first.context.new_page() for _ in range(6)))]
    chats[0].page.close()  # the one that listened
    chats[1].write("hola")
    chats[-1].answer("Inglés básico")
    chats[2].see(".message.user", "hola")
    first.context.close()


def test_the_side_pane_shows_runs_calls_and_a_plugin_that_does_not_load(chat: Chat) -> None:
    chat.open_side("runs")
    run = chat.see(".run", "Ejecución 7")
    assert "respondida" in run.inner_text() and "1204 de entrada, 181 de salida" in run.inner_text()
    assert "conv_1" in chat.page.inner_text("#panel-runs .about") and "1.50 s" in run.inner_text()
    run.locator("summary", has_text="buscar_curso").click()
    assert '"codigo": "INGB-01"' in chat.see(".run details[open] pre >> nth=1").inner_text()
    assert "12 ms" in run.inner_text()
    chat.open_side("plugins")
    assert "línea 12" in chat.see(".plugin.broken").inner_text()
    chat.see("#tab-plugins[data-alert='1']")


def test_troubles_show_what_the_user_would_get(chat: Chat, twilio: Simulator, killed: list[str]) -> None:
    chat.open_side("trouble")
    chat.page.check("[data-key=webhook_lost] input[value=once]")
    chat.close_side()
    chat.write("¿hola?")
    chat.see("#toast", "El gateway no contestó al webhook")
    chat.see(".message.user .tick[aria-label=Enviado]")
    chat.open_side("trouble")
    chat.until("document.querySelector('[data-key=webhook_lost] input[value=off]').checked")
    chat.page.check("[data-key=send_63016] input[value=once]")
    chat.page.get_by_role("button", name="Matar el proceso").click()
    chat.see("#toast", "El proceso volvió en 1 s")
    chat.close_side()
    chat.write("hola")
    assert "63016" in chat.see(".message.failed").inner_text()
    assert killed == ["kill"] and twilio.sent_to(ANA)[0].error_code == 63016


def test_a_new_person_can_be_played(chat: Chat, twilio: Simulator) -> None:
    if chat.is_phone:
        chat.page.click("#show-people")
    chat.page.click("#new-person")
    chat.page.fill("#dialog-person [name=name]", "Eva Ruiz")
    chat.page.fill("#dialog-person [name=phone]", "123")
    with chat.page.expect_response("**/api/people"):
        chat.page.click("#dialog-person .primary")
    chat.see("#dialog-person .error", "Hace falta un nombre y un teléfono")
    chat.complaints.clear()  # the browser notes the 400
    chat.page.fill("#dialog-person [name=phone]", "+52 1 33 9999 0000")
    chat.page.click("#dialog-person .primary")
    chat.see("#as-whom", "Eva Ruiz")
    chat.gone("dialog[open]")
    chat.write("hola")
    chat.answer("Inglés básico")
    assert twilio.messages[0].from_ == "whatsapp:+5213399990000"


def test_everything_can_be_done_by_keyboard(windows: dict[str, Page], twilio: Simulator) -> None:
    chat = Chat(windows["desktop"], twilio.page_url)
    assert chat.page.evaluate("document.activeElement.id") == "text"
    chat.page.keyboard.type("uno")
    chat.page.keyboard.press("Shift+Enter")
    chat.page.keyboard.type("dos")
    chat.page.keyboard.press("Enter")
    chat.answer("Inglés básico")
    assert twilio.messages[0].body == "uno\ndos"
    for key in ("Shift+Tab", "Enter", "ArrowRight", "Enter", "Escape", "Enter"):  # the emoji, the second of them
        chat.page.keyboard.press(key)
    chat.page.wait_for_selector("text=😂")
    chat.page.focus(".person[aria-current]")
    chat.page.keyboard.press("ArrowDown")
    chat.page.keyboard.press("Enter")
    chat.see("#as-whom", "Luis Ortega")
    chat.page.focus("#tab-runs")
    chat.page.keyboard.press("ArrowRight")
    assert chat.see("#panel-plugins").is_visible()
    chat.leave()


def test_every_control_has_a_name_and_the_dark_scheme_is_dark(browser: Browser, twilio: Simulator) -> None:
    chat = Chat(new_window(browser, "desktop", "dark"), twilio.page_url)
    chat.write("🎉")
    chat.answer("Inglés básico")
    nameless = chat.page.evaluate("""() => [...document.querySelectorAll('button, input, textarea, a')]
        .filter((node) => !(node.ariaLabel || node.textContent.trim() || node.labels?.length || node.hidden))
        .map((node) => node.outerHTML)""")
    assert nameless == [] and chat.page.get_attribute("html", "lang") == "es"
    assert chat.page.locator(".text.big").inner_text().strip() == "🎉"
    background = chat.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert max(int(colour) for colour in re.findall(r"\d+", background)[:3]) < 50
    chat.page.context.close()


def test_nothing_sticks_out_of_a_narrow_window(chat: Chat) -> None:
    chat.write("palabra" * 60 + " https://hilo.example/" + "x" * 200)
    chat.answer("Inglés básico")
    assert chat.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    list_widths = "(list => [list.scrollWidth, list.clientWidth])(document.querySelector('#messages'))"
    needed, given = chat.page.evaluate(list_widths)
    assert needed <= given


# --- The side pane's data -------------------------------------------------------------------------------------


def inspection_of(hilo: Hilo) -> Inspection:
    return Inspection(hilo.db.rows, lambda: [vars(report) for report in hilo.gateway.plugins.reports.values()])


def test_a_run_is_told_with_its_stretches_calls_tokens_and_parts(
        hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.model = course_assistant
    twilio.receive(ANA, "inglés")
    twilio.wait_for(ANA)
    hilo.done()
    found = inspection_of(hilo)(ANA)
    run = found["runs"][0]
    assert (run["state"], run["outcome"], run["assistant"]) == ("done", "answered", "cursos")
    assert [step["name"] for step in run["steps"]] == ["queued", "waiting", "sending"]
    assert sum(step["seconds"] for step in run["steps"]) == pytest.approx(run["seconds"], abs=0.01)
    call = run["calls"][0]
    assert (call["name"], call["ok"]) == ("buscar_curso", True) and call["ms"] >= 0 and "ingl" in call["output"].lower()
    assert run["tokens"]["input"] > 0 and len(run["parts"]) == 1 and found["thread_id"].startswith("conv_")
    assert "buscar_curso" in next(plugin for plugin in found["plugins"] if plugin["file"] == "tools/cursos.py")["tools"]


def test_a_stranger_has_no_runs(hilo: Hilo) -> None:
    found = inspection_of(hilo)("whatsapp:+5210000000000")
    assert (found["runs"], found["mode"], found["thread_id"]) == ([], None, None)


# --- With the gateway -----------------------------------------------------------------------------------------


def lists_courses(request: Any, items: list[Any]) -> Answer:
    """What a model makes of the courses that a search has found."""
    courses = json.loads(items[-1]["output"])["cursos"]
    lines = [f"- **{course['nombre']}** ({course['codigo']}), {course['precio']}" for course in courses]
    return Answer("¡Hola, Ana! 👋 Para inglés tenemos:\n\n" + "\n".join(lines) + "\n\n¿De cuál te cuento más?")


def tells_course(request: Any, items: list[Any]) -> Answer:
    """What a model makes of one course's details."""
    course = json.loads(items[-1]["output"])
    facts = f"- Horario: {course['horario']}\n- Precio: {course['precio']}"
    start = course["fechas_inicio"][0]
    return Answer(f"**{course['nombre']}** empieza el _{start}_ 📅\n\n{facts}\n\nInscríbete aquí: {course['enlace']}")


def test_a_conversation_with_the_gateway_is_answered_and_told_beside_it(
        chat: Chat, hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, echo: Echo) -> None:
    search = calls(("buscar_curso", {"nombre": "inglés", "nivel": None, "limite": 3}))
    openai_server.model = script([search, lists_courses, calls(("detalle_curso", {"codigo": "ING-101"})), tells_course])
    cursos.cargar(lambda sql, **values: hilo.db.rows(sql, values), CATALOGUE)
    echo.inspect = inspection_of(hilo)
    chat.write("Hola, ¿qué cursos de inglés tienen?")
    assert "Inglés básico" in chat.answer("¿De cuál te cuento más?").locator("strong").all_inner_texts()
    chat.write("Cuéntame del básico 🙏")
    assert chat.answer("Inscríbete aquí").locator("a").count() == 1
    chat.see(".message.user .tick[aria-label=Leído]")
    chat.open_side("runs")
    run = chat.see(".run[data-state=done]", "buscar_curso")
    assert "respondida" in run.inner_text() and "conv_" in chat.page.inner_text("#panel-runs .about")
    details = chat.see(".run[data-state=done]", "detalle_curso")
    details.locator("summary").click()
    assert "ING-101" in chat.see(".run details[open] pre >> nth=0").inner_text()
    if os.environ.get("HILO_SCREENSHOT") and not chat.is_phone:
        details.locator("summary").click()
        chat.page.set_viewport_size({"width": 1140, "height": 632})
        chat.page.locator("#text").focus()
        chat.page.screenshot(path=SCREENSHOT)


# --- With the demo --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def demo_openai() -> Iterator[LocalOpenAI]:
    with LocalOpenAI() as server:
        server.model = course_assistant
        server.transcription = "Busco un curso de fotografía"
        yield server


@pytest.fixture(scope="module")
def demo_url(browser: Browser, demo_openai: LocalOpenAI, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The page of `python gateway.py demo`, which ends with exit code 0 on SIGTERM."""
    ours = {"OPENAI_API_KEY": "sk-local", "OPENAI_BASE_URL": demo_openai.url, "BURST_SECONDS": "0"}
    command = [sys.executable, str(FILES.parent / "gateway.py"), "demo", "--port", "0"]
    process = subprocess.Popen(command, cwd=tmp_path_factory.mktemp("demo"), env=os.environ | ours, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    line = read_until(process, "✅ Hilo demo: ").splitlines()[-1]
    yield line.partition(": ")[2].strip()
    process.terminate()
    _, complaints = process.communicate(timeout=30)
    assert process.returncode == 0, complaints


@pytest.mark.parametrize("size", sorted(SIZES))
def test_the_demo_answers_texts_and_voice_notes_and_tells_of_its_runs(
        windows: dict[str, Page], demo_url: str, size: str) -> None:
    chat = Chat(windows[size], demo_url)
    if chat.is_phone:
        chat.choose("Sofía Méndez")
    chat.write("inglés")
    assert "Inglés básico" in chat.answer("Encontré").inner_text()
    chat.see(".message.user .tick[aria-label=Leído]")
    chat.open_side("runs")
    run = chat.see(".run[data-state=done]", "buscar_curso")
    run.locator("summary").click()
    assert "ING-101" in chat.see(".run details[open] pre >> nth=1").inner_text()
    chat.close_side()
    chat.choose("Luis Ortega")
    seen = chat.page.locator(".message.hilo").count()
    chat.page.click("#record")
    chat.see("#record-time", "0:01")
    chat.page.click("#record-send")
    chat.until(f"document.querySelectorAll('.message.hilo:not(.typing)').length > {seen}")
    assert "Fotografía" in chat.answer("Encontré").inner_text()
    chat.open_side("plugins")
    assert chat.see(".plugin", "tools/voz.py").locator(".state").inner_text() == "cargado"
    chat.leave()
    assert chat.complaints == []
