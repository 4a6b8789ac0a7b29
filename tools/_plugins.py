"""How plugins are found and loaded, how hooks are called, and how a tool call runs within its limits."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import inspect
import json
import logging
import queue
import re
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import pluggy
import pydantic_core

import tools
from tools import Context, Event, PluginError, Setting, Tool, ToolError, clean

HERE = Path(__file__).parent
SLOTS = threading.BoundedSemaphore(16)  # tool calls that run at one time

log = logging.getLogger("hilo")


@dataclass
class PluginReport:
    """What a plugin file gave, or why it could not be loaded: `error` whole, `brief` without what a plugin's own code
    may have put into it."""

    file: str
    tools: list[str] = field(default_factory=list)
    hooks: list[str] = field(default_factory=list)
    error: str | None = None
    brief: str | None = None

    def failed(self, error: BaseException) -> None:
        """Take note of why it could not be loaded."""
        where = tools.author_line(error)
        self.brief = f"{where + ': ' if where else ''}{type(error).__name__}"
        self.error = f"{self.brief}: {' '.join(str(error).split())}"
        if isinstance(error, (PluginError, SyntaxError, ImportError)):  # their texts are ours and Python's
            self.brief = re.sub(r"(?<![\w.])/\S*/", "", self.error)  # without the folders of this machine
        self.hooks = []

    def told(self, whole: bool) -> dict[str, Any]:
        """Return it as JSON, with the whole error or the brief one."""
        error = self.error if whole else self.brief
        return {"file": self.file, "tools": self.tools, "hooks": self.hooks, "error": error}


class HookFailed(Exception):
    """An implementation of a hook failed, and no other had anything to say."""


class Plugins:
    """The files of `tools/` and the entry points of group `hilo.tools`, with the tools they registered."""

    LONG = 30.0  # seconds after which a call of a hook is taken to hang
    HUNG = 3  # calls of one function that hang, at which it is not called: each holds a worker

    def __init__(self, names: Iterable[str] | None = None):
        self.manager = pluggy.PluginManager("hilo")
        self.manager.add_hookspecs(tools.Hooks)
        self.tools: dict[str, Tool] = {}
        self.reports: dict[str, PluginReport] = {}
        self.settings: dict[str, Mapping[str, Setting]] = {}  # by the plugin's name
        self.under_way: dict[object, tuple[float, Any]] = {}  # calls of hooks: since when, and of which function
        for name in self.discover() if names is None else names:
            self.load(name, partial(imported, name), f"{name.replace('.', '/', 1)}.py")
        for entry in importlib.metadata.entry_points(group="hilo.tools") if names is None else ():
            file = f"{entry.dist.name if entry.dist else '?'}:{entry.value}"
            self.load(entry.name, partial(loaded, entry), file)

    @staticmethod
    def discover() -> list[str]:
        """Return the module names of the files in `tools/`; those that begin with _ are no plugins."""
        return [f"tools.{path.stem}" for path in sorted((HERE).glob("*.py")) if path.name[0] != "_"]

    def load(self, name: str, load: Callable[[], Any], file: str) -> None:
        """Import a plugin and register its hooks and tools; a failure is kept in its report, and logged."""
        name = file if name in self.reports else name  # two packages may give an entry point the same name
        report = self.reports[name] = PluginReport(file)
        mine: dict[str, Tool] = {}
        try:
            module = load()
            self.check_hooks(module)
            if before := self.manager.get_name(module):
                raise PluginError(f"is loaded already, as {self.reports[before].file}")
            self.manager.register(module, name)
            self.settings[name] = declared(module)
            report.hooks = sorted(caller.name for caller in self.manager.get_hookcallers(module) or ())
            for implementation in self.manager.hook.register_tools.get_hookimpls():
                if implementation.plugin is module:
                    implementation.function(partial(self.register, mine))
        except BaseException as error:
            let_through(error)
            report.failed(error)
            if self.manager.has_plugin(name):
                self.manager.unregister(name=name)
            self.settings.pop(name, None)
            log.error("⚠️ plugin %s left out: %s", file, report.error)
            return
        self.tools |= mine
        report.tools = sorted(mine)

    def unload(self, name: str) -> None:
        """Take a plugin's hooks and tools out again, so that it can be loaded anew."""
        if self.manager.has_plugin(name):
            self.manager.unregister(name=name)
        self.settings.pop(name, None)
        for tool in self.reports.pop(name, PluginReport("")).tools:
            del self.tools[tool]

    def check_hooks(self, module: Any) -> None:
        """Raise PluginError for a hook that cannot be called, and where there is none."""
        members = inspect.getmembers(module, inspect.isroutine)
        marked = [(name, function) for name, function in members if hasattr(function, "hilo_impl")]
        if not marked:
            raise PluginError("has no function marked @hookimpl")
        for name, function in marked:
            self.check_hook(function.hilo_impl.get("specname") or name, function)

    @staticmethod
    def check_hook(name: str, function: Any) -> None:
        """Raise PluginError for a hook that is misspelt, asks for what it is not given, or is a wrapper."""
        hook = getattr(tools.Hooks, name, None)
        if hook is None:
            known = ", ".join(n for n in vars(tools.Hooks) if n[0] != "_")
            raise PluginError(f"{name} is no hook of Hilo; there are {known}", function)
        if function.hilo_impl.get("wrapper") or function.hilo_impl.get("hookwrapper"):
            raise PluginError(f"{name}: hook wrappers are not supported", function)
        odd = (inspect.iscoroutinefunction, inspect.isasyncgenfunction, inspect.isgeneratorfunction)
        if any(kind(function) for kind in odd):
            raise PluginError(f"{name}: hooks are ordinary functions, not async ones or generators", function)
        given = [parameter for parameter in inspect.signature(hook).parameters if parameter != "self"]
        for parameter in inspect.signature(function).parameters.values():
            if parameter.default is not parameter.empty:
                continue
            if parameter.kind is parameter.KEYWORD_ONLY:
                raise PluginError(f"{name}: remove the * before {parameter.name!r}, which is given by place", function)
            if parameter.kind is parameter.POSITIONAL_OR_KEYWORD and parameter.name not in given:
                raise PluginError(f"{name} is not given {parameter.name!r}, but {', '.join(given)}", function)

    def register(
        self, mine: dict[str, Tool], function: Callable[..., Any], side_effects: bool = False, timeout: float = 10.0
    ) -> None:
        """Make a function a tool of the plugin being loaded; raises PluginError on the author's own line."""
        tool = tools.make_tool(function, side_effects, timeout)
        if tool.name in self.tools or tool.name in mine:
            where = next((r.file for r in self.reports.values() if tool.name in r.tools), "this plugin")
            raise PluginError(f"register({tool.name}): another tool has that name already, in {where}")
        mine[tool.name] = tool

    def variables(self) -> dict[str, Setting]:
        """Return the variables that plugins declare, by name."""
        return {name: setting for declared in self.settings.values() for name, setting in declared.items()}

    def unusable(self, settings: Any) -> list[str]:
        """Return one line for each variable of a plugin that cannot be used."""
        every = [item for declared in self.settings.values() for item in declared.items()]
        return list(dict.fromkeys(line for name, setting in every if (line := setting.fault(name, settings))))

    def check_settings(self, settings: Any) -> None:
        """Raise ConfigurationError where a variable of a plugin cannot be used."""
        from settings import ConfigurationError  # the core's: what plugins import needs none of it

        for line in self.unusable(settings):
            raise ConfigurationError(line)

    def implementations(self, hook: str) -> list[Any]:
        """Return a hook's implementations in the order in which they are asked."""
        return list(reversed(getattr(self.manager.hook, hook).get_hookimpls()))

    def first(self, hook: str, convert: Callable[[Any], Any], strict: bool = False, **arguments: Any) -> Any:
        """Return the first result that is not None; one that raises is logged and the next is asked. `strict`: raises
        HookFailed instead of returning None where one has failed that might have had something to say."""
        failed = False
        for implementation in self.implementations(hook):
            try:
                result = self.call(implementation, arguments)
                if result is not None:
                    return convert(result)
            except BaseException as error:
                let_through(error)
                self.blame(hook, implementation, error, arguments.get("context"))
                failed = True
        if strict and failed:
            raise HookFailed(hook)
        return None

    def each(self, hook: str, **arguments: Any) -> None:
        """Call every implementation of a hook; one that raises is logged only."""
        for implementation in self.implementations(hook):
            try:
                self.call(implementation, arguments)
            except BaseException as error:
                let_through(error)
                self.blame(hook, implementation, error, None)

    def call(self, implementation: Any, arguments: Mapping[str, Any]) -> Any:
        """Return what one implementation of a hook returns; raises TimeoutError where too many calls of it hang."""
        if len(self.under_way) >= self.HUNG:
            before = time.monotonic() - self.LONG
            calls = list(self.under_way.values())
            if sum(since < before and known is implementation for since, known in calls) >= self.HUNG:
                raise TimeoutError(f"not called: {self.HUNG} calls of it have not come back for {self.LONG:.0f} s")
        me = object()
        self.under_way[me] = (time.monotonic(), implementation)
        try:
            return implementation.function(*(arguments[name] for name in implementation.argnames))
        finally:
            del self.under_way[me]

    @staticmethod
    def blame(hook: str, implementation: Any, error: BaseException, context: Context | None) -> None:
        """Log a failure with the plugin's name and line; the traceback is for DEBUG."""
        where = tools.author_line(error) or tools.line_of(implementation.function)
        out = context.log if context else log
        out.warning("⚠️ %s in %s failed (%s): %s", hook, implementation.plugin_name, where, unquoting(error))
        out.debug("traceback", exc_info=error)


