"""The contract between Hilo and its plugins: all that a file in `tools/` imports.

A plugin is a module with functions marked `@hookimpl`; `Hooks` lists what they may be called and what they
receive. The shortest one gives the assistant a tool:

    from tools import Context, hookimpl

    def hora_de_cierre(context: Context, sucursal: str) -> str:
        '''Dice a qué hora cierra una sucursal.'''
        return "19:00"

    @hookimpl
    def register_tools(register):
        register(hora_de_cierre)

What it reads with `context.settings.get("CIERRE", "19")` it declares in a mapping, so that a value that cannot be used
stops the start: SETTINGS = {"CIERRE": Setting("an hour from 0 to 23", "1?[0-9]|2[0-3]")}
"""

from __future__ import annotations

import inspect
import json
import logging
import re
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any

import pluggy
import pydantic
import pydantic.errors
import pydantic.fields
import typing_extensions

__all__ = ["Context", "Event", "Media", "Message", "Part", "PluginError", "Setting", "Tool", "ToolError", "Turn",
           "hookimpl"]  # fmt: skip

hookimpl = pluggy.HookimplMarker("hilo")
hookspec = pluggy.HookspecMarker("hilo")


# --- What plugins see -------------------------------------------------------------------------------------


class ToolError(Exception):
    """Raised by a tool to tell the model, in words it can act on, why there is no result."""


class PluginError(Exception):
    """A plugin that breaks the contract, or a setting of its own that cannot be used. The text, which of all that a
    hook may raise is alone logged, says what to change and quotes no user; `function` is where it stands when the
    traceback does not tell."""

    def __init__(self, text: str, function: Callable[..., Any] | None = None):
        super().__init__(text)
        self.function = function


@dataclass(frozen=True)
class Setting:
    """A variable of a plugin's own, in its mapping `SETTINGS`: `needs` completes "it needs …"; `form` is a pattern for
    the whole value, or a function of it that raises ValueError. A `secret` is never shown; `required` tells, perhaps
    as a function of the settings, whether there has to be a value."""

    needs: str
    form: str | Callable[[str], Any] = "(?s).+"
    secret: bool = False
    required: bool | Callable[[Any], Any] = False

    def fault(self, name: str, settings: Any) -> str | None:
        """Return the line that says why the variable cannot be used, None where it can."""
        value = settings.get(name)
        if value and not self.fits(value):
            return f"{name}={'(secret)' if self.secret else repr(value[:80])} cannot be used: it needs {self.needs}"
        lacking = not value and (self.required(settings) if callable(self.required) else self.required)
        return f"{name} is not set: it needs {self.needs}" if lacking else None

    def fits(self, value: str) -> bool:
        """Tell whether a value has the form."""
        if isinstance(self.form, str):
            return re.fullmatch(self.form, value) is not None
        try:
            self.form(value)
        except ValueError:
            return False
        return True


@dataclass(frozen=True)
class Media:
    """A file that came with a message: Twilio's URL (needs Basic auth) and its media type, without parameters."""

    url: str
    content_type: str


@dataclass(frozen=True)
class Message:
    """One inbound WhatsApp message. `raw` has every form field as Twilio sent it
    (https://www.twilio.com/docs/messaging/guides/webhook-request)."""

    sid: str
    address: str
    text: str = ""
    media: tuple[Media, ...] = ()
    button: str | None = None
    location: tuple[float, float] | None = None
    profile_name: str = ""
    at: datetime | None = None
    raw: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Part:
    """One outbound WhatsApp message: a text, a file or a template (`content_sid` with its `variables`).
    `to` is another address than the user's own, for relays; `None` answers the user."""

    text: str = ""
    media_url: str | None = None
    content_sid: str | None = None
    variables: Mapping[str, str] | None = None
    to: str | None = None

    def __post_init__(self) -> None:
        if not (self.text or self.media_url or self.content_sid):
            raise ValueError("Part: needs a text, a media_url or a content_sid")


@dataclass(frozen=True)
class Turn:
    """One line of the transcript: `role` is "user" or "assistant"."""

    role: str
    text: str
    at: datetime


