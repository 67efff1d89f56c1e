"""A run's curves in TensorBoard, MLflow, Weights & Biases or trackio, beside its own files.

Each is one small class with `log(values, step)`. None is required, a run never depends on one, and
one that fails while it logs is left out by the log with a note (`training.log.Log`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from ..core.errors import ConfigError, nearest


class TensorBoard:
    """Event files in the run's own folder; look at them with `tensorboard --logdir runs`."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        import_module("tensorboard")
        self.writer = import_module("torch.utils.tensorboard").SummaryWriter(
            str(folder / "tensorboard")
        )
        self.writer.add_text("recipe", _as_table(settings), 0)

    def log(self, values: dict[str, Any], step: int) -> None:
        """One scalar a name."""
        for name, value in _numbers(values).items():
            self.writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what is left."""
        self.writer.close()


class MLflow:
    """A run of the experiment `project`, at the tracking address that MLflow is set to."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        self.mlflow = import_module("mlflow")
        self.mlflow.set_experiment(project)
        self.client = self.mlflow.start_run(run_name=folder.name)
        self.mlflow.log_params({name: str(value)[:500] for name, value in settings.items()})

    def log(self, values: dict[str, Any], step: int) -> None:
        """One call a line."""
        self.mlflow.log_metrics(_numbers(values), step=step, run_id=self.client.info.run_id)

    def close(self) -> None:
        """Mark the run as finished."""
        self.mlflow.end_run()


class WeightsAndBiases:
    """A run of the project; its files lie in the run's folder (`wandb offline` is respected)."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.run = import_module("wandb").init(
            project=project, name=folder.name, dir=str(folder), config=dict(settings)
        )

    def log(self, values: dict[str, Any], step: int) -> None:
        """One call a line."""
        self.run.log(_numbers(values), step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self.run.finish()


class Trackio:
    """A run of the project in trackio's local database."""

    def __init__(self, folder: Path, project: str, settings: Mapping[str, Any]) -> None:
        self.run = import_module("trackio").init(
            project=project, name=folder.name, config=dict(settings), embed=False
        )

    def log(self, values: dict[str, Any], step: int) -> None:
        """One call a line."""
        self.run.log(_numbers(values), step=step)

    def close(self) -> None:
        """Mark the run as finished."""
        self.run.finish()


TRACKERS: dict[str, tuple[Callable[..., Any], str]] = {
    "tensorboard": (TensorBoard, "tensorboard"),
    "mlflow": (MLflow, "mlflow"),
    "wandb": (WeightsAndBiases, "wandb"),
    "trackio": (Trackio, "trackio"),
}


@contextlib.contextmanager
def tracking(
    names: Sequence[str],
    folder: Path,
    project: str,
    settings: Mapping[str, Any],
    note: Callable[[str], None],
) -> Iterator[list[Any]]:
    """Trackers by name, closed at the end.

    Args:
        names: "tensorboard", "mlflow", "wandb", "trackio".
        folder: The run's folder; its name is the run's.
        project: Recipe's name.
        settings: The resolved recipe; nested fields become dotted names.
        note: Is told of a tracker that does not open or close; the run goes on without it.

    Raises:
        ConfigError: If a name is unknown or its package is not installed.
    """  # fmt: skip
    opened: list[Any] = []
    for name in dict.fromkeys(names):
        if name not in TRACKERS:
            raise ConfigError(
                f"unknown tracker {name!r}",
                f"{nearest(name, TRACKERS)}known: {', '.join(TRACKERS)}",
            )
        make, package = TRACKERS[name]
        try:
            opened.append(make(folder, project, dotted(settings)))
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"tracker {name!r} needs the package {error.name or package!r}",
                f"pip install {package}",
            ) from None
        except Exception as error:
            note(f"{name} does not open ({type(error).__name__}: {error}); going on without it")
    try:
        yield opened
    finally:
        for tracker in opened:
            try:
                tracker.close()
            except Exception as error:
                note(f"{type(tracker).__name__} did not close ({type(error).__name__}: {error})")


def dotted(settings: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Nested fields by dotted name: `{"optimizer.lr": 0.001}`."""
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        if isinstance(value, Mapping):
            flat |= dotted(value, f"{path}{name}.")
        else:
            flat[f"{path}{name}"] = value
    return flat


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {
        name: float(value)
        for name, value in values.items()
        if isinstance(value, (int, float)) or hasattr(value, "item")
    }


def _as_table(settings: Mapping[str, Any]) -> str:
    rows = [f"| {name} | `{value}` |" for name, value in settings.items()]
    return "\n".join(["| setting | value |", "|---|---|", *rows])