def imported(name: str) -> Any:
    """Return the module of a plugin file, `tools.cursos`; raises PluginError where Python has no name for it."""
    if name.count(".") > 1:
        raise PluginError("a file with a dot in its name cannot be imported; rename it")
    return importlib.import_module(name)


def loaded(entry: importlib.metadata.EntryPoint) -> Any:
    """Return what an entry point leads to; raises PluginError where its value has no form."""
    if not re.fullmatch(r"[\w.]+\s*(:\s*[\w.]+\s*)?(\[.*\]\s*)?", entry.value):
        raise PluginError(f"the entry point {entry.name} = {entry.value!r} is no module and no module:object")
    return entry.load()


def unquoting(error: BaseException) -> str:
    """Return an error's class, for its text may quote a user, and that too where it is our own words."""
    return f"{type(error).__name__}: {error}" if isinstance(error, PluginError) else type(error).__name__


def let_through(error: BaseException) -> None:
    """Raise what was meant for this process, not for a plugin: Ctrl-C and signals, which reach the main thread."""
    if isinstance(error, KeyboardInterrupt) and threading.current_thread() is threading.main_thread():
        raise error


def declared(module: Any) -> Mapping[str, Setting]:
    """Return the variables that a plugin declares in SETTINGS; raises PluginError for what declares none."""
    found = getattr(module, "SETTINGS", {})
    if isinstance(found, Mapping) and all(isinstance(setting, Setting) for setting in found.values()):
        return found
    raise PluginError('SETTINGS is a mapping of variables, each as {"NAME": Setting("what it needs", "pattern")}')


