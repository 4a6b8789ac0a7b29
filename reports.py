"""What an operator reads of runs: the list of those that need a look, and one run's story step by step."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from database import Database
from settings import mask

LATELY = 24  # hours
LISTED = 50  # runs of one list

# Which user an operator means: the address first seen, any other one, or Twilio's ExternalUserId.
WHO = """
SELECT user_phone FROM users
WHERE user_phone = ANY(:names) OR reply_to = ANY(:names) OR external_user_id = ANY(:names)
UNION SELECT user_phone FROM addresses WHERE address = ANY(:names)
"""

OPEN = """
SELECT *, extract(epoch FROM now() - created_at)::float8 AS age, extract(epoch FROM due_at - now())::float8 AS due
FROM runs WHERE state <> 'done' ORDER BY due_at LIMIT :n::int
"""

LATE = """
SELECT *, extract(epoch FROM finished_at - created_at)::float8 AS age, NULL::float8 AS due FROM runs
WHERE state = 'done' AND outcome IN ('fallback', 'undelivered')
    AND finished_at > now() - :hours::int * interval '1 hour'
ORDER BY id DESC LIMIT :n::int
"""

COUNTS = """
SELECT CASE state WHEN 'done' THEN outcome ELSE 'open' END AS what, count(*) AS n FROM runs
WHERE state <> 'done' OR finished_at > now() - :hours::int * interval '1 hour' GROUP BY what ORDER BY what
"""

RUNS_OF = """
SELECT *, extract(epoch FROM coalesce(finished_at, now()) - created_at)::float8 AS age,
    CASE WHEN state <> 'done' THEN extract(epoch FROM due_at - now())::float8 END AS due
