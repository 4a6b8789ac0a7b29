"""Plugins: each hook, what its results mean, and what becomes of a plugin that is wrong."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import importlib
import itertools
import json
import re
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from checks import Checks
from runs import Workers
from settings import Assistant
from simulator import Simulator
from tests.conftest import ANA, Hilo, Server, serving, wait_for
from tests.local_openai import LocalOpenAI, calls, fails, says, script
from tests.test_webhooks import request
from tools import Context, Event, Message, Part, PluginError, ToolError, hookimpl, parts_of
from tools._plugins import Plugins, ToolCall

GOOD = """
from tools import hookimpl

def saluda(nombre: str) -> str:
    '''Saluda a alguien.'''
    return f"hola, {nombre}"

@hookimpl
def register_tools(register):
    register(saluda)
"""


@pytest.fixture
def direct(start: Callable[..., Hilo], openai_server: LocalOpenAI) -> Hilo:
    """A gateway on a model that answers at once."""
    openai_server.ignores_background = True
    return start()


def creates(server: LocalOpenAI) -> list[dict[str, Any]]:
    """The bodies of the calls that created a response, in order."""
    return [request.body for request in server.requests if (request.method, request.path) == ("POST", "/v1/responses")]


Stage = tuple[Hilo, Simulator, LocalOpenAI]
NUMBERS = itertools.count(5215530000000)


@pytest.fixture(scope="module")
def stage(postgres: Server) -> Iterator[Stage]:
    """A gateway on a model that answers at once, for many tests, each with a user of its own."""
    with serving(postgres) as (hilo, twilio, openai_server):
        openai_server.ignores_background = True
        yield hilo, twilio, openai_server


def turn(stage: Stage, **hooks: Callable[..., Any]) -> tuple[dict[str, Any], list[str], list[dict[str, Any]]]:
    """One turn of a new user who says hola, with these hooks: the run, the texts sent, the responses asked for."""
    hilo, twilio, openai_server = stage
    user, before = f"whatsapp:+{next(NUMBERS)}", len(creates(openai_server))
    report = hilo.plug(**hooks)
    assert report.error is None
    twilio.receive(user, "hola")
    (run,) = wait_for(lambda: hilo.rows("SELECT * FROM runs WHERE user_phone = :u AND state = 'done'", u=user))
    hilo.unplug(report)
    return run, [message.body for message in twilio.sent_to(user)], creates(openai_server)[before:]


def bodies(twilio: Simulator, count: int) -> list[str]:
    """The texts sent to Ana, once there are so many."""
    return [message.body for message in twilio.wait_for(ANA, count)]


def broken(*_: Any) -> Any:
    """A hook that fails."""
    raise RuntimeError("se rompió")


def cancelled(*_: Any) -> Any:
    """A hook that ends as a cancelled task does."""
    raise asyncio.CancelledError


# --- Each hook --------------------------------------------------------------------------------------------


def test_hook_register_tools(direct: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    def saluda(context: Context, nombre: str) -> str:
        """Saluda a alguien."""
        return f"hola, {nombre}, de parte de {context.profile_name}"

    report = direct.plug(register_tools=lambda register: register(saluda, side_effects=True, timeout=3))
    assert (report.tools, report.hooks) == (["saluda"], ["register_tools"])
    tool = direct.gateway.plugins.tools["saluda"]
    assert (tool.side_effects, tool.timeout, tool.description) == (True, 3.0, "Saluda a alguien.")
    openai_server.model = script([calls(("saluda", {"nombre": "Luis"})), says("Saludado.")])
    twilio.receive(ANA, "saluda a Luis", profile_name="Ana")
    assert bodies(twilio, 1) == ["Saludado."]
    assert [item["output"] for item in creates(openai_server)[1]["input"]] == ["hola, Luis, de parte de Ana"]


PICTURE = [{"type": "input_text", "text": "una foto"}, {"type": "input_image", "image_url": "https://x.mx/a.png"}]


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (None, "hola"),
        ("[una nota de voz] hola", "[una nota de voz] hola"),
        (PICTURE, PICTURE),
        ([], "hola"),
        ("  ", "hola"),
        (7, "hola"),
        ("ho\x00la\ud83d", "hola"),
        ([{"type": "input_image", "image_url": b"x"}], "hola"),
        ([{"type": "input_text", "text": "a", "n": float("nan")}], "hola"),
    ],
    ids=["None", "text", "parts", "empty list", "blank", "wrong type", "bad characters", "bytes", "NaN"],
)
def test_hook_message_to_input(stage: Stage, given: Any, read: Any) -> None:
    _, _, (asked,) = turn(stage, message_to_input=lambda message, context: given)
    assert [item["content"] for item in asked["input"]] == [read]


def test_hook_message_to_input_is_asked_once_and_its_result_is_told_later_on(
    direct: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    asked = []

    def message_to_input(message: Message, context: Context) -> str:
        asked.append(message.text)
        return f"«{message.text}»"

    direct.plug(message_to_input=message_to_input)
    openai_server.model = script([fails(), says("uno"), says("dos")], shared=True)
    twilio.receive(ANA, "a")  # fails once: asked for again on another conversation
    twilio.wait_for(ANA, 1)
    direct.done()
    direct.rows("DELETE FROM oa_threads_map")
    twilio.receive(ANA, "b")
    twilio.wait_for(ANA, 2)
    assert asked == ["a", "b"]
    seeded = [r.body["items"] for r in openai_server.requests if r.path == "/v1/conversations" and r.body.get("items")]
    assert [item["content"] for item in seeded[-1]] == ["«a»", "uno"]


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (None, ["Eco: hola"]),
        ("", []),
        ([], []),
        ("Ya voy.", ["Ya voy."]),
        (Part(text="Ya voy."), ["Ya voy."]),
        (["uno", Part(text="dos"), "tres"], ["uno", "dos", "tres"]),
        (["uno", " ", Part(text="  ")], ["uno"]),
        (7, ["Eco: hola"]),
        (["uno", 7], ["Eco: hola"]),
        ("x" * 2000, ["x" * 1600, "x" * 400]),
        ("ho\x00la\ud83d", ["hola"]),
        (Part("uno", media_url=7), ["Eco: hola"]),  # type: ignore[arg-type]
        (Part("uno", to=""), ["Eco: hola"]),
    ],
    ids=[
        "None",
        "empty",
        "empty list",
        "str",
        "Part",
        "list",
        "blanks",
        "wrong type",
        "wrong item",
        "long",
        "bad chars",
        "wrong file",
        "to nobody",
    ],
)
def test_hook_incoming_message(stage: Stage, given: Any, sent: list[str]) -> None:
    run, texts, asked = turn(stage, incoming_message=lambda message, context: given)
    answered = sent[:1] == ["Eco: hola"]
    assert (texts, run["outcome"]) == (sent, "answered" if answered else "intercepted")
    assert len(asked) == answered


def test_hook_incoming_message_is_asked_for_each_message_in_order_and_the_rest_goes_to_the_model(
    start: Callable[..., Hilo], twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(BURST_SECONDS="0.5")
    openai_server.ignores_background = True
    asked = []

    def incoming_message(message: Message) -> str | None:
        asked.append(message.text)
        return "¡Pong!" if message.text == "ping" else None

    hilo.plug(incoming_message=incoming_message)
    for text in ("hola", "ping", "adiós"):
        twilio.receive(ANA, text)
    assert bodies(twilio, 2) == ["¡Pong!", "Eco: hola\nadiós"]
    assert asked == ["hola", "ping", "adiós"] and len(hilo.done()) == 1


@pytest.mark.parametrize(
    ("chosen", "instructions"), [(None, "curso"), ("ventas", "Vende."), ("nadie", "curso"), (7, "curso")]
)
def test_hook_choose_assistant(stage: Stage, chosen: Any, instructions: str) -> None:
    sales = Assistant.model_validate({"name": "ventas", "model": "gpt-6-sol", "instructions": "Vende.", "tools": []})
    stage[0].gateway.journey.assistants["ventas"] = sales
    run, _, (asked,) = turn(stage, choose_assistant=lambda message, context: chosen)
    assert instructions in asked["instructions"]
    if chosen == "ventas":
        assert (run["assistant"], asked["model"], asked["tools"]) == ("ventas", "gpt-6-sol", [])
    else:
        assert (run["assistant"], asked["model"], bool(asked["tools"])) == ("cursos", "gpt-6-luna", True)


@pytest.mark.parametrize(
    ("reason", "more", "harm"),
    [
        ("no_assistant", {"OPENAI_API_KEY": ""}, None),
        ("no_assistant", {"ASSISTANT_ID": ""}, None),
        ("no_assistant", {"ASSISTANT_ID": "asst_abc123"}, None),
        ("disabled", {"THREADS_INTEGRATION_ENABLED": "false"}, None),
        ("openai_down", {"THREADS_RUN_TIMEOUT": "1"}, "down"),
        ("error", {}, "fails"),
    ],
)
def test_hook_fallback_reply(
    start: Callable[..., Hilo],
    twilio: Simulator,
    openai_server: LocalOpenAI,
    reason: str,
    more: dict[str, str],
    harm: str | None,
) -> None:
    hilo = start(**more)
    openai_server.ignores_background = True
    openai_server.down = harm == "down"
    openai_server.model = fails("invalid_prompt") if harm == "fails" else says("Hola.")
    seen = []

    def fallback_reply(message: Message, reason: str, context: Context) -> list[str | Part]:
        seen.append((message.text, reason))
        return ["Por ahora no.", Part(text="Prueba más tarde.")]

    hilo.plug(fallback_reply=fallback_reply)
    twilio.receive(ANA, "hola")
    assert bodies(twilio, 2) == ["Por ahora no.", "Prueba más tarde."]
    assert seen == [("hola", reason)]
    assert (hilo.done()[0]["outcome"], hilo.done()[0]["reason"]) == ("fallback", reason)


def test_hook_fallback_reply_that_nobody_gives_is_an_apology(
    start: Callable[..., Hilo], twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(OPENAI_API_KEY="")
    for name in [name for name, report in hilo.gateway.plugins.reports.items() if "fallback_reply" in report.hooks]:
        hilo.gateway.plugins.unload(name)
    twilio.receive(ANA, "hello, what courses do you have?")
    assert bodies(twilio, 1)[0].startswith("Sorry, I could not answer you")


@pytest.mark.parametrize(
    ("given", "sent"),
    [
        (None, ["Eco: hola"]),
        ("¡Hola!", ["¡Hola!"]),
        (["uno", Part(text="dos")], ["uno", "dos"]),
        ([], []),
        ("y" * 1601, ["y" * 1600, "y"]),
        (object(), ["Eco: hola"]),
    ],
    ids=["None", "str", "list", "empty list", "long", "wrong type"],
)
def test_hook_format_reply(stage: Stage, given: Any, sent: list[str]) -> None:
    seen = []

    def format_reply(text: str, message: Message, context: Context) -> Any:
        seen.append((text, message.text))
        return given

    run, texts, _ = turn(stage, format_reply=format_reply)
    assert (texts, run["outcome"], seen) == (sent, "answered", [("Eco: hola", "hola")])


def test_hook_format_reply_with_media_and_templates(direct: Hilo, twilio: Simulator) -> None:
    template = "HX" + "a" * 32
    parts = [Part("El temario", "https://x.mx/temario.pdf"), Part(content_sid=template, variables={"1": "Ana"})]
    direct.plug(format_reply=lambda text: parts)
    twilio.receive(ANA, "el temario, por favor")
    media, card = twilio.wait_for(ANA, 2)
    assert (media.body, [item.url for item in media.media]) == ("El temario", ["https://x.mx/temario.pdf"])
    assert (card.content_sid, card.variables) == (template, {"1": "Ana"})


@pytest.mark.parametrize(
    ("given", "part"),
    [
        (Part(content_sid="HX", variables={1: Decimal("5.50"), "n\x00": "\ud83dé"}),  # type: ignore[dict-item]
         Part(content_sid="HX", variables={"1": "5.50", "n": "é"})),
        (Part("a\x00", "https://x.mx/\x00a.jpg", "", {}), Part("a", "https://x.mx/a.jpg")),
        (Part("a", to="whatsapp:+5\x00"), Part("a", to="whatsapp:+5")),
    ],
)  # fmt: skip
def test_part_becomes_what_json_and_the_database_take(given: Part, part: Part) -> None:
    assert parts_of(given) == [part]


@pytest.mark.parametrize(
    ("wrong", "names"),
    [
        ({"text": 5}, "Part.text is a string, not int"),
        ({"media_url": b"x"}, "Part.media_url is a string, not bytes"),
        ({"content_sid": 5}, "Part.content_sid is a string, not int"),
        ({"to": 5215511110001}, "Part.to is a string, not int"),
        ({"to": " "}, "Part.to is empty"),
        ({"variables": ["a"]}, "Part.variables is a mapping, .* not list"),
        ({"variables": {"1": None}}, "Part.variables: a value is None"),
    ],
    ids=str,
)
def test_part_of_wrong_types_is_refused_in_words_that_quote_nothing(wrong: dict[str, Any], names: str) -> None:
    with pytest.raises(PluginError, match=names):
        parts_of(Part(**{"text": "hola", **wrong}))


def test_hook_track_event(
    start: Callable[..., Hilo], twilio: Simulator, openai_server: LocalOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    hilo = start()
    openai_server.ignores_background = True
    seen: list[Event] = []
    hilo.plug(track_event=lambda event: seen.append(event))
    hilo.plug(track_event=lambda event: broken())
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    run = hilo.done()[0]
    wait_for(lambda: [event for event in seen if event.name == "run_finished"])
    (event,) = [event for event in seen if event.name == "run_finished"]
    assert (event.run_id, event.address, event.data["outcome"]) == (run["id"], ANA, "answered")
    assert json.dumps(dict(event.data))
    assert any("track_event" in line and "(test_plugins.py:" in line for line in caplog.messages)
    hilo.plug(track_event=lambda event: cancelled())
    twilio.receive(ANA, "BAJA")
    wait_for(lambda: "opted_out" in [event.name for event in seen])
    twilio.receive(ANA, "ALTA")
    wait_for(lambda: "opted_in" in [event.name for event in seen])


def test_hook_track_event_that_hangs_holds_up_no_turn(
    direct: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    release = threading.Event()
    direct.plug(track_event=lambda event: release.wait(30))
    for n in range(3):
        twilio.receive(ANA, f"m{n}")
        twilio.wait_for(ANA, n + 1)
        direct.done(n + 1)
    release.set()


def test_hook_that_hangs_is_left_out_and_its_workers_replaced(
    start: Callable[..., Hilo], twilio: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Plugins, "LONG", 1.0)
    monkeypatch.setattr(Workers, "STUCK", 0.5)
    hilo = start(WORKER_THREADS="4", LEASE_SECONDS="0.5", OPENAI_API_KEY="")
    release, called = threading.Event(), []

    def hang(message: Message) -> None:
        called.append(message.text)
        release.wait(60)

    hilo.plug(incoming_message=hang)
    hilo.plug(fallback_reply=lambda message: f"{message.text}: listo")
    users = [f"whatsapp:+52155{n:08d}" for n in range(12)]
    for user in users:
        twilio.receive(user, "hola")
    hilo.done(12, 60)
    assert all(sent.body for user in users for sent in twilio.wait_for(user, 1))
    before = len(called)
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "hola: listo"
    assert len(called) == before
    release.set()
    wait_for(lambda: not hilo.gateway.plugins.under_way)
    twilio.receive(ANA, "adiós")
    assert twilio.wait_for(ANA, 2)[1].body == "adiós: listo" and called[-1] == "adiós"


# --- Installed packages -----------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Install a module as a package with an entry point in group hilo.tools."""
    monkeypatch.syspath_prepend(str(tmp_path))
    made: list[str] = []

    def installer(module: str, source: str, target: str = "") -> None:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        info = tmp_path / f"{module}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[hilo.tools]\nmio = {target or module}\n")
        importlib.invalidate_caches()
        made.append(module)

    yield installer
    for name in made:
        sys.modules.pop(name, None)


