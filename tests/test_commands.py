"""The operator's commands, on a real database, a local Twilio and a local OpenAI."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest

import commands
from simulator import Simulator, whatsapp
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo, free_port, wait_for
from tests.local_openai import Fault, LocalOpenAI, calls, says, script
from tests.process import Process
from tools import Context, Message, Part
from trial import load_sample

LUIS = "whatsapp:+5218110002222"
USERNAME = "whatsapp:MX.Maria2026"
PROJECT = Path(commands.__file__).parent


class Result(NamedTuple):
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Iterator[Command]:
    """Run `python gateway.py …` in this process, in an empty directory, with these variables and no others of ours."""
    monkeypatch.chdir(tmp_path)
    handlers, level = logging.root.handlers[:], logging.getLogger("hilo").level

    def run(*arguments: str, env: Mapping[str, str] | None = None) -> Result:
        with monkeypatch.context() as variables:
            for name, value in (env or {}).items():
                variables.setenv(name, value)
            try:
                code = commands.main(list(arguments))
            except SystemExit as end:  # argparse
                code = int(str(end.code))
        return Result(code, *capsys.readouterr())

    yield run
    logging.disable(logging.NOTSET)
    logging.root.handlers[:] = handlers
    logging.getLogger("hilo").setLevel(level)


def variables(hilo: Hilo) -> dict[str, str]:
    """Return the variables that a gateway was started with."""
    return dict(hilo.settings.environ)


def lines(result: Result, beginning: str) -> list[str]:
    return [line for line in result.out.splitlines() if line.startswith(beginning)]


# --- The command line -------------------------------------------------------------------------------------


def test_help_names_every_command_and_an_unknown_one_is_answered_with_them(command: Command) -> None:
    shown, unknown = command("--help"), command("chek")
    for name, (summary, function) in commands.COMMANDS.items():
        assert name in shown.out and name in unknown.err
        assert summary and function.__doc__
    assert (shown.code, unknown.code) == (0, 2)


@pytest.mark.parametrize("name", ["runs", "forget"])
def test_command_without_a_database_says_so_and_makes_none(command: Command, tmp_path: Path, name: str) -> None:
    result = command(name, *(["whatsapp:+52"] if name == "forget" else []))
    assert (result.code, result.out) == (1, "")
    assert "DATABASE_URL is not set" in result.err
    assert list(tmp_path.iterdir()) == []


def test_command_without_a_schema_says_what_to_run(command: Command, empty_database_url: str) -> None:
    result = command("runs", env={"DATABASE_URL": empty_database_url})
    todo = "where it is one of Hilo's, run python gateway.py migrate"
    assert (result.code, result.err) == (1, f"database: SQLSTATE 42P01 (no such table): {todo}\n")


# --- tools ------------------------------------------------------------------------------------------------


def test_tools_names_a_broken_file_and_its_line_without_a_database_or_openai(tmp_path: Path) -> None:
    copy = tmp_path / "hilo"
    for name in ("tools", "assistants"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*PROJECT.glob("*.py"), *PROJECT.glob("*.sql")):
        shutil.copy(path, copy)
    (copy / "tools" / "roto.py").write_text("from tools import hookimpl\n\ndef f(:\n")
    code = """import sys, commands