class Events:
    """Hands events to the track_event plugins, and runs errands, in a thread of its own: no turn waits for them."""

    BUSY = 20  # errands waiting at which a further one is left out

    def __init__(self, plugins: Plugins):
        self.plugins = plugins
        self.waiting: queue.Queue[Callable[[], Any] | None] = queue.Queue(10_000)
        self.thread = threading.Thread(target=self.work, name="events", daemon=True)

    def put(self, event: Event) -> None:
        """Queue an event; where nobody listens, or too many wait, it is dropped."""
        if self.plugins.implementations("track_event"):
            with contextlib.suppress(queue.Full):
                self.waiting.put_nowait(partial(self.plugins.each, "track_event", event=event))

    def errand(self, job: Callable[[], Any]) -> None:
        """Queue something that may as well be left undone."""
        if self.waiting.qsize() < self.BUSY:
            self.waiting.put_nowait(job)

    def work(self) -> None:
        """Do one thing after the other, until there is None."""
        while (job := self.waiting.get()) is not None:
            try:
                job()
            except BaseException as error:  # whatever it is, the next one is done
                log.debug("errand failed: %s", type(error).__name__)

    def stop(self, seconds: float = 2.0) -> None:
        """Let what waits be done, within so many seconds."""
        with contextlib.suppress(queue.Full):
            self.waiting.put_nowait(None)
        self.thread.join(seconds)


