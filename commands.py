"""What an operator types: `python gateway.py COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any

import gateway
import localdb
from database import DatabaseDown, DatabaseFault, migrate
from settings import ConfigurationError, Settings, load_settings, start_log


def main(arguments: list[str]) -> int:
    """Carry out one command; returns the exit code. What cannot be used is one line on stderr and exit 1."""
    options = parser().parse_args(arguments or ["serve"])
    try:
        return COMMANDS[options.command][1](options)
    except (ConfigurationError, localdb.LocalDatabaseError) as error:
        print(error, file=sys.stderr)
    except (DatabaseDown, DatabaseFault) as error:
        print(f"database: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        return 130
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


def chat(options: argparse.Namespace) -> int:
    """Talk to Hilo in this terminal, over a local Twilio and the embedded database; nothing real is touched."""
    import trial

    return trial.chat(options)


COMMANDS: dict[str, tuple[str, Callable[[argparse.Namespace], int]]] = {
    "serve": ("web and workers in one process (the default)", serve),
    "worker": ("workers only; any number share one database", worker),
    "migrate": ("apply schema.sql where it is missing or old", migrate_command),
    "chat": ("talk to Hilo in the terminal; touches nothing real", chat),
}

ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "chat": {"--log": {"action": "store_true", "help": "show the gateway's log too"}},
}
