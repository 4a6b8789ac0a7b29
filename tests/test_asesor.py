"""A conversation handed over to a person and back, as the user and the advisors see it; and the 24-hour window."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from settings import ConfigurationError, load_settings
from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo, wait_for
from tests.local_openai import LocalOpenAI, calls, says, script
from tools import Context, Message, Part, asesor
from tools._plugins import Plugins

LUIS = "whatsapp:+5215511110002"
MARTA = "whatsapp:+5215500000001"
PACO = "whatsapp:+5215500000002"
TEMPLATE = "HX" + "a" * 32
WANTS = "Ya avisé a un asesor: te escribe por este mismo chat en cuanto pueda."
NOBODY = "Disculpa, por ahora ningún asesor pudo atenderte en este chat, así que sigo yo contigo."
BACK = "Aquí estoy de nuevo. ¿En qué te ayudo?"
Start = Callable[..., Hilo]


class Chat:
    """The gateway, and who writes what to it."""

    def __init__(self, hilo: Hilo, twilio: Simulator):
        self.hilo, self.twilio = hilo, twilio
        self.seen: dict[str, int] = {}

    def says(self, who: str, text: str = "", name: str = "", quoting: str = "", **more: Any) -> None:
        """Write as somebody, in answer to one of our messages (its sid), and wait until all is done."""
        fields = {"OriginalRepliedMessageSid": quoting} if quoting else {}
        names = {ANA: "Ana", LUIS: "Luis", MARTA: "Marta", PACO: "Paco"}
        self.twilio.receive(who, text, fields=fields, profile_name=name or names.get(who, ""), **more)
        self.hilo.done()

    def heard(self, who: str) -> list[str]:
        """What somebody was sent since the last time."""
        texts = [message.body or f"<{message.content_sid}>" for message in self.twilio.sent_to(who)]
        new, self.seen[who] = texts[self.seen.get(who, 0) :], len(texts)
        return new

    def last_sid(self, who: str) -> str:
        """The sid of the last message that somebody was sent."""
        return self.twilio.sent_to(who)[-1].sid

    def mode(self, who: str = ANA) -> str:
        return str(self.hilo.rows("SELECT mode FROM users WHERE user_phone = :u", u=who)[0]["mode"])


@pytest.fixture
def chat(start: Start, twilio: Simulator) -> Chat:
    """A gateway with two advisors, who have written to it today."""
    twilio.open_since = datetime.now(UTC)
    return Chat(start(ASESORES=f"{MARTA}, {PACO}", OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET), twilio)


# --- The whole exchange -----------------------------------------------------------------------------------


def test_conversation_goes_to_an_advisor_and_back_and_the_assistant_knows_what_was_said(
    chat: Chat, openai_server: LocalOpenAI
) -> None:
    chat.says(ANA, "hola, busco factura")
    chat.says(ANA, "/asesor necesito factura")
    assert chat.heard(ANA) == ["Eco: hola, busco factura", WANTS]
    (notice,) = chat.heard(MARTA)
    assert chat.heard(PACO) == [notice]
    assert notice.startswith("🔔 *Ana* (+52…0001) quiere hablar con una persona.\nMotivo: necesito factura\n")
    assert "— Ana: hola, busco factura\n— Asistente: Eco: hola, busco factura\n" in notice
    assert "5511110001" not in notice

    asked = len(openai_server.requests)
    chat.says(ANA, "¿sigues ahí?")
    assert chat.heard(ANA) == [] and chat.heard(PACO) == ["💬 *Ana* (+52…0001): ¿sigues ahí?"]
    chat.heard(MARTA)
    chat.says(MARTA, "Hola Ana, soy Marta", quoting=chat.last_sid(MARTA))
    assert chat.heard(ANA) == ["👤 *Marta:* Hola Ana, soy Marta"]
    chat.says(ANA, "mi RFC es ABC")
    assert chat.heard(MARTA) == ["💬 *Ana* (+52…0001): mi RFC es ABC"] and chat.heard(PACO) == []
    chat.says(MARTA, "va tu factura A-7")  # there is one conversation: no need to quote
    assert chat.heard(ANA) == ["👤 *Marta:* va tu factura A-7"]
    assert len(openai_server.requests) == asked

    chat.says(ANA, "/bot")
    assert chat.heard(ANA) == [BACK] and chat.heard(MARTA) == ["✅ *Ana* (+52…0001) volvió con el asistente."]
    chat.says(ANA, "¿qué factura era?")
    assert chat.heard(ANA) == ["Eco: ¿qué factura era?"]
    first, last = openai_server.conversations.values()
    told = [part["text"] for item in last.items for part in item["content"]]
    assert "mi RFC es ABC" in told and "👤 *Marta:* va tu factura A-7" in told
    left = "SELECT thread_id FROM discarded_threads WHERE due_at > now() + interval '50 minutes'"
    assert chat.hilo.rows(left) == [{"thread_id": first.id}]  # deleted once nothing can be under way on it


def test_assistants_tool_hands_over_and_its_last_answer_still_arrives(chat: Chat, openai_server: LocalOpenAI) -> None:
    openai_server.model = script(
        [calls(("hablar_con_asesor", {"motivo": "pide una beca"})), says("Ahora te escribe un asesor.")], shared=True
    )
    chat.says(ANA, "quiero una beca")
    assert chat.heard(ANA) == ["Ahora te escribe un asesor."]
    assert "Motivo: pide una beca\n\nLo último:\n— Ana: quiero una beca\n" in chat.heard(MARTA)[0]
    assert len(chat.heard(PACO)) == 1
    chat.says(ANA, "¿hola?")
    assert chat.heard(ANA) == [] and chat.mode() == "human"


def test_answer_on_its_way_when_an_advisor_writes_is_withheld(chat: Chat, openai_server: LocalOpenAI) -> None:
    chat.says(ANA, "/asesor")
    chat.says(ANA, "/bot")
    notice = chat.twilio.sent_to(MARTA)[0].sid
    chat.heard(ANA), chat.heard(MARTA), chat.heard(PACO)
    with openai_server.gate("POST /v1/responses$") as gate:
        chat.twilio.receive(ANA, "hola", profile_name="Ana")
        assert gate.arrived.wait(5)
        chat.twilio.receive(MARTA, "yo te ayudo", fields={"OriginalRepliedMessageSid": notice}, profile_name="Marta")
        chat.twilio.wait_for(ANA, 3)
    chat.hilo.done()
    assert chat.heard(ANA) == ["👤 *Marta:* yo te ayudo"]
    assert chat.heard(MARTA) == ["💬 *Ana* (+52…0001): hola"] and chat.heard(PACO) == []
    assert chat.hilo.rows("SELECT body FROM messages WHERE state = 'withheld'") == [{"body": "Eco: hola"}]


# --- Whose message it is ----------------------------------------------------------------------------------


def test_advisor_with_several_conversations_gets_a_list_unless_a_message_is_quoted(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    anas = chat.last_sid(MARTA)
    chat.says(LUIS, "/asesor")
    chat.heard(MARTA)
    chat.says(MARTA, "hola, ¿en qué ayudo?")
    (answer,) = chat.heard(MARTA)
    assert answer.startswith("Conversaciones abiertas: 2\n• *Ana* (+52…0001), desde hace 0 min\n")
    chat.says(MARTA, "hola Ana", quoting=anas)
    assert chat.heard(ANA) == [WANTS, "👤 *Marta:* hola Ana"] and chat.heard(LUIS) == [WANTS]
    chat.says(PACO, "hola, soy Paco")  # Ana is Marta's: Luis is left
    assert chat.heard(LUIS) == ["👤 *Paco:* hola, soy Paco"] and chat.heard(ANA) == []
    chat.says(MARTA, "¿sigues?")
    assert chat.heard(ANA) == ["👤 *Marta:* ¿sigues?"]


def test_advisor_without_an_open_conversation_is_answered_by_the_assistant(chat: Chat) -> None:
    chat.says(MARTA, "¿qué cursos hay?")
    assert chat.heard(MARTA) == ["Eco: ¿qué cursos hay?"]


def test_mistyped_command_of_an_advisor_is_not_sent_to_the_user(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    chat.heard(ANA), chat.heard(MARTA)
    chat.says(MARTA, "/bto")
    assert chat.heard(ANA) == [] and chat.heard(MARTA)[0].startswith("Conversaciones abiertas: 1")


def test_advisors_bot_hands_back_and_a_quoted_notice_takes_it_up_again(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    notice = chat.last_sid(MARTA)
    chat.heard(ANA), chat.heard(MARTA)
    chat.says(MARTA, "/bot")
    assert chat.heard(ANA) == [BACK] and chat.heard(MARTA) == ["✅ *Ana* (+52…0001) vuelve con el asistente."]
    assert chat.mode() == "bot"
    chat.says(MARTA, "/bot", quoting=notice)
    assert chat.heard(MARTA) == ["*Ana* (+52…0001) ya estaba con el asistente."] and chat.heard(ANA) == []
    chat.says(MARTA, "olvidé decirte algo", quoting=notice)
    assert chat.heard(ANA) == ["👤 *Marta:* olvidé decirte algo"] and chat.mode() == "human"


def test_user_who_left_cannot_be_written_to(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    notice = chat.last_sid(MARTA)
    chat.says(ANA, "BAJA")
    chat.heard(ANA), chat.heard(MARTA)
    chat.says(MARTA, "¿sigues?", quoting=notice)
    assert chat.heard(ANA) == [] and chat.mode() == "out"
    assert chat.heard(MARTA) == ["*Ana* (+52…0001) pidió no recibir más mensajes: no se le puede escribir."]


def test_user_who_leaves_while_with_an_advisor_is_the_advisors_to_know_and_nothing_reaches_the_assistant(
    chat: Chat, openai_server: LocalOpenAI
) -> None:
    chat.says(ANA, "/asesor")
    chat.says(MARTA, "hola", quoting=chat.last_sid(MARTA))
    chat.heard(MARTA), chat.heard(PACO), chat.heard(ANA)
    chat.says(ANA, "STOP")
    gone = "*Ana* (+52…0001) pidió no recibir más mensajes: no se le puede escribir."
    assert chat.heard(MARTA) == [gone] and chat.heard(PACO) == [] and len(chat.heard(ANA)) == 1
    chat.says(MARTA, "¿me das tu RFC?")  # written before she had read that
    assert chat.heard(MARTA) == [gone] and chat.heard(ANA) == []
    assert [request for request in openai_server.requests if request.path == "/v1/responses"] == []
    chat.says(MARTA, "/bot")
    chat.says(MARTA, "¿qué cursos hay?")
    assert chat.heard(MARTA) == [gone, "Eco: ¿qué cursos hay?"]


def test_advisor_who_leaves_is_passed_over_and_the_others_are_asked(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    chat.says(MARTA, "hola", quoting=chat.last_sid(MARTA))
    chat.says(MARTA, "baja")
    chat.heard(PACO), chat.heard(MARTA), chat.heard(ANA)
    chat.says(ANA, "¿sigues?")
    assert chat.heard(PACO) == ["💬 *Ana* (+52…0001): ¿sigues?"] and chat.heard(MARTA) == []
    chat.says(LUIS, "/asesor")
    assert len(chat.heard(PACO)) == 1 and chat.heard(MARTA) == []
    chat.says(PACO, "baja")
    chat.says(ANA, "¿y ahora?")  # nobody is left
    told, answer = chat.heard(ANA)
    assert told == NOBODY and answer.endswith("¿y ahora?") and chat.mode() == "bot"
    chat.says(ANA, "/asesor")
    assert chat.heard(ANA)[0].startswith("Por este chat no hay asesores por ahora.")


def test_commands_of_a_user_with_an_advisor_are_answered_and_what_is_none_is_passed_on(chat: Chat) -> None:
    chat.hilo.plug(incoming_message=lambda message: "De 9 a 18 h." if message.text == "/horario" else None)
    chat.says(ANA, "/asesor")
    chat.heard(ANA), chat.heard(MARTA)
    for command in ("/ayuda", "/horario", "/reiniciar"):
        chat.says(ANA, command)
    assert [text[:9] for text in chat.heard(ANA)] == ["Esto es l", "De 9 a 18", "Listo, em"] and chat.heard(MARTA) == []
    chat.says(ANA, "/orden 7")
    assert chat.heard(MARTA) == ["💬 *Ana* (+52…0001): /orden 7"] and chat.heard(ANA) == []


def test_advisor_who_had_a_conversation_learns_who_took_it_over_or_ended_it(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    martas, pacos = chat.last_sid(MARTA), chat.last_sid(PACO)
    chat.says(MARTA, "hola", quoting=martas)
    chat.heard(MARTA), chat.heard(PACO)
    chat.says(PACO, "yo sigo", quoting=pacos)
    assert chat.heard(MARTA) == ["👥 Paco sigue ahora la conversación con *Ana* (+52…0001)."] and chat.heard(PACO) == []
    chat.says(MARTA, "/bot", quoting=martas)
    assert chat.heard(PACO) == ["✅ Marta devolvió a *Ana* (+52…0001) al asistente."]
    assert chat.heard(MARTA) == ["✅ *Ana* (+52…0001) vuelve con el asistente."]


def test_users_private_talk_stays_out_of_the_advisors_own_conversation(chat: Chat, openai_server: LocalOpenAI) -> None:
    chat.says(MARTA, "¿qué cursos hay?")
    chat.says(ANA, "/asesor mi RFC es XAXX")
    chat.says(MARTA, "hola Ana")
    chat.says(ANA, "tengo una deuda")
    chat.says(MARTA, "/lista")
    chat.says(ANA, "/bot")
    chat.hilo.rows("DELETE FROM oa_threads_map")
    chat.says(MARTA, "¿y de inglés?")
    (*_, last) = openai_server.conversations.values()
    told = [part["text"] for item in last.items for part in item["content"]]
    assert told == ["¿qué cursos hay?", "Eco: ¿qué cursos hay?", "¿y de inglés?", "Eco: ¿y de inglés?"]


def test_user_with_an_advisor_who_asks_again_is_answered_and_the_advisors_are_not_called_twice(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    chat.says(ANA, "/asesor")
    assert chat.heard(ANA) == [WANTS, WANTS] and len(chat.heard(MARTA)) == 1


def test_request_that_a_fault_broke_off_still_reaches_the_advisors_once(start: Start, twilio: Simulator) -> None:
    chat = Chat(start(ASESORES=MARTA, LEASE_SECONDS="0.5"), twilio)
    chat.hilo.rows("ALTER TABLE messages ADD CONSTRAINT sin_respuesta CHECK (reply IS NULL) NOT VALID")
    twilio.receive(ANA, "/asesor", profile_name="Ana")
    wait_for(lambda: chat.mode() == "human")
    chat.hilo.rows("ALTER TABLE messages DROP CONSTRAINT sin_respuesta")
    twilio.wait_for(ANA, 1)
    chat.hilo.done()
    assert chat.heard(ANA) == [WANTS] and len(chat.heard(MARTA)) == 1


# --- Time -------------------------------------------------------------------------------------------------


def test_advisors_time_runs_out_and_the_assistant_answers(chat: Chat, openai_server: LocalOpenAI) -> None:
    chat.says(ANA, "/asesor mi beca")
    until = "SELECT extract(epoch FROM mode_until - now()) / 60 AS m FROM users WHERE user_phone = :u"
    assert 59 < chat.hilo.rows(until, u=ANA)[0]["m"] <= 60
    chat.hilo.rows("UPDATE users SET mode_until = now() + interval '1 minute'")
    chat.says(ANA, "¿hola?")
    assert chat.hilo.rows(until, u=ANA)[0]["m"] <= 1  # nobody has answered: waiting does not lengthen the wait
    chat.says(MARTA, "aquí estoy")
    assert chat.hilo.rows(until, u=ANA)[0]["m"] > 59
    chat.hilo.rows("UPDATE users SET mode_until = now() + interval '1 minute' WHERE user_phone = :u", u=ANA)
    chat.says(ANA, "gracias")
    assert chat.hilo.rows(until, u=ANA)[0]["m"] > 59
    chat.hilo.rows("UPDATE users SET mode_until = now() - interval '1 s' WHERE user_phone = :u", u=ANA)
    chat.heard(ANA)
    chat.says(ANA, "¿y ahora?")
    (answer,) = chat.heard(ANA)
    assert answer.endswith("¿y ahora?") and chat.mode() == "bot"
    (*_, last) = openai_server.conversations.values()
    assert "👤 *Marta:* aquí estoy" in [part["text"] for item in last.items for part in item["content"]]


def hand_back(chat: Chat, processes: int = 1) -> None:
    """Let the upkeep of so many processes look at the same moment."""
    with ThreadPoolExecutor(processes) as pool:
        list(pool.map(lambda _: chat.hilo.gateway.upkeep.hand_back(), range(processes)))
    chat.hilo.done()


def test_time_without_any_answer_runs_out_and_what_waits_is_answered_once(
    chat: Chat, openai_server: LocalOpenAI
) -> None:
    chat.says(ANA, "hola")
    chat.says(ANA, "/asesor")
    chat.says(ANA, "¿cuánto cuesta?")
    chat.says(ANA, "¿y hay beca?")
    chat.says(ANA, "/ayuda")
    chat.heard(ANA)
    chat.hilo.rows("UPDATE users SET mode_until = now() - interval '1 s' WHERE user_phone = :u", u=ANA)
    hand_back(chat, processes=4)
    assert chat.heard(ANA) == [NOBODY, "Eco: ¿cuánto cuesta?\n¿y hay beca?"] and chat.mode() == "bot"
    hand_back(chat)
    chat.says(ANA, "gracias")
    assert chat.heard(ANA) == ["Eco: gracias"]
    assert chat.hilo.rows("SELECT 1 AS x FROM runs WHERE pending <> 0") == []


def test_message_that_the_plugin_fails_to_pass_on_is_tried_again(start: Start, twilio: Simulator) -> None:
    twilio.open_since = datetime.now(UTC)
    chat = Chat(start(ASESORES=MARTA, LEASE_SECONDS="0.5"), twilio)
    chat.says(ANA, "/asesor")
    chat.heard(MARTA)
    failing = [True, False]

    def incoming_message(message: Message, context: Context) -> Any:
        if message.address == ANA and failing.pop(0):
            raise OSError("la base no contesta")
        return asesor.incoming_message(message, context)

    chat.hilo.gateway.plugins.unload("tools.asesor")
    chat.hilo.plug(incoming_message=incoming_message)
    chat.says(ANA, "¿hay beca?")
    assert chat.heard(MARTA) == ["💬 *Ana* (+52…0001): ¿hay beca?"] and failing == []


def time_is_up(chat: Chat) -> None:
    chat.hilo.rows("UPDATE users SET mode_until = now() - interval '1 s' WHERE user_phone = :u", u=ANA)
    hand_back(chat)


def test_message_that_no_plugin_passed_on_is_answered_once_the_time_is_up(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    chat.hilo.gateway.plugins.unload("tools.asesor")
    chat.says(ANA, "¿hay beca?")
    assert chat.heard(ANA) == [WANTS]
    time_is_up(chat)
    assert chat.heard(ANA) == [NOBODY, "Eco: ¿hay beca?"] and chat.mode() == "bot"


def test_message_whose_answer_was_withheld_is_answered_once_the_time_is_up(
    chat: Chat, openai_server: LocalOpenAI
) -> None:
    with openai_server.gate("POST /v1/responses$") as gate:
        chat.twilio.receive(ANA, "¿hay beca?")
        assert gate.arrived.wait(5)
        chat.hilo.rows("SELECT set_mode(user_phone, 'human', NULL, now() + interval '1 hour') FROM users")
    chat.hilo.done(1)
    assert chat.heard(ANA) == []
    time_is_up(chat)
    assert chat.heard(ANA) == [NOBODY, "Eco: ¿hay beca?"] and chat.mode() == "bot"


def test_time_of_an_advisor_who_answered_runs_out_and_nothing_is_said(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    chat.says(MARTA, "hola")
    chat.says(ANA, "gracias")
    chat.heard(ANA)
    chat.hilo.rows("UPDATE users SET mode_until = now() - interval '1 s' WHERE user_phone = :u", u=ANA)
    hand_back(chat)
    assert chat.heard(ANA) == [] and chat.mode() == "bot"


# --- Nobody is reached ------------------------------------------------------------------------------------


@pytest.mark.parametrize("way", ["error", "undeliver"])
def test_request_that_reaches_no_advisor_is_given_back_and_the_user_told_how_else(
    start: Start, twilio: Simulator, way: str
) -> None:
    chat = Chat(start(ASESORES=f"{MARTA}, {PACO}", ASESOR_CONTACTO="tel. 55", TWILIO_TEMPLATE_SID=TEMPLATE), twilio)
    chat.says(MARTA, "hola")  # so that she is a user too
    for who in (MARTA, PACO):
        twilio.fault("send", way, code=63016, to=who, times=None, **({"status": 400} if way == "error" else {}))
    chat.heard(MARTA)
    chat.says(ANA, "/asesor mi beca")
    lost = "SELECT 1 AS x FROM messages WHERE state IN ('failed', 'undelivered')"
    wait_for(lambda: len(chat.hilo.rows(lost)) == 2)
    hand_back(chat, processes=2)
    assert chat.heard(ANA) == [WANTS, f"{NOBODY} Puedes hablar con una persona aquí: tel. 55"] and chat.mode() == "bot"
    assert f"<{TEMPLATE}>" not in chat.heard(MARTA) + chat.heard(PACO)


def test_request_that_reaches_one_advisor_is_not_given_back(chat: Chat) -> None:
    chat.twilio.fault("send", "error", code=63016, to=PACO, times=None, status=400)
    chat.says(ANA, "/asesor")
    hand_back(chat)
    assert chat.heard(ANA) == [WANTS] and chat.mode() == "human"


def test_request_that_the_webhook_does_not_take_is_given_back(
    start: Start, twilio: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asesor, "ESPERAS", (0.0, 0.1))
    chat = Chat(start(ASESOR_WEBHOOK_URL="http://127.0.0.1:9/hilo"), twilio)
    chat.says(ANA, "/asesor")
    chat.says(ANA, "¿hola?")
    wait_for(lambda: chat.hilo.rows("SELECT 1 AS x FROM users WHERE mode = 'bot' OR mode_until <= now()"))
    hand_back(chat)
    assert chat.heard(ANA) == [WANTS, NOBODY, "Eco: ¿hola?"] and chat.mode() == "bot"


def test_request_whose_process_ends_before_the_webhook_has_taken_it_waits_a_minute(
    start: Start, twilio: Simulator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(asesor, "ESPERAS", (60.0,))
    chat = Chat(start(ASESOR_WEBHOOK_URL="http://127.0.0.1:9/hilo"), twilio)
    chat.says(ANA, "/asesor")
    left = "SELECT extract(epoch FROM mode_until - now()) AS s FROM users"
    assert 50 < chat.hilo.rows(left)[0]["s"] <= 60


def test_user_is_handed_over_without_an_assistant_and_without_a_traditional_flow(
    start: Start, twilio: Simulator
) -> None:
    chat = Chat(start(ASESORES=MARTA, ASSISTANT_ID=""), twilio)
    chat.hilo.gateway.plugins.unload("tools.flujo_tradicional")
    chat.says(ANA, "quiero hablar con una persona")
    assert chat.heard(ANA) == [WANTS] and len(chat.heard(MARTA)) == 1


@pytest.mark.parametrize("advisors", [f"{MARTA}, {PACO}", ""])
def test_user_who_asks_for_a_person_without_an_assistant_is_handed_over_where_there_are_advisors(
    start: Start, twilio: Simulator, advisors: str
) -> None:
    chat = Chat(start(ASESORES=advisors, THREADS_INTEGRATION_ENABLED="false"), twilio)
    chat.says(ANA, "quiero hablar con una persona")
    assert (chat.heard(ANA) == [WANTS]) == bool(advisors) == (chat.mode() == "human")
    notices = chat.heard(MARTA)
    assert [("Motivo: quiero hablar con una persona" in notice) for notice in notices] == [True] * bool(advisors)
    chat.says(LUIS, "hacen descuentos?")
    assert ("*/asesor*" in chat.heard(LUIS)[0]) == bool(advisors)


# --- Files and long texts ---------------------------------------------------------------------------------


def test_files_are_named_in_words_to_either_side(chat: Chat) -> None:
    chat.says(ANA, "hello, I need an invoice")
    chat.says(ANA, "/asesor")
    chat.heard(ANA), chat.heard(MARTA)
    chat.says(ANA, "", media=[(b"OggS", "audio/ogg")])
    assert chat.heard(MARTA) == ["💬 *Ana* (+52…0001): [Envió una nota de voz, que no se puede reenviar por aquí.]"]
    chat.says(MARTA, "mira", media=[(b"%PDF", "application/pdf")])
    assert chat.heard(ANA) == ["👤 *Marta:* mira\n[Sent a file, which cannot be passed on here.]"]
    assert chat.heard(MARTA) == ["⚠️ Los archivos no se pueden reenviar por aquí: escríbelo o comparte un enlace."]


def test_text_as_long_as_whatsapp_takes_is_passed_on_whole(chat: Chat) -> None:
    chat.says(ANA, "/asesor")
    chat.heard(MARTA)
    words = " ".join(["palabra"] * 199)
    chat.says(ANA, words)
    parts = chat.heard(MARTA)
    assert len(parts) == 2 and " ".join(parts).endswith(words)


# --- Settings ---------------------------------------------------------------------------------------------


def test_without_advisors_the_user_is_told_how_else(
    start: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    chat = Chat(start(), twilio)
    chat.says(ANA, "/asesor")
    assert chat.heard(ANA)[0].startswith("Por este chat no hay asesores por ahora.") and chat.mode() == "bot"
    chat.hilo.stop()
    chat = Chat(start(ASESOR_CONTACTO="tel. 55 5555 0101"), twilio)
    chat.heard(ANA)
    chat.says(ANA, "/asesor")
    assert chat.heard(ANA) == ["Puedes hablar con una persona aquí: tel. 55 5555 0101"]
    openai_server.model = script([calls(("hablar_con_asesor", {"motivo": "x"})), says("No hay asesores.")], shared=True)
    chat.says(ANA, "un asesor")
    assert "55 5555 0101" in chat.hilo.rows("SELECT output FROM tool_calls")[0]["output"] and chat.mode() == "bot"


@pytest.mark.parametrize(
    ("name", "value", "held"),
    [("ASESORES", "Marta", "'Marta'"), ("ASESOR_MINUTOS", "0", "'0'"), ("ASESOR_TEMPLATE_SID", "aviso", "'aviso'"),
     ("ASESOR_WEBHOOK_URL", "http://localhost.mx/clave", r"\(secret\)")],
)  # fmt: skip
def test_setting_that_cannot_be_used_stops_the_start(name: str, value: str, held: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{name}={held} cannot be used: it needs "):
        Plugins(["tools.asesor"]).check_settings(load_settings({name: value}))


@pytest.fixture
def crm() -> Iterator[tuple[str, list[dict[str, Any]]]]:
    """A server of the team's that takes events, failing the first time; its URL and what came."""
    events: list[dict[str, Any]] = []

    class Handler(BaseHTTPRequestHandler):
        failed = False

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.send_response(200 if Handler.failed else 503)
            self.end_headers()
            if Handler.failed:
                events.append(body)
            Handler.failed = True

        def log_message(self, *_: object) -> None:
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}/hilo", events
    server.shutdown()
    thread.join()
    server.server_close()


