"""A gateway reduced to its webhooks, for tests of the local Twilio and its page."""

import threading
from collections.abc import Callable
from urllib.parse import parse_qsl

import bottle
import waitress
from twilio.request_validator import SIGNATURE_SETTINGS_HEADER, RequestValidator, get_signature_algorithm
from waitress import wasyncore

from simulator import AUTH_TOKEN


class Receiver:
    """A gateway's webhooks: keeps what came and whether the signature was right, answers with `status` and `reply`,
    and hands each message to `on_message` in a thread of its own."""

    def __init__(self, on_message: Callable[[dict[str, str]], None] | None = None) -> None:
        self.on_message = on_message
        self.forms: list[dict[str, str]] = []
        self.callbacks: list[dict[str, str]] = []
        self.signed: list[bool] = []
        self.reply = "<Response/>"
        self.status = 200
        self.public_url: str | None = None
        self.secret = AUTH_TOKEN
        self.app = app = bottle.Bottle()
        app.route("/webhooks/twilio", "POST", lambda: self._take(self.forms))
        app.route("/webhooks/twilio/status", "POST", lambda: self._take(self.callbacks))
        self._server = waitress.create_server(app, host="127.0.0.1", port=0, threads=4)
        self.url = f"http://127.0.0.1:{self._server.effective_port}"
        self._stopped = False
        self._answering: list[threading.Thread] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _take(self, kept: list[dict[str, str]]) -> bottle.HTTPResponse:
        form = dict(parse_qsl(bottle.request.body.read().decode(), keep_blank_values=True))
        environ = bottle.request.environ
        path = bottle.request.path + (f"?{environ['QUERY_STRING']}" if environ["QUERY_STRING"] else "")
        settings = bottle.request.headers.get(SIGNATURE_SETTINGS_HEADER)
        self.signed.append(RequestValidator(self.secret).validate(
            (self.public_url or self.url) + path, form, bottle.request.headers.get("X-Twilio-Signature", ""),
            get_signature_algorithm(settings)))
        kept.append(form | dict(bottle.request.query))
        if self.on_message and kept is self.forms:
            self._answering.append(threading.Thread(target=self.on_message, args=(form,)))
            self._answering[-1].start()
        return bottle.HTTPResponse(self.reply, self.status)

    def _run(self) -> None:
        while not self._stopped:
            wasyncore.loop(timeout=1, use_poll=True, map=self._server._map, count=1)

    def settle(self) -> None:
        """Wait until every message that came has been dealt with."""
        for thread in self._answering:
            thread.join()

    def close(self) -> None:
        self._stopped = True
        self._server.pull_trigger()
        self._thread.join()
        self.settle()
        self._server.task_dispatcher.shutdown()
        wasyncore.close_all(self._server._map)
