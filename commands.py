"""What an operator types: `python gateway.py COMMAND`."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import sys
import textwrap
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import gateway
import localdb
from database import Database, DatabaseDown, DatabaseFault, migrate
from reports import NotFound
from settings import ConfigurationError, Settings, load_settings, scrub, start_log
from tools import Tool

DATA = Path(".data")  # where the embedded PostgreSQL is


def main(arguments: list[str]) -> int:
    """Carry out one command; returns the exit code. What cannot be used is one line on stderr and exit 1."""
    options = parser().parse_args(arguments or ["serve"])
    try:
        return COMMANDS[options.command][1](options)
    except (ConfigurationError, NotFound, localdb.LocalDatabaseError) as error:
        print(scrub(str(error)), file=sys.stderr)
    except (DatabaseDown, DatabaseFault) as error:
        print(f"database: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read on, as `head`, has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 1


def parser() -> argparse.ArgumentParser:
    """Return what understands the command line."""
    top = argparse.ArgumentParser(
        prog="python gateway.py", description="Hilo answers WhatsApp messages with an OpenAI assistant.",
        epilog="COMMAND --help tells more. Settings come from the environment and .env; .env.example lists them.",
    )  # fmt: skip
    commands = top.add_subparsers(dest="command", metavar="COMMAND", title="commands")
    for name, (summary, function) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=function.__doc__)
        for argument, properties in ARGUMENTS.get(name, {}).items():
            command.add_argument(argument, **properties)
    return top


def logged_settings() -> Settings:
    """Return the settings of a process that logs to stdout."""
    settings = load_settings()
    start_log(settings)
    return settings


def serve(options: argparse.Namespace) -> int:
    """Web and workers in one process; SIGTERM finishes the steps in hand."""
    return gateway.serve(logged_settings())


def worker(options: argparse.Namespace) -> int:
    """Workers only; SIGTERM finishes the steps in hand."""
    return gateway.serve(logged_settings(), web=False)


def migrate_command(options: argparse.Namespace) -> int:
    """Apply schema.sql where it is missing or old; safe at every release, and from several processes at once."""
    with gateway.database_of(logged_settings()) as url:
        print("schema applied" if migrate(url) else "schema is up to date")
    return 0


def tools(options: argparse.Namespace) -> int:
    """List the tools and hooks of each plugin, and what is wrong with one that cannot be loaded (exit 1)."""
    from tools._plugins import Plugins

    logging.disable()
    plugins = Plugins()
    if options.json:
        print(json.dumps([tool.definition for tool in plugins.tools.values()], ensure_ascii=False, indent=2))
    for report in plugins.reports.values():
        if report.error:
            print(f"❌ {report.file}: {report.error}", file=sys.stderr if options.json else sys.stdout)
        elif not options.json:
            print("\n".join([report.file, *(described(plugins.tools[name]) for name in report.tools)]))
            print(f"  hooks: {', '.join(report.hooks)}\n")
    return 1 if any(report.error for report in plugins.reports.values()) else 0


def described(tool: Tool) -> str:
    """Return a tool's name, parameters (`?`: may be left out), what it is for, and its limits."""
    parameters = []
    for name, schema in tool.parameters["properties"].items():
        kinds = kind(schema).split("|")
        optional = "?" if "null" in kinds else ""
        parameters.append(f"{name}{optional}: {'|'.join(k for k in kinds if k != 'null')}")
    purpose = textwrap.shorten(tool.description.partition("\n\n")[0], 110, placeholder="…")
    effects = "has side effects" if tool.side_effects else "no side effects"
    return f"  {tool.name}({', '.join(parameters)})\n      {purpose}\n      {effects}; {tool.timeout:g} s at most"


def kind(schema: Mapping[str, Any]) -> str:
    """Return a JSON Schema as a few words: `string`, `basico|intermedio|null`, `date[]`."""
    if "anyOf" in schema:
        return "|".join(kind(option) for option in schema["anyOf"])
    if "$ref" in schema:
        return str(schema["$ref"]).rpartition("/")[2]
    if "enum" in schema:
        return "|".join("null" if value is None else str(value) for value in schema["enum"])
    if schema.get("type") == "array":
        return f"{kind(schema['items'])}[]"
    return str(schema.get("format") or schema.get("type") or schema.get("const"))


