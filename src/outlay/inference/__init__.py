"""Functions on finished models: packed prefill, packed scoring, packed batches for any loop.

Names resolve when they are used, so importing this room imports no torch.
"""

from __future__ import annotations

from typing import Any

_HOMES = {
    "PackedBatch": "packing",
    "PackedCollator": "collator",
    "Prefilled": "prefill",
    "check_isolation": "isolation",
    "isolated": "isolation",
    "pack": "bins",
    "packed_nll": "nll",
    "prefill_packed": "prefill",
    "prepack": "packing",
    "segment_attention": "attention",
    "segment_mask": "attention",
    "unpack_cache": "prefill",
}
__all__ = sorted(_HOMES)  # pyright: ignore[reportUnsupportedDunderAll]


def __getattr__(name: str) -> Any:
    import importlib

    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return list(__all__)
