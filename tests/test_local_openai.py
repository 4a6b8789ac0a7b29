"""The local OpenAI against the real SDK: its answers have the SDK's types, its refusals are OpenAI's."""

from __future__ import annotations

import base64
import http.client
import http.server
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, ClassVar, get_args, get_type_hints

import openai
import pytest
from openai.types import Model
from openai.types.audio import Transcription
from openai.types.conversations import (
    Conversation,
    ConversationDeletedResource,
    ConversationItem,
    ConversationItemList,
)
from openai.types.responses import Response
from openai.types.webhooks import UnwrapWebhookEvent
from openai.types.webhooks.webhook_endpoint_list import WebhookEndpointList
from openai.types.webhooks.webhook_test_params import WebhookTestParams
from pydantic import TypeAdapter

from tests.local_openai import (
    EVENT_TYPES,
    Answer,
    Fault,
    LocalOpenAI,
    Refusal,
    Upload,
    calls,
    course_assistant,
    fails,
    never,
    refuses,
    says,
    script,
    stops_short,
)

PNG = "data:image/png;base64," + base64.b64encode(b"\x89PNG\r\n\x1a\n").decode()
MODEL = "gpt-6-luna"
TOOL: dict[str, Any] = {
    "type": "function",
    "name": "buscar_curso",
    "description": "Busca cursos.",
    "strict": True,
    "parameters": {
        "type": "object",
        "properties": {
            "nombre": {"type": "string"},
            "nivel": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        },
        "required": ["nombre", "nivel"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def running() -> Iterator[LocalOpenAI]:
    with LocalOpenAI() as server:
        yield server


@pytest.fixture
def server(running: LocalOpenAI) -> Iterator[LocalOpenAI]:
    running.reset()
    yield running
    running.reset()


@pytest.fixture(scope="module")
def client(running: LocalOpenAI) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=running.url, api_key="sk-local", max_retries=0, timeout=10) as client:
        yield client


class Gateway(http.server.BaseHTTPRequestHandler):
    """Receives webhooks: keeps what came, answers `status`."""

    protocol_version = "HTTP/1.1"
    received: ClassVar[list[tuple[dict[str, str], bytes, int]]] = []
    status: ClassVar[list[int]] = []

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.received.append((dict(self.headers.items()), body, self.client_address[1]))
        self.send_response(self.status.pop(0) if self.status else 200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def gateway(server: LocalOpenAI) -> Iterator[type[Gateway]]:
    """A place for webhooks, and the server told to send them there."""
    Gateway.received.clear()
    Gateway.status.clear()
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Gateway) as listener:
        listener.daemon_threads = True
        listener.block_on_close = False
        thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        server.webhook_url = f"http://127.0.0.1:{listener.server_port}/webhooks/openai"
        yield Gateway
        server.webhook_url = None
        listener.shutdown()
        thread.join()


def until(condition: Callable[[], Any], seconds: float = 5.0) -> Any:
    """What the condition returns as soon as it is true."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come true in time"
        time.sleep(0.002)
    return value


def create(
    client: openai.OpenAI, text: Any = "hola", conversation: str | None = None, **more: Any
) -> Response:
    """A response, created in the background."""
    named = {"conversation": conversation} if conversation else {}
    given = {"model": MODEL, "input": text, "background": True, "store": True, **named, **more}
    return client.responses.create(**given)


def ended(client: openai.OpenAI, response: Response) -> Response:
    """The response once its status is terminal."""
    return until(lambda: found if (found := client.responses.retrieve(response.id)).completed_at else None)


def answer(
    client: openai.OpenAI, text: Any = "hola", conversation: str | None = None, **more: Any
) -> Response:
    """The completed response to a text."""
    return ended(client, create(client, text, conversation, **more))


def output_of(response: Response, output: Any = "[]") -> list[dict[str, Any]]:
    """An output for every function call of a response."""
    found = [item.call_id for item in response.output if item.type == "function_call"]
    return [{"type": "function_call_output", "call_id": c, "output": json.dumps(output)} for c in found]


def texts_of(items: Iterable[Any]) -> list[str]:
    """The text of each message."""
    return [item.content[0].text for item in items]


def in_status(client: openai.OpenAI, response: Response, status: str) -> Response:
    """The response once it has this status."""
    return until(
        lambda: found if (found := client.responses.retrieve(response.id)).status == status else None
    )


def fits(kind: Any, value: Any, extra: tuple[str, ...] = ()) -> None:
    """Asserts that a value is of an SDK type, with no field that the type does not know."""
    checked = TypeAdapter(kind).validate_python(value)
    assert set(getattr(checked, "model_extra", None) or ()) <= set(extra)


def wire(server: LocalOpenAI, path: str) -> Any:
    """The JSON of a path, as it is on the wire."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=5)
    connection.request("GET", path, headers={"Authorization": "Bearer sk-local"})
    found = json.loads(connection.getresponse().read())
    connection.close()
    return found


# --- Shapes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "status"),
    [
        (says("hola"), "completed"),
        (Answer("Busco…", (("buscar_curso", {"nombre": "Excel"}),), reasoning=True), "completed"),
        (refuses("No puedo."), "completed"),
        (fails("rate_limit_exceeded"), "failed"),
        (stops_short("Hay tres", "content_filter"), "incomplete"),
        (never(), "in_progress"),
    ],
)
def test_response_in_each_status_has_the_sdk_types(
    server: LocalOpenAI, client: openai.OpenAI, model: Answer, status: str
) -> None:
    server.model = model
    conversation = client.conversations.create().id
    more = {
        "tools": [TOOL, {"type": "file_search", "vector_store_ids": ["vs_1"]}],
        "instructions": "Sé breve.",
    }
    made = create(client, conversation=conversation, safety_identifier="abc", metadata={"run": "1"}, **more)
    assert made.status == "queued"
    in_status(client, made, status)
    found = wire(server, f"/v1/responses/{made.id}")
    fits(Response, found, extra=("store",))
    for item in found["output"]:
        fits(ConversationItem, item)
    assert found["instructions"] == "Sé breve." and len(found["tools"]) == 2


def test_conversation_and_items_have_the_sdk_types(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.model = script([calls(("buscar_curso", {"nombre": "x"})), says("Listo.")])
    made = client.conversations.create(metadata={"a": "b"})
    image = {"type": "input_image", "image_url": PNG}
    first = answer(
        client, [{"role": "user", "content": [image, {"type": "input_text", "text": "¿?"}]}], made.id
    )
    answer(client, output_of(first), made.id)
    fits(Conversation, wire(server, f"/v1/conversations/{made.id}"))
    listed = wire(server, f"/v1/conversations/{made.id}/items")
    fits(ConversationItemList, listed)
    kinds = ["message", "function_call_output", "function_call", "message"]
    assert [item["type"] for item in listed["data"]] == kinds
    for item in listed["data"]:
        fits(ConversationItem, item)
    fits(ConversationDeletedResource, client.conversations.delete(made.id).to_dict())


def test_event_types_are_those_the_sdk_can_test() -> None:
    known = get_args(get_type_hints(WebhookTestParams)["event_type"])
    assert set(EVENT_TYPES) <= set(known)


# --- Conversations ------------------------------------------------------------------------------------------


def test_conversation_is_seeded_with_up_to_twenty_items(server: LocalOpenAI, client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": str(n)} for n in range(21)]
    made = client.conversations.create(items=turns[:20])
    assert len(list(client.conversations.items.list(made.id))) == 20
    with pytest.raises(openai.BadRequestError, match="array too long"):
        client.conversations.create(items=turns)


def test_items_are_listed_newest_first_in_pages(server: LocalOpenAI, client: openai.OpenAI) -> None:
    turns: list[Any] = [{"role": "user", "content": str(n)} for n in range(5)]
    made = client.conversations.create(items=turns)
    newest = client.conversations.items.list(made.id, limit=2)
    assert len(newest.data) == 2 and newest.has_more
    assert texts_of(newest) == ["4", "3", "2", "1", "0"]
    assert texts_of(client.conversations.items.list(made.id, order="asc", limit=1))[0] == "0"


def test_deleted_conversation_is_gone_but_leaves_its_items(
    server: LocalOpenAI, client: openai.OpenAI
) -> None:
    seed: Any = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    first, second = (client.conversations.create(items=seed).id for _ in range(2))
    for item in client.conversations.items.list(first):
        client.conversations.items.delete(item.id or "", conversation_id=first)
    for made in (first, second):
        assert client.conversations.delete(made).deleted
        with pytest.raises(openai.NotFoundError):
            client.conversations.retrieve(made)
    assert list(server.leftover_items) == [second]


def test_items_are_added_and_read_one_by_one(server: LocalOpenAI, client: openai.OpenAI) -> None:
    made = client.conversations.create()
    (added,) = client.conversations.items.create(made.id, items=[{"role": "user", "content": "hola"}]).data
    assert client.conversations.items.retrieve(added.id or "", conversation_id=made.id) == added
    with pytest.raises(openai.NotFoundError):
        client.conversations.items.retrieve("msg_0", conversation_id=made.id)
    assert client.conversations.update(made.id, metadata={"k": "v"}).metadata == {"k": "v"}


@pytest.mark.parametrize("given", ["thread_abc", "conv_0"])
def test_unknown_conversation_is_refused(server: LocalOpenAI, client: openai.OpenAI, given: str) -> None:
    with pytest.raises(openai.APIStatusError) as reading:
        client.conversations.retrieve(given)
    with pytest.raises(openai.APIStatusError) as creating:
        create(client, conversation=given)
    status = 404 if given.startswith("conv") else 400
    assert (reading.value.status_code, creating.value.status_code) == (status, status)
    assert creating.value.param == "conversation" and creating.value.request_id


def test_assistants_api_is_gone(server: LocalOpenAI, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError, match="Invalid URL"):
        client.post("/threads", body={}, cast_to=object)


# --- Responses ----------------------------------------------------------------------------------------------


def test_background_response_echoes_and_joins_the_conversation(
    server: LocalOpenAI, client: openai.OpenAI
) -> None:
    made = client.conversations.create().id
    done = answer(client, [{"role": "user", "content": "uno"}, {"role": "user", "content": "dos"}], made)
    assert done.output_text == "Eco: uno\ndos" and done.usage and done.usage.total_tokens > 0
    assert answer(client, "tres", made).output_text == "Eco: tres"
    assert len(server.conversations[made].items) == 5
    assert server.polls >= 2 and server.responses[done.id].polls >= 1 and server.model_errors == []


def test_items_join_only_when_the_response_completes(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.model = never()
    made = client.conversations.create().id
    create(client, conversation=made)
    assert list(client.conversations.items.list(made)) == []


@pytest.mark.parametrize("keeps", [False, True])
def test_failed_turn_joins_only_if_told_to(server: LocalOpenAI, client: openai.OpenAI, keeps: bool) -> None:
    server.model, server.failed_turn_keeps_input = fails("server_error", "No."), keeps
    made = client.conversations.create().id
    failed = in_status(client, create(client, conversation=made), "failed")
    assert failed.error and (failed.error.code, failed.error.message) == ("server_error", "No.")
    assert len(server.conversations[made].items) == int(keeps)


def test_incomplete_response_tells_its_reason(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.model = stops_short("Hay tres cur")
    cut = in_status(client, create(client), "incomplete")
    assert cut.output_text == "Hay tres cur"
    assert cut.incomplete_details and cut.incomplete_details.reason == "max_output_tokens"


def test_thinking_takes_its_time(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.think_seconds = lambda: 0.15
    record = server.responses[answer(client).id]
    assert record.ended and 0.15 <= record.ended - record.created < 1


def test_cancel_is_idempotent(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.model = never()
    made = create(client)
    assert client.responses.cancel(made.id).status == "cancelled"
    assert client.responses.cancel(made.id).status == "cancelled"
    server.model = says("ya")
    done = answer(client)
    assert client.responses.cancel(done.id).output_text == "ya"


def test_cancel_may_come_too_late(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.model, server.cancel_completes = says("ya", seconds=60), True
    assert client.responses.cancel(create(client).id).output_text == "ya"


def test_deleted_response_is_not_found(server: LocalOpenAI, client: openai.OpenAI) -> None:
    made = answer(client)
    client.responses.delete(made.id)
    with pytest.raises(openai.NotFoundError):
        client.responses.retrieve(made.id)


def test_second_response_on_a_conversation_finds_it_locked(
    server: LocalOpenAI, client: openai.OpenAI
) -> None:
    server.model = never()
    made = client.conversations.create().id
    first = create(client, conversation=made)
    with pytest.raises(openai.BadRequestError) as locked:
        create(client, conversation=made)
    assert locked.value.code == "conversation_locked"
    assert (server.lock_rejections, server.overlaps, server.max_concurrent_per_conversation) == (
        [made],
        [],
        1,
    )
    client.responses.cancel(first.id)
    assert create(client, conversation=made).status == "queued"


def test_stuck_conversation_stays_locked(server: LocalOpenAI, client: openai.OpenAI) -> None:
    made = client.conversations.create().id
    server.conversations[made].stuck = True
    with pytest.raises(openai.BadRequestError, match="Another process"):
        create(client, conversation=made)


def test_without_the_lock_overlaps_are_seen(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.model, server.enforce_lock = never(), False
    made = client.conversations.create().id
    create(client, conversation=made)
    create(client, conversation=made)
    assert (server.overlaps, server.max_concurrent_per_conversation) == ([made], 2)


def test_server_that_ignores_background_answers_when_done(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.ignores_background, server.webhook_url = True, "http://127.0.0.1:9/"
    made = create(client)
    assert server.deliveries == []
    assert made.status == "completed" and made.output_text == "Eco: hola"
    with pytest.raises(openai.BadRequestError, match="synchronous"):
        client.responses.cancel(made.id)


def test_call_in_the_foreground_answers_when_done(server: LocalOpenAI, client: openai.OpenAI) -> None:
    assert client.responses.create(model=MODEL, input="hola").output_text == "Eco: hola"


def test_model_that_raises_fails_the_response(
    server: LocalOpenAI, client: openai.OpenAI, caplog: pytest.LogCaptureFixture
) -> None:
    server.model = lambda request, items: [][1]
    failed = in_status(client, create(client), "failed")
    assert failed.error and "IndexError" in failed.error.message
    assert [type(error) for error in server.model_errors] == [IndexError]


def test_ten_thousand_responses_in_flight_need_no_more_threads(
    server: LocalOpenAI, client: openai.OpenAI
) -> None:
    all_there = threading.Event()

    def wait_for_all(request: Any, items: Any) -> Answer:
        all_there.wait(10)
        return says("ya", seconds=0.01)

    server.model = wait_for_all
    before = threading.active_count()
    request = {"model": MODEL, "input": "hola", "background": True}
    for _ in range(10_000):
        server.submit(request)
    all_there.set()
    assert server.max_in_flight == 10_000 and threading.active_count() <= before
    until(lambda: server.in_flight == 0)
    assert create(client).status == "queued"


# --- Function calls -----------------------------------------------------------------------------------------


def test_function_calls_are_answered_by_call_id(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.model = script([calls(("a", {"x": "ñ"}), ("b", "{}")), says("listo")])
    made = client.conversations.create().id
    called = answer(client, conversation=made)
    arguments = [item.arguments for item in called.output if item.type == "function_call"]
    assert arguments == ['{"x": "ñ"}', "{}"]
    assert answer(client, output_of(called), made).output_text == "listo"
    assert server.orphans() == []


def test_unanswered_call_poisons_the_conversation(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.model = script([calls(("a", {}), ("b", {})), says("listo")])
    made = client.conversations.create().id
    called = answer(client, conversation=made)
    assert server.orphans() == []
    first, second = output_of(called)
    for attempt in ("hola", [first]):
        with pytest.raises(
            openai.BadRequestError, match="No tool output found for function call call_"
        ) as refused:
            create(client, attempt, made)
        assert refused.value.param == "input"
    assert [call_id for _, call_id in server.orphans()] == [first["call_id"], second["call_id"]]
    answer(client, [first, second], made)
    assert server.orphans() == []
    answer(client, [first], made)
    assert server.duplicate_outputs == [(made, first["call_id"])]


@pytest.mark.parametrize("in_conversation", [True, False])
def test_output_without_its_call_is_refused(
    server: LocalOpenAI, client: openai.OpenAI, in_conversation: bool
) -> None:
    made = client.conversations.create().id if in_conversation else None
    with pytest.raises(
        openai.BadRequestError, match="No tool call found for function call output with call_id"
    ):
        create(client, [{"type": "function_call_output", "call_id": "call_x", "output": "1"}], made)


def test_call_carried_along_needs_its_output(server: LocalOpenAI, client: openai.OpenAI) -> None:
    call = {"type": "function_call", "call_id": "call_x", "name": "a", "arguments": "{}"}
    output = {"type": "function_call_output", "call_id": "call_x", "output": "1"}
    with pytest.raises(openai.BadRequestError, match="No tool output found for function call call_x"):
        create(client, [call])
    assert answer(client, [{"role": "user", "content": "hola"}, call, output]).output_text == "Eco: hola"


def test_item_already_in_the_conversation_is_refused(server: LocalOpenAI, client: openai.OpenAI) -> None:
    made = client.conversations.create(items=[{"role": "user", "content": "a"}]).id
    known = next(iter(client.conversations.items.list(made)))
    with pytest.raises(openai.BadRequestError, match="Duplicate item found"):
        create(client, [{"id": known.id, "role": "user", "content": "a"}], made)


def test_course_assistant_searches_once_and_names_what_it_found(
    server: LocalOpenAI, client: openai.OpenAI
) -> None:
    server.model = course_assistant
    made = client.conversations.create().id
    called = answer(client, "excel", made, tools=[TOOL])
    (call,) = called.output
    assert call.type == "function_call" and json.loads(call.arguments) == {"nombre": "excel", "nivel": None}
    found = output_of(called, {"cursos": [{"nombre": "Excel básico"}, {"nombre": "Excel avanzado"}]})
    done = answer(client, found, made, tools=[TOOL])
    assert done.output_text == "Encontré: Excel básico, Excel avanzado."
    assert answer(client, "pintura", made, tools=[TOOL]).output[0].type == "function_call"


def test_script_runs_anew_in_each_conversation_unless_shared(
    server: LocalOpenAI, client: openai.OpenAI
) -> None:
    for shared, expected in ((False, ["a", "b", "a"]), (True, ["a", "b", "b"])):
        server.model = script([says("a"), says("b")], shared=shared)
        one, two = client.conversations.create().id, client.conversations.create().id
        assert [answer(client, conversation=c).output_text for c in (one, one, two)] == expected


# --- Refusals -----------------------------------------------------------------------------------------------


def bad_tool(**changes: Any) -> dict[str, Any]:
    """The tool with another schema."""
    return {**TOOL, "parameters": {**TOOL["parameters"], **changes}}


NESTED = {"type": "object", "properties": {}, "required": []}
PROPERTY = "In context=('properties', 'nombre'), "


@pytest.mark.parametrize(
    ("tool", "message"),
    [
        (
            bad_tool(additionalProperties=True),
            "'additionalProperties' is required to be supplied and to be false",
        ),
        (bad_tool(required=["nombre"]), "including every key in properties. Missing 'nivel'"),
        (
            bad_tool(properties={"nombre": {"type": "string", "default": ""}}),
            PROPERTY + "'default' is not permitted",
        ),
        (bad_tool(properties={"nombre": NESTED}), PROPERTY + "'additionalProperties' is required"),
        (bad_tool(properties={"nombre": {"type": "array"}}), "array schema missing items"),
        (bad_tool(properties={"nombre": {"title": "N"}}), "schema must have a 'type' key"),
        (bad_tool(properties={"nombre": {"$ref": "#/$defs/N", "title": "N"}}), "[$]ref cannot have keywords"),
        (bad_tool(**{"$defs": {"N": NESTED}}), "In context=('[$]defs', 'N')"),
        (bad_tool(type="array"), "schema must be a JSON Schema of 'type: \"object\"'"),
    ],
)
def test_schema_that_is_not_strict_is_refused_by_name(
    server: LocalOpenAI, client: openai.OpenAI, tool: dict[str, Any], message: str
) -> None:
    pattern = message.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(openai.BadRequestError, match=pattern) as refused:
        create(client, tools=[TOOL, tool])
    assert "Invalid schema for function 'buscar_curso'" in refused.value.message
    assert (refused.value.code, refused.value.param) == ("invalid_function_parameters", "tools[1].parameters")


def test_loose_schema_passes_without_strict(server: LocalOpenAI, client: openai.OpenAI) -> None:
    assert create(client, tools=[{**bad_tool(required=[]), "strict": False}]).status == "queued"


@pytest.mark.parametrize(
    ("changes", "param", "code"),
    [
        ({"model": "gpt-3.5-turbo"}, "model", "model_not_found"),
        ({"extra_body": {"assistant_id": "asst_1"}}, "assistant_id", "unknown_parameter"),
        ({"store": False}, "background", None),
        ({"input": []}, None, "missing_required_parameter"),
        ({"metadata": {str(n): "" for n in range(17)}}, "metadata", "object_above_max_properties"),
        ({"metadata": {"k": "v" * 513}}, "metadata.k", "string_above_max_length"),
        ({"safety_identifier": "x" * 129}, "safety_identifier", "string_above_max_length"),
        ({"instructions": ["a"]}, "instructions", "invalid_type"),
        ({"prompt": {"id": "pmpt_1"}}, "prompt", "unsupported_parameter"),
        ({"tools": [{**TOOL, "name": "buscar curso"}]}, "tools[0].name", "invalid_value"),
        ({"tools": [{"type": "file_search", "vector_store_ids": []}]}, "tools[0]", "invalid_value"),
        ({"tools": [{"type": "retrieval"}]}, "tools[0].type", "invalid_value"),
        ({"input": [{"role": "bot", "content": "a"}]}, "input[0].role", "invalid_value"),
        ({"input": [{"type": "audio"}]}, "input[0].type", "invalid_value"),
        ({"input": [{"type": "function_call_output", "output": "1"}]}, "input[0].call_id", None),
        (
            {"input": [{"role": "assistant", "content": [{"type": "input_text", "text": "a"}]}]},
            "input[0].content[0]",
            "invalid_value",
        ),
        (
            {"input": [{"role": "user", "content": [{"type": "input_image", "image_url": "file:///etc"}]}]},
            "input[0].content[0].image_url",
            "invalid_value",
        ),
        (
            {
                "input": [
                    {"type": "function_call", "id": "call_1", "call_id": "c", "name": "a", "arguments": ""}
                ]
            },
            "input[0].id",
            "invalid_value",
        ),
    ],
)
def test_bad_parameter_is_refused_by_name(
    server: LocalOpenAI, client: openai.OpenAI, changes: dict[str, Any], param: str | None, code: str | None
) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.responses.create(**{"model": MODEL, "input": "hola", "background": True, **changes})
    assert refused.value.param == param
    assert code is None or refused.value.code == code
    assert server.responses == {}


def test_context_overflow_is_refused_unless_truncated(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.context_limit = 100
    with pytest.raises(openai.BadRequestError) as refused:
        create(client, "x" * 500)
    assert refused.value.code == "context_length_exceeded"
    assert create(client, "x" * 500, truncation="auto").status == "queued"


def test_wrong_key_is_refused(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.api_key = "sk-right"
    with pytest.raises(openai.AuthenticationError) as refused:
        client.models.list()
    assert refused.value.code == "invalid_api_key"
    assert client.with_options(api_key="sk-right").models.list().data


# --- Audio and models ---------------------------------------------------------------------------------------


def transcribe(client: openai.OpenAI, name: str = "nota.ogg", content: bytes = b"OggS") -> Transcription:
    """What the server hears in a file."""
    return client.audio.transcriptions.create(model="gpt-transcribe", file=(name, content), language="es")


def test_voice_note_is_transcribed(server: LocalOpenAI, client: openai.OpenAI) -> None:
    assert transcribe(client).text == "Hola, busco un curso de Excel."
    server.transcription = lambda upload: f"{upload.filename} {len(upload.content)}"
    heard = transcribe(client)
    fits(Transcription, heard.to_dict())
    assert heard.text == "nota.ogg 4"
    assert server.transcriptions[0] == Upload("nota.ogg", b"OggS", server.transcriptions[0].fields)
    assert server.transcriptions[0].fields["language"] == "es"


@pytest.mark.parametrize(
    ("name", "content"),
    [("nota.bin", b"OggS"), ("nota", b"OggS"), ("a.ogg", b""), ("a.ogg", bytes(26_500_000))],
)
def test_unusable_audio_is_refused(
    server: LocalOpenAI, client: openai.OpenAI, name: str, content: bytes
) -> None:
    with pytest.raises(openai.APIStatusError) as refused:
        transcribe(client, name, content)
    assert refused.value.status_code == (413 if len(content) > 4 else 400)


def test_transcription_fails_as_told(server: LocalOpenAI, client: openai.OpenAI) -> None:
    def fail(upload: Upload) -> str:
        raise Refusal(500, "No.", type="server_error")

    server.transcription = fail
    with pytest.raises(openai.InternalServerError):
        transcribe(client)


def test_models_carry_their_shutdown_date(server: LocalOpenAI, client: openai.OpenAI) -> None:
    found = {model.id: model.shutdown_date for model in client.models.list()}
    assert found[MODEL] is None and found["gpt-4o"] == "2027-01-14"
    fits(Model, client.models.retrieve(MODEL).to_dict())
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


# --- Webhooks -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "status"),
    [(says("a"), "completed"), (fails(), "failed"), (stops_short(), "incomplete"), (never(), "cancelled")],
)
def test_terminal_status_sends_a_signed_event(
    server: LocalOpenAI, client: openai.OpenAI, gateway: type[Gateway], model: Answer, status: str
) -> None:
    server.model = model
    made = create(client)
    if status == "cancelled":
        client.responses.cancel(made.id)
    headers, body, _ = until(lambda: gateway.received)[0]
    event: Any = client.webhooks.unwrap(body, headers, secret=server.webhook_secret)
    assert (event.type, event.data.id) == (f"response.{status}", made.id)
    fits(UnwrapWebhookEvent, json.loads(body))
    with pytest.raises(openai.InvalidWebhookSignatureError):
        client.webhooks.unwrap(body, headers, secret="whsec_" + base64.b64encode(b"other").decode())


def test_rotating_secret_signs_twice(
    server: LocalOpenAI, client: openai.OpenAI, gateway: type[Gateway]
) -> None:
    old, new = ("whsec_" + base64.b64encode(os.urandom(24)).decode() for _ in range(2))
    server.webhook_secret = f"{new} {old}"
    create(client)
    headers, body, _ = until(lambda: gateway.received)[0]
    for secret in (old, new):
        assert client.webhooks.unwrap(body, headers, secret=secret).type == "response.completed"


def test_event_repeats_late_and_over_kept_connections(
    server: LocalOpenAI, client: openai.OpenAI, gateway: type[Gateway]
) -> None:
    server.webhook_repeat, server.webhook_delay = 3, 0.05
    done = answer(client)
    assert gateway.received == []
    for _ in range(9):
        create(client)
    until(lambda: len(gateway.received) == 30)
    ids = {json.loads(body)["id"] for _, body, _ in gateway.received}
    assert len(ids) == 10 and json.loads(gateway.received[0][1])["data"]["id"] == done.id
    assert len({port for _, _, port in gateway.received}) <= 4


def test_lost_event_never_arrives(server: LocalOpenAI, client: openai.OpenAI, gateway: type[Gateway]) -> None:
    server.webhook_loss = 1.0
    answer(client)
    server.webhook_loss = lambda event: False
    last = answer(client)
    until(lambda: gateway.received)
    assert [delivery.lost for delivery in server.deliveries] == [True, False]
    assert [json.loads(body)["data"]["id"] for _, body, _ in gateway.received] == [last.id]


def test_refused_event_is_sent_again(
    server: LocalOpenAI, client: openai.OpenAI, gateway: type[Gateway]
) -> None:
    server.webhook_retries = (0.01, 0.01)
    gateway.status.extend([503, 400])
    create(client)
    until(lambda: server.deliveries and len(server.deliveries[0].statuses) == 3)
    assert server.deliveries[0].statuses == [503, 400, 200]


def test_early_event_arrives_before_the_create_call_is_answered(
    server: LocalOpenAI, client: openai.OpenAI, gateway: type[Gateway]
) -> None:
    server.webhook_early, server.think_seconds = True, 60
    made = create(client)
    assert made.status == "queued" and len(gateway.received) == 1
    assert client.responses.retrieve(made.id).status == "completed"


def test_endpoint_receives_a_test_event(
    server: LocalOpenAI, client: openai.OpenAI, gateway: type[Gateway]
) -> None:
    assert "response.completed" in client.webhooks.event_types.list().data
    fits(WebhookEndpointList, wire(server, "/v1/webhook_endpoints"))
    (endpoint,) = client.webhooks.list()
    assert endpoint.url == server.webhook_url
    result = client.webhooks.test(endpoint.id, event_type="response.completed")
    assert (result.status_code, result.success) == (200, True)
    headers, body, _ = gateway.received[0]
    assert client.webhooks.unwrap(body, headers, secret=server.webhook_secret).type == "response.completed"
    gateway.status.append(403)
    with pytest.raises(openai.BadRequestError, match="403"):
        client.webhooks.test(endpoint.id, event_type="response.failed")


def test_endpoint_made_by_the_api_gets_the_events_it_asked_for(
    server: LocalOpenAI, client: openai.OpenAI, gateway: type[Gateway]
) -> None:
    url, server.webhook_url = server.webhook_url or "", None
    made = client.webhooks.create(name="hilo", url=url, event_types=["response.failed"])
    answer(client)
    server.model = fails()
    create(client)
    headers, body, _ = until(lambda: gateway.received)[0]
    assert client.webhooks.unwrap(body, headers, secret=made.signing_secret).type == "response.failed"
    assert client.webhooks.retrieve(made.id).name == "hilo"
    assert client.webhooks.delete(made.id).deleted and list(client.webhooks.list()) == []


# --- Faults and gates ---------------------------------------------------------------------------------------


def test_fault_answers_its_error_as_often_as_told(server: LocalOpenAI, client: openai.OpenAI) -> None:
    headers = {"retry-after": "7"}
    fault = Fault("POST /v1/responses$", status=429, code="rate_limit_exceeded", headers=headers, repeat=2)
    server.faults.append(fault)
    for _ in range(2):
        with pytest.raises(openai.RateLimitError) as limited:
            create(client)
        assert limited.value.code == "rate_limit_exceeded"
        assert limited.value.response.headers["retry-after"] == "7"
    assert create(client).status == "queued"
    assert (fault.hits, server.faults, len(server.responses)) == (2, [], 1)
    assert [request.status for request in server.requests] == [429, 429, 200]


@pytest.mark.parametrize(("fault", "made"), [({"cut": "before"}, 0), ({"cut": "after"}, 1)])
def test_cut_connection_loses_the_answer(
    server: LocalOpenAI, client: openai.OpenAI, fault: dict[str, Any], made: int
) -> None:
    server.faults.append(Fault("POST /v1/responses", **fault))
    with pytest.raises(openai.APIConnectionError):
        create(client)
    assert len(server.responses) == made and server.requests[-1].status == -1


def test_error_after_the_work_leaves_a_response(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.faults.append(Fault("/v1/responses", status=500, after_work=True))
    with pytest.raises(openai.InternalServerError):
        create(client)
    assert len(server.responses) == 1


def test_hanging_requests_leave_the_others_alone(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.faults.append(Fault("POST /v1/conversations", hang=30, repeat=None))

    def hang() -> None:
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).conversations.create()

    with ThreadPoolExecutor(20) as pool:
        hanging = [pool.submit(hang) for _ in range(20)]
        until(lambda: len(server.requests) == 20)
        assert answer(client).output_text == "Eco: hola"
        for one in hanging:
            one.result()


def test_pattern_that_matches_nothing_is_refused(server: LocalOpenAI) -> None:
    with pytest.raises(ValueError, match="is no pattern"):
        Fault("responses", status=500)
    with pytest.raises(ValueError, match="is no pattern"):
        server.gate("PUT /v1/responses")


def test_server_that_is_down_answers_nobody(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.down = True
    with pytest.raises(openai.InternalServerError):
        client.models.list()
    server.down = "closed"
    with pytest.raises(openai.APIConnectionError):
        client.models.list()
    server.down = False
    assert client.models.list().data


@pytest.mark.parametrize("before_work", [False, True])
def test_gate_holds_the_answer_until_released(
    server: LocalOpenAI, client: openai.OpenAI, before_work: bool
) -> None:
    with ThreadPoolExecutor(1) as pool, server.gate("POST /v1/responses", before_work=before_work) as gate:
        made = pool.submit(create, client)
        assert gate.arrived.wait(5)
        assert len(server.responses) == (0 if before_work else 1)
        assert not made.done() and gate.requests[0].body["input"] == "hola"
        gate.release()
        assert made.result().status == "queued"


def test_reset_forgets_everything_and_frees_what_waits(server: LocalOpenAI, client: openai.OpenAI) -> None:
    server.model, server.think_seconds = never(), 9
    create(client, conversation=client.conversations.create().id)
    with ThreadPoolExecutor(1) as pool:
        gate = server.gate("GET /v1/models")
        waiting = pool.submit(client.models.list)
        assert gate.arrived.wait(5)
        server.reset()
        assert waiting.result().data
    assert (server.responses, server.conversations, server.requests) == ({}, {}, [])
    assert (server.think_seconds, server.in_flight, server.stats()["requests"]) == (0.0, 0, 0)
    assert answer(client).output_text == "Eco: hola"


def test_restarted_server_keeps_port_and_state() -> None:
    server = LocalOpenAI()
    with server, openai.OpenAI(base_url=server.url, api_key="k", max_retries=0) as client:
        server.think_seconds = 0.2
        made = create(client)
        server.stop()
        with pytest.raises(openai.APIConnectionError):
            client.responses.retrieve(made.id)
        server.start()
        assert ended(client, made).output_text == "Eco: hola"


# --- Process ------------------------------------------------------------------------------------------------


def backstage(port: int, method: str, path: str, body: Any = None) -> tuple[int, Any]:
    """Status and JSON of a call backstage."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
    connection.request(method, path, json.dumps(body), {"Content-Type": "application/json"})
    answered = connection.getresponse()
    found = answered.status, json.loads(answered.read())
    connection.close()
    return found


def test_control_sets_what_it_knows_and_refuses_the_rest(server: LocalOpenAI, client: openai.OpenAI) -> None:
    fault = {"match": "GET /v1/models", "status": 500}
    settings = {
        "think_seconds": [0.01, 0.02],
        "model": {"says": "hey"},
        "webhook_repeat": 2,
        "faults": [fault],
    }
    assert backstage(server.port, "POST", "/_control", settings)[0] == 200
    assert answer(client).output_text == "hey" and server.webhook_repeat == 2
    with pytest.raises(openai.InternalServerError):
        client.models.list()
    for unknown in ({"model": "gpt"}, {"thinking": 1}):
        assert backstage(server.port, "POST", "/_control", unknown)[0] == 400
    assert backstage(server.port, "POST", "/_control", {"reset": True, "model": "course_assistant"})[0] == 200
    assert server.model is course_assistant


def test_process_serves_until_it_is_told_to_stop() -> None:
    command = [sys.executable, "-m", "tests.local_openai", "--think", "0.01", "--model", "course_assistant"]
    root = Path(__file__).parent.parent
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=root, text=True) as process:
        assert process.stdout
        url = process.stdout.readline().strip()
        with openai.OpenAI(base_url=url, api_key="k", max_retries=0) as client:
            assert answer(client).output_text == "No encontré cursos con eso."
        status, stats = backstage(int(url.split(":")[2].split("/")[0]), "GET", "/_stats")
        assert status == 200 and stats["responses"] == {"completed": 1} and stats["polls"] >= 1
        assert stats["handling_ms"]["count"] >= 2 and stats["ended_to_seen_ms"]["count"] == 1
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 0