def test_entry_point_is_a_plugin(install: Callable[..., None]) -> None:
    install("paquete_saludo", GOOD)
    plugins = Plugins()
    report = plugins.reports["mio"]
    assert (report.file, report.tools, report.error) == ("paquete_saludo:paquete_saludo", ["saluda"], None)
    assert "buscar_curso" in plugins.tools  # beside the files in tools/


def test_two_packages_with_one_entry_point_name_are_both_there(install: Callable[..., None]) -> None:
    install("paquete_uno", GOOD)
    install("paquete_dos", GOOD.replace("saluda", "despide"))
    plugins = Plugins()
    assert {"saluda", "despide"} <= set(plugins.tools)
    assert not [report for report in plugins.reports.values() if report.error]


def test_entry_point_that_is_not_there_is_reported_with_its_package(install: Callable[..., None]) -> None:
    install("paquete_vacio", "", "paquete_que_no_existe")
    report = Plugins().reports["mio"]
    assert report.file == "paquete_vacio:paquete_que_no_existe"
    assert report.error == "ModuleNotFoundError: No module named 'paquete_que_no_existe'"


def test_entry_point_that_leads_to_a_plugin_again_is_reported_in_one_line(install: Callable[..., None]) -> None:
    install("paquete_doble", GOOD, "paquete_doble\notro = paquete_doble\nmalo = no-es:un módulo")
    reports = Plugins().reports
    assert reports["mio"].error is None and reports["mio"].tools == ["saluda"]
    assert reports["otro"].error == "PluginError: is loaded already, as paquete_doble:paquete_doble"
    error = reports["malo"].error or ""
    assert error == "PluginError: the entry point malo = 'no-es:un módulo' is no module and no module:object"


