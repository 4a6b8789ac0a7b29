"""Every inbound message leads to exactly one reply turn, whatever crashes: real processes, killed and paused.

A fault point is a `step` of the journey that gateway.py names in its log, where tests/stop_at stops the process dead,
or a moment on the wire at which a local server holds its answer.
"""

from __future__ import annotations

import contextlib
import re
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from database import Database
from simulator import Simulator
from tests.conftest import Server, environment, wait_for
from tests.local_openai import Answer, Json, LocalOpenAI, calls, says, unanswered_texts
from tests.process import Process

FAST = {"LEASE_SECONDS": "1"}  # a dead worker's run is taken over after 3 s at most
LINES = 90  # of the model's answer: too long for one part


# --- Stopped dead at each step ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Point:
    """Where a process is stopped dead: at a step of the log, or while a server holds its answer to a request."""

    name: str
    step: str = ""
    wire: str = ""
    text: str = "pregunta uno"


POINTS = (
    Point("after the webhook's commit, before its 200", "stored"),
    Point("after the claim", "claimed"),
    Point("after the messages are taken", "taken"),
    Point("after the conversation is created, before it is saved", wire="POST /v1/conversations$"),
    Point("after the conversation is saved", "thread"),
    Point("after the response is created, before its id is saved", "created"),
    Point("after the response's id is saved", "waiting"),
    Point("after a tool ran, before its output is saved", "tool_ran", text="cupo"),
    Point("after a tool with side effects ran, before its output is saved", "tool_ran", text="inscribe"),
    Point("after the outputs are saved, before they are sent", "tools", text="inscribe"),
    Point("after the outputs are sent, before the new response's id is saved", "created:2", text="inscribe"),
    Point("after the reply is written", "written"),
    Point("after a part is marked, before Twilio gets it", "sending"),
    Point("after Twilio accepted a part, before its answer", wire="send"),
    Point("after Twilio accepted a part, before its sid is saved", "accepted"),
    Point("between two parts", "sent"),
    Point("after done", "done"),
)
TOGETHER = 4  # processes at one time


@dataclass
class Seen:
    """What was seen of one fault point."""

    stopped: int = 0
    replies: list[str] = field(default_factory=list)
    after: list[str] = field(default_factory=list)
    begun: int = 0
    outputs: list[str] = field(default_factory=list)
    runs: list[dict[str, Any]] = field(default_factory=list)
    overlaps: list[str] = field(default_factory=list)
    orphans: list[tuple[str, str]] = field(default_factory=list)


def clerk(request: Json, items: list[Json]) -> Answer:
    """Answers each question by its name and at length, after a tool call where the question asks for one."""
    asked = unanswered_texts(items)
    last_user = max(n for n, item in enumerate(items) if item.get("role") == "user")
    if not any(item["type"] == "function_call_output" for item in items[last_user:]):
        if "inscribe" in asked:
            return calls(("inscribir", {"curso": "EXC-101"}))
        if "cupo" in asked:
            return calls(("consultar_cupo", {"curso": "EXC-101"}))
    if asked == ["gracias"]:
        return says("De nada.")
    return says("\n".join([f"Sobre {' y '.join(asked)}:", *(f"línea {n:02} de la respuesta" for n in range(LINES))]))


def complete(replies: list[str], question: str) -> bool:
    """Tell whether these parts are the clerk's one answer, whole and in order."""
    text = "\n".join(replies)
    numbers = [int(n) for n in re.findall(r"línea (\d\d)", text)]
    return text.startswith(f"Sobre {question}:") and numbers == list(range(LINES)) and len(replies) == 2


@contextlib.contextmanager
def database_at(url: str) -> Iterator[Database]:
    """Lend a pool of one connection to the database behind a gateway, for the test's own questions."""
    database = Database(url, 1)
    try:
        yield database
    finally:
        database.close()


