"""Runs and the workers that advance them: claimed, fenced, put down again; nobody waits for the model."""

from __future__ import annotations

import contextlib
import heapq
import json
import logging
import queue
import select
import socket
import threading
import time
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any

from database import Database, DatabaseDown, DatabaseFault, discard
from settings import RunLog, Settings, mask, trail
from tools import Part

if TYPE_CHECKING:
    from gateway import Journey

FAULTS = (DatabaseDown, DatabaseFault)
CREATE_TIMEOUT = 30.0  # seconds; less where the deadline is nearer, and never longer than the process lives
FINISHES = 4  # times a run is finished again because something else woke it at that moment
INSIST = 0.25  # seconds between attempts to write down what has happened elsewhere

log = logging.getLogger("hilo")


# --- Runs: claimed, fenced, put down ----------------------------------------------------------------------


class LeaseLost(Exception):
    """Another worker has taken the run over: nothing more may be written or sent for it here."""


def touched(row: Any) -> Any:
    """Return what a statement on a run gave; raises LeaseLost where it touched no row."""
    if row is None:
        raise LeaseLost
    return row


@dataclass
class Run:
    """A claimed run. Every write carries its attempt, so a worker that lost the lease touches no row."""

    id: int
    user_phone: str
    state: str
    attempt: int
    wakes: int
    crashes: int
    assistant: str | None
    thread_id: str | None
    response_id: str | None
    creating: bool
    rounds: int
    tries: int
    profile_name: str
    own_number: str | None
    mode: str
    language: str | None
    left: float | None
    lease_until: float
    call_timeout: float
    turn: list[dict[str, Any]] = field(default_factory=list)  # its messages; of a claim, where a response is under way
    held: bool = True
    reading: bool = False  # a file is being fetched and made sense of
    next_part: dict[str, Any] | None = None  # the part that was marked for sending when the reply was written
    failure: str | None = None  # what OpenAI failed with just now, until it is written down
    ended: dict[str, Any] = field(default_factory=lambda: {"resp": None, "status": None, "i": None, "o": None})

    def __post_init__(self) -> None:
        self.turn = [row | {"at": datetime.fromisoformat(row["at"])} for row in self.turn or ()]
        self.log = RunLog(log, {"run": self.id, "address": mask(self.user_phone)})
        self.doubt = self.state == "sending"  # a part may have been sent by a worker that is gone
        self.deadline = None if self.left is None else time.monotonic() + self.left

    @property
    def seconds_left(self) -> float:
        """Seconds to the deadline, which begins with the start."""
        return float("inf") if self.deadline is None else self.deadline - time.monotonic()

    @property
    def patience(self) -> float:
        """Seconds that a call which may be repeated can take within the lease and the turn's own time."""
        return min(self.call_timeout, max(0.5, self.lease_until - time.monotonic() - 0.5), max(1.0, self.seconds_left))

    @property
    def create_timeout(self) -> float:
        """Seconds that making a response may take."""
        return min(CREATE_TIMEOUT, max(1.0, self.seconds_left))

    def check_lease(self, seconds: float) -> None:
        """Raise LeaseLost when by our own clock the lease does not outlast a call of so many seconds; called just
        before a call that has an effect."""
        if time.monotonic() + seconds >= self.lease_until:
            raise LeaseLost


