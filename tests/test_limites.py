"""Messages of a user past the limits, and a day past its budget, as the user sees them."""

from __future__ import annotations

import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from settings import ConfigurationError, load_settings
from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo
from tests.local_openai import LocalOpenAI
from tools._plugins import Plugins

LUIS = "whatsapp:+5215511110002"
MARTA = "whatsapp:+5215500000001"
ADVISED = "Ya avisé a un asesor: te escribe por este mismo chat en cuanto pueda."
SLOWLY = "Vas muy rápido para mí 🙂 Dame un minuto y seguimos."
TOMORROW = "Por hoy llegamos al límite de mensajes. Mañana seguimos con mucho gusto."
Start = Callable[..., Hilo]


@pytest.fixture
def begin(start: Start) -> Start:
    """Start a gateway that OpenAI's webhook wakes; its messages are all of the first second of the day."""

    def starter(**more: str) -> Hilo:
        hilo = start(OPENAI_WEBHOOK_SECRET=WEBHOOK_SECRET, **more)
        hilo.rows("""CREATE OR REPLACE FUNCTION del_minuto() RETURNS trigger LANGUAGE plpgsql AS $$
            BEGIN NEW.at = date_trunc('day', NEW.at) + interval '1 second'; RETURN NEW; END $$""")
        hilo.rows("""CREATE OR REPLACE TRIGGER del_minuto BEFORE INSERT ON messages
            FOR EACH ROW WHEN (NEW.direction = 'in') EXECUTE FUNCTION del_minuto()""")
        return hilo

    return starter


def say(twilio: Simulator, hilo: Hilo, *texts: str, who: str = ANA) -> list[str]:
    """Write one message after the other, and return what was answered."""
    before = len(twilio.sent_to(who))
    for text in texts:
        twilio.receive(who, text)
        hilo.done()
    return [message.body for message in twilio.sent_to(who)[before:]]


def spend(hilo: Hilo, tokens_in: int, tokens_out: int, model: str = "gpt-6-luna", when: str = "now()") -> None:
    """Let a response have been made."""
    hilo.rows(
        "INSERT INTO responses (id, created_at, model, input_tokens, output_tokens)"  # noqa: S608
        f" VALUES (gen_random_uuid()::text, {when}, :m, :i::int, :o::int)",
        m=model, i=tokens_in, o=tokens_out,
    )  # fmt: skip


# --- A minute and a day -----------------------------------------------------------------------------------


def test_messages_past_a_minutes_limit_get_one_courteous_answer_and_the_next_minute_is_free(
    begin: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = begin(LIMITE_MINUTO="2")
    assert say(twilio, hilo, "m1", "m2", "m3", "m4", "m5") == ["Eco: m1", "Eco: m2", SLOWLY]
    assert say(twilio, hilo, "hola", who=LUIS) == ["Eco: hola"]
    hilo.rows("UPDATE messages SET at = at - interval '1 minute'")
    assert say(twilio, hilo, "m6") == ["Eco: m4\nm5\nm6"]  # what was passed over in silence is told


def test_messages_past_a_days_limit_get_one_courteous_answer_and_the_next_day_is_free(
    begin: Start, twilio: Simulator
) -> None:
    hilo = begin(LIMITE_DIA="2", LIMITE_MINUTO="0", ZONA_HORARIA="UTC")
    assert say(twilio, hilo, "hello, how are you?", "m2", "m3", "m4", "/ayuda")[2:] == [
        "We have reached the limit of messages for today. We'll gladly continue tomorrow."
    ]
    hilo.rows("UPDATE messages SET at = at - interval '1 day'")
    assert say(twilio, hilo, "m5") == ["Eco: m4\n/ayuda\nm5"]


def test_limit_is_counted_right_over_two_processes_and_messages_at_once(
    begin: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = begin(LIMITE_MINUTO="5")
    begin(LIMITE_MINUTO="5")
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda n: twilio.receive(ANA, f"m{n}"), range(12)))
    hilo.done()
    answers = [message.body for message in twilio.sent_to(ANA)]
    assert answers.count(SLOWLY) == 1
    bodies = [request.body for request in openai_server.requests if request.path == "/v1/responses"]
    assert sum(item.get("role") == "user" for body in bodies for item in body["input"]) == 5


def test_burst_past_the_limit_is_answered_as_far_as_the_limit_goes(begin: Start, twilio: Simulator) -> None:
    hilo = begin(LIMITE_MINUTO="2", BURST_SECONDS="0.5")
    for n in range(1, 6):
        twilio.receive(ANA, f"m{n}")
    hilo.done()
    assert [message.body for message in twilio.sent_to(ANA)] == [SLOWLY, "Eco: m1\nm2"]


