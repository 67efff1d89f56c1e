"""From finished runs on disk to what a report is made from."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..core.errors import ConfigError

if TYPE_CHECKING:
    from ..training.recipe import Recipe
    from ..training.result import Result

_COUNTED = ("tokens", "flops", "seconds")


def read_result(folder: Path) -> Result:
    """What a finished run recorded.

    Raises:
        ConfigError: If it is not finished, or its record is damaged.
    """
    from ..training.result import Result

    try:
        return Result(**json.loads((folder / "result.json").read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise ConfigError(
            f"run {str(folder)!r} is not finished",
            f"go on with `{shlex.join(['outlay', 'run', '--resume', str(folder)])}`",
        ) from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{str(folder / 'result.json')!r} cannot be read ({type(error).__name__})",
            "run it again in another --out",
        ) from None


def curves(result: Result) -> dict[str, list[list[Any]]]:
    """Curves by name: points of step, tokens, FLOPs, seconds and value."""
    from ..comparison.page.heat_map import ENTRY

    found: dict[str, list[list[Any]]] = {}
    place: list[Any] = [None, None, None]
    for line in result.curves:
        if all(key in line for key in _COUNTED):
            place = [line[key] for key in _COUNTED]
        for key, value in line.items():
            plain = isinstance(value, (int, float)) and key not in ("step", "lr", *_COUNTED)
            # An entry of the matrix of tasks is one number and no curve.
            if plain and key not in ("examples",) and not ENTRY.fullmatch(key):
                found.setdefault(key, []).append([line["step"], *place, value])
    return found


def run_data(result: Result, arm: str) -> dict[str, Any]:
    """One run of a report."""
    return {
        "arm": arm, "seed": result.seed, "status": result.status, "metrics": result.metrics,
        "meter": {k: v for k, v in result.meter.items() if isinstance(v, (int, float))},
        "curves": curves(result),
    }  # fmt: skip


def report_of_run(result: Result, recipe: Recipe) -> dict[str, Any]:
    """What `write_report` needs for one run."""
    return report_of_runs([Loaded(Path(result.folder), result, recipe)], title=recipe.name)


@dataclass(frozen=True)
class Loaded:
    """A finished run, read from its folder.

    Attributes:
        folder: Where it lies.
        result: What it recorded.
        recipe: What was run.
    """

    folder: Path
    result: Result
    recipe: Recipe


def load(folder: Path) -> Loaded:
    """Read a finished run.

    Raises:
        ConfigError: If it is not finished or its files are damaged.
    """
    from ..training.recipe import Recipe

    return Loaded(folder, read_result(folder), Recipe.read(folder / "recipe.yaml"))


def arm_names(runs: Sequence[Loaded]) -> dict[Path, str]:
    """A name for each run: runs that differ in nothing but the seed share one."""
    keys: dict[Path, str] = {}
    bases: dict[str, str] = {}
    for run in runs:
        plain = run.recipe.resolved()
        base = re.sub(r"-seed\d+$", "", run.recipe.name)
        rest = {k: v for k, v in plain.items() if k not in ("seed", "name", "note")}
        keys[run.folder] = key = json.dumps([base, rest], sort_keys=True)
        bases[key] = base
    names: dict[str, str] = {}
    for key, base in bases.items():
        methods = json.loads(key)[1]["methods"]
        shared = [b for b in bases.values() if b == base]
        name = base if len(shared) == 1 else " + ".join(methods) or base
        again = sum(n == name or n.startswith(f"{name} (") for n in names.values())
        names[key] = f"{name} ({again + 1})" if again else name
    return {folder: names[key] for folder, key in keys.items()}


def report_of_runs(
    runs: Sequence[Loaded],
    *,
    title: str,
    metric: str | None = None,
    margin: float | None = None,
    command: str = "",
) -> dict[str, Any]:
    """What `write_report` needs for finished runs; arms that share seeds are judged.

    Args:
        runs: Finished runs.
        title: Heading.
        metric: `split/metric` that decides; the task's own on the test split by default.
        margin: Differences inside it are called equal.
        command: What to type to get it again.

    Raises:
        ConfigError: If they do not share a task, or the metric is not measured in all.
    """
    from ..comparison import machine
    from ..training.evaluate import main_metric

    tasks = sorted({run.recipe.task for run in runs})
    if len(tasks) > 1:
        raise ConfigError(
            f"these runs have different tasks: {', '.join(tasks)}", "report each task by itself"
        )
    name, _ = main_metric(tasks[0])
    measured = set.intersection(*(set(run.result.metrics) for run in runs))
    if metric is None:
        usual = (f"test/{name}", f"validation/{name}", *sorted(measured))
        metric = next((m for m in usual if m in measured), f"test/{name}")
    elif metric not in measured:
        raise ConfigError(
            f"metric {metric!r} is not measured in all of these runs",
            f"use one of {', '.join(sorted(measured)) or 'none'}",
        )
    higher = main_metric(tasks[0], metric.rpartition("/")[2])[1]
    arms = arm_names(runs)
    data: dict[str, Any] = {
        "title": title, "metric": metric, "higher_is_better": higher,
        "budget": _budgets(runs),
        "runs": [run_data(run.result, arms[run.folder]) for run in runs],
        "recipes": {arms[run.folder]: run.recipe.to_yaml() for run in reversed(runs)},
        "versions": machine.versions(), "hardware": machine.hardware(),
        "command": command or shlex.join(["outlay", "report", *(str(r.folder) for r in runs)]),
        "notes": sorted({run.recipe.note for run in runs} - {""}),
    }  # fmt: skip
    table = _table(runs, arms, metric)
    if len(table) > 1 and max(len(seeds) for seeds in table.values()) > 1:
        data = {**_judged(runs, arms, table, metric, higher, margin), **data}
    return data


def _budgets(runs: Sequence[Loaded]) -> str:
    texts = sorted({f"{r.recipe.budget} of {r.recipe.batch.size} examples" for r in runs})
    return " or ".join(texts)


def _table(
    runs: Sequence[Loaded], arms: Mapping[Path, str], metric: str
) -> dict[str, dict[int, float]]:
    table: dict[str, dict[int, float]] = {}
    for run in runs:
        seeds = table.setdefault(arms[run.folder], {})
        if run.result.seed in seeds:
            raise ConfigError(
                f"two runs of {arms[run.folder]!r} have the seed {run.result.seed}",
                "give each run once",
            )
        seeds[run.result.seed] = run.result.metrics[metric]
    return table


def _judged(
    runs: Sequence[Loaded],
    arms: Mapping[Path, str],
    table: Mapping[str, Mapping[int, float]],
    metric: str,
    higher: bool,
    margin: float | None,
) -> dict[str, Any]:
    from ..comparison.judge import judge

    spent = {
        arm: {
            unit: {r.result.seed: r.result.meter[unit] for r in runs if arms[r.folder] == arm}
            for unit in ("steps", "tokens")
        }
        for arm in table
    }
    trainable = {arms[r.folder]: r.result.meter.get("trainable_parameters") for r in runs}
    return judge(
        table, metric=metric, higher_is_better=higher, spent=spent, margin=margin,
        trainable={arm: int(n) if n is not None else None for arm, n in trainable.items()},
    )  # fmt: skip