def test_webhook_gets_requests_and_messages(
    start: Start, twilio: Simulator, crm: tuple[str, list[dict[str, Any]]]
) -> None:
    url, events = crm
    chat = Chat(start(ASESOR_WEBHOOK_URL=url), twilio)
    chat.says(ANA, "hola")
    chat.says(ANA, "/asesor mi beca")
    wait_for(lambda: events)
    chat.says(ANA, "¿hay alguien?")
    wait_for(lambda: len(events) == 2)
    assert chat.heard(ANA) == ["Eco: hola", WANTS]
    request, message = events
    assert (request["evento"], request["direccion"], request["motivo"]) == ("pedido", ANA, "mi beca")
    assert request["resumen"][:2] == ["— Ana: hola", "— Asistente: Eco: hola"]
    assert (message["evento"], message["texto"], message["nombre"]) == ("mensaje", "¿hay alguien?", "Ana")
    left = "SELECT extract(epoch FROM mode_until - now()) AS s FROM users"
    wait_for(lambda: chat.hilo.rows(left)[0]["s"] > 3500)  # it was taken, so the user waits the whole time


# --- The 24-hour window -----------------------------------------------------------------------------------


def test_notice_by_template_reaches_advisors_out_of_the_window(start: Start, twilio: Simulator) -> None:
    chat = Chat(start(ASESORES=MARTA, ASESOR_TEMPLATE_SID=TEMPLATE), twilio)
    chat.says(ANA, "/asesor mi beca")
    (notice,) = twilio.sent_to(MARTA)
    assert notice.content_sid == TEMPLATE
    assert notice.variables == {"1": "*Ana* (+52…0001)", "2": "mi beca · — Ana: /asesor mi beca"}
    chat.says(MARTA, "hola Ana", quoting=notice.sid)
    assert chat.heard(ANA) == [WANTS, "👤 *Marta:* hola Ana"]


