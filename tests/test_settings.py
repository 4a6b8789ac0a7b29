"""Settings: what each variable takes, and the one line that says why a value cannot be used."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import checks
import gateway
from settings import (
    ConfigurationError,
    LogFormat,
    load_assistants,
    load_settings,
    mask,
    read_environment,
    read_settings,
    start_log,
    variables,
)

ROOT = Path(gateway.__file__).parent
SID = "0123456789abcdef" * 2


def test_without_any_variable_the_defaults_hold() -> None:
    settings = load_settings({})
    assert (settings.port, settings.threads_run_timeout, settings.burst_seconds, settings.lease_seconds) == (
        8000,
        30,
        1.5,
        10,
    )
    assert (settings.worker_threads, settings.web_threads, settings.db_connections) == (16, 8, 4)
    assert settings.threads_integration_enabled is True
    absent = ["database_url", "public_url", "twilio_account_sid", "twilio_auth_token", "twilio_from", "twilio_api_url",
              "openai_api_key", "openai_base_url", "openai_webhook_secret", "assistant_id", "admin_token"]  # fmt: skip
    assert [getattr(settings, name) for name in absent] == [None] * len(absent)


def test_every_variable_of_the_design_is_read() -> None:
    design = """DATABASE_URL PORT PUBLIC_URL TWILIO_ACCOUNT_SID TWILIO_AUTH_TOKEN TWILIO_WEBHOOK_SECRET TWILIO_FROM
        TWILIO_API_URL OPENAI_API_KEY OPENAI_BASE_URL OPENAI_WEBHOOK_SECRET ASSISTANT_ID THREADS_INTEGRATION_ENABLED
        THREADS_RUN_TIMEOUT BURST_SECONDS WORKER_THREADS WEB_THREADS DB_CONNECTIONS LEASE_SECONDS ADMIN_TOKEN"""
    assert set(design.split()) <= set(variables())


GOOD: dict[str, list[tuple[str, Any]]] = {
    "PORT": [("1", 1), (" 65535 ", 65535)],
    "PUBLIC_URL": [
        ("https://hilo.example", "https://hilo.example"),
        ("http://127.0.0.1:8000/", "http://127.0.0.1:8000/"),
    ],
    "TWILIO_ACCOUNT_SID": [("AC" + SID, "AC" + SID)],
    "TWILIO_FROM": [("whatsapp:+14155238886", "whatsapp:+14155238886"), ("MG" + SID, "MG" + SID)],
    "TWILIO_API_URL": [("http://127.0.0.1:9/", "http://127.0.0.1:9/")],
    "OPENAI_BASE_URL": [("https://api.example/v1", "https://api.example/v1")],
    "ASSISTANT_ID": [("cursos", "cursos"), ("asst_abc", "asst_abc"), ("pmpt_abc", "pmpt_abc")],
    "THREADS_INTEGRATION_ENABLED": [("true", True), ("false", False), ("0", False), ("1", True), ("off", False)],
    "THREADS_RUN_TIMEOUT": [("1", 1.0), ("12.5", 12.5)],
    "BURST_SECONDS": [("0", 0.0), ("60", 60.0)],
    "WORKER_THREADS": [("0", 0), ("256", 256)],
    "WEB_THREADS": [("1", 1)],
    "DB_CONNECTIONS": [("1", 1)],
    "LEASE_SECONDS": [("0.5", 0.5)],
}


@pytest.mark.parametrize(("name", "given", "value"), [(name, *pair) for name in GOOD for pair in GOOD[name]])
def test_value_that_can_be_used_is(name: str, given: str, value: Any) -> None:
    assert getattr(load_settings({name: given}), name.lower()) == value


BAD = {
    "ZONA_HORARIA": ["Marte", "../etc/passwd", "America"],
    "PORT": ["0", "65536", "ocho", "8000.5", "-1"],
    "PUBLIC_URL": ["hilo.example", "https://hilo.example/ruta", "ftp://x", "https://", "https://x?y", "https://a b"],
    "TWILIO_ACCOUNT_SID": ["AC123", "SK" + SID, "AC" + "z" * 32, "AC" + SID + "0"],
    "TWILIO_FROM": ["+14155238886", "whatsapp:14155238886", "whatsapp:+1", "MG1", "MG" + "z" * 32, "sms:+14155238886"],
    "TWILIO_TEMPLATE_SID": ["HX1", "hola"],
    "TWILIO_API_URL": ["localhost:9", "http://x/y"],
    "OPENAI_BASE_URL": ["api.openai.com", "https://"],
    "ASSISTANT_ID": ["../cursos", "cursos.md", "mis cursos", "a/b"],
    "THREADS_INTEGRATION_ENABLED": ["quizá", "2"],
    "THREADS_RUN_TIMEOUT": ["0", "-1", "nan", "inf", "treinta", "99999"],
    "BURST_SECONDS": ["-1", "61", "nan", "1,5"],
    "WORKER_THREADS": ["-1", "257", "4.5", "muchos"],
    "WEB_THREADS": ["0", "1000"],
    "DB_CONNECTIONS": ["0", "101"],
    "LEASE_SECONDS": ["0", "nan", "601"],
    "RETENTION_DAYS": ["-1", "x"],
}


@pytest.mark.parametrize(("name", "given"), [(name, value) for name in BAD for value in BAD[name]])
def test_value_that_cannot_be_used_is_one_line_with_name_value_and_need(name: str, given: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings({name: given, "OPENAI_API_KEY": "sk-muy-secreto"})
    line = str(caught.value)
    assert line.startswith(f"{name}={given!r} cannot be used: it needs ") and "\n" not in line
    assert "secreto" not in line and "pydantic" not in line


@pytest.mark.parametrize(
    ("name", "given"),
    [
        ("OPENAI_API_KEY", "sk-«clave»"), ("OPENAI_API_KEY", "sk uno"), ("TWILIO_AUTH_TOKEN", "ñandú"),
        ("ADMIN_TOKEN", "dos palabras"), ("OPENAI_WEBHOOK_SECRET", "clave"), ("OPENAI_WEBHOOK_SECRET", "whsec_="),
        ("OPENAI_WEBHOOK_SECRET", "whsec_no es base64"), ("OPENAI_WEBHOOK_SECRET", "whsec_abcde"),
    ],
)  # fmt: skip
def test_secret_that_cannot_be_used_is_named_and_not_shown(name: str, given: str) -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings({name: given})
    assert str(caught.value).startswith(f"{name}=(secret) cannot be used: it needs ") and given not in str(caught.value)
    assert name == "OPENAI_WEBHOOK_SECRET" or "ASCII without white space" in str(caught.value)


def test_long_value_is_cut_in_the_line() -> None:
    with pytest.raises(ConfigurationError) as caught:
        load_settings({"PUBLIC_URL": "x" * 5000})
    assert len(str(caught.value)) < 250


def test_every_fault_is_found_and_the_rest_can_be_used() -> None:
    settings, faults = read_settings({"PORT": "x", "BURST_SECONDS": "y", "WORKER_THREADS": "3"})
    assert sorted(fault.split("=")[0] for fault in faults) == ["BURST_SECONDS", "PORT"]
    assert (settings.port, settings.worker_threads) == (8000, 3)


def test_white_space_around_a_value_is_no_part_of_it() -> None:
    settings = load_settings(
        {"OPENAI_API_KEY": " sk-1\n", "TWILIO_AUTH_TOKEN": "token\r\n", "PUBLIC_URL": " https://x.mx\n"}
    )
    assert settings.openai_api_key and settings.openai_api_key.get_secret_value() == "sk-1"
    assert settings.webhook_secret == "token" and settings.origin == "https://x.mx"


def test_empty_variable_is_an_absent_one() -> None:
    assert load_settings({"PORT": "", "PUBLIC_URL": "  "}).port == 8000


def test_env_file_is_read_and_the_process_goes_over_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text('PORT=9001\nBURST_SECONDS="2.5"\n# nota\nMI_VARIABLE=hola\nVACIA\n')
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PORT", "9002")
    settings = load_settings()
    assert (settings.port, settings.burst_seconds, settings.get("MI_VARIABLE")) == (9002, 2.5, "hola")
    assert settings.get("VACIA", "x") == "x" and settings.get("NO_HAY") == ""


@pytest.mark.parametrize(
    ("content", "faults"),
    [
        (b"PORT=9001\nTWILIO_AUTH_TOKEN='abc\n", [".env line 2 cannot be read: it needs NAME=value"]),
        (b"PORT=9001\r\nNOTA='a\r\nb'\r\n=secreto\r\n", [".env line 4 cannot be read: it needs NAME=value"]),
        (b"PORT=9001\nX=secreto\xff\n", [".env line 2 cannot be read: it needs to be UTF-8"]),
        ("\ufeffPORT=9001\n".encode(), []),
    ],
    ids=["a quote without its end", "no name", "not UTF-8", "a mark at its beginning"],
)
def test_line_of_the_env_file_that_cannot_be_used_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes, faults: list[str]
) -> None:
    (tmp_path / ".env").write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert read_environment()[0]["PORT"] == "9001"
    with contextlib.closing(checks.Checks(offline=True)) as check:
        assert [found.text for found in check.variables() if found.status == "fault"] == faults
    if faults:
        with pytest.raises(ConfigurationError, match=faults[0]):
            load_settings()
    else:
        assert load_settings().port == 9001


def test_settings_never_show_a_secret() -> None:
    secrets = {"OPENAI_API_KEY": "sk-secreto-1", "TWILIO_AUTH_TOKEN": "secreto-2", "ADMIN_TOKEN": "secreto-3",
               "DATABASE_URL": "postgresql://u:secreto-4@h/d"}  # fmt: skip
    settings = load_settings(secrets)
    assert "secreto" not in repr(settings) + str(settings) + settings.model_dump_json()
    assert sorted(settings.secrets()) == sorted(secrets.values())


def test_webhook_secret_is_the_token_unless_it_is_given() -> None:
    assert load_settings({"TWILIO_AUTH_TOKEN": "t"}).webhook_secret == "t"
    assert load_settings({"TWILIO_AUTH_TOKEN": "t", "TWILIO_WEBHOOK_SECRET": "s"}).webhook_secret == "s"
    assert load_settings({}).webhook_secret is None


# --- Assistants -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "ends"), [("asst_abc123", "2026-08-26"), ("pmpt_abc123", "2026-11-30")])
def test_id_of_an_api_that_ended_starts_and_says_how_to_move(
    caplog: pytest.LogCaptureFixture, name: str, ends: str
) -> None:
    gateway.check_assistant(load_settings({"ASSISTANT_ID": name}))
    (line,) = [message for message in caplog.messages if name in message]
    assert ends in line and "assistants/NAME.md" in line and "ASSISTANT_ID=NAME" in line


def test_assistant_that_is_not_there_stops_the_start_and_names_those_that_are() -> None:
    with pytest.raises(ConfigurationError, match=r"ASSISTANT_ID='ventas' .*assistants/ventas.md: no such file.*cursos"):
        gateway.check_assistant(load_settings({"ASSISTANT_ID": "ventas"}))


def test_front_matter_sets_model_tools_and_stores(tmp_path: Path) -> None:
    (tmp_path / "ventas.md").write_text(
        "---\nmodel: gpt-6-sol\nreasoning_effort: none\ntools: [buscar_curso]\nvector_stores: [vs_1]\n---\n\nVende.\n"
    )
    (tmp_path / "simple.md").write_text("Ayuda.")
    good, bad = load_assistants(tmp_path)
    assert bad == {} and good["simple"].tools is None and good["simple"].model == "gpt-6-luna"
    sales = good["ventas"]
    assert (sales.model, sales.reasoning_effort, sales.tools, sales.vector_stores) == (
        "gpt-6-sol", "none", ("buscar_curso",), ("vs_1",),
    )  # fmt: skip
    assert sales.instructions == "Vende." and sales.name == "ventas"


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (b"---\nmodelo: x\n---\nHola", "modelo"),
        (b"---\nreasoning_effort: enorme\n---\nHola", "reasoning_effort"),
        (b"---\ntools: buscar_curso\n---\nHola", "tools"),
        (b"---\ntools:\n---\nHola", "tools: Value error, write [] for none"),
        (b"---\nmax_results: 99\n---\nHola", "max_results"),
        (b"---\nmodel: [\n---\nHola", "line 3"),
        (b"---\nmodel: gpt-6-luna\n---\n", "instructions"),
        (b"", "instructions"),
        (b"\xff\xfe", "utf-8"),
    ],
)
def test_assistant_that_cannot_be_used_is_named_with_the_reason(tmp_path: Path, text: bytes, why: str) -> None:
    (tmp_path / "malo.md").write_bytes(text)
    (tmp_path / "bueno.md").write_text("Ayuda.")
    good, bad = load_assistants(tmp_path)
    assert list(good) == ["bueno"] and list(bad) == ["malo.md"]
    assert why in bad["malo.md"] and "\n" not in bad["malo.md"]


# --- The log ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "masked"),
    [
        ("whatsapp:+5215512341234", "whatsapp:+52…1234"),
        ("whatsapp:MX.maria2026", "whatsapp:MX.…2026"),
        ("+5215512341234", "+52…1234"),
        ("whatsapp:MX.a", "whatsapp:…"),
        ("", "…"),
    ],
)
def test_address_is_masked(address: str, masked: str) -> None:
    assert mask(address) == masked


@pytest.mark.parametrize(
    "text",
    [
        "de whatsapp:+5215512341234 llegó", "To=whatsapp%3A%2B5215512341234&x=1", "llamó +5215512341234.",
        "('whatsapp:+5215512341234',)", "whatsapp:MX.maria5512341234",
    ],
)  # fmt: skip
def test_address_that_slipped_into_a_line_is_masked(text: str) -> None:
    record = logging.LogRecord("hilo", logging.INFO, "", 0, "%s", (text,), None)
    line = LogFormat().format(record)
    assert "551234" not in line and "…1234" in line


def test_secret_that_slipped_into_a_line_or_a_traceback_is_masked() -> None:
    settings = load_settings({"OPENAI_API_KEY": "sk-secreto-1", "DATABASE_URL": "postgresql://u:clave@h/d"})
    try:
        raise RuntimeError("Bearer sk-secreto-1 at postgresql://u:clave@h/d")
    except RuntimeError:
        record = logging.LogRecord("hilo", logging.ERROR, "", 0, "falló", (), sys.exc_info())
    line = LogFormat(settings.secrets()).format(record)
    assert "sk-secreto-1" not in line and "clave" not in line and "(secret)" in line


def test_record_is_one_line_whatever_is_in_it() -> None:
    try:
        raise RuntimeError("una\nque sigue")
    except RuntimeError:
        record = logging.LogRecord("hilo", logging.ERROR, "", 0, "%s", ("dos\r\nlíneas\u2028tres",), sys.exc_info())
    line = LogFormat().format(record)
    assert len(line.splitlines()) == 1 and "dos ⏎ líneas ⏎ tres ⏎ Traceback" in line and line.endswith("que sigue")


def test_log_level_that_is_none_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigurationError, match=r"^LOG_LEVEL='RUIDOSO' cannot be used: it needs DEBUG, INFO"):
        start_log(load_settings({"LOG_LEVEL": "ruidoso"}))


# --- The start of a process -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "line"),
    [
        ({"PORT": "ocho"}, "PORT='ocho' cannot be used: it needs a port number from 1 to 65535\n"),
        (
            {"DATABASE_URL": "mysql://u:clave-secreta@h/d"},
            "DATABASE_URL=(secret) cannot be used: it needs postgresql://…/database\n",
        ),
    ],
)
def test_start_with_a_bad_setting_ends_with_one_line(tmp_path: Path, variables: dict[str, str], line: str) -> None:
    assert ended(tmp_path, "migrate", variables) == (1, "", line)


def test_worker_without_a_thread_to_work_with_ends_with_one_line(tmp_path: Path) -> None:
    line = "WORKER_THREADS=0 cannot be used: it needs 1 or more for the command worker\n"
    assert ended(tmp_path, "worker", {"WORKER_THREADS": "0"}) == (1, "", line)


def test_serve_on_a_port_that_is_taken_ends_with_one_line(tmp_path: Path, database_url: str) -> None:
    with socket.create_server(("0.0.0.0", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, errors = ended(tmp_path, "serve", {"PORT": str(port), "DATABASE_URL": database_url})
    assert (code, errors) == (1, f"PORT={port} cannot be used: Address already in use\n")


def ended(directory: Path, command: str, variables: dict[str, str]) -> tuple[int, str, str]:
    """Return how a command ended, and what it printed on stdout and stderr."""
    env = {name: value for name, value in os.environ.items() if not name.startswith(("TWILIO_", "OPENAI_"))} | variables
    arguments = [sys.executable, str(ROOT / "gateway.py"), command]
    process = subprocess.run(arguments, env=env, cwd=directory, capture_output=True, text=True, timeout=60)
    return process.returncode, process.stdout, process.stderr
