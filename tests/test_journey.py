"""A message's journey, from the signed webhook to the reply at Twilio."""

from __future__ import annotations

from collections.abc import Callable

from simulator import Simulator
from tests.conftest import ANA, WEBHOOK_SECRET, Hilo
from tests.local_openai import LocalOpenAI, calls, says, script


def test_message_is_answered_by_the_assistant(hilo: Hilo, twilio: Simulator, openai_server: LocalOpenAI) -> None:
    openai_server.model = says("¡Hola! ¿Qué te gustaría aprender?")
    assert twilio.receive(ANA, "hola").status == 200
    replies = twilio.wait_for(ANA, 1)
    assert [reply.body for reply in replies] == ["¡Hola! ¿Qué te gustaría aprender?"]
    assert [run["outcome"] for run in hilo.done()] == ["answered"]
