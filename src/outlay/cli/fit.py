"""`fit`: an estimator on features that lie in a file."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from ..core.errors import ConfigError, DataError
from . import screen
from .inputs import free_place
from .options import AsJson, Debug, Force, Quiet
from .predict import as_jsonl, write_whole
from .progress import progress_for

Call = Annotated[
    str,
    typer.Argument(
        metavar="NAME", help="An estimator, as \"nearest_class_mean(metric='cosine')\"."
    ),
]
Data = Annotated[
    Path,
    typer.Option("--data", help="Features: .parquet, .csv, .jsonl or .npz.", show_default=False),
]
Target = Annotated[
    str,
    typer.Option("--target", help="Column or array that holds the classes.", show_default=False),
]
Columns = Annotated[
    Optional[str],  # noqa: UP045 - evaluated by Typer
    typer.Option("--features", help="Columns that are features, as a,b,c; all others by default."),
]
Test = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--test", help="Rows to measure on, in place of a share of --data."),
]
Share = Annotated[
    float, typer.Option("--test-share", min=0.0, max=0.9, help="Share of the rows held out.")
]
New = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--predict", metavar="FILE", help="Rows to predict; needs --out."),
]
Place = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", metavar="DIR", help="Folder that the fitted estimator goes to."),
]
Seed = Annotated[int, typer.Option(help="Decides which rows are held out.")]


def fit(
    name: Call,
    data: Data,
    target: Target,
    features: Columns = None,
    test: Test = None,
    test_share: Share = 0.2,
    predict: New = None,
    out: Place = None,
    seed: Seed = 0,
    force: Force = False,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Fit an estimator on features in a file, measure it on rows held out, and keep it.

    The estimator that is kept is the one that was measured; `--test-share 0` fits all rows.
    """
    if out is not None:
        free_place(out, force)
    if predict is not None and out is None:
        raise ConfigError("--predict needs a place for its rows", "give --out DIR as well")
    estimator = feature_estimator(name)
    columns = tuple(c.strip() for c in features.split(",")) if features else ()
    with progress_for(quiet).waiting("fitting"):
        answer = _fitted(estimator, data, target, columns, test, test_share, seed)
        new = _new_rows(estimator, predict, target, answer["columns"]) if predict else []
    if out is not None:
        answer["out"] = str(estimator.save(out, overwrite=force))
        if predict is not None:
            write_whole(out / "predictions.jsonl", as_jsonl(new))
            answer["predictions"] = str(out / "predictions.jsonl")
    if as_json:
        screen.put_json(answer)
    elif not quiet:
        screen.console().print(screen.facts(_shown(answer)))


def _shown(answer: dict[str, Any]) -> list[tuple[str, Any]]:
    """The answer for people."""
    rows = []
    for key, value in answer.items():
        if key == "columns":
            continue
        if isinstance(value, dict):
            value = ", ".join(f"{name}={entry}" for name, entry in value.items())
        elif isinstance(value, list):
            value = ", ".join(map(str, value[:12])) + (", ..." if len(value) > 12 else "")
        elif isinstance(value, float):
            value = screen.amount(value)
        rows.append((key.replace("_", " "), value))
    return rows


def feature_estimator(call: str) -> Any:
    """The estimator of a call string.

    Raises:
        ConfigError: If it is unknown, or does not fit on features by itself.
    """
    from ..core import callspec, registry

    entry = registry.find(callspec.parse(call)[0])
    cls: Any = entry.load()
    if entry.kind != "estimator" or not hasattr(cls, "save"):
        fitting = [
            key for key, e in registry.entries().items()
            if e.kind == "estimator" and hasattr(e.load(), "save")
        ]  # fmt: skip
        raise ConfigError(
            f"{entry.card.name!r} is not fitted on a file of features",
            f"give one of {', '.join(fitting)}",
        )
    return registry.build(call)


def _fitted(
    estimator: Any, data: Path, target: str, columns: tuple[str, ...], test: Path | None,
    share: float, seed: int,
) -> dict[str, Any]:  # fmt: skip
    import numpy as np

    from ..training.data.features import read_features
    from ..training.data.splits import stratified

    table = read_features(data, target, names=columns)
    features, labels = table.features, table.labels
    assert labels is not None
    held_out: tuple[Any, Any] | None = None
    if test is not None:
        other = read_features(test, target, names=table.names)
        held_out = other.features, other.labels
    elif share > 0:
        count = max(1, round(share * len(features)))
        if count >= len(features):
            raise DataError(
                f"{len(features)} rows leave none to fit on", "give more rows or --test-share 0"
            )
        chosen = np.zeros(len(features), dtype=bool)
        chosen[sorted(stratified(labels.tolist(), count, seed, "test"))] = True
        held_out = features[chosen], labels[chosen]
        features, labels = features[~chosen], labels[~chosen]
    started = time.perf_counter()
    estimator.fit(features, labels)
    seconds = time.perf_counter() - started
    accuracy = None if held_out is None else float(estimator.score(*held_out))
    return {
        "estimator": estimator.card.name,
        "settings": estimator.get_params(),
        "rows": len(features),
        "features": int(features.shape[1]),
        "classes": [label.item() for label in estimator.classes_],
        "zero_rows": estimator.zero_rows_,
        "bytes": estimator.num_bytes(),
        "seconds": seconds,
        "test_rows": 0 if held_out is None else len(held_out[0]),
        "test_accuracy": accuracy,
        "columns": list(table.names),
    }


def _new_rows(estimator: Any, place: Path, target: str, columns: list[str]) -> list[dict[str, Any]]:
    from ..training.data.features import read_features

    features = read_features(place, target, labeled=False, names=tuple(columns)).features
    names = [str(label) for label in estimator.classes_]
    return [
        {"prediction": label.item(), "probabilities": dict(zip(names, row.tolist()))}
        for label, row in zip(estimator.predict(features), estimator.predict_proba(features))
    ]
