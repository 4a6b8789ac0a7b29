"""How a function becomes a tool: its schema, as strict mode takes it, and its arguments, as the function wants them."""

from __future__ import annotations

import datetime as dt
import enum
import json
import typing
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Annotated, Any, Literal, Optional

import openai
import pydantic
import pytest
import typing_extensions
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.local_openai import LocalOpenAI, check_tool
from tools import Context, PluginError, Tool, ToolError, make_tool


class Nivel(enum.Enum):
    BASICO = "basico"
    AVANZADO = "avanzado"


class Mezcla(enum.Enum):
    TODO = "todo"
    DIEZ = 10
    NADA = None


class Talla(enum.IntEnum):
    CHICA = 1
    GRANDE = 2


class Contacto(pydantic.BaseModel):
    """Cómo se le encuentra."""

    nombre: str = pydantic.Field(description="Nombre completo")
    correo: str | None = None
    nivel: Nivel = Nivel.BASICO


class Grupo(pydantic.BaseModel):
    nombre: str
    contactos: list[Contacto] = []
    subgrupos: list[Grupo] = []


class Lugar(typing.TypedDict):
    """Un lugar."""

    ciudad: str
    cp: Annotated[int, pydantic.Field(description="Código postal")]


class Sede(typing.TypedDict, total=False):
    lugar: typing.Required[Lugar]
    telefono: str


class Horario(typing.TypedDict):
    dia: str
    hora: typing.NotRequired[str]


class Nodo(typing.TypedDict):
    hijos: list[Nodo]


class Pedido(typing_extensions.TypedDict, total=False):
    curso: typing_extensions.Required[str]
    lugar: Lugar
    notas: list[str]


class Perro(pydantic.BaseModel):
    tipo: Literal["perro"]
    ladra: bool = True


class Gato(pydantic.BaseModel):
    tipo: Literal["gato"]


OPTIONAL = Optional[int]  # noqa: UP045
Animal = Annotated[Perro | Gato, pydantic.Field(discriminator="tipo")]


def tool_with(hint: Any, default: Any = ..., name: str = "x") -> Tool:
    """A tool whose one parameter has this hint; called, it returns its keyword arguments."""
    default_text = "" if default is ... else " = DEFAULT"
    scope: dict[str, Any] = {"HINT": hint, "DEFAULT": default}
    exec(f"def f({name}: HINT{default_text}):\n    'Hace algo.'\n    return {{{name!r}: {name}}}", scope)
    return make_tool(scope["f"])


def parameter(tool: Tool, name: str = "x") -> Any:
    """A parameter's schema."""
    return tool.parameters["properties"][name]


# --- The schema -------------------------------------------------------------------------------------------