class Runs:
    """The fenced statements that move a run: each raises LeaseLost when another worker has it."""

    def __init__(self, db: Database, settings: Settings, wake: Callable[[float], None]):
        self.db = db
        self.settings = settings
        self.wake_in = wake  # tells the dispatcher that a run is due in so many seconds

    def claim(self, n: int) -> list[Run]:
        """Return up to `n` due runs, now held; the lease begins before the statement does."""
        until = time.monotonic() + self.settings.lease_seconds
        found = self.db.all("claim", n=n, lease=self.settings.lease_seconds)
        return [Run(**row, lease_until=until, call_timeout=self.settings.call_timeout) for row in found]

    def wake(self, response_id: str, claim: bool) -> tuple[Run | None, bool]:
        """Return the run that waited for a response, now held where the caller wants to `claim` it, and whether it is
        due for others; raises DatabaseDown and DatabaseFault within seconds."""
        until = time.monotonic() + self.settings.lease_seconds
        lease = self.settings.lease_seconds if claim else None
        for row in self.db.hurried("wake_by_response", resp=response_id, lease=lease):
            due, ours = row.pop("due"), row.pop("ours")
            run = Run(**row, lease_until=until, call_timeout=self.settings.call_timeout) if ours else None
            return run, due and not ours
        return None, False

    def fenced(self, run: Run, statement: str, **params: Any) -> dict[str, Any]:
        """Return the row of a statement on `run`; raises LeaseLost where it touched none."""
        row: dict[str, Any] = touched(self.db.one(statement, id=run.id, a=run.attempt, **params))
        return row

    def renew(self, run: Run, seconds: float, statement: str = "renew", **params: Any) -> dict[str, Any]:
        """Lengthen the lease to outlive a call of `seconds`, in the same statement as what else it does."""
        lease = max(seconds + self.settings.grace, self.settings.lease_seconds)
        until = time.monotonic() + lease
        row = self.fenced(run, statement, lease=lease, **params)
        run.lease_until = until
        return row

    def renew_if_short(self, run: Run) -> None:
        """Lengthen a lease that leaves a call less than half its time."""
        if run.lease_until - time.monotonic() < self.settings.call_timeout / 2:
            self.renew(run, self.settings.call_timeout)

    def insist(self, run: Run, write: Callable[[], Any]) -> Any:
        """Return what `write` returns, trying again while the database is away and the lease lasts: what it would
        write has happened at OpenAI, at Twilio or in a tool, and is known nowhere else."""
        while True:
            try:
                return write()
            except DatabaseDown:
                if time.monotonic() + INSIST >= run.lease_until:
                    raise
                time.sleep(INSIST)

    def take(self, run: Run) -> list[dict[str, Any]]:
        """Return the messages of this turn in order: those waiting, and those taken before a crash."""
        run.turn = self.db.all("take", id=run.id, a=run.attempt, timeout=self.settings.threads_run_timeout)
        if run.turn:
            run.deadline = time.monotonic() + run.turn[0]["left"]
        return run.turn

    def put_down(self, run: Run, seconds: float, tries: int = 0, asked: bool = False) -> None:
        """Let go of a run until `seconds` from now, or at once where it was woken meanwhile, unless somebody outside
        has `asked` for that time."""
        seen = None if asked else run.wakes
        row = self.fenced(
            run, "put_down", seconds=float(seconds), seen=seen, tries=tries, creating=run.creating, failure=run.failure
        )
        run.held = False
        self.wake_in(row["seconds"])

    def rotate(self, run: Run, why: str) -> None:
        """Leave the conversation behind: the run begins again on a new one, seeded from our own transcript."""
        run.log.warning("⚠️ thread %s left: %s", run.thread_id, why)
        self.fenced(run, "rotate", failure=run.failure or why)
        run.failure = None
        run.state, run.response_id, run.creating, run.tries = "queued", None, False, run.tries + 1

    def write(self, run: Run, parts: list[Part], outcome: str, reason: str | None = None, leave: bool = False) -> None:
        """Make the reply's parts rows, the first of which may be ours to send at once; `leave` leaves no thread behind
        for the next turn."""
        rows = [{k: dict(v) if isinstance(v, Mapping) else v for k, v in vars(part).items()} for part in parts]
        facts = {"outcome": outcome, "reason": reason, "leave": leave, "failure": run.failure, **run.ended}
        row = self.renew(run, self.settings.call_timeout, "write", parts=json.dumps(rows), **facts)
        run.state, run.creating, run.failure = "sending", False, None
        run.next_part = row if row["id"] else None

    def finish(self, run: Run, part: int | None = None, sid: str | None = None) -> dict[str, Any] | None:
        """End the turn, and note that Twilio took its last part; what arrived meanwhile becomes the next turn. Returns
        outcome, parts sent and seconds; None where there are more parts to send: then the turn has not ended."""
        facts = {"id": run.id, "a": run.attempt, "burst": self.settings.burst_seconds, "part": part, "sid": sid}
        for _ in range(FINISHES):
            row: dict[str, Any] = self.db.one("finish", **facts) or {}
            if row["more"]:
                return None
            if row["outcome"]:
                run.state, run.held = "done", False
                if row["next"] is not None:
                    self.wake_in(row["next"])
                return row
        raise LeaseLost