def test_with_an_advisor_nobody_has_a_limit_and_the_way_there_and_back_is_always_open(
    begin: Start, twilio: Simulator
) -> None:
    hilo = begin(LIMITE_MINUTO="2", ASESORES=MARTA)
    assert say(twilio, hilo, "m1", "m2", "m3", "/asesor") == ["Eco: m1", "Eco: m2", SLOWLY, ADVISED]
    before = len(twilio.sent_to(MARTA))
    assert say(twilio, hilo, "a1", "a2", "a3") == []
    assert [message.body[-2:] for message in twilio.sent_to(MARTA)[before:]] == ["a1", "a2", "a3"]
    before = len(twilio.sent_to(ANA))
    say(twilio, hilo, *"1234", who=MARTA)
    assert len(twilio.sent_to(ANA)) == before + 4
    assert say(twilio, hilo, "/bot", "m4") == ["Aquí estoy de nuevo. ¿En qué te ayudo?"]
    hilo.rows("UPDATE messages SET at = at - interval '1 minute'")
    assert say(twilio, hilo, "/asesor", "a1", "a2", "a3", "/bot", "m1", "m2", "m3", "m4") == [
        ADVISED, "Aquí estoy de nuevo. ¿En qué te ayudo?", "Eco: m1", "Eco: m2", SLOWLY,
    ]  # fmt: skip


def test_command_without_a_limit_that_nobody_answers_has_one(begin: Start, twilio: Simulator) -> None:
    hilo = begin(LIMITE_MINUTO="1")
    hilo.gateway.plugins.unload("tools.asesor")
    assert say(twilio, hilo, "/bot uno", "/bot dos", "/asesor tres") == ["Eco: /bot uno", SLOWLY]


def test_opt_out_past_the_limit_is_honoured(begin: Start, twilio: Simulator) -> None:
    hilo = begin(LIMITE_MINUTO="1")
    assert say(twilio, hilo, "m1", "m2", "BAJA")[-1].startswith("Listo, ya no te")


def test_count_reads_no_more_than_a_few_index_entries_among_many_messages(hilo: Hilo, twilio: Simulator) -> None:
    from tools.limites import CUENTA

    hilo.rows("""INSERT INTO messages (sid, user_phone, direction, at) SELECT 'SM' || n, 'whatsapp:+52' || n % 50, 'in',
        now() - n * interval '1 s' FROM generate_series(20000, 1, -1) n""")
    hilo.rows("ANALYZE messages")
    named = {":zona": "'UTC'", ":sid": "'SM50'", ":u": "'whatsapp:+520'", ":n": "22",
             ":de_minuto": "ARRAY['']", ":de_dia": "ARRAY['']", ":libres": "ARRAY['/bot']"}  # fmt: skip
    sql = CUENTA
    for name, value in named.items():
        sql = sql.replace(name, value)
    rows = hilo.rows(f"EXPLAIN (ANALYZE, COSTS OFF, TIMING OFF) {sql}")
    plan = "\n".join(row["QUERY PLAN"] for row in rows)
    assert "Backward" in plan and "Seq Scan" not in plan and "Sort" not in plan, plan
    assert int(re.findall(r"shared hit=(\d+)", plan)[0]) < 60, plan  # pages, of the hundreds that the table has


@pytest.mark.parametrize(
    ("settings", "complaint"),
    [
        ({"LIMITE_MINUTO": "muchos"}, "LIMITE_MINUTO='muchos' cannot be used: it needs a number"),
        ({"LIMITE_COSTO_DIA": "5"}, "LIMITE_PRECIOS is not set: it needs model=input/output"),
        ({"LIMITE_PRECIOS": "luna=1"}, "LIMITE_PRECIOS='luna=1' cannot be used: it needs model=input/output"),
        ({"LIMITE_PRECIOS": " , "}, "LIMITE_PRECIOS=',' cannot be used"),
    ],
    ids=str,
)
def test_setting_that_cannot_be_used_stops_the_start(settings: dict[str, str], complaint: str) -> None:
    with pytest.raises(ConfigurationError, match=f"^{complaint}"):
        Plugins(["tools.limites"]).check_settings(load_settings(settings))