code = commands.main(["tools"])
unwanted = {"openai", "simulator", "page", "demo", "trial"} & set(sys.modules)  # what is for trying only, and slow
sys.exit(f"imported: {unwanted}" if unwanted else code)"""
    env = {**os.environ, "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none", "PYTHONDONTWRITEBYTECODE": "1"}
    process = subprocess.run([sys.executable, "-c", code], cwd=copy, env=env, capture_output=True, text=True)
    assert (process.returncode, process.stderr) == (1, "")
    assert "❌ tools/roto.py: roto.py:3: SyntaxError: invalid syntax" in process.stdout
    assert "buscar_curso(nombre: string, nivel?: basico|intermedio|avanzado" in process.stdout
    assert "no side effects; 10 s at most" in process.stdout
    assert "hooks: fallback_reply" in process.stdout


def test_tools_as_json_are_the_schemas_that_the_model_gets(command: Command) -> None:
    result = command("tools", "--json")
    found = {tool["name"]: tool for tool in json.loads(result.out)}
    assert result.code == 0
    assert found["buscar_curso"]["strict"] is True
    assert found["buscar_curso"]["parameters"]["additionalProperties"] is False


# --- check ------------------------------------------------------------------------------------------------


def test_check_of_a_sound_gateway_finds_no_fault(
    start: Callable[..., Hilo], openai_server: LocalOpenAI, twilio: Simulator, command: Command, database_url: str
) -> None:
    load_sample(database_url)
    hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    result = command("check", env=variables(hilo))
    assert (result.code, result.err) == (0, "")
    assert all(line.startswith("✅") for line in result.out.splitlines()), result.out
    for what in ("settings", "database", "schema", "extension unaccent", "plugins", "assistants", "assistant", "openai",
                 "openai webhook", "twilio", "sender", "public url"):  # fmt: skip
        assert lines(result, f"✅ {what}: "), f"{what} in {result.out}"
    assert WEBHOOK_SECRET not in result.out and twilio.number not in result.out and "sk-local" not in result.out
    assert hilo.rows("SELECT FROM messages") == []


def test_check_of_bad_settings_names_all_of_them_and_goes_on(command: Command) -> None:
    env = {"PORT": "http", "TWILIO_FROM": "+5215512345678", "OPENAI_BASE_URL": "nowhere", "ASSISTANT_ID": "asst_1",
           "LOG_LEVEL": "LOUD", "TWILIO_ACOUNT_SID": "x"}  # fmt: skip
    result = command("check", "--offline", env=env)
    assert result.code == 1
    faults = "\n".join(lines(result, "❌ settings: "))
    named = ("PORT='http'", "TWILIO_FROM=", "OPENAI_BASE_URL='nowhere'", "LOG_LEVEL='LOUD'")
    assert all(name in faults for name in named)
    assert "15512345678" not in result.out
    assert lines(result, "⚠️ settings: TWILIO_ACOUNT_SID is no variable of Hilo's → was TWILIO_ACCOUNT_SID meant?")
    assert lines(result, "❌ assistant: ASSISTANT_ID='asst_1': the Assistants API ended on 2026-08-26")
    assert lines(result, "✅ plugins: ")


def test_settings_of_plugins_that_cannot_be_used_are_named_by_check_and_stop_the_start(
    command: Command, tmp_path: Path
) -> None:
    env = {"LIMITE_MINUTO": "abc", "ASESORES": "foo,whatsapp:+5215512345678", "ASESOR_MINUTOS": "x",
           "LIMITE_PRECIOS": "foo", "VOZ_IDIOMA": "zzzz", "LIMITE_DIAS": "9", "FORMAS_DE_PAGO": "tarjeta",
           "DATABASE_URL": "postgresql://nobody@127.0.0.1:1/none"}  # fmt: skip
    found = command("check", "--offline", env=env).out
    faults = [line.partition(" ")[2] for line in found.splitlines() if line.startswith("❌ settings: ")]
    assert sorted(line.partition("=")[0] for line in faults) == sorted(f"settings: {name}" for name in list(env)[:5])
    assert "VOZ_IDIOMA='zzzz' cannot be used: it needs languages of two letters" in found
    assert "15512345678" not in found
    assert "⚠️ settings: LIMITE_DIAS is no variable of Hilo's → was LIMITE_DIA meant?" in found
    assert "FORMAS_DE_PAGO" not in found and "✅ settings: 2 of " in found
    with Process(tmp_path, {name: env[name] for name in ("ASESORES", "DATABASE_URL")}) as process:
        assert process.exit_code() == 1
        line = "ASESORES='foo,whatsapp:+52…5678' cannot be used: it needs whatsapp:+ and a number, with commas"
        assert process.lines() == [line]


def test_check_of_what_is_wrong_elsewhere_says_what_to_do(
    hilo: Hilo, openai_server: LocalOpenAI, twilio: Simulator, command: Command
) -> None:
    openai_server.models["gpt-6-luna"] = "2026-01-31"
    twilio.webhook_url = "https://somewhere.else/webhooks/twilio"
    hilo.rows("INSERT INTO users (user_phone, reply_to) VALUES (:u, :u)", u=ANA)
    hilo.rows("INSERT INTO oa_threads_map (user_phone, thread_id) VALUES (:u, 'thread_old')", u=ANA)
    other = {"ASSISTANT_ID": "pmpt_1", "TWILIO_WEBHOOK_SECRET": "another", "OPENAI_WEBHOOK_SECRET": WEBHOOK_SECRET}
    result = command("check", env=variables(hilo) | other)
    assert result.code == 1
    assert lines(result, "❌ assistant: ASSISTANT_ID='pmpt_1': reusable prompts end on 2026-11-30")
    assert lines(result, "❌ openai: the model gpt-6-luna was shut down on 2026-01-31 → ")
    assert lines(result, f"❌ openai webhook: this OpenAI project has none for {hilo.url}/webhooks/openai → ")
    assert lines(result, "❌ sender: whatsapp:+14…8886 sends what it receives to https://somewhere.else/webhooks")
    assert lines(result, "❌ public url: the process there refuses our signature → ")
    assert lines(result, "⚠️ threads: 1 rows of oa_threads_map are of the Assistants API")
    assert lines(result, "⚠️ catalogue: there are no courses → ")
    assert all(" → " in line for line in lines(result, "❌"))


def test_check_where_nothing_answers_names_each_thing(command: Command) -> None:
    nowhere = f"http://127.0.0.1:{free_port()}"
    env = {
        "DATABASE_URL": "postgresql://hilo:geheim@127.0.0.1:1/hilo", "PUBLIC_URL": nowhere, "TWILIO_API_URL": nowhere,
        "OPENAI_API_KEY": "sk-key-1", "OPENAI_BASE_URL": f"{nowhere}/v1", "OPENAI_WEBHOOK_SECRET": WEBHOOK_SECRET,
        "TWILIO_ACCOUNT_SID": "AC" + "1" * 32, "TWILIO_AUTH_TOKEN": "token-1", "TWILIO_FROM": "MG" + "1" * 32,
        "ASSISTANT_ID": "cursos",
    }  # fmt: skip
    result = command("check", "--json", env=env)
    found = json.loads(result.out)
    faults = {check["check"] for check in found["checks"] if check["status"] == "fault"}
    assert (result.code, found["ok"]) == (1, False)
    assert faults == {"database", "openai", "openai webhook", "twilio", "public url"}
    assert not any(secret in result.out for secret in ("geheim", "sk-key-1", "token-1"))


def test_check_of_secrets_that_do_not_fit_says_which(
    start: Callable[..., Hilo], openai_server: LocalOpenAI, twilio: Simulator, command: Command
) -> None:
    hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    openai_server.webhook_secret = "whsec_" + "b3RybyBzZWNyZXRv"
    openai_server.api_key = "sk-other"
    env = variables(hilo) | {"TWILIO_AUTH_TOKEN": "wrong", "TWILIO_WEBHOOK_SECRET": twilio.auth_token}
    refused = command("check", env=env)
    assert lines(refused, "❌ openai: the key is refused (HTTP 401) → ")
    assert lines(refused, "❌ twilio: the account sid and token are refused → ")
    assert lines(refused, "✅ public url: ")
    openai_server.api_key = None
    assert lines(command("check", env=env), "❌ openai webhook: a test event was refused: its signature does not match")


# --- runs -------------------------------------------------------------------------------------------------


def answered(hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, sender: str = ANA, turns: int = 1) -> None:
    """Have a user's question answered with the help of a tool."""
    replies = [calls(("buscar_curso", {"nombre": "Excel", "nivel": None, "limite": None})), says("Hay Excel básico.")]
    openai_server.model = script([*replies, *[says(f"Respuesta {n}.") for n in range(1, turns)]])
    for n in range(turns):
        twilio.receive(sender, "¿Tienen Excel?", profile_name="Ana")
        twilio.wait_for(sender, n + 1)
        hilo.done()