class Ward:
    """A gateway's process with servers and a database of its own, stopped at one fault point after the other."""

    def __init__(self, points: tuple[Point, ...], url: str, directory: Path):
        self.points, self.url, self.directory = points, url, directory
        self.seen: dict[str, Seen] = {}
        self.error: BaseException | None = None

    def go_through(self) -> None:
        """Stop a process at each point and start it again, where the user must be answered before the next point."""
        try:
            with contextlib.ExitStack() as self.stack:
                self.twilio = self.stack.enter_context(Simulator())
                self.openai = self.stack.enter_context(LocalOpenAI())
                self.db = self.stack.enter_context(database_at(self.url))
                self.openai.model = clerk
                self.env = environment(self.url, self.twilio, self.openai, **FAST)
                process = self.start(self.points[0])
                for point, following in zip(self.points, [*self.points[1:], None], strict=True):
                    self.seen[point.name] = Seen()
                    sid = self.stop(process, point)
                    process = self.start(following)
                    self.look(point, sid)
        except BaseException as error:
            self.error = error

    def start(self, point: Point | None) -> Process:
        """Start the process that will stop at a point, or at none."""
        stop = f"{address_at(point)[-4:]} · {point.step}" if point and point.step else ""
        return self.stack.enter_context(Process(self.directory, self.env, stop_at=stop)).ready()

    def stop(self, process: Process, point: Point) -> str:
        """Have the user write and the process die at the point; return the message's sid."""
        user, gate = address_at(point), None
        if point.wire:
            gate = self.twilio.gate(user) if point.wire == "send" else self.openai.gate(point.wire)
        delivery = self.twilio.receive(user, point.text)
        if gate:
            assert gate.arrived.wait(20), point
            process.kill()
            gate.release()
        self.seen[point.name].stopped = process.exit_code(20)
        return delivery.sid

    def look(self, point: Point, sid: str) -> None:
        """Note how the user is answered by the process that was started again, and in the turn that follows."""
        seen, user = self.seen[point.name], address_at(point)
        if point.step == "stored":  # Twilio has had no answer, and delivers again
            self.twilio.receive(user, point.text, sid=sid)
        self.settled(point, 1)
        seen.replies = [message.body for message in self.twilio.sent_to(user)]
        self.twilio.receive(user, "gracias")
        self.settled(point, 2)
        seen.after = [message.body for message in self.twilio.sent_to(user)][len(seen.replies) :]
        notes = self.directory / "notes"
        seen.begun = notes.read_text().count(user) if notes.exists() else 0
        outputs = "SELECT output FROM tool_calls t JOIN runs r ON r.id = t.run_id WHERE r.user_phone = :u"
        seen.outputs = [row["output"] for row in self.db.rows(outputs, {"u": user})]
        seen.overlaps, seen.orphans = self.openai.overlaps, self.openai.orphans()

    def settled(self, point: Point, count: int) -> None:
        """Return once the user's turns so far are done."""
        seen, runs = self.seen[point.name], "SELECT * FROM runs WHERE user_phone = :u ORDER BY id"

        def done() -> bool:
            threading.Event().wait(0.05)
            seen.runs = self.db.rows(runs, {"u": address_at(point)})
            return len(seen.runs) >= count and all(run["state"] == "done" for run in seen.runs)

        wait_for(done, 40)


def address_at(point: Point) -> str:
    """Return the address of the user in whose turn the process is stopped."""
    return f"whatsapp:+52155222{POINTS.index(point):05}"


@pytest.fixture(scope="module")
def seen(postgres: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Seen]:
    """What was seen at each fault point: a few processes at a time go through them all."""
    wards = [
        Ward(POINTS[n::TOGETHER], postgres.named(postgres.create()), tmp_path_factory.mktemp("ward"))
        for n in range(TOGETHER)
    ]
    threads = [threading.Thread(target=ward.go_through) for ward in wards]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for ward in wards:
        if ward.error:
            raise ward.error
    return {name: found for ward in wards for name, found in ward.seen.items()}


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.name)
def test_process_stopped_dead_user_gets_one_reply(seen: dict[str, Seen], point: Point) -> None:
    found = seen[point.name]
    assert found.stopped == -signal.SIGKILL
    assert complete(found.replies, point.text), found.replies
    assert found.after == ["De nada."]
    assert [run["outcome"] for run in found.runs] == ["answered", "answered"]
    assert (found.overlaps, found.orphans) == ([], [])


def test_tool_that_changes_something_is_not_begun_again_and_the_model_is_told(seen: dict[str, Seen]) -> None:
    found = seen["after a tool with side effects ran, before its output is saved"]
    assert found.begun == 1
    assert ["no se sabe" in output for output in found.outputs] == [True]


def test_tool_that_changes_nothing_is_run_again(seen: dict[str, Seen]) -> None:
    found = seen["after a tool ran, before its output is saved"]
    assert found.begun == 2
    assert found.outputs == ["Quedan 7 lugares en EXC-101."]


def test_output_that_is_saved_is_not_asked_for_again(seen: dict[str, Seen]) -> None:
    for name in [point.name for point in POINTS if point.name.startswith("after the outputs are")]:
        assert seen[name].begun == 1
        assert seen[name].outputs == ["Inscrito en EXC-101."]
