"""Every inbound message leads to exactly one reply turn, whatever crashes: real processes, killed and paused.

A fault point is a `step` of the journey that gateway.py names in its log, where tests/stop_at stops the process dead,
or a moment on the wire at which a local server holds its answer.
"""

from __future__ import annotations

import contextlib
import random
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from database import Database, migrate
from pace import Breaker
from runs import LeaseLost, Run
from settings import load_settings
from simulator import Delivery, Simulator
from tests.conftest import ANA, Hilo, Server, environment, wait_for
from tests.local_openai import (
    Answer,
    Fault,
    Json,
    LocalOpenAI,
    calls,
    echo,
    fails,
    never,
    says,
    script,
    unanswered_texts,
)
from tests.process import Postgres, Process
from tools import Event
from upkeep import SETTLED, TICK

# A dead worker's run is taken over after 3 s at most; a busy machine may take long to start a process.
FAST = {"LEASE_SECONDS": "2", "THREADS_RUN_TIMEOUT": "120"}
UNLIMITED = {"LIMITE_MINUTO": "0", "LIMITE_DIA": "0"}
LUIS = "whatsapp:+5215511110002"
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
    """Tell whether these parts are the clerk's one answer, whole and in order, after what its tool sends."""
    if question == "cupo":
        first, *replies = replies or [""]
        if first != "Reviso los lugares…":
            return False
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
            assert gate.arrived.wait(60), point
            process.kill()
            gate.release()
        self.seen[point.name].stopped = process.exit_code(60)
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

        wait_for(done, 60)


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


# --- A part in doubt --------------------------------------------------------------------------------------


@pytest.fixture
def clerks(hilo: Hilo, openai_server: LocalOpenAI) -> Hilo:
    """A gateway in this process whose answers take two parts."""
    openai_server.model = clerk
    return hilo


def bodies(twilio: Simulator, user: str = ANA) -> list[str]:
    """The texts sent to a user over the REST API."""
    return [message.body for message in twilio.sent_to(user) if message.direction == "outbound-api"]


def put_down(hilo: Hilo) -> float:
    """Return for how many seconds an unfinished delivery is put down, once it is."""
    sql = "SELECT extract(epoch FROM due_at - now())::float8 AS s FROM runs WHERE state = 'sending' AND NOT held"
    [row] = wait_for(lambda: hilo.rows(f"{sql} AND due_at > now()"))
    return float(row["s"])


def waited_out(hilo: Hilo) -> float:
    """Let the time pass for which an unfinished delivery is put down; return how many seconds that is."""
    seconds = put_down(hilo)
    hilo.age(60)
    return seconds


def sends(hilo: Hilo) -> list[int]:
    """How often each part was handed to Twilio, in order."""
    return [row["sends"] for row in hilo.rows("SELECT sends FROM messages WHERE direction = 'out' ORDER BY id")]


