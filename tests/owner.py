"""Databases as a plan gives them: the owner is an ordinary role with a password, and a limit of connections."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from urllib.parse import quote, urlsplit, urlunsplit

from tests.conftest import Server

PASSWORD = "c0n/ñ@:% ?#+á"  # nothing of it may stand in a URL as it is


@contextlib.contextmanager
def owned(server: Server, limit: int = -1, password: str = PASSWORD) -> Iterator[str]:
    """Lend the URL of an empty database whose owner is no superuser; `limit` connections at a time, -1: any number."""
    name = server.create("template1")
    literal = password.replace("'", "''")
    server.run(f"CREATE ROLE {name} LOGIN PASSWORD '{literal}' CONNECTION LIMIT {limit}")
    server.run(f"ALTER DATABASE {name} OWNER TO {name}")
    try:
        yield signed_in(server.named(name), name, password)
    finally:
        server.drop(name)
        server.run(f"DROP ROLE {name}")


def signed_in(url: str, role: str, password: str) -> str:
    """Return a database's URL for a role, in the form that Heroku gives."""
    parts = urlsplit(url)
    netloc = f"{role}:{quote(password, safe='')}@{parts.netloc.rpartition('@')[2]}"
    return urlunsplit(parts._replace(scheme="postgres", netloc=netloc))
