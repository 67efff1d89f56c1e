"""The report: one HTML file that opens from disk without a request, and its records.

The same function serves one run and many. Curves are thinned for drawing; `results.parquet`
holds every point.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from .formats import MISSING, counted, listed, significant
from .page import charts
from .page.curves import drawn_curves
from .page.heat_map import matrices_of
from .page.meters import meter_means, meter_text, varies
from .page.records import markdown, write_points, write_runs
from .page.report_data import ReportData, completed
from .page.tables import (
    Table,
    arms_table,
    group_letters,
    pairs_table,
    runs_table,
    settings_table,
    sorted_arms,
)

COLORS = 8
"""Colors in the palette; from the ninth arm on they repeat with another dash and marker."""


def write_report(
    data: ReportData | Mapping[str, Any], folder: Path | str, records: bool = True
) -> Path:
    """Write `report.html`, `report.md`, `report.json`, `results.parquet` and `metrics.jsonl`.

    Each file is replaced as a whole, so a reader never meets half of one.

    Args:
        data: See `report_data.ReportData`.
        folder: Made if it is not there.
        records: False leaves `results.parquet` and `metrics.jsonl` alone, for a run's folder
            where the run keeps a log of its own under the second name.

    Returns:
        Path of `report.html`.

    Raises:
        ConfigError: If the data lacks something or is malformed; nothing is written then.
    """
    whole = completed(data)
    meters = meter_means(whole)
    if not whole["sentence"]:
        whole["sentence"] = _description(whole)
    page = _page(whole, meters, drawn_curves(data["runs"], [a["name"] for a in whole["arms"]]))
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if records:
        _replace(folder / "results.parquet", lambda path: write_points(data["runs"], path))
        _replace(folder / "metrics.jsonl", lambda path: write_runs(whole["runs"], path))
    twin = json.dumps(whole, ensure_ascii=False, indent=1, allow_nan=False)
    _replace(folder / "report.json", lambda path: path.write_text(twin + "\n", encoding="utf-8"))
    text = markdown(whole, meters)
    _replace(folder / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    _replace(folder / "report.html", lambda path: path.write_text(page, encoding="utf-8"))
    return folder / "report.html"


def _description(whole: Mapping[str, Any]) -> str:
    """Headline where nothing was judged: what was measured."""
    if len(whole["arms"]) > 1:
        return f"{counted(len(whole['arms']), 'arm')}, not compared with one another."
    arm = whole["arms"][0]
    if arm["mean"] is None:
        return f"{arm['name']}: no run finished."
    over = f", mean of {arm['seeds']} seeds" if arm["seeds"] > 1 else ""
    return f"{arm['name']} reaches {significant(arm['mean'])} {whole['metric']}{over}."


def _page(
    whole: dict[str, Any], meters: Mapping[str, Mapping[str, float]], drawn: dict[str, Any]
) -> str:
    names = [arm["name"] for arm in whole["arms"]]
    numbered = [arm | {"number": number} for number, arm in enumerate(whole["arms"])]
    tables: dict[str, Table] = {"arms": arms_table(whole, meters)}
    if whole["pairs"]:
        tables["differences"] = pairs_table(whole)
    tables["runs"] = runs_table(whole, meters)
    settings = settings_table(whole["recipes"])
    if settings:
        tables["settings"] = settings
    costs = [
        {"key": key, "label": meter_text(key).label, "figures": figures}
        for key, amounts in meters.items()
        if len(names) > 1 and varies(amounts, names)
        and (figures := _pareto_figures(numbered, amounts, key, whole["higher_is_better"]))
    ]  # fmt: skip
    payload = {
        "curves": drawn,
        "arms": names,
        "xLabels": {"step": "Steps"} | {key: meter_text(key).label for key in drawn["meters"][1:]},
        "tables": {key: table.records() for key, table in tables.items()},
        "command": whole["command"],
    }
    scripts = [Markup(_asset("uplot/uPlot.iife.min.js")), Markup(_asset("report.js"))]
    return _environment().get_template("report.html").render(
        data=whole, tables=tables, names=names, numbers={n: i for i, n in enumerate(names)},
        groups=group_letters(whole), arms=sorted_arms(whole), costs=costs,
        matrices=[Markup(figure) for figure in matrices_of(whole)],
        forest=_forest_figures(whole), curves=drawn, lines=charts.lines(drawn, charts.WIDE),
        equal=[
            {"label": text.label, "explanation": text.explanation, "key": key,
             "value": next(iter(meters[key].values())),
             "text": text.write(next(iter(meters[key].values())))}
            for key in meters
            if len(names) == 1 or not varies(meters[key], names)
            for text in [meter_text(key)]
        ],
        margin=significant(whole["margin"]) if whole["margin"] else "",
        level=f"{100 * (1 - whole['alpha']):g}%", seeds=_seed_text(whole),
        payload=Markup(_inlined(payload)), scripts=scripts, styles=[
            Markup(_asset("uplot/uPlot.min.css")), Markup(_asset("report.css"))],
        licence=Markup(_asset("uplot/LICENSE").replace("--", "- -")),
        policy=_policy(scripts), colors=COLORS,
    )  # fmt: skip


def _pareto_figures(
    arms: list[dict[str, Any]], amounts: Mapping[str, float], key: str, higher: bool
) -> list[dict[str, Any]]:
    made = [
        charts.pareto(arms, amounts, meter_text(key), higher, width)
        for width in (charts.WIDE, charts.NARROW)
    ]
    return [figure for figure in made if figure]


def _forest_figures(whole: Mapping[str, Any]) -> list[dict[str, Any]]:
    if not any(pair.get("difference") is not None for pair in whole["pairs"]):
        return []
    return [
        charts.forest(whole["pairs"], whole["margin"], whole["higher_is_better"], width)
        for width in (charts.WIDE, charts.NARROW)
    ]


def _seed_text(whole: Mapping[str, Any]) -> str:
    counts = sorted({arm["seeds"] for arm in whole["arms"]})
    if counts[0] == counts[-1]:
        return counted(counts[0], "seed")
    return f"{counts[0]} to {counts[-1]} seeds"


def _inlined(payload: Any) -> str:
    """JSON that no character of can end the script element or a line of it."""
    text = json.dumps(payload, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _policy(scripts: list[Markup]) -> str:
    """Content security policy: these two scripts, no request, nothing else."""
    hashes = [
        base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts
    ]
    allowed = " ".join(f"'sha256-{value}'" for value in hashes)
    return (
        f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


@lru_cache(maxsize=8)
def _asset(name: str) -> str:
    return (resources.files("outlay.comparison.page") / "assets" / name).read_text(encoding="utf-8")


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = Environment(
        loader=PackageLoader("outlay.comparison.page", "assets"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"listed": listed, "exact": _exact}
    return environment


def _exact(value: Any) -> str:
    """A value at full precision, for the hover text of a cell."""
    if value is None:
        return MISSING
    if isinstance(value, float):
        return f"{int(value):,}" if value.is_integer() and abs(value) < 1e15 else repr(value)
    if isinstance(value, int):
        return f"{value:,}"
    if isinstance(value, list):
        return " to ".join(_exact(entry) for entry in value)
    return str(value)


def _replace(path: Path, write: Any) -> None:
    """Write beside the file, then rename over it."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    try:
        write(Path(name))
        os.chmod(name, 0o644)
        os.replace(name, path)
    except BaseException:
        os.unlink(name)
        raise
