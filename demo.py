"""`demo`: Hilo behind a page that looks like WhatsApp, on this machine alone.

The page, the local Twilio and the database belong to this process; the gateway is a process of its own, so that it can
be killed and started again. This process keeps the gateway's port open meanwhile: what comes in waits for the next one.
A file of `tools/` or `assistants/` that is saved is loaded anew by starting the gateway again. Nothing of this is in
`serve`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
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
LAST_WORDS = 4.0  # seconds that a gateway has to end in good order
ADVISOR = ("Rosa (asesora)", "whatsapp:+5215512345679")
TEMPLATE_SID = "HX" + "d" * 32
TEMPLATE = {
    "body": "Hola, ya tenemos la respuesta a tu mensaje. ¿Quieres verla?",
    "actions": [{"title": "Ver respuesta", "id": "ver_respuesta"}],
}

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
        people=(*PEOPLE, ADVISOR), inspect=Inspection(keeper.rows, keeper.plugins), templates={TEMPLATE_SID: TEMPLATE},
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


class Keeper:
    """Keeps a gateway running: starts another when it ends, or when a file was saved."""

    def __init__(self, listener: socket.socket, with_log: bool):
        self.listener, self.with_log = listener, with_log
        self.origin = f"http://127.0.0.1:{listener.getsockname()[1]}"
        self.process: subprocess.Popen[str] | None = None
        self.next: subprocess.Popen[str] | None = None
        self.orders = ""
        self.began = 0.0
        self.broken = False  # the code does not even import: nothing to be done until a file is saved
        self.db: Database | None = None
        self.reports: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """Start a process that imports what it needs and waits to be told to serve."""
        self.next = subprocess.Popen(
            [sys.executable, str(HERE / "demo.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            pass_fds=[self.listener.fileno()], start_new_session=True,  # Ctrl-C is for this process only
        )  # fmt: skip

    def start(self, settings: Settings, url: str) -> Mapping[str, Any]:
        """Have the prepared process serve; return what it says of the assistant. Raises ConfigurationError."""
        orders = {"environ": dict(settings.environ), "url": url, "socket": self.listener.fileno(), "log": self.with_log}
        self.orders = json.dumps(orders)
        if self.replace():
            with contextlib.suppress(requests.RequestException, ValueError):
                return requests.get(self.origin, timeout=30).json()["assistant"]
        raise gateway.ConfigurationError("the gateway does not start: see above")

    def replace(self) -> bool:
        """Have the next process take the place of the one that serves; False where it does not even import."""
        if self.next is None:
            self.prepare()
        process, self.next = self.next, None
        assert process and process.stdin and process.stdout
        self.broken = not process.stdout.readline()
        if self.broken:
            end(process)
            return False
        if self.process:
            end(self.process)
        self.process, self.began = process, time.monotonic()
        with contextlib.suppress(BrokenPipeError):
            process.stdin.write(self.orders + "\n")
            process.stdin.flush()
        return True

    def watch(self) -> None:
        """See to the process and the files, until a signal comes."""
        stamps, looked = saved(), time.monotonic()
        while True:
            time.sleep(TICK)
            if self.process and self.process.poll() is not None and not self.broken:
                time.sleep(PAUSE if time.monotonic() - self.began < PAUSE else 0)
                self.replace()
            if time.monotonic() - looked >= 1:
                looked, now = time.monotonic(), saved()
                if changed := sorted({path.name for path, _ in now.items() ^ stamps.items()}):
                    say(f"Cambió {', '.join(changed)}: lo cargo de nuevo.")
                    self.replace()
                stamps = now

    def kill(self) -> str:
        """Kill the process as nothing can be killed more thoroughly; another one takes its place."""
        if self.process is None or self.process.poll() is not None:
            return "El gateway ya está muerto; otro toma su lugar."
        self.process.kill()
        return f"kill -9 {self.process.pid}: el gateway murió; otro toma su lugar."

    def stop(self) -> None:
        """End all that runs."""
        for process in (self.process, self.next):
            if process:
                end(process)

    # What the page asks

    def rows(self, sql: str, params: Mapping[str, Any]) -> list[dict[str, Any]]:
        """Return the rows of a statement."""
        return self.db.rows(sql, params) if self.db else []

    def plugins(self) -> list[dict[str, Any]]:
        """Return what the gateway says of its plugins; while there is none, what the last one said."""
        with contextlib.suppress(requests.RequestException, ValueError, KeyError):
            self.reports = requests.get(self.origin + REPORTS, timeout=1).json()["plugins"]
        broken = {"file": "gateway.py", "tools": [], "hooks": [], "error": "no arranca: la terminal dice por qué"}
        return [*self.reports, broken] if self.broken else self.reports


def saved() -> dict[Path, int]:
    """Return the files that are watched, with the moments at which they were saved."""
    found = {}
    for pattern in WATCHED:
        for path in HERE.glob(pattern):
            with contextlib.suppress(FileNotFoundError):
                found[path] = path.stat().st_mtime_ns
    return found


def end(process: subprocess.Popen[str]) -> None:
    """End a process, in good order where it can."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(LAST_WORDS)
    process.kill()
    process.wait()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(BrokenPipeError):
            pipe.close() if pipe else None


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
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    print("ready", flush=True)
    os.dup2(2, 1)  # nobody reads on
    line = sys.stdin.readline()
    if not line:
        return 0
    orders = json.loads(line)
    settings = load_settings(orders["environ"])
    show_log(settings, orders["log"])
    hilo = gateway.Gateway(settings, orders["url"])
    for name, why in hilo.journey.bad_assistants.items():
        log.error("⚠️ assistants/%s: %s", name, why)
    server = Inherited(hilo, socket.socket(fileno=orders["socket"]))
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
