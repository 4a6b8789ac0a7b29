"""`demo`: Hilo behind a page that looks like WhatsApp, on this machine alone.

The page, the local Twilio and the database belong to this process; the gateway is a process of its own, so that it can
be killed and started again. This process keeps the gateway's port open meanwhile: what comes in waits for the next one.
A file of `tools/` or `assistants/` that is saved is loaded anew by another gateway, which takes the place of the one
that serves once it has loaded everything: a file that hangs or kills it leaves the former at work. Nothing of this is
in `serve`.
"""

from __future__ import annotations

import argparse
import contextlib
import faulthandler
import json
import logging
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import requests
import waitress

import gateway
from database import HERE, Database
from page import PEOPLE, PageOptions
from page.inspection import Inspection
from settings import Settings, environment, load_settings
from simulator import Simulator
from tools._plugins import Plugins
from trial import say, show_log, stop_at_once, trial_database, trial_settings, until_stopped, who_answers

PORT = 8001  # of the page, where it is free
WATCHED = ("tools/*.py", "tools/*.toml", "assistants/*.md")
REPORTS = "/demo/plugins"  # of the gateway, on this machine only: errors whole, which `/` shows to nobody
TICK = 0.2  # seconds between looks at the process; files are looked at once a second
PAUSE = 1.0  # seconds before a gateway that ends by itself is started again
IMPORTS = 30.0  # seconds until a new gateway has imported its own modules
LOADING = 6.0  # seconds that it then has for the files of tools/
CATCH_UP = 10.0  # seconds between looks for messages whose webhook was lost
LAST_WORDS = 4.0  # seconds that a gateway has to end in good order
ADVISOR = ("Rosa (asesora)", "whatsapp:+5215512345679")
TEMPLATE_SID = "HX" + "d" * 32
TEMPLATE = {
    "body": "Hola, ya tenemos la respuesta a tu mensaje. ¿Quieres verla?",
    "actions": [{"title": "Ver respuesta", "id": "ver_respuesta"}],
}

NOTICE_SID = "HX" + "e" * 32
NOTICE = {
    "body": "🔔 {{1}} quiere hablar con una persona.\nMotivo y lo último: {{2}}\n\n"
            "Responde a *este mensaje* y se lo paso. Con */bot* vuelve con el asistente.",
}  # fmt: skip

log = logging.getLogger("hilo")


def demo(options: argparse.Namespace) -> int:
    """Try Hilo in the browser; prints the address of the page."""
    with until_stopped() as stack:
        say("Hilo: preparo la base de datos local…")
        listener = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        keeper = Keeper(listener, options.log)
        stack.callback(keeper.stop)
        twilio = stack.enter_context(simulator(options.port, keeper))
        ours = {
            "ASESORES": ADVISOR[1],
            "ASESOR_TEMPLATE_SID": NOTICE_SID,
            "TWILIO_TEMPLATE_SID": TEMPLATE_SID,
            "OPENAI_BASE_URL": f"{twilio.url}/openai/v1",
        }
        settings = trial_settings(twilio, keeper.origin, {}, ours)
        twilio.gateway_url = keeper.origin
        show_log(settings, options.log)
        keeper.prepare()  # while the database starts
        Plugins().check_settings(settings)
        url = stack.enter_context(trial_database())
        keeper.db = stack.enter_context(contextlib.closing(Database(url, 2)))
        stack.callback(keeper.stop)  # before the database goes
        assistant = keeper.start(settings, url)
        say(f"✅ Hilo demo: {twilio.page_url}")
        say(who_answers(assistant, settings))
        say("Un archivo de tools/ o assistants/ que se guarda se carga de nuevo. Ctrl-C para terminar.")
        keeper.watch()
    return 0


def simulator(port: int | None, keeper: Keeper) -> Simulator:
    """Return the local Twilio with its page, on the port asked for; without one, on the usual port or a free one."""
    page = PageOptions(
        people=(*PEOPLE, ADVISOR), inspect=Inspection(keeper.rows, keeper.plugins),
        templates={TEMPLATE_SID: TEMPLATE, NOTICE_SID: NOTICE},
        actions={"Matar el gateway (kill -9)": keeper.kill},
        openai_url=environment().get("OPENAI_BASE_URL") or "https://api.openai.com/v1",
    )  # fmt: skip
    if port is None:
        with contextlib.suppress(OSError):
            return Simulator(port=PORT, page=page)
    try:
        return Simulator(port=port or 0, page=page)
    except OSError as error:
        raise gateway.ConfigurationError(f"--port={port} cannot be used: {error.strerror}") from None


# --- The gateway's process, as this one sees it -----------------------------------------------------------