def problem(text: str) -> str:
    """Return a tool's failure as the model reads it."""
    return json.dumps({"error": text}, ensure_ascii=False)


UNKNOWN_OUTCOME = problem(
    "se interrumpió y no se sabe si llegó a hacerse; no la repitas: dile al usuario que se va a verificar"
)


class ToolCall:
    """One call of the model's in a thread of its own, which is abandoned when it outlives its limit.

    `save(output, ok, milliseconds)` records the outcome and tells whether it was the first to do so."""

    LEFT = 32  # calls of one tool that were left behind and still run, at which it is not called again
    abandoned = 0  # calls left behind since the start
    hanging: ClassVar[dict[str, set[threading.Thread]]] = {}

    @classmethod
    def too_many_hang(cls, name: str) -> bool:
        """Tell whether so many calls of a tool hang that one more would only add a thread."""
        alive = {thread for thread in cls.hanging.get(name, set()) if thread.is_alive()}
        cls.hanging[name] = alive
        return len(alive) >= cls.LEFT

    def __init__(self, tool: Tool, arguments: str, context: Context, save: Callable[[str, bool, int], bool]):
        self.tool, self.arguments, self.context, self.save = tool, arguments, context, save
        self.begun = self.saved = self.left = False
        self.places: list[bool] = []  # holds one while the call has a place among SLOTS
        self.began = time.monotonic()
        self.thread = threading.Thread(target=self.work, name=f"tool {tool.name}", daemon=True)
        self.thread.start()

    def work(self) -> None:
        """Call the function and record what it returned, or what the model is told instead."""
        if not SLOTS.acquire(timeout=self.tool.timeout):
            return
        self.places.append(True)
        try:
            self.begun = True
            if not self.left:
                self.save(*self.output(), self.milliseconds)
                self.saved = True
        except BaseException as error:  # the database is away: the call counts as begun, with an unknown outcome
            self.context.log.warning("⚠️ output of %s not saved: %s", self.tool.name, type(error).__name__)
        finally:
            self.give_place_back()

    def give_place_back(self) -> None:
        """Let another call begin: this one has ended, or is left behind and may hang for ever."""
        with contextlib.suppress(IndexError):
            self.places.pop()
            SLOTS.release()

    @property
    def milliseconds(self) -> int:
        """Milliseconds since the call began."""
        return round((time.monotonic() - self.began) * 1000)

    def output(self) -> tuple[str, bool]:
        """Return the call's output as the model reads it, and whether it went well."""
        try:
            value = self.tool.call(self.arguments, self.context)
            text = value if isinstance(value, str) else pydantic_core.to_json(value, inf_nan_mode="null").decode()
            self.context.log.debug("· tool_ran")
            return clean(text), True
        except ToolError as error:
            return problem(clean(str(error))), False
        except BaseException as error:
            where = tools.author_line(error) or tools.line_of(self.tool.function)
            self.context.log.error("⚠️ tool %s failed (%s): %s", self.tool.name, where, unquoting(error))
            self.context.log.debug("traceback", exc_info=error)
            return problem("la herramienta falló; responde con lo que sepas y ofrece otra vía"), False

    def wait(self, end: float) -> None:
        """Wait for the call within its limit and `end` (monotonic); past them the model is told, the thread left."""
        self.thread.join(max(0.0, min(self.began + self.tool.timeout, end) - time.monotonic()))
        self.left = True
        if not self.saved:
            told = UNKNOWN_OUTCOME if self.tool.side_effects and self.begun else problem("no terminó a tiempo")
            try:
                ToolCall.abandoned += self.save(told, False, self.milliseconds)
            finally:
                self.hanging.setdefault(self.tool.name, set()).add(self.thread)
                self.give_place_back()
