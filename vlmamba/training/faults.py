"""What ends a run early, and how: exit codes, requests to stop, hangs, losses that are not finite."""

from __future__ import annotations

import contextlib
import faulthandler
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vlmamba.common.files import append_text
from vlmamba.common.processes import STOP_SIGNALS

logger = logging.getLogger(__name__)

EXIT_STALLED = 74
"""Nothing moved for `stall_seconds`; stacks were written down."""
STDERR = 2
"""The descriptor: `sys.stderr` may be something without one, as in a notebook."""
NONFINITE_FILE = "nonfinite.jsonl"
GRACE_SECONDS = 5.0
"""Between a process's own stacks and its end, so that the other processes come to write theirs."""


@contextmanager
def stop_signals() -> Iterator[threading.Event]:
    """An event set by SIGTERM, SIGUSR1 or Ctrl-C: the loop then saves and ends. A second Ctrl-C interrupts at once."""
    stop = threading.Event()
    previous: dict[signal.Signals, Any] = {}

    def handle(number: int, frame: object) -> None:
        logger.warning("received %s: saving after this step, then stopping", signal.Signals(number).name)
        stop.set()
        signal.signal(signal.SIGINT, previous.get(signal.SIGINT, signal.default_int_handler))

    if threading.current_thread() is threading.main_thread():
        for each in STOP_SIGNALS:
            previous[each] = signal.signal(each, handle)
    try:
        yield stop
    finally:
        for each, handler in previous.items():
            with contextlib.suppress(ValueError):
                signal.signal(each, handler)


class Watch:
    """Ends a process that has hung, in the data, in a message between processes or in a write.

    Used as a context. While it is open, `alive` must be called more often than every `seconds`; else the stacks of all
    threads are written to stderr and to ``stall-rank-00000.txt``, and the process ends with `EXIT_STALLED`.

    Args:
        seconds: The limit; 0 switches the watch off.
        run_dir: Where the file goes.
        rank: Of this process.
    """

    def __init__(self, seconds: float, run_dir: Path, rank: int) -> None:
        self.seconds, self.rank = seconds, rank
        self.path = run_dir / f"stall-rank-{rank:05d}.txt"
        self._deadline = float("inf")
        self._closed = threading.Event()

    def __enter__(self) -> Watch:
        if self.seconds:
            self.alive()
            threading.Thread(target=self._watch, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self.seconds:
            faulthandler.cancel_dump_traceback_later()

    def alive(self) -> None:
        """Something moved."""
        if self.seconds and not self._closed.is_set():
            self._deadline = time.monotonic() + self.seconds
            # Should a thread hold the interpreter's lock for good, the one below never runs; this one does.
            faulthandler.dump_traceback_later(1.5 * self.seconds + 2 * GRACE_SECONDS, exit=True, file=STDERR)

    def _watch(self) -> None:
        while not self._closed.wait(min(1.0, self.seconds / 4)):
            if time.monotonic() > self._deadline:
                self._end()

    def _end(self) -> None:
        text = f"rank {self.rank}: nothing moved for {self.seconds:g} s (stall_seconds). Stacks of all threads:\n"
        sys.stderr.write(text)
        with contextlib.suppress(OSError, ValueError):
            sys.stderr.flush()
            faulthandler.dump_traceback(STDERR)
        with contextlib.suppress(OSError), self.path.open("a", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            faulthandler.dump_traceback(file)
        sys.stderr.flush()
        time.sleep(GRACE_SECONDS)
        os._exit(EXIT_STALLED)


def record_nonfinite(run_dir: Path, entry: Mapping[str, Any], samples: Sequence[Mapping[str, Any]]) -> None:
    """Append a step that was not taken, with its samples, to ``nonfinite.jsonl``.

    Raises:
        WriteError: The disk is full or fails.
    """
    append_text(run_dir / NONFINITE_FILE, json.dumps({**entry, "samples": list(samples)}) + "\n")
