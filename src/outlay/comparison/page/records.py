"""What lies beside the page: every curve point as Parquet, runs as JSON lines, a Markdown twin."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..formats import between, listed, significant
from .curves import as_points
from .report_data import COLUMNS
from .tables import Table, arms_table, group_letters, pairs_table


def write_points(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write all curve points, unthinned: arm, seed, curve, step, tokens, flops, seconds, value.

    Args:
        runs: As `report_data.RunData`. A None in a point becomes a null.
        path: Of the Parquet file.
    """
    arms: list[str] = []
    seeds: list[int] = []
    names: list[str] = []
    blocks = [np.empty((0, len(COLUMNS)))]
    for run in runs:
        for name, curve in run.get("curves", {}).items():
            points = as_points(curve, f"curve {name!r} of {run['arm']}, seed {run['seed']}")
            arms += [run["arm"]] * len(points)
            seeds += [run["seed"]] * len(points)
            names += [name] * len(points)
            blocks.append(points)
    numbers = np.concatenate(blocks)
    columns: dict[str, Any] = {
        "arm": pa.array(arms, pa.string()).dictionary_encode(),
        "seed": pa.array(seeds, pa.int64()),
        "curve": pa.array(names, pa.string()).dictionary_encode(),
    }
    for number, column in enumerate(COLUMNS):
        columns[column] = pa.array(numbers[:, number], pa.float64(), from_pandas=True)
    pq.write_table(pa.table(columns), path, compression="zstd")


def write_runs(runs: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Write one JSON object a line and run, without its curves."""
    lines = [json.dumps(run, ensure_ascii=False, allow_nan=False) for run in runs]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def markdown(data: Mapping[str, Any], meters: Mapping[str, Mapping[str, float]]) -> str:
    """The report without its figures, for an issue or a README."""
    better = "higher" if data["higher_is_better"] else "lower"
    facts = [
        f"- Metric: {_plain(data['metric'])}, {better} is better",
        f"- Budget of each run: {_plain(data['budget'])}",
    ]
    if data["margin"]:
        facts.append(f"- Margin stated beforehand: {significant(data['margin'])}")
    parts = [f"# {_plain(data['title'])}", f"**{_plain(data['sentence'])}**", "\n".join(facts)]
    said = [*data["sentences"], *data["notes"]]
    if said:
        parts.append("\n".join(f"- {_plain(sentence)}" for sentence in said))
    parts += ["## Arms", _markdown_table(arms_table(data, meters))]
    groups = [f"- {letter}: {_plain(listed(names))}" for letter, names in group_letters(data)]
    if groups:
        parts += [
            "Arms in one group are not separated by these seeds; groups are not ranks:",
            "\n".join(groups),
        ]
    if data["pairs"]:
        parts += ["## Paired differences", _markdown_table(pairs_table(data))]
        level = f"{100 * (1 - data['alpha']):g}%"
        parts.append(
            f"Intervals are simultaneous {level} intervals over all pairs; a pair is separated "
            f"only if its Holm-adjusted paired-t p is below {data['alpha']:g}."
        )
    if data["verdicts"]:
        parts.append(
            "\n".join(
                f"- {_plain(v['better'])} is better than {_plain(v['worse'])}: "
                f"{between(v['interval'], plus=True)}"
                for v in data["verdicts"]
            )
        )
    origin = [f"- Hardware: {_plain(data['hardware'])}"] if data["hardware"] else []
    if data["versions"]:
        versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
        origin.append(f"- Versions: {_plain(versions)}")
    if origin:
        parts += ["## Where it ran", "\n".join(origin)]
    if data["command"]:
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", data["command"])), default=0))
        parts += ["## Repeat it", f"{fence}sh\n{data['command']}\n{fence}"]
    return "\n\n".join(parts) + "\n"


def _markdown_table(table: Table) -> str:
    head = [_plain(column.label) for column in table.columns]
    rule = ["--:" if column.numeric else "---" for column in table.columns]
    body = [[_plain(text) for _, _, text in row] for row in table.cells()]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])


def _plain(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no table breaks, no HTML."""
    text = " ".join(str(text).split())
    return re.sub(r"([\\`*\[\]<>|&~])|(?<!\w)(_)|(_)(?!\w)", r"\\\1\2\3", text)
