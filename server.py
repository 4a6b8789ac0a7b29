"""The web server: waitress, with limits that suit webhooks and an end that drops no request in hand."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import waitress
from waitress.channel import HTTPChannel

from settings import ConfigurationError

if TYPE_CHECKING:
    from gateway import Gateway

BODY_LIMIT = 64 * 1024  # bytes of a webhook's body


class Channel(HTTPChannel):
    """A client's connection. What little a thread is about to send is left to it: the loop would ask whether it can be
    sent, over and over, until that thread has done so, and take the interpreter from it meanwhile."""

    LITTLE = 512  # bytes

    def writable(self) -> bool:
        """Tell whether the loop has something to send, or to close."""
        return bool(self.total_outbufs_len > self.LITTLE or not self.requests) and bool(super().writable())


class Server:
    """A gateway's web application, answered in threads of its own; raises ConfigurationError without its port."""

    def __init__(self, gateway: Gateway, host: str, port: int):
        app = gateway.app()
        try:
            self.server = waitress.create_server(
                app, host=host, port=port, threads=gateway.settings.web_threads, connection_limit=1500, backlog=2048,
                asyncore_use_poll=True, channel_timeout=120, max_request_body_size=16 * BODY_LIMIT,
                clear_untrusted_proxy_headers=True, ident=None,
            )  # fmt: skip
        except OSError as error:
            raise ConfigurationError(f"PORT={port} cannot be used: {error.strerror}") from None
        self.server.channel_class = Channel
        self.port = self.server.effective_port
        self.ended = False
        self.thread = threading.Thread(target=self.run, name="web", daemon=True)

    def run(self) -> None:
        """Answer requests until the end."""
        while not self.ended:
            self.server.asyncore.loop(timeout=1, map=self.server._map, use_poll=True, count=1)

    def drain(self, seconds: float = 5.0) -> None:
        """Stop listening, and return when the requests in hand are answered."""
        self.server.trigger.pull_trigger(lambda: (self.server.del_channel(), self.server.socket.close()))
        end = time.monotonic() + seconds
        self.wait_for_answers(end)
        self.ended = True
        self.server.pull_trigger()
        self.thread.join(2.0)
        self.wait_for_answers(max(end, time.monotonic() + 1.0))  # to what came just then, on one kept open
        self.server.task_dispatcher.shutdown(timeout=1)
        self.server.asyncore.close_all(self.server._map)

    def wait_for_answers(self, end: float) -> None:
        """Return when no request is in hand, at `end` (monotonic) at the latest."""
        channels = self.server.active_channels
        while time.monotonic() < end and any(c.requests or c.total_outbufs_len for c in list(channels.values())):
            time.sleep(0.02)
