"""What an operator types: `python gateway.py COMMAND`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import gateway
from database import DatabaseDown, DatabaseFault, migrate
from settings import ConfigurationError, Settings, load_settings, start_log


def main(arguments: list[str]) -> int:
    """Carry out one command; returns the exit code. What cannot be used is one line on stderr and exit 1."""
    parser = argparse.ArgumentParser(prog="python gateway.py", description="Hilo answers WhatsApp with an OpenAI assistant.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND")
    for name, (summary, _) in COMMANDS.items():
        commands.add_parser(name, help=summary)
    options = parser.parse_args(arguments or ["serve"])
    try:
        settings = load_settings()
        start_log(settings)
        return COMMANDS[options.command][1](settings, options)
    except ConfigurationError as error:
        print(error, file=sys.stderr)
    except (DatabaseDown, DatabaseFault) as error:
        print(f"database: {error}", file=sys.stderr)
    return 1


def serve(settings: Settings, options: argparse.Namespace) -> int:
    """Web and workers in one process."""
    return gateway.serve(settings)


def worker(settings: Settings, options: argparse.Namespace) -> int:
    """Workers only."""
    return gateway.serve(settings, web=False)


def migrate_command(settings: Settings, options: argparse.Namespace) -> int:
    """Apply schema.sql where it is missing or old."""
    with gateway.database_of(settings) as url:
        print("schema applied" if migrate(url) else "schema is up to date")
    return 0


COMMANDS: dict[str, tuple[str, Callable[[Settings, argparse.Namespace], int]]] = {
    "serve": ("web and workers in one process (the default)", serve),
    "worker": ("workers only; any number share one database", worker),
    "migrate": ("apply schema.sql where it is missing or old", migrate_command),
}
