"""What README.md and .env.example say is what the code does: tables, commands, and the tool that the README shows."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import itertools
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

import tools
from commands import ARGUMENTS, COMMANDS
from database import HERE
from settings import variables
from simulator import Simulator
from tests.conftest import Hilo
from tests.local_openai import LocalOpenAI, calls, says, script
from tools import Context, ToolError
from tools._plugins import Plugins

README = (HERE / "README.md").read_text("utf-8")


# --- What the texts say -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """A setting in .env.example: its line, and the one above."""

    name: str
    default: str
    text: str
    shown: bool  # to be filled in; else the default stands behind a #


def env_example() -> list[Entry]:
    """Return the settings of .env.example; each has one line of text right above it."""
    lines = (HERE / ".env.example").read_text("utf-8").splitlines()
    entries = []
    for above, line in itertools.pairwise(lines):
        if found := re.fullmatch(r"(# )?([A-Z_]+)=(.*)", line):
            assert re.match(r"# .*[a-z]", above), f"{found[2]} has no line of text above it"
            entries.append(Entry(found[2], found[3], above.removeprefix("# "), not found[1]))
    return entries


def table(heading: str) -> list[list[str]]:
    """Return the cells of the table under a heading of the README, without its head."""
    section = README.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line.startswith("|")]
    return [[cell.strip().replace("\\|", "|") for cell in row] for row in rows[2:]]


def blocks(language: str) -> list[str]:
    """Return the README's blocks of code in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.MULTILINE | re.DOTALL)


def commands_shown() -> set[str]:
    """Return every command that the README shows, in a block or within a sentence."""
    spoken = re.findall(r"`((?:python|pip|psql|pytest)\b[^`\n]*)`", README)
    return {*"".join(blocks("bash")).splitlines(), *(command for command in spoken if "COMMAND" not in command)}


# --- Tables -----------------------------------------------------------------------------------------------