HINTS: dict[str, tuple[Any, Any]] = {
    "str": (str, {"type": "string"}),
    "int": (int, {"type": "integer"}),
    "float": (float, {"type": "number"}),
    "bool": (bool, {"type": "boolean"}),
    "Literal": (Literal["a", "b"], {"type": "string", "enum": ["a", "b"]}),
    "Literal of one": (Literal["a"], {"type": "string", "const": "a"}),
    "Optional": (OPTIONAL, {"anyOf": [{"type": "integer"}, {"type": "null"}]}),
    "union": (int | str, {"anyOf": [{"type": "integer"}, {"type": "string"}]}),
    "list": (list[str], {"type": "array", "items": {"type": "string"}}),
    "set": (set[int], {"type": "array", "items": {"type": "integer"}}),
    "list of lists": (list[list[int]], {"type": "array", "items": {"type": "array", "items": {"type": "integer"}}}),
    "datetime": (dt.datetime, {"type": "string", "format": "date-time"}),
    "date": (dt.date, {"type": "string", "format": "date"}),
    "UUID": (uuid.UUID, {"type": "string", "format": "uuid"}),
    "Decimal": (Decimal, {"anyOf": [{"type": "number"}, {"type": "string"}]}),
    "path": (pydantic.FilePath, {"type": "string"}),
    "Literal of several types": (Literal["a", 1], {"type": ["string", "integer"], "enum": ["a", 1]}),
    "Enum": (Nivel, {"$ref": "#/$defs/Nivel"}),
    "described": (Annotated[int, pydantic.Field(description="Cuántos", ge=1)], {
        "type": "integer", "description": "Cuántos", "minimum": 1}),
    "described Enum": (Annotated[Nivel, pydantic.Field(description="Qué nivel")], {
        "type": "string", "enum": ["basico", "avanzado"], "description": "Qué nivel"}),
    "pattern": (Annotated[str, pydantic.Field(pattern="^[A-Z]+$", max_length=5)], {
        "type": "string", "pattern": "^[A-Z]+$"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", HINTS)
def test_hint_becomes_the_schema_of_a_required_parameter(kind: str) -> None:
    hint, schema = HINTS[kind]
    tool = tool_with(hint)
    assert parameter(tool) == schema
    assert tool.parameters["required"] == ["x"] and tool.parameters["additionalProperties"] is False


@pytest.mark.parametrize("kind", HINTS)
def test_parameter_with_a_default_may_be_null_and_shows_no_default(kind: str) -> None:
    hint, schema = HINTS[kind]
    tool = tool_with(hint, None)
    assert {"type": "null"} in parameter(tool)["anyOf"] and tool.parameters["required"] == ["x"]
    assert "default" not in json.dumps(tool.parameters)
    if "description" in schema:
        assert parameter(tool)["description"] == schema["description"]


def strictly(hint: Any, default: Any = ...) -> dict[str, Any]:
    """A tool's definition, which the local OpenAI's strict check has taken."""
    definition = tool_with(hint, default).definition
    check_tool(definition, "tools[0]")
    return definition


COMPOUND = [
    Contacto, Contacto | None, list[Contacto], Grupo, list[Grupo] | None, Lugar, list[Lugar], Pedido, Animal,
    list[Animal], Sede, list[Horario], Nivel | Talla | None, Contacto | Lugar | None,
    Annotated[Contacto, pydantic.Field(description="Quién")],
    Annotated[Grupo, pydantic.Field(description="Cuál")], Talla,
    list[Literal[1, "dos"]], Mezcla, Mezcla | None, Literal["a", None],
    Annotated[Decimal, pydantic.Field(gt=0, max_digits=8)],
    dt.timedelta, dt.time, list[dt.datetime], frozenset[Nivel], typing.Union[Grupo, str],  # noqa: UP007
]  # fmt: skip


@pytest.mark.parametrize("hint", [*COMPOUND, *(hint for hint, _ in HINTS.values())], ids=str)
@pytest.mark.parametrize("default", [..., None], ids=["required", "optional"])
def test_every_schema_passes_the_strict_check(hint: Any, default: Any) -> None:
    schema = strictly(hint, default)["parameters"]
    text = json.dumps(schema)
    assert "(?" not in text and '"title"' not in text and '"default"' not in text
    assert json.loads(text) == schema


def test_nested_model_shows_descriptions_and_requires_all_its_fields() -> None:
    schema = tool_with(Contacto).parameters["$defs"]["Contacto"]
    assert schema["description"] == "Cómo se le encuentra."
    assert schema["properties"]["nombre"] == {"type": "string", "description": "Nombre completo"}
    assert schema["properties"]["nivel"] == {"anyOf": [{"$ref": "#/$defs/Nivel"}, {"type": "null"}]}
    assert schema["required"] == ["nombre", "correo", "nivel"] and schema["additionalProperties"] is False


def test_context_is_hidden_and_filled_wherever_it_stands() -> None:
    def f(a: int, quien: Context, b: str = "x") -> Any:
        """Hace algo."""
        return a, quien.address, b

    tool = make_tool(f)
    assert list(tool.parameters["properties"]) == ["a", "b"]
    assert tool.call('{"a": 1, "b": null}', Context(address="whatsapp:+1")) == (1, "whatsapp:+1", "x")
    with pytest.raises(ToolError, match="quien"):
        tool.validate('{"a": 1, "quien": 2}')


def test_value_that_may_be_none_is_no_twofold_null() -> None:
    tool = tool_with(Literal["a", None], None)
    assert parameter(tool) == {"type": ["string", "null"], "enum": ["a", None]}
    assert tool_with(Mezcla).parameters["$defs"]["Mezcla"] == {
        "type": ["string", "integer", "null"], "enum": ["todo", 10, None],
    }  # fmt: skip


@pytest.mark.parametrize(
    "hint", [Context | None, Annotated[Context | None, "x"], Annotated[Context, "x"], "Context"], ids=str
)
def test_context_that_may_be_none_is_the_context(hint: Any) -> None:
    def f(a: int, quien: hint = None) -> Any:
        """Hace algo."""
        return a, quien.address

    f.__annotations__["quien"] = hint
    tool = make_tool(f)
    assert list(tool.parameters["properties"]) == ["a"]
    assert tool.call('{"a": 1}', Context(address="whatsapp:+1")) == (1, "whatsapp:+1")


def test_second_context_is_refused() -> None:
    def f(a: Context, b: Context) -> None:
        """Hace algo."""

    with pytest.raises(PluginError, match="'a' and 'b' both take the Context"):
        make_tool(f)


def test_tool_without_parameters_is_taken() -> None:
    def f() -> str:
        """Hace algo."""
        return "hecho"

    tool = make_tool(f)
    check_tool(tool.definition, "tools[0]")
    assert [tool.call(arguments, Context()) for arguments in ("{}", "", " {} ")] == ["hecho"] * 3


@pytest.mark.parametrize(
    "name",
    [
        "json",
        "copy",
        "schema",
        "dict",
        "model_config",
        "model_fields",
        "validate",
        "_privado",
        "arg_x",
        "self_",
        "título",
    ],
)
def test_parameter_may_have_any_name(name: str) -> None:
    tool = tool_with(str, name=name)
    check_tool(tool.definition, "tools[0]")
    assert list(tool.parameters["properties"]) == [name]
    assert tool.call(json.dumps({name: "v"}), Context()) == {name: "v"}


def test_docstring_is_the_description_without_its_indentation() -> None:
    def f() -> None:
        """Hace algo.

        Con cuidado.
        """

    assert make_tool(f).description == "Hace algo.\n\nCon cuidado."


def test_definition_is_what_the_sdk_sends() -> None:
    tools = [tool_with(hint).definition | {"name": f"f{n}"} for n, hint in enumerate(COMPOUND)]
    with LocalOpenAI() as server, openai.OpenAI(api_key="sk-local", base_url=server.url) as client:
        response = client.responses.create(model="gpt-6-luna", input="hola", tools=tools)  # type: ignore[arg-type]
        assert response.status == "completed"


# --- The arguments ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("hint", "given", "value"),
    [
        (str, "x", "x"),
        (Nivel, "basico", Nivel.BASICO),
        (Talla, 2, Talla.GRANDE),
        (Literal["a", "b"], "b", "b"),
        (dt.date, "2026-11-22", dt.date(2026, 11, 22)),
        (dt.datetime, "2026-11-22T10:00:00Z", dt.datetime(2026, 11, 22, 10, tzinfo=dt.UTC)),
        (Decimal, "12.50", Decimal("12.50")),
        (Decimal, 12.5, Decimal("12.5")),
        (set[int], [1, 1, 2], {1, 2}),
        (list[str], [], []),
        (int | str, "7", "7"),
        (Contacto, {"nombre": "Ana", "correo": None, "nivel": None}, Contacto(nombre="Ana")),
        (Lugar, {"ciudad": "Puebla", "cp": 72000}, {"ciudad": "Puebla", "cp": 72000}),
        (Pedido, {"curso": "XL", "lugar": None, "notas": None}, {"curso": "XL"}),
        (Sede, {"lugar": {"ciudad": "Puebla", "cp": 1}, "telefono": None}, {"lugar": {"ciudad": "Puebla", "cp": 1}}),
        (Horario, {"dia": "lunes", "hora": None}, {"dia": "lunes"}),
        (Animal, {"tipo": "perro", "ladra": None}, Perro(tipo="perro")),
        (list[Contacto], [{"nombre": "Ana", "correo": "a@b.mx", "nivel": None}],
         [Contacto(nombre="Ana", correo="a@b.mx")]),
        (Contacto | Lugar, {"nombre": "Ana", "correo": None, "nivel": None}, Contacto(nombre="Ana")),
        (Grupo, {"nombre": "g", "contactos": None,
                 "subgrupos": [{"nombre": "h", "contactos": None, "subgrupos": None}]},
         Grupo(nombre="g", subgrupos=[Grupo(nombre="h")])),
    ],
    ids=str,
)  # fmt: skip
def test_arguments_arrive_as_the_hint_says(hint: Any, given: Any, value: Any) -> None:
    assert tool_with(hint).validate(json.dumps({"x": given})) == {"x": value}


@pytest.mark.parametrize(
    ("hint", "default"),
    [
        (str, "nada"), (int, 5), (Nivel, Nivel.AVANZADO), (int | str, 5), (list[str], ["a"]),
        (Contacto, Contacto(nombre="x")),
        (int | Contacto, 5), (OPTIONAL, 5), (Literal["a", "b"], "b"), (Decimal, Decimal(1)), (dt.date, dt.date.min),
        (Animal, Gato(tipo="gato")), (Perro | Gato, None),
    ],
    ids=str,
)  # fmt: skip
def test_null_stands_for_the_default_where_null_is_no_value(hint: Any, default: Any) -> None:
    tool = tool_with(hint, default)
    expected = None if hint == OPTIONAL else default
    assert tool.call('{"x": null}', Context()) == {"x": expected}
    assert tool.call("{}", Context()) == {"x": default}


@pytest.mark.parametrize(
    ("hint", "given", "names"),
    [
        (int, '{"x": "mucho"}', ["x", "mucho"]),
        (int, '{"x": 1.5}', ["x"]),
        (int, "{}", ["x"]),
        (int, '{"x": null}', ["x"]),
        (list[int], '{"x": [1, null]}', ["x.1"]),
        (list[Contacto], '{"x": [null]}', ["x.0"]),
        (Nivel, '{"x": "experto"}', ["x", "basico"]),
        (Literal["a", "b"], '{"x": "c"}', ["x", "'a'"]),
        (Contacto, '{"x": {"correo": null, "nivel": null}}', ["x.nombre"]),
        (Contacto, '{"x": {"nombre": "Ana", "nivel": "experto"}}', ["x.nivel"]),
        (Annotated[int, pydantic.Field(ge=1)], '{"x": 0}', ["x", "1"]),
        (Annotated[str, pydantic.Field(max_length=3)], '{"x": "largo"}', ["x", "3"]),
        (str, '{"x": "a", "y": 1}', ["y"]),
        (str, "[]", ["arguments"]),
        (str, "null", ["arguments"]),
        (str, '"x"', ["arguments"]),
        (str, "{", ["not JSON"]),
        (str, '{"x": "' + "largo" * 500, ["not JSON"]),
        (int, json.dumps({"x": "z" * 5000}), ["x", "z" * 80]),
        (Decimal, '{"x": "1,5"}', ["x"]),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_wrong_argument_is_an_error_that_names_it(hint: Any, given: str, names: list[str]) -> None:
    with pytest.raises(ToolError) as caught:
        tool_with(hint).validate(given)
    text = str(caught.value)
    assert all(name in text for name in names), text
    assert text.startswith("f: ") and "\n" not in text and len(text) < 600 and "http" not in text


def test_arguments_of_one_call_do_not_reach_the_next() -> None:
    def f(x: list[int] = []) -> list[int]:  # noqa: B006
        """Hace algo."""
        return x

    tool = make_tool(f)
    tool.call('{"x": [1]}', Context()).append(2)
    assert tool.call('{"x": null}', Context()) == []


@settings(max_examples=150, deadline=None)
@given(st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["x", "tipo"]), inner, max_size=3),
    max_leaves=8,
))  # fmt: skip
def test_whatever_json_a_model_sends_is_taken_or_refused_in_one_line(sent: Any) -> None:
    for tool in TOOLS:
        try:
            tool.validate(json.dumps({"x": sent}))
            tool.validate(json.dumps({"x": [sent]}))
        except ToolError as error:
            assert "\n" not in str(error)


TOOLS = [tool_with(hint, None) for hint in (Grupo, Animal, Pedido, Contacto | Lugar | int, list[Contacto])]


# --- What has no schema -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hint",
    [Any, object, dict, dict[str, int], list, tuple[int, str], Callable[[], int], type, set],
    ids=str,
)  # fmt: skip
def test_type_without_a_strict_schema_is_refused(hint: Any) -> None:
    with pytest.raises(PluginError, match=r"^f: "):
        tool_with(hint)


