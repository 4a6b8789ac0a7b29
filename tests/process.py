"""The gateway and PostgreSQL as processes of their own, to be killed, paused and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

import psutil  # type: ignore[import-untyped]

from tests.conftest import wait_for

HERE = Path(__file__).parent
READY = ("listens on port", "✅ Hilo 1.0.0 works")


class Process:
    """`python gateway.py serve` (or `worker`) with these settings and no others; its log is a file in `directory`."""

    started = 0

    def __init__(self, directory: Path, env: Mapping[str, str], command: str = "serve", stop_at: str = ""):
        Process.started += 1
        self.log = directory / f"{command}-{Process.started}.log"
        inherited = {name: os.environ[name] for name in ("PATH", "HOME", "LANG", "TMPDIR") if name in os.environ}
        own = {"PYTHONPATH": str(HERE / "stop_at"), "HILO_STOP_AT": stop_at, "HILO_NOTES": str(directory / "notes")}
        with self.log.open("wb") as output:
            self.popen = subprocess.Popen(
                [sys.executable, str(HERE.parent / "gateway.py"), command],
                env={**inherited, **own, **env}, cwd=directory, stdin=subprocess.DEVNULL, stdout=output, stderr=output,
            )  # fmt: skip

    def __enter__(self) -> Process:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()

    def lines(self, containing: str = "") -> list[str]:
        """Return the lines of its log so far that contain a text."""
        return [line for line in self.log.read_text("utf-8", "replace").splitlines() if containing in line]

    def ready(self, timeout: float = 60.0) -> Process:
        """Return itself once it takes messages, or works; fails with its log where it ended instead."""
        wait_for(lambda: self.popen.poll() is not None or any(self.lines(text) for text in READY), timeout)
        assert self.popen.poll() is None, "\n".join(self.lines())
        return self

    def kill(self) -> None:
        """Stop it dead, if it still runs."""
        self.popen.kill()
        self.popen.wait()

    def send_signal(self, number: signal.Signals) -> None:
        """Send it a signal."""
        self.popen.send_signal(number)

    def exit_code(self, timeout: float = 60.0) -> int:
        """Return how it ended (-9: killed), once it has; fails after `timeout` seconds."""
        return self.popen.wait(timeout)

    def paused(self) -> bool:
        """Tell whether it stands still, by SIGSTOP."""
        return bool(psutil.Process(self.popen.pid).status() == psutil.STATUS_STOPPED)

    def pause(self) -> None:
        """Let it stand still until it gets SIGCONT."""
        self.send_signal(signal.SIGSTOP)
        wait_for(self.paused)


class Postgres:
    """A PostgreSQL of the test's own; whoever starts it does not stay."""

    def __init__(self, directory: Path):
        self.directory = directory
        self.url = self.start()

    def start(self) -> str:
        """Return its URL once it runs."""
        script = "import localdb, pathlib, sys; print(localdb.start(pathlib.Path(sys.argv[1])).url)"
        command = [sys.executable, "-c", script, str(self.directory)]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def processes(self) -> list[psutil.Process]:
        """Return the server's processes, the one that starts the others first."""
        first = psutil.Process(int((self.directory / "postgres/postmaster.pid").read_text().split()[0]))
        return [first, *first.children(recursive=True)]

    def stop(self, number: signal.Signals) -> None:
        """SIGINT stops it in good order, SIGQUIT at once, SIGKILL dead."""
        self.processes()[0].send_signal(number)
