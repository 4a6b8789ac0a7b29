"""A soak: many users write while processes are killed at random, and then every message is accounted for.

    python -m bench.soak                    # 8 minutes, about 2,500 messages and 60 kills
    python -m bench.soak --minutes 1 --kills 8 --seed 7

One `serve` and two `worker` processes share an embedded PostgreSQL, between the local Twilio and the local OpenAI,
which run in this process. A killed process (SIGKILL; now and then SIGTERM) is started again at once; PostgreSQL is
stopped in good order, at once or dead, and started again. A message whose webhook fails meanwhile is left to the
catch-up. All settings are those of production, but for the limits of messages and the wait for a burst.

Each message has a number, and the model's answer repeats the numbers that it answers, so the books can be kept from
outside: `lost` has no reply turn, or one that does not name it or did not wholly reach Twilio; `doubled` is in
more than one reply turn, or has a part that was sent twice; `out of order` was answered before one that Hilo received
earlier from that user, or has its parts in another order than they were written. The traditional flow's answer is a
reply turn too. Exits 0 when all three are 0 and no tool with side effects ran twice for a message.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import random
import re
import signal
import sys
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from database import Database, DatabaseDown
from simulator import Simulator
from tests.conftest import environment
from tests.local_openai import Answer, Json, LocalOpenAI, calls, says, unanswered_texts
from tests.process import Postgres, Process

COMMANDS = ("serve", "worker", "worker")
SETTLING = 200.0  # seconds after the last message until a missing answer counts as lost: a catch-up takes 65
NUMBER = re.compile(r"#\d\d\d-\d\d\d\d")
LONG = "\n".join(f"línea {n:02} de una respuesta larga" for n in range(60))

Rows = list[dict[str, Any]]


# --- The model and the users ------------------------------------------------------------------------------


def clerk(request: Json, items: list[Json]) -> Answer:
    """Answers with the numbers of what was asked, after a tool call where a text asks for one."""
    asked = unanswered_texts(items)
    numbers = [number for text in asked for number in NUMBER.findall(text)]
    last = max((n for n, item in enumerate(items) if item.get("role") == "user"), default=-1)
    if not any(item["type"] == "function_call_output" for item in items[last + 1 :]):
        wanted = [(tool, {"curso": NUMBER.findall(text)[0]}) for text in asked for tool in TOOLS if tool in text]
        if wanted:
            return calls(*wanted, seconds=random.uniform(0.1, 0.5))
    reply = f"Respuesta a {' '.join(numbers)}."
    long = any("largo" in text for text in asked)
    return says(f"{reply}\n\n{LONG}" if long else reply, seconds=random.uniform(0.1, 1.0))


TOOLS = ("consultar_cupo", "inscribir")
WORDS = ("hola", "hola", "hola", "largo", *TOOLS)


class Users:
    """Threads that write for many users at random moments; nobody waits for an answer before the next message."""

    def __init__(self, twilio: Simulator, count: int, per_second: float, seed: int):
        self.twilio, self.count, self.pause = twilio, count, count / per_second
        self.seed = seed
        self.ends = threading.Event()
        self.missed = 0  # webhooks that were not answered, or by the sentence of an outage
        self.threads = [threading.Thread(target=self.write, args=(n,), daemon=True) for n in range(count)]

    def write(self, user: int) -> None:
        """Write one user's messages until the end."""
        chance = random.Random(f"{self.seed} {user}")
        for number in range(10_000):
            if self.ends.wait(chance.expovariate(1 / self.pause) if number else chance.uniform(0, self.pause)):
                return
            delivery = self.twilio.receive(address(user), f"{chance.choice(WORDS)} #{user:03}-{number:04}")
            self.missed += delivery.status != 200 or "<Message>" in delivery.body


def address(user: int) -> str:
    """Return a user's address."""
    return f"whatsapp:+5215577700{user:03}"


# --- The processes and their end --------------------------------------------------------------------------


@dataclass
class Troop:
    """The gateway's processes, which are started again whenever they end."""

    directory: Path
    env: dict[str, str]
    stack: contextlib.ExitStack
    processes: list[Process] = field(default_factory=list)

    def start(self, command: str) -> Process:
        """Return a new process, which ends with the soak."""
        return self.stack.enter_context(Process(self.directory, self.env, command))

    def start_all(self) -> None:
        """Start them, and return when they are ready."""
        self.processes = [self.start(command) for command in COMMANDS]
        for process in self.processes:
            process.ready()

    def end(self, place: int, number: signal.Signals) -> int:
        """End a process by a signal and start it again; return its exit code."""
        process = self.processes[place]
        process.send_signal(number)
        code = process.exit_code(30)
        self.processes[place] = self.start(COMMANDS[place])
        return code