FROM runs WHERE user_phone = ANY(:who) ORDER BY id DESC LIMIT :n::int
"""

RUN = "SELECT *, now() AS now FROM runs WHERE id = :id"
MESSAGES = "SELECT * FROM messages WHERE run_id = :id ORDER BY id"
RESPONSES = "SELECT * FROM responses WHERE run_id = :id ORDER BY created_at, id"
CALLS = "SELECT * FROM tool_calls WHERE run_id = :id ORDER BY started_at, call_id"


class NotFound(Exception):
    """No such run or user; the text says what was looked for."""


# --- Lists ------------------------------------------------------------------------------------------------


def report(db: Database, options: argparse.Namespace) -> Iterator[str]:
    """Yield the lines that `runs` prints; raises NotFound."""
    what = options.what
    if what is None:
        yield from overview(db)
    elif what.isdecimal() and len(what) < 19 and db.rows(RUN, {"id": int(what)}):
        yield from story(db, int(what), options.text)
    elif what.isdecimal() and len(what) < 8:
        raise NotFound(f"there is no run {what}")
    else:
        yield from runs_of(db, what)


def overview(db: Database) -> Iterator[str]:
    """Yield what is not done, and what failed or fell back lately."""
    counts = {row["what"]: row["n"] for row in db.rows(COUNTS, {"hours": LATELY})}
    waiting = counts.pop("open", 0)
    done = ", ".join(f"{n} {outcome}" for outcome, n in counts.items())
    yield f"{waiting} not done; in the last {LATELY} hours: {done or 'none done'}"
    bad = counts.get("fallback", 0) + counts.get("undelivered", 0)
    yield from listed("Not done, the most urgent first:", db.rows(OPEN, {"n": LISTED}), waiting)
    yield from listed("Fell back or undelivered, the latest first:", db.rows(LATE, {"hours": LATELY, "n": LISTED}), bad)
    if waiting or bad:
        yield "\n`runs ID` tells a run's story, `runs ADDRESS` lists a user's."


def listed(title: str, rows: list[dict[str, Any]], count: int) -> Iterator[str]:
    """Yield runs under a title, and how many more there are; nothing where there are none."""
    if rows:
        yield from ["", title, *map(line, rows)]
    if count > len(rows):
        yield f"  … and {count - len(rows)} more"


def runs_of(db: Database, address: str) -> Iterator[str]:
    """Yield the latest runs of a user."""
    who = users_named(db, address)
    rows = db.rows(RUNS_OF, {"who": who, "n": LISTED})
    if not who or not rows:
        raise NotFound(f"there is no run of {named(address)}")
    yield f"The latest runs of {mask(who[0])}:"
    yield from map(line, rows)


def names_of(address: str) -> list[str]:
    """Return the ways in which an address may be written in the tables."""
    address = address.strip()
    bare = address.removeprefix("whatsapp:")
    digits = bare.removeprefix("+")
    numbers = [f"whatsapp:+{digits}", f"+{digits}", digits] if digits.isdecimal() else []
    return list(dict.fromkeys([address, f"whatsapp:{bare}", bare, *numbers]))


def named(address: str) -> str:
    """Return what an operator typed for a user, masked where it is an address."""
    number = re.sub(r"[\s().-]", "", address)
    return mask(address) if re.match(r"whatsapp:|\+?\d{7,}$", number) else repr(address)


def users_named(db: Database, address: str) -> list[str]:
    """Return the user_phone of whoever has an address or external user id."""
    return [row["user_phone"] for row in db.rows(WHO, {"names": names_of(address)})]


def line(run: dict[str, Any]) -> str:
    """Return a run as one line of a list."""
    state = run["outcome"] if run["state"] == "done" else run["state"]
    words = [f"  {run['id']:>6}  {mask(run['user_phone']):<20}  {clock(run['created_at'])}  {state:<11}"]
    words.append(f"{'took' if run['state'] == 'done' else 'age'} {span(run['age'])}")
    if run["due"] is not None:
        words.append(f"due in {span(run['due'])}" if run["due"] > 0 else f"{span(-run['due'])} late")
        words.append("held by a worker" if run["held"] else "")
    words += [run["reason"] or "", f"try {run['tries'] + 1}" if run["tries"] else "", crashed(run)]
    return "  ".join(filter(None, words)).rstrip()


def clock(at: datetime) -> str:
    """Return a moment in UTC, as the log has it, without the year: 11-26 03:24:31Z."""
    return f"{at.astimezone(UTC):%m-%d %H:%M:%SZ}"


def crashed(run: dict[str, Any]) -> str:
    """Return how often in a row the run's worker vanished, "" where it did not."""
    return f"its worker vanished {run['crashes']} times" if run["crashes"] else ""


def span(seconds: float) -> str:
    """Return seconds as people say them: 0.4 s, 12 s, 5 min, 3 h, 2 d."""
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"


# --- One run's story --------------------------------------------------------------------------------------


@dataclass
class Step:
    """Something that happened at a moment."""

    at: datetime
    text: str
    more: str = ""  # what somebody said: shown with --text only


def story(db: Database, run_id: int, with_text: bool) -> Iterator[str]:
    """Yield a run's story, oldest step first."""
    run = db.rows(RUN, {"id": run_id})[0]
    yield f"Run {run_id} of {mask(run['user_phone'])}: {run['outcome'] or run['state']}{because(run)}"
    facts = {"assistant": run["assistant"], "thread": run["thread_id"], "rounds of tools": run["rounds"] or None,
             "failed tries": None if run["failures"] else run["tries"] or None, "claims": run["attempt"]}  # fmt: skip
    yield "  " + ", ".join(f"{name} {value}" for name, value in facts.items() if value is not None)
    yield ""
    begin = run["created_at"]
    for step in sorted(steps(db, run), key=lambda step: step.at):
        yield f"  {clock(step.at)}  {(step.at - begin).total_seconds():+9.2f} s  {step.text}"
        if with_text and step.more:
            yield from (f"{'':31}│ {text}" for text in step.more.splitlines())
    if run["state"] != "done":
        late = (run["now"] - run["due_at"]).total_seconds()
        held = ", held by a worker" if run["held"] else ""
        yield f"\n  Not done: {'late by' if late > 0 else 'due in'} {span(abs(late))}{held}. {crashed(run)}".rstrip()


