"""What the side pane shows of a conversation, read from Hilo's tables; nothing here writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

SHOWN = 20  # runs of one conversation, the newest

# Who has this address: the person first seen under it, the one who wrote from it last, or who is known by it.
PERSON = """
SELECT u.user_phone, u.mode, t.thread_id, t.assistant_id
FROM users u LEFT JOIN oa_threads_map t USING (user_phone)
WHERE u.user_phone = :address OR u.reply_to = :address
    OR u.user_phone = (SELECT a.user_phone FROM addresses a WHERE a.address = :address)
ORDER BY u.reply_to = :address DESC LIMIT 1
"""

# A run's three stretches: until it was taken up, until the reply was written, until the reply was sent.
RUNS = """
SELECT id, state, outcome, reason, assistant, thread_id, extract(epoch FROM created_at)::float8 AS created_at,
    extract(epoch FROM coalesce(finished_at, now()) - created_at)::float8 AS seconds,
    extract(epoch FROM coalesce(started_at, finished_at) - created_at)::float8 AS queued,
    extract(epoch FROM coalesce(written_at, finished_at) - started_at)::float8 AS waiting,
    extract(epoch FROM finished_at - written_at)::float8 AS sending
FROM runs WHERE user_phone = :who ORDER BY id DESC LIMIT :n::int
"""

TOKENS = """
SELECT run_id, sum(input_tokens)::int AS input, sum(output_tokens)::int AS output
FROM responses WHERE run_id = ANY(:runs::bigint[]) AND input_tokens IS NOT NULL GROUP BY run_id
"""

CALLS = """
SELECT run_id, name, arguments, output, ok, milliseconds AS ms
FROM tool_calls WHERE run_id = ANY(:runs::bigint[]) ORDER BY started_at, call_id
"""

PARTS = """
SELECT run_id, state, error_code AS error
FROM messages WHERE run_id = ANY(:runs::bigint[]) AND direction = 'out' ORDER BY id
"""


class Inspection:
    """Callable with an address: its runs and all plugins, in the shape that page/chat.js describes.

    `rows(sql, params)` queries Hilo's database; `plugins()` tells of each plugin its file, tools, hooks and the
    whole of its error.
    """

    def __init__(self, rows: Callable[[str, Mapping[str, Any]], list[dict[str, Any]]],
                 plugins: Callable[[], Iterable[Mapping[str, Any]]]) -> None:
        self._rows = rows
        self._plugins = plugins

    def __call__(self, address: str) -> dict[str, Any]:
        person = next(iter(self._rows(PERSON, {"address": address})), None) or {}
        runs = self._rows(RUNS, {"who": person.get("user_phone", ""), "n": SHOWN})
        return {"mode": person.get("mode"), "thread_id": person.get("thread_id"),
                "assistant": person.get("assistant_id"), "runs": self._with_details(runs),
                "plugins": [dict(plugin) for plugin in self._plugins()]}

    def _with_details(self, runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
        ids = {"runs": [run["id"] for run in runs]}
        calls, parts, tokens = (_by_run(self._rows(sql, ids)) for sql in (CALLS, PARTS, TOKENS))
        return [run | {"steps": _steps(run), "error": run["reason"], "calls": calls.get(run["id"], []),
                       "parts": parts.get(run["id"], []), "tokens": next(iter(tokens.get(run["id"], [])), None)}
                for run in runs]


def _by_run(rows: Iterable[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """The rows of each run, without its id."""
    found: dict[int, list[dict[str, Any]]] = {}
    for row in rows:
        found.setdefault(row.pop("run_id"), []).append(row)
    return found


def _steps(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The stretches that a run has begun; the seconds of the one under way are not known yet."""
    states = ("queued", "waiting", "sending")
    last = states.index(run["state"]) if run["state"] in states else len(states) - 1
    begun = [name for name in states[: last + 1] if run[name] is not None or name == run["state"]]
    names = {} if run["assistant"] else {"waiting": "writing"}  # no model had a part in it
    return [{"name": names.get(name, name), "seconds": run[name]} for name in begun]