class Havoc:
    """A thread that ends processes at random moments, the next one no sooner than the last is started again."""

    def __init__(self, troop: Troop, postgres: Postgres, seconds: float, kills: int, restarts: int, seed: int):
        self.troop, self.postgres = troop, postgres
        self.chance = random.Random(seed)
        moments = [(self.chance.uniform(5, seconds), "kill") for _ in range(kills)]
        moments += [(self.chance.uniform(5, seconds), "term") for _ in range(kills // 10)]
        moments += [(seconds * (n + 0.5) / restarts, "postgres") for n in range(restarts)]
        self.moments = sorted(moments)
        self.done: collections.Counter[str] = collections.Counter()
        self.thread = threading.Thread(target=self.work, daemon=True)

    def work(self) -> None:
        """Do what is planned, each at its moment."""
        began = time.monotonic()
        for moment, what in self.moments:
            threading.Event().wait(max(0.0, began + moment - time.monotonic()))
            self.strike(what)

    def strike(self, what: str) -> None:
        """End one process or PostgreSQL, and start it again."""
        if what == "postgres":
            number = self.chance.choice([signal.SIGINT, signal.SIGQUIT, signal.SIGKILL])
            self.postgres.stop(number)
            threading.Event().wait(self.chance.uniform(0.2, 3))
            self.postgres.start()
            self.done[f"PostgreSQL by {number.name}"] += 1
            return
        place = self.chance.randrange(len(COMMANDS))
        code = self.troop.end(place, signal.SIGKILL if what == "kill" else signal.SIGTERM)
        self.done[f"{COMMANDS[place]} by {'SIGKILL' if what == 'kill' else 'SIGTERM'}"] += 1
        if what == "term" and code:  # -15: it had not yet begun to work
            self.done[f"exit code {code} after SIGTERM"] += 1


# --- The books --------------------------------------------------------------------------------------------


@dataclass
class Books:
    """Every message of the database and of the local Twilio, and what is wrong with them."""

    inbound: Rows
    parts: Rows
    runs: dict[int, dict[str, Any]]
    sent: dict[str, int]  # sid of each message that Twilio took over its API: its place in Twilio's order
    written: dict[str, str]  # sid of each message that a user wrote: its number

    def lost(self) -> set[str]:
        """Messages without a reply turn that is done, whole at Twilio and, if it is the model's, about them."""
        missing = {part["run_id"] for part in self.parts if part["sid"] not in self.sent}
        whole = {part["run_id"] for part in self.parts} - missing
        done = {id for id, run in self.runs.items() if run["state"] == "done" and id in whole}
        by_model = {id for id in done if self.runs[id]["outcome"] == "answered"}
        named = set(self.named())
        well = {n for n, run in self.turns() if run in done and (run not in by_model or (n, run) in named)}
        return set(self.written.values()) - well

    def named(self) -> list[tuple[str, int]]:
        """Each number that a part names, with the part's run."""
        return [(number, part["run_id"]) for part in self.parts for number in NUMBER.findall(part["body"])]

    def turns(self) -> list[tuple[str, int]]:
        """Each message's number with the run that took it."""
        return [(self.written[row["sid"]], row["run_id"]) for row in self.inbound if row["run_id"]]

    def doubled(self) -> set[str]:
        """Messages that two reply turns answer, and sids that belong to no part: something was sent twice."""
        times = collections.Counter(number for number, _ in {*self.named(), *self.turns()})
        known = {part["sid"] for part in self.parts}
        return {number for number, count in times.items() if count > 1} | {sid for sid in self.sent if sid not in known}

    def out_of_order(self) -> set[str]:
        """Messages answered before an earlier one of that user, and parts that left in another order."""
        wrong = set()
        for row, following in self.pairs(self.inbound):
            if row["run_id"] and following["run_id"] and following["run_id"] < row["run_id"]:
                wrong.add(self.written[following["sid"]])
        parts = [part for part in self.parts if part["sid"] in self.sent]
        for part, following in self.pairs(sorted(parts, key=lambda part: (part["run_id"], part["id"]))):
            if self.sent[following["sid"]] < self.sent[part["sid"]]:
                wrong.add(following["sid"])
        return wrong

    @staticmethod
    def pairs(rows: Rows) -> list[tuple[dict[str, Any], dict[str, Any]]]:
        """Return each row with the next one of the same user."""
        last: dict[str, dict[str, Any]] = {}
        found = []
        for row in rows:
            if row["user_phone"] in last:
                found.append((last[row["user_phone"]], row))
            last[row["user_phone"]] = row
        return found


def books_of(db: Database, twilio: Simulator) -> Books:
    """Return the books as they are now."""
    messages = list(twilio.messages)
    fields = "SELECT id, sid, user_phone, run_id, body, sends FROM messages WHERE direction"
    return Books(
        inbound=db.rows(f"{fields} = 'in' ORDER BY id"),
        parts=db.rows(f"{fields} = 'out' ORDER BY id"),
        runs={row["id"]: row for row in db.rows("SELECT id, state, outcome, reason FROM runs")},
        sent={message.sid: message.number for message in messages if message.direction == "outbound-api"},
        written={m.sid: NUMBER.findall(m.body)[0] for m in messages if m.direction == "inbound"},
    )


def settled(db: Database, twilio: Simulator, seconds: float) -> Books:
    """Return the books once every message is answered, or after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        with contextlib.suppress(DatabaseDown):
            books = books_of(db, twilio)
            still = any(run["state"] != "done" for run in books.runs.values())
            if time.monotonic() > end or not (still or books.lost()):
                return books
        threading.Event().wait(1)


# --- Main -------------------------------------------------------------------------------------------------


def report(books: Books, users: Users, havoc: Havoc, openai_server: LocalOpenAI, notes: Path) -> bool:
    """Print what happened; return whether all is well."""
    effects = collections.Counter(line.split()[-1] for line in notes.read_text().splitlines() if " inscribir " in line)
    lost, doubled, disorder = books.lost(), books.doubled(), books.out_of_order()
    outcomes = collections.Counter(books.runs[run]["outcome"] for _, run in books.turns())
    again = sum(part["sends"] > 1 for part in books.parts)
    print(f"ended and started again: {', '.join(f'{n} × {what}' for what, n in sorted(havoc.done.items()))}")
    print(f"webhooks that failed: {users.missed}; parts: {len(books.parts)}, handed to Twilio again: {again}")
    print(f"responses: {len(openai_server.responses)} on {len(openai_server.conversations)} conversations; "
          f"overlaps: {len(openai_server.overlaps)}; orphaned calls: {len(openai_server.orphans())}")  # fmt: skip
    print(f"tools with side effects: {len(effects)} effects, {sum(n > 1 for n in effects.values())} done twice")
    print(f"sent {len(books.written)}, answered {len(books.written) - len(lost)} "
          f"({', '.join(f'{outcome} {n}' for outcome, n in outcomes.most_common())})")  # fmt: skip
    print(f"lost {len(lost)}, doubled {len(doubled)}, out of order {len(disorder)}")
    for name, wrong in (("lost", lost), ("doubled", doubled), ("out of order", disorder)):
        if wrong:
            print(f"{name}: {' '.join(sorted(wrong)[:20])}")
    wrong_at_openai = openai_server.overlaps or openai_server.orphans()
    return not (lost or doubled or disorder or wrong_at_openai or any(n > 1 for n in effects.values()))


def soak(options: argparse.Namespace, directory: Path) -> bool:
    """Run the soak; return whether all is well."""
    with contextlib.ExitStack() as stack:
        twilio, openai_server = stack.enter_context(Simulator()), stack.enter_context(LocalOpenAI())
        openai_server.model = clerk
        postgres = Postgres(directory / "db")
        stack.callback(postgres.stop, signal.SIGQUIT)
        env = environment(postgres.url, twilio, openai_server, BURST_SECONDS="0.5", LIMITE_MINUTO="0", LIMITE_DIA="0")
        (directory / "notes").touch()
        troop = Troop(directory, env, stack)
        troop.start_all()
        db = Database(postgres.url, 1)
        stack.callback(db.close)
        users = Users(twilio, options.users, options.rate, options.seed)
        havoc = Havoc(troop, postgres, options.minutes * 60, options.kills, options.postgres, options.seed)
        for thread in (*users.threads, havoc.thread):
            thread.start()
        threading.Event().wait(options.minutes * 60)
        users.ends.set()
        havoc.thread.join()
        return report(settled(db, twilio, SETTLING), users, havoc, openai_server, directory / "notes")


def main() -> int:
    """Run the soak of the command line; returns 0 when every message was answered once and in order."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=8.0)
    parser.add_argument("--users", type=int, default=80)
    parser.add_argument("--rate", type=float, default=5.5, help="messages a second, of all users together")
    parser.add_argument("--kills", type=int, default=60)
    parser.add_argument("--postgres", type=int, default=4, help="restarts of PostgreSQL")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # the processes that were started end with it
    random.seed(options.seed)
    directory = Path(tempfile.mkdtemp(prefix="hilo-soak-"))
    directory.chmod(0o755)
    began = time.monotonic()
    well = soak(options, directory)
    print(f"{time.monotonic() - began:.0f} s, seed {options.seed}; logs in {directory}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