def test_runs_lists_what_fell_back_and_tells_a_run_step_by_step(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command
) -> None:
    answered(hilo, twilio, openai_server)
    openai_server.down = True
    twilio.receive(LUIS, "secreto de Luis")
    good, bad = hilo.done(2)
    env = variables(hilo)
    overview = command("runs", env=env)
    assert overview.code == 0
    assert "0 not done; in the last 24 hours: 1 answered, 1 fallback" in overview.out
    assert f"{bad['id']:>6}  whatsapp:+52…2222" in overview.out and "openai_down" in overview.out
    assert f"{good['id']:>6}  " not in overview.out

    story = command("runs", str(good["id"]), env=env)
    steps = ["message in SM", "a worker took", "response resp_", "tool buscar_curso: ok", "the reply was written",
             "handed to Twilio (17 characters)", "done: answered"]  # fmt: skip
    positions = [story.out.index(step) for step in steps]
    assert positions == sorted(positions)
    assert "tokens" in story.out and "thread conv_" in story.out
    assert "Excel" not in story.out and "whatsapp:+52…0001" in story.out
    told = command("runs", str(good["id"]), "--text", env=env).out
    assert "│ ¿Tienen Excel?" in told and "│ Hay Excel básico." in told and '"nombre": "Excel"' in told

    fallen = command("runs", str(bad["id"]), env=env).out
    failed = r"(?m)^  \d\d-\d\d \d\d:\d\d:\d\dZ .* s  OpenAI failed: InternalServerError 503 server_error$"
    assert len(re.findall(failed, fallen)) == 3 and "failed tries" not in fallen
    assert fallen.index("OpenAI failed") < fallen.rindex("done: fallback (openai_down)")

    of_luis = command("runs", LUIS.removeprefix("whatsapp:"), env=env)
    assert (of_luis.code, of_luis.out.count("whatsapp:+52…2222")) == (0, 2)
    assert not any(whole in overview.out + story.out + of_luis.out for whole in (ANA, LUIS, "secreto"))