# --- Workers: due rows are claimed and advanced -----------------------------------------------------------


class Load:
    """How much of a processor this process has used of late."""

    EVERY = 0.1  # seconds between looks

    def __init__(self) -> None:
        self.looked, self.used = time.monotonic(), time.process_time()

    def share(self) -> float | None:
        """Return the part of one processor that was used since the last look, None where that was just now."""
        now = time.monotonic()
        if now - self.looked < self.EVERY:
            return None
        used = time.process_time()
        share = (used - self.used) / (now - self.looked)
        self.looked, self.used = now, used
        return share


class Alarm:
    """When to look for due runs again: at every moment that anybody asked for, and after five seconds of quiet."""

    LONGEST = 5.0

    def __init__(self) -> None:
        self.changed = threading.Condition()
        self.moments: list[float] = []  # a heap
        self.net = 0.0
        self.blind = True  # rows may be due of which nobody here knows: another process put them down

    def wake_in(self, seconds: float) -> None:
        """Ask for a look in so many seconds."""
        at = time.monotonic() + seconds
        with self.changed:
            heapq.heappush(self.moments, at)
            if self.moments[0] == at:
                self.changed.notify()

    def wait(self) -> None:
        """Return when the moment has come."""
        with self.changed:
            while (left := min([self.net, *self.moments[:1]]) - time.monotonic()) > 0:
                self.changed.wait(left)
            now = time.monotonic()
            while self.moments and self.moments[0] <= now:
                heapq.heappop(self.moments)
            self.blind |= self.net <= now
            self.net = now + self.LONGEST


