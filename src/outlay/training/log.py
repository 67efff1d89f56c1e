"""Curves of a run as append-only JSON lines; trackers beside them behind one call."""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol


class Tracker(Protocol):
    """Anything with `log(dict, step)`: TensorBoard, MLflow, W&B, trackio."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Take one line."""
        ...


def _line(step: int, values: dict[str, Any]) -> str:
    parts = [f'"step":{step}']
    for key, value in values.items():
        number = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
        if number in ("nan", "inf", "-inf"):
            number = "null"
        parts.append(f"{json.dumps(key)}:{number}")
    return "{" + ",".join(parts) + "}\n"


class Log:
    """Writes lines from a thread of its own, so that logging never waits for the disk.

    A tracker that raises is dropped with one warning line in the file; training goes on.

    Args:
        path: `metrics.jsonl`; None keeps nothing on disk.
        trackers: Further sinks.
        start: First step to come; lines of later steps (of a killed run) are cut off.
    """

    def __init__(
        self, path: Path | None, trackers: Sequence[Tracker] = (), start: int | None = None
    ) -> None:
        self.trackers = list(trackers)
        self._queue: deque[tuple[int, dict[str, Any]]] = deque()
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._file = None
        self._thread: threading.Thread | None = None
        if path is not None:
            if start is not None and path.exists():
                _cut(path, start)
            self._file = path.open("a", encoding="utf-8")
            self._thread = threading.Thread(target=self._write, daemon=True)
            self._thread.start()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Append one line; returns at once."""
        if self._file is not None:
            self._queue.append((step, values))
        for tracker in list(self.trackers):
            try:
                tracker.log(values, step)
            except Exception as error:
                self.trackers.remove(tracker)
                self._queue.append((step, {"tracker_failed": f"{type(error).__name__}: {error}"}))

    def _write(self) -> None:
        while not self._closing.wait(0.2):
            with self._writing:
                self._drain()

    def _drain(self) -> None:
        if self._file is None:
            return
        lines = []
        while self._queue:
            lines.append(_line(*self._queue.popleft()))
        if lines:
            self._file.write("".join(lines))
            self._file.flush()

    def flush(self) -> None:
        """Return when every line so far is in the file, as a checkpoint needs it."""
        with self._writing:
            self._drain()

    def close(self) -> None:
        """Write what is left."""
        self._closing.set()
        if self._thread is not None:
            self._thread.join()
        if self._file is not None:
            self._drain()
            self._file.close()


def _cut(path: Path, start: int) -> None:
    """Drop the lines of steps that will be done again, and a torn last line."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if json.loads(line)["step"] < start:
                kept.append(line)
        except (ValueError, KeyError, TypeError):
            break
    path.write_text("".join(kept), encoding="utf-8")


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a torn last line is left out."""
    lines = []
    if path.exists():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                lines.append(json.loads(line))
            except ValueError:
                break
    return lines
