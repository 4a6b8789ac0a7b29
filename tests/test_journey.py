"""A message's journey, from the signed webhook to the reply at Twilio."""

from __future__ import annotations

import hashlib
import json
import re
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest

from gateway import fetch_last_assistant_message, parsed
from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo, wait_for
from tests.local_openai import (
    Fault,
    LocalOpenAI,
    calls,
    course_assistant,
    fails,
    never,
    refuses,
    says,
    script,
    stops_short,
)

LUIS = "whatsapp:+5215511110002"
Start = Callable[..., Hilo]


@pytest.fixture
def woken(start: Start) -> Hilo:
    """A gateway that OpenAI's webhook wakes, whose traditional flow says why it was asked."""
    hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    hilo.plug(fallback_reply=lambda reason: f"[{reason}]")
    return hilo


def creates(server: LocalOpenAI) -> list[dict[str, Any]]:
    """The bodies of the calls that created a response, in order."""
    return [request.body for request in server.requests if (request.method, request.path) == ("POST", "/v1/responses")]


def user_texts(body: dict[str, Any]) -> list[str]:
    """What a create call tells the model that the user said."""
    return [item["content"] for item in body["input"] if item.get("role") == "user"]


def bodies(twilio: Simulator, address: str = ANA) -> list[str]:
    """The texts sent to a user."""
    return [message.body for message in twilio.sent_to(address)]


# --- The main path ----------------------------------------------------------------------------------------