def test_typed_dict_that_refers_to_itself_is_refused_in_words() -> None:
    with pytest.raises(PluginError, match="pydantic model"):
        tool_with(Nodo)


def test_default_that_is_a_field_is_refused() -> None:
    with pytest.raises(PluginError, match="Annotated"):
        tool_with(int, pydantic.Field(5, description="x"))


def test_default_in_a_fields_description_is_refused_and_one_in_the_signature_counts() -> None:
    for field in (pydantic.Field(default=5), pydantic.Field(default_factory=int)):
        with pytest.raises(PluginError, match="'x' its default in the signature"):
            tool_with(Annotated[int, field])
    assert tool_with(Annotated[int, pydantic.Field(default=5)], 7).call("{}", Context()) == {"x": 7}


@pytest.mark.parametrize(
    "function",
    [print, len, Contacto, 7, "f", lambda: 1, Contacto(nombre="x").model_dump],
    ids=["print", "len", "class", "int", "str", "lambda", "method"],
)
def test_what_is_no_function_is_refused(function: Any) -> None:
    with pytest.raises(PluginError):
        make_tool(function)


@pytest.mark.parametrize("timeout", [0, -1, "10", None, float("nan"), float("inf")])
def test_time_limit_that_is_none_is_refused(timeout: Any) -> None:
    def f() -> None:
        """Hace algo."""

    with pytest.raises(PluginError, match="timeout"):
        make_tool(f, timeout=timeout)