@dataclass(frozen=True)
class Event:
    """Something that happened, for metrics, CRM or audit: `name` (such as "run_finished"), the run and the
    address concerned (None where there is none) and `data`, plain JSON values."""

    name: str
    at: datetime
    run_id: int | None = None
    address: str | None = None
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What a hook or a tool may use. `turn` holds the messages being answered, oldest first; `log` already
    carries the run's id and the masked address; `language` is the one of the user's latest text that shows one, `mode`
    who answers: bot, human (an advisor) or out (nobody)."""

    run_id: int | None = None
    address: str = ""
    profile_name: str = ""
    assistant: str | None = None
    settings: Any = None
    log: logging.Logger | logging.LoggerAdapter[logging.Logger] = field(
        default_factory=lambda: logging.getLogger("hilo")
    )
    turn: tuple[Message, ...] = ()
    services: Any = field(default=None, repr=False)
    language: str = "es"
    mode: str = "bot"

    def query(self, sql: str, /, **params: Any) -> list[dict[str, Any]]:
        """Return the rows of one statement, committed at once; values go in as `:name` parameters only."""
        return typing.cast(list[dict[str, Any]], self.services.query(sql, params))

    def history(self, n: int = 20) -> list[Turn]:
        """Return the last `n` lines said before this turn, oldest first."""
        return typing.cast(list[Turn], self.services.history(self.address, n, self.run_id))

    def send(self, part: str | Part) -> None:
        """Queue one more part, which leaves just before this run's reply; the same part twice in a run leaves once."""
        self.services.send_part(self, part)

    def fallback(self, message: Message, reason: str) -> list[Part] | None:
        """Return what the first plugin with a `fallback_reply` answers, None where there is none."""
        found = self.services.plugins.first("fallback_reply", parts_of, message=message, reason=reason, context=self)
        return typing.cast("list[Part] | None", found)

    def show_typing(self, message: Message) -> None:
        """Let the user see that an answer is being written, and the message as read; best effort, waits for nothing."""
        self.services.show_typing(message)

    def download(self, media: Media, limit: int = 16 * 1024 * 1024, seconds: float = 10.0) -> bytes:
        """Return a file that came with a message, at most `limit` bytes of it; raises ToolError when it cannot be had
        in so many seconds."""
        return typing.cast(bytes, self.services.download(media, limit, seconds))

    def openai(self) -> Any:
        """Return the process's OpenAI client (no retries, 10 s time-out); raises ToolError without a key."""
        return self.services.openai()


Reply = str | Part | list[str | Part]


def clean(value: Any) -> Any:
    """Return texts, also inside lists and dicts, without what no database takes: NUL and halves of surrogate pairs."""
    if isinstance(value, str):
        if value.isascii() and "\x00" not in value:
            return value
        return value.replace("\x00", "").encode("utf-16", "surrogatepass").decode("utf-16", "ignore")
    if isinstance(value, Mapping):
        return {clean(key): clean(item) for key, item in value.items()}
    return [clean(item) for item in value] if isinstance(value, (list, tuple)) else value


def parts_of(reply: Any) -> list[Part]:
    """Return a hook's reply as parts that any database takes; raises PluginError, which quotes nothing of it, for
    anything but a string, a Part or a list of them."""
    items: Iterable[Any] = reply if isinstance(reply, (list, tuple)) else [reply]
    return [part for item in items if (part := _part_of(item))]


def _part_of(item: Any) -> Part | None:
    """Return one item of a reply as a part, None where it says nothing; raises PluginError."""
    if isinstance(item, str):
        return Part(clean(item)) if clean(item).strip() else None
    if not isinstance(item, Part):
        raise PluginError(f"a reply is a string, a Part or a list of them, not {_kind(item)}")
    text, media_url, content_sid, to = (_text(item, name) for name in ("text", "media_url", "content_sid", "to"))
    if item.to is not None and not to:  # what is meant for an advisor, say, must not reach the user
        raise PluginError("Part.to is empty; it needs an address, or None for the user")
    variables = _variables(item.variables)
    if not (text or media_url or content_sid):
        return None
    return Part(text, media_url or None, content_sid or None, variables, to or None)


