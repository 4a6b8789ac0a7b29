"""`python gateway.py demo`: the page, the gateway behind it, and what happens to that."""

from __future__ import annotations

import os
import secrets
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped]
import pytest
import requests

import localdb
from tests.conftest import wait_for
from tests.local_openai import LocalOpenAI, calls, says, script
from tests.test_chat import PRODUCTION, read_until, servers

PROJECT = Path(localdb.__file__).parent
ANA = "whatsapp:+5215512345671"
BROKEN = "from tools import hookimpl\n\n\nraise RuntimeError('falta la clave')\n"
TOOL = '''from tools import hookimpl


def hora() -> str:
    """Dice la hora."""
    return "las diez"


@hookimpl
def register_tools(register):
    register(hora)
'''


class Demo:
    """A demo that runs, as its page sees it."""

    def __init__(self, process: subprocess.Popen[str]):
        self.process = process
        line = read_until(process, "✅ Hilo demo: ").splitlines()[-1]
        self.page = line.partition(": ")[2].strip()

    def get(self, path: str, **query: str) -> Any:
        return requests.get(f"{self.page}api/{path}", query, timeout=20).json()

    def post(self, path: str, **body: Any) -> Any:
        origin = self.page.removesuffix("/chat/")
        answer = requests.post(f"{self.page}api/{path}", json=body, headers={"Origin": origin}, timeout=20)
        assert answer.status_code == 200, answer.text
        return answer.json()

    def write(self, text: str) -> None:
        """Have Ana send a message."""
        assert self.post("send", address=ANA, text=text, sid=f"SM{secrets.token_hex(16)}")["status"] == 200

    def replies(self) -> list[str]:
        """Return what was sent to Ana so far."""
        messages = self.get("conversation", address=ANA)["messages"]
        return [message["text"] for message in messages if message["by"] == "hilo"]

    def inspect(self) -> Any:
        return self.get("inspect", address=ANA)

    def plugin(self, file: str) -> Any:
        """Return what the side pane says of a plugin file, None where it says nothing."""
        return next((plugin for plugin in self.inspect()["plugins"] if plugin["file"] == file), None)


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the project, so that its tools may be changed."""
    copy = tmp_path_factory.mktemp("demo") / "hilo"
    for name in ("tools", "assistants", "page"):
        shutil.copytree(PROJECT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__"))
    for path in (*PROJECT.glob("*.py"), *PROJECT.glob("*.sql")):
        shutil.copy(path, copy)
    (copy / ".env").write_text(PRODUCTION)
    return copy


@pytest.fixture
def demo(project: Path) -> Iterator[Callable[..., Demo]]:
    started: list[Demo] = []

    def starter(**variables: str) -> Demo:
        command = [sys.executable, "gateway.py", "demo", "--port", "0"]
        process = subprocess.Popen(
            command, cwd=project, env=os.environ | variables, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        started.append(Demo(process))
        return started[-1]

    yield starter
    for one in started:
        one.process.kill()
        one.process.communicate()


def test_demo_answers_on_its_page_reloads_tools_and_outlives_a_kill(
    demo: Callable[..., Demo], project: Path, openai_server: LocalOpenAI
) -> None:
    openai_server.model = says("¡Hola, Ana!")
    one = demo(OPENAI_API_KEY="sk-local", OPENAI_BASE_URL=openai_server.url, BURST_SECONDS="0")
    one.write("hola")
    assert wait_for(one.replies) == ["¡Hola, Ana!"]
    run = wait_for(lambda: next((run for run in one.inspect()["runs"] if run["state"] == "done"), None))
    assert (run["outcome"], run["assistant"], run["thread_id"][:5]) == ("answered", "cursos", "conv_")

    file = project / "tools" / "reloj.py"
    file.write_text(BROKEN)
    error = wait_for(lambda: (one.plugin("tools/reloj.py") or {}).get("error"), 20)
    assert error == "reloj.py:4: RuntimeError: falta la clave"
    file.write_text(TOOL)
    wait_for(lambda: (one.plugin("tools/reloj.py") or {}).get("tools") == ["hora"], 20)

    openai_server.model = script([calls(("hora", {})), says("Son las diez.")])
    assert "kill -9" in one.post("action", name="Matar el gateway (kill -9)")["text"]
    one.write("¿qué hora es?")
    assert wait_for(lambda: one.replies()[1:], 20) == ["Son las diez."]
    assert one.inspect()["runs"][0]["calls"][0]["output"] == "las diez"

    one.post("switch", key="openai_down", state="always")
    one.write("quiero un curso de excel")
    assert "EXC-101" in wait_for(lambda: one.replies()[2:], 20)[0]
    one.process.send_signal(signal.SIGTERM)
    _, errors = one.process.communicate(timeout=20)
    assert one.process.returncode == 0 and "Traceback" not in errors
    assert servers(project) == []
    made = {path.name for path in project.iterdir() if not (PROJECT / path.name).exists()}
    assert made <= {".data", ".env", "__pycache__"}


def test_file_that_keeps_the_gateway_from_starting_is_shown_while_the_former_one_answers(
    demo: Callable[..., Demo], project: Path
) -> None:
    one = demo(BURST_SECONDS="0")

    def told(file: str, text: str) -> Any:
        plugins = one.inspect()["plugins"]
        return next((each for each in plugins if file in each["file"] and text in (each["error"] or "")), None)

    tool, texts = project / "tools" / "lento.py", project / "tools" / "textos.toml"
    tool.write_text("import time\n\nwhile True:\n    time.sleep(1)\n")
    wait_for(lambda: told("tools/lento.py", "No arranca: tools/lento.py:4: tarda más de 6 s en cargar"), 40)
    one.write("quiero un curso de excel")
    assert "EXC-101" in wait_for(one.replies, 20)[0]
    tool.write_text("import os\n\nos._exit(3)\n")
    wait_for(lambda: told("tools/lento.py", "No arranca: terminó con el código 3: no dijo nada"), 40)
    tool.unlink()
    good = texts.read_text()
    texts.write_text(good + "\n[roto\n")
    wait_for(lambda: told("tools/textos.toml", "No arranca: tools._textos.TextosError: "), 40)
    texts.write_text(good)
    (project / "assistants" / "roto.md").write_text("---\nmodel: [\n---\nHola")
    wait_for(lambda: told("assistants/roto.md", "line"), 40)
    assert told("tools/textos.toml", "") is None
    (project / "assistants" / "roto.md").unlink()
    one.process.send_signal(signal.SIGTERM)
    assert one.process.wait(20) == 0


def test_demo_that_is_killed_takes_its_gateway_along(demo: Callable[..., Demo], project: Path) -> None:
    one = demo()
    family = psutil.Process(one.process.pid).children()
    gateways = [child for child in family if child.name() != "postgres"]
    assert len(gateways) == 1
    one.process.kill()
    wait_for(lambda: not gateways[0].is_running() or gateways[0].status() == psutil.STATUS_ZOMBIE)
    localdb.start(project / ".data").stop()  # attaches to the server that was left, and ends it
    wait_for(lambda: not servers(project))