class Workers:
    """A dispatcher that claims due runs for the free ones of a few threads, and the wires to other processes."""

    STUCK = 15.0  # seconds after its run's lease until a worker is taken to hang in a plugin, and replaced
    # While this process computes rather than waits, so many workers are at work, and what else is claimed waits for
    # them: more would stand in the interpreter's queue, and so, several times, would a message that arrives.
    ENOUGH = 6
    COMPUTING = 0.5  # of one processor
    IDLE = 0.4

    def __init__(self, settings: Settings, db: Database, alarm: Alarm):
        self.settings, self.db, self.alarm = settings, db, alarm
        self.free = threading.Semaphore(0)  # as many runs may be claimed
        self.places = settings.worker_threads  # of workers that may be at work now
        self.room = threading.Semaphore(self.places)
        self.load, self.settling = Load(), threading.Lock()
        self.claimed: queue.SimpleQueue[Run | None] = queue.SimpleQueue()
        self.busy: dict[threading.Thread, Run] = {}
        self.notify = threading.Event()
        self.me = uuid.uuid4().hex  # of this process, in what it tells others
        self.listening: Any = None
        self.started = self.warm = self.stopping = False
        self.trouble = ""  # why no runs can be claimed; "": they can
        self.ended = threading.Event()

    def start(self, journey: Journey) -> None:
        """Start the threads; without workers only the one that wakes other processes."""
        self.journey, self.started = journey, True
        journey.crowded = self.crowded
        targets: list[Callable[[], None]] = [self.tell_others]
        if self.settings.worker_threads:
            targets += [self.dispatch, self.listen, self.keep, *[self.work] * self.settings.worker_threads]
        for target in targets:
            threading.Thread(target=target, name=target.__name__, daemon=True).start()

    def crowded(self) -> bool:
        """Tell whether there is too much to do for niceties: a quarter of the workers is at work."""
        return self.in_hand > self.settings.worker_threads / 4

    @property
    def in_hand(self) -> int:
        """How many runs are claimed: at most one for each worker, also where not all of them may be at work."""
        return len(self.busy) + self.claimed.qsize()

    def woken(self, seconds: float) -> None:
        """A run is due in so many seconds: look then, or tell another process where everybody here is busy."""
        if self.settings.worker_threads:
            self.alarm.wake_in(seconds)
        if self.in_hand >= self.settings.worker_threads:
            self.notify.set()

    def wake(self, runs: Runs, response_id: str) -> None:
        """The response that a run waits for has ended: a free worker takes the run at once, else it is due."""
        free = self.warm and not self.stopping and self.free.acquire(blocking=False)
        run = None
        try:
            run, due = runs.wake(response_id, claim=free)
            if run is not None and not self.stopping:
                self.claimed.put(run)
                free = False  # the worker's business from now on
            elif run is not None:  # nobody takes it here any more
                with contextlib.suppress(LeaseLost):
                    runs.put_down(run, 0)
        finally:
            if free:
                self.free.release()
        if due:
            self.woken(0)

    def dispatch(self) -> None:
        """Claim as many due runs as there are free workers, for ever."""
        self.journey.warm()
        self.warm = True
        while not self.stopping:
            self.alarm.wait()
            if not self.free.acquire(blocking=False):
                self.notify.set()  # all are busy here: another process may be free
                self.free.acquire()
            n = 1
            while n < 16 and self.free.acquire(blocking=False):
                n += 1
            taken = self.claim(n)
            for run in taken:
                self.claimed.put(run)
            self.free.release(n - len(taken)) if len(taken) < n else self.alarm.wake_in(0)

    def claim(self, n: int) -> list[Run]:
        """Return up to `n` due runs; fewer set the alarm for the next one that will be due."""
        if self.stopping:
            return []
        taken: list[Run] = []
        try:
            taken = self.journey.runs.claim(n)
            if self.trouble:
                self.trouble = ""
                log.info("✅ runs can be claimed again")
            if len(taken) < n and self.alarm.blind:
                self.alarm.blind = False
                seconds = (self.db.one("next_due") or {})["seconds"]
                self.alarm.wake_in(Alarm.LONGEST if seconds is None else max(0.0, seconds))
        except Exception as error:  # whatever it is, the only one that looks for due runs goes on
            why = str(error) if isinstance(error, FAULTS) else type(error).__name__
            log.log(logging.DEBUG if why == self.trouble else logging.ERROR, "⚠️ no runs can be claimed: %s", why)
            self.trouble = why
            self.alarm.blind = True
            self.alarm.wake_in(0.5)
            self.ended.wait(0.5)
        return taken

    def work(self) -> None:
        """Advance one run after the other; what fails stays a row, and is claimed again when its lease runs out."""
        me = threading.current_thread()
        self.free.release()
        while self.room.acquire() and (run := self.claimed.get()) is not None:
            self.busy[me] = run
            try:
                late = run.lease_until - time.monotonic() < self.settings.lease_seconds / 4  # it waited for a place
                self.journey.runs.put_down(run, 0) if self.stopping or late else self.journey.advance(run)
            except LeaseLost:
                run.log.warning("⚠️ another worker took this run over")
            except (DatabaseDown, DatabaseFault) as error:
                run.log.error("⚠️ database: %s", error)
            except BaseException as error:  # whatever it is, this worker goes on; its text may quote a user
                run.log.error("⚠️ step failed: %s at %s", type(error).__name__, trail(error))
                run.log.debug("traceback", exc_info=error)
            if self.busy.pop(me, None) is None:
                return  # taken to be stuck, and replaced
            self.free.release()
            self.settle(1)
        self.claimed.put(None)  # for the next one
        self.room.release()

    def settle(self, left: int) -> None:
        """Give back the place of a step that has ended, or let it rest, as ENOUGH says. All come back where none has
        ended for a second; `left` is 0 for who only looks."""
        with self.settling:
            quiet = time.monotonic() - self.load.looked > 1.0
            share = self.load.share()
            more = 0
            if quiet or self.stopping:
                more = self.settings.worker_threads - self.places
            elif share is not None and share > self.COMPUTING and left and self.places > self.ENOUGH:
                more = -1
            elif share is not None and share < self.IDLE and self.places < self.settings.worker_threads:
                more = 1
            self.places += more
        if left + more:
            self.room.release(left + more)

    def keep(self) -> None:
        """Lengthen the leases of runs whose response is being created or whose files are read, which alone may last to
        the deadline; and see to workers that hang, and places that rest."""
        while not self.ended.wait(self.settings.grace / 4):
            self.replace_stuck()
            if self.places < self.settings.worker_threads:
                self.settle(0)
            for run in list(self.busy.values()):
                soon = run.lease_until - time.monotonic() < self.settings.call_timeout
                if (run.creating or run.reading) and soon and run.seconds_left > -self.settings.grace:
                    with contextlib.suppress(LeaseLost, *FAULTS):
                        self.journey.runs.renew(run, self.settings.call_timeout, "keep", reading=run.reading)

    def replace_stuck(self) -> None:
        """Start a worker for each that hangs; fencing makes what the old one may still do harmless."""
        for thread, run in list(self.busy.items()):
            late = time.monotonic() > run.lease_until + self.STUCK
            if late and self.busy.pop(thread, None) is not None:
                run.log.error("⚠️ a worker hangs in this run, in a plugin or library: replaced")
                self.room.release()
                threading.Thread(target=self.work, name="work", daemon=True).start()

    def tell_others(self) -> None:
        """NOTIFY other processes, after the commit and at most fifty times a second."""
        while not self.stopping:
            self.notify.wait()
            self.notify.clear()
            with contextlib.suppress(DatabaseDown, DatabaseFault):
                self.db.one("notify", me=self.me)
            time.sleep(0.02)

    def listen(self) -> None:
        """Look for due runs when another process says so; only a wake-up, the alarm's five seconds are the net."""
        while not self.stopping:
            connection = None
            try:
                self.listening = connection = self.db.connect()
                connection.run("LISTEN hilo")
                while not self.stopping:
                    ready = select.poll()
                    ready.register(connection._usock, select.POLLIN)
                    if self.db.full:  # this connection does more good in the pool
                        break
                    if ready.poll(1_000):
                        connection.run("")
                        others = any(payload != self.me for _, _, payload in connection.notifications)
                        connection.notifications.clear()
                        if others:
                            self.alarm.blind = True
                            self.alarm.wake_in(0)
            except Exception as error:
                log.debug("listen: %s", type(error).__name__)
            finally:
                discard(connection)
            self.ended.wait(1)

    def stop(self, until: float) -> None:
        """Take nothing more; return when the steps in hand are done, at `until` (monotonic) at the latest."""
        self.stopping = True
        self.alarm.wake_in(0)
        self.settle(0)
        for _ in range(self.settings.worker_threads if self.started else 0):  # also those that were just given a run
            self.free.acquire(timeout=max(0.0, until - time.monotonic()))
        self.free.release()  # lets the dispatcher see that it is over
        self.ended.set()
        self.notify.set()
        self.claimed.put(None)
        with contextlib.suppress(Exception):  # it may not listen, or no longer
            self.listening._usock.shutdown(socket.SHUT_RDWR)