def _text(part: Part, name: str) -> str:
    """Return one of a part's texts, clean, "" where it is blank or None; raises PluginError."""
    value = getattr(part, name)
    if not isinstance(value, str) and (value is not None or name == "text"):
        raise PluginError(f"Part.{name} is a string, not {_kind(value)}")
    value = str(clean(value or ""))
    return value if value.strip() else ""


def _variables(given: Any) -> dict[str, str] | None:
    """Return a template's variables as texts, None where there are none; raises PluginError."""
    if given is not None and not isinstance(given, Mapping):
        raise PluginError(f"Part.variables is a mapping, such as {{'1': 'Ana'}}, not {_kind(given)}")
    if any(value is None for value in (given or {}).values()):
        raise PluginError("Part.variables: a value is None; each needs a text")
    return {clean(str(key)): clean(str(value)) for key, value in given.items()} if given else None


def model_input(value: Any) -> str | list[dict[str, Any]]:
    """Return what message_to_input gave; raises PluginError, which quotes nothing of it, for anything but a text or
    input content parts that JSON can hold."""
    value = clean(value)
    if isinstance(value, str) and value.strip():
        return value
    if not (isinstance(value, list) and value and all(isinstance(p, dict) and "type" in p for p in value)):
        raise PluginError(f"message_to_input returns a text or a list of input content parts, not {_kind(value)}")
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        raise PluginError("message_to_input returned input content parts that are no JSON") from None
    return value


def _kind(value: Any) -> str:
    """Return the name of a value's type."""
    return type(value).__name__


class Hooks:
    """What a plugin may implement. None means "not mine", [] means "handled, say nothing"."""

    @hookspec
    def register_tools(self, register: Callable[..., Any]) -> None:
        """Call `register(function, side_effects=False, timeout=10)` for each function the assistant may call."""

    @hookspec(firstresult=True)
    def message_to_input(self, message: Message, context: Context) -> str | list[dict[str, Any]] | None:
        """Return what the model is to read for a message: a text, or OpenAI input content parts."""

    @hookspec(firstresult=True)
    def incoming_message(self, message: Message, context: Context) -> Reply | None:
        """Answer a message without the model, such as a command."""

    @hookspec(firstresult=True)
    def choose_assistant(self, message: Message, context: Context) -> str | None:
        """Return the name of the file in `assistants/` that is to answer this turn; "" for the traditional flow."""

    @hookspec(firstresult=True)
    def fallback_reply(self, message: Message, reason: str, context: Context) -> Reply | None:
        """Answer a turn that the model cannot: reason is no_assistant, disabled, openai_down, timeout or error."""

    @hookspec(firstresult=True)
    def format_reply(self, text: str, message: Message, context: Context) -> Reply | None:
        """Return the model's text as the parts that WhatsApp shows."""

    @hookspec
    def track_event(self, event: Event) -> None:
        """Take note of what happened; called outside the journey, a failure is logged only."""

    @hookspec
    def register_routes(self, app: Any, context: Context) -> None:
        """Add pages to the bottle application."""


# --- How a function becomes a tool ------------------------------------------------------------------------

# What strict mode understands (https://platform.openai.com/docs/guides/structured-outputs#supported-schemas);
# other constraints stay ours alone: the arguments are validated with them all the same.
_KEPT = {
    "type", "description", "enum", "const", "properties", "required", "items", "anyOf", "$ref", "$defs",
    "format", "pattern", "minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf",
    "minItems", "maxItems", "additionalProperties",
}  # fmt: skip
_FORMATS = {"date-time", "time", "date", "duration", "email", "hostname", "ipv4", "ipv6", "uuid"}