def test_advisor_learns_that_a_users_window_is_shut_and_the_user_gets_the_template(
    start: Start, twilio: Simulator
) -> None:
    chat = Chat(start(ASESORES=MARTA, TWILIO_TEMPLATE_SID=TEMPLATE), twilio)
    chat.says(ANA, "/asesor")
    chat.heard(ANA), chat.heard(MARTA)
    chat.hilo.rows("UPDATE users SET last_in_at = now() - interval '25 hours' WHERE user_phone = :u", u=ANA)
    chat.says(MARTA, "¿sigues ahí?")
    assert chat.heard(ANA) == [f"<{TEMPLATE}>"]
    (told,) = chat.heard(MARTA)
    assert told.startswith("⚠️ *Ana* (+52…0001) no escribe desde hace más de 24 horas")


@pytest.mark.parametrize("way", ["error", "undeliver"])
def test_advisors_message_that_twilio_says_came_too_late_leads_to_the_template_and_the_advisor_knows(
    start: Start, twilio: Simulator, way: str
) -> None:
    chat = Chat(start(ASESORES=MARTA, TWILIO_TEMPLATE_SID=TEMPLATE), twilio)
    chat.says(ANA, "/asesor")
    chat.heard(ANA), chat.heard(MARTA)
    twilio.fault("send", way, code=63016, to=ANA, **({"status": 400} if way == "error" else {}))
    chat.says(MARTA, "¿sigues ahí?")
    wait_for(lambda: chat.hilo.rows("SELECT 1 AS x FROM messages WHERE content_sid IS NOT NULL AND sid IS NOT NULL"))
    chat.hilo.done()
    assert chat.heard(ANA)[-1] == f"<{TEMPLATE}>" and chat.mode() == "human"
    (told,) = chat.heard(MARTA)
    assert told.startswith("⚠️ *Ana* (+52…0001) no escribe desde hace más de 24 horas")


