"""Settings of the environment, the assistants' files, and the form of the log."""

from __future__ import annotations

import base64
import io
import logging
import os
import re
import sys
import time
import traceback
import zoneinfo
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import dotenv
import frontmatter
import pydantic
from dotenv.parser import parse_stream

HERE = Path(__file__).parent
HEX = "[0-9a-fA-F]{32}"
PRINTABLE = "in ASCII without white space or typographic quotes"
TRAIL = 8  # places named of where an error came from

log = logging.getLogger("hilo")


# --- Configuration ----------------------------------------------------------------------------------------


class ConfigurationError(Exception):
    """A setting, schema or file that cannot be used: one line that names it and says what it needs."""


def setting(needs: str, default: Any = None, **constraints: Any) -> Any:
    """Return a field of Settings; `needs` completes the sentence "it needs …"."""
    return pydantic.Field(default, description=needs, **constraints)


def known_zone(name: str) -> str:
    """Return the name of a time zone; raises ValueError where there is none of that name."""
    try:
        return zoneinfo.ZoneInfo(name).key
    except (zoneinfo.ZoneInfoNotFoundError, OSError):
        raise ValueError("no such time zone") from None


class Settings(pydantic.BaseModel):
    """What the environment says. Attributes are the variables' names in lower case."""

    model_config = pydantic.ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)

    database_url: pydantic.SecretStr | None = setting("postgresql://user:password@host:port/database")
    port: int = setting("a port number from 1 to 65535", 8000, ge=1, le=65535)
    public_url: str | None = setting(
        "the address Twilio calls, https://host without a path", pattern=r"^https?://[^/\s?#]+/?$"
    )
    twilio_account_sid: str | None = setting("an account sid, AC and 32 hexadecimal digits", pattern=f"^AC{HEX}$")
    twilio_auth_token: pydantic.SecretStr | None = setting(f"the account's auth token, {PRINTABLE}")
    twilio_webhook_secret: pydantic.SecretStr | None = setting("the key that signs webhooks, if not the auth token")
    twilio_from: str | None = setting(
        "whatsapp:+ and the number, or a Messaging Service MG…", pattern=rf"^(whatsapp:\+[0-9]{{5,15}}|MG{HEX})$"
    )
    twilio_template_sid: str | None = setting(
        "the ContentSid (HX…) of a template to send when WhatsApp's 24-hour window is shut", pattern=f"^HX{HEX}$"
    )
    twilio_api_url: str | None = setting("https://host, in place of Twilio's own hosts", pattern=r"^https?://[^/\s?#]+/?$")
    openai_api_key: pydantic.SecretStr | None = setting(f"an OpenAI API key, {PRINTABLE}")
    openai_base_url: str | None = setting("the address of the OpenAI API, https://host/v1", pattern=r"^https?://\S+$")
    openai_webhook_secret: pydantic.SecretStr | None = setting("whsec_ and base64, as OpenAI shows it once")
    assistant_id: str | None = setting("the name of a file in assistants/, without .md", pattern=r"^[\w-]+$")
    threads_integration_enabled: bool = setting("true or false", True)
    threads_run_timeout: float = setting("seconds from 1 to 86400", 30.0, ge=1, le=86400)
    zona_horaria: Annotated[str, pydantic.AfterValidator(known_zone)] = setting(
        "a time zone such as America/Mexico_City or Europe/Madrid", "America/Mexico_City"
    )
    burst_seconds: float = setting("seconds from 0 to 60", 1.5, ge=0, le=60)
    worker_threads: int = setting("a whole number from 0 (web only) to 256", 16, ge=0, le=256)
    web_threads: int = setting("a whole number from 1 to 256", 8, ge=1, le=256)
    db_connections: int = setting("a whole number from 1 to 100", 4, ge=1, le=100)
    retention_days: int = setting("a whole number of days from 1 on, or 0 to keep all for ever", 365, ge=0, le=36500)
    lease_seconds: float = setting("seconds from 0.5 to 600", 10.0, ge=0.5, le=600)
    admin_token: pydantic.SecretStr | None = setting(f"a secret that opens the operators' pages, {PRINTABLE}")
    environ: Mapping[str, str] = pydantic.Field(default_factory=dict, exclude=True, repr=False)

    @pydantic.field_validator("openai_api_key", "twilio_auth_token", "admin_token")
    @classmethod
    def fits_a_header(cls, secret: pydantic.SecretStr | None) -> pydantic.SecretStr | None:
        """Refuse what no HTTP header can carry, such as a typographic quote."""
        if secret and not re.fullmatch("[!-~]+", secret.get_secret_value()):
            raise ValueError("not ASCII, or with white space in it")
        return secret

    @pydantic.field_validator("openai_webhook_secret")
    @classmethod
    def is_a_key(cls, secret: pydantic.SecretStr | None) -> pydantic.SecretStr | None:
        """Refuse what the SDK could not decode when the first event comes."""
        if secret and not re.fullmatch("whsec_[A-Za-z0-9+/]+=*", secret.get_secret_value()):
            raise ValueError("not whsec_ and base64")
        if secret:
            base64.b64decode(secret.get_secret_value()[6:], validate=True)
        return secret

    def get(self, name: str, default: str = "") -> str:
        """Return any other variable, for a plugin's own settings."""
        return self.environ.get(name, "").strip() or default

    @property
    def webhook_secret(self) -> str | None:
        """The key that Twilio's webhooks are signed with."""
        secret = self.twilio_webhook_secret or self.twilio_auth_token
        return secret.get_secret_value() if secret else None

    @property
    def first_connections(self) -> int:
        """The connections of a process that does not know yet how many the server allows."""
        return self.db_connections if "db_connections" in self.model_fields_set else 2

    @property
    def call_timeout(self) -> float:
        """Seconds for any call to the outside: 10, fewer (never below 2) where leases are shorter."""
        return min(10.0, max(2.0, self.lease_seconds))

    @property
    def grace(self) -> float:
        """Seconds a lease outlives the call that it was renewed for."""
        return self.call_timeout / 2

    @property
    def origin(self) -> str:
        """PUBLIC_URL without a slash at its end, "" where there is none."""
        return (self.public_url or "").rstrip("/")

    def lacks(self, *names: str) -> str | None:
        """Return the sentence that names those of these variables that are not set, None where all are."""
        missing = [name for name in names if not getattr(self, name.lower())]
        return f"{' and '.join(missing)} {'are' if missing[1:] else 'is'} not set" if missing else None

    def secrets(self) -> list[str]:
        """Return every secret value, so that no log line ever has one."""
        held = (getattr(self, name) for name in type(self).model_fields)
        return [value.get_secret_value() for value in held if isinstance(value, pydantic.SecretStr)]