def test_message_is_answered_by_the_assistant(hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.model = says("¡Hola! ¿Qué te gustaría aprender?")
    assert twilio.receive(ANA, "hola").status == 200
    replies = twilio.wait_for(ANA, 1)
    assert [reply.body for reply in replies] == ["¡Hola! ¿Qué te gustaría aprender?"]
    assert [run["outcome"] for run in hilo.done()] == ["answered"]


def test_question_about_a_course_is_answered_from_the_catalogue(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    woken.rows("INSERT INTO cursos (codigo, nombre, nivel) VALUES ('XL-1', 'Excel desde cero', 'basico')")
    openai_server.model = course_assistant
    twilio.receive(ANA, "excel")
    assert twilio.wait_for(ANA, 1)[0].body == "Encontré: Excel desde cero."
    assert woken.done()[0]["rounds"] == 1
    call = woken.rows("SELECT * FROM tool_calls")[0]
    assert (call["name"], call["ok"]) == ("buscar_curso", True) and "Excel desde cero" in call["output"]


def test_every_create_carries_instructions_tools_and_no_phone_number(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    woken.tool(hora)
    openai_server.model = script([calls(("hora", {})), says("Son las 7.")])
    twilio.receive(ANA, "¿qué hora es?")
    twilio.wait_for(ANA, 1)
    first, second = creates(openai_server)
    assert first["instructions"] == second["instructions"] and "asistente" in first["instructions"].lower()
    assert "hora" in [tool["name"] for tool in first["tools"]] and first["tools"] == second["tools"]
    assert first["background"] is True and first["store"] is True and first["conversation"] == second["conversation"]
    assert len(first["safety_identifier"]) == 64
    assert not any("5511110001" in str(request.body) for request in openai_server.requests)


def hora() -> str:
    """Dice la hora."""
    return "7:00"


def test_two_calls_of_a_response_run_in_parallel_and_are_answered_together(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    both = threading.Barrier(2, timeout=5)

    def precio(codigo: str) -> str:
        """Dice el precio de un curso."""
        both.wait()
        return codigo + ": 100"

    woken.tool(precio)
    openai_server.model = script([calls(("precio", {"codigo": "A"}), ("precio", {"codigo": "B"})), says("Listo.")])
    twilio.receive(ANA, "precios de A y B")
    twilio.wait_for(ANA, 1)
    assert [item["output"] for item in creates(openai_server)[1]["input"]] == ["A: 100", "B: 100"]
    assert [item["type"] for item in creates(openai_server)[1]["input"]] == ["function_call_output"] * 2


def test_model_that_never_stops_calling_is_cut_off_after_eight_rounds(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.ignores_background = True
    hilo = start()
    hilo.plug(fallback_reply=lambda reason: f"[{reason}]")
    hilo.tool(hora)
    openai_server.model = calls(("hora", {}))
    twilio.receive(ANA, "¿qué hora es?")
    assert twilio.wait_for(ANA, 1)[0].body == "[error]"
    run = hilo.done()[0]
    assert (run["rounds"], run["outcome"], run["reason"]) == (8, "fallback", "error")
    assert hilo.rows("SELECT count(*) AS n FROM tool_calls")[0]["n"] == 8
    assert hilo.rows("SELECT * FROM oa_threads_map") == []


# --- Several messages -------------------------------------------------------------------------------------


def test_messages_while_the_model_works_go_into_the_next_turn_together_in_order(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    with openai_server.gate("POST /v1/responses$") as gate:
        twilio.receive(ANA, "uno")
        assert gate.arrived.wait(5)
        for text in ("dos", "tres", "cuatro"):
            twilio.receive(ANA, text)
    assert [reply.body for reply in twilio.wait_for(ANA, 2)] == ["Eco: uno", "Eco: dos\ntres\ncuatro"]
    assert len(woken.done(2)) == 2
    first, second = creates(openai_server)
    assert user_texts(second) == ["dos", "tres", "cuatro"] and first["conversation"] == second["conversation"]
    assert second["input"][0]["role"] == "developer"  # they were written before the first answer was read


def test_redelivery_changes_nothing(woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    sid = twilio.receive(ANA, "hola").sid
    twilio.receive(ANA, "otra", profile_name="Ana María")
    twilio.wait_for(ANA, 1)
    woken.done()
    wait_for(lambda: not woken.rows("SELECT 1 AS x FROM messages WHERE direction = 'out' AND state <> 'read'"))

    def everything() -> list[Any]:
        return [woken.rows(f"SELECT * FROM {name} ORDER BY 1") for name in ("users", "messages", "runs")]  # noqa: S608

    before = everything()
    assert twilio.receive(ANA, "hola", sid=sid).status == 200
    assert everything() == before


def test_redelivery_while_the_first_is_answered_is_answered_once(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    twilio.fault("webhook", "repeat")
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    woken.done()
    assert len(creates(openai_server)) == 1 and len(twilio.sent_to(ANA)) == 1


def test_many_messages_at_once_never_run_two_turns_of_one_user(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    second = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    openai_server.enforce_lock = False
    openai_server.think_seconds = 0.02
    users = [f"whatsapp:+521551111{n:04}" for n in range(4)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda n: twilio.receive(users[n % 4], f"m{n}").status, range(40)))
    assert answers == [200] * 40
    hilo.done(4)
    assert openai_server.max_concurrent_per_conversation == 1
    told = [text for body in creates(openai_server) for text in user_texts(body)]
    assert sorted(told) == sorted(f"m{n}" for n in range(40))
    for user in users:
        mine = hilo.rows("SELECT body FROM messages WHERE user_phone = :u AND direction = 'in' ORDER BY id", u=user)
        assert [text for text in told if text in {row["body"] for row in mine}] == [row["body"] for row in mine]
    assert second.rows("SELECT count(*) AS n FROM runs WHERE outcome <> 'answered'")[0]["n"] == 0


def test_two_users_do_not_wait_for_each_other(woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.model = lambda request, items: never() if user_texts(request) == ["lento"] else says("Va.")
    twilio.receive(ANA, "lento")
    wait_for(lambda: openai_server.in_flight == 1)
    twilio.receive(LUIS, "rápido")
    assert twilio.wait_for(LUIS, 1)[0].body == "Va."
    assert twilio.sent_to(ANA) == []


# --- Who wakes a run --------------------------------------------------------------------------------------


def test_webhook_wakes_the_run_and_one_look_suffices(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.think_seconds = 0.3
    began = time.monotonic()
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    assert time.monotonic() - began < 4  # without the webhook it would be five seconds
    assert openai_server.polls == 1


def test_webhook_that_comes_before_the_id_is_saved_loses_nothing(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.webhook_early = True
    began = time.monotonic()
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "Eco: hola"
    assert time.monotonic() - began < 4


def test_repeated_webhooks_change_nothing(woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.webhook_repeat = 4
    woken.tool(hora, side_effects=True)
    openai_server.model = script([calls(("hora", {})), says("Son las 7.")])
    twilio.receive(ANA, "¿qué hora es?")
    twilio.wait_for(ANA, 1)
    woken.done()
    wait_for(lambda: sum(len(delivery.statuses) for delivery in openai_server.deliveries) == 8)
    assert len(creates(openai_server)) == 2 and len(twilio.sent_to(ANA)) == 1
    assert woken.rows("SELECT count(*) AS n FROM tool_calls")[0]["n"] == 1


def test_lost_webhook_is_made_up_for_by_the_poll_at_the_deadline(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET, THREADS_RUN_TIMEOUT="1.5")
    openai_server.webhook_loss = 1.0
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "Eco: hola"
    assert hilo.done()[0]["outcome"] == "answered"


def test_without_a_webhook_polls_alone_serve(hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.think_seconds = 0.5
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "Eco: hola"
    assert 1 <= openai_server.polls <= 4


def test_message_and_webhook_taken_by_a_web_process_wake_the_worker_process(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    worker = start()
    web = start(WORKER_THREADS="0", OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    twilio.receive(ANA, "primero")  # whatever the worker had to learn at its start, it knows after this one
    twilio.wait_for(ANA, 1)
    worker.done()
    began = time.monotonic()
    assert twilio.receive(ANA, "hola").status == 200
    twilio.wait_for(ANA, 2)
    assert time.monotonic() - began < 3  # the net is five seconds
    assert web.rows("SELECT count(*) AS n FROM responses WHERE ended_at IS NULL")[0]["n"] == 0


def test_stopped_gateway_leaves_no_threads_behind(start: Start, twilio: Simulator) -> None:
    before = set(threading.enumerate())
    hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    ours = {"work", "dispatch", "listen", "tell_others", "upkeep", "events", "web"}
    hilo.stop()
    wait_for(lambda: not [t for t in set(threading.enumerate()) - before if t.name.split()[0] in ours])


def test_places_beyond_enough_rest_while_the_process_computes_and_come_back(start: Start, twilio: Simulator) -> None:
    hilo = start(WORKER_THREADS="12", OPENAI_API_KEY="")
    workers, beyond = hilo.gateway.workers, []

    def compute() -> str:
        before = workers.places
        busy = len(workers.busy)
        beyond.append(busy - max(before, workers.places))  # they change while it looks
        hashlib.pbkdf2_hmac("sha256", b"", b"", 150_000)  # all cores: it needs no interpreter
        return "listo"

    hilo.plug(incoming_message=compute)
    users = [f"whatsapp:+52155{n:08d}" for n in range(150)]
    for user in users:
        twilio.receive(user, "hola")
    wait_for(lambda: workers.places == workers.ENOUGH, 30)
    hilo.done(len(users), 60)
    assert len(beyond) == len(users) and max(beyond) <= 0
    assert all(len(twilio.wait_for(user, 1)) == 1 for user in users)
    wait_for(lambda: workers.places == 12)


# --- The deadline, and answers that are none ---------------------------------------------------------------


@pytest.fixture
def hurried(start: Start) -> Hilo:
    """A gateway that gives the model one second."""
    hilo = start(THREADS_RUN_TIMEOUT="1", OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    hilo.plug(fallback_reply=lambda reason: f"[{reason}]")
    return hilo


def test_slow_model_is_cancelled_at_the_deadline_and_the_fallback_answers(
    hurried: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = never()
    began = time.monotonic()
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "[timeout]"
    assert time.monotonic() - began < 3
    run = hurried.done()[0]
    assert (run["outcome"], run["reason"]) == ("fallback", "timeout")
    assert [record.status for record in openai_server.responses.values()] == ["cancelled"]
    assert hurried.rows("SELECT * FROM oa_threads_map") == []


def test_answer_that_comes_with_the_cancel_is_used(
    hurried: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = says("Justo a tiempo.", seconds=60)
    openai_server.cancel_completes = True
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "Justo a tiempo."
    assert hurried.done()[0]["outcome"] == "answered"


def test_calls_that_come_with_the_cancel_are_not_made(
    hurried: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hurried.tool(hora)
    openai_server.model = calls(("hora", {}), seconds=60)
    openai_server.cancel_completes = True
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "[timeout]"
    assert hurried.rows("SELECT * FROM tool_calls") == []


@pytest.mark.parametrize(("seconds", "reply", "ends"), [(0, "Eco: hola", "completed"), (60, "[timeout]", "cancelled")])
def test_poll_that_hangs_holds_up_no_reply_and_the_cancel_tells_what_became_of_it(
    hurried: Hilo, twilio: Simulator, openai_server: LocalOpenAI, seconds: float, reply: str, ends: str
) -> None:
    openai_server.think_seconds = seconds
    openai_server.faults.append(Fault("GET /v1/responses/", hang=8, repeat=None))
    began = time.monotonic()
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == reply
    assert time.monotonic() - began < 5
    assert [record.status for record in openai_server.responses.values()] == [ends]


def test_create_that_hangs_holds_up_no_reply(hurried: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.faults.append(Fault("POST /v1/responses$", hang=8, repeat=None))
    began = time.monotonic()
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    assert time.monotonic() - began < 4
    assert hurried.done()[0]["outcome"] == "fallback" and hurried.rows("SELECT * FROM oa_threads_map") == []


def test_assistants_file_decides_what_is_sent(woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    assistants = woken.gateway.journey.assistants
    changes = {"vector_stores": ("vs_1",), "max_results": 7, "max_output_tokens": 500, "reasoning_effort": None}
    assistants["cursos"] = assistants["cursos"].model_copy(update={**changes, "tools": ()})
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    (body,) = creates(openai_server)
    assert body["tools"] == [{"type": "file_search", "vector_store_ids": ["vs_1"], "max_num_results": 7}]
    assert body["max_output_tokens"] == 500 and "reasoning" not in body


def test_conversation_that_cannot_be_made_in_time_holds_up_no_reply(
    hurried: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.faults.append(Fault("POST /v1/conversations", hang=8, repeat=None))
    began = time.monotonic()
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "[openai_down]"
    assert time.monotonic() - began < 4


def test_incomplete_answer_with_text_is_sent_and_its_thread_left(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = stops_short("Tenemos cursos de")
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "Tenemos cursos de"
    assert woken.done()[0]["outcome"] == "answered"
    assert woken.rows("SELECT * FROM oa_threads_map") == []


def test_incomplete_answer_without_text_falls_back(woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.model = stops_short()
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "[error]"


def test_refusal_is_sent_as_the_answer(woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.model = refuses("No puedo ayudarte con eso.")
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "No puedo ayudarte con eso."
    assert woken.done()[0]["outcome"] == "answered" and woken.rows("SELECT * FROM oa_threads_map")


def test_failed_response_is_tried_on_a_new_conversation(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = script([fails(), says("Ahora sí.")], shared=True)
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "Ahora sí."
    assert len({body["conversation"] for body in creates(openai_server)}) == 2
    assert [user_texts(body) for body in creates(openai_server)] == [["hola"], ["hola"]]


def test_response_that_fails_again_and_again_falls_back(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = fails()
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "[error]"
    assert len(creates(openai_server)) == 3
    run = woken.done()[0]
    assert (run["outcome"], run["reason"]) == ("fallback", "error")


def test_failure_that_would_come_again_falls_back_at_once(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = fails("invalid_prompt")
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "[error]"
    assert len(creates(openai_server)) == 1


def test_empty_answer_is_asked_for_again(woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.model = script([says("  "), says("Hola.")], shared=True)
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "Hola."


@pytest.mark.parametrize(
    ("output", "text"),
    [
        ([{"type": "message", "content": [{"type": "output_text", "text": "Hola."}, {"type": "output_new"}]}], "Hola."),
        ([{"type": "message", "content": None}, {"type": "new"}], ""),
        (None, ""),
    ],
    ids=["a part", "an item", "nothing"],
)
def test_parts_of_an_answer_that_are_of_no_known_kind_cost_no_others(output: Any, text: str) -> None:
    body = json.dumps({"id": "resp_1", "status": "completed", "output": output})
    assert fetch_last_assistant_message(parsed(SimpleNamespace(content=body))) == text


@pytest.mark.parametrize("answer", [says("¡Hola!\x00"), says("¡Hola!\ud83d")], ids=["NUL", "lone surrogate"])
def test_answer_with_characters_that_no_database_takes_is_sent_without_them(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI, answer: Any
) -> None:
    openai_server.model = answer
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1, timeout=5)[0].body == "¡Hola!"


def test_server_that_ignores_background_is_used_all_the_same(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.ignores_background = True
    hilo = start()
    hilo.tool(hora)
    openai_server.model = script([calls(("hora", {})), says("Son las 7.")])
    twilio.receive(ANA, "¿qué hora es?")
    assert twilio.wait_for(ANA, 1)[0].body == "Son las 7."
    assert openai_server.polls == 0 and hilo.done()[0]["outcome"] == "answered"


# --- OpenAI says no ---------------------------------------------------------------------------------------


def test_busy_openai_is_asked_again_after_its_retry_after(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.faults.append(Fault("POST /v1/responses$", status=429, headers={"retry-after": "1"}))
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "Eco: hola"
    refused, taken = [r for r in openai_server.requests if (r.method, r.path) == ("POST", "/v1/responses")]
    assert taken.at - refused.at >= 1 and refused.body["conversation"] == taken.body["conversation"]


def test_message_meanwhile_does_not_cut_short_what_openai_asked_for(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.faults.append(Fault("POST /v1/responses$", status=429, headers={"retry-after": "1"}))
    with openai_server.gate("POST /v1/responses$", before_work=True) as gate:
        twilio.receive(ANA, "uno")
        assert gate.arrived.wait(5)
        twilio.receive(ANA, "dos")
    assert twilio.wait_for(ANA, 1)[0].body == "Eco: uno\ndos"
    refused, taken = [r for r in openai_server.requests if (r.method, r.path) == ("POST", "/v1/responses")]
    assert taken.at - refused.at >= 1


def test_busy_openai_past_the_deadline_is_not_waited_for(
    hurried: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.faults.append(Fault("POST /v1/responses$", status=429, headers={"retry-after": "30"}))
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1, timeout=4)[0].body == "[openai_down]"


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 401, "code": "invalid_api_key"},
        {"status": 429, "code": "insufficient_quota"},
        {"status": 400, "code": "model_not_found"},
        {"status": 400, "code": "invalid_function_parameters"},
    ],
    ids=lambda fault: fault["code"],
)
def test_error_that_would_come_again_falls_back_at_once(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI, fault: dict[str, Any]
) -> None:
    openai_server.faults.append(Fault("POST /v1/responses$", repeat=None, **fault))
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "[openai_down]"
    assert len(creates(openai_server)) == 1


def test_fallback_of_two_parts_after_a_refused_create_is_put_down_between_them_and_sent_whole(
    hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo.plug(fallback_reply=lambda: ["uno", "dos"])
    openai_server.faults.append(Fault("POST /v1/responses$", status=401, code="invalid_api_key"))
    twilio.fault("callback", "lost", times=None)  # so the second part waits, and the run is taken up again for it
    twilio.receive(ANA, "hola")
    [run] = hilo.done(1)
    assert (run["outcome"], run["creating"], len(run["failures"])) == ("fallback", False, 1)
    assert [message.body for message in twilio.sent_to(ANA)] == ["uno", "dos"]


def test_openai_that_is_not_there_falls_back_within_the_deadline(
    hurried: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.stop()
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1, timeout=4)[0].body == "[openai_down]"
    openai_server.start()


def test_five_failures_in_a_row_open_the_breaker_and_a_probe_closes_it(
    hurried: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.down = True
    for n in range(5):
        twilio.receive(f"whatsapp:+52155222200{n:02}", "hola")
    hurried.done(5)
    while not hurried.gateway.journey.threads.breaker.is_open:  # a turn whose second was over before it asked
        twilio.receive(LUIS, "hola")
        hurried.done(len(hurried.rows("SELECT FROM runs")))
    asked = len(openai_server.requests)
    assert asked >= 5
    answered = len(twilio.sent_to(LUIS))
    twilio.receive(ANA, "hola")
    assert twilio.wait_for(ANA, 1)[0].body == "[openai_down]"
    assert len(openai_server.requests) == asked  # it was not even asked
    openai_server.down = False
    hurried.gateway.journey.threads.breaker.next_probe = 0.0  # the pause is over
    twilio.receive(ANA, "¿y ahora?")
    assert twilio.wait_for(ANA, 2)[1].body == "Eco: ¿y ahora?"
    twilio.receive(LUIS, "hola")
    assert twilio.wait_for(LUIS, answered + 1)[-1].body == "Eco: hola"


# --- What the model is told -------------------------------------------------------------------------------


def test_kind_of_message_that_nobody_reads_becomes_a_placeholder(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    twilio.receive(ANA, "", fields={"MessageType": "contacts"})
    twilio.wait_for(ANA, 1)
    assert user_texts(creates(openai_server)[0]) == ["[El usuario envió un tipo de mensaje que no se puede leer aquí.]"]


def test_model_is_not_told_a_message_twice(woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    for n in range(3):
        twilio.receive(ANA, f"m{n}")
        twilio.wait_for(ANA, n + 1)
        woken.done(n + 1)
    (conversation,) = openai_server.conversations.values()
    told = [part["text"] for item in conversation.items for part in item["content"]]
    assert told == ["m0", "Eco: m0", "m1", "Eco: m1", "m2", "Eco: m2"]


# --- The log ----------------------------------------------------------------------------------------------


def test_log_tells_each_step_on_a_line_with_the_run_and_no_text_or_number(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hilo")
    woken.tool(hora)
    openai_server.model = script([calls(("hora", {})), says("Son las siete de la mañana."), says("De nada.")])
    twilio.receive(ANA, "¿qué hora es, por favor?")
    twilio.wait_for(ANA, 1)
    woken.done()
    twilio.receive(ANA, "mil gracias")
    twilio.wait_for(ANA, 2)
    run = woken.done(2)[0]["id"]
    lines = [record.getMessage() for record in caplog.records if record.name == "hilo"]
    conversation = next(iter(openai_server.conversations))
    start = f"run={run} whatsapp:+52…0001 "
    wait_for(lambda: any(record.getMessage() == start + "✅ answered" for record in caplog.records))
    assert f"{start}🧵 Thread ID: {conversation} (created, 0 messages told)" in lines
    assert any(line.endswith(f"🧵 Thread ID: {conversation} (reused)") for line in lines)
    assert any(line.startswith(start + "🔧 Tool ejecutado: hora (") and line.endswith(" ms)") for line in lines)
    assert any(line.startswith(start + "📤 Respuesta enviada (1 parte, ") for line in lines)
    assert any(line.endswith(" s desde el mensaje)") and ("," in line.split("parte, ")[1]) for line in lines)
    whole = "\n".join(lines)
    assert "hora es" not in whole and "siete" not in whole and "gracias" not in whole and "5511110001" not in whole


def test_reply_time_in_the_log_counts_from_the_message_not_from_the_turn(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", "hilo")
    with openai_server.gate("POST /v1/responses$") as gate:
        twilio.receive(ANA, "uno")
        assert gate.arrived.wait(5)
        twilio.receive(ANA, "dos")
        woken.rows("UPDATE messages SET at = now() - interval '1 minute' WHERE body = 'dos'")
    twilio.wait_for(ANA, 2)
    wait_for(lambda: [line for line in caplog.messages if re.search(r"\(1 parte, 6\d,", line)])


def test_fault_in_the_log_is_an_sqlstate_only(woken: Hilo, twilio: Simulator, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG", "hilo")
    woken.rows("ALTER TABLE runs ADD CONSTRAINT sin_respuesta CHECK (outcome IS NULL) NOT VALID")
    twilio.receive(ANA, "un secreto")
    wait_for(lambda: [line for line in caplog.messages if "SQLSTATE 23514 sin_respuesta" in line])
    assert "un secreto" not in caplog.text and "Failing row" not in caplog.text
