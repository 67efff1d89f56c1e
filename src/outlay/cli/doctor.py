"""`doctor`: what is installed here, what is missing, and the line that brings it."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from typing import Any

import typer

from . import screen
from .options import AsJson, Debug, Quiet

_SWITCHES = ("OUTLAY_OFFLINE", "HF_HUB_OFFLINE")
_PLACES = ("OUTLAY_CACHE", "OUTLAY_ASSETS", "HF_HOME")
_THREADS = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "TOKENIZERS_PARALLELISM")


def doctor(as_json: AsJson = False, quiet: Quiet = False, debug: Debug = False) -> None:
    """Check the installation: versions, machine, extras, packaged models and data, folders.

    It is what an issue report needs: paste all of it, or the output of `--json`.
    """
    found = examine()
    if as_json:
        screen.put_json(found)
        return
    out = screen.console()
    out.print(
        screen.facts(
            [
                ("versions", ", ".join(f"{n} {v}" for n, v in found["versions"].items())),
                ("system", found["system"]),
                ("hardware", found["hardware"]),
                ("threads", found["threads_sentence"]),
                ("GPU", ", ".join(map(_gpu_line, found["gpus"])) or "none"),
                ("--device auto", found["device"]),
                ("offline", found["offline"]["sentence"]),
                *((f"{name} folder", place) for name, place in found["folders"].items()),
                ("methods", found["methods"]["sentence"]),
            ]
        )
    )
    for title, rows in (("Extras", found["extras"]), ("Packaged models and data", found["assets"])):
        cells = [
            (r["name"], "yes" if r["installed"] else "no", r["summary"],
             "" if r["installed"] else r["install"])
            for r in rows
        ]  # fmt: skip
        out.print(screen.table(title, ("name", "here", "what it is", "to install"), cells))
    if not quiet:
        missing = [r["name"] for r in found["assets"] if not r["installed"]]
        typer.echo("everything is here" if not missing else f"missing: {', '.join(missing)}")


def examine() -> dict[str, Any]:
    """Everything that doctor shows, as plain values."""
    import torch

    from .. import assets
    from ..assets.sources import cache_folder
    from ..comparison import machine
    from ..training.backend import OneDevice

    gpus = [
        {"name": torch.cuda.get_device_name(i),
         "memory_bytes": torch.cuda.get_device_properties(i).total_memory}
        for i in range(torch.cuda.device_count())
    ]  # fmt: skip
    if getattr(torch.backends, "mps", None) is not None and torch.backends.mps.is_available():
        gpus.append({"name": "Apple GPU (mps)", "memory_bytes": None})
    threads, cores = torch.get_num_threads(), _cores()
    told = [f"{name}={os.environ[name]}" for name in _THREADS if name in os.environ]
    set_here = [name for name in _SWITCHES if os.environ.get(name, "") not in ("", "0")]
    return {
        "versions": machine.versions(),
        "hardware": machine.hardware(),
        "system": f"{platform.platform()}, torch built for "
        + (f"CUDA {torch.version.cuda}" if torch.version.cuda else "CPU"),
        "cores": cores,
        "threads": threads,
        "threads_sentence": "; ".join([f"{threads} of {cores} cores", *told]),
        "device": str(OneDevice("auto").device),
        "memory_bytes": int(machine.memory_gib() * 2**30),
        "gpus": gpus,
        "offline": {
            "switches": set_here,
            "sentence": f"{', '.join(set_here)} set" if set_here
            else "nothing asks for it; nothing is looked for on a network anyway",
        },
        "folders": {
            "cache": str(cache_folder()),
            "runs": os.path.abspath("runs"),
            **{name: os.environ[name] for name in _PLACES if name in os.environ},
        },
        "methods": _methods(),
        "extras": extras(),
        "assets": [
            {"name": a.name, "kind": a.kind, "installed": a.installed, "package": a.package,
             "version": a.version, "path": str(a.path) if a.path else None, "licence": a.licence,
             "summary": a.summary, "install": a.install_line}
            for a in assets.available().values()
        ],
    }  # fmt: skip


def extras() -> list[dict[str, Any]]:
    """The optional dependencies by extra, from the package's own metadata."""
    from packaging.requirements import Requirement

    try:
        facts = importlib.metadata.metadata("outlay")
    except importlib.metadata.PackageNotFoundError:
        return []
    needed = [Requirement(text) for text in facts.get_all("Requires-Dist") or ()]
    rows = []
    for extra in sorted(facts.get_all("Provides-Extra") or ()):
        parts = [
            r for r in needed
            if r.marker and r.marker.evaluate({"extra": extra})
            and not r.marker.evaluate({"extra": ""})
        ]  # fmt: skip
        missing = [r.name for r in parts if not _here(r.name)]
        rows.append(
            {
                "name": extra,
                "installed": not missing,
                "summary": ", ".join(_with_version(r.name) for r in parts),
                "missing": missing,
                "install": f'pip install "outlay[{extra}]"',
            }
        )
    return rows


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _gpu_line(gpu: dict[str, Any]) -> str:
    memory = gpu["memory_bytes"]
    return gpu["name"] if memory is None else f"{gpu['name']}, {memory / 2**30:.0f} GiB"


def _with_version(package: str) -> str:
    try:
        return f"{package} {importlib.metadata.version(package)}"
    except importlib.metadata.PackageNotFoundError:
        return package


def _methods() -> dict[str, Any]:
    """How many methods there are, and which come from other packages; or what is wrong there."""
    from ..core import registry
    from ..core.errors import OutlayError

    try:
        known = registry.entries().values()
    except OutlayError as error:
        return {"known": None, "of_other_packages": [], "sentence": str(error)}
    foreign = [f"{e.card.name} ({e.module})" for e in known if not e.module.startswith("outlay.")]
    sentence = f"{len(known)}, of other packages: {', '.join(foreign) or 'none'}"
    return {"known": len(known), "of_other_packages": foreign, "sentence": sentence}


def _here(package: str) -> bool:
    try:
        importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return False
    return True