@pytest.mark.parametrize(
    ("what", "named"),
    [("7777", "7777"), ("whatsapp:+5210000000000", "of whatsapp:+52…0000"), ("99999999999999999999", "of 999…9999"),
     ("+52 100 000 0000", "of +52…0000"), ("nobody", "of 'nobody'"), ("MX.ana", "of 'MX.ana'")],
)  # fmt: skip
def test_runs_of_something_unknown_says_of_what(command: Command, database_url: str, what: str, named: str) -> None:
    result = command("runs", what, env={"DATABASE_URL": database_url})
    assert result == (1, "", f"there is no run {named}\n")


def test_runs_shows_a_run_that_waits_and_one_that_was_refused(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command
) -> None:
    twilio.fault("send", "error", status=400, code=21610, message="Attempt to send to unsubscribed recipient")
    answered_by = openai_server.gate("POST /v1/responses")
    twilio.receive(ANA, "hola")
    assert answered_by.arrived.wait(10)
    open_run = hilo.rows("SELECT id FROM runs")[0]["id"]
    waiting = command("runs", env=variables(hilo)).out
    assert "1 not done" in waiting and "held by a worker" in waiting
    assert "Not done: due in" in command("runs", str(open_run), env=variables(hilo)).out
    answered_by.release()
    hilo.done()
    story = command("runs", str(open_run), env=variables(hilo)).out
    assert "undelivered (21610)" in story
    assert "is failed, error 21610: https://www.twilio.com/docs/api/errors/21610" in story


# --- forget -----------------------------------------------------------------------------------------------