def check(options: argparse.Namespace) -> int:
    """Check settings, database, plugins, assistants, and, over the network, OpenAI, Twilio and PUBLIC_URL. Says what to
    do about each fault; exit 1 where there is one."""
    import checks

    return 0 if checks.check(options.offline, options.json) else 1


def runs(options: argparse.Namespace) -> int:
    """List the runs that are not done and those that fell back or failed in the last 24 hours; `runs ID` tells one
    run's story step by step, `runs ADDRESS` lists a user's runs."""
    import reports

    with database() as (_, db):
        for line in reports.report(db, options):
            print(line)
    return 0


def forget(options: argparse.Namespace) -> int:
    """Remove what is kept of a user: their rows here, conversations and responses at OpenAI, messages and files at
    Twilio. What cannot be removed is named (exit 1); running it again is safe."""
    from forget import Forgetting, lines

    with database() as (settings, db):
        threads = gateway.ThreadsAdapter(settings, db, {})
        with contextlib.closing(Forgetting(db, settings, threads, options.address)) as forgetting:
            complete = forgetting.carry_out()
            for line in lines(forgetting, options.address):
                print(line)
    return 0 if complete else 1


@contextlib.contextmanager
def database() -> Iterator[tuple[Settings, Database]]:
    """Lend settings and database to a command that prints; raises ConfigurationError where there is no database."""
    settings = load_settings()
    start_log(settings, sys.stderr)
    if not settings.database_url and not (DATA / "postgres").exists():
        raise ConfigurationError("DATABASE_URL is not set, and there is no local database here yet")
    with gateway.database_of(settings) as url:
        db = Database(url, 1)
        try:
            yield settings, db
        finally:
            db.close()


def chat(options: argparse.Namespace) -> int:
    """Talk to Hilo in this terminal, over a local Twilio and the embedded database; nothing real is touched."""
    import trial

    return trial.chat(options)


def demo(options: argparse.Namespace) -> int:
    """Try Hilo in the browser, on a page that looks like WhatsApp, over a local Twilio and the embedded database;
    nothing real is touched. Tools and assistants that are saved are loaded anew."""
    import demo as page

    return page.demo(options)


COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "serve": ("web and workers in one process (the default)", serve),
    "worker": ("workers only; any number share one database", worker),
    "migrate": ("apply schema.sql where it is missing or old", migrate_command),
    "check": ("check everything that Hilo needs, and say what to do about it", check),
    "tools": ("list the plugins' tools and hooks, and what is wrong with them", tools),
    "runs": ("what is not done or failed lately; one run's story; a user's runs", runs),
    "forget": ("remove all that is kept of a user, here, at OpenAI and at Twilio", forget),
    "demo": ("try Hilo in the browser, as a WhatsApp user would; touches nothing real", demo),
    "chat": ("talk to Hilo in the terminal; touches nothing real", chat),
}

ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "check": {
        "--offline": {"action": "store_true", "help": "do not ask OpenAI, Twilio and PUBLIC_URL"},
        "--json": {"action": "store_true", "help": "print JSON"},
    },
    "tools": {"--json": {"action": "store_true", "help": "the schemas, as the model gets them"}},
    "runs": {
        "what": {"nargs": "?", "metavar": "ADDRESS|ID", "help": "a user's address (whatsapp:+52…), or a run's id"},
        "--text": {"action": "store_true", "help": "show what was said, too"},
    },
    "forget": {"address": {"metavar": "ADDRESS", "help": "whatsapp:+52…, or an external user id"}},
    "demo": {
        "--log": {"action": "store_true", "help": "show the gateway's log"},
        "--port": {"type": int, "help": "the page's port (8001, or any free one)"},
    },
    "chat": {"--log": {"action": "store_true", "help": "show the gateway's log too"}},
}