def test_window_that_twilio_says_is_shut_leads_to_the_template_in_the_same_run(start: Start, twilio: Simulator) -> None:
    chat = Chat(start(TWILIO_TEMPLATE_SID=TEMPLATE), twilio)
    twilio.fault("send", "error", status=400, code=63016, to=ANA)
    chat.says(ANA, "hola")
    assert chat.heard(ANA) == [f"<{TEMPLATE}>"]
    assert [run["outcome"] for run in chat.hilo.done()] == ["answered"]


def test_window_that_a_callback_says_is_shut_leads_to_the_template_in_a_run_of_its_own(
    start: Start, twilio: Simulator
) -> None:
    chat = Chat(start(TWILIO_TEMPLATE_SID=TEMPLATE), twilio)
    twilio.fault("send", "undeliver", code=63016, to=ANA)
    chat.says(ANA, "hola")
    twilio.wait_for(ANA, 2)
    assert [run["outcome"] for run in chat.hilo.done(2)] == ["undelivered", "answered"]
    assert chat.heard(ANA) == ["Eco: hola", f"<{TEMPLATE}>"]


def test_window_that_a_callback_says_is_shut_before_the_last_part_leads_to_one_template(
    start: Start, twilio: Simulator
) -> None:
    chat = Chat(start(TWILIO_TEMPLATE_SID=TEMPLATE), twilio)
    chat.hilo.plug(format_reply=lambda text: ["uno", "dos"])
    twilio.fault("send", "undeliver", code=63016, to=ANA)
    twilio.receive(ANA, "hola")
    twilio.wait_for(ANA, 3)
    chat.hilo.done(2)
    assert chat.heard(ANA) == ["uno", "dos", f"<{TEMPLATE}>"]


