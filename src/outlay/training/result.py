"""What a run left: metrics, meter and where everything lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass
class Result:
    """What a run left.

    Attributes:
        run: Name of the run's folder.
        folder: Its path.
        metrics: Values by `split/metric`.
        meter: Everything that was counted.
        weights_sha256: Digest of the trained weights, before merging.
        seconds: Wall-clock of this call.
        status: "done", "stopped" or "failed".
        seed: The run's seed.
        notes: Sentences that a reader of the result should see.
    """

    run: str
    folder: str
    metrics: dict[str, float]
    meter: dict[str, Any]
    weights_sha256: str
    seconds: float
    status: str
    seed: int = 0
    notes: list[str] = field(default_factory=list)

    @property
    def curves(self) -> list[dict[str, Any]]:
        """Lines of metrics.jsonl."""
        from .log import read

        return read(Path(self.folder) / "metrics.jsonl")