def variables() -> dict[str, pydantic.fields.FieldInfo]:
    """Return every variable that Hilo reads, by its name in the environment."""
    return {name.upper(): info for name, info in Settings.model_fields.items() if name != "environ"}


def read_environment(path: Path = Path(".env")) -> tuple[dict[str, str], list[str]]:
    """Return the variables of `.env` with those of the process over them, and one line for each line of it that cannot
    be used, which may hold a secret and is not quoted."""
    text, faults = file_text(path)
    lines = list(parse_stream(io.StringIO(text, newline=None)))
    faults += [f"{path} line {line.original.line} cannot be read: it needs NAME=value" for line in lines if line.error]
    sound = io.StringIO("".join(line.original.string for line in lines if not line.error))
    return {**{name: value or "" for name, value in dotenv.dotenv_values(stream=sound).items()}, **os.environ}, faults


def file_text(path: Path) -> tuple[str, list[str]]:
    """Return the text of a file, "" where there is none, and the line that says why it cannot be read."""
    data = b""
    try:
        data = path.read_bytes()
        return data.decode("utf-8-sig"), []
    except (FileNotFoundError, IsADirectoryError):
        return "", []
    except OSError as error:
        return "", [f"{path} cannot be read: {error.strerror}"]
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        return data.decode("utf-8", "replace"), [f"{path} line {number} cannot be read: it needs to be UTF-8"]


def environment() -> dict[str, str]:
    """Return the variables of `.env` with those of the process over them; raises ConfigurationError for a line of it
    that cannot be used."""
    environ, faults = read_environment()
    if faults:
        raise ConfigurationError(faults[0])
    return environ


def read_settings(environ: Mapping[str, str] | None = None) -> tuple[Settings, list[str]]:
    """Return the settings that can be used, and one line for each variable that cannot."""
    faults: list[str] = []
    if environ is None:
        environ, faults = read_environment()
    given = {name.lower(): environ[name].strip() for name in variables() if environ.get(name, "").strip()}
    while True:
        try:
            return Settings(environ=dict(environ), **given), faults  # type: ignore[arg-type]
        except pydantic.ValidationError as error:
            for name in {str(fault["loc"][0]): None for fault in error.errors()}:
                faults.append(unusable(name, given.pop(name)))


def unusable(name: str, value: str) -> str:
    """Return the line that names a variable, what it held (unless secret) and what it needs."""
    info = Settings.model_fields[name]
    held = "(secret)" if "Secret" in str(info.annotation) else repr(value[:80])
    return f"{name.upper()}={held} cannot be used: it needs {info.description}"


def load_settings(environ: Mapping[str, str] | None = None) -> Settings:
    """Return the settings of the environment and `.env`; raises ConfigurationError naming the first bad one."""
    settings, faults = read_settings(environ)
    if faults:
        raise ConfigurationError(faults[0])
    return settings