def plugin_variables() -> dict[str, str | None]:
    """Return the variables that plugins read for themselves, with a default that stands beside the name."""
    found: dict[str, str | None] = {}
    for path in sorted((HERE / "tools").glob("[!_]*.py")):
        for call in (node for node in ast.walk(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.Call)):
            texts = [a.value for a in call.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            if texts and re.fullmatch(r"(?!HTTP_)[A-Z]+(_[A-Z]+)*", texts[0]) and len(texts[0]) > 5:
                found[texts[0]] = found.get(texts[0]) or (texts[1] if len(texts) > 1 else None)
    return {name: default for name, default in found.items() if name not in variables()}


def test_plugins_declare_the_variables_that_they_read() -> None:
    assert set(Plugins().variables()) == set(plugin_variables())


def shown_default(value: Any) -> str:
    """Return a setting's default as one writes it into the environment."""
    return "" if value is None else str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(
        value, float) else str(value)  # fmt: skip


def test_env_example_has_every_setting_once_with_the_defaults_of_the_code() -> None:
    entries = env_example()
    assert len({entry.name for entry in entries}) == len(entries)
    defaults = {name: shown_default(info.default) for name, info in variables().items()}
    assert {entry.name for entry in entries} == {*defaults, *plugin_variables(), "LOG_LEVEL"}
    known = defaults | {name: default for name, default in plugin_variables().items() if default}
    said = {entry.name: entry.default for entry in entries if not entry.shown and entry.name in known}
    assert said == {name: known[name] for name in said}


def test_readme_lists_the_settings_as_env_example_does() -> None:
    entries = [(entry.name, "" if entry.shown else entry.default, entry.text) for entry in env_example()]
    assert [(row[0].strip("`"), row[1].strip("`"), row[2]) for row in table("Settings")] == entries


def usage(name: str) -> str:
    """Return a command with its arguments: `runs [ADDRESS|ID] [--text]`."""
    words = [name]
    for argument, properties in ARGUMENTS.get(name, {}).items():
        if argument.startswith("-"):
            value = "" if properties.get("action") == "store_true" else f" {argument.strip('-').upper()}"
            words.append(f"[{argument}{value}]")
        else:
            shown = properties.get("metavar", argument)
            words.append(f"[{shown}]" if properties.get("nargs") == "?" else shown)
    return " ".join(words)


def test_readme_lists_the_commands_of_the_code() -> None:
    assert table("Commands") == [[f"`{usage(name)}`", summary] for name, (summary, _) in COMMANDS.items()]


def test_readme_lists_the_hooks_of_the_contract() -> None:
    hooks = {name: value for name, value in vars(tools.Hooks).items() if inspect.isfunction(value)}
    signatures = [f"`{name}({', '.join(list(inspect.signature(f).parameters)[1:])})`" for name, f in hooks.items()]
    assert [row[0] for row in table("Hooks")] == signatures
    assert all(len(row) == 2 and len(row[1]) > 10 for row in table("Hooks"))


def test_readme_points_at_files_that_exist() -> None:
    links = re.findall(r"\]\((?!http)([^)]+)\)", README)
    named = re.findall(r"`((?:tools|assistants|page|tests)/[\w./-]+|[\w.-]+\.(?:py|sql|txt|md|example))`", README)
    missing = {name for name in [*links, *named] if not (HERE / name).exists()} - {"tools/horario.py", ".env"}
    assert not missing and links


# --- The tool ---------------------------------------------------------------------------------------------


def readme_tool(directory: Path) -> Path:
    """Write the README's tool to the file that it names there; return its path."""
    [code] = blocks("python")
    [name] = re.findall(r"Drop this into `(tools/\w+\.py)`", README)
    path = directory / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(code, "utf-8")
    return path


def loaded(path: Path) -> types.ModuleType:
    """Return a file as a module."""
    spec = importlib.util.spec_from_file_location(f"readme_{path.stem}", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tool_of_the_readme_is_a_plugin_that_can_be_called(tmp_path: Path) -> None:
    path = readme_tool(tmp_path)
    plugins = Plugins([])
    plugins.load("readme", lambda: loaded(path), "tools/horario.py")
    assert plugins.reports["readme"].error is None and plugins.reports["readme"].tools == ["horario"]
    tool = plugins.tools["horario"]
    assert tool.call('{"sucursal": "Centro"}', Context()) == "9:00 a 19:00"
    with pytest.raises(ToolError, match="no hay esa sucursal; hay centro, norte"):
        tool.call('{"sucursal": "sur"}', Context())


def test_tool_of_the_readme_is_called_by_the_assistant(
    hilo: Hilo, openai_server: LocalOpenAI, twilio: Simulator, tmp_path: Path
) -> None:
    module = loaded(readme_tool(tmp_path))
    openai_server.model = script([calls(("horario", {"sucursal": "norte"})), says("De 10 a 18.")])
    hilo.plug(register_tools=module.register_tools)
    twilio.receive("whatsapp:+5215511110001", "¿a qué hora abre norte?")
    hilo.done(1)
    [call] = hilo.rows("SELECT name, output, ok FROM tool_calls")
    assert call == {"name": "horario", "output": "10:00 a 18:00", "ok": True}


# --- Commands ---------------------------------------------------------------------------------------------


@dataclass
class Shell:
    """Runs the README's commands as they stand, in a copy of the project, without settings."""

    directory: Path

    def start(self, command: str, **more: Any) -> subprocess.Popen[str]:
        """Start a command; what it prints comes by its stdout."""
        words = shlex.split(command)
        program = [sys.executable] if words[0] == "python" else [sys.executable, "-m", words[0]]
        environ = {name: os.environ[name] for name in ("PATH", "HOME", "TMPDIR", "LANG") if name in os.environ}
        return subprocess.Popen(
            [*program, *words[1:]], cwd=self.directory, env=environ | {"PYTHONDONTWRITEBYTECODE": "1"},
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **more,
        )  # fmt: skip

    def run(self, command: str, typed: str = "") -> tuple[int, str]:
        """Return the exit code of a command that ends by itself, and what it printed."""
        process = self.start(command, stdin=subprocess.PIPE)
        output, _ = process.communicate(typed, timeout=120)
        return process.returncode, output


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """A copy of the project without what a developer may keep beside it, and no settings."""
    beside = shutil.ignore_patterns(".*cache", ".git", ".data", ".env", ".venv", "venv", ".hypothesis", "__pycache__")
    return Shell(shutil.copytree(HERE, tmp_path / "hilo", ignore=beside))


def pip_install(shell: Shell) -> None:
    """What is wanted can be had together, and is what these tests run with."""
    if importlib.util.find_spec("pip") is None:
        pytest.skip("there is no pip here")
    code, output = shell.run("pip install -r requirements.txt --no-index --disable-pip-version-check --dry-run")
    assert code == 0 and "Would install" not in output, output


def demo(shell: Shell) -> None:
    """It prints what the README says it does, but for the port."""
    expected = re.sub(r":\d+/", ":PORT/", blocks("text")[0])
    process = shell.start("python gateway.py demo")
    assert process.stdout
    try:
        printed = "".join(process.stdout.readline() for _ in expected.splitlines())
        process.send_signal(signal.SIGTERM)
        rest = process.stdout.read()
        assert (process.wait(30), rest) == (0, "")
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert re.sub(r":\d+/", ":PORT/", printed) == expected


def chat(shell: Shell) -> None:
    """A line typed there is answered from the sample catalogue."""
    code, output = shell.run("python gateway.py chat", "hola, ¿qué cursos de Excel tienen?\n")
    assert code == 0 and re.search(r"hilo>.*Excel", output, re.DOTALL), output


def list_tools(shell: Shell) -> None:
    """It lists the README's tool once that is there, and says why a file was not loaded."""
    readme_tool(shell.directory)
    code, output = shell.run("python gateway.py tools")
    assert code == 0 and "horario(sucursal: string)" in output, output
    (shell.directory / "tools" / "roto.py").write_text("from tools import nada\n")
    code, output = shell.run("python gateway.py tools")
    assert code == 1 and "tools/roto.py" in output and "horario(sucursal: string)" in output, output


def load_catalogue(shell: Shell) -> None:
    """A catalogue in the form of the sample is loaded."""
    shutil.copy(shell.directory / "tools" / "cursos.csv", shell.directory / "catalogo.csv")
    code, output = shell.run("python gateway.py migrate")
    assert code == 0 and output == "schema applied\n"
    code, output = shell.run("python -m tools.cursos catalogo.csv")
    assert code == 0, output


def check(shell: Shell) -> None:
    """Without settings it says what is missing and what to do."""
    code, output = shell.run("python gateway.py check")
    assert code == 1 and "TWILIO_AUTH_TOKEN" in output and "PUBLIC_URL" in output, output


def run_tests(shell: Shell) -> None:
    """It finds the tests, this one too; to run them here would have no end."""
    code, output = shell.run("pytest --collect-only tests/test_docs.py")
    assert code == 0 and "test_command_of_the_readme_does_what_it_says" in output, output


RUN: dict[str, Callable[[Shell], None]] = {
    "pip install -r requirements.txt": pip_install,
    "python gateway.py demo": demo,
    "python gateway.py chat": chat,
    "python gateway.py tools": list_tools,
    "python gateway.py check": check,
    "python -m tools.cursos catalogo.csv": load_catalogue,
    "pytest": run_tests,
}


def test_every_command_of_the_readme_is_run_here() -> None:
    assert commands_shown() == set(RUN)


@pytest.mark.parametrize("command", RUN)
def test_command_of_the_readme_does_what_it_says(command: str, shell: Shell) -> None:
    RUN[command](shell)
