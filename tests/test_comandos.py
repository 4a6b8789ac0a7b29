"""What a user types to command: /reiniciar, /ayuda, a team's own, and the words to leave and to return."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable

import pytest

from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo, wait_for
from tests.local_openai import LocalOpenAI
from tools import Context, Message

Start = Callable[..., Hilo]


@pytest.fixture
def woken(start: Start) -> Hilo:
    """A gateway that OpenAI's webhook wakes."""
    return start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)


def bodies(twilio: Simulator, address: str = ANA) -> list[str]:
    """The texts sent to a user."""
    return [message.body for message in twilio.sent_to(address)]


def say(twilio: Simulator, hilo: Hilo, text: str, replies: int = 1) -> list[str]:
    """Write, and return what was answered, once nothing is open any more."""
    before = len(bodies(twilio))
    twilio.receive(ANA, text)
    twilio.wait_for(ANA, before + replies)
    hilo.done()
    return bodies(twilio)[before:]


def told(server: LocalOpenAI) -> list[str]:
    """What the newest conversation at OpenAI holds."""
    (*_, last) = server.conversations.values()
    return [part["text"] for item in last.items for part in item["content"]]


# --- /reiniciar -------------------------------------------------------------------------------------------


def test_reiniciar_begins_a_conversation_that_is_told_nothing_from_before_and_deletes_the_old_one(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    say(twilio, woken, "me llamo Ana")
    (first,) = openai_server.conversations
    assert say(twilio, woken, "/reiniciar") == ["Listo, empezamos de cero. ¿En qué te ayudo?"]
    say(twilio, woken, "¿cómo me llamo?")
    assert told(openai_server)[-2:] == ["¿cómo me llamo?", "Eco: ¿cómo me llamo?"]
    assert "me llamo Ana" not in told(openai_server)
    woken.gateway.upkeep.delete_discarded()
    wait_for(lambda: openai_server.conversations[first].deleted)
    assert woken.rows("SELECT * FROM discarded_threads") == []


def test_reiniciar_in_the_middle_of_a_burst_leaves_what_came_before_and_answers_what_came_after(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = start(BURST_SECONDS="1", OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET)
    twilio.receive(ANA, "busco francés")
    twilio.wait_for(ANA, 1)
    hilo.done()
    with openai_server.gate("POST /v1/responses$") as gate:  # what follows becomes one turn
        twilio.receive(ANA, "mejor alemán.")
        assert gate.arrived.wait(5)
        for text in ("y el italiano", "/reiniciar", "busco excel"):
            twilio.receive(ANA, text)
    twilio.wait_for(ANA, 4)
    hilo.done(3)
    assert bodies(twilio)[2:] == ["Listo, empezamos de cero. ¿En qué te ayudo?", "Eco: busco excel"]
    assert told(openai_server) == ["busco excel", "Eco: busco excel"]


# --- /ayuda and a team's own ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "command", "first_line"),
    [
        ("2", "/AYUDA ", "Esto es lo que puedes escribirme:"),
        ("hello, I need a course", "/ayuda", "This is what you can write to me:"),
        ("oi, tudo bem?", "/ayuda", "Isto é o que você pode me escrever:"),
        ("2", "/help", "This is what you can write to me:"),
    ],
)
def test_ayuda_answers_in_the_users_language_without_the_model(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI, before: str, command: str, first_line: str
) -> None:
    say(twilio, woken, before)
    asked = len(openai_server.requests)
    (reply,) = say(twilio, woken, command)
    assert reply.splitlines()[0] == first_line and "/reiniciar" in reply
    assert len(openai_server.requests) == asked


def test_ayuda_names_the_advisors_only_where_there_are_some(start: Start, twilio: Simulator) -> None:
    alone = start()
    assert "/asesor" not in say(twilio, alone, "/ayuda")[0]
    alone.stop()
    assert "/asesor" in say(twilio, start(ASESORES="whatsapp:+5215500000001"), "/ayuda")[0]


def test_ayuda_of_a_plugin_that_fails_leaves_the_rest(
    woken: Hilo, twilio: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = types.ModuleType("tools.averiado")
    broken.ayuda = lambda context: context.nada  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tools.averiado", broken)
    assert say(twilio, woken, "/ayuda")[0].endswith("para no recibir más mensajes")


@pytest.mark.parametrize(
    ("gone", "text", "begins"),
    [
        (("asesor", "limites"), "/ayuda", "Esto es"),
        (("comandos", "limites"), "/asesor", "Ya avisé"),
        (("asesor", "comandos"), "hola", "Por hoy llegamos"),
    ],
)
def test_plugin_works_without_the_others(
    start: Start, twilio: Simulator, gone: tuple[str, str], text: str, begins: str
) -> None:
    hilo = start(ASESORES="whatsapp:+5215500000001", LIMITE_DIA="1")
    for name in gone:
        hilo.gateway.plugins.unload(f"tools.{name}")
    if "limites" not in gone:
        say(twilio, hilo, "hola")
    assert say(twilio, hilo, text)[0].startswith(begins)


def test_command_of_a_team_is_answered_by_its_plugin(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    def incoming_message(message: Message, context: Context) -> str | None:
        return "De 9 a 18 h." if message.text.strip().lower() == "/horario" else None

    woken.plug(incoming_message=incoming_message)
    assert say(twilio, woken, "/horario") == ["De 9 a 18 h."]
    assert say(twilio, woken, "/ayuda")[0].startswith("Esto es")
    assert openai_server.requests == []


def test_command_that_nobody_knows_goes_to_the_assistant(woken: Hilo, twilio: Simulator) -> None:
    assert say(twilio, woken, "/precios") == ["Eco: /precios"]


# --- Leaving and returning --------------------------------------------------------------------------------


@pytest.mark.parametrize("word", [" Baja. ", "Cancelar suscripción"])
def test_opt_out_word_is_confirmed_once_and_kept_until_the_word_to_return(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI, word: str
) -> None:
    assert say(twilio, woken, word) == ["Listo, ya no te enviaremos más mensajes. Si quieres volver, escribe ALTA."]
    for text in ("hola", "/ayuda", "/bot", "/reiniciar", "/asesor"):
        twilio.receive(ANA, text)
    woken.done()
    assert len(bodies(twilio)) == 1 and openai_server.requests == []
    assert say(twilio, woken, "ALTA") == ["¡Qué bueno tenerte de vuelta! Escríbenos cuando quieras."]
    assert say(twilio, woken, "hola") == ["Eco: hola"]


def test_opt_out_while_the_model_works_stops_that_answer(
    woken: Hilo, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    with openai_server.gate("POST /v1/responses$") as gate:
        twilio.receive(ANA, "hola")
        assert gate.arrived.wait(5)
        twilio.receive(ANA, "BAJA")
    woken.done(2)
    assert [body[:17] for body in bodies(twilio)] == ["Listo, ya no te e"]
    assert woken.rows("SELECT body FROM messages WHERE state = 'withheld'") == [{"body": "Eco: hola"}]


def test_opt_out_between_two_parts_withholds_the_second(woken: Hilo, twilio: Simulator) -> None:
    woken.plug(format_reply=lambda text: ["uno", "dos"])
    gate = twilio.gate(ANA)
    twilio.receive(ANA, "hola")
    assert gate.arrived.wait(5)
    twilio.receive(ANA, "BAJA")
    gate.release()
    woken.done(2)
    assert [body[:5] for body in bodies(twilio)] == ["uno", "Listo"]


def test_tool_that_hands_over_does_not_bring_back_a_user_who_left(woken: Hilo, twilio: Simulator) -> None:
    say(twilio, woken, "BAJA")
    assert woken.rows("SELECT set_mode(:u, 'human', 1, now()) AS m", u=ANA) == [{"m": None}]
    assert woken.rows("SELECT mode FROM users") == [{"mode": "out"}]


def test_word_to_return_from_a_user_who_never_left_goes_to_the_assistant(woken: Hilo, twilio: Simulator) -> None:
    assert say(twilio, woken, "alta") == ["Eco: alta"]