class Child:
    """A gateway's process: what it answers, and what it says last on stderr, which is passed on."""

    def __init__(self, listener: socket.socket):
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "demo.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            stderr=subprocess.PIPE, errors="replace", pass_fds=[listener.fileno()],
            start_new_session=True,  # Ctrl-C is for this process only
        )  # fmt: skip
        self.began = time.monotonic()
        self.lines: deque[str] = deque(maxlen=50)
        self.relay = threading.Thread(target=self.pass_on, name="stderr", daemon=True)
        self.relay.start()

    def pass_on(self) -> None:
        """Copy stderr to ours."""
        assert self.process.stderr
        with contextlib.suppress(ValueError, OSError):
            for line in self.process.stderr:
                self.lines.append(line.rstrip())
                sys.stderr.write(line)
                sys.stderr.flush()

    def tell(self, order: str) -> None:
        """Give it a line to read, where it still reads."""
        assert self.process.stdin
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(order + "\n")
            self.process.stdin.flush()

    def answer(self, seconds: float) -> str:
        """Return its next line; "" where it ended or said none in so many seconds."""
        assert self.process.stdout
        if select.select([self.process.stdout], [], [], seconds)[0]:
            return self.process.stdout.readline()
        return ""

    @property
    def ended(self) -> bool:
        """Whether it is no more."""
        return self.process.poll() is not None

    def last_words(self) -> str:
        """Return why it does not serve, in a line: where it hung, or the last that it said."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        self.relay.join(1)
        said = [line.strip() for line in self.lines if line.strip()]
        hung = next((n for n, line in enumerate(said) if line.startswith("Timeout (")), None)
        if hung is None and not self.ended:
            return "el proceso no contesta"
        if hung is None:
            last = said[-1] if said else "no dijo nada"
            # Python ends with 1 where it could not go on, and says why.
            return last if self.process.returncode == 1 else f"terminó con el código {self.process.returncode}: {last}"
        found = [FRAME.search(line) for line in said[hung:]]
        where = next((f"{frame[1]}:{frame[2]}: " for frame in found if frame), "")
        return f"{where}tarda más de {LOADING:g} s en cargar"

    def end(self) -> None:
        """End it, in good order where it can."""
        self.process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(LAST_WORDS)
        self.process.kill()
        self.process.wait()
        self.relay.join(1)
        for pipe in (self.process.stdin, self.process.stdout):
            with contextlib.suppress(BrokenPipeError):
                pipe.close() if pipe else None


FRAME = re.compile(rf'File "{re.escape(str(HERE))}/((?:tools|assistants)/(?!_plugins)[^"]+)", line (\d+)')


class Keeper:
    """Keeps a gateway running: starts another when it ends, or when a file was saved."""

    def __init__(self, listener: socket.socket, with_log: bool):
        self.listener, self.with_log = listener, with_log
        self.origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.current: Child | None = None
        self.next: Child | None = None
        self.orders = ""
        self.stamps = saved()  # before anything is loaded
        self.broken = False  # nothing loads: nothing to be done until a file is saved
        self.db: Database | None = None
        self.reports: list[dict[str, Any]] = []
        self.failures: list[dict[str, Any]] = []  # of files: what the gateway that serves cannot tell of
        self.bad_assistants: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """Start a process that imports what it needs and waits to be told what to load."""
        self.next = Child(self.listener)

    def start(self, settings: Settings, url: str) -> Mapping[str, Any]:
        """Have the prepared process serve; return what it says of the assistant. Raises ConfigurationError."""
        orders = {"environ": dict(settings.environ), "url": url, "socket": self.listener.fileno(), "log": self.with_log}
        self.orders = json.dumps(orders)
        if self.replace(["tools/"]):
            with contextlib.suppress(requests.RequestException, ValueError):
                return requests.get(self.origin, timeout=30).json()["assistant"]
        raise gateway.ConfigurationError(f"the gateway does not start: {self.failures[0]['error']}")

    def replace(self, changed: Iterable[str] = ()) -> bool:
        """Have the next process take the place of the one that serves; False, and that one stays, where it does not
        load, which is then told of the files that were changed."""
        if self.next is None:
            self.prepare()
        child, loaded = self.next, ""
        assert child
        if child.answer(IMPORTS):
            child.tell(self.orders)
            loaded = child.answer(LOADING + 2)
        self.next, self.broken = None, not loaded
        if self.broken:
            self.failures = [failure(", ".join(changed) or "gateway.py", f"No arranca: {child.last_words()}")]
            child.end()
            return False
        if self.current:
            self.current.end()
        self.current, self.failures = child, []
        self.bad_assistants = [failure(f"assistants/{name}", why) for name, why in json.loads(loaded).items()]
        child.began = time.monotonic()
        child.tell("serve")
        return True

    def watch(self) -> None:
        """See to the process and the files, until a signal comes."""
        looked = 0.0
        while True:
            if self.current and self.current.ended and not self.broken:
                self.revive(self.current)
            if time.monotonic() - looked >= 1:
                looked, before, self.stamps = time.monotonic(), self.stamps, saved()
                if changed := sorted({str(path.relative_to(HERE)) for path, _ in self.stamps.items() ^ before.items()}):
                    say(f"Cambió {', '.join(changed)}: lo cargo de nuevo.")
                    self.replace(changed)
            time.sleep(TICK)

    def revive(self, child: Child) -> None:
        """Start another in place of one that has ended; one that ended at once by itself is shown till then."""
        if time.monotonic() - child.began < PAUSE and child.process.returncode != -signal.SIGKILL:
            self.failures = [failure("gateway.py", f"Terminó al empezar: {child.last_words()}")]
            time.sleep(PAUSE)
        self.replace()

    def kill(self) -> str:
        """Kill the process as nothing can be killed more thoroughly; another one takes its place."""
        if self.current is None or self.current.ended:
            return "El gateway ya está muerto; otro toma su lugar."
        self.current.process.kill()
        return f"kill -9 {self.current.process.pid}: el gateway murió; otro toma su lugar."

    def stop(self) -> None:
        """End all that runs."""
        for child in (self.current, self.next):
            if child:
                child.end()

    # What the page asks

    def rows(self, sql: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of a statement."""
        return self.db.rows(sql, params) if self.db else []

    def plugins(self) -> list[dict[str, Any]]:
        """Return what the gateway says of its plugins; while there is none, what the last one said."""
        with contextlib.suppress(requests.RequestException, ValueError, KeyError):
            self.reports = requests.get(self.origin + REPORTS, timeout=1).json()["plugins"]
        return [*self.failures, *self.bad_assistants, *self.reports]