def because(run: dict[str, Any]) -> str:
    """Return a run's reason in brackets: why it fell back, or Twilio's error code."""
    unasked = run["reason"] == "openai_down" and not (run["failures"] or run["tries"])
    more = ": not asked, after failures of other runs" if unasked else ""
    return f" ({run['reason']}{more})" if run["reason"] else ""


def steps(db: Database, run: dict[str, Any]) -> Iterator[Step]:
    """Yield what the tables know of a run, in no order."""
    key = {"id": run["id"]}
    for failure in run["failures"] or ():
        yield Step(datetime.fromisoformat(failure["at"]), f"OpenAI failed: {failure['code']}")
    moments = {
        "created_at": "the run was made", "started_at": "a worker took its messages",
        "written_at": "the reply was written", "finished_at": f"done: {run['outcome']}{because(run)}",
    }  # fmt: skip
    yield from (Step(run[name], text) for name, text in moments.items() if run[name])
    if run["deadline"] and run["state"] != "done":
        yield Step(run["deadline"], "deadline: past it the traditional flow answers")
    for row in db.rows(MESSAGES, key):
        yield from message_in(row) if row["direction"] == "in" else part_out(row, run)
    for row in db.rows(RESPONSES, key):
        yield from response(row)
    for row in db.rows(CALLS, key):
        yield tool_call(row)


def message_in(row: dict[str, Any]) -> Iterator[Step]:
    """Yield the step of a message that came in."""
    raw = row["raw"] or {}
    kinds = [raw.get("MessageType") or "text", f"{len(row['body'])} characters"]
    kinds += [f"{raw['NumMedia']} files"] if raw.get("NumMedia", "0") not in ("0", "") else []
    kinds += ["answered by a plugin"] if row["reply"] is not None else []
    yield Step(row["at"], f"message in {row['sid']}: {', '.join(kinds)}", row["body"])


def part_out(row: dict[str, Any], run: dict[str, Any]) -> Iterator[Step]:
    """Yield the steps of a part of the reply: handed to Twilio, and what is known of it."""
    whose = f" to {mask(row['user_phone'])}" if row["user_phone"] != run["user_phone"] else ""
    name, code = f"part {row['id']}{whose}", row["error_code"]
    if row["sending_at"]:
        kinds = [row["content_sid"] or f"{len(row['body'])} characters", "a file" if row["media_url"] else ""]
        kinds += [f"time {row['sends']}"] if row["sends"] > 1 else []
        yield Step(row["sending_at"], f"{name} handed to Twilio ({', '.join(filter(None, kinds))})", row["body"])
    sid = f" as {row['sid']}" if row["sid"] else ""
    why = f", error {code}: https://www.twilio.com/docs/api/errors/{code}" if code else ""
    more = "" if row["sending_at"] else row["body"]
    yield Step(row["updated_at"] or row["at"], f"{name} is {row['state']}{sid}{why}", more)


def response(row: dict[str, Any]) -> Iterator[Step]:
    """Yield the steps of a response of the model."""
    yield Step(row["created_at"], f"response {row['id']} asked of {row['model'] or 'the model'}")
    if row["ended_at"]:
        seconds = (row["ended_at"] - row["created_at"]).total_seconds()
        used = f", {row['input_tokens']} + {row['output_tokens']} tokens" if row["input_tokens"] is not None else ""
        status = row["status"] or "not looked at yet"
        yield Step(row["ended_at"], f"response {row['id']} ended: {status} after {seconds:.1f} s{used}")


def tool_call(row: dict[str, Any]) -> Step:
    """Return the step of a tool call."""
    went = "ok" if row["ok"] else "begun, outcome unknown" if row["output"] is None else "failed"
    took = f", {row['milliseconds']} ms" if row["milliseconds"] is not None else ""
    return Step(row["started_at"], f"tool {row['name']}: {went}{took}", f"{row['arguments']}\n→ {row['output'] or ''}")
