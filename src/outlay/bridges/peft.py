"""PEFT: its adapters as the method `peft(type=...)`, and its folders read and written."""

from __future__ import annotations

from .peft_load import load_adapter
from .peft_save import save_adapter

__all__ = ["load_adapter", "save_adapter"]