def leftovers(hilo: Hilo, address: str) -> dict[str, int]:
    """Return how many rows of each table speak of a user."""
    columns = hilo.rows("SELECT table_name AS t FROM information_schema.columns WHERE column_name = 'user_phone'")
    tables = sorted(row["t"] for row in columns)
    counts = {t: hilo.rows(f"SELECT count(*) AS n FROM {t} WHERE user_phone = :u", u=address)[0]["n"] for t in tables}  # noqa: S608
    return {table: count for table, count in counts.items() if count}


def test_forget_removes_a_user_here_at_openai_and_at_twilio_and_nobody_else(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command
) -> None:
    hilo.rows("CREATE TABLE favoritos (user_phone text, codigo text)")
    hilo.rows("INSERT INTO favoritos VALUES (:ana, 'EXC-101'), (:luis, 'EXC-201')", ana=ANA, luis=LUIS)
    answered(hilo, twilio, openai_server, turns=2)
    twilio.receive(ANA, media=[(b"OggS", "audio/ogg")])
    hilo.done(3)
    answered(hilo, twilio, openai_server, LUIS)
    threads = {row["user_phone"]: row["thread_id"] for row in hilo.rows("SELECT * FROM oa_threads_map")}
    file = next(message for message in twilio.messages if message.media).media[0]

    result = command("forget", ANA, env=variables(hilo))
    assert (result.code, result.err) == (0, "")
    assert result.out.startswith("Forgotten of whatsapp:+52…0001:\n") and "1  files at Twilio" in result.out
    assert leftovers(hilo, ANA) == {}
    assert openai_server.conversations[threads[ANA]].deleted and openai_server.conversations[threads[ANA]].items == []
    assert {record.conversation.id for record in openai_server.responses.values()  # type: ignore[union-attr]
            if not record.body.get("deleted")} == {threads[LUIS]}  # fmt: skip
    assert {message.address for message in twilio.messages} == {LUIS} and file.deleted

    assert set(leftovers(hilo, LUIS)) == {"favoritos", "messages", "oa_threads_map", "runs", "users"}
    assert not openai_server.conversations[threads[LUIS]].deleted
    assert [row["n"] for row in hilo.rows("SELECT count(*) AS n FROM tool_calls")] == [1]
    again = command("forget", ANA, env=variables(hilo))
    assert (again.code, again.out) == (0, "Nothing is known of whatsapp:+52…0001.\n")


def test_forget_that_openai_breaks_off_keeps_what_a_second_one_needs(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command
) -> None:
    answered(hilo, twilio, openai_server)
    thread = hilo.rows("SELECT thread_id FROM oa_threads_map")[0]["thread_id"]
    openai_server.down = "closed"
    result = command("forget", ANA, env=variables(hilo))
    assert result.code == 1
    assert "❌ not removed: something at OpenAI, which cannot be reached" in result.out
    assert set(leftovers(hilo, ANA)) == {"users", "runs", "oa_threads_map"}
    assert twilio.messages == []
    openai_server.down = False
    openai_server.faults.append(Fault("DELETE /v1/conversations/", status=500))
    named = f"❌ not removed: conversation {thread} at OpenAI: HTTP 500"
    assert named in command("forget", ANA, env=variables(hilo)).out
    assert command("forget", ANA, env=variables(hilo)).code == 0
    assert leftovers(hilo, ANA) == {} and openai_server.conversations[thread].deleted


def test_forget_without_the_keys_names_what_stays(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command
) -> None:
    answered(hilo, twilio, openai_server)
    result = command("forget", ANA, env={"DATABASE_URL": variables(hilo)["DATABASE_URL"]})
    assert result.code == 1
    assert "1 conversations and 2 responses at OpenAI: OPENAI_API_KEY is not set" in result.out
    assert "2 messages at Twilio: TWILIO_ACCOUNT_SID or TWILIO_AUTH_TOKEN is not set" in result.out
    assert set(leftovers(hilo, ANA)) == {"users", "runs", "oa_threads_map", "messages"}