@dataclass(frozen=True)
class Tool:
    """A function the assistant may call, with the schema the model sees."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    arguments: type[pydantic.BaseModel]
    context_name: str | None
    side_effects: bool = False
    timeout: float = 10.0

    @property
    def definition(self) -> dict[str, Any]:
        """The tool as `responses.create` takes it."""
        return {
            "type": "function",
            "name": self.name,
            "description": self.description,
            "parameters": self.parameters,
            "strict": True,
        }

    def validate(self, arguments: str) -> dict[str, Any]:
        """Return the keyword arguments in a model's JSON; raises ToolError naming each one that is wrong."""
        try:
            given = json.loads(arguments or "{}")
        except ValueError as error:
            raise ToolError(f"{self.name}: the arguments are not JSON ({error})") from None
        try:
            checked = self._checked(given)
        except pydantic.ValidationError as error:
            raise ToolError(f"{self.name}: {_faults(error)}") from None
        return {name.removeprefix("arg_"): getattr(checked, name) for name in checked.model_fields_set}

    def call(self, arguments: str, context: Context) -> Any:
        """Return what the function returns for a model's JSON arguments."""
        values = self.validate(arguments)
        if self.context_name:
            values[self.context_name] = context
        return self.function(**values)

    def _checked(self, given: Any) -> pydantic.BaseModel:
        """Validate; a null where only a default would do (strict mode has no optional keys) is left out."""
        try:
            return self.arguments.model_validate(given)
        except pydantic.ValidationError as error:
            nulls = [e["loc"] for e in error.errors() if e["input"] is None and e["type"] != "missing"]
            if not any([_drop(given, loc) for loc in nulls]):
                raise
        return self.arguments.model_validate(given)


def make_tool(function: Callable[..., Any], side_effects: bool = False, timeout: float = 10.0) -> Tool:
    """Return the tool that a function's name, docstring and type hints describe; raises PluginError."""
    name = getattr(function, "__name__", repr(function))
    if not inspect.isfunction(function) or name == "<lambda>":
        raise PluginError(f"register({name}): needs a function defined with def")
    if not re.fullmatch("[a-zA-Z0-9_]{1,64}", name):
        raise PluginError(f"{name}: a tool's name has at most 64 letters (a to z, without accents), digits and _")
    if inspect.iscoroutinefunction(function) or inspect.isasyncgenfunction(function):
        raise PluginError(f"{name}: tools are ordinary functions, not async ones")
    description = inspect.getdoc(function)
    if not description:
        raise PluginError(f"{name}: needs a docstring; the assistant reads it to know when to call the tool")
    if not (isinstance(timeout, (int, float)) and 0 < timeout <= 3600):
        raise PluginError(f"{name}: timeout={timeout!r} has to be a number of seconds above 0, at most 3600")
    fields, context_name = _parameters(function, name)
    arguments, schema = _schema(name, fields)
    return Tool(name, description, schema, function, arguments, context_name, side_effects, float(timeout))


def _parameters(function: Callable[..., Any], name: str) -> tuple[dict[str, Any], str | None]:
    """Return a function's parameters as pydantic fields, and the name of the one that takes the Context."""
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except Exception as error:
        raise PluginError(f"{name}: its type hints cannot be read ({error})") from error
    fields: dict[str, Any] = {}
    context_name = None
    for parameter in inspect.signature(function).parameters.values():
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise PluginError(f"{name}: {parameter} cannot be described to the model; name each parameter")
        if parameter.name not in hints:
            raise PluginError(f"{name}: parameter {parameter.name!r} needs a type hint")
        hint = hints[parameter.name]
        if not _takes_context(hint):
            # An alias lets a parameter have any name, also one that pydantic keeps for itself ("json", "_x").
            field_ = pydantic.Field(_default(parameter, hint, name), alias=parameter.name)
            fields[f"arg_{parameter.name}"] = (_taken(hint, name), field_)
        elif context_name:
            raise PluginError(f"{name}: {context_name!r} and {parameter.name!r} both take the Context; one suffices")
        else:
            context_name = parameter.name
    return fields, context_name


def _takes_context(hint: Any) -> bool:
    """Tell whether a hint is Context, also as `Context | None` or within Annotated."""
    unions = (typing.Union, types.UnionType, typing.Annotated)
    return hint is Context or (typing.get_origin(hint) in unions and any(map(_takes_context, typing.get_args(hint))))


