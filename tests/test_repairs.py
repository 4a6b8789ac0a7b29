"""Threads that are of no use any more: each heals by a new conversation that is told what was said before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import openai
import pytest

from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo, wait_for
from tests.local_openai import Answer, Fault, LocalOpenAI, calls, fails, says, script, stops_short

TOLD = [("user", "hola"), ("assistant", "Eco: hola")]


@pytest.fixture
def hilo(start: Callable[..., Hilo], twilio: Simulator) -> Hilo:
    """A gateway that has answered one message, on a conversation that is there now."""
    hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    hilo.plug(fallback_reply=lambda reason: f"[{reason}]")
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 1)
    hilo.done()
    return hilo


@pytest.fixture
def first(hilo: Hilo, openai_server: LocalOpenAI) -> Any:
    """The conversation of that first answer."""
    (conversation,) = openai_server.conversations.values()
    return conversation


def thread_id(hilo: Hilo) -> str | None:
    """The conversation in the map."""
    rows = hilo.rows("SELECT thread_id FROM oa_threads_map")
    return rows[0]["thread_id"] if rows else None


def creates(server: LocalOpenAI) -> list[dict[str, Any]]:
    """The bodies of the calls that created a response, in order."""
    return [request.body for request in server.requests if (request.method, request.path) == ("POST", "/v1/responses")]


def seeds(server: LocalOpenAI, conversation_id: str | None) -> list[tuple[str, str]]:
    """What a new conversation was told, as (role, text)."""
    made = [r.body for r in server.requests if (r.method, r.path) == ("POST", "/v1/conversations")]
    number = list(server.conversations).index(str(conversation_id))
    return [(item["role"], item["content"]) for item in made[number].get("items") or ()]


def test_next_turn_uses_the_same_conversation(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    twilio.receive(ANA, "¿y ahora?")
    twilio.wait_for(ANA, 2)
    assert list(openai_server.conversations) == [first.id] == [thread_id(hilo)]


# --- Broken in one way or another: the next message gets its answer all the same ----------------------------


def forget_row(hilo: Hilo, server: LocalOpenAI, conversation: Any) -> None:
    hilo.rows("DELETE FROM oa_threads_map WHERE thread_id = :t", t=conversation.id)


def delete(hilo: Hilo, server: LocalOpenAI, conversation: Any) -> None:
    openai.OpenAI(api_key="sk-local", base_url=server.url).conversations.delete(conversation.id)


def poison(hilo: Hilo, server: LocalOpenAI, conversation: Any) -> None:
    call = {
        "id": "fc_x",
        "type": "function_call",
        "call_id": "call_x",
        "name": "x",
        "arguments": "{}",
        "status": "completed",
    }
    conversation.items.append(call)


def lock_for_good(hilo: Hilo, server: LocalOpenAI, conversation: Any) -> None:
    conversation.stuck = True


def overflow(hilo: Hilo, server: LocalOpenAI, conversation: Any) -> None:
    text = {"type": "input_text", "text": "palabra " * 40_000}
    conversation.items.append(
        {"id": "msg_x", "type": "message", "role": "user", "content": [text], "status": "completed"}
    )
    server.context_limit = 50_000


def assistants_api(hilo: Hilo, server: LocalOpenAI, conversation: Any) -> None:
    hilo.rows("UPDATE oa_threads_map SET thread_id = 'thread_abc123'")


def lose_the_answer(hilo: Hilo, server: LocalOpenAI, conversation: Any) -> None:
    server.faults.append(Fault("POST /v1/responses$", cut="after"))


def break_down_midway(hilo: Hilo, server: LocalOpenAI, conversation: Any) -> None:
    server.faults.append(Fault("POST /v1/responses$", status=500, after_work=True))


def lose_the_response(hilo: Hilo, server: LocalOpenAI, conversation: Any) -> None:
    server.faults.append(Fault("GET /v1/responses/", status=404))


BROKEN = [
    forget_row, delete, poison, lock_for_good, overflow, assistants_api, lose_the_answer, break_down_midway,
    lose_the_response,
]  # fmt: skip


@pytest.mark.parametrize("harm", BROKEN, ids=lambda harm: harm.__name__)
def test_broken_thread_heals_by_a_new_one_that_is_told_the_transcript(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI, harm: Callable[..., None]
) -> None:
    harm(hilo, openai_server, first)
    twilio.receive(ANA, "¿y ahora?")
    assert twilio.wait_for(ANA, 2)[1].body == "Eco: ¿y ahora?"
    assert hilo.done(2)[1]["outcome"] == "answered"
    healed = thread_id(hilo)
    assert healed and healed != first.id
    assert seeds(openai_server, healed) == TOLD  # and not the message that is being answered
    last = creates(openai_server)[-1]
    assert last["conversation"] == healed and [item["content"] for item in last["input"]] == ["¿y ahora?"]


def test_lock_that_clears_keeps_the_conversation(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.faults.append(Fault("POST /v1/responses$", status=400, code="conversation_locked"))
    twilio.receive(ANA, "¿y ahora?")
    assert twilio.wait_for(ANA, 2)[1].body == "Eco: ¿y ahora?"
    assert thread_id(hilo) == first.id and len(openai_server.conversations) == 1


def test_transcript_that_overflows_by_itself_falls_back(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.context_limit = 10
    twilio.receive(ANA, "¿y ahora?")
    assert twilio.wait_for(ANA, 2)[1].body == "[openai_down]"
    assert thread_id(hilo) is None


def test_new_conversation_is_told_the_last_twenty_lines_of_the_transcript(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    for n in range(12):
        twilio.receive(ANA, f"m{n}")
        twilio.wait_for(ANA, n + 2)
    hilo.done(13)
    forget_row(hilo, openai_server, first)
    twilio.receive(ANA, "¿y ahora?")
    twilio.wait_for(ANA, 14)
    told = seeds(openai_server, thread_id(hilo))
    assert told == [pair for n in range(2, 12) for pair in (("user", f"m{n}"), ("assistant", f"Eco: m{n}"))]


def test_what_was_said_before_a_fresh_start_is_not_told(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo.rows("SELECT forget_thread(:u)", u=ANA)
    twilio.receive(ANA, "otra vez hola")
    twilio.wait_for(ANA, 2)
    assert thread_id(hilo) != first.id and seeds(openai_server, thread_id(hilo)) == []


def test_discarded_conversation_is_deleted_at_openai_with_every_item(
    hilo: Hilo, first: Any, openai_server: LocalOpenAI
) -> None:
    text = [{"type": "input_text", "text": "algo privado"}]
    first.items += [{"id": f"msg_{n}", "type": "message", "role": "user", "content": text} for n in range(150)]
    hilo.rows("SELECT forget_thread(:u)", u=ANA)
    hilo.gateway.upkeep.delete_discarded()
    assert first.deleted and openai_server.leftover_items == {}
    assert hilo.rows("SELECT * FROM discarded_threads") == []


def test_discarded_conversation_that_openai_keeps_for_now_is_tried_again_later(
    hilo: Hilo, first: Any, openai_server: LocalOpenAI
) -> None:
    openai_server.faults.append(Fault("DELETE /v1/conversations/", status=500))
    hilo.rows("SELECT forget_thread(:u)", u=ANA)
    hilo.gateway.upkeep.delete_discarded()
    assert hilo.rows("SELECT attempts, due_at > now() AS later FROM discarded_threads") == [
        {"attempts": 1, "later": True}
    ]
    hilo.rows("UPDATE discarded_threads SET due_at = now()")
    hilo.gateway.upkeep.delete_discarded()
    assert openai_server.leftover_items == {} and hilo.rows("SELECT * FROM discarded_threads") == []


# --- A turn without the model's answer leaves no thread ------------------------------------------------------


@pytest.mark.parametrize(
    "answer", [fails("invalid_prompt"), stops_short(), stops_short("A medias")], ids=["failed", "empty", "cut short"]
)
def test_turn_that_does_not_end_in_the_models_answer_leaves_no_thread(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI, answer: Answer
) -> None:
    openai_server.model = answer
    twilio.receive(ANA, "¿y ahora?")
    twilio.wait_for(ANA, 2)
    hilo.done(2)
    assert thread_id(hilo) is None


def test_fallback_in_between_is_told_to_the_next_conversation(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    openai_server.model = script([fails("invalid_prompt"), says("Aquí sigo.")], shared=True)
    for n, text in enumerate(("dos", "tres")):
        twilio.receive(ANA, text)
        twilio.wait_for(ANA, n + 2)
        hilo.done(n + 2)
    assert seeds(openai_server, thread_id(hilo)) == [*TOLD, ("user", "dos"), ("assistant", "[error]")]


def test_plugins_answer_in_between_is_told_to_the_next_conversation(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo.plug(incoming_message=lambda message: "De 9 a 19." if "horario" in message.text else None)
    for n, text in enumerate(("¿horario?", "¿y los sábados?")):
        twilio.receive(ANA, text)
        twilio.wait_for(ANA, n + 2)
        hilo.done(n + 2)
        assert (thread_id(hilo) is None) == (n == 0)
    assert seeds(openai_server, thread_id(hilo)) == [*TOLD, ("user", "¿horario?"), ("assistant", "De 9 a 19.")]


# --- In the middle of a run: nothing with an effect is done twice ---------------------------------------------


def test_rotation_between_tool_rounds_carries_the_calls_and_runs_no_tool_twice(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    enrolled = []

    def inscribir(curso: str) -> str:
        """Inscribe al usuario en un curso."""
        enrolled.append(curso)
        first.deleted = True  # the conversation is gone when the output is to be sent
        return f"inscrito en {curso}"

    hilo.tool(inscribir, side_effects=True)
    openai_server.model = script([calls(("inscribir", {"curso": "XL-1"})), says("Quedaste inscrito.")], shared=True)
    twilio.receive(ANA, "inscríbeme en XL-1")
    assert twilio.wait_for(ANA, 2)[1].body == "Quedaste inscrito."
    assert enrolled == ["XL-1"]
    carried = creates(openai_server)[-1]["input"]
    assert [item.get("type", item.get("role")) for item in carried] == ["user", "function_call", "function_call_output"]
    assert carried[1]["call_id"] == carried[2]["call_id"] and carried[2]["output"] == "inscrito en XL-1"
    assert seeds(openai_server, thread_id(hilo)) == TOLD


def test_row_deleted_while_a_tool_runs_lets_the_turn_end_on_its_conversation(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    def hora() -> str:
        """Dice la hora."""
        forget_row(hilo, openai_server, first)
        return "7:00"

    hilo.tool(hora)
    openai_server.model = script([calls(("hora", {})), says("Son las 7.")], shared=True)
    twilio.receive(ANA, "¿qué hora es?")
    assert twilio.wait_for(ANA, 2)[1].body == "Son las 7."
    assert len(openai_server.conversations) == 1


def test_lost_create_after_a_tool_round_is_made_again_without_the_tool(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    times = []

    def inscribir() -> str:
        """Inscribe al usuario."""
        times.append(1)
        openai_server.faults.append(Fault("POST /v1/responses$", cut="after"))
        return ""

    hilo.tool(inscribir, side_effects=True)
    openai_server.model = script([calls(("inscribir", {})), says("Listo.")], shared=True)
    twilio.receive(ANA, "inscríbeme")
    assert twilio.wait_for(ANA, 2)[1].body == "Listo."
    assert times == [1]
    outputs = [
        item["output"] for item in creates(openai_server)[-1]["input"] if item.get("type") == "function_call_output"
    ]
    assert outputs == [""]


def test_retried_create_after_a_tool_round_answers_the_same_calls(
    hilo: Hilo, first: Any, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    times = []

    def consultar() -> str:
        """Consulta algo; puede devolver nada."""
        times.append(1)
        return ""

    hilo.tool(consultar)
    openai_server.model = script([calls(("consultar", {})), says("Listo.")], shared=True)
    openai_server.faults.append(Fault("POST /v1/responses$", status=429, headers={"retry-after": "0.1"}))
    # The fault takes the first create; the one after the tool gets another.
    twilio.receive(ANA, "consulta")
    wait_for(lambda: times)
    assert twilio.wait_for(ANA, 2)[1].body == "Listo."
    assert times == [1] and openai_server.duplicate_outputs == []
    assert len(openai_server.conversations) == 1
