"""Packaged models and data, found where they are installed. Nothing is downloaded."""

from __future__ import annotations

from .catalogue import Asset, available, model_folder, names, rows

__all__ = ["Asset", "available", "model_folder", "names", "rows"]