# --- The day's budget -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "spent"),
    [
        ({"LIMITE_TOKENS_DIA": "1000"}, (600, 400)),
        ({"LIMITE_COSTO_DIA": "0.01", "LIMITE_PRECIOS": "gpt-6-luna=1/10, gpt-6-sol=2/20"}, (1000, 900)),
    ],
    ids=["tokens", "dollars"],
)
def test_past_the_days_budget_the_traditional_flow_answers_and_the_model_is_not_asked(
    begin: Start, twilio: Simulator, openai_server: LocalOpenAI, settings: dict[str, str], spent: tuple[int, int]
) -> None:
    hilo = begin(**settings)
    hilo.rows("INSERT INTO cursos (codigo, nombre, nivel, precio) VALUES ('XL-1', 'Excel desde cero', 'basico', 900)")
    spend(hilo, 5000, 5000, when="now() - interval '2 days'")
    spend(hilo, spent[0], spent[1] // 2)
    assert say(twilio, hilo, "hola") == ["Eco: hola"]
    spend(hilo, 0, spent[1])
    expire(hilo)
    asked = len(openai_server.requests)
    (answer,) = say(twilio, hilo, "cuánto cuesta el curso de excel")
    assert "Excel desde cero" in answer and len(openai_server.requests) == asked
    assert "*/reiniciar*" in say(twilio, hilo, "/ayuda")[0]
    hilo.rows("UPDATE responses SET created_at = created_at - interval '1 day'")
    expire(hilo, whole=True)
    assert say(twilio, hilo, "gracias")[0].startswith("Eco:")
    (*_, last) = openai_server.conversations.values()
    assert any("Excel desde cero" in part["text"] for item in last.items for part in item["content"])


def expire(hilo: Hilo, whole: bool = False) -> None:
    """Let the two seconds pass for which a sum is good; `whole`: as in a process that has just begun."""
    from tools.limites import CUENTAS

    if whole:
        CUENTAS.pop(hilo.gateway.journey)
    else:
        CUENTAS[hilo.gateway.journey].mirada = float("-inf")


def test_past_the_budget_a_burst_is_answered_once(begin: Start, twilio: Simulator) -> None:
    hilo = begin(LIMITE_TOKENS_DIA="10", BURST_SECONDS="0.5")
    spend(hilo, 10, 10)
    for text in ("hola", "busco", "un curso"):
        twilio.receive(ANA, text)
    hilo.done()
    assert len(twilio.sent_to(ANA)) == 1


def test_past_the_budget_no_message_reaches_the_model_and_none_is_dropped(
    begin: Start, twilio: Simulator, openai_server: LocalOpenAI
) -> None:
    hilo = begin(LIMITE_TOKENS_DIA="10", BURST_SECONDS="0.5")
    hilo.rows("INSERT INTO cursos (codigo, nombre, nivel, precio) VALUES ('XL-1', 'Excel desde cero', 'basico', 900)")
    spend(hilo, 10, 10)
    assert len(say(twilio, hilo, "/hazme un ensayo")) == 1
    twilio.receive(ANA, "cuánto cuesta el de excel")
    twilio.receive(ANA, "/ayuda")
    hilo.done(2)
    answers = [message.body for message in twilio.sent_to(ANA)[1:]]
    assert "*/reiniciar*" in answers[0] and "$900" in answers[1] and len(answers) == 2
    assert [request for request in openai_server.requests if request.path == "/v1/responses"] == []


def test_past_the_budget_without_a_traditional_flow_the_user_is_told(begin: Start, twilio: Simulator) -> None:
    hilo = begin(LIMITE_TOKENS_DIA="10")
    hilo.gateway.plugins.unload("tools.flujo_tradicional")
    spend(hilo, 10, 10)
    assert say(twilio, hilo, "hola") == ["Por hoy no puedo responder más preguntas. Mañana seguimos con mucho gusto."]


def test_sum_of_the_day_reads_only_what_may_have_changed_since_the_last_look(begin: Start, twilio: Simulator) -> None:
    from tools.limites import CUENTAS

    hilo = begin(LIMITE_TOKENS_DIA="100000", ZONA_HORARIA="UTC")
    spend(hilo, 700, 0, when="greatest(now() - interval '20 minutes', date_trunc('day', now() AT TIME ZONE 'UTC'))")
    spend(hilo, 30, 0, model="otro")

    def total() -> dict[str, Any]:
        expire(hilo)
        say(twilio, hilo, "2")
        return {model: pair for model, pair in CUENTAS[hilo.gateway.journey].total.items() if model == "otro"}

    say(twilio, hilo, "1")
    account = CUENTAS[hilo.gateway.journey]
    assert account.total["otro"] == (30, 0) and account.total["gpt-6-luna"] == (700, 0)
    assert total() == {"otro": (30, 0)}  # neither lost nor counted twice
    spend(hilo, 5, 1, model="otro")
    assert total() == {"otro": (35, 1)}
