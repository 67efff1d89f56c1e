"""`bench prefill`: what packing gives on prompts of one's own."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from ..core.errors import ConfigError, DataError
from . import screen
from .options import AsJson, Debug, Device, Quiet, Threads
from .progress import progress_for

if TYPE_CHECKING:
    from ..comparison.prefills import Prefills

ModelName = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="A transformers folder, a packaged model, or llama or gpt2 with random weights.",
    ),
]
Prompts = Annotated[
    Path, typer.Option("--data", help="Prompts: .jsonl, .csv or .txt.", show_default=False)
]
Column = Annotated[
    Optional[str],  # noqa: UP045 - evaluated by Typer
    typer.Option("--text", help="Column of the prompts; the only one, prompt or text by default."),
]
BatchSize = Annotated[int, typer.Option(min=1, help="Prompts of one batch.")]
Longest = Annotated[int, typer.Option("--length", min=2, help="Longer prompts are cut, in tokens.")]
Limit = Annotated[int, typer.Option(min=1, help="Prompts that are measured, the first ones.")]
Repeats = Annotated[int, typer.Option(min=1, help="Rounds that are kept; one more is thrown away.")]
SCRATCH = ("llama", "gpt2")
LABELS = {
    "padded": "padded batches",
    "sorted": "sorted by length, padded",
    "packed": "packed, one cache",
    "packed list": "packed, a cache a prompt",
    "one by one": "one at a time",
}


def prefill(
    model: ModelName,
    data: Prompts,
    text: Column = None,
    batch_size: BatchSize = 64,
    length: Longest = 1024,
    limit: Limit = 256,
    repeats: Repeats = 5,
    device: Device = "auto",
    threads: Threads = None,
    as_json: AsJson = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure what packing gives when prompts are prefilled: time, tokens, memory, exactness.

    The same prompts are read into key-value caches in padded batches, in batches sorted by
    length, packed into dense rows, and one at a time, in turn.
    """
    with progress_for(quiet).waiting("prefilling in turn"):
        import torch

        from ..comparison.prefills import measure_prefill
        from ..training.backend import OneDevice

        if threads is not None:
            torch.set_num_threads(threads)
        backend = OneDevice(device)
        texts = _texts(data, text)[:limit]
        network, tokenizer = _model(model, length)
        prompts = [tokenizer(t, truncation=True, max_length=length)["input_ids"] for t in texts]
        # A prompt of one token is generation's first step already.
        kept = [prompt for prompt in prompts if len(prompt) > 1]
        if not kept:
            raise DataError(f"{str(data)!r} holds no prompt of two tokens", "give longer prompts")
        found = measure_prefill(backend.place(network).eval(), kept, batch_size, repeats)
    if as_json:
        screen.put_json({"model": model, "left_out": len(prompts) - len(kept), **found.to_json()})
    elif not quiet:
        _show(found)


def _texts(data: Path, column: str | None) -> list[str]:
    from ..training.data.readers import read_table

    table = read_table(data)
    names = table.columns
    if column is None:
        usual = [name for name in ("prompt", "text") if name in names]
        column = names[0] if len(names) == 1 else (usual or [None])[0]
    if column is None or column not in names:
        raise ConfigError(
            f"{str(data)!r} has no column {column or 'prompt'!r}",
            f"name one of {', '.join(names)} with --text",
        )
    for number, row in enumerate(table.rows):
        if not isinstance(row.get(column), str):
            raise DataError(f"{table.where(number)}: {column!r} is no text", "give a string")
    return [row[column] for row in table.rows]


def _model(name: str, length: int) -> Any:
    from .. import assets
    from ..training.models.load import load_model
    from ..training.specs import ModelSpec

    if name in SCRATCH:
        spec = ModelSpec(config=name)
    elif name in assets.names("model"):
        spec = ModelSpec(asset=name)
    else:
        spec = ModelSpec(path=name)
    return load_model(spec, "causal-language-modeling", length=length)


def _show(found: Prefills) -> None:
    out = screen.console()
    whole = found.to_json()["arms"]
    out.print(
        f"{found.prompts:,} prompts of {found.tokens:,} tokens, the longest {found.longest:,}; "
        f"{found.batch_size} a batch",
        markup=False,
        highlight=False,
    )
    columns = ("prefill", "ms a prompt", "speed-up", "tokens computed", "peak memory", "cache",
               "logits differ")  # fmt: skip
    rows = [
        (LABELS[name], f"{1e3 * arm['seconds_per_prompt']:.2f}", f"{arm['speedup']:.2f}x",
         f"{arm['computed_tokens']:,}", screen.amount_bytes(arm["peak_bytes"]),
         screen.amount_bytes(arm["cache_bytes"]), f"{arm['logits_gap']:.1e}")
        for name, arm in whole.items()
    ]  # fmt: skip
    out.print(screen.table("", columns, rows, right=columns[1:]))
    best = min(("packed", "packed list"), key=lambda name: whole[name]["seconds_per_prompt"])
    rival = min(("sorted", "one by one"), key=lambda name: whole[name]["seconds_per_prompt"])
    gain = whole[rival]["seconds_per_prompt"] / whole[best]["seconds_per_prompt"]
    out.print(
        f"{LABELS[best].capitalize()}: {whole[best]['speedup']:.2f} times as fast as padded "
        f"batches, {gain:.2f} times as fast as {LABELS[rival]}. Peak memory leaves weights and "
        "the returned cache out.",
        markup=False,
        highlight=False,
    )
