"""`python gateway.py chat`: a conversation in the terminal, over the wire that production uses."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest

import trial
from database import Database
from localdb import start
from tests.conftest import wait_for
from tests.local_openai import LocalOpenAI, says

GATEWAY = Path(trial.__file__).with_name("gateway.py")
# What a production `.env` has, unusable here on purpose: nothing of it may be looked at.
PRODUCTION = """
DATABASE_URL=mysql://nowhere
PUBLIC_URL=not an address
PORT=none
TWILIO_ACCOUNT_SID=ACreal
TWILIO_AUTH_TOKEN=real-token
TWILIO_FROM=real
WORKER_THREADS=0
"""


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory whose local database the tests of this file share."""
    path = tmp_path_factory.mktemp("chat")
    (path / ".env").write_text(PRODUCTION)
    return path


@pytest.fixture
def chat(directory: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `chat` with pipes, and some variables."""
    started: list[tuple[subprocess.Popen[str], threading.Timer]] = []

    def starter(*arguments: str, **variables: str) -> subprocess.Popen[str]:
        command = [sys.executable, str(GATEWAY), "chat", *arguments]
        pipe = subprocess.PIPE
        process = subprocess.Popen(
            command, cwd=directory, env=os.environ | variables, stdin=pipe, stdout=pipe, stderr=pipe, text=True
        )
        limit = threading.Timer(60, process.kill)  # a test that waits for a line would wait for ever
        limit.start()
        started.append((process, limit))
        return process

    yield starter
    for process, limit in started:
        limit.cancel()
        process.kill()
        process.communicate()


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Return what a process prints up to the line that has a text."""
    assert process.stdout
    lines = []
    for line in process.stdout:
        lines.append(line)
        if text in line:
            return "".join(lines)
    raise AssertionError(f"no {text!r} in {''.join(lines)!r}; stderr: {process.stderr and process.stderr.read()}")


def write(process: subprocess.Popen[str], line: str) -> None:
    assert process.stdin
    process.stdin.write(line + "\n")
    process.stdin.flush()


def servers(directory: Path) -> list[Any]:
    """Return the processes that have to do with a directory."""
    found = (p.info for p in psutil.process_iter(["pid", "cmdline"]))
    return [info for info in found if any(str(directory) in word for word in info["cmdline"] or ())]


def test_chat_by_a_pipe_prints_each_answer_before_it_reads_on(
    chat: Callable[..., subprocess.Popen[str]], directory: Path
) -> None:
    process = chat()
    assert process.stdin
    assert "flujo tradicional (sin OPENAI_API_KEY)" in read_until(process, "Escribe")
    write(process, "hola")
    assert "tú>   hola" in read_until(process, "hilo> ¡Hola")
    os.write(process.stdin.fileno(), b"\xff quiero un curso de excel\n")  # a byte that is no text ends nothing
    output, errors = process.communicate()
    assert "EXC-101" in output
    assert (process.returncode, errors) == (0, "")
    assert servers(directory) == []


def test_chat_with_a_key_talks_to_the_assistant_until_sigterm(
    chat: Callable[..., subprocess.Popen[str]], directory: Path, openai_server: LocalOpenAI
) -> None:
    openai_server.model = says("Tenemos Excel básico.")
    process = chat("--log", OPENAI_API_KEY="sk-local", OPENAI_BASE_URL=openai_server.url, LOG_LEVEL="DEBUG")
    assert "asistente cursos (gpt-6" in read_until(process, "Escribe")
    write(process, "¿hay excel?")
    read_until(process, "hilo> Tenemos Excel básico.")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == 0
    assert "🧵 Thread ID: conv_" in errors and "Traceback" not in errors
    assert servers(directory) == []
    assert {path.name for path in directory.iterdir()} == {".env", ".data"}


def test_trial_database_is_a_copy_without_users_and_what_was_killed_is_removed(
    directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(directory)
    with start(trial.DIRECTORY) as server:
        trial.migrate(server.url)
        local = Database(server.url, 1)
        local.rows("CREATE TABLE pedidos AS SELECT 7 AS numero")
        local.rows("INSERT INTO users (user_phone, reply_to) VALUES ('whatsapp:+5215511110001', '')")
        local.rows("INSERT INTO runs (user_phone, due_at) VALUES ('whatsapp:+5215511110001', now())")
        local.rows("CREATE DATABASE trial_killed")
        local.close()
        with trial.trial_database() as url:
            copy = Database(url, 1)
            assert copy.rows("SELECT numero, (SELECT count(*) FROM users) AS users FROM pedidos") == [
                {"numero": 7, "users": 0}
            ]
            assert copy.rows("SELECT count(*) > 30 AS full FROM cursos") == [{"full": True}]
            names = copy.rows("SELECT datname FROM pg_database WHERE datname LIKE 'trial%'")
            assert [row["datname"] for row in names] == [url.partition("?")[0].rpartition("/")[2]]
            copy.close()


def test_trial_database_beside_others_who_use_theirs_has_the_sample_at_once(
    directory: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(directory)
    with start(trial.DIRECTORY) as server, trial.connect(server.url) as local:
        local.run("CREATE DATABASE trial_used")
        began = time.monotonic()
        with trial.connect(trial.named(server.url, "trial_used")), trial.trial_database() as url:
            with trial.connect(url) as connection:
                sample = connection.run("SELECT count(*) > 30, to_regclass('pedidos') IS NULL FROM cursos")
        assert sample == [[True, True]]
        assert time.monotonic() - began < 10  # PostgreSQL waits 5 s for those who use a database, each time it is told
        local.run("DROP DATABASE trial_used")
    assert "catálogo de ejemplo" in capsys.readouterr().out


def test_database_of_a_chat_stopped_while_it_waits_for_its_turn_is_not_left_behind(
    chat: Callable[..., subprocess.Popen[str]], directory: Path
) -> None:
    with start(directory / trial.DIRECTORY) as server, trial.connect(trial.named(server.url, "postgres")) as other:
        other.run("SELECT pg_advisory_lock(:lock)", lock=trial.MAKING)
        process = chat()
        waits = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"
        wait_for(lambda: other.run(waits) == [[1]], 30)
        process.send_signal(signal.SIGTERM)
        other.run("SELECT pg_advisory_unlock(:lock)", lock=trial.MAKING)
        _, errors = process.communicate(timeout=20)
        assert (process.returncode, errors) == (0, "")
        assert other.run("SELECT datname FROM pg_database WHERE starts_with(datname, 'trial_')") == []


SWALLOWED = """
import os, signal, time, weakref
import trial

class Thing: pass

def kill(_):
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.01)

with trial.until_stopped() as stack:
    stack.callback(print, "cleared up")
    thing = Thing()
    reference = weakref.ref(thing, kill)
    del thing  # Python drops what the callback raises
    for _ in range(100):
        time.sleep(0.1)
    print("not heard")
"""


def test_signal_that_python_drops_in_a_callback_still_ends_the_process() -> None:
    command = [sys.executable, "-c", SWALLOWED]
    done = subprocess.run(command, cwd=GATEWAY.parent, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "cleared up\n", "")


@pytest.mark.parametrize("command", ["chat", "serve", "worker", ""])
def test_signal_before_anything_has_begun_ends_the_process_in_good_order(directory: Path, command: str) -> None:
    for number in (signal.SIGTERM, signal.SIGINT, *([signal.SIGHUP] if command == "chat" else [])):
        process = subprocess.Popen(
            [sys.executable, "-X", "importtime", str(GATEWAY), *command.split()], cwd=directory, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        assert process.stderr
        next(line for line in process.stderr if line.endswith("| bottle\n"))
        process.send_signal(number)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 0 and "Traceback" not in errors