def _default(parameter: inspect.Parameter, hint: Any, name: str) -> Any:
    """Return a parameter's default, ... where it has none; raises PluginError where it stands elsewhere."""
    if isinstance(parameter.default, pydantic.fields.FieldInfo):
        raise PluginError(f"{name}: describe {parameter.name!r} with Annotated[type, Field(…)], not as its default")
    bare = parameter.default is parameter.empty
    notes = [n for n in getattr(hint, "__metadata__", ()) if isinstance(n, pydantic.fields.FieldInfo)]
    if any(note.default_factory or (bare and not note.is_required()) for note in notes):
        raise PluginError(f"{name}: give {parameter.name!r} its default in the signature, not in Field(…)")
    return ... if bare else parameter.default


def _schema(name: str, fields: dict[str, Any]) -> tuple[type[pydantic.BaseModel], dict[str, Any]]:
    """Return the model that validates the arguments and its strict JSON Schema."""
    try:
        config = pydantic.ConfigDict(extra="forbid", arbitrary_types_allowed=False, protected_namespaces=())
        arguments: type[pydantic.BaseModel] = pydantic.create_model(name, __config__=config, **fields)
        return arguments, _strict(arguments.model_json_schema(), name)
    except (pydantic.errors.PydanticUserError, NameError) as error:
        reason = str(error).splitlines()[0]
        raise PluginError(f"{name}: a parameter's type has no JSON Schema ({reason})") from error


def _strict(schema: dict[str, Any], name: str) -> dict[str, Any]:
    """Return a schema as strict mode takes it: all required, nothing additional, no defaults, bare $refs."""
    definitions = schema.get("$defs", {})

    def visit(node: dict[str, Any], path: str) -> dict[str, Any]:
        if "$ref" in node and len(node) > 1:  # a $ref takes no keyword beside it: put the definition in place
            node = {**definitions[node["$ref"].rsplit("/", 1)[1]], **{k: v for k, v in node.items() if k != "$ref"}}
        if "oneOf" in node:
            node = {**node, "anyOf": node["oneOf"]}
        if "type" not in node and node.keys() & {"enum", "const"}:
            node = {**node, "type": _types(node.get("enum", [node.get("const")]))}
        if not node.keys() & {"type", "$ref", "anyOf"}:
            raise PluginError(f"{name}: {path} accepts anything; give it a precise type")
        if node.get("type") == "object" and "properties" not in node and path != name:
            raise PluginError(f"{name}: {path} is a free-form object; use a pydantic model or a TypedDict")
        if "prefixItems" in node or (node.get("type") == "array" and "items" not in node):
            raise PluginError(f"{name}: {path} is a tuple or a bare list; use list[…] with one type")
        kept = {key: value for key, value in node.items() if key in _KEPT}
        if kept.get("format") not in _FORMATS:
            kept.pop("format", None)
        if "(?" in kept.get("pattern", ""):  # look-around is refused; the arguments are held to it all the same
            kept.pop("pattern")
        if node.get("type") == "object":
            kept["properties"] = {
                key: visit(_nullable(value, key not in node.get("required", ())), f"{path}.{key}")
                for key, value in node.get("properties", {}).items()
            }
            kept["required"] = list(kept["properties"])
            kept["additionalProperties"] = False
        if "items" in node:
            kept["items"] = visit(node["items"], f"{path}[]")
        if "anyOf" in node:
            kept["anyOf"] = [visit(option, path) for option in node["anyOf"]]
        if "$defs" in node:
            kept["$defs"] = {key: visit(value, key) for key, value in node["$defs"].items()}
        return kept

    strict = visit(schema, name)
    strict.pop("description", None)
    return strict


def _types(values: list[Any]) -> str | list[str]:
    """Return the JSON type of an enum's values, a list where they have several."""
    names = {str: "string", bool: "boolean", int: "integer", float: "number", type(None): "null", list: "array"}
    found = list(dict.fromkeys(names.get(type(value), "object") for value in values))
    return found[0] if len(found) == 1 else found