def test_hook_register_routes(install: Callable[..., None], start: Callable[..., Hilo]) -> None:
    install(
        "paquete_paginas",
        """
        from tools import hookimpl

        @hookimpl
        def register_routes(app, context):
            saludo = context.settings.get("SALUDO", "hola")
            app.route("/saludo", callback=lambda: saludo + " " + str(context.query("SELECT 7 AS n")[0]["n"]))
            app.route("/falla", callback=lambda: 1 / 0)
        """,
    )
    hilo = start(WORKER_THREADS="0", SALUDO="buenas")
    assert request(hilo, "GET", "/saludo") == (200, "buenas 7")
    assert request(hilo, "GET", "/falla")[0] == 500
    assert request(hilo, "GET", "/")[0] == 200


def test_page_that_is_made_in_pieces_leaves_in_pieces_and_a_large_one_whole(
    install: Callable[..., None], start: Callable[..., Hilo]
) -> None:
    install(
        "paquete_trozos",
        """
        import threading
        from tools import hookimpl

        seguir = threading.Event()

        @hookimpl
        def register_routes(app, context):
            app.route("/trozos", callback=trozos)
            app.route("/sigue", callback=lambda: str(seguir.set()))
            app.route("/grande", callback=lambda: (b"x" * 1_000_000 for _ in range(40)))

        def trozos():
            yield b"uno,"
            yield b"dos" if seguir.wait(10) else b"nunca"
        """,
    )
    hilo = start(WORKER_THREADS="0")
    connection = http.client.HTTPConnection("127.0.0.1", hilo.settings.port, timeout=10)
    connection.request("GET", "/trozos")
    answer = connection.getresponse()
    assert answer.read(4) == b"uno,"  # while the thread that makes the next one waits
    assert request(hilo, "GET", "/sigue")[0] == 200
    assert answer.read() == b"dos"
    connection.close()
    connection = http.client.HTTPConnection("127.0.0.1", hilo.settings.port, timeout=10)
    connection.request("GET", "/grande")
    answer = connection.getresponse()
    time.sleep(0.3)  # the socket's buffers and the server's are full, and the page waits for room
    assert answer.read() == b"x" * 40_000_000
    connection.close()


