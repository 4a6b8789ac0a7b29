"""A local OpenAI: conversations, background responses, transcription, models and webhooks over real HTTP.

Tests and benchmarks talk to it with the real `openai` SDK:

    with LocalOpenAI() as server:
        client = openai.OpenAI(base_url=server.url, api_key="sk-local")
        server.model = script([calls(("buscar_curso", {"nombre": "Excel"})), says("Tenemos Excel.")])
        server.think_seconds = 0.05

It keeps state as OpenAI does: a conversation takes one response at a time, function calls must be answered,
items join the conversation when the response completes. `model` decides what is answered; `faults`, `gate()`
and `down` what goes wrong; `requests`, `responses`, `conversations`, `deliveries` and the counters say what
happened.
Wire format: https://platform.openai.com/docs/api-reference; webhooks: https://www.standardwebhooks.com.
Also a process of its own: `python -m tests.local_openai --port 9000 --think 2`.
"""

from __future__ import annotations

import argparse
import base64
import binascii
import contextlib
import hashlib
import heapq
import hmac
import http.client
import io
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import signal
import socket
import string
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import parse_qs, urlsplit

import bottle
import waitress.channel
import waitress.server
from openai.types.responses.response_create_params import ResponseCreateParamsNonStreaming

Json = dict[str, Any]
Model = Callable[[Json, list[Json]], "Answer"]

log = logging.getLogger("local_openai")

TERMINAL = frozenset({"completed", "failed", "incomplete", "cancelled"})
CREATE_PARAMS = frozenset(ResponseCreateParamsNonStreaming.__annotations__)
AUDIO_SUFFIXES = ("flac", "m4a", "mp3", "mp4", "mpeg", "mpga", "oga", "ogg", "wav", "webm")
AUDIO_LIMIT = 25 * 1024 * 1024
THREADS = 8
GATE_SECONDS = 60.0
SAMPLES = 100_000
EVENT_TYPES = (
    *("batch.completed", "batch.failed", "batch.expired", "batch.cancelled"),
    *("response.completed", "response.failed", "response.cancelled", "response.incomplete"),
    *("eval.run.succeeded", "eval.run.failed", "eval.run.canceled"),
    *("fine_tuning.job.succeeded", "fine_tuning.job.failed", "fine_tuning.job.cancelled"),
    *("realtime.call.incoming", "video.completed", "video.failed"),
)
MODELS: dict[str, str | None] = {
    "gpt-6-luna": None,
    "gpt-6-sol": None,
    "gpt-transcribe": None,
    "gpt-5-mini": "2026-12-11",
    "gpt-4o": "2027-01-14",
    "gpt-4o-transcribe": "2027-02-26",
    "whisper-1": "2027-02-26",
}


class Refusal(Exception):
    """OpenAI says no, with this status and this error body."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.error: Json = {"message": message, "type": type, "param": param, "code": code}
        self.headers = dict(headers or {})


class Cut(Exception):
    """The connection is closed without an answer."""


ALPHABET = string.ascii_letters + string.digits


def new_id(prefix: str) -> str:
    """An identifier as OpenAI writes them: `resp_` and 48 hexadecimal digits."""
    return f"{prefix}_{os.urandom(24).hex()}"


def new_call_id() -> str:
    """A function call's identifier: `call_` and 24 letters or digits."""
    return "call_" + "".join(random.choices(ALPHABET, k=24))


# --- Answers: what the model says ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Answer:
    """What the model answers. It is itself a model: one that always answers this."""

    text: str | None = None
    calls: tuple[tuple[str, Json | str], ...] = ()
    status: Literal["completed", "failed", "incomplete"] = "completed"
    code: str = "server_error"
    message: str = "The server had an error while processing your request. Sorry about that!"
    reason: str = "max_output_tokens"
    refusal: bool = False
    reasoning: bool = False
    seconds: float | None = None
    """How long this answer takes; None: the server's `think_seconds`."""

    def __call__(self, request: Json, items: list[Json]) -> Answer:
        """This same answer, whatever was asked."""
        return self

    def output(self) -> list[Json]:
        """The response's output items, each with an id of its own."""
        items: list[Json] = []
        if self.reasoning:
            items.append({"id": new_id("rs"), "type": "reasoning", "summary": []})
        if self.text is not None:
            items.append(assistant_message(self.text, self.status, refusal=self.refusal))
        for name, arguments in self.calls:
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            call = {"id": new_id("fc"), "type": "function_call", "status": "completed", "name": name}
            items.append({**call, "call_id": new_call_id(), "arguments": text})
        return items


def says(text: str, *, seconds: float | None = None) -> Answer:
    """Answers with this text."""
    return Answer(text, seconds=seconds)


def calls(
    *functions: tuple[str, Json | str], text: str | None = None, seconds: float | None = None
) -> Answer:
    """Calls these functions, all in one response: (name, arguments), arguments as a dict or as raw text."""
    return Answer(text, functions, seconds=seconds)


def fails(
    code: str = "server_error", message: str = "The model failed.", *, seconds: float | None = None
) -> Answer:
    """Ends `failed` with this error: HTTP 200 and no exception in the SDK."""
    return Answer(status="failed", code=code, message=message, seconds=seconds)


def stops_short(text: str | None = None, reason: str = "max_output_tokens") -> Answer:
    """Ends `incomplete` with this partial text, or none."""
    return Answer(text, status="incomplete", reason=reason)


def refuses(text: str) -> Answer:
    """Completes with a refusal instead of a text."""
    return Answer(text, refusal=True)


def never() -> Answer:
    """Thinks until it is cancelled."""
    return Answer("", seconds=math.inf)


def script(answers: Sequence[Model], *, shared: bool = False) -> Model:
    """Gives the answers in turn, the last one ever after: in each conversation anew, or once for all."""
    turns: Counter[str] = Counter()
    steps = list(answers)

    def scripted(request: Json, items: list[Json]) -> Answer:
        key = "" if shared else str(conversation_id(request))
        turns[key] += 1
        return steps[min(turns[key], len(steps)) - 1](request, items)

    return scripted


def echo(request: Json, items: list[Json]) -> Answer:
    """Answers "Eco: " and what the user has said since the last answer."""
    return Answer("Eco: " + "\n".join(unanswered_texts(items)))


def course_assistant(request: Json, items: list[Json]) -> Answer:
    """Looks the user's text up with `buscar_curso` once, then names the courses that came back."""
    last_user = max((n for n, item in enumerate(items) if item.get("role") == "user"), default=-1)
    found = [item for item in items[last_user + 1 :] if item["type"] == "function_call_output"]
    tool = next((tool for tool in request.get("tools") or () if tool.get("name") == "buscar_curso"), None)
    if not found and tool:
        return calls(("buscar_curso", search_arguments(tool, "\n".join(unanswered_texts(items)))))
    names = [name for item in found for name in course_names(item["output"])]
    return says("Encontré: " + ", ".join(names) + "." if names else "No encontré cursos con eso.")


def search_arguments(tool: Json, text: str) -> Json:
    """The arguments for a search tool: the text in its first string parameter, null in the others."""
    properties: Json = (tool.get("parameters") or {}).get("properties") or {"nombre": {}}
    return {name: text if n == 0 else None for n, name in enumerate(properties)}


def course_names(output: Any) -> list[str]:
    """Each "nombre" in a tool's output."""
    with contextlib.suppress(ValueError):
        output = json.loads(output) if isinstance(output, str) else output
    if isinstance(output, dict):
        return [output["nombre"]] if "nombre" in output else course_names(list(output.values()))
    if isinstance(output, list):
        return [name for part in output for name in course_names(part)]
    return []


def unanswered_texts(items: Sequence[Json]) -> list[str]:
    """What the user said after the assistant's last message, one entry a message."""
    texts: list[str] = []
    for item in reversed(items):
        if item.get("role") == "assistant":
            break
        if item.get("role") == "user":
            texts.insert(0, "".join(spoken(part) for part in item["content"]))
    return texts


def spoken(part: Json) -> str:
    """A content part as text: images and files become a mark."""
    return str(part.get("text", f"[{part['type'].removeprefix('input_')}]"))


class Stamp(Answer):
    """Says at what time it was done, in seconds since 1970: a benchmark's measure of what comes after."""

    def output(self) -> list[Json]:
        """The message, made when the response completes."""
        return [assistant_message(str(time.time()))]


READY_MODELS: dict[str, Model] = {"echo": echo, "course_assistant": course_assistant, "clock": Stamp()}


# --- Items: what a conversation holds -----------------------------------------------------------------------

