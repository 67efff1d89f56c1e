"""Curves of a run as append-only JSON lines; trackers beside them behind one call."""

from __future__ import annotations

import contextlib
import json
import threading
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from ..core.errors import CheckpointError


@runtime_checkable
class Tracker(Protocol):
    """Anything with `log(dict, step)`: TensorBoard, MLflow, W&B, trackio."""

    def log(self, values: dict[str, Any], step: int) -> None:
        """Take one line."""
        ...


def _plain(value: Any) -> Any:
    """A number of torch or numpy as Python's own; anything else as text."""
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):
        return str(value)


def _line(step: int, values: dict[str, Any]) -> str:
    parts = [f'"step":{step}']
    for key, value in values.items():
        if not isinstance(value, (float, int, str, bool, type(None))):
            value = _plain(value)
        number = f"{value:.6g}" if isinstance(value, float) else json.dumps(value)
        if number in ("nan", "inf", "-inf"):
            number = "null"
        parts.append(f"{json.dumps(key)}:{number}")
    return "{" + ",".join(parts) + "}\n"


class Log:
    """Writes lines from a thread of its own, so that logging never waits for the disk.

    Trackers are called from another thread, so that a slow one holds up neither the loop nor the
    file. A tracker that raises is dropped with one warning line in the file; training goes on.

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
        self._told: deque[tuple[int, dict[str, Any]]] = deque()
        self._writing = threading.Lock()
        self._closing = threading.Event()
        self._failed: OSError | None = None
        self._file = None
        self._threads: list[threading.Thread] = []
        if path is not None:
            if start is not None and path.exists():
                _cut(path, start)
            self._file = path.open("a", encoding="utf-8")
            self._start(self._write)
        if self.trackers:
            self._start(self._relay)

    def _start(self, work: Callable[[], None]) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def log(self, values: dict[str, Any], step: int) -> None:
        """Append one line; returns at once."""
        if self._file is not None:
            self._queue.append((step, values))
        if self.trackers:
            self._told.append((step, values))

    def _write(self) -> None:
        while not self._closing.wait(0.2):
            with self._writing:
                self._drain()

    def _drain(self) -> None:
        if self._file is None or self._failed is not None:
            return
        lines = []
        while self._queue:
            lines.append(_line(*self._queue.popleft()))
        if lines:
            try:
                self._file.write("".join(lines))
                self._file.flush()
            except OSError as error:
                self._failed = error

    def _relay(self) -> None:
        while not (self._closing.wait(0.05) and not self._told):
            while self._told and self.trackers:
                step, values = self._told.popleft()
                for tracker in list(self.trackers):
                    try:
                        tracker.log(values, step)
                    except Exception as error:
                        self.trackers.remove(tracker)
                        note = f"{type(error).__name__}: {error}"
                        self._queue.append((step, {"tracker_failed": note}))
            if not self.trackers:
                return

    def flush(self) -> None:
        """Return when every line so far is in the file, as a checkpoint needs it.

        Raises:
            CheckpointError: If the file cannot be written.
        """
        with self._writing:
            self._drain()
        if self._failed is not None:
            raise CheckpointError(
                f"cannot write metrics: {self._failed.strerror or self._failed}",
                "free space on the disk and run the same command: it goes on",
            )

    def close(self, patience: float = 5.0) -> None:
        """Write what is left; a tracker gets `patience` seconds to finish."""
        self._closing.set()
        for thread in self._threads:
            thread.join(patience)
        if self._file is not None:
            with self._writing:
                self._drain()
            # A full disk was said by `flush`; closing must not hide another error.
            with contextlib.suppress(OSError):
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
    spare = path.with_name(f".{path.name}.part")
    spare.write_text("".join(kept), encoding="utf-8")
    spare.replace(path)


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
