"""Metrics at `/metrics`, in Prometheus' text format (https://prometheus.io/docs/instrumenting/exposition_formats/).

For whoever sends `Authorization: Bearer ADMIN_TOKEN`; without that setting there is no such page. All but one are read
from the database, so every process tells the same, of the work of all: what is open now, and what was done since
midnight UTC, when the counters begin anew. No address and no text is among them.
"""

from __future__ import annotations

import hmac
from collections.abc import Iterable, Iterator
from typing import Any

import bottle
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from database import DatabaseDown, DatabaseFault
from tools import Context, hookimpl
from tools._plugins import ToolCall

MIDNIGHT = "date_trunc('day', now(), 'UTC')"
BOUNDS = (1, 2, 3, 5, 8, 13, 21, 34, 60)  # seconds

OPEN = """
SELECT state, count(*)::int AS n, coalesce(extract(epoch FROM now() - min(due_at)), 0)::float8 AS late
FROM runs WHERE state <> 'done' GROUP BY state
"""
WITHIN = ", ".join(f"count(*) FILTER (WHERE seconds <= {bound})" for bound in BOUNDS)
DONE = f"""
SELECT coalesce(outcome, '') AS outcome, count(*)::int AS n, sum(seconds)::float8 AS seconds, ARRAY[{WITHIN}] AS within
FROM runs, LATERAL (SELECT extract(epoch FROM finished_at - created_at)::float8) AS took (seconds)
WHERE state = 'done' AND finished_at >= {MIDNIGHT} GROUP BY 1
"""  # noqa: S608
TOOLS = f"""
SELECT t.name, t.ok, count(*)::int AS n, coalesce(sum(t.milliseconds), 0)::float8 / 1000 AS seconds
FROM runs r JOIN tool_calls t ON t.run_id = r.id
WHERE r.state = 'done' AND r.finished_at >= {MIDNIGHT} AND t.ok IS NOT NULL GROUP BY t.name, t.ok
"""  # noqa: S608
TOKENS = f"""
SELECT coalesce(model, '') AS model, coalesce(sum(input_tokens), 0)::float8 AS input,
    coalesce(sum(output_tokens), 0)::float8 AS output
FROM responses WHERE created_at >= {MIDNIGHT} GROUP BY 1
"""  # noqa: S608
LOST = f"""
SELECT coalesce(m.error_code::text, '') AS code, count(*)::int AS n
FROM runs r JOIN messages m ON m.run_id = r.id
WHERE r.state = 'done' AND r.finished_at >= {MIDNIGHT} AND m.direction = 'out' AND m.state IN ('failed', 'undelivered')
GROUP BY 1
"""  # noqa: S608


class Figures(Collector):
    """What Prometheus' registry asks for the metrics, at every visit."""

    def __init__(self, context: Context):
        self.query = context.query

    def collect(self) -> Iterator[Metric]:
        """Yield the metrics as they are now; raises DatabaseDown or DatabaseFault."""
        yield from self.open_runs()
        yield from self.done_runs()
        yield from self.tool_calls()
        rows = self.query(TOKENS)
        told = [((row["model"], way), row[way]) for row in rows for way in ("input", "output")]
        yield counter("hilo_tokens", "Tokens of the model", ("model", "direction"), told)
        lost = (((row["code"],), row["n"]) for row in self.query(LOST))
        yield counter("hilo_parts_undelivered", "Parts that did not arrive, by Twilio's error code", ("code",), lost)

    def open_runs(self) -> Iterator[Metric]:
        """Yield how many runs are open, and for how long the longest due one has waited."""
        rows = self.query(OPEN)
        states = GaugeMetricFamily("hilo_runs_open", "Runs that are not done, by state", labels=("state",))
        for row in rows:
            states.add_metric((row["state"],), row["n"])
        yield states
        late = max((row["late"] for row in rows), default=0.0)
        yield GaugeMetricFamily("hilo_runs_late_seconds", "Seconds since the longest due run was due", max(0.0, late))

    def done_runs(self) -> Iterator[Metric]:
        """Yield how many runs ended how, and how long they took from the first message on."""
        text = "Seconds from a run's first message to its end"
        histogram = HistogramMetricFamily("hilo_run_seconds", text, labels=("outcome",))
        for row in self.query(DONE):
            buckets = [(str(float(bound)), n) for bound, n in zip(BOUNDS, row["within"], strict=True)]
            histogram.add_metric((row["outcome"],), [*buckets, ("+Inf", row["n"])], row["seconds"])
        yield histogram

    def tool_calls(self) -> Iterator[Metric]:
        """Yield how many calls each tool had, and the seconds that they took."""
        rows = self.query(TOOLS)
        labels = ("tool", "ok")
        named = [((row["name"], str(row["ok"]).lower()), row) for row in rows]
        yield counter("hilo_tool_calls", "Tool calls", labels, ((label, row["n"]) for label, row in named))
        seconds = ((label, row["seconds"]) for label, row in named)
        yield counter("hilo_tool_call_seconds", "Seconds that tool calls took", labels, seconds)
        abandoned = "Tool calls that this process left behind at their time limit, since its start"
        yield CounterMetricFamily("hilo_tool_calls_abandoned", abandoned, ToolCall.abandoned)


def counter(name: str, text: str, labels: tuple[str, ...], rows: Iterable[tuple[tuple[str, ...], float]]) -> Metric:
    """Return a counter with one sample a row."""
    family = CounterMetricFamily(name, text, labels=labels)
    for values, number in rows:
        family.add_metric(values, number)
    return family


def refused(token: str, header: str) -> bottle.HTTPResponse | None:
    """Return the answer to whoever does not show the token (RFC 6750), None to who does."""
    scheme, _, shown = header.partition(" ")
    if scheme.lower() != "bearer":
        return bottle.HTTPResponse("Authorization: Bearer ADMIN_TOKEN", 401, {"WWW-Authenticate": "Bearer"})
    if not hmac.compare_digest(shown.strip().encode("latin-1"), token.encode()):
        return bottle.HTTPResponse("not the ADMIN_TOKEN", 403)
    return None


@hookimpl
def register_routes(app: Any, context: Context) -> None:
    """Add the page, where there is a token to ask for."""
    secret = context.settings.admin_token
    if secret is None:
        return
    registry = CollectorRegistry()
    registry.register(Figures(context))

    def metrics() -> Any:
        no = refused(secret.get_secret_value(), bottle.request.environ.get("HTTP_AUTHORIZATION", ""))
        if no:
            return no
        try:
            return bottle.HTTPResponse(generate_latest(registry), headers={"Content-Type": CONTENT_TYPE_LATEST})
        except (DatabaseDown, DatabaseFault) as error:
            return bottle.HTTPResponse(str(error), 503)

    app.route("/metrics", callback=metrics)