ROLES = {"user": "input", "system": "input", "developer": "input", "assistant": "output"}
CONTENT = {"input": ("input_text", "input_image", "input_file"), "output": ("output_text", "refusal")}
ID_PREFIX = {"message": "msg", "function_call": "fc", "function_call_output": "fc", "reasoning": "rs"}


def assistant_message(text: str, status: str = "completed", *, refusal: bool = False) -> Json:
    """The assistant's message as an output item."""
    part: Json = {"type": "output_text", "text": text, "annotations": [], "logprobs": []}
    if refusal:
        part = {"type": "refusal", "refusal": text}
    status = "incomplete" if status == "incomplete" else "completed"
    message = {"id": new_id("msg"), "type": "message", "status": status, "role": "assistant"}
    return {**message, "content": [part]}


def to_items(value: Any, param: str) -> list[Json]:
    """Input as conversation items, each with an id; raises Refusal naming the item that does not fit."""
    if isinstance(value, str):
        value = [{"role": "user", "content": value}]
    if not isinstance(value, list):
        raise wrong_type(param, "an array of objects or a string", value)
    return [to_item(item, f"{param}[{n}]") for n, item in enumerate(value)]


def to_item(item: Any, param: str) -> Json:
    """One input item in the form in which the conversation keeps it."""
    if not isinstance(item, dict):
        raise wrong_type(param, "an object", item)
    kind = item.get("type", "message")
    if kind not in ID_PREFIX:
        raise invalid_value(f"{param}.type", kind, tuple(ID_PREFIX))
    check_item_id(item, kind, param)
    kept: Json = {"id": new_id(ID_PREFIX[kind]), "status": "completed", **drop_none(item), "type": kind}
    if kind == "message":
        kept["content"] = to_content(item, param)
    if kind.startswith("function_call"):
        texts = ("call_id", "name", "arguments") if kind == "function_call" else ("call_id",)
        for name in texts:
            need_text(item, name, param)
    if kind == "function_call_output" and not isinstance(item.get("output"), str | list):
        raise wrong_type(f"{param}.output", "a string or an array", item.get("output"))
    return kept


def check_item_id(item: Json, kind: str, param: str) -> None:
    """Refuses an id of another kind of item, such as a call_id."""
    given = item.get("id")
    if given is not None and not str(given).startswith(ID_PREFIX[kind]):
        message = f"Invalid '{param}.id': '{given}'. Expected an ID that begins with '{ID_PREFIX[kind]}'."
        raise Refusal(400, message, param=f"{param}.id", code="invalid_value")


def to_content(item: Json, param: str) -> list[Json]:
    """A message's content as a list of parts of the kinds that its role may use."""
    side = ROLES.get(item.get("role", ""))
    if side is None:
        raise invalid_value(f"{param}.role", item.get("role"), tuple(ROLES))
    content = item.get("content")
    if isinstance(content, str):
        content = [{"type": f"{side}_text", "text": content}]
    if not isinstance(content, list):
        raise wrong_type(f"{param}.content", "an array of objects or a string", content)
    return [to_part(part, side, f"{param}.content[{n}]") for n, part in enumerate(content)]


def to_part(part: Any, side: str, param: str) -> Json:
    """One content part, complete; raises Refusal for a kind that the role cannot use."""
    if not isinstance(part, dict):
        raise wrong_type(param, "an object", part)
    kind = part.get("type")
    if kind not in CONTENT[side]:
        raise invalid_value(param, kind, CONTENT[side])
    if kind.endswith("_text"):
        need_text(part, "text", param)
    if kind == "output_text":
        return {"annotations": [], "logprobs": [], **part}
    if kind == "input_image":
        check_image(part, param)
        return {"detail": "auto", "file_id": None, "image_url": None, **drop_none(part)}
    return dict(part)


def check_image(part: Json, param: str) -> None:
    """Refuses an image that is neither a file, a web address nor a data URL of an image in base64."""
    url = part.get("image_url")
    if url is None and part.get("file_id"):
        return
    if isinstance(url, str) and re.match(r"https?://\S+$", url):
        return
    encoded = (
        re.match(r"data:image/(?:png|jpeg|webp|gif);base64,(.+)$", url, re.DOTALL)
        if isinstance(url, str)
        else None
    )
    with contextlib.suppress(binascii.Error, ValueError):
        if encoded and base64.b64decode(encoded[1], validate=True):
            return
    message = f"Invalid '{param}.image_url'. Expected a valid URL, but got a value with an invalid format."
    raise Refusal(400, message, param=f"{param}.image_url", code="invalid_value")


def need_text(value: Json, name: str, param: str) -> None:
    """Refuses a missing field and one that is no string."""
    if name not in value:
        message = f"Missing required parameter: '{param}.{name}'."
        raise Refusal(400, message, param=f"{param}.{name}", code="missing_required_parameter")
    if not isinstance(value[name], str):
        raise wrong_type(f"{param}.{name}", "a string", value[name])


def wrong_type(param: str, expected: str, got: Any) -> Refusal:
    """OpenAI's refusal of a value of the wrong type."""
    message = f"Invalid type for '{param}': expected {expected}, but got {type(got).__name__} instead."
    return Refusal(400, message, param=param, code="invalid_type")


def invalid_value(param: str, got: Any, supported: Sequence[str]) -> Refusal:
    """OpenAI's refusal of a value that is not among those it knows."""
    values = ", ".join(f"'{value}'" for value in supported[:-1]) + f" and '{supported[-1]}'"
    message = f"Invalid value: '{got}'. Supported values are: {values}."
    return Refusal(400, message, param=param, code="invalid_value")


def drop_none(value: Json) -> Json:
    """The fields that have a value."""
    return {name: part for name, part in value.items() if part is not None}


def check_pairing(items: Sequence[Json]) -> None:
    """Refuses an output without its function call and a function call without its output."""
    waiting: dict[str, None] = {}
    called: set[str] = set()
    for item in items:
        if item["type"] == "function_call":
            called.add(item["call_id"])
            waiting[item["call_id"]] = None
        elif item["type"] == "function_call_output":
            if item["call_id"] not in called:
                message = f"No tool call found for function call output with call_id {item['call_id']}."
                raise Refusal(400, message, param="input")
            waiting.pop(item["call_id"], None)
    for call_id in waiting:
        raise Refusal(400, f"No tool output found for function call {call_id}.", param="input")


def unanswered_calls(items: Sequence[Json]) -> list[str]:
    """The call_ids of function calls without an output."""
    answered = {item["call_id"] for item in items if item["type"] == "function_call_output"}
    return [i["call_id"] for i in items if i["type"] == "function_call" and i["call_id"] not in answered]


def count_tokens(*values: Any) -> int:
    """About as many tokens as a model would count: a quarter of the characters."""
    return sum(len(json.dumps(value, ensure_ascii=False)) for value in values if value) // 4


# --- Checks: what a create call may carry -------------------------------------------------------------------

NOT_PERMITTED = ("default", "allOf", "oneOf", "not", "if", "then", "else", "patternProperties", "uniqueItems")

PARAM_TYPES: dict[str, tuple[type | tuple[type, ...], str]] = {
    "model": (str, "a string"),
    "instructions": (str, "a string"),
    "conversation": ((str, dict), "a string or an object"),
    "tools": (list, "an array of objects"),
    "reasoning": (dict, "an object"),
    "text": (dict, "an object"),
    "safety_identifier": (str, "a string"),
    "background": (bool, "a boolean"),
    "store": (bool, "a boolean"),
}


