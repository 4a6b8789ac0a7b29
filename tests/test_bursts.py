"""Several messages in a row: how long each waits for the next, and which turn they become."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo
from tests.local_openai import LocalOpenAI

Start = Callable[..., Hilo]
WAITS = "SELECT extract(epoch FROM due_at - now())::float8 AS s FROM runs WHERE state = 'queued'"


def turns(server: LocalOpenAI) -> list[list[tuple[str, str]]]:
    """The input of each create call: role and text."""
    asked = [r for r in server.requests if (r.method, r.path) == ("POST", "/v1/responses")]
    return [[(item["role"], item["content"]) for item in request.body["input"]] for request in asked]


def test_three_messages_in_a_row_are_one_turn_and_one_answer(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(BURST_SECONDS="0.7", OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    for text in ("hola", "info", "del curso de excel"):
        twilio.receive(ANA, text)
    assert [reply.body for reply in twilio.wait_for(ANA, 1)] == ["Eco: hola\ninfo\ndel curso de excel"]
    hilo.done()
    assert turns(openai_server) == [[("user", "hola"), ("user", "info"), ("user", "del curso de excel")]]


def test_wait_begins_anew_with_each_message_up_to_five_times_its_length(start: Start, twilio: Simulator) -> None:
    hilo = start(BURST_SECONDS="4", WORKER_THREADS="0")
    twilio.receive(ANA, "hola")
    for passed, waits in ((3, 4), (6, 4), (17, 3), (19.5, 0.5), (30, -10)):  # seconds since the first message
        hilo.rows("UPDATE runs SET created_at = now() - :s::float8 * interval '1 s'", s=passed)
        twilio.receive(ANA, "y otra cosa")
        assert hilo.rows(WAITS)[0]["s"] == pytest.approx(waits, abs=0.3)


def test_message_that_looks_complete_ends_the_wait_sooner(start: Start, twilio: Simulator) -> None:
    hilo = start(BURST_SECONDS="6", WORKER_THREADS="0")
    twilio.receive(ANA, "hola")
    assert hilo.rows(WAITS)[0]["s"] == pytest.approx(6, abs=0.3)
    twilio.receive(ANA, "", media=[(b"OggS", "audio/ogg; codecs=opus")])
    assert hilo.rows(WAITS)[0]["s"] == pytest.approx(2, abs=0.3)
    twilio.receive(ANA, "/ayuda")
    assert hilo.rows(WAITS)[0]["s"] <= 0


def test_wait_is_kept_in_the_database_and_ends_in_another_process(start: Start, twilio: Simulator) -> None:
    web = start(BURST_SECONDS="0.5", WORKER_THREADS="0")
    twilio.receive(ANA, "hola")
    twilio.receive(ANA, "info")
    web.stop()
    start(BURST_SECONDS="0.5")
    assert twilio.wait_for(ANA, 1)[0].body == "Eco: hola\ninfo"


@pytest.mark.parametrize(("text", "pays"), [("excel", 0.9), ("¿hay cursos de excel?", 0.3), ("/ayuda", 0.0)])
def test_single_message_pays_the_wait_once_and_no_more(
    start: Start, twilio: Simulator, text: str, pays: float
) -> None:
    hilo = start(BURST_SECONDS="0.9", OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    twilio.receive(ANA, text)
    run = hilo.done()[0]
    waited = (run["started_at"] - run["created_at"]).total_seconds()
    assert pays <= waited < pays + 0.6


def test_messages_while_the_model_works_wait_for_one_another_and_come_with_a_note(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(BURST_SECONDS="0.8", OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    with openai_server.gate("POST /v1/responses$") as gate:
        twilio.receive(ANA, "busco excel.")
        assert gate.arrived.wait(5)
        twilio.receive(ANA, "perdón")
    twilio.wait_for(ANA, 1)
    twilio.receive(ANA, "mejor word")  # the next turn has not begun: it waits after the last message
    assert [reply.body for reply in twilio.wait_for(ANA, 2)] == ["Eco: busco excel.", "Eco: perdón\nmejor word"]
    hilo.done(2)
    first, second = turns(openai_server)
    assert first == [("user", "busco excel.")]
    assert [role for role, _ in second] == ["developer", "user", "user"]
    assert second[0][1].startswith("Tu respuesta anterior se envió antes de que leyeras lo que sigue")