# --- Who is asked, and in which order ---------------------------------------------------------------------


def test_raising_implementation_is_logged_with_its_line_and_the_next_is_asked(
    direct: Hilo, twilio: Simulator, openai_server: LocalOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    direct.plug(format_reply=lambda text: "del siguiente")
    direct.plug(format_reply=lambda text: broken(), incoming_message=lambda message: sys.exit(3))
    direct.plug(message_to_input=lambda message: json.loads("{"), choose_assistant=lambda: broken())
    twilio.receive(ANA, "hola")
    assert bodies(twilio, 1) == ["del siguiente"]
    failed = [line for line in caplog.messages if "failed" in line]
    assert [line.split(" in ")[0].split("⚠️ ")[1] for line in failed] == [
        "incoming_message", "choose_assistant", "message_to_input", "format_reply",
    ]  # fmt: skip
    assert all("(test_plugins.py:" in line and line.startswith("run=") for line in failed)


@pytest.mark.parametrize(
    "hooks",
    [
        {"incoming_message": lambda message: float(message.text)},
        {"incoming_message": lambda message: [cancelled()]},
        {"fallback_reply": lambda message: broken(), "choose_assistant": lambda message: {}[message.text]},
        {"format_reply": lambda text, message: Part(message.text, media_url=len(text))},  # type: ignore[arg-type]
    ],
    ids=["a failure that quotes the user", "cancelled", "KeyError", "wrong result"],
)
def test_failure_of_a_hook_costs_no_answer_and_puts_nothing_said_in_the_log(
    stage: Stage, hooks: dict[str, Callable[..., Any]], caplog: pytest.LogCaptureFixture
) -> None:
    run, texts, _ = turn(stage, **hooks)
    assert (texts, run["outcome"], run["crashes"]) == (["Eco: hola"], "answered", 0)
    (line,) = [line for line in caplog.messages if "failed (" in line]
    assert "(test_plugins.py:" in line and "hola" not in line


def test_failure_of_a_step_is_logged_with_the_places_it_came_from_and_nothing_said(
    direct: Hilo, twilio: Simulator, caplog: pytest.LogCaptureFixture
) -> None:
    class Quotes:
        """An assistant that no step can use."""

        @property
        def name(self) -> str:
            raise ValueError("hola, soy Ana")

    direct.gateway.journey.assistants["cursos"] = Quotes()  # type: ignore[assignment]
    twilio.receive(ANA, "hola")
    line = wait_for(lambda: next((line for line in caplog.messages if "step failed" in line), None))
    assert re.search(r"^run=\d+ .*step failed: ValueError at runs.py:\d+ → .*gateway.py:\d+", line)
    assert "Ana" not in caplog.text


def test_later_plugin_is_asked_first_and_the_built_in_last(direct: Hilo, twilio: Simulator) -> None:
    asked: list[str] = []

    def built_in(text: str) -> str:
        asked.append("built-in")
        return "del último"

    direct.plug(format_reply=lambda text: asked.append("first"))
    direct.plug(format_reply=lambda text: asked.append("second"))
    direct.plug(format_reply=hookimpl(built_in, trylast=True))
    plugins = direct.gateway.plugins
    names = [implementation.plugin_name for implementation in plugins.implementations("format_reply")]
    assert names.index("tools.formato_whatsapp") > 1  # declared trylast itself
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    assert asked[:2] == ["second", "first"]


# --- A plugin that is wrong -------------------------------------------------------------------------------

HEAD = "from tools import Context, hookimpl\n"
TOOL = "@hookimpl\ndef register_tools(register):\n    register(f)\n"
WRONG: dict[str, tuple[str | bytes, str]] = {
    "misspelt hook": (HEAD + "@hookimpl\ndef fallback_repply(message): ...", r"mal.py:2: .*fallback_repply is no hook"),
    "wrong argument": (
        HEAD + "@hookimpl\ndef format_reply(texto): ...",
        r"mal.py:2: .*format_reply is not given 'texto'",
    ),
    "async hook": (HEAD + "@hookimpl\nasync def track_event(event): ...", r"mal.py:2: .*ordinary functions, not async"),
    "generator hook": (HEAD + "@hookimpl\ndef register_tools(register):\n    yield", r"mal.py:2: .*or generators"),
    "async generator hook": (HEAD + "@hookimpl\nasync def format_reply(text):\n    yield", r"mal.py:2: .*not async"),
    "by keyword only": (HEAD + "@hookimpl\ndef format_reply(*, text): ...", r"mal.py:2: .*remove the \* before 'text'"),
    "cancelled at import": (HEAD + "import asyncio\nraise asyncio.CancelledError", r"mal.py:3: CancelledError"),
    "wrapper": (HEAD + "@hookimpl(wrapper=True)\ndef format_reply(text):\n    yield", r"mal.py:2: .*wrappers"),
    "settings": (HEAD + "SETTINGS = {'UNA': str}\n@hookimpl\ndef format_reply(text): ...", "SETTINGS is a mapping of"),
    "no hookimpl": (HEAD + "def format_reply(text): ...", "no function marked @hookimpl"),
    "syntax error": (HEAD + "def f(:\n    pass", r"mal.py:2: SyntaxError"),
    "import error": (HEAD + "\nimport no_existe_este_modulo", r"mal.py:3: ModuleNotFoundError: .*no_existe"),
    "name error": (HEAD + "x = 1\ny = z", r"mal.py:3: NameError"),
    "deep in the library": (HEAD + "import json\njson.loads('{')", r"mal.py:3: JSONDecodeError"),
    "sys.exit at import": (HEAD + "import sys\nsys.exit(1)", r"mal.py:3: SystemExit: 1"),
    "not UTF-8": (b"x = '\xff'", "SyntaxError"),
    "NUL": (b"x = 1\x00", "SyntaxError|ValueError"),
    "register_tools fails": (
        HEAD + "@hookimpl\ndef register_tools(register):\n    1 / 0",
        r"mal.py:4: ZeroDivisionError",
    ),
    "no docstring": (HEAD + "def f(a: int): ...\n" + TOOL, r"mal.py:5: PluginError: f: needs a docstring"),
    "no type hint": (
        HEAD + "def f(a):\n    'F.'\n" + TOOL,
        r"mal.py:6: PluginError: f: parameter 'a' needs a type hint",
    ),
    "type without a schema": (HEAD + "def f(a: object()):\n    'F.'\n" + TOOL, r"mal.py:6: PluginError: f: "),
    "any": (
        HEAD + "from typing import Any\ndef f(a: Any):\n    'F.'\n" + TOOL,
        r"mal.py:7: PluginError: f: f.a accepts anything",
    ),
    "unknown name": (HEAD + "def f(a: 'Nada'):\n    'F.'\n" + TOOL, r"mal.py:6: PluginError: f: .*Nada"),
    "dict": (
        HEAD + "def f(a: dict[str, int]):\n    'F.'\n" + TOOL,
        r"mal.py:6: PluginError: f: f.a is a free-form object",
    ),
    "tuple": (HEAD + "def f(a: tuple[int, str]):\n    'F.'\n" + TOOL, r"mal.py:6: PluginError: f: f.a is a tuple"),
    "star": (HEAD + "def f(*a: int):\n    'F.'\n" + TOOL, r"mal.py:6: PluginError: f: \*a"),
    "async": (HEAD + "async def f():\n    'F.'\n" + TOOL, r"mal.py:6: PluginError: f: tools are ordinary functions"),
    "lambda": (HEAD + "f = lambda: 1\n" + TOOL, r"mal.py:5: PluginError: .*defined with def"),
    "name with an accent": (HEAD + "def año():\n    'F.'\nf = año\n" + TOOL, r"mal.py:7: PluginError: año: .*letters"),
    "long name": (
        HEAD + f"def {'f' * 65}():\n    'F.'\nf = {'f' * 65}\n" + TOOL,
        r"mal.py:7: PluginError: f{65}: .*64",
    ),
    "bad timeout": (
        HEAD + "def f():\n    'F.'\n@hookimpl\ndef register_tools(register):\n    register(f, timeout=0)",
        r"mal.py:6: PluginError: f: timeout=0",
    ),
    "unknown option": (
        HEAD + "def f():\n    'F.'\n@hookimpl\ndef register_tools(register):\n    register(f, retries=2)",
        r"mal.py:6: TypeError: .*retries",
    ),
    "duplicate": (
        HEAD + "def saluda():\n    'F.'\nf = saluda\n" + TOOL,
        r"mal.py:7: PluginError: .*saluda.*another tool .* in \S+/bien.py",
    ),
    "twice": (
        HEAD + "def f():\n    'F.'\n" + TOOL + "    register(f)",
        r"mal.py:7: PluginError: .*another tool .* in this plugin",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_plugin_is_reported_by_file_and_line_and_leaves_the_others_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, case: str
) -> None:
    source, error = WRONG[case]
    folder = tmp_path / f"con_plugins_{tmp_path.name.replace('-', '_')}"
    folder.mkdir()
    (folder / "bien.py").write_text(GOOD)
    (folder / "mal.py").write_bytes(source if isinstance(source, bytes) else source.encode())
    monkeypatch.syspath_prepend(str(tmp_path))
    importlib.invalidate_caches()
    plugins = Plugins([f"{folder.name}.bien", f"{folder.name}.mal"])
    good, bad = plugins.reports.values()
    assert (good.error, good.tools, list(plugins.tools)) == (None, ["saluda"], ["saluda"])
    assert bad.error and re.search(error, bad.error), bad.error
    assert "\n" not in bad.error and "_plugins.py" not in bad.error and "__init__.py" not in bad.error
    assert (bad.tools, bad.hooks) == ([], []) and bad.file == f"{folder.name}/mal.py"
    assert [line for line in caplog.messages if f"{folder.name}/mal.py" in line]


def test_file_with_a_dot_in_its_name_is_reported_as_it_is_called() -> None:
    report = Plugins(["tools.con.punto"]).reports["tools.con.punto"]
    assert report.file == "tools/con.punto.py" and report.error and "rename it" in report.error


def test_docstring_longer_than_openai_takes_is_a_warning_of_check() -> None:
    def f() -> None: ...

    f.__doc__ = "Hace algo." * 110
    with contextlib.closing(Checks(offline=True)) as checks:
        checks.plugins = plugins_with(f)
        (warned,) = [found for found in checks.plugin_files() if found.status == "warning"]
    assert "the docstring of f has 1,100 characters" in warned.text and "1,024" in warned.todo


def test_hooks_of_a_plugin_that_failed_are_never_called(direct: Hilo, twilio: Simulator) -> None:
    def register_tools(register: Callable[..., None]) -> None:
        register(print)

    report = direct.plug(incoming_message=lambda message: "no debería", register_tools=register_tools)
    assert report.error and "print" in report.error
    report = direct.plug(incoming_message=lambda message: "tampoco", format_reply=lambda texto: "ni esto")
    assert report.error
    twilio.receive(ANA, "hola")
    assert bodies(twilio, 1) == ["Eco: hola"]


def test_files_that_begin_with_an_underscore_are_no_plugins() -> None:
    names = Plugins.discover()
    assert "tools.cursos" in names and not [name for name in names if name.startswith("tools._")]


# --- The context ------------------------------------------------------------------------------------------


def test_context_has_all_that_it_promises(
    direct: Hilo, twilio: Simulator, openai_server: LocalOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hilo")
    seen: dict[str, Any] = {}

    def mira(context: Context) -> str:
        """Mira lo que hay."""
        seen["history"] = [(turn.role, turn.text) for turn in context.history(3)]
        seen["last"] = [turn.text for turn in context.history(1)]
        seen["rows"] = context.query("SELECT :a::int + 1 AS n, :b::text AS t", a=1, b="it's :x %s")
        seen["none"] = context.query("UPDATE users SET language = language WHERE false")
        seen["context"] = context
        context.log.info("dentro de la herramienta")
        context.send("Un momento…")
        context.send(Part("con media", "https://x.mx/a.pdf"))
        return "visto"

    direct.tool(mira)
    for n, text in enumerate(("uno", "dos")):
        twilio.receive(ANA, text, profile_name="Ana")
        twilio.wait_for(ANA, n + 1)
        direct.done(n + 1)
    openai_server.model = script([calls(("mira", {})), says("Listo.")], shared=True)
    twilio.receive(ANA, "tres", profile_name="Ana")
    assert bodies(twilio, 5)[2:] == ["Un momento…", "con media", "Listo."]
    context = seen["context"]
    run = direct.done(3)[2]["id"]
    assert (context.run_id, context.address, context.profile_name, context.assistant) == (run, ANA, "Ana", "cursos")
    assert seen["history"] == [("assistant", "Eco: uno"), ("user", "dos"), ("assistant", "Eco: dos")]
    assert seen["last"] == ["Eco: dos"]
    assert seen["rows"] == [{"n": 2, "t": "it's :x %s"}] and seen["none"] == []
    assert [message.text for message in context.turn] == ["tres"] and context.turn[0].raw["Body"] == "tres"
    assert context.settings.public_url == direct.url and context.settings.get("NO_HAY", "x") == "x"
    assert f"run={run} whatsapp:+52…0001 dentro de la herramienta" in caplog.messages


def test_context_openai_is_the_sdks_client(stage: Stage) -> None:
    def incoming_message(context: Context) -> str:
        return " ".join(model.id for model in context.openai().models.list())

    _, (text,), _ = turn(stage, incoming_message=incoming_message)
    assert "gpt-transcribe" in text


def test_context_openai_without_a_key_is_a_tool_error(start: Callable[..., Hilo]) -> None:
    journey = start(OPENAI_API_KEY="", WORKER_THREADS="0").gateway.journey
    with pytest.raises(ToolError, match="OPENAI_API_KEY"):
        Context(services=journey).openai()


def test_context_send_reaches_another_address(direct: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    adviser = "whatsapp:+5215599990000"

    def avisa(context: Context) -> None:
        """Avisa a un asesor."""
        context.send(Part(f"{context.profile_name} quiere hablar", to=adviser))

    direct.tool(avisa, side_effects=True)
    openai_server.model = script([calls(("avisa", {})), says("Avisado.")])
    twilio.receive(ANA, "quiero un asesor", profile_name="Ana")
    assert twilio.wait_for(adviser, 1)[0].body == "Ana quiere hablar"
    assert bodies(twilio, 1) == ["Avisado."]


def test_message_has_buttons_places_and_files(direct: Hilo, twilio: Simulator) -> None:
    seen: list[Message] = []

    def incoming_message(message: Message) -> list[Part]:
        seen.append(message)
        return []

    direct.plug(incoming_message=incoming_message)
    place = {"MessageType": "location", "Latitude": "19.43", "Longitude": "-99.13", "Label": "Zócalo"}
    button = {"MessageType": "button", "ButtonText": "Sí", "ButtonPayload": "si_1"}
    twilio.receive(ANA, "", media=[(b"x", "audio/ogg; codecs=opus"), (b"y", "image/png")])
    direct.done(1)
    twilio.receive(ANA, "", fields=place)
    direct.done(2)
    twilio.receive(ANA, "Sí", fields=button)
    direct.done(3)
    assert [file.content_type for file in seen[0].media] == ["audio/ogg", "image/png"]
    assert seen[0].media[0].url.startswith(twilio.url)
    assert (seen[1].location, seen[1].raw["Label"]) == ((19.43, -99.13), "Zócalo")
    assert (seen[2].button, seen[2].text) == ("si_1", "Sí")


# --- Tool calls -------------------------------------------------------------------------------------------


def call(plugins: Plugins, name: str, arguments: str = "{}") -> tuple[str, bool]:
    """What the model is told for one call, and whether it went well."""
    saved: list[tuple[str, bool]] = []

    def save(output: str, ok: bool, milliseconds: int) -> bool:
        saved.append((output, ok))
        return len(saved) == 1

    ToolCall(plugins.tools[name], arguments, Context(), save).wait(float("inf"))
    return saved[0]


def plugins_with(function: Callable[..., Any], **options: Any) -> Plugins:
    """Plugins with one tool, called f."""
    function.__name__ = "f"
    function.__doc__ = function.__doc__ or "Hace algo."
    plugins = Plugins([])
    plugins.register(plugins.tools, function, **options)
    return plugins


class Ficha:
    """Something without a JSON form."""


@pytest.mark.parametrize(
    ("value", "output"),
    [
        ("texto", "texto"),
        ("", ""),
        (None, "null"),
        ([{"precio": 1.5}], '[{"precio":1.5}]'),
        ({"a": float("nan"), "b": float("inf")}, '{"a":null,"b":null}'),
        ("ma\x00lo\ud83d", "malo"),
        ({"ñ": "🙂"}, '{"ñ":"🙂"}'),
        ((n for n in range(2)), "[0,1]"),
    ],
    ids=["text", "empty", "None", "rows", "NaN", "bad characters", "unicode", "generator"],
)
def test_output_of_a_tool_is_told_as_text_or_json(value: Any, output: str) -> None:
    def f() -> Any:
        return value

    assert call(plugins_with(f), "f") == (output, True)


def test_tool_error_reaches_the_model_in_its_own_words() -> None:
    def f() -> None:
        raise ToolError("No hay cupo en «Excel».")

    assert call(plugins_with(f), "f") == ('{"error": "No hay cupo en «Excel»."}', False)


@pytest.mark.parametrize(
    "harm",
    [
        lambda: 1 / 0, sys.exit, Ficha, lambda: b"\xff", lambda: json.loads("{"), lambda: {"a": 1}["divisible"],
        cancelled,
    ],
)
def test_any_other_failure_is_a_fixed_sentence_and_logged_with_the_line(
    caplog: pytest.LogCaptureFixture, harm: Callable[[], Any]
) -> None:
    def f() -> Any:
        return harm()

    output, ok = call(plugins_with(f), "f")
    assert not ok and "la herramienta falló" in output and "divisi" not in output
    (line,) = [line for line in caplog.messages if "tool f failed (test_plugins.py:" in line]
    assert "divisi" not in line


def test_wrong_arguments_go_back_to_the_model_naming_each(
    direct: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    ran = []

    def inscribe(curso: str, lugares: int) -> str:
        """Inscribe."""
        ran.append(curso)
        return "ok"

    direct.tool(inscribe, side_effects=True)
    wrong: list[dict[str, Any] | str] = [
        {"curso": 5, "lugares": "muchos"},
        {},
        {"curso": "a", "lugares": 1, "extra": 2},
        "no es JSON",
        "[1]",
        "null",
    ]
    openai_server.model = script([calls(*[("inscribe", arguments) for arguments in wrong]), says("Perdón.")])
    twilio.receive(ANA, "inscríbeme")
    assert bodies(twilio, 1) == ["Perdón."]
    outputs = [json.loads(item["output"])["error"] for item in creates(openai_server)[1]["input"]]
    assert "curso" in outputs[0] and "lugares" in outputs[0] and "curso" in outputs[1] and "extra" in outputs[2]
    assert "not JSON" in outputs[3] and "arguments" in outputs[4] and "arguments" in outputs[5]
    assert ran == [] and direct.rows("SELECT count(*) AS n FROM tool_calls WHERE NOT ok")[0]["n"] == 6


def test_call_of_a_tool_that_is_not_there_or_not_this_assistants_is_an_error(
    direct: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    assistants = direct.gateway.journey.assistants
    assistants["cursos"] = assistants["cursos"].model_copy(update={"tools": ("detalle_curso",)})
    openai_server.model = script([calls(("inventada", {}), ("buscar_curso", {"nombre": "x"})), says("Perdón.")])
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    first, second = creates(openai_server)
    assert [tool["name"] for tool in first["tools"]] == ["detalle_curso"]
    assert ["no existe la herramienta" in item["output"] for item in second["input"]] == [True, True]


def test_huge_output_is_cut(direct: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    def todo() -> str:
        """Devuelve mucho."""
        return "x" * 200_000

    direct.tool(todo)
    openai_server.model = script([calls(("todo", {})), says("Mucho.")])
    twilio.receive(ANA, "todo")
    assert bodies(twilio, 1) == ["Mucho."]
    assert len(creates(openai_server)[1]["input"][0]["output"]) == 40_000


@pytest.mark.parametrize(("side_effects", "sentence"), [(False, "no terminó a tiempo"), (True, "no la repitas")])
def test_tool_past_its_time_is_left_behind_and_the_model_told(side_effects: bool, sentence: str) -> None:
    release = threading.Event()

    def f() -> str:
        release.wait(20)
        return "tarde"

    before = ToolCall.abandoned
    output, ok = call(plugins_with(f, timeout=0.1, side_effects=side_effects), "f")
    release.set()
    assert not ok and sentence in output and ToolCall.abandoned == before + 1


def test_hung_tools_take_no_place_from_those_that_follow() -> None:
    release = threading.Event()

    def hang() -> None:
        release.wait(20)

    def f() -> str:
        return "aquí sigo"

    hung, plugins = plugins_with(hang, timeout=0.05), plugins_with(f, timeout=2)
    jobs = [ToolCall(hung.tools["f"], "{}", Context(), lambda *_: True) for _ in range(20)]
    for job in jobs:
        job.wait(float("inf"))
    assert call(plugins, "f") == ("aquí sigo", True)
    release.set()
    for job in jobs:
        job.thread.join(5)
    assert call(plugins, "f") == ("aquí sigo", True)


def test_call_given_up_before_it_had_a_place_never_runs() -> None:
    release, ran, told = threading.Event(), [], []

    def hang() -> None:
        release.wait(20)

    def f() -> None:
        ran.append(1)

    hung, plugins = plugins_with(hang, timeout=20), plugins_with(f, timeout=20, side_effects=True)
    holders = [ToolCall(hung.tools["f"], "{}", Context(), lambda *_: True) for _ in range(16)]

    def save(output: str, ok: bool, milliseconds: int) -> bool:
        told.append(output)
        return True

    waiting = ToolCall(plugins.tools["f"], "{}", Context(), save)
    waiting.wait(0.0)  # the turn's time is up
    release.set()
    for job in (*holders, waiting):
        job.thread.join(5)
    assert ran == [] and "no terminó a tiempo" in told[0]


def test_hung_tool_does_not_hold_up_the_reply_past_the_deadline(
    start: Callable[..., Hilo], twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.ignores_background = True
    release = threading.Event()

    def cuelga() -> None:
        """No termina."""
        release.wait(30)

    hilo = start(THREADS_RUN_TIMEOUT="2")
    hilo.tool(cuelga, timeout=20)
    hilo.plug(fallback_reply=lambda reason: f"[{reason}]")
    openai_server.model = script([calls(("cuelga", {})), says("No pude consultarlo.")])
    twilio.receive(ANA, "consulta")
    assert twilio.wait_for(ANA, 1, timeout=4)[0].body == "No pude consultarlo."
    release.set()