def check_create(body: Json, models: Mapping[str, str | None]) -> None:
    """Refuses the parameters of a response that OpenAI would refuse."""
    for name in body:
        if name not in CREATE_PARAMS:
            raise Refusal(400, f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    check_types(body)
    if body.get("model") is None:
        raise Refusal(
            400, "Missing required parameter: 'model'.", param="model", code="missing_required_parameter"
        )
    if body["model"] not in models:
        message = f"The requested model '{body['model']}' does not exist."
        raise Refusal(400, message, param="model", code="model_not_found")
    for name in ("stream", "previous_response_id", "prompt"):
        if body.get(name):
            message = f"Unsupported parameter: '{name}' is not supported with this model."
            raise Refusal(400, message, param=name, code="unsupported_parameter")
    if body.get("background") and body.get("store") is False:
        raise Refusal(400, "Background mode requires 'store' to be true.", param="background")
    if not body.get("input") and not body.get("conversation"):
        message = "One of 'input', 'previous_response_id', 'prompt' or 'conversation' must be provided."
        raise Refusal(400, message, code="missing_required_parameter")
    check_metadata(body)
    if len(body.get("safety_identifier") or "") > 128:
        raise too_long("safety_identifier", 128, body["safety_identifier"])


def check_types(body: Json) -> None:
    """Refuses a parameter of the wrong type."""
    for name, (kind, expected) in PARAM_TYPES.items():
        if body.get(name) is not None and not isinstance(body[name], kind):
            raise wrong_type(name, expected, body[name])


def check_metadata(body: Json) -> None:
    """Refuses more than 16 pairs, keys over 64 characters and values that are no string of at most 512."""
    metadata = body.get("metadata") or {}
    if not isinstance(metadata, dict):
        raise wrong_type("metadata", "an object", metadata)
    if len(metadata) > 16:
        message = f"Invalid 'metadata': too many properties. Expected at most 16, but got {len(metadata)}."
        raise Refusal(400, message, param="metadata", code="object_above_max_properties")
    for key, value in metadata.items():
        if len(key) > 64:
            raise too_long("metadata", 64, key)
        if not isinstance(value, str):
            raise wrong_type(f"metadata.{key}", "a string", value)
        if len(value) > 512:
            raise too_long(f"metadata.{key}", 512, value)


def too_long(param: str, limit: int, value: str) -> Refusal:
    """OpenAI's refusal of a long string."""
    message = f"Invalid '{param}': string too long. Expected a string with maximum length {limit}"
    message += f", but got a string with length {len(value)} instead."
    return Refusal(400, message, param=param, code="string_above_max_length")


def check_tool(tool: Any, param: str) -> None:
    """Refuses a tool that is no function or file search as the API has them."""
    if not isinstance(tool, dict):
        raise wrong_type(param, "an object", tool)
    if tool.get("type") == "file_search":
        limit = tool.get("max_num_results", 10)
        if not tool.get("vector_store_ids") or not 1 <= limit <= 50:
            message = (
                f"Invalid '{param}': file_search needs vector_store_ids, and 1 to 50 as max_num_results."
            )
            raise Refusal(400, message, param=param, code="invalid_value")
    elif tool.get("type") == "function":
        need_text(tool, "name", param)
        if not re.fullmatch(r"[a-zA-Z0-9_-]{1,64}", tool["name"]):
            message = f"Invalid '{param}.name': string does not match pattern."
            message += " Expected a string that matches the pattern '^[a-zA-Z0-9_-]+$'."
            raise Refusal(400, message, param=f"{param}.name", code="invalid_value")
        check_parameters(tool, param)
    elif tool.get("type") not in ("web_search", "code_interpreter", "image_generation", "mcp", "custom"):
        raise invalid_value(
            f"{param}.type", tool.get("type"), ("function", "file_search", "web_search", "mcp")
        )


def check_parameters(tool: Json, param: str) -> None:
    """Refuses a strict function whose schema is not strict, in OpenAI's words."""
    schema = tool.get("parameters")
    problem = None
    if not isinstance(schema, dict) or schema.get("type") != "object":
        kind = schema.get("type") if isinstance(schema, dict) else None
        problem = f"schema must be a JSON Schema of 'type: \"object\"', got 'type: \"{kind}\"'."
    elif tool.get("strict"):
        problem = schema_problem(schema, ())
    if problem:
        message = f"Invalid schema for function '{tool['name']}': {problem}"
        raise Refusal(400, message, param=f"{param}.parameters", code="invalid_function_parameters")


def schema_problem(schema: Json, path: tuple[str, ...]) -> str | None:
    """The first thing in a schema that strict mode refuses, or None."""
    where = f"In context={path!r}"
    for word in NOT_PERMITTED:
        if word in schema:
            return f"{where}, '{word}' is not permitted."
    if "$ref" in schema and len(schema) > 1:
        return f"{where}, $ref cannot have keywords {set(schema) - {'$ref'}!r}."
    if not {"type", "anyOf", "$ref"} & set(schema):
        return f"{where}, schema must have a 'type' key."
    if schema.get("type") == "array" and "items" not in schema:
        return f"{where}, array schema missing items."
    problem = object_problem(schema, where) if schema.get("type") == "object" else None
    if problem:
        return problem
    inner = (schema_problem(part, (*path, *steps)) for steps, part in subschemas(schema))
    return next(filter(None, inner), None)


def object_problem(schema: Json, where: str) -> str | None:
    """What strict mode refuses in an object: open to more properties, or one of them not required."""
    if schema.get("additionalProperties") is not False:
        return f"{where}, 'additionalProperties' is required to be supplied and to be false."
    missing = [name for name in schema.get("properties", {}) if name not in schema.get("required", ())]
    if missing:
        needed = "'required' is required to be supplied and to be an array including every key in properties."
        return f"{where}, {needed} Missing '{missing[0]}'."
    return None


def subschemas(schema: Json) -> Iterator[tuple[tuple[str, ...], Json]]:
    """The schemas directly inside a schema, each with its steps from there."""
    for group in ("properties", "$defs", "definitions"):
        for name, part in schema.get(group, {}).items():
            yield (group, name), part
    for n, part in enumerate(schema.get("anyOf", ())):
        yield ("anyOf", str(n)), part
    if isinstance(schema.get("items"), dict):
        yield ("items",), schema["items"]


def conversation_id(body: Json) -> str | None:
    """The conversation that a create call names, as a string or as an object."""
    value = body.get("conversation")
    return value.get("id") if isinstance(value, dict) else value


def new_response(body: Json) -> Json:
    """The response to a create call, queued, with the API's defaults for what was not said."""
    tools = [
        {"description": None, "strict": True, **t} if t["type"] == "function" else t
        for t in body.get("tools") or ()
    ]
    named = conversation_id(body)
    return {
        "id": new_id("resp"),
        "object": "response",
        "created_at": int(time.time()),
        "status": "queued",
        "background": bool(body.get("background")),
        "completed_at": None,
        "conversation": {"id": named} if named else None,
        "error": None,
        "incomplete_details": None,
        "instructions": body.get("instructions"),
        "max_output_tokens": body.get("max_output_tokens"),
        "max_tool_calls": body.get("max_tool_calls"),
        "metadata": body.get("metadata") or {},
        "model": body["model"],
        "output": [],
        "parallel_tool_calls": body.get("parallel_tool_calls", True),
        "previous_response_id": None,
        "prompt_cache_key": body.get("prompt_cache_key"),
        "reasoning": {"effort": "medium", "summary": None, **(body.get("reasoning") or {})},
        "safety_identifier": body.get("safety_identifier"),
        "service_tier": "default",
        "store": body.get("store", True),
        "temperature": body.get("temperature", 1.0),
        "text": {"format": {"type": "text"}, "verbosity": "medium", **(body.get("text") or {})},
        "tool_choice": body.get("tool_choice", "auto"),
        "tools": tools,
        "top_logprobs": 0,
        "top_p": body.get("top_p", 1.0),
        "truncation": body.get("truncation", "disabled"),
        "usage": None,
        "user": None,
    }


def usage_of(read: int, written: int) -> Json:
    """The usage of a response, in tokens."""
    return {
        "input_tokens": read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": written,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": read + written,
    }


# --- Records: what happened ---------------------------------------------------------------------------------


@dataclass
class Request:
    """A request as it came in. `at` is a time.time(); `status` is 0 until answered and -1 when cut."""

    method: str
    path: str
    headers: dict[str, str]
    body: Any = None
    at: float = field(default_factory=time.time)
    status: int = 0


@dataclass
class ConversationRecord:
    """A conversation and its items, oldest first. A deleted one keeps the items nobody deleted."""

    body: Json
    items: list[Json] = field(default_factory=list)
    deleted: bool = False
    stuck: bool = False
    """A lock that does not clear: every create is refused as `conversation_locked`."""
    running: set[str] = field(default_factory=set)
    max_running: int = 0
    response_ids: list[str] = field(default_factory=list)
    orphan_attempts: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        """The conversation's `conv_` id."""
        return str(self.body["id"])


@dataclass
class ResponseRecord:
    """A response: what was asked, what the API shows of it (`body`), and when things happened (monotonic)."""

    body: Json
    request: Json
    input_items: list[Json]
    conversation: ConversationRecord | None
    created: float = field(default_factory=time.monotonic)
    ended: float | None = None
    seen: float | None = None
    """When a GET first showed the terminal status."""
    polls: int = 0
    answer: Answer | None = None
    done: threading.Event = field(default_factory=threading.Event)
    notified: threading.Event = field(default_factory=threading.Event)

    @property
    def id(self) -> str:
        """The response's `resp_` id."""
        return str(self.body["id"])

    @property
    def status(self) -> str:
        """The API's status: queued, in_progress, completed, failed, incomplete or cancelled."""
        return str(self.body["status"])


@dataclass
class Delivery:
    """An event on its way to one endpoint; `statuses` has an HTTP status or an error's name per attempt."""

    event: Json
    url: str
    secret: str
    lost: bool = False
    statuses: list[int | str] = field(default_factory=list)
    finished: Callable[[], None] = lambda: None


@dataclass(frozen=True)
class Upload:
    """An audio file sent for transcription."""

    filename: str
    content: bytes
    fields: dict[str, str]


# --- Faults and gates: what goes wrong ----------------------------------------------------------------------


def matches(pattern: str, method: str, path: str) -> bool:
    """Whether a request fits a pattern: a path prefix, perhaps after a method; `$` makes the path exact."""
    wanted, _, prefix = pattern.rpartition(" ")
    if wanted and wanted != method:
        return False
    return path == prefix[:-1] if prefix.endswith("$") else path.startswith(prefix)


def check_pattern(pattern: str) -> None:
    """Raises ValueError for a pattern that can match nothing."""
    if not re.fullmatch(r"((GET|POST|DELETE) )?/v1/\S*", pattern):
        raise ValueError(
            f"{pattern!r} is no pattern: expected '/v1/…' or 'POST /v1/…', with '$' for an exact path"
        )


@dataclass
class Fault:
    """What goes wrong with the next `repeat` requests that match: hang, then an error or a cut connection.

    With neither `status` nor `cut` the request is only slow. `after_work=True`: OpenAI has done what it was
    asked before it hangs or answers the error. `match` is a path prefix, perhaps after a method: "POST
    /v1/responses" takes cancels too, "POST /v1/responses$" does not.
    """

    match: str
    status: int | None = None
    code: str | None = None
    message: str = "Something went wrong at OpenAI."
    param: str | None = None
    headers: dict[str, str] = field(default_factory=dict)
    hang: float = 0.0
    cut: Literal["", "before", "after"] = ""
    after_work: bool = False
    repeat: int | None = 1
    """How many requests it takes; None: all of them."""
    hits: int = 0

    def __post_init__(self) -> None:
        check_pattern(self.match)

    def error(self) -> Refusal:
        """The error that OpenAI answers."""
        status = self.status or 500
        kind = "requests" if status == 429 else "server_error" if status >= 500 else "invalid_request_error"
        return Refusal(
            status, self.message, param=self.param, code=self.code, type=kind, headers=self.headers
        )


class Gate:
    """Where requests that match, as in Fault, wait: `arrived` is set by the first, `release()` frees all."""

    def __init__(self, match: str, before_work: bool) -> None:
        check_pattern(match)
        self.match = match
        self.before_work = before_work
        self.arrived = threading.Event()
        self.released = threading.Event()
        self.requests: list[Request] = []

    def release(self) -> None:
        """Opens the gate for good."""
        self.released.set()

    def __enter__(self) -> Gate:
        return self

    def __exit__(self, *_: object) -> None:
        self.release()


# --- Clock: one thread for all that happens later -----------------------------------------------------------


class Clock:
    """Calls functions at their time, on one thread: ten thousand waiting are ten thousand heap entries."""

    def __init__(self) -> None:
        self._due: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._order = itertools.count()
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._running = False

    def start(self) -> None:
        """Starts the thread."""
        self._running = True
        self._thread = threading.Thread(target=self._run, name="openai-clock", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Ends the thread; what is due later stays for the next start."""
        with self._changed:
            self._running = False
            self._changed.notify()
        if self._thread:
            self._thread.join(5)

    def clear(self) -> None:
        """Forgets all that is due."""
        with self._changed:
            self._due.clear()

    def after(self, seconds: float, function: Callable[..., None], *args: Any) -> None:
        """Calls the function in so many seconds; never, if they are infinite."""
        if math.isinf(seconds):
            return
        with self._changed:
            entry = (time.monotonic() + seconds, next(self._order), function, args)
            heapq.heappush(self._due, entry)
            if self._due[0] is entry:
                self._changed.notify()

    def _next(self) -> tuple[Callable[..., None], tuple[Any, ...]] | None:
        with self._changed:
            while self._running:
                wait = self._due[0][0] - time.monotonic() if self._due else None
                if wait is not None and wait <= 0:
                    return heapq.heappop(self._due)[2:]
                self._changed.wait(wait)
        return None

    def _run(self) -> None:
        while entry := self._next():
            function, args = entry
            try:
                function(*args)
            except Exception:
                log.exception("%s failed", function.__name__)


# --- Webhooks: a small pool that keeps its connections ------------------------------------------------------


def sign(secrets: str, event_id: str, timestamp: int, body: bytes) -> str:
    """The Standard Webhooks signature header: one `v1,` signature for each secret, as during a rotation."""
    signatures = []
    for secret in secrets.split():
        key = base64.b64decode(secret[6:]) if secret.startswith("whsec_") else secret.encode()
        digest = hmac.new(key, f"{event_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
        signatures.append("v1," + base64.b64encode(digest).decode())
    return " ".join(signatures)


class Postman:
    """Posts signed events over connections that it keeps open, one per thread and host."""

    def __init__(self, threads: int = 4) -> None:
        self._queue: queue.SimpleQueue[tuple[Delivery, Callable[[Delivery], None]] | None] = (
            queue.SimpleQueue()
        )
        self._count = threads
        self._threads: list[threading.Thread] = []

    def start(self) -> None:
        """Starts the threads."""
        names = (f"openai-webhook-{n}" for n in range(self._count))
        self._threads = [threading.Thread(target=self._run, name=name, daemon=True) for name in names]
        for thread in self._threads:
            thread.start()

    def stop(self) -> None:
        """Ends the threads after the posts in hand."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join(15)

    def post(self, delivery: Delivery, then: Callable[[Delivery], None]) -> None:
        """Makes one attempt on a thread of the pool, notes its status, then calls `then`."""
        self._queue.put((delivery, then))

    def _run(self) -> None:
        connections: dict[str, http.client.HTTPConnection] = {}
        while entry := self._queue.get():
            delivery, then = entry
            delivery.statuses.append(post_event(delivery, connections))
            then(delivery)
        for connection in connections.values():
            connection.close()


def post_event(delivery: Delivery, connections: dict[str, http.client.HTTPConnection]) -> int | str:
    """The HTTP status of one attempt, or the name of the error that stopped it."""
    body = json.dumps(delivery.event).encode()
    now = int(time.time())
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "OpenAI/1.0 (+https://platform.openai.com/docs/webhooks)",
        "webhook-id": delivery.event["id"],
        "webhook-timestamp": str(now),
        "webhook-signature": sign(delivery.secret, delivery.event["id"], now, body),
    }
    where = urlsplit(delivery.url)
    path = where.path + (f"?{where.query}" if where.query else "")
    fresh = where.netloc not in connections
    try:
        connection = connections.setdefault(where.netloc, connect(where.scheme, where.netloc))
        connection.request("POST", path or "/", body, headers)
        answer = connection.getresponse()
        answer.read()
        return answer.status
    except (OSError, http.client.HTTPException) as error:
        connections.pop(where.netloc).close()
        # A kept connection may have been closed by the other side meanwhile: that is no failure of theirs.
        fresh = fresh or isinstance(error, TimeoutError)
        return type(error).__name__ if fresh else post_event(delivery, connections)


def connect(scheme: str, netloc: str) -> http.client.HTTPConnection:
    """A connection to a host, opened at its first use."""
    kind = http.client.HTTPSConnection if scheme == "https" else http.client.HTTPConnection
    return kind(netloc, timeout=10)


# --- Calls: one HTTP request --------------------------------------------------------------------------------


class Call:
    """One HTTP request, read and recorded."""

    def __init__(self, environ: Json) -> None:
        self.environ = environ
        headers = {
            key[5:].replace("_", "-").lower(): v for key, v in environ.items() if key.startswith("HTTP_")
        }
        headers["content-type"] = environ.get("CONTENT_TYPE", "")
        self.request = Request(environ["REQUEST_METHOD"], environ["PATH_INFO"], headers)
        data = environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
        self.is_json = headers["content-type"].startswith("application/json")
        environ["wsgi.input"] = io.BytesIO(data)
        if self.is_json and data:
            with contextlib.suppress(ValueError):
                self.request.body = json.loads(data)

    def json(self) -> Json:
        """The body, a JSON object; an empty one if there is none. Raises Refusal for anything else."""
        body = self.request.body if self.is_json else {}
        if not isinstance(body, dict):
            raise Refusal(400, "We could not parse the JSON body of your request.")
        return body

    def query(self, name: str, default: str) -> str:
        """A query parameter."""
        return parse_qs(self.environ.get("QUERY_STRING", "")).get(name, [default])[-1]

    def limit(self) -> int:
        """How many entries a list shall have; raises Refusal for a number outside 1 to 100."""
        limit = self.query("limit", "20")
        if not limit.isascii() or not limit.isdigit() or not 1 <= int(limit) <= 100:
            message = f"Invalid 'limit': '{limit}'. Expected an integer from 1 to 100."
            raise Refusal(400, message, param="limit", code="invalid_value")
        return int(limit)

    def cut(self) -> None:
        """Closes the connection without an answer."""
        channel = self.environ["waitress.client_disconnected"].__self__
        with contextlib.suppress(OSError):
            channel.socket.shutdown(socket.SHUT_RDWR)


# --- The server ---------------------------------------------------------------------------------------------


class LocalOpenAI:
    """OpenAI on 127.0.0.1: a context manager, or start() and stop(). All of it may be used from any thread.

    Started again after stop() it keeps its port and its state; `reset()` forgets the state and all settings.
    """

    model: Model
    """What thinks: called with the create call's body and all items it sees, this call's at the end."""
    think_seconds: float | Callable[[], float]
    """From create to terminal status."""
    models: dict[str, str | None]
    """The models that exist, with their shutdown date."""
    api_key: str | None
    """The only key that is accepted; None: any."""
    down: bool | Literal["closed"]
    """True: every request is answered 503. "closed": every connection is cut."""
    ignores_background: bool
    """Answers a create call only when it is done, as servers do that do not know `background`."""
    enforce_lock: bool
    """False: a second response may run on a conversation, so `overlaps` shows what the lock would hide."""
    cancel_completes: bool
    """A cancel comes too late: the response completes."""
    failed_turn_keeps_input: bool
    """Whether the input of a failed or cancelled response joins the conversation; OpenAI does not say."""
    context_limit: int | None
    """Tokens (characters / 4) above which a create call is refused as `context_length_exceeded`."""
    transcription: str | Callable[[Upload], str]
    """The text heard in an audio file; a callable may raise Refusal."""
    webhook_url: str | None
    """Where events go; more endpoints come by the API."""
    webhook_secret: str
    """What signs them: `whsec_…`, or several with spaces between them."""
    webhook_delay: float | Callable[[], float]
    webhook_loss: float | Callable[[Json], bool]
    """The share of events that are lost (0 to 1), or which ones."""
    webhook_repeat: int
    """How often each event is delivered."""
    webhook_early: bool
    """The response ends and its event is delivered before the create call has been answered."""
    webhook_retries: tuple[float, ...]
    """Seconds to wait before each further attempt when the answer is not 2xx."""

    def __init__(self, port: int = 0) -> None:
        self.port = port
        self._lock = threading.RLock()
        self._clock = Clock()
        self._postman = Postman()
        self._server: Any = None
        self._thread: threading.Thread | None = None
        self._stopping = False
        self._held: list[threading.Event] = []
        self._routes = self._make_routes()
        self._clear()

    def _clear(self) -> None:
        self.model = echo
        self.think_seconds = 0.0
        self.models = dict(MODELS)
        self.api_key = None
        self.down = False
        self.ignores_background = False
        self.enforce_lock = True
        self.cancel_completes = False
        self.failed_turn_keeps_input = False
        self.context_limit = None
        self.transcription = "Hola, busco un curso de Excel."
        self.webhook_url = None
        self.webhook_secret = "whsec_" + base64.b64encode(os.urandom(24)).decode()
        self.webhook_delay = 0.0
        self.webhook_loss = 0.0
        self.webhook_repeat = 1
        self.webhook_early = False
        self.webhook_retries = (1.0, 5.0, 30.0)
        self.faults: list[Fault] = []
        self._gates: list[Gate] = []
        self._endpoints: dict[str, Json] = {}
        self._clear_records()

    def _clear_records(self) -> None:
        self.requests: list[Request] = []
        self.responses: dict[str, ResponseRecord] = {}
        self.conversations: dict[str, ConversationRecord] = {}
        self.deliveries: list[Delivery] = []
        self.transcriptions: list[Upload] = []
        self.lock_rejections: list[str] = []
        self.duplicate_outputs: list[tuple[str, str]] = []
        self.model_errors: list[Exception] = []
        self.in_flight = 0
        self.max_in_flight = 0
        self.polls = 0
        self._last_tools: tuple[list[Json] | None, str | None] = (None, None)
        self._routed: Counter[str] = Counter()
        self._handling: deque[float] = deque(maxlen=SAMPLES)
        self._unseen: deque[float] = deque(maxlen=SAMPLES)

    # Life

    @property
    def url(self) -> str:
        """The base URL for the SDK."""
        return f"http://127.0.0.1:{self.port}/v1"

    def start(self) -> LocalOpenAI:
        """Listens; returns itself. Raises OSError when the port is taken."""
        logging.getLogger("waitress.queue").setLevel(logging.ERROR)
        self._stopping = False
        self._server = waitress.server.create_server(
            self._application,
            host="127.0.0.1",
            port=self.port,
            threads=THREADS,
            connection_limit=1500,
            asyncore_use_poll=True,
            backlog=2048,
            channel_timeout=120,
            ident=None,
        )
        self.port = int(self._server.effective_port)
        self._thread = threading.Thread(target=self._serve, args=(self._server,), name="openai", daemon=True)
        self._thread.start()
        self._clock.start()
        self._postman.start()
        return self

    def stop(self) -> None:
        """Lets go of all that is held, closes every connection and frees the port."""
        if self._server is None:
            return
        self._stopping = True
        self._let_go()
        self._server.pull_trigger()
        if self._thread:
            self._thread.join(10)
        self._server.task_dispatcher.shutdown(timeout=2)
        self._server.asyncore.close_all(self._server._map)
        self._clock.stop()
        self._postman.stop()
        self._server = None

    def _serve(self, server: Any) -> None:
        while not self._stopping:
            server.asyncore.loop(timeout=1, map=server._map, use_poll=True, count=1)

    def _let_go(self) -> None:
        with self._lock:
            for event in self._held:
                event.set()

    def reset(self) -> None:
        """Back to the first state: nothing known, nothing set, nothing waiting."""
        self._clock.clear()
        with self._lock:
            for gate in self._gates:
                gate.release()
            self._let_go()
            self._clear()

    def __enter__(self) -> LocalOpenAI:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.stop()

    # What goes wrong

    def gate(self, match: str, *, before_work: bool = False) -> Gate:
        """Holds requests that match, with the work done and the answer not yet sent, until release()."""
        gate = Gate(match, before_work)
        with self._lock:
            self._gates.append(gate)
        return gate

    def _hold(self, event: threading.Event, seconds: float) -> None:
        """Waits, with one more thread for the other requests meanwhile; raises Cut when stopping."""
        dispatcher = self._server.task_dispatcher
        with self._lock:
            self._held.append(event)
            dispatcher.set_thread_count(THREADS + len(self._held))
        try:
            if not self._stopping:
                event.wait(seconds)
        finally:
            with self._lock:
                self._held.remove(event)
                if not self._stopping:
                    dispatcher.set_thread_count(THREADS + len(self._held))
        if self._stopping:
            raise Cut

    def _wait_at_gates(self, request: Request, *, before_work: bool) -> None:
        for gate in list(self._gates):
            if gate.before_work is before_work and not gate.released.is_set():
                if matches(gate.match, request.method, request.path):
                    gate.requests.append(request)
                    gate.arrived.set()
                    self._hold(gate.released, GATE_SECONDS)

    def _take_fault(self, request: Request) -> Fault | None:
        with self._lock:
            for fault in self.faults:
                if matches(fault.match, request.method, request.path):
                    fault.hits += 1
                    if fault.repeat is not None and fault.hits >= fault.repeat:
                        self.faults.remove(fault)
                    return fault
        return None

    def _suffer(self, fault: Fault) -> None:
        if fault.hang:
            self._hold(threading.Event(), fault.hang)
        if fault.cut:
            raise Cut
        if fault.status:
            raise fault.error()

    # HTTP

    def _application(self, environ: Json, start_response: Callable[..., Any]) -> list[bytes]:
        began = time.perf_counter()
        call = Call(environ)
        if not call.request.path.startswith("/_"):
            self._remember(call.request)
        headers: dict[str, str] = {}
        try:
            status, payload = 200, self._perform(call)
        except Refusal as refusal:
            status, headers = refusal.status, refusal.headers
            payload = json.dumps({"error": refusal.error}).encode()
        except Cut:
            call.request.status = -1
            call.cut()
            raise waitress.channel.ClientDisconnected from None
        call.request.status = status
        self._handling.append(time.perf_counter() - began)
        known = {"content-type": "application/json", "x-request-id": new_id("req"), **headers}
        known["content-length"] = str(len(payload))
        start_response(f"{status} {http.client.responses.get(status, 'Error')}", list(known.items()))
        return [payload]

    def _remember(self, request: Request) -> None:
        with self._lock:
            self.requests.append(request)
            if len(self.requests) > SAMPLES:
                del self.requests[: SAMPLES // 2]

    def _perform(self, call: Call) -> bytes:
        request = call.request
        if request.path.startswith("/_"):
            return self._backstage(call)
        self._check_reachable(request)
        fault = self._take_fault(request)
        late = fault is not None and (fault.after_work or fault.cut == "after")
        self._wait_at_gates(request, before_work=True)
        if fault and not late:
            self._suffer(fault)
        try:
            payload = self._route(call)
        finally:
            self._wait_at_gates(request, before_work=False)
        if fault and late:
            self._suffer(fault)
        return payload

    def _check_reachable(self, request: Request) -> None:
        if self.down == "closed":
            raise Cut
        if self.down:
            raise Refusal(
                503, "The server is currently overloaded.", type="server_error", code="server_error"
            )
        key = request.headers.get("authorization", "").removeprefix("Bearer ")
        if not key:
            raise Refusal(401, "Missing bearer or basic authentication in header")
        if self.api_key not in (None, key):
            message = f"Incorrect API key provided: {key[:3]}****."
            raise Refusal(401, message, code="invalid_api_key")

    def _make_routes(self) -> dict[str, Callable[..., Any]]:
        return {
            "POST conversations": self._create_conversation,
            "GET conversations/*": self._get_conversation,
            "POST conversations/*": self._update_conversation,
            "DELETE conversations/*": self._delete_conversation,
            "GET conversations/*/items": self._list_items,
            "POST conversations/*/items": self._create_items,
            "GET conversations/*/items/*": self._get_item,
            "DELETE conversations/*/items/*": self._delete_item,
            "POST responses": self._create_response,
            "GET responses/*": self._get_response,
            "DELETE responses/*": self._delete_response,
            "POST responses/*/cancel": self._cancel_response,
            "POST audio/transcriptions": self._transcribe,
            "GET models": self._list_models,
            "GET models/*": self._get_model,
            "GET webhook_event_types": self._list_event_types,
            "GET webhook_endpoints": self._list_endpoints,
            "POST webhook_endpoints": self._create_endpoint,
            "GET webhook_endpoints/*": self._get_endpoint,
            "DELETE webhook_endpoints/*": self._delete_endpoint,
            "POST webhook_endpoints/*/test": self._test_endpoint,
        }

    def _route(self, call: Call) -> bytes:
        method, path = call.request.method, call.request.path
        parts = path.removeprefix("/v1/").split("/")
        if parts == ["audio", "transcriptions"]:
            shape, ids = f"{method} audio/transcriptions", []
        else:
            shape = f"{method} " + "/".join("*" if n % 2 else part for n, part in enumerate(parts))
            ids = parts[1::2]
        handler = self._routes.get(shape) if path.startswith("/v1/") else None
        if handler is None:
            raise Refusal(404, f"Invalid URL ({method} {path})")
        self._routed[shape] += 1
        answer = handler(call, *ids)
        return answer if isinstance(answer, bytes) else json.dumps(answer).encode()

    # Conversations

    def _conversation(
        self, given: str, param: str = "conversation_id", says_param: bool = False
    ) -> ConversationRecord:
        if not given.startswith("conv"):
            message = f"Invalid '{param}': '{given}'. Expected an ID that begins with 'conv'."
            raise Refusal(400, message, param=param, code="invalid_value")
        record = self.conversations.get(given)
        if record is None or record.deleted:
            message = f"Conversation with id '{given}' not found."
            raise Refusal(404, message, param=param if says_param else None)
        return record

    def _create_conversation(self, call: Call) -> Json:
        body = call.json()
        check_metadata(body)
        items = self._few_items(body)
        made = {"id": new_id("conv"), "object": "conversation", "created_at": int(time.time())}
        with self._lock:
            made["metadata"] = body.get("metadata") or {}
            self.conversations[str(made["id"])] = ConversationRecord(made, items)
        return made

    def _few_items(self, body: Json) -> list[Json]:
        given = body.get("items") or []
        if isinstance(given, list) and len(given) > 20:
            message = "Invalid 'items': array too long. Expected an array with maximum length 20"
            message += f", but got an array with length {len(given)} instead."
            raise Refusal(400, message, param="items", code="array_above_max_length")
        return to_items(given, "items")

    def _get_conversation(self, call: Call, given: str) -> Json:
        with self._lock:
            return self._conversation(given).body

    def _update_conversation(self, call: Call, given: str) -> Json:
        body = call.json()
        check_metadata(body)
        with self._lock:
            record = self._conversation(given)
            record.body["metadata"] = body.get("metadata") or {}
            return record.body

    def _delete_conversation(self, call: Call, given: str) -> Json:
        with self._lock:
            self._conversation(given).deleted = True
        return {"id": given, "object": "conversation.deleted", "deleted": True}

    def _list_items(self, call: Call, given: str) -> Json:
        limit = call.limit()
        with self._lock:
            items = list(self._conversation(given).items)
        if call.query("order", "desc") == "desc":
            items.reverse()
        return page(items, limit, call.query("after", ""))

    def _create_items(self, call: Call, given: str) -> Json:
        items = self._few_items(call.json())
        with self._lock:
            self._conversation(given).items.extend(items)
        return page(items, len(items), "")

    def _get_item(self, call: Call, given: str, item_id: str) -> Json:
        with self._lock:
            return find_item(self._conversation(given), item_id)

    def _delete_item(self, call: Call, given: str, item_id: str) -> Json:
        with self._lock:
            record = self._conversation(given)
            record.items.remove(find_item(record, item_id))
            return record.body

    # Responses

    def _create_response(self, call: Call) -> bytes:
        body = call.json()
        with self._lock:
            record = self.submit(body)
            accepted = json.dumps(record.body).encode()
        if not record.body["background"]:
            self._hold(record.done, 600)
            with self._lock:
                return json.dumps(record.body).encode()
        if self.webhook_early:
            self._think(record, early=True)
            self._hold(record.notified, 10)
        return accepted

    def submit(self, body: Json) -> ResponseRecord:
        """The response that a create call with this body makes, on its way; raises Refusal."""
        check_create(body, self.models)
        items = to_items(body.get("input") or [], "input")
        with self._lock:
            self._share_tools(body)
            record = self._accept(body, items)
        if not (self.webhook_early and record.body["background"]):
            self._clock.after(0, self._think, record)
        return record

    def _share_tools(self, body: Json) -> None:
        """Checks the tools; those of the last call are neither checked again nor kept twice."""
        tools, instructions = self._last_tools
        if body.get("tools") != tools:
            for n, tool in enumerate(body.get("tools") or ()):
                check_tool(tool, f"tools[{n}]")
            self._last_tools = body.get("tools"), body.get("instructions")
        elif tools is not None:
            body["tools"] = tools
            if body.get("instructions") == instructions:
                body["instructions"] = instructions

    def _accept(self, body: Json, items: list[Json]) -> ResponseRecord:
        """The new response, if conversation and input allow one; raises Refusal."""
        named = conversation_id(body)
        conversation = self._conversation(named, "conversation", says_param=True) if named else None
        seen = [*conversation.items, *items] if conversation else items
        if conversation:
            self._check_conversation(conversation, items, seen)
        check_pairing(seen)
        self._check_context(body, seen)
        made = new_response(body)
        made["background"] = made["background"] and not self.ignores_background
        record = ResponseRecord(made, body, items, conversation)
        self.responses[record.id] = record
        self.in_flight += 1
        self.max_in_flight = max(self.max_in_flight, self.in_flight)
        if conversation:
            conversation.running.add(record.id)
            conversation.max_running = max(conversation.max_running, len(conversation.running))
            conversation.response_ids.append(record.id)
        return record

    def _check_conversation(
        self, conversation: ConversationRecord, items: list[Json], seen: list[Json]
    ) -> None:
        if conversation.stuck or (conversation.running and self.enforce_lock):
            self.lock_rejections.append(conversation.id)
            message = (
                "Another process is currently operating on this conversation. Please retry in a few seconds."
            )
            raise Refusal(400, message, param="conversation", code="conversation_locked")
        conversation.orphan_attempts.extend(unanswered_calls(seen))
        known = {item["id"] for item in conversation.items}
        answered = {i["call_id"] for i in conversation.items if i["type"] == "function_call_output"}
        for item in items:
            if item["id"] in known:
                message = f"Duplicate item found with id {item['id']}. Remove duplicate items from your input"
                raise Refusal(400, message + " and try again.", param="input")
            if item["type"] == "function_call_output" and item["call_id"] in answered:
                self.duplicate_outputs.append((conversation.id, item["call_id"]))

    def _check_context(self, body: Json, seen: list[Json]) -> None:
        if self.context_limit is None or body.get("truncation") == "auto":
            return
        if count_tokens(seen, body.get("instructions"), body.get("tools")) > self.context_limit:
            message = (
                "Your input exceeds the context window of this model. Please adjust your input and try again."
            )
            raise Refusal(400, message, param="input", code="context_length_exceeded")

    def _think(self, record: ResponseRecord, early: bool = False) -> None:
        """Runs the model, and ends the response when its time has come."""
        with self._lock:
            if record.status != "queued":
                return
            record.body["status"] = "in_progress"
            before = list(record.conversation.items) if record.conversation else []
        try:
            answer = self.model(record.request, [*before, *record.input_items])
        except Exception as error:
            self.model_errors.append(error)
            log.exception("the model of the test failed")
            answer = fails(message=f"{type(error).__name__}: {error}")
        record.answer = answer
        think = self.think_seconds() if callable(self.think_seconds) else self.think_seconds
        seconds = 0.0 if early else think if answer.seconds is None else answer.seconds
        left = record.created + seconds - time.monotonic()
        if left <= 0:
            self._finish(record)
        else:
            self._clock.after(left, self._finish, record)

    def _finish(self, record: ResponseRecord) -> None:
        """The answer becomes the response's output, and input and output join the conversation."""
        answer = record.answer
        with self._lock:
            if record.status in TERMINAL or answer is None or record.id not in self.responses:
                return
            body = record.body
            if answer.status == "failed":
                body["error"] = {"code": answer.code, "message": answer.message}
            else:
                body["output"] = answer.output()
                before = record.conversation.items if record.conversation else []
                read = count_tokens([*before, *record.input_items], body["instructions"], body["tools"])
                body["usage"] = usage_of(read, count_tokens(body["output"]))
                body["completed_at"] = int(time.time()) if answer.status == "completed" else None
            if answer.status == "incomplete":
                body["incomplete_details"] = {"reason": answer.reason}
            self._end(record, answer.status)

    def _end(self, record: ResponseRecord, status: str) -> None:
        """Puts the response into a terminal status; the lock is held."""
        record.body["status"] = status
        record.ended = time.monotonic()
        self.in_flight -= 1
        if conversation := record.conversation:
            conversation.running.discard(record.id)
            if status in ("completed", "incomplete"):
                conversation.items += [*record.input_items, *record.body["output"]]
            elif self.failed_turn_keeps_input:
                conversation.items += record.input_items
        record.done.set()
        if record.body["background"]:
            self._announce(record)

    def _response(self, given: str) -> ResponseRecord:
        record = self.responses.get(given)
        if record is None or record.body.get("deleted"):
            raise Refusal(404, f"Response with id '{given}' not found.")
        return record

    def _get_response(self, call: Call, given: str) -> bytes:
        with self._lock:
            record = self._response(given)
            self.polls += 1
            record.polls += 1
            if record.ended is not None and record.seen is None:
                record.seen = time.monotonic()
                self._unseen.append(record.seen - record.ended)
            return json.dumps(record.body).encode()

    def _cancel_response(self, call: Call, given: str) -> bytes:
        with self._lock:
            record = self._response(given)
            if not record.body["background"]:
                raise Refusal(400, "Cannot cancel a synchronous response.")
        if self.cancel_completes:
            self._think(record)
            self._finish(record)
        with self._lock:
            if record.status not in TERMINAL:
                self._end(record, "cancelled")
            return json.dumps(record.body).encode()

    def _delete_response(self, call: Call, given: str) -> Json:
        with self._lock:
            record = self._response(given)
            if record.status not in TERMINAL:
                self._end(record, "cancelled")
            record.body["deleted"] = True
        return {"id": given, "object": "response", "deleted": True}

    # Audio and models

    def _transcribe(self, call: Call) -> Json:
        form = bottle.LocalRequest(call.environ)
        fields = {name: str(value) for name, value in form.forms.items()}
        if "file" not in form.files:
            raise Refusal(400, "you must provide a file", param="file")
        file = form.files["file"]
        upload = Upload(file.raw_filename, file.file.read(), fields)
        self._check_upload(upload)
        with self._lock:
            self.transcriptions.append(upload)
        text = self.transcription(upload) if callable(self.transcription) else self.transcription
        tokens = {
            "input_tokens": 10,
            "output_tokens": count_tokens(text),
            "total_tokens": 10 + count_tokens(text),
        }
        return {"text": text, "usage": {"type": "tokens", **tokens}}

    def _check_upload(self, upload: Upload) -> None:
        model = upload.fields.get("model", "")
        if model not in self.models or not re.search("transcribe|whisper", model):
            message = f"The model `{model}` does not exist or you do not have access to it."
            raise Refusal(404, message, code="model_not_found")
        if upload.filename.rpartition(".")[2].lower() not in AUDIO_SUFFIXES:
            message = f"Invalid file format. Supported formats: {list(AUDIO_SUFFIXES)}"
            raise Refusal(400, message)
        if len(upload.content) > AUDIO_LIMIT:
            message = (
                f"Maximum content size limit ({AUDIO_LIMIT}) exceeded ({len(upload.content)} bytes read)"
            )
            raise Refusal(413, message)
        if not upload.content:
            message = "Audio file is too short. Minimum audio length is 0.1 seconds."
            raise Refusal(400, message, param="file", code="audio_too_short")

    def _list_models(self, call: Call) -> Json:
        return {"object": "list", "data": [model_body(name, date) for name, date in self.models.items()]}

    def _get_model(self, call: Call, given: str) -> Json:
        if given not in self.models:
            raise Refusal(404, f"The model '{given}' does not exist", param="model", code="model_not_found")
        return model_body(given, self.models[given])

    # Webhooks

    def _all_endpoints(self) -> dict[str, Json]:
        """The endpoints with their secret; the one of `webhook_url` comes first."""
        with self._lock:
            known = dict(self._endpoints)
        if not self.webhook_url:
            return known
        local = endpoint_body("we_local", "local", self.webhook_url, list(EVENT_TYPES), self.webhook_secret)
        return {"we_local": local, **known}

    def _announce(self, record: ResponseRecord) -> None:
        """Sends the event of a terminal status to every endpoint that wants it."""
        kind = f"response.{record.status}"
        event = new_event(kind, record.id)
        wanted = [e for e in self._all_endpoints().values() if kind in e["event_types"]]
        sent = 0
        for endpoint in wanted:
            delivery = Delivery(
                event, endpoint["url"], endpoint["signing_secret"], finished=record.notified.set
            )
            delivery.lost = self._is_lost(event)
            for _ in range(0 if delivery.lost else self.webhook_repeat):
                delay = self.webhook_delay() if callable(self.webhook_delay) else self.webhook_delay
                self._clock.after(delay, self._postman.post, delivery, self._delivered)
                sent += 1
            self.deliveries.append(delivery)
        if len(self.deliveries) > SAMPLES:
            del self.deliveries[: SAMPLES // 2]
        if not sent:
            record.notified.set()

    def _is_lost(self, event: Json) -> bool:
        return (
            self.webhook_loss(event) if callable(self.webhook_loss) else random.random() < self.webhook_loss
        )

    def _delivered(self, delivery: Delivery) -> None:
        delivery.finished()
        last, attempts = delivery.statuses[-1], len(delivery.statuses)
        accepted = isinstance(last, int) and 200 <= last < 300
        if not accepted and attempts <= len(self.webhook_retries):
            wait = self.webhook_retries[attempts - 1]
            self._clock.after(wait, self._postman.post, delivery, self._delivered)

    def _list_event_types(self, call: Call) -> Json:
        return {"object": "list", "data": list(EVENT_TYPES)}

    def _list_endpoints(self, call: Call) -> Json:
        known = [without_secret(endpoint) for endpoint in self._all_endpoints().values()]
        return page(known, call.limit(), call.query("after", ""))

    def _create_endpoint(self, call: Call) -> Json:
        body = call.json()
        for name in ("name", "url"):
            need_text(body, name, "webhook_endpoint")
        secret = "whsec_" + base64.b64encode(os.urandom(24)).decode()
        made = endpoint_body(new_id("we"), body["name"], body["url"], body.get("event_types") or [], secret)
        with self._lock:
            self._endpoints[made["id"]] = made
        return made

    def _endpoint(self, given: str) -> Json:
        known = self._all_endpoints()
        if given not in known:
            raise Refusal(404, f"Webhook endpoint with id '{given}' not found.")
        return known[given]

    def _get_endpoint(self, call: Call, given: str) -> Json:
        return without_secret(self._endpoint(given))

    def _delete_endpoint(self, call: Call, given: str) -> Json:
        self._endpoint(given)
        with self._lock:
            self._endpoints.pop(given, None)
        return {"id": given, "object": "webhook_endpoint.deleted", "deleted": True}

    def _test_endpoint(self, call: Call, given: str) -> Json:
        endpoint = self._endpoint(given)
        kind = call.json().get("event_type")
        if kind not in EVENT_TYPES:
            raise invalid_value("event_type", kind, EVENT_TYPES)
        answered = threading.Event()
        delivery = Delivery(new_event(kind, "resp_test"), endpoint["url"], endpoint["signing_secret"])
        with self._lock:
            self.deliveries.append(delivery)
        self._postman.post(delivery, lambda _: answered.set())
        self._hold(answered, 15)
        last = delivery.statuses[-1] if delivery.statuses else "TimeoutError"
        if not isinstance(last, int) or not 200 <= last < 300:
            raise Refusal(
                400,
                f"The webhook endpoint did not accept the test event: {last}.",
                code="webhook_test_failed",
            )
        made = {"object": "webhook_endpoint.test", "event_type": kind, "status_code": last, "success": True}
        return {**made, "webhook_endpoint_id": given}

    # What happened

    @property
    def max_concurrent_per_conversation(self) -> int:
        """The most responses that ever ran at once on one conversation."""
        with self._lock:
            return max((record.max_running for record in self.conversations.values()), default=0)

    @property
    def overlaps(self) -> list[str]:
        """Conversations on which two responses ran at once; what the lock refused is in `lock_rejections`."""
        with self._lock:
            return [record.id for record in self.conversations.values() if record.max_running > 1]

    @property
    def leftover_items(self) -> dict[str, list[Json]]:
        """Items that nobody deleted of conversations that were deleted."""
        with self._lock:
            gone = (record for record in self.conversations.values() if record.deleted and record.items)
            return {record.id: list(record.items) for record in gone}

    def orphans(self) -> list[tuple[str, str]]:
        """(conversation, call_id) of calls never answered though their conversation was used again."""
        with self._lock:
            return [
                (record.id, call_id)
                for record in self.conversations.values()
                for call_id in dict.fromkeys(record.orphan_attempts)
                if call_id in unanswered_calls(record.items)
            ]

    def stats(self) -> Json:
        """Counters and latencies (milliseconds) as the process serves them at `/_stats`."""
        with self._lock:
            statuses = Counter(record.status for record in self.responses.values())
            attempts = Counter(str(s) for delivery in self.deliveries for s in delivery.statuses)
            return {
                "requests": sum(self._routed.values()),
                "routes": dict(self._routed),
                "responses": dict(statuses),
                "in_flight": self.in_flight,
                "max_in_flight": self.max_in_flight,
                "conversations": len(self.conversations),
                "polls": self.polls,
                "webhooks": dict(attempts),
                "webhooks_lost": sum(delivery.lost for delivery in self.deliveries),
                "lock_rejections": len(self.lock_rejections),
                "max_concurrent_per_conversation": self.max_concurrent_per_conversation,
                "overlaps": len(self.overlaps),
                "orphans": len(self.orphans()),
                "duplicate_outputs": len(self.duplicate_outputs),
                "model_errors": len(self.model_errors),
                "handling_ms": percentiles(self._handling),
                "ended_to_seen_ms": percentiles(self._unseen),
            }

    # Backstage: what benchmarks use

    def _backstage(self, call: Call) -> bytes:
        if call.request.path == "/_stats":
            return json.dumps(self.stats()).encode()
        if call.request.path == "/_control":
            self.control(call.json())
            return json.dumps(self.stats()).encode()
        raise Refusal(404, f"Invalid URL ({call.request.method} {call.request.path})")

    def control(self, settings: Json) -> None:
        """Sets attributes by name; `model` is a name or {"says": text}, `faults` adds some, `reset` is first.

        A pair of numbers for `think_seconds` or `webhook_delay` is a range. Raises Refusal for what it does
        not know.
        """
        settings = dict(settings)
        if settings.pop("reset", False):
            self.reset()
        for name, value in settings.items():
            if name == "model" and isinstance(value, dict):
                self.model = says(value["says"])
            elif name == "model" and value in READY_MODELS:
                self.model = READY_MODELS[value]
            elif name == "faults":
                self.faults.extend(Fault(**fault) for fault in value)
            elif name in ("think_seconds", "webhook_delay") and isinstance(value, list):
                setattr(self, name, between(*value))
            elif name in SETTINGS:
                setattr(self, name, value)
            else:
                raise Refusal(400, f"Unknown setting: '{name}' = {value!r}.", param=name)


SETTINGS = frozenset(name for name in LocalOpenAI.__annotations__ if name not in ("model", "models"))


def between(low: float, high: float) -> Callable[[], float]:
    """Random numbers in a range."""
    return lambda: random.uniform(low, high)


def percentiles(seconds: Sequence[float]) -> Json:
    """Count, median, 95th and 99th percentile and maximum, in milliseconds."""
    ordered = sorted(seconds)
    marks = {"p50": 0.5, "p95": 0.95, "p99": 0.99, "max": 1.0}
    last = len(ordered) - 1
    found = (
        {name: round(ordered[int(last * mark)] * 1000, 3) for name, mark in marks.items()} if ordered else {}
    )
    return {"count": len(ordered), **found}


def page(items: list[Json], limit: int, after: str) -> Json:
    """A page of a list: at most `limit` items after the one with the id `after`."""
    ids = [item["id"] for item in items]
    if after and after not in ids:
        raise Refusal(
            400, f"Invalid 'after': no item with id '{after}'.", param="after", code="invalid_value"
        )
    start = ids.index(after) + 1 if after else 0
    data = items[start : start + limit]
    bounds = (
        {"first_id": data[0]["id"], "last_id": data[-1]["id"]} if data else {"first_id": "", "last_id": ""}
    )
    return {"object": "list", "data": data, "has_more": start + limit < len(items), **bounds}


def find_item(record: ConversationRecord, item_id: str) -> Json:
    """A conversation's item; raises Refusal when there is none."""
    for item in record.items:
        if item["id"] == item_id:
            return item
    raise Refusal(404, f"Item with id '{item_id}' not found in conversation '{record.id}'.")


def model_body(name: str, shutdown_date: str | None) -> Json:
    """A model as the API shows it."""
    return {
        "id": name,
        "object": "model",
        "created": 1767225600,
        "owned_by": "system",
        "shutdown_date": shutdown_date,
    }


def new_event(kind: str, response_id: str) -> Json:
    """A webhook's body: an id, nothing more."""
    return {
        "object": "event",
        "id": new_id("evt"),
        "type": kind,
        "created_at": int(time.time()),
        "data": {"id": response_id},
    }


def endpoint_body(made: str, name: str, url: str, event_types: list[str], secret: str) -> Json:
    """A webhook endpoint with its secret."""
    now = int(time.time())
    body = {
        "id": made,
        "object": "webhook_endpoint",
        "created_at": now,
        "updated_at": now,
        "name": name,
        "url": url,
    }
    return {**body, "event_types": event_types, "signing_secret": secret, "signing_secret_hint": secret[-4:]}


def without_secret(endpoint: Json) -> Json:
    """An endpoint as it is shown after its creation."""
    return {name: value for name, value in endpoint.items() if name != "signing_secret"}


# --- Process ------------------------------------------------------------------------------------------------


def main() -> None:
    """Serves until SIGTERM or SIGINT; prints the base URL first."""
    parser = argparse.ArgumentParser(description="A local OpenAI for benchmarks.")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--think", type=float, nargs="+", default=[0.0], help="seconds, or two bounds")
    parser.add_argument("--model", choices=sorted(READY_MODELS), default="echo")
    parser.add_argument("--webhook-url")
    parser.add_argument("--webhook-secret")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = LocalOpenAI(options.port)
    server.model = READY_MODELS[options.model]
    server.think_seconds = options.think[0] if len(options.think) == 1 else between(*options.think)
    server.webhook_url = options.webhook_url
    server.webhook_secret = options.webhook_secret or server.webhook_secret
    with server:
        print(server.url, flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