class Assistant(pydantic.BaseModel):
    """One file of `assistants/`: front matter and, as Markdown, the instructions."""

    model_config = pydantic.ConfigDict(frozen=True, extra="forbid")

    name: str
    model: str = "gpt-6-luna"
    reasoning_effort: Literal["none", "minimal", "low", "medium", "high", "xhigh"] | None = "low"
    tools: tuple[str, ...] | None = None
    vector_stores: tuple[str, ...] = ()
    max_results: int = pydantic.Field(5, ge=1, le=50)
    max_output_tokens: int | None = pydantic.Field(None, ge=16)
    description: str = ""
    instructions: str = pydantic.Field(min_length=1)

    @pydantic.field_validator("tools", mode="before")
    @classmethod
    def named(cls, value: Any) -> Any:
        """Refuse a key without a value, which may mean all or none."""
        if value is None:
            raise ValueError("write [] for none of the tools, or leave the line out for all")
        return value


def load_assistants(folder: Path = HERE / "assistants") -> tuple[dict[str, Assistant], dict[str, str]]:
    """Return the assistants by name, and by file name what is wrong with each that cannot be used."""
    good: dict[str, Assistant] = {}
    bad: dict[str, str] = {}
    for path in sorted(folder.glob("*.md")):
        try:
            post = frontmatter.loads(path.read_text("utf-8"))
            good[path.stem] = Assistant(**{**post.metadata, "name": path.stem, "instructions": post.content.strip()})
        except pydantic.ValidationError as error:
            fault = error.errors()[0]
            bad[path.name] = f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}"
        except Exception as error:  # YAML's own errors, a file that is not UTF-8
            bad[path.name] = " ".join(str(error).split())[:300]
    return good, bad


def legacy_assistant(name: str | None) -> str | None:
    """Return what to do about an id of the Assistants or prompts API, None where it is neither."""
    kind = {"asst_": "the Assistants API ended on 2026-08-26", "pmpt_": "reusable prompts end on 2026-11-30"}.get(
        (name or "")[:5]
    )
    return kind and (
        f"ASSISTANT_ID={name!r}: {kind}; put the instructions into assistants/NAME.md and set ASSISTANT_ID=NAME"
    )


# --- Log --------------------------------------------------------------------------------------------------


def mask(address: str) -> str:
    """Return an address fit for a log: `whatsapp:+52…1234`."""
    scheme, colon, rest = address.rpartition(":")
    return f"{scheme}{colon}{rest[:3]}…{rest[-4:]}" if len(rest) > 7 else f"{scheme}{colon}…"


ADDRESS = re.compile(r"whatsapp(?::|%3A)(?:\+|%2B)?[\w.]{7,}|\+\d{8,15}", re.ASCII)


def scrub(text: str, secrets: Iterable[str] = ()) -> str:
    """Return a text with addresses masked, and secrets taken out, wherever they slipped in."""
    text = ADDRESS.sub(lambda found: mask(found[0]), text)
    for secret in secrets:
        text = text.replace(secret, "(secret)") if len(secret) > 5 else text
    return text


def trail(error: BaseException) -> str:
    """Return where an error came from, the deepest place last: `runs.py:254 → gateway.py:382 → gateway.py:430`."""
    frames = [(frame.f_code.co_filename, line) for frame, line in traceback.walk_tb(error.__traceback__)]
    return " → ".join(f"{Path(file).name}:{line}" for file, line in frames[-TRAIL:])


class LogFormat(logging.Formatter):
    """One line a record, a traceback too, with the run's id, scrubbed."""

    converter = time.gmtime  # type: ignore[assignment]

    def __init__(self, secrets: Iterable[str] = ()):
        super().__init__("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%dT%H:%M:%SZ")
        self.secrets = tuple(secrets)

    def format(self, record: logging.LogRecord) -> str:
        return " ⏎ ".join(scrub(super().format(record), self.secrets).splitlines())


class RunLog(logging.LoggerAdapter[logging.Logger]):
    """Puts the run and the masked address in front of every line."""

    def process(self, msg: Any, kwargs: Any) -> tuple[Any, Any]:
        return f"run={self.extra['run']} {self.extra['address']} {msg}", kwargs  # type: ignore[index]


def start_log(settings: Settings, stream: Any = None) -> None:
    """Send Hilo's log to stdout (stderr for commands that print), at LOG_LEVEL."""
    handler = logging.StreamHandler(stream or sys.stdout)
    handler.setFormatter(LogFormat(settings.secrets()))
    logging.basicConfig(level=logging.WARNING, handlers=[handler], force=True)
    logging.getLogger("waitress.queue").setLevel(logging.ERROR)  # a line for every request that waits for a thread
    level = settings.get("LOG_LEVEL", "INFO").upper()
    if level not in logging.getLevelNamesMapping():
        raise ConfigurationError(f"LOG_LEVEL={level!r} cannot be used: it needs DEBUG, INFO, WARNING or ERROR")
    log.setLevel(level)