@pytest.mark.parametrize("way", ["error", "undeliver"])
def test_shut_window_without_a_template_ends_as_undelivered_with_an_event_and_no_loop(
    start: Start, twilio: Simulator, way: str
) -> None:
    chat = Chat(start(), twilio)
    events: list[Any] = []
    chat.hilo.plug(track_event=lambda event: events.append(event))
    twilio.fault("send", way, code=63016, to=ANA, times=None, **({"status": 400} if way == "error" else {}))
    chat.says(ANA, "hola")
    wait_for(lambda: [event.data for event in events if event.name == "message_failed"] == [{"code": 63016}])
    wait_for(lambda: [run["outcome"] for run in chat.hilo.done()] == ["undelivered"])
    assert len(twilio.sent_to(ANA)) == (1 if way == "undeliver" else 0)


@pytest.mark.parametrize("way", ["error", "undeliver"])
def test_template_that_is_refused_too_is_not_sent_again(start: Start, twilio: Simulator, way: str) -> None:
    chat = Chat(start(TWILIO_TEMPLATE_SID=TEMPLATE), twilio)
    twilio.fault("send", way, code=63016, to=ANA, times=None, **({"status": 400} if way == "error" else {}))
    chat.says(ANA, "hola")
    done = "SELECT 1 AS x FROM runs WHERE outcome = 'undelivered'"
    wait_for(lambda: len(chat.hilo.rows(done)) == (2 if way == "undeliver" else 1))
    sent = chat.hilo.rows("SELECT content_sid FROM messages WHERE direction = 'out' ORDER BY id")
    assert [row["content_sid"] for row in sent] == [None, TEMPLATE]


def test_part_for_somebody_who_never_wrote_and_is_out_of_the_window_ends_without_a_template_run(
    start: Start, twilio: Simulator
) -> None:
    chat = Chat(start(TWILIO_TEMPLATE_SID=TEMPLATE), twilio)

    def incoming_message(message: Message, context: Context) -> list[Part]:
        return [Part("para ti"), Part("para Marta", to=MARTA)]

    chat.hilo.plug(incoming_message=incoming_message)
    twilio.fault("send", "undeliver", code=63016, to=MARTA)
    chat.says(ANA, "hola")
    wait_for(lambda: chat.hilo.rows("SELECT 1 AS x FROM messages WHERE state = 'undelivered'"))
    assert chat.heard(MARTA) == ["para Marta"] and chat.heard(ANA) == ["para ti"]
    assert len(chat.hilo.done()) == 1
    assert [callback.status for callback in twilio.callbacks if callback.status != 200] == []