def test_forget_by_external_user_id_takes_all_addresses_of_that_person(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command
) -> None:
    openai_server.model = says("¡Hola!")
    twilio.receive(ANA, "hola", fields={"ExternalUserId": "MX.Maria2026"})
    twilio.wait_for(ANA, 1)
    twilio.receive(USERNAME, "soy yo")
    twilio.wait_for(USERNAME, 1)
    hilo.done(2)
    assert command("forget", "MX.Maria2026", env=variables(hilo)).code == 0
    assert (leftovers(hilo, ANA), leftovers(hilo, USERNAME), twilio.messages) == ({}, {}, [])


def test_forget_takes_along_what_others_were_told_of_the_user_and_their_answers(
    hilo: Hilo, twilio: Simulator, command: Command
) -> None:
    def relay(message: Message) -> list[str | Part]:
        return [Part(text="Ana pide auxilio", to=LUIS), "Te leemos."] if message.address == ANA else ["Anotado."]

    hilo.plug(incoming_message=relay)
    twilio.receive(ANA, "auxilio")
    notice = twilio.wait_for(LUIS, 1)[0]
    hilo.done()
    twilio.receive(LUIS, "Dile que sí", fields={"OriginalRepliedMessageSid": notice.sid})
    hilo.done(2)
    twilio.receive(LUIS, "Otra cosa")
    hilo.done(3)
    assert command("forget", ANA, env=variables(hilo)).code == 0
    kept = ["Anotado.", "Otra cosa", "Anotado."]
    assert [row["body"] for row in hilo.rows("SELECT body FROM messages ORDER BY id")] == kept
    assert [message.body for message in twilio.messages] == kept


def test_forget_of_a_run_under_way_ends_it_unanswered(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command
) -> None:
    openai_server.think_seconds = 60
    twilio.receive(ANA, "hola")
    wait_for(lambda: openai_server.in_flight)
    assert command("forget", ANA, env=variables(hilo)).code == 0
    assert leftovers(hilo, ANA) == {}
    assert {record.status for record in openai_server.responses.values()} == {"cancelled"}
    assert twilio.sent_to(whatsapp(ANA)) == []


@pytest.mark.parametrize("call", ["POST /v1/conversations$", "POST /v1/responses$"])
def test_forget_while_openai_makes_something_leaves_nothing_there(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command, call: str
) -> None:
    twilio.receive(ANA, "mi secreto")
    hilo.done()
    hilo.rows("DELETE FROM oa_threads_map")
    with openai_server.gate(call) as gate:
        twilio.receive(ANA, "otra cosa")
        assert gate.arrived.wait(10)
        assert command("forget", ANA, env=variables(hilo)).code == 0

    def gone() -> bool:
        hilo.gateway.upkeep.delete_discarded()
        threads, responses = openai_server.conversations.values(), openai_server.responses.values()
        return len(threads) == 2 and all(t.deleted for t in threads) and all(r.body.get("deleted") for r in responses)

    wait_for(gone)
    assert leftovers(hilo, ANA) == {} and hilo.rows("SELECT FROM responses") == []
    assert all(record.items == [] for record in openai_server.conversations.values())


