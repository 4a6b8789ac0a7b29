"""Stops the process dead at a point that its log names; Python imports this file first where it is on PYTHONPATH.

HILO_STOP_AT="0001 · written, 0002 · created:2, 0003 · sending=STOP": SIGKILL when the run of the user whose address
ends in 0001 is at `written` and that of 0002 at `created` for the second time, SIGSTOP for 0003 at `sending`.
The points are DEBUG lines, so LOG_LEVEL=DEBUG is needed.
"""

import logging
import os
import signal
import threading
from typing import Any

make_record = logging.getLogRecordFactory()
left = {}  # by the end of a log line: how many more times it may come, and the signal
for entry in filter(None, os.environ.get("HILO_STOP_AT", "").split(",")):
    line, _, name = entry.strip().partition("=")
    line, _, times = line.partition(":")
    left[line] = [int(times or 1), getattr(signal, f"SIG{name or 'KILL'}")]


def stop_at(*args: Any, **kwargs: Any) -> logging.LogRecord:
    """Make a log record, unless it is the one to stop at. No lock of the log is held yet."""
    record = make_record(*args, **kwargs)
    message = record.getMessage()
    for line, entry in left.items():
        if message.endswith(line):
            entry[0] -= 1
            if entry[0] == 0:
                signal.pthread_kill(threading.get_ident(), entry[1])
    return record


if left:
    logging.setLogRecordFactory(stop_at)