def _nullable(node: dict[str, Any], optional: bool) -> dict[str, Any]:
    """Return the schema of an optional property so that null stands for "left out"."""
    node = {key: value for key, value in node.items() if key != "default"}
    null = None in node.get("enum", ()) or any(option.get("type") == "null" for option in node.get("anyOf", ()))
    if not optional or null:
        return node
    description = {"description": node.pop("description")} if "description" in node else {}
    options = node["anyOf"] if set(node) == {"anyOf"} or set(node) == {"anyOf", "title"} else [node]
    return {"anyOf": [*options, {"type": "null"}], **description}


def _taken(hint: Any, name: str) -> Any:
    """Return a hint as pydantic takes it; raises PluginError for a TypedDict that refers to itself."""
    try:
        return _modern(hint)
    except RecursionError:
        raise PluginError(f"{name}: a TypedDict refers to itself; use a pydantic model for that") from None


def _modern(hint: Any) -> Any:
    """Return a hint in which each typing.TypedDict is one that pydantic takes (needed before Python 3.12)."""
    if typing_extensions.is_typeddict(hint):
        hints = typing_extensions.get_type_hints(hint, include_extras=True)
        fields = {key: _key(value, key in hint.__required_keys__) for key, value in hints.items()}
        make: Any = typing_extensions.TypedDict
        made = make(hint.__name__, fields)
        made.__doc__, made.__module__ = hint.__doc__, hint.__module__
        return made
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if not arguments or origin is typing.Literal:
        return hint
    if origin is typing.Annotated:
        return typing.Annotated[(_modern(arguments[0]), *arguments[1:])]
    changed = tuple(_modern(argument) for argument in arguments)
    if changed == arguments:
        return hint
    return typing.Union[changed] if origin in (typing.Union, types.UnionType) else origin[changed]  # noqa: UP007


def _key(hint: Any, required: bool) -> Any:
    """Return the hint of a TypedDict's key, which says itself whether it is required where `required` does not hold."""
    origin = typing.get_origin(hint)
    if origin in (typing.Required, typing.NotRequired, typing_extensions.Required, typing_extensions.NotRequired):
        required = origin in (typing.Required, typing_extensions.Required)
        hint = typing.get_args(hint)[0]
    return _modern(hint) if required else typing_extensions.NotRequired[_modern(hint)]


def _drop(value: Any, loc: tuple[int | str, ...]) -> bool:
    """Remove the key at `loc` that holds a null; False where a list holds it. A union's member in it is passed by."""
    for step in loc:
        if isinstance(value, dict) and step in value:
            if value[step] is None:
                del value[step]
                return True
            value = value[step]
        elif isinstance(value, list) and isinstance(step, int) and step < len(value):
            value = value[step]
    return False


def _faults(error: pydantic.ValidationError) -> str:
    """Return what is wrong with each argument, in one line, without a value longer than 80 characters."""
    return "; ".join(
        f"{'.'.join(map(str, fault['loc'])) or 'arguments'}: {fault['msg']} (got {str(fault['input'])[:80]!r})"
        for fault in error.errors(include_url=False)
    )


def author_line(error: BaseException) -> str:
    """Return "file.py:12" for the line of the author's own file that led to an error, "" where there is none."""
    if place := line_of(getattr(error, "function", None)):
        return place
    if isinstance(error, SyntaxError) and Path(error.filename or "").exists():
        return f"{Path(error.filename or '').name}:{error.lineno}"
    lines = [(Path(frame.f_code.co_filename), line) for frame, line in traceback.walk_tb(error.__traceback__)]
    theirs = [(file, line) for file, line in lines if not _is_ours(file)]
    # The author's file is the first that is not ours; what it calls, the standard library say, may lie deeper.
    return next((f"{file.name}:{line}" for file, line in reversed(theirs) if file == theirs[0][0]), "")


def line_of(function: Any) -> str:
    """Return "file.py:12" for where a function begins, "" where that is not known."""
    code = getattr(function, "__code__", None)
    return f"{Path(code.co_filename).name}:{code.co_firstlineno}" if code else ""


def _is_ours(file: Path) -> bool:
    """Tell whether a file is part of what calls plugins: the core, the contract or the import system."""
    here = Path(__file__).parent
    return file.parent == here.parent or file in (Path(__file__), here / "_plugins.py") or "importlib" in str(file)
