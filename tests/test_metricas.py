"""`/metrics`: whom it lets in, and that its figures are those of the database."""

from __future__ import annotations

import urllib.error
import urllib.request
from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from simulator import Simulator
from tests.conftest import ANA, Hilo, wait_for
from tests.local_openai import LocalOpenAI, calls, says, script
from tools._plugins import ToolCall

TOKEN = "un-secreto-de-prueba"
LUIS = "whatsapp:+5218110002222"


def visit(hilo: Hilo, header: str = f"Bearer {TOKEN}") -> tuple[int, str]:
    """Return status and text of the page."""
    request = urllib.request.Request(hilo.url + "/metrics", headers={"Authorization": header} if header else {})
    try:
        with urllib.request.urlopen(request, timeout=10) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def figures(hilo: Hilo) -> dict[str, float]:
    """Return every sample by its name and labels."""
    status, text = visit(hilo)
    assert status == 200, text
    return {
        f"{sample.name}{''.join(f' {key}={value}' for key, value in sorted(sample.labels.items()))}": sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@pytest.fixture
def open_to_us(start: Callable[..., Hilo]) -> Hilo:
    """A gateway with a token."""
    return start(ADMIN_TOKEN=TOKEN)


def test_without_the_setting_there_is_no_such_page(hilo: Hilo) -> None:
    assert visit(hilo)[0] == 404 and visit(hilo, "")[0] == 404


@pytest.mark.parametrize(
    ("header", "status"),
    [
        ("", 401), ("Basic dW46ZG9z", 401), (TOKEN, 401), ("Bearer", 403), ("Bearer otra-cosa", 403),
        (f"Bearer {TOKEN}x", 403), (f"Bearer {TOKEN} x", 403), ("Bearer señal", 403), (f"bearer {TOKEN}", 200),
    ],
)  # fmt: skip
def test_only_the_token_opens_the_page(header: str, status: int, open_to_us: Hilo) -> None:
    got, text = visit(open_to_us, header)
    assert got == status and TOKEN not in text


def test_quiet_gateway_has_figures_of_nothing(open_to_us: Hilo) -> None:
    abandoned = ToolCall.abandoned  # by this process, whose other tests do abandon calls
    assert figures(open_to_us) == {"hilo_runs_late_seconds": 0.0, "hilo_tool_calls_abandoned_total": abandoned}


def test_turns_are_counted_by_outcome_with_seconds_tools_and_tokens(
    open_to_us: Hilo, openai_server: LocalOpenAI, twilio: Simulator
) -> None:
    openai_server.model = script([calls(("buscar_curso", {"nombre": "Excel", "nivel": None})), says("Sí hay.")])
    twilio.receive(ANA, "¿hay Excel?")
    open_to_us.done(1)
    twilio.receive(LUIS, "BAJA")
    open_to_us.done(2)
    seen = figures(open_to_us)
    assert seen["hilo_run_seconds_count outcome=answered"] == seen["hilo_run_seconds_count outcome=intercepted"] == 1
    assert 0 < seen["hilo_run_seconds_sum outcome=answered"] < 60
    assert seen["hilo_run_seconds_bucket le=+Inf outcome=answered"] == 1
    assert seen["hilo_tool_calls_total ok=true tool=buscar_curso"] == 1
    assert seen["hilo_tool_call_seconds_total ok=true tool=buscar_curso"] >= 0
    assert any(value > 0 for name, value in seen.items() if name.startswith("hilo_tokens_total direction=output"))
    assert "5215511110001" not in visit(open_to_us)[1]


def test_run_that_waits_is_open_and_one_of_yesterday_is_not_counted(
    open_to_us: Hilo, openai_server: LocalOpenAI, twilio: Simulator
) -> None:
    twilio.receive(LUIS, "hola")
    open_to_us.done(1)
    open_to_us.rows("UPDATE runs SET finished_at = now() - interval '1 day'")
    with openai_server.gate("POST /v1/responses$") as gate:
        twilio.receive(ANA, "hola")
        assert gate.arrived.wait(10)
        seen = figures(open_to_us)
    assert seen["hilo_runs_open state=queued"] == 1
    assert not [name for name in seen if name.startswith("hilo_run_seconds")]
    open_to_us.done(2)


def test_part_that_did_not_arrive_is_counted_by_its_code(open_to_us: Hilo, twilio: Simulator) -> None:
    twilio.fault("send", "undeliver", code=63024)
    twilio.receive(ANA, "hola")
    wait_for(lambda: open_to_us.rows("SELECT FROM runs WHERE outcome = 'undelivered'"))
    assert figures(open_to_us)["hilo_parts_undelivered_total code=63024"] == 1