def test_call_timed_out_after_acceptance_part_is_found_in_twilios_list(
    start: Callable[..., Hilo], twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = clerk
    hilo = start(**FAST)
    twilio.fault("callback", "lost", times=None)
    twilio.fault("send", "hang", seconds=3)
    twilio.receive(ANA, "pregunta uno")
    hilo.done()
    assert complete(bodies(twilio), "pregunta uno")
    assert sends(hilo) == [1, 1]


def test_call_cut_after_acceptance_part_is_found_in_twilios_list(clerks: Hilo, twilio: Simulator) -> None:
    twilio.fault("callback", "lost", times=None)
    twilio.fault("send", "cut")
    twilio.receive(ANA, "pregunta uno")
    assert 13 < waited_out(clerks) <= 15
    clerks.done()
    assert complete(bodies(twilio), "pregunta uno")
    assert sends(clerks) == [1, 1]


@pytest.mark.parametrize("fault", [{"kind": "refuse"}, {"kind": "error", "status": 503}], ids=["refused", "503"])
def test_call_broken_before_acceptance_part_goes_again(clerks: Hilo, twilio: Simulator, fault: dict[str, Any]) -> None:
    twilio.fault("send", **fault)
    twilio.receive(ANA, "pregunta uno")
    assert 13 < waited_out(clerks) <= 15
    clerks.done()
    assert complete(bodies(twilio), "pregunta uno")
    assert sends(clerks) == [2, 1]


def test_callback_that_names_the_row_settles_the_doubt_before_any_list(clerks: Hilo, twilio: Simulator) -> None:
    twilio.fault("list", "error", times=None)
    twilio.fault("send", "cut")
    twilio.receive(ANA, "pregunta uno")
    clerks.done(timeout=5)
    assert complete(bodies(twilio), "pregunta uno")


def test_list_that_fails_is_asked_again(clerks: Hilo, twilio: Simulator) -> None:
    twilio.fault("callback", "lost", times=None)
    twilio.fault("send", "cut")
    twilio.fault("list", "error", times=None)
    twilio.receive(ANA, "gracias")
    assert waited_out(clerks) > 5
    assert put_down(clerks) <= 5
    twilio.clear_faults("list")
    clerks.age(60)
    clerks.done()
    assert (bodies(twilio), sends(clerks)) == (["De nada."], [1])


def test_person_who_writes_from_another_address_meanwhile_the_part_is_looked_up_where_it_went(
    start: Callable[..., Hilo], twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = script([says("primera"), says("segunda")], shared=True)
    hilo = start()
    same = {"ExternalUserId": "MX.ana123"}
    twilio.fault("callback", "lost", times=None)
    twilio.fault("send", "cut")
    twilio.receive(ANA, "hola", fields=same)
    put_down(hilo)
    twilio.receive("whatsapp:MX.ana123", "sigo aquí", fields=same)
    hilo.age(60)
    hilo.done(2)
    assert (bodies(twilio), bodies(twilio, "whatsapp:MX.ana123")) == (["primera"], ["segunda"])


def test_stall_that_leaves_the_lease_less_than_the_call_may_take_begins_no_call() -> None:
    now = time.monotonic()
    run = Run(1, ANA, "sending", 1, 0, 0, None, None, None, False, 0, 0, "", None, "bot", None, None, now + 2.1, 2.0)
    run.check_lease(2.0)
    run.lease_until = now + 1.9
    with pytest.raises(LeaseLost):
        run.check_lease(2.0)


def test_same_text_sent_before_is_not_taken_for_the_part_in_doubt(clerks: Hilo, twilio: Simulator) -> None:
    twilio.receive(ANA, "gracias")
    clerks.done(1)
    twilio.fault("send", "refuse")
    twilio.receive(ANA, "gracias")
    waited_out(clerks)
    clerks.done(2)
    assert bodies(twilio) == ["De nada.", "De nada."]


def test_429_waits_as_long_as_twilio_says(clerks: Hilo, twilio: Simulator) -> None:
    twilio.fault("send", "error", status=429, code=20429, retry_after=40)
    twilio.receive(ANA, "gracias")
    assert 38 < waited_out(clerks) <= 40
    clerks.done()
    assert (bodies(twilio), sends(clerks)) == (["De nada."], [2])


@pytest.mark.parametrize("code", [21610, 21617, 63016])
def test_part_that_twilio_refuses_for_good_ends_the_run_as_undelivered(
    clerks: Hilo, twilio: Simulator, code: int
) -> None:
    events: list[Event] = []
    clerks.plug(track_event=lambda event: events.append(event))
    twilio.fault("send", "error", status=400, code=code)
    twilio.receive(ANA, "pregunta uno")
    [run] = clerks.done()
    assert (run["outcome"], run["reason"], bodies(twilio)) == ("undelivered", str(code), [])
    parts = clerks.rows("SELECT state, error_code FROM messages WHERE direction = 'out'")
    assert [(part["state"], part["error_code"]) for part in parts] == [("failed", code), ("failed", code)]
    failed = wait_for(lambda: [event for event in events if event.name == "message_failed"])
    assert [(event.run_id, event.data) for event in failed] == [(run["id"], {"code": code})]


def test_part_that_whatsapp_refuses_later_ends_the_run_as_undelivered(clerks: Hilo, twilio: Simulator) -> None:
    events: list[Event] = []
    clerks.plug(track_event=lambda event: events.append(event))
    twilio.fault("send", "undeliver", code=63016)
    twilio.receive(ANA, "gracias")
    wait_for(lambda: [event for event in events if event.name == "message_failed"])
    [run] = clerks.done()
    assert (run["outcome"], run["reason"]) == ("undelivered", "63016")
    [part] = clerks.rows("SELECT state, error_code FROM messages WHERE direction = 'out'")
    assert part == {"state": "undelivered", "error_code": 63016}


# --- Messages whose webhook never came --------------------------------------------------------------------


def an_hour_ago(url: str) -> None:
    """Let the gateway behind a database have looked at Twilio's list an hour ago for the last time."""
    with database_at(url) as database:
        database.one("put", key="caught_up_to", value=(datetime.now(UTC) - timedelta(hours=1)).isoformat())


def test_messages_lost_while_the_gateway_was_down_are_answered_once_and_in_order(
    start: Callable[..., Hilo], database_url: str, twilio: Simulator
) -> None:
    an_hour_ago(database_url)
    written = datetime.now(UTC) - timedelta(minutes=3)
    sids = [twilio.receive(ANA, text, lost=True, at=written).sid for text in ("uno", "dos", "tres")]  # in one second
    hilo = start()
    hilo.done()
    twilio.receive(ANA, "uno", sid=sids[0])  # the webhook comes after all
    twilio.receive(ANA, "cuatro")
    hilo.done(2)
    assert bodies(twilio) == ["Eco: uno\ndos\ntres", "Eco: cuatro"]


def caught_up(hilo: Hilo) -> Hilo:
    """Return a gateway once its catch-up of the start is over."""
    wait_for(lambda: hilo.gateway.upkeep.next_catch_up > time.monotonic() + SETTLED)
    return hilo


def catch_up(hilo: Hilo) -> None:
    """Look at Twilio's list now, as from an hour ago."""
    hilo.gateway.upkeep.next_catch_up = 0.0
    hilo.gateway.upkeep.catch_up()


def refuse_messages(hilo: Hilo, sqlstate: str) -> None:
    """Let PostgreSQL refuse every message of somebody else's than Ana's."""
    hilo.rows(f"""CREATE OR REPLACE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$BEGIN
        IF NEW.user_phone <> '{ANA}' THEN RAISE EXCEPTION 'no' USING ERRCODE = '{sqlstate}'; END IF; RETURN NEW;
        END$$""")
    hilo.rows("CREATE OR REPLACE TRIGGER refuse BEFORE INSERT ON messages FOR EACH ROW EXECUTE FUNCTION refuse()")


def test_message_that_the_database_refuses_for_now_is_fetched_again_and_one_it_never_takes_is_left(
    start: Callable[..., Hilo], database_url: str, twilio: Simulator
) -> None:
    hilo = caught_up(start(WORKER_THREADS="0"))
    written = datetime.now(UTC) - timedelta(minutes=3)
    for user, text in ((LUIS, "disco lleno"), (ANA, "medio \ud83d carácter")):  # of which no database takes a half
        twilio.receive(user, text, lost=True, at=written)
    for sqlstate, stored in (("53100", [ANA]), ("22023", [ANA])):
        refuse_messages(hilo, sqlstate)
        an_hour_ago(database_url)
        catch_up(hilo)
        assert [row["user_phone"] for row in hilo.rows("SELECT user_phone FROM messages")] == stored
        [row] = hilo.rows("SELECT value FROM hilo WHERE key = 'caught_up_to'")
        assert (datetime.fromisoformat(row["value"]) > written) == (sqlstate == "22023")
    hilo.rows("DROP TRIGGER refuse ON messages")
    an_hour_ago(database_url)
    catch_up(hilo)
    assert [row["body"] for row in hilo.rows("SELECT body FROM messages")] == ["medio  carácter", "disco lleno"]


def test_list_of_files_that_fails_keeps_no_message_back(
    start: Callable[..., Hilo], database_url: str, twilio: Simulator
) -> None:
    an_hour_ago(database_url)
    written = datetime.now(UTC) - timedelta(minutes=3)
    twilio.fault("media", "error", times=None, status=404, code=20404)
    twilio.receive(LUIS, "una foto", media=[(b"x", "image/jpeg")], lost=True, at=written)
    twilio.receive(ANA, "hola", lost=True, at=written)
    start().done(2)
    assert len(bodies(twilio, LUIS)) == 1 and bodies(twilio) == ["Eco: hola"]


def to_other_number(twilio: Simulator, text: str, written: datetime, number: str = "whatsapp:+14150000009") -> None:
    """Let a user write to another sender of the same account, whose webhooks go elsewhere."""
    filed(twilio, text, written).to = number


def filed(twilio: Simulator, text: str, written: datetime) -> Any:
    """Let a user write without a webhook, and return Twilio's record of it."""
    record = twilio.records.get(twilio.receive(ANA, text, lost=True, at=written).sid)
    assert record
    return record


@pytest.mark.parametrize("sender", ["usual", "none", "service"])
def test_messages_for_another_program_of_the_same_account_are_left_to_it(
    start: Callable[..., Hilo], database_url: str, twilio: Simulator, sender: str
) -> None:
    hilo = start(TWILIO_FROM={"usual": twilio.number, "none": "", "service": "MG" + "0" * 32}[sender])
    twilio.receive(LUIS, "hola")  # of whose number Hilo knows from now on
    hilo.done(1)
    written = datetime.now(UTC) - timedelta(minutes=3)
    to_other_number(twilio, "para otro", written)
    twilio.receive(ANA, "para Hilo", lost=True, at=written)
    an_hour_ago(database_url)
    hilo.gateway.numbers.clear()  # as a process that has just started
    catch_up(hilo)
    hilo.done(2)
    assert bodies(twilio) == ["Eco: para Hilo"]


def test_message_to_a_sender_of_the_messaging_service_is_ours_though_none_came_yet(
    start: Callable[..., Hilo], database_url: str, twilio: Simulator
) -> None:
    service = "MG" + "0" * 32
    an_hour_ago(database_url)
    written = datetime.now(UTC) - timedelta(minutes=3)
    filed(twilio, "hola", written).service_sid = service
    to_other_number(twilio, "para otro", written)
    start(TWILIO_FROM=service).done(1)
    assert bodies(twilio) == ["Eco: hola"]


def caught_up_to(hilo: Hilo) -> datetime:
    return datetime.fromisoformat(hilo.rows("SELECT value FROM hilo WHERE key = 'caught_up_to'")[0]["value"])


def test_what_came_before_twilio_was_set_up_was_for_another_program(
    start: Callable[..., Hilo], database_url: str, twilio: Simulator
) -> None:
    an_hour_ago(database_url)
    twilio.receive(ANA, "para el de antes", lost=True, at=datetime.now(UTC) - timedelta(minutes=3))
    hilo = start(PUBLIC_URL="")
    wait_for(lambda: datetime.now(UTC) - caught_up_to(hilo) < timedelta(minutes=1))
    hilo.stop()
    hilo = caught_up(start())
    assert hilo.rows("SELECT * FROM messages") == []


@pytest.mark.parametrize(("known", "stored"), [(False, 0), (True, 1)])
def test_mark_of_two_days_ago_counts_only_where_somebody_has_written(
    start: Callable[..., Hilo], twilio: Simulator, known: bool, stored: int
) -> None:
    hilo = caught_up(start(WORKER_THREADS="0"))
    if known:
        twilio.receive(LUIS, "hola")
    before = len(hilo.rows("SELECT * FROM messages"))
    hilo.db.one("put", key="caught_up_to", value=(datetime.now(UTC) - timedelta(days=2)).isoformat())
    twilio.receive(ANA, "hace un día y algo", lost=True, at=datetime.now(UTC) - timedelta(hours=30))
    catch_up(hilo)
    assert len(hilo.rows("SELECT * FROM messages")) == before + stored


def test_word_to_leave_that_was_missed_is_no_news_where_the_user_has_returned_since(
    start: Callable[..., Hilo], database_url: str, twilio: Simulator
) -> None:
    hilo = caught_up(start())
    ago = [datetime.now(UTC) - timedelta(minutes=n) for n in (5, 4)]
    twilio.receive(ANA, "BAJA", lost=True, at=ago[0])
    twilio.receive(ANA, "ALTA", at=ago[1])
    hilo.done(1)
    an_hour_ago(database_url)
    catch_up(hilo)
    hilo.done(2)
    assert hilo.rows("SELECT mode FROM users") == [{"mode": "bot"}]


def test_start_and_outage_are_followed_by_a_catch_up_once_messages_have_settled(hilo: Hilo) -> None:
    upkeep = hilo.gateway.upkeep
    wait_for(lambda: SETTLED <= upkeep.next_catch_up - upkeep.last_outage <= SETTLED + TICK)
    before = upkeep.next_catch_up
    threading.Event().wait(0.05)
    upkeep.outage()
    upkeep.next_catch_up = 0.0  # its time has come, but what was lost in the outage is too young for it
    upkeep.catch_up()
    assert before < upkeep.next_catch_up <= upkeep.last_outage + SETTLED + TICK


# --- PostgreSQL goes away ---------------------------------------------------------------------------------


def test_postgresql_restarts_in_mid_traffic_and_nothing_is_lost_or_doubled(tmp_path: Path) -> None:
    """It is stopped in three ways while six users write; then the gateway is started again, before the database."""
    with contextlib.ExitStack() as stack:
        twilio, openai_server = stack.enter_context(Simulator()), stack.enter_context(LocalOpenAI())
        openai_server.think_seconds = 0.2
        postgres = Postgres(tmp_path / "db")
        stack.callback(postgres.stop, signal.SIGQUIT)
        url = postgres.url
        env = environment(url, twilio, openai_server, **FAST, **UNLIMITED)
        process = stack.enter_context(Process(tmp_path, env)).ready()
        an_hour_ago(url)
        users = [f"whatsapp:+52155333000{n:02}" for n in range(6)]
        stop, sent = threading.Event(), {user: list[str]() for user in users}
        answers: list[Delivery] = []

        def write(user: str) -> None:
            """Write a message every now and then, two minutes late so that the catch-up need not wait for them."""
            while not stop.wait(0.3):
                sent[user].append(f"{user[-2:]}-{len(sent[user])}")
                answers.append(twilio.receive(user, sent[user][-1], at=datetime.now(UTC) - timedelta(minutes=2)))

        writers = [threading.Thread(target=write, args=(user,)) for user in users]
        for writer in writers:
            writer.start()
        for number in (signal.SIGINT, signal.SIGQUIT, signal.SIGKILL):
            before = len(answers)
            wait_for(lambda before=before: len(answers) > before + 12, 60)  # type: ignore[misc]
            postgres.stop(number)
            wait_for(lambda: "<Message>" in answers[-1].body, 60)
            postgres.start()
        wait_for(lambda: "<Message>" not in answers[-1].body, 60)
        stop.set()
        for writer in writers:
            writer.join()
        assert {answer.status for answer in answers} == {200}
        process.send_signal(signal.SIGTERM)
        assert process.exit_code() == 0
        an_hour_ago(url)
        postgres.stop(signal.SIGINT)
        stack.enter_context(Process(tmp_path, env)).ready()  # it begins without a database
        postgres.start()
        every = {text for texts in sent.values() for text in texts}
        with database_at(url) as db:
            done = "SELECT m.body FROM messages m JOIN runs r ON r.id = m.run_id WHERE r.state = 'done'"
            wait_for(lambda: every <= {row["body"] for row in db.rows(done)}, 45)
        for user in users:
            said = [word for body in bodies(twilio, user) for word in body.removeprefix("Eco: ").split("\n")]
            assert Counter(said) == Counter(sent[user])


def test_database_that_hangs_users_are_told_before_twilio_gives_up(tmp_path: Path) -> None:
    """PostgreSQL stands still, as behind a network that is cut: connections neither answer nor break."""
    with contextlib.ExitStack() as stack:
        twilio, openai_server = stack.enter_context(Simulator()), stack.enter_context(LocalOpenAI())
        postgres = Postgres(tmp_path / "db")
        stack.callback(postgres.stop, signal.SIGQUIT)
        env = environment(postgres.url, twilio, openai_server, WORKER_THREADS="0", WEB_THREADS="2")
        hilo = Hilo(load_settings(env))
        migrate(postgres.url)
        hilo.start()
        stack.callback(hilo.stop)
        hilo.db.HURRY = 1.0
        assert "<Message>" not in twilio.receive(ANA, "hola").body
        server = postgres.processes()
        for process in server:
            process.suspend()
        began = time.monotonic()
        with ThreadPoolExecutor(8) as pool:
            answers = list(pool.map(lambda n: twilio.receive(f"whatsapp:+5215533400{n:03}", "hola"), range(8)))
        took = time.monotonic() - began
        for process in server:
            process.resume()
        assert ["<Message>" in answer.body for answer in answers] == [True] * 8
        assert took < 3  # those who came later waited for nobody: eight of a second, two at a time, would be four
        hilo.db.hung_until = 0.0
        assert "<Message>" not in twilio.receive(ANA, "¿hola?").body


# --- A worker that was paused -----------------------------------------------------------------------------


@pytest.fixture
def apart(database_url: str, twilio: Simulator, openai_server: LocalOpenAI, tmp_path: Path) -> Iterator[Apart]:
    """Starts processes that share one database."""
    openai_server.model = clerk
    with contextlib.ExitStack() as stack, database_at(database_url) as db:
        yield Apart(stack, tmp_path, db, environment(database_url, twilio, openai_server, **FAST))


@dataclass
class Apart:
    """Processes that share one database, and what they left there."""

    stack: contextlib.ExitStack
    directory: Path
    db: Database
    env: dict[str, str]

    def start(self, command: str = "serve", stop_at: str = "", **more: str) -> Process:
        """Return a process that is starting."""
        return self.stack.enter_context(Process(self.directory, {**self.env, **more}, command, stop_at))

    def done(self, count: int) -> list[dict[str, Any]]:
        """Return the runs once `count` of them are done and no other is open."""
        self.db.rows("NOTIFY hilo")  # nobody need wait for the five seconds after which a process looks by itself

        def finished() -> list[dict[str, Any]] | None:
            threading.Event().wait(0.05)
            runs = self.db.rows("SELECT * FROM runs ORDER BY id")
            return runs if len(runs) >= count and all(run["state"] == "done" for run in runs) else None

        found: list[dict[str, Any]] = wait_for(finished, 60)
        return found


def test_worker_paused_longer_than_its_lease_neither_writes_nor_sends_and_cancels_its_response(
    apart: Apart, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    """One worker stands still at three steps; another takes its run over each time; then the first goes on."""
    steps = ("created", "written", "sending")
    users = {step: f"whatsapp:+5215544400{n:02}" for n, step in enumerate(steps)}
    stops = ", ".join(f"{users[step][-4:]} · {step}=STOP" for step in steps)
    web, slow, other = apart.start(WORKER_THREADS="0"), apart.start("worker", stops), apart.start("worker")
    for process in (web, slow, other):
        process.ready()
    openai_server.model = script([never(), clerk], shared=True)
    openai_server.think_seconds = 0.2
    for count, step in enumerate(steps, 1):
        other.pause()
        twilio.receive(users[step], f"pregunta {step}")
        wait_for(slow.paused, 60)
        other.send_signal(signal.SIGCONT)
        apart.done(count)
        assert complete(bodies(twilio, users[step]), f"pregunta {step}")
        slow.send_signal(signal.SIGCONT)
        wait_for(lambda user=users[step]: slow.lines(f"{user[-4:]} ⚠️ another worker took this run over"), 60)  # type: ignore[misc]
    for step in steps:
        assert complete(bodies(twilio, users[step]), f"pregunta {step}")
    assert {run["outcome"] for run in apart.done(3)} == {"answered"}
    assert (openai_server.overlaps, openai_server.orphans()) == ([], [])
    statuses = [response.status for response in openai_server.responses.values()]
    assert statuses == ["cancelled", *["completed"] * 3]  # by the worker that had made it


# --- Several processes, and their end ---------------------------------------------------------------------


def test_three_processes_keep_each_users_order_share_the_work_and_end_well_under_load(
    apart: Apart, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = echo
    openai_server.think_seconds = lambda: random.uniform(0, 0.2)
    processes = [apart.start(command, WORKER_THREADS="1", **UNLIMITED) for command in ("serve", "worker", "worker")]
    for process in processes:
        process.ready()
    users = {f"whatsapp:+52155666000{n:02}": list[str]() for n in range(8)}
    enough = threading.Event()

    def write(user: str) -> None:
        while not enough.wait(random.uniform(0, 0.3)):
            users[user].append(f"m{len(users[user])}")
            assert twilio.receive(user, users[user][-1]).status == 200

    with ThreadPoolExecutor(len(users)) as pool:
        writing = [pool.submit(write, user) for user in users]
        wait_for(lambda: all(process.lines("· written") for process in processes), 60)  # the work is shared
        for _ in range(2):
            processes[2].send_signal(signal.SIGTERM)  # in mid-traffic, and twice
        assert processes[2].exit_code(25) == 0
        enough.set()
        for future in writing:
            future.result()
    processes[0].send_signal(signal.SIGTERM)  # with a backlog of its own
    assert processes[0].exit_code(25) == 0
    apart.done(len(users))
    for user, written in users.items():
        said = [word for body in bodies(twilio, user) for word in body.removeprefix("Eco: ").split("\n")]
        assert said == written
    assert (openai_server.overlaps, openai_server.lock_rejections, openai_server.orphans()) == ([], [], [])


# --- OpenAI fails again and again -------------------------------------------------------------------------


def test_breaker_opens_after_failures_in_a_row_and_lets_one_probe_through_at_a_time() -> None:
    breaker = Breaker(limit=3, pause=0.1)
    breaker.failed(1)
    breaker.failed(2)
    breaker.succeeded()
    for run in range(3):
        assert breaker.allows(run)
        breaker.failed(run)
    assert not breaker.allows(4)
    wait_for(lambda: breaker.allows(5), 1)
    assert breaker.allows(5)  # again, after a rotation
    breaker.next_probe = time.monotonic()  # the pause is over, but the probe is on its way
    breaker.failed(6)  # a turn of before
    assert not breaker.allows(7)
    breaker.failed(5)
    wait_for(lambda: breaker.allows(8), 1)
    breaker.succeeded()
    assert breaker.allows(9) and breaker.allows(10)


def test_openai_hangs_turns_in_flight_are_answered_at_their_deadline_and_wait_for_no_other(
    start: Callable[..., Hilo], twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = lambda request, items: never()
    hilo = start(THREADS_RUN_TIMEOUT="5", WORKER_THREADS="3", LEASE_SECONDS="2")
    users = [f"whatsapp:+52155222300{n:02}" for n in range(12)]
    for user in users:
        twilio.receive(user, "hola")
    wait_for(lambda: len(hilo.rows("SELECT FROM runs WHERE state <> 'queued'")) == len(users))
    for method in ("GET", "POST"):
        openai_server.faults.append(Fault(f"{method} /v1/responses", hang=20, repeat=None))
    for _ in range(hilo.gateway.journey.threads.breaker.limit):
        hilo.gateway.journey.threads.breaker.failed(0)
    runs = hilo.done(len(users))
    assert {run["outcome"] for run in runs} == {"fallback"}
    late = "SELECT max(extract(epoch FROM written_at - deadline))::float8 AS seconds FROM runs"
    assert hilo.rows(late)[0]["seconds"] < 4  # two looks of two seconds each may be under way


def test_model_that_fails_in_every_response_opens_the_breaker_though_creates_go_well(
    start: Callable[..., Hilo], twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = fails("server_error")
    hilo = start()
    hilo.plug(fallback_reply=lambda reason: f"[{reason}]")
    for n in range(3):
        twilio.receive(f"whatsapp:+52155222200{n:02}", "hola")
    hilo.done(3)
    asked = len(openai_server.requests)
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1, timeout=2)[0].body == "[openai_down]"
    assert len(openai_server.requests) == asked