def failure(file: str, why: str) -> dict[str, Any]:
    """Return what the side pane shows of a file that keeps something from being loaded."""
    return {"file": file, "tools": [], "hooks": [], "error": why}


def saved() -> dict[Path, int]:
    """Return the files that are watched, with the moments at which they were saved."""
    found = {}
    for pattern in WATCHED:
        for path in HERE.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found[path] = path.stat().st_mtime_ns
    return found


# --- The gateway's process itself -------------------------------------------------------------------------


class Inherited(gateway.Server):
    """The web server on a socket that the other process holds open."""

    def __init__(self, hilo: gateway.Gateway, listener: socket.socket):
        app = hilo.app()
        app.route(REPORTS, callback=lambda: {"plugins": [vars(each) for each in hilo.plugins.reports.values()]})
        self.server = waitress.create_server(
            app, sockets=[listener], threads=hilo.settings.web_threads, asyncore_use_poll=True, ident=None,
            max_request_body_size=gateway.BODY_LIMIT, clear_untrusted_proxy_headers=True,
        )  # fmt: skip
        self.port = self.server.effective_port
        self.thread = threading.Thread(target=self.server.run, name="web", daemon=True)


def wait_for_end(stop: threading.Event) -> None:
    """Set `stop` when the other process has closed our stdin, or ended."""
    sys.stdin.read()
    stop.set()


def main() -> int:
    """Serve as the first line of stdin says, until SIGTERM or the end of stdin, which is the other process's end."""
    answers = os.fdopen(os.dup(1), "w")  # nobody else's: what a tool prints goes to stderr
    os.dup2(2, 1)
    print("ready", file=answers, flush=True)
    line = sys.stdin.readline()
    if not line:
        return 0
    orders = json.loads(line)
    settings = load_settings(orders["environ"])
    show_log(settings, orders["log"])
    faulthandler.dump_traceback_later(LOADING, exit=True)  # a file that does not come to an end
    hilo = gateway.Gateway(settings, orders["url"])
    hilo.upkeep.every = CATCH_UP
    server = Inherited(hilo, socket.socket(fileno=orders["socket"]))
    faulthandler.cancel_dump_traceback_later()
    for name, why in hilo.journey.bad_assistants.items():
        log.error("⚠️ assistants/%s: %s", name, why)
    print(json.dumps(hilo.journey.bad_assistants), file=answers, flush=True)
    if not sys.stdin.readline():  # told to serve, once the one before has ended
        return 0
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    hilo.start()
    server.thread.start()
    threading.Thread(target=wait_for_end, args=(stop,), daemon=True).start()
    stop.wait()
    stop_at_once(hilo, server)
    return 0


if __name__ == "__main__":
    code = main()
    sys.stderr.flush()
    os._exit(code)  # a thread still reads stdin, and may not hold this up