def test_forget_while_a_tool_runs_lets_it_send_nothing(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    begun, forgotten, logged = threading.Event(), threading.Event(), ""

    def avisar(context: Context) -> str:
        """Avisa."""
        begun.set()
        forgotten.wait(10)
        context.send(Part(text="Ana pide auxilio", to=LUIS))
        return "hecho"

    hilo.tool(avisar)
    openai_server.model = script([calls(("avisar", {})), says("Ya.")], shared=True)
    twilio.receive(ANA, "auxilio")
    assert begun.wait(10)
    assert command("forget", ANA, env=variables(hilo)).code == 0
    forgotten.set()

    def log() -> str:
        nonlocal logged
        logged += capsys.readouterr().err
        return logged

    wait_for(lambda: "took this run over" in log())
    assert "tool avisar failed" in logged and "KeyError" not in logged
    assert hilo.rows("SELECT FROM messages") == [] and twilio.messages == []


def test_message_that_comes_while_its_user_is_forgotten_is_a_newcomers_and_answered(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI, command: Command
) -> None:
    twilio.receive(ANA, "me llamo Ana", profile_name="Ana")
    hilo.done()
    with openai_server.gate("DELETE /v1/responses/") as gate:
        forgetting = threading.Thread(target=command, args=("forget", ANA), kwargs={"env": variables(hilo)})
        forgetting.start()
        assert gate.arrived.wait(10)
        twilio.receive(ANA, "¿quién soy?")
        twilio.wait_for(ANA, 2)
        hilo.done(2)
    forgetting.join(10)
    kept = ["¿quién soy?", "Eco: ¿quién soy?"]
    assert [row["body"] for row in hilo.rows("SELECT body FROM messages ORDER BY id")] == kept
    assert [message.body for message in twilio.messages] == kept
    assert hilo.rows("SELECT FROM users WHERE profile_name = 'Ana'") == []
    twilio.receive(ANA, "¿y ahora?")
    assert twilio.wait_for(ANA, 2)[-1].body == "Eco: ¿y ahora?"
    hilo.done(2)
    told = [part["text"] for record in openai_server.conversations.values() for item in record.items
            for part in item["content"]]  # fmt: skip
    assert "¿quién soy?" in told and "me llamo Ana" not in told


def test_forget_takes_along_what_an_advisor_wrote_and_leaves_the_conversation_that_was_told_of_it(
    start: Callable[..., Hilo], twilio: Simulator, openai_server: LocalOpenAI, command: Command
) -> None:
    marta = "whatsapp:+5215500000001"
    hilo = start(ASESORES=marta)
    of_ana = [(ANA, "/asesor mi RFC es XAXX"), (marta, "Hola, Ana"), (ANA, "tengo una deuda"), (marta, "/bot")]
    of_luis = [(LUIS, "/asesor"), (marta, "Hola, Luis"), (LUIS, "/bot")]
    for who, text in [*of_ana, *of_luis, (marta, "¿qué cursos hay?")]:
        twilio.receive(who, text, profile_name={ANA: "Ana", LUIS: "Luis"}.get(who, "Marta"))
        hilo.done()
    result = command("forget", ANA, env=variables(hilo))
    assert result.code == 0 and "1  conversations of others, which the gateway deletes" in result.out
    bodies = [row["body"] for row in hilo.rows("SELECT body FROM messages ORDER BY id")]
    assert not [body for body in bodies if "Ana" in body or "RFC" in body or "deuda" in body]
    assert {"Hola, Luis", "👤 *Marta:* Hola, Luis", "¿qué cursos hay?"} <= set(bodies) and bodies.count("/bot") == 1
    assert sorted(bodies) == sorted(message.body for message in twilio.messages)
    hilo.gateway.upkeep.delete_discarded()
    assert all(record.deleted and not record.items for record in openai_server.conversations.values())
    assert command("forget", ANA, env=variables(hilo)).out.startswith("Nothing is known of ")


def test_conversation_that_is_left_is_deleted_at_openai_though_no_user_has_it_any_more(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    answered(hilo, twilio, openai_server)
    first = hilo.rows("SELECT thread_id FROM oa_threads_map")[0]["thread_id"]
    openai_server.faults.append(Fault("POST /v1/responses$", status=500, repeat=None))
    twilio.receive(ANA, "¿y Word?")
    hilo.done(2)
    left = [row["thread_id"] for row in hilo.rows("SELECT thread_id FROM discarded_threads WHERE due_at > now()")]
    assert first in left and len(left) == len(openai_server.conversations)
    hilo.rows("UPDATE discarded_threads SET due_at = now()")
    hilo.gateway.upkeep.delete_discarded()
    assert all(record.deleted and not record.items for record in openai_server.conversations.values())
    assert hilo.rows("SELECT FROM discarded_threads") == []
