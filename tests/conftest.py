"""Shapes are checked in tests: jaxtyping annotations with beartype, before outlay is imported."""

from __future__ import annotations

import os

from jaxtyping import install_import_hook

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OUTLAY_OFFLINE", "1")
install_import_hook("outlay", "shape_check.check")

# Small tensors on shared cores: more threads only wait for each other.
import torch  # noqa: E402

torch.set_num_threads(1)
