"""The stage that every benchmark plays on: a local OpenAI, a local Twilio and the gateway, each a process."""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import random
import resource
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urlsplit

from twilio.request_validator import RequestValidator

from simulator import ACCOUNT_SID as ACCOUNT
from simulator import AUTH_TOKEN as TOKEN

ROOT = Path(__file__).parent.parent
NUMBER = "whatsapp:+14155238886"
WEBHOOK_SECRET = "whsec_" + "c2VjcmV0byBkZSBwcnVlYmFz"


def free_port() -> int:
    """Return a TCP port that nobody listens on, below those that the system gives to outgoing connections."""
    while True:
        port = random.randrange(10_000, 32_000)
        with socket.socket() as listener, contextlib.suppress(OSError):
            listener.bind(("127.0.0.1", port))
            return port


class Process:
    """A Python process of the stage; its standard output goes to a file, errors to ours."""

    def __init__(self, *arguments: str, **environ: str):
        self.output = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [sys.executable, *arguments], cwd=ROOT, stdout=self.output, env={**os.environ, **environ}
        )

    @property
    def pid(self) -> int:
        return self.process.pid

    def line(self) -> str:
        """Return the first line that it prints."""
        while True:
            self.output.seek(0)
            if (text := self.output.readline()).endswith("\n"):
                return text.strip()
            if self.process.poll() is not None:
                raise SystemExit(f"{self.process.args!r} ended with {self.process.returncode}")
            time.sleep(0.02)

    def cpu(self) -> float:
        """Return the seconds of processor time it has used."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def status(self, key: str) -> int:
        """Return a number of /proc/PID/status, such as VmRSS (kB) or Threads."""
        for row in Path(f"/proc/{self.pid}/status").read_text().splitlines():
            if row.startswith(key + ":"):
                return int(row.split()[1])
        return 0

    def stop(self) -> None:
        """Stop it, by force where it does not obey."""
        self.process.terminate()
        try:
            self.process.wait(30)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.output.close()


def get(url: str, body: Any = None) -> Any:
    """Return the JSON of a URL."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=30) as answer:
        return json.load(answer)


def until_ready(url: str) -> None:
    """Return when a gateway answers."""
    while True:
        with contextlib.suppress(OSError):
            get(url + "/")
            return
        time.sleep(0.02)


class Stage:
    """A running set: `openai` and `twilio` answer `/_stats`, `gateway` takes webhooks at `url`. The model thinks for so
    many seconds, or for any time between two."""

    def __init__(self, database_url: str, *, webhooks: bool = True, callbacks: bool = False,
                 think: Sequence[float] = (0.0,), model: str = "echo", start: bool = True, **settings: str):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        hook = ["--webhook-url", f"{self.url}/webhooks/openai", "--webhook-secret", WEBHOOK_SECRET] if webhooks else []
        self.openai = Process("-m", "tests.local_openai", "--think", *map(str, think), "--model", model, *hook)
        self.twilio = Process("-m", "tests.local_twilio", *([] if callbacks else ["--no-callbacks"]))
        self.openai_url, self.twilio_url = self.openai.line(), self.twilio.line()
        self.environ = {
            "DATABASE_URL": database_url, "PORT": str(self.port), "PUBLIC_URL": self.url, "TWILIO_ACCOUNT_SID": ACCOUNT,
            "TWILIO_AUTH_TOKEN": TOKEN, "TWILIO_FROM": NUMBER, "TWILIO_API_URL": self.twilio_url,
            "OPENAI_API_KEY": "sk-local", "OPENAI_BASE_URL": self.openai_url, "ASSISTANT_ID": "cursos",
            "BURST_SECONDS": "0", "LOG_LEVEL": "WARNING", "THREADS_RUN_TIMEOUT": "120", **settings,
        }  # fmt: skip
        if webhooks:
            self.environ["OPENAI_WEBHOOK_SECRET"] = WEBHOOK_SECRET
        if start:
            self.start_gateway()
            until_ready(self.url)

    def start_gateway(self) -> None:
        """Start the gateway's process."""
        self.gateway = Process("gateway.py", "serve", **self.environ)

    def replies(self) -> int:
        """Return how many users have got a reply."""
        return int(get(self.twilio_url + "/_stats")["recipients"])

    def openai_stats(self) -> dict[str, Any]:
        """Return the local OpenAI's counters."""
        found: dict[str, Any] = get(self.openai_url.removesuffix("/v1") + "/_stats")
        return found

    def stop(self) -> None:
        """Stop the processes."""
        for process in (self.gateway, self.twilio, self.openai):
            process.stop()


class Sender:
    """Posts signed webhooks over one connection that is kept alive."""

    def __init__(self, url: str):
        self.url = url
        self.connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=30)
        self.validator = RequestValidator(TOKEN)

    def form(self, user: int, number: int) -> tuple[bytes, dict[str, str]]:
        """Return a message's body and headers."""
        fields = {
            "MessageSid": f"SM{user:016d}{number:016d}", "AccountSid": ACCOUNT, "From": f"whatsapp:+52155{user:08d}",
            "To": NUMBER, "Body": f"hola {user}-{number}", "NumMedia": "0", "ProfileName": "Ana", "MessageType": "text",
        }  # fmt: skip
        signature = self.validator.compute_signature(self.url + "/webhooks/twilio", fields)
        headers = {"Content-Type": "application/x-www-form-urlencoded", "X-Twilio-Signature": signature}
        return urlencode(fields).encode(), headers

    def post(self, body: bytes, headers: dict[str, str], path: str = "/webhooks/twilio") -> float:
        """Return the seconds that a webhook took to be answered with 200."""
        start = time.perf_counter()
        self.connection.request("POST", path, body, headers)
        answer = self.connection.getresponse()
        answer.read()
        assert answer.status == 200, answer.status
        return time.perf_counter() - start


@contextlib.contextmanager
def database() -> Iterator[str]:
    """Lend the URL of an embedded PostgreSQL of its own, migrated."""
    import localdb
    from database import migrate

    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        server = localdb.start(Path(folder) / "data")
        try:
            migrate(server.url)
            yield server.url
        finally:
            server.stop()


def raise_descriptors() -> None:
    """Allow as many open files as the system does."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
